/** Block masks: the launch that lists the tiles of keys of each tile of rows, and what kernels with lists take. */
import { isBanded } from '../../../attention/band.ts';
import { BLOCK_INTEGERS, BLOCK_POINTERS, LIST_WORDS } from '../kernels/parts/blocks.ts';
import {
  TILE_LISTS_INTEGERS,
  TILE_LISTS_POINTERS,
  TILE_LISTS_WARPS,
  type TileListsConfig,
  tileLists,
} from '../kernels/tile-lists.ts';
import { bandArguments, inOrder, launch, moduleOf, pointer, u32, u64 } from './arguments.ts';
import type { Context } from './context.ts';
import type { BufferName, KernelArgument, KernelLaunch } from './launch.ts';

/** The tiles of an attention kernel. */
export interface ListedTiles {
  readonly tileRows: number;
  /** Heads side by side as rows. */
  readonly packedHeads: number;
  readonly tileKeys: number;
  /** Entries say which groups of keys are hidden; default false. See `TileListsConfig`. */
  readonly wholeRows?: boolean;
  /** Tiles of the longest sequence's rows. */
  readonly queryTiles: number;
}

const listWordsOf = ({ problem }: Context, { tileKeys }: ListedTiles) =>
  Math.ceil(problem.keyLength / tileKeys) + LIST_WORDS;

const listsOf = ({ problem }: Context, { queryTiles, packedHeads }: ListedTiles) => {
  const heads = problem.blocks?.strides[1] === 0 ? 1 : problem.queryHeads / packedHeads;
  return { heads, count: problem.batch * heads * queryTiles };
};

/** Arguments of `BlockParameters`; none without a block mask. */
export function blockArgumentsOf(context: Context, tiles: ListedTiles): KernelArgument[] {
  const { blocks } = context.problem;
  if (blocks === undefined) return [];
  const [mapBatch, mapHead, mapRow, mapKey] = blocks.strides;
  return [
    ...inOrder(BLOCK_POINTERS, {
      tileLists: pointer('tileLists'),
      blockMap: pointer('blockMap', blocks.offset),
      mapBatch: u64(mapBatch),
      mapHead: u64(mapHead),
      mapRow: u64(mapRow),
      mapKey: u64(mapKey),
    }),
    ...inOrder(BLOCK_INTEGERS, {
      blockRows: u32(blocks.rows),
      blockKeys: u32(blocks.keys),
      listHeads: u32(listsOf(context, tiles).heads),
      listWords: u32(listWordsOf(context, tiles)),
    }),
  ];
}

/** Scratch of the lists. */
export function tileListScratch(context: Context, tiles: ListedTiles): Record<BufferName, number> {
  if (context.problem.blocks === undefined) return {};
  return { tileLists: listsOf(context, tiles).count * listWordsOf(context, tiles) * 4 };
}

/** Makes the lists; no launch without a block mask. */
export function tileListLaunches(context: Context, tiles: ListedTiles): KernelLaunch[] {
  const { problem, device } = context;
  if (problem.blocks === undefined) return [];
  const { queryTiles, wholeRows = false, ...tile } = tiles;
  const config: TileListsConfig = { target: device.target, ...tile, banded: isBanded(problem.band), wholeRows };
  const { count } = listsOf(context, tiles);
  const blocks = Math.ceil(count / TILE_LISTS_WARPS);
  return [
    launch('list tiles', moduleOf('tileLists', tileLists, config), 'tileLists', blocks, TILE_LISTS_WARPS * 32, 0, [
      ...inOrder(TILE_LISTS_POINTERS, { sequences: pointer('sequences') }),
      ...inOrder(TILE_LISTS_INTEGERS, { queryTiles: u32(queryTiles), lists: u32(count) }),
      ...bandArguments(problem.band),
      ...blockArgumentsOf(context, tiles),
    ]),
  ];
}
