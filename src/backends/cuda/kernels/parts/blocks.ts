/**
 * Block masks: the tiles of keys that a tile of rows works on are those in its list, which `tile-lists.ts` makes of the
 * caller's map, whatever the sizes of its blocks. A tile of which a part is hidden is marked there, and only such tiles
 * look at the map again.
 */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { integers, offset, offset64, pointers } from './addresses.ts';
import { partOf } from './band.ts';
import { headAddress } from './epilogue.ts';
import { at } from './lists.ts';
import type { EachScore } from './scores.ts';

/** Pointers, and strides of the map in bytes. */
export const BLOCK_POINTERS = ['tileLists', 'blockMap', 'mapBatch', 'mapHead', 'mapRow', 'mapKey'] as const;
/** Rows and keys of a block; heads, or groups of packed ones, that have lists of their own (1: all share theirs); words of a list. */
export const BLOCK_INTEGERS = ['blockRows', 'blockKeys', 'listHeads', 'listWords'] as const;

export interface BlockParameters {
  readonly pointer: Readonly<Record<(typeof BLOCK_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof BLOCK_INTEGERS)[number], Parameter<'u32'>>>;
}

export const blockParameters = (b: KernelBuilder): BlockParameters => ({
  pointer: pointers(b, BLOCK_POINTERS),
  integer: integers(b, BLOCK_INTEGERS),
});

/** Words of a list besides its entries: how many there are, before them, and one behind them, which is loaded ahead of need. */
export const LIST_WORDS = 2;

/** Keys of a group: sizes of blocks are multiples of it. */
export const GROUP_KEYS = 16;

/**
 * An entry is the tile, then a bit for each of its groups of keys that is hidden from all rows, then 1 where a part of it is hidden.
 *
 * @param groups bits of groups that entries have; 0 where the rows of a tile may lie in several blocks
 */
export const tileOfEntry = (b: KernelBuilder, entry: Reg<'u32'>, groups = 0): Reg<'s32'> =>
  b.as(b.shr(entry, 1 + groups), 's32');

/** A part of an entry's tile is hidden. */
export const isCutEntry = (b: KernelBuilder, entry: Reg<'u32'>): Reg<'pred'> => b.setp('ne', b.and(entry, 1), 0);

/** The list of a tile of rows. */
export function listAddress(
  b: KernelBuilder,
  { pointer, integer }: BlockParameters,
  {
    sequence,
    head,
    queryTiles,
    tileIndex,
  }: Readonly<Record<'sequence' | 'head' | 'queryTiles' | 'tileIndex', Reg<'u32'>>>,
): Reg<'global'> {
  const heads = b.loadParameter(integer.listHeads);
  const ofHead = b.mad(sequence, heads, b.min(head, b.sub(heads, 1)));
  const bytes = b.shl(b.loadParameter(integer.listWords), 2);
  return offset(b, b.loadPointer(pointer.tileLists), b.mad(ofHead, queryTiles, tileIndex), bytes);
}

/**
 * The positions in a list that are this CTA's, the last exclusive.
 *
 * @param share where the keys are split: this CTA's number, and how many there are
 */
export function listRange(
  b: KernelBuilder,
  list: Reg<'global'>,
  share: { readonly split: Reg<'u32'>; readonly splits: Reg<'u32'> } | undefined,
): { readonly firstTile: Reg<'s32'>; readonly lastTile: Reg<'s32'> } {
  const count = b.ld('u32', list, 0, { readOnly: true });
  if (share === undefined) return { firstTile: b.constant('s32', 0), lastTile: b.as(count, 's32') };
  const { first, end } = partOf(b, count, share.split, share.splits);
  return { firstTile: b.as(first, 's32'), lastTile: b.as(end, 's32') };
}

export const entryAddress = (b: KernelBuilder, list: Reg<'global'>, position: Reg<'s32'>): Reg<'global'> =>
  b.add(offset(b, list, b.as(position, 'u32'), 4), 4);

