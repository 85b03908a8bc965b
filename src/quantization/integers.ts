/**
 * INT8 and INT4 quantization of Q and K: SageAttention (arXiv 2410.02367), per-thread groups from SageAttention2 (arXiv
 * 2411.10958).
 */
import type { Grouping } from './groups.ts';

/** How scales and code points are rounded. */
export interface IntegerRounding {
  /** Ties of `x / scale`. */
  readonly ties: 'even' | 'away';
  /** Added to every scale. Nonzero keeps a group of zeros from dividing by zero, at the cost of a little range. */
  readonly scaleOffset: number;
}

/** The reference implementation's CUDA quantization kernels, and the default here. */
export const CUDA_ROUNDING: IntegerRounding = { ties: 'even', scaleOffset: 0 };
/** The reference implementation's Triton kernel for per-block groups. */
export const TRITON_BLOCK_ROUNDING: IntegerRounding = { ties: 'away', scaleOffset: 0 };
/** The reference implementation's Triton kernels for per-thread groups. */
export const TRITON_THREAD_ROUNDING: IntegerRounding = { ties: 'away', scaleOffset: 1e-7 };

/** Rounds to an integer, ties to even. |x| < 2^51. */
export function roundHalfEven(x: number): number {
  const magic = 3 * 2 ** 51;
  return x + magic - magic;
}

/** Rounds to an integer, ties away from zero. */
export function roundHalfAway(x: number): number {
  return Math.sign(x) * Math.floor(Math.abs(x) + 0.5);
}

export interface QuantizedIntegers {
  /** `[length, dim]`, in -max..max. */
  readonly values: Int8Array;
  /** float32, indexed by the grouping. A group without tokens, or with zeros only, has `scaleOffset`. */
  readonly scales: Float32Array;
}

/**
 * `scale = max|x| / max` for each group, `value = round(x / scale)`; a group whose maximum is 0 gets values 0.
 *
 * Elements that are not finite take no part in the maximum and become 0: a NaN in a key that a mask excludes must not
 * spoil the scale of its neighbours. Callers that may attend to such a token must carry the NaN themselves.
 *
 * @param x `[length, dim]`
 * @param max 127 for INT8, 7 for INT4
 * @param counted per token, 0: it takes no part in the maximum, and its values are clamped; default all count
 */
export function quantizeIntegers(
  x: Float32Array,
  dim: number,
  grouping: Grouping,
  max: number,
  rounding: IntegerRounding = CUDA_ROUNDING,
  counted?: Uint8Array,
): QuantizedIntegers {
  const length = dim === 0 ? 0 : x.length / dim;
  const scales = new Float32Array(grouping.count(length));
  for (let token = 0; token < length; token++) {
    if (counted?.[token] === 0) continue;
    const group = grouping.indexOf(token);
    let largest = scales[group] as number;
    for (let i = token * dim; i < (token + 1) * dim; i++) {
      const magnitude = Math.abs(x[i] as number);
      if (magnitude > largest && magnitude !== Number.POSITIVE_INFINITY) largest = magnitude;
    }
    scales[group] = largest;
  }
  for (let group = 0; group < scales.length; group++) {
    scales[group] = Math.fround((scales[group] as number) / max) + rounding.scaleOffset;
  }
  const round = rounding.ties === 'even' ? roundHalfEven : roundHalfAway;
  const values = new Int8Array(x.length);
  for (let token = 0; token < length; token++) {
    const scale = scales[grouping.indexOf(token)] as number;
    if (scale === 0) continue;
    for (let i = token * dim; i < (token + 1) * dim; i++) {
      const value = x[i] as number;
      // float32's smallest scales are rounded so coarsely that max|x| / scale may exceed max.
      if (Number.isFinite(value)) values[i] = Math.max(-max, Math.min(max, round(Math.fround(value / scale))));
    }
  }
  return { values, scales };
}
