import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { E2M1_VALUES, e2m1FromNumber, roundToE2m1 } from '../tensor/formats/float4.ts';
import { e4m3ToNumber } from '../tensor/formats/float8.ts';
import { roundToFloat16 } from '../tensor/formats/float16.ts';
import {
  type Fp4Format,
  fp4Block,
  fp4Scale,
  MXFP4_BLOCK,
  quantizeFp4Block,
  quantizeFp4InPlace,
  SCALE_SEARCHES,
  type ScaleSearch,
} from './fp4-blocks.ts';
import { largestMagnitude, OUTER_MAX, outerScale } from './outer-scale.ts';
import { P_TWO_LEVEL_MAX, quantizeProbabilities } from './two-level.ts';

const seed = runSeed();
const settings = { seed: seed | 0, numRuns: 300 };
const NVFP4 = { format: 'nvfp4', scaleSearch: 'none' } as const;
const FORMATS: readonly Fp4Format[] = ['nvfp4', 'mxfp4'];

/** Blocks of random size and magnitude, within what scales can hold. */
const arbitraryBlock = (format: Fp4Format) =>
  fc
    .record({
      seed: fc.integer(),
      count: fc.integer({ min: 1, max: fp4Block(format) }),
      exponent: fc.integer({ min: -4, max: 8 }),
    })
    .map(({ seed: own, count, exponent }) => new Random(own).normals(count).map((x) => x * 2 ** exponent));

function dequantized(block: Float32Array, format: Fp4Format, scaleSearch: ScaleSearch) {
  const codes = new Uint8Array(MXFP4_BLOCK);
  const scale = fp4Scale(format, quantizeFp4Block(block.slice(), block.length, { format, scaleSearch }, codes));
  return { scale, values: Float32Array.from(block, (_, i) => scale * (E2M1_VALUES[codes[i] as number] as number)) };
}

const squaredError = (x: Float32Array, y: Float32Array) =>
  x.reduce((sum, value, i) => sum + (value - (y[i] as number)) ** 2, 0);

describe(`FP4 blocks (seed ${seed})`, () => {
  it('every code times every scale of NVFP4 is exact in FP16: what portable kernels multiply', () => {
    for (let code = 1; code < 0x7f; code++) {
      for (const value of E2M1_VALUES) {
        const product = value * e4m3ToNumber(code);
        expect(roundToFloat16(product)).toBe(product);
      }
    }
  });

  it.each(FORMATS)('%s: every code comes back, at every scale it can have', (format) => {
    const block = Float32Array.from(E2M1_VALUES.slice(0, 8).concat(E2M1_VALUES.slice(8)));
    for (let exponent = -6; exponent <= 6; exponent++) {
      const scaled = block.map((value) => value * 2 ** exponent);
      for (const search of SCALE_SEARCHES) expect(dequantized(scaled, format, search).values).toEqual(scaled);
    }
  });

  it('ties go to even, what is above 6 saturates, NaN becomes +6', () => {
    const ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 1e30, Number.POSITIVE_INFINITY, Number.NaN];
    expect(ties.map(roundToE2m1)).toEqual([0, 1, 1, 2, 2, 4, 4, 6, 6, 6, 6]);
    expect(ties.slice(0, -1).map((value) => roundToE2m1(-value))).toEqual([-0, -1, -1, -2, -2, -4, -4, -6, -6, -6]);
    // Between two neighbours everything goes to the nearer.
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 6 }), fc.double({ min: 0, max: 1, noNaN: true }), (code, part) => {
        const [low, high] = [E2M1_VALUES[code] as number, E2M1_VALUES[code + 1] as number];
        const nearest = part === 0.5 ? (code & 1 ? high : low) : part < 0.5 ? low : high;
        expect(E2M1_VALUES[e2m1FromNumber(low + (high - low) * part)]).toBe(nearest);
      }),
      settings,
    );
  });

  it.each(FORMATS)('%s: an element errs by at most half of the widest gap, and of what the scale lost', (format) => {
    fc.assert(
      fc.property(arbitraryBlock(format), (block) => {
        const largest = largestMagnitude(block, 1);
        const { scale, values } = dequantized(block, format, 'none');
        // E4M3 errs by 1 of 16, or by half of its least step, 2^-9; MX clamps values above 6 of 8.
        const clamped = Math.max(0, largest - 6 * scale);
        expect(clamped).toBeLessThanOrEqual(format === 'nvfp4' ? Math.max(largest / 16, 6 * 2 ** -10) : largest / 4);
        for (let i = 0; i < block.length; i++) {
          expect(Math.abs((values[i] as number) - (block[i] as number))).toBeLessThanOrEqual(
            Math.max(scale, clamped) * (1 + 1e-6),
          );
        }
      }),
      settings,
    );
  });

  it.each(FORMATS)('%s: a wider search never errs more', (format) => {
    fc.assert(
      fc.property(arbitraryBlock(format), (block) => {
        const [mse, sixOrFour, none] = (['mse', 'four-over-six', 'none'] as const).map((search) =>
          squaredError(block, dequantized(block, format, search).values),
        ) as [number, number, number];
        expect(sixOrFour).toBeLessThanOrEqual(none * (1 + 1e-5));
        expect(mse).toBeLessThanOrEqual(sixOrFour * (1 + 1e-5));
      }),
      settings,
    );
  });

  it('search takes a third off the squared error of normal numbers', () => {
    const x = new Random(seed).normals(16 * 2000);
    const errorOf = (scaleSearch: ScaleSearch) => {
      const y = x.slice();
      quantizeFp4InPlace(y, 0, 1, y.length, { format: 'nvfp4', scaleSearch });
      return squaredError(x, y) / squaredError(x, new Float32Array(x.length));
    };
    // Mean over 32,000 elements: relative deviation well below 2%.
    expect(errorOf('four-over-six')).toBeLessThan(0.9 * errorOf('none'));
    expect(errorOf('mse')).toBeLessThan(0.8 * errorOf('none'));
  });

  it('runs strided, leaves the rest alone, and what is not finite too', () => {
    const x = new Float32Array(3 * 20).fill(7);
    for (let i = 0; i < 20; i++) x[3 * i + 1] = i < 16 ? i - 8 : 0;
    quantizeFp4InPlace(x, 1, 3, 20, NVFP4);
    for (let i = 0; i < 20; i++) {
      expect([x[3 * i], x[3 * i + 2]]).toEqual([7, 7]);
      const exact = i < 16 ? i - 8 : 0;
      // scale = E4M3(8 / 6) = 1.375; E2M1's largest gap is 2 (from 4 to 6), and 6 * 1.375 reaches 8.
      expect(Math.abs((x[3 * i + 1] as number) - exact)).toBeLessThanOrEqual(1.375);
    }
    const wild = Float32Array.of(Number.NaN, 6, 1e-30, Number.NEGATIVE_INFINITY);
    quantizeFp4InPlace(wild, 0, 1, 4, NVFP4);
    expect([...wild]).toEqual([Number.NaN, 6, 0, Number.NEGATIVE_INFINITY]);
  });

  it('nothing is divided by 0: the least scale is 2^-9, unless zeros are asked for', () => {
    const small = new Float32Array(16).fill(2 ** -10);
    quantizeFp4InPlace(small, 0, 1, 16, NVFP4);
    expect([...small]).toEqual(new Array(16).fill(2 ** -10));
    quantizeFp4InPlace(small, 0, 1, 16, { ...NVFP4, zeroScales: true });
    expect([...small]).toEqual(new Array(16).fill(0));
    const none = new Float32Array(16);
    quantizeFp4InPlace(none, 0, 1, 16, { format: 'mxfp4', scaleSearch: 'mse' });
    expect([...none]).toEqual(new Array(16).fill(0));
  });
});

