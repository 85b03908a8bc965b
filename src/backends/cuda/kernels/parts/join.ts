/**
 * Partial results of the splits of the keys, and how a row's are joined: each split's output is normalized by its own sum, so they are
 * averaged with weights 2^(lse - max lse). One warp takes one row.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset, offset64, pointers } from './addresses.ts';
import { BYTES } from './elements.ts';
import { headAddress } from './epilogue.ts';
import { at } from './lists.ts';
import { joinSink, loadSink, type Sinks } from './sinks.ts';

/** Byte strides of the joined output and LSE. */
export const OUTPUT_STRIDES = ['outputBatch', 'outputHead', 'outputToken', 'lseBatch', 'lseHead'] as const;

/**
 * Parameters of an attention kernel whose last CTA joins: the caller's output and LSE, and how many splits of each tile of rows have
 * arrived, all 0 before the launch and after it.
 */
const JOIN_POINTERS = ['joinedOutput', 'joinedLse', 'arrivals'] as const;
export type JoinParameters = Readonly<Record<(typeof JOIN_POINTERS)[number], Parameter<'u64'>>>;

export const joinParameters = (b: KernelBuilder): JoinParameters => pointers(b, JOIN_POINTERS);

export interface JoinConfig {
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly outputType: DType;
  /** Every fourth channel of the output lies at a multiple of four elements. */
  readonly alignedFours: boolean;
  readonly lse: boolean;
  /** With sinks: rows are heads over one token, each of which has its own. */
  readonly rowsAreHeads: boolean;
  /** Splits whose loads are under way at once where Dv is at most {@link CHANNELS_AT_ONCE}: five registers each. Default 16. */
  readonly splitsAtOnce?: number;
}

/** Where partial results lie, and where the joined ones go. */
export interface JoinPlace {
  /** `[split, head, row, paddedValueDim]` float32. */
  readonly partialOutput: Reg<'global'>;
  /** `[split, head, row]` float32, base 2. */
  readonly partialLse: Reg<'global'>;
  readonly output: Reg<'global'>;
  readonly lse: () => Reg<'global'>;
  readonly splits: Reg<'u32'>;
  readonly rowsOfSplit: Reg<'u32'>;
  readonly strides: Readonly<Record<(typeof OUTPUT_STRIDES)[number], Parameter<'u64'>>>;
  readonly sinks: Sinks | undefined;
  readonly lane: Reg<'u32'>;
}

export interface JoinedRow {
  /** Among a split's partial rows. */
  readonly partialRow: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  /** In its sequence. */
  readonly row: Reg<'u32'>;
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
}

/** Channels that a warp loads at once, four a lane. */
const CHANNELS_AT_ONCE = 128;

export interface Sums {
  /** For each {@link CHANNELS_AT_ONCE} the lane's four channels. */
  readonly channels: readonly (readonly Reg<'f32'>[])[];
  readonly total: Reg<'f32'>;
  /** What weights are relative to, in base 2. */
  readonly reference: Reg<'f32'>;
}

/** Joins one row, by a whole warp. */
export function joinRow(b: KernelBuilder, config: JoinConfig, place: JoinPlace, joined: JoinedRow): void {
  const { partialOutput, partialLse, splits, rowsOfSplit, lane } = place;
  const { paddedValueDim } = config;
  const { partialRow } = joined;
  const source = {
    space: 'global' as const,
    output: offset(b, partialOutput, partialRow, paddedValueDim * 4),
    lse: offset(b, partialLse, partialRow, 4),
    outputStep: b.as(b.mulWide(rowsOfSplit, paddedValueDim * 4), 'global'),
    lseStep: b.as(b.mulWide(rowsOfSplit, 4), 'global'),
  };
  storeJoined(b, config, place, joined, weightedSums(b, paddedValueDim, lane, splits, source, config.splitsAtOnce));
}

