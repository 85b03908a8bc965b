/** V in FP8 E4M3, a scale per channel: SageAttention2 (arXiv 2411.10958); vmax: SageAttention2++ (arXiv 2505.21136). */
import { e4m3FromNumber } from '../tensor/formats/float8.ts';
import { V_FP8_MAX } from './schemes.ts';

/**
 * Order of tokens inside every 16 of the stored V: position i holds token `TOKEN_PERMUTATION[i]`. P's FP8 fragments,
 * made in registers from score fragments, then meet the right tokens of V without an exchange between threads.
 */
export const TOKEN_PERMUTATION = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15] as const;

/** Where a token is stored; the inverse of {@link TOKEN_PERMUTATION}, applied inside every 16. */
export function permutedPosition(token: number): number {
  const within = token % 16;
  return token - within + TOKEN_PERMUTATION.indexOf(within as (typeof TOKEN_PERMUTATION)[number]);
}

export interface ValueFp8Options {
  /** Largest quantized magnitude: 448, or 2.25 where PV accumulates in FP16. */
  readonly vMax?: number;
  /** Subtracted from each channel before quantizing (`smoothV`); `[dim]`. */
  readonly mean?: Float32Array;
  /** Stored tokens are padded with zeros to a multiple of this; default 64, sm90 tiles take 128. */
  readonly padTo?: number;
  /** Per token, 0: it takes no part in the scales, and its codes are clamped; default all count. */
  readonly counted?: Uint8Array;
}

export interface ValueFp8 {
  /** E4M3 codes, `[dim, paddedLength]`, tokens permuted. */
  readonly codes: Uint8Array;
  readonly paddedLength: number;
  /** `max|v| / vMax` of each channel, float32. */
  readonly scales: Float32Array;
}

/**
 * Quantizes V: transposed to `[dim, length]`, tokens permuted inside every 16, padded. A channel of zeros has scale 0
 * and codes 0. Elements that are not finite take no part in the scale and become E4M3's NaN.
 *
 * @param v `[length, dim]`
 */
export function quantizeValueFp8(v: Float32Array, dim: number, options: ValueFp8Options = {}): ValueFp8 {
  const { vMax = V_FP8_MAX.default, mean, padTo = 64, counted } = options;
  const length = v.length / dim;
  const paddedLength = Math.ceil(length / padTo) * padTo;
  const codes = new Uint8Array(dim * paddedLength);
  const scales = new Float32Array(dim);
  for (let channel = 0; channel < dim; channel++) {
    const offset = mean === undefined ? 0 : (mean[channel] as number);
    let largest = 0;
    for (let token = 0; token < length; token++) {
      if (counted?.[token] === 0) continue;
      const magnitude = Math.abs(Math.fround((v[token * dim + channel] as number) - offset));
      if (magnitude > largest && magnitude !== Number.POSITIVE_INFINITY) largest = magnitude;
    }
    scales[channel] = largest / vMax;
    const scale = scales[channel] as number;
    // As the CUDA kernels do, which multiply; the reciprocal of a subnormal scale would overflow, so that one divides.
    const reciprocal = Math.fround(vMax / largest);
    const quantize = (value: number) => {
      if (scale === 0) return 0;
      return Math.fround(Number.isFinite(reciprocal) ? value * reciprocal : value / scale);
    };
    for (let token = 0; token < length; token++) {
      const value = Math.fround((v[token * dim + channel] as number) - offset);
      const scaled = Number.isFinite(value) ? quantize(value) : Number.NaN;
      codes[channel * paddedLength + permutedPosition(token)] = e4m3FromNumber(scaled);
    }
  }
  return { codes, paddedLength, scales };
}
