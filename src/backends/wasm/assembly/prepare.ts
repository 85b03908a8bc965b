/**
 * Keys and values to tiles of BLOCK_K tokens.
 *
 * A tile's keys: for every 8 keys and every step of 4 bytes of channels, two vectors of 4 keys each, so that the product
 * with a splat step of Q is a sum over channels for 4 keys at once. Its values: for every 8 channels and every step of 4
 * bytes of tokens, two vectors of 4 channels each. A step is 4 elements of 8 bits in the relaxed build, 2 of 16 bits in
 * the other, and 1 of what stays in float32.
 */
import {
  JOB_D,
  JOB_DTYPE,
  JOB_DV,
  JOB_DV_PADDED,
  JOB_FLAGS,
  JOB_K,
  JOB_KEY_TAIL,
  JOB_KV_HEADS,
  JOB_K_HEAD_STRIDE,
  JOB_K_STEPS,
  JOB_K_TOKEN_STRIDE,
  JOB_MASK,
  JOB_MASK_DTYPE,
  JOB_MASK_HEAD_STRIDE,
  JOB_MASK_KEY_STRIDE,
  JOB_MASK_QUERY_STRIDE,
  JOB_MEANS,
  JOB_QUERY_HEADS,
  JOB_SEQUENCES,
  JOB_TAIL,
  JOB_TAIL_SEEN,
  JOB_TILES,
  JOB_TILE_BYTES,
  JOB_TILE_FLAGS,
  JOB_TILE_K_PLAIN,
  JOB_TILE_K_SCALES,
  JOB_TILE_K_SUMS,
  JOB_TILE_SHIFT,
  JOB_TILE_V,
  JOB_V,
  JOB_V_HEAD_STRIDE,
  JOB_V_TOKEN_STRIDE,
  SEQUENCE_BYTES,
  SEQUENCE_FIRST_TILE,
  SEQUENCE_K,
  SEQUENCE_KEY_LENGTH,
  SEQUENCE_LOWER,
  SEQUENCE_MASK,
  SEQUENCE_PARTLY_SEEN,
  SEQUENCE_QUERY_LENGTH,
  SEQUENCE_ROWS_DIFFER,
  SEQUENCE_START,
  SEQUENCE_TILES,
  SEQUENCE_UPPER,
  SEQUENCE_V,
  UNIT_HEAD,
  UNIT_SEQUENCE,
} from '../generated/fields.ts';
import {
  BLOCK_K,
  FLAG_ACCURATE,
  FLAG_EXACT,
  FLAG_FP4,
  FLAG_SMOOTH_K,
  FLAG_SMOOTH_V,
  FLAG_TILE_MEANS,
  DTYPE_BOOL,
  DTYPE_FLOAT32,
  TILE_NAN_KEY,
  TILE_PLAIN_KEYS,
  TILE_SHIFTED,
} from '../job.ts';
import {
  finiteMaximum,
  integerSumOf,
  larger,
  largerMagnitudes,
  magnitudes,
  maxOf,
  roundBy,
  roundingFor,
} from './arithmetic.ts';
import { elementShift, loadElement, loadRow, touchRows } from './elements.ts';
import { markInvalidFp4, packKeyFp4, packValuesFp4 } from './fp4.ts';
import { SCRATCH_ROW, SCRATCH_SEEN, SCRATCH_VALUE_SIZES, SCRATCH_VALUES } from './scratch.ts';
import { markInvalidValues, packValues, quantizeValues, wholeSteps } from './values.ts';

/** The largest finite number. */
const LARGEST: f32 = 3.4028234663852886e38;
/** Magnitude of a quantized key. */
const K_LEVELS: f32 = 127;
/** No scale of Q or K is smaller: its reciprocal stays finite, and scores of values this small are 0 anyway. */
export const LEAST_SCALE: f32 = 7.52316384526264e-37;

/** Largest magnitude of a row of float32, or NaN where it holds a NaN or an infinity. */
export function rowMaximum(row: usize, padded: i32): f32 {
  let most0 = i32x4.splat(0);
  let most1 = most0;
  const bytes = <usize>padded << 2;
  let i: usize = 0;
  for (; i + 32 <= bytes; i += 32) {
    most0 = largerMagnitudes(most0, v128.load(row + i));
    most1 = largerMagnitudes(most1, v128.load(row + i, 16));
  }
  if (i < bytes) most0 = largerMagnitudes(most0, v128.load(row + i));
  return finiteMaximum(i32x4.max_s(most0, most1));
}

