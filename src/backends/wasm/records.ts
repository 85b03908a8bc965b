/** Fills in the records that kernels read (fields.ts). */

import { bandOf, visibleKeys } from '../../attention/band.ts';
import {
  type AttentionProblem,
  type BlockLayout,
  lseShapeOf,
  type MaskLayout,
  outputLayoutOf,
  type Sequence,
} from '../../attention/problem.ts';
import type { DType, MaskDType } from '../../tensor/dtype.ts';
import type { OperandLayout } from '../../tensor/tensor.ts';
import { JOB_FIELDS, SEQUENCE_FIELDS, UNIT_FIELDS } from './fields.ts';
import * as fields from './generated/fields.ts';
import type { TileGeometry } from './geometry.ts';
import * as job from './job.ts';

const DTYPE_CODES: Readonly<Record<MaskDType, number>> = {
  float32: job.DTYPE_FLOAT32,
  float16: job.DTYPE_FLOAT16,
  bfloat16: job.DTYPE_BFLOAT16,
  bool: job.DTYPE_BOOL,
};

const NOWHERE: OperandLayout = { offset: 0, batchStride: 0, headStride: 0, tokenStride: 0 };

/**
 * 0 means none to the kernels. Scores within 1e-10 of each other weigh the same in float32, so less changes nothing.
 */
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
  readonly sinks: number;
  readonly blockMap: number;
  readonly tiles: number;
  readonly means: number;
  readonly tail: number;
  readonly keyTail: number;
  readonly tailSeen: number;
}

export const NO_ADDRESSES: Addresses = {
  ...{ q: 0, k: 0, v: 0, out: 0, lse: 0, mask: 0, sinks: 0, blockMap: 0, tiles: 0, means: 0 },
  ...{ tail: 0, keyTail: 0, tailSeen: 0 },
};

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
  readonly blocks: BlockLayout | undefined;
}

/** Layouts of what a call was given, as they are staged. */
export type OperandLayouts = Pick<JobSettings, 'q' | 'k' | 'v' | 'mask' | 'blocks'>;

