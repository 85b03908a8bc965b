/** What masks and softcap do to scores, over their whole range, on a kernel of each family. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import type { KernelName } from '../../../../attention/kernels.ts';
import type { AttentionOptions } from '../../../../attention/options.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { exactAttention } from '../../../../reference/index.ts';
import { type Tensor, tensor } from '../../../../tensor/tensor.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';

const seed = runSeed();
const KERNELS = [
  ['qk-int8-pv-fp16-cuda', 'sm_80', 0.025],
  ['qk-int8-pv-fp8-cuda', 'sm_89', 0.06],
  ['qk-int8-pv-fp8-cuda-sm90', 'sm_90a', 0.06],
] as const;
const [LQ, LK, DIM] = [5, 40, 32];

function attend(name: KernelName, target: (typeof KERNELS)[number][1], operands: Operands, options: AttentionOptions) {
  const descriptor = descriptorOf(name as Parameters<typeof descriptorOf>[0]);
  const { q, k, v } = operands;
  const problem = createProblem(q, k, v, options);
  const choice = {
    descriptor,
    qkQuantGran: descriptor.qkQuantGran[0] ?? 'per-thread',
    pvAccumDtype: descriptor.pvAccumDtype[0] as never,
    smoothK: true,
    smoothV: false,
    smoothQ: false as const,
  };
  const inputs = { ...operands, attnMask: options.attnMask as Tensor | undefined };
  return simulateAttention(problem, choice, { target, multiprocessors: 1 }, inputs).output.data as Float32Array;
}

interface Operands {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
}

function operandsOf(random: Random): Operands {
  const make = (length: number) => tensor(random.normals(length * DIM), [1, 1, length, DIM]);
  return { q: make(LQ), k: make(LK), v: make(LK) };
}

describe(`scores (SAGEATTENTION_SEED=${seed})`, () => {
  test.each(KERNELS)('%s: softcap of any size', (name, target, bound) => {
    const sizes = fc.double({ min: -300, max: 308, noNaN: true }).map((exponent) => 10 ** exponent);
    const nearScores = fc.double({ min: 0.05, max: 2000, noNaN: true });
    fc.assert(
      fc.property(fc.oneof(sizes, nearScores, fc.constantFrom(1e7, 3.4e38, 1e20)), fc.nat(), (softcap, of) => {
        const operands = operandsOf(new Random(of));
        const exact = exactAttention(operands.q, operands.k, operands.v, { softcap }).output;
        const got = attend(name, target, operands, { softcap });
        let [error, size] = [0, 0];
        for (const [i, x] of exact.entries()) {
          error += Math.abs((got[i] as number) - x);
          size += Math.abs(x);
        }
        expect(error / size).toBeLessThan(bound);
      }),
      { seed, numRuns: 5, endOnFailure: true },
    );
  });

  test.each(KERNELS)('%s: NaN in an additive mask is NaN in its row, and there only', (name, target) => {
    const operands = operandsOf(new Random(seed));
    const values = new Float32Array(LQ * LK).map((_, i) => (i % 7 === 0 ? Number.NEGATIVE_INFINITY : 0));
    values[2 * LK + 4] = Number.NaN;
    const output = attend(name, target, operands, { attnMask: tensor(values, [LQ, LK]) });
    const rows = Array.from({ length: LQ }, (_, row) => output.subarray(row * DIM, (row + 1) * DIM));
    expect(rows.map((row) => row.every(Number.isNaN))).toEqual([false, false, true, false, false]);
    expect(rows.map((row) => row.every(Number.isFinite))).toEqual([true, true, false, true, true]);
  });
});
