import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Worker } from 'node:worker_threads';
import { build } from 'esbuild';
import { afterEach, describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { ExecutionError, InvalidArgumentError } from '../../errors.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { slice, type Tensor, tensor } from '../../tensor/tensor.ts';
import type { RunContext } from '../backend.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn, type WasmBackend } from './backend.ts';
import { createWorkers, type Executor, type ExecutorKind } from './executor.ts';
import { ACCURATE_KERNEL, INTEGER_KERNEL } from './kernel-table.ts';
import { loadModule } from './modules.ts';

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;
const KINDS: ExecutorKind[] = ['threads', 'worker', 'inline'];

let backend: WasmBackend | undefined;
afterEach(async () => {
  await backend?.dispose();
  backend = undefined;
});

function start(kind: ExecutorKind, threads = 2): WasmBackend {
  backend = createWasmBackendOn({ threads }, { kind, shortWork: 0 });
  return backend;
}

function inputsOf(tokens: number, dim = 32, heads = 2) {
  const shape = [1, heads, tokens, dim];
  const operand = () => tensor(random.normals(heads * tokens * dim), shape);
  return { q: operand(), k: operand(), v: operand() };
}

type Inputs = ReturnType<typeof inputsOf>;

async function run(on: WasmBackend, inputs: Inputs, context: RunContext = {}, options: AttentionOptions = {}) {
  const problem = createProblem(inputs.q, inputs.k, inputs.v, options);
  const plan = await on.plan(problem, chooseOptions(INTEGER_KERNEL, problem, options));
  return toFloat32((await plan.run(inputs, context)).output as Tensor);
}

const errorOf = (inputs: Inputs, output: Float32Array) =>
  compare(output, attentionExact(createProblem(inputs.q, inputs.k, inputs.v, {}), inputs).output).relativeL1;

/**
 * A call of minutes: every query is one token, every key another, read again and again. No test lives to see its end.
 */
function endlessInputs(): Inputs {
  const q = tensor(random.normals(8), [1, 1, 2 ** 19, 8], { strides: [0, 0, 0, 1] });
  const kv = tensor(random.normals(8), [1, 1, 2 ** 18, 8], { strides: [0, 0, 0, 1] });
  return { q, k: kv, v: kv };
}

/** Until what was called so far has been sent to the workers, or computes between turns of this thread. */
async function turns(): Promise<void> {
  for (let i = 0; i < 5; i++) await new Promise((resolve) => setImmediate(resolve));
}

const codeOf = (result: PromiseSettledResult<unknown>) =>
  result.status === 'rejected' ? result.reason.code : 'fulfilled';

/** Workers that start from here on, and how many of them live. */
function recordWorkers(): { workers: Worker[]; alive: () => number; restore: () => void } {
  const threads = process.getBuiltinModule('node:worker_threads') as { Worker: typeof Worker };
  const original = threads.Worker;
  const workers: Worker[] = [];
  let ended = 0;
  threads.Worker = class extends original {
    constructor(...args: ConstructorParameters<typeof Worker>) {
      super(...args);
      workers.push(this);
      this.once('exit', () => ended++);
    }
  };
  return {
    workers,
    alive: () => workers.length - ended,
    restore: () => {
      threads.Worker = original;
    },
  };
}

describe.each(KINDS)('%s', (kind) => {
  test('concurrent calls of different shapes do not disturb each other', async () => {
    const on = start(kind);
    const cases = [17, 130, 64, 1, 200, 33].map((tokens) => inputsOf(tokens));
    const outputs = await Promise.all(cases.map((inputs) => run(on, inputs)));
    for (const [i, inputs] of cases.entries()) {
      expect(errorOf(inputs, outputs[i] as Float32Array), seed).toBeLessThan(0.05);
    }
  });

  test('a signal stops a long call at once, one that waits too, and the next call works', async () => {
    const on = start(kind);
    const endless = endlessInputs();
    const small = inputsOf(40);
    await run(on, small);
    const controller = new AbortController();
    const reason = new Error('enough');
    const calls = [1, 2, 3].map(() => run(on, endless, { signal: controller.signal }));
    await turns();
    controller.abort(reason);
    const settled = await Promise.allSettled(calls);
    expect(settled.map((result) => result.status === 'rejected' && result.reason)).toEqual([reason, reason, reason]);
    // It would wait for the others if they still ran.
    expect(errorOf(small, await run(on, small)), seed).toBeLessThan(0.05);
    await expect(run(on, small, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });

  test('inputs are those of the time of the call', async () => {
    const on = start(kind);
    const inputs = inputsOf(40);
    const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
    const choice = chooseOptions(INTEGER_KERNEL, problem, {});
    const plan = await on.plan(problem, choice);
    const expected: Float64Array[] = [];
    const calls: Promise<Float32Array>[] = [];
    for (let i = 0; i < 6; i++) {
      for (const { data } of Object.values(inputs)) (data as Float32Array).set(random.normals(data.length));
      expected.push(attentionExact(problem, inputs).output);
      // The backend starts anew for the fourth call.
      if (i === 3) await on.dispose();
      calls.push(plan.run(inputs, {}).then(({ output }) => toFloat32(output as Tensor)));
      if (i < 3) await calls[i];
    }
    for (const [i, output] of (await Promise.all(calls)).entries()) {
      expect(compare(output, expected[i] as Float64Array).relativeL1, `${seed}, call ${i}`).toBeLessThan(0.05);
    }
    const cache = on.prepareKeyValue(problem, choice, inputs.k, inputs.v, {});
    const spoil = ({ data }: Tensor) => (data as Float32Array).fill(1e4);
    spoil(inputs.k);
    spoil(inputs.v);
    const attended = (await cache).attend(inputs.q, problem, {}, {});
    spoil(inputs.q);
    const cached = toFloat32((await attended).output as Tensor);
    expect(compare(cached, expected[5] as Float64Array).relativeL1, seed).toBeLessThan(0.05);
  });

  test('buffers that were transferred or made smaller are refused by name', async () => {
    const on = start(kind);
    for (const name of ['q', 'k', 'v'] as const) {
      const inputs = inputsOf(40);
      const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
      const plan = await on.plan(problem, chooseOptions(INTEGER_KERNEL, problem, {}));
      const Resizable = ArrayBuffer as unknown as new (bytes: number, options: object) => ArrayBuffer;
      const shrinking = new Resizable(2 * 40 * 32 * 4, { maxByteLength: 2 ** 16 });
      const resizable = { ...inputs, [name]: { ...inputs[name], data: new Float32Array(shrinking) } };
      await plan.run(resizable, {});
      (shrinking as ArrayBuffer & { resize(bytes: number): void }).resize(64);
      structuredClone(inputs[name].data.buffer, { transfer: [inputs[name].data.buffer as ArrayBuffer] });
      for (const gone of [inputs, resizable]) {
        const error = await plan.run(gone, {}).catch((caught) => caught);
        expect(error).toBeInstanceOf(InvalidArgumentError);
        expect(error).toMatchObject({ code: 'buffer-too-small', argument: name });
      }
      const shared = new Float32Array(new SharedArrayBuffer(2 * 40 * 32 * 4)).fill(1);
      await plan.run({ ...inputsOf(40), [name]: { ...inputsOf(40)[name], data: shared } }, {});
    }
  });

  test('what does not fit is refused with the size and the limit, and nothing is left behind', async () => {
    const on = start(kind);
    const huge = tensor(random.normals(64), [1, 1, 2 ** 27, 64], { strides: [0, 0, 0, 1] });
    const q = tensor(random.normals(64), [1, 1, 1, 64]);
    for (let i = 0; i < 3; i++) {
      const error = await run(on, { q, k: huge, v: huge }).catch((caught) => caught);
      expect(error).toBeInstanceOf(ExecutionError);
      expect(error.code).toBe('out-of-memory');
      expect(error.message).toMatch(/needs \d+\.\d MiB.*at most \d+\.\d MiB/);
    }
    const small = inputsOf(40);
    expect(errorOf(small, await run(on, small)), seed).toBeLessThan(0.05);
  });

  test('keys prepared once, appended to and attended to', async () => {
    const on = start(kind);
    const heads = 2;
    const tokens = 300;
    const q = tensor(random.normals(2 * 4 * 30 * 40), [2, 4, 30, 40]);
    const k = tensor(
      random.normals(2 * heads * tokens * 40).map((value) => value + 2),
      [2, heads, tokens, 40],
    );
    const v = tensor(random.normals(2 * heads * tokens * 24), [2, heads, tokens, 24]);
    for (const [kernel, bound] of [
      [INTEGER_KERNEL, 0.035],
      [ACCURATE_KERNEL, 0.0129],
    ] as const) {
      const part = (from: number, to: number) => [slice(k, 2, from, to), slice(v, 2, from, to)] as const;
      const problemOf = (from: number, to: number) => createProblem(part(from, to)[0], ...part(from, to), {});
      const choice = chooseOptions(kernel, problemOf(0, 1), { smoothV: true });
      const prepared = await on.prepareKeyValue(problemOf(0, 0), choice, ...part(0, 0), {});
      let held = 0;
      for (const to of [100, 101, 127, 129, 140, 300]) {
        await prepared.append(...part(held, to), problemOf(held, to), {});
        held = to;
        expect(prepared.length).toBe(to);
        const options = { isCausal: true, causalAlignment: 'bottom-right', returnLse: true } as const;
        const problem = createProblem(q, ...part(0, to), options);
        const { output, lse } = await prepared.attend(q, problem, {}, {});
        const exact = attentionExact(problem, { q, k: part(0, to)[0], v: part(0, to)[1] });
        expect(compare(toFloat32(output as Tensor), exact.output).relativeL1, seed).toBeLessThan(bound);
        expect(compare(toFloat32(lse as Tensor), exact.lse).maxAbsoluteError, seed).toBeLessThan(0.05);
      }
      prepared.dispose();
      await expect(prepared.attend(q, problemOf(0, 300), {}, {})).rejects.toThrow('disposed');
    }
  });

  test('dispose rejects what runs and what waits and ends all workers; the next call starts again', async () => {
    const { workers, alive, restore } = recordWorkers();
    try {
      const on = start(kind);
      const small = inputsOf(10);
      const memory = async () => (await on.availability()).details.memory;
      await run(on, small);
      const used = await memory();
      const perRuntime = workers.length;
      expect(perRuntime).toBe({ threads: 2, worker: 1, inline: 0 }[kind]);
      const problem = createProblem(small.k, small.k, small.v, {});
      const prepared = await on.prepareKeyValue(
        problem,
        chooseOptions(INTEGER_KERNEL, problem, {}),
        small.k,
        small.v,
        {},
      );
      const endless = endlessInputs();
      const calls: Promise<unknown>[] = [1, 2, 3, 4].map(() => run(on, endless));
      await turns();
      calls.push(run(on, small), prepared.attend(small.q, problem, {}, {}));
      await turns();
      await on.dispose();
      expect((await Promise.allSettled(calls)).map(codeOf)).toEqual(calls.map(() => 'disposed'));
      await expect(prepared.attend(small.q, problem, {}, {})).rejects.toMatchObject({ code: 'disposed' });
      await expect(prepared.append(small.k, small.v, problem, {})).rejects.toMatchObject({ code: 'disposed' });
      await turns();
      expect(workers).toHaveLength(perRuntime);
      expect(alive()).toBe(0);
      prepared.dispose();

      expect(errorOf(small, await run(on, small)), seed).toBeLessThan(0.05);
      expect(await memory()).toBe(used);
      expect(alive()).toBe(perRuntime);
      on[Symbol.dispose]();
    } finally {
      restore();
    }
  });

  test('a call that the backend is disposed under while it starts is rejected, and leaves no worker', async () => {
    const { alive, restore } = recordWorkers();
    try {
      const on = start(kind);
      const call = run(on, endlessInputs());
      const settled = Promise.allSettled([call]);
      await on.dispose();
      expect((await settled).map(codeOf)).toEqual(['disposed']);
      await turns();
      expect(alive()).toBe(0);
    } finally {
      restore();
    }
  });
});

test.each(['threads', 'worker'] as const)(
  '%s: a worker that dies takes its calls along, and what waits only where its memory is gone',
  async (kind) => {
    const { workers, alive, restore } = recordWorkers();
    try {
      const on = start(kind);
      const small = inputsOf(10);
      const before = await run(on, small);
      const problem = createProblem(small.k, small.k, small.v, {});
      const prepared = await on.prepareKeyValue(
        problem,
        chooseOptions(INTEGER_KERNEL, problem, {}),
        small.k,
        small.v,
        {},
      );
      const attend = async () => toFloat32((await prepared.attend(small.q, problem, {}, {})).output as Tensor);
      const attended = await attend();
      const endless = endlessInputs();
      const running = Promise.allSettled([run(on, endless), run(on, endless)]);
      await turns();
      const waiting = Promise.allSettled([attend(), run(on, small)]);
      await turns();
      await workers.at(-1)?.terminate();
      expect((await running).map(codeOf)).toEqual(['execution-failed', 'execution-failed']);
      if (kind === 'threads') {
        expect(await waiting).toEqual([attended, before].map((value) => ({ status: 'fulfilled', value })));
        expect(await attend()).toEqual(attended);
      } else {
        expect((await waiting).map(codeOf)).toEqual(['execution-failed', 'execution-failed']);
        await expect(attend()).rejects.toMatchObject({ code: 'execution-failed' });
        await expect(prepared.append(small.k, small.v, problem, {})).rejects.toMatchObject({
          code: 'execution-failed',
        });
      }
      expect(errorOf(small, await run(on, small)), seed).toBeLessThan(0.05);
      expect(alive()).toBe({ threads: 2, worker: 1 }[kind]);
    } finally {
      restore();
    }
  },
);

test('scratch for some threads is given back when there is none for the others', async () => {
  const { module } = await loadModule('auto');
  const executor = (await createWorkers(module, { threads: 4, shortWork: 0, kind: 'threads' })) as Executor;
  const { memory } = executor;
  try {
    // The rest of the 4 GiB has room for the scratch of two threads, not of four.
    memory.allocate(4 * 2 ** 30 - 300 * 2 ** 20);
    const used = memory.usedBytes;
    const call = { stages: [], units: 4, barriers: 0, extraScratch: 128 * 2 ** 20, work: 1 };
    for (let i = 0; i < 3; i++) {
      await expect(executor.run(call)).rejects.toMatchObject({ code: 'out-of-memory' });
      expect(memory.usedBytes).toBe(used);
    }
  } finally {
    await executor.dispose();
  }
});

test('memory is used again: 2,000 calls take no more than the first did', async () => {
  const on = start('threads', 1);
  const inputs = inputsOf(20, 16, 1);
  await Promise.all([run(on, inputs), run(on, inputs)]);
  const memory = async () => (await on.availability()).details.memory;
  const before = await memory();
  expect(before).toMatch(/^[\d.]+ KiB in use of \d+ KiB$/);
  for (let i = 0; i < 20; i++) await Promise.all(Array.from({ length: 100 }, () => run(on, inputs)));
  expect(await memory()).toBe(before);
});

test('an idle backend does not keep the process, a running call does', async () => {
  const code = `
    import { createWasmBackend } from ${JSON.stringify(new URL('./index.ts', import.meta.url).href)};
    import { createProblem } from ${JSON.stringify(new URL('../../attention/problem.ts', import.meta.url).href)};
    import { chooseOptions } from ${JSON.stringify(new URL('../choice.ts', import.meta.url).href)};
    import { tensor } from ${JSON.stringify(new URL('../../tensor/tensor.ts', import.meta.url).href)};
    const backend = createWasmBackend();
    const x = tensor(new Float32Array(64 * 8).fill(1), [1, 1, 64, 8]);
    const problem = createProblem(x, x, x, {});
    const plan = await backend.plan(problem, chooseOptions(backend.kernels[0], problem, {}));
    const { output } = await plan.run({ q: x, k: x, v: x }, {});
    console.log('sum', output.data.reduce((a, b) => a + b, 0));
  `;
  const child = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '--eval', code]);
  let printed = '';
  child.stdout.on('data', (chunk) => {
    printed += chunk;
  });
  child.stderr.on('data', (chunk) => {
    printed += chunk;
  });
  const status = await new Promise((resolve) => child.on('exit', resolve));
  expect(printed).toContain('sum 51');
  expect(status).toBe(0);
}, 60_000);

test("Node's permission model, which forbids workers: this thread computes, and says why", async () => {
  const folder = mkdtempSync(join(tmpdir(), 'sageattention-'));
  const program = join(folder, 'program.mjs');
  const code = `
    import { listBackends, sageattn, tensor } from './src/index.ts';
    const x = tensor(new Float32Array(300 * 64).fill(1), [1, 1, 300, 64]);
    const { data } = await sageattn(x, x, x, { backend: 'wasm' });
    const [{ availability }] = await listBackends(['wasm']);
    console.log('mean', Math.round(data.reduce((a, b) => a + b, 0) / data.length), availability.details.threads);
  `;
  await build({
    stdin: { contents: code, resolveDir: fileURLToPath(new URL('../../..', import.meta.url)), loader: 'ts' },
    ...{
      outfile: program,
      bundle: true,
      format: 'esm',
      platform: 'node',
      target: 'node20',
      external: ['koffi', 'webgpu'],
    },
  });
  const [major] = process.versions.node.split('.').map(Number) as [number];
  const flag = major < 24 ? '--experimental-permission' : '--permission';
  const child = spawn(process.execPath, [flag, '--allow-fs-read=*', program]);
  let printed = '';
  child.stdout.on('data', (chunk) => {
    printed += chunk;
  });
  child.stderr.on('data', (chunk) => {
    printed += chunk;
  });
  const status = await new Promise((resolve) => child.on('exit', resolve));
  rmSync(folder, { recursive: true });
  expect(printed).toMatch(/mean 1 this thread, in turns of .*\(workers cannot be started/);
  expect(status).toBe(0);
}, 60_000);

test('options are checked', () => {
  expect(() => createWasmBackendOn({ threads: 0 })).toThrow(InvalidArgumentError);
  expect(() => createWasmBackendOn({ threads: 1.5 })).toThrow(InvalidArgumentError);
  expect(() => createWasmBackendOn({ simd: 'mmx' as 'auto' })).toThrow(InvalidArgumentError);
  expect(() => createWasmBackendOn({ workerUrl: 1 as unknown as string })).toThrow(InvalidArgumentError);
  expect(() => createWasmBackendOn({ wide: 1 as unknown as boolean })).toThrow(InvalidArgumentError);
  expect(() => createWasmBackendOn(null as unknown as object)).toThrow('options: expected an object');
  expect(() => createWasmBackendOn({ thread: 1 } as object)).toThrow(
    "one of threads, simd, workerUrl, wide (perhaps threads), received 'thread'",
  );
});
