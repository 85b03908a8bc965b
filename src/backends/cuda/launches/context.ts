/**
 * What the launches of one call share: the problem, its kernel on its target, and where sequences lie in padded
 * buffers.
 */
import { type Band, NO_LIMIT, visibleKeys } from '../../../attention/band.ts';
import { type AttentionProblem, type MaskLayout, type Sequence, sequencesOf } from '../../../attention/problem.ts';
import { InvalidArgumentError, UnsupportedOptionError } from '../../../errors.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { BLOCK_K, scalesEachTile as ofEachTile } from '../kernels/mma-sync/config.ts';
import type { TileConfig } from '../kernels/mma-sync/tiles.ts';
import { roundUp } from '../kernels/parts/constants.ts';
import { BYTES, type LoadWidth } from '../kernels/parts/elements.ts';
import { SEQUENCE_INTS } from '../kernels/parts/sequences.ts';
import type { HiddenKeys } from '../kernels/quantize/visible-keys.ts';
import type { WgmmaTuning } from '../kernels/wgmma/table.ts';
import type { Target } from '../ptx/targets.ts';
import type { BufferName, KernelLaunch, LaunchSequence } from './launch.ts';
import { keepsQuery, type Scheme, schemeOf, targetOfKernel } from './scheme.ts';

/** What planning needs to know of a device. */
export interface DeviceFacts {
  readonly target: Target;
  readonly multiprocessors: number;
  /**
   * Alignment in bytes that the addresses of q, k and v are known to have; default 16, which allocations always have.
   */
  readonly pointerAlignment?: number;
}

/** What the tables of the kernel families answer. */
export type Tuning = TileConfig & WgmmaTuning;

/** Room for keys that more will be appended to: what a cache has, and which part of it is worked on. */
export interface KeyRoom {
  /** Tokens that each sequence has room for at least. */
  readonly capacity: number;
  /** First token that is worked on, a multiple of the kernels' tiles of keys (at most 128); default 0. */
  readonly from?: number;
}

/** Rows of Q to which sequences are padded. */
export const BLOCK_Q = 128;

/** Everything about a call that its launches share. */
export interface Context {
  readonly problem: AttentionProblem;
  /** Rows of Q are heads: all see the same keys. */
  readonly rowsAreHeads: boolean;
  /** How quantizers know of keys that a mask hides from every row. */
  readonly hiddenKeys: HiddenKeys;
  readonly choice: KernelChoice;
  readonly device: DeviceFacts;
  readonly layout: PaddedLayout;
  readonly scheme: Scheme;
  /** Replaces parts of the table's answer: for measurements. */
  readonly overrides: Partial<Tuning>;
  /** Where the problem's channels of V lie in the output. */
  readonly channels: ValueChannels;
  /** Where K and V lie in pages. */
  readonly pages?: PageLayout;
}

/** K and V in pages of a pool. */
export interface PageLayout {
  /** A power of two, a multiple of the kernels' tiles of keys. */
  readonly pageTokens: number;
  /** Pages that a table may name; behind them lies one more, whose keys are not finite. */
  readonly poolPages: number;
  readonly pagesPerSequence: number;
}

/** A part of the channels of V. */
export interface ValueChannels {
  readonly first: number;
  /** Of the whole output. */
  readonly of: number;
}

/** Where sequences lie in the padded buffers. */
export interface PaddedLayout {
  /** Rows of Q and of K of all sequences, padded. */
  readonly paddedQueries: number;
  readonly paddedKeys: number;
  /** Longest padded sequences, and tiles in them. */
  readonly queryTiles: number;
  readonly keyTiles: number;
  readonly table: Int32Array;
}

interface ContextOptions {
  readonly room?: KeyRoom | undefined;
  readonly overrides?: Partial<Tuning> | undefined;
  readonly whole?: boolean;
  readonly tokenMask?: MaskLayout | undefined;
  readonly channels?: ValueChannels | undefined;
  readonly pages?: PageLayout | undefined;
}

/** The parts of quantizing K and V. A cache keeps its means, and the tiles that nothing was appended to. */
export type KeyValuePart = 'means' | 'key' | 'value';