/** Loads an entry of a list. */
export const loadEntry = (
  b: KernelBuilder,
  list: Reg<'global'>,
  position: Reg<'s32'>,
  into = b.reg('u32'),
): Reg<'u32'> => b.ld('u32', offset(b, list, b.as(position, 'u32'), 4), 4, { readOnly: true, into });

/** Scores of a thread by rows and keys that lie in one block whatever its size: sizes are multiples of 16. */
export interface ScoreGroups {
  readonly sequence: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  /** A row of each group, which has the others' head and is among the same 16. */
  readonly rows: readonly { readonly head: Reg<'u32'>; readonly token: Reg<'u32'> }[];
  readonly rowGroup: (r: number) => number;
  /** A key of the first group of keys, columns from one group to the next, and groups. */
  readonly firstKey: Reg<'u32'>;
  readonly columns: 16 | 32;
  readonly groups: number;
  readonly eachScore: EachScore;
}

/** Excludes the scores of the groups of keys that an entry says are hidden. */
export function excludeHiddenGroups(b: KernelBuilder, entry: Reg<'u32'>, groups: number, eachScore: EachScore): void {
  for (let group = 0; group < groups; group++) {
    const isHidden = b.setp('ne', b.and(entry, 2 << group), 0);
    eachScore((score, _, column) => {
      if (Math.floor(column / GROUP_KEYS) === group) b.when(isHidden, () => b.set(score, Number.NEGATIVE_INFINITY));
    });
  }
}

/** Excludes the scores of hidden blocks. */
export function excludeHiddenBlocks(b: KernelBuilder, parameters: BlockParameters, scores: ScoreGroups): void {
  const { rows, rowGroup, columns, groups, eachScore } = scores;
  for (const m of rows.keys()) {
    const hidden = hiddenGroups(b, parameters, scores, m);
    for (let group = 0; group < groups; group++) {
      const isHidden = b.setp('ne', b.and(hidden, 2 ** group), 0);
      eachScore((score, r, column) => {
        if (rowGroup(r) !== m || Math.floor(column / columns) !== group) return;
        b.when(isHidden, () => b.set(score, Number.NEGATIVE_INFINITY));
      });
    }
  }
}

/** A bit for each group of keys that is hidden from a group of rows. A loop: scores take nearly all registers. */
function hiddenGroups(
  b: KernelBuilder,
  { pointer, integer }: BlockParameters,
  { sequence, queryLength, keyLength, rows, firstKey, columns, groups }: ScoreGroups,
  m: number,
): Reg<'u32'> {
  const { head, token } = at(rows, m);
  // Rows and keys beyond the last have no block, and need none.
  const blockOf = (index: Reg<'u32'>, length: Reg<'u32'>, size: Parameter<'u32'>) =>
    b.div(b.min(index, b.sub(length, 1)), b.loadParameter(size));
  const strides = { batch: pointer.mapBatch, head: pointer.mapHead };
  const ofHead = headAddress(b, b.loadPointer(pointer.blockMap), { sequence, head }, strides);
  const rowBlock = blockOf(token, queryLength, integer.blockRows);
  const ofRow = offset64(b, ofHead, rowBlock, b.loadParameter(pointer.mapRow));
  const hidden = b.constant('u32', 0);
  const bit = b.constant('u32', 1);
  const key = b.mov(firstKey);
  b.loop(
    () => b.setp('lt', bit, 2 ** groups),
    () => {
      const block = blockOf(key, keyLength, integer.blockKeys);
      const flag = b.ldByte(offset64(b, ofRow, block, b.loadParameter(pointer.mapKey)));
      b.when(b.setp('eq', flag, 0), () => b.or(hidden, bit, hidden));
      b.add(key, columns, key);
      b.add(bit, bit, bit);
    },
  );
  return hidden;
}
