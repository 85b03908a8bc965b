/**
 * Quantizes Q or K: subtracts K's mean (or the block's own mean of Q), finds the largest magnitude of each group of tokens,
 * and writes padded INT8 or INT4 rows and float32 scales. One CTA takes one block of tokens of one head and reads it once;
 * src/quantization/groups.ts has the groups.
 *
 * A key far smaller than the largest of its group would lose its bits to that: its codes are taken larger by a power of two, which
 * `keyExponents` has ({@link KEY_EXPONENT_BIAS}), and the sign bit in the scales of its tile says so.
 *
 * A token with an element that is not finite takes no part in its group's scale. Of K, its bit is set in `keyFaults` and
 * the sign bit in the scales of its tile; of Q, its row bias becomes NaN: attention makes NaN of the rows that see it, and
 * of those only.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import {
  INFINITY_BITS,
  KEY_EXPONENT_BIAS,
  LOG2_E,
  MAGIC,
  MOST_KEY_EXPONENT,
  nextPowerOfTwo,
  SMALLEST_GROUP_MAXIMUM,
} from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats, packBytes } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { endWithoutKeys, type HiddenKeys, loadVisibleRange, seenInBlock } from './visible-keys.ts';

export interface QuantizeTokensConfig {
  readonly target: Target;
  readonly operand: 'query' | 'key';
  readonly dtype: DType;
  /** D, and D padded to 32 (INT8) or 64 (INT4). */
  readonly headDim: number;
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
  /** The stored format: a byte or half a byte for each value. */
  readonly container: 's8' | 's4';
  /** Largest quantized magnitude: 127, or 7. */
  readonly largest: 127 | 7;
  /** Tokens of a CTA: 128 of Q, 64 of K. */
  readonly blockTokens: 64 | 128;
  /** Consecutive tokens that hold a set of groups, and groups in the set: 1 takes them all, 8 by row % 8 (Q), 4 by (row % 8) / 2 (K). */
  readonly groupTokens: 32 | 64 | 128;
  readonly groups: 1 | 4 | 8;
  /** Subtract the vector in `keyMean` (K), or use it for the row bias (Q). */
  readonly keyMean: boolean;
  /** One vector for each head serves all sequences, whose keys lie in pages. */
  readonly oneMean?: true;
  /** Q only: subtract the mean of the block's tokens and write it to `queryMean`. */
  readonly smoothQ: boolean;
  /** K only: keys that a mask hides from every row are zeros. */
  readonly hiddenKeys: HiddenKeys;
}

export const QUANTIZE_TOKENS_POINTERS = [
  'sequences',
  'input',
  'keyMean',
  'quantized',
  'scale',
  'rowBias',
  'keyFaults',
  'keyExponents',
  'queryMean',
  'visibleKeys',
] as const;
export const QUANTIZE_TOKENS_INTEGERS = ['heads', 'blocks', 'paddedTokens', 'headsPerKeyHead'] as const;
/** Strides of the input in bytes. */
export const QUANTIZE_TOKENS_STRIDES = ['batchStride', 'headStride', 'tokenStride'] as const;

/** Bits of floats that are apart by a factor of four: a key so much smaller than its group's largest is scaled apart. */
const FAR_APART = 2 * 2 ** 23;

/** Threads of a row, each with eight channels, and threads of the CTA. */
function threadsOf(paddedDim: number) {
  const perRow = nextPowerOfTwo(paddedDim / 8);
  return { perRow, threads: Math.min(512, Math.max(128, perRow * 16)) };
}

export const quantizeTokensThreads = ({ paddedDim }: QuantizeTokensConfig) => threadsOf(paddedDim).threads;

