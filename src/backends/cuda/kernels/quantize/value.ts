/**
 * V for the tensor cores: FP16 as it is (`[head, token, channel]`), or FP8 with a scale per channel (`[head, channel, token]`,
 * tokens permuted inside every 16; src/quantization/value-fp8.ts). Padded with zeros, V's mean subtracted if asked for.
 *
 * An element that is not finite becomes 0, since 0 * NaN would reach rows that may not see it; its token's bit is set in
 * `keyFaults` and the sign bit in the scales of K's tile, so attention makes NaN of the rows that do see it. So it is with
 * numbers beyond FP16's range where V is stored in FP16.
 */
import { TOKEN_PERMUTATION } from '../../../../quantization/value-fp8.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { BEYOND_FP16_BITS, INFINITY_BITS, nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { loadSequence } from '../parts/sequences.ts';
import { endWithoutKeys, type HiddenKeys, isVisible, loadVisibleRange, visibleBitsAt } from './visible-keys.ts';

export interface ValueConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly loadWidth: LoadWidth;
  /** Subtract `valueMean`. */
  readonly smoothV: boolean;
  /** Scales in a K tile, whose signs say that the tile has faults. */
  readonly keyScales: 1 | 4;
  /** Keys that a mask hides from every row are zeros and count in no maximum. */
  readonly hiddenKeys: HiddenKeys;
}

/** Tokens that a CTA of `quantizeValue` and `convertValue` takes: one K tile. */
export const VALUE_BLOCK = 64;
/** Parts of a sequence whose maxima are found apart. */
export const VALUE_CHUNKS = 16;

export const VALUE_POINTERS = [
  'sequences',
  'input',
  'valueMean',
  'valueMaximum',
  'value',
  'valueScale',
  'keyScale',
  'keyFaults',
  'visibleKeys',
  'rangeShift',
] as const;
export const VALUE_INTEGERS = ['heads', 'blocks', 'paddedTokens'] as const;

const isFault = (b: KernelBuilder, value: Reg<'f32'>, from = INFINITY_BITS) =>
  b.setp('ge', b.and(b.as(value, 'u32'), 0x7fffffff), from);

interface Place {
  readonly thread: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  /** Which of the blocks that the grid has for each head of each sequence. */
  readonly block: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  /** Row of the sequence's head in `[sequence, head, channel]` buffers. */
  readonly sequenceHead: Reg<'u32'>;
  /** Whether any row may see a token. */
  readonly isSeen: (token: Reg<'u32'>) => Reg<'pred'>;
  /** The interval outside of which no row sees any. */
  readonly seenFrom: Reg<'u32'>;
  readonly seenUntil: Reg<'u32'>;
  readonly pointer: ReturnType<typeof pointers<(typeof VALUE_POINTERS)[number]>>;
  readonly paddedTokens: Reg<'u32'>;
  /** First element of the head. */
  readonly source: Reg<'global'>;
  readonly tokenStride: Reg<'u64'>;
}

/** Parameters and place, common to the three kernels. */
function begin(b: KernelBuilder, hiddenKeys: HiddenKeys): Place {
  const pointer = pointers(b, VALUE_POINTERS);
  const integer = integers(b, VALUE_INTEGERS);
  const batchStride = b.parameter('batchStride', 'u64');
  const headStride = b.parameter('headStride', 'u64');
  const tokenStrideParameter = b.parameter('tokenStride', 'u64');
  b.section('which block');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, sequenceHeadIndex] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, sequenceHeadIndex, heads);
  const sequences = b.loadPointer(pointer.sequences);
  const table = loadSequence(b, sequences, sequence);
  const [seenFrom, seenUntil] = loadVisibleRange(b, sequences, sequence);
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(batchStride));
  source = offset64(b, source, head, b.loadParameter(headStride));
  const isSeen = (token: Reg<'u32'>) => {
    const inRange = b.andPred(b.setp('ge', token, seenFrom), b.setp('lt', token, seenUntil));
    if (hiddenKeys === 'none') return inRange;
    const bits = visibleBitsAt(
      b,
      b.loadPointer(pointer.visibleKeys),
      hiddenKeys,
      head,
      paddedTokens,
      table.paddedKeyStart,
    );
    const word = b.constant('b32', 0);
    const at = offset(b, bits, b.shr(token, 5), 4);
    b.when(inRange, () => b.ld('b32', at, 0, { readOnly: true, into: word }));
    return isVisible(b, word, token);
  };
  return {
    thread,
    head,
    sequence,
    block,
    keyStart: table.keyStart,
    paddedKeyStart: table.paddedKeyStart,
    sequenceHead: sequenceHeadIndex,
    isSeen,
    seenFrom,
    seenUntil,
    pointer,
    paddedTokens,
    source,
    tokenStride: b.loadParameter(tokenStrideParameter),
  };
}