/** Stores what a row of partial results has become for the caller. */
export function storeJoined(
  b: KernelBuilder,
  config: JoinConfig,
  place: Pick<JoinPlace, 'output' | 'lse' | 'strides' | 'sinks' | 'lane'>,
  joined: Omit<JoinedRow, 'partialRow'>,
  { channels, total, reference }: Sums,
): void {
  const { row, head, sequence, queryStart, queryLength } = joined;
  const { lane, sinks, strides } = place;
  const empty = b.setp('eq', total, 0);
  const inverse = b.rcp(total);
  let joint: Reg<'f32'> | undefined;
  if (sinks !== undefined) {
    const inside = b.setp('lt', row, queryLength);
    const ofRow = config.rowsAreHeads ? b.add(b.mul(head, queryLength), row) : head;
    const withSink = joinSink(b, b.add(b.lg2(total), reference), loadSink(b, sinks, ofRow, inside));
    b.mul(inverse, withSink.keep, inverse);
    joint = withSink.lse;
  }
  b.when(empty, () => b.set(inverse, 0));
  const token = b.add(queryStart, row);
  const ofHead = { sequence, head };
  const output = headAddress(b, place.output, ofHead, { batch: strides.outputBatch, head: strides.outputHead });
  const destination = offset(
    b,
    offset64(b, output, token, b.loadParameter(strides.outputToken)),
    lane,
    4 * BYTES[config.outputType],
  );
  channels.forEach((four, i) => {
    const values = four.map((sum) => b.mul(sum, inverse));
    storeFour(b, config, destination, i * CHANNELS_AT_ONCE, values, b.shl(lane, 2));
  });
  if (config.lse) {
    const value = b.mul(joint ?? b.add(b.lg2(total), reference), Math.LN2);
    if (joint === undefined) b.when(empty, () => b.set(value, Number.NEGATIVE_INFINITY));
    const ofRow = headAddress(b, place.lse(), ofHead, { batch: strides.lseBatch, head: strides.lseHead });
    const address = offset(b, ofRow, token, 4);
    b.when(b.setp('eq', lane, 0), () => b.st(value, address));
  }
}

/** Stores what partial results of a row make as one partial result. */
export function storePartial(
  b: KernelBuilder,
  paddedValueDim: number,
  lane: Reg<'u32'>,
  { channels, total, reference }: Sums,
  output: Reg<'global'>,
  lse: Reg<'global'>,
): void {
  const empty = b.setp('eq', total, 0);
  const inverse = b.rcp(total);
  const joint = b.add(b.lg2(total), reference);
  b.when(empty, () => {
    b.set(inverse, 0);
    b.set(joint, Number.NEGATIVE_INFINITY);
  });
  const own = b.add(output, b.as(b.mulWide(lane, 16), 'global'));
  channels.forEach((four, i) => {
    const values = four.map((sum) => b.mul(sum, inverse));
    const left = paddedValueDim - i * CHANNELS_AT_ONCE;
    const store = () => b.stVector(values, own, i * CHANNELS_AT_ONCE * 4);
    if (left >= CHANNELS_AT_ONCE) store();
    else b.when(b.setp('lt', b.shl(lane, 2), left), store);
  });
  b.when(b.setp('eq', lane, 0), () => b.st(joint, lse));
}

/** A row's partial results of the first split, and the bytes to the next split's. */
type RowSource =
  | {
      readonly space: 'global';
      readonly output: Reg<'global'>;
      readonly lse: Reg<'global'>;
      readonly outputStep: Reg<'global'>;
      readonly lseStep: Reg<'global'>;
    }
  | { readonly space: 'shared'; readonly output: Reg<'shared'>; readonly lse: Reg<'shared'>; readonly step: number };

/** The lane's places in a {@link RowSource}, and how they move to the next split. */
function cursorOf(b: KernelBuilder, first: RowSource, lane: Reg<'u32'>) {
  if (first.space === 'global') {
    const [source, lse] = [b.add(first.output, b.as(b.mulWide(lane, 16), 'global')), b.mov(first.lse)];
    const advance = () => {
      b.add(source, first.outputStep, source);
      b.add(lse, first.lseStep, lse);
    };
    return { source, lse, advance };
  }
  const [source, lse] = [b.add(first.output, b.as(b.shl(lane, 4), 'shared')), b.mov(first.lse)];
  const advance = () => {
    b.add(source, first.step, source);
    b.add(lse, first.step, lse);
  };
  return { source, lse, advance };
}

