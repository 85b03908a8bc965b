/**
 * Ranks in several processes, which NCCL connects: bandwidth, times of sharded calls with their error, and how soon the others know that
 * a rank's process was killed.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-nccl.mjs OUTPUT_FOLDER [--ranks 2] [--tokens 16384,65536]
 *
 * Starts a process for each rank, itself, and writes `nccl.json` there. With one rank: whether NCCL is reached, sends to itself, and ends
 * when a rank that it waits for dies.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { CudaBackend, type CudaTensor } from '../../src/backends/cuda/index.ts';
import { launch } from '../../src/cli/launch.ts';
import type { CudaPlace } from '../../src/distributed/cuda-place.ts';
import {
  createDeviceGroup,
  type DeviceGroup,
  type ShardedTensor,
  sageattnSharded,
} from '../../src/distributed/index.ts';
import { loadNccl } from '../../src/distributed/nccl/api.ts';
import { spansOf, type TokenOrder } from '../../src/distributed/shards.ts';
import { messageOf } from '../../src/errors.ts';
import { median } from '../../src/measure/statistics.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../../test/support/random.ts';
import type { Shape } from './inputs.ts';
import { errorOf, exactRows, hostInputs, partOf, type Triple, uploadBits } from './sharded-inputs.ts';
import { nvidiaSmi } from './workbench.ts';

const [HEADS, DIM] = [32, 128] as const;
const COMPARED = 12;
/** Short calls need more before the host's code is compiled and the clocks are up. */
const repetitionsOf = (tokens: number) => (tokens > 30_000 ? [6, 7] : [40, 15]) as [warmUp: number, timed: number];
const BANDWIDTH_BYTES = 2 ** 28;
const BANDWIDTH_CALLS = 10;
/** All ranks draw the same inputs. */
const SEED = 7;

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { ranks: { type: 'string', default: '2' }, tokens: { type: 'string', default: '16384,65536' } },
});
const folder = positionals[0] ?? '.';

/** What this process is in the group. */
const memberOf = (group: DeviceGroup) => group.members[0] as { readonly rank: number; readonly place: CudaPlace };

/** Bytes a second between neighbours, one way or both at once. */
async function bandwidth(group: DeviceGroup, bothWays: boolean): Promise<number> {
  const { place, rank } = memberOf(group);
  const alone = group.size === 1;
  const peer = alone ? 0 : rank ^ 1;
  const shape = [1, 1, 1, BANDWIDTH_BYTES / 2];
  const [from, into] = [place.empty(shape, 'bfloat16'), place.empty(shape, 'bfloat16')];
  const calls = Array.from({ length: BANDWIDTH_CALLS }, (_, i) => `bytes ${i}`);
  const outgoing = bothWays || alone || rank % 2 === 0 ? calls.map((name) => ({ to: peer, name, value: from })) : [];
  const incoming = bothWays || alone || rank % 2 === 1 ? calls.map((name) => ({ from: peer, name, into })) : [];
  const times: number[] = [];
  for (let round = 0; round < 4; round++) {
    await group.inTurn(async ({ links: [link] }) => {
      using start = place.device.createEvent();
      using end = place.device.createEvent();
      start.record(place.copyStream);
      await link?.exchange(outgoing, incoming);
      end.record(place.copyStream);
      await link?.finish();
      await place.device.stream.completed();
      times.push(start.millisecondsTo(end) / BANDWIDTH_CALLS);
    });
  }
  place.free(from);
  place.free(into);
  return ((bothWays ? 2 : 1) * BANDWIDTH_BYTES) / (Math.min(...times) / 1000);
}

/** Median of a rank's calls, which end together, and the error of its own rows of the output. */
async function timeCall(
  group: DeviceGroup,
  whole: Triple<CudaTensor>,
  shape: Shape,
  ulysses: number,
  exact: ReturnType<typeof exactRows>,
) {
  const { place, rank } = memberOf(group);
  const { tokens, isCausal } = shape;
  const order: TokenOrder = isCausal ? 'zigzag' : 'contiguous';
  const spans = spansOf(tokens, group.size, rank, order);
  const parts = whole.map((each) =>
    group.wrap([partOf(each, place.device, spans)], tokens, { order }),
  ) as Triple<ShardedTensor>;
  const times: number[] = [];
  const [warmUp, timed] = repetitionsOf(tokens);
  let relativeL1: number | undefined;
  for (let i = 0; i < warmUp + timed; i++) {
    const start = performance.now();
    const output = await sageattnSharded(...parts, { ulysses, isCausal, returnLse: false });
    if (i >= warmUp) times.push(performance.now() - start);
    else if (i === 0) {
      const tensors = [{ rank, tensor: output.parts[0] as CudaTensor }];
      relativeL1 = errorOf(exact, tensors, shape, { ranks: group.size, order });
    }
    output.dispose();
  }
  for (const part of parts) part.dispose();
  return { tokens, isCausal, ulysses, ring: group.size / ulysses, milliseconds: median(times), relativeL1 };
}

