/**
 * Two processes that share one NVIDIA card as the ranks of a group, which NCCL refuses: the bits of ranks in one process, time, and one
 * that is killed in the middle of a call. With `--devices 0,1` each has a card of its own.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/test-processes.mjs [--devices 0,0]
 */
import { spawn } from 'node:child_process';
import { createServer } from 'node:net';
import { parseArgs } from 'node:util';
import {
  createDeviceGroup,
  type DeviceGroup,
  type ShardedOptions,
  sageattnSharded,
} from '../../src/distributed/index.ts';
import { messageOf } from '../../src/errors.ts';
import { sageattn } from '../../src/index.ts';
import { median } from '../../src/measure/statistics.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../support/random.ts';

const { values: flags } = parseArgs({ options: { devices: { type: 'string', default: '0,0' } } });
const devices = flags.devices.split(',').map(Number);
const SEED = 17;
/** Milliseconds until a rank that was killed must have been noticed. */
const NOTICED = 10_000;

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

function inputsOf(tokens: number): Tensor[] {
  const random = new Random(SEED);
  return [8, 4, 4].map((heads) =>
    fromFloat32(random.normals(heads * tokens * 128), [1, heads, tokens, 128], 'bfloat16'),
  );
}

/** The output, and the median time of some calls in milliseconds. */
async function attend(group: DeviceGroup, tokens: number, options: ShardedOptions, calls: number) {
  const [q, k, v] = await Promise.all(inputsOf(tokens).map((x) => group.shard(x, { order: 'zigzag' })));
  const times: number[] = [];
  let values = new Float32Array();
  for (let call = 0; call < calls; call++) {
    const start = performance.now();
    const output = await sageattnSharded(q as never, k as never, v as never, { ...options, returnLse: false });
    times.push(performance.now() - start);
    if (call === 0) values = toFloat32(await group.gather(output)) as typeof values;
    output.dispose();
  }
  for (const each of [q, k, v]) each?.dispose();
  return { values, milliseconds: median(times) };
}

const CASES = [
  { name: 'a ring', tokens: 700, options: {} },
  { name: 'a causal ring', tokens: 700, options: { isCausal: true } },
  { name: 'heads divided', tokens: 700, options: { ulysses: 2 } },
  { name: 'a causal ring, 16,384 tokens', tokens: 16_384, options: { isCausal: true } },
];

async function runRank(rank: number): Promise<void> {
  const say = (line: string) => rank === 0 && console.log(line);
  const group = await createDeviceGroup({ transport: 'ipc', device: devices[rank] as number, timeout: 60_000 });
  const local = rank === 0 ? await createDeviceGroup({ devices }) : undefined;
  for (const { name, tokens, options } of CASES) {
    const shared = await attend(group, tokens, options, 5);
    if (local === undefined) continue;
    const expected = await attend(local, tokens, options, 1);
    const at = expected.values.findIndex((value, i) => !Object.is(value, shared.values[i]));
    say(
      `${at < 0 ? 'ok     ' : 'FAILED '} ${name}: ${at < 0 ? 'the same bits' : `value ${at} differs`} (${shared.milliseconds.toFixed(2)} ms a call)`,
    );
    if (at >= 0) process.exitCode = 1;
  }
  local?.dispose();
  // The second rank is killed at some point of some call.
  if (rank === 1) setTimeout(() => process.kill(process.pid, 'SIGKILL'), 500);
  let last = performance.now();
  try {
    for (;;) {
      await attend(group, 4096, {}, 1);
      last = performance.now();
    }
  } catch (error) {
    const took = performance.now() - last;
    const right = took < NOTICED && (error as Error).name === 'ExecutionError' && /rank 1/.test(messageOf(error));
    say(
      `${right ? 'ok     ' : 'FAILED '} a rank that is killed: after ${took.toFixed(0)} ms ${(error as Error).name}: ${messageOf(error)}`,
    );
    if (!right) process.exitCode = 1;
  }
  group.dispose();
  const [q, k, v] = inputsOf(700) as [Tensor, Tensor, Tensor];
  const values = toFloat32(await sageattn(q, k, v, { backend: 'cuda' }));
  say(`${values.every(Number.isFinite) ? 'ok     ' : 'FAILED '} the card is usable afterwards`);
}

const { RANK } = process.env;
if (RANK === undefined) {
  const port = await freePort();
  const codes = devices.map(
    (_, rank) =>
      new Promise<number | null>((resolve) => {
        const env = {
          ...process.env,
          ...{ RANK: String(rank), LOCAL_RANK: String(rank), WORLD_SIZE: String(devices.length) },
          ...{ MASTER_ADDR: '127.0.0.1', MASTER_PORT: String(port) },
        };
        const child = spawn(process.execPath, process.argv.slice(1), { env, stdio: 'inherit' });
        child.on('exit', resolve);
      }),
  );
  const [first] = await Promise.all(codes);
  process.exit(first ?? 1);
} else await runRank(Number(RANK));
