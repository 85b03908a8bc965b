/** What every part of the kernel knows: parameters, shared memory, sizes; and the CTA's tile of Q. */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile, xorSwizzle } from '../../ptx/layouts.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { FP4_MAX } from '../fp4/e2m1.ts';
import { divide, integers, OPERAND_STRIDES, pointers } from '../parts/addresses.ts';
import { type BandParameters, bandParameters, type KeyRange, keyRange } from '../parts/band.ts';
import { type BlockParameters, blockParameters, listAddress, listRange } from '../parts/blocks.ts';
import { LOG2_E4M3_MAX, nextPowerOfTwo, roundUp } from '../parts/constants.ts';
import { type SoftcapParameters, softcapParameters } from '../parts/scores.ts';
import { loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import { type Sinks, sinkParameters } from '../parts/sinks.ts';
import {
  ATTENTION_INTEGERS,
  ATTENTION_POINTERS,
  ATTENTION_STRIDES,
  type AttentionConfig,
  BLOCK_K,
  blockQueries,
  FP4_POINTERS,
  hasFp4Keys,
  hasFp4Values,
} from './config.ts';

export interface Frame {
  readonly b: KernelBuilder;
  readonly config: AttentionConfig;
  readonly pointer: Readonly<Record<(typeof ATTENTION_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof ATTENTION_INTEGERS)[number], Parameter<'u32'>>>;
  readonly strides: Readonly<Record<(typeof ATTENTION_STRIDES)[number], Parameter<'u64'>>>;
  readonly band: BandParameters;
  /** |smScale| * log2(e); its sign is Q's. */
  readonly scoreScale: Parameter<'f32'>;
  readonly softcap: SoftcapParameters;
  readonly sinks: Sinks | undefined;
  readonly blocks: BlockParameters | undefined;
  readonly threads: number;
  /** 16-row tiles of a warp, rows of a thread, 8-key tiles, 8-channel tiles. */
  readonly rowTiles: number;
  readonly threadRows: number;
  readonly keyTiles: number;
  readonly channelTiles: number;
  /** V is FP8. */
  readonly fp8: boolean;
  /** Pointers to the scales of NVFP4 operands; undefined if there are none. */
  readonly fp4: Readonly<Record<(typeof FP4_POINTERS)[number], Parameter<'u64'>>> | undefined;
  readonly fp4Keys: boolean;
  readonly fp4Values: boolean;
  /** Strides of the caller's 16-bit operands; undefined where Q, K and V are quantized. */
  readonly given: Readonly<Record<(typeof OPERAND_STRIDES)[number], Parameter<'u64'>>> | undefined;
  readonly valueRowBytes: number;
  /** Added to every exponent, less the head's shift where P and V share FP16's range ({@link exponentOffsetOf}). */
  readonly exponentOffset: number;
  /** Products are summed in FP16: V takes more of its range from P where its tokens lie far apart (`quantizeValue`). */
  readonly sharesRange: boolean;
  /**
   * Scores are finished as floats before the maximum is taken; otherwise they stay 1.5 * 2^23 + q . k until the
   * exponentials.
   */
  readonly scoresAreFloat: boolean;
  readonly tiles: Readonly<Record<'parked' | 'parkedScales' | 'parkedCopies' | 'query' | 'key' | 'value', SharedTile>> &
    Readonly<Partial<Record<'queryScales' | 'keyScales' | 'valueScales' | 'faults', SharedTile>>>;
  /**
   * Where a thread's scores lie: column 0 is `firstColumn` of twice the thread's number in its four, others so far
   * behind it.
   */
  readonly firstColumn: (t2: Reg<'u32'>) => Reg<'u32'>;
  readonly columnOf: (fragment: number, value: number) => number;
}

/** A layout for shared rows of so many bytes, lengthened to what the swizzle can permute. */
const swizzled = (bytes: number) => xorSwizzle(bytes >= 128 ? roundUp(bytes, 128) : nextPowerOfTwo(bytes));

/** Declares parameters and shared memory. */
export function makeFrame(config: AttentionConfig): Frame {
  const { qkRowBytes, queryRowBytes, pvFormat, paddedValueDim, warps, rowsPerWarp } = config;
  const threads = warps * 32;
  const b = new KernelBuilder({
    name: 'attention',
    target: config.target,
    threads,
    minBlocksPerMultiprocessor: config.minBlocksPerMultiprocessor,
  });
  const parameters = {
    pointer: pointers(b, ATTENTION_POINTERS),
    integer: integers(b, ATTENTION_INTEGERS),
    strides: pointers(b, ATTENTION_STRIDES),
    band: bandParameters(b),
    scoreScale: b.parameter('scoreScale', 'f32'),
    softcap: softcapParameters(b),
  };
  const [fp4Keys, fp4Values] = [hasFp4Keys(config), hasFp4Values(config)];
  const fp4 = fp4Keys || fp4Values ? pointers(b, FP4_POINTERS) : undefined;
  const given = config.given === undefined ? undefined : pointers(b, OPERAND_STRIDES);
  const sinks = sinkParameters(b, config.sinks);
  const blocks = config.blocks ? blockParameters(b) : undefined;

  b.section('shared memory');
  const fp8 = pvFormat === 'e4m3' || pvFormat === 'e4m3-as-f16';
  const valueRowBytes = fp4Values ? BLOCK_K / 2 : fp8 ? BLOCK_K : paddedValueDim * 2;
  const valueRows = fp8 || fp4Values ? paddedValueDim : BLOCK_K;
  const parked = b.shared('parked', 1, rowMajor(config.blocks ? 80 : 64));
  const parkedScales = b.shared('scales of Q', 1, rowMajor(threads));
  const parkedCopies = b.shared('where copies go', 1, rowMajor(threads * 4));
  const query = b.shared('query', blockQueries(config), swizzled(queryRowBytes));
  const key = b.shared('key', BLOCK_K, swizzled(qkRowBytes));
  if (config.keyStages === 2) b.shared('key, second stage', BLOCK_K, key.layout);
  const value = b.shared('value', valueRows, swizzled(valueRowBytes));
  if (config.valueStages === 2) b.shared('value, second stage', valueRows, value.layout);
  const scales = {
    // Words of four scales for 64 channels of a row, in rows that are copied at once.
    ...(config.qkFormat === 'e2m1'
      ? { queryScales: scaleTile(b, 'scales of Q', qkRowBytes / 32, blockQueries(config), 1) }
      : {}),
    ...(fp4Keys ? { keyScales: scaleTile(b, 'scales of K', qkRowBytes / 32, BLOCK_K, 2) } : {}),
    ...(fp4Values ? { valueScales: scaleTile(b, 'scales of V', 1, paddedValueDim, config.valueStages) } : {}),
    // A byte for each token.
    ...(given === undefined ? {} : { faults: b.shared('faults of V', 1, rowMajor(BLOCK_K)) }),
  };

  const floatMask = config.mask !== 'none' && config.mask !== 'boolean';
  return {
    ...{ b, config, threads, ...parameters },
    ...{ rowTiles: rowsPerWarp / 16, threadRows: rowsPerWarp / 8, keyTiles: BLOCK_K / 8 },
    ...{ channelTiles: paddedValueDim / 8, fp8, valueRowBytes },
    ...{ fp4, fp4Keys, fp4Values, given, sinks, blocks },
    exponentOffset: config.quantizedWeights ? Math.log2(FP4_MAX) : pvFormat === 'e4m3' ? LOG2_E4M3_MAX : 0,
    sharesRange: pvFormat === 'e4m3' && config.accumulate === 'f16-per-tile',
    scoresAreFloat: config.softcap || config.smoothQ || floatMask || fp4Keys || given !== undefined,
    tiles: { parked, parkedScales, parkedCopies, query, key, value, ...scales },
    firstColumn: (t2) => (fp4Values ? b.shl(t2, 2) : t2),
    columnOf: (fragment, value) =>
      fp4Values ? 32 * (fragment >> 2) + 2 * (fragment & 3) + value : 8 * fragment + value,
  };
}

/** Shared memory for a word of scales for each row and step of 64 elements, and for the next tile's behind it. */
function scaleTile(b: KernelBuilder, name: string, steps: number, rows: number, stages: 1 | 2): SharedTile {
  const tile = b.shared(name, (steps * rows * 4) / 128, rowMajor(128));
  if (stages === 2) b.shared(`${name}, second stage`, tile.rows, tile.layout);
  return tile;
}

/** Where a thread is in its CTA. */
export interface ThreadPlace {
  readonly thread: Reg<'u32'>;
  readonly lane: Reg<'u32'>;
  readonly warp: Reg<'u32'>;
  /** lane / 4: the thread's first row in a fragment. */
  readonly g: Reg<'u32'>;
}

/** Where a head's keys and values are: as the prologue has it, or reloaded. */
export interface KeyPlace {
  readonly keyHead: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  readonly firstKeyTile: Reg<'u32'>;
  /** Of the caller's tensors; `paddedKeyStart` is the sequence's first key there. */
  readonly sequence: Reg<'u32'>;
  readonly length: Reg<'s32'>;
  /** The thread's number; default `%tid.x`. */
  readonly thread?: Reg<'u32'>;
}

/** The CTA's tile of Q, and the keys that its rows see. */
export interface Work extends SequenceRegisters, KeyRange {
  readonly split: Reg<'u32'> | undefined;
  readonly sequence: Reg<'u32'>;
  /** Heads of Q, and of K and V. */
  readonly head: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  readonly firstRow: Reg<'u32'>;
  /** Where the tiles of keys are listed; `firstTile` and `lastTile` are positions in it then. Undefined: all are taken. */
  readonly list: Reg<'global'> | undefined;
  readonly wholeFrom: Reg<'s32'>;
}

export function placeAndWork(frame: Frame): { place: ThreadPlace; work: Work } {
  const { b, config, integer } = frame;
  b.section('which tile');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const warp = b.shr(thread, 5);
  const place = { thread, lane, warp, g: b.shr(lane, 2) };

  const queryHeads = b.loadParameter(integer.queryHeads);
  const splits = config.split ? b.loadParameter(integer.splits) : undefined;
  let block = b.special('%ctaid.x');
  let split: Reg<'u32'> | undefined;
  if (splits !== undefined) [split, block] = divide(b, block, splits);
  const queryTiles = b.loadParameter(integer.queryTiles);
  const [tileRank, headAndSequence] = divide(b, block, queryTiles);
  const [head, sequence] = divide(b, headAndSequence, queryHeads);
  // Under a causal mask the last rows have the most keys: they start first.
  const tileIndex = config.banded ? b.sub(b.sub(queryTiles, 1), tileRank) : tileRank;
  const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
  const table = loadSequence(b, b.loadPointer(frame.pointer.sequences), sequence);
  const { queryLength, keyLength } = table;
  const firstRow = b.mul(tileIndex, blockQueries(config));
  // Sequences shorter than the longest have no such tile.
  b.when(b.setp('ge', firstRow, queryLength), () => b.exit());

  b.section('keys of the band');
  const low = config.sameBand ? b.constant('s32', 0) : b.as(firstRow, 's32');
  const lastRow = () => b.min(b.add(low, blockQueries(config) - 1), b.sub(b.as(queryLength, 's32'), 1));
  const high = config.sameBand ? low : lastRow();
  const share = split === undefined || splits === undefined ? undefined : { split, splits };
  const rangeOf =
    share === undefined || frame.blocks !== undefined ? undefined : { split: share.split, splits: () => share.splits };
  const band = config.banded ? frame.band : undefined;
  const range = keyRange(b, band, { low, high, queryLength, keyLength }, BLOCK_K, rangeOf);
  const wholeFrom = range.wholeFrom ?? b.constant('s32', 0);
  const work = { split, sequence, head, keyHead, firstRow, ...table, ...range, wholeFrom, list: undefined };
  if (frame.blocks === undefined) return { place, work };
  const list = listAddress(b, frame.blocks, { sequence, head, queryTiles, tileIndex });
  return { place, work: { ...work, list, ...listRange(b, list, share) } };
}
