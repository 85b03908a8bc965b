/**
 * Values of a tile, from float32 to integers with a scale for each channel.
 *
 * Where rows see different keys, one scale over keys of very different sizes would cost some rows all their precision: a
 * later token must not spoil what an earlier row sees. Keys whose values are much larger or smaller than the tile's typical
 * ones then have scales of their own, one for each 8 channels, in powers of two: up to MOST_APART keys beside the others, or
 * all keys of the tile.
 */
import {
  JOB_DV_PADDED,
  JOB_TILE_FLAGS,
  JOB_TILE_NANS,
  JOB_TILE_V,
  JOB_TILE_V_APART,
  JOB_TILE_V_EXPONENTS,
  JOB_TILE_V_SCALES,
} from '../generated/fields.ts';
import {
  BLOCK_K,
  MOST_APART,
  TILE_APART_COUNT,
  TILE_APART_KEYS,
  TILE_FINE_VALUES,
  TILE_NAN_VALUE,
  TILE_VALUES_APART,
} from '../job.ts';
import { larger, magnitudes, maxOf, roundingFor, toIntegers } from './arithmetic.ts';
import { SCRATCH_HISTOGRAM, SCRATCH_VALUE_SIZES, SCRATCH_VALUES } from './scratch.ts';

/** Magnitude of a quantized value: 12 bits where lanes have 16 anyway, and all 16 where a key has its own scale. */
const V_LEVELS: f32 = ASC_FEATURE_RELAXED_SIMD ? 127 : 2047;
const FINE_LEVELS: f32 = ASC_FEATURE_RELAXED_SIMD ? 127 : 32767;
/** Bytes of a quantized value. */
export const VALUE_BYTES: usize = ASC_FEATURE_RELAXED_SIMD ? 1 : 2;
/** Sizes within this ratio share a scale without a closer look. */
const ALIKE: f32 = 6;
const CHANNELS_ALIKE: f32 = 8;
/** Keys whose size is further than this power of two from the typical one stand apart. */
const TYPICAL_RANGE: i32 = 2;

