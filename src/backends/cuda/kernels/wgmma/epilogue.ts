/** The end of an item of work: normalizes and stores a thread's rows. */
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, logSumExp, rowFactor, storePair } from '../parts/epilogue.ts';
import { joinRow, whenLast } from '../parts/join.ts';
import { at } from '../parts/lists.ts';
import { quadSum, transposeInQuad } from '../parts/quad.ts';
import { joinSink, loadSink } from '../parts/sinks.ts';
import { eachRow } from './rows.ts';
import type { Item } from './state.ts';
import { tokenOf } from './work.ts';

/** A row ready to be stored. */
interface FinishedRow {
  /** What its output is multiplied by. */
  readonly factor: Reg<'f32'>;
  /** What the head's sink leaves of it; undefined without sinks. */
  readonly keep: Reg<'f32'> | undefined;
  /** It saw no key. */
  readonly empty: Reg<'pred'>;
  /** It exists. */
  readonly inside: Reg<'pred'>;
  /** Address of the row's channel 2t. */
  readonly address: Reg<'global'>;
}

export function writeResults(item: Item): void {
  const { frame, thread, work, output } = item;
  const { b, config, integer, pointer, strides, fp8 } = frame;
  const { paddedValueDim, valueDim } = config;
  const queryHeads = b.loadParameter(integer.queryHeads);
  const keyHeads = b.div(queryHeads, b.loadParameter(integer.headsPerKeyHead));
  const channelBase = b.mad(b.mad(work.sequence, keyHeads, work.keyHead), paddedValueDim, thread.t2);
  const channelTerms = (of: Parameter<'u64'>) => {
    const base = offset(b, b.loadPointer(of), channelBase, 4);
    return (n: number) => b.ldVector('f32', 2, base, n * 32, { readOnly: true });
  };
  const scaleAt = fp8 ? channelTerms(pointer.valueScale) : undefined;
  const meanAt = config.smoothV ? channelTerms(pointer.valueMean) : undefined;
  const tokenStride = b.loadParameter(strides.outputToken);
  const type = config.split ? 'float32' : config.outputType;
  const width = config.split ? paddedValueDim : valueDim;
  const finished = eachRow((r) => finishRow(item, r, queryHeads, tokenStride));
  for (let n = 0; n < paddedValueDim / 8 && n * 8 < width; n++) {
    const scales = scaleAt?.(n);
    const means = meanAt?.(n);
    for (const [r, { factor, keep, empty, inside, address }] of finished.entries()) {
      const channel = (j: number) => {
        // A channel's scale may be so small or large that only the result itself can bear it.
        const result = b.mul(at(output.registers, 4 * n + 2 * r + j), factor);
        if (scales !== undefined) {
          b.mul(result, at(scales, j), result);
          // A sequence without keys has no scales of V either.
          b.when(empty, () => b.set(result, 0));
        }
        if (means === undefined) return result;
        const mean = at(means, j);
        const smoothed = keep === undefined ? b.add(result, mean) : b.fma(mean, keep, result);
        b.when(empty, () => b.set(smoothed, 0));
        return smoothed;
      };
      storePair(b, [channel(0), channel(1)], address, { type, first: n * 8, width, t2: thread.t2, inside });
    }
  }
}

/** What 132 multiprocessors have of eight heads, with two CTAs each, is read at once. */
const SPLITS_AT_ONCE = 33;
/** The barrier at which the consumers meet when a tile of rows is done. */
const JOIN_BARRIER = 12;

/** Joins the splits of the tile of rows, if this CTA's is the last of them: one row a warp. */
export function joinSplits({ frame, thread, work }: Item): void {
  const { b, config, integer, pointer, strides, join, sinks, shared, tiles } = frame;
  if (join === undefined) return;
  const consumers = 128 * config.consumers;
  const splits = b.loadParameter(integer.splits);
  const warp = b.sub(b.shr(frame.thread, 5), 4);
  const arrival = {
    counter: offset(b, b.loadPointer(join.arrivals), work.item, 4),
    splits,
    isFirst: b.andPred(b.setp('eq', warp, 0), thread.leader),
    sync: () => b.namedBarrier('bar.sync', b.constant('u32', JOIN_BARRIER), consumers),
    word: b.add(shared, tiles.arrived.base),
  };
  whenLast(b, arrival, () => {
    const { sequence, queryStart, queryLength, paddedQueryStart } = work;
    const paddedQueries = b.loadParameter(integer.paddedQueries);
    const place = {
      partialOutput: b.loadPointer(pointer.output),
      partialLse: b.loadPointer(pointer.lse),
      output: b.loadPointer(join.joinedOutput),
      lse: () => b.loadPointer(join.joinedLse),
      ...{ splits, strides, sinks, lane: b.and(frame.thread, 31) },
      rowsOfSplit: b.mul(paddedQueries, b.loadParameter(integer.queryHeads)),
    };
    const { packedHeads } = config;
    const tileRow = b.mov(b.add(work.firstRow, warp));
    const end = b.min(b.add(work.firstRow, frame.rows), b.mul(queryLength, packedHeads));
    b.loop(
      () => b.setp('lt', tileRow, end),
      () => {
        const row = tokenOf(frame, tileRow);
        const head = packedHeads === 1 ? work.head : b.add(work.head, b.and(tileRow, packedHeads - 1));
        const partialRow = b.add(b.mad(head, paddedQueries, paddedQueryStart), row);
        joinRow(b, { ...config, rowsAreHeads: false, splitsAtOnce: SPLITS_AT_ONCE }, place, {
          partialRow,
          sequence,
          head,
          row,
          queryStart,
          queryLength,
        });
        b.add(tileRow, 4 * config.consumers, tileRow);
      },
    );
  });
}

