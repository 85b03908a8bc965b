/**
 * bfloat16: the upper half of a float32 (1 sign, 8 exponent, 7 mantissa bits).
 *
 * Conversion rounds to nearest even and overflows to infinity; NaN becomes 0x7fc0 with the sign kept.
 */
import { magnitudeCode, signBit } from './rounding.ts';

const INFINITY_BITS = 0x7f80;
const NAN_BITS = 0x7fc0;
const OVERFLOW = 2 ** 128;

const float32 = new Float32Array(1);
const word = new Uint32Array(float32.buffer);

/** float64 or float32 to bfloat16 bits. */
export function bfloat16FromNumber(value: number): number {
  const sign = signBit(value) << 15;
  if (Number.isNaN(value)) return sign | NAN_BITS;
  const magnitude = Math.abs(value);
  if (magnitude >= OVERFLOW) return sign | INFINITY_BITS;
  return sign | magnitudeCode(magnitude, 7, -126);
}

/** bfloat16 bits to a number, exactly. */
export function bfloat16ToNumber(bits: number): number {
  word[0] = bits << 16;
  return float32[0] as number;
}

/** Rounds to the nearest bfloat16 value. */
export function roundToBfloat16(value: number): number {
  return bfloat16ToNumber(bfloat16FromNumber(value));
}

/** Decodes `count` bfloat16 elements `start, start + stride, ...` of `source` into `target` from `at`. */
export function decodeBfloat16(
  source: Uint16Array,
  target: Float32Array,
  start = 0,
  stride = 1,
  count = source.length,
  at = 0,
): void {
  const words = new Uint32Array(target.buffer, target.byteOffset, target.length);
  for (let i = 0; i < count; i++) words[at + i] = (source[start + i * stride] as number) << 16;
}

/** Encodes all of `source` into `target` from element `at`. */
export function encodeBfloat16(source: Float32Array | Float64Array, target: Uint16Array, at = 0): void {
  if (source instanceof Float64Array) {
    for (let i = 0; i < source.length; i++) target[at + i] = bfloat16FromNumber(source[i] as number);
    return;
  }
  const words = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < words.length; i++) {
    const bits = words[i] as number;
    // Half of the dropped part, and one more where the kept part is odd: ties go to even, carries run into the
    // exponent.
    const rounded = (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
    target[at + i] = (bits & 0x7fffffff) > 0x7f800000 ? ((bits >>> 16) & 0x8000) | NAN_BITS : rounded;
  }
}