/** Powers of two between a channel's largest and smallest tokens that V's codes have room for without a shift. */
const UNSHIFTED_SPREAD = 5;
/** Powers of two that V may take of E4M3's range from P. */
const LARGEST_RANGE_SHIFT = 6;

/** Eight channels of a `[sequence, head, channel]` vector. */
function channelVector(b: KernelBuilder, place: Place, name: 'valueMean', channel: Reg<'u32'>, paddedDim: number) {
  const at = offset(b, b.loadPointer(place.pointer[name]), b.mad(place.sequenceHead, paddedDim, channel), 4);
  return loadEightFloats(b, at);
}

/** Largest finite magnitude of each channel in each of {@link VALUE_CHUNKS} parts of a sequence, `[sequence, head, chunk, channel]`. */
export function valueMaximum(config: ValueConfig): Kernel {
  const { target, dtype, valueDim, paddedValueDim, loadWidth, smoothV, hiddenKeys } = config;
  const threads = valueThreads(config);
  const perRow = nextPowerOfTwo(paddedValueDim / 8);
  const rowsAtOnce = threads / perRow;
  const b = new KernelBuilder({ name: 'valueMaximum', target, threads });
  const place = begin(b, config.hiddenKeys);
  const tile = b.shared('maxima', rowsAtOnce, rowMajor(perRow * 32));

  b.section('maximum of this chunk');
  const seen = b.sub(place.seenUntil, place.seenFrom);
  const chunk = b.div(b.add(seen, VALUE_CHUNKS - 1), VALUE_CHUNKS);
  const firstToken = b.mad(place.block, chunk, place.seenFrom);
  const endToken = b.min(b.add(firstToken, chunk), place.seenUntil);
  const row = b.shr(place.thread, Math.log2(perRow));
  const channel = b.shl(b.and(place.thread, perRow - 1), 3);
  const token = b.add(firstToken, row);
  const source = offset(
    b,
    offset64(b, place.source, b.add(place.keyStart, token), place.tokenStride),
    channel,
    BYTES[dtype],
  );
  const stepBytes = b.as(b.mul(place.tokenStride, rowsAtOnce), 'global');
  const maxima = Array.from({ length: 8 }, () => b.constant('u32', 0));
  const means = smoothV ? guardedMeans(b, place, channel, paddedValueDim) : undefined;
  b.loop(
    () => b.setp('lt', token, endToken),
    () => {
      for (let unrolled = 0; unrolled < 4; unrolled++) {
        const inChunk = b.setp('lt', token, endToken);
        const inside = hiddenKeys === 'none' ? inChunk : b.andPred(inChunk, place.isSeen(token));
        const values = loadEight(b, dtype, loadWidth, source, channel, valueDim, inside);
        values.forEach((value, i) => {
          const centered = means === undefined ? value : b.sub(value, means[i] as Reg<'f32'>);
          const magnitude = b.and(b.as(centered, 'u32'), 0x7fffffff);
          const counted = b.andPred(inside, b.setp('lt', magnitude, INFINITY_BITS));
          b.when(counted, () => b.max(maxima[i] as Reg<'u32'>, magnitude, maxima[i]));
        });
        b.add(token, rowsAtOnce, token);
        b.add(source, stepBytes, source);
      }
    },
  );

  b.section('maximum over the rows');
  const shared = b.sharedAddress(tile.base);
  const at = b.add(shared, b.as(b.mad(row, perRow * 32, b.shl(channel, 2)), 'shared'));
  b.stVector(maxima.slice(0, 4), at);
  b.stVector(maxima.slice(4), at, 16);
  b.barSync();
  b.if(b.setp('lt', place.thread, paddedValueDim), () => {
    const column = b.add(shared, b.as(b.shl(place.thread, 2), 'shared'));
    let largest = b.ld('u32', column);
    for (let r = 1; r < rowsAtOnce; r++) largest = b.max(largest, b.ld('u32', column, r * perRow * 32));
    // Channels of the padding have no mean to lie apart from.
    b.when(b.setp('ge', place.thread, valueDim), () => b.set(largest, 0));
    const index = b.mad(b.mad(place.sequenceHead, VALUE_CHUNKS, place.block), paddedValueDim, place.thread);
    b.st(largest, offset(b, b.loadPointer(place.pointer.valueMaximum), index, 4));
  });
  return b.build();
}

