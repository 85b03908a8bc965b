/** The dot product of integers that the products rest on, in one instruction or in two. */

/** Names of the two ways, for functions that are compiled once for each. */
export type OneStep = i32;
export type TwoSteps = f32;

/**
 * Whether the relaxed dot product sums pairs in 16 bits, which saturate: the engine emulates it then, on x86-64 without VNNI, by
 * five instructions. The same sums in two of its own, with the ones of the second in a register, are three.
 */
let saturates = sumsSaturate();

function sumsSaturate(): bool {
  if (!ASC_FEATURE_RELAXED_SIMD) return false;
  // Of a memory that has pages: the compiler must not compute what only the machine can say.
  const one = <i32>(memory.size() > 0);
  const a = i8x16.splat(<i8>(127 * one));
  const b = i8x16.splat(<i8>(-1 * one));
  // 127 * 255 twice is beyond 16 bits where the second operand is taken for unsigned.
  return i32x4.extract_lane(i32x4.relaxed_dot_i8x16_i7x16_add_s(a, b, i32x4.splat(0)), 0) == 2 * 32767;
}

export function twoSteps(): bool {
  return ASC_FEATURE_RELAXED_SIMD && saturates;
}

/** For tests: the two ways give the same sums on every machine. */
export function setTwoSteps(wanted: bool): void {
  saturates = wanted;
}

/** Ones in a register: the engine would build a vector constant anew in every turn. `steps` is at least 1. */
// @ts-ignore: decorator
@inline
export function onesOf(steps: i32): v128 {
  return i16x8.splat(<i16>(steps > 0));
}

/**
 * `c + a . b`: each lane sums over the 4 bytes of its step. `b` holds -128..127 and `a` 0..127 in the relaxed build, so that no sum
 * of a pair saturates.
 */
// @ts-ignore: decorator
@inline
export function dot<Steps>(b: v128, a: v128, c: v128, ones: v128): v128 {
  if (ASC_FEATURE_RELAXED_SIMD) {
    if (isFloat<Steps>()) return i32x4.add(c, i32x4.dot_i16x8_s(i16x8.relaxed_dot_i8x16_i7x16_s(b, a), ones));
    return i32x4.relaxed_dot_i8x16_i7x16_add_s(b, a, c);
  }
  return i32x4.add(c, i32x4.dot_i16x8_s(b, a));
}
