import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { arithmeticOf, WholeCalls } from './calls.ts';
import { CallerExecutor, createWorkers, type Executor, type ExecutorKind } from './executor.ts';
import { ACCURATE_KERNEL, EXACT_KERNEL, INTEGER_KERNEL } from './kernel-table.ts';
import { compileUnshared, loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';

async function start(kind: ExecutorKind): Promise<Runtime> {
  const { module, simd, relaxed } = await loadModule('auto');
  const executor =
    kind === 'inline'
      ? await CallerExecutor.create(await compileUnshared(simd), 'a test')
      : ((await createWorkers(module, { threads: 2, shortWork: 0, kind })) as Executor);
  return new Runtime(executor, simd, relaxed);
}

test.each(['threads', 'worker', 'inline'] as const)('%s: addresses beyond 2 GiB', async (kind) => {
  const random = new Random(runSeed());
  const runtime = await start(kind);
  const { executor } = runtime;
  try {
    // Reserved, never touched: it takes no real memory.
    executor.memory.allocate(2.5 * 2 ** 30);
    const operand = () => tensor(random.normals(2 * 300 * 40), [1, 2, 300, 40]);
    const inputs = { q: operand(), k: operand(), v: operand(), attnMask: tensor(random.normals(300), [1, 300]) };
    const { q, k, v, attnMask } = inputs;
    const problem = createProblem(q, k, v, { attnMask, returnLse: true });
    const callsOf = (kernel: typeof INTEGER_KERNEL) =>
      new WholeCalls(problem, arithmeticOf(chooseOptions(kernel, problem, {})), runtime.simd);
    for (const kernel of [INTEGER_KERNEL, ACCURATE_KERNEL, EXACT_KERNEL]) {
      const { output } = await runtime.run({}, callsOf(kernel).parts(runtime, inputs));
      const { relativeL1 } = compare(toFloat32(output as Tensor), attentionExact(problem, inputs).output);
      expect(relativeL1, `seed ${random.seed}`).toBeLessThan(0.03);
    }
    const controller = new AbortController();
    const aborted = runtime.run({ signal: controller.signal }, callsOf(INTEGER_KERNEL).parts(runtime, inputs));
    controller.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
  } finally {
    await executor.dispose();
  }
});

test.each(['threads', 'inline'] as const)('%s: calls that do not fit at once wait for each other', async (kind) => {
  const random = new Random(runSeed());
  const runtime = await start(kind);
  const { executor } = runtime;
  try {
    const operand = () => tensor(random.normals(4 * 1024 * 64), [1, 4, 1024, 64]);
    const all = Array.from({ length: 4 }, () => ({ q: operand(), k: operand(), v: operand() }));
    const first = all[0] as (typeof all)[0];
    const problem = createProblem(first.q, first.k, first.v, {});
    const calls = new WholeCalls(problem, arithmeticOf(chooseOptions(INTEGER_KERNEL, problem, {})), runtime.simd);
    const call = (inputs: typeof first) => runtime.run({}, calls.parts(runtime, inputs));
    const expected: Float32Array[] = [];
    for (const inputs of all) expected.push(toFloat32((await call(inputs)).output as Tensor));
    // The remaining memory is enough for one call, not for two.
    executor.memory.allocate(4 * 2 ** 30 - executor.memory.usedBytes - 8 * 2 ** 20);
    const outputs = all.map((inputs) => {
      const output = call(inputs);
      // Taken when the call was made, also where it waits.
      (inputs.v.data as Float32Array).fill(7);
      return output;
    });
    for (const [i, { output }] of (await Promise.all(outputs)).entries()) {
      expect(toFloat32(output as Tensor), `seed ${random.seed}, call ${i}`).toEqual(expected[i]);
    }
    executor.memory.allocate(4 * 2 ** 20);
    await expect(call(first)).rejects.toMatchObject({ code: 'out-of-memory' });
  } finally {
    await executor.dispose();
  }
});
