/** Weights of a row's keys in one tile: powers of two of its scores, relative to the row's largest. */
import { BLOCK_K } from '../job.ts';
import {
  CONSTANT_COARSE_0,
  CONSTANT_COARSE_1,
  CONSTANT_COARSE_2,
  CONSTANT_COARSE_3,
  CONSTANT_FINE_0,
  CONSTANT_FINE_1,
  CONSTANT_FINE_2,
  CONSTANT_FINE_3,
  CONSTANT_FINE_4,
  CONSTANT_FINE_5,
  CONSTANT_INTEGER_SHIFT,
  CONSTANT_LEAST_EXPONENT,
  CONSTANT_ROUNDING,
  CONSTANT_VECTORS,
  exp2Coarse,
  exp2Fine,
  integerSumOf,
  larger,
  madd,
  maxOf,
  sumOf,
} from './arithmetic.ts';

/** Largest of a row's scores; `keys` is a multiple of 16. */
export function maximumOf(scores: usize, keys: i32): f32 {
  let m0 = v128.load(scores);
  let m1 = v128.load(scores, 16);
  let m2 = v128.load(scores, 32);
  let m3 = v128.load(scores, 48);
  for (let j = 16; j < keys; j += 16) {
    scores += 64;
    m0 = larger(m0, v128.load(scores));
    m1 = larger(m1, v128.load(scores, 16));
    m2 = larger(m2, v128.load(scores, 32));
    m3 = larger(m3, v128.load(scores, 48));
  }
  return maxOf(larger(larger(m0, m1), larger(m2, m3)));
}

/** Weights of one row relative to its largest, in integers of 12 bits (SIMD128). Returns their sum before rounding, in levels. */
function weigh12(scores: usize, keys: i32, most: f32, scale: f32, p: usize, constants: usize): f32 {
  const top = f32x4.splat(most);
  const factor = f32x4.splat(scale);
  const least = v128.load32_splat(constants, CONSTANT_LEAST_EXPONENT);
  const rounding = v128.load32_splat(constants, CONSTANT_ROUNDING);
  const c3 = v128.load32_splat(constants, CONSTANT_COARSE_3);
  const c2 = v128.load32_splat(constants, CONSTANT_COARSE_2);
  const c1 = v128.load32_splat(constants, CONSTANT_COARSE_1);
  const c0 = v128.load32_splat(constants, CONSTANT_COARSE_0);
  // Adding 2^23 leaves the rounded integer in the low bits.
  const shift = v128.load32_splat(constants, CONSTANT_INTEGER_SHIFT);
  let sum = f32x4.splat(0);
  for (let j = 0; j < keys; j += 16) {
    let y = larger(f32x4.mul(f32x4.sub(v128.load(scores), top), factor), least);
    const x0 = exp2Coarse(y, rounding, c3, c2, c1, c0);
    y = larger(f32x4.mul(f32x4.sub(v128.load(scores, 16), top), factor), least);
    const x1 = exp2Coarse(y, rounding, c3, c2, c1, c0);
    y = larger(f32x4.mul(f32x4.sub(v128.load(scores, 32), top), factor), least);
    const x2 = exp2Coarse(y, rounding, c3, c2, c1, c0);
    y = larger(f32x4.mul(f32x4.sub(v128.load(scores, 48), top), factor), least);
    const x3 = exp2Coarse(y, rounding, c3, c2, c1, c0);
    sum = f32x4.add(sum, f32x4.add(f32x4.add(x0, x1), f32x4.add(x2, x3)));
    const low = i16x8.narrow_i32x4_s(
      i32x4.sub(f32x4.add(x0, shift), shift),
      i32x4.sub(f32x4.add(x1, shift), shift),
    );
    const high = i16x8.narrow_i32x4_s(
      i32x4.sub(f32x4.add(x2, shift), shift),
      i32x4.sub(f32x4.add(x3, shift), shift),
    );
    v128.store(p, low);
    v128.store(p, high, 16);
    p += 32;
    scores += 64;
  }
  return sumOf(sum);
}

