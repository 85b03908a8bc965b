/**
 * Quantizes Q or K to NVFP4: subtracts K's mean (or the block's own mean of Q), brings a block of tokens into range by
 * a power of two, and finds codes and scales of each 16 channels of a token. One CTA takes one block of tokens of one
 * head and reads it once.
 *
 * K's rows inside every 32 are in the order that makes the accumulators of Q K^T the operand of P V: row r holds key 2
 * (r >> 3) + 8 ((r >> 1) & 3) + (r & 1). Scales are words of four, for 64 channels: `[block of tokens, 64 channels,
 * row]`.
 *
 * Faults are as in `quantize/tokens.ts`: a key that is not finite is zeros and has a bit in `keyFaults`, and
 * `keyScale` of its tile has the sign bit; a row of Q that is not finite has a NaN bias.
 */
import type { ScaleSearch } from '../../../../quantization/fp4-blocks.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { INFINITY_BITS, LOG2_E, nextPowerOfTwo, SMALLEST_GROUP_MAXIMUM } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import { endWithoutKeys, type HiddenKeys, loadVisibleRange, seenInBlock } from '../quantize/visible-keys.ts';
import { type CodeOrder, packCodes, type QuantizedBlock, quantizeBlock, scaleAll, scaleByte, unitOf } from './e2m1.ts';

export interface Fp4TokensConfig {
  readonly target: Target;
  readonly operand: 'query' | 'key';
  readonly dtype: DType;
  /** D, and D padded to 64. */
  readonly headDim: number;
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
  /**
   * `codes`: E2M1 and scales. Of Q also `halves`: their products in FP16, in the order of {@link unpackCodes};
   * `exact-halves`: the values themselves so.
   */
  readonly format: 'codes' | 'halves' | 'exact-halves';
  readonly scaleSearch: ScaleSearch;
  /** Of `codes`. */
  readonly codeOrder: CodeOrder;
  /** K only: rows in the order of the accumulators. */
  readonly permuted: boolean;
  /** Subtract the vector in `keyMean` (K), or use it for the row bias (Q). */
  readonly keyMean: boolean;
  /** One vector for each head serves all sequences, whose keys lie in pages. */
  readonly oneMean?: true;
  /** Q only: subtract the mean of the block's tokens and write it to `queryMean`. */
  readonly smoothQ: boolean;
  /** K only: keys that a mask hides from every row are zeros. */
  readonly hiddenKeys: HiddenKeys;
}

/** `scale`: of a block of tokens, float32; `blockScale`: of 16 channels of a token, E4M3. */
export const FP4_TOKENS_POINTERS = [
  'sequences',
  'input',
  'keyMean',
  'quantized',
  'blockScale',
  'scale',
  'rowBias',
  'keyFaults',
  'queryMean',
  'visibleKeys',
] as const;
export const FP4_TOKENS_INTEGERS = ['heads', 'blocks', 'paddedTokens', 'headsPerKeyHead'] as const;
const STRIDES = ['batchStride', 'headStride', 'tokenStride'] as const;

/** Threads of a row, each with eight channels, and threads of the CTA. */
function threadsOf(paddedDim: number) {
  const perRow = nextPowerOfTwo(paddedDim / 8);
  return { perRow, threads: Math.min(512, Math.max(128, perRow * 16)) };
}

export const fp4TokensThreads = ({ paddedDim }: Pick<Fp4TokensConfig, 'paddedDim'>) => threadsOf(paddedDim).threads;

/** Tokens of a CTA. */
const blockTokensOf = ({ operand }: Pick<Fp4TokensConfig, 'operand'>) => (operand === 'query' ? 128 : 64);

/** The CTA's block, and this thread's part of it: eight channels of rows `rowsAtOnce` apart. */
interface Place {
  readonly b: KernelBuilder;
  readonly config: Fp4TokensConfig;
  readonly pointer: Record<(typeof FP4_TOKENS_POINTERS)[number], Parameter<'u64'>>;
  readonly integer: Record<(typeof FP4_TOKENS_INTEGERS)[number], Parameter<'u32'>>;
  readonly smScale: Parameter<'f32'>;
  readonly shared: Reg<'shared'>;
  readonly thread: Reg<'u32'>;
  readonly perRow: number;
  readonly rowsAtOnce: number;
  readonly blockTokens: number;
  readonly heads: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly table: SequenceRegisters;
  readonly firstToken: Reg<'u32'>;
  /** The block's first token, counted over the padded tokens of all heads. */
  readonly paddedToken: Reg<'u32'>;
  readonly row: Reg<'u32'>;
  readonly column: Reg<'u32'>;
  readonly channel: Reg<'u32'>;
}