/** What the CTA works on. */
interface Block {
  readonly b: KernelBuilder;
  readonly config: QuantizeTokensConfig;
  readonly pointer: Record<(typeof QUANTIZE_TOKENS_POINTERS)[number], Parameter<'u64'>>;
  readonly integer: Record<(typeof QUANTIZE_TOKENS_INTEGERS)[number], Parameter<'u32'>>;
  readonly stride: Record<(typeof QUANTIZE_TOKENS_STRIDES)[number], Parameter<'u64'>>;
  readonly smScale: Parameter<'f32'>;
  readonly shared: Reg<'shared'>;
  readonly rowMaxima: SharedTile;
  readonly reciprocals: SharedTile;
  /** A number for each warp and pass; undefined where a row is of one warp. */
  readonly halves: SharedTile | undefined;
  /** Sums of Q's channels, a row for each row that is taken at once; undefined if no mean is subtracted. */
  readonly sums: SharedTile | undefined;
  readonly thread: Reg<'u32'>;
  readonly heads: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  /** First token of the sequence in the input, and in the padded rows. */
  readonly start: Reg<'u32'>;
  readonly paddedStart: Reg<'u32'>;
  /** First token of the block in its sequence. */
  readonly firstToken: Reg<'u32'>;
  readonly tokensLeft: Reg<'u32'>;
  /** Which of a block's keys any row may see; undefined of Q. */
  readonly isSeen: ((inBlock: Reg<'u32'>) => Reg<'pred'>) | undefined;
}

/** Eight channels of every so many rows: what a thread holds of the block. */
interface Rows {
  readonly row: Reg<'u32'>;
  readonly column: Reg<'u32'>;
  readonly channel: Reg<'u32'>;
  readonly perRow: number;
  readonly rowsAtOnce: number;
  /** The values of each pass, and whether its row exists. */
  readonly values: readonly Reg<'f32'>[][];
  readonly inside: readonly Reg<'pred'>[];
}

export function quantizeTokens(config: QuantizeTokensConfig): Kernel {
  const block = makeBlock(config);
  const rows = loadRows(block);
  const keyMean = config.keyMean ? loadKeyMean(block, rows) : undefined;
  if (config.operand === 'query') writeRowBias(block, rows, keyMean);
  else if (keyMean !== undefined) subtract(block, rows, keyMean);
  if (block.sums !== undefined) subtractBlockMean(block, rows, block.sums);
  findRowMaxima(block, rows);
  if (config.operand === 'query') writeQueryScales(block);
  else writeKeyScales(block);
  storeCodes(block, rows);
  return block.b.build();
}

function makeBlock(config: QuantizeTokensConfig): Block {
  const { target, operand, paddedDim, blockTokens, groupTokens, groups } = config;
  const isQuery = operand === 'query';
  const { perRow, threads } = threadsOf(paddedDim);
  const b = new KernelBuilder({ name: isQuery ? 'quantizeQuery' : 'quantizeKey', target, threads });
  const pointer = pointers(b, QUANTIZE_TOKENS_POINTERS);
  const integer = integers(b, QUANTIZE_TOKENS_INTEGERS);
  const stride = pointers(b, QUANTIZE_TOKENS_STRIDES);
  const smScale = b.parameter('smScale', 'f32');
  const groupCount = (blockTokens / groupTokens) * groups;
  const rowMaxima = b.shared('row maxima', 1, rowMajor(blockTokens * 4));
  const reciprocals = b.shared('reciprocals', 1, rowMajor(Math.max(16, groupCount * 4)));
  const halves =
    perRow > 32
      ? b.shared('halves of rows', 1, rowMajor((blockTokens / (threads / perRow)) * (threads / 8)))
      : undefined;
  const sums = config.smoothQ ? b.shared('column sums', threads / perRow, rowMajor(perRow * 32)) : undefined;
  const shared = b.sharedAddress();

  b.section('which block');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, headAndSequence, heads);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const [start, length, paddedStart] = isQuery
    ? [table.queryStart, table.queryLength, table.paddedQueryStart]
    : [table.keyStart, table.keyLength, table.paddedKeyStart];
  const firstToken = b.mul(block, blockTokens);
  b.when(b.setp('ge', firstToken, length), () => b.exit());
  const tokensLeft = b.sub(length, firstToken);
  const place = { thread, heads, head, sequence, start, paddedStart, firstToken, tokensLeft };
  const memory = { shared, rowMaxima, reciprocals, halves, sums };
  const own = { b, config, pointer, integer, stride, smScale, ...memory, ...place };
  return { ...own, isSeen: isQuery ? undefined : seenKeys(own) };
}

