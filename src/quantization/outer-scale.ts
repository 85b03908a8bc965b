/**
 * A power of two for a whole operand, around its blocks' scales. E4M3 scales reach from 2^-9 to 448 only: without it,
 * values below about 0.01 or above 2688 are lost. A power of two changes no code otherwise.
 */
import { E2M1_MAX } from '../tensor/formats/float4.ts';
import { E4M3_MAX } from '../tensor/formats/float8.ts';
import { floorToPowerOfTwo } from '../tensor/formats/rounding.ts';

/** Largest magnitude of NVFP4 alone. */
export const NVFP4_MAX = E4M3_MAX * E2M1_MAX;

/**
 * What operands are scaled to at most: a search may make the largest block's scale half as large again, and 448 must
 * hold it.
 */
export const OUTER_MAX = NVFP4_MAX / 2;

/** Neither it nor its reciprocal is a subnormal, which GPUs may flush to zero. */
const LARGEST_OUTER_SCALE = 2 ** 126;

/**
 * The power of two that puts `largest` into (672, 1344]: what the operand is multiplied by before its blocks are
 * quantized.
 *
 * @param largest largest finite magnitude, float32; 0 gives 1
 */
export function outerScale(largest: number): number {
  if (largest === 0) return 1;
  return Math.min(floorToPowerOfTwo(OUTER_MAX / largest), LARGEST_OUTER_SCALE);
}

/**
 * Largest finite magnitude of `[length, dim]`, tokens `start` to `end`.
 *
 * @param counted per token, 0: it is left out
 */
export function largestMagnitude(
  x: Float32Array,
  dim: number,
  counted?: Uint8Array,
  start = 0,
  end = x.length / dim,
): number {
  let largest = 0;
  for (let token = start; token < end; token++) {
    if (counted?.[token] === 0) continue;
    for (let i = token * dim; i < (token + 1) * dim; i++) {
      const magnitude = Math.abs(x[i] as number);
      if (magnitude > largest && Number.isFinite(magnitude)) largest = magnitude;
    }
  }
  return largest;
}