export function quantizeFp4Tokens(config: Fp4TokensConfig): Kernel {
  const { operand, paddedDim } = config;
  const isQuery = operand === 'query';
  const { perRow, threads } = threadsOf(paddedDim);
  const rowsAtOnce = threads / perRow;
  const name = isQuery ? 'quantizeFp4Query' : 'quantizeFp4Key';
  const b = new KernelBuilder({ name, target: config.target, threads });
  const pointer = pointers(b, FP4_TOKENS_POINTERS);
  const integer = integers(b, FP4_TOKENS_INTEGERS);
  const strides = pointers(b, STRIDES);
  const smScale = b.parameter('smScale', 'f32');
  const blockTokens = blockTokensOf(config);
  const faults = isQuery ? undefined : b.shared('rows that are not finite', 1, rowMajor(blockTokens * 4));
  const maxima = b.shared('largest of each warp', 1, rowMajor(Math.max(16, threads / 8)));
  const sums = config.smoothQ ? b.shared('column sums', rowsAtOnce, rowMajor(perRow * 32)) : undefined;
  const shared = b.sharedAddress();

  b.section('which block');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, headAndSequence, heads);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const firstToken = b.mul(block, blockTokens);
  const [length, paddedStart] = isQuery
    ? [table.queryLength, table.paddedQueryStart]
    : [table.keyLength, table.paddedKeyStart];
  b.when(b.setp('ge', firstToken, length), () => b.exit());
  const paddedToken = b.mad(head, b.loadParameter(integer.paddedTokens), b.add(paddedStart, firstToken));
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const place: Place = {
    ...{ b, config, pointer, integer, smScale, shared, thread, perRow, rowsAtOnce, blockTokens },
    ...{ heads, head, sequence, table, firstToken, paddedToken, row, column, channel: b.shl(column, 3) },
  };

  const { values, inside } = load(place, strides, isQuery ? undefined : seenKeys(place));
  const mean = config.keyMean ? loadKeyMean(place) : undefined;
  if (isQuery) writeRowBias(place, values, mean);
  else if (mean !== undefined) subtract(place, values, inside, mean);
  if (sums !== undefined) subtractBlockMean(place, values, inside, sums.base);
  dropFaultyRows(place, values, faults?.base);
  const { unit, factor } = commonUnit(place, values, maxima.base);
  const sign = faults === undefined ? undefined : writeFaults(place, faults.base);
  b.when(b.setp('eq', thread, 0), () => {
    const bits = b.as(unit, 'b32');
    const stored = sign === undefined ? bits : b.or(bits, sign);
    b.st(stored, offset(b, b.loadPointer(pointer.scale), b.shr(paddedToken, Math.log2(blockTokens)), 4));
  });
  for (const eight of values) scaleAll(b, eight, factor);
  store(place, values);
  return b.build();
}

/** Which keys of the block any row may see; without one the CTA ends. */
function seenKeys(place: Place): (inBlock: Reg<'u32'>) => Reg<'pred'> {
  const { b, config, pointer, integer, sequence, head, firstToken, blockTokens, table } = place;
  const range = loadVisibleRange(b, b.loadPointer(pointer.sequences), sequence);
  endWithoutKeys(b, range, firstToken, blockTokens);
  const { hiddenKeys } = config;
  const paddedTokens = () => b.loadParameter(integer.paddedTokens);
  const paddedStart = table.paddedKeyStart;
  return seenInBlock(b, range, {
    hiddenKeys,
    visibleKeys: pointer.visibleKeys,
    head,
    paddedTokens,
    paddedStart,
    firstToken,
  });
}

