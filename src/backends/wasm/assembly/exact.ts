/**
 * Attention in float32 for calls too short to quantize for. A unit is a head of k and v with some rows of every head of q
 * that shares it. All scores of a row are there at once, so there is one softmax and nothing to rescale; weights are divided
 * by their sum before the product with V, which then stays between the values that it mixes.
 */
import {
  JOB_D,
  JOB_DTYPE,
  JOB_DV,
  JOB_FLAGS,
  JOB_K,
  JOB_KV_HEADS,
  JOB_K_HEAD_STRIDE,
  JOB_K_TOKEN_STRIDE,
  JOB_LSE,
  JOB_LSE_HEAD_STRIDE,
  JOB_MASK,
  JOB_MASK_DTYPE,
  JOB_MASK_HEAD_STRIDE,
  JOB_MASK_KEY_STRIDE,
  JOB_MASK_QUERY_STRIDE,
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
  JOB_V,
  JOB_V_HEAD_STRIDE,
  JOB_V_TOKEN_STRIDE,
  SEQUENCE_BYTES,
  SEQUENCE_K,
  SEQUENCE_KEY_LENGTH,
  SEQUENCE_LOWER,
  SEQUENCE_LSE,
  SEQUENCE_MASK,
  SEQUENCE_OUT,
  SEQUENCE_Q,
  SEQUENCE_QUERY_LENGTH,
  SEQUENCE_UPPER,
  SEQUENCE_V,
  UNIT_HEAD,
  UNIT_ROW,
  UNIT_SEQUENCE,
} from '../generated/fields.ts';
import { EXACT_DATA, EXACT_ROWS, FLAG_IN_PLACE } from '../job.ts';
import { finiteMaximum, largerMagnitudes, log, storeConstants } from './arithmetic.ts';
import { finishScores, LARGEST_FACTOR, LOG2_E, LOWEST } from './attend.ts';
import { elementShift, loadElement, loadRow, storeRow } from './elements.ts';
import { addRows, packColumns, product, PRODUCT_ROWS, PRODUCT_WIDTH, scoreInPlace } from './exact-products.ts';
import { isPlainRow, rowMaximum } from './prepare.ts';
import { SCRATCH_CONSTANTS, SCRATCH_ROW } from './scratch.ts';
import { addSink, excludeAbsent, mapOfHead, mapOfRow, nextKey, shareBesideSink, sinkOf } from './sparse.ts';
import { maximumOf, weighFloat } from './weights.ts';

/** Rows in work at a time. */
const ROWS: i32 = 8;

// Scratch. A row takes the most that any takes, so that addresses of rows are constants apart.
const ROW_BYTES: usize = 2112;
const QUERIES: usize = 40960;
const OUTPUTS: usize = 57856;
/** For each row NaN in the channels in which it sees a value that is not finite, 0 in others. */
const POISON: usize = 74752;
/** For each row what its sum of weights begins with: NaN where the query is not finite. */
const SUMS: usize = 91648;

/** Whether all elements of a row are finite. */
// @ts-ignore: decorator
@inline
function isFiniteRow(row: usize, padded: i32): boolean {
  const most = rowMaximum(row, padded);
  return most == most;
}

/** Four keys from `key` on to columns of the packed head. Returns whether all of them are finite. */
function packKeys(
  k: usize, stride: usize, dtype: i32, d: i32, padded: i32, key: i32, keyLength: i32, rows: usize, target: usize,
): boolean {
  const rowBytes = <usize>padded << 2;
  let k0 = k + <usize>key * stride;
  if (isPlainRow(dtype, d, padded) && key + 4 <= keyLength) {
    const k1 = k0 + stride;
    const k2 = k1 + stride;
    const k3 = k2 + stride;
    if (packColumns(k0, k1, k2, k3, rowBytes, target)) return true;
  }
  let finite = true;
  for (let t = 0; t < 4; t++, k0 += stride) {
    const row = rows + <usize>t * rowBytes;
    if (key + t >= keyLength) {
      memory.fill(row, 0, rowBytes);
      continue;
    }
    loadRow(k0, dtype, d, row, padded);
    if (isFiniteRow(row, padded)) continue;
    // Its scores are NaN, whatever the query.
    finite = false;
    store<f32>(row, NaN);
  }
  packColumns(rows, rows + rowBytes, rows + 2 * rowBytes, rows + 3 * rowBytes, rowBytes, target);
  return finite;
}