/**
 * {@link writeResults} of 16-bit outputs whose rows are multiples of 16 bytes: the four lanes of a row trade the pairs of
 * four chunks so that each has a whole one.
 */
export function writeWideResults(item: Item): void {
  const { frame, thread, output } = item;
  const { b, config, integer, strides } = frame;
  const { valueDim, outputType } = config;
  const queryHeads = b.loadParameter(integer.queryHeads);
  const tokenStride = b.loadParameter(strides.outputToken);
  const chunks = valueDim / 8;
  const odd = b.setp('ne', b.and(thread.t, 1), 0);
  const upper = b.setp('ne', b.and(thread.t, 2), 0);
  const kind = outputType === 'float16' ? 'f16x2' : 'bf16x2';
  for (let r = 0; r < 2; r++) {
    const { factor, inside, address } = finishRow(item, r, queryHeads, tokenStride);
    // From the row's channel 2t to channel 8t.
    const own = b.add(address, b.as(b.mulWide(thread.t, 12), 'global'));
    for (let first = 0; first < chunks; first += 4) {
      const words = Array.from({ length: 4 }, (_, i) => {
        if (first + i >= chunks) return b.constant('b32', 0);
        const [low, high] = [0, 1].map((j) => b.mul(at(output.registers, 4 * (first + i) + 2 * r + j), factor));
        return b.as(b.cvtPack(kind, low as Reg<'f32'>, high as Reg<'f32'>), 'b32');
      });
      const whole = transposeInQuad(b, words, odd, upper);
      const exists =
        first + 4 <= chunks ? inside : b.andPred(inside, b.setp('lt', b.as(thread.t, 's32'), chunks - first));
      b.when(exists, () => b.stVector(whole, own, first * 16));
    }
  }
}

/** Sums a row up, stores its logsumexp, and finds its place. */
function finishRow(item: Item, r: number, queryHeads: Reg<'u32'>, tokenStride: Reg<'u64'>): FinishedRow {
  const { frame, thread, work, rows, state, output } = item;
  const { b, config, integer, pointer, strides, fp8, sinks } = frame;
  const { sequence } = work;
  const { exponentOffset, paddedValueDim } = config;
  const sum = quadSum(b, config.onesColumn ? at(output.registers, paddedValueDim / 2 + 2 * r) : at(state.sum, r));
  const bias = rows.bias(r);
  const { empty, factor } = rowFactor(b, sum, bias, fp8 ? output.unit : undefined);
  const row = rows.row(r);
  const token = rows.token(row);
  const head = rows.head(row);
  const inside = b.setp('lt', token, work.queryLength);
  const partialRow =
    work.split === undefined
      ? undefined
      : b.mad(
          work.split,
          b.mul(b.loadParameter(integer.paddedQueries), queryHeads),
          b.add(b.mad(head, b.loadParameter(integer.paddedQueries), work.paddedQueryStart), token),
        );
  const terms = { exponentOffset, biased: config.softcap };
  const lseOf = (natural: boolean) => logSumExp(b, { sum, max: at(state.max, r), empty, bias }, { ...terms, natural });
  const joined =
    sinks === undefined || config.split ? undefined : joinSink(b, lseOf(false), loadSink(b, sinks, head, inside));
  if (config.lse || config.split) {
    const lse = joined === undefined ? lseOf(!config.split) : b.mul(joined.lse, Math.LN2);
    let address = b.loadPointer(pointer.lse);
    if (partialRow === undefined) {
      const lseStrides = { batch: strides.lseBatch, head: strides.lseHead };
      address = headAddress(b, address, { sequence, head }, lseStrides);
      address = offset(b, address, b.add(work.queryStart, token), 4);
    } else address = offset(b, address, partialRow, 4);
    b.when(b.andPred(inside, b.setp('eq', thread.t, 0)), () => b.st(lse, address));
  }
  let address = b.loadPointer(pointer.output);
  if (partialRow === undefined) {
    address = headAddress(b, address, { sequence, head }, { batch: strides.outputBatch, head: strides.outputHead });
    address = offset64(b, address, b.add(work.queryStart, token), tokenStride);
  } else address = offset(b, address, partialRow, paddedValueDim * 4);
  const type = config.split ? 'float32' : config.outputType;
  const keep = joined?.keep;
  return {
    factor: keep === undefined ? factor : b.mul(factor, keep),
    keep,
    empty,
    inside,
    address: offset(b, address, thread.t2, BYTES[type]),
  };
}
