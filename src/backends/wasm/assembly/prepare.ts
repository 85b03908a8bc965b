/**
 * Keys and values to tiles of BLOCK_K tokens.
 *
 * A tile's keys: for every 8 keys and every step of 4 bytes of channels, two vectors of 4 keys each, so that the product
 * with a splat step of Q is a sum over channels for 4 keys at once. Its values: for every 8 channels and every step of 4
 * bytes of tokens, two vectors of 4 channels each. A step is 4 elements of 8 bits in the relaxed build, 2 of 16 bits in
 * the other, and 1 of what stays in float32.
 */
import {
  BLOCK_K,
  FLAG_ACCURATE,
  FLAG_EXACT,
  FLAG_KEEP_MEANS,
  FLAG_SMOOTH_K,
  FLAG_SMOOTH_V,
  JOB_D,
  JOB_DTYPE,
  JOB_DV,
  JOB_DV_PADDED,
  JOB_FLAGS,
  JOB_K,
  JOB_K_HEAD_STRIDE,
  JOB_K_STEPS,
  JOB_K_TOKEN_STRIDE,
  JOB_KV_HEADS,
  JOB_MASK,
  JOB_MASK_DTYPE,
  JOB_MASK_HEAD_STRIDE,
  JOB_MASK_KEY_STRIDE,
  JOB_MASK_QUERY_STRIDE,
  JOB_MEANS,
  JOB_QUERY_HEADS,
  JOB_SEQUENCES,
  JOB_TAIL,
  JOB_TILE_BYTES,
  JOB_TILE_FLAGS,
  JOB_TILE_K_SUMS,
  JOB_TILE_K_SCALES,
  JOB_TILE_NANS,
  JOB_TILE_V,
  JOB_TILE_V_SCALES,
  JOB_TILES,
  JOB_V,
  JOB_V_HEAD_STRIDE,
  JOB_V_TOKEN_STRIDE,
  DTYPE_BOOL,
  SEQUENCE_BYTES,
  SEQUENCE_FIRST_TILE,
  SEQUENCE_K,
  SEQUENCE_KEY_LENGTH,
  SEQUENCE_LOWER,
  SEQUENCE_MASK,
  SEQUENCE_PARTLY_SEEN,
  SEQUENCE_QUERY_LENGTH,
  SEQUENCE_START,
  SEQUENCE_TILES,
  SEQUENCE_UPPER,
  SEQUENCE_V,
  TILE_NAN_KEY,
  TILE_NAN_VALUE,
  UNIT_HEAD,
  UNIT_SEQUENCE,
} from '../job.ts';
import { integerSumOf, larger, maxOf, toIntegers } from './arithmetic.ts';
import { elementShift, loadElement, loadRow } from './elements.ts';
import { SCRATCH_ROW, SCRATCH_SEEN, SCRATCH_VALUES } from './scratch.ts';

/** Magnitude of a quantized key, and of a quantized value: 12 bits where lanes have 16 anyway. */
const K_LEVELS: f32 = 127;
const V_LEVELS: f32 = ASC_FEATURE_RELAXED_SIMD ? 127 : 2047;
/** No scale of Q or K is smaller: its reciprocal stays finite, and scores of values this small are 0 anyway. */
export const LEAST_SCALE: f32 = 7.52316384526264e-37;

// @ts-ignore: decorator
@inline
function magnitudes(x: v128): v128 {
  return v128.and(x, i32x4.splat(0x7fffffff));
}

/** Largest magnitude of a row of float32, or NaN where it holds a NaN or an infinity. */
export function rowMaximum(row: usize, padded: i32): f32 {
  let most = f32x4.splat(0);
  let invalid = f32x4.splat(0);
  for (let i = 0; i < padded; i += 4) {
    const x = v128.load(row + (<usize>i << 2));
    most = larger(most, magnitudes(x));
    // 0 for finite numbers, NaN for others.
    invalid = f32x4.add(invalid, f32x4.mul(x, f32x4.splat(0)));
  }
  return maxOf(most) + f32x4.extract_lane(invalid, 0) + f32x4.extract_lane(invalid, 1) +
    (f32x4.extract_lane(invalid, 2) + f32x4.extract_lane(invalid, 3));
}

/** One byte per key: whether any row of any head that shares this key sees it. */
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
    if (from < to) memory.fill(seen + from, 1, to - from);
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
      const to = min(keyLength, i + upper + 1);
      for (let j = max(0, i + lower); j < to; j++) {
        if (load<u8>(seen + j)) continue;
        const value = loadElement(row + <usize>(<u32>j * keyStride), dtype);
        if (dtype == DTYPE_BOOL ? value != 0 : value != -Infinity) {
          store<u8>(seen + j, 1);
          missing--;
        }
      }
    }
  }
}