/** Sums of a row's partial outputs with their weights, in the order of the splits; the loads of many are under way at once. */
export function weightedSums(
  b: KernelBuilder,
  paddedValueDim: number,
  lane: Reg<'u32'>,
  splits: Reg<'u32'>,
  first: RowSource,
  mostAtOnce = 16,
): Sums {
  const parts = Math.ceil(paddedValueDim / CHANNELS_AT_ONCE);
  const splitsAtOnce = parts === 1 ? mostAtOnce : 8;
  const zeros = (count: number) => Array.from({ length: count }, () => b.constant('f32', 0));
  const channels = Array.from({ length: parts }, () => zeros(4));
  const total = b.constant('f32', 0);
  const maximum = b.constant('f32', Number.NEGATIVE_INFINITY);
  const reference = b.constant('f32', 0);
  const { source, lse: lseAt, advance } = cursorOf(b, first, lane);
  const split = b.constant('u32', 0);
  b.loop(
    () => b.setp('lt', split, splits),
    () => {
      const loaded = Array.from({ length: splitsAtOnce }, (_, ahead) => {
        const inside = b.setp('lt', b.add(split, ahead), splits);
        const lse = b.constant('f32', Number.NEGATIVE_INFINITY);
        b.when(inside, () => b.ld('f32', lseAt, 0, { into: lse }));
        const values = channels.map((_, i) => {
          const four = zeros(4);
          const left = paddedValueDim - i * CHANNELS_AT_ONCE;
          const has = left >= CHANNELS_AT_ONCE ? inside : b.andPred(inside, b.setp('lt', b.shl(lane, 2), left));
          b.when(has, () => b.ldVector('f32', 4, source, i * CHANNELS_AT_ONCE * 4, { into: four }));
          return four;
        });
        advance();
        return { lse, values };
      });
      const before = b.mov(maximum);
      for (const { lse } of loaded) b.max(maximum, lse, maximum);
      b.mov(b.selp(0, maximum, b.setp('eq', maximum, Number.NEGATIVE_INFINITY)), reference);
      const kept = b.ex2(b.sub(before, reference));
      b.mul(total, kept, total);
      for (const sum of channels.flat()) b.mul(sum, kept, sum);
      for (const { lse, values } of loaded) {
        const weight = b.ex2(b.sub(lse, reference));
        b.add(total, weight, total);
        values.forEach((four, i) => {
          four.forEach((value, c) => {
            b.fma(value, weight, at(at(channels, i), c), at(at(channels, i), c));
          });
        });
      }
      b.add(split, splitsAtOnce, split);
    },
  );
  return { channels, total, reference };
}

/** Stores a lane's four channels from `first` on, those beyond Dv left out. */
function storeFour(
  b: KernelBuilder,
  { valueDim, outputType, alignedFours }: JoinConfig,
  destination: Reg<'global'>,
  first: number,
  values: readonly Reg<'f32'>[],
  channel: Reg<'u32'>,
): void {
  const bytes = BYTES[outputType];
  const kind = outputType === 'float16' ? 'f16x2' : 'bf16x2';
  if (alignedFours && valueDim % 4 === 0) {
    const whole =
      outputType === 'float32'
        ? values
        : [0, 2].map((c) => b.as(b.cvtPack(kind, at(values, c), at(values, c + 1)), 'b32'));
    const store = () => b.stVector(whole, destination, first * bytes);
    if (first + CHANNELS_AT_ONCE <= valueDim) store();
    else b.when(b.setp('lt', b.as(channel, 's32'), valueDim - first), store);
    return;
  }
  values.forEach((value, c) => {
    const stored = outputType === 'float32' ? value : b.cvt(outputType === 'float16' ? 'f16' : 'bf16', value);
    b.when(b.setp('lt', b.as(b.add(channel, c), 's32'), valueDim - first), () =>
      b.st(stored, destination, (first + c) * bytes),
    );
  });
}

/** The threads of a CTA that have stored their partial results, and what they tell each other with. */
export interface Arrival {
  /** Counts the splits of the tile of rows. */
  readonly counter: Reg<'global'>;
  readonly splits: Reg<'u32'>;
  /** True in one of the threads. */
  readonly isFirst: Reg<'pred'>;
  /** A barrier of the threads. */
  readonly sync: () => void;
  /** A word of shared memory. */
  readonly word: Reg<'shared'>;
}

/**
 * Emits `join` for the CTA that is the last of its tile's splits to arrive: it sees what the others have stored. Every CTA of the tile must
 * come by, and the counter is 0 again when the last has.
 */
export function whenLast(b: KernelBuilder, { counter, splits, isFirst, sync, word }: Arrival, join: () => void): void {
  b.section('the last of the splits joins them');
  b.fenceDevice();
  sync();
  const last = b.sub(splits, 1);
  b.when(isFirst, () => b.st(b.atomInc(counter, last), word));
  sync();
  const before = b.ld('u32', word);
  b.if(b.setp('eq', before, last), () => {
    b.fenceDevice();
    join();
  });
}