/** {@link loadRow}, and {@link rowMaximum} of the row loaded. */
export function loadMeasured(address: usize, dtype: i32, count: i32, row: usize, padded: i32): f32 {
  if (dtype != DTYPE_FLOAT32 || count != padded) {
    loadRow(address, dtype, count, row, padded);
    return rowMaximum(row, padded);
  }
  let most0 = i32x4.splat(0);
  let most1 = most0;
  // A padded row is a multiple of 8 elements.
  for (let i: usize = 0; i < <usize>padded << 2; i += 32) {
    const x0 = v128.load(address + i);
    const x1 = v128.load(address + i, 16);
    v128.store(row + i, x0);
    v128.store(row + i, x1, 16);
    most0 = largerMagnitudes(most0, x0);
    most1 = largerMagnitudes(most1, x1);
  }
  return finiteMaximum(i32x4.max_s(most0, most1));
}

/** Whether rows lie in memory as {@link loadRow} would give them. */
// @ts-ignore: decorator
@inline
export function isPlainRow(dtype: i32, count: i32, padded: i32): boolean {
  return dtype == DTYPE_FLOAT32 && count == padded;
}

/** A key in `seen`: rows may attend to it, and it counts; or its weight is 0 in all of them, though not excluded. */
const SEEN: u8 = 1;
const HIDDEN: u8 = 2;
/** An additive mask hides what lies this far below its row's largest entry. */
const HIDING: f32 = 1000;

/** Largest entry of a row of an additive mask between two keys; NaN does not count. */
function largestOf(row: usize, keyStride: u32, dtype: i32, from: i32, to: i32): f32 {
  let most: f32 = -Infinity;
  for (let j = from; j < to; j++) {
    const value = loadElement(row + <usize>(<u32>j * keyStride), dtype);
    if (value > most) most = value;
  }
  return most;
}

/** One byte for each key: whether any row of any head that shares this key sees it. */
function markSeen(job: usize, sequence: usize, kvHead: i32, seen: usize): void {
  const keyLength = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const queryLength = load<i32>(sequence, SEQUENCE_QUERY_LENGTH);
  const lower = load<i32>(sequence, SEQUENCE_LOWER);
  const upper = load<i32>(sequence, SEQUENCE_UPPER);
  const mask = load<usize>(job, JOB_MASK);
  memory.fill(seen, 0, keyLength);
  if (mask == 0) {
    // The bands of successive rows overlap or touch unless a row's band is empty.
    if (lower > upper) return;
    const from = max(0, lower);
    const to = min(keyLength, queryLength + upper);
    if (from < to) memory.fill(seen + from, SEEN, to - from);
    return;
  }
  const dtype = load<i32>(job, JOB_MASK_DTYPE);
  const shift = elementShift(dtype);
  const keyStride = load<u32>(job, JOB_MASK_KEY_STRIDE) << shift;
  const group = load<i32>(job, JOB_QUERY_HEADS) / load<i32>(job, JOB_KV_HEADS);
  const base = mask + (load<u32>(sequence, SEQUENCE_MASK) << shift);
  const headStride = load<u32>(job, JOB_MASK_HEAD_STRIDE);
  const queryStride = load<u32>(job, JOB_MASK_QUERY_STRIDE);
  // Where heads or rows share one mask, and rows one band, the first of them says it all.
  const everyRowAlike = queryStride == 0 && lower + queryLength <= 1 && upper >= keyLength - 1;
  const lastRow = everyRowAlike ? max(0, queryLength - 1) : 0;
  const heads = headStride == 0 ? 1 : group;
  let missing = keyLength;
  for (let h = kvHead * group; h < kvHead * group + heads; h++) {
    const plane = base + ((<u32>h * headStride) << shift);
    // From the last row: where the mask is causal as well, it sees every key and ends the search.
    for (let i = queryLength - 1; i >= lastRow && missing > 0; i--) {
      const row = plane + ((<u32>i * queryStride) << shift);
      const from = max(0, i + lower);
      const to = min(keyLength, i + upper + 1);
      const least: f32 = dtype == DTYPE_BOOL ? 1 : largestOf(row, keyStride, dtype, from, to) - HIDING;
      for (let j = from; j < to; j++) {
        const state = load<u8>(seen + j);
        if (state == SEEN) continue;
        const value = loadElement(row + <usize>(<u32>j * keyStride), dtype);
        // NaN is seen.
        if (value == -Infinity || (dtype == DTYPE_BOOL && value == 0)) continue;
        if (value < least) {
          store<u8>(seen + j, HIDDEN);
        } else {
          store<u8>(seen + j, SEEN);
          missing--;
        }
      }
    }
  }
}

