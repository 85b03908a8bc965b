/**
 * Quantizes K and V for the Hopper kernels in one launch that reads each once: INT8 rows of K with float32 scales, and V in FP16
 * or FP8. One CTA takes a tile of 128 keys of one head, the attention kernel's own.
 *
 * V in FP16 stays as it lies, `[head, token, channel]`. V in FP8 is transposed, tokens permuted inside every 16, and
 *
 *     v[token, channel] ~ code * valueScale[channel] * valueTileScale[tile]
 *
 * `valueScale` comes from a sample of the tokens (`channelStatistics`), so that no pass over all of V precedes this one;
 * what exceeds it is covered by a scale that the tile chooses for itself. That is a power of two, which costs FP8 no
 * accuracy, is 1 for nearly all tiles, and lets attention move its sums from one tile's scale to the next's without a rounding.
 * A finished tile never changes, whatever is appended.
 *
 * An element that is not finite sets its token's bit in `keyFaults` and the sign bit of the scales of its 64 keys: attention
 * makes NaN of the rows that see it, and of those only. Of V it becomes 0 with its neighbours, since 0 * NaN would reach
 * the others; it takes no part in a scale. So it is with numbers beyond FP16's range where V is stored in FP16. Before the first
 * key that causality, window and length leave to any row, and behind the last, tiles are filled with copies of it.
 */
import { TOKEN_PERMUTATION } from '../../../../quantization/value-fp8.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, offset64, pointers } from '../parts/addresses.ts';
import { BEYOND_FP16_BITS, INFINITY_BITS, MAGIC, nextPowerOfTwo, SMALLEST_GROUP_MAXIMUM } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEightFloats, loadEightPacked, packBytes, unpackEight } from '../parts/elements.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type HiddenKeys, isVisible, loadVisibleRange, visibleBitsAt } from './visible-keys.ts';

export interface QuantizeKeyValueConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly valueFormat: 'e4m3' | 'f16';
  /** D and Dv, and padded to multiples of 32; Dv in FP16 to one of 16. */
  readonly headDim: number;
  readonly paddedDim: number;
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly keyLoadWidth: LoadWidth;
  readonly valueLoadWidth: LoadWidth;
  /** Scales of 64 keys: 1, or 4 by (token % 8) / 2. */
  readonly keyScales: 1 | 4;
  /** Subtract `keyMean`. */
  readonly smoothK: boolean;
  /** Subtract `valueMean`. */
  readonly smoothV: boolean;
  /** Keys that a mask hides from every row count in no scale. */
  readonly hiddenKeys: HiddenKeys;
}

/** Keys of a CTA. */
export const KEY_VALUE_TILE = 128;
/** Keys that scales of K, bits of faults and the padding of sequences are counted in. */
const HALF = KEY_VALUE_TILE / 2;

export const QUANTIZE_KEY_VALUE_POINTERS = [
  'sequences',
  'k',
  'v',
  'keyMean',
  'valueMean',
  'valueScale',
  'key',
  'keyScale',
  'keyFaults',
  'value',
  'valueTileScale',
  'visibleKeys',
] as const;
export const QUANTIZE_KEY_VALUE_INTEGERS = ['heads', 'tiles', 'paddedTokens'] as const;

const E4M3_MAX = 448;
/** Exponents of a tile's scale lie in this range, so that the ratio of two moves sums neither to infinity nor out of reach. */
const TILE_SCALE_EXPONENTS = { least: -30, most: 60 } as const;
/** A tile whose largest code would be no smaller than this share of E4M3's largest does without a scale. */
const SMALLEST_UNSCALED = 2 ** -6;

const floatBits = (value: number) => new Uint32Array(new Float32Array([value]).buffer)[0] as number;

/** Threads: enough for each to hold 32 bytes of registers for every 64 elements at most. */
export const quantizeKeyValueThreads = ({
  paddedDim,
  paddedValueDim,
}: Pick<QuantizeKeyValueConfig, 'paddedDim' | 'paddedValueDim'>) =>
  Math.max(paddedDim, paddedValueDim) <= 128 ? 256 : 512;