/**
 * Mean over the tokens that are seen and finite. Any vector would do (softmax does not change), so tokens that could
 * poison it stay out.
 */
function meanOf(
  base: usize, tokenStride: usize, dtype: i32, count: i32, padded: i32, from: i32, to: i32, seen: usize, row: usize,
  mean: usize,
): void {
  memory.fill(mean, 0, <usize>padded << 2);
  let tokens = 0;
  // Terms are scaled by a power of two no smaller than their number: the sum cannot overflow.
  const down: f32 = <f32>1 / <f32>(1 << (32 - clz(max(1, to - from))));
  for (let t = from; t < to; t++) {
    if (seen != 0 && load<u8>(seen + t) == 0) continue;
    loadRow(base + <usize>(t - from) * tokenStride, dtype, count, row, padded);
    const most = rowMaximum(row, padded);
    if (most != most) continue;
    tokens++;
    for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
      v128.store(mean + i, f32x4.add(v128.load(mean + i), f32x4.mul(v128.load(row + i), f32x4.splat(down))));
    }
  }
  const up: f32 = tokens > 0 ? <f32>1 / down / <f32>tokens : 0;
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    v128.store(mean + i, f32x4.mul(v128.load(mean + i), f32x4.splat(up)));
  }
}

// @ts-ignore: decorator
@inline
function subtractRow(row: usize, vector: usize, padded: i32): void {
  for (let i: usize = 0; i < <usize>padded << 2; i += 16) {
    v128.store(row + i, f32x4.sub(v128.load(row + i), v128.load(vector + i)));
  }
}

/** One key, in float32 at `row`, to its place in the tile: in integers, or as it is where nothing is quantized. */
function packKey(job: usize, tile: usize, key: i32, row: usize, padded: i32, exact: boolean): void {
  const steps = <usize>load<i32>(job, JOB_K_STEPS);
  const scaleAt = tile + load<usize>(job, JOB_TILE_K_SCALES) + (<usize>key << 2);
  const most = rowMaximum(row, padded);
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
  let sum = i32x4.splat(0);
  for (let i = 0; i < padded; i += 8) {
    const low = toIntegers(f32x4.mul(v128.load(row + (<usize>i << 2)), inverse));
    const high = toIntegers(f32x4.mul(v128.load(row + (<usize>i << 2), 16), inverse));
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
    store<i32>(tile + load<usize>(job, JOB_TILE_K_SUMS) + (<usize>key << 2), integerSumOf(sum));
  }
}

/** A value row with NaN or infinity: its channels are marked, and stored as 0. */
function markInvalidValues(job: usize, tile: usize, token: i32, row: usize): void {
  const padded = load<i32>(job, JOB_DV_PADDED);
  const nans = tile + load<usize>(job, JOB_TILE_NANS);
  const flags = tile + load<usize>(job, JOB_TILE_FLAGS);
  if ((load<i32>(flags) & TILE_NAN_VALUE) == 0) {
    memory.fill(nans, 0, (<usize>padded * BLOCK_K) >> 3);
    store<i32>(flags, load<i32>(flags) | TILE_NAN_VALUE);
  }
  for (let c = 0; c < padded; c++) {
    const at = row + (<usize>c << 2);
    const x = load<f32>(at);
    if (x - x == 0) continue;
    store<f32>(at, 0);
    const bit = token * padded + c;
    store<u8>(nans + (bit >> 3), load<u8>(nans + (bit >> 3)) | (<u8>1 << <u8>(bit & 7)));
  }
}

