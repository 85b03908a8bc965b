/**
 * The two matrix products for a single row of Q, as decoding has it: columns of several groups at a time instead of several
 * rows, so that a tile is read once and nothing is computed for rows that are not there.
 */
import { BLOCK_K } from '../job.ts';
import { madd } from './arithmetic.ts';
import { dot, OneStep, onesOf, TwoSteps, twoSteps } from './dot.ts';
import { storeScores } from './products.ts';

/** Bytes of a step of eight columns. */
const STEP_BYTES: usize = 32;

/** One row as `scoreRows` has four: `keys` is a multiple of 16. */
export function scoreRow(
  q: usize, tile: usize, steps: i32, digits: i32, keys: i32, scales: usize, sums: usize, zeros: usize, scores: usize,
): void {
  if (twoSteps()) scoreRowBy<TwoSteps>(q, tile, steps, digits, keys, scales, sums, zeros, scores);
  else scoreRowBy<OneStep>(q, tile, steps, digits, keys, scales, sums, zeros, scores);
}

function scoreRowBy<Steps>(
  q: usize, tile: usize, steps: i32, digits: i32, keys: i32, scales: usize, sums: usize, zeros: usize, scores: usize,
): void {
  const ones = onesOf(steps);
  const groupBytes = <usize>steps * STEP_BYTES;
  let group = tile;
  for (let key = 0; key < keys; key += 16) {
    let c0 = i32x4.splat(0);
    let c1 = c0;
    let c2 = c0;
    let c3 = c0;
    let at = q;
    for (let digit = 0; digit < digits; digit++) {
      if (digit > 0) {
        c0 = i32x4.shl(c0, 7);
        c1 = i32x4.shl(c1, 7);
        c2 = i32x4.shl(c2, 7);
        c3 = i32x4.shl(c3, 7);
      }
      let b = group;
      let n = steps;
      do {
        const a = v128.load32_splat(at);
        const other = b + groupBytes;
        c0 = dot<Steps>(v128.load(b), a, c0, ones);
        c1 = dot<Steps>(v128.load(b, 16), a, c1, ones);
        c2 = dot<Steps>(v128.load(other), a, c2, ones);
        c3 = dot<Steps>(v128.load(other, 16), a, c3, ones);
        at += 4;
        b += STEP_BYTES;
      } while (--n);
    }
    storeScores(
      c0, c1, v128.load(scales), v128.load(scales, 16), v128.load(sums), v128.load(sums, 16), zeros, scores,
    );
    storeScores(
      c2, c3, v128.load(scales, 32), v128.load(scales, 48), v128.load(sums, 32), v128.load(sums, 48), zeros, scores + 32,
    );
    group += 2 * groupBytes;
    scales += 64;
    sums += 64;
    scores += 64;
  }
}

/** One row as `scoreRowsFloat` has four: `keys` is a multiple of 16. */
export function scoreRowFloat(q: usize, tile: usize, channels: i32, keys: i32, scales: usize, scores: usize): void {
  const groupBytes = <usize>channels * STEP_BYTES;
  let group = tile;
  for (let key = 0; key < keys; key += 16) {
    let c0 = f32x4.splat(0);
    let c1 = c0;
    let c2 = c0;
    let c3 = c0;
    let at = q;
    let b = group;
    let n = channels;
    do {
      const a = v128.load32_splat(at);
      const other = b + groupBytes;
      c0 = madd(v128.load(b), a, c0);
      c1 = madd(v128.load(b, 16), a, c1);
      c2 = madd(v128.load(other), a, c2);
      c3 = madd(v128.load(other, 16), a, c3);
      at += 4;
      b += STEP_BYTES;
    } while (--n);
    v128.store(scores, f32x4.mul(c0, v128.load(scales)));
    v128.store(scores, f32x4.mul(c1, v128.load(scales, 16)), 16);
    v128.store(scores, f32x4.mul(c2, v128.load(scales, 32)), 32);
    v128.store(scores, f32x4.mul(c3, v128.load(scales, 48)), 48);
    group += 2 * groupBytes;
    scales += 64;
    scores += 64;
  }
}

