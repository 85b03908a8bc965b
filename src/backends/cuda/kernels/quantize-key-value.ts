/**
 * Quantizes K and V for the Hopper kernels in one launch that reads each once: INT8 rows of K with float32 scales, and V in FP8,
 * transposed, tokens permuted inside every 16. One CTA takes a tile of 128 keys of one head, the attention kernel's own.
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
 * the others; it takes no part in a scale. Behind the last token of a sequence, tiles are filled with copies of it.
 */
import { TOKEN_PERMUTATION } from '../../../quantization/value-fp8.ts';
import type { DType } from '../../../tensor/dtype.ts';
import { KernelBuilder } from '../ptx/builder.ts';
import { rowMajor } from '../ptx/layouts.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel, Reg } from '../ptx/types.ts';
import {
  BYTES,
  divide,
  INFINITY_BITS,
  integers,
  type LoadWidth,
  loadEightFloats,
  loadEightPacked,
  loadSequence,
  MAGIC,
  nextPowerOfTwo,
  offset,
  offset64,
  packBytes,
  pointers,
  SMALLEST_GROUP_MAXIMUM,
  unpackEight,
} from './common.ts';

export interface QuantizeKeyValueConfig {
  readonly target: Target;
  readonly dtype: DType;
  /** D and Dv, and padded to multiples of 32. */
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
] as const;
export const QUANTIZE_KEY_VALUE_INTEGERS = ['heads', 'tiles', 'paddedTokens'] as const;
/** In bytes. */
export const QUANTIZE_KEY_VALUE_STRIDES = [
  'keyBatch',
  'keyHead',
  'keyToken',
  'valueBatch',
  'valueHead',
  'valueToken',
] as const;

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

