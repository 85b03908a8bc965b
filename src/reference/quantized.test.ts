import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { denseCall } from '../../test/support/arbitrary-attention.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import type { PvAccumDtype, PvFormat, QkFormat } from '../quantization/schemes.ts';
import { toFloat32 } from '../tensor/access.ts';
import { type Tensor, tensor } from '../tensor/tensor.ts';
import {
  compare,
  exactAttention,
  type QuantizedOptions,
  quantizedAttention,
  quantizedAttentionVarlen,
  TILINGS,
} from './index.ts';
import { PORTABLE_ALGORITHM, quantizedScores } from './quantized.ts';

const seed = runSeed();
const ACCUMULATORS: readonly PvAccumDtype[] = ['fp32', 'fp16', 'fp16+fp32', 'fp32+fp32', 'fp32+fp16'];

const normal = (random: Random, ...shape: number[]) =>
  tensor(random.normals(shape.reduce((product, size) => product * size, 1)), shape);

/** q, k, v of 4 query heads and 2 of keys; K with a mean of its own per channel, as real keys have. */
function realistic(random: Random, length = 150, dim = 64, keyOffset = 3): { q: Tensor; k: Tensor; v: Tensor } {
  const [q, k, v] = [
    normal(random, 1, 4, length, dim),
    normal(random, 1, 2, length, dim),
    normal(random, 1, 2, length, dim),
  ];
  const keys = k.data as Float32Array;
  for (let i = 0; i < keys.length; i++) keys[i] = (keys[i] as number) + keyOffset * Math.sin(i % dim);
  return { q, k, v };
}

const errorOf = ({ q, k, v }: { q: Tensor; k: Tensor; v: Tensor }, options: QuantizedOptions = {}) =>
  compare(quantizedAttention(q, k, v, options).output, exactAttention(q, k, v).output).relativeL1;

