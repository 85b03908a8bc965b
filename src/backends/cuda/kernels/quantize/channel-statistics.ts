/**
 * What smoothing and scaling need to know of K's and V's channels, from a sample of their tokens, both in one launch: the mean of
 * each channel, and a scale for V in FP8, `[sequence, head, paddedDim]` float32.
 *
 * A sample is enough. Softmax does not change when any constant vector is subtracted from all keys, nor the output when one is
 * subtracted from V and added back, and the mean of n tokens deviates from the mean of all by sigma / sqrt(n), far below
 * what quantization resolves. V's scale of a channel need not bound all of its tokens where each tile has a scale of its own
 * besides (`quantizeKeyValue`). Elements that are not finite are left out, and keys that no row sees. `smoothingMean` of
 * src/quantization/smoothing.ts says what the mean is where tokens are of very different sizes.
 */
import { LEAST_SIZE, ONE_SIZE } from '../../../../quantization/smoothing.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, offset64, pointers } from '../parts/addresses.ts';
import { INFINITY_BITS, MIN_SCALE, nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEightPacked, unpackEight } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type HiddenKeys, isVisible, loadVisibleRange, visibleBitsAt } from './visible-keys.ts';
import { type Stretch, visibleStretch, wholeStretch } from './visible-stretch.ts';

/** Tokens of a long sequence that are looked at: so many, and up to twice as many less one. */
export const SAMPLED_TOKENS = 128;
/** Sequences shorter than this are looked at as a whole. */
export const WHOLE_BELOW = 512;
/**
 * One token is taken from each stretch of `floor(length / SAMPLED_TOKENS)`, at a place in it that moves by the golden ratio from
 * stretch to stretch: tokens of an image lie in rows, and a constant step could look at one column only.
 */
const GOLDEN_RATIO = 0x9e3779b9;
/** Sums of all sampled numbers, each up to float32's largest, are kept finite by adding this share of each. */
const SUM_SHARE = 1 / WHOLE_BELOW;
/** Magnitudes are taken to lie within these powers of two: their inverse squares, and sums of them, are finite. */
const MOST_LOG2 = 55;

/** V's scale maps the largest sampled magnitude to half of E4M3's largest, so that most tiles need no scale of their own. */
const LARGEST_CODE = 448 / 2;
/**
 * A channel is scaled as if it held at least this share of its head's largest magnitude: a value that the sample missed then
 * costs the other channels of its tile at most 10 of E4M3's 15 powers of two.
 */
const SMALLEST_SHARE = 2 ** -10;
/** A head whose sample stays below it is scaled as if its channels held 1. */
const SMALLEST_MAXIMUM = 1e-30;

/** The tokens of a sequence that are sampled, in order; what {@link channelStatistics} looks at. */
export function sampledTokens(length: number): number[] {
  const stretch = length < WHOLE_BELOW ? 1 : Math.floor(length / SAMPLED_TOKENS);
  const tokens: number[] = [];
  for (let i = 0; i * stretch < length; i++) {
    const within = Math.floor((Math.imul(i, GOLDEN_RATIO) >>> 0) * stretch * 2 ** -32);
    if (i * stretch + within < length) tokens.push(i * stretch + within);
  }
  return tokens;
}

/** V's scales of one head from the largest sampled magnitude of each channel. */
export function sampledScales(maxima: Float32Array): Float32Array {
  const largest = maxima.reduce((a, b) => Math.max(a, b), 0);
  const floor = largest < SMALLEST_MAXIMUM ? 1 : Math.fround(largest * SMALLEST_SHARE);
  return maxima.map((maximum) => Math.max(maximum, floor) * Math.fround(1 / LARGEST_CODE));
}

/** The statistics that are taken of an operand. */
export interface StatisticsOf {
  readonly dim: number;
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
  readonly mean: boolean;
  /** Scales of V; `paddedDim` is a multiple of 32 then. */
  readonly scale: boolean;
}

export interface ChannelStatisticsConfig {
  readonly target: Target;
  readonly dtype: DType;
  /** An operand of which nothing is needed is left out. */
  readonly key: StatisticsOf | undefined;
  readonly value: StatisticsOf | undefined;
  /** How a mask hides keys: keys that no row sees are left out. */
  readonly hiddenKeys: HiddenKeys;
}

