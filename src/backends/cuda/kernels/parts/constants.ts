/** Numbers that several kernels share, and the arithmetic of sizes. */

/**
 * 1.5 * 2^23. An integer |n| < 2^22 added to the bits of this float gives the bits of 1.5 * 2^23 + n: scores
 * accumulated on top of it are floats without a conversion.
 */
export const MAGIC = 12582912;

export const MAGIC_BITS = 0x4b400000;
export const LOG2_E = Math.LOG2E;

export { FLOAT32_MAX } from '../../../../tensor/dtype.ts';

/** Magnitudes of floats order like the integers of their bits: from here on they are not finite. */
export const INFINITY_BITS = 0x7f800000;

/** From here on they round to infinity in FP16. */
export const BEYOND_FP16_BITS = 0x477ff000;

/**
 * A key's exponent, a byte: its codes are 2^(bias - byte) times as large as its group's scale says. Moved to a float's exponent, the byte is
 * what its scores must be multiplied by.
 */
export const KEY_EXPONENT_BIAS = 127;
export const MOST_KEY_EXPONENT = 100;

/** Below this a group of Q or K counts as zeros: 127 / max would not be finite, and no score could tell. */
export const SMALLEST_GROUP_MAXIMUM = 1e-36;

export const nextPowerOfTwo = (n: number) => 2 ** Math.ceil(Math.log2(Math.max(1, n)));
export const roundUp = (n: number, multiple: number) => Math.ceil(n / multiple) * multiple;

/**
 * The smallest normal float32. Scales below it are taken for it, so that -Infinity * scale is not NaN, and zeros stay
 * zeros.
 */
export const MIN_SCALE = 1.1754943508222875e-38;

/** log2 of E4M3's largest number: added to exponents, it makes a row's maximum the format's. */
export const LOG2_E4M3_MAX = Math.log2(448);

/**
 * Exponents are (1.5 * 2^23 + q.k) * scale plus a term of that size, whose rounding shifts the exponents of a tile by up
 * to the scale. For a scale above this the shift would show in P, so exponents are computed differently.
 */
export const COARSE_SCALE = 2 ** -7;