describe(`quantized attention (seed ${seed})`, () => {
  it.each([
    { smoothK: true, smoothQ: false },
    { smoothK: true, smoothQ: true },
    { smoothK: false, smoothQ: false },
  ])('its output is the softmax of its scores times V, %j', (smoothing) => {
    const [length, dim] = [150, 64];
    const random = new Random(seed);
    const [q, k, v] = [
      normal(random, 1, 1, length, dim),
      normal(random, 1, 1, length, dim),
      normal(random, 1, 1, length, dim),
    ];
    const algorithm = { ...PORTABLE_ALGORITHM, ...smoothing, pvFormat: 'fp32' } as const;
    const scores = quantizedScores(q.data as Float32Array, k.data as Float32Array, dim, algorithm);
    const output = new Float64Array(length * dim);
    for (let row = 0; row < length; row++) {
      const weights = scores
        .subarray(row * length, (row + 1) * length)
        .map((score) => Math.exp(score / Math.sqrt(dim)));
      const sum = weights.reduce((a, b) => a + b);
      for (let i = 0; i < length * dim; i++) {
        const at = row * dim + (i % dim);
        output[at] =
          (output[at] as number) +
          ((weights[Math.floor(i / dim)] as number) / sum) * ((v.data as Float32Array)[i] as number);
      }
    }
    expect(compare(quantizedAttention(q, k, v, { algorithm }).output, output).relativeL1).toBeLessThan(1e-5);
  });

  // The published levels: about 1.3% with FP16 PV, 4% with FP8, INT4 and FP4 an order of magnitude more than INT8.
  const QK: Readonly<Record<QkFormat, number>> = { int8: 0.02, int4: 0.2, fp4: 0.25 };
  const PV: Readonly<Record<PvFormat, number>> = { fp32: 0, fp16: 0.001, fp8: 0.035, int8: 0.035, fp4: 0.2 };

  it.each([
    ...(['int8', 'int4', 'fp4'] as const).map((qkFormat) => [qkFormat, 'fp32', 'fp32'] as const),
    ...(['fp16', 'fp8', 'int8', 'fp4'] as const).flatMap((pvFormat) =>
      ACCUMULATORS.map((pvAccumDtype) => ['int8', pvFormat, pvAccumDtype] as const),
    ),
  ] as const)('QK %s, PV %s, accumulator %s is as accurate as its formats', (qkFormat, pvFormat, pvAccumDtype) => {
    // A tile's sum must stay below 65504 in every FP16 register.
    const narrow = pvAccumDtype !== 'fp32' && pvAccumDtype !== 'fp32+fp32';
    const error = errorOf(realistic(new Random(seed)), {
      smoothQ: qkFormat === 'int4',
      qkQuantGran: 'per-thread',
      pvAccumDtype,
      algorithm: { qkFormat, pvFormat, tiling: TILINGS.sm80, vMax: narrow ? 2.25 : 448 },
    });
    expect(error).toBeLessThan(QK[qkFormat] + PV[pvFormat] + (pvAccumDtype === 'fp16' ? 0.005 : 0));
    expect(error).toBeGreaterThan(0);
  });

  it('with fp32 PV and one channel of small integers has no error but that of softmax in float32', () => {
    const q = tensor(Float32Array.of(1, 127, 5, -3), [1, 1, 4, 1]);
    const k = tensor(Float32Array.of(2, -127, 9), [1, 1, 3, 1]);
    const v = tensor(Float32Array.of(1, 2, 3), [1, 1, 3, 1]);
    const algorithm = { pvFormat: 'fp32', smoothK: false } as const;
    const actual = quantizedAttention(q, k, v, { smScale: 1 / 64, returnLse: true, algorithm });
    const expected = exactAttention(q, k, v, { smScale: 1 / 64, returnLse: true });
    expect(compare(actual.output, expected.output).maxAbsoluteError).toBeLessThan(1e-4);
    expect(compare(actual.lse ?? [], expected.lse ?? []).maxAbsoluteError).toBeLessThan(1e-4);
  });

  it('honours every semantics on random problems: scores within what INT8 can cost, outputs close on the whole', () => {
    const total = { error: 0, magnitude: 0 };
    const largest = (x: Tensor) => toFloat32(x).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    fc.assert(
      fc.property(denseCall, fc.boolean(), fc.boolean(), ({ q, k, v, options }, smoothQ, smoothV) => {
        const quantized = quantizedAttention(q, k, v, { ...options, returnLse: true, smoothQ, smoothV });
        const exact = exactAttention(q, k, v, { ...options, returnLse: true });
        // Half a step is max / 254; a mean taken away at most doubles the maximum. softcap and masks only shrink
        // differences.
        const [queryMax, keyMax, dim] = [2 * largest(q), 2 * largest(k), q.shape[3] as number];
        const [queryStep, keyStep] = [queryMax / 254, keyMax / 254];
        const scoreError = dim * (queryMax * keyStep + keyMax * queryStep) * Math.abs(options.smScale ?? dim ** -0.5);
        exact.lse?.forEach((value, row) => {
          const other = quantized.lse?.[row] as number;
          if (value === Number.NEGATIVE_INFINITY) expect(other).toBe(value);
          else expect(Math.abs(other - value)).toBeLessThan(scoreError + 1e-5);
        });
        expect(quantized.output.every(Number.isFinite)).toBe(true);
        exact.output.forEach((value, i) => {
          total.error += Math.abs((quantized.output[i] as number) - value);
          total.magnitude += Math.abs(value);
        });
      }),
      { seed: seed | 0, numRuns: 150 },
    );
    // The usual level is 1%: a semantics misread (a mask, a band, a head) on a tenth of the problems would cost ten
    // times that.
    expect(total.error / total.magnitude).toBeLessThan(0.03);
  });

  it('smoothing K keeps accuracy where keys share an offset, and its LSE is that of the true scores', () => {
    const inputs = realistic(new Random(seed), 150, 64, 30);
    const smooth = errorOf(inputs);
    expect(smooth).toBeLessThan(0.03);
    expect(errorOf(inputs, { smoothK: false })).toBeGreaterThan(5 * smooth);
    const { q, k, v } = inputs;
    const exact = exactAttention(q, k, v, { returnLse: true }).lse ?? [];
    const lse = quantizedAttention(q, k, v, { returnLse: true }).lse ?? [];
    expect(compare(lse, exact).maxAbsoluteError).toBeLessThan(0.05);
  });

  it('smoothing Q and V keep accuracy where those share an offset', () => {
    const random = new Random(seed);
    const inputs = realistic(random);
    for (const operand of [inputs.q, inputs.v]) {
      const data = operand.data as Float32Array;
      for (let i = 0; i < data.length; i++) data[i] = (data[i] as number) + 8 * Math.cos(i % 64);
    }
    const int4 = { algorithm: { qkFormat: 'int4', pvFormat: 'fp32' } } as const;
    expect(errorOf(inputs, { ...int4, smoothQ: true })).toBeLessThan(errorOf(inputs, int4) / 2);
    const { q, k, v } = inputs;
    const absolute = (options: QuantizedOptions) =>
      compare(quantizedAttention(q, k, v, options).output, exactAttention(q, k, v).output).rmse;
    const fp8 = { algorithm: { pvFormat: 'fp8' } } as const;
    expect(absolute({ ...fp8, smoothV: true })).toBeLessThan(absolute(fp8));
  });

  it('a narrower FP8 accumulator is less accurate, and promotion every tile mends it', () => {
    const inputs = realistic(new Random(seed), 320);
    // Values of one sign: the accumulator grows, and the low bits of each addend are cut off.
    const v = inputs.v.data as Float32Array;
    for (let i = 0; i < v.length; i++) v[i] = 1 + Math.abs(v[i] as number);
    const error = (pvAccumDtype: PvAccumDtype, fp8AccumulatorBits: number) =>
      errorOf(inputs, { pvAccumDtype, algorithm: { pvFormat: 'fp8', fp8AccumulatorBits } });
    const [narrow, promoted, wide] = [error('fp32', 9), error('fp32+fp32', 9), error('fp32', 23)];
    expect(narrow).toBeGreaterThan(promoted);
    expect(promoted).toBeGreaterThan(wide);
  });

  it('treats each packed sequence as a dense call of its own', () => {
    const random = new Random(seed);
    const cuSeqlens = [0, 70, 70, 73];
    const [q, k, v] = [normal(random, 73, 2, 8), normal(random, 73, 1, 8), normal(random, 73, 1, 4)];
    const packed = quantizedAttentionVarlen(q, k, v, cuSeqlens, cuSeqlens, { isCausal: true, returnLse: true });
    for (const [start, end] of [
      [0, 70],
      [70, 73],
    ] as const) {
      const part = (x: Tensor) => {
        const row = (x.shape[1] as number) * (x.shape[2] as number);
        return tensor((x.data as Float32Array).slice(start * row, end * row), [1, end - start, ...x.shape.slice(1)]);
      };
      const dense = quantizedAttention(part(q), part(k), part(v), { isCausal: true, tensorLayout: 'NHD' });
      expect(packed.output.slice(start * 8, end * 8)).toEqual(dense.output);
    }
    expect(packed.lseShape).toEqual([2, 73]);
  });

  it.each(['fp32', 'fp16', 'fp8', 'int8', 'fp4'] as const)(
    'PV %s: NaNs of excluded keys stay out, of visible ones come in',
    (pvFormat) => {
      const { q, k, v } = realistic(new Random(seed), 20, 16);
      for (const operand of [k, v]) (operand.data as Float32Array).fill(Number.NaN, 19 * 16, 20 * 16);
      const attnMask = tensor(
        Uint8Array.from({ length: 20 }, (_, key) => (key === 19 ? 0 : 1)),
        [20],
      );
      const options = { algorithm: { pvFormat } };
      expect(quantizedAttention(q, k, v, { ...options, attnMask }).output.every(Number.isFinite)).toBe(true);
      const { output } = quantizedAttention(q, k, v, options);
      // Heads 0 and 1 share the spoilt key; the others have their own.
      expect(output.slice(0, 2 * 20 * 16).every(Number.isNaN)).toBe(true);
      expect(output.slice(2 * 20 * 16).every(Number.isFinite)).toBe(true);
    },
  );

  it('gives zeros for zero channels, equal keys and rows without keys', () => {
    const ones = tensor(new Float32Array(2 * 70 * 4).fill(1), [1, 2, 70, 4]);
    const zeroChannel = tensor(
      toFloat32(ones).map((value, i) => (i % 4 === 2 ? 0 : value)),
      ones.shape,
    );
    // FP4's block scale is E4M3: 1 comes back within that format's relative error of 1 / 16.
    const tolerance = { fp16: 1e-3, fp8: 1e-3, int8: 1e-3, fp4: 1 / 16 } as const;
    for (const pvFormat of ['fp16', 'fp8', 'int8', 'fp4'] as const) {
      const { output } = quantizedAttention(ones, ones, zeroChannel, { algorithm: { pvFormat } });
      const worst = output.reduce((most, value, i) => Math.max(most, Math.abs(value - (i % 4 === 2 ? 0 : 1))), 0);
      expect(worst).toBeLessThanOrEqual(tolerance[pvFormat]);
      for (let i = 2; i < output.length; i += 4) expect(output[i]).toBe(0);
    }
    const { output, lse } = quantizedAttention(ones, ones, ones, {
      attnMask: tensor(Uint8Array.of(0), [1]),
      returnLse: true,
    });
    expect(output.every((value) => value === 0)).toBe(true);
    expect(lse?.every((value) => value === Number.NEGATIVE_INFINITY)).toBe(true);
  });
});
