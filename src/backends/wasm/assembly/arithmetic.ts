/** Arithmetic on four float32 at a time that both builds and all kernels share. */

/** 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. */
const ROUNDING: f32 = 12582912;
export const ROUNDING_BITS: i32 = 0x4b400000;
/** Below this exponent a power of two is not computed; it is far below what any weight counts for. */
const LEAST_EXPONENT: f32 = -126;

// Constants of inner loops come from memory: the engine would build a vector constant anew in every turn, which made the
// softmax take half as long again.
export const CONSTANT_ROUNDING: usize = 0;
export const CONSTANT_LEAST_EXPONENT: usize = 4;
/** 2^23 */
export const CONSTANT_INTEGER_SHIFT: usize = 8;
/** Polynomials of 2^f over [-1/2, 1/2], minimax in relative error. The coarse one is multiplied by a scale. */
export const CONSTANT_COARSE_0: usize = 12;
export const CONSTANT_COARSE_1: usize = 16;
export const CONSTANT_COARSE_2: usize = 20;
export const CONSTANT_COARSE_3: usize = 24;
export const CONSTANT_FINE_0: usize = 28;
export const CONSTANT_FINE_1: usize = 32;
export const CONSTANT_FINE_2: usize = 36;
export const CONSTANT_FINE_3: usize = 40;
export const CONSTANT_FINE_4: usize = 44;
export const CONSTANT_FINE_5: usize = 48;
/** Whole vectors, see weights.ts. */
export const CONSTANT_VECTORS: usize = 64;

export function storeConstants(at: usize, coarseScale: f32): void {
  store<f32>(at, ROUNDING, CONSTANT_ROUNDING);
  store<f32>(at, LEAST_EXPONENT, CONSTANT_LEAST_EXPONENT);
  store<f32>(at, 8388608, CONSTANT_INTEGER_SHIFT);
  store<f32>(at, <f32>0.9999280723037018 * coarseScale, CONSTANT_COARSE_0);
  store<f32>(at, <f32>0.6932609870389171 * coarseScale, CONSTANT_COARSE_1);
  store<f32>(at, <f32>0.24261114309949505 * coarseScale, CONSTANT_COARSE_2);
  store<f32>(at, <f32>0.05517167035405337 * coarseScale, CONSTANT_COARSE_3);
  store<f32>(at, 1.0000000716559039, CONSTANT_FINE_0);
  store<f32>(at, 0.693146967060839, CONSTANT_FINE_1);
  store<f32>(at, 0.24022119717778734, CONSTANT_FINE_2);
  store<f32>(at, 0.05550713276869234, CONSTANT_FINE_3);
  store<f32>(at, 0.009675541663598257, CONSTANT_FINE_4);
  store<f32>(at, 0.00132764718440602, CONSTANT_FINE_5);
}

/** `a * b + c`; fused in the relaxed build on hardware that can, always in the same way on one device. */
// @ts-ignore: decorator
@inline
export function madd(a: v128, b: v128, c: v128): v128 {
  if (ASC_FEATURE_RELAXED_SIMD) return f32x4.relaxed_madd(a, b, c);
  return f32x4.add(f32x4.mul(a, b), c);
}

/** Larger of two, lane by lane; one machine instruction, unlike `f32x4.max`. NaN in `b` is dropped. */
// @ts-ignore: decorator
@inline
export function larger(a: v128, b: v128): v128 {
  return f32x4.pmax(a, b);
}

/** Magnitudes, lane by lane. */
// @ts-ignore: decorator
@inline
export function magnitudes(x: v128): v128 {
  // A mask that V8 has in memory; where the engine hoists constants out of loops, as Node 20 does, one in a register is faster.
  if (ASC_FEATURE_RELAXED_SIMD) return f32x4.abs(x);
  return v128.and(x, i32x4.splat(0x7fffffff));
}

/** Nearest integers (ties to even) of values below 2^22 in magnitude. */
// @ts-ignore: decorator
@inline
export function toIntegers(x: v128): v128 {
  return i32x4.sub(f32x4.add(x, f32x4.splat(ROUNDING)), i32x4.splat(ROUNDING_BITS));
}

/** ROUNDING in a register, for loops: the engine would build a vector constant anew in every turn. `turns` is at least 1. */
// @ts-ignore: decorator
@inline
export function roundingFor(turns: i32): v128 {
  return i32x4.splat(turns > 0 ? ROUNDING_BITS : 0);
}

/** {@link toIntegers} by {@link roundingFor}. */
// @ts-ignore: decorator
@inline
export function roundBy(rounding: v128, x: v128): v128 {
  return i32x4.sub(f32x4.add(x, rounding), rounding);
}

/**
 * `2^x` times the coarse polynomial's scale, for -126 <= x <= 0, to a relative error of 7.5e-5: enough for weights that
 * keep 7 or 12 bits. The polynomial's exponent is shifted by the integer part.
 */
// @ts-ignore: decorator
@inline
export function exp2Coarse(x: v128, rounding: v128, c3: v128, c2: v128, c1: v128, c0: v128): v128 {
  const rounded = f32x4.add(x, rounding);
  const f = f32x4.sub(x, f32x4.sub(rounded, rounding));
  const p = madd(madd(madd(c3, f, c2), f, c1), f, c0);
  return i32x4.add(p, i32x4.shl(rounded, 23));
}

