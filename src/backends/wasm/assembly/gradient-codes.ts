/**
 * Operands of the gradients' products in integers (SageBwd, arXiv 2505.11594, algorithm 3), with finer scales than its one of each block: what
 * a product sums over has no scale of its own, everything else may.
 *
 * The left operand, P or dS, has a scale for each row of the result and is signed; the right one, dO, Q or K, has one for each channel.
 * Its rows are brought to one size before, and the left operand gets the sizes: so what a row of the result adds up is rounded by
 * the largest that this row itself adds, and a token of 1000 times the size costs those nothing that do not see it.
 *
 * Integers stand as the dot product takes them: those of 4 rows (2 in 16-bit lanes) that it sums over make one 4-byte step.
 * There are 8 bits in the relaxed build, 7 of them in the right operand, whose least element goes to 0; 12 in 16-bit lanes.
 */
import { BLOCK_Q } from '../job.ts';
import { larger, madd, maxOf, sumOf } from './arithmetic.ts';
import { LEAST_SCALE, rowMaximum } from './prepare.ts';
import {
  P_ROW_BYTES,
  SCRATCH_GRADIENT_CONSTANTS,
  SCRATCH_INVERSES,
  SCRATCH_LEFT,
  SCRATCH_LEFT_SUMS,
  SCRATCH_LEFT_UNITS,
} from './scratch.ts';

/** Rows that one 4-byte step of a product sums over. */
// @ts-ignore: decorator
@inline
export function rowsOfStep(): i32 {
  return ASC_FEATURE_RELAXED_SIMD ? 4 : 2;
}

/** Largest magnitude of the left operand. */
// @ts-ignore: decorator
@inline
function leftLevels(): f32 {
  return ASC_FEATURE_RELAXED_SIMD ? 127 : 2047;
}

/** 1.5 * 2^23, see toIntegers; the same as an integer is taken off again. */
const ROUNDING: f32 = 12582912;

// Constants of the loops here come from memory, see arithmetic.ts.
const ROUNDING_AT: usize = SCRATCH_GRADIENT_CONSTANTS;
const MAGNITUDE_AT: usize = SCRATCH_GRADIENT_CONSTANTS + 4;
const LOW_HALF_AT: usize = SCRATCH_GRADIENT_CONSTANTS + 8;
const TRANSPOSITION_AT: usize = SCRATCH_GRADIENT_CONSTANTS + 16;

/** Writes what the functions below read; a thread does it before its first. */
export function storeGradientConstants(scratch: usize): void {
  store<f32>(scratch + ROUNDING_AT, ROUNDING);
  store<u32>(scratch + MAGNITUDE_AT, 0x7fffffff);
  store<u32>(scratch + LOW_HALF_AT, 0xffff);
  for (let i: usize = 0; i < 16; i++) store<u8>(scratch + TRANSPOSITION_AT + i, <u8>((i >> 2) | ((i & 3) << 2)));
}

/** `x * factor` as integers. */
// @ts-ignore: decorator
@inline
function integersOf(x: v128, factor: v128, rounding: v128): v128 {
  return i32x4.sub(madd(x, factor, rounding), rounding);
}

/** 4-byte steps of four columns, from integers of four rows. */
// @ts-ignore: decorator
@inline
function stepsOf4(x0: v128, x1: v128, x2: v128, x3: v128, transposition: v128): v128 {
  const bytes = i8x16.narrow_i16x8_s(i16x8.narrow_i32x4_s(x0, x1), i16x8.narrow_i32x4_s(x2, x3));
  // The engine would load the indices of a shuffle anew in every turn.
  if (ASC_FEATURE_RELAXED_SIMD) return i8x16.relaxed_swizzle(bytes, transposition);
  return bytes;
}

/** The same of two rows in 16-bit lanes. */
// @ts-ignore: decorator
@inline
function stepsOf2(x0: v128, x1: v128, lowHalf: v128): v128 {
  return v128.or(v128.and(x0, lowHalf), i32x4.shl(x1, 16));
}

/** Scales of a left operand from the largest magnitudes; NaN and infinity stay. */
// @ts-ignore: decorator
@inline
function unitsOf(largest: v128): v128 {
  return larger(f32x4.mul(largest, f32x4.splat(<f32>1 / leftLevels())), f32x4.splat(LEAST_SCALE));
}

