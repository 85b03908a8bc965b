/**
 * Sequence parallelism over the CUDA devices of this machine against one of them, with the bandwidth between two, what one rank sends,
 * the prediction of the virtual clock, what the ranks take without a link between them, and the error beside each time.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-distributed.mjs OUTPUT_FOLDER [--ranks 4] [--tokens 16384,65536,262144]
 *
 * On one device all ranks share it: the times then say what dividing costs, not what it gains. Writes `distributed.json` there.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { copyPeer, reachPeer } from '../../src/backends/cuda/driver/copy.ts';
import { CudaBackend, type CudaDevice, type CudaTensor } from '../../src/backends/cuda/index.ts';
import { createDeviceGroup, type ShardedTensor, sageattnSharded, type Topology } from '../../src/distributed/index.ts';
import { predict, type Rates, shapeOf } from '../../src/distributed/predict.ts';
import { scheduleOf, sentBytes } from '../../src/distributed/schedule.ts';
import { spansOf, type TokenOrder } from '../../src/distributed/shards.ts';
import { sageattn, setBackend } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { median } from '../../src/measure/statistics.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import type { Shape } from './inputs.ts';
import { errorOf, exactRows, hostInputs, partOf, type Triple, uploadBits } from './sharded-inputs.ts';
import { copyBandwidth, nvidiaSmi, tflops } from './workbench.ts';

const [HEADS, DIM] = [32, 128] as const;
/** Rows of the output that are compared with exact ones; fewer where one takes long. */
const comparedRows = (tokens: number) => (tokens > 100_000 ? 6 : 24);
/** Short calls need more before the host's code is compiled and the clocks are up. */
const repetitionsOf = (tokens: number): [warmUp: number, timed: number] =>
  tokens > 100_000 ? [1, 2] : tokens > 30_000 ? [6, 7] : [40, 15];
const WIRE = { query: 2, keyValue: 1 } as const;

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { ranks: { type: 'string' }, tokens: { type: 'string', default: '16384,65536,262144' } },
});
const folder = positionals[0] ?? '.';

const backend = new CudaBackend();
await setBackend(backend);
const cuda = await backend.cuda();
const ranks = Number(flags.ranks ?? Math.max(2, cuda.deviceCount));
const devices = Array.from({ length: ranks }, (_, rank) => rank % cuda.deviceCount);
const used = [...new Set(devices)].map((ordinal) => cuda.device(ordinal));
const first = used[0] as CudaDevice;
const seed = runSeed();
const random = new Random(seed);
console.log(`SAGEATTENTION_SEED=${seed}; ${ranks} ranks on ${used.length} devices`);

/** Bytes a second from the second device to the first, one way and both ways at once. */
function peerBandwidth([one, other]: readonly CudaDevice[]):
  | { peer: boolean; oneWay: number; bothWays: number }
  | undefined {
  if (one === undefined || other === undefined) return undefined;
  const bytes = 2 ** 28;
  using here = one.allocate(bytes);
  using there = other.allocate(bytes);
  using back = one.allocate(bytes);
  using target = other.allocate(bytes);
  const peer = reachPeer(one, other);
  const oneWay = timeOnDevice(one, () => copyPeer(there, here, bytes, one.stream));
  const bothWays = timeOnDevice(one, () => {
    copyPeer(there, here, bytes, one.stream);
    copyPeer(back, target, bytes, other.stream);
    one.stream.waitFor(other.stream);
  });
  return { peer, oneWay: bytes / (oneWay / 1000), bothWays: (2 * bytes) / (bothWays / 1000) };
}

/** What connects the devices, as nvidia-smi draws it. */
const links = spawnSync('nvidia-smi', ['topo', '-m'], { encoding: 'utf8' }).stdout ?? '';

/** Milliseconds from the call until every device has ended, and until the host has enqueued it. */
async function wallTime(call: () => Promise<{ dispose(): void }>, [warmUp, timed]: [number, number]) {
  const once = async () => {
    const start = performance.now();
    const made = await call();
    const enqueued = performance.now() - start;
    for (const device of used) device.stream.synchronize();
    const taken = performance.now() - start;
    made.dispose();
    return { enqueued, taken };
  };
  for (let i = 0; i < warmUp; i++) await once();
  const times: Awaited<ReturnType<typeof once>>[] = [];
  for (let i = 0; i < timed; i++) times.push(await once());
  return {
    milliseconds: median(times.map(({ taken }) => taken)),
    hostMilliseconds: median(times.map(({ enqueued }) => enqueued)),
  };
}

interface Row extends Topology {
  readonly tokens: number;
  readonly isCausal: boolean;
  /** Until the last device has its output. */
  readonly milliseconds: number;
  /** Until the host has enqueued a call; the devices work meanwhile. */
  readonly hostMilliseconds: number;
  readonly tflops: number;
  readonly oneDevice: { readonly milliseconds: number; readonly relativeL1: number };
  readonly relativeL1: number;
  readonly sentBytes: number;
  readonly predictedMilliseconds: number | undefined;
  /** A rank's share of the same ring on one device, where nothing crosses a link: what overlap leaves over is the difference. */
  readonly aloneMilliseconds: number | undefined;
}

