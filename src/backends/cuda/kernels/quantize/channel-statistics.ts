/**
 * What smoothing and scaling need to know of K's and V's channels, from a sample of their tokens, both in one launch: the mean of
 * each channel, and a scale for V in FP8, `[sequence, head, paddedDim]` float32.
 *
 * A sample is enough. Softmax does not change when any constant vector is subtracted from all keys, nor the output when one is
 * subtracted from V and added back, and the mean of n tokens deviates from that of all by sigma / sqrt(n), far below what
 * quantization resolves. V's scale of a channel need not bound all of its tokens where each tile has a scale of its own
 * besides (`quantizeKeyValue`). Elements that are not finite are left out, and keys that no row sees.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, offset64, pointers } from '../parts/addresses.ts';
import { INFINITY_BITS, nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEightPacked, unpackEight } from '../parts/elements.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type HiddenKeys, isVisible, loadVisibleRange, visibleBitsAt } from './visible-keys.ts';

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

/**
 * Spreads of the middle half of the warps' means that the mean of all may lie from their median: ten times what it does of normal
 * numbers.
 */
const FAR_FROM_MEDIAN = 2;

/** V's scale maps the largest sampled magnitude to half of E4M3's largest, so that most tiles need no scale of their own. */
const LARGEST_CODE = 448 / 2;
/**
 * A channel is scaled as if it held at least this share of its head's largest magnitude: a value that the sample missed then
 * costs the other channels of its tile at most 10 of E4M3's 15 powers of two.
 */
const SMALLEST_SHARE = 2 ** -10;
/** A head whose sample stays below it is scaled as if its channels held 1. */
const SMALLEST_MAXIMUM = 1e-30;

/** Sorts registers in place, by Batcher's merges of odd and even places. */
function sort(b: KernelBuilder, values: Reg<'f32'>[]): void {
  const n = values.length;
  for (let p = 1; p < n; p *= 2) {
    for (let k = p; k >= 1; k /= 2) {
      for (let j = k % p; j + k < n; j += 2 * k) {
        for (let i = 0; i < Math.min(k, n - j - k); i++) {
          const [x, y] = [i + j, i + j + k];
          if (Math.floor(x / (2 * p)) !== Math.floor(y / (2 * p))) continue;
          const [low, high] = [values[x], values[y]] as [Reg<'f32'>, Reg<'f32'>];
          values[x] = b.min(low, high);
          values[y] = b.max(low, high);
        }
      }
    }
  }
}

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

/** What is found out about an operand. */
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
  /** Of the keys that a mask hides from every row nothing is looked at. */
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
/** `sequenceHeads`: sequences times heads, the CTAs of an operand; those of K come first. */
export const CHANNEL_STATISTICS_INTEGERS = ['heads', 'sequenceHeads', 'paddedTokens'] as const;
export const CHANNEL_STATISTICS_THREADS = 512;
const WARPS = CHANNEL_STATISTICS_THREADS / 32;

/** Keys of a sequence that are looked at: from `first` on, `count` of `length`. */
interface Stretch {
  readonly first: Reg<'u32'>;
  readonly length: Reg<'u32'>;
  readonly count: Reg<'u32'>;
}

