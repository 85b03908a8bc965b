import { describe, expect, it } from 'vitest';
import { GOLDEN_NAMES, type Golden, readGolden } from '../../test/golden/golden.ts';
import { toFloat32 } from '../tensor/access.ts';
import { roundToBfloat16 } from '../tensor/formats/bfloat16.ts';
import { keyGrouping, queryGrouping } from './groups.ts';
import { CUDA_ROUNDING, quantizeIntegers, TRITON_BLOCK_ROUNDING, TRITON_THREAD_ROUNDING } from './integers.ts';
import { INT_MAX, TILINGS, V_FP8_MAX } from './schemes.ts';
import { channelMean, subtractMean } from './smoothing.ts';
import { quantizeValueFp8 } from './value-fp8.ts';

/** Relative: what counts as agreement with the official kernels. */
const SCALE_TOLERANCE = 1e-5;

/**
 * The official kernels' schemes. Triton's K - mean was rounded to bfloat16 by torch; its per-block Q has the softmax
 * scale in it.
 */
const SCHEMES = [
  {
    name: 'per_block_triton',
    granularity: 'per-block',
    tiling: TILINGS.portable,
    rounding: TRITON_BLOCK_ROUNDING,
    torch: true,
    scaledQuery: true,
  },
  { name: 'per_warp_sm80', granularity: 'per-warp', tiling: TILINGS.sm80, rounding: CUDA_ROUNDING, torch: false },
  { name: 'per_warp_sm90', granularity: 'per-warp', tiling: TILINGS.sm90, rounding: CUDA_ROUNDING, torch: false },
  {
    name: 'per_thread_sm80',
    granularity: 'per-thread',
    tiling: TILINGS.sm80,
    rounding: TRITON_THREAD_ROUNDING,
    torch: true,
  },
  {
    name: 'per_thread_sm90',
    granularity: 'per-thread',
    tiling: TILINGS.sm90,
    rounding: TRITON_THREAD_ROUNDING,
    torch: true,
  },
] as const;

interface Heads {
  readonly length: number;
  readonly dim: number;
  readonly heads: Float32Array[];
}

/** The `[length, dim]` matrices of a `[B,H,L,D]` tensor. */
function headsOf(golden: Golden, operand: 'q' | 'k' | 'v'): Heads {
  const [batch, heads, length, dim] = golden[operand].shape as [number, number, number, number];
  const all = toFloat32(golden[operand]);
  const size = length * dim;
  return {
    length,
    dim,
    heads: Array.from({ length: batch * heads }, (_, i) => all.subarray(i * size, (i + 1) * size)),
  };
}

function worstRelative(actual: Float32Array, expected: Float32Array): number {
  expect(actual.length).toBe(expected.length);
  return expected.reduce(
    (worst, value, i) => Math.max(worst, Math.abs((actual[i] as number) - value) / Math.abs(value)),
    0,
  );
}

function worstDifference(actual: Int8Array | Uint8Array, expected: Int8Array | Uint8Array): number {
  expect(actual.length).toBe(expected.length);
  let worst = 0;
  for (let i = 0; i < expected.length; i++) {
    worst = Math.max(worst, Math.abs((actual[i] as number) - (expected[i] as number)));
  }
  return worst;
}

