/**
 * Gradients of attention (FlashAttention-2, arXiv 2307.08691, algorithm 2; SageBwd, arXiv 2603.02170): scores from the
 * integers of the forward pass, everything after them in float32.
 *
 * A unit is some rows of one head. It has sums of its own of the gradients of keys and values, so that no two threads add to
 * one number; storing them adds these up in a fixed order, and the result depends on no thread.
 */
import {
  JOB_D,
  JOB_DTYPE,
  JOB_DV,
  JOB_DV_PADDED,
  JOB_D_KEY,
  JOB_D_KEY_HEAD_STRIDE,
  JOB_D_KEY_TOKEN_STRIDE,
  JOB_D_MASK,
  JOB_D_MASK_KEYS,
  JOB_D_MASK_ROWS,
  JOB_D_OUT,
  JOB_D_OUT_HEAD_STRIDE,
  JOB_D_OUT_TOKEN_STRIDE,
  JOB_D_QUERY,
  JOB_D_QUERY_HEAD_STRIDE,
  JOB_D_QUERY_TOKEN_STRIDE,
  JOB_D_VALUE,
  JOB_D_VALUE_HEAD_STRIDE,
  JOB_D_VALUE_TOKEN_STRIDE,
  JOB_FLAGS,
  JOB_GRADIENT_DTYPE,
  JOB_GRADIENT_SUMS,
  JOB_GRADIENT_TILES,
  JOB_K,
  JOB_KV_HEADS,
  JOB_K_HEAD_STRIDE,
  JOB_K_STEPS,
  JOB_K_TOKEN_STRIDE,
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
  JOB_V,
  JOB_V_HEAD_STRIDE,
  JOB_V_TOKEN_STRIDE,
  SEQUENCE_BYTES,
  SEQUENCE_CHUNKS,
  SEQUENCE_CHUNK_ROWS,
  SEQUENCE_D_KEY,
  SEQUENCE_D_OUT,
  SEQUENCE_D_QUERY,
  SEQUENCE_D_VALUE,
  SEQUENCE_FIRST_SUM,
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
  SEQUENCE_V,
  UNIT_HEAD,
  UNIT_ROW,
  UNIT_SEQUENCE,
} from '../generated/fields.ts';
import { BLOCK_K, BLOCK_Q, DTYPE_BOOL, FLAG_ACCURATE, FLAG_INTEGER_GRADIENTS, FLAG_PART_OF_KEYS, TILE_PLAIN_KEYS } from '../job.ts';
import { exp2, exp2FineHere, larger, madd, sumOf, tanh4 } from './arithmetic.ts';
import { addMask, bounded, dotFloat, exclude, prepareQueries } from './attend.ts';
import { elementShift, load4, loadRow, storeRow } from './elements.ts';
import { quantizeRight, roundColumns, roundRows, rowsOfStep, storeGradientConstants, unitBlockBytes } from './gradient-codes.ts';
import { prepareUnit, rowMaximum } from './prepare.ts';
import { addGradients, addTransposed, addValuesFloat, scoreRows, scoreRowsFloat } from './products.ts';
import {
  FLOAT_Q_ROW_BYTES,
  P_ROW_BYTES,
  Q_ROW_BYTES,
  SCRATCH_DELTAS,
  SCRATCH_D_OUT,
  SCRATCH_D_OUT_CODES,
  SCRATCH_D_OUT_SCALES,
  SCRATCH_D_OUT_SIZES,
  SCRATCH_D_P,
  SCRATCH_D_S,
  SCRATCH_FACTORS,
  SCRATCH_FLOAT_Q,
  SCRATCH_GRADIENT_P,
  SCRATCH_GRADIENT_ROW,
  SCRATCH_INVALID_ROWS,
  SCRATCH_LEFT,
  SCRATCH_LEFT_SUMS,
  SCRATCH_LEFT_UNITS,
  SCRATCH_LSES,
  SCRATCH_ONES,
  SCRATCH_OUT,
  SCRATCH_Q,
  SCRATCH_Q_CODES,
  SCRATCH_Q_SCALES,
  SCRATCH_Q_SIZES,
  SCRATCH_ROW,
  SCRATCH_ROW_BIASES,
  SCRATCH_ROW_SCALES,
  SCRATCH_ROW_ZEROS,
  SCRATCH_SCORES,
  SCRATCH_VALUES,
} from './scratch.ts';

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
/** Weights below this power of two are 0, so that what a mask pushes down has none. */
const LEAST_EXPONENT: f32 = -125;
/** An LSE beyond it, in base 2, has lost too much to rounding: a mask that pushes all of a row down. The row's softmax is made anew. */
const LARGEST_LSE: f32 = 2048;

/** Where a tile of keys in integers has its scales and the sizes of its keys. */
// @ts-ignore: decorator
@inline
function keyScalesAt(dPadded: i32): usize {
  return <usize>(dPadded >> 3) * keyBlockBytes();
}

