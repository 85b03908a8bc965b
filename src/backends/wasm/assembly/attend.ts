/**
 * Attention of BLOCK_Q rows of one head over the tiles of their keys, with a running softmax (FlashAttention-2,
 * arXiv 2307.08691, algorithm 1) on quantized operands (SageAttention, arXiv 2410.02367, algorithm 1).
 *
 * Q has a scale per row. P of a tile is quantized against the row's largest weight in that tile, not the largest so far:
 * its few levels then cover what the tile holds. In the relaxed build these are 7 bits, and where one key dominates a tile
 * a second digit of 7 holds what rounding to the first would lose of the others.
 */
import {
  JOB_D,
  JOB_DTYPE,
  JOB_DV,
  JOB_DV_PADDED,
  JOB_FLAGS,
  JOB_K,
  JOB_K_HEAD_STRIDE,
  JOB_K_TOKEN_STRIDE,
  JOB_KV_HEADS,
  JOB_K_STEPS,
  JOB_LSE,
  JOB_LSE_HEAD_STRIDE,
  JOB_MASK,
  JOB_MASK_DTYPE,
  JOB_MASK_HEAD_STRIDE,
  JOB_MASK_KEY_STRIDE,
  JOB_MASK_QUERY_STRIDE,
  JOB_MEANS,
  JOB_OUT,
  JOB_OUT_HEAD_STRIDE,
  JOB_OUT_TOKEN_STRIDE,
  JOB_Q,
  JOB_QUERY_HEADS,
  JOB_Q_HEAD_STRIDE,
  JOB_Q_TOKEN_STRIDE,
  JOB_SEQUENCES,
  JOB_SM_SCALE,
  JOB_SOFTCAP,
  JOB_TILES,
  JOB_TILE_BYTES,
  JOB_TILE_FLAGS,
  JOB_TILE_K_PLAIN,
  JOB_TILE_K_SCALES,
  JOB_TILE_K_SUMS,
  JOB_TILE_NANS,
  JOB_TILE_SHIFT,
  JOB_TILE_V,
  JOB_TILE_V_APART,
  JOB_TILE_V_EXPONENTS,
  JOB_TILE_V_SCALES,
  SEQUENCE_BYTES,
  SEQUENCE_FIRST_TILE,
  SEQUENCE_K,
  SEQUENCE_KEY_LENGTH,
  SEQUENCE_LOWER,
  SEQUENCE_LSE,
  SEQUENCE_MASK,
  SEQUENCE_OUT,
  SEQUENCE_Q,
  SEQUENCE_QUERY_LENGTH,
  SEQUENCE_TILES,
  SEQUENCE_UPPER,
  UNIT_HEAD,
  UNIT_ROW,
  UNIT_SEQUENCE,
} from '../generated/fields.ts';
import {
  BLOCK_K,
  BLOCK_Q,
  DTYPE_BOOL,
  DTYPE_FLOAT32,
  FLAG_ACCURATE,
  FLAG_EXACT,
  FLAG_FP4,
  FLAG_FP4_PRODUCTS,
  FLAG_GRADIENTS,
  FLAG_SMOOTH_K,
  FLAG_SMOOTH_Q,
  FLAG_SMOOTH_Q_SEQUENCE,
  FLAG_SMOOTH_V,
  FLAG_TILE_MEANS,
  SMOOTHED_ROWS,
  TILE_APART_COUNT,
  TILE_APART_KEYS,
  TILE_FINE_VALUES,
  TILE_NAN_KEY,
  TILE_NAN_VALUE,
  TILE_PLAIN_KEYS,
  TILE_SHIFTED,
  TILE_VALUES_APART,
} from '../job.ts';
import {
  exp2,
  finiteMaximum,
  larger,
  largerMagnitudes,
  log,
  madd,
  maxOf,
  ROUNDING_BITS,
  roundingFor,
  storeConstants,
  sumOf,
  tanh4,
  toIntegers,
} from './arithmetic.ts';
import { elementShift, load4, loadElement, loadRow, storeRow, touchRows } from './elements.ts';
import { decodeKeys, decodeValues, FP4_MAX, roundQuery, roundWeights, spreadInvalidFp4, WEIGHT_UNIT } from './fp4.ts';
import { isPlainRow, LEAST_SCALE, rowMaximum } from './prepare.ts';
import { addValuesFine, addValuesFloat, addValuesInteger, scoreRows, scoreRowsFloat } from './products.ts';
import { addValuesRow, addValuesRowFloat, scoreRow, scoreRowFloat } from './row-products.ts';
import {
  FLOAT_Q_ROW_BYTES,
  P_ROW_BYTES,
  Q_ROW_BYTES,
  SCRATCH_CONSTANTS,
  SCRATCH_APART,
  SCRATCH_APART_WEIGHTS,
  SCRATCH_DECODED_KEYS,
  SCRATCH_DECODED_VALUES,
  SCRATCH_EXACT_SUMS,
  SCRATCH_FLOAT_Q,
  SCRATCH_MAXIMA,
  SCRATCH_MEAN_SCORES,
  SCRATCH_KEY_ONES,
  SCRATCH_OUT,
  SCRATCH_P,
  SCRATCH_Q,
  SCRATCH_QUERY_MEAN,
  SCRATCH_ROW,
  SCRATCH_RANGE,
  SCRATCH_ROW_BIASES,
  SCRATCH_ROW_SCALES,
  SCRATCH_ROW_ZEROS,
  SCRATCH_SCORES,
  SCRATCH_SECOND_WEIGHTS,
  SCRATCH_SUMS,
  SCRATCH_TILE_MAXIMA,
  SCRATCH_TILE_SCALES,
  SCRATCH_TILE_SUMS,
  SCRATCH_TILE_WEIGHTS,
} from './scratch.ts';
import { addSink, excludeAbsent, hasAny, mapOfHead, mapOfRow, nextKey, shareBesideSink, sinkOf } from './sparse.ts';
import {
  isFarFromZero,
  maximumOf,
  SECOND_DIGITS,
  takeOff,
  storeWeightConstants,
  weighFloat,
  weighInteger,
  weighTwoDigits,
} from './weights.ts';