/** The eight channels of a thread, from `channel` on, of the `span` that the threads cover together. */
interface Channels {
  readonly channel: Reg<'u32'>;
  readonly span: number;
}

/** How V's elements are dealt out to the threads, and how they are stored. */
interface ValueOrder {
  readonly channels: Channels;
  /** Tokens of a thread, counted from the tile's first. */
  readonly tokens: readonly Reg<'u32'>[];
  readonly store: () => void;
}

type Quad = [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];

export function quantizeKeyValue(config: QuantizeKeyValueConfig): Kernel {
  const { target, dtype, headDim, paddedDim, valueDim, paddedValueDim, keyScales } = config;
  const fp8 = config.valueFormat === 'e4m3';
  const threads = quantizeKeyValueThreads(config);
  const warps = threads / 32;
  const bytes = BYTES[dtype];
  // All of K and V is under way at once where it fits in registers, and two CTAs on a multiprocessor: one loads while the other computes.
  const valuesLater = dtype === 'float32';
  const minBlocksPerMultiprocessor = threads > 256 ? 1 : 2;
  const b = new KernelBuilder({ name: 'quantizeKeyValue', target, threads, minBlocksPerMultiprocessor });
  const pointer = pointers(b, QUANTIZE_KEY_VALUE_POINTERS);
  const integer = integers(b, QUANTIZE_KEY_VALUE_INTEGERS);
  const { keyBatch, keyHead, keyToken, valueBatch, valueHead, valueToken } = pointers(b, KEY_VALUE_STRIDES);

  // K: a thread takes eight channels of rows `rowsAtOnce` apart, at most half a tile, which are all of one group.
  const perRow = Math.max(nextPowerOfTwo(paddedDim / 8), threads / HALF);
  const rowsAtOnce = threads / perRow;
  const passes = KEY_VALUE_TILE / rowsAtOnce;
  const halfOf = (pass: number) => Math.floor((pass * rowsAtOnce) / HALF);
  const rowMaxima = b.shared('row maxima of K', 2, rowMajor(rowsAtOnce * 4));
  const valueMaxima = b.shared('maxima of V', 1, rowMajor(warps * 4));
  const faultWords = b.shared('faults', warps, rowMajor(16));
  const shared = b.sharedAddress();
  const sharedAt = (base: Reg<'shared'>, index: Reg<'u32'>, shift: number) =>
    b.add(base, b.as(b.shl(index, shift), 'shared'));
  const at = <T>(list: readonly T[], i: number) => list[i] as T;

  b.section('which tile');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const warp = b.shr(thread, 5);
  const [tile, sequenceHead] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.tiles));
  const [head, sequence] = divide(b, sequenceHead, b.loadParameter(integer.heads));
  const table = b.loadPointer(pointer.sequences);
  const { keyStart, keyLength, paddedKeyStart } = loadSequence(b, table, sequence);
  const [seenFrom, seenUntil] = loadVisibleRange(b, table, sequence);
  const firstToken = b.mul(tile, KEY_VALUE_TILE);
  b.when(b.setp('ge', firstToken, seenUntil), () => b.exit());
  b.when(b.setp('le', b.add(firstToken, KEY_VALUE_TILE), seenFrom), () => b.exit());
  const tokensLeft = b.sub(keyLength, firstToken);
  const firstSeen = b.sub(b.max(seenFrom, firstToken), firstToken);
  const lastSeen = b.sub(b.sub(seenUntil, firstToken), 1);
  // Beyond the padding of this sequence lies the next.
  const secondHalf = b.setp('gt', tokensLeft, HALF);
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  const firstRow = b.add(b.mad(head, paddedTokens, paddedKeyStart), firstToken);
  const isSeen = visibility();
  /** Loads eight channels of each token; those beyond the interval of seen keys are copies of its ends. */
  const loaderOf = (
    input: typeof pointer.k,
    [batch, ofHead, token]: readonly [Parameter<'u64'>, Parameter<'u64'>, Parameter<'u64'>],
    { channel, span }: Channels,
    dim: number,
    width: LoadWidth,
  ) => {
    let source = offset64(b, b.loadPointer(input), sequence, b.loadParameter(batch));
    source = offset64(b, source, head, b.loadParameter(ofHead));
    const stride = b.loadParameter(token);
    source = offset(b, offset64(b, source, b.add(keyStart, firstToken), stride), channel, bytes);
    const inRow = (first: number) => (dim === span ? undefined : b.setp('lt', b.add(channel, first), dim));
    return (inTile: Reg<'u32'>) => {
      const seen = isSeen?.(inTile);
      const inside = (first: number) => {
        const guard = inRow(first);
        return seen === undefined || guard === undefined ? (guard ?? seen) : b.andPred(guard, seen);
      };
      return loadEightPacked(b, dtype, width, offset64(b, source, clamped(inTile), stride), inside);
    };
  };

  b.section('load K');
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const keyChannels: Channels = { channel: b.shl(column, 3), span: perRow * 8 };
  const keyTokens = () => Array.from({ length: passes }, (_, pass) => b.add(row, pass * rowsAtOnce));
  const keys = keyTokens().map(
    loaderOf(pointer.k, [keyBatch, keyHead, keyToken], keyChannels, headDim, config.keyLoadWidth),
  );

  b.section('load V');
  const loadValues = () => {
    const order = fp8 ? transposed() : asItLies();
    const strides = [valueBatch, valueHead, valueToken] as const;
    const load = loaderOf(pointer.v, strides, order.channels, valueDim, config.valueLoadWidth);
    return { ...order, packed: order.tokens.map(load) };
  };
  const early = valuesLater ? undefined : loadValues();

  b.section('largest magnitudes of rows of K');
  const keyMean = config.smoothK ? channelVector('keyMean', keyChannels, paddedDim) : undefined;
  /** Bits of the eights of K and then of V that hold something that is not finite. */
  const faults = b.constant('b32', 0);
  const leaveOutFaults = (largest: Reg<'u32'>, bit: number, from = INFINITY_BITS) =>
    b.when(b.setp('ge', largest, from), () => {
      b.set(largest, 0);
      b.or(faults, 2 ** bit, faults);
    });
  const ofHalves = [b.constant('u32', 0), b.constant('u32', 0)];
  keys.forEach((packed, pass) => {
    const largest = largestOf(centered(packed, keyMean));
    leaveOutHidden(largest, b.add(row, pass * rowsAtOnce));
    leaveOutFaults(largest, pass);
    // A copy of a token may be of another group than that.
    leaveOutUnseen(largest, b.add(row, pass * rowsAtOnce));
    const ofHalf = at(ofHalves, halfOf(pass));
    b.max(ofHalf, largest, ofHalf);
  });
  const rowMaximumAt = sharedAt(shared, row, 2);
  ofHalves.forEach((ofHalf, half) => {
    let largest = ofHalf;
    for (let mask = 1; mask < perRow; mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
    b.when(b.setp('eq', column, 0), () => b.st(largest, rowMaximumAt, rowMaxima.base + half * rowsAtOnce * 4));
  });

  if (valuesLater) {
    b.barSync();
    quantizeKeys();
  }

  b.section('largest code of V');
  const values = early ?? loadValues();
  const valueMean = config.smoothV ? channelVector('valueMean', values.channels, paddedValueDim) : undefined;
  const toCodes = fp8
    ? channelVector('valueScale', values.channels, paddedValueDim).map((scale) => b.rcpApprox(scale))
    : undefined;
  let largestCode = b.constant('u32', 0);
  values.packed.forEach((packed, i) => {
    const largest = largestOf(scaled(centered(packed, valueMean), toCodes));
    leaveOutHidden(largest, at(values.tokens, i));
    leaveOutFaults(largest, passes + i, fp8 ? INFINITY_BITS : BEYOND_FP16_BITS);
    if (fp8) b.max(largestCode, largest, largestCode);
  });
  const first = b.setp('eq', lane, 0);
  if (fp8) {
    for (let mask = 1; mask < 32; mask *= 2) largestCode = b.max(largestCode, b.shflBfly(largestCode, mask));
    b.when(first, () => b.st(largestCode, sharedAt(shared, warp, 2), valueMaxima.base));
  }

  b.section('faults');
  const tokenBits = Array.from({ length: 4 }, () => b.constant('b32', 0));
  b.if(b.voteAny(b.setp('ne', faults, 0)), reportFaults);
  b.when(first, () => b.stVector(tokenBits, sharedAt(shared, warp, 4), faultWords.base));
  b.barSync();

  if (!valuesLater) quantizeKeys();
  b.if(b.setp('lt', thread, 2 * keyScales), writeKeyScales);
  values.store();
  return b.build();

  // ---- visible keys

  /** The token itself, or the nearest in the interval of keys that a row may see. */
  function clamped(inTile: Reg<'u32'>): Reg<'u32'> {
    return b.max(b.min(inTile, lastSeen), firstSeen);
  }

  /** Of the tile's tokens, what a mask hides from every row; undefined without a mask. */
  function visibility(): ((inTile: Reg<'u32'>) => Reg<'pred'>) | undefined {
    if (config.hiddenKeys === 'none') return undefined;
    const base = b.loadPointer(pointer.visibleKeys);
    const bits = visibleBitsAt(b, base, config.hiddenKeys, head, paddedTokens, b.add(paddedKeyStart, firstToken));
    const at = (token: Reg<'u32'>) => offset(b, bits, b.shr(token, 5), 4);
    return (inTile) => {
      const token = clamped(inTile);
      return isVisible(b, b.ld('b32', at(token), 0, { readOnly: true }), token);
    };
  }

  function leaveOutHidden(largest: Reg<'u32'>, inTile: Reg<'u32'>): void {
    if (isSeen !== undefined) b.when(isSeen(inTile), () => b.set(largest, 0), true);
  }

  function leaveOutUnseen(largest: Reg<'u32'>, inTile: Reg<'u32'>): void {
    b.when(b.setp('gt', inTile, lastSeen), () => b.set(largest, 0));
    b.when(b.setp('lt', inTile, firstSeen), () => b.set(largest, 0));
  }

  // ---- channels

  /** A thread's eight channels of a `[sequence, head, channel]` vector; those beyond the row are 0. */
  function channelVector(
    name: 'keyMean' | 'valueMean' | 'valueScale',
    { channel, span }: Channels,
    padded: number,
  ): Reg<'f32'>[] {
    const vector = Array.from({ length: 8 }, () => b.constant('f32', 0));
    const load = () => {
      const from = offset(b, b.loadPointer(pointer[name]), b.mad(sequenceHead, padded, channel), 4);
      loadEightFloats(b, from).forEach((value, i) => {
        b.mov(value, vector[i]);
      });
    };
    if (span === padded) load();
    else b.if(b.setp('lt', channel, padded), load);
    return vector;
  }

  function centered(packed: readonly Reg<'b32'>[], mean: readonly Reg<'f32'>[] | undefined): Reg<'f32'>[] {
    const floats = unpackEight(b, dtype, packed);
    return mean === undefined ? floats : floats.map((float, i) => b.sub(float, at(mean, i)));
  }

  function scaled(floats: Reg<'f32'>[], factors: readonly Reg<'f32'>[] | undefined): Reg<'f32'>[] {
    return factors === undefined ? floats : floats.map((float, i) => b.mul(float, at(factors, i)));
  }

  function largestOf(floats: readonly Reg<'f32'>[]): Reg<'u32'> {
    return floats.map((float) => b.and(b.as(float, 'u32'), 0x7fffffff)).reduce((x, y) => b.max(x, y));
  }

  // ---- faults

  function isFaulty(bit: number): Reg<'pred'> {
    return b.setp('ne', b.and(faults, 2 ** bit), 0);
  }

  /** Bits of the tile's tokens that this warp found not to be finite; what it holds of V for them becomes 0. */
  function reportFaults(): void {
    [...keyTokens(), ...values.tokens].forEach((token, i) => {
      const found = isFaulty(i);
      const real = b.andPred(found, b.setp('le', token, lastSeen));
      tokenBits.forEach((bits, word) => {
        // Shifts by 32 and more give 0, those by less than 0 too.
        const bit = b.shl(b.constant('b32', 1), b.sub(token, 32 * word));
        b.when(real, () => b.or(bits, bit, bits));
      });
      if (i < passes) return;
      b.when(found, () => {
        for (const register of at(values.packed, i - passes)) b.set(register, 0);
      });
    });
    for (const bits of tokenBits) {
      for (let mask = 1; mask < 32; mask *= 2) b.or(bits, b.shflBfly(bits, mask), bits);
    }
  }

  // ---- K

  /** Codes of K, once all rows' maxima are known. */
  function quantizeKeys(): void {
    b.section('quantize K');
    const ownGroup = b.shr(b.and(row, 7), 1);
    const reciprocals = [0, 1].map((half) => {
      const maximum = groupMaximum(ownGroup, b.constant('u32', half));
      const reciprocal = b.divF32(b.constant('f32', 127), maximum);
      b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
      return reciprocal;
    });
    const destination = b.add(
      offset(b, b.loadPointer(pointer.key), b.add(firstRow, row), paddedDim),
      b.as(b.cvt('u64', keyChannels.channel), 'global'),
    );
    const magic = b.constant('f32', MAGIC);
    const stored = b.setp('lt', keyChannels.channel, paddedDim);
    const storedBeyond = b.andPred(stored, secondHalf);
    keys.forEach((packed, pass) => {
      const reciprocal = at(reciprocals, halfOf(pass));
      // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
      const rounded = centered(packed, keyMean).map((float) => b.as(b.fma(float, reciprocal, magic), 'b32'));
      const codes = packBytes(b, rounded);
      b.when(halfOf(pass) === 0 ? stored : storedBeyond, () =>
        b.stVector(codes, destination, pass * rowsAtOnce * paddedDim),
      );
    });
  }

  /** Largest magnitude of a group of half a tile. */
  function groupMaximum(group: Reg<'u32'>, half: Reg<'u32'>): Reg<'f32'> {
    const base = b.add(shared, b.as(b.mad(half, rowsAtOnce * 4, rowMaxima.base), 'shared'));
    const members =
      keyScales === 1
        ? Array.from({ length: rowsAtOnce / 4 }, (_, i) => b.ldVector('u32', 4, base, 16 * i))
        : Array.from({ length: rowsAtOnce / 8 }, (_, i) => b.ldVector('u32', 2, sharedAt(base, group, 3), 32 * i));
    const maximum = b.as(
      members.flat().reduce((x, y) => b.max(x, y)),
      'f32',
    );
    b.when(b.setp('lt', maximum, SMALLEST_GROUP_MAXIMUM), () => b.set(maximum, 0));
    return maximum;
  }

  /** Thread i writes the scale of group i % keyScales of half i / keyScales, and the first of a half its bits of faults. */
  function writeKeyScales(): void {
    b.section('scales and faults');
    const group = b.and(thread, keyScales - 1);
    const half = b.shr(thread, Math.log2(keyScales));
    const scale = b.divF32(groupMaximum(group, half), 127);
    const from = sharedAt(shared, half, 3);
    const found = Array.from({ length: warps }, (_, i) => b.ldVector('b32', 2, from, faultWords.base + 16 * i));
    const [low, high] = [0, 1].map((word) => found.map((pair) => at(pair, word)).reduce((x, y) => b.or(x, y))) as [
      Reg<'b32'>,
      Reg<'b32'>,
    ];
    const exists = b.orPred(secondHalf, b.setp('eq', half, 0));
    const slot = b.add(b.shr(firstRow, 6), half);
    const bits = b.as(scale, 'b32');
    b.when(b.setp('ne', b.or(low, high), 0), () => b.or(bits, 0x80000000, bits));
    const scaleAt = offset(b, b.loadPointer(pointer.keyScale), b.mad(slot, keyScales, group), 4);
    b.when(exists, () => b.st(bits, scaleAt));
    const faultsAt = offset(b, b.loadPointer(pointer.keyFaults), slot, 8);
    b.when(b.andPred(exists, b.setp('eq', group, 0)), () => b.stVector([low, high], faultsAt));
  }

  // ---- V

  /** V in FP16: rows as those of K. */
  function asItLies(): ValueOrder {
    const ofRow = Math.max(nextPowerOfTwo(paddedValueDim / 8), threads / KEY_VALUE_TILE);
    const atOnce = threads / ofRow;
    const firstOfThread = b.shr(thread, Math.log2(ofRow));
    const channel = b.shl(b.and(thread, ofRow - 1), 3);
    const tokens = Array.from({ length: KEY_VALUE_TILE / atOnce }, (_, i) => b.add(firstOfThread, i * atOnce));
    const store = () => {
      b.section('convert and store V');
      const rowBytes = paddedValueDim * 2;
      const destination = b.add(
        offset(b, b.loadPointer(pointer.value), b.add(firstRow, firstOfThread), rowBytes),
        b.as(b.mulWide(channel, 2), 'global'),
      );
      const inRow = b.setp('lt', channel, paddedValueDim);
      values.packed.forEach((packed, i) => {
        const floats = centered(packed, valueMean);
        const pairs = [0, 2, 4, 6].map((c) => b.as(b.cvtPack('f16x2', at(floats, c), at(floats, c + 1)), 'b32'));
        if (config.smoothV) {
          // 0 less the mean may be beyond FP16's range.
          b.when(isFaulty(passes + i), () => {
            for (const pair of pairs) b.set(pair, 0);
          });
          if (isSeen !== undefined) {
            b.when(b.notPred(isSeen(at(tokens, i))), () => {
              for (const pair of pairs) b.set(pair, 0);
            });
          }
        }
        const kept = b.andPred(inRow, b.orPred(secondHalf, b.setp('lt', at(tokens, i), HALF)));
        b.when(kept, () => b.stVector(pairs, destination, i * atOnce * rowBytes));
      });
    };
    return { channels: { channel, span: ofRow * 8 }, tokens, store };
  }

  /**
   * V in FP8: a warp takes `octets` times eight channels of `words` times four tokens, which lie side by side in permuted order,
   * so that packing transposes them; shared memory gathers the 128 tokens of each channel.
   */
  function transposed(): ValueOrder {
    const octets = (paddedValueDim / 8) % 8 === 0 ? 8 : 4;
    const words = 32 / octets;
    const channelParts = paddedValueDim / 8 / octets;
    const wordParts = 32 / words;
    const partsAtOnce = Math.min(Math.floor(warps / channelParts), wordParts);
    const rounds = Math.ceil(wordParts / partsAtOnce);
    const codeTile = b.shared('V, transposed', paddedValueDim, rowMajor(KEY_VALUE_TILE));
    const codesAt = b.add(shared, codeTile.base);
    // The 16-byte chunks of a channel are permuted so that the lanes of a warp write different banks.
    const chunkMask = (ofOctet: Reg<'u32'>) => (octets === 8 ? b.and(ofOctet, 7) : b.shl(b.and(ofOctet, 3), 1));
    const part = b.rem(warp, channelParts);
    const octet = b.mad(part, octets, b.and(lane, octets - 1));
    const channel = b.shl(octet, 3);
    const firstPart = b.div(warp, channelParts);
    // Warps that are left over, or have no more tokens, load what others load and store nothing.
    const allBusy = partsAtOnce * channelParts === warps && rounds * partsAtOnce === wordParts;
    const wordOf = (round: number) => {
      const wordPart = b.add(firstPart, round * partsAtOnce);
      const clamped = allBusy ? wordPart : b.min(wordPart, wordParts - 1);
      return b.mad(clamped, words, b.shr(lane, Math.log2(octets)));
    };
    const ofRounds = Array.from({ length: rounds }, (_, round) => wordOf(round));
    const tokens = ofRounds.flatMap((word) => {
      // Position 4w + i of 16 holds token TOKEN_PERMUTATION[4w + i] = 2w + TOKEN_PERMUTATION[i].
      const firstOfWord = b.add(b.shl(b.shr(word, 2), 4), b.shl(b.and(word, 3), 1));
      return TOKEN_PERMUTATION.slice(0, 4).map((later) => b.add(firstOfWord, later));
    });

    const store = () => {
      b.section('scale of the tile of V');
      const ofWarps = Array.from({ length: warps / 4 }, (_, i) =>
        b.ldVector('u32', 4, shared, valueMaxima.base + 16 * i),
      );
      const tileScale = tileScaleOf(ofWarps.flat().reduce((x, y) => b.max(x, y)));
      const scaleAt = offset(b, b.loadPointer(pointer.valueTileScale), b.shr(firstRow, 6), 4);
      b.when(b.setp('eq', thread, 0), () => b.st(tileScale, scaleAt));
      // The reciprocal of a power of two.
      const inverse = b.as(b.sub(b.constant('u32', 0x7f000000), tileScale), 'f32');
      const factors = (toCodes as Reg<'f32'>[]).map((ofChannel) => b.mul(ofChannel, inverse));

      b.section('quantize V into shared memory');
      const channelAt = sharedAt(codesAt, channel, Math.log2(KEY_VALUE_TILE));
      ofRounds.forEach((word, round) => {
        const chunk = b.xor(b.shr(word, 2), chunkMask(octet));
        const place = sharedAt(sharedAt(channelAt, chunk, 4), b.and(word, 3), 2);
        const codes = values.packed
          .slice(4 * round, 4 * round + 4)
          .map((packed) => scaled(centered(packed, valueMean), factors));
        const parts = Math.min(partsAtOnce, wordParts - round * partsAtOnce);
        const busy = allBusy ? undefined : b.setp('lt', firstPart, parts);
        for (let c = 0; c < 8; c++) {
          const [x, y, z, w] = codes.map((ofToken) => at(ofToken, c)) as Quad;
          const packed = b.pack('e4m3x4', b.cvtPack('e4m3x2', x, y), b.cvtPack('e4m3x2', z, w));
          const write = () => b.st(packed, place, c * KEY_VALUE_TILE);
          if (busy === undefined) write();
          else b.when(busy, write);
        }
      });
      b.barSync();

      b.section('store V');
      const chunks = paddedValueDim * (KEY_VALUE_TILE / 16);
      const valueRow = b.mul(head, paddedValueDim);
      const destination = b.add(
        b.loadPointer(pointer.value),
        b.as(b.cvt('u64', b.add(paddedKeyStart, firstToken)), 'global'),
      );
      for (let done = 0; done < chunks; done += threads) {
        const index = b.add(thread, done);
        const ofChannel = b.shr(index, 3);
        const chunk = b.and(index, 7);
        const place = b.xor(chunk, chunkMask(b.shr(ofChannel, 3)));
        const from = sharedAt(sharedAt(codesAt, ofChannel, Math.log2(KEY_VALUE_TILE)), place, 4);
        const to = b.add(
          offset(b, destination, b.add(valueRow, ofChannel), paddedTokens),
          b.as(b.cvt('u64', b.shl(chunk, 4)), 'global'),
        );
        let kept = b.orPred(secondHalf, b.setp('lt', chunk, 4));
        if (done + threads > chunks) kept = b.andPred(kept, b.setp('lt', index, chunks));
        b.if(kept, () => b.stVector(b.ldVector('b32', 4, from), to));
      }
    };
    return { channels: { channel, span: paddedValueDim }, tokens, store };
  }

  /** Bits of the power of two that brings a tile's largest code into E4M3's range; 1 where it is there. */
  function tileScaleOf(largest: Reg<'u32'>): Reg<'u32'> {
    const share = b.mul(b.as(largest, 'f32'), 1 / E4M3_MAX);
    const up = b.and(b.add(b.as(share, 'u32'), 0x7fffff), 0x7f800000);
    const { least, most } = TILE_SCALE_EXPONENTS;
    const power = b.min(b.max(up, floatBits(2 ** least)), floatBits(2 ** most));
    const one = floatBits(1);
    const unscaled = b.andPred(b.setp('le', power, one), b.setp('ge', power, floatBits(SMALLEST_UNSCALED)));
    b.when(b.orPred(unscaled, b.setp('eq', largest, 0)), () => b.set(power, one));
    return power;
  }
}