/** Bytes of 8 channels of a tile's keys in integers. */
// @ts-ignore: decorator
@inline
function keyBlockBytes(): usize {
  return <usize>((BLOCK_K / rowsOfStep()) * 32);
}

/** Bytes of a tile's values for dP and its keys for dQ; see prepareBackwardUnit. */
// @ts-ignore: decorator
@inline
function gradientTileBytes(dPadded: i32, dvPadded: i32): usize {
  return <usize>(BLOCK_K * 4) * <usize>(dPadded + dvPadded + 1);
}

/**
 * Quantizes keys as for attention, and lays out values and keys in float32 beside them: values with 8 keys in a row of each
 * channel, then 1 for each key, or NaN where its value has one, and keys less their mean with 8 channels in a row. Keys of which integers
 * are wanted are those, as gradient-codes.ts has them, in a part of the same room.
 */
export function prepareBackwardUnit(job: usize, unit: usize, scratch: usize): void {
  prepareUnit(job, unit, scratch);
  const index = load<i32>(unit, UNIT_SEQUENCE);
  const head = load<i32>(unit, UNIT_HEAD);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>index * SEQUENCE_BYTES;
  const keyLength = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const d = load<i32>(job, JOB_D);
  const dv = load<i32>(job, JOB_DV);
  const dPadded = (d + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const kvHeads = load<i32>(job, JOB_KV_HEADS);
  let k =
    load<usize>(job, JOB_K) +
    ((load<u32>(sequence, SEQUENCE_K) + <u32>head * load<u32>(job, JOB_K_HEAD_STRIDE)) << shift);
  let v =
    load<usize>(job, JOB_V) +
    ((load<u32>(sequence, SEQUENCE_V) + <u32>head * load<u32>(job, JOB_V_HEAD_STRIDE)) << shift);
  const kStride = <usize>(load<u32>(job, JOB_K_TOKEN_STRIDE) << shift);
  const vStride = <usize>(load<u32>(job, JOB_V_TOKEN_STRIDE) << shift);
  const mean =
    load<usize>(job, JOB_MEANS) + ((<usize>(index * kvHeads + head) * <usize>(dPadded + dvPadded)) << 2);
  // A cap bends the scores, and other keys may be elsewhere: rows of dS do not add up to 0 then, and the mean counts.
  const smoothed = load<f32>(job, JOB_SOFTCAP) == 0 && !(load<i32>(job, JOB_FLAGS) & FLAG_PART_OF_KEYS);
  const integers = (load<i32>(job, JOB_FLAGS) & FLAG_INTEGER_GRADIENTS) != 0;
  if (integers) storeGradientConstants(scratch);
  const row = scratch + SCRATCH_ROW;
  const rowBytes = <usize>dPadded << 2;
  const bytes = gradientTileBytes(dPadded, dvPadded);
  let tile =
    load<usize>(job, JOB_GRADIENT_TILES) +
    (<usize>load<i32>(sequence, SEQUENCE_FIRST_TILE) * <usize>kvHeads +
      <usize>head * <usize>load<i32>(sequence, SEQUENCE_TILES)) *
      bytes;
  for (let start = 0; start < keyLength; start += BLOCK_K, tile += bytes) {
    memory.fill(tile, 0, bytes);
    const ones = tile + <usize>(BLOCK_K * 4) * <usize>dvPadded;
    const keys = ones + BLOCK_K * 4;
    const count = min(BLOCK_K, keyLength - start);
    if (integers) memory.fill(scratch + SCRATCH_VALUES, 0, BLOCK_K * rowBytes);
    for (let t = 0; t < count; t++, k += kStride, v += vStride) {
      loadRow(v, dtype, dv, row, dvPadded);
      const most = rowMaximum(row, dvPadded);
      store<f32>(ones + (<usize>t << 2), most == most ? <f32>1 : <f32>NaN);
      if (most == most) {
        const at = tile + <usize>(t >> 3) * (<usize>dvPadded << 5) + (<usize>(t & 7) << 2);
        for (let c: usize = 0; c < <usize>dvPadded; c++) store<f32>(at + (c << 5), load<f32>(row + (c << 2)));
      }
      loadRow(k, dtype, d, row, dPadded);
      const largest = rowMaximum(row, dPadded);
      // A row that sees an invalid key is invalid as a whole by its scores.
      if (largest != largest) continue;
      for (let c: usize = 0; c < <usize>dPadded << 2; c += 16) {
        let x = v128.load(row + c);
        if (smoothed) x = f32x4.sub(x, v128.load(mean + c));
        if (integers) v128.store(scratch + SCRATCH_VALUES + <usize>t * rowBytes + c, x);
        else v128.store(keys + (c >> 5) * (BLOCK_K * 32) + (<usize>t << 5) + (c & 16), x);
      }
    }
    if (integers) {
      const scales = keys + keyScalesAt(dPadded);
      quantizeRight(
        scratch + SCRATCH_VALUES, rowBytes, count, dPadded, keys, keyBlockBytes(), scales, scales + 2 * rowBytes, scratch,
      );
    }
  }
}

/**
 * One row's scores of a tile to base 2, with cap, mask and band; what the row does not see is -Infinity.
 *
 * @param keys a multiple of 16; `from` to `to` of them are in the row's band
 * @param shift what smoothing took from the scores
 * @param slopes where the cap's derivative goes
 */
function finishRow(
  scores: usize, keys: i32, scale: f32, plain: usize, shift: f32, softcap: f32, mask: usize, maskDtype: i32,
  maskStride: usize, from: i32, to: i32, slopes: usize,
): void {
  const bytes = <usize>keys << 2;
  const factor = f32x4.splat(scale);
  // Under a cap every score must include what smoothing took; otherwise only unsmoothed keys include it, and must not.
  const added = f32x4.splat(softcap != 0 ? shift : 0);
  for (let j: usize = 0; j < bytes; j += 16) {
    let x = f32x4.add(f32x4.mul(v128.load(scores + j), factor), added);
    if (plain != 0) x = f32x4.sub(x, f32x4.mul(load4(plain + (j >> 2), DTYPE_BOOL), f32x4.splat(shift)));
    if (softcap != 0) {
      const t = tanh4(f32x4.div(f32x4.mul(x, f32x4.splat(LN_2)), f32x4.splat(softcap)));
      v128.store(slopes + j, f32x4.sub(f32x4.splat(1), f32x4.mul(t, t)));
      x = f32x4.mul(f32x4.mul(t, f32x4.splat(softcap)), f32x4.splat(LOG2_E));
    }
    v128.store(scores + j, x);
  }
  if (mask != 0) addMask(scores, to, mask, maskDtype, maskStride);
  exclude(scores, 0, from);
  exclude(scores, to, keys);
}

/** 2^y of four scores, 0 where `unseen` is all ones. */
// @ts-ignore: decorator
@inline
function weightsOf(y: v128, unseen: v128): v128 {
  const least = f32x4.splat(LEAST_EXPONENT);
  const power = exp2FineHere(larger(f32x4.pmin(f32x4.splat(127), y), least));
  // The bounds above drop a NaN; the difference brings it back.
  return v128.andnot(f32x4.add(power, f32x4.sub(y, y)), unseen);
}

/** All ones where a row does not see a key, or its weight is too small to count. */
// @ts-ignore: decorator
@inline
function unseenOf(score: v128, y: v128): v128 {
  return v128.or(f32x4.eq(score, f32x4.splat(-Infinity)), f32x4.lt(y, f32x4.splat(LEAST_EXPONENT)));
}

/**
 * One row of a tile: scores to weights and to the gradients of the scores.
 *
 * @param scores as finishRow leaves them
 * @param dP products of dO and the values
 * @param lse base 2, without what smoothing took from the scores
 * @param rowFactor of weights relative to it
 * @param p where the weights go
 * @param dS the cap's derivatives where there is a cap, and where the gradients go
 * @param dMask where the gradients without the cap's slope go; 0: nowhere
 */
function weighRow(
  scores: usize, dP: usize, keys: i32, softcap: f32, lse: f32, rowFactor: f32, delta: f32, p: usize, dS: usize,
  dMask: usize,
): void {
  const top = f32x4.splat(lse);
  const factor = f32x4.splat(rowFactor);
  const deltas = f32x4.splat(delta);
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) {
    const score = v128.load(scores + j);
    const y = f32x4.sub(score, top);
    const unseen = unseenOf(score, y);
    const weight = f32x4.mul(weightsOf(y, unseen), factor);
    // A key that is not seen counts as 0, even if its value is NaN.
    let gradient = v128.andnot(f32x4.mul(weight, f32x4.sub(v128.load(dP + j), deltas)), unseen);
    v128.store(p + j, weight);
    if (dMask != 0) v128.store(dMask + j, gradient);
    if (softcap != 0) gradient = v128.andnot(f32x4.mul(gradient, v128.load(dS + j)), unseen);
    v128.store(dS + j, gradient);
  }
}

