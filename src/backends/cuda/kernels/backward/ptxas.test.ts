/** ptxas accepts the gradient kernels for every target, and those whose speed counts do not spill. */
import { describe, expect, test } from 'vitest';
import { createBackwardProblem } from '../../../../attention/backward.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { emptyTensor } from '../../../../tensor/tensor.ts';
import { descriptorOf } from '../../kernel-table.ts';
import type { SimulatableModule } from '../../launches/arguments.ts';
import { planBackward } from '../../launches/backward.ts';
import { TARGETS, type Target } from '../../ptx/targets.ts';
import { assemble, ptxasVersion } from '../../testing/ptxas.ts';

function launchesOf(target: Target, dim: number, isCausal: boolean, softcap: number) {
  const operand = () => emptyTensor([1, 1, 256, dim], 'bfloat16');
  const attention = createProblem(operand(), operand(), operand(), { isCausal, softcap, returnLse: true });
  const results = { output: operand(), lse: emptyTensor([1, 1, 256], 'float32'), dOutput: operand() };
  const problem = createBackwardProblem(attention, results, undefined, {}, 'fp16');
  const descriptor = descriptorOf('qk-int8-pv-fp16-cuda');
  const smoothing = { smoothK: true, smoothV: false, smoothQ: false } as const;
  const choice = { descriptor, qkQuantGran: 'per-thread', pvAccumDtype: 'fp32', ...smoothing } as const;
  return planBackward(problem, choice, { target, multiprocessors: 132 }).launches;
}

/** ptxas ends a product earlier than `wgmmaGradients` says, before its accumulators are read: a debt of speed. */
const WAIT = /C7517.*warpgroup\.wait is injected/;

describe.skipIf(ptxasVersion() === undefined)('ptxas takes the backward pass', () => {
  const cases = TARGETS.flatMap((target) =>
    // The others share their code with these.
    target === 'sm_86' || target === 'sm_120a' ? [] : [64, 128].map((dim) => ({ target, dim })),
  );
  test.each(cases)('D = $dim on $target', ({ target, dim }) => {
    for (const isCausal of target === 'sm_90a' ? [false, true] : [true]) {
      for (const { name, module } of launchesOf(target, dim, isCausal, 0)) {
        const kernel = (module as SimulatableModule).kernel();
        if (name.startsWith('quantize') || name === 'statistics') continue;
        const { registers, spillStoreBytes, remarks } = assemble(kernel);
        expect(spillStoreBytes, name).toBe(0);
        expect(
          remarks.filter((remark) => !WAIT.test(remark)),
          name,
        ).toEqual([]);
        expect(registers * kernel.threads * kernel.minBlocksPerMultiprocessor, name).toBeLessThanOrEqual(65536);
      }
    }
  });

  test('with a softcap', () => {
    const gradients = launchesOf('sm_80', 128, false, 30).filter(({ name }) => name.startsWith('gradients'));
    for (const { module } of gradients) assemble((module as SimulatableModule).kernel());
  });
});