/** Values of a head for the products: groups of channels, token by token. Returns whether all are finite; others become 0. */
function packValues(
  v: usize, stride: usize, dtype: i32, dv: i32, padded: i32, keyLength: i32, row: usize, target: usize,
): boolean {
  const groupBytes = <usize>keyLength * PRODUCT_WIDTH * 4;
  const inPlace = isPlainRow(dtype, dv, padded);
  let most = i32x4.splat(0);
  for (let key = 0; key < keyLength; key++) {
    let from = v + <usize>key * stride;
    if (!inPlace) {
      loadRow(from, dtype, dv, row, padded);
      from = row;
    }
    let to = target + <usize>key * PRODUCT_WIDTH * 4;
    for (let c = 0; c < padded; c += PRODUCT_WIDTH) {
      for (let i: usize = 0; i < <usize>PRODUCT_WIDTH * 4; i += 32) {
        const x0 = v128.load(from + i);
        const x1 = v128.load(from + i, 16);
        most = largerMagnitudes(largerMagnitudes(most, x0), x1);
        v128.store(to + i, x0);
        v128.store(to + i, x1, 16);
      }
      from += PRODUCT_WIDTH * 4;
      to += groupBytes;
    }
  }
  const largest = finiteMaximum(most);
  if (largest == largest) return true;
  const end = target + <usize>keyLength * (<usize>padded << 2);
  for (let at = target; at < end; at += 16) {
    const x = v128.load(at);
    v128.store(at, v128.and(x, f32x4.eq(f32x4.mul(x, f32x4.splat(0)), f32x4.splat(0))));
  }
  return false;
}

/** NaN in the channels in which a row sees a value that is not finite. */
function poisonRow(
  scores: usize, keyLength: i32, v: usize, stride: usize, dtype: i32, dv: i32, poison: usize,
): void {
  const shift = elementShift(dtype);
  memory.fill(poison, 0, ROW_BYTES);
  for (let j = 0; j < keyLength; j++) {
    if (load<f32>(scores + (<usize>j << 2)) == -Infinity) continue;
    for (let c = 0; c < dv; c++) {
      const x = loadElement(v + <usize>j * stride + (<usize>c << shift), dtype);
      if (x * 0 != 0) store<f32>(poison + (<usize>c << 2), NaN);
    }
  }
}

/**
 * One row of q in float32 to `target`, with the sign of the scale.
 *
 * @returns what the row's sum of weights begins with: NaN where the query is not finite
 */
function takeQuery(q: usize, dtype: i32, d: i32, padded: i32, negative: boolean, target: usize): f32 {
  loadRow(q, dtype, d, target, padded);
  if (!isFiniteRow(target, padded)) {
    memory.fill(target, 0, <usize>padded << 2);
    return NaN;
  }
  if (negative) {
    for (let i: usize = 0; i < <usize>padded << 2; i += 16) v128.store(target + i, f32x4.neg(v128.load(target + i)));
  }
  return 0;
}

/**
 * One row's scores to shares of V, which add up to 1; less than 1 beside a sink, zeros where the row sees nothing.
 *
 * @param keys a multiple of 16
 * @param scale what turns a score to base 2; 1 where {@link finishScores} did
 * @param sum what the sum of weights begins with
 * @param least the row's largest score is taken for no less: it may have seen nothing but NaN
 * @param sink of the head; -Infinity: none
 * @param lse where the row's LSE goes; 0: nowhere
 */
function softmax(
  scores: usize, keys: i32, scale: f32, sum: f32, least: f32, shares: usize, constants: usize, sink: f32, lse: usize,
): void {
  let most = maximumOf(scores, keys);
  if (most == -Infinity && least == -Infinity) {
    memory.fill(shares, 0, <usize>keys << 2);
    if (lse != 0) store<f32>(lse, sink);
    return;
  }
  most = max(most, least);
  sum += weighFloat(scores, keys, most, scale, shares, constants);
  let own: f64 = 0;
  if (lse != 0 || sink != -Infinity) {
    own = sum != sum ? <f64>NaN : <f64>(most * scale) * 0.6931471805599453 + log(<f64>sum);
  }
  const factor = f32x4.splat(sink == -Infinity ? <f32>1 / sum : shareBesideSink(own, sink) / sum);
  for (let j: usize = 0; j < <usize>keys << 2; j += 16) {
    v128.store(shares + j, f32x4.mul(v128.load(shares + j), factor));
  }
  if (lse != 0) store<f32>(lse, <f32>addSink(own, sink));
}