export const CHANNEL_STATISTICS_POINTERS = [
  'sequences',
  'k',
  'v',
  'keyMean',
  'valueMean',
  'valueScale',
  'visibleKeys',
] as const;
/** `sequenceHeads`: sequences times heads, the CTAs of an operand; K's CTAs come first. */
export const CHANNEL_STATISTICS_INTEGERS = ['heads', 'sequenceHeads', 'paddedTokens'] as const;
export const CHANNEL_STATISTICS_THREADS = 512;
const WARPS = CHANNEL_STATISTICS_THREADS / 32;

/** What the whole CTA shares. */
interface Frame {
  readonly b: KernelBuilder;
  readonly config: ChannelStatisticsConfig;
  readonly pointer: Record<(typeof CHANNEL_STATISTICS_POINTERS)[number], Parameter<'u64'>>;
  readonly integer: Record<(typeof CHANNEL_STATISTICS_INTEGERS)[number], Parameter<'u32'>>;
  /** A row for each warp in each plane: one plane for every kind of number that is joined. */
  readonly planes: SharedTile;
  readonly warpMaxima: SharedTile;
  /** Logarithms of the sizes of each warp's smallest and largest token; undefined where no mean is wanted. */
  readonly warpSizes: SharedTile | undefined;
  readonly warpCounts: SharedTile | undefined;
  readonly shared: Reg<'shared'>;
  readonly thread: Reg<'u32'>;
}

/** The operand that a CTA reads, and where its results go. */
interface Operand {
  readonly of: StatisticsOf;
  readonly sequenceHead: Reg<'u32'>;
  readonly input: Parameter<'u64'>;
  readonly strides: readonly [batch: Parameter<'u64'>, head: Parameter<'u64'>, token: Parameter<'u64'>];
  readonly mean: Reg<'global'>;
  readonly scale: Reg<'global'> | undefined;
}

/** Threads of a row, each with eight channels. */
const threadsPerRow = ({ paddedDim }: StatisticsOf) => nextPowerOfTwo(paddedDim / 8);
const rowBytesOf = (of: StatisticsOf) => threadsPerRow(of) * 32;
/** Rows of a plane: one for each warp, or for the two warps that a row of more than 256 channels takes. */
const joinedRowsOf = (of: StatisticsOf) => Math.min(WARPS, CHANNEL_STATISTICS_THREADS / threadsPerRow(of));
/** Where a mean will be subtracted, the smallest and the largest value are needed; otherwise the magnitude. */
const needsBothEnds = ({ mean, scale }: StatisticsOf) => mean && scale;
const planesOf = ({ mean, scale }: StatisticsOf) => (mean ? 2 : 0) + (scale ? (mean ? 2 : 1) : 0);

export function channelStatistics(config: ChannelStatisticsConfig): Kernel {
  const { target, key, value, hiddenKeys } = config;
  const b = new KernelBuilder({ name: 'channelStatistics', target, threads: CHANNEL_STATISTICS_THREADS });
  const pointer = pointers(b, CHANNEL_STATISTICS_POINTERS);
  const integer = integers(b, CHANNEL_STATISTICS_INTEGERS);
  const { keyBatch, keyHead, keyToken, valueBatch, valueHead, valueToken } = pointers(b, KEY_VALUE_STRIDES);
  const planeBytes = [key, value].map((of) =>
    of === undefined ? 0 : planesOf(of) * joinedRowsOf(of) * rowBytesOf(of),
  );
  const planes = b.shared('planes', 1, rowMajor(Math.max(...planeBytes)));
  const warpMaxima = b.shared('largest of each warp', 1, rowMajor(WARPS * 4));
  const means = key?.mean === true || value?.mean === true;
  const warpSizes = means ? b.shared('sizes of each warp', 1, rowMajor(WARPS * 8)) : undefined;
  const warpCounts = hiddenKeys === 'none' ? undefined : b.shared('visible keys of each warp', 1, rowMajor(WARPS * 16));
  const shared = b.sharedAddress();

  b.section('which sequence and head');
  const thread = b.special('%tid.x');
  const index = b.special('%ctaid.x');
  const frame: Frame = { b, config, pointer, integer, planes, warpMaxima, warpSizes, warpCounts, shared, thread };
  const keyBody = () => {
    const mean = b.loadPointer(pointer.keyMean);
    const strides = [keyBatch, keyHead, keyToken] as const;
    if (key !== undefined) {
      describe(frame, { of: key, sequenceHead: index, input: pointer.k, strides, mean, scale: undefined });
    }
  };
  const valueBody = () => {
    const sequenceHead = key === undefined ? index : b.sub(index, b.loadParameter(integer.sequenceHeads));
    const [mean, scale] = [b.loadPointer(pointer.valueMean), b.loadPointer(pointer.valueScale)];
    const strides = [valueBatch, valueHead, valueToken] as const;
    if (value !== undefined) describe(frame, { of: value, sequenceHead, input: pointer.v, strides, mean, scale });
  };
  if (key === undefined) valueBody();
  else if (value === undefined) keyBody();
  else b.if(b.setp('lt', index, b.loadParameter(integer.sequenceHeads)), keyBody, valueBody);
  return b.build();
}

