/**
 * The two matrix products, four rows at a time against eight columns: eight accumulators, which is what keeps the dot
 * product instruction busy and still fits the sixteen vector registers of x86-64.
 */
import {
  BLOCK_K,
} from '../job.ts';
import { dot, OneStep, onesOf, TwoSteps, twoSteps } from './dot.ts';
import { madd } from './arithmetic.ts';
import { FLOAT_Q_ROW_BYTES, P_ROW_BYTES, Q_ROW_BYTES } from './scratch.ts';

/**
 * One row's integers of eight keys to scores. In the relaxed build the zero's share is taken off: in float32 by a multiply-add, since an
 * integer multiplication costs two. Sums below 2^24 stay exact.
 */
// @ts-ignore: decorator
@inline
export function storeScores(
  c0: v128, c1: v128, s0: v128, s1: v128, sum0: v128, sum1: v128, zero: usize, scores: usize,
): void {
  let x0 = f32x4.convert_i32x4_s(c0);
  let x1 = f32x4.convert_i32x4_s(c1);
  if (ASC_FEATURE_RELAXED_SIMD) {
    const z = v128.load32_splat(zero);
    x0 = madd(sum0, z, x0);
    x1 = madd(sum1, z, x1);
  }
  v128.store(scores, f32x4.mul(x0, s0));
  v128.store(scores, f32x4.mul(x1, s1), 16);
}

/**
 * Scores of four rows of Q against `keys` keys (a multiple of 8) of a tile: `q . k * kScale` to `scores`
 * `[4, BLOCK_K]`. Their largest are found later: four more vectors here would not fit the registers.
 *
 * @param sums of each key's integers, negative, and `zeros` of each row: the integer that stands for 0; float32 (relaxed build only)
 * @param digits 2: rows of Q hold their high digits, then their low ones (relaxed build only)
 */
export function scoreRows(
  q: usize, tile: usize, steps: i32, digits: i32, keys: i32, scales: usize, sums: usize,
  zeros: usize, scores: usize,
): void {
  if (twoSteps()) scoreRowsBy<TwoSteps>(q, tile, steps, digits, keys, scales, sums, zeros, scores);
  else scoreRowsBy<OneStep>(q, tile, steps, digits, keys, scales, sums, zeros, scores);
}

function scoreRowsBy<Steps>(
  q: usize, tile: usize, steps: i32, digits: i32, keys: i32, scales: usize, sums: usize,
  zeros: usize, scores: usize,
): void {
  const ones = onesOf(steps);
  let b = tile;
  for (let key = 0; key < keys; key += 8) {
    let c00 = i32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = q;
    let n = steps;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      let a = v128.load32_splat(a0);
      c00 = dot<Steps>(b0, a, c00, ones);
      c01 = dot<Steps>(b1, a, c01, ones);
      a = v128.load32_splat(a0, Q_ROW_BYTES);
      c10 = dot<Steps>(b0, a, c10, ones);
      c11 = dot<Steps>(b1, a, c11, ones);
      a = v128.load32_splat(a0, 2 * Q_ROW_BYTES);
      c20 = dot<Steps>(b0, a, c20, ones);
      c21 = dot<Steps>(b1, a, c21, ones);
      a = v128.load32_splat(a0, 3 * Q_ROW_BYTES);
      c30 = dot<Steps>(b0, a, c30, ones);
      c31 = dot<Steps>(b1, a, c31, ones);
      a0 += 4;
      b += 32;
    } while (--n);
    if (ASC_FEATURE_RELAXED_SIMD) {
      if (digits == 2) {
        c00 = i32x4.shl(c00, 7);
        c01 = i32x4.shl(c01, 7);
        c10 = i32x4.shl(c10, 7);
        c11 = i32x4.shl(c11, 7);
        c20 = i32x4.shl(c20, 7);
        c21 = i32x4.shl(c21, 7);
        c30 = i32x4.shl(c30, 7);
        c31 = i32x4.shl(c31, 7);
        b -= <usize>steps * 32;
        n = steps;
        do {
          const b0 = v128.load(b);
          const b1 = v128.load(b, 16);
          let a = v128.load32_splat(a0);
          c00 = dot<Steps>(b0, a, c00, ones);
          c01 = dot<Steps>(b1, a, c01, ones);
          a = v128.load32_splat(a0, Q_ROW_BYTES);
          c10 = dot<Steps>(b0, a, c10, ones);
          c11 = dot<Steps>(b1, a, c11, ones);
          a = v128.load32_splat(a0, 2 * Q_ROW_BYTES);
          c20 = dot<Steps>(b0, a, c20, ones);
          c21 = dot<Steps>(b1, a, c21, ones);
          a = v128.load32_splat(a0, 3 * Q_ROW_BYTES);
          c30 = dot<Steps>(b0, a, c30, ones);
          c31 = dot<Steps>(b1, a, c31, ones);
          a0 += 4;
          b += 32;
        } while (--n);
      }
    }
    const s0 = v128.load(scales);
    const s1 = v128.load(scales, 16);
    const sum0 = v128.load(sums);
    const sum1 = v128.load(sums, 16);
    storeScores(c00, c01, s0, s1, sum0, sum1, zeros, scores);
    storeScores(c10, c11, s0, s1, sum0, sum1, zeros + 4, scores + BLOCK_K * 4);
    storeScores(c20, c21, s0, s1, sum0, sum1, zeros + 8, scores + BLOCK_K * 8);
    storeScores(c30, c31, s0, s1, sum0, sum1, zeros + 12, scores + BLOCK_K * 12);
    scales += 32;
    sums += 32;
    scores += 32;
  }
}

