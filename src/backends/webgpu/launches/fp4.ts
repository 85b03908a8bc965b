/** Quantization to FP4 and what smoothing Q takes from the scores. */
import type { ScaleSearch } from '../../../quantization/fp4-blocks.ts';
import type { QuerySmoothing } from '../../../quantization/schemes.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { fp4QueryVectors } from '../kernels/fp4.ts';
import { encodeParams, padDim } from '../kernels/layout.ts';
import { PREPARE_KEY_VALUE_PARAMS, QUERY_BLOCK } from '../kernels/prepare.ts';
import {
  MEAN_SCORE_KEYS,
  MEAN_SCORES_PARAMS,
  meanScoresKernel,
  PREPARE_FP4_QUERY_PARAMS,
  prepareFp4KeyValueKernel,
  prepareFp4QueryKernel,
  QUERY_MEANS_PARAMS,
  queryMeansKernel,
} from '../kernels/prepare-fp4.ts';
import { sinkParams } from '../kernels/sinks.ts';
import type { Binding, BufferName, Launch, Unit } from './launch.ts';
import { sinkSpans, sinkValues } from './sinks.ts';
import {
  accessOf,
  allOf,
  appendedTiles,
  blockRows,
  extent,
  keyHeads,
  keyValueRowBytes,
  keyValueSources,
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

/** How a call over FP4 keys treats its queries. */
export interface Fp4Queries {
  readonly scaleSearch: ScaleSearch;
  readonly smoothQ: QuerySmoothing | false;
}

/** Quantization of K and V to FP4, of tokens `first` to the end of each sequence. */
export function prepareFp4KeyValueLaunches(stages: Stages, first: number): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { dtype, headDim, valueDim, kvHeads } = problem;
  const { smoothK, values, held, scaleSearch = 'mse' } = keyValue;
  const tiles = appendedTiles(records, first);
  const tilesAt = tables.tiles(tiles);
  const code = prepareFp4KeyValueKernel({
    dtype,
    access: accessOf(dtype, [problem.k, problem.v], [headDim, valueDim]),
    headDim,
    headDimPadded: padDim(headDim),
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK,
    smoothV: values.smoothed,
    scaleSearch,
    valueBlocks: held ? 'channels' : 'keys',
  });
  const rowBytes = keyValueRowBytes(keyValue);
  return launchesOf(
    stages,
    'prepare key value',
    code,
    allOf(tiles, kvHeads),
    (unit) => {
      const rows = blockRows(stages, tiles, unit);
      return [
        tablesBinding(stages),
        operandSpan(stages, 2, 'k', tiles, unit),
        operandSpan(stages, 3, 'v', tiles, unit),
        ...(smoothK || values.smoothed ? [partialSpan(stages, 4, unit.heads)] : []),
        rowSpan(5, 'keys', rowBytes.keys, keyValue.rowsPerHead, unit.heads, rows),
        rowSpan(6, 'values', rowBytes.values, keyValue.rowsPerHead, unit.heads, rows),
      ];
    },
    (unit, base) =>
      encodeParams(PREPARE_KEY_VALUE_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        ...keyValueSources(stages, base),
        rowsPerHead: keyValue.rowsPerHead,
        kRowBase: base('keys') / 4,
        vRowBase: base('values') / 4,
        partialBase: base('partials') / 16,
      }),
  );
}

const queryLengths = ({ records }: Stages) => records.map(({ queryLength }) => queryLength);

/** Means of Q in a head: one for each block of its rows, or for each sequence. */
const meanGroupsOf = ({ rowsPerQueryHead, records }: Stages, smoothQ: QuerySmoothing): number =>
  smoothQ === 'sequence' ? records.length : rowsPerQueryHead / QUERY_BLOCK;

const meanGroupOf = ({ records }: Stages, smoothQ: QuerySmoothing, { sequence, first }: Tile): number =>
  smoothQ === 'sequence' ? sequence : ((records[sequence] as SequenceRecord).queryRow + first) / QUERY_BLOCK;

/** Span of the means of Q that the tiles of some heads have. */
function meansSpan(stages: Stages, smoothQ: QuerySmoothing, slot: number, tiles: readonly Tile[], unit: Unit): Binding {
  const groups = extent(tiles, unit.tiles, (tile) => {
    const group = Math.floor(meanGroupOf(stages, smoothQ, tile));
    return [group, group + 1];
  });
  const meanBytes = padDim(stages.problem.headDim) * 4;
  return rowSpan(slot, 'queryMeans', meanBytes, meanGroupsOf(stages, smoothQ), unit.heads, groups);
}

