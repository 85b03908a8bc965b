/**
 * NVFP4 in registers: E2M1 codes in blocks of 16 that share an E4M3 scale (`src/quantization/fp4-blocks.ts`), on every
 * target: rounding is done by additions, for only 12.x converts E2M1.
 */
import { nvfp4Candidates, type ScaleSearch } from '../../../../quantization/fp4-blocks.ts';
import { OUTER_MAX } from '../../../../quantization/outer-scale.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { at } from '../parts/lists.ts';

/** Elements that share a scale. */
export const FP4_BLOCK = 16;
/** The largest product of a code and a scale: 6 * 448. */
export const FP4_MAX = 2688;
/** E4M3's least scale that is not 0, and its largest. */
const LEAST_SCALE = 2 ** -9;
const LARGEST_SCALE = 448;
const LARGEST_CODE = 6;

const EXPONENT_BITS = 0x7f800000;

/** The power of two below |x|, or `least` where that is larger. NaN and Infinity become Infinity. */
const powerBelow = (b: KernelBuilder, x: Reg<'f32'>, least: number): Reg<'f32'> =>
  b.max(b.as(b.and(b.as(x, 'b32'), EXPONENT_BITS), 'f32'), least);

/**
 * Rounds to nearest even, at steps of `power * 2^(24 - bits)`: adding a number of that last bit and taking it away
 * again.
 */
function roundAt(b: KernelBuilder, x: Reg<'f32'>, power: Reg<'f32'>, bits: number): Reg<'f32'> {
  const large = 1.5 * 2 ** bits;
  return b.fma(power, -large, b.fma(power, large, x));
}

/** The nearest value of E2M1, ties to even; beyond 6 it is 6. */
export function roundToE2m1(b: KernelBuilder, x: Reg<'f32'>): Reg<'f32'> {
  return b.max(b.min(roundAt(b, x, powerBelow(b, x, 1), 22), LARGEST_CODE), -LARGEST_CODE);
}

/** The nearest scale of a magnitude: E4M3, ties to even, none below 2^-9 or above 448. NaN stays NaN. */
export function roundToScale(b: KernelBuilder, x: Reg<'f32'>): Reg<'f32'> {
  const rounded = roundAt(b, x, powerBelow(b, x, 2 ** -6), 20);
  const enough = b.maxNaN(rounded, LEAST_SCALE);
  // A minimum would swallow NaN.
  b.when(b.setp('gt', enough, LARGEST_SCALE), () => b.set(enough, LARGEST_SCALE));
  return enough;
}

/** The code of a value of E2M1, sign and rest apart: as a subnormal float32 it begins with that. */
function codeOf(b: KernelBuilder, value: Reg<'f32'>): { readonly sign: Reg<'b32'>; readonly magnitude: Reg<'b32'> } {
  const bits = b.as(b.mul(value, 2 ** -126), 'b32');
  return { sign: b.and(b.shr(bits, 28), 8), magnitude: b.and(b.shr(bits, 22), 7) };
}

/** The byte of a scale. */
export const scaleByte = (b: KernelBuilder, scale: Reg<'f32'>): Reg<'b32'> =>
  b.shr(b.as(b.mul(scale, 2 ** -120), 'b32'), 20);

/**
 * How eight codes lie in a word. `nibbles`: one after the other from the lowest bits, as block-scaled products take them.
 * `pairs`: as {@link unpackCodes} takes fewest operations for. Each byte has two codes, of bits 7, 5 to 3 and of bits 6, 2 to 0.
 */
export type CodeOrder = 'nibbles' | 'pairs';

/** Where a code's magnitude lies, and its sign: element `i` of eight. */
function placeOf(order: CodeOrder, i: number): { readonly magnitude: number; readonly sign: number } {
  if (order === 'nibbles') return { magnitude: 4 * i, sign: 4 * i + 3 };
  // Pair p is elements p and p + 4: bytes 1 and 3 where p is even, else 0 and 2.
  const byte = 8 * (2 * (i >> 2) + (i & 1 ? 0 : 1));
  return i & 2 ? { magnitude: byte + 3, sign: byte + 7 } : { magnitude: byte, sign: byte + 6 };
}

/** Eight codes in a word. */
export function packCodes(b: KernelBuilder, values: readonly Reg<'f32'>[], order: CodeOrder): Reg<'b32'> {
  const shifted = (bits: Reg<'b32'>, by: number) => (by === 0 ? bits : by > 0 ? b.shl(bits, by) : b.shr(bits, -by));
  return values
    .flatMap((value, i) => {
      const [code, place] = [codeOf(b, value), placeOf(order, i)];
      return [shifted(code.magnitude, place.magnitude), shifted(code.sign, place.sign - 3)];
    })
    .reduce((word, bits) => b.or(word, bits));
}

/** What a block became: its scale, and the values of its codes. */
export interface QuantizedBlock {
  readonly scale: Reg<'f32'>;
  readonly codes: readonly Reg<'f32'>[];
}

/**
 * Quantizes a block of finite values up to {@link OUTER_MAX}: of the candidates the scale with the least squared error.
 *
 * @param values of the block that this lane holds
 * @param lanes lanes that hold the block together: this one, or this one and its neighbour
 */
