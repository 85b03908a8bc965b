/** Normalizes and stores the rows of a thread. */
import type { Reg } from '../../ptx/types.ts';
import { UNPACKED_UNIT } from '../fp4/e2m1.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, logSumExp, type RowSum, rowFactor, storePair } from '../parts/epilogue.ts';
import { at } from '../parts/lists.ts';
import { quadSum } from '../parts/quad.ts';
import { joinSink, loadSink } from '../parts/sinks.ts';
import type { Frame } from './frame.ts';
import { exponentOffsetOf, type Parked, type Reloaded } from './parked.ts';
import type { Output, SoftmaxState } from './state.ts';

/** What all rows of a thread store alike. */
interface Results {
  readonly frame: Frame;
  readonly rows: Reloaded;
  readonly output: Output;
  /** The thread's first row among the partial ones; undefined where the output is final. */
  readonly partialRow: Reg<'u32'> | undefined;
  /** Start of the head's rows, or of all partial rows. */
  readonly base: Reg<'global'>;
  readonly tokenStride: Reg<'u64'>;
  /** For each tile of 8 channels, the scales of the thread's two channels; empty if V has no scales. */
  readonly scales: readonly (readonly Reg<'f32'>[])[];
  readonly means: readonly (readonly Reg<'f32'>[])[];
}

export function writeResults(
  frame: Frame,
  parked: Parked,
  split: Reg<'u32'> | undefined,
  state: SoftmaxState,
  output: Output,
): void {
  const { b, config, integer, pointer, strides, fp8, channelTiles } = frame;
  const rows = parked.reload();
  const { sequence, head, keyHead, queryLength, queryRow, threadRow, rowIndex, rowBias, t2 } = rows;
  const queryHeads = b.loadParameter(integer.queryHeads);
  const keyHeads = b.div(queryHeads, b.loadParameter(integer.headsPerKeyHead));
  const sequenceHead = b.mad(sequence, keyHeads, keyHead);
  const outputStrides = { batch: strides.outputBatch, head: strides.outputHead };
  const all = b.loadPointer(pointer.output);
  const base = config.split ? all : headAddress(b, all, { sequence, head }, outputStrides);
  const tokenStride = b.loadParameter(strides.outputToken);
  const channelTerms = (name: 'valueScale' | 'valueMean') =>
    Array.from({ length: channelTiles }, (_, n) => {
      const terms = b.loadPointer(pointer[name]);
      const own = offset(b, terms, b.mad(sequenceHead, config.paddedValueDim, t2), 4);
      return b.ldVector('f32', 2, own, n * 32, { readOnly: true });
    });
  const scales = fp8 ? channelTerms('valueScale') : [];
  const means = config.smoothV ? channelTerms('valueMean') : [];
  const rowsOfSplit = () => b.mul(b.loadParameter(integer.paddedQueries), queryHeads);
  const partialRow = split === undefined ? undefined : b.mad(split, rowsOfSplit(), b.add(queryRow, threadRow));
  const results: Results = { frame, rows, output, partialRow, base, tokenStride, scales, means };
  for (const [r, max] of state.max.entries()) {
    const row = b.as(b.add(rowIndex, 8 * r), 'u32');
    const { sum, exact } = rowSums(frame, state, r);
    // A row of Q that is not finite has a NaN bias.
    const bias = frame.given === undefined ? b.ld('f32', rowBias, r * 32, { readOnly: true }) : b.constant('f32', 0);
    const { empty, factor } = rowFactor(b, sum, bias, unitOf(frame, output));
    b.if(b.setp('lt', row, queryLength), () => {
      const joined = joinRowSink(results, row, { sum, max, empty, bias }, exact);
      if (config.lse || config.split)
        storeLse(results, r, row, joined?.lse ?? lseOf(frame, { sum: exact, max, empty, bias }));
      storeRow(results, r, row, factor, empty, joined?.keep);
    });
  }
}

/** What a row is divided by, and the sum of P that its logsumexp is of. */
function rowSums({ b, config }: Frame, { sum: sums, exactSum }: SoftmaxState, r: number) {
  const sum = config.quantizedWeights ? at(sums, r) : quadSum(b, at(sums, r));
  return { sum, exact: exactSum.length > 0 ? quadSum(b, at(exactSum, r)) : sum };
}