/** Tokens this much larger than the typical one, as a power of two, stay out of a mean. */
const OUTLYING: f32 = 3;
/** Tokens that are brought into the cache at a time; a power of two. */
const TOUCHED: i32 = 32;
/** Values whose sizes span more than this power of two are not smoothed. */
const LARGEST_SPAN: i32 = 5;

/** Biased exponent of a size; 0 and subnormal numbers have 0. */
// @ts-ignore: decorator
@inline
function sizeExponent(size: f32): i32 {
  return reinterpret<i32>(size) >> 23;
}

/**
 * Mean over the tokens that count, are finite and no outliers. Any vector would do (softmax does not change), so tokens that
 * could spoil it stay out: a mean that one large token dominates would cost all others their precision.
 *
 * @param ofValues zeros where sizes differ much: unlike keys, values cannot be left unsmoothed one by one
 */
function meanOf(
  base: usize, tokenStride: usize, dtype: i32, count: i32, padded: i32, from: i32, to: i32, seen: usize, row: usize,
  mean: usize, ofValues: boolean,
): void {
  // Terms are scaled by a power of two no smaller than their number: the sum cannot overflow.
  const down: f32 = <f32>1 / <f32>(1 << (32 - clz(max(1, to - from))));
  const inPlace = isPlainRow(dtype, count, padded);
  let largest: i32 = 255;
  for (;;) {
    memory.fill(mean, 0, <usize>padded << 2);
    let tokens = 0;
    let sized = 0;
    let sum = 0;
    let most = 0;
    let least = 255;
    for (let t = from; t < to; t++) {
      if (((t - from) & (TOUCHED - 1)) == 0) {
        const here = base + <usize>(t - from) * tokenStride;
        touchRows(here, tokenStride, min(TOUCHED, to - t), <usize>count << elementShift(dtype), row);
      }
      if (seen != 0 && load<u8>(seen + t) != SEEN) continue;
      let token = base + <usize>(t - from) * tokenStride;
      if (!inPlace) {
        loadRow(token, dtype, count, row, padded);
        token = row;
      }
      const size = rowMaximum(token, padded);
      if (size != size) continue;
      const exponent = sizeExponent(size);
      if (exponent > largest) continue;
      if (exponent > 0) {
        sized++;
        sum += exponent;
        most = max(most, exponent);
        least = min(least, exponent);
      }
      tokens++;
      for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
        v128.store(mean + i, f32x4.add(v128.load(mean + i), f32x4.mul(v128.load(token + i), f32x4.splat(down))));
      }
    }
    if (ofValues && most - least > LARGEST_SPAN) tokens = 0;
    const typical: f32 = sized > 0 ? <f32>sum / <f32>sized : 0;
    if (!ofValues && largest == 255 && <f32>most > typical + OUTLYING) {
      largest = <i32>(typical + OUTLYING);
      continue;
    }
    const up: f32 = tokens > 0 ? <f32>1 / down / <f32>tokens : 0;
    for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
      v128.store(mean + i, f32x4.mul(v128.load(mean + i), f32x4.splat(up)));
    }
    return;
  }
}

/** `row -= vector`, in float32. */
// @ts-ignore: decorator
@inline
export function subtractRow(row: usize, vector: usize, padded: i32): void {
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    v128.store(row + i, f32x4.sub(v128.load(row + i), v128.load(vector + i)));
  }
}

/**
 * A key without the mean, from `source` to `row`.
 *
 * @returns the key's largest magnitude, NaN where it holds a NaN or an infinity; negative where smoothing enlarges it much
 */