/** Which keys of the block any row may see; without one the CTA ends. */
function seenKeys(block: Omit<Block, 'isSeen'>): (inBlock: Reg<'u32'>) => Reg<'pred'> {
  const { b, config, pointer, integer, head, sequence, paddedStart, firstToken } = block;
  const range = loadVisibleRange(b, b.loadPointer(pointer.sequences), sequence);
  endWithoutKeys(b, range, firstToken, config.blockTokens);
  const { hiddenKeys } = config;
  const paddedTokens = () => b.loadParameter(integer.paddedTokens);
  return seenInBlock(b, range, {
    hiddenKeys,
    visibleKeys: pointer.visibleKeys,
    head,
    paddedTokens,
    paddedStart,
    firstToken,
  });
}

function loadRows(block: Block): Rows {
  const { b, config, pointer, stride, thread, isSeen } = block;
  const { dtype, headDim, paddedDim, loadWidth, blockTokens } = config;
  const { perRow, threads } = threadsOf(paddedDim);
  const rowsAtOnce = threads / perRow;
  const passes = blockTokens / rowsAtOnce;
  b.section('load');
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const channel = b.shl(column, 3);
  let source = offset64(b, b.loadPointer(pointer.input), block.sequence, b.loadParameter(stride.batchStride));
  source = offset64(b, source, block.head, b.loadParameter(stride.headStride));
  const tokenStride = b.loadParameter(stride.tokenStride);
  source = offset64(b, source, b.add(b.add(block.start, block.firstToken), row), tokenStride);
  source = offset(b, source, channel, BYTES[dtype]);
  const step = b.as(b.mul(tokenStride, rowsAtOnce), 'global');
  const values: Reg<'f32'>[][] = [];
  const inside: Reg<'pred'>[] = [];
  for (let pass = 0; pass < passes; pass++) {
    const inBlock = b.add(row, pass * rowsAtOnce);
    const rowInside = isSeen === undefined ? b.setp('lt', inBlock, block.tokensLeft) : isSeen(inBlock);
    inside.push(rowInside);
    values.push(loadEight(b, dtype, loadWidth, source, channel, headDim, rowInside));
    if (pass + 1 < passes) source = b.add(source, step);
  }
  return { row, column, channel, perRow, rowsAtOnce, values, inside };
}

/** Means of a thread's eight channels of K; zeros beyond the row. */
function loadKeyMean({ b, config, pointer, integer, heads, head, sequence }: Block, { channel }: Rows): Reg<'f32'>[] {
  const { paddedDim } = config;
  b.section('mean of K');
  const keyHeads = b.div(heads, b.loadParameter(integer.headsPerKeyHead));
  const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
  const inRow = b.setp('lt', channel, paddedDim);
  const means = b.loadPointer(pointer.keyMean);
  const row = config.oneMean === true ? keyHead : b.mad(sequence, keyHeads, keyHead);
  const from = offset(b, means, b.mad(row, paddedDim, channel), 4);
  const mean = b.regs('f32', 8);
  for (const register of mean) b.set(register, 0);
  b.if(inRow, () => {
    loadEightFloats(b, from).forEach((value, i) => {
      b.mov(value, mean[i]);
    });
  });
  return mean;
}

/** Subtracts a mean of the channels from the rows that exist. */
function subtract({ b }: Block, { values, inside }: Rows, mean: readonly Reg<'f32'>[]): void {
  values.forEach((eight, pass) => {
    for (const [i, value] of eight.entries()) b.when(at(inside, pass), () => b.sub(value, at(mean, i), value));
  });
}