export const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
/** Finite, and below every score: the maximum of a row that has seen nothing but NaN. */
export const LOWEST: f32 = -3e38;
/** Row scales beyond it are applied to the scores first: the exponents' factor is up to 4096 times as large. */
export const LARGEST_FACTOR: f32 = 1e30;
/** Bound of what smoothing takes from a score. */
const LARGEST_SHIFT: f32 = 1e38;
/** A finite mask counts as no less: in base 2 it is finite then, and still above LOWEST. */
const LEAST_MASK: f32 = -2e38;

/**
 * Steps of a quantized query. SIMD128: magnitudes to either side of 0. Relaxed SIMD: from the row's least element (or 0) to
 * its largest, as 0..127 or in two digits 0..16383; one level is left for roundings.
 */
const Q_LEVELS: f32 = ASC_FEATURE_RELAXED_SIMD ? 126 : 127;
const Q_LEVELS_ACCURATE: f32 = ASC_FEATURE_RELAXED_SIMD ? 16382 : 8191;
/** Largest quantized weight: 7 bits, or 12 where lanes have 16 anyway (12 + 12 + 7 bits of the 128 keys: 31). */
const P_LEVELS: f32 = ASC_FEATURE_RELAXED_SIMD ? 127 : 4095;

/**
 * What quantizing a row of Q needs to know of it: how far it reaches below and above 0 to SCRATCH_RANGE (relaxed build only), and behind that
 * its product with the means.
 *
 * @returns its largest magnitude, NaN where it holds a NaN or an infinity
 */
// @ts-ignore: decorator
@inline
function measureQuery(row: usize, means: usize, padded: i32, scratch: usize): f32 {
  let low = f32x4.splat(0);
  let high = low;
  let most = low;
  let sum = low;
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    const x = v128.load(row + i);
    if (ASC_FEATURE_RELAXED_SIMD) {
      low = f32x4.pmin(low, x);
      high = larger(high, x);
    }
    most = largerMagnitudes(most, x);
    sum = madd(x, v128.load(means + i), sum);
  }
  if (ASC_FEATURE_RELAXED_SIMD) {
    store<f32>(scratch + SCRATCH_RANGE, maxOf(f32x4.neg(low)));
    store<f32>(scratch + SCRATCH_RANGE, maxOf(high), 4);
  }
  store<f32>(scratch + SCRATCH_RANGE, sumOf(sum), 8);
  return finiteMaximum(most);
}

/**
 * One query row, float32 at `row`, to integers `x * inverse + zero` at `target`; in the relaxed build the first operand of
 * the dot product must not be negative.
 */
function quantizeQuery(
  row: usize, padded: i32, target: usize, inverse: f32, zero: i32, accurate: boolean,
): void {
  const factor = f32x4.splat(inverse);
  const rounding = roundingFor(padded);
  const offset = i32x4.splat(zero - ROUNDING_BITS);
  for (let i = 0; i < padded; i += 8) {
    const low = i32x4.add(f32x4.add(f32x4.mul(v128.load(row + (<usize>i << 2)), factor), rounding), offset);
    const high = i32x4.add(f32x4.add(f32x4.mul(v128.load(row + (<usize>i << 2), 16), factor), rounding), offset);
    if (ASC_FEATURE_RELAXED_SIMD) {
      let words = i16x8.narrow_i32x4_s(low, high);
      if (accurate) {
        const digits = v128.and(words, i16x8.splat(127));
        v128.store64_lane(target + <usize>(padded + i), i8x16.narrow_i16x8_s(digits, digits), 0);
        words = i16x8.shr_u(words, 7);
      }
      v128.store64_lane(target + <usize>i, i8x16.narrow_i16x8_s(words, words), 0);
    } else {
      v128.store(target + (<usize>i << 1), i16x8.narrow_i32x4_s(low, high));
    }
  }
}

/** Scores between `from` and `to` to -Infinity. */
// @ts-ignore: decorator
@inline
export function exclude(scores: usize, from: i32, to: i32): void {
  for (let j = from; j < to; j++) store<f32>(scores + (<usize>j << 2), -Infinity);
}

/** Adds a row's mask to the first `to` of its scores in base 2; -Infinity excludes also where the score is NaN. */
export function addMask(scores: usize, to: i32, mask: usize, maskDtype: i32, maskStride: usize): void {
  const maskShift = elementShift(maskDtype);
  if (maskStride == 1) {
    for (let j = 0; j < to; j += 4) {
      const at = scores + (<usize>j << 2);
      const m = load4(mask + (<usize>j << maskShift), maskDtype);
      const x = v128.load(at);
      v128.store(
        at,
        maskDtype == DTYPE_BOOL
          ? v128.bitselect(x, f32x4.splat(-Infinity), f32x4.ne(m, f32x4.splat(0)))
          : // -Infinity excludes also where the score is NaN.
            v128.bitselect(
              m,
              madd(larger(m, f32x4.splat(LEAST_MASK)), f32x4.splat(LOG2_E), x),
              f32x4.eq(m, f32x4.splat(-Infinity)),
            ),
      );
    }
  } else {
    for (let j = 0; j < to; j++) {
      const at = scores + (<usize>j << 2);
      const m = loadElement(mask + ((<usize>j * maskStride) << maskShift), maskDtype);
      if (maskDtype == DTYPE_BOOL) {
        if (m == 0) store<f32>(at, -Infinity);
      } else {
        store<f32>(at, m == -Infinity ? m : max(m, LEAST_MASK) * LOG2_E + load<f32>(at));
      }
    }
  }
}