/** Scores of four rows of Q against `keys` keys (a multiple of 8) of a tile, all float32, as {@link scoreRows}. */
export function scoreRowsFloat(q: usize, tile: usize, channels: i32, keys: i32, scales: usize, scores: usize): void {
  let b = tile;
  for (let key = 0; key < keys; key += 8) {
    let c00 = f32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = q;
    let n = channels;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      let a = v128.load32_splat(a0);
      c00 = madd(b0, a, c00);
      c01 = madd(b1, a, c01);
      a = v128.load32_splat(a0, FLOAT_Q_ROW_BYTES);
      c10 = madd(b0, a, c10);
      c11 = madd(b1, a, c11);
      a = v128.load32_splat(a0, 2 * FLOAT_Q_ROW_BYTES);
      c20 = madd(b0, a, c20);
      c21 = madd(b1, a, c21);
      a = v128.load32_splat(a0, 3 * FLOAT_Q_ROW_BYTES);
      c30 = madd(b0, a, c30);
      c31 = madd(b1, a, c31);
      a0 += 4;
      b += 32;
    } while (--n);
    // 1, or NaN for a key that holds one.
    const s0 = v128.load(scales);
    const s1 = v128.load(scales, 16);
    v128.store(scores, f32x4.mul(c00, s0));
    v128.store(scores, f32x4.mul(c01, s1), 16);
    v128.store(scores, f32x4.mul(c10, s0), BLOCK_K * 4);
    v128.store(scores, f32x4.mul(c11, s1), BLOCK_K * 4 + 16);
    v128.store(scores, f32x4.mul(c20, s0), BLOCK_K * 8);
    v128.store(scores, f32x4.mul(c21, s1), BLOCK_K * 8 + 16);
    v128.store(scores, f32x4.mul(c30, s0), BLOCK_K * 12);
    v128.store(scores, f32x4.mul(c31, s1), BLOCK_K * 12 + 16);
    scales += 32;
    scores += 32;
  }
}

/**
 * Adds `x0 * w0` to four float32 and `x1 * w1` to the four behind them. Both loads come before both stores: V8 makes one
 * operation of 256 bits of two that lie beside each other only where no store stands between them.
 */
// @ts-ignore: decorator
@inline
function addTo(at: usize, x0: v128, x1: v128, w0: v128, w1: v128): void {
  const o0 = v128.load(at);
  const o1 = v128.load(at, 16);
  v128.store(at, madd(x0, w0, o0));
  v128.store(at, madd(x1, w1, o1), 16);
}

/**
 * `out += weight * vScale * (P . V)` in integers, for four rows.
 *
 * @param steps 4-byte steps of P that count
 * @param weights four float32: what a unit of P is worth
 */