/** Means of Q into `queryMeans`. */
export function queryMeansLaunches(stages: Stages, smoothQ: QuerySmoothing): Launch[] {
  const { problem, tables } = stages;
  const { dtype, headDim, queryHeads } = problem;
  const headDimPadded = padDim(headDim);
  const longest = Math.max(1, ...queryLengths(stages));
  const tiles = tilesOf(queryLengths(stages), smoothQ === 'sequence' ? longest : QUERY_BLOCK);
  const tilesAt = tables.tiles(tiles);
  const access = accessOf(dtype, [problem.q], [headDim]);
  return launchesOf(
    stages,
    'query means',
    queryMeansKernel({ dtype, access, headDim, headDimPadded, smoothQ }),
    allOf(tiles, queryHeads),
    (unit) => [
      tablesBinding(stages),
      operandSpan(stages, 2, 'q', tiles, unit),
      meansSpan(stages, smoothQ, 3, tiles, unit),
    ],
    (unit, base) =>
      encodeParams(QUERY_MEANS_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequencesAt: stages.sequencesAt,
        tilesAt,
        headStride: problem.q.headStride,
        tokenStride: problem.q.tokenStride,
        base: base('q') / BYTES_PER_ELEMENT[dtype],
        meanGroups: meanGroupsOf(stages, smoothQ),
        meanBase: base('queryMeans') / 16,
      }),
  );
}

/** Quantization of Q: to FP4, or over a cache to integers. */
export function prepareFp4QueryLaunches(
  stages: Stages,
  scoreScale: number,
  { scaleSearch, smoothQ }: Fp4Queries,
): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { dtype, headDim, valueDim, queryHeads, kvHeads } = problem;
  const headDimPadded = padDim(headDim);
  const tiles = tilesOf(queryLengths(stages), QUERY_BLOCK);
  const tilesAt = tables.tiles(tiles);
  const { smoothK, held } = keyValue;
  const code = prepareFp4QueryKernel({
    dtype,
    access: accessOf(dtype, [problem.q], [headDim]),
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK,
    smoothQ,
    scaleSearch,
    format: held ? 'int8' : 'fp4',
    sinks: problem.sinks?.dtype,
  });
  const groupSize = queryHeads / Math.max(1, kvHeads);
  return launchesOf(
    stages,
    'prepare query',
    code,
    allOf(tiles, queryHeads),
    (unit) => [
      tablesBinding(stages),
      operandSpan(stages, 2, 'q', tiles, unit),
      rowSpan(
        3,
        'queryRows',
        fp4QueryVectors(headDimPadded) * 16,
        stages.rowsPerQueryHead,
        unit.heads,
        extent(tiles, unit.tiles, ({ sequence, first, count }) => {
          const row = (records[sequence] as SequenceRecord).queryRow + first;
          return [row, row + count];
        }),
      ),
      ...(smoothK ? [partialSpan(stages, 4, keyHeads(unit.heads, groupSize))] : []),
      ...(smoothQ ? [meansSpan(stages, smoothQ, 5, tiles, unit)] : []),
      ...sinkSpans(problem, unit),
    ],
    (unit, base) =>
      encodeParams([...PREPARE_FP4_QUERY_PARAMS, ...sinkParams(problem.sinks?.dtype)], {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        headStride: problem.q.headStride,
        tokenStride: problem.q.tokenStride,
        base: base('q') / BYTES_PER_ELEMENT[dtype],
        queryRowsPerHead: stages.rowsPerQueryHead,
        rowBase: base('queryRows') / 16,
        partialBase: base('partials') / 16,
        scoreScale,
        meanGroups: smoothQ ? meanGroupsOf(stages, smoothQ) : 0,
        meanBase: base('queryMeans') / 16,
        ...sinkValues(problem, base),
      }),
  );
}

/** Bytes of the buffer of mean scores that a launch of attention reads at most, where a head's are fewer. */
const MEAN_SCORE_BYTES = 2 ** 27;

/** The mean scores of a call: a row of keys for each mean of Q, for some heads at a time. */
export interface MeanScores {
  readonly smoothQ: QuerySmoothing;
  readonly groups: number;
  /** Floats of a row. */
  readonly stride: number;
  /** Heads whose scores the buffer holds at once. */
  readonly heads: number;
  readonly bytes: number;
}