/**
 * Turns one row's scores of a tile into base 2 with softcap, mask and band applied, for the tiles where any of these
 * matters or a key is NaN.
 *
 * @param keys a multiple of 16; `from` to `to` of them are in the row's band
 * @param shift added to each score, base 2
 * @param plain one byte for each key, nonzero for those whose score is `plainShift` less; 0: none
 * @param mask the row's mask of the tile's first key; 0: none
 * @param line of a map whose blocks begin with the first score; 0: none
 * @returns whether a NaN was among the scores that the row sees; it counts as -Infinity then
 */
export function finishScores(
  scores: usize, keys: i32, scale: f32, softcap: f32, shift: f32, plain: usize, plainShift: f32, mask: usize,
  maskDtype: i32, maskStride: usize, from: i32, to: i32, job: usize = 0, line: usize = 0,
): boolean {
  const bytes = <usize>keys << 2;
  const factor = f32x4.splat(scale);
  const added = f32x4.splat(shift);
  for (let j: usize = 0; j < bytes; j += 16) {
    v128.store(scores + j, f32x4.add(f32x4.mul(v128.load(scores + j), factor), added));
  }
  if (plain != 0) {
    for (let j: usize = 0; j < bytes; j += 16) {
      const less = f32x4.mul(load4(plain + (j >> 2), DTYPE_BOOL), f32x4.splat(plainShift));
      v128.store(scores + j, f32x4.sub(v128.load(scores + j), less));
    }
  }
  if (softcap != 0) {
    const cap = f32x4.splat(softcap);
    for (let j: usize = 0; j < bytes; j += 16) {
      const x = f32x4.div(f32x4.mul(v128.load(scores + j), f32x4.splat(LN_2)), cap);
      v128.store(scores + j, f32x4.mul(f32x4.mul(tanh4(x), cap), f32x4.splat(LOG2_E)));
    }
  }
  if (mask != 0) addMask(scores, to, mask, maskDtype, maskStride);
  if (line != 0) excludeAbsent(job, line, scores, to);
  exclude(scores, 0, from);
  exclude(scores, to, keys);
  let invalid = i32x4.splat(0);
  for (let j: usize = 0; j < bytes; j += 16) {
    const x = v128.load(scores + j);
    const nan = v128.or(f32x4.ne(x, x), f32x4.eq(x, f32x4.splat(Infinity)));
    invalid = v128.or(invalid, nan);
    v128.store(scores + j, v128.bitselect(f32x4.splat(-Infinity), x, nan));
  }
  return v128.any_true(invalid);
}

/** Output channels become NaN where the row sees a key whose value there is. */
function spreadInvalidValues(scores: usize, keys: i32, nans: usize, channels: i32, out: usize): void {
  for (let j = 0; j < keys; j++) {
    if (load<f32>(scores + (<usize>j << 2)) == -Infinity) continue;
    for (let c = 0; c < channels; c++) {
      const bit = j * channels + c;
      if ((load<u8>(nans + (bit >> 3)) >> (bit & 7)) & 1) store<f32>(out + (<usize>c << 2), NaN);
    }
  }
}

/** A number that neither overflows nor turns a sum with it into NaN. */
// @ts-ignore: decorator
@inline
export function bounded(x: f32): f32 {
  return max(-LARGEST_SHIFT, min(LARGEST_SHIFT, x));
}

/** Product of two float32 vectors of a padded length. */
// @ts-ignore: decorator
@inline
export function dotFloat(a: usize, b: usize, padded: i32): f32 {
  let sum = f32x4.splat(0);
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    sum = madd(v128.load(a + i), v128.load(b + i), sum);
  }
  return sumOf(sum);
}

/** Mean of `rows` rows of Q, those left out that hold a NaN or an infinity, to SCRATCH_QUERY_MEAN. */
function meanOfQueries(q: usize, stride: usize, rows: i32, dtype: i32, d: i32, padded: i32, scratch: usize): void {
  const row = scratch + SCRATCH_ROW;
  const mean = scratch + SCRATCH_QUERY_MEAN;
  const bytes = <usize>padded << 2;
  // Terms are scaled down by a power of two no smaller than their number: the sum cannot overflow.
  const down: f32 = <f32>1 / <f32>(1 << (32 - clz(rows)));
  let finite = 0;
  memory.fill(mean, 0, bytes);
  for (let r = 0; r < rows; r++, q += stride) {
    loadRow(q, dtype, d, row, padded);
    const most = rowMaximum(row, padded);
    if (most != most) continue;
    finite++;
    for (let i: usize = 0; i < bytes; i += 16) {
      v128.store(mean + i, f32x4.add(v128.load(mean + i), f32x4.mul(v128.load(row + i), f32x4.splat(down))));
    }
  }
  const up = f32x4.splat(finite > 0 ? <f32>1 / down / <f32>finite : 0);
  for (let i: usize = 0; i < bytes; i += 16) v128.store(mean + i, f32x4.mul(v128.load(mean + i), up));
}

/**
 * What Q's mean gives with the keys of a tile as they came, less their own mean: the share of the scores that smoothing Q took.
 *
 * @param k the tile's first key
 * @param exponents one byte for each key, 0: it is 0, or hidden, and has no share
 * @param plain one byte for each key, nonzero for those that are not smoothed; 0: none
 * @param sign of the scores, which are negated where smScale is negative
 */