/**
 * A right operand: `rows` rows of float32 `stride` bytes apart, no more than 128, finite, readable to a multiple of 4 of them.
 *
 * @param codes `[channels / 8, blockBytes]`: steps of 8 channels each
 * @param scales of each channel, then minus the integers that stand for 0, float32 `[2, channels]`
 * @param sizes of each row, which its share of the left operand must be multiplied by
 */
export function quantizeRight(
  x: usize, stride: usize, rows: i32, channels: i32, codes: usize, blockBytes: usize, scales: usize, sizes: usize,
  scratch: usize,
): void {
  const padded = (rows + 3) & ~3;
  const inverses = scratch + SCRATCH_INVERSES;
  let largest: f32 = LEAST_SCALE;
  for (let r: usize = 0; r < <usize>padded; r++) {
    const size = max(rowMaximum(x + r * stride, channels), LEAST_SCALE);
    store<f32>(sizes + (r << 2), size);
    store<f32>(inverses + (r << 2), <f32>1 / size);
    largest = max(largest, size);
  }
  // Not above 1, so that products with them do not leave float32 at either end where the result would not.
  for (let r: usize = 0; r < <usize>padded; r++) store<f32>(sizes + (r << 2), load<f32>(sizes + (r << 2)) / largest);
  const rounding = v128.load32_splat(scratch + ROUNDING_AT);
  const magnitude = v128.load32_splat(scratch + MAGNITUDE_AT);
  const lowHalf = v128.load32_splat(scratch + LOW_HALF_AT);
  const transposition = v128.load(scratch + TRANSPOSITION_AT);
  for (let c: usize = 0; c < <usize>channels; c += 4) {
    const column = x + (c << 2);
    let least = f32x4.splat(0);
    let most = f32x4.splat(0);
    for (let r = 0, at = column, i = inverses; r < padded; r++, at += stride, i += 4) {
      let u = f32x4.mul(v128.load(at), v128.load32_splat(i));
      if (ASC_FEATURE_RELAXED_SIMD) least = f32x4.pmin(least, u);
      else u = v128.and(u, magnitude);
      most = larger(most, u);
    }
    // 126: both ends may be rounded away from 0.
    const levels: f32 = ASC_FEATURE_RELAXED_SIMD ? 126 : 2047;
    const scale = larger(f32x4.mul(f32x4.sub(most, least), f32x4.splat(<f32>1 / levels)), f32x4.splat(LEAST_SCALE));
    const factor = f32x4.div(f32x4.splat(1), scale);
    const zero = integersOf(f32x4.sub(f32x4.splat(0), least), factor, rounding);
    v128.store(scales + (c << 2), f32x4.mul(scale, f32x4.splat(largest)));
    v128.store(scales + (<usize>channels << 2) + (c << 2), f32x4.neg(f32x4.convert_i32x4_s(zero)));
    let to = codes + (c >> 3) * blockBytes + ((c & 4) << 2);
    for (let r = 0, at = column, i = inverses; r < padded; r += 4, at += stride << 2, i += 16) {
      const x0 = integersOf(f32x4.mul(v128.load(at), v128.load32_splat(i)), factor, rounding);
      const x1 = integersOf(f32x4.mul(v128.load(at + stride), v128.load32_splat(i, 4)), factor, rounding);
      const x2 = integersOf(f32x4.mul(v128.load(at + (stride << 1)), v128.load32_splat(i, 8)), factor, rounding);
      const x3 = integersOf(f32x4.mul(v128.load(at + 3 * stride), v128.load32_splat(i, 12)), factor, rounding);
      if (ASC_FEATURE_RELAXED_SIMD) {
        v128.store(
          to,
          stepsOf4(i32x4.add(x0, zero), i32x4.add(x1, zero), i32x4.add(x2, zero), i32x4.add(x3, zero), transposition),
        );
        to += 32;
      } else {
        v128.store(to, stepsOf2(x0, x1, lowHalf));
        v128.store(to, stepsOf2(x2, x3, lowHalf), 32);
        to += 64;
      }
    }
  }
}

/**
 * A left operand whose columns are rows of the result: `[rows, keys]` float32, P_ROW_BYTES apart, summed over its rows. Integers go to
 * SCRATCH_LEFT as `[steps, BLOCK_K]` of 4 bytes.
 *
 * @param rows a multiple of 4
 * @param keys a multiple of 4
 * @param sizes of the right operand's rows
 */