/** Adds a tile's scores to a row's maximum and sum, which SCRATCH_LSES and SCRATCH_FACTORS hold meanwhile. */
function addToSoftmax(scores: usize, keys: i32, stat: usize): void {
  const before = load<f32>(stat + SCRATCH_LSES);
  let most = before;
  for (let j: usize = 0; j < <usize>keys << 2; j += 4) most = max(most, load<f32>(scores + j));
  if (most == -Infinity) return;
  let sum: f32 = before == -Infinity ? 0 : load<f32>(stat + SCRATCH_FACTORS) * exp2(before - most);
  for (let j: usize = 0; j < <usize>keys << 2; j += 4) {
    const score = load<f32>(scores + j);
    if (score != -Infinity) sum += exp2(score - most);
  }
  store<f32>(stat + SCRATCH_LSES, most);
  store<f32>(stat + SCRATCH_FACTORS, sum);
}

/** What rows of dO with NaN or infinity, which are 0 in the products, add to the gradients of the values they see. */
function addInvalidRows(
  dOut: usize, stride: usize, dtype: i32, dv: i32, rows: i32, keys: i32, sums: usize, dvPadded: i32, scratch: usize,
): void {
  const row = scratch + SCRATCH_GRADIENT_ROW;
  for (let r = 0; r < rows; r++) {
    if (load<u8>(scratch + SCRATCH_INVALID_ROWS + <usize>r) == 0) continue;
    loadRow(dOut + <usize>r * stride, dtype, dv, row, dvPadded);
    const weights = scratch + SCRATCH_GRADIENT_P + <usize>r * P_ROW_BYTES;
    for (let j: usize = 0; j < <usize>keys; j++) {
      const weight = load<f32>(weights + (j << 2));
      if (weight == 0) continue;
      const target = sums + ((j * <usize>dvPadded) << 2);
      for (let c: usize = 0; c < <usize>dv << 2; c += 4) {
        store<f32>(target + c, load<f32>(target + c) + weight * load<f32>(row + c));
      }
    }
  }
}