async function timeCalls(group: DeviceGroup) {
  const rows: object[] = [];
  const { place, rank } = memberOf(group);
  for (const tokens of flags.tokens.split(',').map(Number)) {
    const random = new Random(SEED + tokens);
    const size = { batch: 1, heads: HEADS, tokens, headDim: DIM };
    const host = hostInputs(random, { ...size, isCausal: false });
    const whole = host.map((bits) =>
      uploadBits(place.device, bits, { ...size, isCausal: false }),
    ) as Triple<CudaTensor>;
    for (const isCausal of [false, true]) {
      const shape = { ...size, isCausal };
      const exact = exactRows(random, host, shape, COMPARED);
      for (const ulysses of [1, 2].filter((each) => group.size % each === 0)) {
        const row = await timeCall(group, whole, shape, ulysses, exact);
        rows.push(row);
        if (rank === 0) console.log(JSON.stringify(row));
      }
    }
    for (const each of whole) each.dispose();
  }
  return rows;
}

/** The last rank is killed while the others are in a call; milliseconds until they know. */
async function killed(group: DeviceGroup): Promise<{ milliseconds: number; error: string } | undefined> {
  const { rank, place } = memberOf(group);
  const x = group.wrap([place.empty([1, HEADS, 4096, DIM], 'bfloat16')], 4096 * group.size);
  if (rank === group.size - 1) {
    setTimeout(() => process.kill(process.pid, 'SIGKILL'), 500);
    await new Promise((resolve) => setTimeout(resolve, 10_000));
  }
  const start = performance.now();
  try {
    await sageattnSharded(x, x, x);
    return undefined;
  } catch (error) {
    // 500 ms of it are the other's delay.
    return { milliseconds: performance.now() - start, error: messageOf(error) };
  }
}

/** One rank of two, the other of which comes to the meeting and dies before NCCL has connected. */
async function diesWhileConnecting(backend: CudaBackend): Promise<{ milliseconds: number; error: string }> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  const { computeCapability } = (await backend.cuda()).device(0);
  const program = `const socket = require('node:net').connect(${port}, '127.0.0.1');
    socket.write(JSON.stringify({ kind: 'hello', rank: 1, size: 2, of: 'sm_${computeCapability}' }) + '\\n');
    socket.on('data', () => setTimeout(() => process.kill(process.pid, 'SIGKILL'), 1000));`;
  const options = { rank: 0, worldSize: 2, address: `127.0.0.1:${port}`, device: 0, timeout: 20_000, backend };
  const joining = createDeviceGroup({ transport: 'nccl', ...options });
  setTimeout(() => spawn(process.execPath, ['-e', program]), 100);
  const start = performance.now();
  try {
    (await joining).dispose();
    return { milliseconds: performance.now() - start, error: 'none' };
  } catch (error) {
    return { milliseconds: performance.now() - start, error: messageOf(error) };
  }
}

async function ownBytes(group: DeviceGroup): Promise<boolean> {
  const { place } = memberOf(group);
  const values = Float32Array.from({ length: 4096 }, (_, i) => i);
  const shape = [1, 1, 1, 4096];
  const from = place.upload(tensor(values, shape));
  const into = place.empty(shape, 'float32');
  await group.inTurn(async ({ links: [link] }) => {
    await link?.exchange([{ to: 0, name: 'x', value: from }], [{ from: 0, name: 'x', into }]);
    await link?.finish();
  });
  const { data } = (await place.download(into)) as unknown as { data: Float32Array };
  return values.every((value, i) => data[i] === value);
}

async function asRank(): Promise<void> {
  const backend = new CudaBackend();
  const start = performance.now();
  const group = await createDeviceGroup({ transport: 'nccl', backend, timeout: 60_000 });
  const connected = performance.now() - start;
  const rank = group.ranks[0] as number;
  const say = (text: string) => rank === 0 && console.log(text);
  const version = new Int32Array(1);
  (await loadNccl()).ncclGetVersion(version);
  say(`NCCL ${version[0]}, ${group.size} ranks connected after ${connected.toFixed(0)} ms`);
  const alone = group.size === 1;
  const report: Record<string, unknown> = {
    date: new Date().toISOString(),
    commit: process.env.SAGEATTENTION_COMMIT,
    node: process.version,
    nvidiaSmi: nvidiaSmi(),
    ncclVersion: version[0],
    ranks: group.size,
    seed: SEED,
    heads: HEADS,
    headDim: DIM,
    connectedMilliseconds: connected,
  };
  if (alone) report.ownBytes = await ownBytes(group);
  report.oneWay = await bandwidth(group, false);
  report.bothWays = await bandwidth(group, true);
  say(JSON.stringify({ ownBytes: report.ownBytes, oneWay: report.oneWay, bothWays: report.bothWays }));
  const keep = () => {
    if (rank !== 0) return;
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, 'nccl.json'), `${JSON.stringify(report, null, 2)}\n`);
  };
  keep();
  report.rows = await timeCalls(group);
  keep();
  report.death = alone ? await diesWhileConnecting(backend) : await killed(group);
  say(JSON.stringify(report.death));
  keep();
  group.dispose();
  process.exit(0);
}

if (process.env.RANK === undefined) {
  const processes = Number(flags.ranks);
  // The killed one makes the launcher say that it has failed, as it should.
  await launch(process.argv[1] as string, process.argv.slice(2), { processes }).catch((error) =>
    console.log(messageOf(error)),
  );
} else await asRank();
