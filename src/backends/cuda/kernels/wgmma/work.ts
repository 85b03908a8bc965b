/**
 * Items of work: a tile of Q rows of one head, or a split of its keys. Each role of a CTA goes through them by itself.
 */
import type { Reg } from '../../ptx/types.ts';
import { divide } from '../parts/addresses.ts';
import { type KeyRange, keyRange } from '../parts/band.ts';
import { listAddress, listRange } from '../parts/blocks.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type Frame, WGMMA_BLOCK_K } from './frame.ts';

export interface Work extends KeyRange {
  /** Where the tiles of keys are listed; `firstTile` and `lastTile` are positions in it then. Undefined: all are taken. */
  readonly list: Reg<'global'> | undefined;
  readonly split: Reg<'u32'> | undefined;
  /** Number of the tile of rows among all. */
  readonly item: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  /** First head of Q of the tile, and head of K and V. */
  readonly head: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  readonly paddedQueryStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  /** First row of the tile; rows are tokens, or `packedHeads` heads of each token. */
  readonly firstRow: Reg<'u32'>;
}

/** Emits `body` in a loop over this CTA's items of work; items without rows are left out. */
export function eachWork(frame: Frame, body: (work: Work) => void): void {
  const { b, config, integer, blocks } = frame;
  const index = b.special('%ctaid.x');
  const total = b.loadParameter(integer.work);
  b.loop(
    () => b.setp('lt', index, total),
    () => {
      b.section('which work');
      const { split, item, sequence, head, tileIndex } = itemOf(frame, index, total);
      const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
      const table = loadSequence(b, b.loadPointer(frame.pointer.sequences), sequence);
      const firstRow = b.mul(tileIndex, frame.rows);
      const firstToken = tokenOf(frame, firstRow);
      b.if(b.setp('lt', firstToken, table.queryLength), () => {
        const { queryLength, keyLength } = table;
        const low = b.as(firstToken, 's32');
        const tokens = Math.ceil(frame.rows / config.packedHeads);
        const high = b.min(b.add(low, tokens - 1), b.sub(b.as(queryLength, 's32'), 1));
        const range = keyRange(
          b,
          config.banded ? frame.band : undefined,
          { low, high, queryLength, keyLength },
          WGMMA_BLOCK_K,
          split === undefined || blocks !== undefined
            ? undefined
            : { split, splits: () => b.loadParameter(integer.splits) },
        );
        const work = { list: undefined, split, item, sequence, head, keyHead, firstRow, ...table, ...range };
        if (blocks === undefined) {
          body(work);
          return;
        }
        const queryTiles = b.loadParameter(integer.queryTiles);
        const unit = config.packedHeads === 1 ? head : b.shr(head, Math.log2(config.packedHeads));
        const list = listAddress(b, blocks, { sequence, head: unit, queryTiles, tileIndex });
        const share = split === undefined ? undefined : { split, splits: b.loadParameter(integer.splits) };
        body({ ...work, list, ...listRange(b, list, share) });
      });
      b.add(index, b.special('%nctaid.x'), index);
    },
  );
}

/** Heads come in groups that share the L2 cache; in a group all heads' longest tiles are first. */
function itemOf({ b, config, integer }: Frame, index: Reg<'u32'>, total: Reg<'u32'>) {
  const { packedHeads } = config;
  const queryHeads = b.loadParameter(integer.queryHeads);
  const headUnits = packedHeads === 1 ? queryHeads : b.shr(queryHeads, Math.log2(packedHeads));
  let item = index;
  let split: Reg<'u32'> | undefined;
  if (config.split) [split, item] = divide(b, item, b.loadParameter(integer.splits));
  const queryTiles = b.loadParameter(integer.queryTiles);
  const headGroup = b.loadParameter(integer.headGroup);
  const [inGroup, group] = divide(b, item, b.mul(queryTiles, headGroup));
  const units = b.div(total, config.split ? b.mul(queryTiles, b.loadParameter(integer.splits)) : queryTiles);
  const firstUnit = b.mul(group, headGroup);
  const [unitRank, tileRank] = divide(b, inGroup, b.min(headGroup, b.sub(units, firstUnit)));
  const [unit, sequence] = divide(b, b.add(firstUnit, unitRank), headUnits);
  const tileIndex = config.banded ? b.sub(b.sub(queryTiles, 1), tileRank) : tileRank;
  const head = packedHeads === 1 ? unit : b.shl(unit, Math.log2(packedHeads));
  return { split, item, sequence, head, tileIndex };
}

/** A row's token in its sequence. */
export function tokenOf({ b, config: { packedHeads } }: Frame, row: Reg<'u32'>): Reg<'u32'> {
  return packedHeads === 1 ? row : b.shr(row, Math.log2(packedHeads));
}
