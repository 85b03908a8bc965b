/** Rows that do not see a token are as right beside one that is a thousand times as large as without it. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import type { KernelName } from '../../../../attention/kernels.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { exactAttention } from '../../../../reference/index.ts';
import { tensor } from '../../../../tensor/tensor.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';

const seed = runSeed();
const DIM = 32;

interface Call {
  readonly length: number;
  /** Tokens from here on are large, and no row before sees them. */
  readonly largeFrom: number;
  readonly times: number;
  readonly packed: boolean;
  readonly seed: number;
}

/** Relative L1 of the rows that see no large token. */
function errorOf(
  name: KernelName,
  target: 'sm_89' | 'sm_90a',
  pvAccumDtype: string | undefined,
  { length, largeFrom, packed, seed }: Call,
  large: { readonly k: number; readonly v: number },
): number {
  const random = new Random(seed);
  const make = (times: number) => {
    const values = random.normals(length * DIM).map((x, i) => (i >= largeFrom * DIM ? x * times : x));
    return tensor(values, [1, 1, length, DIM]);
  };
  const [q, k, v] = [make(1), make(large.k), make(large.v)];
  const document = (token: number) => token >= largeFrom;
  const shown = Uint8Array.from({ length: length * length }, (_, i) =>
    document(Math.floor(i / length)) === document(i % length) ? 1 : 0,
  );
  const options = packed ? { attnMask: tensor(shown, [length, length], { dtype: 'bool' }) } : { isCausal: true };
  const descriptor = descriptorOf(name as Parameters<typeof descriptorOf>[0]);
  const choice = {
    descriptor,
    qkQuantGran: descriptor.qkQuantGran[0] ?? 'per-thread',
    pvAccumDtype: (pvAccumDtype ?? descriptor.pvAccumDtype[0]) as never,
    smoothK: true,
    smoothV: false,
    smoothQ: descriptor.smoothQ[0],
  };
  const exact = exactAttention(q, k, v, options).output;
  const inputs = { q, k, v, attnMask: options.attnMask };
  const { output } = simulateAttention(createProblem(q, k, v, options), choice, { target, multiprocessors: 1 }, inputs);
  let [error, size] = [0, 0];
  for (let i = 0; i < largeFrom * DIM; i++) {
    error += Math.abs(((output.data as Float32Array)[i] as number) - (exact[i] as number));
    size += Math.abs(exact[i] as number);
  }
  return error / size;
}

describe(`tokens far apart (SAGEATTENTION_SEED=${seed})`, () => {
  const call = (): fc.Arbitrary<Call> =>
    fc
      .record({
        length: fc.integer({ min: 72, max: 150 }),
        share: fc.double({ min: 0, max: 1, noNaN: true }),
        times: fc.double({ min: 1, max: 3 }).map((power) => 10 ** power),
        packed: fc.boolean(),
        seed: fc.nat(),
      })
      .map(({ share, length, ...rest }) => ({
        ...rest,
        length,
        largeFrom: length - 1 - Math.floor(share * (length - 25)),
      }));

  test.each([
    ['qk-int8-pv-fp8-cuda', 'sm_89', 'fp32+fp16'],
    ['qk-int8-pv-fp8-cuda', 'sm_89', 'fp32+fp32'],
    ['qk-int8-pv-fp8-cuda-sm90', 'sm_90a', undefined],
  ] as const)('V: %s %s %s', (name, target, accumulator) => {
    fc.assert(
      fc.property(call(), (call) => {
        const alone = errorOf(name, target, accumulator, call, { k: 1, v: 1 });
        expect(errorOf(name, target, accumulator, call, { k: 1, v: call.times })).toBeLessThan(1.7 * alone + 0.005);
      }),
      { seed, numRuns: 3, endOnFailure: true },
    );
  });

  // Also where a scale is that of both, of one tile or of all keys (`keyExponents`).
  test.each([
    ['qk-int8-pv-fp16-cuda', 'sm_89', undefined],
    ['qk-int8-pv-fp8-cuda', 'sm_89', undefined],
    ['qk-int4-pv-fp8-cuda', 'sm_89', undefined],
    ['qk-int8-pv-fp8-cuda-sm90', 'sm_90a', undefined],
    ['qk-int8-pv-fp16-cuda-sm90', 'sm_90a', undefined],
  ] as const)('K: %s %s', (name, target, accumulator) => {
    fc.assert(
      fc.property(call(), (call) => {
        const alone = errorOf(name, target, accumulator, call, { k: 1, v: 1 });
        expect(errorOf(name, target, accumulator, call, { k: call.times, v: 1 })).toBeLessThan(1.7 * alone + 0.005);
      }),
      { seed, numRuns: 3, endOnFailure: true },
    );
  });
});