export function roundColumns(x: usize, sizes: usize, rows: i32, keys: i32, scratch: usize): void {
  const rounding = v128.load32_splat(scratch + ROUNDING_AT);
  const magnitude = v128.load32_splat(scratch + MAGNITUDE_AT);
  const lowHalf = v128.load32_splat(scratch + LOW_HALF_AT);
  const transposition = v128.load(scratch + TRANSPOSITION_AT);
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) {
    // Compared as integers, in which NaN is largest.
    let largest = i32x4.splat(0);
    for (let r = 0, at = x + j, size = sizes; r < rows; r += 2, at += 2 * P_ROW_BYTES, size += 8) {
      const y0 = f32x4.mul(v128.load(at), v128.load32_splat(size));
      const y1 = f32x4.mul(v128.load(at, P_ROW_BYTES), v128.load32_splat(size, 4));
      largest = i32x4.max_s(i32x4.max_s(largest, v128.and(y0, magnitude)), v128.and(y1, magnitude));
    }
    const unit = unitsOf(largest);
    const factor = f32x4.div(f32x4.splat(1), unit);
    let sum = i32x4.splat(0);
    let to = scratch + SCRATCH_LEFT + j;
    for (let r = 0, at = x + j, size = sizes; r < rows; r += 4, at += 4 * P_ROW_BYTES, size += 16) {
      const x0 = integersOf(f32x4.mul(v128.load(at), v128.load32_splat(size)), factor, rounding);
      const x1 = integersOf(f32x4.mul(v128.load(at, P_ROW_BYTES), v128.load32_splat(size, 4)), factor, rounding);
      const x2 = integersOf(f32x4.mul(v128.load(at, 2 * P_ROW_BYTES), v128.load32_splat(size, 8)), factor, rounding);
      const x3 = integersOf(f32x4.mul(v128.load(at, 3 * P_ROW_BYTES), v128.load32_splat(size, 12)), factor, rounding);
      if (ASC_FEATURE_RELAXED_SIMD) {
        sum = i32x4.add(sum, i32x4.add(i32x4.add(x0, x1), i32x4.add(x2, x3)));
        v128.store(to, stepsOf4(x0, x1, x2, x3, transposition));
        to += P_ROW_BYTES;
      } else {
        v128.store(to, stepsOf2(x0, x1, lowHalf));
        v128.store(to, stepsOf2(x2, x3, lowHalf), P_ROW_BYTES);
        to += 2 * P_ROW_BYTES;
      }
    }
    v128.store(scratch + SCRATCH_LEFT_UNITS + j, unit);
    if (ASC_FEATURE_RELAXED_SIMD) v128.store(scratch + SCRATCH_LEFT_SUMS + j, f32x4.convert_i32x4_s(sum));
  }
}

/** Largest magnitude of a row times the sizes, NaN if there is one. */
// @ts-ignore: decorator
@inline
function largestOf(x: usize, sizes: usize, keys: i32, magnitude: v128): f32 {
  let largest0 = i32x4.splat(0);
  let largest1 = largest0;
  for (let j: usize = 0; j < <usize>keys << 2; j += 32) {
    const y0 = f32x4.mul(v128.load(x + j), v128.load(sizes + j));
    const y1 = f32x4.mul(v128.load(x + j, 16), v128.load(sizes + j, 16));
    largest0 = i32x4.max_s(largest0, v128.and(y0, magnitude));
    largest1 = i32x4.max_s(largest1, v128.and(y1, magnitude));
  }
  const largest = i32x4.max_s(largest0, largest1);
  // Not a number in any lane: the sum of differences is 0 for finite numbers.
  return sumOf(f32x4.sub(largest, largest)) == 0 ? maxOf(largest) : NaN;
}

