/**
 * The `mma.sync` attention kernel: INT8 or INT4 QK^T, FP16 or FP8 PV, for sm_80 and later.
 *
 * One CTA computes `rowsPerWarp * warps` rows of Q of one head against the keys of its band, 64 at a time, with the online
 * softmax of FlashAttention in base 2. Quantized operands are padded (rows to whole tiles with zeros, channels to whole
 * tensor-core steps), so only scores are masked, never loads. K is fetched a tile ahead with cp.async.
 *
 * Names: g = lane / 4 and t = lane % 4 locate a thread in the fragments of mma.m16n8: it owns rows g and g + 8 and columns
 * 2t and 2t + 1 of every 16x8 tile of scores. With per-thread scales all its scores of a tile share one scale.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { type Layout, rowMajor, type SharedTile, xorSwizzle } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { bandParameters, keyRange } from '../parts/band.ts';
import { MAGIC, MAGIC_BITS, nextPowerOfTwo, roundUp } from '../parts/constants.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, logSumExp, rowFactor, storePair } from '../parts/epilogue.ts';
import { at, maxOf } from '../parts/lists.ts';
import { quadMax, quadSum } from '../parts/quad.ts';
import { capScores, excludeBeyondBand, maskRow, softcapParameters, spreadFaults } from '../parts/scores.ts';
import { loadSequence } from '../parts/sequences.ts';

/** Keys of a tile. */
export const BLOCK_K = 64;

/**
 * Exponents are (1.5 * 2^23 + q.k) * scale plus a term of that size, whose rounding shifts those of a tile by up to the scale.
 * Above this it would show in P: there exponents are made another way.
 */
const COARSE_SCALE = 2 ** -7;

/** Added to the exponent where P is E4M3, so that a row's maximum becomes the format's. */
const LOG2_E4M3_MAX = Math.log2(448);

/** A maximum above this, in base 2, leaves too few bits of a sum with {@link LOG2_E4M3_MAX}. */
const COARSE_MAX = 2 ** 12;

export interface AttentionConfig {
  readonly target: Target;
  readonly qkFormat: 's8' | 's4';
  /** Bytes of a quantized token of Q or K: D padded to 32 (INT8), or to 64 and halved (INT4). */
  readonly qkRowBytes: number;
  /**
   * `f16`: V in FP16, tokens by channels. `e4m3`: V in FP8, channels by permuted tokens, and P in FP8. `e4m3-as-f16`: V in
   * FP8, converted to FP16 on its way to the tensor core, and P in FP16: where `mma.sync` has no FP8.
   */
  readonly pvFormat: 'f16' | 'e4m3' | 'e4m3-as-f16';
  /**
   * `f32`: tensor-core sums in FP32 throughout. `f16`: in FP16 throughout. `f32-per-tile` and `f16-per-tile`: sums of one
   * tile, then added to FP32 registers.
   */
  readonly accumulate: 'f32' | 'f16' | 'f32-per-tile' | 'f16-per-tile';
  /** Dv, and Dv padded to a multiple of 16, or of 32 with V in FP8. */
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly warps: number;
  readonly rowsPerWarp: 16 | 32;
  readonly minBlocksPerMultiprocessor: number;
  /** 2: V is fetched a tile ahead like K. 1: behind its own tile's QK^T, where shared memory is short. */
  readonly valueStages: 1 | 2;
  /** Rows of Q that share a set of scales, and how many are in the set: [128, 1], [32, 1] or [32, 8]. */
  readonly queryScales: readonly [rows: number, scales: number];
  /** Scales of a K tile: 1, or 4 when per thread. */
  readonly keyScales: 1 | 4;
  /** The output is rescaled only when a row's maximum has grown by more than this (in powers of two); P then reaches 2^threshold. */
  readonly rescaleThreshold: number;
  /** Causal or windowed: row i sees keys i + lower .. i + upper. */
  readonly banded: boolean;
  /** Rows are heads over one token: all see what row 0 sees. */
  readonly sameBand: boolean;
  readonly mask: 'none' | 'boolean' | DType;
  readonly softcap: boolean;
  /** Adds the share of Q's block mean to the scores (`smoothQ`), buffer `meanScores`. */
  readonly smoothQ: boolean;
  /** Adds V's channel mean to the output. */
  readonly smoothV: boolean;
  readonly outputType: DType;
  readonly lse: boolean;
  /** Writes partial results of one of several splits of the keys; `combine.ts` joins them. */
  readonly split: boolean;
}

/** Parameters in order, as the kernel declares them. Pointers that a configuration does not use may be null. */
export const ATTENTION_POINTERS = [
  'sequences',
  'query',
  'queryScale',
  'rowBias',
  'key',
  'keyScale',
  'keyFaults',
  'value',
  'valueScale',
  'valueMean',
  'meanScores',
  'mask',
  'output',
  'lse',
] as const;
export const ATTENTION_INTEGERS = [
  'queryHeads',
  'headsPerKeyHead',
  'queryTiles',
  'splits',
  'paddedQueries',
  'paddedKeys',
  'meanScoreKeys',
] as const;
/** Strides in bytes: of the mask, the output and (elements of 4 bytes) the LSE. */
export const ATTENTION_STRIDES = [
  'maskBatch',
  'maskHead',
  'maskQuery',
  'maskKey',
  'outputBatch',
  'outputHead',
  'outputToken',
  'lseBatch',
  'lseHead',
] as const;

const isFp8 = (config: AttentionConfig) => config.pvFormat !== 'f16';

/** Rows of Q of a CTA. */
export const blockQueries = ({ warps, rowsPerWarp }: Pick<AttentionConfig, 'warps' | 'rowsPerWarp'>) =>
  warps * rowsPerWarp;

/** A layout for shared rows of so many bytes, lengthened to what the swizzle can permute. */
const swizzled = (bytes: number) => xorSwizzle(bytes >= 128 ? roundUp(bytes, 128) : nextPowerOfTwo(bytes));

