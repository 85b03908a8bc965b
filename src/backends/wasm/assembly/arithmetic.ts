/** Arithmetic on four float32 at a time that both builds and all kernels share. */

/** 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. */
const ROUNDING: f32 = 12582912;
/** Below this exponent a power of two is not computed; it is far below what any weight counts for. */
const LEAST_EXPONENT: f32 = -126;

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

/** Nearest integers (ties to even) of values below 2^22 in magnitude. */
// @ts-ignore: decorator
@inline
export function toIntegers(x: v128): v128 {
  return i32x4.sub(f32x4.add(x, f32x4.splat(ROUNDING)), i32x4.splat(0x4b400000));
}

/**
 * `2^x * scale` for x <= 0 to a relative error of 7.5e-5: enough for weights that keep 7 or 12 bits. A minimax polynomial
 * of 2^f over [-1/2, 1/2], its exponent shifted by the integer part.
 */
// @ts-ignore: decorator
@inline
export function exp2Coarse(x: v128, scale: f32): v128 {
  const bounded = larger(x, f32x4.splat(LEAST_EXPONENT));
  const rounded = f32x4.add(bounded, f32x4.splat(ROUNDING));
  const f = f32x4.sub(bounded, f32x4.sub(rounded, f32x4.splat(ROUNDING)));
  let p = madd(f32x4.splat(<f32>0.05517167035405337 * scale), f, f32x4.splat(<f32>0.24261114309949505 * scale));
  p = madd(p, f, f32x4.splat(<f32>0.6932609870389171 * scale));
  p = madd(p, f, f32x4.splat(<f32>0.9999280723037018 * scale));
  return i32x4.add(p, i32x4.shl(rounded, 23));
}

/** `2^x` for -126 <= x <= 127 to a relative error of 1e-7 and float32 rounding; smaller x count as -126. */
// @ts-ignore: decorator
@inline
export function exp2Fine(x: v128): v128 {
  const bounded = larger(x, f32x4.splat(LEAST_EXPONENT));
  const rounded = f32x4.add(bounded, f32x4.splat(ROUNDING));
  const f = f32x4.sub(bounded, f32x4.sub(rounded, f32x4.splat(ROUNDING)));
  let p = madd(f32x4.splat(0.00132764718440602), f, f32x4.splat(0.009675541663598257));
  p = madd(p, f, f32x4.splat(0.05550713276869234));
  p = madd(p, f, f32x4.splat(0.24022119717778734));
  p = madd(p, f, f32x4.splat(0.693146967060839));
  p = madd(p, f, f32x4.splat(1.0000000716559039));
  return i32x4.add(p, i32x4.shl(rounded, 23));
}

/** `2^x` of one number x <= 127. */
export function exp2(x: f32): f32 {
  return f32x4.extract_lane(exp2Fine(f32x4.splat(x)), 0);
}

/** `tanh`, to an absolute error of 2e-7. */
// @ts-ignore: decorator
@inline
export function tanh4(x: v128): v128 {
  // 2 log2(e) x, bounded where tanh is 1 in float32.
  const y = f32x4.max(f32x4.min(f32x4.mul(x, f32x4.splat(2.8853900817779268)), f32x4.splat(40)), f32x4.splat(-40));
  const e = exp2Fine(y);
  return f32x4.sub(f32x4.splat(1), f32x4.div(f32x4.splat(2), f32x4.add(e, f32x4.splat(1))));
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

/** Largest of the four lanes. */
// @ts-ignore: decorator
@inline
export function maxOf(x: v128): f32 {
  return max(
    max(f32x4.extract_lane(x, 0), f32x4.extract_lane(x, 1)),
    max(f32x4.extract_lane(x, 2), f32x4.extract_lane(x, 3)),
  );
}

/** Sum of the four integer lanes. */
// @ts-ignore: decorator
@inline
export function integerSumOf(x: v128): i32 {
  return (
    i32x4.extract_lane(x, 0) + i32x4.extract_lane(x, 1) + (i32x4.extract_lane(x, 2) + i32x4.extract_lane(x, 3))
  );
}
