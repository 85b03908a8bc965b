/**
 * Quantizes V to NVFP4 and transposes it: a tile is 64 keys, `[channel, key]` codes of 32 bytes a channel, with a word
 * of four scales, of 16 keys each, for a channel. One CTA takes a tile of one head and reads it once.
 *
 * A tile has a power of two of its own, `valueTileScale`, 0 where all of it is zeros: so no pass over all of V
 * precedes this one, and a finished tile never changes, whatever is appended. Exponents are multiples of four, for
 * attention moves its sums from one tile's to the next's; scales of blocks have room for the rest.
 *
 * An element that is not finite, or too large ({@link VALUE_LIMIT}), becomes 0 with its neighbours, and its token has
 * a bit in `keyFaults`: attention makes NaN of the rows that see it.
 */
import type { ScaleSearch } from '../../../../quantization/fp4-blocks.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import { endWithoutKeys, type HiddenKeys, loadVisibleRange, seenInBlock } from '../quantize/visible-keys.ts';
import {
  type CodeOrder,
  FP4_BLOCK,
  inversePower,
  packCodes,
  quantizeBlock,
  scaleAll,
  scaleByte,
  unitOf,
} from './e2m1.ts';

export interface Fp4ValueConfig {
  readonly target: Target;
  readonly dtype: DType;
  /** Dv, and Dv padded to 32. */
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly loadWidth: LoadWidth;
  readonly scaleSearch: ScaleSearch;
  readonly codeOrder: CodeOrder;
  /** Subtract `valueMean`. */
  readonly smoothV: boolean;
  /** Keys that a mask hides from every row are zeros. */
  readonly hiddenKeys: HiddenKeys;
}

export const FP4_VALUE_POINTERS = [
  'sequences',
  'input',
  'valueMean',
  'value',
  'valueBlockScale',
  'valueTileScale',
  'keyScale',
  'keyFaults',
  'visibleKeys',
] as const;
export const FP4_VALUE_INTEGERS = ['heads', 'blocks', 'paddedTokens'] as const;
const STRIDES = ['batchStride', 'headStride', 'tokenStride'] as const;

export const FP4_VALUE_THREADS = 256;
const TILE = 64;

/** V beyond this magnitude counts as not finite. */
export const VALUE_LIMIT = 2 ** 51;
const VALUE_LIMIT_BITS = (127 + 51) << 23;
/**
 * Exponents of tiles' scales. Sums move by their difference, at most 84, and stay within float32: they reach 2688^2
 * times 2^20 keys, 2^43.
 */
const EXPONENTS = { least: -44, most: 40 } as const;

interface Place {
  readonly b: KernelBuilder;
  readonly config: Fp4ValueConfig;
  readonly pointer: Record<(typeof FP4_VALUE_POINTERS)[number], Parameter<'u64'>>;
  readonly paddedTokens: Reg<'u32'>;
  readonly thread: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly sequenceHead: Reg<'u32'>;
  readonly table: SequenceRegisters;
  readonly firstToken: Reg<'u32'>;
  /** The tile's number, counted over all heads. */
  readonly tile: Reg<'u32'>;
  readonly perRow: number;
  readonly rowsAtOnce: number;
  readonly row: Reg<'u32'>;
  readonly channel: Reg<'u32'>;
}

