/** Scores of any size: past where one key wins each row a larger smScale changes nothing, up to the largest that is taken. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { createProblem } from '../../../attention/problem.ts';
import { tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { descriptorOf } from '../kernel-table.ts';
import { simulateAttention } from '../testing/simulator/run.ts';

const seed = runSeed();
const [LENGTH, DIM] = [40, 32];

describe(`large scores (SAGEATTENTION_SEED=${seed})`, () => {
  test.each([
    ['qk-int8-pv-fp16-cuda', 'sm_80', 80],
    ['qk-int4-pv-fp8-cuda', 'sm_89', 80],
    ['qk-int8-pv-fp8-cuda-sm90', 'sm_90a', 30],
    ['qk-fp4-pv-fp4', 'sm_80', 80],
  ] as const)('%s on %s, up to 2^%i', (name, target, most) => {
    const random = new Random(seed);
    const make = () => tensor(random.normals(LENGTH * DIM), [1, 1, LENGTH, DIM]);
    const [q, k, v] = [make(), make(), make()];
    const descriptor = descriptorOf(name);
    const [qkQuantGran, pvAccumDtype, smoothQ] = [
      descriptor.qkQuantGran,
      descriptor.pvAccumDtype,
      descriptor.smoothQ,
    ].map(([first]) => first);
    const choice = { descriptor, qkQuantGran, pvAccumDtype, smoothK: true, smoothV: false, smoothQ } as KernelChoice;
    const outputOf = (smScale: number) => {
      const problem = createProblem(q, k, v, { smScale });
      return simulateAttention(problem, choice, { target, multiprocessors: 1 }, { q, k, v }).output
        .data as Float32Array;
    };
    const winners = [1, -1].map((sign) => outputOf(sign * 2 ** 24)) as [Float32Array, Float32Array];
    fc.assert(
      fc.property(fc.integer({ min: 25, max: most }), fc.boolean(), (power, negative) => {
        const expected = winners[negative ? 1 : 0] as Float32Array;
        let [error, size] = [0, 0];
        outputOf((negative ? -1 : 1) * 2 ** power).forEach((value, i) => {
          error += Math.abs(value - (expected[i] as number));
          size += Math.abs(expected[i] as number);
        });
        // Of powers of two apart the scores are the same numbers: the same key wins.
        expect(error / size).toBeLessThan(0.01);
      }),
      { seed, numRuns: 3, endOnFailure: true },
    );
    for (const smScale of [2 ** (most + 1), -1e39, Number.MAX_VALUE]) {
      expect(() => outputOf(smScale)).toThrow(
        expect.objectContaining({ code: 'unsupported-option', argument: 'options.smScale' }),
      );
    }
  });
});
