/** What instructions compute where JavaScript has no operator for it. Compiled code reaches this file as `R`. */
import { bfloat16FromNumber, bfloat16ToNumber } from '../../../../tensor/formats/bfloat16.ts';
import { E2M1_VALUES, e2m1FromNumber } from '../../../../tensor/formats/float4.ts';
import { e4m3FromNumber, e4m3ToNumber } from '../../../../tensor/formats/float8.ts';
import { float16FromNumber, float16Table } from '../../../../tensor/formats/float16.ts';

/** Values of FP16 and of E4M3 by their codes. */
export const HALF = float16Table();
export const E4M3 = Float64Array.from({ length: 256 }, (_, code) => e4m3ToNumber(code));

/** Values of BF16 by their codes. */
export const BRAIN = Float64Array.from({ length: 65536 }, (_, code) => bfloat16ToNumber(code));

export const halfFrom = float16FromNumber;
export const bfloat16From = bfloat16FromNumber;

/** `cvt.rn.satfinite.e4m3x2.f32` */
export function packE4m3(high: number, low: number): number {
  return e4m3FromNumber(low) | (e4m3FromNumber(high) << 8);
}

export function unpackE4m3(codes: number): number {
  const [low, high] = [E4M3[codes & 255] as number, E4M3[(codes >> 8) & 255] as number];
  return (float16FromNumber(low) | (float16FromNumber(high) << 16)) >>> 0;
}

/** `cvt.rn.satfinite.e2m1x2.f32` */
export const packE2m1 = (high: number, low: number) => e2m1FromNumber(low) | (e2m1FromNumber(high) << 4);

export function unpackE2m1(codes: number): number {
  const [low, high] = [E2M1_VALUES[codes & 15] as number, E2M1_VALUES[(codes >> 4) & 15] as number];
  return (float16FromNumber(low) | (float16FromNumber(high) << 16)) >>> 0;
}

export const halfTo = (bits: number) => HALF[bits & 65535] as number;

/** A function of the halves of f16x2 registers, rounded to FP16. */
export function halves(f: (...values: number[]) => number, ...registers: number[]): number {
  const low = float16FromNumber(f(...registers.map((register) => halfTo(register))));
  const high = float16FromNumber(f(...registers.map((register) => halfTo(register >>> 16))));
  return (low | (high << 16)) >>> 0;
}

/**
 * `max.NaN.xorsign.abs` of the halves of two registers.
 *
 * @param values by code: {@link HALF} or {@link BRAIN}
 */
export function maxMagnitudes(values: ArrayLike<number>, a: number, b: number): number {
  const larger = (x: number, y: number) => {
    const [p, q] = [Math.abs(values[x] as number), Math.abs(values[y] as number)];
    if (Number.isNaN(p) || Number.isNaN(q)) return 0x7fff;
    return ((p > q ? x : y) & 0x7fff) | ((x ^ y) & 0x8000);
  };
  return (larger(a & 65535, b & 65535) | (larger(a >>> 16, b >>> 16) << 16)) >>> 0;
}

const doubleBits = new DataView(new ArrayBuffer(8));

/**
 * a * b + c in float64, for float32 values, such that rounding it to float32 in any direction rounds the exact sum:
 * where the sum does not fit in float64, its last bit is set to say so (rounding to odd).
 */
export function fusedSum(a: number, b: number, c: number): number {
  const product = a * b; // exact
  const sum = product + c;
  const back = sum - product;
  const rest = product - (sum - back) + (c - back);
  if (rest === 0 || Number.isNaN(rest)) return sum;
  doubleBits.setFloat64(0, sum);
  const low = doubleBits.getInt32(4);
  if ((low & 1) === 1) return sum;
  // An even last bit is not at an end of its word: one more never carries; one less may.
  if (rest > 0 === sum > 0) doubleBits.setInt32(4, low | 1);
  else doubleBits.setBigInt64(0, doubleBits.getBigInt64(0) - 1n);
  return doubleBits.getFloat64(0);
}

/** High word of the 64-bit product of two words: both signed where one is negative, else unsigned. */
export function mulHigh(a: number, b: number): number {
  const aHigh = (a >> 16) & 0xffff;
  const aLow = a & 0xffff;
  const bHigh = (b >> 16) & 0xffff;
  const bLow = b & 0xffff;
  const middle = aHigh * bLow + Math.floor((aLow * bLow) / 65536);
  const carried = aLow * bHigh + (middle % 65536);
  const unsigned = aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(carried / 65536);
  return unsigned - (a < 0 ? b : 0) - (b < 0 ? a : 0);
}

/** The least float32 that is not below a float64. */
export function roundUp(value: number): number {
  const rounded = Math.fround(value);
  if (!(rounded < value)) return rounded;
  doubleBits.setFloat32(0, rounded);
  const bits = doubleBits.getInt32(0);
  if (rounded === 0) doubleBits.setInt32(0, 1);
  else doubleBits.setInt32(0, rounded > 0 ? bits + 1 : bits - 1);
  return doubleBits.getFloat32(0);
}

/** The greatest float32 that is not above a float64. */
export const roundDown = (value: number) => -roundUp(-value);

export const maxNumber = (a: number, b: number) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.max(a, b));
export const minNumber = (a: number, b: number) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.min(a, b));

/** Rounded to nearest even integer, as `cvt.rni` does. */
export function roundEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Result of a 2^x, log2 or reciprocal instruction with `.ftz`: subnormals are 0. */
export function flush(value: number): number {
  return Math.abs(value) < 1.1754943508222875e-38 ? 0 : value;
}

export function prmt(a: number, b: number, selector: number): number {
  let result = 0;
  for (let i = 0; i < 4; i++) {
    const pick = (selector >> (4 * i)) & 7;
    const byte = ((pick < 4 ? a >>> (8 * pick) : b >>> (8 * (pick - 4))) & 255) >>> 0;
    result |= byte << (8 * i);
  }
  return result >>> 0;
}
