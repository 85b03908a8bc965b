/**
 * What smoothing and scaling need to know of K's and V's channels, from a sample of their tokens, both in one launch: the mean of
 * each channel, and a scale for V in FP8, `[sequence, head, paddedDim]` float32.
 *
 * A sample is enough. Softmax does not change when any constant vector is subtracted from all keys, nor the output when one is
 * subtracted from V and added back, and the mean of n tokens deviates from that of all by sigma / sqrt(n), far below what
 * quantization resolves. V's scale of a channel need not bound all of its tokens where each tile has a scale of its own
 * besides (`quantizeKeyValue`). Elements that are not finite are left out.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, offset64, pointers } from '../parts/addresses.ts';
import { INFINITY_BITS, nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEightPacked, unpackEight } from '../parts/elements.ts';
import { loadSequence } from '../parts/sequences.ts';

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
}

export const CHANNEL_STATISTICS_POINTERS = ['sequences', 'k', 'v', 'keyMean', 'valueMean', 'valueScale'] as const;
/** `sequenceHeads`: sequences times heads, the CTAs of an operand; those of K come first. */
export const CHANNEL_STATISTICS_INTEGERS = ['heads', 'sequenceHeads'] as const;
export const CHANNEL_STATISTICS_THREADS = 512;
const WARPS = CHANNEL_STATISTICS_THREADS / 32;

export function channelStatistics({ target, dtype, key, value }: ChannelStatisticsConfig): Kernel {
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
    const { keyStart, keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);

    b.section('the sampled tokens');
    const stretch = b.div(keyLength, SAMPLED_TOKENS);
    b.when(b.setp('lt', keyLength, WHOLE_BELOW), () => b.set(stretch, 1));
    const row = b.shr(thread, Math.log2(perRow));
    const column = b.and(thread, perRow - 1);
    const channel = b.shl(column, 3);
    let source = offset64(b, b.loadPointer(input), sequence, b.loadParameter(batchStride));
    source = offset64(b, source, head, b.loadParameter(headStride));
    const stride = b.loadParameter(tokenStride);
    source = offset(b, offset64(b, source, keyStart, stride), channel, BYTES[dtype]);
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
      () => b.setp('lt', stretchStart, keyLength),
      () => {
        const loaded = Array.from({ length: atOnce }, () => {
          const token = b.add(stretchStart, b.mulHi(b.mul(rank, GOLDEN_RATIO), stretch));
          const inside = b.setp('lt', token, keyLength);
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
        b.mul(b.divF32(total, b.max(count, 1)), 1 / SUM_SHARE, mean);
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