function scoreMean(
  job: usize, k: usize, stride: usize, keys: i32, kMean: usize, exponents: usize, plain: usize, sign: f32,
  scratch: usize,
): void {
  const d = load<i32>(job, JOB_D);
  const padded = (d + 7) & ~7;
  const dtype = load<i32>(job, JOB_DTYPE);
  const row = scratch + SCRATCH_ROW;
  const mean = scratch + SCRATCH_QUERY_MEAN;
  const target = scratch + SCRATCH_MEAN_SCORES;
  memory.fill(target, 0, BLOCK_K * 4);
  for (let key: usize = 0; key < <usize>keys; key++, k += stride) {
    if (load<u8>(exponents + key) == 0) continue;
    loadRow(k, dtype, d, row, padded);
    const smoothed = plain == 0 || load<u8>(plain + key) == 0;
    let sum = f32x4.splat(0);
    for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
      const x = smoothed ? f32x4.sub(v128.load(row + i), v128.load(kMean + i)) : v128.load(row + i);
      sum = madd(x, v128.load(mean + i), sum);
    }
    store<f32>(target + (key << 2), sumOf(sum) * sign);
  }
}

/** Adds the shares of Q's mean to the scores of four rows. */
function addMeanScores(shares: usize, keys: i32, scores: usize): void {
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) {
    const share = v128.load(shares + j);
    for (let t: usize = 0; t < <usize>BLOCK_K << 4; t += <usize>BLOCK_K << 2) {
      v128.store(scores + t + j, f32x4.add(v128.load(scores + t + j), share));
    }
  }
}

/**
 * Quantizes rows of Q to SCRATCH_Q and begins their softmax.
 *
 * @param q the first row
 * @param rows how many there are
 * @param prepared how many are wanted: the last is repeated
 */
export function prepareQueries(
  job: usize, q: usize, stride: usize, rows: i32, prepared: i32, means: usize, scratch: usize,
): void {
  const flags = load<i32>(job, JOB_FLAGS);
  const accurate = (flags & FLAG_ACCURATE) != 0;
  const exact = (flags & FLAG_EXACT) != 0;
  const dtype = load<i32>(job, JOB_DTYPE);
  const d = load<i32>(job, JOB_D);
  const dPadded = (d + 7) & ~7;
  const smScale = load<f32>(job, JOB_SM_SCALE);
  const levels = accurate ? Q_LEVELS_ACCURATE : Q_LEVELS;
  const inPlace = !exact && isPlainRow(dtype, d, dPadded);
  touchRows(q, stride, rows, <usize>d << elementShift(dtype), scratch + SCRATCH_ROW);
  for (let r = 0; r < prepared; r++) {
    const stat = scratch + (<usize>r << 2);
    let row = q + <usize>min(r, rows - 1) * stride;
    if (!inPlace) {
      loadRow(row, dtype, d, scratch + SCRATCH_ROW, dPadded);
      row = scratch + SCRATCH_ROW;
    }
    const most = measureQuery(row, means, dPadded, scratch);
    const valid = most == most;
    if (!valid) {
      row = scratch + SCRATCH_ROW;
      memory.fill(row, 0, <usize>dPadded << 2);
      measureQuery(row, means, dPadded, scratch);
    }
    let step = most / levels;
    if (ASC_FEATURE_RELAXED_SIMD) {
      // Divided before it is added: the range of a row may be beyond float32.
      step = load<f32>(scratch + SCRATCH_RANGE) / levels + load<f32>(scratch + SCRATCH_RANGE, 4) / levels;
    }
    const scale: f32 = exact ? <f32>1 : valid && most > 0 ? max(step, LEAST_SCALE) : <f32>0;
    let inverse: f32 = scale > 0 ? <f32>1 / scale : 0;
    if (smScale < 0) inverse = -inverse;
    const float = scratch + SCRATCH_FLOAT_Q + <usize>r * FLOAT_Q_ROW_BYTES;
    const bias = load<f32>(scratch + SCRATCH_RANGE, 8) * smScale;
    if (exact) {
      if (flags & FLAG_FP4_PRODUCTS && valid) {
        if (flags & (FLAG_SMOOTH_Q | FLAG_SMOOTH_Q_SEQUENCE)) {
          for (let i: usize = 0; i < <usize>dPadded << 2; i += 16) {
            v128.store(row + i, f32x4.sub(v128.load(row + i), v128.load(scratch + SCRATCH_QUERY_MEAN + i)));
          }
        }
        roundQuery(row, dPadded, rowMaximum(row, dPadded), flags);
      }
      for (let i: usize = 0; i < <usize>dPadded << 2; i += 16) {
        v128.store(float + i, f32x4.mul(v128.load(row + i), f32x4.splat(inverse)));
      }
    } else if (flags & (FLAG_TILE_MEANS | FLAG_GRADIENTS)) {
      memory.copy(float, row, <usize>dPadded << 2);
    }
    let zero: i32 = 0;
    if (ASC_FEATURE_RELAXED_SIMD) {
      // What becomes the least element, by the same rounding as all others: it goes to 0.
      const least = load<f32>(scratch + SCRATCH_RANGE + (smScale < 0 ? 4 : 0)) * abs(inverse);
      zero = i32x4.extract_lane(toIntegers(f32x4.splat(least)), 0);
      store<f32>(stat + SCRATCH_ROW_ZEROS, <f32>zero);
    }
    if (!exact) {
      quantizeQuery(row, dPadded, scratch + SCRATCH_Q + <usize>r * Q_ROW_BYTES, inverse, zero, accurate);
    }
    store<f32>(stat + SCRATCH_ROW_SCALES, scale * abs(smScale) * LOG2_E);
    store<f32>(stat + SCRATCH_ROW_BIASES, bias);
    store<f32>(stat + SCRATCH_MAXIMA, -Infinity);
    // A NaN here stays through every later sum.
    store<f32>(stat + SCRATCH_SUMS, valid ? <f32>0 : <f32>NaN);
    store<f32>(stat + SCRATCH_EXACT_SUMS, 0);
  }
}

/**
 * Adds a tile's weights to a row's softmax.
 *
 * @param keys with scores; a multiple of 16
 * @param shift what all scores lack, base 2
 * @param p where the weights go
 * @param precise in float32, else in integers
 * @param added where the sum of the weights as they are in `p` goes, and beside it the largest score
 * @returns what a weight of 1 is worth in the row's output; 0: it sees no key here
 */