/** What one CTA does: sample the tokens of a head, join what the threads found, write the channels' mean and scale. */
function describe(frame: Frame, operand: Operand): void {
  const keys = locate(frame, operand);
  const sample = sampleTokens(frame, operand, keys);
  const channels = sample.channels;
  if (sample.weighted !== undefined) chooseMeans(frame, channels, sample.weighted);
  joinWarps(frame, operand, channels);
  const ofChannel = writeMeans(frame, operand, channels);
  if (operand.scale !== undefined && operand.of.scale) writeScales(frame, operand, operand.scale, ofChannel);
}

/** The keys of the CTA's sequence and head. */
interface Keys {
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  /** Bits of those that a mask leaves to any row; undefined without a mask. */
  readonly bits: Reg<'global'> | undefined;
  readonly stretch: Stretch;
}

function locate({ b, config, pointer, integer, thread, warpCounts, shared }: Frame, { sequenceHead }: Operand): Keys {
  const [head, sequence] = divide(b, sequenceHead, b.loadParameter(integer.heads));
  const table = b.loadPointer(pointer.sequences);
  const { keyStart, paddedKeyStart } = loadSequence(b, table, sequence);
  const range = loadVisibleRange(b, table, sequence);
  if (config.hiddenKeys === 'none') {
    return { head, sequence, keyStart, bits: undefined, stretch: wholeStretch(b, range) };
  }
  const base = b.loadPointer(pointer.visibleKeys);
  const bits = visibleBitsAt(b, base, config.hiddenKeys, head, b.loadParameter(integer.paddedTokens), paddedKeyStart);
  const countsAt = () => b.add(shared, (warpCounts as SharedTile).base);
  const stretch = visibleStretch(b, bits, range, thread, WARPS, countsAt);
  return { head, sequence, keyStart, bits, stretch };
}

/** A thread's statistics of its tokens' eight channels, from `channel` on; a list that is not asked for is empty. */
interface Channels {
  readonly channel: Reg<'u32'>;
  readonly sums: Reg<'f32'>[];
  readonly counts: Reg<'f32'>[];
  readonly highest: Reg<'f32'>[];
  readonly lowest: Reg<'f32'>[];
}

/** Sums for means in which a token counts by its size, and the logarithms of the smallest and largest size. */
interface Weighted {
  readonly sums: Reg<'f32'>[];
  readonly counts: Reg<'f32'>[];
  readonly smallest: Reg<'f32'>;
  readonly largest: Reg<'f32'>;
}

/** What a thread found; `weighted` where a mean is wanted. */
interface Sample {
  readonly channels: Channels;
  readonly weighted: Weighted | undefined;
}