function smoothKey(source: usize, row: usize, mean: usize, padded: i32): f32 {
  let before = i32x4.splat(0);
  let after = f32x4.splat(0);
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    const x = v128.load(source + i);
    const y = f32x4.sub(x, v128.load(mean + i));
    before = largerMagnitudes(before, x);
    after = larger(after, magnitudes(y));
    v128.store(row + i, y);
  }
  const plain = finiteMaximum(before);
  if (plain != plain) return NaN;
  const size = maxOf(after);
  return size <= min(plain * 2, LARGEST) ? size : -1;
}

/**
 * One key, in float32 at `row`, to its place in the tile: in integers, in FP4, or as it is where nothing is quantized.
 *
 * @param most its largest magnitude; NaN: it holds a NaN or an infinity
 */
function packKey(job: usize, tile: usize, key: i32, row: usize, padded: i32, most: f32, exact: boolean): void {
  if (load<i32>(job, JOB_FLAGS) & FLAG_FP4) {
    packKeyFp4(job, tile, key, row, padded, most);
    return;
  }
  const steps = <usize>load<i32>(job, JOB_K_STEPS);
  const scaleAt = tile + load<usize>(job, JOB_TILE_K_SCALES) + (<usize>key << 2);
  if (most != most) {
    // Its score is NaN, for the rows that see it.
    store<f32>(scaleAt, NaN);
    const flags = tile + load<usize>(job, JOB_TILE_FLAGS);
    store<i32>(flags, load<i32>(flags) | TILE_NAN_KEY);
    return;
  }
  let target = tile + <usize>(key >> 3) * steps * 32 + (<usize>(key & 7) << 2);
  if (exact) {
    store<f32>(scaleAt, 1);
    for (let i: usize = 0; i < <usize>padded; i++, target += 32) store<f32>(target, load<f32>(row + (i << 2)));
    return;
  }
  const scale: f32 = most == 0 ? 0 : max(most / K_LEVELS, LEAST_SCALE);
  store<f32>(scaleAt, scale);
  if (most == 0) return;
  const inverse = f32x4.splat(<f32>1 / scale);
  const rounding = roundingFor(padded);
  let sum = i32x4.splat(0);
  for (let i = 0; i < padded; i += 8) {
    const low = roundBy(rounding, f32x4.mul(v128.load(row + (<usize>i << 2)), inverse));
    const high = roundBy(rounding, f32x4.mul(v128.load(row + (<usize>i << 2), 16), inverse));
    const words = i16x8.narrow_i32x4_s(low, high);
    if (ASC_FEATURE_RELAXED_SIMD) {
      sum = i32x4.add(sum, i32x4.add(low, high));
      const bytes = i8x16.narrow_i16x8_s(words, words);
      v128.store32_lane(target, bytes, 0);
      v128.store32_lane(target, bytes, 1, 32);
      target += 64;
    } else {
      v128.store32_lane(target, words, 0);
      v128.store32_lane(target, words, 1, 32);
      v128.store32_lane(target, words, 2, 64);
      v128.store32_lane(target, words, 3, 96);
      target += 128;
    }
  }
  if (ASC_FEATURE_RELAXED_SIMD) {
    // Q is offset into 0..127; with this the offset's share is taken off.
    store<f32>(tile + load<usize>(job, JOB_TILE_K_SUMS) + (<usize>key << 2), <f32>-integerSumOf(sum));
  }
}

/** Marks a key as one that is not smoothed. */
function markPlain(job: usize, tile: usize, key: i32): void {
  const plain = tile + load<usize>(job, JOB_TILE_K_PLAIN);
  const at = tile + load<usize>(job, JOB_TILE_FLAGS);
  const flags = load<i32>(at);
  if ((flags & TILE_PLAIN_KEYS) == 0) {
    memory.fill(plain, 0, BLOCK_K);
    store<i32>(at, flags | TILE_PLAIN_KEYS);
  }
  store<u8>(plain + <usize>key, 1);
}

/**
 * Keys `from` to `to` of a tile.
 *
 * @param source of key `from`
 * @param seen of key `from`; 0: all count
 * @param mean 0: keys are not smoothed
 */