/** `2^x` for -126 <= x <= 127, to a relative error of 1e-7 and float32 rounding. */
// @ts-ignore: decorator
@inline
export function exp2Fine(
  x: v128, rounding: v128, c5: v128, c4: v128, c3: v128, c2: v128, c1: v128, c0: v128,
): v128 {
  const rounded = f32x4.add(x, rounding);
  const f = f32x4.sub(x, f32x4.sub(rounded, rounding));
  const p = madd(madd(madd(madd(madd(c5, f, c4), f, c3), f, c2), f, c1), f, c0);
  return i32x4.add(p, i32x4.shl(rounded, 23));
}

// @ts-ignore: decorator
@inline
export function exp2FineHere(x: v128): v128 {
  return exp2Fine(
    x, f32x4.splat(ROUNDING), f32x4.splat(0.00132764718440602), f32x4.splat(0.009675541663598257),
    f32x4.splat(0.05550713276869234), f32x4.splat(0.24022119717778734), f32x4.splat(0.693146967060839),
    f32x4.splat(1.0000000716559039),
  );
}

/** `2^x` of one number x <= 127; x below -126 counts as -126. */
export function exp2(x: f32): f32 {
  return f32x4.extract_lane(exp2FineHere(f32x4.splat(max(x, LEAST_EXPONENT))), 0);
}

/**
 * `tanh`, to a relative error of 4e-7 at every size: minimax in `x^2` over [0, 8.7], beyond which float32 knows only 1.
 * Relative, so that a cap far above the scores leaves them as they are.
 */
// @ts-ignore: decorator
@inline
export function tanh4(x: v128): v128 {
  const bounded = f32x4.max(f32x4.min(x, f32x4.splat(8.7)), f32x4.splat(-8.7));
  const z = f32x4.mul(bounded, bounded);
  let p = madd(f32x4.splat(1.3897389843355989e-8), z, f32x4.splat(2.0993655055295082e-5));
  p = madd(p, z, f32x4.splat(0.003518733096729421));
  p = madd(p, z, f32x4.splat(0.13400457449933376));
  p = madd(p, z, f32x4.splat(0.9999999851839138));
  let q = madd(f32x4.splat(7.996427541348108e-7), z, f32x4.splat(0.000332363019435919));
  q = madd(q, z, f32x4.splat(0.02596485226505322));
  q = madd(q, z, f32x4.splat(0.4673377768931809));
  q = madd(q, z, f32x4.splat(1));
  return f32x4.mul(bounded, f32x4.div(p, q));
}

/** Natural logarithm of a finite x > 0: 2 atanh((m - 1) / (m + 1)) of the mantissa, and the exponent. */
export function log(x: f64): f64 {
  const bits = reinterpret<u64>(x);
  let exponent = <i32>(bits >> 52) - 1023;
  let m = reinterpret<f64>((bits & 0x000fffffffffffff) | 0x3ff0000000000000);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent++;
  }
  const r = (m - 1) / (m + 1);
  const r2 = r * r;
  const series = 1 + r2 * (1 / 3.0 + r2 * (1 / 5.0 + r2 * (1 / 7.0 + r2 * (1 / 9.0 + r2 * (1 / 11.0)))));
  return <f64>exponent * 0.6931471805599453 + 2 * r * series;
}

/** Sum of the four lanes, in a fixed order. */
// @ts-ignore: decorator
@inline
export function sumOf(x: v128): f32 {
  return (
    f32x4.extract_lane(x, 0) + f32x4.extract_lane(x, 1) + (f32x4.extract_lane(x, 2) + f32x4.extract_lane(x, 3))
  );
}

/** Largest of the four lanes; none is NaN. By vectors: a scalar `max` compiles to branches that are mispredicted. */
// @ts-ignore: decorator
@inline
export function maxOf(x: v128): f32 {
  const half = larger(x, v128.shuffle<f32>(x, x, 2, 3, 0, 1));
  return f32x4.extract_lane(larger(half, v128.shuffle<f32>(half, half, 1, 0, 3, 2)), 0);
}

/** What is not finite has a magnitude from here on, as an integer; those of finite numbers are in order below it. */
const INFINITE: i32 = 0x7f800000;

/** Larger magnitudes as integers, lane by lane: finite or not, in one. */
// @ts-ignore: decorator
@inline
export function largerMagnitudes(most: v128, x: v128): v128 {
  return i32x4.max_s(most, magnitudes(x));
}

/** The largest of four magnitudes that {@link largerMagnitudes} gave, as a float; NaN where one was not finite. */
// @ts-ignore: decorator
@inline
export function finiteMaximum(most: v128): f32 {
  const half = i32x4.max_s(most, v128.shuffle<i32>(most, most, 2, 3, 0, 1));
  const all = i32x4.extract_lane(i32x4.max_s(half, v128.shuffle<i32>(half, half, 1, 0, 3, 2)), 0);
  return all < INFINITE ? reinterpret<f32>(all) : NaN;
}

/** Sum of the four integer lanes. */
// @ts-ignore: decorator
@inline
export function integerSumOf(x: v128): i32 {
  return (
    i32x4.extract_lane(x, 0) + i32x4.extract_lane(x, 1) + (i32x4.extract_lane(x, 2) + i32x4.extract_lane(x, 3))
  );
}