/** Among rows there is a dO with NaN or infinity; an LSE beyond LARGEST_LSE. */
const INVALID: i32 = 1;
const FAR: i32 = 2;

/** Loads dO of some rows, their LSE in base 2, and `rowsum(dO o O)`; returns what there is among them. */
function prepareGradientRows(
  job: usize, dOut: usize, dOutStride: usize, out: usize, outStride: usize, lse: usize, rows: i32, scratch: usize,
): i32 {
  const dtype = load<i32>(job, JOB_DTYPE);
  const dv = load<i32>(job, JOB_DV);
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const capped = load<f32>(job, JOB_SOFTCAP) != 0;
  const row = scratch + SCRATCH_GRADIENT_ROW;
  let flags = 0;
  const rowsPadded = (rows + 3) & ~3;
  for (let r = 0; r < rowsPadded; r++) {
    const stat = scratch + (<usize>r << 2);
    const target = scratch + SCRATCH_D_OUT + <usize>r * FLOAT_Q_ROW_BYTES;
    store<u8>(scratch + SCRATCH_INVALID_ROWS + <usize>r, 0);
    if (r >= rows) {
      memory.fill(target, 0, <usize>dvPadded << 2);
      continue;
    }
    loadRow(dOut + <usize>r * dOutStride, dtype, dv, target, dvPadded);
    loadRow(out + <usize>r * outStride, dtype, dv, row, dvPadded);
    store<f32>(stat + SCRATCH_DELTAS, dotFloat(target, row, dvPadded));
    const most = rowMaximum(target, dvPadded);
    if (most != most) {
      store<f32>(stat + SCRATCH_DELTAS, NaN);
      store<u8>(scratch + SCRATCH_INVALID_ROWS + <usize>r, 1);
      memory.fill(target, 0, <usize>dvPadded << 2);
      flags |= INVALID;
    }
    const base2 = base2LseOf(lse, r, capped, scratch);
    store<f32>(stat + SCRATCH_LSES, base2);
    store<f32>(stat + SCRATCH_FACTORS, 1);
    if (abs(base2) > LARGEST_LSE && base2 != -Infinity) flags |= FAR;
  }
  return flags;
}

