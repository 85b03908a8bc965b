/** What a consumer thread holds in registers from tile to tile of an item of work. */
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { FLOAT32_MAX } from '../parts/constants.ts';
import { at } from '../parts/lists.ts';
import type { RingPlace } from '../parts/ring.ts';
import type { EachScore } from '../parts/scores.ts';
import { type Frame, WGMMA_BLOCK_K } from './frame.ts';
import { type ConsumerThread, eachRow, type Rows } from './rows.ts';
import type { TileScales, Walk } from './walk.ts';
import type { Work } from './work.ts';

/** The scores of a tile: register 4n + i holds row (i >> 1), column 8n + (i & 1) from the thread's first ones. */
export interface Scores {
  /** Sums of the products, and the same registers as floats. */
  readonly integers: readonly Reg<'s32'>[];
  readonly floats: readonly Reg<'f32'>[];
  readonly each: EachScore;
}

export function makeScores({ b }: Frame): Scores {
  const integers = b.regs('s32', WGMMA_BLOCK_K / 2);
  const floats = integers.map((register) => b.as(register, 'f32'));
  const each: EachScore = (body) => {
    for (const [index, score] of floats.entries()) body(score, (index >> 1) & 1, 8 * (index >> 2) + (index & 1));
  };
  return { integers, floats, each };
}

/** The online softmax of the thread's rows. */
export interface SoftmaxState {
  /** Finite also before a row's first key, so that no difference is one of infinities. */
  readonly max: readonly Reg<'f32'>[];
  readonly sum: readonly Reg<'f32'>[];
  /** What the output must be multiplied by before the tile at hand is added, and a column of row sums among it. */
  readonly factor: readonly Reg<'f32'>[];
  readonly sumFactor: readonly Reg<'f32'>[];
}

export function makeSoftmaxState({ b, config }: Frame): SoftmaxState {
  const max = eachRow(() => b.constant('f32', -FLOAT32_MAX));
  const sum = eachRow(() => b.constant('f32', 0));
  const factor = eachRow(() => b.constant('f32', 1));
  return { max, sum, factor, sumFactor: config.onesColumn ? eachRow(() => b.constant('f32', 1)) : factor };
}

/** The output, and P on its way to it. Register i of the output belongs to row (i >> 1) & 1. */
export interface Output {
  /** Scale of V's codes in the last tile taken; the output is in its units. */
  readonly unit: Reg<'f32'>;
  /** Channels, and 8 more with a column of row sums. */
  readonly columns: number;
  readonly registers: readonly Reg<'f32'>[];
  /** Sums of the tensor cores that are still to be added to the output: the output itself where they add to it. */
  readonly sums: readonly Reg<'f32'>[];
  /** P as A fragments. */
  readonly weights: readonly (readonly Reg<'b32'>[])[];
  /** What register i is multiplied by before the tile at hand is added. */
  factorOf(i: number): Reg<'f32'>;
}

export function makeOutput({ b, config, fp8 }: Frame, state: SoftmaxState): Output {
  const { paddedValueDim, promoted, valueChunk, onesColumn } = config;
  const unit = b.constant('f32', 1);
  const columns = paddedValueDim + (onesColumn ? 8 : 0);
  if (!promoted && (valueChunk < columns || onesColumn)) {
    throw new RangeError('sums of PV in chunks, and row sums among them, need promotion');
  }
  const registers = Array.from({ length: columns / 2 }, () => b.constant('f32', 0));
  const sums = !promoted ? registers : valueChunk < columns ? [] : b.regs('f32', columns / 2);
  const weights = Array.from({ length: fp8 ? 4 : 8 }, () => b.regs('b32', 4));
  const factorOf = (i: number) => at(i < paddedValueDim / 2 ? state.factor : state.sumFactor, (i >> 1) & 1);
  return { unit, columns, registers, sums, weights, factorOf };
}