/** A tile's values, float32 `[BLOCK_K, DvPadded]` at `values`, to integers with a scale per channel. */
function quantizeValues(job: usize, tile: usize, values: usize): void {
  const padded = load<i32>(job, JOB_DV_PADDED);
  const rowBytes = <usize>padded << 2;
  const scales = tile + load<usize>(job, JOB_TILE_V_SCALES);
  let target = tile + load<usize>(job, JOB_TILE_V);
  for (let c: usize = 0; c < rowBytes; c += 16) {
    let most = f32x4.splat(0);
    for (let t = 0, at = values + c; t < BLOCK_K; t++, at += rowBytes) {
      most = larger(most, magnitudes(v128.load(at)));
    }
    v128.store(scales + c, f32x4.mul(most, f32x4.splat(1 / V_LEVELS)));
    // Tiny channels are multiplied by 2^100 first: the reciprocal of their scale would overflow.
    const tiny = f32x4.lt(most, f32x4.splat(7.888609052210118e-31));
    const lift = v128.bitselect(f32x4.splat(1.2676506002282294e30), f32x4.splat(1), tiny);
    const lifted = f32x4.mul(most, lift);
    const inverse = v128.and(
      f32x4.div(f32x4.splat(V_LEVELS), lifted),
      f32x4.gt(lifted, f32x4.splat(0)),
    );
    // Two vectors of channels share a step: the second lies 16 bytes on.
    let to = target + (c & 16);
    if (c & 16) target += (BLOCK_K / (ASC_FEATURE_RELAXED_SIMD ? 4 : 2)) * 32;
    for (let t = 0, at = values + c; t < BLOCK_K; ) {
      const x0 = toIntegers(f32x4.mul(f32x4.mul(v128.load(at), lift), inverse));
      const x1 = toIntegers(f32x4.mul(f32x4.mul(v128.load(at + rowBytes), lift), inverse));
      if (ASC_FEATURE_RELAXED_SIMD) {
        const x2 = toIntegers(f32x4.mul(f32x4.mul(v128.load(at + rowBytes * 2), lift), inverse));
        const x3 = toIntegers(f32x4.mul(f32x4.mul(v128.load(at + rowBytes * 3), lift), inverse));
        const byte = i32x4.splat(0xff);
        const low = v128.or(v128.and(x0, byte), i32x4.shl(v128.and(x1, byte), 8));
        const high = v128.or(i32x4.shl(v128.and(x2, byte), 16), i32x4.shl(x3, 24));
        v128.store(to, v128.or(low, high));
        t += 4;
        at += rowBytes * 4;
      } else {
        v128.store(to, v128.or(v128.and(x0, i32x4.splat(0xffff)), i32x4.shl(x1, 16)));
        t += 2;
        at += rowBytes * 2;
      }
      to += 32;
    }
  }
}

/** A tile's values kept in float32. */
function packValues(job: usize, tile: usize, values: usize): void {
  const rowBytes = <usize>load<i32>(job, JOB_DV_PADDED) << 2;
  let to = tile + load<usize>(job, JOB_TILE_V);
  for (let c: usize = 0; c < rowBytes; c += 32) {
    for (let t = 0, at = values + c; t < BLOCK_K; t++, at += rowBytes) {
      v128.store(to, v128.load(at));
      v128.store(to, v128.load(at, 16), 16);
      to += 32;
    }
  }
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

  let seen: usize = 0;
  if (load<i32>(sequence, SEQUENCE_PARTLY_SEEN)) {
    seen = scratch + SCRATCH_SEEN;
    markSeen(job, sequence, head, seen);
  }
  if ((flags & FLAG_KEEP_MEANS) == 0) {
    if (flags & FLAG_SMOOTH_K) meanOf(k, kStride, dtype, d, dPadded, start, end, seen, row, kMean);
    else memory.fill(kMean, 0, <usize>dPadded << 2);
    if (flags & FLAG_SMOOTH_V) meanOf(v, vStride, dtype, dv, dvPadded, start, end, seen, row, vMean);
    else memory.fill(vMean, 0, <usize>dvPadded << 2);
  }

  const tileBytes = load<usize>(job, JOB_TILE_BYTES);
  const firstTile =
    <usize>load<i32>(sequence, SEQUENCE_FIRST_TILE) * <usize>load<i32>(job, JOB_KV_HEADS) +
    <usize>head * <usize>load<i32>(sequence, SEQUENCE_TILES);
  const tail = load<usize>(job, JOB_TAIL);
  const values = tail != 0 ? tail + ((pair * BLOCK_K * <usize>dvPadded) << 2) : scratch + SCRATCH_VALUES;
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
    for (let t = from; t < to; t++) {
      const key = t - tileStart;
      const value = values + <usize>key * valueBytes;
      if (seen != 0 && load<u8>(seen + t) == 0) {
        memory.fill(value, 0, valueBytes);
        continue;
      }
      loadRow(k + <usize>(t - start) * kStride, dtype, d, row, dPadded);
      if (flags & FLAG_SMOOTH_K) subtractRow(row, kMean, dPadded);
      packKey(job, tile, key, row, dPadded, (flags & FLAG_EXACT) != 0);
      // The row goes through scratch: loads may reach beyond its end, and the next one belongs there.
      loadRow(v + <usize>(t - start) * vStride, dtype, dv, row, dvPadded);
      const most = rowMaximum(row, dvPadded);
      if (most != most) markInvalidValues(job, tile, key, row);
      if (flags & FLAG_SMOOTH_V) subtractRow(row, vMean, dvPadded);
      memory.copy(value, row, valueBytes);
    }
    memory.fill(values + <usize>(to - tileStart) * valueBytes, 0, <usize>(tileStart + BLOCK_K - to) * valueBytes);
    if (flags & FLAG_ACCURATE) packValues(job, tile, values);
    else quantizeValues(job, tile, values);
    from = to;
  }
}