/** Rows that no key is there for: zeros, and an LSE of -Infinity or their sink. */
function storeEmpty(job: usize, sequence: usize, kvHead: i32, group: i32, firstRow: i32, endRow: i32): void {
  const shift = elementShift(load<i32>(job, JOB_DTYPE));
  const bytes = <usize>load<i32>(job, JOB_DV) << shift;
  const lse = load<usize>(job, JOB_LSE);
  for (let head = kvHead * group; head < (kvHead + 1) * group; head++) {
    const out = load<u32>(sequence, SEQUENCE_OUT) + <u32>head * load<u32>(job, JOB_OUT_HEAD_STRIDE);
    const lseRow = load<u32>(sequence, SEQUENCE_LSE) + <u32>head * load<u32>(job, JOB_LSE_HEAD_STRIDE);
    for (let i = firstRow; i < endRow; i++) {
      const at = (out + <u32>i * load<u32>(job, JOB_OUT_TOKEN_STRIDE)) << shift;
      memory.fill(load<usize>(job, JOB_OUT) + at, 0, bytes);
      if (lse != 0) store<f32>(lse + ((lseRow + <u32>i) << 2), sinkOf(job, head));
    }
  }
}

export function exactUnit(job: usize, unit: usize, scratch: usize): void {
  const index = load<i32>(unit, UNIT_SEQUENCE);
  const kvHead = load<i32>(unit, UNIT_HEAD);
  const unitRow = load<i32>(unit, UNIT_ROW);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>index * SEQUENCE_BYTES;
  const endRow = min(load<i32>(sequence, SEQUENCE_QUERY_LENGTH), unitRow + EXACT_ROWS);
  const keyLength = load<i32>(sequence, SEQUENCE_KEY_LENGTH);
  const lower = load<i32>(sequence, SEQUENCE_LOWER);
  const upper = load<i32>(sequence, SEQUENCE_UPPER);
  const group = load<i32>(job, JOB_QUERY_HEADS) / load<i32>(job, JOB_KV_HEADS);
  if (keyLength == 0) {
    storeEmpty(job, sequence, kvHead, group, unitRow, endRow);
    return;
  }
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const d = load<i32>(job, JOB_D);
  const dPadded = (d + 3) & ~3;
  const dv = load<i32>(job, JOB_DV);
  const inPlace = (load<i32>(job, JOB_FLAGS) & FLAG_IN_PLACE) != 0;
  const dvPadded = inPlace ? dv : (dv + PRODUCT_WIDTH - 1) & ~(PRODUCT_WIDTH - 1);
  const smScale = load<f32>(job, JOB_SM_SCALE);
  const scale = abs(smScale) * LOG2_E;
  const softcap = load<f32>(job, JOB_SOFTCAP);
  const keys = (keyLength + 15) & ~15;
  const scoreBytes = <usize>keys << 2;
  const constants = scratch + SCRATCH_CONSTANTS;
  storeConstants(constants, 1);

  // Keys and values: where they lie, or laid out for the products.
  const k =
    load<usize>(job, JOB_K) +
    ((load<u32>(sequence, SEQUENCE_K) + <u32>kvHead * load<u32>(job, JOB_K_HEAD_STRIDE)) << shift);
  const kStride = <usize>(load<u32>(job, JOB_K_TOKEN_STRIDE) << shift);
  const v =
    load<usize>(job, JOB_V) +
    ((load<u32>(sequence, SEQUENCE_V) + <u32>kvHead * load<u32>(job, JOB_V_HEAD_STRIDE)) << shift);
  const vStride = <usize>(load<u32>(job, JOB_V_TOKEN_STRIDE) << shift);
  const packedK = scratch + EXACT_DATA;
  const packedV = inPlace ? packedK : packedK + scoreBytes * <usize>dPadded;
  const scores = inPlace ? packedK : packedV + (<usize>keyLength << 2) * <usize>dvPadded;
  // In place, shares have room of their own: excluded keys must still be known when a value turns out not to be finite.
  const shares = inPlace ? scores + scoreBytes : scores;
  let finiteKeys = true;
  let finiteValues = true;
  if (!inPlace) {
    for (let key = 0; key < keys; key += 4) {
      const group = <usize>(key / PRODUCT_WIDTH) * <usize>dPadded * PRODUCT_WIDTH;
      const to = packedK + ((group + <usize>(key & (PRODUCT_WIDTH - 1))) << 2);
      if (!packKeys(k, kStride, dtype, d, dPadded, key, keyLength, scratch + OUTPUTS, to)) finiteKeys = false;
    }
    finiteValues = packValues(v, vStride, dtype, dv, dvPadded, keyLength, scratch + SCRATCH_ROW, packedV);
  }

  const maskDtype = load<i32>(job, JOB_MASK_DTYPE);
  const maskShift = elementShift(maskDtype);
  const maskKeyStride = load<u32>(job, JOB_MASK_KEY_STRIDE);
  const maskQueryStride = load<u32>(job, JOB_MASK_QUERY_STRIDE);
  const qStride = <usize>(load<u32>(job, JOB_Q_TOKEN_STRIDE) << shift);
  const outStride = <usize>(load<u32>(job, JOB_OUT_TOKEN_STRIDE) << shift);
  const lse = load<usize>(job, JOB_LSE);
  for (let head = kvHead * group; head < (kvHead + 1) * group; head++) {
    const q =
      load<usize>(job, JOB_Q) +
      ((load<u32>(sequence, SEQUENCE_Q) + <u32>head * load<u32>(job, JOB_Q_HEAD_STRIDE)) << shift);
    const out =
      load<usize>(job, JOB_OUT) +
      ((load<u32>(sequence, SEQUENCE_OUT) + <u32>head * load<u32>(job, JOB_OUT_HEAD_STRIDE)) << shift);
    const lseHead =
      lse + ((load<u32>(sequence, SEQUENCE_LSE) + <u32>head * load<u32>(job, JOB_LSE_HEAD_STRIDE)) << 2);
    let mask = load<usize>(job, JOB_MASK);
    if (mask != 0) {
      mask += (load<u32>(sequence, SEQUENCE_MASK) + <u32>head * load<u32>(job, JOB_MASK_HEAD_STRIDE)) << maskShift;
    }
    const sink = sinkOf(job, head);
    const map = mapOfHead(job, sequence, head);
    const most = inPlace ? 1 : ROWS;
    for (let first = unitRow; first < endRow; first += most) {
      const rows = min(most, endRow - first);
      const padded = (rows + PRODUCT_ROWS - 1) & ~(PRODUCT_ROWS - 1);
      for (let r = 0; r < rows; r++) {
        const row = scratch + QUERIES + <usize>r * ROW_BYTES;
        const begin = takeQuery(q + <usize>(first + r) * qStride, dtype, d, dPadded, smScale < 0, row);
        store<f32>(scratch + SUMS + (<usize>r << 2), begin);
      }

      if (inPlace) finiteKeys = scorePresent(job, mapOfRow(job, map, first), scratch + QUERIES, k, kStride, keyLength, d, scores);
      else {
        for (let key = 0; key < keys; key += PRODUCT_WIDTH) {
          const b = packedK + ((<usize>key * <usize>dPadded) << 2);
          for (let r = 0; r < padded; r += PRODUCT_ROWS) {
            const to = scores + <usize>r * scoreBytes + (<usize>key << 2);
            product(scratch + QUERIES + <usize>r * ROW_BYTES, ROW_BYTES, b, dPadded, to, scoreBytes);
          }
        }
      }

      for (let r = 0; r < rows; r++) {
        const i = first + r;
        const line = mapOfRow(job, map, i);
        const at = scores + <usize>r * scoreBytes;
        const from = min(keyLength, max(0, i + lower));
        const to = max(from, min(keyLength, i + upper + 1));
        let rowScale = scale;
        let sum = load<f32>(scratch + SUMS + (<usize>r << 2));
        let least: f32 = -Infinity;
        if (mask == 0 && softcap == 0 && finiteKeys && from == 0 && to == keyLength && scale <= LARGEST_FACTOR) {
          for (let j = keyLength; j < keys; j++) store<f32>(at + (<usize>j << 2), -Infinity);
          if (line != 0) excludeAbsent(job, line, at, keyLength);
        } else {
          const maskRow: usize = mask == 0 ? <usize>0 : mask + ((<u32>i * maskQueryStride) << maskShift);
          if (finishScores(at, keys, scale, softcap, 0, 0, 0, maskRow, maskDtype, maskKeyStride, from, to, job, line)) {
            sum = NaN;
            least = LOWEST;
          }
          rowScale = 1;
        }
        if (!finiteValues) {
          poisonRow(at, keyLength, v, vStride, dtype, dv, scratch + POISON + <usize>r * ROW_BYTES);
        }
        const lseAt: usize = lse == 0 ? <usize>0 : lseHead + (<usize>i << 2);
        softmax(at, keys, rowScale, sum, least, shares + (at - scores), constants, sink, lseAt);
      }

      const outputs = scratch + OUTPUTS;
      if (inPlace) addPresent(job, mapOfRow(job, map, first), shares, v, vStride, keyLength, dv, outputs, scratch + POISON);
      else {
        for (let c = 0; c < dvPadded; c += PRODUCT_WIDTH) {
          const b = packedV + ((<usize>c * <usize>keyLength) << 2);
          for (let r = 0; r < padded; r += PRODUCT_ROWS) {
            const to = outputs + <usize>r * ROW_BYTES + (<usize>c << 2);
            product(shares + <usize>r * scoreBytes, scoreBytes, b, keyLength, to, ROW_BYTES);
          }
        }
      }
      for (let r = 0; r < rows; r++) {
        const row = outputs + <usize>r * ROW_BYTES;
        if (inPlace && !isFiniteRow(row, dv)) {
          addSeen(scores, shares, v, vStride, keyLength, dv, row);
        } else if (!finiteValues) {
          const poison = scratch + POISON + <usize>r * ROW_BYTES;
          for (let c: usize = 0; c < <usize>dvPadded << 2; c += 16) {
            v128.store(row + c, f32x4.add(v128.load(row + c), v128.load(poison + c)));
          }
        }
        storeRow(row, dv, out + <usize>(first + r) * outStride, dtype);
      }
    }
  }
}