/** The launches of a kernel family: its row in `FAMILIES` (plan.ts). */
export interface FamilyLaunches {
  /** Largest |smScale|; beyond it scores are no longer told apart. */
  readonly mostSmScale: number;
  /** Tokens to whose multiples sequences of quantized keys are padded; default {@link BLOCK_K}. */
  readonly keyPadding?: number;
  /** The problem as the kernels take it, with heads as rows of one query; undefined where they take it as it is. */
  readonly headsAsRows?: (problem: AttentionProblem, choice: KernelChoice) => AttentionProblem | undefined;
  /** Launches of problems that another family's kernels attend to faster, over keys and values as this one quantizes them. */
  readonly insteadFor?: (problem: AttentionProblem, choice: KernelChoice) => FamilyLaunches | undefined;
  /** Quantizes K and V. Asked only when there are keys. */
  readonly keyValue: (context: Context, parts: readonly KeyValuePart[]) => KernelLaunch[];
  /** Quantizes Q and attends to quantized K and V. */
  readonly attend: (context: Context) => Pick<LaunchSequence, 'launches' | 'scratch' | 'zeroed'>;
}

/**
 * Padded places of a problem's sequences; with `room`, each sequence of a dense problem has its own.
 *
 * @param visibleOf interval of a sequence's keys that its rows may see
 */
function paddedLayoutOf(
  problem: AttentionProblem,
  room: KeyRoom | undefined,
  keyPadding: number,
  visibleOf: (sequence: Sequence) => readonly [first: number, end: number],
): PaddedLayout {
  const from = room?.from ?? 0;
  const sequences = sequencesOf(problem);
  const table = new Int32Array(sequences.length * SEQUENCE_INTS);
  let paddedQueries = 0;
  let paddedKeys = 0;
  for (const sequence of sequences) {
    const { index, queryStart, queryLength, keyStart, keyLength } = sequence;
    const keys = [keyStart + from, keyLength - from] as const;
    const visible = visibleOf(sequence).map((key) => key - from);
    table.set([queryStart, queryLength, ...keys, paddedQueries, paddedKeys + from, ...visible], index * SEQUENCE_INTS);
    paddedQueries += roundUp(queryLength, BLOCK_Q);
    paddedKeys += roundUp(room?.capacity ?? keyLength, keyPadding);
  }
  const largestRow = Math.max(problem.queryHeads * paddedQueries, problem.kvHeads * paddedKeys);
  if (largestRow >= 2 ** 31 || Math.max(problem.queryLength, problem.keyLength) >= NO_LIMIT) {
    throw new InvalidArgumentError(
      'unsupported-size',
      'q',
      'fewer than 2^31 padded tokens over all heads and sequences, and sequences shorter than 2^30',
      `${largestRow} tokens`,
    );
  }
  return {
    paddedQueries,
    paddedKeys,
    queryTiles: Math.ceil(problem.queryLength / BLOCK_Q),
    keyTiles: Math.ceil((problem.keyLength - from) / BLOCK_K),
    table,
  };
}

/** The largest load that an operand's place in memory allows. */
export function loadWidthOf(operand: OperandLayout, dim: number, dtype: DType, alignment: number): LoadWidth {
  const whole = [operand.offset, operand.batchStride, operand.headStride, operand.tokenStride, dim];
  for (const width of [8, 4, 2] as const) {
    const bytes = Math.min(16, width * BYTES[dtype]);
    if (alignment % bytes === 0 && whole.every((elements) => elements % width === 0)) return width;
  }
  return 1;
}

/** What the quantizers of a whole call read of its mask. */
function hiddenKeysOf({ mask }: AttentionProblem): HiddenKeys {
  if (mask === undefined) return 'none';
  return mask.strides[1] === 0 ? 'of all heads' : 'of each head';
}

/**
 * The context of a call whose kernel belongs to `family`.
 *
 * @param whole of a call that ends with its attention: what no row of it sees counts in no mean and no scale. Keys that
 *     are kept count all, from `room` on, but for those that `tokenMask` leaves out
 * @param tokenMask of keys that are kept: buffer `mask`, alike for all heads and rows
 */
