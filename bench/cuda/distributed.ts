/**
 * Sequence parallelism over the CUDA devices of this machine against one of them, with the bandwidth between two, what one rank sends,
 * the prediction of the virtual clock, and the error beside each time.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-distributed.mjs OUTPUT_FOLDER [--ranks 4] [--tokens 16384,65536]
 *
 * On one device all ranks share it: the times then say what dividing costs, not what it gains. Writes `distributed.json` there.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { copyPeer, reachPeer } from '../../src/backends/cuda/driver/copy.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  cudaTensorOn,
  downloadAsync,
} from '../../src/backends/cuda/index.ts';
import { copyToDevice } from '../../src/backends/cuda/tensor.ts';
import { createDeviceGroup, type ShardedTensor, sageattnSharded } from '../../src/distributed/index.ts';
import { predict, type Rates, shapeOf } from '../../src/distributed/predict.ts';
import { scheduleOf, sentBytes } from '../../src/distributed/schedule.ts';
import { sageattn, setBackend } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { median } from '../../src/measure/statistics.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, normalBits, sampleRows } from './inputs.ts';
import { copyBandwidth, nvidiaSmi, tflops } from './workbench.ts';

const [HEADS, DIM] = [32, 128] as const;
/** Rows of the output that are compared with exact ones. */
const COMPARED = 24;
const REPETITIONS = 7;
const WIRE = { query: 2, keyValue: 1 } as const;

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { ranks: { type: 'string' }, tokens: { type: 'string', default: '16384,65536' } },
});
const folder = positionals[0] ?? '.';

const backend = new CudaBackend();
await setBackend(backend);
const cuda = await backend.cuda();
const ranks = Number(flags.ranks ?? Math.max(2, cuda.deviceCount));
const devices = Array.from({ length: ranks }, (_, rank) => rank % cuda.deviceCount);
const used = [...new Set(devices)].map((ordinal) => cuda.device(ordinal));
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

/** Milliseconds from the call until every device has ended. */
async function wallTime(call: () => Promise<{ dispose(): void }>): Promise<number> {
  const once = async () => {
    const start = performance.now();
    const made = await call();
    for (const device of used) device.stream.synchronize();
    const taken = performance.now() - start;
    made.dispose();
    return taken;
  };
  for (let i = 0; i < 3; i++) await once();
  const times: number[] = [];
  for (let i = 0; i < REPETITIONS; i++) times.push(await once());
  return median(times);
}

interface Row {
  readonly tokens: number;
  readonly isCausal: boolean;
  readonly ulysses: number;
  readonly ring: number;
  readonly milliseconds: number;
  readonly tflops: number;
  readonly oneDevice: { readonly milliseconds: number; readonly relativeL1: number };
  readonly relativeL1: number;
  readonly sentBytes: number;
  readonly predictedMilliseconds: number | undefined;
}

const peers = peerBandwidth(used);
const memory = copyBandwidth(used[0] as CudaDevice);
const rows: Row[] = [];
for (const tokens of flags.tokens.split(',').map(Number)) {
  const shape = [1, HEADS, tokens, DIM];
  const bits = [0, 1, 0].map((offset) => normalBits(random, HEADS * tokens * DIM, offset)) as [
    Uint16Array,
    Uint16Array,
    Uint16Array,
  ];
  const host = bits.map((data) => tensor(data, shape, { dtype: 'bfloat16' }));
  const first = used[0] as CudaDevice;
  const whole = host.map(({ data }) => {
    const memoryOf = first.allocate((data as Uint16Array).byteLength);
    copyToDevice(first, memoryOf, new Uint8Array(data.buffer as ArrayBuffer), first.stream);
    first.stream.synchronize();
    return cudaTensorOn(memoryOf, 'bfloat16', shape);
  }) as [CudaTensor, CudaTensor, CudaTensor];
  for (const isCausal of [false, true]) {
    const size = { batch: 1, heads: HEADS, tokens, headDim: DIM, isCausal };
    const sampled = sampleRows(random, size, COMPARED);
    const [q, k, v] = bits;
    const exact = Float64Array.from(sampled.flatMap((row) => [...exactRow({ q, k, v }, size, row)]));
    const errorOf = (values: Float32Array) =>
      compare(
        Float32Array.from(
          sampled.flatMap(({ head, token }) => {
            const at = (head * tokens + token) * DIM;
            return [...values.subarray(at, at + DIM)];
          }),
        ),
        exact,
      ).relativeL1;
    const alone = () => sageattn(...whole, { isCausal, returnLse: false }) as Promise<CudaTensor>;
    const oneOutput = await alone();
    const oneDevice = {
      milliseconds: await wallTime(alone),
      relativeL1: errorOf(toFloat32(await downloadAsync(oneOutput))),
    };
    oneOutput.dispose();
    const order = isCausal ? 'zigzag' : 'contiguous';
    for (const ulysses of [1, 2, 4, 8].filter((each) => ranks % each === 0)) {
      const topology = { ulysses, ring: ranks / ulysses };
      const group = await createDeviceGroup({ devices, backend });
      const parts = (await Promise.all(host.map((x) => group.shard(x, { order })))) as [
        ShardedTensor,
        ShardedTensor,
        ShardedTensor,
      ];
      const call = () => sageattnSharded(...parts, { ...topology, isCausal, returnLse: false });
      const output = await call();
      const relativeL1 = errorOf(toFloat32(await group.gather(output)));
      output.dispose();
      const milliseconds = await wallTime(call);
      for (const part of parts) part.dispose();
      group.dispose();
      const sharded = shapeOf({ tokens, heads: HEADS, headDim: DIM, isCausal });
      const sent = sentBytes(sharded, scheduleOf(sharded, topology, 0), WIRE);
      const rates: Rates | undefined =
        used.length === ranks && peers !== undefined
          ? { attention: tflops(size, oneDevice.milliseconds) * 1e12, memory, link: peers.bothWays / 2, latency: 1e-5 }
          : undefined;
      const row: Row = {
        tokens,
        isCausal,
        ...topology,
        milliseconds,
        tflops: tflops(size, milliseconds),
        oneDevice,
        relativeL1,
        sentBytes: sent.ulysses + sent.ring,
        predictedMilliseconds: rates && predict(sharded, topology, rates, WIRE).total * 1000,
      };
      rows.push(row);
      console.log(
        `${tokens}${isCausal ? ' causal' : ''}, ulysses ${ulysses} x ring ${topology.ring}: ${milliseconds.toFixed(3)} ms, ` +
          `one device ${oneDevice.milliseconds.toFixed(3)} ms (${(oneDevice.milliseconds / milliseconds).toFixed(2)}x), ` +
          `predicted ${row.predictedMilliseconds?.toFixed(3) ?? '-'} ms, sent ${(row.sentBytes / 1e6).toFixed(1)} MB, ` +
          `relative L1 ${relativeL1.toFixed(4)} (one device ${oneDevice.relativeL1.toFixed(4)})`,
      );
    }
  }
  for (const each of whole) each.dispose();
}
mkdirSync(folder, { recursive: true });
writeFileSync(
  join(folder, 'distributed.json'),
  `${JSON.stringify({ date: new Date().toISOString(), commit: process.env.SAGEATTENTION_COMMIT, node: process.version, nvidiaSmi: nvidiaSmi(), seed, ranks, devices, peers, copyBandwidth: memory, heads: HEADS, headDim: DIM, rows }, null, 2)}\n`,
);
await backend.dispose();
