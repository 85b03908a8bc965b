import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { e4m3ToNumber } from '../tensor/formats/float8.ts';
import { keyGrouping, queryGrouping } from './groups.ts';
import {
  CUDA_ROUNDING,
  quantizeIntegers,
  roundHalfAway,
  roundHalfEven,
  TRITON_BLOCK_ROUNDING,
  TRITON_THREAD_ROUNDING,
} from './integers.ts';
import { INT_MAX, TILINGS, V_FP8_MAX } from './schemes.ts';
import { blockMeans, channelMean, smoothingMean, subtractMean } from './smoothing.ts';
import { permutedPosition, quantizeValueFp8, TOKEN_PERMUTATION } from './value-fp8.ts';

const seed = runSeed();
const settings = { seed: seed | 0, numRuns: 200 };
const granularities = ['per-block', 'per-warp', 'per-thread'] as const;

describe('groups', () => {
  it('follow the fragments of mma.m16n8 inside warps', () => {
    const q = queryGrouping('per-thread', TILINGS.sm80);
    // Rows lane / 4 and lane / 4 + 8 share a thread; 8 scales for every 32 tokens.
    expect([0, 8, 16, 24].map(q.indexOf)).toEqual([0, 0, 0, 0]);
    expect([1, 7, 32, 41, 128].map(q.indexOf)).toEqual([1, 7, 8, 9, 32]);
    const k = keyGrouping('per-thread', TILINGS.sm80);
    expect([0, 1, 2, 3, 6, 7, 8, 9, 62, 64, 67].map(k.indexOf)).toEqual([0, 0, 1, 1, 3, 3, 0, 0, 3, 4, 5]);
    expect(keyGrouping('per-warp', TILINGS.sm90).indexOf(129)).toBe(1);
    expect(queryGrouping('per-warp', TILINGS.sm90).indexOf(33)).toBe(2);
    expect(queryGrouping('per-block', TILINGS.sm90).indexOf(64)).toBe(1);
  });

  it('have an index below their count, and scales for whole blocks', () => {
    for (const tiling of Object.values(TILINGS)) {
      for (const granularity of granularities) {
        for (const length of [0, 1, 63, 64, 65, 127, 129, 1000]) {
          for (const grouping of [queryGrouping(granularity, tiling), keyGrouping(granularity, tiling)]) {
            const count = grouping.count(length);
            expect(count).toBe(grouping.count(Math.max(0, length)));
            for (let token = 0; token < length; token++) expect(grouping.indexOf(token)).toBeLessThan(count);
            if (length === 0) expect(count).toBe(0);
          }
        }
      }
    }
  });
});

describe('integers', () => {
  it('round ties as named', () => {
    expect([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999999].map((x) => roundHalfEven(x) + 0)).toEqual([0, 2, 2, 0, -2, 2]);
    expect([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999999].map((x) => roundHalfAway(x) + 0)).toEqual([1, 2, 3, -1, -2, 2]);
  });

  const inputs = fc.record({
    seed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
    length: fc.integer({ min: 1, max: 150 }),
    dim: fc.integer({ min: 1, max: 9 }),
    exponent: fc.integer({ min: -60, max: 60 }),
    granularity: fc.constantFrom(...granularities),
    max: fc.constantFrom(INT_MAX.int8, INT_MAX.int4),
    rounding: fc.constantFrom(CUDA_ROUNDING, TRITON_BLOCK_ROUNDING),
  });

  it(`are within half a step of what they stand for (seed ${seed})`, () => {
    fc.assert(
      fc.property(inputs, ({ length, dim, exponent, granularity, max, rounding, ...rest }) => {
        const x = new Random(rest.seed).normals(length * dim, 2 ** exponent);
        const grouping = queryGrouping(granularity, TILINGS.sm80);
        const { values, scales } = quantizeIntegers(x, dim, grouping, max, rounding);
        for (let i = 0; i < x.length; i++) {
          const scale = scales[grouping.indexOf(Math.floor(i / dim))] as number;
          expect(Math.abs(values[i] as number)).toBeLessThanOrEqual(max);
          // Half a step, and what float32 loses in scale and quotient: two roundings of at most 127 steps.
          const bound = scale * (0.5 + max * 2 ** -22);
          expect(Math.abs((values[i] as number) * scale - (x[i] as number))).toBeLessThanOrEqual(bound);
        }
      }),
      settings,
    );
  });

  it('of a group of zeros are zeros with scale 0, subnormals stay in range, NaNs spoil nothing', () => {
    const grouping = keyGrouping('per-block', TILINGS.portable);
    expect(quantizeIntegers(new Float32Array(8), 4, grouping, 127)).toEqual({
      values: new Int8Array(8),
      scales: Float32Array.of(0),
    });
    const away = quantizeIntegers(new Float32Array(8), 4, grouping, 127, TRITON_THREAD_ROUNDING);
    expect(away.values.every((value) => value === 0)).toBe(true);
    const tiny = quantizeIntegers(Float32Array.of(1e-45, -1e-44, 1e-43, -2e-43), 4, grouping, 127);
    expect(tiny.values.every((value) => Math.abs(value) <= 127)).toBe(true);
    const { values, scales } = quantizeIntegers(
      Float32Array.of(1, Number.NaN, Number.NEGATIVE_INFINITY, -127),
      2,
      grouping,
      127,
    );
    expect([...values, ...scales]).toEqual([1, 0, 0, -127, 1]);
    expect(quantizeIntegers(new Float32Array(0), 4, grouping, 127).scales.length).toBe(0);
  });
});