function sampleTokens(frame: Frame, { of, input, strides }: Operand, keys: Keys): Sample {
  const { b, config, thread } = frame;
  const { dtype } = config;
  const { dim, loadWidth, mean, scale } = of;
  const { first, length, count } = keys.stretch;
  const perRow = threadsPerRow(of);
  const rowsAtOnce = CHANNEL_STATISTICS_THREADS / perRow;
  b.section('the sampled tokens');
  const stretch = b.div(count, SAMPLED_TOKENS);
  b.when(b.setp('lt', count, WHOLE_BELOW), () => b.set(stretch, 1));
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const channel = b.shl(column, 3);
  let source = offset64(b, b.loadPointer(input), keys.sequence, b.loadParameter(strides[0]));
  source = offset64(b, source, keys.head, b.loadParameter(strides[1]));
  const stride = b.loadParameter(strides[2]);
  source = offset(b, offset64(b, source, b.add(keys.keyStart, first), stride), channel, BYTES[dtype]);
  const eight = (value: number) => Array.from({ length: 8 }, () => b.constant('f32', value));
  const [sums, counts] = mean ? [eight(0), eight(0)] : [[], []];
  const bothEnds = needsBothEnds(of);
  const highest = scale ? eight(bothEnds ? Number.NEGATIVE_INFINITY : 0) : [];
  const lowest = bothEnds ? eight(Number.POSITIVE_INFINITY) : [];
  const channels = { channel, sums, counts, highest, lowest };
  const weighted = mean
    ? {
        sums: eight(0),
        counts: eight(0),
        smallest: b.constant('f32', Number.POSITIVE_INFINITY),
        largest: b.constant('f32', Number.NEGATIVE_INFINITY),
      }
    : undefined;
  const rank = b.mov(row);
  const stretchStart = b.mul(row, stretch);
  const step = b.mul(stretch, rowsAtOnce);
  // Loads that are under way at once hide the latency of memory: all loads of a sample, if registers allow.
  const atOnce = Math.max(1, Math.min(dtype === 'float32' || perRow > 32 ? 4 : 8, SAMPLED_TOKENS / rowsAtOnce));
  b.loop(
    // A warp's lanes go on together: they find weights together.
    () => b.voteAny(b.setp('lt', stretchStart, length)),
    () => {
      const loaded = Array.from({ length: atOnce }, () => {
        const token = b.add(stretchStart, b.mulHi(b.mul(rank, GOLDEN_RATIO), stretch));
        const inside = b.setp('lt', token, length);
        if (keys.bits !== undefined) {
          b.andPred(inside, isVisibleAt(b, keys.bits, b.add(first, token), inside), inside);
        }
        const guard = (first: number) => b.andPred(inside, b.setp('lt', b.add(channel, first), dim));
        const words = loadEightPacked(b, dtype, loadWidth, offset64(b, source, token, stride), guard);
        b.add(rank, rowsAtOnce, rank);
        b.add(stretchStart, step, stretchStart);
        return { inside, words };
      });
      const weights = weighted === undefined ? [] : weightsOf(b, perRow, loaded, dtype, weighted);
      loaded.forEach(({ inside, words }, i) => {
        countEight(b, unpackEight(b, dtype, words), inside, channels, weighted, weights[i]);
      });
    },
  );
  return { channels, weighted };
}

/**
 * What tokens count in the weighted means: a number for each half of more than 256 channels, which changes nothing, for any mean
 * serves. 0 where a token is not there, or all of it is zeros or not finite.
 */
function weightsOf(
  b: KernelBuilder,
  perRow: number,
  tokens: readonly { readonly inside: Reg<'pred'>; readonly words: readonly Reg<'b32'>[] }[],
  dtype: DType,
  { smallest, largest }: Weighted,
): Reg<'f32'>[] {
  const logarithms = tokens.map(({ words }) => {
    const size = b.constant('u32', 0);
    for (const value of unpackEight(b, dtype, words)) {
      const magnitude = b.and(b.as(value, 'u32'), 0x7fffffff);
      b.when(b.setp('lt', magnitude, INFINITY_BITS), () => b.max(size, magnitude, size));
    }
    for (let mask = 1; mask < Math.min(perRow, 32); mask *= 2) b.max(size, b.shflBfly(size, mask), size);
    return b.lg2(b.as(size, 'f32'));
  });
  const [sum, count] = [b.constant('f32', 0), b.constant('f32', 0)];
  const counted = tokens.map(({ inside }, i) => {
    const counts = b.andPred(inside, b.setp('gt', at(logarithms, i), Number.NEGATIVE_INFINITY));
    b.when(counts, () => {
      b.add(sum, at(logarithms, i), sum);
      b.add(count, 1, count);
      b.min(smallest, at(logarithms, i), smallest);
      b.max(largest, at(logarithms, i), largest);
    });
    return counts;
  });
  for (let mask = perRow; mask < 32; mask *= 2) {
    for (const register of [sum, count]) b.add(register, b.shflBfly(register, mask), register);
  }
  const least = b.fma(sum, b.rcpApprox(b.max(count, 1)), b.constant('f32', Math.log2(LEAST_SIZE)));
  return logarithms.map((logarithm, i) => {
    const bounded = b.min(b.max(b.max(logarithm, least), -MOST_LOG2), MOST_LOG2);
    return b.selp(b.ex2(b.mul(bounded, -2)), b.constant('f32', 0), at(counted, i));
  });
}

