/**
 * Lists the tiles of keys that the tiles of rows work on: within the band, and with a block that the caller's map has.
 * One warp makes the list of one tile of rows, 32 tiles of keys at a time.
 */
import { KernelBuilder } from '../ptx/builder.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel, Reg } from '../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from './parts/addresses.ts';
import { bandParameters, keyRange } from './parts/band.ts';
import { blockParameters, GROUP_KEYS, listAddress } from './parts/blocks.ts';
import { headAddress } from './parts/epilogue.ts';
import { loadSequence } from './parts/sequences.ts';
import { sumsOfWarp } from './parts/warp.ts';

export interface TileListsConfig {
  readonly target: Target;
  /** Rows and keys of a tile of the attention kernel; keys are a power of two. */
  readonly tileRows: number;
  /** Heads of Q that lie side by side as rows, so that a tile has `tileRows / packedHeads` tokens (at least one) of each. */
  readonly packedHeads: number;
  readonly tileKeys: number;
  readonly banded: boolean;
  /** The rows of each tile lie in one block: entries say which groups of keys are hidden. */
  readonly wholeRows: boolean;
}

export const TILE_LISTS_POINTERS = ['sequences'] as const;
export const TILE_LISTS_INTEGERS = ['queryTiles', 'lists'] as const;
/** Lists of a CTA, one warp each. */
export const TILE_LISTS_WARPS = 4;

export function tileLists({ target, tileRows, packedHeads, tileKeys, banded, wholeRows }: TileListsConfig): Kernel {
  const b = new KernelBuilder({ name: 'tileLists', target, threads: TILE_LISTS_WARPS * 32 });
  const pointer = pointers(b, TILE_LISTS_POINTERS);
  const integer = integers(b, TILE_LISTS_INTEGERS);
  const bandOf = bandParameters(b);
  const blocks = blockParameters(b);

  b.section('which list');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const index = b.mad(b.special('%ctaid.x'), TILE_LISTS_WARPS, b.shr(thread, 5));
  b.when(b.setp('ge', index, b.loadParameter(integer.lists)), () => b.exit());
  const queryTiles = b.loadParameter(integer.queryTiles);
  const [tileIndex, headAndSequence] = divide(b, index, queryTiles);
  const [unit, sequence] = divide(b, headAndSequence, b.loadParameter(blocks.integer.listHeads));
  const head = b.mul(unit, packedHeads);
  const tokens = tileRows / packedHeads;
  const { queryLength, keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const firstRow = b.mul(tileIndex, tokens);
  b.when(b.setp('ge', firstRow, queryLength), () => b.exit());
  const lastRow = b.min(b.add(firstRow, tokens - 1), b.sub(queryLength, 1));
  const [low, high] = [b.as(firstRow, 's32'), b.as(lastRow, 's32')];
  const { firstTile, lastTile } = keyRange(
    b,
    banded ? bandOf : undefined,
    { low, high, queryLength, keyLength },
    tileKeys,
    undefined,
  );
  const list = listAddress(b, blocks, { sequence, head: unit, queryTiles, tileIndex });

  b.section('blocks of the rows');
  const strides = { batch: blocks.pointer.mapBatch, head: blocks.pointer.mapHead };
  const map = headAddress(b, b.loadPointer(blocks.pointer.blockMap), { sequence, head }, strides);
  const [blockRows, blockKeys] = [b.loadParameter(blocks.integer.blockRows), b.loadParameter(blocks.integer.blockKeys)];
  const [firstRowBlock, lastRowBlock] = [b.div(firstRow, blockRows), b.div(lastRow, blockRows)];

  b.section('tiles');
  const count = b.constant('u32', 0);
  const first = b.mov(firstTile);
  b.loop(
    () => b.setp('lt', first, lastTile),
    () => {
      const tile = b.add(first, b.as(lane, 's32'));
      const [some, hidden] = [b.constant('u32', 0), b.constant('u32', 0)];
      b.if(b.setp('lt', tile, lastTile), () => {
        const firstKey = b.as(b.shl(tile, Math.log2(tileKeys)), 'u32');
        const lastKey = b.min(b.add(firstKey, tileKeys - 1), b.sub(keyLength, 1));
        const lastKeyBlock = b.div(lastKey, blockKeys);
        each(b, b.constant('u32', 0), b.constant('u32', packedHeads - 1), (packed) => {
          const ofHead = offset64(b, map, packed, b.loadParameter(blocks.pointer.mapHead));
          each(b, firstRowBlock, lastRowBlock, (rowBlock) => {
            const ofRow = offset64(b, ofHead, rowBlock, b.loadParameter(blocks.pointer.mapRow));
            each(b, b.div(firstKey, blockKeys), lastKeyBlock, (keyBlock) => {
              const flag = b.ldByte(offset64(b, ofRow, keyBlock, b.loadParameter(blocks.pointer.mapKey)));
              const isHidden = b.setp('eq', flag, 0);
              if (wholeRows) {
                const from = b.sub(b.max(b.mul(keyBlock, blockKeys), firstKey), firstKey);
                const to = b.sub(b.min(b.mul(b.add(keyBlock, 1), blockKeys), b.add(firstKey, tileKeys)), firstKey);
                const above = (key: Reg<'u32'>) => b.shl(b.constant('u32', 1), b.shr(key, Math.log2(GROUP_KEYS)));
                const groups = b.sub(above(to), above(from));
                b.when(isHidden, () => b.or(hidden, groups, hidden));
              } else b.when(isHidden, () => b.set(hidden, 1));
              b.when(b.notPred(isHidden), () => b.set(some, 1));
            });
          });
        });
      });
      const { before, total } = sumsOfWarp(b, lane, some);
      const at = offset(b, list, b.add(count, before), 4);
      const groups = wholeRows ? tileKeys / GROUP_KEYS : 0;
      const entry = b.as(b.shl(tile, 1 + groups), 'u32');
      if (wholeRows) {
        b.or(entry, b.shl(hidden, 1), entry);
        b.when(b.setp('ne', hidden, 0), () => b.or(entry, 1, entry));
      } else b.or(entry, hidden, entry);
      b.when(b.setp('ne', some, 0), () => b.st(entry, at, 4));
      b.add(count, total, count);
      b.add(first, 32, first);
    },
  );
  b.when(b.setp('eq', lane, 0), () => {
    b.st(count, list);
    b.st(b.constant('u32', 0), offset(b, list, count, 4), 4);
  });
  return b.build();
}

/** A loop over integers, the last inclusive. */
function each(b: KernelBuilder, first: Reg<'u32'>, last: Reg<'u32'>, body: (index: Reg<'u32'>) => void): void {
  const index = b.mov(first);
  b.loop(
    () => b.setp('le', index, last),
    () => {
      body(index);
      b.add(index, 1, index);
    },
  );
}