describe('smoothing', () => {
  it('takes means of channels and of blocks, leaving out what is not finite', () => {
    const x = Float32Array.of(1, 10, 3, 20, Number.NaN, 60, 8, Number.POSITIVE_INFINITY);
    expect([...channelMean(x, 2)]).toEqual([4, 30]);
    expect([...channelMean(x, 2, 1, 2)]).toEqual([3, 20]);
    expect([...channelMean(x, 2, 2, 2)]).toEqual([0, 0]);
    expect([...blockMeans(x, 2, 3)]).toEqual([2, 30, 8, 0]);
    expect([...subtractMean(x, Float32Array.of(4, 30), 1, 3)]).toEqual([-1, -10, Number.NaN, 30]);
  });

  it('weighs tokens by their sizes only where those differ much', () => {
    const ordinary = Float32Array.of(1, 8, 2, 4, 0, 0, -1, 3);
    expect([...smoothingMean(ordinary, 2)]).toEqual([...channelMean(ordinary, 2)]);
    const large = Float32Array.of(...ordinary, 4000, -5000, Number.NaN, 6000);
    const mean = smoothingMean(large, 2);
    expect(Math.max(...mean.map(Math.abs))).toBeLessThan(8);
    // Left out, it does not matter.
    expect([...smoothingMean(large, 2, Uint8Array.of(1, 1, 1, 1, 0, 0))]).toEqual([...channelMean(ordinary, 2)]);
    // A token next to zero does not take all.
    expect(smoothingMean(Float32Array.of(0.01, 5, 5, 6, 6), 1)[0]).toBeGreaterThan(0.2);
    expect([...smoothingMean(new Float32Array(4), 2)]).toEqual([0, 0]);
  });
});

describe('V in FP8', () => {
  it('is stored transposed, permuted inside every 16, and padded with zeros', () => {
    expect(Array.from({ length: 16 }, (_, i) => permutedPosition(16 + (TOKEN_PERMUTATION[i] as number)))).toEqual(
      Array.from({ length: 16 }, (_, i) => 16 + i),
    );
    const v = Float32Array.from({ length: 20 * 2 }, (_, i) => (i % 2 === 0 ? i / 2 : -i));
    const { codes, paddedLength, scales } = quantizeValueFp8(v, 2, { padTo: 32 });
    expect([paddedLength, codes.length]).toEqual([32, 64]);
    expect(scales[0]).toBeCloseTo(19 / 448, 7);
    for (let token = 0; token < 20; token++) {
      const decoded = e4m3ToNumber(codes[permutedPosition(token)] as number) * (scales[0] as number);
      // Half a step of three mantissa bits, or half the smallest step.
      expect(Math.abs(decoded - token)).toBeLessThanOrEqual(token / 16 + 2 ** -10 * (scales[0] as number));
    }
    const used = new Set(Array.from({ length: 20 }, (_, token) => permutedPosition(token)));
    for (let i = 0; i < 32; i++) if (!used.has(i)) expect([codes[i], codes[32 + i]]).toEqual([0, 0]);
  });

  it('has scale 0 and zeros for a channel of zeros, and keeps vmax', () => {
    const { codes, scales } = quantizeValueFp8(Float32Array.of(0, 5, 0, -2), 2, { vMax: V_FP8_MAX.fp16Accumulator });
    expect(scales[0]).toBe(0);
    expect([codes[0], codes[permutedPosition(1)]].map((code) => (code as number) & 0x7f)).toEqual([0, 0]);
    expect(e4m3ToNumber(codes[64] as number)).toBe(2.25);
  });

  it('keeps a NaN where it is', () => {
    const { codes, scales } = quantizeValueFp8(Float32Array.of(Number.NaN, 448, Number.POSITIVE_INFINITY), 1);
    expect([codes[permutedPosition(0)], codes[permutedPosition(1)], codes[permutedPosition(2)]]).toEqual([
      0x7f, 0x7e, 0x7f,
    ]);
    expect(scales[0]).toBe(1);
  });
});
