/** The tile of keys that a CTA takes. */
import { KernelBuilder } from '../../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../../ptx/layouts.ts';
import type { Parameter, Reg } from '../../../ptx/types.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, pointers } from '../../parts/addresses.ts';
import { nextPowerOfTwo } from '../../parts/constants.ts';
import { loadSequence } from '../../parts/sequences.ts';
import { isVisible, loadVisibleRange, visibleBitsAt } from '../visible-keys.ts';
import {
  HALF_TILE,
  KEY_VALUE_TILE,
  QUANTIZE_KEY_VALUE_INTEGERS,
  QUANTIZE_KEY_VALUE_POINTERS,
  type QuantizeKeyValueConfig,
  quantizeKeyValueThreads,
} from './config.ts';

/** K: a thread takes eight channels of rows `rowsAtOnce` apart, at most half a tile, which are all of one group. */
interface KeyLayout {
  readonly perRow: number;
  readonly rowsAtOnce: number;
  readonly passes: number;
  /** Which half of the tile a pass belongs to. */
  readonly halfOf: (pass: number) => number;
}

interface Place {
  readonly thread: Reg<'u32'>;
  readonly lane: Reg<'u32'>;
  readonly warp: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  /** Row of the sequence's head in `[sequence, head, channel]` vectors. */
  readonly sequenceHead: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  /** First token of the tile in its sequence, and its row in the padded outputs. */
  readonly firstToken: Reg<'u32'>;
  readonly firstRow: Reg<'u32'>;
  readonly paddedTokens: Reg<'u32'>;
  /** The first and last token of the tile that the band leaves to any row. */
  readonly firstSeen: Reg<'u32'>;
  readonly lastSeen: Reg<'u32'>;
}

export interface Tile extends Place {
  readonly b: KernelBuilder;
  readonly config: QuantizeKeyValueConfig;
  readonly fp8: boolean;
  readonly threads: number;
  readonly warps: number;
  readonly keyLayout: KeyLayout;
  readonly pointer: Record<(typeof QUANTIZE_KEY_VALUE_POINTERS)[number], Parameter<'u64'>>;
  readonly stride: Record<(typeof KEY_VALUE_STRIDES)[number], Parameter<'u64'>>;
  readonly shared: Reg<'shared'>;
  readonly rowMaxima: SharedTile;
  readonly valueMaxima: SharedTile;
  readonly faultWords: SharedTile;
  /** A word for each key. */
  readonly exponents: SharedTile;
  /** Which of the tile's tokens a mask shows to some row; undefined without a mask. */
  readonly isSeen: ((inTile: Reg<'u32'>) => Reg<'pred'>) | undefined;
}

export function makeTile(config: QuantizeKeyValueConfig): Tile {
  const { target, paddedDim } = config;
  const threads = quantizeKeyValueThreads(config);
  const warps = threads / 32;
  const minBlocksPerMultiprocessor = threads > 256 ? 1 : 2;
  const b = new KernelBuilder({ name: 'quantizeKeyValue', target, threads, minBlocksPerMultiprocessor });
  const pointer = pointers(b, QUANTIZE_KEY_VALUE_POINTERS);
  const integer = integers(b, QUANTIZE_KEY_VALUE_INTEGERS);
  const stride = pointers(b, KEY_VALUE_STRIDES);
  const perRow = Math.max(nextPowerOfTwo(paddedDim / 8), threads / HALF_TILE);
  const rowsAtOnce = threads / perRow;
  const halfOf = (pass: number) => Math.floor((pass * rowsAtOnce) / HALF_TILE);
  const keyLayout = { perRow, rowsAtOnce, passes: KEY_VALUE_TILE / rowsAtOnce, halfOf };
  const rowMaxima = b.shared('row maxima of K', 2, rowMajor(rowsAtOnce * 4));
  const valueMaxima = b.shared('maxima of V', 1, rowMajor(warps * 4));
  const faultWords = b.shared('faults', warps, rowMajor(16));
  const exponents = b.shared('exponents of K', 1, rowMajor(KEY_VALUE_TILE * 4));
  const shared = b.sharedAddress();
  const place = makePlace(b, pointer, integer);
  const memory = { shared, rowMaxima, valueMaxima, faultWords, exponents };
  const fp8 = config.valueFormat === 'e4m3';
  const isSeen = visibility(b, config, pointer, place);
  return { b, config, fp8, threads, warps, keyLayout, pointer, stride, ...memory, ...place, isSeen };
}