/** Scales of the tile that the softmax takes next. */
export interface KeyScales extends TileScales {
  /** Scale of each 64 keys; its sign says that some of them have exponents, or are not finite. */
  readonly keys: readonly Reg<'f32'>[];
  /** Scale of V's codes. */
  readonly values: Reg<'f32'>;
  /** The item's first 64 keys among all of the head's, and its last among its own. */
  readonly firstGroup: Reg<'u32'>;
  readonly lastGroup: Reg<'s32'>;
}

export function makeKeyScales(frame: Frame, { t }: ConsumerThread, work: Work): KeyScales {
  const { b, config, integer, pointer, fp8, exact } = frame;
  if (exact) {
    const none = { firstGroup: b.constant('u32', 0), lastGroup: b.constant('s32', 0), fetch: () => {} };
    return { keys: [], values: b.constant('f32', 1), ...none };
  }
  const firstGroup = b.shr(b.mad(work.keyHead, b.loadParameter(integer.paddedKeys), work.paddedKeyStart), 6);
  const lastGroup = b.shr(b.sub(b.as(work.keyLength, 's32'), 1), 6);
  const keys = [b.constant('f32', 0), b.constant('f32', 0)];
  const values = b.constant('f32', 1);
  const listed = work.list !== undefined;
  const first = listed ? firstGroup : b.add(firstGroup, b.as(b.shl(work.firstTile, 1), 'u32'));
  const keyScales = b.loadPointer(pointer.keyScale);
  const keyAt = offset(b, keyScales, config.keyScales === 4 ? b.mad(first, 4, t) : first, 4);
  const valueAt = fp8 ? offset(b, b.loadPointer(pointer.valueTileScale), first, 4) : undefined;
  const load = (address: Reg<'global'>, into: Reg<'f32'>, byte = 0) =>
    b.ld('f32', address, byte, { readOnly: true, into });
  const fetchListed = (tile: Reg<'s32'>, exists: Reg<'pred'>) => {
    const own = offset(b, keyAt, b.as(tile, 'u32'), 8 * config.keyScales);
    b.when(exists, () => {
      load(own, at(keys, 0));
      if (valueAt !== undefined) load(offset(b, valueAt, b.as(tile, 'u32'), 8), values);
    });
    const second = b.andPred(exists, b.setp('lt', b.shl(tile, 1), lastGroup));
    b.when(second, () => load(own, at(keys, 1), 4 * config.keyScales));
  };
  const fetchNext = (tile: Reg<'s32'>) => {
    b.when(b.setp('lt', tile, work.lastTile), () => {
      load(keyAt, at(keys, 0));
      if (valueAt !== undefined) load(valueAt, values);
    });
    // The second half of the last tile may not exist.
    b.when(b.setp('lt', b.shl(tile, 1), lastGroup), () => load(keyAt, at(keys, 1), 4 * config.keyScales));
    b.add(keyAt, 8 * config.keyScales, keyAt);
    if (valueAt !== undefined) b.add(valueAt, 8, valueAt);
  };
  const fetch = (tile: Reg<'s32'>, exists: Reg<'pred'> | undefined) =>
    exists === undefined ? fetchNext(tile) : fetchListed(tile, exists);
  return { keys, values, firstGroup, lastGroup, fetch };
}

/** An item of work in the hands of a consumer. */
export interface Item {
  readonly frame: Frame;
  readonly thread: ConsumerThread;
  readonly work: Work;
  readonly rows: Rows;
  /** Scales of the thread's rows of Q; one where they share it, as all scores of 16-bit operands do. */
  readonly queryScale: readonly Reg<'f32'>[];
  /** The stage of the tile whose scores are at hand; undefined unless V is inspected. */
  readonly inspected: RingPlace | undefined;
  readonly scores: Scores;
  readonly state: SoftmaxState;
  readonly output: Output;
  readonly walk: Walk;
  readonly scales: KeyScales;
}