function load(
  place: Place,
  strides: Record<(typeof STRIDES)[number], Parameter<'u64'>>,
  isSeen: ((inBlock: Reg<'u32'>) => Reg<'pred'>) | undefined,
): { values: Reg<'f32'>[][]; inside: Reg<'pred'>[] } {
  const { b, config, pointer, sequence, head, table, firstToken, row, channel, rowsAtOnce, blockTokens } = place;
  const { dtype, headDim, loadWidth } = config;
  b.section('load');
  const [start, length] = isSeen === undefined ? [table.queryStart, table.queryLength] : [table.keyStart, undefined];
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(strides.batchStride));
  source = offset64(b, source, head, b.loadParameter(strides.headStride));
  const stride = b.loadParameter(strides.tokenStride);
  source = offset64(b, source, b.add(b.add(start, firstToken), row), stride);
  source = offset(b, source, channel, BYTES[dtype]);
  const step = b.as(b.mul(stride, rowsAtOnce), 'global');
  const values: Reg<'f32'>[][] = [];
  const inside: Reg<'pred'>[] = [];
  for (let first = 0; first < blockTokens; first += rowsAtOnce) {
    const inBlock = b.add(row, first);
    const rowInside =
      isSeen === undefined || length !== undefined
        ? b.setp('lt', b.add(firstToken, inBlock), length as Reg<'u32'>)
        : isSeen(inBlock);
    inside.push(rowInside);
    values.push(loadEight(b, dtype, loadWidth, source, channel, headDim, rowInside));
    if (first + rowsAtOnce < blockTokens) source = b.add(source, step);
  }
  return { values, inside };
}

/** Eight channels of K's mean; zeros beyond the row. */
function loadKeyMean({ b, config, pointer, integer, heads, head, sequence, channel }: Place): Reg<'f32'>[] {
  b.section('mean of K');
  const headsPerKeyHead = b.loadParameter(integer.headsPerKeyHead);
  const index =
    config.oneMean === true
      ? b.div(head, headsPerKeyHead)
      : b.mad(sequence, b.div(heads, headsPerKeyHead), b.div(head, headsPerKeyHead));
  const source = offset(b, b.loadPointer(pointer.keyMean), b.mad(index, config.paddedDim, channel), 4);
  const mean = Array.from({ length: 8 }, () => b.constant('f32', 0));
  b.if(b.setp('lt', channel, config.paddedDim), () => {
    loadEightFloats(b, source).forEach((value, i) => {
      b.mov(value, mean[i]);
    });
  });
  return mean;
}

function subtract(
  { b }: Place,
  values: readonly (readonly Reg<'f32'>[])[],
  inside: readonly Reg<'pred'>[],
  mean: readonly Reg<'f32'>[],
): void {
  values.forEach((eight, pass) => {
    for (const [i, value] of eight.entries()) b.when(at(inside, pass), () => b.sub(value, at(mean, i), value));
  });
}

/** The row bias: smScale * log2(e) * q . mean(K), NaN for a row that is not finite. */
function writeRowBias(
  { b, pointer, smScale, paddedToken, row, column, perRow, rowsAtOnce }: Place,
  values: readonly (readonly Reg<'f32'>[])[],
  mean: readonly Reg<'f32'>[] | undefined,
): void {
  b.section('row bias: smScale * log2(e) * q . mean(K), NaN for a row that is not finite');
  const scale = b.mul(b.loadParameter(smScale), LOG2_E);
  const destination = offset(b, b.loadPointer(pointer.rowBias), b.add(paddedToken, row), 4);
  const first = b.setp('eq', column, 0);
  values.forEach((eight, pass) => {
    let dot = b.constant('f32', 0);
    eight.forEach((value, i) => {
      // Without a mean only NaN is to be carried: anything times 0.
      dot = mean === undefined ? b.fma(value, 0, dot) : b.fma(value, at(mean, i), dot);
    });
    for (let mask = 1; mask < perRow; mask *= 2) dot = b.add(dot, b.shflBfly(dot, mask));
    const bias = b.mul(dot, scale);
    // Infinity minus Infinity: an infinite element makes its row NaN too.
    const carried = b.add(bias, b.mul(bias, 0));
    b.when(first, () => b.st(carried, destination, pass * rowsAtOnce * 4));
  });
}