/** What smoothing takes from a row's scores, in the scores' base 2; without a mean it only marks rows that are not finite. */
function writeRowBias(block: Block, rows: Rows, mean: readonly Reg<'f32'>[] | undefined): void {
  const { b, pointer, integer, head, paddedStart, firstToken } = block;
  const { row, column, perRow, rowsAtOnce, values } = rows;
  b.section('row bias: smScale * log2(e) * q . mean(K), NaN for a row that is not finite');
  const scale = b.mul(b.loadParameter(block.smScale), LOG2_E);
  const biases = b.loadPointer(pointer.rowBias);
  const paddedRow = b.mad(head, b.loadParameter(integer.paddedTokens), paddedStart);
  const destination = offset(b, biases, b.add(paddedRow, b.add(firstToken, row)), 4);
  const first = b.setp('eq', column, 0);
  const write = (dot: Reg<'f32'>, pass: number) => {
    const bias = b.mul(dot, scale);
    // Infinity minus Infinity: an infinite element makes its row NaN too.
    const carried = b.add(bias, b.mul(bias, 0));
    b.when(first, () => b.st(carried, destination, pass * rowsAtOnce * 4));
  };
  const ofWarps = values.map((eight, pass) => {
    let dot = b.constant('f32', 0);
    eight.forEach((value, i) => {
      // Without a mean only NaN is to be carried: anything times 0.
      dot = b.fma(value, mean === undefined ? 0 : at(mean, i), dot);
    });
    for (let mask = 1; mask < Math.min(perRow, 32); mask *= 2) dot = b.add(dot, b.shflBfly(dot, mask));
    if (perRow <= 32) write(dot, pass);
    return dot;
  });
  if (perRow > 32) joinHalves(block, ofWarps, (a, c) => b.add(a, c)).forEach(write);
}

/** Joins what the two warps of each row hold, for rows of 64 threads: a value for each pass, alike in a warp's lanes. */
function joinHalves<T extends 'f32' | 'u32'>(
  { b, shared, thread, halves }: Block,
  ofWarps: readonly Reg<T>[],
  join: (a: Reg<T>, c: Reg<T>) => Reg<T>,
): Reg<T>[] {
  if (halves === undefined) throw new RangeError('rows of one warp have no halves');
  const warp = b.shr(thread, 5);
  const base = b.add(shared, halves.base);
  const ownAt = b.add(base, b.as(b.shl(warp, 2), 'shared'));
  // The other warp of the row has the other lowest bit.
  const otherAt = b.add(base, b.as(b.shl(b.xor(warp, 1), 2), 'shared'));
  const passBytes = halves.bytes / ofWarps.length;
  b.when(b.setp('eq', b.and(thread, 31), 0), () => {
    ofWarps.forEach((value, pass) => {
      b.st(value, ownAt, pass * passBytes);
    });
  });
  b.barSync();
  const joined = ofWarps.map((value, pass) => join(value, b.ld(value.kind as T, otherAt, pass * passBytes)));
  // Before the next values are written.
  b.barSync();
  return joined;
}