/** Means of this thread's eight channels; threads beyond the row get zeros. */
function guardedMeans(b: KernelBuilder, place: Place, channel: Reg<'u32'>, paddedDim: number): Reg<'f32'>[] {
  const means = Array.from({ length: 8 }, () => b.constant('f32', 0));
  b.if(b.setp('lt', channel, paddedDim), () => {
    channelVector(b, place, 'valueMean', channel, paddedDim).forEach((mean, i) => {
      b.mov(mean, means[i]);
    });
  });
  return means;
}

/** Marks a token of this block as not finite: its bit, and the signs of the K tile's scales. */
function reportFault(b: KernelBuilder, place: Place, token: Reg<'u32'>, keyScales: 1 | 4): void {
  const tile = b.shr(
    b.add(b.mad(place.head, place.paddedTokens, place.paddedKeyStart), b.mul(place.block, VALUE_BLOCK)),
    6,
  );
  const word = b.add(b.shl(tile, 1), b.shr(token, 5));
  const bit = b.shl(b.constant('b32', 1), b.and(token, 31));
  b.redOr(offset(b, b.loadPointer(place.pointer.keyFaults), word, 4), bit);
  const scales = offset(b, b.loadPointer(place.pointer.keyScale), b.mul(tile, keyScales), 4);
  const sign = b.constant('b32', 0x80000000);
  for (let i = 0; i < keyScales; i++) b.redOr(scales, sign, 4 * i);
}

export const valueThreads = ({ paddedValueDim }: Pick<ValueConfig, 'paddedValueDim'>) => Math.max(256, paddedValueDim);