/** Subtracts the mean over the block's tokens from each channel and stores it, `[head, block, paddedDim]`. */
function subtractBlockMean(
  place: Place,
  values: readonly (readonly Reg<'f32'>[])[],
  inside: readonly Reg<'pred'>[],
  base: number,
): void {
  const { b, config, pointer, shared, table, firstToken, paddedToken, row, channel, perRow, rowsAtOnce } = place;
  const { blockTokens } = place;
  b.section('mean of the block');
  const own = b.add(b.add(shared, base), b.as(b.mad(row, perRow * 32, b.shl(channel, 2)), 'shared'));
  const partial = Array.from({ length: 8 }, (_, i) => {
    let sum = b.constant('f32', 0);
    for (const eight of values) {
      const value = at(eight, i);
      const isNumber = b.setp('lt', b.and(b.as(value, 'u32'), 0x7fffffff), INFINITY_BITS);
      sum = b.add(sum, b.selp(value, b.constant('f32', 0), isNumber));
    }
    return sum;
  });
  b.stVector(partial.slice(0, 4), own);
  b.stVector(partial.slice(4), own, 16);
  b.barSync();
  const columnAt = b.add(b.add(shared, base), b.as(b.shl(channel, 2), 'shared'));
  const total = Array.from({ length: 8 }, () => b.constant('f32', 0));
  for (let r = 0; r < rowsAtOnce; r++) {
    for (const half of [0, 4]) {
      b.ldVector('f32', 4, columnAt, r * perRow * 32 + half * 4).forEach((value, i) => {
        b.add(at(total, half + i), value, at(total, half + i));
      });
    }
  }
  const count = b.min(b.sub(table.queryLength, firstToken), blockTokens);
  const reciprocal = b.rcp(b.cvt('f32', count));
  const blockMean = total.map((sum) => b.mul(sum, reciprocal));
  const index = b.mad(b.shr(paddedToken, Math.log2(blockTokens)), config.paddedDim, channel);
  const destination = offset(b, b.loadPointer(pointer.queryMean), index, 4);
  b.when(b.andPred(b.setp('eq', row, 0), b.setp('lt', channel, config.paddedDim)), () => {
    b.stVector(blockMean.slice(0, 4), destination);
    b.stVector(blockMean.slice(4), destination, 16);
  });
  subtract(place, values, inside, blockMean);
}