/** Takes eight channels of a token that is `inside` into account. */
function countEight(
  b: KernelBuilder,
  values: readonly Reg<'f32'>[],
  inside: Reg<'pred'>,
  { sums, counts, highest, lowest }: Channels,
  weighted: Weighted | undefined,
  weight: Reg<'f32'> | undefined,
): void {
  const bothEnds = lowest.length > 0;
  for (const [i, value] of values.entries()) {
    const magnitude = b.and(b.as(value, 'u32'), 0x7fffffff);
    const counted = b.andPred(inside, b.setp('lt', magnitude, INFINITY_BITS));
    const [sum, count, high, low] = [sums[i], counts[i], highest[i], lowest[i]];
    b.when(counted, () => {
      if (sum !== undefined) b.fma(value, SUM_SHARE, sum, sum);
      if (count !== undefined) b.add(count, SUM_SHARE, count);
      if (weighted !== undefined && weight !== undefined) {
        b.fma(value, weight, at(weighted.sums, i), at(weighted.sums, i));
        b.add(at(weighted.counts, i), weight, at(weighted.counts, i));
      }
      if (high !== undefined) b.max(high, bothEnds ? value : b.as(magnitude, 'f32'), high);
      if (low !== undefined) b.min(low, value, low);
    });
  }
}

/** The bit of a token that is `inside`. */
function isVisibleAt(b: KernelBuilder, bits: Reg<'global'>, token: Reg<'u32'>, inside: Reg<'pred'>): Reg<'pred'> {
  const word = b.constant('b32', 0);
  const wordAt = offset(b, bits, b.shr(token, 5), 4);
  b.when(inside, () => b.ld('b32', wordAt, 0, { readOnly: true, into: word }));
  return isVisible(b, word, token);
}

/** Takes the weighted sums where the tokens of the head are of very different sizes. */
function chooseMeans(frame: Frame, { sums, counts }: Channels, weighted: Weighted): void {
  const { b, shared, thread, warpSizes } = frame;
  if (warpSizes === undefined) return;
  b.section('whether tokens are of one size');
  const { smallest, largest } = weighted;
  for (let mask = 1; mask < 32; mask *= 2) {
    b.min(smallest, b.shflBfly(smallest, mask), smallest);
    b.max(largest, b.shflBfly(largest, mask), largest);
  }
  const ownAt = b.add(shared, b.as(b.shl(b.shr(thread, 5), 3), 'shared'));
  b.when(b.setp('eq', b.and(thread, 31), 0), () => b.stVector([smallest, largest], ownAt, warpSizes.base));
  b.barSync();
  for (let warp = 0; warp < WARPS; warp += 2) {
    const sizes = b.ldVector('f32', 4, shared, warpSizes.base + warp * 8);
    sizes.forEach((size, i) => {
      if (i % 2 === 0) b.min(smallest, size, smallest);
      else b.max(largest, size, largest);
    });
  }
  b.when(b.setp('gt', b.sub(largest, smallest), Math.log2(ONE_SIZE)), () => {
    sums.forEach((sum, i) => {
      b.mov(at(weighted.sums, i), sum);
      b.mov(at(weighted.counts, i), at(counts, i));
    });
  });
}

type Join = (a: Reg<'f32'>, c: Reg<'f32'>) => Reg<'f32'>;

/** The kinds of numbers that are joined, a plane each, with how two are. */
function planesToJoin(b: KernelBuilder, { mean, scale }: StatisticsOf, channels: Channels) {
  const add: Join = (a, c) => b.add(a, c);
  const planes: (readonly [registers: Reg<'f32'>[], join: Join])[] = [];
  if (mean) planes.push([channels.sums, add], [channels.counts, add]);
  if (scale) planes.push([channels.highest, (a, c) => b.max(a, c)]);
  if (mean && scale) planes.push([channels.lowest, (a, c) => b.min(a, c)]);
  return planes;
}