function addWeights(
  scores: usize, keys: i32, scale: f32, shift: f32, p: usize, precise: boolean, stat: usize, out: usize,
  outBytes: usize, added: usize, constants: usize,
): f32 {
  let most = maximumOf(scores, keys);
  if (most == -Infinity) {
    memory.fill(p, 0, P_ROW_BYTES);
    store<f32>(added, 0);
    return 0;
  }
  const top = most * scale + shift;
  const before = load<f32>(stat + SCRATCH_MAXIMA);
  let weight: f32 = 1;
  if (top > before) {
    // The first keys that a row sees find zeros.
    if (before != -Infinity) {
      const correction = exp2(before - top);
      store<f32>(stat + SCRATCH_SUMS, load<f32>(stat + SCRATCH_SUMS) * correction);
      store<f32>(stat + SCRATCH_EXACT_SUMS, load<f32>(stat + SCRATCH_EXACT_SUMS) * correction);
      const factor = f32x4.splat(correction);
      for (let c: usize = 0; c < outBytes; c += 16) {
        v128.store(out + c, f32x4.mul(v128.load(out + c), factor));
      }
    }
    store<f32>(stat + SCRATCH_MAXIMA, top);
  } else {
    weight = exp2(top - before);
  }
  if (isFarFromZero(most, scale)) {
    takeOff(scores, keys, most);
    most = 0;
  }
  store<f32>(added + (SCRATCH_TILE_MAXIMA - SCRATCH_TILE_SUMS), most);
  store<f32>(
    added,
    precise
      ? weighFloat(scores, keys, most, scale, p, constants)
      : weighInteger(scores, keys, most, scale, p, constants),
  );
  return weight;
}

/** Weights in float32 of the keys whose values stand apart, for four rows, to SCRATCH_APART; scores begin with key `base`. */
function weighApart(
  list: usize, count: i32, base: i32, scores: usize, keys: i32, scales: usize, scratch: usize,
): void {
  for (let t: usize = 0; t < 4; t++) {
    const row = scores + t * (BLOCK_K * 4);
    const most = load<f32>(scratch + SCRATCH_TILE_MAXIMA + (t << 2));
    const worth = load<f32>(scratch + SCRATCH_APART_WEIGHTS + (t << 2));
    for (let a: usize = 0; a < <usize>count; a++) {
      const key = <i32>load<u8>(list + a) - base;
      let weight: f32 = 0;
      if (worth > 0 && key >= 0 && key < keys) {
        const score = load<f32>(row + (<usize>key << 2));
        if (score != -Infinity) weight = exp2((score - most) * load<f32>(scales + (t << 2)));
      }
      store<f32>(scratch + SCRATCH_APART + t * P_ROW_BYTES + (a << 2), weight);
    }
  }
}

/** Adds the mean of a tile's values to rows of the output, by the sums of their weights. */
function addShift(mean: usize, sums: usize, rows: i32, out: usize, outBytes: usize): void {
  for (let t: usize = 0; t < <usize>rows; t++, out += outBytes) {
    const sum = v128.load32_splat(sums + (t << 2));
    for (let c: usize = 0; c < outBytes; c += 16) {
      v128.store(out + c, madd(v128.load(mean + c), sum, v128.load(out + c)));
    }
  }
}

/** Writes the outputs of a unit's rows and their LSE. */
function storeOutputs(
  job: usize, sequence: usize, head: i32, firstRow: i32, rows: i32, vMean: usize, scratch: usize,
): void {
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const dv = load<i32>(job, JOB_DV);
  const softcap = load<f32>(job, JOB_SOFTCAP);
  const rounded = (load<i32>(job, JOB_FLAGS) & FLAG_FP4_PRODUCTS) != 0;
  const outBytes = <usize>load<i32>(job, JOB_DV_PADDED) << 2;
  const target =
    load<usize>(job, JOB_OUT) +
    ((load<u32>(sequence, SEQUENCE_OUT) + <u32>head * load<u32>(job, JOB_OUT_HEAD_STRIDE)) << shift);
  const targetStride = <usize>(load<u32>(job, JOB_OUT_TOKEN_STRIDE) << shift);
  const lse = load<usize>(job, JOB_LSE);
  const lseRow =
    lse + ((load<u32>(sequence, SEQUENCE_LSE) + <u32>head * load<u32>(job, JOB_LSE_HEAD_STRIDE)) << 2);
  const sink = sinkOf(job, head);
  for (let r = 0; r < rows; r++) {
    const stat = scratch + (<usize>r << 2);
    const most = load<f32>(stat + SCRATCH_MAXIMA);
    const sum = load<f32>(stat + SCRATCH_SUMS);
    const outRow = scratch + SCRATCH_OUT + <usize>r * outBytes;
    const empty = most == -Infinity;
    const to = target + <usize>(firstRow + r) * targetStride;
    let value: f64 = -Infinity;
    if (!empty && (lse != 0 || sink != -Infinity)) {
      // Weights rounded to FP4 sum to about 1% less.
      const exact = rounded ? load<f32>(stat + SCRATCH_EXACT_SUMS) : sum;
      const bias: f32 = softcap == 0 ? load<f32>(stat + SCRATCH_ROW_BIASES) : 0;
      value = sum != sum ? <f64>NaN : <f64>most * 0.6931471805599453 + log(<f64>exact) + <f64>bias;
    }
    if (empty) {
      memory.fill(to, 0, <usize>dv << shift);
    } else {
      const factor = f32x4.splat(<f32>1 / sum);
      const share = f32x4.splat(sink == -Infinity ? <f32>1 : shareBesideSink(value, sink));
      // Without a detour where the row in memory ends with a vector.
      const direct = dtype == DTYPE_FLOAT32 && (dv & 3) == 0;
      const finished = direct ? to : outRow;
      for (let c: usize = 0; c < <usize>dv << 2; c += 16) {
        v128.store(finished + c, f32x4.mul(madd(v128.load(outRow + c), factor, v128.load(vMean + c)), share));
      }
      if (!direct) storeRow(outRow, dv, to, dtype);
    }
    if (lse != 0) store<f32>(lseRow + (<usize>(firstRow + r) << 2), <f32>addSink(value, sink));
  }
}