/** Offset of (row, chunk) in a tile for a thread whose row and chunk are registers. */
function laneOffset(b: KernelBuilder, layout: Layout, row: Reg<'u32'>, chunk: Reg<'u32'>): Reg<'shared'> {
  const permuted = b.xor(b.and(b.shr(row, layout.rowShift), layout.rowMask), chunk);
  return b.as(b.mad(row, layout.rowBytes, b.shl(permuted, 4)), 'shared');
}

/** Moves a swizzled address by a constant number of chunks: an XOR, and what is beyond the permuted chunks as an offset. */
function chunkAddresses(b: KernelBuilder, layout: Layout, base: Reg<'shared'>) {
  const moved = new Map<number, Reg<'shared'>>([[0, base]]);
  return (chunk: number): [address: Reg<'shared'>, offset: number] => {
    const within = chunk & layout.rowMask;
    let address = moved.get(within);
    if (address === undefined) {
      address = b.xor(base, within * 16);
      moved.set(within, address);
    }
    return [address, (chunk - within) * 16];
  };
}

/**
 * Copies a tile from global to shared memory, all threads together. Returns the copy as a function of the thread's source
 * and destination, to be emitted once per tile.
 */
function tileCopy(b: KernelBuilder, tile: SharedTile, threads: number, rowBytes: number) {
  const { layout, rows } = tile;
  const columns = Math.min(8, layout.rowBytes / 16);
  // Computed anew where it is needed: registers held through the loop cost more.
  const place = (thread = b.special('%tid.x')) => {
    return { row: b.shr(thread, Math.log2(columns)), column: b.and(thread, columns - 1) };
  };
  const { row, column } = place();
  const rowsAtOnce = threads / columns;
  const destination = b.add(laneOffset(b, layout, row, column), tile.base);
  const inside = new Map<number, Reg<'pred'>>();
  // Rows beyond the tile and chunks beyond the row are left out.
  const guarded = (firstRow: number, firstColumn: number, body: () => void) => {
    const lastPartial = rowBytes / 16 - firstColumn < columns;
    const rowsPartial = rows - firstRow < rowsAtOnce;
    if (!lastPartial && !rowsPartial) return body();
    const key = (lastPartial ? 1 : 0) + (rowsPartial ? 2 : 0);
    let predicate = inside.get(key);
    if (predicate === undefined) {
      const inRow = b.setp('lt', column, lastPartial ? rowBytes / 16 - firstColumn : columns);
      predicate = rowsPartial ? b.andPred(inRow, b.setp('lt', row, rows - firstRow)) : inRow;
      inside.set(key, predicate);
    }
    b.when(predicate, body);
  };
  return {
    place,
    rowsAtOnce,
    /** Where this thread's first chunk goes, from the start of shared memory. */
    destination,
    /** @param rowStride bytes between rows in global memory; a register when it is only known at run time */
    emit(source: Reg<'global'>, into: Reg<'shared'>, rowStride: number | Reg<'global'>) {
      let from = source;
      for (let firstRow = 0; firstRow < rows; firstRow += rowsAtOnce) {
        if (firstRow > 0 && typeof rowStride !== 'number') from = b.add(from, rowStride);
        for (let firstColumn = 0; firstColumn * 16 < rowBytes; firstColumn += columns) {
          const sourceOffset = firstColumn * 16 + (typeof rowStride === 'number' ? firstRow * rowStride : 0);
          guarded(firstRow, firstColumn, () =>
            b.cpAsync16(into, from, firstRow * layout.rowBytes + firstColumn * 16, sourceOffset),
          );
        }
      }
    },
  };
}

const fourOf = <T>(values: readonly T[]) => values as [T, T, T, T];

