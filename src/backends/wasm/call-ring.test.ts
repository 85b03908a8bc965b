import type { Worker } from 'node:worker_threads';
import { afterEach, describe, expect, test, vi } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { tensor } from '../../tensor/tensor.ts';
import { LINGER_MS } from './call-ring.ts';
import { type Arithmetic, WholeCalls } from './calls.ts';
import { CallerExecutor, createWorkers, type Executor } from './executor.ts';
import { JOB_UNIT_COUNT, JOB_UNITS, UNIT_BYTES, UNIT_SEQUENCE } from './generated/fields.ts';
import { compileUnshared, loadModule } from './modules.ts';
import { type CallParts, Runtime } from './runtime.ts';

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;
const ARITHMETIC: Arithmetic = { precision: 'integer', smoothK: true, smoothV: false, smoothQ: false };
/** `ring`: this thread takes part; `workers`: a call so long that they are alone with it. */
const WORK = { ring: 1, workers: Number.MAX_SAFE_INTEGER } as const;
type Who = keyof typeof WORK;

const { module, simd } = await loadModule('auto');
const one = new Runtime(await CallerExecutor.create(await compileUnshared(simd), 'tests'), simd, '');

let executor: Executor | undefined;
const started: Worker[] = [];
const threads = process.getBuiltinModule('node:worker_threads') as { Worker: typeof Worker };
const original = threads.Worker;
threads.Worker = class extends original {
  constructor(...args: ConstructorParameters<typeof Worker>) {
    super(...args);
    started.push(this);
  }
};

async function start(count: number): Promise<Runtime> {
  executor = (await createWorkers(module, { threads: count, shortWork: 0, kind: 'threads' })) as Executor;
  return new Runtime(executor, simd, '');
}

afterEach(async () => {
  await executor?.dispose();
  started.length = 0;
});

function inputsOf(tokens: number, heads: number) {
  const shape = [1, heads, tokens, 16];
  const operand = () => tensor(random.normals(heads * tokens * 16), shape);
  return { q: operand(), k: operand(), v: operand() };
}

const anyInputs = () => inputsOf(random.integer(1, 400), random.integer(1, 4));

type Inputs = ReturnType<typeof anyInputs>;

function partsOf(runtime: Runtime, inputs: Inputs, who: Who) {
  const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
  const { prepare, keepInputs } = new WholeCalls(problem, ARITHMETIC, simd).parts(runtime, inputs);
  const parts: CallParts<unknown> = {
    prepare: (lease) => {
      const prepared = prepare(lease);
      return { ...prepared, work: who === 'ring' ? prepared.work : WORK.workers };
    },
    keepInputs,
  };
  return parts;
}

const run = async (runtime: Runtime, inputs: Inputs, who: Who, signal?: AbortSignal) =>
  ((await runtime.run(signal === undefined ? {} : { signal }, partsOf(runtime, inputs, who))) as { output: unknown })
    .output;

/** One of the call's units names a sequence far outside of the memory. */
function spoiled(runtime: Runtime, inputs: Inputs, who: Who, stage: number): CallParts<unknown> {
  const parts = partsOf(runtime, inputs, who);
  return {
    ...parts,
    prepare: (lease) => {
      const write = vi.spyOn(runtime.executor, 'write');
      const prepared = parts.prepare(lease);
      const job = prepared.stages[stage]?.job as number;
      const bytes = write.mock.calls.find(([address]) => address === job)?.[1] as Uint8Array;
      write.mockRestore();
      const word = (at: number) => new DataView(bytes.buffer, bytes.byteOffset).getUint32(at, true);
      const unit = random.integer(0, word(JOB_UNIT_COUNT) - 1);
      const far = new Uint8Array(new Int32Array([2 ** 25]).buffer);
      runtime.executor.write(word(JOB_UNITS) + unit * UNIT_BYTES + UNIT_SEQUENCE, far);
      return prepared;
    },
  };
}

test('a long call keeps its record while many short ones come and go', async () => {
  const runtime = await start(2);
  for (let round = 0; round < 3; round++) {
    const long = inputsOf(2000, 2);
    const outcome = run(runtime, long, 'workers');
    for (let i = 0; i < 12; i++) {
      const short = inputsOf(random.integer(1, 60), 2);
      expect(await run(runtime, short, 'ring'), seed).toEqual(await run(one, short, 'ring'));
    }
    expect(await outcome, seed).toEqual(await run(one, long, 'workers'));
  }
});

describe.each(['ring', 'workers'] as const)('%s', (who) => {
  test('calls at once and one after another have the bits of one thread', async () => {
    const runtime = await start(random.integer(2, 5));
    for (let round = 0; round < 5; round++) {
      const calls = Array.from({ length: random.integer(1, 4) }, anyInputs);
      const outputs = await Promise.all(calls.map((inputs) => run(runtime, inputs, who)));
      for (const [i, inputs] of calls.entries()) expect(outputs[i], seed).toEqual(await run(one, inputs, who));
      // Some rounds find workers asleep on the ring, some at their messages.
      if (random.integer(0, 2) === 0) await new Promise((resolve) => setTimeout(resolve, 2 * LINGER_MS));
    }
  });

  test('a trap in any thread ends its call with an error, and no other', async () => {
    const runtime = await start(3);
    for (let round = 0; round < 4; round++) {
      const [good, bad] = [anyInputs(), anyInputs()];
      const [failed, done] = await Promise.allSettled([
        runtime.run({}, spoiled(runtime, bad, who, round % 2)),
        run(runtime, good, who),
      ]);
      expect(failed, seed).toMatchObject({ status: 'rejected', reason: { code: 'execution-failed' } });
      expect((failed as PromiseRejectedResult).reason.message).toContain('a kernel failed');
      expect(done, seed).toEqual({ status: 'fulfilled', value: await run(one, good, who) });
    }
  });

  test('an abort at any moment ends the call, and no other', async () => {
    const runtime = await start(3);
    for (let round = 0; round < 5; round++) {
      const controller = new AbortController();
      const [aborted, good] = [inputsOf(700, 4), anyInputs()];
      const calls = [run(runtime, aborted, who, controller.signal), run(runtime, good, who)];
      const settled = Promise.allSettled(calls);
      setTimeout(() => controller.abort(new Error('enough')), random.integer(0, 4));
      const [first, second] = await settled;
      if (first?.status === 'rejected') expect(first.reason.message).toBe('enough');
      expect(second, seed).toEqual({ status: 'fulfilled', value: await run(one, good, who) });
    }
  });

  test('workers that die at any moment take the calls in hand along, and nothing hangs', async () => {
    const runtime = await start(3);
    for (let round = 0; round < 4; round++) {
      const calls = Array.from({ length: 5 }, anyInputs);
      const settled = Promise.allSettled(calls.map((inputs) => run(runtime, inputs, who)));
      await new Promise((resolve) => setTimeout(resolve, random.integer(0, 3)));
      const death = started.at(-1 - random.integer(0, 2))?.terminate();
      for (const [i, result] of (await settled).entries()) {
        if (result.status === 'rejected') expect(result.reason.code, seed).toBe('execution-failed');
        else expect(result.value, seed).toEqual(await run(one, calls[i] as Inputs, who));
      }
      await death;
    }
    const inputs = anyInputs();
    expect(await run(runtime, inputs, who), seed).toEqual(await run(one, inputs, who));
  });
});
