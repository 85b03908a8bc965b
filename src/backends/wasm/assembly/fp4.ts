/**
 * FP4 in blocks of 16 (NVFP4 of SageAttention3, arXiv 2505.11594): the arithmetic of src/quantization/fp4-blocks.ts, bit for bit.
 * Keys, values and weights are decoded to float32 and multiplied there, which gives the real numbers of an FP4 tensor core.
 *
 * A tile holds a key's codes (two a byte, even channel low), then E4M3 scales, then a power of two for each key: the exponent of a
 * float32, 0 where all is 0. Blocks of values run along the tokens of a channel; where rows see different keys whose values differ much
 * in size, along the channels of a token, so that no token spoils another (TILE_FINE_VALUES).
 */
import {
  JOB_D,
  JOB_DV_PADDED,
  JOB_FLAGS,
  JOB_TILE_FLAGS,
  JOB_TILE_K_SCALES,
  JOB_TILE_K_SUMS,
  JOB_TILE_V,
  JOB_TILE_V_EXPONENTS,
  JOB_TILE_V_SCALES,
} from '../generated/fields.ts';
import {
  BLOCK_K,
  FLAG_SEARCH_FOUR_OVER_SIX,
  FLAG_SEARCH_MSE,
  TILE_FINE_VALUES,
  TILE_NAN_KEY,
  TILE_NAN_VALUE,
} from '../job.ts';
import { magnitudes, maxOf, sumOf } from './arithmetic.ts';
import { SCRATCH_BLOCK, SCRATCH_VALUE_SIZES } from './scratch.ts';

/** Largest magnitude of NVFP4: 448 * 6. */
export const FP4_MAX: f32 = 2688;
/** What roundWeights gives for 1; a row's largest weight becomes 2688 of them. */
export const WEIGHT_UNIT: f32 = 0.000244140625;
const SIXTH: f32 = 0.1666666716337204;
/** E4M3's NaN: the scale of a key that holds one. */
const NAN_SCALE: u8 = 0x7f;
/** E2M1's -0, which no number becomes: a value that is not finite. */
const NAN_CODE: u8 = 8;
/** Values whose sizes differ more do not share a block where rows see different keys. */
const ALIKE: f32 = 8;

/** Nearest E2M1 numbers, ties to even. The step is half the power of two below, and at least a half. */
// @ts-ignore: decorator
@inline
function toE2m1(x: v128): v128 {
  const y = f32x4.max(f32x4.min(x, f32x4.splat(6)), f32x4.splat(-6));
  const power = v128.and(y, i32x4.splat(0x7f800000));
  const step = i32x4.max_s(i32x4.sub(power, i32x4.splat(0x00800000)), i32x4.splat(0x3f000000));
  const rounding = f32x4.mul(step, f32x4.splat(12582912));
  return f32x4.sub(f32x4.add(y, rounding), rounding);
}

/** Codes of E2M1 numbers; the code of -0 is 0. */
// @ts-ignore: decorator
@inline
function codesOf(x: v128): v128 {
  const size = magnitudes(x);
  const normal = i32x4.sub(i32x4.shr_u(size, 22), i32x4.splat(252));
  const half = f32x4.ge(size, f32x4.splat(0.5));
  const code = i32x4.max_s(normal, v128.and(half, i32x4.splat(1)));
  return v128.or(code, v128.and(v128.and(i32x4.shr_u(x, 28), i32x4.splat(8)), half));
}

/** E4M3 code of a number >= 0: nearest, ties to even, at most 448. */
export function toE4m3(x: f32): i32 {
  if (x >= 448) return 0x7e;
  if (x < 0.015625) return <i32>nearest(x * 512);
  const bits = reinterpret<i32>(x);
  return ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - 960;
}

/** What an E4M3 code of a number >= 0 stands for. */
export function fromE4m3(code: i32): f32 {
  return code < 8 ? <f32>code * 0.001953125 : reinterpret<f32>((code + 960) << 20);
}