/** {@link scoreInPlace} of the keys that a line of the map has. Returns whether all of these scores are finite. */
function scorePresent(
  job: usize, line: usize, q: usize, k: usize, stride: usize, keyLength: i32, d: i32, scores: usize,
): boolean {
  if (line == 0) return scoreInPlace(q, k, stride, keyLength, d, scores);
  let finite = true;
  let key = 0;
  while ((key = nextKey(job, line, true, key, keyLength)) < keyLength) {
    const end = nextKey(job, line, false, key, keyLength);
    if (!scoreInPlace(q, k + <usize>key * stride, stride, end - key, d, scores + (<usize>key << 2))) finite = false;
    key = end;
  }
  return finite;
}

/** {@link addRows} over the keys that a line of the map has; `row` is room for one more output. */
function addPresent(
  job: usize, line: usize, shares: usize, v: usize, stride: usize, keyLength: i32, dv: i32, out: usize, row: usize,
): void {
  if (line == 0) {
    addRows(shares, v, stride, keyLength, dv, out);
    return;
  }
  let key = 0;
  let to = out;
  while ((key = nextKey(job, line, true, key, keyLength)) < keyLength) {
    const end = nextKey(job, line, false, key, keyLength);
    addRows(shares + (<usize>key << 2), v + <usize>key * stride, stride, end - key, dv, to);
    if (to == row) {
      for (let c: usize = 0; c < <usize>dv << 2; c += 16) {
        v128.store(out + c, f32x4.add(v128.load(out + c), v128.load(row + c)));
      }
    }
    to = row;
    key = end;
  }
  if (to == out) memory.fill(out, 0, <usize>dv << 2);
}

/** {@link addRows} over the keys that are not excluded: a value that the row does not see may be anything. */
function addSeen(scores: usize, shares: usize, v: usize, stride: usize, keyLength: i32, dv: i32, out: usize): void {
  memory.fill(out, 0, <usize>dv << 2);
  for (let j = 0; j < keyLength; j++) {
    if (load<f32>(scores + (<usize>j << 2)) == -Infinity) continue;
    const share = load<f32>(shares + (<usize>j << 2));
    for (let c: usize = 0; c < <usize>dv << 2; c += 4) {
      const x = load<f32>(v + <usize>j * stride + c);
      store<f32>(out + c, load<f32>(out + c) + (x * 0 == 0 ? x * share : <f32>NaN));
    }
  }
}