/** A value row with NaN or infinity: its channels are marked, and stored as 0. */
export function markInvalidValues(job: usize, tile: usize, token: i32, row: usize): void {
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

/** Keys of a partly filled tile that the products may take: they go in steps of so many. */
// @ts-ignore: decorator
@inline
export function wholeSteps(keys: i32): i32 {
  return (keys + 15) & ~15;
}

/**
 * A tile's values, float32 `[keys, DvPadded]` at `values`, to integers with a scale for each channel.
 *
 * @param keys whole steps of them; what the tile holds beyond is not touched, and not read
 */
function quantizeByChannel(job: usize, tile: usize, values: usize, keys: i32): void {
  const padded = load<i32>(job, JOB_DV_PADDED);
  const rowBytes = <usize>padded << 2;
  const scales = tile + load<usize>(job, JOB_TILE_V_SCALES);
  let target = tile + load<usize>(job, JOB_TILE_V);
  const rounding = roundingFor(keys);
  /** Where an integer lies in its lane. */
  const field = i32x4.splat(keys > 0 ? (ASC_FEATURE_RELAXED_SIMD ? 0xff : 0xffff) : 0);
  for (let c: usize = 0; c < rowBytes; c += 16) {
    let most = f32x4.splat(0);
    for (let t = 0, at = values + c; t < keys; t++, at += rowBytes) {
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
    const lifting = v128.any_true(tiny);
    for (let t = 0, at = values + c; t < keys; ) {
      let x0 = v128.load(at);
      let x1 = v128.load(at + rowBytes);
      if (lifting) {
        x0 = f32x4.mul(x0, lift);
        x1 = f32x4.mul(x1, lift);
      }
      // The low bits of a sum with ROUNDING are those of the integer.
      x0 = f32x4.add(f32x4.mul(x0, inverse), rounding);
      x1 = f32x4.add(f32x4.mul(x1, inverse), rounding);
      if (ASC_FEATURE_RELAXED_SIMD) {
        let x2 = v128.load(at + rowBytes * 2);
        let x3 = v128.load(at + rowBytes * 3);
        if (lifting) {
          x2 = f32x4.mul(x2, lift);
          x3 = f32x4.mul(x3, lift);
        }
        x2 = f32x4.add(f32x4.mul(x2, inverse), rounding);
        x3 = f32x4.add(f32x4.mul(x3, inverse), rounding);
        const low = v128.or(v128.and(x0, field), i32x4.shl(v128.and(x1, field), 8));
        const high = v128.or(i32x4.shl(v128.and(x2, field), 16), i32x4.shl(x3, 24));
        v128.store(to, v128.or(low, high));
        t += 4;
        at += rowBytes * 4;
      } else {
        v128.store(to, v128.or(v128.and(x0, field), i32x4.shl(x1, 16)));
        t += 2;
        at += rowBytes * 2;
      }
      to += 32;
    }
  }
}

/** Whether sizes of the tile's keys, at SCRATCH_VALUE_SIZES, differ much. Values of 0 are exact at any scale. */
function keysDiffer(sizes: usize, keys: i32): boolean {
  let least: f32 = Infinity;
  let most: f32 = 0;
  for (let t = 0; t < keys; t++) {
    const size = load<f32>(sizes + (<usize>t << 2));
    if (size == 0) continue;
    least = min(least, size);
    most = max(most, size);
  }
  return most > least * ALIKE;
}

/** Whether channels differ so much in size that a key's largest value says little about its others. */
function channelsDiffer(scales: usize, channels: i32): boolean {
  let least: f32 = Infinity;
  let most: f32 = 0;
  for (let c = 0; c < channels; c++) {
    const scale = load<f32>(scales + (<usize>c << 2));
    if (scale == 0) continue;
    least = min(least, scale);
    most = max(most, scale);
  }
  return most > least * CHANNELS_ALIKE;
}

/** Biased exponent of the least power of two that brings 8 channels into FINE_LEVELS; 0 where they are all 0. */
// @ts-ignore: decorator
@inline
function exponentOf(at: usize): i32 {
  const most = maxOf(larger(magnitudes(v128.load(at)), magnitudes(v128.load(at, 16))));
  if (most == 0) return 0;
  return max(1, (reinterpret<i32>(most / FINE_LEVELS) + 0x7fffff) >> 23);
}

/** Exponents of each key and 8 channels, one byte each, to `target`. */
function findExponents(values: usize, keys: i32, padded: i32, target: usize): void {
  for (let at = values, end = values + ((<usize>keys * <usize>padded) << 2); at < end; at += 32, target++) {
    store<u8>(target, <u8>exponentOf(at));
  }
}

/**
 * Finds the keys whose size is not typical in any of their 8 channels, and counts them; the first MOST_APART are listed at
 * `list`.
 *
 * @param distances one byte for each key to work with
 */
function findApart(exponents: usize, keys: i32, groups: i32, histogram: usize, distances: usize, list: usize): i32 {
  memory.fill(distances, 0, keys);
  for (let g = 0; g < groups; g++) {
    memory.fill(histogram, 0, 256);
    let counted = 0;
    for (let t = 0; t < keys; t++) {
      const exponent = load<u8>(exponents + <usize>(t * groups + g));
      if (exponent == 0) continue;
      store<u8>(histogram + exponent, load<u8>(histogram + exponent) + 1);
      counted++;
    }
    let median = 0;
    for (let below = 0; median < 255; median++) {
      below += load<u8>(histogram + <usize>median);
      if (2 * below >= counted) break;
    }
    for (let t = 0; t < keys; t++) {
      const exponent = <i32>load<u8>(exponents + <usize>(t * groups + g));
      if (exponent == 0) continue;
      // 1 to 255, since 0 says that there is no distance; the largest one of a key's groups is the key's.
      const distance = max(1, min(255, 128 + exponent - median));
      if (distance > <i32>load<u8>(distances + <usize>t)) store<u8>(distances + <usize>t, <u8>distance);
    }
  }
  let apart = 0;
  for (let t = 0; t < keys; t++) {
    const distance = <i32>load<u8>(distances + <usize>t);
    if (distance == 0 || (distance >= 128 - TYPICAL_RANGE && distance <= 128 + TYPICAL_RANGE)) continue;
    if (apart < MOST_APART) store<u8>(list + <usize>apart, <u8>t);
    apart++;
  }
  return apart;
}

/** One key's values to integers by the exponents of its channels. */
function packFine(row: usize, padded: i32, exponents: usize, target: usize): void {
  for (let c = 0; c < padded; c += 8, row += 32, exponents++) {
    const exponent = <i32>load<u8>(exponents);
    const inverse = exponent == 0 ? f32x4.splat(0) : i32x4.splat((254 - exponent) << 23);
    const words = i16x8.narrow_i32x4_s(
      toIntegers(f32x4.mul(v128.load(row), inverse)),
      toIntegers(f32x4.mul(v128.load(row, 16), inverse)),
    );
    if (ASC_FEATURE_RELAXED_SIMD) v128.store64_lane(target + <usize>c, i8x16.narrow_i16x8_s(words, words), 0);
    else v128.store(target + (<usize>c << 1), words);
  }
}

/**
 * A tile's values, float32 `[keys, DvPadded]` at `values`, to integers.
 *
 * @param keys that the tile holds; the rest of the last step are 0
 * @param rowsDiffer whether rows may see different keys of the tile; their sizes are at SCRATCH_VALUE_SIZES then
 * @param kept whether `values` must stay as they are
 */
export function quantizeValues(
  job: usize, tile: usize, values: usize, keys: i32, rowsDiffer: boolean, kept: boolean, scratch: usize,
): void {
  const padded = load<i32>(job, JOB_DV_PADDED);
  const flagsAt = tile + load<usize>(job, JOB_TILE_FLAGS);
  const flags = load<i32>(flagsAt) & ~(TILE_FINE_VALUES | TILE_VALUES_APART);
  store<i32>(flagsAt, flags);
  const count = wholeSteps(keys);
  quantizeByChannel(job, tile, values, count);
  if (!rowsDiffer) return;
  const scales = tile + load<usize>(job, JOB_TILE_V_SCALES);
  if (!keysDiffer(scratch + SCRATCH_VALUE_SIZES, keys) && !channelsDiffer(scales, padded)) return;
  const groups = padded >> 3;
  const exponents = tile + load<usize>(job, JOB_TILE_V_EXPONENTS);
  findExponents(values, keys, padded, exponents);
  const histogram = scratch + SCRATCH_HISTOGRAM;
  const list = flagsAt + TILE_APART_KEYS;
  const apart = findApart(exponents, keys, groups, histogram, histogram + 256, list);
  if (apart == 0) return;
  const rowBytes = <usize>padded << 2;
  const codeBytes = <usize>padded * VALUE_BYTES;
  if (apart > MOST_APART) {
    store<i32>(flagsAt, flags | TILE_FINE_VALUES);
    const target = tile + load<usize>(job, JOB_TILE_V);
    memory.fill(exponents + <usize>(keys * groups), 0, <usize>((count - keys) * groups));
    for (let t: usize = 0; t < <usize>count; t++) {
      packFine(values + t * rowBytes, padded, exponents + t * <usize>groups, target + t * codeBytes);
    }
    return;
  }
  store<i32>(flagsAt, flags | TILE_VALUES_APART);
  store<i32>(flagsAt, apart, TILE_APART_COUNT);
  const target = tile + load<usize>(job, JOB_TILE_V_APART);
  let others = values;
  if (kept) {
    others = scratch + SCRATCH_VALUES;
    memory.copy(others, values, <usize>count * rowBytes);
  }
  for (let a: usize = 0; a < <usize>apart; a++) {
    const t = <usize>load<u8>(list + a);
    packFine(values + t * rowBytes, padded, exponents + t * <usize>groups, target + a * codeBytes);
    // Listed in rising order: what this overwrites has been used.
    memory.copy(exponents + a * <usize>groups, exponents + t * <usize>groups, groups);
    memory.fill(others + t * rowBytes, 0, rowBytes);
  }
  quantizeByChannel(job, tile, others, count);
}

/** A tile's values kept in float32. */
export function packValues(job: usize, tile: usize, values: usize, keys: i32): void {
  const rowBytes = <usize>load<i32>(job, JOB_DV_PADDED) << 2;
  const count = wholeSteps(keys);
  let group = tile + load<usize>(job, JOB_TILE_V);
  for (let c: usize = 0; c < rowBytes; c += 32, group += BLOCK_K * 32) {
    for (let t = 0, at = values + c, to = group; t < count; t++, at += rowBytes, to += 32) {
      v128.store(to, v128.load(at));
      v128.store(to, v128.load(at, 16), 16);
    }
  }
}
