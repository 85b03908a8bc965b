/** Fills in the records that kernels read (job.ts). */

import { bandOf, visibleKeys } from '../../attention/band.ts';
import {
  type AttentionProblem,
  lseShapeOf,
  type MaskLayout,
  outputLayoutOf,
  type Sequence,
} from '../../attention/problem.ts';
import type { DType, MaskDType } from '../../tensor/dtype.ts';
import type { OperandLayout } from '../../tensor/tensor.ts';
import type { TileGeometry } from './geometry.ts';
import * as job from './job.ts';

const DTYPE_CODES: Readonly<Record<MaskDType, number>> = {
  float32: job.DTYPE_FLOAT32,
  float16: job.DTYPE_FLOAT16,
  bfloat16: job.DTYPE_BFLOAT16,
  bool: job.DTYPE_BOOL,
};

const NOWHERE: OperandLayout = { offset: 0, batchStride: 0, headStride: 0, tokenStride: 0 };

/** 0 means none to the kernels. Scores within 1e-10 of each other weigh the same in float32, so less changes nothing. */
const LEAST_SOFTCAP = 1e-10;
const LARGEST_SM_SCALE = 3.4e38;

/** Addresses of what a job works on; 0: not there. */
export interface Addresses {
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly out: number;
  readonly lse: number;
  readonly mask: number;
  readonly tiles: number;
  readonly means: number;
  readonly tail: number;
  readonly keyTail: number;
}

/** What a job says besides addresses. */
export interface JobSettings {
  readonly dtype: DType;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly geometry: TileGeometry;
  /** Sum of `FLAG_`. */
  readonly flags: number;
  readonly smScale: number;
  readonly softcap: number;
  readonly q: OperandLayout | undefined;
  readonly k: OperandLayout | undefined;
  readonly v: OperandLayout | undefined;
  readonly out: OperandLayout | undefined;
  readonly lseHeadStride: number;
  readonly mask: MaskLayout | undefined;
}

/** A sequence's place in operands and tiles, lengths and band. */
export interface SequenceRecord {
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly out: number;
  readonly lse: number;
  readonly mask: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly lower: number;
  readonly upper: number;
  readonly firstTile: number;
  readonly tiles: number;
  readonly start: number;
  readonly partlySeen: boolean;
  readonly rowsDiffer: boolean;
}

export interface UnitRecord {
  readonly sequence: number;
  readonly head: number;
  readonly row: number;
}

/** Tiles of so many keys. */
export const tilesOf = (keys: number) => Math.ceil(keys / job.BLOCK_K);

/** Element of a sequence's first token. */
function startOf(layout: OperandLayout | undefined, index: number, token: number): number {
  return layout === undefined ? 0 : layout.offset + index * layout.batchStride + token * layout.tokenStride;
}

/** Sequence records of a problem whose operands are staged with these layouts. */
export function sequenceRecords(
  problem: AttentionProblem,
  sequences: readonly Sequence[],
  layouts: Pick<JobSettings, 'q' | 'k' | 'v' | 'mask'>,
): SequenceRecord[] {
  const out = outputLayoutOf(problem);
  const lseBatchStride = problem.sequences === undefined ? problem.queryHeads * problem.queryLength : 0;
  // Heads that share keys, and rows, may each have a mask of their own.
  const [, maskHead, maskQuery] = layouts.mask?.strides ?? [0, 0, 0];
  const maskDiffers = maskQuery !== 0 || (maskHead !== 0 && problem.queryHeads > problem.kvHeads);
  let firstTile = 0;
  return sequences.map((sequence) => {
    const { index, queryStart, queryLength, keyStart, keyLength } = sequence;
    const { lower, upper } = bandOf(problem, sequence);
    const [first, end] = visibleKeys(problem, sequence);
    const tiles = tilesOf(keyLength);
    const record = {
      q: startOf(layouts.q, index, queryStart),
      k: startOf(layouts.k, index, keyStart),
      v: startOf(layouts.v, index, keyStart),
      out: startOf(out, index, queryStart),
      lse: index * lseBatchStride + queryStart,
      mask: layouts.mask === undefined ? 0 : layouts.mask.offset + index * layouts.mask.strides[0],
      queryLength,
      keyLength,
      lower,
      upper,
      firstTile,
      tiles,
      start: 0,
      partlySeen: layouts.mask !== undefined || first > 0 || end < keyLength,
      rowsDiffer: maskDiffers || upper < keyLength - 1 || queryLength - 1 + lower > 0,
    };
    firstTile += tiles;
    return record;
  });
}

