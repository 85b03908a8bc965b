/** Launches of an append: copies of rows, and wider scales of the values held. */

import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import {
  COPY_ROWS_PARAMS,
  copiedRowWords,
  copyRowsKernel,
  FLAG_KEYS_PARAMS,
  flagKeysKernel,
  joinMaximaKernel,
  WIDEN_VALUES_PARAMS,
  widenValuesKernel,
} from '../kernels/cache.ts';
import { encodeParams, padDim } from '../kernels/layout.ts';
import { KEY_BLOCK } from '../kernels/prepare.ts';
import type { Launch } from './launch.ts';
import {
  allOf,
  extent,
  type KeyValueShape,
  launchesOf,
  operandSpan,
  partialSpan,
  rowSpan,
  type SequenceRecord,
  type Stages,
  type Tile,
  tablesBinding,
  tilesOf,
} from './stages.ts';

/** Bytes of a copied row of K and of V. */
export const rawRowBytes = ({ dtype, headDim, valueDim }: KeyValueShape) => ({
  rawKeys: copiedRowWords(dtype, headDim) * 4,
  rawValues: copiedRowWords(dtype, valueDim) * 4,
});

/** Where the copies of K or V are, as an operand of a problem. */
export function rawLayout(shape: KeyValueShape, operand: 'rawKeys' | 'rawValues'): OperandLayout {
  const tokenStride = rawRowBytes(shape)[operand] / BYTES_PER_ELEMENT[shape.dtype];
  return {
    offset: 0,
    batchStride: (shape.rowsPerHead / Math.max(1, shape.sequences)) * tokenStride,
    headStride: shape.rowsPerHead * tokenStride,
    tokenStride,
  };
}

/** Copies K and V of tokens `first` to the end of each sequence. */
export function copyLaunches(stages: Stages, first: number): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const bytes = BYTES_PER_ELEMENT[problem.dtype];
  const tiles: Tile[] = tilesOf(
    records.map(({ keyLength }) => keyLength - first),
    KEY_BLOCK,
  ).map((tile) => ({ ...tile, first: tile.first + first }));
  const tilesAt = tables.tiles(tiles);
  return (['k', 'v'] as const).flatMap((operand) => {
    const target = operand === 'k' ? 'rawKeys' : 'rawValues';
    const rowBytes = rawRowBytes(keyValue)[target];
    return launchesOf(
      stages,
      'copy rows',
      copyRowsKernel(problem.dtype, operand, operand === 'k' ? problem.headDim : problem.valueDim),
      allOf(tiles, problem.kvHeads),
      (unit) => [
        tablesBinding(stages),
        operandSpan(stages, 2, operand, tiles, unit),
        rowSpan(3, target, rowBytes, keyValue.rowsPerHead, unit.heads, rowsOf(stages, tiles, unit.tiles)),
      ],
      (unit, base) =>
        encodeParams(COPY_ROWS_PARAMS, {
          tileStart: unit.tiles[0],
          headStart: unit.heads[0],
          sequencesAt: stages.sequencesAt,
          tilesAt,
          headStride: problem[operand].headStride,
          tokenStride: problem[operand].tokenStride,
          base: base(operand) / bytes,
          rowsPerHead: keyValue.rowsPerHead,
          rowBase: base(target) / 4,
        }),
    );
  });
}

/**
 * Flags of the keys from `from` to the end of each sequence: those that count in statistics.
 *
 * @param first the first key added, where the mask begins
 */
export function flagLaunches(stages: Stages, from: number, first: number, masked: boolean): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const keyStride = problem.mask?.strides[3] ?? 0;
  const tiles: Tile[] = tilesOf(
    records.map(({ keyLength }) => keyLength - from),
    KEY_BLOCK,
  ).map((tile) => ({ ...tile, first: tile.first + from }));
  const tilesAt = tables.tiles(tiles);
  return launchesOf(
    stages,
    'flag keys',
    flagKeysKernel(masked),
    allOf(tiles, 1),
    (unit) => {
      const [low, high] = extent(tiles, unit.tiles, (tile) => {
        const { mask } = records[tile.sequence] as SequenceRecord;
        const [start, end] = [tile.first - first, tile.first + tile.count - first].map((token) => Math.max(0, token));
        return [mask + (start as number) * keyStride, mask + Math.max(0, (end as number) - 1) * keyStride + 1];
      });
      return [
        tablesBinding(stages),
        ...(masked ? [{ slot: 2, buffer: 'mask' as const, start: low, end: high }] : []),
        rowSpan(3, 'visible', 4, keyValue.rowsPerHead, unit.heads, rowsOf(stages, tiles, unit.tiles)),
      ];
    },
    (unit, base) =>
      encodeParams(FLAG_KEYS_PARAMS, {
        tileStart: unit.tiles[0],
        sequencesAt: stages.sequencesAt,
        tilesAt,
        firstAdded: first,
        maskKeyStride: keyStride,
        maskBase: base('mask'),
        visibleBase: base('visible') / 4,
      }),
  );
}

const rowsOf = ({ records }: Stages, tiles: readonly Tile[], range: readonly [number, number]) =>
  extent(tiles, range, ({ sequence, first, count }) => {
    const at = (records[sequence] as SequenceRecord).keyRow + first;
    return [at, at + count];
  });

/**
 * Widens the scales of the first `first` values of each sequence where the values of the appended tokens are
 * larger.
 *
 * @param added the shape under which the added tokens' statistics were taken
 */
export function widenLaunches(stages: Stages, first: number, added: KeyValueShape): Launch[] {
  const { keyValue, records, tables, problem } = stages;
  const { headDim, valueDim, values, layout, chunks, sequences, rowsPerHead } = keyValue;
  const config = { headDimPadded: padDim(headDim), valueDimPadded: padDim(valueDim), values, layout };
  const valueBytes = config.valueDimPadded * 2;
  const blocks: Tile[] = tilesOf(
    records.map(() => first),
    KEY_BLOCK,
  );
  const each: Tile[] = records.map((_, sequence) => ({ sequence, first: 0, count: 1 }));
  return (
    [
      ['widen values', widenValuesKernel(config), blocks],
      ['join maxima', joinMaximaKernel(config), each],
    ] as const
  ).flatMap(([label, code, tiles]) => {
    const tilesAt = tables.tiles(tiles);
    return launchesOf(
      stages,
      label,
      code,
      allOf(tiles, problem.kvHeads),
      (unit) => [
        tablesBinding(stages),
        partialSpan(stages, 2, unit.heads),
        partialSpan(stages, 3, unit.heads, 'newPartials', { keyValue: added }),
        ...(tiles === blocks
          ? [
              rowSpan(
                4,
                'values',
                valueBytes,
                rowsPerHead,
                unit.heads,
                extent(tiles, unit.tiles, ({ sequence, first: row }) => {
                  const at = (records[sequence] as SequenceRecord).keyRow + row;
                  return [at, at + KEY_BLOCK];
                }),
              ),
            ]
          : []),
      ],
      (unit, base) =>
        encodeParams(WIDEN_VALUES_PARAMS, {
          tileStart: unit.tiles[0],
          headStart: unit.heads[0],
          sequences,
          chunks,
          newChunks: added.chunks,
          sequencesAt: stages.sequencesAt,
          tilesAt,
          rowsPerHead,
          rowBase: base('values') / 4,
          partialBase: base('partials') / 16,
          newPartialBase: base('newPartials') / 16,
        }),
    );
  });
}
