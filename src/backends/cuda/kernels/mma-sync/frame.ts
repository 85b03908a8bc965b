/** What every part of the kernel knows: parameters, shared memory, sizes; and the CTA's tile of Q. */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile, xorSwizzle } from '../../ptx/layouts.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { FP4_MAX } from '../fp4/e2m1.ts';
import { divide, integers, OPERAND_STRIDES, pointers } from '../parts/addresses.ts';
import { type BandParameters, bandParameters, type KeyRange, keyRange, partOf } from '../parts/band.ts';
import { type BlockParameters, blockParameters, listAddress, listRange } from '../parts/blocks.ts';
import { LOG2_E4M3_MAX, nextPowerOfTwo, roundUp } from '../parts/constants.ts';
import { type JoinParameters, joinParameters } from '../parts/join.ts';
import { loadHeld, type PageParameters, pageParameters } from '../parts/pages.ts';
import { type SoftcapParameters, softcapParameters } from '../parts/scores.ts';
import { loadKeyLength, loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import { type Sinks, sinkParameters } from '../parts/sinks.ts';
import { splitByLength } from '../parts/splits.ts';
import {
  ATTENTION_INTEGERS,
  ATTENTION_POINTERS,
  ATTENTION_STRIDES,
  type AttentionConfig,
  BLOCK_K,
  blockQueries,
  FP4_POINTERS,
  FUSED_POINTERS,
  hasFp4Keys,
  hasFp4Values,
  LEAST_TILES,
  LENGTH_SPLIT_INTEGERS,
  scalesEachTile,
} from './config.ts';

export interface Frame {
  readonly b: KernelBuilder;
  readonly config: AttentionConfig;
  readonly pointer: Readonly<Record<(typeof ATTENTION_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof ATTENTION_INTEGERS)[number], Parameter<'u32'>>>;
  readonly strides: Readonly<Record<(typeof ATTENTION_STRIDES)[number], Parameter<'u64'>>>;
  readonly band: BandParameters;
  /**
   * The address of shared memory as a warp of {@link AttentionConfig.keyWarps} has it for itself, the CTA's else; only Q is common to all.
   */
  readonly own: (offset?: number) => Reg<'shared'>;
  /** A thread's number among those that work on the same tile of keys. */
  readonly thread: () => Reg<'u32'>;
  /** A barrier of those threads. */
  readonly sync: () => void;
  /** Bytes from one warp's own shared memory to the next's. */
  readonly ownBytes: number;
  /** Where a warp leaves its results for the others to join, in its own memory; undefined where none does. */
  readonly results: SharedTile | undefined;
  /** Of a kernel that quantizes Q: its parameters, and where rows' scales and biases lie, pairs of floats. */
  readonly fused:
    | {
        readonly parameters: Readonly<Record<(typeof FUSED_POINTERS)[number], Parameter<'u64'>>>;
        readonly signedScale: Parameter<'f32'>;
        readonly rows: SharedTile;
      }
    | undefined;
  /** |smScale| * log2(e); its sign is Q's. */
  readonly scoreScale: Parameter<'f32'>;
  readonly softcap: SoftcapParameters;
  readonly sinks: Sinks | undefined;
  readonly join: JoinParameters | undefined;
  readonly blocks: BlockParameters | undefined;
  readonly lengthSplits: Readonly<Record<(typeof LENGTH_SPLIT_INTEGERS)[number], Parameter<'u32'>>> | undefined;
  readonly pages: PageParameters | undefined;
  /** Threads that work on the same tile of keys. */
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

/** Parameters in the order of the launch's arguments. */
function declareParameters(b: KernelBuilder, config: AttentionConfig) {
  return {
    pointer: pointers(b, ATTENTION_POINTERS),
    integer: integers(b, ATTENTION_INTEGERS),
    strides: pointers(b, ATTENTION_STRIDES),
    band: bandParameters(b),
    scoreScale: b.parameter('scoreScale', 'f32'),
    softcap: softcapParameters(b),
    fp4: hasFp4Keys(config) || hasFp4Values(config) ? pointers(b, FP4_POINTERS) : undefined,
    given: config.given === undefined ? undefined : pointers(b, OPERAND_STRIDES),
    sinks: sinkParameters(b, config.sinks),
    fusedParameters:
      config.fusedQuery === undefined
        ? undefined
        : { parameters: pointers(b, FUSED_POINTERS), signedScale: b.parameter('signedScale', 'f32') },
    join: config.joins ? joinParameters(b) : undefined,
    blocks: config.blocks ? blockParameters(b) : undefined,
    lengthSplits: config.splitsByLength === true ? integers(b, LENGTH_SPLIT_INTEGERS) : undefined,
    pages: config.pageTokens === undefined ? undefined : pageParameters(b),
  };
}

/** Declares parameters and shared memory. */
export function makeFrame(config: AttentionConfig): Frame {
  const { qkRowBytes, queryRowBytes, pvFormat, paddedValueDim, warps, rowsPerWarp } = config;
  const { keyWarps } = config;
  if (
    (keyWarps > 1 && (warps > 1 || config.qkFormat === 'e2m1')) ||
    (keyWarps === 1 && config.fusedQuery !== undefined)
  ) {
    throw new RangeError('warps with keys of their own have all rows and no scales of Q, and only those quantize Q');
  }
  const threads = warps * 32;
  const b = new KernelBuilder({
    name: 'attention',
    target: config.target,
    threads: threads * keyWarps,
    minBlocksPerMultiprocessor: config.minBlocksPerMultiprocessor,
  });
  const parameters = declareParameters(b, config);
  const { given, fusedParameters } = parameters;
  const [fp4Keys, fp4Values] = [hasFp4Keys(config), hasFp4Values(config)];

  b.section('shared memory');
  const fp8 = pvFormat === 'e4m3' || pvFormat === 'e4m3-as-f16';
  const valueRowBytes = fp4Values ? BLOCK_K / 2 : fp8 ? BLOCK_K : paddedValueDim * 2;
  const valueRows = fp8 || fp4Values ? paddedValueDim : BLOCK_K;
  const makeQuery = () => b.shared('query', blockQueries(config), swizzled(queryRowBytes));
  const fused = fusedParameters && {
    ...fusedParameters,
    rows: b.shared('scales and biases of Q', 1, rowMajor(blockQueries(config) * 8)),
  };
  const common = keyWarps > 1 ? makeQuery() : undefined;
  const parked = b.shared('parked', 1, rowMajor(parkedBytes(config)));
  const parkedScales = b.shared('scales of Q', 1, rowMajor(threads));
  const parkedCopies = b.shared('where copies go', 1, rowMajor(threads * 4));
  const query = common ?? makeQuery();
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
    ...(fp4Values || scalesEachTile(config)
      ? { valueScales: scaleTile(b, 'scales of V', 1, paddedValueDim, config.valueStages) }
      : {}),
    // A byte for each token.
    ...(given === undefined ? {} : { faults: b.shared('faults of V', 1, rowMajor(BLOCK_K)) }),
  };

  const results = keyWarps > 1 ? resultTile(b, config, key) : undefined;
  const end = Math.max(...b.tiles.map(({ base, bytes }) => base + bytes));
  const ownBytes = roundUp(end - (common === undefined ? 0 : common.base + common.bytes), 128);
  if (keyWarps > 1) b.shared('of the other warps', ((keyWarps - 1) * ownBytes) / 128, rowMajor(128));

  const floatMask = config.mask !== 'none' && config.mask !== 'boolean';
  return {
    ...{ b, config, threads, ...parameters },
    ...{ rowTiles: rowsPerWarp / 16, threadRows: threadRowsOf(config), keyTiles: BLOCK_K / 8 },
    ...{ channelTiles: paddedValueDim / 8, fp8, valueRowBytes },
    ...ownershipOf(b, config, ownBytes),
    ...{ results, fused, fp4Keys, fp4Values },
    exponentOffset: config.quantizedWeights ? Math.log2(FP4_MAX) : pvFormat === 'e4m3' ? LOG2_E4M3_MAX : 0,
    sharesRange: pvFormat === 'e4m3' && config.accumulate === 'f16-per-tile',
    scoresAreFloat: config.softcap || config.smoothQ || floatMask || fp4Keys || given !== undefined,
    tiles: { parked, parkedScales, parkedCopies, query, key, value, ...scales },
    firstColumn: (t2) => (fp4Values ? b.shl(t2, 2) : t2),
    columnOf: (fragment, value) =>
      fp4Values ? 32 * (fragment >> 2) + 2 * (fragment & 3) + value : 8 * fragment + value,
  };
}

/** With lists or pages there is one value more. */
const parkedBytes = ({ blocks, pageTokens }: AttentionConfig) => (blocks || pageTokens !== undefined ? 80 : 64);

const threadRowsOf = ({ eightRows, rowsPerWarp }: AttentionConfig) => (eightRows ? 1 : rowsPerWarp / 8);

/** Rows of output in FP32 and their logsumexps, over the stages of K and V, which are done with by then, and as much more as they need. */
function resultTile(b: KernelBuilder, config: AttentionConfig, key: SharedTile): SharedTile {
  const bytes = blockQueries(config) * (config.paddedValueDim + 1) * 4;
  const { base } = key;
  const end = Math.max(...b.tiles.map((tile) => tile.base + tile.bytes));
  const missing = base + bytes - end;
  if (missing > 0) b.shared('results of a warp', Math.ceil(missing / 16), rowMajor(16));
  return { ...key, name: 'results', rows: 1, layout: rowMajor(bytes), base, bytes };
}

/** Where warps that take different keys are by themselves. */
function ownershipOf(
  b: KernelBuilder,
  { keyWarps }: AttentionConfig,
  ownBytes: number,
): Pick<Frame, 'own' | 'thread' | 'sync' | 'ownBytes'> {
  if (keyWarps === 1) {
    return {
      ...{ ownBytes, own: (offset) => b.sharedAddress(offset), sync: () => b.barSync() },
      thread: () => b.special('%tid.x'),
    };
  }
  return {
    ownBytes,
    own: (offset) => b.add(b.sharedAddress(offset), b.as(b.mul(b.shr(b.special('%tid.x'), 5), ownBytes), 'shared')),
    sync: () => b.warpSync(),
    thread: () => b.and(b.special('%tid.x'), 31),
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
  /** The thread's number among those of its tile of keys. */
  readonly thread?: Reg<'u32'>;
}

/** A CTA's share of the keys where they are split. */
export interface Share {
  /** Which of the parts it is: of the tile of rows, or with splits by length of the head. */
  readonly part: Reg<'u32'>;
  /** The first part of the tile of rows; undefined: 0. */
  readonly first: Reg<'u32'> | undefined;
  readonly splits: Reg<'u32'>;
}

/** The CTA's tile of Q, and the keys that its rows see. */
export interface Work extends SequenceRegisters, KeyRange {
  readonly share: Share | undefined;
  /** Number of the tile of rows among all. */
  readonly item: Reg<'u32'>;
  /** Of K and V in pages: how many of the pool's count for the sequence. */
  readonly validPages: Reg<'u32'> | undefined;
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
  const thread = frame.thread();
  const lane = b.and(thread, 31);
  const warp = b.shr(thread, 5);
  const place = { thread, lane, warp, g: b.shr(lane, 2) };

  const { share, item, queryTiles, tileIndex, head, sequence } = whichTile(frame, lane);
  const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
  const planned = loadSequence(b, b.loadPointer(frame.pointer.sequences), sequence);
  const held = frame.pages === undefined ? undefined : loadHeld(b, frame.pages, config.pageTokens ?? BLOCK_K, sequence);
  const table = held === undefined ? planned : { ...planned, keyLength: held.length };
  const { queryLength, keyLength } = table;
  const firstRow = b.mul(tileIndex, blockQueries(config));
  // Sequences shorter than the longest have no such tile.
  b.when(b.setp('ge', firstRow, queryLength), () => b.exit());

  b.section('keys of the band');
  const low = config.sameBand ? b.constant('s32', 0) : b.as(firstRow, 's32');
  const lastRow = () => b.min(b.add(low, blockQueries(config) - 1), b.sub(b.as(queryLength, 's32'), 1));
  const high = config.sameBand ? low : lastRow();
  const split = share?.first === undefined ? share?.part : b.sub(share.part, share.first);
  const own = split === undefined || share === undefined ? undefined : { split, splits: share.splits };
  const rangeOf =
    own === undefined || frame.blocks !== undefined ? undefined : { split: own.split, splits: () => own.splits };
  const band = config.banded ? frame.band : undefined;
  // Heads as rows are one token; how far it is from keys in pages is not settled before.
  const tokens = config.sameBand && frame.pages !== undefined ? b.constant('u32', 1) : queryLength;
  const range = keyRange(b, band, { low, high, queryLength: tokens, keyLength }, BLOCK_K, rangeOf);
  const wholeFrom = range.wholeFrom ?? b.constant('s32', 0);
  const work = {
    ...{ share, item, validPages: held?.validPages },
    sequence,
    head,
    keyHead,
    firstRow,
    ...table,
    ...range,
    wholeFrom,
    list: undefined,
  };
  if (frame.blocks === undefined) return { place, work: { ...work, ...shareOfWarp(frame, work) } };
  const list = listAddress(b, frame.blocks, { sequence, head, queryTiles, tileIndex });
  const listed = listRange(b, list, own);
  return { place, work: { ...work, list, ...listed, ...shareOfWarp(frame, listed) } };
}

/** Which tile of rows the CTA takes, and which part of its keys. */
function whichTile(
  { b, config, integer, lengthSplits, pages, pointer }: Frame,
  lane: Reg<'u32'>,
): Pick<Work, 'share' | 'item' | 'head' | 'sequence'> & Readonly<Record<'queryTiles' | 'tileIndex', Reg<'u32'>>> {
  const queryHeads = b.loadParameter(integer.queryHeads);
  const splits = config.split ? b.loadParameter(integer.splits) : undefined;
  if (lengthSplits !== undefined && splits !== undefined) {
    const [slot, head] = divide(b, b.special('%ctaid.x'), splits);
    const sequences = b.loadPointer(pointer.sequences);
    const lengthOf = (sequence: Reg<'u32'>, inside: Reg<'pred'>) => {
      if (pages !== undefined) return loadHeld(b, pages, config.pageTokens ?? BLOCK_K, sequence, inside).length;
      const length = b.constant('u32', 0);
      b.when(inside, () => loadKeyLength(b, sequences, sequence, length));
      return length;
    };
    const { sequence, ...own } = splitByLength(b, {
      tilesOf: (sequence, inside) => b.shr(b.add(lengthOf(sequence, inside), BLOCK_K - 1), Math.log2(BLOCK_K)),
      sequences: b.loadParameter(lengthSplits.sequenceCount),
      mostSplits: b.loadParameter(lengthSplits.mostSplits),
      ...{ slots: splits, leastTiles: LEAST_TILES, slot, lane },
    });
    const item = b.mad(sequence, queryHeads, head);
    const [queryTiles, tileIndex] = [b.constant('u32', 1), b.constant('u32', 0)];
    return { share: { part: slot, ...own }, item, queryTiles, tileIndex, head, sequence };
  }
  let item = b.special('%ctaid.x');
  let part: Reg<'u32'> | undefined;
  if (splits !== undefined) [part, item] = divide(b, item, splits);
  const queryTiles = b.loadParameter(integer.queryTiles);
  const [tileRank, headAndSequence] = divide(b, item, queryTiles);
  const [head, sequence] = divide(b, headAndSequence, queryHeads);
  // Under a causal mask the last rows have the most keys: they start first.
  const tileIndex = config.banded ? b.sub(b.sub(queryTiles, 1), tileRank) : tileRank;
  const share = part === undefined || splits === undefined ? undefined : { part, first: undefined, splits };
  return { share, item, queryTiles, tileIndex, head, sequence };
}

/** The tiles that this warp takes of those of its CTA. */
function shareOfWarp(
  { b, config: { keyWarps } }: Frame,
  { firstTile, lastTile }: Pick<KeyRange, 'firstTile' | 'lastTile'>,
): Partial<Pick<KeyRange, 'firstTile' | 'lastTile'>> {
  if (keyWarps === 1) return {};
  const count = b.as(b.max(b.sub(lastTile, firstTile), 0), 'u32');
  const { first, end } = partOf(b, count, b.shr(b.special('%tid.x'), 5), b.constant('u32', keyWarps));
  return { firstTile: b.add(firstTile, b.as(first, 's32')), lastTile: b.add(firstTile, b.as(end, 's32')) };
}