/** Subtracts the mean over the block's tokens from each channel and stores it, `[head, block, paddedDim]`. */
function subtractBlockMean(block: Block, rows: Rows, { base }: SharedTile): void {
  const { b, config, pointer, integer, shared, head, paddedStart, firstToken, tokensLeft } = block;
  const { paddedDim, blockTokens } = config;
  const { row, channel, perRow, rowsAtOnce, values } = rows;
  b.section('mean of the block');
  const ownAt = b.add(b.add(shared, base), b.as(b.mad(row, perRow * 32, b.shl(channel, 2)), 'shared'));
  const partial = Array.from({ length: 8 }, (_, i) => {
    let sum = b.constant('f32', 0);
    for (const eight of values) {
      const value = at(eight, i);
      const zero = b.constant('f32', 0);
      const isFault = b.setp('ge', b.and(b.as(value, 'u32'), 0x7fffffff), INFINITY_BITS);
      sum = b.add(sum, b.selp(zero, value, isFault));
    }
    return sum;
  });
  b.stVector(partial.slice(0, 4), ownAt);
  b.stVector(partial.slice(4), ownAt, 16);
  b.barSync();
  const columnAt = b.add(b.add(shared, base), b.as(b.shl(channel, 2), 'shared'));
  const total = Array.from({ length: 8 }, () => b.constant('f32', 0));
  for (let r = 0; r < rowsAtOnce; r++) {
    for (let half = 0; half < 2; half++) {
      b.ldVector('f32', 4, columnAt, r * perRow * 32 + half * 16).forEach((value, i) => {
        const sum = at(total, half * 4 + i);
        b.add(sum, value, sum);
      });
    }
  }
  const reciprocal = b.rcp(b.cvt('f32', b.min(tokensLeft, blockTokens)));
  const mean = total.map((sum) => b.mul(sum, reciprocal));
  const tokens = b.mad(head, b.loadParameter(integer.paddedTokens), b.add(paddedStart, firstToken));
  const index = b.mad(b.shr(tokens, Math.log2(blockTokens)), paddedDim, channel);
  const destination = offset(b, b.loadPointer(pointer.queryMean), index, 4);
  b.when(b.andPred(b.setp('eq', row, 0), b.setp('lt', channel, paddedDim)), () => {
    b.stVector(mean.slice(0, 4), destination);
    b.stVector(mean.slice(4), destination, 16);
  });
  subtract(block, rows, mean);
}