// The vectors of weigh7 and weigh14, from CONSTANT_VECTORS on.
const FRACTION: usize = CONSTANT_VECTORS;
const CUBIC: usize = CONSTANT_VECTORS + 16;
const QUADRATIC: usize = CONSTANT_VECTORS + 32;
const LINEAR: usize = CONSTANT_VECTORS + 48;
const CONSTANT: usize = CONSTANT_VECTORS + 64;
const POWERS: usize = CONSTANT_VECTORS + 80;
const ONES: usize = CONSTANT_VECTORS + 96;
const POWERS_14_LOW: usize = CONSTANT_VECTORS + 112;
const POWERS_14_HIGH: usize = CONSTANT_VECTORS + 128;

/** Writes what weigh7 and weigh14 read. */
export function storeWeightConstants(at: usize): void {
  v128.store(at, i16x8.splat(0x7ff8), FRACTION);
  // 2^f over [0, 1) times 127 * 128, minimax, to a relative error of 7.5e-5.
  v128.store(at, i16x8.splat(1268), CUBIC);
  v128.store(at, i16x8.splat(3675), QUADRATIC);
  v128.store(at, i16x8.splat(11311), LINEAR);
  v128.store(at, i16x8.splat(16255), CONSTANT);
  // 2^(n + 8) at n modulo 16, for n from -8 to -1.
  v128.store(at, i8x16(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, -128), POWERS);
  v128.store(at, i8x16.splat(1), ONES);
  // 2^(n + 15) at n modulo 16, for n from -15 to -1, in two bytes; -16 has none.
  v128.store(at, i8x16(0, 1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0), POWERS_14_LOW);
  v128.store(at, i8x16(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64), POWERS_14_HIGH);
}

/**
 * Eight weights in 0..127 as 16-bit integers, from exponents with 12 bits of fraction: a polynomial of the fraction, then a
 * multiplication with a power of two that is looked up by the integer part n. Exponents saturate at -8, whose weight rounds
 * to 0.
 */
// @ts-ignore: decorator
@inline
function weigh8(
  low: v128, high: v128, fraction: v128, c3: v128, c2: v128, c1: v128, c0: v128, powers: v128,
): v128 {
  const t = i16x8.narrow_i32x4_s(i32x4.relaxed_trunc_f32x4_s(low), i32x4.relaxed_trunc_f32x4_s(high));
  const f = v128.and(i16x8.shl(t, 3), fraction);
  let w = i16x8.add(c2, i16x8.relaxed_q15mulr_s(f, c3));
  w = i16x8.add(c1, i16x8.relaxed_q15mulr_s(f, w));
  w = i16x8.add(c0, i16x8.relaxed_q15mulr_s(f, w));
  // The upper byte of each power has index 0, where there is a 0.
  return i16x8.relaxed_q15mulr_s(w, i8x16.relaxed_swizzle(powers, i16x8.shr_u(t, 12)));
}

/**
 * Weights of one row relative to its largest, in integers of 7 bits (relaxed SIMD). Eight lanes of 16 bits: the float32 way
 * takes four instructions for every three of these. Returns their sum in levels.
 */
