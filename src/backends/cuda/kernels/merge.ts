/**
 * Parts, each of some rows, become one. `merge` joins outputs of attention over parts of the keys, each normalized by its own sum: the
 * mean with weights exp(lse - max lse). `sum` adds gradients. One warp takes one row.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { KernelBuilder } from '../ptx/builder.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from './parts/addresses.ts';
import { LOG2_E } from './parts/constants.ts';
import { BYTES, loadElement } from './parts/elements.ts';

export interface MergeConfig {
  readonly target: Target;
  readonly valueDim: number;
  /** Of the parts and of the output. */
  readonly dtype: DType;
  readonly parts: number;
  readonly lse: boolean;
}

/** Parts of one launch: what their addresses take of a kernel's 4 KB of parameters. */
export const MERGE_PARTS = 64;
/** Rows of a CTA, one warp each. */
export const MERGE_ROWS = 4;

/** Of each part: `[head, row, valueDim]` and `[head, row]` float32, contiguous, of `partRows` rows from `partStart` on. */
export const mergePart = (i: number) => ({
  output: `partOutput${i}`,
  lse: `partLse${i}`,
  start: `partStart${i}`,
  rows: `partRows${i}`,
});
export const MERGE_POINTERS = ['output', 'lse'] as const;
export const MERGE_INTEGERS = ['heads', 'rowBlocks', 'rows'] as const;
export const MERGE_STRIDES = ['outputBatch', 'outputHead', 'outputToken'] as const;

/** The row of a warp. */
function rowOfWarp(b: KernelBuilder, integer: Record<(typeof MERGE_INTEGERS)[number], Parameter<'u32'>>) {
  b.section('which row');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const heads = b.loadParameter(integer.heads);
  const [rowBlock, headOfBatch] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.rowBlocks));
  const [head, batch] = divide(b, headOfBatch, heads);
  const row = b.mad(rowBlock, MERGE_ROWS, b.shr(thread, 5));
  const rows = b.loadParameter(integer.rows);
  b.when(b.setp('ge', row, rows), () => b.exit());
  return { lane, headOfBatch, head, batch, row, rows };
}

type RowPlace = ReturnType<typeof rowOfWarp>;

interface PartParameters {
  readonly output: Parameter<'u64'>;
  readonly start: Parameter<'u32'>;
  readonly rows: Parameter<'u32'>;
}

/** A part's row of the row at hand, among those of all its heads, and whether it has one. */
function rowOfPart(b: KernelBuilder, { headOfBatch, row }: RowPlace, part: PartParameters) {
  // A row before the part's first wraps round to a large number.
  const inPart = b.sub(row, b.loadParameter(part.start));
  const partRows = b.loadParameter(part.rows);
  return { partRow: b.mad(headOfBatch, partRows, inPart), isIn: b.setp('lt', inPart, partRows) };
}

/** A lane's channels of a row: these and the lane's number more. */
const channelsOf = (dim: number) => Array.from({ length: Math.ceil(dim / 32) }, (_, i) => i * 32);

/** A lane's channels of a part's row in turn; 0 where the part has no such row. */
function eachChannel(
  b: KernelBuilder,
  { lane }: RowPlace,
  part: PartParameters,
  { partRow, isIn }: ReturnType<typeof rowOfPart>,
  { dim, dtype }: { readonly dim: number; readonly dtype: DType },
  use: (loaded: Reg<'f32'>, index: number) => void,
): void {
  const rowAt = offset(b, b.loadPointer(part.output), partRow, dim * BYTES[dtype]);
  const at = offset(b, rowAt, lane, BYTES[dtype]);
  for (const [i, channel] of channelsOf(dim).entries()) {
    const has = channel + 32 <= dim ? isIn : b.andPred(isIn, b.setp('lt', lane, dim - channel));
    use(loadElement(b, dtype, at, channel * BYTES[dtype], has), i);
  }
}

/** Where a lane's first channel of the row goes. */
function destinationOf(
  b: KernelBuilder,
  { lane, head, batch, row }: RowPlace,
  output: Parameter<'u64'>,
  strides: Record<(typeof MERGE_STRIDES)[number], Parameter<'u64'>>,
  dtype: DType,
): Reg<'global'> {
  let destination = offset64(b, b.loadPointer(output), batch, b.loadParameter(strides.outputBatch));
  destination = offset64(b, destination, head, b.loadParameter(strides.outputHead));
  destination = offset64(b, destination, row, b.loadParameter(strides.outputToken));
  return offset(b, destination, lane, BYTES[dtype]);
}