export function addValuesInteger(
  p: usize, values: usize, steps: i32, channels: i32, scales: usize, weights: usize, out: usize,
  outBytes: usize,
): void {
  if (twoSteps()) addValuesBy<TwoSteps>(p, values, steps, channels, scales, weights, out, outBytes);
  else addValuesBy<OneStep>(p, values, steps, channels, scales, weights, out, outBytes);
}

function addValuesBy<Steps>(
  p: usize, values: usize, steps: i32, channels: i32, scales: usize, weights: usize, out: usize,
  outBytes: usize,
): void {
  const ones = onesOf(steps);
  for (let channel = 0; channel < channels; channel += 8) {
    let c00 = i32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = p;
    let b = values;
    let n = steps;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      let a = v128.load32_splat(a0);
      c00 = dot<Steps>(b0, a, c00, ones);
      c01 = dot<Steps>(b1, a, c01, ones);
      a = v128.load32_splat(a0, P_ROW_BYTES);
      c10 = dot<Steps>(b0, a, c10, ones);
      c11 = dot<Steps>(b1, a, c11, ones);
      a = v128.load32_splat(a0, 2 * P_ROW_BYTES);
      c20 = dot<Steps>(b0, a, c20, ones);
      c21 = dot<Steps>(b1, a, c21, ones);
      a = v128.load32_splat(a0, 3 * P_ROW_BYTES);
      c30 = dot<Steps>(b0, a, c30, ones);
      c31 = dot<Steps>(b1, a, c31, ones);
      a0 += 4;
      b += 32;
    } while (--n);
    const s0 = v128.load(scales);
    const s1 = v128.load(scales, 16);
    let o = out;
    let w = v128.load32_splat(weights);
    addTo(o, f32x4.convert_i32x4_s(c00), f32x4.convert_i32x4_s(c01), f32x4.mul(s0, w), f32x4.mul(s1, w));
    o += outBytes;
    w = v128.load32_splat(weights, 4);
    addTo(o, f32x4.convert_i32x4_s(c10), f32x4.convert_i32x4_s(c11), f32x4.mul(s0, w), f32x4.mul(s1, w));
    o += outBytes;
    w = v128.load32_splat(weights, 8);
    addTo(o, f32x4.convert_i32x4_s(c20), f32x4.convert_i32x4_s(c21), f32x4.mul(s0, w), f32x4.mul(s1, w));
    o += outBytes;
    w = v128.load32_splat(weights, 12);
    addTo(o, f32x4.convert_i32x4_s(c30), f32x4.convert_i32x4_s(c31), f32x4.mul(s0, w), f32x4.mul(s1, w));
    out += 32;
    scales += 32;
    values += (BLOCK_K / (ASC_FEATURE_RELAXED_SIMD ? 4 : 2)) * 32;
  }
}

/** `out += weight * (P . V)` in float32, for four rows over `keys` keys. */
export function addValuesFloat(
  p: usize, values: usize, keys: i32, channels: i32, weights: usize, out: usize, outBytes: usize,
): void {
  for (let channel = 0; channel < channels; channel += 8) {
    let c00 = f32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = p;
    let b = values;
    let n = keys;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      let a = v128.load32_splat(a0);
      c00 = madd(b0, a, c00);
      c01 = madd(b1, a, c01);
      a = v128.load32_splat(a0, P_ROW_BYTES);
      c10 = madd(b0, a, c10);
      c11 = madd(b1, a, c11);
      a = v128.load32_splat(a0, 2 * P_ROW_BYTES);
      c20 = madd(b0, a, c20);
      c21 = madd(b1, a, c21);
      a = v128.load32_splat(a0, 3 * P_ROW_BYTES);
      c30 = madd(b0, a, c30);
      c31 = madd(b1, a, c31);
      a0 += 4;
      b += 32;
    } while (--n);
    let o = out;
    let w = v128.load32_splat(weights);
    addTo(o, c00, c01, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 4);
    addTo(o, c10, c11, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 8);
    addTo(o, c20, c21, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 12);
    addTo(o, c30, c31, w, w);
    out += 32;
    values += BLOCK_K * 32;
  }
}