export function channelStatistics({ target, dtype, key, value, hiddenKeys }: ChannelStatisticsConfig): Kernel {
  const b = new KernelBuilder({ name: 'channelStatistics', target, threads: CHANNEL_STATISTICS_THREADS });
  const pointer = pointers(b, CHANNEL_STATISTICS_POINTERS);
  const integer = integers(b, CHANNEL_STATISTICS_INTEGERS);
  const { keyBatch, keyHead, keyToken, valueBatch, valueHead, valueToken } = pointers(b, KEY_VALUE_STRIDES);
  // A row for each warp in each plane: one plane for every kind of number that is joined.
  const planesOf = (of: StatisticsOf | undefined) =>
    of === undefined ? 0 : (of.mean ? 2 : 0) + (of.scale ? (of.mean ? 2 : 1) : 0);
  const rowBytesOf = (of: StatisticsOf | undefined) => (of === undefined ? 0 : nextPowerOfTwo(of.paddedDim / 8) * 32);
  const planeBytes = Math.max(...[key, value].map((of) => planesOf(of) * WARPS * rowBytesOf(of)));
  const planes = b.shared('planes', 1, rowMajor(planeBytes));
  const warpMaxima = b.shared('largest of each warp', 1, rowMajor(WARPS * 4));
  const warpCounts = hiddenKeys === 'none' ? undefined : b.shared('visible keys of each warp', 1, rowMajor(WARPS * 16));
  const shared = b.sharedAddress();

  b.section('which sequence and head');
  const thread = b.special('%tid.x');
  const index = b.special('%ctaid.x');
  const keyBody = () => {
    const mean = b.loadPointer(pointer.keyMean);
    if (key !== undefined) describe(key, index, pointer.k, [keyBatch, keyHead, keyToken], mean, undefined);
  };
  const valueBody = () => {
    const own = key === undefined ? index : b.sub(index, b.loadParameter(integer.sequenceHeads));
    const [mean, scale] = [b.loadPointer(pointer.valueMean), b.loadPointer(pointer.valueScale)];
    if (value !== undefined) describe(value, own, pointer.v, [valueBatch, valueHead, valueToken], mean, scale);
  };
  if (key === undefined) valueBody();
  else if (value === undefined) keyBody();
  else b.if(b.setp('lt', index, b.loadParameter(integer.sequenceHeads)), keyBody, valueBody);
  return b.build();

  /**
   * The mean of a channel, or the median of the warps' means where tokens so large that they are few pull the mean far from it:
   * then it would be far from all other tokens, and so would what is left of those that no large one is seen beside. Any
   * constant serves for smoothing.
   */
  function withoutOutliers(mean: Reg<'f32'>, columnAt: Reg<'shared'>, rowBytes: number): Reg<'f32'> {
    const means = Array.from({ length: WARPS }, (_, warp) => {
      const [sum, count] = [0, 1].map((plane) =>
        b.ld('f32', columnAt, planes.base + (plane * WARPS + warp) * rowBytes),
      ) as [Reg<'f32'>, Reg<'f32'>];
      const own = b.mul(sum, b.rcpApprox(b.max(count, 1)));
      b.when(b.setp('eq', count, 0), () => b.mov(mean, own));
      return own;
    });
    sort(b, means);
    const [low, median, high] = [WARPS / 4, WARPS / 2, (3 * WARPS) / 4].map((i) => means[i]) as [
      Reg<'f32'>,
      Reg<'f32'>,
      Reg<'f32'>,
    ];
    const near = b.mul(b.sub(high, low), FAR_FROM_MEDIAN);
    const far = b.setp('gt', b.abs(b.sub(mean, median)), near);
    return b.selp(median, mean, far);
  }

  /** All keys of an interval. */
  function whole([from, until]: readonly [Reg<'u32'>, Reg<'u32'>]): Stretch {
    const length = b.sub(until, from);
    return { first: from, length, count: length };
  }

  /** The bit of a token that is `inside`. */
  function isVisibleAt(bits: Reg<'global'>, token: Reg<'u32'>, inside: Reg<'pred'>): Reg<'pred'> {
    const word = b.constant('b32', 0);
    const at = offset(b, bits, b.shr(token, 5), 4);
    b.when(inside, () => b.ld('b32', at, 0, { readOnly: true, into: word }));
    return isVisible(b, word, token);
  }

  /** From the first word with a visible key to the last, and how many there are: the fewer they are, the denser is the sample. */
  function visibleOf(bits: Reg<'global'>, [from, until]: readonly [Reg<'u32'>, Reg<'u32'>]): Stretch {
    b.section('visible keys');
    const joins = [
      (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.add(x, y, into),
      (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.min(x, y, into),
      (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.max(x, y, into),
    ] as const;
    const own = [b.constant('u32', 0), b.constant('u32', 0xffffffff), b.constant('u32', 0)];
    const word = b.mov(thread);
    const end = b.shr(b.add(until, 31), 5);
    b.loop(
      () => b.setp('lt', word, end),
      () => {
        const set = b.as(b.ld('b32', offset(b, bits, word, 4), 0, { readOnly: true }), 'u32');
        const found = [bitsOf(set), b.shl(word, 5), b.shl(b.add(word, 1), 5)] as const;
        const any = b.setp('ne', set, 0);
        found.forEach((value, i) => {
          const so = own[i] as Reg<'u32'>;
          b.when(any, () => joins[i]?.(so, value, so));
        });
        b.add(word, CHANNEL_STATISTICS_THREADS, word);
      },
    );
    own.forEach((value, i) => {
      for (let lanes = 1; lanes < 32; lanes *= 2) joins[i]?.(value, b.shflBfly(value, lanes), value);
    });
    const at = b.add(shared, (warpCounts as SharedTile).base);
    const [count, least, most] = own as [Reg<'u32'>, Reg<'u32'>, Reg<'u32'>];
    b.when(b.setp('eq', b.and(thread, 31), 0), () =>
      b.stVector([count, least, most, most], b.add(at, b.as(b.shl(b.shr(thread, 5), 4), 'shared'))),
    );
    b.barSync();
    const ofWarps = Array.from({ length: WARPS }, (_, i) => b.ldVector('u32', 4, at, 16 * i));
    const [all, lowest, highest] = joins.map((join, i) =>
      ofWarps.map((values) => values[i] as Reg<'u32'>).reduce((x, y) => join(x, y)),
    ) as [Reg<'u32'>, Reg<'u32'>, Reg<'u32'>];
    const first = b.min(b.max(lowest, from), until);
    return { first, length: b.sub(b.max(b.min(highest, until), first), first), count: all };
  }

  /** How many bits of a word are set. */
  function bitsOf(word: Reg<'u32'>): Reg<'u32'> {
    const inPairs = b.sub(word, b.and(b.shr(word, 1), 0x55555555));
    const inFours = b.add(b.and(inPairs, 0x33333333), b.and(b.shr(inPairs, 2), 0x33333333));
    const inBytes = b.and(b.add(inFours, b.shr(inFours, 4)), 0x0f0f0f0f);
    return b.shr(b.mul(inBytes, 0x01010101), 24);
  }

  function describe(
    { dim, paddedDim, loadWidth, mean: wantsMean, scale: wantsScale }: StatisticsOf,
    sequenceHead: Reg<'u32'>,
    input: typeof pointer.k,
    [batchStride, headStride, tokenStride]: readonly [Parameter<'u64'>, Parameter<'u64'>, Parameter<'u64'>],
    meanOut: Reg<'global'>,
    scaleOut: Reg<'global'> | undefined,
  ): void {
    const perRow = nextPowerOfTwo(paddedDim / 8);
    const rowsAtOnce = CHANNEL_STATISTICS_THREADS / perRow;
    const [head, sequence] = divide(b, sequenceHead, b.loadParameter(integer.heads));
    const table = b.loadPointer(pointer.sequences);
    const { keyStart, paddedKeyStart } = loadSequence(b, table, sequence);
    const range = loadVisibleRange(b, table, sequence);
    const bits =
      hiddenKeys === 'none'
        ? undefined
        : visibleBitsAt(
            b,
            b.loadPointer(pointer.visibleKeys),
            hiddenKeys,
            head,
            b.loadParameter(integer.paddedTokens),
            paddedKeyStart,
          );
    const { first, length, count } = bits === undefined ? whole(range) : visibleOf(bits, range);

    b.section('the sampled tokens');
    const stretch = b.div(count, SAMPLED_TOKENS);
    b.when(b.setp('lt', count, WHOLE_BELOW), () => b.set(stretch, 1));
    const row = b.shr(thread, Math.log2(perRow));
    const column = b.and(thread, perRow - 1);
    const channel = b.shl(column, 3);
    let source = offset64(b, b.loadPointer(input), sequence, b.loadParameter(batchStride));
    source = offset64(b, source, head, b.loadParameter(headStride));
    const stride = b.loadParameter(tokenStride);
    source = offset(b, offset64(b, source, b.add(keyStart, first), stride), channel, BYTES[dtype]);
    const eight = (value: number) => Array.from({ length: 8 }, () => b.constant('f32', value));
    const [sums, counts] = wantsMean ? [eight(0), eight(0)] : [[], []];
    // Of what a mean will be subtracted from, both ends are needed; else the magnitude.
    const bothEnds = wantsScale && wantsMean;
    const highest = wantsScale ? eight(bothEnds ? Number.NEGATIVE_INFINITY : 0) : [];
    const lowest = bothEnds ? eight(Number.POSITIVE_INFINITY) : [];
    const rank = b.mov(row);
    const stretchStart = b.mul(row, stretch);
    const step = b.mul(stretch, rowsAtOnce);
    // Loads that are under way at once hide the latency of memory: those of a whole sample, if registers allow.
    const atOnce = Math.max(1, Math.min(dtype === 'float32' ? 4 : 8, SAMPLED_TOKENS / rowsAtOnce));
    b.loop(
      () => b.setp('lt', stretchStart, length),
      () => {
        const loaded = Array.from({ length: atOnce }, () => {
          const token = b.add(stretchStart, b.mulHi(b.mul(rank, GOLDEN_RATIO), stretch));
          const inside = b.setp('lt', token, length);
          if (bits !== undefined) b.andPred(inside, isVisibleAt(bits, b.add(first, token), inside), inside);
          const guard = (first: number) => b.andPred(inside, b.setp('lt', b.add(channel, first), dim));
          const words = loadEightPacked(b, dtype, loadWidth, offset64(b, source, token, stride), guard);
          b.add(rank, rowsAtOnce, rank);
          b.add(stretchStart, step, stretchStart);
          return { inside, words };
        });
        for (const { inside, words } of loaded) {
          for (const [i, value] of unpackEight(b, dtype, words).entries()) {
            const magnitude = b.and(b.as(value, 'u32'), 0x7fffffff);
            const counted = b.andPred(inside, b.setp('lt', magnitude, INFINITY_BITS));
            const [sum, count, high, low] = [sums[i], counts[i], highest[i], lowest[i]];
            b.when(counted, () => {
              if (sum !== undefined) b.fma(value, SUM_SHARE, sum, sum);
              if (count !== undefined) b.add(count, 1, count);
              if (high !== undefined) b.max(high, bothEnds ? value : b.as(magnitude, 'f32'), high);
              if (low !== undefined) b.min(low, value, low);
            });
          }
        }
      },
    );

    b.section('join the rows');
    type Join = (a: Reg<'f32'>, c: Reg<'f32'>) => Reg<'f32'>;
    const add: Join = (a, c) => b.add(a, c);
    const parts: (readonly [registers: Reg<'f32'>[], join: Join])[] = [];
    if (wantsMean) parts.push([sums, add], [counts, add]);
    if (wantsScale) parts.push([highest, (a, c) => b.max(a, c)]);
    if (bothEnds) parts.push([lowest, (a, c) => b.min(a, c)]);
    const rowBytes = perRow * 32;
    const at = b.add(shared, b.as(b.mad(b.shr(thread, 5), rowBytes, b.shl(channel, 2)), 'shared'));
    const writes = b.setp('lt', b.and(thread, 31), perRow);
    parts.forEach(([registers, join], plane) => {
      const ofWarp = registers.map((register) => {
        let joined = register;
        for (let mask = perRow; mask < 32; mask *= 2) joined = join(joined, b.shflBfly(joined, mask));
        return joined;
      });
      b.when(writes, () => {
        for (const half of [0, 4]) {
          b.stVector(ofWarp.slice(half, half + 4), at, planes.base + plane * WARPS * rowBytes + half * 4);
        }
      });
    });
    b.barSync();
    const largest = b.constant('f32', 0);
    const mean = b.constant('f32', 0);
    const owns = b.setp('lt', thread, paddedDim);
    const destination = b.mad(sequenceHead, paddedDim, thread);
    b.if(owns, () => {
      const columnAt = b.add(shared, b.as(b.shl(thread, 2), 'shared'));
      const joined = parts.map(([, join], plane) =>
        Array.from({ length: WARPS }, (_, warp) =>
          b.ld('f32', columnAt, planes.base + (plane * WARPS + warp) * rowBytes),
        ).reduce(join),
      );
      if (wantsMean) {
        const [total, count] = joined as [Reg<'f32'>, Reg<'f32'>];
        const ofAll = b.divF32(total, b.max(count, 1));
        b.mul(withoutOutliers(ofAll, columnAt, rowBytes), 1 / SUM_SHARE, mean);
        b.st(mean, offset(b, meanOut, destination, 4));
      }
      const high = joined[wantsMean ? 2 : 0];
      if (high === undefined) return;
      if (!bothEnds) b.mov(high, largest);
      else {
        const [count, low] = [joined[1], joined[3]] as [Reg<'f32'>, Reg<'f32'>];
        b.max(b.sub(high, mean), b.sub(mean, low), largest);
        // Nothing was finite; and a difference may be infinite where its numbers are not.
        b.when(b.setp('eq', count, 0), () => b.set(largest, 0));
        b.min(largest, 3e38, largest);
      }
      let ofWarp = largest;
      for (let mask = 1; mask < 32; mask *= 2) ofWarp = b.max(ofWarp, b.shflBfly(ofWarp, mask));
      const warpAt = b.add(shared, b.as(b.shl(b.shr(thread, 5), 2), 'shared'));
      b.when(b.setp('eq', b.and(thread, 31), 0), () => b.st(ofWarp, warpAt, warpMaxima.base));
    });
    if (scaleOut === undefined || !wantsScale) return;

    b.section('scales of V');
    b.barSync();
    b.if(owns, () => {
      const ofHead = Array.from({ length: paddedDim / 32 }, (_, warp) =>
        b.ld('f32', shared, warpMaxima.base + warp * 4),
      ).reduce((x, y) => b.max(x, y));
      const floor = b.mul(ofHead, SMALLEST_SHARE);
      b.when(b.setp('lt', ofHead, SMALLEST_MAXIMUM), () => b.set(floor, 1));
      b.st(b.mul(b.max(largest, floor), 1 / LARGEST_CODE), offset(b, scaleOut, destination, 4));
    });
  }
}