/** Gradients of the rows of one unit. */
export function backwardUnit(job: usize, unit: usize, scratch: usize): void {
  const index = load<i32>(unit, UNIT_SEQUENCE);
  const head = load<i32>(unit, UNIT_HEAD);
  const firstRow = load<i32>(unit, UNIT_ROW);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>index * SEQUENCE_BYTES;
  const chunkRows = load<i32>(sequence, SEQUENCE_CHUNK_ROWS);
  const chunks = load<i32>(sequence, SEQUENCE_CHUNKS);
  const tiles = load<i32>(sequence, SEQUENCE_TILES);
  const dPadded = (load<i32>(job, JOB_D) + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const tokens = <usize>tiles * BLOCK_K;
  const sumBytes = (tokens * <usize>(dPadded + dvPadded)) << 2;
  const sums =
    load<usize>(job, JOB_GRADIENT_SUMS) +
    (load<usize>(sequence, SEQUENCE_FIRST_SUM) << 2) +
    <usize>(head * chunks + firstRow / chunkRows) * sumBytes;
  memory.fill(sums, 0, sumBytes);
  for (let i: usize = 0; i < 16; i += 4) store<f32>(scratch + SCRATCH_ONES + i, 1);
  if (load<i32>(job, JOB_FLAGS) & FLAG_INTEGER_GRADIENTS) storeGradientConstants(scratch);
  const end = min(load<i32>(sequence, SEQUENCE_QUERY_LENGTH), firstRow + chunkRows);
  for (let row = firstRow; row < end; row += BLOCK_Q) {
    backwardRows(job, sequence, index, head, row, min(BLOCK_Q, end - row), sums, sums + ((tokens * <usize>dvPadded) << 2), scratch);
  }
}

/** Begins the softmax of rows whose LSE is too far from 0 anew; the others have a factor of -1 until it ends. */
function forgetFarRows(rows: i32, scratch: usize): void {
  for (let stat = scratch, end = scratch + (<usize>rows << 2); stat < end; stat += 4) {
    const lse = load<f32>(stat + SCRATCH_LSES);
    const isFar = abs(lse) > LARGEST_LSE && lse != -Infinity;
    if (isFar) store<f32>(stat + SCRATCH_LSES, -Infinity);
    store<f32>(stat + SCRATCH_FACTORS, isFar ? 0 : -1);
  }
}

/** A row's LSE in base 2, without what smoothing took from its scores. */
// @ts-ignore: decorator
@inline
function base2LseOf(lse: usize, r: i32, capped: bool, scratch: usize): f32 {
  const at = <usize>r << 2;
  const bias: f32 = capped ? 0 : load<f32>(scratch + at + SCRATCH_ROW_BIASES);
  return <f32>((<f64>load<f32>(lse + at) - <f64>bias) * 1.4426950408889634);
}

/**
 * Sums of those rows' weights to what weights are multiplied by.
 *
 * @param isPart the rows also saw keys that are not here: of all weights these have as much as the LSE says, and not more than all
 */
function finishFarRows(rows: i32, lse: usize, capped: bool, isPart: bool, scratch: usize): void {
  for (let r = 0; r < rows; r++) {
    const stat = scratch + (<usize>r << 2);
    const sum = load<f32>(stat + SCRATCH_FACTORS);
    let factor = sum > 0 ? <f32>1 / sum : 1;
    if (isPart && sum > 0) {
      const share = load<f32>(stat + SCRATCH_LSES) - base2LseOf(lse, r, capped, scratch);
      factor = min(factor, exp2(min(<f32>127, share)));
    }
    store<f32>(stat + SCRATCH_FACTORS, factor);
  }
}

function backwardRows(
  job: usize, sequence: usize, index: i32, head: i32, firstRow: i32, rows: i32, dvSums: usize, dkSums: usize,
  scratch: usize,
): void {
  const keyLength = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const lower = load<i32>(sequence, SEQUENCE_LOWER);
  const upper = load<i32>(sequence, SEQUENCE_UPPER);
  const kvHeads = load<i32>(job, JOB_KV_HEADS);
  const queryHeads = load<i32>(job, JOB_QUERY_HEADS);
  const kvHead = head / (queryHeads / kvHeads);
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const d = load<i32>(job, JOB_D);
  const dv = load<i32>(job, JOB_DV);
  const dPadded = (d + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const softcap = load<f32>(job, JOB_SOFTCAP);
  const means =
    load<usize>(job, JOB_MEANS) + ((<usize>(index * kvHeads + kvHead) * <usize>(dPadded + dvPadded)) << 2);

  // Rows.
  const q =
    load<usize>(job, JOB_Q) +
    ((load<u32>(sequence, SEQUENCE_Q) + <u32>head * load<u32>(job, JOB_Q_HEAD_STRIDE)) << shift);
  const qStride = <usize>(load<u32>(job, JOB_Q_TOKEN_STRIDE) << shift);
  prepareQueries(job, q + <usize>firstRow * qStride, qStride, rows, (rows + 3) & ~3, means, scratch);
  const dOutStride = <usize>(load<u32>(job, JOB_D_OUT_TOKEN_STRIDE) << shift);
  const dOut =
    load<usize>(job, JOB_D_OUT) +
    ((load<u32>(sequence, SEQUENCE_D_OUT) + <u32>head * load<u32>(job, JOB_D_OUT_HEAD_STRIDE)) << shift) +
    <usize>firstRow * dOutStride;
  const outStride = <usize>(load<u32>(job, JOB_OUT_TOKEN_STRIDE) << shift);
  const out =
    load<usize>(job, JOB_OUT) +
    ((load<u32>(sequence, SEQUENCE_OUT) + <u32>head * load<u32>(job, JOB_OUT_HEAD_STRIDE)) << shift) +
    <usize>firstRow * outStride;
  const lse =
    load<usize>(job, JOB_LSE) +
    ((load<u32>(sequence, SEQUENCE_LSE) + <u32>head * load<u32>(job, JOB_LSE_HEAD_STRIDE) + <u32>firstRow) << 2);
  const found = prepareGradientRows(job, dOut, dOutStride, out, outStride, lse, rows, scratch);
  const rowsPadded = (rows + 3) & ~3;
  const dQ = scratch + SCRATCH_OUT;
  const dQBytes = <usize>dPadded << 2;
  memory.fill(dQ, 0, <usize>rowsPadded * dQBytes);
  const integers = (load<i32>(job, JOB_FLAGS) & FLAG_INTEGER_GRADIENTS) != 0;
  if (integers) {
    quantizeRight(
      scratch + SCRATCH_D_OUT, FLOAT_Q_ROW_BYTES, rows, dvPadded, scratch + SCRATCH_D_OUT_CODES, unitBlockBytes(),
      scratch + SCRATCH_D_OUT_SCALES, scratch + SCRATCH_D_OUT_SIZES, scratch,
    );
    quantizeRight(
      scratch + SCRATCH_FLOAT_Q, FLOAT_Q_ROW_BYTES, rows, dPadded, scratch + SCRATCH_Q_CODES, unitBlockBytes(),
      scratch + SCRATCH_Q_SCALES, scratch + SCRATCH_Q_SIZES, scratch,
    );
  }

  // Keys.
  const tileBytes = load<usize>(job, JOB_TILE_BYTES);
  const gradientBytes = gradientTileBytes(dPadded, dvPadded);
  const firstTile =
    <usize>load<i32>(sequence, SEQUENCE_FIRST_TILE) * <usize>kvHeads +
    <usize>kvHead * <usize>load<i32>(sequence, SEQUENCE_TILES);
  const steps = load<i32>(job, JOB_K_STEPS);
  const digits = ASC_FEATURE_RELAXED_SIMD && load<i32>(job, JOB_FLAGS) & FLAG_ACCURATE ? 2 : 1;
  const kScales = load<usize>(job, JOB_TILE_K_SCALES);
  const kSums = load<usize>(job, JOB_TILE_K_SUMS);
  const scores = scratch + SCRATCH_SCORES;
  const dP = scratch + SCRATCH_D_P;
  const p = scratch + SCRATCH_GRADIENT_P;
  const dS = scratch + SCRATCH_D_S;
  const ones = scratch + SCRATCH_ONES;

  const maskDtype = load<i32>(job, JOB_MASK_DTYPE);
  const maskShift = elementShift(maskDtype);
  const maskKeyStride = load<u32>(job, JOB_MASK_KEY_STRIDE);
  const maskQueryStride = load<u32>(job, JOB_MASK_QUERY_STRIDE);
  let mask = load<usize>(job, JOB_MASK);
  if (mask != 0) {
    mask += (load<u32>(sequence, SEQUENCE_MASK) + <u32>head * load<u32>(job, JOB_MASK_HEAD_STRIDE)) << maskShift;
  }
  const maskRows = load<i32>(job, JOB_D_MASK_ROWS);
  const dMaskBytes = <usize>load<i32>(job, JOB_D_MASK_KEYS) << 2;
  let dMask = load<usize>(job, JOB_D_MASK);
  if (dMask != 0) dMask += <usize>((index * queryHeads + head) * maskRows + firstRow) * dMaskBytes;

  const firstKey = max(0, firstRow + lower);
  const endKey = min(keyLength, firstRow + rows + upper);
  const firstStart = (firstKey / BLOCK_K) * BLOCK_K;
  let isFar = (found & FAR) != 0;
  if (isFar) forgetFarRows(rows, scratch);
  for (let start = firstStart; start < endKey; start += BLOCK_K) {
    const number = firstTile + <usize>(start / BLOCK_K);
    const tile = load<usize>(job, JOB_TILES) + number * tileBytes;
    const values = load<usize>(job, JOB_GRADIENT_TILES) + number * gradientBytes;
    const valueOnes = values + <usize>(BLOCK_K * 4) * <usize>dvPadded;
    const keyRows = valueOnes + BLOCK_K * 4;
    const isPlain = load<i32>(tile + load<usize>(job, JOB_TILE_FLAGS)) & TILE_PLAIN_KEYS;
    const plain = isPlain ? tile + load<usize>(job, JOB_TILE_K_PLAIN) : 0;
    const keys = (min(BLOCK_K, endKey - start) + 15) & ~15;
    for (let r = 0; r < rows; r += 4) {
      scoreRows(
        scratch + SCRATCH_Q + <usize>r * Q_ROW_BYTES, tile, steps, digits, keys, tile + kScales, tile + kSums,
        scratch + SCRATCH_ROW_ZEROS + (<usize>r << 2), scores,
      );
      if (!isFar) {
        scoreRowsFloat(
          scratch + SCRATCH_D_OUT + <usize>r * FLOAT_Q_ROW_BYTES, values, dvPadded, keys, valueOnes, dP,
        );
      }
      for (let t = 0; t < 4; t++) {
        const i = firstRow + r + t;
        const at = <usize>(r + t) * P_ROW_BYTES;
        const stat = scratch + (<usize>(r + t) << 2);
        const rowScores = scores + <usize>t * (BLOCK_K * 4);
        const rowLse = load<f32>(stat + SCRATCH_LSES);
        const factor = load<f32>(stat + SCRATCH_FACTORS);
        if (isFar ? r + t >= rows || factor < 0 : r + t >= rows || rowLse == -Infinity) {
          memory.fill(p + at, 0, <usize>keys << 2);
          memory.fill(dS + at, 0, <usize>keys << 2);
          continue;
        }
        const from = min(keys, max(0, i + lower - start));
        const to = max(from, min(keys, min(keyLength, i + upper + 1) - start));
        const maskRow: usize =
          mask == 0 ? <usize>0 : mask + ((<u32>i * maskQueryStride + <u32>start * maskKeyStride) << maskShift);
        finishRow(
          rowScores, keys, load<f32>(stat + SCRATCH_ROW_SCALES), plain,
          bounded(load<f32>(stat + SCRATCH_ROW_BIASES) * LOG2_E), softcap, maskRow, maskDtype, maskKeyStride, from, to,
          dS + at,
        );
        if (isFar) {
          addToSoftmax(rowScores, keys, stat);
          continue;
        }
        const mine: usize = dMask == 0 ? <usize>0 : dMask + <usize>(r + t) * dMaskBytes + (<usize>start << 2);
        weighRow(
          rowScores, dP + <usize>t * (BLOCK_K * 4), keys, softcap, rowLse, factor, load<f32>(stat + SCRATCH_DELTAS),
          p + at, dS + at, mine == 0 ? <usize>0 : scratch + SCRATCH_GRADIENT_ROW,
        );
        // A tile's keys may end beyond those that there are.
        if (mine != 0) memory.copy(mine, scratch + SCRATCH_GRADIENT_ROW, <usize>min(keys, keyLength - start) << 2);
      }
      if (isFar) continue;
      const mine = dQ + <usize>r * dQBytes;
      if (integers) {
        const scales = keyRows + keyScalesAt(dPadded);
        roundRows(dS + <usize>r * P_ROW_BYTES, scales + 2 * dQBytes, keys, scratch);
        addGradients(
          scratch + SCRATCH_LEFT, 16, keyRows, keyBlockBytes(), keys / rowsOfStep(), dPadded, scales,
          scratch + SCRATCH_LEFT_UNITS, scratch + SCRATCH_LEFT_SUMS, mine, dQBytes,
        );
      } else {
        addValuesFloat(dS + <usize>r * P_ROW_BYTES, keyRows, keys, dPadded, ones, mine, dQBytes);
      }
    }
    if (isFar) {
      // Once over all keys for the softmax; then again from the first, for the gradients.
      if (start + BLOCK_K < endKey) continue;
      isFar = false;
      finishFarRows(rows, lse, softcap != 0, (load<i32>(job, JOB_FLAGS) & FLAG_PART_OF_KEYS) != 0, scratch);
      start = firstStart - BLOCK_K;
      continue;
    }
    const dvTile = dvSums + ((<usize>start * <usize>dvPadded) << 2);
    const dkTile = dkSums + ((<usize>start * <usize>dPadded) << 2);
    if (integers) {
      addKeyGradients(
        p, scratch + SCRATCH_D_OUT_CODES, scratch + SCRATCH_D_OUT_SCALES, scratch + SCRATCH_D_OUT_SIZES, rowsPadded, keys,
        dvPadded, dvTile, scratch,
      );
      addKeyGradients(
        dS, scratch + SCRATCH_Q_CODES, scratch + SCRATCH_Q_SCALES, scratch + SCRATCH_Q_SIZES, rowsPadded, keys,
        dPadded, dkTile, scratch,
      );
    } else {
      addTransposed(p, scratch + SCRATCH_D_OUT, rows, keys, dvPadded, dvTile);
      addTransposed(dS, scratch + SCRATCH_FLOAT_Q, rows, keys, dPadded, dkTile);
    }
    if (found & INVALID) addInvalidRows(dOut, dOutStride, dtype, dv, rows, keys, dvTile, dvPadded, scratch);
  }

  // dQ.
  const gradientDtype = load<i32>(job, JOB_GRADIENT_DTYPE);
  const gradientShift = elementShift(gradientDtype);
  const stride = <usize>(load<u32>(job, JOB_D_QUERY_TOKEN_STRIDE) << gradientShift);
  const target =
    load<usize>(job, JOB_D_QUERY) +
    ((load<u32>(sequence, SEQUENCE_D_QUERY) + <u32>head * load<u32>(job, JOB_D_QUERY_HEAD_STRIDE)) << gradientShift) +
    <usize>firstRow * stride;
  for (let r: usize = 0; r < <usize>rows; r++) {
    storeScaled(dQ + r * dQBytes, load<f32>(job, JOB_SM_SCALE), d, dPadded, target + r * stride, gradientDtype);
  }
}

/**
 * Adds `X^T . right` to the sums of a tile's keys in integers, X `[rows, keys]` being P or dS.
 *
 * @param right rows of dO or Q in integers
 */
function addKeyGradients(
  x: usize, right: usize, scales: usize, sizes: usize, rows: i32, keys: i32, channels: i32, out: usize, scratch: usize,
): void {
  roundColumns(x, sizes, rows, keys, scratch);
  const outBytes = <usize>channels << 2;
  for (let key: usize = 0; key < <usize>keys; key += 4) {
    const left = scratch + (key << 2);
    addGradients(
      left + SCRATCH_LEFT, P_ROW_BYTES, right, unitBlockBytes(), rows / rowsOfStep(), channels, scales,
      left + SCRATCH_LEFT_UNITS, left + SCRATCH_LEFT_SUMS, out + key * outBytes, outBytes,
    );
  }
}

/** Stores a row of float32 times a factor. */
function storeScaled(row: usize, scale: f32, count: i32, padded: i32, target: usize, dtype: i32): void {
  const factor = f32x4.splat(scale);
  for (let c: usize = 0; c < <usize>padded << 2; c += 16) {
    v128.store(row + c, f32x4.mul(v128.load(row + c), factor));
  }
  storeRow(row, count, target, dtype);
}

/** Adds up one key's sums, `count` of them `bytes` apart, and stores them. */
function storeSums(
  sums: usize, bytes: usize, count: i32, scale: f32, d: i32, padded: i32, target: usize, dtype: i32, row: usize,
): void {
  for (let c: usize = 0; c < <usize>padded << 2; c += 16) {
    let sum = f32x4.splat(0);
    for (let n = 0, at = sums + c; n < count; n++, at += bytes) sum = f32x4.add(sum, v128.load(at));
    v128.store(row + c, sum);
  }
  storeScaled(row, scale, d, padded, target, dtype);
}

/** Stores dK and dV of one tile of keys. */
export function storeGradientsUnit(job: usize, unit: usize, scratch: usize): void {
  const head = load<i32>(unit, UNIT_HEAD);
  const start = load<i32>(unit, UNIT_ROW);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>load<i32>(unit, UNIT_SEQUENCE) * SEQUENCE_BYTES;
  const d = load<i32>(job, JOB_D);
  const dv = load<i32>(job, JOB_DV);
  const dPadded = (d + 7) & ~7;
  const dvPadded = load<i32>(job, JOB_DV_PADDED);
  const group = load<i32>(job, JOB_QUERY_HEADS) / load<i32>(job, JOB_KV_HEADS);
  const count = group * load<i32>(sequence, SEQUENCE_CHUNKS);
  const tokens = <usize>load<i32>(sequence, SEQUENCE_TILES) * BLOCK_K;
  const bytes = (tokens * <usize>(dPadded + dvPadded)) << 2;
  const dvSums =
    load<usize>(job, JOB_GRADIENT_SUMS) +
    (load<usize>(sequence, SEQUENCE_FIRST_SUM) << 2) +
    <usize>(head * count) * bytes;
  const dkSums = dvSums + ((tokens * <usize>dvPadded) << 2);
  const dtype = load<i32>(job, JOB_GRADIENT_DTYPE);
  const shift = elementShift(dtype);
  const dK =
    load<usize>(job, JOB_D_KEY) +
    ((load<u32>(sequence, SEQUENCE_D_KEY) + <u32>head * load<u32>(job, JOB_D_KEY_HEAD_STRIDE)) << shift);
  const dV =
    load<usize>(job, JOB_D_VALUE) +
    ((load<u32>(sequence, SEQUENCE_D_VALUE) + <u32>head * load<u32>(job, JOB_D_VALUE_HEAD_STRIDE)) << shift);
  const dKStride = <usize>(load<u32>(job, JOB_D_KEY_TOKEN_STRIDE) << shift);
  const dVStride = <usize>(load<u32>(job, JOB_D_VALUE_TOKEN_STRIDE) << shift);
  const row = scratch + SCRATCH_ROW;
  const end = min(start + BLOCK_K, load<i32>(sequence, SEQUENCE_KEY_LENGTH));
  for (let key = <usize>start; key < <usize>end; key++) {
    storeSums(
      dvSums + ((key * <usize>dvPadded) << 2), bytes, count, 1, dv, dvPadded, dV + key * dVStride, dtype, row,
    );
    storeSums(
      dkSums + ((key * <usize>dPadded) << 2), bytes, count, load<f32>(job, JOB_SM_SCALE), d, dPadded,
      dK + key * dKStride, dtype, row,
    );
  }
}