/** A sequence's place in operands and tiles, lengths and band. */
export interface SequenceRecord {
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly out: number;
  readonly lse: number;
  readonly mask: number;
  readonly blocks: number;
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

export const NO_SEQUENCE: SequenceRecord = {
  ...{ q: 0, k: 0, v: 0, out: 0, lse: 0, mask: 0, blocks: 0, queryLength: 0, keyLength: 0, lower: 0, upper: 0 },
  ...{ firstTile: 0, tiles: 0, start: 0, partlySeen: false, rowsDiffer: false },
};

/** Places of a sequence in gradients, and how its rows are split. */
export interface SequenceGradients {
  readonly dOut: number;
  readonly dQuery: number;
  readonly dKey: number;
  readonly dValue: number;
  readonly firstSum: number;
  readonly chunks: number;
  readonly chunkRows: number;
}

/** What a backward job says besides. */
export interface JobGradients {
  readonly addresses: Readonly<
    Record<'dOut' | 'gradientTiles' | 'gradientSums' | 'dQuery' | 'dKey' | 'dValue' | 'dMask', number>
  >;
  readonly dtype: DType;
  readonly dOut: OperandLayout;
  readonly dQuery: OperandLayout;
  readonly dKey: OperandLayout;
  readonly dValue: OperandLayout;
  readonly dMaskRows: number;
  readonly dMaskKeys: number;
  /** One for each sequence. */
  readonly sequences: readonly SequenceGradients[];
}

const NO_GRADIENTS: JobGradients = {
  addresses: { dOut: 0, gradientTiles: 0, gradientSums: 0, dQuery: 0, dKey: 0, dValue: 0, dMask: 0 },
  dtype: 'float32',
  ...{ dOut: NOWHERE, dQuery: NOWHERE, dKey: NOWHERE, dValue: NOWHERE },
  dMaskRows: 0,
  dMaskKeys: 0,
  sequences: [],
};
const NO_SEQUENCE_GRADIENTS: SequenceGradients = {
  ...{ dOut: 0, dQuery: 0, dKey: 0, dValue: 0, firstSum: 0, chunks: 0, chunkRows: 0 },
};

export interface UnitRecord {
  readonly sequence: number;
  readonly head: number;
  readonly row: number;
}

/** Tiles of so many keys. */
export const tilesOf = (keys: number) => Math.ceil(keys / job.BLOCK_K);

/** Element of a sequence's first token. */
export function startOf(layout: OperandLayout | undefined, index: number, token: number): number {
  return layout === undefined ? 0 : layout.offset + index * layout.batchStride + token * layout.tokenStride;
}

/** Sequence records of a problem whose operands are staged with these layouts. */
export function sequenceRecords(
  problem: AttentionProblem,
  sequences: readonly Sequence[],
  layouts: OperandLayouts,
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
      blocks: layouts.blocks === undefined ? 0 : layouts.blocks.offset + index * layouts.blocks.strides[0],
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

/** EXACT_ROWS of each head of k and v. */
export function exactUnits(sequences: readonly SequenceRecord[], kvHeads: number): UnitRecord[] {
  const units: UnitRecord[] = [];
  for (const [sequence, { queryLength }] of sequences.entries()) {
    for (let head = 0; head < kvHeads; head++) {
      for (let row = 0; row < queryLength; row += job.EXACT_ROWS) units.push({ sequence, head, row });
    }
  }
  return units;
}

/** Settings of a problem; `flags` and layouts of staged operands come from the caller. */
export function jobSettings(
  problem: AttentionProblem,
  geometry: TileGeometry,
  flags: number,
  layouts: OperandLayouts,
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
  return fields.JOB_BYTES + sequences * fields.SEQUENCE_BYTES + units * fields.UNIT_BYTES;
}

/** Writes a record's fields. Offsets and strides wrap modulo 2^32, as address arithmetic in the kernels does. */
function writeFields<Name extends string>(
  view: DataView,
  at: number,
  names: readonly Name[],
  values: Readonly<Record<Name, number>>,
): void {
  names.forEach((name, i) => {
    view.setUint32(at + 4 * i, values[name], true);
  });
}

/** The strides of an operand by the names of their fields. */
const stridesOf = <Name extends string>(name: Name, { headStride, tokenStride }: OperandLayout) =>
  ({ [`${name}HeadStride`]: headStride, [`${name}TokenStride`]: tokenStride }) as Record<
    `${Name}HeadStride` | `${Name}TokenStride`,
    number
  >;

/** A float32 as the integer that stands for it in memory. */
function floatBits(value: number): number {
  return new Uint32Array(Float32Array.of(value).buffer)[0] as number;
}

/** A job record, then its sequences, then its units, as they lie in memory from `address` on. */
export function writeRecords(
  address: number,
  settings: JobSettings,
  addresses: Addresses,
  sequences: readonly SequenceRecord[],
  units: readonly UnitRecord[],
  gradients: JobGradients = NO_GRADIENTS,
): Uint8Array {
  const bytes = new Uint8Array(recordBytes(sequences.length, units.length));
  const view = new DataView(bytes.buffer);
  const { geometry, mask, blocks, q = NOWHERE, k = NOWHERE, v = NOWHERE, out = NOWHERE } = settings;
  const sequencesAt = fields.JOB_BYTES;
  const unitsAt = sequencesAt + sequences.length * fields.SEQUENCE_BYTES;
  const [, maskHeadStride, maskQueryStride, maskKeyStride] = mask?.strides ?? [0, 0, 0, 0];
  const [, blockHeadStride, blockRowStride, blockKeyStride] = blocks?.strides ?? [0, 0, 0, 0];
  writeFields(view, 0, JOB_FIELDS, {
    ...addresses,
    sequences: address + sequencesAt,
    units: address + unitsAt,
    unitCount: units.length,
    next: 0,
    abort: 0,
    queryHeads: settings.queryHeads,
    kvHeads: settings.kvHeads,
    d: settings.headDim,
    dv: settings.valueDim,
    dtype: DTYPE_CODES[settings.dtype],
    qHeadStride: q.headStride,
    qTokenStride: q.tokenStride,
    kHeadStride: k.headStride,
    kTokenStride: k.tokenStride,
    vHeadStride: v.headStride,
    vTokenStride: v.tokenStride,
    outHeadStride: out.headStride,
    outTokenStride: out.tokenStride,
    lseHeadStride: settings.lseHeadStride,
    ...{ maskHeadStride, maskQueryStride, maskKeyStride },
    maskDtype: DTYPE_CODES[mask?.dtype ?? 'bool'],
    ...{ blockRows: blocks?.rows ?? 0, blockKeys: blocks?.keys ?? 0 },
    ...{ blockHeadStride, blockRowStride, blockKeyStride },
    flags: settings.flags,
    smScale: floatBits(Math.max(-LARGEST_SM_SCALE, Math.min(LARGEST_SM_SCALE, settings.smScale))),
    softcap: floatBits(settings.softcap > 0 ? Math.max(LEAST_SOFTCAP, settings.softcap) : 0),
    kSteps: geometry.keySteps,
    dvPadded: geometry.valueDimPadded,
    tileKScales: geometry.keyScales,
    tileKSums: geometry.keySums,
    tileV: geometry.values,
    tileVScales: geometry.valueScales,
    tileFlags: geometry.flags,
    tileNans: geometry.nans,
    tileBytes: geometry.bytes,
    tileVExponents: geometry.valueExponents,
    tileVApart: geometry.valuesApart,
    tileKPlain: geometry.plainKeys,
    tileShift: geometry.shift,
    ...gradients.addresses,
    ...stridesOf('dOut', gradients.dOut),
    ...stridesOf('dQuery', gradients.dQuery),
    ...stridesOf('dKey', gradients.dKey),
    ...stridesOf('dValue', gradients.dValue),
    gradientDtype: DTYPE_CODES[gradients.dtype],
    dMaskRows: gradients.dMaskRows,
    dMaskKeys: gradients.dMaskKeys,
  });
  for (const [i, { partlySeen, rowsDiffer, ...sequence }] of sequences.entries()) {
    writeFields(view, sequencesAt + i * fields.SEQUENCE_BYTES, SEQUENCE_FIELDS, {
      ...sequence,
      ...(gradients.sequences[i] ?? NO_SEQUENCE_GRADIENTS),
      partlySeen: Number(partlySeen),
      rowsDiffer: Number(rowsDiffer),
    });
  }
  for (const [i, unit] of units.entries()) {
    writeFields(view, unitsAt + i * fields.UNIT_BYTES, UNIT_FIELDS, unit);
  }
  return bytes;
}