/** One unit for each head of k and v of each sequence that is attended to. */
export function prepareUnits(sequences: readonly SequenceRecord[], kvHeads: number): UnitRecord[] {
  return sequences.flatMap(({ keyLength }, sequence) =>
    keyLength === 0 ? [] : Array.from({ length: kvHeads }, (_, head) => ({ sequence, head, row: 0 })),
  );
}

/** BLOCK_Q rows each. Last rows first: under a causal mask they are the longest, and short ones even out the end. */
export function attendUnits(sequences: readonly SequenceRecord[], queryHeads: number): UnitRecord[] {
  const units: UnitRecord[] = [];
  for (const [sequence, { queryLength }] of sequences.entries()) {
    for (let head = 0; head < queryHeads; head++) {
      for (let block = Math.ceil(queryLength / job.BLOCK_Q) - 1; block >= 0; block--) {
        units.push({ sequence, head, row: block * job.BLOCK_Q });
      }
    }
  }
  return units;
}

/** Settings of a problem; `flags` and layouts of staged operands come from the caller. */
export function jobSettings(
  problem: AttentionProblem,
  geometry: TileGeometry,
  flags: number,
  layouts: Pick<JobSettings, 'q' | 'k' | 'v' | 'mask'>,
): JobSettings {
  const { dtype, queryHeads, kvHeads, headDim, valueDim, smScale, softcap } = problem;
  const lseHeadStride = lseShapeOf(problem).at(-1) as number;
  return {
    ...{ dtype, queryHeads, kvHeads, headDim, valueDim, geometry, flags, smScale, softcap, lseHeadStride },
    ...layouts,
    out: outputLayoutOf(problem),
  };
}

/** Bytes of a job with its sequences and units. */
export function recordBytes(sequences: number, units: number): number {
  return job.JOB_BYTES + sequences * job.SEQUENCE_BYTES + units * job.UNIT_BYTES;
}