/** Makes zeros of rows with an element that is not finite, and says which those are. */
function dropFaultyRows(
  { b, shared, row, column, perRow, rowsAtOnce }: Place,
  values: readonly (readonly Reg<'f32'>[])[],
  faults: number | undefined,
): void {
  b.section('rows that are not finite are zeros');
  const first = b.setp('eq', column, 0);
  values.forEach((eight, pass) => {
    // Magnitudes order like the integers of their bits, with Infinity and then NaN above all numbers.
    let largest = b.constant('u32', 0);
    for (const value of eight) largest = b.max(largest, b.and(b.as(value, 'u32'), 0x7fffffff));
    for (let mask = 1; mask < perRow; mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
    const isFaulty = b.setp('ge', largest, INFINITY_BITS);
    for (const value of eight) b.when(isFaulty, () => b.set(value, 0));
    if (faults === undefined) return;
    const rowAt = b.add(b.add(shared, faults), b.as(b.shl(row, 2), 'shared'));
    b.when(first, () => b.st(largest, rowAt, pass * rowsAtOnce * 4));
  });
}

/** The power of two that all of the block is divided by, and its reciprocal with the sign of the score's scale. */
function commonUnit(
  { b, config, smScale, shared, thread }: Place,
  values: readonly (readonly Reg<'f32'>[])[],
  maxima: number,
): { unit: Reg<'f32'>; factor: Reg<'f32'> } {
  b.section('the power of two that brings the block into range');
  const warps = fp4TokensThreads(config) / 32;
  let largest = b.constant('f32', 0);
  for (const value of values.flat()) largest = b.max(largest, b.abs(value));
  for (let mask = 1; mask < 32; mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
  const base = b.add(shared, maxima);
  b.when(b.setp('eq', b.and(thread, 31), 0), () =>
    b.st(largest, b.add(base, b.as(b.shl(b.shr(thread, 5), 2), 'shared'))),
  );
  b.barSync();
  const all = Array.from({ length: warps }, (_, warp) => b.ld('f32', base, warp * 4)).reduce((x, y) => b.max(x, y));
  b.when(b.setp('lt', all, SMALLEST_GROUP_MAXIMUM), () => b.set(all, 0));
  const unit = unitOf(b, all);
  const factor = b.rcp(unit);
  b.when(b.setp('eq', all, 0), () => b.set(factor, 0));
  // Attention takes positive scales only: Q bears the sign of smScale.
  if (config.operand === 'query') {
    b.when(b.setp('lt', b.loadParameter(smScale), 0), () => b.neg(factor, factor));
  }
  return { unit, factor };
}

/**
 * Writes the tile's bits of keys that are not finite; returns the sign bit for its scale if there are any. After a
 * barrier.
 */
function writeFaults({ b, pointer, shared, thread, paddedToken }: Place, faults: number): Reg<'b32'> {
  b.section('keys that are not finite');
  const sign = b.constant('b32', 0);
  const base = b.add(shared, faults);
  b.if(b.setp('lt', thread, 32), () => {
    const words = [0, 1].map((half) => {
      const value = b.ld('u32', b.add(base, b.as(b.shl(thread, 2), 'shared')), half * 128);
      const own = b.selp<'b32'>(1, b.constant('b32', 0), b.setp('ge', value, INFINITY_BITS));
      let word = b.shl(own, thread);
      for (let mask = 1; mask < 32; mask *= 2) word = b.or(word, b.shflBfly(word, mask));
      return word;
    });
    const destination = offset(b, b.loadPointer(pointer.keyFaults), b.shr(paddedToken, 6), 8);
    b.when(b.setp('eq', thread, 0), () => b.stVector(words, destination));
    b.when(b.setp('ne', b.or(at(words, 0), at(words, 1)), 0), () => b.set(sign, 0x80000000));
  });
  return sign;
}

function store(place: Place, values: readonly (readonly Reg<'f32'>[])[]): void {
  const { b, config, pointer, paddedToken, row, channel, rowsAtOnce, blockTokens } = place;
  const { format, paddedDim, scaleSearch } = config;
  b.section('codes and scales');
  const isInside = b.setp('lt', channel, paddedDim);
  const steps = paddedDim / 64;
  const rowBytes = format === 'codes' ? paddedDim / 2 : paddedDim * 2;
  const base = offset(b, b.loadPointer(pointer.quantized), paddedToken, rowBytes);
  // Words of four scales: [block, 64 channels, row]; the first of two lanes with 16 channels writes its byte.
  const scaleBlock = offset(
    b,
    b.loadPointer(pointer.blockScale),
    b.shr(paddedToken, Math.log2(blockTokens)),
    steps * blockTokens * 4,
  );
  const scaleWord = offset(b, scaleBlock, b.mul(b.shr(channel, 6), blockTokens), 4);
  const scaleAt = b.add(scaleWord, b.as(b.cvt('u64', b.and(b.shr(channel, 4), 3)), 'global'));
  const writesScale = b.andPred(isInside, b.setp('eq', b.and(channel, 8), 0));
  values.forEach((eight, pass) => {
    const inBlock = b.add(row, pass * rowsAtOnce);
    const block: QuantizedBlock | undefined =
      format === 'exact-halves' ? undefined : quantizeBlock(b, eight, scaleSearch, 2);
    if (format === 'codes') {
      const { scale, codes } = block as QuantizedBlock;
      const storedRow = config.permuted ? permutedRow(b, inBlock) : inBlock;
      const destination = b.add(offset(b, base, storedRow, rowBytes), b.as(b.cvt('u64', b.shr(channel, 1)), 'global'));
      const word = packCodes(b, codes, config.codeOrder);
      b.when(isInside, () => b.st(word, destination));
      const byte = scaleByte(b, scale);
      const scaleDestination = offset(b, scaleAt, storedRow, 4);
      b.when(writesScale, () => b.stByte(byte, scaleDestination));
      return;
    }
    const halves = block === undefined ? eight : block.codes.map((code) => b.mul(code, block.scale));
    const destination = offset(b, base, inBlock, rowBytes);
    // Element i of 32 channels' quarter t and element i + 4 are a pair of what ldmatrix brings to lane t.
    const place32 = b.add(b.shl(b.and(channel, -32), 1), b.shr(b.and(channel, 24), 1));
    const own = b.add(destination, b.as(b.cvt('u64', place32), 'global'));
    for (let i = 0; i < 4; i++) {
      const pair = b.cvtPack('f16x2', at(halves, i), at(halves, i + 4));
      b.when(isInside, () => b.st(pair, own, 16 * i));
    }
  });
}

/** Where a key of 32 lies: key 8t + 2j + v in row 8j + 2t + v. */
function permutedRow(b: KernelBuilder, key: Reg<'u32'>): Reg<'u32'> {
  const j = b.shl(b.and(key, 6), 2);
  const t = b.and(b.shr(key, 2), 6);
  return b.or(b.or(b.and(key, -31), j), t);
}