export function quantizeFp4Value(config: Fp4ValueConfig): Kernel {
  const { target, paddedValueDim } = config;
  const b = new KernelBuilder({ name: 'quantizeFp4Value', target, threads: FP4_VALUE_THREADS });
  const pointer = pointers(b, FP4_VALUE_POINTERS);
  const integer = integers(b, FP4_VALUE_INTEGERS);
  const strides = pointers(b, STRIDES);
  const perRow = nextPowerOfTwo(paddedValueDim / 8);
  const rowsAtOnce = Math.min(TILE, FP4_VALUE_THREADS / perRow);
  // Rows of whole spans of banks: a warp reads one token of 32 neighbouring channels.
  const tileBytes = b.shared('V', TILE, rowMajor(paddedValueDim * 4));
  const maxima = b.shared('largest of each warp', 1, rowMajor(FP4_VALUE_THREADS / 8));
  const shared = b.sharedAddress();

  b.section('which tile');
  const thread = b.special('%tid.x');
  const [block, sequenceHead] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, sequenceHead, b.loadParameter(integer.heads));
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  const firstToken = b.mul(block, TILE);
  const tile = b.shr(b.add(b.mad(head, paddedTokens, table.paddedKeyStart), firstToken), 6);
  const row = b.shr(thread, Math.log2(perRow));
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  const place: Place = {
    ...{ b, config, pointer, paddedTokens, thread, head, sequence, sequenceHead, table, firstToken, tile },
    ...{ perRow, rowsAtOnce, row, channel },
  };

  const values = load(place, strides, seenKeys(place));
  b.section('the power of two of the tile');
  let largest = b.constant('f32', 0);
  for (const value of values.flat()) largest = b.max(largest, b.abs(value));
  for (let mask = 1; mask < 32; mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
  const maximaAt = b.add(shared, maxima.base);
  b.when(b.setp('eq', b.and(thread, 31), 0), () =>
    b.st(largest, b.add(maximaAt, b.as(b.shl(b.shr(thread, 5), 2), 'shared'))),
  );
  storeShared(place, values, b.add(shared, tileBytes.base));
  b.barSync();
  const warps = FP4_VALUE_THREADS / 32;
  const all = Array.from({ length: warps }, (_, warp) => b.ld('f32', maximaAt, warp * 4)).reduce((x, y) => b.max(x, y));
  const unit = tileUnit(b, all);
  const stored = b.selp(0, unit, b.setp('eq', all, 0));
  b.when(b.setp('eq', thread, 0), () => b.st(stored, offset(b, b.loadPointer(pointer.valueTileScale), tile, 4)));
  quantizeColumns(place, b.add(shared, tileBytes.base), inversePower(b, unit));
  return b.build();
}

/** Whether any row may see a key of the tile, counted from the tile's first; without one the CTA ends. */
function seenKeys({ b, config, pointer, sequence, head, firstToken, table, paddedTokens }: Place) {
  const range = loadVisibleRange(b, b.loadPointer(pointer.sequences), sequence);
  endWithoutKeys(b, range, firstToken, TILE);
  return seenInBlock(b, range, {
    hiddenKeys: config.hiddenKeys,
    visibleKeys: pointer.visibleKeys,
    head,
    paddedTokens: () => paddedTokens,
    paddedStart: table.paddedKeyStart,
    firstToken,
  });
}

/** Eight channels of tokens `rowsAtOnce` apart, less their mean; faults are reported, and zeros. */
function load(
  place: Place,
  strides: Record<(typeof STRIDES)[number], Parameter<'u64'>>,
  isSeen: (inTile: Reg<'u32'>) => Reg<'pred'>,
): Reg<'f32'>[][] {
  const { b, config, pointer, sequence, sequenceHead, head, table, firstToken, row, channel, rowsAtOnce } = place;
  const { dtype, valueDim, loadWidth, smoothV, paddedValueDim } = config;
  b.section('load');
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(strides.batchStride));
  source = offset64(b, source, head, b.loadParameter(strides.headStride));
  const stride = b.loadParameter(strides.tokenStride);
  source = offset64(b, source, b.add(b.add(table.keyStart, firstToken), row), stride);
  source = offset(b, source, channel, BYTES[dtype]);
  const step = b.as(b.mul(stride, rowsAtOnce), 'global');
  const means = Array.from({ length: 8 }, () => b.constant('f32', 0));
  if (smoothV) {
    const meanAt = offset(b, b.loadPointer(pointer.valueMean), b.mad(sequenceHead, paddedValueDim, channel), 4);
    b.if(b.setp('lt', channel, paddedValueDim), () => {
      loadEightFloats(b, meanAt).forEach((mean, i) => {
        b.mov(mean, means[i]);
      });
    });
  }
  const values: Reg<'f32'>[][] = [];
  for (let first = 0; first < TILE; first += rowsAtOnce) {
    const inTile = b.add(row, first);
    const isInTile = b.setp('lt', inTile, TILE);
    // Threads beyond the tile's rows ask of its last.
    const inside = b.andPred(isInTile, isSeen(b.min(inTile, TILE - 1)));
    const eight = loadEight(b, dtype, loadWidth, source, channel, valueDim, inside);
    if (smoothV) {
      for (const [i, value] of eight.entries()) b.when(inside, () => b.sub(value, at(means, i), value));
    }
    let largest = b.constant('u32', 0);
    for (const value of eight) largest = b.max(largest, b.and(b.as(value, 'u32'), 0x7fffffff));
    b.if(b.setp('ge', largest, VALUE_LIMIT_BITS), () => {
      for (const value of eight) b.set(value, 0);
      reportFault(place, inTile);
    });
    values.push(eight);
    if (first + rowsAtOnce < TILE) source = b.add(source, step);
  }
  return values;
}