/** V in FP16: one CTA takes 64 tokens. */
export function convertValue(config: ValueConfig): Kernel {
  const { target, dtype, valueDim, paddedValueDim, loadWidth, smoothV, keyScales } = config;
  const threads = valueThreads(config);
  const perRow = nextPowerOfTwo(paddedValueDim / 8);
  const rowsAtOnce = threads / perRow;
  const b = new KernelBuilder({ name: 'convertValue', target, threads });
  const place = begin(b, config.hiddenKeys);
  const firstToken = b.mul(place.block, VALUE_BLOCK);
  endWithoutKeys(b, [place.seenFrom, place.seenUntil], firstToken, VALUE_BLOCK);

  b.section('convert');
  const row = b.shr(place.thread, Math.log2(perRow));
  const channel = b.shl(b.and(place.thread, perRow - 1), 3);
  let source = offset64(b, place.source, b.add(b.add(place.keyStart, firstToken), row), place.tokenStride);
  source = offset(b, source, channel, BYTES[dtype]);
  const stepBytes = b.as(b.mul(place.tokenStride, rowsAtOnce), 'global');
  const outputRow = b.add(b.add(b.mad(place.head, place.paddedTokens, place.paddedKeyStart), firstToken), row);
  const destination = b.add(
    offset(b, b.loadPointer(place.pointer.value), outputRow, paddedValueDim * 2),
    b.as(b.mulWide(channel, 2), 'global'),
  );
  const stored = b.setp('lt', channel, paddedValueDim);
  const means = smoothV ? guardedMeans(b, place, channel, paddedValueDim) : undefined;
  for (let first = 0; first < VALUE_BLOCK; first += rowsAtOnce) {
    const token = b.add(row, first);
    // More threads than the block has elements: rows beyond it are not stored.
    const inBlock = rowsAtOnce > VALUE_BLOCK ? b.andPred(stored, b.setp('lt', token, VALUE_BLOCK)) : stored;
    const inside = place.isSeen(b.add(firstToken, token));
    const values = loadEight(b, dtype, loadWidth, source, channel, valueDim, inside);
    const faulty = b.constant('b32', 0);
    values.forEach((value, i) => {
      if (means !== undefined) b.when(inside, () => b.sub(value, means[i] as Reg<'f32'>, value));
      b.when(isFault(b, value, BEYOND_FP16_BITS), () => {
        b.set(faulty, 1);
        b.set(value, 0);
      });
    });
    const pairs = [0, 2, 4, 6].map((i) => b.cvtPack('f16x2', values[i] as Reg<'f32'>, values[i + 1] as Reg<'f32'>));
    b.when(inBlock, () => b.stVector(pairs, destination, first * paddedValueDim * 2));
    b.if(b.andPred(inBlock, b.setp('ne', faulty, 0)), () => reportFault(b, place, token, keyScales));
    if (first + rowsAtOnce < VALUE_BLOCK) source = b.add(source, stepBytes);
  }
  return b.build();
}

/**
 * V in FP8: one CTA takes 64 tokens. A thread takes eight channels of four tokens that lie side by side in the permuted order,
 * so that it transposes them by packing; sixteen lanes write the 64 tokens of a channel.
 *
 * `sharesRange`: products of P and V are summed in FP16, which leaves V codes up to 2.25 if P takes all of its format: less than
 * a seventh power of two above the smallest that are exact to E4M3's last bit. Where tokens lie further apart (a row may see only the small
 * ones), V's codes are doubled `rangeShift` times and P's halved as often, which attention does: `[sequence, head]`, float32.
 *
 * `scalesEachTile`: the 64 tokens have scales of their own, `[head, tile, channel]`; without it `[sequence, head, channel]`, from what
 * {@link valueMaximum} found.
 */
