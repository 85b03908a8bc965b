import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { arithmeticOf, EXACT, wholeCall } from './calls.ts';
import { createExecutor } from './executor.ts';
import { ACCURATE_KERNEL, INTEGER_KERNEL } from './kernel-table.ts';
import { loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';

test.each(['threads', 'worker', 'inline'] as const)('%s: addresses beyond 2 GiB', async (kind) => {
  const random = new Random(runSeed());
  const { module, simd, relaxed } = await loadModule('auto');
  const executor = await createExecutor(module, { threads: 2, kind });
  try {
    // Reserved, never touched: it takes no real memory.
    executor.memory.allocate(2.5 * 2 ** 30);
    const runtime = new Runtime(executor, simd, relaxed);
    const operand = () => tensor(random.normals(2 * 300 * 40), [1, 2, 300, 40]);
    const inputs = { q: operand(), k: operand(), v: operand(), attnMask: tensor(random.normals(300), [1, 300]) };
    const { q, k, v, attnMask } = inputs;
    const problem = createProblem(q, k, v, { attnMask, returnLse: true });
    const integer = arithmeticOf(chooseOptions(INTEGER_KERNEL, problem, {}));
    const accurate = arithmeticOf(chooseOptions(ACCURATE_KERNEL, problem, {}));
    for (const arithmetic of [integer, accurate, EXACT]) {
      const { output } = await runtime.run({}, wholeCall(runtime, problem, arithmetic, inputs));
      const { relativeL1 } = compare(toFloat32(output as Tensor), attentionExact(problem, inputs).output);
      expect(relativeL1, `seed ${random.seed}`).toBeLessThan(0.03);
    }
    const controller = new AbortController();
    const aborted = runtime.run({ signal: controller.signal }, wholeCall(runtime, problem, integer, inputs));
    controller.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
  } finally {
    await executor.dispose();
  }
});

test.each(['threads', 'inline'] as const)('%s: calls that do not fit at once wait for each other', async (kind) => {
  const random = new Random(runSeed());
  const { module, simd, relaxed } = await loadModule('auto');
  const executor = await createExecutor(module, { threads: 2, kind });
  try {
    const runtime = new Runtime(executor, simd, relaxed);
    const operand = () => tensor(random.normals(4 * 1024 * 64), [1, 4, 1024, 64]);
    const all = Array.from({ length: 4 }, () => ({ q: operand(), k: operand(), v: operand() }));
    const first = all[0] as (typeof all)[0];
    const problem = createProblem(first.q, first.k, first.v, {});
    const arithmetic = arithmeticOf(chooseOptions(INTEGER_KERNEL, problem, {}));
    const call = (inputs: typeof first) => runtime.run({}, wholeCall(runtime, problem, arithmetic, inputs));
    const expected: Float32Array[] = [];
    for (const inputs of all) expected.push(toFloat32((await call(inputs)).output as Tensor));
    // What is left is enough for one call, not for two.
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
