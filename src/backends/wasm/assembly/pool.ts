/**
 * Means of the blocks of one head in one sequence, and how much alike the rows of each are: what blocks of scores are chosen by
 * (`src/quantization/pooling.ts` is the same in float64).
 */
import {
  JOB_BLOCK_ROWS,
  JOB_D,
  JOB_DTYPE,
  JOB_FLAGS,
  JOB_OUT,
  JOB_OUT_HEAD_STRIDE,
  JOB_Q,
  JOB_Q_HEAD_STRIDE,
  JOB_Q_TOKEN_STRIDE,
  JOB_SEQUENCES,
  SEQUENCE_BYTES,
  SEQUENCE_OUT,
  SEQUENCE_Q,
  SEQUENCE_QUERY_LENGTH,
  UNIT_HEAD,
  UNIT_SEQUENCE,
} from '../generated/fields.ts';
import { FLAG_SIMILARITIES, FLAG_SMOOTH_K, POOLED_EXTRA } from '../job.ts';
import { madd } from './arithmetic.ts';
import { dotFloat } from './attend.ts';
import { elementShift, loadRow } from './elements.ts';
import { subtractRow } from './prepare.ts';
import { SCRATCH_OUT, SCRATCH_QUERY_MEAN, SCRATCH_ROW } from './scratch.ts';

/** `target += x * factor`, of `bytes`, a multiple of 16. */
// @ts-ignore: decorator
@inline
function addScaled(target: usize, x: usize, factor: f32, bytes: usize): void {
  const f = f32x4.splat(factor);
  for (let i: usize = 0; i < bytes; i += 16) v128.store(target + i, madd(v128.load(x + i), f, v128.load(target + i)));
}

/** The mean cosine of all pairs of `rows` rows after `mean` was taken off: `|sum of normalized rows|^2 / rows^2`. */
function similarity(
  x: usize, stride: usize, rows: i32, dtype: i32, d: i32, padded: i32, mean: usize, row: usize, sum: usize,
): f32 {
  const bytes = <usize>padded << 2;
  memory.fill(sum, 0, bytes);
  for (let r = 0; r < rows; r++, x += stride) {
    loadRow(x, dtype, d, row, padded);
    subtractRow(row, mean, padded);
    const norm = dotFloat(row, row, padded);
    if (norm != 0) addScaled(sum, row, <f32>1 / sqrt(norm), bytes);
  }
  return dotFloat(sum, sum, padded) / (<f32>rows * <f32>rows);
}

/** One head of the operand that stands in the record as q; its blocks have JOB_BLOCK_ROWS rows. */
export function poolUnit(job: usize, unit: usize, scratch: usize): void {
  const head = load<i32>(unit, UNIT_HEAD);
  const sequence = load<usize>(job, JOB_SEQUENCES) + <usize>load<i32>(unit, UNIT_SEQUENCE) * SEQUENCE_BYTES;
  const flags = load<i32>(job, JOB_FLAGS);
  const dtype = load<i32>(job, JOB_DTYPE);
  const shift = elementShift(dtype);
  const d = load<i32>(job, JOB_D);
  const padded = (d + 7) & ~7;
  const bytes = <usize>padded << 2;
  const tokens = load<i32>(sequence, SEQUENCE_QUERY_LENGTH);
  const blockRows = load<i32>(job, JOB_BLOCK_ROWS);
  const x =
    load<usize>(job, JOB_Q) +
    ((load<u32>(sequence, SEQUENCE_Q) + <u32>head * load<u32>(job, JOB_Q_HEAD_STRIDE)) << shift);
  const stride = <usize>(load<u32>(job, JOB_Q_TOKEN_STRIDE) << shift);
  const out =
    load<usize>(job, JOB_OUT) + ((load<u32>(sequence, SEQUENCE_OUT) + <u32>head * load<u32>(job, JOB_OUT_HEAD_STRIDE)) << 2);
  const row = scratch + SCRATCH_ROW;
  const mean = scratch + SCRATCH_QUERY_MEAN;
  memory.fill(mean, 0, bytes);
  let target = out;
  for (let first = 0; first < tokens; first += blockRows, target += bytes + POOLED_EXTRA * 4) {
    const rows = min(blockRows, tokens - first);
    memory.fill(target, 0, bytes + POOLED_EXTRA * 4);
    for (let r = 0; r < rows; r++) {
      loadRow(x + <usize>(first + r) * stride, dtype, d, row, padded);
      addScaled(target, row, <f32>1 / <f32>rows, bytes);
    }
    // What all tokens share says nothing about how much alike they are.
    if (flags & FLAG_SMOOTH_K) addScaled(mean, target, <f32>rows / <f32>tokens, bytes);
  }
  if ((flags & FLAG_SIMILARITIES) == 0) return;
  target = out;
  for (let first = 0; first < tokens; first += blockRows, target += bytes + POOLED_EXTRA * 4) {
    const rows = min(blockRows, tokens - first);
    const from = x + <usize>first * stride;
    store<f32>(target + bytes, similarity(from, stride, rows, dtype, d, padded, mean, row, scratch + SCRATCH_OUT));
  }
}
