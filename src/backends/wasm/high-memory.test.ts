import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { arithmeticOf, EXACT, prepareCall } from './calls.ts';
import { createExecutor } from './executor.ts';
import { ACCURATE_KERNEL, INTEGER_KERNEL } from './kernel-table.ts';
import { loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';

test.each(['threads', 'worker', 'inline'] as const)('%s: addresses beyond 2 GiB', async (kind) => {
  const random = new Random(runSeed());
  const { module, simd, relaxed } = await loadModule('auto');
  const executor = createExecutor(module, 2, kind);
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
      const { output } = await runtime.run({}, (lease) => prepareCall(runtime, lease, problem, arithmetic, inputs));
      const { relativeL1 } = compare(toFloat32(output as Tensor), attentionExact(problem, inputs).output);
      expect(relativeL1, `seed ${random.seed}`).toBeLessThan(0.03);
    }
    const controller = new AbortController();
    const aborted = runtime.run({ signal: controller.signal }, (lease) =>
      prepareCall(runtime, lease, problem, integer, inputs),
    );
    controller.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
  } finally {
    await executor.dispose();
  }
});
