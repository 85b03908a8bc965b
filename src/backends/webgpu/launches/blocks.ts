/** What attention kernels take of a block mask. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import type { Binding, BufferName, Unit } from './launch.ts';
import { extent, type Tile } from './stages.ts';

/** The binding of the map of a unit's tiles and heads; none without a block mask. */
export function blockSpans({ blocks, keyLength }: AttentionProblem, tiles: readonly Tile[], unit: Unit): Binding[] {
  if (blocks === undefined) return [];
  const { rows, keys, offset, strides } = blocks;
  const [batchStride, headStride, rowStride, keyStride] = strides;
  const lastKey = Math.max(0, Math.ceil(keyLength / keys) - 1) * keyStride;
  const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
    const start = offset + sequence * batchStride;
    const lastRow = Math.floor((first + Math.max(count, 1) - 1) / rows);
    return [start + Math.floor(first / rows) * rowStride, start + lastRow * rowStride + lastKey + 1];
  });
  const [first, end] = unit.heads;
  return [{ slot: 9, buffer: 'blockMap', start: low + first * headStride, end: high + (end - 1) * headStride }];
}

/** Values of `BLOCK_PARAMS`; none without a block mask. */
export function blockValues(
  { blocks }: AttentionProblem,
  base: (buffer: BufferName) => number,
): Readonly<Record<string, number>> {
  if (blocks === undefined) return {};
  const [mapBatchStride, mapHeadStride, mapRowStride, mapKeyStride] = blocks.strides;
  return {
    blockRows: blocks.rows,
    blockKeys: blocks.keys,
    ...{ mapBatchStride, mapHeadStride, mapRowStride, mapKeyStride },
    mapOffset: blocks.offset - base('blockMap'),
  };
}