describe(`outer scale (seed ${seed})`, () => {
  it('is a power of two that puts the largest into (672, 1344]', () => {
    fc.assert(
      fc.property(fc.float({ min: Math.fround(2 ** -114), max: Math.fround(3.4e38), noNaN: true }), (largest) => {
        const scale = outerScale(largest);
        expect(Number.isInteger(Math.log2(scale))).toBe(true);
        expect(largest * scale).toBeGreaterThan(OUTER_MAX / 2);
        expect(largest * scale).toBeLessThanOrEqual(OUTER_MAX);
      }),
      settings,
    );
    expect(outerScale(0)).toBe(1);
    expect(outerScale(OUTER_MAX)).toBe(1);
    // float32's least: the scale has a reciprocal that is normal.
    expect(outerScale(2 ** -149)).toBe(2 ** 126);
  });

  it('counts what is finite and what counts', () => {
    const x = Float32Array.of(1, -2, 3, Number.POSITIVE_INFINITY, 100, 0, Number.NaN, -4);
    expect(largestMagnitude(x, 2)).toBe(100);
    expect(largestMagnitude(x, 2, Uint8Array.of(1, 1, 0, 1))).toBe(4);
    expect(largestMagnitude(x, 2, undefined, 0, 2)).toBe(3);
  });
});

describe(`P in two levels (seed ${seed})`, () => {
  const arbitraryRow = fc.record({ seed: fc.integer(), count: fc.integer({ min: 1, max: 70 }) }).map((made) => {
    const random = new Random(made.seed);
    return Float32Array.from({ length: made.count }, () => P_TWO_LEVEL_MAX * Math.exp(-8 * random.uniform()));
  });

  it.each(['rounded', 'exact'] as const)(
    'divided by the scale %s: errors, and the sum of what is multiplied',
    (divisor) => {
      fc.assert(
        fc.property(arbitraryRow, (p) => {
          const quantized = p.slice();
          const sum = quantizeProbabilities(quantized, p.length, NVFP4, divisor);
          const summed = quantized.reduce((a, b) => a + b, 0);
          expect(Math.abs(sum - summed)).toBeLessThanOrEqual(1e-4 * summed);
          for (let block = 0; block < p.length; block += 16) {
            const largest = Math.max(...p.subarray(block, block + 16));
            for (let i = block; i < Math.min(block + 16, p.length); i++) {
              // Half of E2M1's widest gap (1 of 6) and E4M3's relative error of the scale (1 of 16).
              const bound = largest * (1 / 6 + 1 / 16);
              expect(Math.abs((quantized[i] as number) - (p[i] as number))).toBeLessThanOrEqual(bound);
            }
          }
        }),
        settings,
      );
    },
  );

  it('zeros stay zeros, and a probability too small for a scale of its own is not lost at once', () => {
    expect(quantizeProbabilities(new Float32Array(16), 16, NVFP4)).toBe(0);
    expect(quantizeProbabilities(new Float32Array(16).fill(2 ** -10), 16, NVFP4)).toBe(16 * 2 ** -10);
  });
});