export function contextOf(
  family: FamilyLaunches,
  asked: AttentionProblem,
  chosen: KernelChoice,
  given: DeviceFacts,
  {
    room,
    overrides = {},
    whole = false,
    tokenMask,
    channels = { first: 0, of: asked.valueDim },
    pages,
  }: ContextOptions,
): Context {
  if (Math.abs(asked.smScale) > family.mostSmScale) {
    const expected = `at most 2^${Math.log2(family.mostSmScale)} in magnitude`;
    throw new UnsupportedOptionError(chosen.descriptor.name, 'options.smScale', expected, `${asked.smScale}`);
  }
  const device = { ...given, target: targetOfKernel(chosen, given.target) };
  // Smoothing Q serves to quantize it.
  const choice = !whole && keepsQuery(asked, chosen, device.target) ? { ...chosen, smoothQ: false as const } : chosen;
  const grouped = family.headsAsRows?.(asked, choice);
  const settled = grouped ?? asked;
  const called = grouped === undefined || pages === undefined ? settled : { ...settled, band: bandOfToken(asked) };
  // One row sees the tokens that count.
  const problem = tokenMask === undefined ? called : { ...called, queryLength: 1, mask: tokenMask };
  const layout = paddedLayoutOf(problem, room, family.keyPadding ?? BLOCK_K, (sequence) =>
    // Heads as rows have the band of one token.
    whole
      ? visibleKeys(asked, { ...sequence, queryLength: grouped === undefined ? sequence.queryLength : 1 })
      : [room?.from ?? 0, sequence.keyLength],
  );
  const hiddenKeys = whole || tokenMask !== undefined ? hiddenKeysOf(problem) : 'none';
  const scheme = schemeOf(problem, choice, device.target, !whole);
  return {
    problem,
    rowsAreHeads: grouped !== undefined,
    hiddenKeys,
    choice,
    device,
    layout,
    scheme,
    overrides,
    channels,
    ...(pages && { pages }),
  };
}

/**
 * What one token sees of keys whose number the kernel learns: at most `keyLength`. A side that hides nothing is none, which is
 * faster.
 */
function bandOfToken({ band: { lower, upper, align }, keyLength }: AttentionProblem): Band {
  const [first, last] = align === 1 ? [1 - keyLength, 0] : [0, keyLength - 1];
  return { lower: lower <= first ? -NO_LIMIT : lower, upper: upper >= last ? NO_LIMIT : upper, align };
}

/** K in pages is smoothed by one vector for each head: pages may belong to several sequences. */
export const oneMean = ({ pages }: Context): { readonly oneMean?: true } =>
  pages === undefined ? {} : { oneMean: true };

export const scalesEachTile = ({ pages, scheme }: Context): boolean =>
  ofEachTile({ pvFormat: scheme.pvFormat, pageTokens: pages?.pageTokens });

export const constantsOf = ({ layout }: Context): Record<BufferName, Uint8Array> => ({
  sequences: new Uint8Array(layout.table.buffer),
});

/** Parts that are worth joining. */
const MOST_SPLITS = 64;
/**
 * Parts for each sequence on average, where sequences are of unequal lengths and more than fill the card. With T the time of all keys, n CTAs
 * at a time and parts of T / (3 B H), the last to start ends at most T / (3 B H) after T / n: a tenth of it with B H = 4 n.
 */
const PARTS_OF_SEQUENCE = 4;

/**
 * Into how many parts the keys are split so that the card is filled; 1 when it is anyway.
 *
 * @param keyTiles tiles of the longest sequence's keys
 * @param leastTiles a part of fewer is not worth its prologue
 * @param blocks thread blocks without a split
 * @param residentBlocks thread blocks that share a multiprocessor
 */
export function splitsOf(
  { multiprocessors }: DeviceFacts,
  keyTiles: number,
  leastTiles: number,
  blocks: number,
  residentBlocks: number,
): number {
  const most = Math.max(1, Math.floor(keyTiles / leastTiles));
  return Math.max(1, Math.min(MOST_SPLITS, most, Math.floor((multiprocessors * residentBlocks) / Math.max(1, blocks))));
}

/** Splits where each sequence has as many as its length asks for. */
export interface LengthSplitCounts {
  /** Of each head, for all sequences together. */
  readonly slots: number;
  readonly mostSplits: number;
}

/**
 * The same where sequences are of unequal lengths, or of lengths that only the device knows; undefined where nothing is gained.
 *
 * @param blocks thread blocks without a split
 * @param mostJoined parts that the last CTA of a sequence joins at most
 */
export function lengthSplitsOf(
  { problem, device, layout, pages }: Context,
  leastTiles: number,
  blocks: number,
  residentBlocks: number,
  mostJoined: number,
): LengthSplitCounts | undefined {
  const { batch } = problem;
  const tiles = sequencesOf(problem).map(({ keyLength }) => Math.ceil(keyLength / BLOCK_K));
  const isUnequal = pages !== undefined || tiles.some((own) => own !== tiles[0]);
  const mostSplits = Math.min(MOST_SPLITS, mostJoined, Math.floor(layout.keyTiles / leastTiles));
  if (!isUnequal || mostSplits < 2) return undefined;
  const heads = blocks / batch;
  const filling = Math.floor((device.multiprocessors * residentBlocks) / heads);
  const slots = Math.min(Math.max(filling, PARTS_OF_SEQUENCE * batch), mostSplits * batch);
  return { slots: Math.max(slots, batch + 1), mostSplits };
}