export function meanScoresOf(stages: Stages, smoothQ: QuerySmoothing): MeanScores {
  const { problem, capabilities } = stages;
  const groups = meanGroupsOf(stages, smoothQ);
  const stride = Math.max(1, problem.keyLength);
  const most = Math.min(MEAN_SCORE_BYTES, capabilities.bindingBytes);
  const heads = Math.min(problem.queryHeads, Math.max(1, Math.floor(most / Math.max(1, groups * stride * 4))));
  return { smoothQ, groups, stride, heads, bytes: heads * groups * stride * 4 };
}

export const queryMeansBytes = (stages: Stages, smoothQ: QuerySmoothing): number =>
  stages.problem.queryHeads * meanGroupsOf(stages, smoothQ) * padDim(stages.problem.headDim) * 4;

/** Span of the mean scores of the query tiles of some heads; the buffer begins with head `firstHead`. */
export function meanScoresSpan(
  stages: Stages,
  { smoothQ, groups, stride }: MeanScores,
  firstHead: number,
  slot: number,
  tiles: readonly Tile[],
  unit: Pick<Unit, 'tiles' | 'heads'>,
): Binding {
  const [start, end] = unit.heads;
  const rows = extent(tiles, unit.tiles, (tile) => {
    const group = Math.floor(meanGroupOf(stages, smoothQ, tile));
    return [group, group + 1];
  });
  return rowSpan(slot, 'meanScores', stride * 4, groups, [start - firstHead, end - firstHead], rows);
}

/** Word of the buffer at which head 0's mean scores would lie, relative to a binding. */
export const meanScoreBase = (
  { groups, stride }: MeanScores,
  firstHead: number,
  base: (buffer: BufferName) => number,
): number => base('meanScores') / 4 + firstHead * groups * stride;

/** The mean scores of heads `[from, to)`. */
export function meanScoresLaunches(
  stages: Stages,
  scores: MeanScores,
  heads: readonly [number, number],
  scoreScale: number,
): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { dtype, headDim, valueDim, queryHeads, kvHeads } = problem;
  const { smoothQ, groups, stride } = scores;
  const { smoothK } = keyValue;
  const headDimPadded = padDim(headDim);
  const groupSize = queryHeads / Math.max(1, kvHeads);
  const tiles = tilesOf(
    records.map(({ keyLength }) => keyLength),
    MEAN_SCORE_KEYS,
  );
  const tilesAt = tables.tiles(tiles);
  const longest = Math.max(0, ...queryLengths(stages));
  // Groups of a sequence take the place of splits.
  const most = smoothQ === 'sequence' ? Math.min(1, longest) : Math.ceil(longest / QUERY_BLOCK);
  const code = meanScoresKernel({
    dtype,
    access: accessOf(dtype, [problem.k], [headDim]),
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK,
    smoothQ,
  });
  /** The groups that a unit's tiles and splits reach. */
  const groupsOf = (unit: Unit) =>
    extent(tiles, unit.tiles, ({ sequence }) => {
      const first = meanGroupOf(stages, smoothQ, { sequence, first: 0, count: 0 });
      return [first + unit.splits[0], Math.min(groups, first + unit.splits[1])];
    });
  const whole = { ...allOf(tiles, queryHeads, most), heads };
  return launchesOf(
    stages,
    'mean scores',
    code,
    whole,
    (unit) => {
      const kv = keyHeads(unit.heads, groupSize);
      const own: readonly [number, number] = [unit.heads[0] - heads[0], unit.heads[1] - heads[0]];
      return [
        tablesBinding(stages),
        operandSpan(stages, 2, 'k', tiles, { ...unit, heads: kv }),
        rowSpan(3, 'queryMeans', headDimPadded * 4, groups, unit.heads, groupsOf(unit)),
        ...(smoothK
          ? [
              partialSpan(stages, 4, kv),
              rowSpan(
                5,
                'keys',
                keyValueRowBytes(keyValue).keys,
                keyValue.rowsPerHead,
                kv,
                blockRows(stages, tiles, unit),
              ),
            ]
          : []),
        rowSpan(6, 'meanScores', stride * 4, groups, own, groupsOf(unit)),
      ];
    },
    (unit, base) =>
      encodeParams(MEAN_SCORES_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupStart: unit.splits[0],
        groupSize,
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        kHeadStride: problem.k.headStride,
        kTokenStride: problem.k.tokenStride,
        kBase: base('k') / BYTES_PER_ELEMENT[dtype],
        rowsPerHead: keyValue.rowsPerHead,
        keyRowBase: base('keys') / 4,
        partialBase: base('partials') / 16,
        meanGroups: groups,
        meanBase: base('queryMeans') / 16,
        scoreStride: stride,
        scoreBase: meanScoreBase(scores, heads[0], base),
        scoreScale,
      }),
  );
}
