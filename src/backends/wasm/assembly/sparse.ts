/** Sinks, and blocks of scores that are left out: what the kernels that attend share. */
import {
  JOB_BLOCK_HEAD_STRIDE,
  JOB_BLOCK_KEY_STRIDE,
  JOB_BLOCK_KEYS,
  JOB_BLOCK_MAP,
  JOB_BLOCK_ROW_STRIDE,
  JOB_BLOCK_ROWS,
  JOB_SINKS,
  SEQUENCE_BLOCKS,
} from '../generated/fields.ts';
import { exp2, log } from './arithmetic.ts';

/** The map of a head in a sequence; 0: all blocks are computed. */
export function mapOfHead(job: usize, sequence: usize, head: i32): usize {
  const map = load<usize>(job, JOB_BLOCK_MAP);
  return map == 0 ? 0 : map + load<u32>(sequence, SEQUENCE_BLOCKS) + <u32>head * load<u32>(job, JOB_BLOCK_HEAD_STRIDE);
}

/** The map's line for a row; 0: all blocks are computed. */
export function mapOfRow(job: usize, map: usize, row: i32): usize {
  return map == 0 ? 0 : map + <u32>(row / load<i32>(job, JOB_BLOCK_ROWS)) * load<u32>(job, JOB_BLOCK_ROW_STRIDE);
}

/** The first key from `key` on that a line of the map has, or does not have; `end` if there is none before it. */
export function nextKey(job: usize, line: usize, has: boolean, key: i32, end: i32): i32 {
  const keys = load<i32>(job, JOB_BLOCK_KEYS);
  const stride = load<u32>(job, JOB_BLOCK_KEY_STRIDE);
  let block = key / keys;
  while (key < end && (load<u8>(line + <u32>block * stride) != 0) != has) key = ++block * keys;
  return min(key, end);
}

/** Whether any of the rows has any of the keys `start` to `end`. */
export function hasAny(job: usize, map: usize, firstRow: i32, endRow: i32, start: i32, end: i32): boolean {
  const rows = load<i32>(job, JOB_BLOCK_ROWS);
  for (let row = firstRow; row < endRow; row = (row / rows + 1) * rows) {
    if (nextKey(job, mapOfRow(job, map, row), true, start, end) < end) return true;
  }
  return false;
}

/** Scores of keys that a line of the map does not have to -Infinity. */
export function excludeAbsent(job: usize, line: usize, scores: usize, keyLength: i32): void {
  let key = 0;
  while ((key = nextKey(job, line, false, key, keyLength)) < keyLength) {
    for (const end = nextKey(job, line, true, key, keyLength); key < end; key++) {
      store<f32>(scores + (<usize>key << 2), -Infinity);
    }
  }
}

/** -Infinity: there is none. */
export function sinkOf(job: usize, head: i32): f32 {
  const sinks = load<usize>(job, JOB_SINKS);
  return sinks == 0 ? -Infinity : load<f32>(sinks + (<usize>head << 2));
}

/** `e^-|sink - lse|` as far as it counts beside 1. */
// @ts-ignore: decorator
@inline
function smaller(lse: f64, sink: f32): f64 {
  const gap = abs(<f64>sink - lse) * 1.4426950408889634;
  return gap > 120 ? 0 : <f64>exp2(<f32>-gap);
}

/** A row's logsumexp (natural) with its head's sink. */
export function addSink(lse: f64, sink: f32): f64 {
  if (sink == -Infinity) return lse;
  if (lse == -Infinity) return <f64>sink;
  return max(lse, <f64>sink) + log(1 + smaller(lse, sink));
}

/** What a sink leaves of a row's output: `1 / (1 + e^(sink - lse))`. */
export function shareBesideSink(lse: f64, sink: f32): f32 {
  if (sink == -Infinity) return 1;
  if (lse != lse || sink != sink) return NaN;
  const less = smaller(lse, sink);
  return <f32>((<f64>sink > lse ? less : 1) / (1 + less));
}