describe.each(GOLDEN_NAMES)('the official quantization of %s', (name) => {
  const golden = readGolden(name);
  const q = headsOf(golden, 'q');
  const k = headsOf(golden, 'k');
  const v = headsOf(golden, 'v');
  const keyMeans = k.heads.map((head) => channelMean(head, k.dim).map(roundToBfloat16));
  const integers = (key: string) => new Int8Array(golden.entry(key).bytes.buffer);

  it("has the same mean of K, to bfloat16's last bit", () => {
    expect(keyMeans.flatMap((mean) => [...mean])).toEqual([...golden.float32('k_mean')]);
  });

  it.each(SCHEMES)('$name: code points within one unit, scales to 1e-5', (scheme) => {
    const { granularity, tiling, rounding, torch } = scheme;
    const queryScale = 'scaledQuery' in scheme ? Math.fround(Math.LOG2E / Math.sqrt(q.dim)) : 1;
    const quantized = {
      q: q.heads.map((head) =>
        quantizeIntegers(
          head.map((value) => value * queryScale),
          q.dim,
          queryGrouping(granularity, tiling),
          INT_MAX.int8,
          rounding,
        ),
      ),
      k: k.heads.map((head, i) => {
        const smoothed = subtractMean(head, keyMeans[i] as Float32Array);
        const asTorch = torch ? smoothed.map(roundToBfloat16) : smoothed;
        return quantizeIntegers(asTorch, k.dim, keyGrouping(granularity, tiling), INT_MAX.int8, rounding);
      }),
    };
    for (const operand of ['q', 'k'] as const) {
      const values = quantized[operand].flatMap((head) => [...head.values]);
      expect(worstDifference(Int8Array.from(values), integers(`${scheme.name}.${operand}_int8`))).toBeLessThanOrEqual(
        1,
      );
      const scales = Float32Array.from(quantized[operand].flatMap((head) => [...head.scales]));
      const expected = golden.float32(`${scheme.name}.${operand}_scale`);
      // A group without tokens has scale 0 here and 1e-7 / 127 there; nothing reads it.
      const read = scales.map((scale, i) => (scale === 0 ? (expected[i] as number) : scale));
      expect(scales.every((scale, i) => scale > 0 || (expected[i] as number) < 1e-8)).toBe(true);
      expect(worstRelative(read, expected)).toBeLessThanOrEqual(SCALE_TOLERANCE);
    }
  });

  it.each([
    ['v_fp8_448.0', V_FP8_MAX.default],
    ['v_fp8_2.25', V_FP8_MAX.fp16Accumulator],
  ] as const)('%s: bytes of the transposed, permuted, padded layout within one unit', (key, vMax) => {
    const quantized = v.heads.map((head) => quantizeValueFp8(head, v.dim, { vMax }));
    const codes = Uint8Array.from(quantized.flatMap((head) => [...head.codes]));
    expect(worstDifference(codes, golden.entry(`${key}.v_fp8`).bytes)).toBeLessThanOrEqual(1);
    const scales = Float32Array.from(quantized.flatMap((head) => [...head.scales]));
    expect(worstRelative(scales, golden.float32(`${key}.v_scale`))).toBeLessThanOrEqual(SCALE_TOLERANCE);
  });

  it('v_fp8_smooth: mean, scales and bytes', () => {
    // The official kernel counts the zeros that pad V: its mean is over a multiple of 16 tokens, and its padding is
    // quantized too.
    const padded = (head: Float32Array, multiple: number) => {
      const whole = new Float32Array(Math.ceil(v.length / multiple) * multiple * v.dim);
      whole.set(head);
      return whole;
    };
    const means = v.heads.map((head) => channelMean(padded(head, 16), v.dim));
    const quantized = v.heads.map((head, i) =>
      quantizeValueFp8(padded(head, 64), v.dim, { mean: means[i] as Float32Array }),
    );
    expect(
      worstRelative(Float32Array.from(means.flatMap((mean) => [...mean])), golden.float32('v_fp8_smooth.v_mean')),
    ).toBeLessThanOrEqual(SCALE_TOLERANCE);
    const codes = Uint8Array.from(quantized.flatMap((head) => [...head.codes]));
    const expected = golden.entry('v_fp8_smooth.v_fp8').bytes;
    expect(codes.length).toBe(expected.length);
    // Codes either side of zero (0x01 and 0x81) are neighbours' neighbours by value, not by code.
    const ordinal = (code: number) => (code & 0x80 ? -(code & 0x7f) : code);
    const worst = codes.reduce(
      (most, code, i) => Math.max(most, Math.abs(ordinal(code) - ordinal(expected[i] as number))),
      0,
    );
    expect(worst).toBeLessThanOrEqual(1);
    const scales = Float32Array.from(quantized.flatMap((head) => [...head.scales]));
    expect(worstRelative(scales, golden.float32('v_fp8_smooth.v_scale'))).toBeLessThanOrEqual(SCALE_TOLERANCE);
  });
});
