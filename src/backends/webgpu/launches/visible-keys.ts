/** Flags of the keys that a mask lets any row see. */
import { isBanded } from '../../../attention/band.ts';
import type { AttentionProblem, MaskLayout } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { encodeParams } from '../kernels/layout.ts';
import {
  MASK_MAXIMA_PARAMS,
  MAXIMA_ROWS,
  maskMaximaKernel,
  VISIBLE_KEYS,
  VISIBLE_KEYS_PARAMS,
  visibleKeysKernel,
} from '../kernels/visible-keys.ts';
import type { Binding, BufferName, Launch } from './launch.ts';
import {
  allOf,
  extent,
  type KeyValueShape,
  launchesOf,
  rowSpan,
  type SequenceRecord,
  type Stages,
  tablesBinding,
  tilesOf,
} from './stages.ts';

/** Heads and rows that a mask has of its own: one where it broadcasts. */
export function maskSizes(problem: AttentionProblem, { dtype, strides: [, head, query] }: MaskLayout) {
  const { queryHeads, kvHeads, queryLength } = problem;
  const perHead = head !== 0;
  // The largest entry that a row sees is another one in every row where there is a band.
  const perRow = query !== 0 || (dtype !== 'bool' && isBanded(problem.band));
  return {
    queryHeads: perHead ? queryHeads : 1,
    /** Heads with flags of their own. */
    keyHeads: perHead ? kvHeads : 1,
    members: perHead ? queryHeads / Math.max(1, kvHeads) : 1,
    rows: perRow ? queryLength : Math.min(1, queryLength),
    banded: perRow && isBanded(problem.band),
  };
}

/** Whether statistics of K and V need flags. */
export const needsVisibleKeys = ({ problem, keyValue }: Pick<Stages, 'problem' | 'keyValue'>): boolean =>
  problem.mask !== undefined && problem.keyLength > 0 && (keyValue.smoothK || keyValue.values.scaled);

/** Between the flags of two heads of K; 0 where the mask is the same for all heads. */
export const visibleHeadStride = (problem: AttentionProblem, keyValue: KeyValueShape): number =>
  problem.mask === undefined || problem.mask.strides[1] === 0 ? 0 : keyValue.rowsPerHead;

/** Bytes of the flags, and of the rows' maxima of an additive mask. */
export function visibleKeysBytes(stages: Stages): Partial<Record<BufferName, number>> {
  const { problem, keyValue, rowsPerQueryHead } = stages;
  const { mask } = problem;
  if (mask === undefined || !needsVisibleKeys(stages)) return {};
  const { keyHeads, queryHeads } = maskSizes(problem, mask);
  const visible = keyHeads * keyValue.rowsPerHead * 4;
  return mask.dtype === 'bool' ? { visible } : { visible, maskMaxima: queryHeads * rowsPerQueryHead * 4 };
}

export function visibleKeysLaunches(stages: Stages): Launch[] {
  const { problem, records, tables } = stages;
  const { mask } = problem;
  if (mask === undefined || !needsVisibleKeys(stages)) return [];
  const { rows } = maskSizes(problem, mask);
  const rowTiles = tilesOf(
    records.map(({ queryLength }) => Math.min(rows, queryLength)),
    MAXIMA_ROWS,
  );
  const keyTiles = tilesOf(
    records.map(({ keyLength }) => keyLength),
    VISIBLE_KEYS,
  );
  const [rowTilesAt, keyTilesAt] = [tables.tiles(rowTiles), tables.tiles(keyTiles)];
  return [
    ...(mask.dtype === 'bool' ? [] : maximaLaunches(stages, mask, rowTiles, rowTilesAt)),
    ...flagLaunches(stages, mask, keyTiles, keyTilesAt),
  ];
}

type Tiles = ReturnType<typeof tilesOf>;