/** Integers of 4 steps of a row: 16 keys in bytes, 8 in 16-bit lanes. */
// @ts-ignore: decorator
@inline
function rowSteps(x: usize, sizes: usize, factor: v128, rounding: v128): v128 {
  const x0 = integersOf(f32x4.mul(v128.load(x), v128.load(sizes)), factor, rounding);
  const x1 = integersOf(f32x4.mul(v128.load(x, 16), v128.load(sizes, 16)), factor, rounding);
  const low = i16x8.narrow_i32x4_s(x0, x1);
  if (!ASC_FEATURE_RELAXED_SIMD) return low;
  const x2 = integersOf(f32x4.mul(v128.load(x, 32), v128.load(sizes, 32)), factor, rounding);
  const x3 = integersOf(f32x4.mul(v128.load(x, 48), v128.load(sizes, 48)), factor, rounding);
  return i8x16.narrow_i16x8_s(low, i16x8.narrow_i32x4_s(x2, x3));
}

/** Sums of each lane's bytes. */
// @ts-ignore: decorator
@inline
function byteSums(x: v128): v128 {
  return i32x4.extadd_pairwise_i16x8_s(i16x8.extadd_pairwise_i8x16_s(x));
}

/**
 * A left operand whose rows are rows of the result: four rows of `keys` keys (a multiple of 16), P_ROW_BYTES apart, summed over the keys.
 * Integers go to SCRATCH_LEFT as `[steps, 4]` of 4 bytes.
 *
 * @param sizes of the right operand's rows
 */
export function roundRows(x: usize, sizes: usize, keys: i32, scratch: usize): void {
  let codes = scratch + SCRATCH_LEFT;
  const units = scratch + SCRATCH_LEFT_UNITS;
  const rounding = v128.load32_splat(scratch + ROUNDING_AT);
  const magnitude = v128.load32_splat(scratch + MAGNITUDE_AT);
  for (let t: usize = 0; t < 4; t++) {
    store<f32>(units + (t << 2), largestOf(x + t * P_ROW_BYTES, sizes, keys, magnitude));
  }
  const unit = unitsOf(v128.load(units));
  v128.store(units, unit);
  const factors = f32x4.div(f32x4.splat(1), unit);
  const f0 = v128.shuffle<f32>(factors, factors, 0, 0, 0, 0);
  const f1 = v128.shuffle<f32>(factors, factors, 1, 1, 1, 1);
  const f2 = v128.shuffle<f32>(factors, factors, 2, 2, 2, 2);
  const f3 = v128.shuffle<f32>(factors, factors, 3, 3, 3, 3);
  const bytes: usize = ASC_FEATURE_RELAXED_SIMD ? 64 : 32;
  let sum = i32x4.splat(0);
  for (let j: usize = 0; j < <usize>keys << 2; j += bytes, codes += 64) {
    const at = x + j;
    const size = sizes + j;
    const r0 = rowSteps(at, size, f0, rounding);
    const r1 = rowSteps(at + P_ROW_BYTES, size, f1, rounding);
    const r2 = rowSteps(at + 2 * P_ROW_BYTES, size, f2, rounding);
    const r3 = rowSteps(at + 3 * P_ROW_BYTES, size, f3, rounding);
    const low01 = v128.shuffle<i32>(r0, r1, 0, 4, 1, 5);
    const high01 = v128.shuffle<i32>(r0, r1, 2, 6, 3, 7);
    const low23 = v128.shuffle<i32>(r2, r3, 0, 4, 1, 5);
    const high23 = v128.shuffle<i32>(r2, r3, 2, 6, 3, 7);
    const s0 = v128.shuffle<i64>(low01, low23, 0, 2);
    const s1 = v128.shuffle<i64>(low01, low23, 1, 3);
    const s2 = v128.shuffle<i64>(high01, high23, 0, 2);
    const s3 = v128.shuffle<i64>(high01, high23, 1, 3);
    v128.store(codes, s0);
    v128.store(codes, s1, 16);
    v128.store(codes, s2, 32);
    v128.store(codes, s3, 48);
    if (ASC_FEATURE_RELAXED_SIMD) {
      sum = i32x4.add(sum, i32x4.add(i32x4.add(byteSums(s0), byteSums(s1)), i32x4.add(byteSums(s2), byteSums(s3))));
    }
  }
  if (ASC_FEATURE_RELAXED_SIMD) v128.store(scratch + SCRATCH_LEFT_SUMS, f32x4.convert_i32x4_s(sum));
}

/** Bytes of 8 channels of a right operand over the rows of a unit. */
// @ts-ignore: decorator
@inline
export function unitBlockBytes(): usize {
  return <usize>((BLOCK_Q / rowsOfStep()) * 32);
}
