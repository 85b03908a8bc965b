/** What every part of a gradient kernel knows: parameters, shared memory, and the CTA's work. */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile, xorSwizzle } from '../../ptx/layouts.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, pointers } from '../parts/addresses.ts';
import { type BandParameters, bandParameters } from '../parts/band.ts';
import { type SoftcapParameters, softcapParameters } from '../parts/scores.ts';
import { loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import {
  CODE_ROW_TOKENS,
  GRADIENT_INTEGERS,
  GRADIENT_POINTERS,
  GRADIENT_STRIDES,
  type GradientConfig,
  OPERAND_BYTES,
  OWN_TOKENS,
  rowNumberCount,
  sharedRowBytes,
  streamOperands,
} from './config.ts';

export const GRADIENT_THREADS = (OWN_TOKENS / 16) * 32;

/** Tiles of one stage of what passes by: codes, V or dO, K or Q, and the numbers of rows of Q; undefined: see `streamOperands`. */
export interface StreamTiles {
  readonly codes: SharedTile;
  readonly values: SharedTile | undefined;
  /** Transposed. */
  readonly valueCodes: SharedTile | undefined;
  /** Transposed where they are codes. */
  readonly channels: SharedTile | undefined;
  /** `rowScale`, `rowShift`, `rowDelta` (and `rowBias`, `rowWeight`) of the queries that pass by. */
  readonly rows: SharedTile | undefined;
}

/** What gradient kernels of any instruction know. */
export interface Owner extends Parameters {
  readonly b: KernelBuilder;
  readonly config: Pick<GradientConfig, 'banded' | 'gradientType' | 'headDim' | 'valueDim'> & {
    readonly streamTokens: number;
  };
  /** The CTA owns queries, and keys pass by. */
  readonly ownsQueries: boolean;
  /** Tokens that a CTA owns. */
  readonly ownTokens: number;
  /** Which of the tiles of such tokens this is. */
  readonly rank: () => Reg<'u32'>;
  /** The CTA has further tiles after this one. */
  readonly stays: boolean;
}

/** Parameters of every gradient kernel. */
export interface Parameters {
  readonly pointer: Readonly<Record<(typeof GRADIENT_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof GRADIENT_INTEGERS)[number], Parameter<'u32'>>>;
  readonly strides: Readonly<Record<(typeof GRADIENT_STRIDES)[number], Parameter<'u64'>>>;
  readonly band: BandParameters;
  readonly smScale: Parameter<'f32'>;
  readonly softcap: SoftcapParameters;
}

export const declareParameters = (b: KernelBuilder): Parameters => ({
  pointer: pointers(b, GRADIENT_POINTERS),
  integer: integers(b, GRADIENT_INTEGERS),
  strides: pointers(b, GRADIENT_STRIDES),
  band: bandParameters(b),
  smScale: b.parameter('smScale', 'f32'),
  softcap: softcapParameters(b),
});

export interface Frame extends Owner {
  readonly config: GradientConfig;
  /** dP and dS are computed: for dQ and dK. */
  readonly scoreGradients: boolean;
  readonly own: { readonly codes: SharedTile; readonly values: SharedTile | undefined };
  readonly stream: StreamTiles;
  /** From one stage to the next. */
  readonly stageBytes: number;
  readonly shared: Reg<'shared'>;
  /** 8-token tiles of what passes by. */
  readonly columnTiles: number;
}

export function makeFrame(config: GradientConfig, name = 'gradients'): Frame {
  const { target, gradients, codeBytes, paddedDim, paddedValueDim, streamTokens, stages } = config;
  const ownsQueries = !gradients.includes('key') && !gradients.includes('value');
  const has = streamOperands(config);
  const { scoreGradients } = has;
  const b = new KernelBuilder({
    name,
    target,
    threads: GRADIENT_THREADS,
    minBlocksPerMultiprocessor: config.minBlocksPerMultiprocessor,
  });
  const parameters = declareParameters(b);

  b.section('shared memory');
  const swizzled = (bytes: number) => xorSwizzle(sharedRowBytes(bytes));
  const [codes, values, channels] = [codeBytes, paddedValueDim * OPERAND_BYTES, paddedDim * OPERAND_BYTES].map(
    swizzled,
  ) as [ReturnType<typeof swizzled>, ReturnType<typeof swizzled>, ReturnType<typeof swizzled>];
  const own = {
    codes: b.shared('own codes', OWN_TOKENS, codes),
    values: scoreGradients ? b.shared('own V or dO', OWN_TOKENS, values) : undefined,
  };
  const transposed = (what: string, dim: number) =>
    b.shared(`${what}, transposed`, (streamTokens / CODE_ROW_TOKENS) * dim, xorSwizzle(CODE_ROW_TOKENS));
  const channelsOf = (what: string) =>
    has.inCodes ? transposed(what, paddedDim) : b.shared(what, streamTokens, channels);
  const stage = (name: string): StreamTiles => ({
    codes: b.shared(`codes${name}`, streamTokens, codes),
    values: has.values ? b.shared(`V or dO${name}`, streamTokens, values) : undefined,
    valueCodes: has.valueCodes ? transposed(`dO${name}`, paddedValueDim) : undefined,
    channels: has.channels ? channelsOf(`K or Q${name}`) : undefined,
    rows: ownsQueries
      ? undefined
      : b.shared(`rows${name}`, rowNumberCount(config), rowMajor(Math.max(128, streamTokens * 4))),
  });
  const stream = stage('');
  const stageBytes = stages === 2 ? stage(', second stage').codes.base - stream.codes.base : 0;
  return {
    ...{ b, config, ownsQueries, ownTokens: OWN_TOKENS, scoreGradients, ...parameters, own, stream, stageBytes },
    rank: () => b.special('%ctaid.x'),
    stays: false,
    shared: b.sharedAddress(),
    columnTiles: streamTokens / 8,
  };
}

/** Where a thread is: rows g and g + 8 of its warp's 16 own tokens, columns 2t and 2t + 1 of every eight that pass by. */
export interface ThreadPlace {
  readonly thread: Reg<'u32'>;
  readonly lane: Reg<'u32'>;
  /** First of the warp's own tokens, in the tile. */
  readonly warpRow: Reg<'u32'>;
  readonly g: Reg<'u32'>;
  readonly t2: Reg<'u32'>;
}

/** A CTA's tile, and what passes by. Tokens count from their sequence's first. */
export interface Work extends SequenceRegisters {
  readonly sequence: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  /** Head of Q; of a tile of keys, the one whose queries pass by. */
  readonly head: Reg<'u32'>;
  /** One after the last head whose queries pass by. */
  readonly headEnd: Reg<'u32'>;
  readonly firstOwn: Reg<'u32'>;
  /** The band: row i sees keys i + lower to i + upper. */
  readonly lower: Reg<'s32'>;
  readonly upper: Reg<'s32'>;
  /** Tiles that pass by, the last exclusive. */
  readonly firstTile: Reg<'s32'>;
  readonly lastTile: Reg<'s32'>;
  /** All pairs of a tile that begins at or after `wholeFrom` and ends at or before `wholeUntil` see each other. */
  readonly wholeFrom: Reg<'s32'>;
  readonly wholeUntil: Reg<'s32'>;
}

/** Bands beyond it are no limit, and sums of it and of a token fit in 32 bits. */
const NO_LIMIT = 2 ** 30;

/** @param firstThread the first that owns tokens; a multiple of 32 */
export function placeOf(b: KernelBuilder, firstThread = 0): ThreadPlace {
  const own = b.special('%tid.x');
  const thread = firstThread === 0 ? own : b.sub(own, firstThread);
  const lane = b.and(thread, 31);
  const warpRow = b.shl(b.shr(thread, 5), 4);
  return { thread, lane, warpRow, g: b.shr(lane, 2), t2: b.shl(b.and(lane, 3), 1) };
}

/** Ends CTAs that have no tile; to those that stay nothing passes by. */
export function workOf(frame: Owner): Work {
  const { b, config, integer, ownsQueries, ownTokens } = frame;
  b.section('which tile');
  const queryHeads = b.loadParameter(integer.queryHeads);
  const groupHeads = b.loadParameter(integer.headsPerKeyHead);
  const tiles = b.loadParameter(integer.tiles);
  const [rank, headAndSequence] = divide(b, frame.rank(), tiles);
  const [ownHead, sequence] = divide(b, headAndSequence, ownsQueries ? queryHeads : b.div(queryHeads, groupHeads));
  // Under a causal mask the last queries have the most keys, and the first keys the most queries: they start first.
  const tileIndex = config.banded && ownsQueries ? b.sub(b.sub(tiles, 1), rank) : rank;
  const keyHead = ownsQueries ? b.div(ownHead, groupHeads) : ownHead;
  const head = ownsQueries ? ownHead : b.mul(ownHead, groupHeads);
  const headEnd = ownsQueries ? b.add(head, 1) : b.add(head, groupHeads);
  const table = loadSequence(b, b.loadPointer(frame.pointer.sequences), sequence);
  const { queryLength, keyLength } = table;
  const firstOwn = b.mul(tileIndex, ownTokens);
  // Sequences shorter than the longest have no such tile.
  const isBeyond = b.setp('ge', firstOwn, ownsQueries ? queryLength : keyLength);
  if (!frame.stays) b.when(isBeyond, () => b.exit());

  const work = { ...table, sequence, keyHead, head, headEnd, firstOwn };
  const passing = passingOf(frame, table, firstOwn);
  if (frame.stays) b.when(isBeyond, () => b.mov(passing.firstTile, passing.lastTile));
  return { ...work, ...passing };
}

/** What passes by own tokens from `firstOwn` on. */
export function passingOf(
  frame: Owner,
  { queryLength, keyLength }: Pick<SequenceRegisters, 'queryLength' | 'keyLength'>,
  firstOwn: Reg<'u32'>,
): Pick<Work, 'lower' | 'upper' | 'firstTile' | 'lastTile' | 'wholeFrom' | 'wholeUntil'> {
  const { b, config, ownsQueries, ownTokens } = frame;
  b.section('what passes by');
  const [queries, keys] = [b.as(queryLength, 's32'), b.as(keyLength, 's32')];
  const streamLength = ownsQueries ? keys : queries;
  const [lower, upper] = [b.constant('s32', -NO_LIMIT), b.constant('s32', NO_LIMIT)];
  const begin = b.constant('s32', 0);
  const end = b.mov(streamLength);
  const wholeFrom = b.constant('s32', -NO_LIMIT);
  const wholeUntil = b.mov(streamLength);
  if (config.banded) {
    const { left, right, alignBottomRight } = frame.band;
    const shift = b.mul(b.sub(keys, queries), b.as(b.loadParameter(alignBottomRight), 's32'));
    b.max(b.sub(shift, b.loadParameter(left)), -NO_LIMIT, lower);
    b.min(b.add(shift, b.loadParameter(right)), NO_LIMIT, upper);
    const low = b.as(firstOwn, 's32');
    const high = b.min(b.add(low, ownTokens - 1), b.sub(ownsQueries ? queries : keys, 1));
    // Query i sees keys i + lower to i + upper; key j is seen by queries j - upper to j - lower.
    const [from, until] = ownsQueries
      ? [(token: Reg<'s32'>) => b.add(token, lower), (token: Reg<'s32'>) => b.add(token, upper)]
      : [(token: Reg<'s32'>) => b.sub(token, upper), (token: Reg<'s32'>) => b.sub(token, lower)];
    b.max(from(low), 0, begin);
    b.min(b.add(until(high), 1), end, end);
    b.mov(from(high), wholeFrom);
    b.min(b.add(until(low), 1), wholeUntil, wholeUntil);
  }
  const shiftOf = Math.log2(config.streamTokens);
  const firstTile = b.shr(begin, shiftOf);
  // None where `end` lies before `begin`.
  const lastTile = b.shr(b.add(end, config.streamTokens - 1), shiftOf);
  b.when(b.setp('le', end, begin), () => b.mov(firstTile, lastTile));
  return { lower, upper, firstTile, lastTile, wholeFrom, wholeUntil };
}

/** Sums of the gradients, by 8-channel tile. */
export interface Sums {
  /** dV; none where it is not computed. */
  readonly values: readonly (readonly Reg<'f32'>[])[];
  /** dK or dQ, without smScale; none where it is not computed. */
  readonly channels: readonly (readonly Reg<'f32'>[])[];
}

/** Which tile passes by, and the stage that it is in. */
export interface Passing {
  /** Head of Q. */
  readonly head: Reg<'u32'>;
  readonly tile: Reg<'s32'>;
  readonly stage: Reg<'u32'>;
}

/** Goes on to the next tile: through the tiles of a head, then to the next head. */
export function advance(b: KernelBuilder, { firstTile, lastTile }: Work, { head, tile }: Omit<Passing, 'stage'>): void {
  b.add(tile, 1, tile);
  const headEnds = b.setp('ge', tile, lastTile);
  b.when(headEnds, () => b.mov(firstTile, tile));
  b.when(headEnds, () => b.add(head, 1, head));
}
