/**
 * What the host does in a call of `sageattn` over tensors on the device: its time, that of four calls captured into one graph, and the
 * driver's functions in a call.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-host.mjs OUTPUT_FOLDER
 *
 * Writes `host.json` there, and prints it as a table.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { CudaApi } from '../../src/backends/cuda/driver/api.ts';
import { Cuda } from '../../src/backends/cuda/driver/device.ts';
import { loadDriver } from '../../src/backends/cuda/driver/load.ts';
import { type CudaTensor, capture, createCudaBackend, cudaTensorOn } from '../../src/backends/cuda/index.ts';
import { defaultKernelFor } from '../../src/backends/cuda/kernel-table.ts';
import { createAttention, type KernelName, sageattn, setBackend } from '../../src/index.ts';
import { timeOnHost } from '../../src/measure/cuda-timing.ts';

interface Spent {
  calls: number;
  microseconds: number;
}

/** The driver, with the time of each function added up while `counting`. */
function timed(api: CudaApi): { readonly api: CudaApi; readonly spent: Map<string, Spent>; counting: boolean } {
  const spent = new Map<string, Spent>();
  const self = { api, spent, counting: false };
  const wrapped = new Map<string | symbol, unknown>();
  self.api = new Proxy(api, {
    get(target, name) {
      const own = (target as unknown as Record<string | symbol, unknown>)[name];
      if (typeof own !== 'function' || !String(name).startsWith('cu')) {
        return typeof own === 'function' ? own.bind(target) : own;
      }
      let found = wrapped.get(name);
      if (found === undefined) {
        found = (...values: unknown[]) => {
          if (!self.counting) return own.apply(target, values);
          const start = process.hrtime.bigint();
          const result = own.apply(target, values);
          const entry = spent.get(String(name)) ?? { calls: 0, microseconds: 0 };
          entry.calls++;
          entry.microseconds += Number(process.hrtime.bigint() - start) / 1000;
          spent.set(String(name), entry);
          return result;
        };
        wrapped.set(name, found);
      }
      return found;
    },
  });
  return self;
}

const CALLS = 400;

async function main(): Promise<number> {
  const [folder] = process.argv.slice(2);
  if (folder === undefined) {
    console.error('usage: bench-cuda-host.mjs OUTPUT_FOLDER');
    return 2;
  }
  mkdirSync(folder, { recursive: true });
  const driver = timed(await loadDriver());
  const cuda = new Cuda(driver.api);
  const backend = createCudaBackend({ open: async () => cuda });
  await setBackend(backend);
  const device = cuda.device();
  const fastest = defaultKernelFor(device.computeCapability)?.name as KernelName;
  const memory = device.allocate(32 * 16384 * 128 * 2);
  const results: object[] = [];
  for (const tokens of [128, 1024, 4096, 16384]) {
    for (const kernel of ['exact', fastest] as const) {
      const view: CudaTensor = cudaTensorOn(memory, 'bfloat16', [1, 32, tokens, 128]);
      const count = tokens > 4096 ? 50 : CALLS;
      const call = async () => (await sageattn(view, view, view, { kernel })).memory.dispose();
      const attention = await createAttention<CudaTensor>({ q: view, k: view, v: view }, { kernel });
      const run = async () => {
        const { output } = await attention.run({ q: view, k: view, v: view });
        output.memory.dispose();
      };
      const whole = await timeOnHost(device, call, count);
      const planned = await timeOnHost(device, run, count);
      // Four calls as one graph: what is left of their cost to the host.
      const stream = device.createStream();
      const graph = await capture(stream, async () => {
        for (let i = 0; i < 4; i++) (await sageattn(view, view, view, { kernel })).dispose();
      });
      const fourCaptured = await timeOnHost(device, () => graph.launch(), count);
      graph.dispose();
      stream.dispose();
      driver.spent.clear();
      driver.counting = true;
      for (let i = 0; i < 40; i++) await call();
      driver.counting = false;
      device.stream.synchronize();
      attention.dispose();
      const functions = Object.fromEntries(
        [...driver.spent].map(([name, { calls, microseconds }]) => [
          name,
          { callsEach: calls / 40, microsecondsEach: microseconds / 40 },
        ]),
      );
      results.push({ tokens, kernel, sageattn: whole, planned, fourCaptured, functions });
      const listed = Object.entries(functions).map(
        ([name, each]) => `${name} ${each.callsEach.toFixed(1)}x ${each.microsecondsEach.toFixed(1)}`,
      );
      console.log(
        `${tokens} ${kernel}: sageattn ${whole.median.toFixed(1)} us, planned ${planned.median.toFixed(1)} us, four captured ${fourCaptured.median.toFixed(1)} us; ${listed.join(', ')}`,
      );
    }
  }
  writeFileSync(join(folder, 'host.json'), `${JSON.stringify(results, null, 1)}\n`);
  memory.dispose();
  await backend.dispose();
  return 0;
}

process.exitCode = await main();