/** A job record, then its sequences, then its units, as they lie in memory from `address` on. */
export function writeRecords(
  address: number,
  settings: JobSettings,
  addresses: Addresses,
  sequences: readonly SequenceRecord[],
  units: readonly UnitRecord[],
): Uint8Array {
  const bytes = new Uint8Array(recordBytes(sequences.length, units.length));
  const view = new DataView(bytes.buffer);
  // Offsets and strides wrap modulo 2^32, as address arithmetic in the kernels does.
  const set = (at: number, value: number) => view.setUint32(at, value, true);
  const { geometry, mask, q, k, v, out } = settings;
  const sequencesAt = job.JOB_BYTES;
  const unitsAt = sequencesAt + sequences.length * job.SEQUENCE_BYTES;

  set(job.JOB_Q, addresses.q);
  set(job.JOB_K, addresses.k);
  set(job.JOB_V, addresses.v);
  set(job.JOB_OUT, addresses.out);
  set(job.JOB_LSE, addresses.lse);
  set(job.JOB_MASK, addresses.mask);
  set(job.JOB_TILES, addresses.tiles);
  set(job.JOB_MEANS, addresses.means);
  set(job.JOB_TAIL, addresses.tail);
  set(job.JOB_SEQUENCES, address + sequencesAt);
  set(job.JOB_UNITS, address + unitsAt);
  set(job.JOB_UNIT_COUNT, units.length);
  set(job.JOB_QUERY_HEADS, settings.queryHeads);
  set(job.JOB_KV_HEADS, settings.kvHeads);
  set(job.JOB_D, settings.headDim);
  set(job.JOB_DV, settings.valueDim);
  set(job.JOB_DTYPE, DTYPE_CODES[settings.dtype]);
  set(job.JOB_Q_HEAD_STRIDE, (q ?? NOWHERE).headStride);
  set(job.JOB_Q_TOKEN_STRIDE, (q ?? NOWHERE).tokenStride);
  set(job.JOB_K_HEAD_STRIDE, (k ?? NOWHERE).headStride);
  set(job.JOB_K_TOKEN_STRIDE, (k ?? NOWHERE).tokenStride);
  set(job.JOB_V_HEAD_STRIDE, (v ?? NOWHERE).headStride);
  set(job.JOB_V_TOKEN_STRIDE, (v ?? NOWHERE).tokenStride);
  set(job.JOB_OUT_HEAD_STRIDE, (out ?? NOWHERE).headStride);
  set(job.JOB_OUT_TOKEN_STRIDE, (out ?? NOWHERE).tokenStride);
  set(job.JOB_LSE_HEAD_STRIDE, settings.lseHeadStride);
  const [, maskHead, maskQuery, maskKey] = mask?.strides ?? [0, 0, 0, 0];
  set(job.JOB_MASK_HEAD_STRIDE, maskHead);
  set(job.JOB_MASK_QUERY_STRIDE, maskQuery);
  set(job.JOB_MASK_KEY_STRIDE, maskKey);
  set(job.JOB_MASK_DTYPE, DTYPE_CODES[mask?.dtype ?? 'bool']);
  set(job.JOB_FLAGS, settings.flags);
  view.setFloat32(job.JOB_SM_SCALE, Math.max(-LARGEST_SM_SCALE, Math.min(LARGEST_SM_SCALE, settings.smScale)), true);
  view.setFloat32(job.JOB_SOFTCAP, settings.softcap > 0 ? Math.max(LEAST_SOFTCAP, settings.softcap) : 0, true);
  set(job.JOB_K_STEPS, geometry.keySteps);
  set(job.JOB_DV_PADDED, geometry.valueDimPadded);
  set(job.JOB_TILE_K_SCALES, geometry.keyScales);
  set(job.JOB_TILE_K_SUMS, geometry.keySums);
  set(job.JOB_TILE_V, geometry.values);
  set(job.JOB_TILE_V_SCALES, geometry.valueScales);
  set(job.JOB_TILE_FLAGS, geometry.flags);
  set(job.JOB_TILE_NANS, geometry.nans);
  set(job.JOB_TILE_BYTES, geometry.bytes);
  set(job.JOB_TILE_V_EXPONENTS, geometry.valueExponents);
  set(job.JOB_TILE_V_APART, geometry.valuesApart);
  set(job.JOB_TILE_K_PLAIN, geometry.plainKeys);
  set(job.JOB_TILE_SHIFT, geometry.shift);
  set(job.JOB_KEY_TAIL, addresses.keyTail);

  for (const [i, sequence] of sequences.entries()) {
    const at = sequencesAt + i * job.SEQUENCE_BYTES;
    set(at + job.SEQUENCE_Q, sequence.q);
    set(at + job.SEQUENCE_K, sequence.k);
    set(at + job.SEQUENCE_V, sequence.v);
    set(at + job.SEQUENCE_OUT, sequence.out);
    set(at + job.SEQUENCE_LSE, sequence.lse);
    set(at + job.SEQUENCE_MASK, sequence.mask);
    set(at + job.SEQUENCE_QUERY_LENGTH, sequence.queryLength);
    set(at + job.SEQUENCE_KEY_LENGTH, sequence.keyLength);
    set(at + job.SEQUENCE_LOWER, sequence.lower);
    set(at + job.SEQUENCE_UPPER, sequence.upper);
    set(at + job.SEQUENCE_FIRST_TILE, sequence.firstTile);
    set(at + job.SEQUENCE_TILES, sequence.tiles);
    set(at + job.SEQUENCE_START, sequence.start);
    set(at + job.SEQUENCE_PARTLY_SEEN, sequence.partlySeen ? 1 : 0);
    set(at + job.SEQUENCE_ROWS_DIFFER, sequence.rowsDiffer ? 1 : 0);
  }
  for (const [i, unit] of units.entries()) {
    const at = unitsAt + i * job.UNIT_BYTES;
    set(at + job.UNIT_SEQUENCE, unit.sequence);
    set(at + job.UNIT_HEAD, unit.head);
    set(at + job.UNIT_ROW, unit.row);
  }
  return bytes;
}