const peers = peerBandwidth(used);
const memory = copyBandwidth(first);
const rows: Row[] = [];

function ratesOf(shape: Shape, milliseconds: number): Rates | undefined {
  if (used.length !== ranks || peers === undefined) return undefined;
  return { attention: tflops(shape, milliseconds) * 1e12, memory, link: peers.bothWays / 2, latency: 1e-5 };
}

/** A sharded call of a group on these devices: its times, and the error of its rows. */
async function timeSharded(
  on: readonly number[],
  whole: Triple<CudaTensor>,
  shape: Shape,
  topology: Topology,
  exact: ReturnType<typeof exactRows> | undefined,
) {
  const { tokens, isCausal } = shape;
  const order: TokenOrder = isCausal ? 'zigzag' : 'contiguous';
  const group = await createDeviceGroup({ devices: on, backend });
  const parts = whole.map((each) =>
    group.wrap(
      on.map((ordinal, rank) => partOf(each, cuda.device(ordinal), spansOf(tokens, ranks, rank, order))),
      tokens,
      { order },
    ),
  ) as Triple<ShardedTensor>;
  const call = () => sageattnSharded(...parts, { ...topology, isCausal, returnLse: false });
  const output = await call();
  const tensors = output.parts.map((tensor, rank) => ({ rank, tensor: tensor as CudaTensor }));
  const relativeL1 = exact && errorOf(exact, tensors, shape, { ranks, order });
  output.dispose();
  const times = await wallTime(call, repetitionsOf(tokens));
  for (const part of parts) part.dispose();
  group.dispose();
  // The memory that the plans kept is the next one's.
  await new Promise(setImmediate);
  return { ...times, relativeL1: relativeL1 ?? Number.NaN };
}

function write(): void {
  mkdirSync(folder, { recursive: true });
  const facts = {
    date: new Date().toISOString(),
    commit: process.env.SAGEATTENTION_COMMIT,
    node: process.version,
    nvidiaSmi: nvidiaSmi(),
    links,
    seed,
    ranks,
    devices,
    peers,
    copyBandwidth: memory,
    heads: HEADS,
    headDim: DIM,
  };
  writeFileSync(join(folder, 'distributed.json'), `${JSON.stringify({ ...facts, rows }, null, 2)}\n`);
}

for (const tokens of flags.tokens.split(',').map(Number)) {
  const size = { batch: 1, heads: HEADS, tokens, headDim: DIM };
  const host = hostInputs(random, { ...size, isCausal: false });
  const whole = host.map((bits) => uploadBits(first, bits, { ...size, isCausal: false })) as Triple<CudaTensor>;
  for (const isCausal of [false, true]) {
    const shape = { ...size, isCausal };
    const exact = exactRows(random, host, shape, comparedRows(tokens));
    const alone = () => sageattn(...whole, { isCausal, returnLse: false }) as Promise<CudaTensor>;
    const output = await alone();
    const one = { ranks: 1, order: 'contiguous' } as const;
    const relativeL1 = errorOf(exact, [{ rank: 0, tensor: output }], shape, one) as number;
    output.dispose();
    const { milliseconds } = await wallTime(alone, repetitionsOf(tokens));
    const oneDevice = { milliseconds, relativeL1 };
    for (const ulysses of [1, 2, 4, 8].filter((each) => ranks % each === 0)) {
      const topology = { ulysses, ring: ranks / ulysses };
      const together = await timeSharded(devices, whole, shape, topology, exact);
      const onOne = devices.map(() => 0);
      const virtual = ulysses > 1 ? undefined : await timeSharded(onOne, whole, shape, topology, undefined);
      const sharded = shapeOf({ tokens, heads: HEADS, headDim: DIM, isCausal });
      const sent = sentBytes(sharded, scheduleOf(sharded, topology, 0), WIRE);
      const rates = ratesOf(shape, oneDevice.milliseconds);
      const row: Row = {
        tokens,
        isCausal,
        ...topology,
        ...together,
        tflops: tflops(shape, together.milliseconds),
        oneDevice,
        sentBytes: sent.ulysses + sent.ring,
        predictedMilliseconds: rates && predict(sharded, topology, rates, WIRE).total * 1000,
        aloneMilliseconds: virtual && virtual.milliseconds / ranks,
      };
      rows.push(row);
      console.log(
        `${tokens}${isCausal ? ' causal' : ''}, ulysses ${ulysses} x ring ${topology.ring}: ${row.milliseconds.toFixed(3)} ms ` +
          `(host ${row.hostMilliseconds.toFixed(3)}), one device ${oneDevice.milliseconds.toFixed(3)} ms ` +
          `(${(oneDevice.milliseconds / row.milliseconds).toFixed(2)}x), predicted ${row.predictedMilliseconds?.toFixed(3) ?? '-'} ms, ` +
          `without links ${row.aloneMilliseconds?.toFixed(3) ?? '-'} ms, sent ${(row.sentBytes / 1e6).toFixed(1)} MB, ` +
          `relative L1 ${row.relativeL1.toFixed(4)} (one device ${oneDevice.relativeL1.toFixed(4)})`,
      );
      write();
    }
  }
  for (const each of whole) each.dispose();
}
write();
await backend.dispose();