/** The power of two that puts a magnitude into (672, 1344]; 1 for 0. */
function outerScale(most: f32): f32 {
  if (most == 0) return 1;
  return min(reinterpret<f32>(reinterpret<i32>(FP4_MAX / 2 / most) & 0x7f800000), 8.507059173023462e37);
}

/** Exponent field of the reciprocal of an outer scale. */
// @ts-ignore: decorator
@inline
function reciprocalExponent(outer: f32): u8 {
  return <u8>(254 - (reinterpret<i32>(outer) >> 23));
}

/** Factors on the block's largest magnitude, in the order in which they are tried. */
function candidate(index: i32, flags: i32): f32 {
  if (flags & FLAG_SEARCH_MSE) {
    switch (index) {
      case 1: return 0.875 / 6;
      case 2: return 0.94 / 6;
      case 3: return 1.0625 / 6;
      case 4: return 1.125 / 6;
      case 5: return 1.25 / 6;
      case 6: return 1.375 / 6;
      case 7: return 1.5 / 6;
      default: return SIXTH;
    }
  }
  return index == 0 ? SIXTH : index == 1 ? <f32>(1.25 / 6) : <f32>(1.5 / 6);
}

/** Squared error of a part of a block that is divided by a scale, added to `sum`. */
// @ts-ignore: decorator
@inline
function squaredErrors(x: v128, scale: v128, inverse: v128, sum: v128): v128 {
  const error = f32x4.sub(x, f32x4.mul(scale, toE2m1(f32x4.mul(x, inverse))));
  return f32x4.add(sum, f32x4.mul(error, error));
}

/** The E4M3 code, at least 1, of the scale that codes 16 float32 at `block` with the least squared error of those tried. */
function scaleOf(block: usize, flags: i32): i32 {
  const x0 = v128.load(block);
  const x1 = v128.load(block, 16);
  const x2 = v128.load(block, 32);
  const x3 = v128.load(block, 48);
  const most = maxOf(
    f32x4.max(f32x4.max(magnitudes(x0), magnitudes(x1)), f32x4.max(magnitudes(x2), magnitudes(x3))),
  );
  const candidates = flags & FLAG_SEARCH_MSE ? 8 : flags & FLAG_SEARCH_FOUR_OVER_SIX ? 3 : 1;
  if (candidates == 1) return max(1, toE4m3(most * SIXTH));
  let best = 1;
  let least: f32 = Infinity;
  let last = -1;
  for (let i = 0; i < candidates; i++) {
    const code = max(1, toE4m3(most * candidate(i, flags)));
    if (code == last) continue;
    last = code;
    const s = fromE4m3(code);
    const scale = f32x4.splat(s);
    const inverse = f32x4.splat(<f32>1 / s);
    let sum = f32x4.splat(0);
    sum = squaredErrors(x0, scale, inverse, sum);
    sum = squaredErrors(x1, scale, inverse, sum);
    sum = squaredErrors(x2, scale, inverse, sum);
    sum = squaredErrors(x3, scale, inverse, sum);
    const error = sumOf(sum);
    if (error < least) {
      least = error;
      best = code;
    }
  }
  return best;
}

/** 16 float32 at `block` to 8 bytes of codes at `target`. */
function storeCodes(block: usize, scale: f32, target: usize): void {
  const inverse = f32x4.splat(<f32>1 / scale);
  const c0 = codesOf(toE2m1(f32x4.mul(v128.load(block), inverse)));
  const c1 = codesOf(toE2m1(f32x4.mul(v128.load(block, 16), inverse)));
  const c2 = codesOf(toE2m1(f32x4.mul(v128.load(block, 32), inverse)));
  const c3 = codesOf(toE2m1(f32x4.mul(v128.load(block, 48), inverse)));
  const codes = i8x16.narrow_i16x8_u(i16x8.narrow_i32x4_u(c0, c1), i16x8.narrow_i32x4_u(c2, c3));
  const low = v128.and(codes, i16x8.splat(15));
  const pairs = v128.or(low, i16x8.shl(i16x8.shr_u(codes, 8), 4));
  v128.store64_lane(target, i8x16.narrow_i16x8_u(pairs, pairs), 0);
}

