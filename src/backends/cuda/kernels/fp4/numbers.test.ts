/** What FP4 attention computes: the algorithm's numbers, at every magnitude of V, and over a cache. Kernels run in the simulator. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { attentionExact } from '../../../../reference/exact.ts';
import { attentionQuantized, FP4_PV_FP4_ALGORITHM } from '../../../../reference/quantized.ts';
import { toFloat32 } from '../../../../tensor/access.ts';
import { type Tensor, tensor } from '../../../../tensor/tensor.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { planAttend, planKeyValue } from '../../launches/plan.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';

const seed = runSeed();

function relativeL1(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, magnitude] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error += Math.abs((actual[i] as number) - (expected[i] as number));
    magnitude += Math.abs(expected[i] as number);
  }
  return error / magnitude;
}

function operands(keys: number, dim: number, magnitude = 1): { q: Tensor; k: Tensor; v: Tensor } {
  const random = new Random(seed);
  const make = (length: number, by: number) =>
    tensor(
      random.normals(length * dim).map((value) => value * by),
      [1, 1, length, dim],
    );
  return { q: make(20, 1), k: make(keys, 1), v: make(keys, magnitude) };
}

const choiceOf = (
  kernel: 'qk-fp4-pv-fp4' | 'qk-fp4-pv-fp4-cuda' | 'qk-fp4-pv-fp8-cuda',
  smoothQ: 'block' | false = 'block',
) =>
  ({
    descriptor: descriptorOf(kernel),
    pvAccumDtype: 'fp32',
    smoothK: true,
    smoothV: false,
    smoothQ,
    scaleSearch: 'mse',
  }) as const;

const DEVICE = { target: 'sm_120a', multiprocessors: 1 } as const;

describe(`FP4 (SAGEATTENTION_SEED=${seed})`, () => {
  test("on tensor cores of FP4 and of FP16 the numbers are the algorithm's", () => {
    const inputs = operands(130, 64);
    const problem = createProblem(inputs.q, inputs.k, inputs.v, { returnLse: true });
    const expected = attentionQuantized(problem, inputs, FP4_PV_FP4_ALGORITHM);
    for (const kernel of ['qk-fp4-pv-fp4', 'qk-fp4-pv-fp4-cuda'] as const) {
      const { output, lse } = simulateAttention(problem, choiceOf(kernel), DEVICE, inputs);
      // A sum in another order moves a value over the edge of its code now and then.
      expect(relativeL1(toFloat32(output), expected.output)).toBeLessThan(0.01);
      expect(relativeL1(toFloat32(lse as Tensor), expected.lse)).toBeLessThan(1e-3);
    }
  });

  test('V loses the same at every magnitude', () => {
    const run = (magnitude: number) => {
      const inputs = operands(130, 32, magnitude);
      const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
      const { output } = simulateAttention(problem, choiceOf('qk-fp4-pv-fp4-cuda'), DEVICE, inputs);
      return { output: toFloat32(output), exact: attentionExact(problem, inputs).output };
    };
    const first = run(1);
    // A power of two moves exponents alone, so every bit stays.
    for (const magnitude of [2 ** -10, 2 ** 13]) {
      expect(run(magnitude).output).toEqual(first.output.map((value) => value * magnitude));
    }
    // Another factor rounds other codes, which are different samples of the same error.
    for (const magnitude of [0.001, 1e4]) {
      const { output, exact } = run(magnitude);
      const ratio = relativeL1(output, exact) / relativeL1(first.output, first.exact);
      expect(ratio).toBeGreaterThan(0.87);
      expect(ratio).toBeLessThan(1.15);
    }
  });

  test('tiles of V of very different magnitudes are summed in one unit', () => {
    const inputs = operands(256, 32);
    const data = inputs.v.data as Float32Array;
    const magnitudes = [1, 1e-9, 1e6, 0];
    for (const [i, value] of data.entries()) data[i] = value * (magnitudes[Math.floor(i / (64 * 32))] as number);
    const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
    const { output } = simulateAttention(problem, choiceOf('qk-fp4-pv-fp4-cuda'), DEVICE, inputs);
    expect(relativeL1(toFloat32(output), attentionExact(problem, inputs).output)).toBeLessThan(0.3);
  });

  test.each([
    ['qk-fp4-pv-fp4', 'sm_80', 'fp32'],
    ['qk-fp4-pv-fp8-cuda', 'sm_89', 'fp32+fp32'],
    // Its cache lies as block-scaled products take it.
    ['qk-fp4-pv-fp4-cuda', 'sm_120a', 'fp32'],
  ] as const)(
    'over a cache of %s Q stays in FP16: decoding loses less, and reads K once',
    (kernel, target, pvAccumDtype) => {
      const random = new Random(seed);
      const [heads, keys, dim] = [7, 600, 64];
      const make = (count: number, length: number) =>
        tensor(random.normals(count * length * dim), [1, count, length, dim]);
      const inputs = { q: make(heads, 1), k: make(1, keys), v: make(1, keys) };
      const problem = createProblem(inputs.q, inputs.k, inputs.v, { returnLse: true });
      const choice = { ...choiceOf(kernel), pvAccumDtype };
      const device = { target, multiprocessors: 16 } as const;
      const first = planKeyValue(problem, choice, device);
      const second = planAttend(problem, choice, device);
      expect(second.launches.map(({ name }) => name)).toEqual(['attention']);
      const { output, lse } = simulateAttention(problem, choice, device, inputs, {
        scratch: { ...first.kept, ...first.scratch, ...second.scratch },
        zeroed: second.zeroed ?? {},
        constants: first.constants,
        launches: [...first.launches, ...second.launches],
      });
      const exact = attentionExact(problem, inputs);
      const actual = toFloat32(output);
      for (let head = 0; head < heads; head++) {
        const [from, end] = [head * dim, (head + 1) * dim];
        expect(relativeL1(actual.subarray(from, end), exact.output.subarray(from, end)), `head ${head}`).toBeLessThan(
          0.25,
        );
      }
      expect(relativeL1(toFloat32(lse as Tensor), exact.lse)).toBeLessThan(0.01);
    },
  );
});
