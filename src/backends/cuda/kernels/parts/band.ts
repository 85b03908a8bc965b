/** Which keys the rows of a tile see, and which tiles of keys those are. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';

/** A causal or windowed problem's parameters; see `launches/arguments.ts`. */
export interface BandParameters {
  readonly left: Parameter<'s32'>;
  readonly right: Parameter<'s32'>;
  readonly alignBottomRight: Parameter<'u32'>;
}

export const bandParameters = (b: KernelBuilder): BandParameters => ({
  left: b.parameter('bandLeft', 's32'),
  right: b.parameter('bandRight', 's32'),
  alignBottomRight: b.parameter('alignBottomRight', 'u32'),
});

/** Rows of a tile as tokens of their sequence, and the sequence. */
export interface TileRows {
  readonly low: Reg<'s32'>;
  readonly high: Reg<'s32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
}

export interface KeyRange {
  /** Keys that a row sees lie `lower`..`upper` from it. */
  readonly lower: Reg<'s32'>;
  readonly upper: Reg<'s32'>;
  /** Tiles of keys that some row sees, the last exclusive. */
  readonly firstTile: Reg<'s32'>;
  readonly lastTile: Reg<'s32'>;
  /**
   * All rows see all keys of a tile that begins at or after `wholeFrom` (undefined: 0) and ends at or before
   * `wholeUntil`.
   */
  readonly wholeFrom: Reg<'s32'> | undefined;
  readonly wholeUntil: Reg<'s32'>;
}

/** The part `index` of `parts` of so many things, up to 2^24: parts differ by one at most. */
export function partOf(
  b: KernelBuilder,
  count: Reg<'u32'>,
  index: Reg<'u32'>,
  parts: Reg<'u32'>,
): { readonly first: Reg<'u32'>; readonly end: Reg<'u32'> } {
  const before = (part: Reg<'u32'>) => b.div(b.mul(count, part), parts);
  return { first: before(index), end: before(b.add(index, 1)) };
}

/**
 * @param band undefined where every row sees every key
 * @param tileKeys keys of a tile, a power of two
 * @param share of the tiles where the keys are split: this CTA's number, and how many there are
 */
export function keyRange(
  b: KernelBuilder,
  band: BandParameters | undefined,
  { low, high, queryLength, keyLength }: TileRows,
  tileKeys: number,
  share: { readonly split: Reg<'u32'>; readonly splits: () => Reg<'u32'> } | undefined,
): KeyRange {
  const length = b.as(keyLength, 's32');
  const lower = b.constant('s32', 0);
  const upper = b.constant('s32', 0);
  let wholeFrom: Reg<'s32'> | undefined;
  let wholeUntil = length;
  let begin = b.constant('s32', 0);
  let end = b.mov(length);
  if (band !== undefined) {
    const alignBottomRight = () => b.as(b.loadParameter(band.alignBottomRight), 's32');
    const shift = b.mul(b.sub(length, b.as(queryLength, 's32')), alignBottomRight());
    b.sub(shift, b.loadParameter(band.left), lower);
    b.add(shift, b.loadParameter(band.right), upper);
    begin = b.max(b.add(low, lower), 0);
    end = b.min(end, b.add(b.add(high, upper), 1));
    wholeFrom = b.add(high, lower);
    wholeUntil = b.min(length, b.add(b.add(low, upper), 1));
  }
  const firstTile = b.shr(begin, Math.log2(tileKeys));
  const endTile = b.shr(b.add(end, tileKeys - 1), Math.log2(tileKeys));
  const range = { lower, upper, wholeFrom, wholeUntil };
  if (share === undefined) return { ...range, firstTile, lastTile: endTile };
  const splits = share.splits();
  const count = b.as(b.max(b.sub(endTile, firstTile), 0), 'u32');
  const part = partOf(b, count, share.split, splits);
  return {
    ...range,
    firstTile: b.add(firstTile, b.as(part.first, 's32')),
    lastTile: b.add(firstTile, b.as(part.end, 's32')),
  };
}