/** Reduces over the rows of each warp, and writes the result to the warp's rows of shared memory. */
function joinWarps({ b, planes, shared, thread }: Frame, { of }: Operand, channels: Channels): void {
  b.section('join the rows');
  const perRow = threadsPerRow(of);
  const rowBytes = rowBytesOf(of);
  const ownAt = b.add(
    shared,
    b.as(b.mad(b.shr(thread, Math.max(5, Math.log2(perRow))), rowBytes, b.shl(channels.channel, 2)), 'shared'),
  );
  const writes = b.setp('lt', b.and(thread, 31), perRow);
  planesToJoin(b, of, channels).forEach(([registers, join], plane) => {
    const ofWarp = registers.map((register) => {
      let joined = register;
      for (let mask = perRow; mask < 32; mask *= 2) joined = join(joined, b.shflBfly(joined, mask));
      return joined;
    });
    b.when(writes, () => {
      for (const half of [0, 4]) {
        b.stVector(ofWarp.slice(half, half + 4), ownAt, planes.base + plane * joinedRowsOf(of) * rowBytes + half * 4);
      }
    });
  });
  b.barSync();
}

/** The channel that a thread finishes. */
interface OwnChannel {
  /** Whether there is one. */
  readonly owns: Reg<'pred'>;
  /** Its place in the order of all sequences and heads. */
  readonly destination: Reg<'u32'>;
  /** Its largest magnitude, less the mean where one is wanted. */
  readonly largest: Reg<'f32'>;
}

/** Writes each channel's mean, and the largest magnitude of each warp's channels to shared memory. */
function writeMeans(frame: Frame, { of, sequenceHead, mean: meanOut }: Operand, channels: Channels): OwnChannel {
  const { b, planes, warpMaxima, shared, thread } = frame;
  const rowBytes = rowBytesOf(of);
  const largest = b.constant('f32', 0);
  const mean = b.constant('f32', 0);
  const owns = b.setp('lt', thread, of.paddedDim);
  const destination = b.mad(sequenceHead, of.paddedDim, thread);
  b.if(owns, () => {
    const columnAt = b.add(shared, b.as(b.shl(thread, 2), 'shared'));
    const joined = planesToJoin(b, of, channels).map(([, join], plane) =>
      Array.from({ length: joinedRowsOf(of) }, (_, row) =>
        b.ld('f32', columnAt, planes.base + (plane * joinedRowsOf(of) + row) * rowBytes),
      ).reduce(join),
    );
    if (of.mean) {
      const [total, count] = joined as [Reg<'f32'>, Reg<'f32'>];
      b.mov(b.divF32(total, b.max(count, MIN_SCALE)), mean);
      b.st(mean, offset(b, meanOut, destination, 4));
    }
    if (!of.scale) return;
    if (needsBothEnds(of)) {
      const [, count, high, low] = joined as [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];
      b.max(b.sub(high, mean), b.sub(mean, low), largest);
      // Nothing was finite; and a difference may be infinite where its numbers are not.
      b.when(b.setp('eq', count, 0), () => b.set(largest, 0));
      b.min(largest, 3e38, largest);
    } else b.mov(at(joined, 0), largest);
    let ofWarp = largest;
    for (let mask = 1; mask < 32; mask *= 2) ofWarp = b.max(ofWarp, b.shflBfly(ofWarp, mask));
    const warpAt = b.add(shared, b.as(b.shl(b.shr(thread, 5), 2), 'shared'));
    b.when(b.setp('eq', b.and(thread, 31), 0), () => b.st(ofWarp, warpAt, warpMaxima.base));
  });
  return { owns, destination, largest };
}

function writeScales(
  { b, shared, warpMaxima }: Frame,
  { of }: Operand,
  scaleOut: Reg<'global'>,
  { owns, destination, largest }: OwnChannel,
): void {
  b.section('scales of V');
  b.barSync();
  b.if(owns, () => {
    const ofHead = Array.from({ length: of.paddedDim / 32 }, (_, warp) =>
      b.ld('f32', shared, warpMaxima.base + warp * 4),
    ).reduce((x, y) => b.max(x, y));
    const floor = b.mul(ofHead, SMALLEST_SHARE);
    b.when(b.setp('lt', ofHead, SMALLEST_MAXIMUM), () => b.set(floor, 1));
    b.st(b.mul(b.max(largest, floor), 1 / LARGEST_CODE), offset(b, scaleOut, destination, 4));
  });
}