/** Marks a token as not finite: its bit, and the sign of the K tile's scale. After K's are written. */
function reportFault({ b, pointer, tile }: Place, token: Reg<'u32'>): void {
  const word = b.add(b.shl(tile, 1), b.shr(token, 5));
  const bit = b.shl(b.constant('b32', 1), b.and(token, 31));
  b.redOr(offset(b, b.loadPointer(pointer.keyFaults), word, 4), bit);
  b.redOr(offset(b, b.loadPointer(pointer.keyScale), tile, 4), b.constant('b32', 0x80000000));
}

function storeShared(
  { b, config, row, channel, rowsAtOnce }: Place,
  values: Reg<'f32'>[][],
  base: Reg<'shared'>,
): void {
  const { paddedValueDim } = config;
  const own = b.add(base, b.as(b.mad(row, paddedValueDim * 4, b.shl(channel, 2)), 'shared'));
  const inRow = b.andPred(b.setp('lt', channel, paddedValueDim), b.setp('lt', row, TILE));
  values.forEach((eight, pass) => {
    b.when(inRow, () => {
      b.stVector(eight.slice(0, 4), own, pass * rowsAtOnce * paddedValueDim * 4);
      b.stVector(eight.slice(4), own, pass * rowsAtOnce * paddedValueDim * 4 + 16);
    });
  });
}

/** {@link unitOf} with an exponent that is a multiple of four, within {@link EXPONENTS}. */
function tileUnit(b: KernelBuilder, largest: Reg<'f32'>): Reg<'f32'> {
  const exponent = b.shr(b.as(unitOf(b, largest), 'u32'), 23);
  const rounded = b.sub(b.and(b.add(exponent, 4), -4), 1);
  const within = b.min(b.max(rounded, 127 + EXPONENTS.least), 127 + EXPONENTS.most);
  return b.as(b.shl(within, 23), 'f32');
}

/** Each thread quantizes 16 keys of a channel at a time. */
function quantizeColumns({ b, config, pointer, tile, thread }: Place, base: Reg<'shared'>, inverse: Reg<'f32'>): void {
  const { paddedValueDim, scaleSearch, codeOrder } = config;
  b.section('codes and scales of 16 keys of a channel');
  const blocks = TILE / FP4_BLOCK;
  const channels = b.mul(tile, paddedValueDim);
  const codesAt = offset(b, b.loadPointer(pointer.value), channels, TILE / 2);
  const scalesAt = offset(b, b.loadPointer(pointer.valueBlockScale), channels, 4);
  const item = b.mov(thread);
  b.loop(
    () => b.setp('lt', item, blocks * paddedValueDim),
    () => {
      const [channel, block] = divide(b, item, b.constant('u32', paddedValueDim));
      const source = b.add(base, b.as(b.mad(block, FP4_BLOCK * paddedValueDim * 4, b.shl(channel, 2)), 'shared'));
      const values = Array.from({ length: FP4_BLOCK }, (_, i) => b.ld('f32', source, i * paddedValueDim * 4));
      scaleAll(b, values, inverse);
      const { scale, codes } = quantizeBlock(b, values, scaleSearch, 1);
      const words = [packCodes(b, codes.slice(0, 8), codeOrder), packCodes(b, codes.slice(8), codeOrder)];
      const destination = offset(b, codesAt, channel, TILE / 2);
      b.stVector(words, b.add(destination, b.as(b.mulWide(block, 8), 'global')));
      const scaleDestination = offset(b, scalesAt, channel, 4);
      b.stByte(scaleByte(b, scale), b.add(scaleDestination, b.as(b.cvt('u64', block), 'global')));
      b.add(item, FP4_VALUE_THREADS, item);
    },
  );
}
