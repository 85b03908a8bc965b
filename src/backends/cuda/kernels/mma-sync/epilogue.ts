/** Normalizes and stores the rows of a thread. */
import type { Reg } from '../../ptx/types.ts';
import { UNPACKED_UNIT } from '../fp4/e2m1.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, logSumExp, type RowSum, rowFactor, storePair } from '../parts/epilogue.ts';
import { type JoinedRow, joinRow, storeJoined, storePartial, weightedSums, whenLast } from '../parts/join.ts';
import { at } from '../parts/lists.ts';
import { quadSum } from '../parts/quad.ts';
import { joinSink, loadSink } from '../parts/sinks.ts';
import { type AttentionConfig, blockQueries } from './config.ts';
import type { Frame, Share } from './frame.ts';
import { exponentOffsetOf, type Parked, type Reloaded } from './parked.ts';
import type { Output, SoftmaxState } from './state.ts';

/** What all rows of a thread store alike. */
interface Results {
  readonly frame: Frame;
  readonly rows: Reloaded;
  readonly output: Output;
  /** The thread's first row among the partial ones; undefined where the output is final. */
  readonly partialRow: Reg<'u32'> | undefined;
  /** Start of the head's rows, or of all partial rows; undefined where they stay in shared memory. */
  readonly base: Reg<'global'> | undefined;
  readonly tokenStride: Reg<'u64'>;
  /** For each tile of 8 channels, the scales of the thread's two channels; empty if V has none, or has them by tile. */
  readonly scales: readonly (readonly Reg<'f32'>[])[];
  readonly means: readonly (readonly Reg<'f32'>[])[];
}

export function writeResults(
  frame: Frame,
  parked: Parked,
  share: Share | undefined,
  state: SoftmaxState,
  output: Output,
): void {
  const { b, config, integer, pointer, strides, fp8, channelTiles } = frame;
  // They go to where K and V were.
  if (frame.results !== undefined) frame.sync();
  const rows = parked.reload();
  const { sequence, head, keyHead, queryLength, threadRow, rowIndex, rowBias, t2 } = rows;
  const queryHeads = b.loadParameter(integer.queryHeads);
  const keyHeads = b.div(queryHeads, b.loadParameter(integer.headsPerKeyHead));
  const sequenceHead = b.mad(sequence, keyHeads, keyHead);
  const outputStrides = { batch: strides.outputBatch, head: strides.outputHead };
  const all = () => b.loadPointer(pointer.output);
  const base =
    frame.results !== undefined
      ? undefined
      : config.split
        ? all()
        : headAddress(b, all(), { sequence, head }, outputStrides);
  const tokenStride = b.loadParameter(strides.outputToken);
  const channelTerms = (name: 'valueScale' | 'valueMean') =>
    Array.from({ length: channelTiles }, (_, n) => {
      const terms = b.loadPointer(pointer[name]);
      const own = offset(b, terms, b.mad(sequenceHead, config.paddedValueDim, t2), 4);
      return b.ldVector('f32', 2, own, n * 32, { readOnly: true });
    });
  const scales = fp8 && frame.tiles.valueScales === undefined ? channelTerms('valueScale') : [];
  const means = config.smoothV ? channelTerms('valueMean') : [];
  const partialRow =
    frame.results !== undefined
      ? threadRow
      : share === undefined
        ? undefined
        : b.mad(share.part, rowsOfPart(frame, queryHeads), b.add(firstPartialRow(frame, rows), threadRow));
  const results: Results = { frame, rows, output, partialRow, base, tokenStride, scales, means };
  for (const [r, max] of state.max.entries()) {
    const row = b.as(b.add(rowIndex, 8 * r), 'u32');
    const { sum, exact } = rowSums(frame, state, r);
    // A row of Q that is not finite has a NaN bias.
    const bias = rowBias(r);
    const { empty, factor } = rowFactor(b, sum, bias, unitOf(frame, output));
    b.if(b.setp('lt', row, queryLength), () => {
      const joined = joinRowSink(results, row, { sum, max, empty, bias }, exact);
      if (config.lse || isPartial(frame))
        storeLse(results, r, row, joined?.lse ?? lseOf(frame, { sum: exact, max, empty, bias }));
      storeRow(results, r, row, factor, empty, joined?.keep);
    });
  }
}

/**
 * Partial rows of one part of the keys.
 *
 * @param loaded heads of Q, where they are in a register
 */
function rowsOfPart({ b, config, integer }: Frame, loaded?: Reg<'u32'>): Reg<'u32'> {
  const queryHeads = () => loaded ?? b.loadParameter(integer.queryHeads);
  // With splits by length a part is of one sequence, whose rows are a tile.
  if (config.splitsByLength === true) return b.mul(queryHeads(), blockQueries(config));
  return b.mul(b.loadParameter(integer.paddedQueries), queryHeads());
}

/** Where the tile's rows begin among those of a part. */
const firstPartialRow = ({ b, config }: Frame, { head, queryRow }: Pick<Reloaded, 'head' | 'queryRow'>): Reg<'u32'> =>
  config.splitsByLength === true ? b.mul(head, blockQueries(config)) : queryRow;

/** What a thread has is not a row's whole result. */
const isPartial = ({ config, results }: Frame) => config.split || results !== undefined;