/** The largest magnitude of each row into shared memory, as bits. */
function findRowMaxima(block: Block, { row, column, perRow, rowsAtOnce, values }: Rows): void {
  const { b, shared, rowMaxima } = block;
  b.section('largest magnitude of each row');
  const rowMaxAt = b.add(b.add(shared, rowMaxima.base), b.as(b.shl(row, 2), 'shared'));
  const firstOfRow = b.setp('eq', column, 0);
  const write = (largest: Reg<'u32'>, pass: number) =>
    b.when(firstOfRow, () => b.st(largest, rowMaxAt, pass * rowsAtOnce * 4));
  const ofWarps = values.map((eight, pass) => {
    // Magnitudes order like the integers of their bits, with Infinity and then NaN above all numbers.
    let largest = b.constant('u32', 0);
    for (const value of eight) largest = b.max(largest, b.and(b.as(value, 'u32'), 0x7fffffff));
    for (let mask = 1; mask < Math.min(perRow, 32); mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
    if (perRow <= 32) write(largest, pass);
    return largest;
  });
  if (perRow > 32) joinHalves(block, ofWarps, (a, c) => b.max(a, c)).forEach(write);
  b.barSync();
}

/** Scales of the groups, and their reciprocals into shared memory. */
function writeQueryScales(block: Block): void {
  const { b, config, pointer, integer, thread, shared, rowMaxima, reciprocals } = block;
  const { groupTokens, groups, blockTokens } = config;
  b.section('scale of each group');
  b.if(b.setp('lt', thread, (blockTokens / groupTokens) * groups), () => {
    // Thread i takes group i % groups of the set i / groups.
    const [group, set] = [b.and(thread, groups - 1), b.shr(thread, Math.log2(groups))];
    const from = b.add(b.add(shared, rowMaxima.base), b.as(b.shl(b.mad(set, groupTokens, group), 2), 'shared'));
    let largest = b.constant('u32', 0);
    for (const member of membersOf(groupTokens, groups)) {
      const value = b.ld('u32', from, member * 4);
      b.when(b.setp('ge', value, INFINITY_BITS), () => b.set(value, 0));
      largest = b.max(largest, value);
    }
    const maximum = b.as(largest, 'f32');
    b.when(b.setp('lt', maximum, SMALLEST_GROUP_MAXIMUM), () => b.set(maximum, 0));
    const scale = b.divF32(maximum, config.largest);
    const reciprocal = b.divF32(signedLargest(block), maximum);
    b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
    b.st(reciprocal, b.add(b.add(shared, reciprocals.base), b.as(b.shl(thread, 2), 'shared')));
    const tokens = b.mad(block.head, b.loadParameter(integer.paddedTokens), b.add(block.paddedStart, block.firstToken));
    const index = b.add(b.mul(b.shr(tokens, Math.log2(groupTokens)), groups), thread);
    b.st(scale, offset(b, b.loadPointer(pointer.scale), index, 4));
  });
  b.barSync();
}

/** A pair of keys in a lane of the first warp: those of a lane are of one group, with the lanes 4 apart or with all. */
interface KeyPair {
  /** Bits of their largest magnitudes; 0 where a key counts in no scale. */
  readonly magnitudes: readonly [Reg<'u32'>, Reg<'u32'>];
  /** Bits of the block's 64 keys that are not finite. */
  readonly faults: readonly [Reg<'b32'>, Reg<'b32'>];
}

/** Scales of K with their sign, exponents and bits of faults; and what each key is multiplied by, in place of its maximum. */
function writeKeyScales(block: Block): void {
  const { b, config, pointer, integer, thread, shared, rowMaxima } = block;
  const { groups } = config;
  b.section('scales, exponents and faults');
  b.if(b.setp('lt', thread, 32), () => {
    const pairAt = b.add(b.add(shared, rowMaxima.base), b.as(b.shl(thread, 3), 'shared'));
    const { magnitudes, faults } = takeKeyPair(block, pairAt);
    // Less 1, so that keys of zeros are never the smallest.
    const lessOne = magnitudes.map((bits) => b.sub(bits, 1)) as [Reg<'u32'>, Reg<'u32'>];
    const largest = b.max(...magnitudes);
    const smallest = b.min(...lessOne);
    for (let lanes = groups; lanes < 32; lanes *= 2) {
      b.max(largest, b.shflBfly(largest, lanes), largest);
      b.min(smallest, b.shflBfly(smallest, lanes), smallest);
    }
    const farApart = b.setp('gt', largest, b.add(b.min(smallest, INFINITY_BITS), FAR_APART));
    const faulty = b.setp('ne', b.or(...faults), 0);
    const special = b.voteAny(b.orPred(farApart, faulty));

    const maximum = b.as(largest, 'f32');
    const reciprocal = b.divF32(b.constant('f32', config.largest), maximum);
    b.when(b.setp('eq', largest, 0), () => b.set(reciprocal, 0));
    const exponents = magnitudes.map((bits) => {
      const apart = b.min(b.shr(b.sub(largest, bits), 23), MOST_KEY_EXPONENT);
      b.when(b.setp('eq', bits, 0), () => b.set(apart, 0));
      return b.selp(apart, b.constant('u32', 0), special);
    });
    const factors = exponents.map((exponent) =>
      b.mul(reciprocal, b.as(b.shl(b.add(exponent, KEY_EXPONENT_BIAS), 23), 'f32')),
    );
    b.stVector(factors, pairAt);

    const tokens = b.mad(block.head, b.loadParameter(integer.paddedTokens), b.add(block.paddedStart, block.firstToken));
    const stored = exponents.map((exponent) => b.sub(b.constant('u32', KEY_EXPONENT_BIAS), exponent));
    const bytes = b.cvt('b16', b.or(at(stored, 0), b.shl(at(stored, 1), 8)));
    b.st(bytes, offset(b, offset(b, b.loadPointer(pointer.keyExponents), tokens, 1), thread, 2));
    const tile = b.shr(tokens, 6);
    const scale = b.as(b.divF32(maximum, config.largest), 'b32');
    b.when(special, () => b.or(scale, 0x80000000, scale));
    const scaleAt = offset(b, b.loadPointer(pointer.scale), b.mad(tile, groups, thread), 4);
    b.when(b.setp('lt', thread, groups), () => b.st(scale, scaleAt));
    const faultsAt = offset(b, b.loadPointer(pointer.keyFaults), tile, 8);
    b.when(b.setp('eq', thread, 0), () => b.stVector(faults, faultsAt));
  });
  b.barSync();
}

function takeKeyPair({ b, thread }: Block, pairAt: Reg<'shared'>): KeyPair {
  const magnitudes = b.ldVector('u32', 2, pairAt) as [Reg<'u32'>, Reg<'u32'>];
  const bits = magnitudes.map((magnitude) => {
    const own = b.selp<'b32'>(1, b.constant('b32', 0), b.setp('ge', magnitude, INFINITY_BITS));
    b.when(b.setp('ge', magnitude, INFINITY_BITS), () => b.set(magnitude, 0));
    b.when(b.setp('lt', b.as(magnitude, 'f32'), SMALLEST_GROUP_MAXIMUM), () => b.set(magnitude, 0));
    return own;
  }) as [Reg<'b32'>, Reg<'b32'>];
  // Sixteen lanes hold a word.
  const word = b.shl(b.or(bits[0], b.shl(bits[1], 1)), b.and(b.shl(thread, 1), 31));
  for (let lanes = 1; lanes < 16; lanes *= 2) b.or(word, b.shflBfly(word, lanes), word);
  const other = b.shflBfly(word, 16);
  const isLow = b.setp('lt', thread, 16);
  return { magnitudes, faults: [b.selp(word, other, isLow), b.selp(other, word, isLow)] };
}

/** Attention takes positive scales only: Q bears the sign of smScale. */
function signedLargest({ b, config, smScale }: Block): Reg<'f32'> {
  const largest = b.constant('f32', config.largest);
  return b.selp(-config.largest, largest, b.setp('lt', b.loadParameter(smScale), 0));
}

/** What a row of the block is multiplied by. */
function reciprocalOf({ b, config, shared, rowMaxima, reciprocals }: Block, inBlock: Reg<'u32'>): Reg<'f32'> {
  const { operand, groupTokens, groups } = config;
  if (operand === 'key') {
    return b.ld('f32', b.add(b.add(shared, rowMaxima.base), b.as(b.shl(inBlock, 2), 'shared')));
  }
  const set = b.mul(b.shr(inBlock, Math.log2(groupTokens)), groups);
  const group = groups === 1 ? set : b.add(set, b.and(inBlock, 7));
  return b.ld('f32', b.add(b.add(shared, reciprocals.base), b.as(b.shl(group, 2), 'shared')));
}

function storeCodes(block: Block, { row, channel, rowsAtOnce, values }: Rows): void {
  const { b, config, pointer, integer, head, paddedStart, firstToken } = block;
  const { container, paddedDim } = config;
  b.section('quantize and store');
  const rowBytes = container === 's8' ? paddedDim : paddedDim / 2;
  const tokenRow = b.mad(head, b.loadParameter(integer.paddedTokens), b.add(b.add(paddedStart, firstToken), row));
  const destination = b.add(
    offset(b, b.loadPointer(pointer.quantized), tokenRow, rowBytes),
    b.as(b.cvt('u64', container === 's8' ? channel : b.shr(channel, 1)), 'global'),
  );
  const stored = b.setp('lt', channel, paddedDim);
  const magic = b.constant('f32', MAGIC);
  values.forEach((eight, pass) => {
    const inBlock = b.add(row, pass * rowsAtOnce);
    const reciprocal = reciprocalOf(block, inBlock);
    // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
    const integersOf = eight.map((value) => b.as(b.fma(value, reciprocal, magic), 'b32'));
    const byte = pass * rowsAtOnce * rowBytes;
    b.when(stored, () => {
      const words = container === 's8' ? packBytes(b, integersOf) : [packNibbles(b, integersOf)];
      if (words.length === 2) b.stVector(words, destination, byte);
      else b.st(at(words, 0), destination, byte);
    });
  });
}

function packNibbles(b: KernelBuilder, words: readonly Reg<'b32'>[]): Reg<'b32'> {
  return words.map((word, i) => b.shl(b.and(word, 15), 4 * i)).reduce((packed, nibble) => b.or(packed, nibble));
}

/** Rows of one group of Q, counted from its first. */
function membersOf(groupTokens: number, groups: 1 | 4 | 8): number[] {
  const rows = Array.from({ length: groupTokens }, (_, i) => i);
  if (groups === 8) return rows.filter((i) => i % 8 === 0);
  return rows;
}