export function quantizeBlock(
  b: KernelBuilder,
  values: readonly Reg<'f32'>[],
  search: ScaleSearch,
  lanes: 1 | 2,
): QuantizedBlock {
  let largest = values.map((value) => b.abs(value)).reduce((x, y) => b.max(x, y));
  if (lanes === 2) largest = b.max(largest, b.shflBfly(largest, 1));
  const [first, ...others] = [...nvfp4Candidates(search)] as [number, ...number[]];
  const best = roundToScale(b, b.mul(largest, first));
  if (others.length > 0) {
    const error = errorOf(b, values, best, lanes);
    for (const share of others) {
      const scale = roundToScale(b, b.mul(largest, share));
      const own = errorOf(b, values, scale, lanes);
      const better = b.setp('lt', own, error);
      b.when(better, () => {
        b.mov(own, error);
        b.mov(scale, best);
      });
    }
  }
  const inverse = b.rcp(best);
  return { scale: best, codes: values.map((value) => roundToE2m1(b, b.mul(value, inverse))) };
}

/** The squared error of a block with a scale. */
function errorOf(b: KernelBuilder, values: readonly Reg<'f32'>[], scale: Reg<'f32'>, lanes: 1 | 2): Reg<'f32'> {
  const inverse = b.rcpApprox(scale);
  let sum: Reg<'f32'> | undefined;
  for (const value of values) {
    const off = b.fma(roundToE2m1(b, b.mul(value, inverse)), scale, b.neg(value));
    sum = sum === undefined ? b.mul(off, off) : b.fma(off, off, sum);
  }
  const own = sum as Reg<'f32'>;
  return lanes === 2 ? b.add(own, b.shflBfly(own, 1)) : own;
}

/** 1 / x for a power of two of float32's middle range, exactly. */
export const inversePower = (b: KernelBuilder, power: Reg<'f32'>): Reg<'f32'> =>
  b.as(b.sub(b.constant('u32', 0x7f000000), b.as(power, 'u32')), 'f32');

/** The least power of two that brings a magnitude to at most {@link OUTER_MAX}, no less than 2^-126; 1 for 0. */
export function unitOf(b: KernelBuilder, largest: Reg<'f32'>): Reg<'f32'> {
  const share = b.as(b.mul(largest, 1 / OUTER_MAX), 'u32');
  const power = b.and(b.add(share, 0x7fffff), EXPONENT_BITS);
  b.when(b.setp('eq', largest, 0), () => b.set(power, 0x3f800000));
  return b.as(power, 'f32');
}

/** What the FP16 values of {@link unpackCodes} times this are: codes times scales. */
export const UNPACKED_UNIT = 2 ** 7;

/**
 * Two scales as both halves of FP16 each, such that codes unpacked with them are exact: 2^7 times them, for the codes'
 * own bits are 2^-14 times them.
 *
 * @param word four scales
 * @param shift 8 * (t >> 1): this lane's codes of 32 belong to the scale of the first or of the second 16
 * @returns of the first and of the second 32 of the 64 elements
 */
export function scaleHalves(b: KernelBuilder, word: Reg<'b32'>, shift: Reg<'u32'>): [Reg<'f16x2'>, Reg<'f16x2'>] {
  const bits = b.as(b.shl(b.and(b.shr(word, shift), 0x007f007f), 7), 'f16x2');
  const [first, second] = b.unpack(b.mul(bits, b.as(b.constant('b32', 0x78007800), 'f16x2')), 'f16');
  return [b.pack('f16x2', first, first), b.pack('f16x2', second, second)];
}

/** In each byte: the places of a code's exponent and mantissa in FP16's first byte, and with its sign those of two halves. */
const MAGNITUDE_BITS = 0x0e0e0e0e;
const CODE_BITS = 0x8e008e00;
/** lop3: bits of the first value where the third has ones, and of the second elsewhere. */
const SELECT = 0xe4;

/**
 * Eight codes as four registers of FP16: pair i is elements i and i + 4, which is fewer operations than neighbours.
 * Values are code * scale / {@link UNPACKED_UNIT}, exactly.
 */
export function unpackCodes(b: KernelBuilder, order: CodeOrder, word: Reg<'b32'>, scale: Reg<'f16x2'>): Reg<'f16x2'>[] {
  const pair = (bytes: Reg<'b32'>) => b.mul(b.as(b.and(bytes, CODE_BITS), 'f16x2'), scale);
  // Each byte becomes the first byte of FP16 of one of its codes; other bits are cut off with the pairs.
  if (order === 'pairs') {
    const first = [pair(b.shl(word, 1)), pair(b.shl(word, 9))];
    const upper = b.lop3(b.shr(word, 2), word, MAGNITUDE_BITS, SELECT);
    return [...first, pair(upper), pair(b.shl(upper, 8))];
  }
  const lower = b.lop3(b.shl(word, 1), b.shl(word, 4), MAGNITUDE_BITS, SELECT);
  const upper = b.lop3(b.shr(word, 3), word, MAGNITUDE_BITS, SELECT);
  return [pair(b.shl(lower, 8)), pair(b.shl(upper, 8)), pair(lower), pair(upper)];
}

/** {@link roundToE2m1} of a number that is not negative. */
export const roundPositive = (b: KernelBuilder, x: Reg<'f32'>): Reg<'f32'> =>
  b.min(roundAt(b, x, powerBelow(b, x, 1), 22), LARGEST_CODE);

/** The eight registers' values times a factor, in place. */
export function scaleAll(b: KernelBuilder, values: readonly Reg<'f32'>[], factor: Reg<'f32'>): void {
  for (const i of values.keys()) b.mul(at(values, i), factor, at(values, i));
}