/** The largest entries of an additive mask's rows, `tiles` of {@link MAXIMA_ROWS}. */
export function maximaLaunches(
  stages: Omit<Stages, 'keyValue'>,
  mask: MaskLayout,
  tiles: Tiles,
  tilesAt: number,
): Launch[] {
  const { problem, records, rowsPerQueryHead } = stages;
  const [, headStride, queryStride, keyStride] = mask.strides;
  const bytes = BYTES_PER_ELEMENT[mask.dtype];
  const { queryHeads, banded } = maskSizes(problem, mask);
  return launchesOf(
    stages,
    'mask maxima',
    maskMaximaKernel({ mask: mask.dtype, banded }),
    allOf(tiles, queryHeads),
    (unit) => {
      const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
        const { mask: start, keyLength } = records[sequence] as SequenceRecord;
        const row = start + first * queryStride;
        return [row, row + (count - 1) * queryStride + Math.max(0, keyLength - 1) * keyStride + 1];
      });
      const rowRange = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
        const row = (records[sequence] as SequenceRecord).queryRow + first;
        return [row, row + count];
      });
      const [h0, h1] = unit.heads;
      return [
        tablesBinding(stages),
        {
          slot: 5,
          buffer: 'mask',
          start: (low + h0 * headStride) * bytes,
          end: (high + (h1 - 1) * headStride) * bytes,
        },
        rowSpan(6, 'maskMaxima', 4, rowsPerQueryHead, unit.heads, rowRange),
      ];
    },
    (unit, base) =>
      encodeParams(MASK_MAXIMA_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequencesAt: stages.sequencesAt,
        tilesAt,
        maskHeadStride: headStride,
        maskQueryStride: queryStride,
        maskKeyStride: keyStride,
        maskBase: base('mask') / bytes,
        rowsPerHead: rowsPerQueryHead,
        maximaBase: base('maskMaxima') / 4,
      }),
  );
}

/**
 * Launches over parts of the heads and rows, as many as the mask's bindings ask for; each joins what those before it
 * found.
 */
function flagLaunches(stages: Stages, mask: MaskLayout, tiles: Tiles, tilesAt: number): Launch[] {
  const { problem, capabilities, keyValue, records, rowsPerQueryHead } = stages;
  const [, headStride, queryStride, keyStride] = mask.strides;
  const bytes = BYTES_PER_ELEMENT[mask.dtype];
  const { keyHeads, members, rows, banded } = maskSizes(problem, mask);
  const additive = mask.dtype !== 'bool';
  // One tile's keys in some rows of some heads must fit a binding, with what alignment adds.
  const room = (capabilities.bindingBytes - capabilities.bindingAlignment) / bytes - VISIBLE_KEYS * keyStride;
  const perLaunch = (members - 1) * headStride + rows * queryStride <= room ? members : 1;
  const rowsPerLaunch = queryStride === 0 ? rows : Math.max(1, Math.min(rows, Math.floor(room / queryStride)));
  const launches: Launch[] = [];
  for (let member = 0; member < members; member += perLaunch) {
    for (let row = 0; row < rows; row += rowsPerLaunch) {
      const [memberEnd, rowEnd] = [member + perLaunch, Math.min(rows, row + rowsPerLaunch)];
      const joined = launches.length > 0 ? 1 : 0;
      const spansOf = ({ tiles: range, heads: [h0, h1] }: ReturnType<typeof allOf>): Binding[] => {
        const [low, high] = extent(tiles, range, ({ sequence, first, count }) => {
          const start = (records[sequence] as SequenceRecord).mask + first * keyStride + row * queryStride;
          return [start, start + (count - 1) * keyStride + (rowEnd - 1 - row) * queryStride + 1];
        });
        const keyRange = extent(tiles, range, ({ sequence, first, count }) => {
          const at = (records[sequence] as SequenceRecord).keyRow + first;
          return [at, at + count];
        });
        const maskHeads = [h0 * members + member, (h1 - 1) * members + memberEnd] as const;
        return [
          tablesBinding(stages),
          ...(additive
            ? [rowSpan(4, 'maskMaxima', 4, rowsPerQueryHead, maskHeads, [0, Math.max(1, rowsPerQueryHead)])]
            : []),
          {
            slot: 5,
            buffer: 'mask',
            start: (low + maskHeads[0] * headStride) * bytes,
            end: (high + (maskHeads[1] - 1) * headStride) * bytes,
          },
          rowSpan(6, 'visible', 4, keyValue.rowsPerHead, [h0, h1], keyRange),
        ];
      };
      launches.push(
        ...launchesOf(
          stages,
          'visible keys',
          visibleKeysKernel({ mask: mask.dtype, banded }),
          allOf(tiles, keyHeads),
          spansOf,
          (unit, base) =>
            encodeParams(VISIBLE_KEYS_PARAMS, {
              tileStart: unit.tiles[0],
              headStart: unit.heads[0],
              sequencesAt: stages.sequencesAt,
              tilesAt,
              groupSize: members,
              memberStart: member,
              memberEnd,
              rowStart: row,
              rowEnd,
              joined,
              maskHeadStride: headStride,
              maskQueryStride: queryStride,
              maskKeyStride: keyStride,
              maskBase: base('mask') / bytes,
              rowsPerHead: rowsPerQueryHead,
              maximaBase: base('maskMaxima') / 4,
              keyRowsPerHead: keyValue.rowsPerHead,
              visibleBase: base('visible') / 4,
            }),
        ),
      );
    }
  }
  return launches;
}