function weigh7(scores: usize, keys: i32, most: f32, scale: f32, p: usize, constants: usize): f32 {
  const factor = f32x4.splat(scale * 4096);
  // Truncation towards 0 rounds to nearest half a step further down. A step more keeps n below 0; the weight of the largest
  // score is 127 nevertheless: the product and the sum are each a quarter off at most, see LARGEST_TOP.
  const down = f32x4.splat(-1.5 - most * (scale * 4096));
  const fraction = v128.load(constants, FRACTION);
  const c3 = v128.load(constants, CUBIC);
  const c2 = v128.load(constants, QUADRATIC);
  const c1 = v128.load(constants, LINEAR);
  const c0 = v128.load(constants, CONSTANT);
  const powers = v128.load(constants, POWERS);
  const ones = v128.load(constants, ONES);
  let sum = i32x4.splat(0);
  for (let j = 0; j < keys; j += 16) {
    const w0 = weigh8(
      madd(v128.load(scores), factor, down), madd(v128.load(scores, 16), factor, down),
      fraction, c3, c2, c1, c0, powers,
    );
    const w1 = weigh8(
      madd(v128.load(scores, 32), factor, down), madd(v128.load(scores, 48), factor, down),
      fraction, c3, c2, c1, c0, powers,
    );
    const bytes = i8x16.narrow_i16x8_s(w0, w1);
    sum = i32x4.relaxed_dot_i8x16_i7x16_add_s(ones, bytes, sum);
    v128.store(p, bytes);
    p += 16;
    scores += 64;
  }
  return <f32>integerSumOf(sum);
}

/** As weigh8, but weights of 14 bits, from exponents with 11 bits of fraction, which saturate at -16. */
// @ts-ignore: decorator
@inline
function weigh8Of14(
  low: v128, high: v128, fraction: v128, c3: v128, c2: v128, c1: v128, c0: v128, constants: usize,
): v128 {
  const t = i16x8.narrow_i32x4_s(i32x4.relaxed_trunc_f32x4_s(low), i32x4.relaxed_trunc_f32x4_s(high));
  const f = v128.and(i16x8.shl(t, 4), fraction);
  let w = i16x8.add(c2, i16x8.relaxed_q15mulr_s(f, c3));
  w = i16x8.add(c1, i16x8.relaxed_q15mulr_s(f, w));
  w = i16x8.add(c0, i16x8.relaxed_q15mulr_s(f, w));
  const n = v128.and(i16x8.shr_u(t, 11), i16x8.splat(15));
  const power = v128.or(
    i8x16.relaxed_swizzle(v128.load(constants, POWERS_14_LOW), n),
    i8x16.relaxed_swizzle(v128.load(constants, POWERS_14_HIGH), i16x8.shl(n, 8)),
  );
  return i16x8.relaxed_q15mulr_s(w, power);
}

/**
 * Weights of one row relative to its largest, in integers of 14 bits (relaxed SIMD), 128 of which make one of weigh7's levels.
 * Returns their sum in those levels.
 */
function weigh14(scores: usize, keys: i32, most: f32, scale: f32, weights: usize, constants: usize): f32 {
  const factor = f32x4.splat(scale * 2048);
  const down = f32x4.splat(-1.5 - most * (scale * 2048));
  const fraction = v128.load(constants, FRACTION);
  const c3 = v128.load(constants, CUBIC);
  const c2 = v128.load(constants, QUADRATIC);
  const c1 = v128.load(constants, LINEAR);
  const c0 = v128.load(constants, CONSTANT);
  const one = i16x8.splat(1);
  let sum = i32x4.splat(0);
  for (let j = 0; j < keys; j += 8) {
    const w = weigh8Of14(
      madd(v128.load(scores), factor, down), madd(v128.load(scores, 16), factor, down),
      fraction, c3, c2, c1, c0, constants,
    );
    sum = i32x4.add(sum, i32x4.dot_i16x8_s(w, one));
    v128.store(weights, w);
    weights += 16;
    scores += 32;
  }
  return <f32>integerSumOf(sum) / 128;
}

/** Second digits of a row's weights lie so far behind the first, and weights of 14 bits behind those. */
export const SECOND_DIGITS: usize = BLOCK_K;
const WEIGHTS_14: usize = 2 * BLOCK_K;

// Where rounding to 7 bits is too coarse, by the sum of the weights and what of it rounding moved. Up to half a level a key
// can be lost, and is where most keys have less than that: a tile with one dominant key. Fewer than FEW levels a key need
// the second digit whatever the sums say, at MANY no loss matters; ordinary tiles have 15 to 20.
const FEW: i32 = 4;
const MANY: i32 = 6;
const LARGEST_LOSS: f32 = 1 / 64.0;