function packKeys(
  job: usize, tile: usize, from: i32, to: i32, source: usize, stride: usize, dtype: i32, seen: usize, mean: usize,
  row: usize,
): void {
  const d = load<i32>(job, JOB_D);
  const padded = (d + 7) & ~7;
  const exact = (load<i32>(job, JOB_FLAGS) & FLAG_EXACT) != 0;
  const inPlace = isPlainRow(dtype, d, padded);
  for (let key = from; key < to; key++, source += stride) {
    if (((key - from) & (TOUCHED - 1)) == 0) {
      touchRows(source, stride, min(TOUCHED, to - key), <usize>d << elementShift(dtype), row);
    }
    const state: u8 = seen == 0 ? SEEN : load<u8>(seen + <usize>(key - from));
    if (state == 0) continue;
    let most: f32 = 0;
    if (mean == 0) {
      most = loadMeasured(source, dtype, d, row, padded);
    } else {
      if (!inPlace) loadRow(source, dtype, d, row, padded);
      most = smoothKey(inPlace ? source : row, row, mean, padded);
      if (most < 0) {
        markPlain(job, tile, key);
        most = loadMeasured(source, dtype, d, row, padded);
      }
    }
    // The integers of a key that no row gives weight stay 0.
    if (state == HIDDEN && most == most) continue;
    packKey(job, tile, key, row, padded, most, exact);
  }
}

/** Values `from` to `to` of a tile to float32 at `values`, and their sizes; see packKeys. Invalid ones are marked, and 0. */
function loadValues(
  job: usize, tile: usize, from: i32, to: i32, source: usize, stride: usize, dtype: i32, seen: usize, mean: usize,
  values: usize, scratch: usize,
): void {
  const dv = load<i32>(job, JOB_DV);
  const padded = load<i32>(job, JOB_DV_PADDED);
  const bytes = <usize>padded << 2;
  const fp4 = (load<i32>(job, JOB_FLAGS) & FLAG_FP4) != 0;
  for (let key = from; key < to; key++, source += stride) {
    if (((key - from) & (TOUCHED - 1)) == 0) {
      touchRows(source, stride, min(TOUCHED, to - key), <usize>dv << elementShift(dtype), scratch + SCRATCH_ROW);
    }
    const value = values + <usize>key * bytes;
    const sizeAt = scratch + SCRATCH_VALUE_SIZES + (<usize>key << 2);
    const state: u8 = seen == 0 ? SEEN : load<u8>(seen + <usize>(key - from));
    let size: f32 = 0;
    if (state != 0) {
      size = loadMeasured(source, dtype, dv, value, padded);
      const invalid = size != size;
      if (invalid) {
        // FP4 has a code for elements that are not finite.
        if (fp4) markInvalidFp4(job, tile);
        else markInvalidValues(job, tile, key, value);
      }
      if (mean != 0) subtractRow(value, mean, padded);
      if (invalid || mean != 0) size = rowMaximum(value, padded);
    }
    store<f32>(sizeAt, state == SEEN && size == size ? size : 0);
    if (state != SEEN) memory.fill(value, 0, bytes);
  }
}

/** Marks tokens `from` to `to` of a tile by the mask of those added to a cache; `at` is the mask's byte of token `from`, or 0. */
function markAdded(tailSeen: usize, from: i32, to: i32, at: usize, stride: usize): void {
  for (let token = from; token < to; token++) {
    store<u8>(tailSeen + <usize>token, at == 0 || load<u8>(at + <usize>(token - from) * stride) != 0 ? SEEN : HIDDEN);
  }
}

/** Keys of a tile that packing reads: FP4 takes one power of two from all of it. */
// @ts-ignore: decorator
@inline
function stepsOf(flags: i32, keys: i32): i32 {
  return flags & FLAG_FP4 ? BLOCK_K : wholeSteps(keys);
}

/**
 * Adds tokens to a tile that has means of its own and may get more: keys and values that came are kept in float32 until the
 * tile is full. Values are quantized anew each time, keys with a new mean whenever their number has doubled, so that the
 * first tokens do not decide for the later ones.
 *
 * @param seen of the tile's first token: {@link SEEN}, or {@link HIDDEN} for those that count in nothing
 */