function storeChannel(
  b: KernelBuilder,
  { lane }: RowPlace,
  destination: Reg<'global'>,
  { channel, dim, dtype }: { readonly channel: number; readonly dim: number; readonly dtype: DType },
  value: Reg<'f32'>,
): void {
  const stored = dtype === 'float32' ? value : b.cvt(dtype === 'float16' ? 'f16' : 'bf16', value);
  b.when(b.setp('lt', lane, dim - channel), () => b.st(stored, destination, channel * BYTES[dtype]));
}

export function merge({ target, valueDim, dtype, parts, lse }: MergeConfig): Kernel {
  const b = new KernelBuilder({ name: 'merge', target, threads: MERGE_ROWS * 32 });
  const declared = Array.from({ length: parts }, (_, i) => {
    const names = mergePart(i);
    return {
      output: b.parameter(names.output, 'u64'),
      lse: b.parameter(names.lse, 'u64'),
      start: b.parameter(names.start, 'u32'),
      rows: b.parameter(names.rows, 'u32'),
    };
  });
  const pointer = pointers(b, MERGE_POINTERS);
  const integer = integers(b, MERGE_INTEGERS);
  const strides = pointers(b, MERGE_STRIDES);

  const place = rowOfWarp(b, integer);
  const { lane, headOfBatch, row, rows } = place;

  b.section('logsumexp of each part');
  const found = declared.map((part) => {
    const own = rowOfPart(b, place, part);
    const value = b.constant('f32', Number.NEGATIVE_INFINITY);
    const at = offset(b, b.loadPointer(part.lse), own.partRow, 4);
    b.when(own.isIn, () => b.ld('f32', at, 0, { into: value }));
    return { part, own, value };
  });
  const maximum = b.constant('f32', Number.NEGATIVE_INFINITY);
  for (const { value } of found) b.max(maximum, value, maximum);
  const reference = b.selp(0, maximum, b.setp('eq', maximum, Number.NEGATIVE_INFINITY));

  b.section('weighted mean');
  const sums = channelsOf(valueDim).map(() => b.constant('f32', 0));
  const total = b.constant('f32', 0);
  for (const { part, own, value } of found) {
    const weight = b.ex2(b.mul(b.sub(value, reference), LOG2_E));
    b.add(total, weight, total);
    // A part that saw nothing has no weight, and its output is 0.
    eachChannel(b, place, part, own, { dim: valueDim, dtype }, (loaded, c) => {
      b.fma(loaded, weight, sums[c] as Reg<'f32'>, sums[c]);
    });
  }

  b.section('store');
  const empty = b.setp('eq', total, 0);
  const inverse = b.rcp(total);
  b.when(empty, () => b.set(inverse, 0));
  const destination = destinationOf(b, place, pointer.output, strides, dtype);
  channelsOf(valueDim).forEach((channel, i) => {
    storeChannel(b, place, destination, { channel, dim: valueDim, dtype }, b.mul(sums[i] as Reg<'f32'>, inverse));
  });
  if (lse) {
    const value = b.fma(b.lg2(total), Math.LN2, reference);
    b.when(empty, () => b.set(value, Number.NEGATIVE_INFINITY));
    const at = offset(b, b.loadPointer(pointer.lse), b.mad(headOfBatch, rows, row), 4);
    b.when(b.setp('eq', lane, 0), () => b.st(value, at));
  }
  return b.build();
}

export interface SumConfig {
  readonly target: Target;
  readonly dim: number;
  /** Of the sum; parts are float32. */
  readonly dtype: DType;
  readonly parts: number;
}

/** Pointers of {@link sum}. */
export const SUM_POINTERS = ['output'] as const;

export function sum({ target, dim, dtype, parts }: SumConfig): Kernel {
  const b = new KernelBuilder({ name: 'sum', target, threads: MERGE_ROWS * 32 });
  const declared = Array.from({ length: parts }, (_, i) => {
    const names = mergePart(i);
    return {
      output: b.parameter(names.output, 'u64'),
      start: b.parameter(names.start, 'u32'),
      rows: b.parameter(names.rows, 'u32'),
    };
  });
  const pointer = pointers(b, SUM_POINTERS);
  const integer = integers(b, MERGE_INTEGERS);
  const strides = pointers(b, MERGE_STRIDES);
  const place = rowOfWarp(b, integer);

  b.section('sum');
  const sums = channelsOf(dim).map(() => b.constant('f32', 0));
  for (const part of declared) {
    eachChannel(b, place, part, rowOfPart(b, place, part), { dim, dtype: 'float32' }, (loaded, c) => {
      b.add(loaded, sums[c] as Reg<'f32'>, sums[c]);
    });
  }

  b.section('store');
  const destination = destinationOf(b, place, pointer.output, strides, dtype);
  channelsOf(dim).forEach((channel, i) => {
    storeChannel(b, place, destination, { channel, dim, dtype }, sums[i] as Reg<'f32'>);
  });
  return b.build();
}