/** The kernel of one configuration. */
export function attention(config: AttentionConfig): Kernel {
  const { qkFormat, qkRowBytes, pvFormat, accumulate, valueDim, paddedValueDim, warps, rowsPerWarp } = config;
  const threads = warps * 32;
  const blockQ = blockQueries(config);
  const b = new KernelBuilder({
    name: 'attention',
    target: config.target,
    threads,
    minBlocksPerMultiprocessor: config.minBlocksPerMultiprocessor,
  });
  const pointer = pointers(b, ATTENTION_POINTERS);
  const integer = integers(b, ATTENTION_INTEGERS);
  const strides = pointers(b, ATTENTION_STRIDES);
  const band = bandParameters(b);
  const scoreScale = b.parameter('scoreScale', 'f32'); // |smScale| * log2(e); its sign is Q's
  const softcap = softcapParameters(b);

  const MT = rowsPerWarp / 16; // 16-row tiles of a warp
  const NT = BLOCK_K / 8; // 8-key tiles
  const VT = paddedValueDim / 8; // 8-channel tiles
  const kSteps = qkRowBytes / 32;

  b.section('shared memory');
  const parked = b.shared('parked', 1, rowMajor(64));
  const parkedScales = b.shared('scales of Q', 1, rowMajor(threads));
  const parkedCopies = b.shared('where copies go', 1, rowMajor(threads * 4));
  const valueRowBytes = isFp8(config) ? BLOCK_K : paddedValueDim * 2;
  const valueRows = isFp8(config) ? paddedValueDim : BLOCK_K;
  const queryTile = b.shared('query', blockQ, swizzled(qkRowBytes));
  const keyTile = b.shared('key', BLOCK_K, swizzled(qkRowBytes));
  b.shared('key, second stage', BLOCK_K, keyTile.layout);
  const valueTile = b.shared('value', valueRows, swizzled(valueRowBytes));
  if (config.valueStages === 2) b.shared('value, second stage', valueRows, valueTile.layout);

  b.section('which tile');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const warp = b.shr(thread, 5);
  const g = b.shr(lane, 2);

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
  const { queryStart, queryLength, keyLength, paddedQueryStart, paddedKeyStart } = loadSequence(
    b,
    b.loadPointer(pointer.sequences),
    sequence,
  );
  const firstRow = b.mul(tileIndex, blockQ);
  // Sequences shorter than the longest have no such tile.
  b.when(b.setp('ge', firstRow, queryLength), () => b.exit());

  b.section('keys of the band');
  const length = b.as(keyLength, 's32');
  const rowLow = config.sameBand ? b.constant('s32', 0) : b.as(firstRow, 's32');
  const rowHigh = config.sameBand ? rowLow : b.min(b.add(rowLow, blockQ - 1), b.sub(b.as(queryLength, 's32'), 1));
  const rows = { low: rowLow, high: rowHigh, queryLength, keyLength };
  const share = split === undefined || splits === undefined ? undefined : { split, splits: () => splits };
  const range = keyRange(b, config.banded ? band : undefined, rows, BLOCK_K, share);
  const { lower, upper, wholeUntil, firstTile, lastTile } = range;
  const wholeFrom = range.wholeFrom ?? b.constant('s32', 0);
  const tile = b.mov(firstTile);

  b.section('addresses');
  const shared = b.sharedAddress();
  const paddedQueries = b.loadParameter(integer.paddedQueries);
  const paddedKeys = b.loadParameter(integer.paddedKeys);
  const queryRow = b.add(b.mad(head, paddedQueries, paddedQueryStart), firstRow);
  const keyRow = b.mad(keyHead, paddedKeys, paddedKeyStart);
  const copyQuery = tileCopy(b, queryTile, threads, qkRowBytes);
  const copyKey = tileCopy(b, keyTile, threads, qkRowBytes);
  const copyValue = tileCopy(b, valueTile, threads, valueRowBytes);
  /** This thread's first chunk of a tile whose rows, tokens, lie one behind the other. */
  const tokensAt = (
    base: Reg<'global'>,
    row: Reg<'u32'>,
    copy: typeof copyKey,
    rowBytes: number,
    thread?: Reg<'u32'>,
  ) => {
    const { row: ownRow, column } = copy.place(thread);
    return b.add(offset(b, base, b.add(row, ownRow), rowBytes), b.as(b.mulWide(column, 16), 'global'));
  };
  /** Where the head's keys and values are: as the prologue has it, or unparked. */
  interface KeyPlace {
    readonly keyHead: Reg<'u32'>;
    readonly paddedKeyStart: Reg<'u32'>;
    readonly firstKeyTile: Reg<'u32'>;
    readonly thread?: Reg<'u32'>;
  }
  const rowOfTile = ({ firstKeyTile }: KeyPlace, tile: Reg<'s32'>) => b.shl(b.add(firstKeyTile, b.as(tile, 'u32')), 6);
  const copyKeyTile = (place: KeyPlace, tile: Reg<'s32'>, into: Reg<'shared'>) => {
    const source = tokensAt(b.loadPointer(pointer.key), rowOfTile(place, tile), copyKey, qkRowBytes, place.thread);
    copyKey.emit(source, into, qkRowBytes);
  };
  const copyValueTile = (place: KeyPlace, tile: Reg<'s32'>, into: Reg<'shared'>) => {
    const base = b.loadPointer(pointer.value);
    if (!isFp8(config)) {
      copyValue.emit(
        tokensAt(base, rowOfTile(place, tile), copyValue, valueRowBytes, place.thread),
        into,
        valueRowBytes,
      );
      return;
    }
    // [head, channel, token]: rows are channels, paddedKeys bytes apart.
    const { row, column } = copyValue.place(place.thread);
    const stride = b.loadParameter(integer.paddedKeys);
    const token = b.add(b.add(place.paddedKeyStart, b.as(b.shl(tile, 6), 'u32')), b.shl(column, 4));
    const channel = offset(b, base, b.mad(place.keyHead, paddedValueDim, row), stride);
    const source = b.add(channel, b.as(b.cvt('u64', token), 'global'));
    copyValue.emit(source, into, b.as(b.mulWide(stride, copyValue.rowsAtOnce), 'global'));
  };

  b.section('prologue: Q, first K and V on their way');
  /** A place in the one of two buffers that a tile goes to: even tiles to the first, odd ones to the second. */
  const staged = (at: Reg<'shared'>, buffer: SharedTile, which: Reg<'s32'>) =>
    b.as(b.mad(b.as(b.and(which, 1), 'u32'), buffer.bytes, b.as(at, 'u32')), 'shared');
  const warpRow = b.mul(warp, rowsPerWarp);
  const hasTiles = b.setp('lt', tile, lastTile);
  b.if(hasTiles, () => {
    const source = tokensAt(b.loadPointer(pointer.query), queryRow, copyQuery, qkRowBytes);
    copyQuery.emit(source, b.add(shared, copyQuery.destination), qkRowBytes);
    const place = { keyHead, paddedKeyStart, firstKeyTile: b.shr(keyRow, 6) };
    copyKeyTile(place, tile, staged(b.add(shared, copyKey.destination), keyTile, tile));
    if (config.valueStages === 2) {
      copyValueTile(place, tile, staged(b.add(shared, copyValue.destination), valueTile, tile));
    }
    b.cpAsyncCommitGroup();
  });
  const [scaleRows, scaleCount] = config.queryScales;
  const scaleGroup = b.shr(b.add(queryRow, warpRow), Math.log2(scaleRows));
  const queryScale = b.mul(
    b.ld(
      'f32',
      offset(b, b.loadPointer(pointer.queryScale), scaleCount === 8 ? b.add(b.shl(scaleGroup, 3), g) : scaleGroup, 4),
      0,
      { readOnly: true },
    ),
    b.loadParameter(scoreScale),
  );

  const R = MT * 2;
  const rowMax = Array.from({ length: R }, () => b.constant('f32', Number.NEGATIVE_INFINITY));
  const rowSum = Array.from({ length: R }, () => b.constant('f32', 0));
  const halfSums = accumulate === 'f16';
  const output: Reg<'f32'>[][][] = [];
  const outputHalf: Reg<'f16x2'>[][][] = [];
  for (let m = 0; m < MT; m++) {
    output.push(Array.from({ length: halfSums ? 0 : VT }, () => Array.from({ length: 4 }, () => b.constant('f32', 0))));
    outputHalf.push(
      Array.from({ length: halfSums ? VT : 0 }, () =>
        Array.from({ length: 2 }, () => b.as(b.constant('b32', 0), 'f16x2')),
      ),
    );
  }
  const magic = Array.from({ length: 4 }, () => b.constant('s32', MAGIC_BITS));
  const zeros = Array.from({ length: 4 }, () => b.constant('f32', 0));
  const zeroHalves = zeros.slice(0, 2).map((zero) => b.as(zero, 'f16x2'));

  // Places of this lane in the matrices of ldmatrix.
  const [low16, high16] = [b.and(lane, 15), b.shr(lane, 4)];
  const [low8, octet] = [b.and(lane, 7), b.shr(lane, 3)];
  const queryLane = b.add(
    b.add(shared, queryTile.base),
    laneOffset(b, queryTile.layout, b.add(warpRow, low16), high16),
  );
  const keyLane = b.add(
    b.add(shared, keyTile.base),
    laneOffset(b, keyTile.layout, b.add(b.shl(high16, 3), low8), b.and(octet, 1)),
  );
  // Registers are dear in the loop: what only its end and rare paths need waits in shared memory.
  const parkedAt = b.sharedAddress();
  b.when(b.setp('eq', thread, 0), () => {
    b.stVector([sequence, head, keyHead, queryStart], parkedAt, parked.base);
    b.stVector([queryLength, firstRow, queryRow, paddedKeyStart], parkedAt, parked.base + 16);
    b.stVector([lower, upper, length, lastTile], parkedAt, parked.base + 32);
    b.stVector([wholeFrom, wholeUntil, b.constant('s32', 0), b.constant('s32', 0)], parkedAt, parked.base + 48);
  });
  // Two offsets of 16 bytes each in one word.
  const destinations = b.or(b.as(b.shr(copyKey.destination, 4), 'b32'), b.shl(b.as(copyValue.destination, 'b32'), 12));
  b.st(destinations, b.add(parkedAt, b.as(b.shl(thread, 2), 'shared')), parkedCopies.base);
  // One for each four threads, which share their rows.
  b.when(b.setp('eq', b.and(lane, 3), 0), () =>
    b.st(queryScale, b.add(parkedAt, b.as(thread, 'shared')), parkedScales.base),
  );
  b.barSync();
  /**
   * The thread's number plus a 0 from memory. ptxas takes what follows from %tid.x for constant, computes it before the loop,
   * and then has no registers to hold it.
   */
  const threadNow = () => b.add(b.special('%tid.x'), b.ld('u32', b.sharedAddress(), parked.base + 56));
  const unpark = () => {
    const at = b.sharedAddress(parked.base);
    const [sequence, head, keyHead, queryStart] = fourOf(b.ldVector('u32', 4, at));
    const [queryLength, firstRow, queryRow, paddedKeyStart] = fourOf(b.ldVector('u32', 4, at, 16));
    const [lower, upper, length] = fourOf(b.ldVector('s32', 4, at, 32));
    const threadRow = b.add(b.mul(b.shr(threadNow(), 5), rowsPerWarp), b.shr(b.and(threadNow(), 31), 2));
    const rowIndex = b.as(b.add(firstRow, threadRow), 's32');
    const firstKeyTile = b.shr(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), 6);
    const rowBias = offset(b, b.loadPointer(pointer.rowBias), b.add(queryRow, threadRow), 4);
    const t2 = b.shl(b.and(threadNow(), 3), 1);
    const row = { queryRow, threadRow, rowIndex, rowBias, t2 };
    return {
      ...row,
      ...{ sequence, head, queryStart, queryLength, length, lower, upper },
      ...{ keyHead, paddedKeyStart, firstKeyTile, thread: threadNow() },
    };
  };

  const scoreRegisters = Array.from({ length: MT }, () => Array.from({ length: NT }, () => b.regs('s32', 4)));
  /** Scores as floats: 1.5 * 2^23 + q.k, or what `cooked` makes of them. Index i of a fragment: row g + 8 * (i >> 1), column 2t + (i & 1). */
  const scores = scoreRegisters.map((tiles) =>
    tiles.map((fragment) => fragment.map((register) => b.as(register, 'f32'))),
  );
  const eachScore = (body: (score: Reg<'f32'>, row: number, column: number) => void) => {
    for (let m = 0; m < MT; m++) {
      for (let n = 0; n < NT; n++) {
        for (let i = 0; i < 4; i++) {
          body(at(at(at(scores, m), n), i), 2 * m + (i >> 1), 8 * n + (i & 1));
        }
      }
    }
  };
  const exponentOffset = pvFormat === 'e4m3' ? LOG2_E4M3_MAX : 0;
  const cooked = config.softcap || config.smoothQ || (config.mask !== 'none' && config.mask !== 'boolean');

  const parkedDestinations = () => {
    const own = b.add(b.sharedAddress(), b.as(b.shl(threadNow(), 2), 'shared'));
    return b.ld('b32', own, parkedCopies.base);
  };
  const keyDestination = () => b.add(b.sharedAddress(), b.as(b.shl(b.and(parkedDestinations(), 0xffff), 4), 'shared'));
  const valueDestination = () => b.add(b.sharedAddress(), b.as(b.shl(b.shr(parkedDestinations(), 16), 4), 'shared'));
  const placeOfValueLane = (thread: Reg<'u32'>) => {
    const lane = b.and(thread, 31);
    const [low16, high16, low8, octet] = [b.and(lane, 15), b.shr(lane, 4), b.and(lane, 7), b.shr(lane, 3)];
    const place = {
      f16: () => laneOffset(b, valueTile.layout, low16, high16),
      e4m3: () => laneOffset(b, valueTile.layout, low8, octet),
      'e4m3-as-f16': () => laneOffset(b, valueTile.layout, lane, b.constant('u32', 0)),
    };
    return b.add(b.sharedAddress(valueTile.base), place[pvFormat]());
  };
  // With P in FP8 there is a register to hold it through QK^T.
  const heldValueLane = pvFormat === 'e4m3' ? placeOfValueLane(thread) : undefined;
  const valueLane = () => heldValueLane ?? placeOfValueLane(threadNow());
  const loadKeyScale = () => {
    const tileIndex = b.add(unpark().firstKeyTile, b.as(tile, 'u32'));
    const index = config.keyScales === 4 ? b.add(b.shl(tileIndex, 2), b.and(threadNow(), 3)) : tileIndex;
    return b.ld('f32', offset(b, b.loadPointer(pointer.keyScale), index, 4), 0, { readOnly: true });
  };
  const parkedScale = () => {
    const quad = b.and(threadNow(), -4);
    return b.ld('f32', b.add(b.sharedAddress(), b.as(quad, 'shared')), parkedScales.base);
  };
  const parkedLastTile = () => b.ld('s32', b.sharedAddress(parked.base), 44);
  b.loop(
    () => b.setp('lt', tile, parkedLastTile()),
    () => {
      b.section('K (and V) of this tile have landed; fetch the next');
      b.cpAsyncWaitGroup(0);
      b.barSync();
      // Its way from memory is as long as QK^T.
      const keyScale = loadKeyScale();
      if (config.valueStages === 1) {
        copyValueTile(unpark(), tile, valueDestination());
        b.cpAsyncCommitGroup();
      }
      const hasNext = b.setp('lt', b.add(tile, 1), parkedLastTile());
      b.if(hasNext, () => {
        const following = b.add(tile, 1);
        copyKeyTile(unpark(), following, staged(keyDestination(), keyTile, following));
        if (config.valueStages === 2) {
          copyValueTile(unpark(), following, staged(valueDestination(), valueTile, following));
        }
      });
      b.cpAsyncCommitGroup();

      b.section('S = Q K^T');
      const queryAt = chunkAddresses(b, queryTile.layout, queryLane);
      const keyAt = chunkAddresses(b, keyTile.layout, staged(keyLane, keyTile, tile));
      for (let k = 0; k < kSteps; k++) {
        const [queryAddress, queryOffset] = queryAt(2 * k);
        const [keyAddress, keyOffset] = keyAt(2 * k);
        const q = Array.from({ length: MT }, (_, m) =>
          b.ldmatrix('b32', 4, queryAddress, queryOffset + m * 16 * queryTile.layout.rowBytes),
        );
        for (let pair = 0; pair < NT / 2; pair++) {
          const keys = b.ldmatrix('b32', 4, keyAddress, keyOffset + pair * 16 * keyTile.layout.rowBytes);
          for (let half = 0; half < 2; half++) {
            for (let m = 0; m < MT; m++) {
              const d = scoreRegisters[m]?.[2 * pair + half] as Reg<'s32'>[];
              const c = k === 0 ? magic : d;
              const [a, bb] = [q[m] as Reg<'b32'>[], keys.slice(2 * half, 2 * half + 2)];
              if (qkFormat === 's8') {
                const shape = 'm16n8k32.row.col.s32.s8.s8.s32';
                b.mma(
                  shape,
                  d,
                  a.map((r) => b.as(r, 's8x4')),
                  bb.map((r) => b.as(r, 's8x4')),
                  c,
                );
              } else {
                const shape = 'm16n8k64.row.col.s32.s4.s4.s32';
                b.mma(
                  shape,
                  d,
                  a.map((r) => b.as(r, 's4x8')),
                  bb.map((r) => b.as(r, 's4x8')),
                  c,
                );
              }
            }
          }
        }
      }

      // A group of zeros has scale 0; the smallest normal keeps -Infinity * scale from being NaN and zeros zeros.
      const whole = b.max(b.mul(parkedScale(), b.abs(keyScale)), 1.1754943508222875e-38);
      // Without its last two bits its product with 1.5 * 2^23 is exact.
      const scale = b.as(b.and(b.as(whole, 'b32'), 0xfffffffc), 'f32');
      const negativeMagic = b.mul(scale, -MAGIC);

      if (!cooked && exponentOffset === 0) {
        b.if(b.voteAny(b.setp('gt', scale, COARSE_SCALE)), () => {
          b.section('coarse scores are scaled');
          // (2^23 + q.k) * scale, positive still. The zero point is exact, and so is its distance to each score: the largest
          // score's exponent is 0.
          const shift = b.mul(scale, -(2 ** 22));
          eachScore((score) => b.fma(score, scale, shift, score));
          b.mul(scale, -(2 ** 23), negativeMagic);
          b.set(scale, 1);
        });
      }
      if (cooked) {
        b.section('scores in base 2: scale, mean of Q, softcap');
        if (config.smoothQ) addMeanScores(scale, negativeMagic);
        else eachScore((score) => b.fma(score, scale, negativeMagic, score));
        if (config.softcap) {
          capScores(b, softcap, eachScore, () => {
            const { rowBias } = unpark();
            return Array.from({ length: R }, (_, r) => b.ld('f32', rowBias, r * 32, { readOnly: true }));
          });
        }
      }

      if (config.mask !== 'none') {
        b.section('mask');
        maskScores(tile);
      }

      b.section('keys outside the band or beyond the last');
      const tileStart = b.shl(tile, 6);
      const [from, until] = b.ldVector('s32', 2, b.sharedAddress(parked.base), 48) as [Reg<'s32'>, Reg<'s32'>];
      let edge = b.setp('gt', b.add(tileStart, BLOCK_K), until);
      if (config.banded) edge = b.orPred(edge, b.setp('lt', tileStart, from));
      b.if(edge, () => {
        const { rowIndex, length, lower, upper, t2 } = unpark();
        const token = (r: number) => (config.sameBand ? b.constant('s32', 0) : b.add(rowIndex, 8 * r));
        const origin = b.add(tileStart, b.as(t2, 's32'));
        const band = config.banded ? { lower, upper, token } : undefined;
        excludeBeyondBand(b, R, { origin, keyLength: length, band }, eachScore);
      });

      b.section('keys that are not finite make the rows that see them NaN');
      const faultsOfTile = () => {
        const { firstKeyTile, t2 } = unpark();
        return { faults: offset(b, b.loadPointer(pointer.keyFaults), b.add(firstKeyTile, b.as(tile, 'u32')), 8), t2 };
      };
      spreadFaults(b, keyScale, faultsOfTile, eachScore);

      b.section('running maximum');
      const newMax: Reg<'f32'>[] = [];
      /** This thread's largest score of a row, as the products left it. */
      const ownLargest = (r: number) => {
        const own = at(scoreRegisters, r >> 1).flatMap((fragment) => fragment.slice(2 * (r & 1), 2 * (r & 1) + 2));
        // Positive floats, and -Infinity below them, order like the integers of their bits; three-input integer maxima exist.
        if (!cooked)
          return b.as(
            maxOf(own, (x, y) => b.max(x, y)),
            'f32',
          );
        return maxOf(
          own.map((s) => b.as(s, 'f32')),
          (x, y) => b.max(x, y),
        );
      };
      for (let r = 0; r < R; r++) {
        let largest = ownLargest(r);
        if (!cooked) largest = b.fma(largest, scale, negativeMagic);
        newMax.push(b.max(quadMax(b, largest), rowMax[r] as Reg<'f32'>));
      }
      let grown: Reg<'pred'> | undefined;
      for (let r = 0; r < R; r++) {
        const limit =
          config.rescaleThreshold === 0
            ? (rowMax[r] as Reg<'f32'>)
            : b.add(rowMax[r] as Reg<'f32'>, config.rescaleThreshold);
        const more = b.setp('gt', newMax[r] as Reg<'f32'>, limit);
        grown = grown === undefined ? more : b.orPred(grown, more);
      }
      b.if(b.voteAny(grown as Reg<'pred'>), () => {
        b.section('rescale the output to the new maximum');
        for (let r = 0; r < R; r++) {
          const old = rowMax[r] as Reg<'f32'>;
          // A row that has seen no key yet: exp2(-Infinity - anything) is 0, and its sums are 0 anyway.
          const factor = b.ex2(b.sub(old, finite(newMax[r] as Reg<'f32'>)));
          b.mov(newMax[r] as Reg<'f32'>, old);
          b.mul(rowSum[r] as Reg<'f32'>, factor, rowSum[r]);
          const m = r >> 1;
          if (halfSums) {
            const factors = b.cvtPack('f16x2', factor, factor);
            for (const fragment of outputHalf[m] as Reg<'f16x2'>[][]) {
              const register = fragment[r & 1] as Reg<'f16x2'>;
              b.mul(register, factors, register);
            }
          } else {
            for (const fragment of output[m] as Reg<'f32'>[][]) {
              for (const register of fragment.slice(2 * (r & 1), 2 * (r & 1) + 2)) b.mul(register, factor, register);
            }
          }
        }
      });

      b.section('what is added for the exponents');
      const folded = rowMax.map((max) => {
        const shift = b.neg(finite(max));
        const terms = [...(exponentOffset === 0 ? [] : [exponentOffset]), ...(cooked ? [] : [negativeMagic])];
        return terms.reduce<Reg<'f32'>>((sum, term) => b.add(sum, term), shift);
      });
      if (exponentOffset !== 0) {
        const magnitudes = rowMax.map((max) => b.abs(max));
        const coarse = cooked
          ? b.setp(
              'gt',
              maxOf(magnitudes, (x, y) => b.max(x, y)),
              COARSE_MAX,
            )
          : b.setp('gt', scale, COARSE_SCALE);
        b.if(b.voteAny(coarse), () => {
          b.section('coarse exponents are taken from differences, before the offset is added');
          for (let r = 0; r < R; r++) {
            const own = cooked ? undefined : finite(ownLargest(r));
            const max = finite(at(rowMax, r));
            // Differences of products are exact, and the largest score has the exponent of its own maximum.
            const share = own === undefined ? undefined : b.sub(b.fma(own, scale, b.mul(scale, -MAGIC)), max);
            eachScore((score, row) => {
              if (row !== r) return;
              if (own === undefined || share === undefined) b.sub(score, max, score);
              else b.fma(b.sub(score, own), scale, share, score);
            });
            b.set(at(folded, r), exponentOffset);
          }
          if (!cooked) b.set(scale, 1);
        });
      }

      b.section('P = exp2(S - max)');
      eachScore((score, r) => {
        const exponent = cooked ? b.add(score, folded[r] as Reg<'f32'>) : b.fma(score, scale, folded[r] as Reg<'f32'>);
        b.ex2(exponent, score);
        b.add(rowSum[r] as Reg<'f32'>, score, rowSum[r]);
      });

      if (config.valueStages === 1) {
        b.section('V of this tile has landed');
        b.cpAsyncWaitGroup(1);
        b.barSync();
      }
      b.section('O += P V');
      const valueBase = config.valueStages === 1 ? valueLane() : staged(valueLane(), valueTile, tile);
      if (pvFormat === 'f16') multiplyTokensByChannels(valueBase);
      else multiplyChannelsByTokens(valueBase);

      b.section('next tile');
      b.add(tile, 1, tile);
    },
  );

  b.section('epilogue');
  writeResults();
  return b.build();

  /** The value, or 0 for -Infinity. */
  function finite(value: Reg<'f32'>): Reg<'f32'> {
    return b.selp(b.constant('f32', 0), value, b.setp('eq', value, Number.NEGATIVE_INFINITY));
  }

  /** Scales the scores and adds the share of Q's block mean, `[head, block of Q, key]`, already times smScale * log2(e). */
  function addMeanScores(scale: Reg<'f32'>, negativeMagic: Reg<'f32'>): void {
    const { queryRow, t2 } = unpark();
    const rowBytes = b.mulWide(b.loadParameter(integer.meanScoreKeys), 4);
    const row = offset64(b, b.loadPointer(pointer.meanScores), b.shr(queryRow, 7), rowBytes);
    const source = offset(b, row, b.add(b.as(b.shl(tile, 6), 'u32'), t2), 4);
    for (let n = 0; n < NT; n++) {
      const shares = b.ldVector('f32', 2, source, n * 32).map((share) => b.add(share, negativeMagic));
      for (let m = 0; m < MT; m++) {
        at(at(scores, m), n).forEach((score, i) => {
          b.fma(score, scale, at(shares, i & 1), score);
        });
      }
    }
  }

  /** P of one 16-row tile and 16 keys as the A fragment of mma.m16n8k16. */
  function halfFragment(m: number, k: number): Reg<'f16x2'>[] {
    const [left, right] = [scores[m]?.[2 * k], scores[m]?.[2 * k + 1]] as [Reg<'f32'>[], Reg<'f32'>[]];
    const pair = (fragment: Reg<'f32'>[], i: number) =>
      b.cvtPack('f16x2', fragment[i] as Reg<'f32'>, fragment[i + 1] as Reg<'f32'>);
    return [pair(left, 0), pair(left, 2), pair(right, 0), pair(right, 2)];
  }

  /** P of one 16-row tile and 32 keys as the A fragment of mma.m16n8k32; the order of V's tokens makes it the thread's own. */
  function fp8Fragment(m: number, k: number): Reg<'e4m3x4'>[] {
    const word = (n: number, i: number) => {
      const [left, right] = [scores[m]?.[n], scores[m]?.[n + 1]] as [Reg<'f32'>[], Reg<'f32'>[]];
      return b.pack(
        'e4m3x4',
        b.cvtPack('e4m3x2', left[i] as Reg<'f32'>, left[i + 1] as Reg<'f32'>),
        b.cvtPack('e4m3x2', right[i] as Reg<'f32'>, right[i + 1] as Reg<'f32'>),
      );
    };
    return [word(4 * k, 0), word(4 * k, 2), word(4 * k + 2, 0), word(4 * k + 2, 2)];
  }

  /** One step of the product in FP16, into FP32 or FP16 sums. */
  function mmaHalf(m: number, n: number, p: Reg<'f16x2'>[], v: Reg<'f16x2'>[]): void {
    if (halfSums) {
      b.mma('m16n8k16.row.col.f16.f16.f16.f16', outputHalf[m]?.[n] as Reg<'f16x2'>[], p, v);
    } else {
      b.mma('m16n8k16.row.col.f32.f16.f16.f32', output[m]?.[n] as Reg<'f32'>[], p, v);
    }
  }

  /** Adds a tile's FP32 or FP16 sums to the output. */
  function promote(m: number, n: number, sums: Reg<'f32'>[] | Reg<'f16x2'>[]): void {
    const into = output[m]?.[n] as Reg<'f32'>[];
    sums.forEach((register, i) => {
      if (register.kind === 'f32') {
        b.add(into[i] as Reg<'f32'>, register, into[i]);
      } else {
        const halves = b.unpack(register, 'f16');
        halves.forEach((half, j) => {
          const target = into[2 * i + j] as Reg<'f32'>;
          b.add(target, b.cvt('f32', half), target);
        });
      }
    });
  }

  /** PV with V in FP16, [token, channel]. */
  function multiplyTokensByChannels(base: Reg<'shared'>): void {
    const valueAt = chunkAddresses(b, valueTile.layout, base);
    const load = (k: number, pair: number) => {
      const [address, at] = valueAt(2 * pair);
      return b.ldmatrix('f16x2', 4, address, at + k * 16 * valueTile.layout.rowBytes, true);
    };
    const kSteps16 = BLOCK_K / 16;
    if (accumulate === 'f16-per-tile') {
      const p = Array.from({ length: MT }, (_, m) => Array.from({ length: kSteps16 }, (_, k) => halfFragment(m, k)));
      for (let pair = 0; pair < VT / 2; pair++) {
        const sums = Array.from({ length: MT * 2 }, () => b.regs('f16x2', 2));
        for (let k = 0; k < kSteps16; k++) {
          const v = load(k, pair);
          for (let m = 0; m < MT; m++) {
            for (let half = 0; half < 2; half++) {
              const d = sums[2 * m + half] as Reg<'f16x2'>[];
              const shape = 'm16n8k16.row.col.f16.f16.f16.f16';
              b.mma(shape, d, p[m]?.[k] as Reg<'f16x2'>[], v.slice(2 * half, 2 * half + 2), k === 0 ? zeroHalves : d);
            }
          }
        }
        for (let m = 0; m < MT; m++) {
          for (let half = 0; half < 2; half++) promote(m, 2 * pair + half, sums[2 * m + half] as Reg<'f16x2'>[]);
        }
      }
      return;
    }
    for (let k = 0; k < kSteps16; k++) {
      const p = Array.from({ length: MT }, (_, m) => halfFragment(m, k));
      for (let pair = 0; pair < VT / 2; pair++) {
        const v = load(k, pair);
        for (let m = 0; m < MT; m++) {
          for (let half = 0; half < 2; half++) {
            mmaHalf(m, 2 * pair + half, p[m] as Reg<'f16x2'>[], v.slice(2 * half, 2 * half + 2));
          }
        }
      }
    }
  }

  /**
   * PV with V in FP8, [channel, permuted token]. One ldmatrix brings 64 tokens of eight channels, or to FP16 products 16 tokens
   * of 32 channels: a word holds tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of a channel, just what a B fragment takes.
   */
  function multiplyChannelsByTokens(base: Reg<'shared'>): void {
    if (pvFormat === 'e4m3-as-f16') {
      const valueAt = chunkAddresses(b, valueTile.layout, base);
      for (let k = 0; k < BLOCK_K / 16; k++) {
        const p = Array.from({ length: MT }, (_, m) => halfFragment(m, k));
        const [address, at] = valueAt(k);
        for (let n = 0; n < VT; n += 4) {
          b.ldmatrix('b32', 4, address, at + n * 8 * valueTile.layout.rowBytes).forEach((word, i) => {
            const v = b.unpack(word, 'e4m3x2').map((pair) => b.cvt('f16x2', pair));
            for (let m = 0; m < MT; m++) mmaHalf(m, n + i, p[m] as Reg<'f16x2'>[], v);
          });
        }
      }
      return;
    }
    const load = (n: number) => b.ldmatrix('b32', 4, base, n * 8 * valueTile.layout.rowBytes);
    const p = Array.from({ length: MT }, (_, m) => [fp8Fragment(m, 0), fp8Fragment(m, 1)]);
    for (let n = 0; n < VT; n++) {
      const v = load(n).map((word) => b.as(word, 'e4m3x4'));
      for (let m = 0; m < MT; m++) {
        const tileSums = accumulate === 'f16-per-tile' ? b.regs('f16x2', 2) : b.regs('f32', 4);
        for (let k = 0; k < 2; k++) {
          const [a, bb] = [p[m]?.[k] as Reg<'e4m3x4'>[], v.slice(2 * k, 2 * k + 2)];
          if (accumulate === 'f16-per-tile') {
            const d = tileSums as Reg<'f16x2'>[];
            b.mma('m16n8k32.row.col.f16.e4m3.e4m3.f16', d, a, bb, k === 0 ? zeroHalves : d);
          } else {
            const shape = 'm16n8k32.row.col.f32.e4m3.e4m3.f32';
            if (accumulate === 'f32') b.mma(shape, output[m]?.[n] as Reg<'f32'>[], a, bb);
            else b.mma(shape, tileSums as Reg<'f32'>[], a, bb, k === 0 ? zeros : (tileSums as Reg<'f32'>[]));
          }
        }
        if (accumulate !== 'f32') promote(m, n, tileSums);
      }
    }
  }

  /** Excludes (boolean) or adds (float) mask elements, read from the caller's tensor. */
  function maskScores(tile: Reg<'s32'>): void {
    const kind = config.mask as Exclude<AttentionConfig['mask'], 'none'>;
    const { sequence, head, queryLength, rowIndex, length, t2 } = unpark();
    const keyStride = b.loadParameter(strides.maskKey);
    let origin = headAddress(
      b,
      b.loadPointer(pointer.mask),
      { sequence, head },
      { batch: strides.maskBatch, head: strides.maskHead },
    );
    const firstColumn = b.add(b.as(b.shl(tile, 6), 'u32'), t2);
    origin = offset64(b, origin, firstColumn, keyStride);
    const columnsLeft = b.sub(length, b.as(firstColumn, 's32'));
    for (let r = 0; r < R; r++) {
      const row = b.as(b.add(rowIndex, 8 * r), 'u32');
      const rowInside = b.setp('lt', row, queryLength);
      const address = offset64(b, origin, row, b.loadParameter(strides.maskQuery));
      maskRow(b, kind, { address, keyStride, inside: rowInside, columnsLeft }, NT, (n, j) =>
        at(at(at(scores, r >> 1), n), 2 * (r & 1) + j),
      );
    }
  }

  /** Normalizes and stores the rows of this thread. */
  function writeResults(): void {
    const { sequence, head, keyHead, queryStart, queryLength, queryRow, threadRow, rowIndex, rowBias, t2 } = unpark();
    const queryHeads = b.loadParameter(integer.queryHeads);
    const keyHeads = b.div(queryHeads, b.loadParameter(integer.headsPerKeyHead));
    const sequenceHead = b.mad(sequence, keyHeads, keyHead);
    const headOutput = config.split
      ? b.loadPointer(pointer.output)
      : headAddress(
          b,
          b.loadPointer(pointer.output),
          { sequence, head },
          { batch: strides.outputBatch, head: strides.outputHead },
        );
    const tokenStride = b.loadParameter(strides.outputToken);
    const channelTerms = (name: 'valueScale' | 'valueMean', n: number): Reg<'f32'>[] =>
      b.ldVector(
        'f32',
        2,
        offset(b, b.loadPointer(pointer[name]), b.mad(sequenceHead, paddedValueDim, t2), 4),
        n * 32,
        { readOnly: true },
      );
    const scales = isFp8(config) ? Array.from({ length: VT }, (_, n) => channelTerms('valueScale', n)) : [];
    const means = config.smoothV ? Array.from({ length: VT }, (_, n) => channelTerms('valueMean', n)) : [];
    const partialRow =
      split === undefined
        ? undefined
        : b.mad(split, b.mul(b.loadParameter(integer.paddedQueries), queryHeads), b.add(queryRow, threadRow));
    for (let r = 0; r < R; r++) {
      const row = b.as(b.add(rowIndex, 8 * r), 'u32');
      const sum = quadSum(b, at(rowSum, r));
      const bias = b.ld('f32', rowBias, r * 32, { readOnly: true });
      const { empty, factor: inverse } = rowFactor(b, sum, bias);
      b.if(b.setp('lt', row, queryLength), () => {
        if (config.lse || config.split) {
          const lse = logSumExp(
            b,
            { sum, max: at(rowMax, r), empty, bias },
            {
              exponentOffset: pvFormat === 'e4m3' ? LOG2_E4M3_MAX : undefined,
              biased: config.softcap,
              natural: !config.split,
            },
          );
          const first = b.setp('eq', t2, 0);
          const base = b.loadPointer(pointer.lse);
          const address =
            partialRow === undefined
              ? offset(
                  b,
                  headAddress(b, base, { sequence, head }, { batch: strides.lseBatch, head: strides.lseHead }),
                  b.add(queryStart, row),
                  4,
                )
              : offset(b, base, b.add(partialRow, 8 * r), 4);
          b.when(first, () => b.st(lse, address));
        }
        const type = config.split ? 'float32' : config.outputType;
        const bytes = BYTES[type];
        const rowAddress =
          partialRow === undefined
            ? offset64(b, headOutput, b.add(queryStart, row), tokenStride)
            : offset(b, headOutput, b.add(partialRow, 8 * r), paddedValueDim * 4);
        const address = offset(b, rowAddress, t2, bytes);
        const width = config.split ? paddedValueDim : valueDim;
        for (let n = 0; n < VT && n * 8 < width; n++) {
          let pair: Reg<'f32'>[];
          if (halfSums) {
            const register = outputHalf[r >> 1]?.[n]?.[r & 1] as Reg<'f16x2'>;
            pair = b.unpack(register, 'f16').map((half) => b.cvt('f32', half));
          } else {
            pair = at(at(output, r >> 1), n).slice(2 * (r & 1), 2 * (r & 1) + 2);
          }
          pair = pair.map((value, j) => {
            let factor = inverse;
            if (isFp8(config)) factor = b.mul(factor, scales[n]?.[j] as Reg<'f32'>);
            const result = b.mul(value, factor);
            const whole = config.smoothV ? b.add(result, means[n]?.[j] as Reg<'f32'>) : result;
            // Without keys nothing has written V's scales or means.
            if (isFp8(config) || config.smoothV) b.when(empty, () => b.set(whole, 0));
            return whole;
          });
          storePair(b, pair as [Reg<'f32'>, Reg<'f32'>], address, {
            type,
            first: n * 8,
            width,
            t2,
            inside: undefined,
          });
        }
      });
    }
  }
}