/** One row as `addValuesInteger` has four. The last eight channels may come twice: they are only stored once. */
export function addValuesRow(
  p: usize, values: usize, steps: i32, channels: i32, scales: usize, weight: usize, out: usize,
): void {
  if (twoSteps()) addValuesRowBy<TwoSteps>(p, values, steps, channels, scales, weight, out);
  else addValuesRowBy<OneStep>(p, values, steps, channels, scales, weight, out);
}

function addValuesRowBy<Steps>(
  p: usize, values: usize, steps: i32, channels: i32, scales: usize, weight: usize, out: usize,
): void {
  const ones = onesOf(steps);
  const groupBytes: usize = (BLOCK_K / (ASC_FEATURE_RELAXED_SIMD ? 4 : 2)) * STEP_BYTES;
  const w = v128.load32_splat(weight);
  for (let channel = 0; channel < channels; channel += 16) {
    const two = channel + 8 < channels;
    const second = two ? groupBytes : <usize>0;
    let c0 = i32x4.splat(0);
    let c1 = c0;
    let c2 = c0;
    let c3 = c0;
    let at = p;
    let b = values;
    let n = steps;
    do {
      const a = v128.load32_splat(at);
      const other = b + second;
      c0 = dot<Steps>(v128.load(b), a, c0, ones);
      c1 = dot<Steps>(v128.load(b, 16), a, c1, ones);
      c2 = dot<Steps>(v128.load(other), a, c2, ones);
      c3 = dot<Steps>(v128.load(other, 16), a, c3, ones);
      at += 4;
      b += STEP_BYTES;
    } while (--n);
    v128.store(out, madd(f32x4.convert_i32x4_s(c0), f32x4.mul(v128.load(scales), w), v128.load(out)));
    v128.store(out, madd(f32x4.convert_i32x4_s(c1), f32x4.mul(v128.load(scales, 16), w), v128.load(out, 16)), 16);
    if (two) {
      v128.store(out, madd(f32x4.convert_i32x4_s(c2), f32x4.mul(v128.load(scales, 32), w), v128.load(out, 32)), 32);
      v128.store(out, madd(f32x4.convert_i32x4_s(c3), f32x4.mul(v128.load(scales, 48), w), v128.load(out, 48)), 48);
    }
    out += 64;
    scales += 64;
    values += 2 * groupBytes;
  }
}

/** One row as `addValuesFloat` has four. The last eight channels may come twice: they are only stored once. */
export function addValuesRowFloat(
  p: usize, values: usize, keys: i32, channels: i32, weight: usize, out: usize,
): void {
  const groupBytes: usize = <usize>BLOCK_K * STEP_BYTES;
  const w = v128.load32_splat(weight);
  for (let channel = 0; channel < channels; channel += 16) {
    const two = channel + 8 < channels;
    const second = two ? groupBytes : <usize>0;
    let c0 = f32x4.splat(0);
    let c1 = c0;
    let c2 = c0;
    let c3 = c0;
    let at = p;
    let b = values;
    let n = keys;
    do {
      const a = v128.load32_splat(at);
      const other = b + second;
      c0 = madd(v128.load(b), a, c0);
      c1 = madd(v128.load(b, 16), a, c1);
      c2 = madd(v128.load(other), a, c2);
      c3 = madd(v128.load(other, 16), a, c3);
      at += 4;
      b += STEP_BYTES;
    } while (--n);
    v128.store(out, madd(c0, w, v128.load(out)));
    v128.store(out, madd(c1, w, v128.load(out, 16)), 16);
    if (two) {
      v128.store(out, madd(c2, w, v128.load(out, 32)), 32);
      v128.store(out, madd(c3, w, v128.load(out, 48)), 48);
    }
    out += 64;
    values += 2 * groupBytes;
  }
}