/** A row of float32, `padded` elements and room for 8 more, to codes, scales and the exponent of its power of two. */
function packRow(row: usize, padded: i32, most: f32, flags: i32, codes: usize, scales: usize, exponent: usize): void {
  if (padded & 8) memory.fill(row + (<usize>padded << 2), 0, 32);
  const outer = outerScale(most);
  const factor = f32x4.splat(outer);
  store<u8>(exponent, most == 0 ? 0 : reciprocalExponent(outer));
  for (let i = 0; i < padded; i += 16, row += 64, codes += 8, scales++) {
    for (let j: usize = 0; j < 64; j += 16) v128.store(row + j, f32x4.mul(v128.load(row + j), factor));
    const scale = scaleOf(row, flags);
    store<u8>(scales, <u8>scale);
    storeCodes(row, fromE4m3(scale), codes);
  }
}

/** One key, float32 at `row`, to its place in the tile; see packKey. */
export function packKeyFp4(job: usize, tile: usize, key: i32, row: usize, padded: i32, most: f32): void {
  const blocks = <usize>(padded + 15) >> 4;
  const scales = tile + load<usize>(job, JOB_TILE_K_SCALES) + <usize>key * blocks;
  const exponent = tile + load<usize>(job, JOB_TILE_K_SUMS) + <usize>key;
  if (most != most) {
    // Its score is NaN, for the rows that see it.
    memory.fill(scales, NAN_SCALE, blocks);
    store<u8>(exponent, 127);
    const flags = tile + load<usize>(job, JOB_TILE_FLAGS);
    store<i32>(flags, load<i32>(flags) | TILE_NAN_KEY);
    return;
  }
  packRow(row, padded, most, load<i32>(job, JOB_FLAGS), tile + <usize>key * blocks * 8, scales, exponent);
}

/** One channel's values, `[BLOCK_K]` a row apart, to codes and scales of 16 tokens. */
function packChannel(
  values: usize, rowBytes: usize, flags: i32, codes: usize, scales: usize, exponent: usize, block: usize,
): void {
  let most: f32 = 0;
  for (let t: usize = 0, at = values; t < <usize>BLOCK_K; t++, at += rowBytes) {
    const size = abs(load<f32>(at));
    if (size < Infinity) most = max(most, size);
  }
  const outer = outerScale(most);
  store<u8>(exponent, most == 0 ? 0 : reciprocalExponent(outer));
  for (let b = 0; b < BLOCK_K / 16; b++, codes += 8, scales++) {
    let invalid = 0;
    for (let t = 0; t < 16; t++, values += rowBytes) {
      const x = load<f32>(values);
      const finite = x - x == 0;
      store<f32>(block + (<usize>t << 2), finite ? x * outer : 0);
      if (!finite) invalid |= 1 << t;
    }
    const scale = scaleOf(block, flags);
    store<u8>(scales, <u8>scale);
    storeCodes(block, fromE4m3(scale), codes);
    for (let t = 0; invalid != 0; t++, invalid >>= 1) {
      if (invalid & 1) store<u8>(codes + (t >> 1), load<u8>(codes + (t >> 1)) | (NAN_CODE << <u8>((t & 1) << 2)));
    }
  }
}

