/** NVFP4 and the two-level quantization of P: SageAttention3 (arXiv 2505.11594). */
import { E2M1_MAX, roundToE2m1 } from '../tensor/formats/float4.ts';
import { E4M3_MAX, roundToE4m3 } from '../tensor/formats/float8.ts';

/** Elements that share an E4M3 scale. */
export const NVFP4_BLOCK = 16;

/**
 * Largest value that a row of P is scaled to before its 1x16 blocks: the block scales then use E4M3's whole range, which
 * P in 0..1 would leave unused (its scales would lie in 0..1/6).
 */
export const P_TWO_LEVEL_MAX = E4M3_MAX * E2M1_MAX;

/**
 * Quantizes `count` elements `start, start + stride, ...` in blocks of 16 and writes their dequantized values in place:
 * `scale = E4M3(max|x| / 6)`, `x = scale * E2M1(x / scale)`, dividing by the rounded scale. A block of zeros, or one whose scale rounds to
 * 0, becomes zeros. Elements that are not finite take no part in the scale and stay what they are.
 */
export function quantizeNvfp4InPlace(x: Float32Array, start: number, stride: number, count: number): void {
  for (let first = 0; first < count; first += NVFP4_BLOCK) {
    const end = Math.min(first + NVFP4_BLOCK, count);
    let largest = 0;
    for (let i = first; i < end; i++) {
      const magnitude = Math.abs(x[start + i * stride] as number);
      if (magnitude > largest && magnitude !== Number.POSITIVE_INFINITY) largest = magnitude;
    }
    const scale = roundToE4m3(largest / E2M1_MAX);
    for (let i = first; i < end; i++) {
      const value = x[start + i * stride] as number;
      if (Number.isFinite(value)) x[start + i * stride] = scale === 0 ? 0 : scale * roundToE2m1(value / scale);
    }
  }
}

/**
 * P in two levels: the row is scaled so that its maximum is 448 * 6, then quantized as NVFP4.
 *
 * @param p one row's probabilities of one tile, >= 0; overwritten with dequantized values of the scaled row
 * @returns the row's scale: multiply the product of the quantized row with V by it
 */
export function quantizeTwoLevelInPlace(p: Float32Array, count: number): number {
  let largest = 0;
  for (let i = 0; i < count; i++) largest = Math.max(largest, p[i] as number);
  if (largest === 0) return 0;
  const rowScale = Math.fround(largest / P_TWO_LEVEL_MAX);
  for (let i = 0; i < count; i++) p[i] = (p[i] as number) / rowScale;
  quantizeNvfp4InPlace(p, 0, 1, count);
  return rowScale;
}
