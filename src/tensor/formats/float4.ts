/**
 * E2M1, the 4-bit floating-point format of OCP MX and NVFP4: 1 sign, 2 exponent, 1 mantissa bit; magnitudes 0, 0.5, 1,
 * 1.5, 2, 3, 4, 6.
 *
 * Conversion rounds to nearest even and saturates at 6 as `cvt.rn.satfinite.e2m1x2` does; NaN, which the format lacks,
 * becomes +6 as it does there.
 */
import { magnitudeCode, signBit } from './rounding.ts';

export const E2M1_MAX = 6;

/** Values of the 16 codes. */
export const E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6] as const;

/** float64 or float32 to an E2M1 code, 0 to 15. */
export function e2m1FromNumber(value: number): number {
  if (Number.isNaN(value)) return 7;
  return (signBit(value) << 3) | magnitudeCode(Math.min(Math.abs(value), E2M1_MAX), 1, 0);
}

/** E2M1 code (0 to 15) to a number, exactly. */
export function e2m1ToNumber(code: number): number {
  return E2M1_VALUES[code & 15] as number;
}

/** Rounds to the nearest E2M1 value, saturating. */
export function roundToE2m1(value: number): number {
  return e2m1ToNumber(e2m1FromNumber(value));
}

/**
 * Encodes and packs two elements a byte: element 2i in the low nibble, 2i + 1 in the high one, which is the order in
 * which tensor-core fragments hold them. An odd last element leaves the high nibble 0.
 */
export function packE2m1(source: Float32Array | Float64Array, bytes: Uint8Array): void {
  for (let i = 0; i < source.length; i += 2) {
    const high = i + 1 < source.length ? e2m1FromNumber(source[i + 1] as number) : 0;
    bytes[i >>> 1] = e2m1FromNumber(source[i] as number) | (high << 4);
  }
}

/** The inverse of {@link packE2m1}: decodes `target.length` elements. */
export function unpackE2m1(bytes: Uint8Array, target: Float32Array): void {
  for (let i = 0; i < target.length; i++) target[i] = e2m1ToNumber((bytes[i >>> 1] as number) >>> ((i & 1) << 2));
}