/** Whether sizes of the tile's keys, at SCRATCH_VALUE_SIZES, differ much; zeros are exact at any scale. */
function sizesDiffer(sizes: usize, keys: i32): boolean {
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

/**
 * A tile's values, float32 `[BLOCK_K, DvPadded]` at `values`, to FP4.
 *
 * @param keys that the tile holds; the rest are 0
 * @param rowsDiffer whether rows may see different keys of the tile; their sizes are at SCRATCH_VALUE_SIZES then
 */
export function packValuesFp4(
  job: usize, tile: usize, values: usize, keys: i32, rowsDiffer: boolean, scratch: usize,
): void {
  const padded = load<i32>(job, JOB_DV_PADDED);
  const flags = load<i32>(job, JOB_FLAGS);
  const rowBytes = <usize>padded << 2;
  const codes = tile + load<usize>(job, JOB_TILE_V);
  const scales = tile + load<usize>(job, JOB_TILE_V_SCALES);
  const exponents = tile + load<usize>(job, JOB_TILE_V_EXPONENTS);
  const flagsAt = tile + load<usize>(job, JOB_TILE_FLAGS);
  const tileFlags = load<i32>(flagsAt) & ~TILE_FINE_VALUES;
  if (!rowsDiffer || !sizesDiffer(scratch + SCRATCH_VALUE_SIZES, keys)) {
    store<i32>(flagsAt, tileFlags);
    const block = scratch + SCRATCH_BLOCK;
    for (let c: usize = 0; c < <usize>padded; c++) {
      packChannel(values + (c << 2), rowBytes, flags, codes + c * (BLOCK_K / 2), scales + c * (BLOCK_K / 16), exponents + c, block);
    }
    return;
  }
  store<i32>(flagsAt, tileFlags | TILE_FINE_VALUES);
  const blocks = <usize>(padded + 15) >> 4;
  const row = scratch + SCRATCH_BLOCK;
  for (let t: usize = 0; t < <usize>BLOCK_K; t++) {
    let most: f32 = 0;
    let invalid = false;
    for (let c: usize = 0; c < <usize>padded; c++) {
      const x = load<f32>(values + t * rowBytes + (c << 2));
      const finite = x - x == 0;
      store<f32>(row + (c << 2), finite ? x : 0);
      if (finite) most = max(most, abs(x));
      else invalid = true;
    }
    const target = codes + t * blocks * 8;
    packRow(row, padded, most, flags, target, scales + t * blocks, exponents + t);
    if (!invalid) continue;
    for (let c: usize = 0; c < <usize>padded; c++) {
      const x = load<f32>(values + t * rowBytes + (c << 2));
      const at = target + (c >> 1);
      if (x - x != 0) store<u8>(at, load<u8>(at) | (NAN_CODE << <u8>((c & 1) << 2)));
    }
  }
}

/** Twice the E2M1 numbers of 16 codes at `at`, as bytes. */
// @ts-ignore: decorator
@inline
function doubled(at: usize): v128 {
  const pairs = v128.load64_zero(at);
  const low = v128.and(pairs, i8x16.splat(15));
  const high = i8x16.shr_u(pairs, 4);
  const codes = v128.shuffle<i8>(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return i8x16.swizzle(i8x16(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), codes);
}

/** Four of 16 bytes as float32. */
// @ts-ignore: decorator
@inline
function quarter(bytes: v128, index: i32): v128 {
  const words = index < 2 ? i16x8.extend_low_i8x16_s(bytes) : i16x8.extend_high_i8x16_s(bytes);
  return f32x4.convert_i32x4_s(index & 1 ? i32x4.extend_high_i16x8_s(words) : i32x4.extend_low_i16x8_s(words));
}

/** What a code's doubled number is multiplied by. */
// @ts-ignore: decorator
@inline
function halfScale(scale: u8, exponent: u8): v128 {
  if (scale == NAN_SCALE) return f32x4.splat(NaN);
  return f32x4.splat(fromE4m3(scale) * 0.5 * reinterpret<f32>(<i32>exponent << 23));
}

/** Four float32 to addresses 32 bytes apart. */
// @ts-ignore: decorator
@inline
function scatter(x: v128, at: usize): void {
  v128.store32_lane(at, x, 0);
  v128.store32_lane(at, x, 1, 32);
  v128.store32_lane(at, x, 2, 64);
  v128.store32_lane(at, x, 3, 96);
}

/** 16 elements, or their first 8, to float32 at addresses 32 bytes apart. */
// @ts-ignore: decorator
@inline
function scatterBlock(codes: usize, factor: v128, half: boolean, at: usize): void {
  const bytes = doubled(codes);
  scatter(f32x4.mul(quarter(bytes, 0), factor), at);
  scatter(f32x4.mul(quarter(bytes, 1), factor), at + 128);
  if (half) return;
  scatter(f32x4.mul(quarter(bytes, 2), factor), at + 256);
  scatter(f32x4.mul(quarter(bytes, 3), factor), at + 384);
}

/** The first keys of a tile to float32, as scoreRowsFloat takes them. */
export function decodeKeys(job: usize, tile: usize, keys: i32, target: usize): void {
  const padded = (load<i32>(job, JOB_D) + 7) & ~7;
  const blocks = <usize>(padded + 15) >> 4;
  let codes = tile;
  let scales = tile + load<usize>(job, JOB_TILE_K_SCALES);
  const exponents = tile + load<usize>(job, JOB_TILE_K_SUMS);
  for (let key: usize = 0; key < <usize>keys; key++) {
    let at = target + (key >> 3) * (<usize>padded << 5) + ((key & 7) << 2);
    const exponent = load<u8>(exponents + key);
    for (let i = 0; i < padded; i += 16, at += 512, codes += 8, scales++) {
      scatterBlock(codes, halfScale(load<u8>(scales), exponent), i + 16 > padded, at);
    }
  }
}

/** The values of a tile's first keys (a multiple of 16) to float32, as addValuesFloat takes them; 0 where they are not finite. */
export function decodeValues(job: usize, tile: usize, keys: i32, target: usize): void {
  const padded = <usize>load<i32>(job, JOB_DV_PADDED);
  const codes = tile + load<usize>(job, JOB_TILE_V);
  const scales = tile + load<usize>(job, JOB_TILE_V_SCALES);
  const exponents = tile + load<usize>(job, JOB_TILE_V_EXPONENTS);
  if ((load<i32>(tile + load<usize>(job, JOB_TILE_FLAGS)) & TILE_FINE_VALUES) == 0) {
    for (let c: usize = 0; c < padded; c++) {
      let at = target + (c >> 3) * (BLOCK_K * 32) + ((c & 7) << 2);
      const exponent = load<u8>(exponents + c);
      for (let b: usize = 0; b < <usize>keys >> 4; b++, at += 512) {
        const factor = halfScale(load<u8>(scales + c * (BLOCK_K / 16) + b), exponent);
        scatterBlock(codes + c * (BLOCK_K / 2) + b * 8, factor, false, at);
      }
    }
    return;
  }
  const blocks = (padded + 15) >> 4;
  for (let t: usize = 0; t < <usize>keys; t++) {
    const exponent = load<u8>(exponents + t);
    for (let b: usize = 0; b < blocks; b++) {
      const bytes = doubled(codes + (t * blocks + b) * 8);
      const factor = halfScale(load<u8>(scales + t * blocks + b), exponent);
      const at = target + b * (BLOCK_K * 64) + (t << 5);
      v128.store(at, f32x4.mul(quarter(bytes, 0), factor));
      v128.store(at, f32x4.mul(quarter(bytes, 1), factor), 16);
      if (b * 16 + 16 > padded) continue;
      v128.store(at, f32x4.mul(quarter(bytes, 2), factor), BLOCK_K * 32);
      v128.store(at, f32x4.mul(quarter(bytes, 3), factor), BLOCK_K * 32 + 16);
    }
  }
}

/** Output channels become NaN where the row sees a key whose value there is not finite; scores begin with key `base`. */
export function spreadInvalidFp4(job: usize, tile: usize, base: usize, scores: usize, keys: i32, out: usize): void {
  const padded = <usize>load<i32>(job, JOB_DV_PADDED);
  const codes = tile + load<usize>(job, JOB_TILE_V);
  const fine = (load<i32>(tile + load<usize>(job, JOB_TILE_FLAGS)) & TILE_FINE_VALUES) != 0;
  const rowBytes = ((padded + 15) >> 4) * 8;
  for (let j: usize = 0; j < <usize>keys; j++) {
    if (load<f32>(scores + (j << 2)) == -Infinity) continue;
    const key = base + j;
    for (let c: usize = 0; c < padded; c++) {
      const byte = load<u8>(fine ? codes + key * rowBytes + (c >> 1) : codes + c * (BLOCK_K / 2) + (key >> 1));
      if (((byte >> <u8>(((fine ? c : key) & 1) << 2)) & 15) == NAN_CODE) store<f32>(out + (c << 2), NaN);
    }
  }
}

/** Marks a tile that holds a value which is not finite. */
export function markInvalidFp4(job: usize, tile: usize): void {
  const flags = tile + load<usize>(job, JOB_TILE_FLAGS);
  store<i32>(flags, load<i32>(flags) | TILE_NAN_VALUE);
}

/** A row of Q, `padded` float32 and room for 8 more, to the numbers that its codes stand for. */
export function roundQuery(row: usize, padded: i32, most: f32, flags: i32): void {
  if (most == 0) return;
  if (padded & 8) memory.fill(row + (<usize>padded << 2), 0, 32);
  const outer = outerScale(most);
  const factor = f32x4.splat(outer);
  for (let i = 0; i < padded; i += 16, row += 64) {
    for (let j: usize = 0; j < 64; j += 16) v128.store(row + j, f32x4.mul(v128.load(row + j), factor));
    const s = fromE4m3(scaleOf(row, flags));
    const inverse = f32x4.splat(<f32>1 / s);
    const scale = f32x4.splat(s / outer);
    for (let j: usize = 0; j < 64; j += 16) {
      v128.store(row + j, f32x4.mul(toE2m1(f32x4.mul(v128.load(row + j), inverse)), scale));
    }
  }
}

/**
 * A row's weights in one tile, float32 relative to the tile's largest, in two levels: to 2688 times what they are of the row's
 * largest, then in blocks of 16; in units of 2^-12 of that, so that sums of the largest values stay in float32. Returns the sum
 * of what they became.
 *
 * @param worth of a weight of 1, as a share of the row's largest so far
 */
export function roundWeights(p: usize, keys: i32, worth: f32): f32 {
  const factor = f32x4.splat(worth * FP4_MAX);
  let sum = f32x4.splat(0);
  for (let j = 0; j < keys; j += 16, p += 64) {
    const x0 = f32x4.mul(v128.load(p), factor);
    const x1 = f32x4.mul(v128.load(p, 16), factor);
    const x2 = f32x4.mul(v128.load(p, 32), factor);
    const x3 = f32x4.mul(v128.load(p, 48), factor);
    const most = maxOf(f32x4.max(f32x4.max(x0, x1), f32x4.max(x2, x3)));
    const s = fromE4m3(max(1, toE4m3(most * SIXTH)));
    const scale = f32x4.splat(s * WEIGHT_UNIT);
    const inverse = f32x4.splat(<f32>1 / s);
    const y0 = f32x4.mul(toE2m1(f32x4.mul(x0, inverse)), scale);
    const y1 = f32x4.mul(toE2m1(f32x4.mul(x1, inverse)), scale);
    const y2 = f32x4.mul(toE2m1(f32x4.mul(x2, inverse)), scale);
    const y3 = f32x4.mul(toE2m1(f32x4.mul(x3, inverse)), scale);
    v128.store(p, y0);
    v128.store(p, y1, 16);
    v128.store(p, y2, 32);
    v128.store(p, y3, 48);
    sum = f32x4.add(sum, f32x4.add(f32x4.add(y0, y1), f32x4.add(y2, y3)));
  }
  return sumOf(sum);
}