/** Four of a key's values at `at`, as float32 before their scale. */
// @ts-ignore: decorator
@inline
function fineValues(at: usize): v128 {
  if (ASC_FEATURE_RELAXED_SIMD) {
    return f32x4.convert_i32x4_s(i32x4.extend_low_i16x8_s(i16x8.extend_low_i8x16_s(v128.load32_zero(at))));
  }
  return f32x4.convert_i32x4_s(v128.load16x4_s(at));
}

/**
 * `out += weight * (P . V)` for four rows of P in float32, over `keys` keys whose values have a scale for each 8 channels.
 *
 * @param values integers `[keys, channels]`
 * @param exponents of the scales `[keys, channels / 8]`, one byte each
 */
export function addValuesFine(
  p: usize, values: usize, exponents: usize, keys: i32, channels: i32, weights: usize, out: usize, outBytes: usize,
): void {
  const bytes: usize = ASC_FEATURE_RELAXED_SIMD ? 1 : 2;
  const rowBytes = <usize>channels * bytes;
  const groups = <usize>channels >> 3;
  for (let channel = 0; channel < channels; channel += 8, exponents++, out += 32) {
    let c00 = f32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = p;
    let b = values + <usize>channel * bytes;
    let e = exponents;
    for (let n = keys; n > 0; n--) {
      const scale = i32x4.splat(<i32>load<u8>(e) << 23);
      const b0 = f32x4.mul(fineValues(b), scale);
      const b1 = f32x4.mul(fineValues(b + 4 * bytes), scale);
      let a = v128.load32_splat(a0);
      c00 = madd(b0, a, c00);
      c01 = madd(b1, a, c01);
      a = v128.load32_splat(a0, P_ROW_BYTES);
      c10 = madd(b0, a, c10);
      c11 = madd(b1, a, c11);
      a = v128.load32_splat(a0, 2 * P_ROW_BYTES);
      c20 = madd(b0, a, c20);
      c21 = madd(b1, a, c21);
      a = v128.load32_splat(a0, 3 * P_ROW_BYTES);
      c30 = madd(b0, a, c30);
      c31 = madd(b1, a, c31);
      a0 += 4;
      b += rowBytes;
      e += groups;
    }
    let o = out;
    let w = v128.load32_splat(weights);
    addTo(o, c00, c01, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 4);
    addTo(o, c10, c11, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 8);
    addTo(o, c20, c21, w, w);
    o += outBytes;
    w = v128.load32_splat(weights, 12);
    addTo(o, c30, c31, w, w);
  }
}

/**
 * `out += P^T . X` in float32: for `keys` keys (a multiple of 4), over `rows` rows of P, P_ROW_BYTES apart, and of X,
 * FLOAT_Q_ROW_BYTES apart; rows of `out` have `channels` (a multiple of 8) without gaps.
 */
export function addTransposed(p: usize, x: usize, rows: i32, keys: i32, channels: i32, out: usize): void {
  const outBytes = <usize>channels << 2;
  for (let key = 0; key < keys; key += 4, p += 16) {
    let b = x;
    for (let channel = 0; channel < channels; channel += 8, b += 32) {
      let c00 = f32x4.splat(0);
      let c01 = c00;
      let c10 = c00;
      let c11 = c00;
      let c20 = c00;
      let c21 = c00;
      let c30 = c00;
      let c31 = c00;
      let a0 = p;
      let b0 = b;
      let n = rows;
      do {
        const x0 = v128.load(b0);
        const x1 = v128.load(b0, 16);
        let a = v128.load32_splat(a0);
        c00 = madd(x0, a, c00);
        c01 = madd(x1, a, c01);
        a = v128.load32_splat(a0, 4);
        c10 = madd(x0, a, c10);
        c11 = madd(x1, a, c11);
        a = v128.load32_splat(a0, 8);
        c20 = madd(x0, a, c20);
        c21 = madd(x1, a, c21);
        a = v128.load32_splat(a0, 12);
        c30 = madd(x0, a, c30);
        c31 = madd(x1, a, c31);
        a0 += P_ROW_BYTES;
        b0 += FLOAT_Q_ROW_BYTES;
      } while (--n);
      let o = out + (<usize>channel << 2);
      v128.store(o, f32x4.add(c00, v128.load(o)));
      v128.store(o, f32x4.add(c01, v128.load(o, 16)), 16);
      o += outBytes;
      v128.store(o, f32x4.add(c10, v128.load(o)));
      v128.store(o, f32x4.add(c11, v128.load(o, 16)), 16);
      o += outBytes;
      v128.store(o, f32x4.add(c20, v128.load(o)));
      v128.store(o, f32x4.add(c21, v128.load(o, 16)), 16);
      o += outBytes;
      v128.store(o, f32x4.add(c30, v128.load(o)));
      v128.store(o, f32x4.add(c31, v128.load(o, 16)), 16);
    }
    out += outBytes << 2;
  }
}