/**
 * Weights of a row again, in two digits of 7 bits, where their sum in whole levels says that one may not do.
 *
 * @returns their sum in levels; 0 where one digit does, which then stays
 */
export function weighTwoDigits(
  scores: usize, keys: i32, most: f32, scale: f32, levels: f32, p: usize, constants: usize,
): f32 {
  if (levels >= <f32>(MANY * keys)) return 0;
  const weights = p + WEIGHTS_14;
  const sum = weigh14(scores, keys, most, scale, weights, constants);
  if (levels >= <f32>(FEW * keys) && abs(sum - levels) <= LARGEST_LOSS * levels) return 0;
  const digit = i16x8.splat(127);
  for (let j: usize = 0; j < <usize>keys; j += 16) {
    const w0 = v128.load(weights + (j << 1));
    const w1 = v128.load(weights + (j << 1), 16);
    v128.store(p + j, i8x16.narrow_i16x8_s(i16x8.shr_u(w0, 7), i16x8.shr_u(w1, 7)));
    v128.store(p + j, i8x16.narrow_i16x8_s(v128.and(w0, digit), v128.and(w1, digit)), SECOND_DIGITS);
  }
  return sum;
}

/** Scores in base 2 beyond it leave no fraction of their product with the exponents' factor: their largest is taken off first. */
const LARGEST_TOP: f32 = 512;

/** Whether {@link weighInteger} needs the largest score taken off first. */
// @ts-ignore: decorator
@inline
export function isFarFromZero(most: f32, scale: f32): boolean {
  return ASC_FEATURE_RELAXED_SIMD && abs(most * scale) > LARGEST_TOP;
}

/** Takes a number off a row's scores. */
export function takeOff(scores: usize, keys: i32, number: f32): void {
  const taken = f32x4.splat(number);
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) v128.store(scores + j, f32x4.sub(v128.load(scores + j), taken));
}

/** Weights of one row as the integer product with V takes them. Returns their sum in levels. */
// @ts-ignore: decorator
@inline
export function weighInteger(scores: usize, keys: i32, most: f32, scale: f32, p: usize, constants: usize): f32 {
  if (ASC_FEATURE_RELAXED_SIMD) return weigh7(scores, keys, most, scale, p, constants);
  return weigh12(scores, keys, most, scale, p, constants);
}

/** Weights of one row relative to its largest, in float32. Returns their sum. */
export function weighFloat(scores: usize, keys: i32, most: f32, scale: f32, p: usize, constants: usize): f32 {
  const top = f32x4.splat(most);
  const factor = f32x4.splat(scale);
  const least = v128.load32_splat(constants, CONSTANT_LEAST_EXPONENT);
  const rounding = v128.load32_splat(constants, CONSTANT_ROUNDING);
  const c5 = v128.load32_splat(constants, CONSTANT_FINE_5);
  const c4 = v128.load32_splat(constants, CONSTANT_FINE_4);
  const c3 = v128.load32_splat(constants, CONSTANT_FINE_3);
  const c2 = v128.load32_splat(constants, CONSTANT_FINE_2);
  const c1 = v128.load32_splat(constants, CONSTANT_FINE_1);
  const c0 = v128.load32_splat(constants, CONSTANT_FINE_0);
  let sum = f32x4.splat(0);
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) {
    const y = f32x4.mul(f32x4.sub(v128.load(scores + j), top), factor);
    // Exactly 0 for an excluded key: its value may be anything.
    const x = v128.and(exp2Fine(larger(y, least), rounding, c5, c4, c3, c2, c1, c0), f32x4.ge(y, least));
    sum = f32x4.add(sum, x);
    v128.store(p + j, x);
  }
  return sumOf(sum);
}