/** What V was divided by; undefined: nothing. */
function unitOf({ b, config }: Frame, { unit }: Output): Reg<'f32'> | undefined {
  return unit !== undefined && config.pvFormat === 'e2m1-as-f16' ? b.mul(unit, UNPACKED_UNIT) : unit;
}

/** @param natural default: of what the caller gets */
function lseOf(frame: Frame, rowSum: RowSum, natural = !frame.config.split): Reg<'f32'> {
  const { b, config, exponentOffset } = frame;
  return logSumExp(b, rowSum, {
    exponentOffset: exponentOffset === 0 ? undefined : exponentOffsetOf(frame),
    biased: config.softcap,
    natural,
  });
}

/**
 * What the head's sink leaves of the row, and the natural logsumexp with it; undefined without sinks.
 *
 * @param exact the sum that the logsumexp is of
 */
function joinRowSink({ frame, rows }: Results, row: Reg<'u32'>, rowSum: RowSum, exact: Reg<'f32'>) {
  const { b, config, sinks } = frame;
  if (sinks === undefined) return undefined;
  const { head, queryLength } = rows;
  const ofRow = config.sameBand ? b.add(b.mul(head, queryLength), row) : head;
  const sink = loadSink(b, sinks, ofRow, b.setp('lt', row, queryLength));
  const { keep, lse } = joinSink(b, lseOf(frame, rowSum, false), sink);
  const joint = exact === rowSum.sum ? lse : joinSink(b, lseOf(frame, { ...rowSum, sum: exact }, false), sink).lse;
  return { keep, lse: b.mul(joint, Math.LN2) };
}

function storeLse({ frame, rows, partialRow }: Results, r: number, row: Reg<'u32'>, lse: Reg<'f32'>): void {
  const { b, pointer, strides } = frame;
  const { sequence, head, queryStart, t2 } = rows;
  const first = b.setp('eq', t2, 0);
  let address = b.loadPointer(pointer.lse);
  if (partialRow === undefined) {
    address = headAddress(b, address, { sequence, head }, { batch: strides.lseBatch, head: strides.lseHead });
    address = offset(b, address, b.add(queryStart, row), 4);
  } else address = offset(b, address, b.add(partialRow, 8 * r), 4);
  b.when(first, () => b.st(lse, address));
}

function storeRow(
  { frame, rows, output, partialRow, base, tokenStride, scales, means }: Results,
  r: number,
  row: Reg<'u32'>,
  factorOfSum: Reg<'f32'>,
  empty: Reg<'pred'>,
  keep: Reg<'f32'> | undefined,
): void {
  const { b, config, fp8, channelTiles } = frame;
  const rowFactor = keep === undefined ? factorOfSum : b.mul(factorOfSum, keep);
  const { queryStart, t2 } = rows;
  const type = config.split ? 'float32' : config.outputType;
  const rowAddress =
    partialRow === undefined
      ? offset64(b, base, b.add(queryStart, row), tokenStride)
      : offset(b, base, b.add(partialRow, 8 * r), config.paddedValueDim * 4);
  const address = offset(b, rowAddress, t2, BYTES[type]);
  const width = config.split ? config.paddedValueDim : config.valueDim;
  for (let n = 0; n < channelTiles && n * 8 < width; n++) {
    const pair = sumsOf(frame, output, r, n).map((value, j) => {
      const factor = fp8 ? b.mul(rowFactor, at(at(scales, n), j)) : rowFactor;
      const result = b.mul(value, factor);
      const mean = config.smoothV ? at(at(means, n), j) : undefined;
      const whole = mean === undefined ? result : keep === undefined ? b.add(result, mean) : b.fma(mean, keep, result);
      // Without keys nothing has written V's scales or means.
      if (fp8 || config.smoothV) b.when(empty, () => b.set(whole, 0));
      return whole;
    });
    storePair(b, [at(pair, 0), at(pair, 1)], address, { type, first: n * 8, width, t2, inside: undefined });
  }
}

/** The two channels of the thread in a row and an 8-channel tile, as FP32. */
function sumsOf({ b, config }: Frame, output: Output, r: number, n: number): readonly Reg<'f32'>[] {
  if (config.accumulate !== 'f16') return at(at(output.floats, r >> 1), n).slice(2 * (r & 1), 2 * (r & 1) + 2);
  const register = at(at(at(output.halves, r >> 1), n), r & 1);
  return b.unpack(register, 'f16').map((half) => b.cvt('f32', half));
}