/** Adds integers less their zero, times scale and unit, to 8 float32. */
// @ts-ignore: decorator
@inline
function addScaled(o: usize, c0: v128, c1: v128, zeros: usize, scales: usize, unit: usize, sum: usize): void {
  let x0 = f32x4.convert_i32x4_s(c0);
  let x1 = f32x4.convert_i32x4_s(c1);
  if (ASC_FEATURE_RELAXED_SIMD) {
    // Exact: integers below 2^24.
    const s = v128.load32_splat(sum);
    x0 = madd(v128.load(zeros), s, x0);
    x1 = madd(v128.load(zeros, 16), s, x1);
  }
  const w = v128.load32_splat(unit);
  addTo(o, f32x4.mul(x0, v128.load(scales)), f32x4.mul(x1, v128.load(scales, 16)), w, w);
}

/**
 * `out += A . B` in integers for four rows of the result; see gradient-codes.ts.
 *
 * @param a signed, 4 bytes of each row in a step; `stride` bytes from step to step
 * @param b `[channels / 8, blockBytes]`, 32 bytes a step
 * @param scales of channels, then minus the integers that stand for 0
 * @param units of the four rows, and `sums` of their integers
 */
export function addGradients(
  a: usize, stride: usize, b: usize, blockBytes: usize, steps: i32, channels: i32, scales: usize, units: usize,
  sums: usize, out: usize, outBytes: usize,
): void {
  if (twoSteps()) addGradientsBy<TwoSteps>(a, stride, b, blockBytes, steps, channels, scales, units, sums, out, outBytes);
  else addGradientsBy<OneStep>(a, stride, b, blockBytes, steps, channels, scales, units, sums, out, outBytes);
}

function addGradientsBy<Steps>(
  a: usize, stride: usize, b: usize, blockBytes: usize, steps: i32, channels: i32, scales: usize, units: usize,
  sums: usize, out: usize, outBytes: usize,
): void {
  const ones = onesOf(steps);
  let zeros = scales + (<usize>channels << 2);
  for (let channel = 0; channel < channels; channel += 8) {
    let c00 = i32x4.splat(0);
    let c01 = c00;
    let c10 = c00;
    let c11 = c00;
    let c20 = c00;
    let c21 = c00;
    let c30 = c00;
    let c31 = c00;
    let a0 = a;
    let b0 = b;
    let n = steps;
    do {
      const x0 = v128.load(b0);
      const x1 = v128.load(b0, 16);
      let y = v128.load32_splat(a0);
      c00 = dot<Steps>(y, x0, c00, ones);
      c01 = dot<Steps>(y, x1, c01, ones);
      y = v128.load32_splat(a0, 4);
      c10 = dot<Steps>(y, x0, c10, ones);
      c11 = dot<Steps>(y, x1, c11, ones);
      y = v128.load32_splat(a0, 8);
      c20 = dot<Steps>(y, x0, c20, ones);
      c21 = dot<Steps>(y, x1, c21, ones);
      y = v128.load32_splat(a0, 12);
      c30 = dot<Steps>(y, x0, c30, ones);
      c31 = dot<Steps>(y, x1, c31, ones);
      a0 += stride;
      b0 += 32;
    } while (--n);
    let o = out;
    addScaled(o, c00, c01, zeros, scales, units, sums);
    o += outBytes;
    addScaled(o, c10, c11, zeros, scales, units + 4, sums + 4);
    o += outBytes;
    addScaled(o, c20, c21, zeros, scales, units + 8, sums + 8);
    o += outBytes;
    addScaled(o, c30, c31, zeros, scales, units + 12, sums + 12);
    out += 32;
    scales += 32;
    zeros += 32;
    b += blockBytes;
  }
}