/** Joins what the warps of a CTA, which took different keys, have of each row: one row a warp. */
export function joinWarps(frame: Frame, parked: Parked, share: Share | undefined): void {
  const { b, config, pointer, strides, sinks, results, ownBytes } = frame;
  if (results === undefined) return;
  const { paddedValueDim, keyWarps } = config;
  b.section('the warps of the CTA join their rows');
  b.barSync();
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  eachJoinedRow(frame, parked, thread, ({ inTile, ...row }) => {
    const base = b.sharedAddress(results.base);
    const sums = weightedSums(b, paddedValueDim, lane, b.constant('u32', keyWarps), {
      output: b.add(base, b.as(b.mul(inTile, paddedValueDim * 4), 'shared')),
      lse: b.add(base, b.as(b.mad(inTile, 4, lseOffset(config)), 'shared')),
      ...{ space: 'shared', step: ownBytes },
    });
    if (share === undefined) {
      const place = { output: b.loadPointer(pointer.output), lse: () => b.loadPointer(pointer.lse) };
      storeJoined(b, { ...config, rowsAreHeads: config.sameBand }, { ...place, strides, sinks, lane }, row, sums);
      return;
    }
    const partialRow = b.mad(share.part, rowsOfPart(frame), row.partialRow);
    const outputs = offset(b, b.loadPointer(pointer.output), partialRow, paddedValueDim * 4);
    storePartial(b, paddedValueDim, lane, sums, outputs, offset(b, b.loadPointer(pointer.lse), partialRow, 4));
  });
}

/** Where a warp's logsumexps lie behind its rows of output. */
const lseOffset = (config: AttentionConfig) => blockQueries(config) * config.paddedValueDim * 4;

/** Emits `body` in a loop over this warp's rows of the tile. */
function eachJoinedRow(
  frame: Frame,
  parked: Parked,
  thread: Reg<'u32'>,
  body: (row: JoinedRow & { readonly inTile: Reg<'u32'> }) => void,
): void {
  const { b, config } = frame;
  const reloaded = parked.reload();
  const { sequence, head, queryStart, queryLength, firstRow } = reloaded;
  const firstPartial = firstPartialRow(frame, reloaded);
  const inTile = b.mov(b.shr(thread, 5));
  const rows = b.min(b.sub(queryLength, firstRow), blockQueries(config));
  b.loop(
    () => b.setp('lt', inTile, rows),
    () => {
      const joined = { partialRow: b.add(firstPartial, inTile), row: b.add(firstRow, inTile) };
      body({ ...joined, ...{ inTile, sequence, head, queryStart, queryLength } });
      b.add(inTile, config.warps * config.keyWarps, inTile);
    },
  );
}

/** Joins the splits of the tile of rows, if this CTA's is the last of them: one row a warp. */
export function joinSplits(frame: Frame, parked: Parked, item: Reg<'u32'>, share: Share | undefined): void {
  const { b, config, integer, pointer, strides, join, sinks, tiles } = frame;
  if (join === undefined || share === undefined) return;
  const { first } = share;
  // Loaded anew: no register holds it over the loop.
  const splits = first === undefined ? b.loadParameter(integer.splits) : share.splits;
  const thread = b.special('%tid.x');
  const arrival = {
    counter: offset(b, b.loadPointer(join.arrivals), item, 4),
    splits,
    isFirst: b.setp('eq', thread, 0),
    sync: () => b.barSync(),
    // The list's address is not needed any more.
    word: b.sharedAddress(tiles.parked.base + 52),
  };
  whenLast(b, arrival, () => {
    const place = {
      partialOutput: b.loadPointer(pointer.output),
      partialLse: b.loadPointer(pointer.lse),
      output: b.loadPointer(join.joinedOutput),
      lse: () => b.loadPointer(join.joinedLse),
      ...{ splits, strides, sinks, lane: b.and(thread, 31) },
      rowsOfSplit: rowsOfPart(frame),
    };
    const ofRows = { ...config, rowsAreHeads: config.sameBand };
    eachJoinedRow(frame, parked, thread, (row) => {
      const partialRow = first === undefined ? row.partialRow : b.mad(first, place.rowsOfSplit, row.partialRow);
      joinRow(b, ofRows, place, { ...row, partialRow });
    });
  });
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
function lseOf(frame: Frame, rowSum: RowSum, natural = !isPartial(frame)): Reg<'f32'> {
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
  if (sinks === undefined || isPartial(frame)) return undefined;
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
  if (frame.results !== undefined && partialRow !== undefined) {
    const first = frame.results.base + lseOffset(frame.config);
    const own = b.add(frame.own(first), b.as(b.shl(b.add(partialRow, 8 * r), 2), 'shared'));
    b.when(b.setp('eq', t2, 0), () => b.st(lse, own));
    return;
  }
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
  const type = isPartial(frame) ? 'float32' : config.outputType;
  const rowAddress = () => {
    if (frame.results !== undefined && partialRow !== undefined) {
      const inTile = b.add(partialRow, 8 * r);
      return b.add(frame.own(frame.results.base), b.as(b.mul(inTile, config.paddedValueDim * 4), 'shared'));
    }
    if (base === undefined) throw new Error('no place for output');
    return partialRow === undefined
      ? offset64(b, base, b.add(queryStart, row), tokenStride)
      : offset(b, base, b.add(partialRow, 8 * r), config.paddedValueDim * 4);
  };
  const ofRow = rowAddress();
  const address =
    ofRow.kind === 'shared'
      ? b.add(ofRow, b.as(b.mul(t2, 4), 'shared'))
      : offset(b, ofRow as Reg<'global'>, t2, BYTES[type]);
  const width = isPartial(frame) ? config.paddedValueDim : config.valueDim;
  for (let n = 0; n < channelTiles && n * 8 < width; n++) {
    const pair = sumsOf(frame, output, r, n).map((value, j) => {
      const factor = scales.length > 0 ? b.mul(rowFactor, at(at(scales, n), j)) : rowFactor;
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
