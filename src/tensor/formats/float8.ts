/**
 * The 8-bit floating-point formats of the OCP FP8 specification.
 *
 * | format | bits (sign, exponent, mantissa) | largest | smallest | special codes |
 * |---|---|---|---|---|
 * | E4M3 (E4M3FN) | 1, 4, 3 | 448 | 2^-9 | NaN 0x7f and 0xff; no infinity |
 * | E5M2 | 1, 5, 2 | 57344 | 2^-16 | infinity 0x7c, NaN above it |
 *
 * Conversion rounds to nearest even and saturates as `cvt.rn.satfinite` does: whatever is larger than the largest
 * number, infinity included, becomes that number with its sign; NaN becomes 0x7f.
 */
import { float32Encoder, magnitudeCode, signBit } from './rounding.ts';

export const E4M3_MAX = 448;
export const E5M2_MAX = 57344;

const NAN_CODE = 0x7f;
const E4M3_MAX_CODE = 0x7e;
const E5M2_MAX_CODE = 0x7b;

/** float64 or float32 to an E4M3 code. */
export function e4m3FromNumber(value: number): number {
  if (Number.isNaN(value)) return NAN_CODE;
  const magnitude = Math.min(Math.abs(value), E4M3_MAX);
  return (signBit(value) << 7) | Math.min(magnitudeCode(magnitude, 3, -6), E4M3_MAX_CODE);
}

/** E4M3 code to a number, exactly. */
export function e4m3ToNumber(code: number): number {
  const sign = code & 0x80 ? -1 : 1;
  const exponent = (code >>> 3) & 0xf;
  const mantissa = code & 7;
  if ((code & 0x7f) === NAN_CODE) return Number.NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -9 : (8 + mantissa) * 2 ** (exponent - 10));
}

/** float64 or float32 to an E5M2 code. */
export function e5m2FromNumber(value: number): number {
  if (Number.isNaN(value)) return NAN_CODE;
  const magnitude = Math.min(Math.abs(value), E5M2_MAX);
  return (signBit(value) << 7) | Math.min(magnitudeCode(magnitude, 2, -14), E5M2_MAX_CODE);
}

/** E5M2 code to a number, exactly. */
export function e5m2ToNumber(code: number): number {
  const sign = code & 0x80 ? -1 : 1;
  const exponent = (code >>> 2) & 0x1f;
  const mantissa = code & 3;
  if (exponent === 0x1f) return mantissa === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -16 : (4 + mantissa) * 2 ** (exponent - 17));
}

const E4M3_VALUES = /* @__PURE__ */ Float32Array.from({ length: 256 }, (_, code) => e4m3ToNumber(code));
const E5M2_VALUES = /* @__PURE__ */ Float32Array.from({ length: 256 }, (_, code) => e5m2ToNumber(code));

/** Rounds to the nearest E4M3 value, saturating. */
export function roundToE4m3(value: number): number {
  return E4M3_VALUES[e4m3FromNumber(value)] as number;
}

/** Decodes E4M3 codes into `target`. */
export function decodeE4m3(codes: Uint8Array, target: Float32Array): void {
  for (let i = 0; i < codes.length; i++) target[i] = E4M3_VALUES[codes[i] as number] as number;
}

/** Decodes E5M2 codes into `target`. */
export function decodeE5m2(codes: Uint8Array, target: Float32Array): void {
  for (let i = 0; i < codes.length; i++) target[i] = E5M2_VALUES[codes[i] as number] as number;
}

const encodeE4m3Float32 = /* @__PURE__ */ float32Encoder({
  mantissaBits: 3,
  minExponent: -6,
  maxCode: E4M3_MAX_CODE,
  signShift: 7,
  nanCode: NAN_CODE,
  signedNan: false,
});

const encodeE5m2Float32 = /* @__PURE__ */ float32Encoder({
  mantissaBits: 2,
  minExponent: -14,
  maxCode: E5M2_MAX_CODE,
  signShift: 7,
  nanCode: NAN_CODE,
  signedNan: false,
});

/** Encodes `source` into E4M3 codes. */
export function encodeE4m3(source: Float32Array | Float64Array, codes: Uint8Array): void {
  if (source instanceof Float32Array) encodeE4m3Float32(source, codes, 0);
  else for (let i = 0; i < source.length; i++) codes[i] = e4m3FromNumber(source[i] as number);
}

/** Encodes `source` into E5M2 codes. */
export function encodeE5m2(source: Float32Array | Float64Array, codes: Uint8Array): void {
  if (source instanceof Float32Array) encodeE5m2Float32(source, codes, 0);
  else for (let i = 0; i < source.length; i++) codes[i] = e5m2FromNumber(source[i] as number);
}