export function quantizeKeyValue(config: QuantizeKeyValueConfig): Kernel {
  const { target, dtype, headDim, paddedDim, valueDim, paddedValueDim, keyScales } = config;
  const threads = quantizeKeyValueThreads(config);
  const warps = threads / 32;
  const bytes = BYTES[dtype];
  // All of K and V is under way at once where it fits in registers, and two CTAs on a multiprocessor: one loads while the other computes.
  const valuesLater = dtype === 'float32';
  const minBlocksPerMultiprocessor = threads > 256 ? 1 : 2;
  const b = new KernelBuilder({ name: 'quantizeKeyValue', target, threads, minBlocksPerMultiprocessor });
  const pointer = pointers(b, QUANTIZE_KEY_VALUE_POINTERS);
  const integer = integers(b, QUANTIZE_KEY_VALUE_INTEGERS);
  const [keyBatch, keyHead, keyToken, valueBatch, valueHead, valueToken] = QUANTIZE_KEY_VALUE_STRIDES.map((name) =>
    b.parameter(name, 'u64'),
  ) as [Stride, Stride, Stride, Stride, Stride, Stride];
  type Stride = ReturnType<typeof b.parameter<'u64'>>;

  // K: a thread takes eight channels of rows `rowsAtOnce` apart, at most half a tile, which are all of one group.
  const perRow = Math.max(nextPowerOfTwo(paddedDim / 8), threads / HALF);
  const rowsAtOnce = threads / perRow;
  const passes = KEY_VALUE_TILE / rowsAtOnce;
  const halfOf = (pass: number) => Math.floor((pass * rowsAtOnce) / HALF);
  // V: a warp takes `octets` times eight channels of `words` times four tokens, which lie side by side in permuted order.
  const octets = (paddedValueDim / 8) % 8 === 0 ? 8 : 4;
  const words = 32 / octets;
  const channelParts = paddedValueDim / 8 / octets;
  const partsAtOnce = Math.min(Math.floor(warps / channelParts), 32 / words);
  const rounds = Math.ceil(32 / words / partsAtOnce);

  const transposed = b.shared('V, transposed', paddedValueDim, rowMajor(KEY_VALUE_TILE));
  const rowMaxima = b.shared('row maxima of K', 2, rowMajor(rowsAtOnce * 4));
  const valueMaxima = b.shared('maxima of V', 1, rowMajor(warps * 4));
  const faultWords = b.shared('faults', warps, rowMajor(16));
  const shared = b.sharedAddress();
  const sharedAt = (base: Reg<'shared'>, index: Reg<'u32'>, shift: number) =>
    b.add(base, b.as(b.shl(index, shift), 'shared'));

  b.section('which tile');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const warp = b.shr(thread, 5);
  const [tile, sequenceHead] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.tiles));
  const [head, sequence] = divide(b, sequenceHead, b.loadParameter(integer.heads));
  const { keyStart, keyLength, paddedKeyStart } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const firstToken = b.mul(tile, KEY_VALUE_TILE);
  b.when(b.setp('ge', firstToken, keyLength), () => b.exit());
  const tokensLeft = b.sub(keyLength, firstToken);
  const lastToken = b.sub(tokensLeft, 1);
  // Beyond the padding of this sequence lies the next.
  const secondHalf = b.setp('gt', tokensLeft, HALF);
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  const firstRow = b.add(b.mad(head, paddedTokens, paddedKeyStart), firstToken);
  const firstOf = (input: typeof pointer.k, [batch, ofHead, token]: readonly [Stride, Stride, Stride]) => {
    let source = offset64(b, b.loadPointer(input), sequence, b.loadParameter(batch));
    source = offset64(b, source, head, b.loadParameter(ofHead));
    const stride = b.loadParameter(token);
    return { source: offset64(b, source, b.add(keyStart, firstToken), stride), stride };
  };

  b.section('load K');
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const keyChannel = b.shl(column, 3);
  const key = firstOf(pointer.k, [keyBatch, keyHead, keyToken]);
  const keySource = offset(b, key.source, keyChannel, bytes);
  const keyInside = (first: number) =>
    headDim === perRow * 8 ? undefined : b.setp('lt', b.add(keyChannel, first), headDim);
  const keys = Array.from({ length: passes }, (_, pass) => {
    const token = b.min(b.add(row, pass * rowsAtOnce), lastToken);
    return loadEightPacked(b, dtype, config.keyLoadWidth, offset64(b, keySource, token, key.stride), keyInside);
  });
  const stored = b.setp('lt', keyChannel, paddedDim);

  b.section('load V');
  const part = b.rem(warp, channelParts);
  const octet = b.mad(part, octets, b.and(lane, octets - 1));
  const valueChannel = b.shl(octet, 3);
  const firstPart = b.div(warp, channelParts);
  const value = firstOf(pointer.v, [valueBatch, valueHead, valueToken]);
  const valueSource = offset(b, value.source, valueChannel, bytes);
  const valueInside = (first: number) =>
    valueDim === paddedValueDim ? undefined : b.setp('lt', b.add(valueChannel, first), valueDim);
  const allBusy = partsAtOnce * channelParts === warps && rounds * partsAtOnce * words === 32;
  // Warps that are left over, or have no more tokens, load what others load and store nothing.
  const valueWords = Array.from({ length: rounds }, (_, round) => {
    const wordPart = b.add(firstPart, round * partsAtOnce);
    const clamped = allBusy ? wordPart : b.min(wordPart, 32 / words - 1);
    return b.mad(clamped, words, b.shr(lane, Math.log2(octets)));
  });
  const isBusy = (round: number) =>
    allBusy ? undefined : b.setp('lt', firstPart, Math.min(partsAtOnce, 32 / words - round * partsAtOnce));
  // Position 4w + i of 16 holds token TOKEN_PERMUTATION[4w + i] = 2w + TOKEN_PERMUTATION[i].
  const firstTokenOf = (word: Reg<'u32'>) => b.add(b.shl(b.shr(word, 2), 4), b.shl(b.and(word, 3), 1));
  const loadValues = () =>
    valueWords.map((word) => {
      const first = firstTokenOf(word);
      return TOKEN_PERMUTATION.slice(0, 4).map((later) => {
        const from = offset64(b, valueSource, b.min(b.add(first, later), lastToken), value.stride);
        return loadEightPacked(b, dtype, config.valueLoadWidth, from, valueInside);
      });
    });
  const early = valuesLater ? undefined : loadValues();

  b.section('means and scales of the channels');
  const channelVector = (name: 'keyMean' | 'valueMean' | 'valueScale', channel: Reg<'u32'>, padded: number) =>
    loadEightFloats(b, offset(b, b.loadPointer(pointer[name]), b.mad(sequenceHead, padded, channel), 4));
  const keyMean = config.smoothK ? keyMeans() : undefined;
  const at = <T>(list: readonly T[], i: number) => list[i] as T;
  const centered = (packed: readonly Reg<'b32'>[], mean: readonly Reg<'f32'>[] | undefined) => {
    const floats = unpackEight(b, dtype, packed);
    return mean === undefined ? floats : floats.map((float, i) => b.sub(float, at(mean, i)));
  };
  const largestOf = (floats: readonly Reg<'f32'>[]) =>
    floats.map((float) => b.and(b.as(float, 'u32'), 0x7fffffff)).reduce((x, y) => b.max(x, y));
  /** Bits of eight channels of a token, in order, that are not finite. */
  const faults = b.constant('b32', 0);
  const leaveOutFaults = (largest: Reg<'u32'>, bit: number) =>
    b.when(b.setp('ge', largest, INFINITY_BITS), () => {
      b.set(largest, 0);
      b.or(faults, 2 ** bit, faults);
    });

  b.section('largest magnitudes of rows of K');
  const ofHalves = [b.constant('u32', 0), b.constant('u32', 0)];
  keys.forEach((packed, pass) => {
    const largest = largestOf(centered(packed, keyMean));
    leaveOutFaults(largest, pass);
    // A copy of the last token may be of another group.
    b.when(b.setp('gt', b.add(row, pass * rowsAtOnce), lastToken), () => b.set(largest, 0));
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
  const valueMean = config.smoothV ? channelVector('valueMean', valueChannel, paddedValueDim) : undefined;
  const valueFactor = channelVector('valueScale', valueChannel, paddedValueDim).map((scale) => b.rcpApprox(scale));
  let largestCode = b.constant('u32', 0);
  values.forEach((tokens, round) => {
    tokens.forEach((packed, i) => {
      const codes = centered(packed, valueMean).map((float, c) => b.mul(float, at(valueFactor, c)));
      const largest = largestOf(codes);
      leaveOutFaults(largest, passes + 4 * round + i);
      b.max(largestCode, largest, largestCode);
    });
  });
  for (let mask = 1; mask < 32; mask *= 2) largestCode = b.max(largestCode, b.shflBfly(largestCode, mask));
  const first = b.setp('eq', lane, 0);
  b.when(first, () => b.st(largestCode, sharedAt(shared, warp, 2), valueMaxima.base));

  const tokenBits = Array.from({ length: 4 }, () => b.constant('b32', 0));
  b.if(b.voteAny(b.setp('ne', faults, 0)), reportFaults);
  b.when(first, () => b.stVector(tokenBits, sharedAt(shared, warp, 4), faultWords.base));
  b.barSync();

  if (!valuesLater) quantizeKeys();
  b.if(b.setp('lt', thread, 2 * keyScales), writeKeyScales);

  b.section('scale of the tile of V');
  const tileMaximum = Array.from({ length: warps / 4 }, (_, i) =>
    b.ldVector('u32', 4, shared, valueMaxima.base + 16 * i),
  )
    .flat()
    .reduce((x, y) => b.max(x, y));
  const tileScale = tileScaleOf(tileMaximum);
  b.when(b.setp('eq', thread, 0), () =>
    b.st(tileScale, offset(b, b.loadPointer(pointer.valueTileScale), b.shr(firstRow, 6), 4)),
  );
  // The reciprocal of a power of two.
  const inverse = b.as(b.sub(b.constant('u32', 0x7f000000), tileScale), 'f32');
  const factor = valueFactor.map((ofChannel) => b.mul(ofChannel, inverse));

  b.section('quantize V into shared memory');
  // The 16-byte chunks of a channel are permuted so that the lanes of a warp write different banks.
  const chunkMask = (ofOctet: Reg<'u32'>) => (octets === 8 ? b.and(ofOctet, 7) : b.shl(b.and(ofOctet, 3), 1));
  const channelAt = sharedAt(b.add(shared, transposed.base), valueChannel, Math.log2(KEY_VALUE_TILE));
  values.forEach((tokens, round) => {
    const word = at(valueWords, round);
    const chunk = b.xor(b.shr(word, 2), chunkMask(octet));
    const place = sharedAt(sharedAt(channelAt, chunk, 4), b.and(word, 3), 2);
    const codes = tokens.map((packed) => centered(packed, valueMean).map((float, c) => b.mul(float, at(factor, c))));
    const busy = isBusy(round);
    for (let c = 0; c < 8; c++) {
      const [x, y, z, w] = codes.map((ofToken) => at(ofToken, c)) as [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];
      const packed = b.pack('e4m3x4', b.cvtPack('e4m3x2', x, y), b.cvtPack('e4m3x2', z, w));
      if (busy === undefined) b.st(packed, place, c * KEY_VALUE_TILE);
      else b.when(busy, () => b.st(packed, place, c * KEY_VALUE_TILE));
    }
  });
  b.barSync();

  b.section('store V');
  const chunks = paddedValueDim * (KEY_VALUE_TILE / 16);
  const valueRow = b.mul(head, paddedValueDim);
  const valueBase = b.add(
    b.loadPointer(pointer.value),
    b.as(b.cvt('u64', b.add(paddedKeyStart, firstToken)), 'global'),
  );
  for (let done = 0; done < chunks; done += threads) {
    const index = b.add(thread, done);
    const channel = b.shr(index, 3);
    const chunk = b.and(index, 7);
    const from = sharedAt(
      sharedAt(b.add(shared, transposed.base), channel, Math.log2(KEY_VALUE_TILE)),
      b.xor(chunk, chunkMask(b.shr(channel, 3))),
      4,
    );
    const to = b.add(
      offset(b, valueBase, b.add(valueRow, channel), paddedTokens),
      b.as(b.cvt('u64', b.shl(chunk, 4)), 'global'),
    );
    // Tokens of the second half may belong to the next sequence.
    let kept = b.orPred(secondHalf, b.setp('lt', chunk, 4));
    const exists = b.setp('lt', index, chunks);
    if (done + threads > chunks) kept = b.andPred(kept, exists);
    b.if(kept, () => b.stVector(b.ldVector('b32', 4, from), to));
  }
  return b.build();

  function keyMeans(): Reg<'f32'>[] {
    const means = Array.from({ length: 8 }, () => b.constant('f32', 0));
    const load = () => {
      channelVector('keyMean', keyChannel, paddedDim).forEach((mean, i) => {
        b.mov(mean, means[i]);
      });
    };
    if (perRow * 8 === paddedDim) load();
    else b.if(b.setp('lt', keyChannel, paddedDim), load);
    return means;
  }

  /** Codes of K, once all rows' maxima are known. */
  function quantizeKeys(): void {
    b.section('scales of K');
    const reciprocalOf = (maximum: Reg<'f32'>) => {
      const reciprocal = b.divF32(b.constant('f32', 127), maximum);
      b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
      return reciprocal;
    };
    const ownGroup = b.shr(b.and(row, 7), 1);
    const reciprocals = [0, 1].map((half) => reciprocalOf(groupMaximum(ownGroup, b.constant('u32', half))));

    b.section('quantize K');
    const keyDestination = b.add(
      offset(b, b.loadPointer(pointer.key), b.add(firstRow, row), paddedDim),
      b.as(b.cvt('u64', keyChannel), 'global'),
    );
    const magic = b.constant('f32', MAGIC);
    const storedBeyond = b.andPred(stored, secondHalf);
    keys.forEach((packed, pass) => {
      const reciprocal = at(reciprocals, halfOf(pass));
      // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
      const rounded = centered(packed, keyMean).map((float) => b.as(b.fma(float, reciprocal, magic), 'b32'));
      const codes = packBytes(b, rounded);
      b.when(halfOf(pass) === 0 ? stored : storedBeyond, () =>
        b.stVector(codes, keyDestination, pass * rowsAtOnce * paddedDim),
      );
    });
  }

  /** Bits of the tile's tokens that this warp found not to be finite; what it holds of V for them becomes 0. */
  function reportFaults(): void {
    const mark = (token: Reg<'u32'>, found: Reg<'pred'>) => {
      const real = b.andPred(found, b.setp('le', token, lastToken));
      tokenBits.forEach((bits, i) => {
        // Shifts by 32 and more give 0, those by less than 0 too.
        const bit = b.shl(b.constant('b32', 1), b.sub(token, 32 * i));
        b.when(real, () => b.or(bits, bit, bits));
      });
    };
    const foundAt = (bit: number) => b.setp('ne', b.and(faults, 2 ** bit), 0);
    for (let pass = 0; pass < passes; pass++) mark(b.add(row, pass * rowsAtOnce), foundAt(pass));
    values.forEach((tokens, round) => {
      const firstOfWord = firstTokenOf(at(valueWords, round));
      tokens.forEach((packed, i) => {
        const found = foundAt(passes + 4 * round + i);
        mark(b.add(firstOfWord, at(TOKEN_PERMUTATION, i)), found);
        b.when(found, () => {
          for (const register of packed) b.set(register, 0);
        });
      });
    });
    for (const bits of tokenBits) {
      for (let mask = 1; mask < 32; mask *= 2) b.or(bits, b.shflBfly(bits, mask), bits);
    }
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