/** Attends for the rows of one unit and writes their outputs and LSE. */
export function attendUnit(job: usize, unit: usize, scratch: usize): void {
  const index = load<i32>(unit, UNIT_SEQUENCE);
  const head = load<i32>(unit, UNIT_HEAD);
  const firstRow = load<i32>(unit, UNIT_ROW);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>index * SEQUENCE_BYTES;
  const rows = min(BLOCK_Q, load<i32>(sequence, SEQUENCE_QUERY_LENGTH) - firstRow);
  const keyLength = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const lower = load<i32>(sequence, SEQUENCE_LOWER);
  const upper = load<i32>(sequence, SEQUENCE_UPPER);
  const kvHeads = load<i32>(job, JOB_KV_HEADS);
  const kvHead = head / (load<i32>(job, JOB_QUERY_HEADS) / kvHeads);
  const flags = load<i32>(job, JOB_FLAGS);
  const accurate = (flags & FLAG_ACCURATE) != 0;
  const exact = (flags & FLAG_EXACT) != 0;
  const shift = elementShift(load<i32>(job, JOB_DTYPE));
  const dPadded = (load<i32>(job, JOB_D) + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const smScale = load<f32>(job, JOB_SM_SCALE);
  const softcap = load<f32>(job, JOB_SOFTCAP);
  const means =
    load<usize>(job, JOB_MEANS) + ((<usize>(index * kvHeads + kvHead) * <usize>(dPadded + dvPadded)) << 2);

  // Queries.
  const q =
    load<usize>(job, JOB_Q) +
    ((load<u32>(sequence, SEQUENCE_Q) + <u32>head * load<u32>(job, JOB_Q_HEAD_STRIDE)) << shift);
  const qStride = <usize>(load<u32>(job, JOB_Q_TOKEN_STRIDE) << shift);
  const fp4 = (flags & FLAG_FP4) != 0;
  const products = (flags & FLAG_FP4_PRODUCTS) != 0;
  const smoothQ = (flags & (FLAG_SMOOTH_Q | FLAG_SMOOTH_Q_SEQUENCE)) != 0;
  const ones = scratch + SCRATCH_KEY_ONES;
  if (fp4) {
    for (let i: usize = 0; i < <usize>BLOCK_K << 2; i += 16) v128.store(ones + i, f32x4.splat(1));
  }
  if (smoothQ) {
    const queryLength = load<i32>(sequence, SEQUENCE_QUERY_LENGTH);
    const first = flags & FLAG_SMOOTH_Q_SEQUENCE ? 0 : firstRow - (firstRow % SMOOTHED_ROWS);
    const count = flags & FLAG_SMOOTH_Q_SEQUENCE ? queryLength : min(SMOOTHED_ROWS, queryLength - first);
    meanOfQueries(
      q + <usize>first * qStride, qStride, count, load<i32>(job, JOB_DTYPE), load<i32>(job, JOB_D), dPadded, scratch,
    );
  }
  const single = rows == 1;
  const rowsPadded = single ? 1 : (rows + 3) & ~3;
  prepareQueries(job, q + <usize>firstRow * qStride, qStride, rows, rowsPadded, means, scratch);
  const steps = load<i32>(job, JOB_K_STEPS);
  const digits = ASC_FEATURE_RELAXED_SIMD && accurate ? 2 : 1;
  const packed = scratch + SCRATCH_Q;
  const constants = scratch + SCRATCH_CONSTANTS;
  storeConstants(constants, P_LEVELS);
  if (ASC_FEATURE_RELAXED_SIMD) storeWeightConstants(constants);
  const out = scratch + SCRATCH_OUT;
  const outBytes = <usize>dvPadded << 2;
  memory.fill(out, 0, <usize>rowsPadded * outBytes);

  // Keys.
  const tileBytes = load<usize>(job, JOB_TILE_BYTES);
  const tiles =
    load<usize>(job, JOB_TILES) +
    (<usize>load<i32>(sequence, SEQUENCE_FIRST_TILE) * <usize>kvHeads +
      <usize>kvHead * <usize>load<i32>(sequence, SEQUENCE_TILES)) *
      tileBytes;
  const kScales = load<usize>(job, JOB_TILE_K_SCALES);
  const kSums = load<usize>(job, JOB_TILE_K_SUMS);
  const vOffset = load<usize>(job, JOB_TILE_V);
  const vScales = load<usize>(job, JOB_TILE_V_SCALES);
  const vExponents = load<usize>(job, JOB_TILE_V_EXPONENTS);
  const vApart = load<usize>(job, JOB_TILE_V_APART);
  const tileFlagsAt = load<usize>(job, JOB_TILE_FLAGS);
  const scores = scratch + SCRATCH_SCORES;
  const p = scratch + SCRATCH_P;
  const weights = scratch + SCRATCH_TILE_WEIGHTS;
  const secondWeights = scratch + SCRATCH_SECOND_WEIGHTS;
  const tileSums = scratch + SCRATCH_TILE_SUMS;

  const k =
    load<usize>(job, JOB_K) +
    ((load<u32>(sequence, SEQUENCE_K) + <u32>kvHead * load<u32>(job, JOB_K_HEAD_STRIDE)) << shift);
  const kStride = <usize>(load<u32>(job, JOB_K_TOKEN_STRIDE) << shift);
  const decodedKeys = scratch + SCRATCH_DECODED_KEYS;
  const decodedValues = scratch + SCRATCH_DECODED_VALUES;
  const meanScores = scratch + SCRATCH_MEAN_SCORES;

  const maskDtype = load<i32>(job, JOB_MASK_DTYPE);
  const maskShift = elementShift(maskDtype);
  const maskKeyStride = load<u32>(job, JOB_MASK_KEY_STRIDE);
  const maskQueryStride = load<u32>(job, JOB_MASK_QUERY_STRIDE);
  let mask = load<usize>(job, JOB_MASK);
  if (mask != 0) {
    mask += (load<u32>(sequence, SEQUENCE_MASK) + <u32>head * load<u32>(job, JOB_MASK_HEAD_STRIDE)) << maskShift;
  }

  const map = mapOfHead(job, sequence, head);
  const firstKey = max(0, firstRow + lower);
  const endKey = min(keyLength, firstRow + rows + upper);
  for (let start = (firstKey / BLOCK_K) * BLOCK_K; start < endKey; start += BLOCK_K) {
    if (map != 0 && !hasAny(job, map, firstRow, firstRow + rows, start, min(start + BLOCK_K, endKey))) continue;
    const tile = tiles + <usize>(start / BLOCK_K) * tileBytes;
    const tileFlags = load<i32>(tile + tileFlagsAt);
    const kShift = (tileFlags & TILE_SHIFTED) && (flags & FLAG_SMOOTH_K) ? tile + load<usize>(job, JOB_TILE_SHIFT) : 0;
    const vShift =
      (tileFlags & TILE_SHIFTED) && (flags & FLAG_SMOOTH_V)
        ? tile + load<usize>(job, JOB_TILE_SHIFT) + (<usize>dPadded << 2)
        : 0;
    const plain = tileFlags & TILE_PLAIN_KEYS ? tile + load<usize>(job, JOB_TILE_K_PLAIN) : 0;
    const ordinary = mask == 0 && softcap == 0 && (tileFlags & (TILE_NAN_KEY | TILE_NAN_VALUE | TILE_PLAIN_KEYS)) == 0;
    const precise = accurate || (tileFlags & TILE_FINE_VALUES) != 0;
    if (fp4) {
      const held = min(BLOCK_K, endKey - start);
      const decoded = (held + 15) & ~15;
      decodeKeys(job, tile, decoded, decodedKeys);
      decodeValues(job, tile, decoded, decodedValues);
      if (smoothQ) {
        scoreMean(
          job, k + <usize>start * kStride, kStride, held, means, tile + kSums, plain, smScale < 0 ? -1 : 1, scratch,
        );
      }
    }
    for (let r = 0; r < rows; r += 4) {
      const i = firstRow + r;
      const last = min(3, rows - 1 - r);
      const rowsEnd = min(min(start + BLOCK_K, keyLength), i + last + upper + 1);
      if (rowsEnd <= start || start + BLOCK_K <= i + lower) continue;
      // Four rows share a line of the map: its blocks have multiples of 16 rows.
      const line = mapOfRow(job, map, i);
      // Each run of keys that are computed; all of the tile's at once where nothing is left out.
      for (let first = start, end = rowsEnd; first < rowsEnd; first = end, end = rowsEnd) {
        if (line != 0) {
          first = nextKey(job, line, true, first, rowsEnd);
          if (first >= rowsEnd) break;
          end = nextKey(job, line, false, first, rowsEnd);
        }
        // A multiple of 16, as blocks and tiles are.
        const base = <usize>(first - start);
        const keys = (end - first + 15) & ~15;
        if (exact) {
          const floatRows = scratch + SCRATCH_FLOAT_Q + <usize>r * FLOAT_Q_ROW_BYTES;
          const floatKeys = (fp4 ? decodedKeys : tile) + base * <usize>dPadded * 4;
          const floatScales = (fp4 ? ones : tile + kScales) + (base << 2);
          if (single) scoreRowFloat(floatRows, floatKeys, dPadded, keys, floatScales, scores);
          else scoreRowsFloat(floatRows, floatKeys, dPadded, keys, floatScales, scores);
          if (smoothQ) addMeanScores(meanScores + (base << 2), keys, scores);
        } else if (single) {
          scoreRow(
            packed, tile + base * <usize>steps * 4, steps, digits, keys, tile + kScales + (base << 2), tile + kSums + (base << 2),
            scratch + SCRATCH_ROW_ZEROS, scores,
          );
        } else {
          scoreRows(
            packed + <usize>r * Q_ROW_BYTES, tile + base * <usize>steps * 4, steps, digits, keys,
            tile + kScales + (base << 2), tile + kSums + (base << 2), scratch + SCRATCH_ROW_ZEROS + (<usize>r << 2), scores,
          );
        }
        const whole = ordinary && first >= i + last + lower && first + keys <= min(keyLength, i + upper + 1);
        let twoDigits = false;
        for (let t = 0; t <= last; t++) {
          const stat = scratch + (<usize>(r + t) << 2);
          const slot = <usize>t << 2;
          const rowScores = scores + <usize>t * (BLOCK_K * 4);
          const pRow = p + <usize>t * P_ROW_BYTES;
          if (ASC_FEATURE_RELAXED_SIMD) store<f32>(secondWeights + slot, 0);
          let scale = load<f32>(stat + SCRATCH_ROW_SCALES);
          let tileShift: f32 = 0;
          if (kShift != 0) {
            const row = scratch + SCRATCH_FLOAT_Q + <usize>(r + t) * FLOAT_Q_ROW_BYTES;
            // Rows that stay in float32 have the sign of smScale already.
            tileShift = bounded(dotFloat(row, kShift, dPadded) * (exact ? abs(smScale) : smScale) * LOG2_E);
          }
          if (!whole || scale > LARGEST_FACTOR) {
            const from = min(keys, max(0, i + t + lower - first));
            const to = max(from, min(keys, min(min(keyLength, end), i + t + upper + 1) - first));
            const maskRow: usize =
              mask == 0 ? <usize>0 : mask + ((<u32>(i + t) * maskQueryStride + <u32>first * maskKeyStride) << maskShift);
            // What smoothing took from the scores: a cap needs it back, and keys that were not smoothed never lost it.
            const lost = bounded(tileShift + load<f32>(stat + SCRATCH_ROW_BIASES) * LOG2_E);
            const invalid = finishScores(
              rowScores, keys, scale, softcap, softcap == 0 ? tileShift : lost, plain == 0 ? 0 : plain + base, lost, maskRow, maskDtype,
              maskKeyStride, from, to,
            );
            if (invalid) {
              store<f32>(stat + SCRATCH_SUMS, NaN);
              store<f32>(stat + SCRATCH_MAXIMA, max(load<f32>(stat + SCRATCH_MAXIMA), LOWEST));
            }
            scale = 1;
            tileShift = 0;
          }
          store<f32>(scratch + SCRATCH_TILE_SCALES + slot, scale);
          const worth = addWeights(
            rowScores, keys, scale, tileShift, pRow, precise, stat, out + <usize>(r + t) * outBytes, outBytes,
            tileSums + slot, constants,
          );
          store<f32>(scratch + SCRATCH_APART_WEIGHTS + slot, worth);
          let unit: f32 = precise ? worth : worth / P_LEVELS;
          let added = load<f32>(tileSums + slot);
          if (products) {
            const sum = stat + SCRATCH_EXACT_SUMS;
            store<f32>(sum, load<f32>(sum) + worth * added);
            added = worth > 0 ? roundWeights(pRow, keys, worth) : <f32>0;
            unit = <f32>1 / (FP4_MAX * WEIGHT_UNIT);
          }
          store<f32>(weights + slot, unit);
          if (ASC_FEATURE_RELAXED_SIMD) {
            if (!precise && worth > 0) {
              const most = load<f32>(scratch + SCRATCH_TILE_MAXIMA + slot);
              const refined = weighTwoDigits(rowScores, keys, most, scale, added, pRow, constants);
              if (refined > 0) {
                added = refined;
                store<f32>(secondWeights + slot, unit / 128);
                twoDigits = true;
              }
            }
          }
          store<f32>(tileSums + slot, unit * added);
          store<f32>(stat + SCRATCH_SUMS, load<f32>(stat + SCRATCH_SUMS) + unit * added);
        }
        for (let t = last + 1; t < 4; t++) {
          store<f32>(weights + (<usize>t << 2), 0);
          store<f32>(secondWeights + (<usize>t << 2), 0);
          store<f32>(scratch + SCRATCH_APART_WEIGHTS + (<usize>t << 2), 0);
        }
        const outRows = out + <usize>r * outBytes;
        const values = fp4 ? decodedValues : tile + vOffset;
        const floatValues = values + (base << 5);
        if (accurate) {
          if (single) addValuesRowFloat(p, floatValues, keys, dvPadded, weights, outRows);
          else addValuesFloat(p, floatValues, keys, dvPadded, weights, outRows, outBytes);
        } else if (precise) {
          addValuesFine(
            p, values + base * <usize>dvPadded * (ASC_FEATURE_RELAXED_SIMD ? 1 : 2),
            tile + vExponents + base * (<usize>dvPadded >> 3), keys, dvPadded, weights, outRows, outBytes,
          );
        } else {
          const valueSteps = keys / (ASC_FEATURE_RELAXED_SIMD ? 4 : 2);
          const packedValues = values + base * (ASC_FEATURE_RELAXED_SIMD ? 8 : 16);
          if (single) addValuesRow(p, packedValues, valueSteps, dvPadded, tile + vScales, weights, outRows);
          else addValuesInteger(p, packedValues, valueSteps, dvPadded, tile + vScales, weights, outRows, outBytes);
          if (ASC_FEATURE_RELAXED_SIMD) {
            if (twoDigits) {
              const second = p + SECOND_DIGITS;
              const scales = tile + vScales;
              if (single) addValuesRow(second, packedValues, valueSteps, dvPadded, scales, secondWeights, outRows);
              else addValuesInteger(second, packedValues, valueSteps, dvPadded, scales, secondWeights, outRows, outBytes);
            }
          }
          if (tileFlags & TILE_VALUES_APART) {
            const count = load<i32>(tile + tileFlagsAt, TILE_APART_COUNT);
            weighApart(
              tile + tileFlagsAt + TILE_APART_KEYS, count, <i32>base, scores, keys, scratch + SCRATCH_TILE_SCALES, scratch,
            );
            addValuesFine(
              scratch + SCRATCH_APART, tile + vApart, tile + vExponents, count, dvPadded,
              scratch + SCRATCH_APART_WEIGHTS, outRows, outBytes,
            );
          }
        }
        if (vShift != 0) addShift(vShift, tileSums, last + 1, outRows, outBytes);
        if (tileFlags & TILE_NAN_VALUE) {
          for (let t = 0; t <= last; t++) {
            if (fp4) spreadInvalidFp4(
              job, tile, base, scores + <usize>t * (BLOCK_K * 4), keys, outRows + <usize>t * outBytes,
            );
            else spreadInvalidValues(
              scores + <usize>t * (BLOCK_K * 4), keys,
              tile + load<usize>(job, JOB_TILE_NANS) + ((base * <usize>dvPadded) >> 3), dvPadded,
              outRows + <usize>t * outBytes,
            );
          }
        }
      }
    }
  }
  storeOutputs(job, sequence, head, firstRow, rows, means + (<usize>dPadded << 2), scratch);
}
