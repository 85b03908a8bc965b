/**
 * IEEE 754 binary16: 1 sign, 5 exponent, 10 mantissa bits; largest 65504.
 *
 * Conversion rounds to nearest even and, as `cvt.rn.f16.f32` does, overflows to infinity: 65520 and above are Infinity.
 * NaN becomes 0x7e00 with the sign kept.
 */
import { bitsOf, type Float16ArrayLike } from '../tensor.ts';
import { float32Encoder, magnitudeCode, signBit } from './rounding.ts';

export const FLOAT16_MAX = 65504;
const INFINITY_BITS = 0x7c00;
const NAN_BITS = 0x7e00;

/** float64 or float32 to float16 bits. */
export function float16FromNumber(value: number): number {
  const sign = signBit(value) << 15;
  if (Number.isNaN(value)) return sign | NAN_BITS;
  const magnitude = Math.abs(value);
  if (magnitude > 2 * FLOAT16_MAX) return sign | INFINITY_BITS;
  return sign | Math.min(magnitudeCode(magnitude, 10, -14), INFINITY_BITS);
}

/** float16 bits to a number, exactly. */
export function float16ToNumber(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0x1f) return mantissa === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25));
}

/** Rounds to the nearest float16 value. */
export function roundToFloat16(value: number): number {
  return float16ToNumber(float16FromNumber(value));
}

let table: Float32Array | undefined;

/** Value of every float16 code; made at first use. */
export function float16Table(): Float32Array {
  table ??= Float32Array.from({ length: 1 << 16 }, (_, bits) => float16ToNumber(bits));
  return table;
}

/** Decodes `count` float16 elements `start, start + stride, ...` of `source` into `target` from `at`. */
export function decodeFloat16(
  source: Uint16Array | Float16ArrayLike,
  target: Float32Array,
  start = 0,
  stride = 1,
  count = source.length,
  at = 0,
): void {
  const bits = bitsOf(source);
  const values = float16Table();
  for (let i = 0; i < count; i++) target[at + i] = values[bits[start + i * stride] as number] as number;
}

const encodeFloat32 = /* @__PURE__ */ float32Encoder({
  mantissaBits: 10,
  minExponent: -14,
  maxCode: INFINITY_BITS,
  signShift: 15,
  nanCode: NAN_BITS,
  signedNan: true,
});

/** Encodes all of `source` into `target` from element `at`. */
export function encodeFloat16(
  source: Float32Array | Float64Array,
  target: Uint16Array | Float16ArrayLike,
  at = 0,
): void {
  const bits = bitsOf(target);
  if (source instanceof Float32Array) encodeFloat32(source, bits, at);
  else for (let i = 0; i < source.length; i++) bits[at + i] = float16FromNumber(source[i] as number);
}