export function quantizeValue(
  config: ValueConfig & { readonly vMax: number; readonly sharesRange: boolean; readonly scalesEachTile: boolean },
): Kernel {
  const { target, dtype, valueDim, paddedValueDim, loadWidth, smoothV, vMax, keyScales } = config;
  const threads = (paddedValueDim / 8) * 16;
  const b = new KernelBuilder({ name: 'quantizeValue', target, threads: Math.max(32, threads) });
  const place = begin(b, config.hiddenKeys);
  const firstToken = b.mul(place.block, VALUE_BLOCK);
  endWithoutKeys(b, [place.seenFrom, place.seenUntil], firstToken, VALUE_BLOCK);

  const spreads = config.sharesRange
    ? b.shared('spreads of the warps', 1, rowMajor(Math.max(16, threads / 8)))
    : undefined;

  b.section('scales of the channels of this thread');
  const word = b.and(place.thread, 15); // four permuted tokens: positions 4 * word ..
  const channel = b.shl(b.shr(place.thread, 4), 3);
  const maxima = Array.from({ length: 8 }, () => b.constant('u32', 0));
  /** Per pair of chunks, less 1, so that pairs of zeros and pairs without tokens count as the largest. */
  const minima = config.sharesRange ? Array.from({ length: 8 }, () => b.constant('u32', 0xffffffff)) : [];
  const ownTokens = config.scalesEachTile ? loadTokens() : undefined;
  if (ownTokens === undefined) joinChunks();
  else findTileMaxima(ownTokens);
  const shift = config.sharesRange ? rangeShift() : undefined;
  // As a power of two.
  const largestCode =
    shift === undefined ? b.constant('f32', vMax) : b.mul(b.as(b.shl(b.add(shift, 127), 23), 'f32'), vMax);
  const reciprocals = maxima.map((maximum) => {
    const value = b.as(maximum, 'f32');
    // A channel of zeros, or of numbers too small for a reciprocal, becomes zeros.
    b.when(b.setp('lt', value, 1e-35), () => b.set(value, 0));
    const reciprocal = b.divF32(largestCode, value);
    b.when(b.setp('eq', value, 0), () => b.set(reciprocal, 0));
    return reciprocal;
  });
  const isFirst = b.setp('eq', place.block, b.div(place.seenFrom, VALUE_BLOCK));
  b.if(b.andPred(isFirst, b.setp('eq', word, 0)), () => {
    const scales = maxima.map((maximum) => b.divF32(b.as(maximum, 'f32'), largestCode));
    const at = offset(
      b,
      b.loadPointer(place.pointer.valueScale),
      b.mad(config.scalesEachTile ? tileInMemory() : place.sequenceHead, paddedValueDim, channel),
      4,
    );
    b.stVector(scales.slice(0, 4), at);
    b.stVector(scales.slice(4), at, 16);
    if (shift === undefined) return;
    const shiftAt = offset(b, b.loadPointer(place.pointer.rangeShift), place.sequenceHead, 4);
    b.when(b.setp('eq', channel, 0), () => b.st(b.cvt('f32', shift), shiftAt));
  });

  const tokens = ownTokens ?? loadTokens();
  for (const values of tokens) {
    for (const [i, value] of values.entries()) b.mul(value, reciprocals[i] as Reg<'f32'>, value);
  }

  b.section('pack and store');
  const row = b.mad(place.head, paddedValueDim, channel);
  const destination = b.add(
    offset(b, b.loadPointer(place.pointer.value), row, place.paddedTokens),
    b.as(b.cvt('u64', b.add(b.add(place.paddedKeyStart, firstToken), b.shl(word, 2))), 'global'),
  );
  const rowStride = b.as(b.cvt('u64', place.paddedTokens), 'global');
  for (let i = 0; i < 8; i++) {
    const [x, y, z, w] = tokens.map((values) => values[i]) as [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];
    b.st(b.pack('e4m3x4', b.cvtPack('e4m3x2', x, y), b.cvtPack('e4m3x2', z, w)), destination);
    b.add(destination, rowStride, destination);
  }
  return b.build();

  /** Four tokens of eight channels, less their means. */
  function loadTokens(): Reg<'f32'>[][] {
    b.section('load four tokens');
    const means = smoothV ? channelVector(b, place, 'valueMean', channel, paddedValueDim) : undefined;
    // Position 4w + i of 16 holds token TOKEN_PERMUTATION[4w + i] = 2w + TOKEN_PERMUTATION[i].
    const [group, within] = [b.shr(word, 2), b.and(word, 3)];
    const firstOfWord = b.add(b.shl(group, 4), b.shl(within, 1));
    const base = offset(
      b,
      offset64(b, place.source, b.add(b.add(place.keyStart, firstToken), firstOfWord), place.tokenStride),
      channel,
      BYTES[dtype],
    );
    return TOKEN_PERMUTATION.slice(0, 4).map((later) => {
      const token = b.add(firstOfWord, later);
      const inside = place.isSeen(b.add(firstToken, token));
      const source = later === 0 ? base : b.add(base, b.as(b.mul(place.tokenStride, later), 'global'));
      const values = loadEight(b, dtype, loadWidth, source, channel, valueDim, inside);
      const faulty = b.constant('b32', 0);
      values.forEach((value, i) => {
        if (means !== undefined) b.when(inside, () => b.sub(value, means[i] as Reg<'f32'>, value));
        b.when(isFault(b, value), () => {
          b.set(faulty, 1);
          b.set(value, 0);
        });
      });
      b.if(b.setp('ne', faulty, 0), () => reportFault(b, place, token, keyScales));
      return values;
    });
  }

  /** From the maxima of all parts of the sequence. */
  function joinChunks(): void {
    const maximumAt = offset(
      b,
      b.loadPointer(place.pointer.valueMaximum),
      b.mad(b.mul(place.sequenceHead, VALUE_CHUNKS), paddedValueDim, channel),
      4,
    );
    const chunkAt = (chunk: number) =>
      [0, 16].flatMap((half) => b.ldVector('u32', 4, maximumAt, chunk * paddedValueDim * 4 + half, { readOnly: true }));
    const isPair = config.sharesRange ? b.setp('le', b.sub(place.seenUntil, place.seenFrom), 2) : undefined;
    for (let chunk = 0; chunk < VALUE_CHUNKS; chunk += 2) {
      const [first, second] = [chunkAt(chunk), chunkAt(chunk + 1)];
      maxima.forEach((maximum, i) => {
        const ofPair = b.max(first[i] as Reg<'u32'>, second[i] as Reg<'u32'>);
        b.max(maximum, ofPair, maximum);
        const least = minima[i];
        if (least === undefined || isPair === undefined) return;
        b.min(least, b.sub(ofPair, 1), least);
        if (chunk > 0) return;
        // Two tokens are one pair, which would hide the smaller behind the larger.
        for (const own of [first, second]) b.when(isPair, () => b.min(least, b.sub(own[i] as Reg<'u32'>, 1), least));
      });
    }
  }

  /** From the tile's own tokens, of which sixteen lanes have four each. */
  function findTileMaxima(ofThread: readonly (readonly Reg<'f32'>[])[]): void {
    maxima.forEach((maximum, i) => {
      for (const values of ofThread) b.max(maximum, b.and(b.as(values[i] as Reg<'f32'>, 'u32'), 0x7fffffff), maximum);
      for (let lanes = 1; lanes < 16; lanes *= 2) b.max(maximum, b.shflBfly(maximum, lanes), maximum);
    });
  }

  /** Number of the tile among those of all heads. */
  function tileInMemory(): Reg<'u32'> {
    const start = b.add(place.paddedKeyStart, firstToken);
    return b.shr(b.mad(place.head, place.paddedTokens, start), Math.log2(VALUE_BLOCK));
  }

  /** Powers of two that tokens lie apart beyond {@link UNSHIFTED_SPREAD}, in the mean of the head's channels. */
  function rangeShift(): Reg<'u32'> {
    // Bits of floats grow by 2^23 with each power of two: here in shares of 128.
    const apart = maxima.map((maximum, i) => {
      const least = b.min(minima[i] as Reg<'u32'>, b.sub(b.max(maximum, 1), 1));
      return b.shr(b.sub(b.max(maximum, 1), b.add(least, 1)), 16);
    });
    let sum = apart.reduce((x, y) => b.add(x, y));
    sum = b.add(sum, b.shflBfly(sum, 16));
    const shared = b.sharedAddress((spreads as SharedTile).base);
    const warp = b.shr(place.thread, 5);
    b.when(b.setp('eq', b.and(place.thread, 31), 0), () => b.st(sum, b.add(shared, b.as(b.shl(warp, 2), 'shared'))));
    b.barSync();
    const warps = Math.ceil(threads / 32);
    const all = Array.from({ length: warps }, (_, i) => b.ld('u32', shared, 4 * i)).reduce((x, y) => b.add(x, y));
    const mean = b.shr(b.div(all, valueDim), 7);
    return b.sub(b.min(b.max(mean, UNSHIFTED_SPREAD), UNSHIFTED_SPREAD + LARGEST_RANGE_SHIFT), UNSHIFTED_SPREAD);
  }
}

export const quantizeValueThreads = ({ paddedValueDim }: Pick<ValueConfig, 'paddedValueDim'>) =>
  Math.max(32, (paddedValueDim / 8) * 16);