function makePlace(
  b: KernelBuilder,
  pointer: Tile['pointer'],
  integer: Record<(typeof QUANTIZE_KEY_VALUE_INTEGERS)[number], Parameter<'u32'>>,
): Place {
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
  b.when(b.setp('ge', firstToken, keyLength), () => b.exit());
  // Where no row sees a key, the first tile is filled with copies of the first.
  b.when(b.setp('ge', seenFrom, seenUntil), () => {
    b.set(seenFrom, 0);
    b.set(seenUntil, 1);
  });
  b.when(b.setp('ge', firstToken, seenUntil), () => b.exit());
  const isBefore = b.setp('le', b.add(firstToken, KEY_VALUE_TILE), seenFrom);
  b.when(b.andPred(isBefore, b.setp('gt', tile, 0)), () => b.exit());
  const firstSeen = b.sub(b.max(seenFrom, firstToken), firstToken);
  const lastSeen = b.sub(b.sub(seenUntil, firstToken), 1);
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  const firstRow = b.add(b.mad(head, paddedTokens, paddedKeyStart), firstToken);
  const tokens = { keyStart, paddedKeyStart, firstToken, firstRow, paddedTokens, firstSeen, lastSeen };
  return { thread, lane, warp, head, sequence, sequenceHead, ...tokens };
}

function visibility(
  b: KernelBuilder,
  { hiddenKeys }: QuantizeKeyValueConfig,
  pointer: Tile['pointer'],
  place: Place,
): Tile['isSeen'] {
  if (hiddenKeys === 'none') return undefined;
  const { head, paddedTokens, paddedKeyStart, firstToken } = place;
  const base = b.loadPointer(pointer.visibleKeys);
  const bits = visibleBitsAt(b, base, hiddenKeys, head, paddedTokens, b.add(paddedKeyStart, firstToken));
  const wordAt = (token: Reg<'u32'>) => offset(b, bits, b.shr(token, 5), 4);
  return (inTile) => {
    const token = clampToSeen(b, place, inTile);
    return isVisible(b, b.ld('b32', wordAt(token), 0, { readOnly: true }), token);
  };
}

/** The token itself, or the nearest in the interval of keys that a row may see. */
export function clampToSeen(
  b: KernelBuilder,
  { firstSeen, lastSeen }: Pick<Place, 'firstSeen' | 'lastSeen'>,
  inTile: Reg<'u32'>,
): Reg<'u32'> {
  return b.max(b.min(inTile, lastSeen), firstSeen);
}

/** Where element `index` of `2 ** shift` bytes lies in shared memory. */
export function sharedAt({ b }: Pick<Tile, 'b'>, base: Reg<'shared'>, index: Reg<'u32'>, shift: number): Reg<'shared'> {
  return b.add(base, b.as(b.shl(index, shift), 'shared'));
}

/** Takes a token that a mask hides from every row out of a maximum. */
export function leaveOutHidden({ b, isSeen }: Tile, largest: Reg<'u32'>, inTile: Reg<'u32'>): void {
  if (isSeen !== undefined) b.when(isSeen(inTile), () => b.set(largest, 0), true);
}

/** Takes a token that the band hides from every row out of a maximum. */
export function leaveOutUnseen({ b, firstSeen, lastSeen }: Tile, largest: Reg<'u32'>, inTile: Reg<'u32'>): void {
  b.when(b.setp('gt', inTile, lastSeen), () => b.set(largest, 0));
  b.when(b.setp('lt', inTile, firstSeen), () => b.set(largest, 0));
}