function appendToTile(
  job: usize, tile: usize, from: i32, to: i32, k: usize, kStride: usize, v: usize, vStride: usize, dtype: i32,
  keyTail: usize, valueTail: usize, seen: usize, scratch: usize,
): void {
  const flags = load<i32>(job, JOB_FLAGS);
  const d = load<i32>(job, JOB_D);
  const dPadded = (d + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const keyBytes = <usize>dPadded << 2;
  const valueBytes = <usize>dvPadded << 2;
  const row = scratch + SCRATCH_ROW;
  const kMean = tile + load<usize>(job, JOB_TILE_SHIFT);
  const vMean = kMean + keyBytes;
  const flagsAt = tile + load<usize>(job, JOB_TILE_FLAGS);

  if (flags & FLAG_SMOOTH_K) {
    for (let key = from; key < to; key++, k += kStride) {
      loadRow(k, dtype, d, row, dPadded);
      memory.copy(keyTail + <usize>key * keyBytes, row, keyBytes);
    }
    let first = from;
    if (clz(from) != clz(to)) {
      first = 0;
      meanOf(keyTail, keyBytes, DTYPE_FLOAT32, d, dPadded, 0, to, seen, row, kMean, false);
      memory.fill(tile, 0, load<usize>(job, JOB_TILE_V));
      store<i32>(flagsAt, (load<i32>(flagsAt) & ~(TILE_NAN_KEY | TILE_PLAIN_KEYS)) | TILE_SHIFTED);
    }
    const rest = keyTail + <usize>first * keyBytes;
    packKeys(job, tile, first, to, rest, keyBytes, DTYPE_FLOAT32, seen + <usize>first, kMean, row);
  } else {
    packKeys(job, tile, from, to, k, kStride, dtype, seen + <usize>from, 0, row);
  }

  loadValues(job, tile, from, to, v, vStride, dtype, seen + <usize>from, 0, valueTail, scratch);
  memory.fill(valueTail + <usize>to * valueBytes, 0, <usize>(stepsOf(flags, to) - to) * valueBytes);
  let values = valueTail;
  if (flags & FLAG_SMOOTH_V) {
    meanOf(valueTail, valueBytes, DTYPE_FLOAT32, dvPadded, dvPadded, 0, to, seen, row, vMean, true);
    store<i32>(flagsAt, load<i32>(flagsAt) | TILE_SHIFTED);
    values = scratch + SCRATCH_VALUES;
    memory.copy(values, valueTail, <usize>stepsOf(flags, to) * valueBytes);
    for (let key: usize = 0; key < <usize>to; key++) subtractRow(values + key * valueBytes, vMean, dvPadded);
  }
  const fp4 = (flags & FLAG_FP4) != 0;
  if (!fp4 && flags & FLAG_ACCURATE) {
    packValues(job, tile, values, to);
    return;
  }
  for (let key: usize = 0; key < <usize>to; key++) {
    const size = rowMaximum(values + key * valueBytes, dvPadded);
    store<f32>(scratch + SCRATCH_VALUE_SIZES + (key << 2), size == size ? size : 0);
  }
  if (fp4) {
    packValuesFp4(job, tile, values, to, true, scratch);
    return;
  }
  quantizeValues(job, tile, values, to, true, values == valueTail, scratch);
}

/** Quantizes the tokens of one head of one sequence from `SEQUENCE_START` on. */
export function prepareUnit(job: usize, unit: usize, scratch: usize): void {
  const index = load<i32>(unit, UNIT_SEQUENCE);
  const head = load<i32>(unit, UNIT_HEAD);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>index * SEQUENCE_BYTES;
  const start = load<i32>(sequence, SEQUENCE_START);
  const end = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const flags = load<i32>(job, JOB_FLAGS);
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const d = load<i32>(job, JOB_D);
  const dv = load<i32>(job, JOB_DV);
  const dPadded = (d + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const k =
    load<usize>(job, JOB_K) +
    ((load<u32>(sequence, SEQUENCE_K) + <u32>head * load<u32>(job, JOB_K_HEAD_STRIDE)) << shift);
  const v =
    load<usize>(job, JOB_V) +
    ((load<u32>(sequence, SEQUENCE_V) + <u32>head * load<u32>(job, JOB_V_HEAD_STRIDE)) << shift);
  const kStride = <usize>(load<u32>(job, JOB_K_TOKEN_STRIDE) << shift);
  const vStride = <usize>(load<u32>(job, JOB_V_TOKEN_STRIDE) << shift);
  const pair = <usize>(index * load<i32>(job, JOB_KV_HEADS) + head);
  const kMean = load<usize>(job, JOB_MEANS) + pair * (<usize>(dPadded + dvPadded) << 2);
  const vMean = kMean + (<usize>dPadded << 2);
  const row = scratch + SCRATCH_ROW;
  const tileMeans = (flags & FLAG_TILE_MEANS) != 0;
  const rowsDiffer = load<i32>(sequence, SEQUENCE_ROWS_DIFFER) != 0;

  let seen: usize = 0;
  if (load<i32>(sequence, SEQUENCE_PARTLY_SEEN)) {
    seen = scratch + SCRATCH_SEEN;
    markSeen(job, sequence, head, seen);
  }
  if (!tileMeans) {
    if (flags & FLAG_SMOOTH_K) meanOf(k, kStride, dtype, d, dPadded, start, end, seen, row, kMean, false);
    else memory.fill(kMean, 0, <usize>dPadded << 2);
    if (flags & FLAG_SMOOTH_V) meanOf(v, vStride, dtype, dv, dvPadded, start, end, seen, row, vMean, true);
    else memory.fill(vMean, 0, <usize>dvPadded << 2);
  }

  const tileBytes = load<usize>(job, JOB_TILE_BYTES);
  const firstTile =
    <usize>load<i32>(sequence, SEQUENCE_FIRST_TILE) * <usize>load<i32>(job, JOB_KV_HEADS) +
    <usize>head * <usize>load<i32>(sequence, SEQUENCE_TILES);
  const keyTail = load<usize>(job, JOB_KEY_TAIL) + ((pair * BLOCK_K * <usize>dPadded) << 2);
  const valueTail = load<usize>(job, JOB_TAIL) + ((pair * BLOCK_K * <usize>dvPadded) << 2);
  const tailSeen = load<usize>(job, JOB_TAIL_SEEN) + pair * BLOCK_K;
  const mask = tileMeans ? load<usize>(job, JOB_MASK) : 0;
  const maskStride = <usize>load<u32>(job, JOB_MASK_KEY_STRIDE);
  const values = scratch + SCRATCH_VALUES;
  const valueBytes = <usize>dvPadded << 2;
  for (let from = start; from < end; ) {
    const number = from / BLOCK_K;
    const tileStart = number * BLOCK_K;
    const to = min(end, tileStart + BLOCK_K);
    const tile = load<usize>(job, JOB_TILES) + (firstTile + <usize>number) * tileBytes;
    if (from == tileStart) {
      memory.fill(tile, 0, load<usize>(job, JOB_TILE_V));
      store<i32>(tile + load<usize>(job, JOB_TILE_FLAGS), 0);
    }
    const first = from - tileStart;
    const last = to - tileStart;
    const kFrom = k + <usize>(from - start) * kStride;
    const vFrom = v + <usize>(from - start) * vStride;
    if (tileMeans) {
      const added = mask + <usize>load<u32>(sequence, SEQUENCE_MASK) + <usize>(from - start) * maskStride;
      markAdded(tailSeen, first, last, mask == 0 ? 0 : added, maskStride);
      appendToTile(
        job, tile, first, last, kFrom, kStride, vFrom, vStride, dtype, keyTail, valueTail, tailSeen, scratch,
      );
    } else {
      const seenFrom = seen == 0 ? <usize>0 : seen + <usize>from;
      packKeys(job, tile, first, last, kFrom, kStride, dtype, seenFrom, flags & FLAG_SMOOTH_K ? kMean : 0, row);
      const mean = flags & FLAG_SMOOTH_V ? vMean : <usize>0;
      loadValues(job, tile, first, last, vFrom, vStride, dtype, seenFrom, mean, values, scratch);
      memory.fill(values + <usize>last * valueBytes, 0, <usize>(stepsOf(flags, last) - last) * valueBytes);
      if (flags & FLAG_FP4) packValuesFp4(job, tile, values, last, rowsDiffer, scratch);
      else if (flags & FLAG_ACCURATE) packValues(job, tile, values, last);
      else quantizeValues(job, tile, values, last, rowsDiffer, false, scratch);
    }
    from = to;
  }
}
