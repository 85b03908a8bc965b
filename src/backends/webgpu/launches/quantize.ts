/** Statistics of K and V, and quantization of Q, K and V. */
import { type AttentionProblem, sequencesOf } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../../tensor/dtype.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { type ValueFormat, valueFormatOf } from '../kernel-table.ts';
import { encodeParams, type KeyValueLayout, padDim, rowVectors } from '../kernels/layout.ts';
import {
  KEY_BLOCK,
  PREPARE_KEY_VALUE_PARAMS,
  PREPARE_PARAMS,
  PREPARE_QUERY_PARAMS,
  type PrepareKeyValueConfig,
  type PrepareQueryConfig,
  prepareKernel,
  prepareKeyValueKernel,
  prepareQueryKernel,
  readsStatistics,
  type ValueScaling,
} from '../kernels/prepare.ts';
import { sinkParams } from '../kernels/sinks.ts';
import { STATISTICS_PARAMS, statisticsKernel, statisticsVectors } from '../kernels/statistics.ts';
import { roundUp } from '../kernels/storage.ts';
import { prepareFp4KeyValueLaunches } from './fp4.ts';
import { type Binding, type BufferName, type Launch, type Unit, unitsOf } from './launch.ts';
import { sinkSpans, sinkValues } from './sinks.ts';
import {
  accessOf,
  allOf,
  appendedTiles,
  blockRows,
  extent,
  type KeyValueShape,
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
import { needsVisibleKeys, visibleHeadStride } from './visible-keys.ts';

/**
 * float16 values of V fit unscaled; other dtypes, V with its mean removed and sums in float16 need a scale per channel.
 */
const valueScalingOf = (
  dtype: DType,
  format: ValueFormat,
  { smoothV, pvAccumDtype }: Pick<KernelChoice, 'smoothV' | 'pvAccumDtype'>,
): ValueScaling => ({
  integers: format === 'int8',
  // Blocks of FP4 have scales enough; INT8 has too few bits for channels of different sizes.
  scaled: format === 'int8' || (format === 'fp16' && (dtype !== 'float16' || smoothV || pvAccumDtype === 'fp16')),
  smoothed: smoothV,
  // Sums in float16 overflow less where no value exceeds 1. Elsewhere values up to 2^28 below the largest keep all
  // bits.
  exponent: pvAccumDtype === 'fp16' ? 0 : 15,
});

export function keyValueBytes(shape: KeyValueShape): { keys: number; values: number; partials: number } {
  // Kernels bind whole tiles.
  const rows = Math.max(KEY_BLOCK, shape.kvHeads * shape.rowsPerHead);
  const rowBytes = keyValueRowBytes(shape);
  const records = Math.max(1, shape.kvHeads * shape.sequences * shape.chunks);
  return {
    keys: rows * rowBytes.keys,
    values: rows * rowBytes.values,
    partials: records * statisticsVectors(padDim(shape.headDim), padDim(shape.valueDim)) * 16,
  };
}

/**
 * Where the rows of the keys of a problem's sequences are when they are laid end to end, each from a new block.
 *
 * @param held for later queries
 */
export function keyValueShapeOf(
  problem: AttentionProblem,
  choice: KernelChoice,
  capabilities: Capabilities,
  layout: KeyValueLayout,
  held = false,
): KeyValueShape {
  const format = valueFormatOf(choice.descriptor.name);
  const keyRows: number[] = [];
  let rows = 0;
  for (const { keyLength } of sequencesOf(problem)) {
    keyRows.push(rows);
    rows += roundUp(keyLength, KEY_BLOCK);
  }
  const { dtype, kvHeads, headDim, valueDim, batch, keyLength, k, v } = problem;
  // A chunk must fit a binding; more chunks than 16 only cost the kernels that add them up.
  const spanned = keyLength * Math.max(k.tokenStride, v.tokenStride) * BYTES_PER_ELEMENT[dtype];
  const chunks = Math.max(
    Math.min(16, Math.ceil(keyLength / KEY_BLOCK)),
    Math.ceil((2 * spanned) / capabilities.bindingBytes),
    1,
  );
  return {
    dtype,
    kvHeads,
    headDim,
    valueDim,
    sequences: batch,
    rowsPerHead: rows,
    keyRows,
    chunks,
    smoothK: choice.smoothK,
    values: valueScalingOf(dtype, format, choice),
    // In a cache every key has its own scale: tokens come in any number at a time.
    sharedScale: !held && layout === 'tiles' && choice.qkQuantGran !== 'per-thread',
    layout,
    format: format === 'fp4' ? 'fp4' : 'int8',
    ...(choice.scaleSearch === undefined ? {} : { scaleSearch: choice.scaleSearch }),
    held,
  };
}

/**
 * Partial sums of K and maxima of V; none where neither is needed.
 *
 * @param target where they go: statistics of tokens appended to a cache are kept apart from those of its other tokens
 */
export function statisticsLaunches(stages: Stages, target: 'partials' | 'newPartials' = 'partials'): Launch[] {
  const { problem, keyValue, records } = stages;
  const { dtype, headDim, valueDim, kvHeads } = problem;
  const { smoothK: keyMean, values } = keyValue;
  const { smoothed: valueMean } = values;
  const valueMax = readsStatistics(values);
  if (!keyMean && !valueMax) return [];
  const { chunks, rowsPerHead } = keyValue;
  const masked = needsVisibleKeys(stages);
  const headStride = visibleHeadStride(problem, keyValue);
  const items: Tile[] = records.flatMap(({ visibleFrom, visibleTo }, sequence) =>
    Array.from({ length: chunks }, (_, chunk) => {
      const each = Math.ceil((visibleTo - visibleFrom) / chunks);
      const first = Math.min(visibleTo, visibleFrom + chunk * each);
      // An empty chunk's span is one token that is there.
      const count = Math.min(visibleTo, first + each) - first;
      return { sequence, first: count === 0 ? Math.max(visibleFrom, first - 1) : first, count: Math.max(1, count) };
    }),
  );
  const [headDimPadded, valueDimPadded] = [padDim(headDim), padDim(valueDim)];
  const code = statisticsKernel({
    dtype,
    access: accessOf(
      dtype,
      [...(keyMean ? [problem.k] : []), ...(valueMax ? [problem.v] : [])],
      [...(keyMean ? [headDim] : []), ...(valueMax ? [valueDim] : [])],
    ),
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded,
    keyMean,
    valueMax,
    valueMean,
    valueTypical: values.integers,
    masked,
  });
  if (records.every(({ keyLength }) => keyLength === 0)) return [];
  return launchesOf(
    stages,
    'statistics',
    code,
    allOf(items, kvHeads),
    (unit) => [
      tablesBinding(stages),
      ...(keyMean ? [operandSpan(stages, 2, 'k', items, unit)] : []),
      ...(valueMax ? [operandSpan(stages, 3, 'v', items, unit)] : []),
      partialSpan(stages, 4, unit.heads, target),
      ...(masked ? [rowSpan(5, 'visible', 4, headStride, unit.heads, [0, rowsPerHead])] : []),
    ],
    (unit, base) =>
      encodeParams(STATISTICS_PARAMS, {
        itemStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequences: keyValue.sequences,
        chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt: 0,
        ...keyValueSources(stages, base),
        partialBase: base(target) / 16,
        visibleHeadStride: headStride,
        visibleBase: base('visible') / 4,
      }),
  );
}

/** A stage of quantization: in a launch of its own, or with the other in one. */
interface PrepareStage<Config> {
  readonly config: Config;
  readonly tiles: readonly Tile[];
  readonly heads: number;
  spansOf(unit: Unit): readonly Binding[];
  /** Parameters but for where a unit and the table of tiles begin. */
  valuesOf(base: (buffer: BufferName) => number): Readonly<Record<string, number>>;
}

/** Of tokens `first` to the end of each sequence. */
function keyValueStage(stages: Stages, first = 0): PrepareStage<PrepareKeyValueConfig> {
  const { problem, keyValue, records } = stages;
  const { dtype, headDim, valueDim, kvHeads } = problem;
  const tiles = appendedTiles(records, first);
  const { smoothK, sharedScale, values, layout } = keyValue;
  const rowBytes = keyValueRowBytes(keyValue);
  const config = {
    dtype,
    access: accessOf(dtype, [problem.k, problem.v], [headDim, valueDim]),
    headDim,
    headDimPadded: padDim(headDim),
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK,
    sharedScale,
    values,
    layout,
  };
  return {
    config,
    tiles,
    heads: kvHeads,
    spansOf(unit) {
      const rows = blockRows(stages, tiles, unit);
      return [
        tablesBinding(stages),
        operandSpan(stages, 2, 'k', tiles, unit),
        operandSpan(stages, 3, 'v', tiles, unit),
        ...(smoothK || values.scaled ? [partialSpan(stages, 4, unit.heads)] : []),
        rowSpan(5, 'keys', rowBytes.keys, keyValue.rowsPerHead, unit.heads, rows),
        rowSpan(6, 'values', rowBytes.values, keyValue.rowsPerHead, unit.heads, rows),
      ];
    },
    valuesOf: (base) => ({
      sequences: keyValue.sequences,
      chunks: keyValue.chunks,
      sequencesAt: stages.sequencesAt,
      ...keyValueSources(stages, base),
      rowsPerHead: keyValue.rowsPerHead,
      kRowBase: base('keys') / 16,
      vRowBase: base('values') / 16,
      partialBase: base('partials') / 16,
    }),
  };
}

/** Below so many workgroups of a block of queries, each takes {@link FEW_QUERIES}: every one loads K's mean first. */
const ENOUGH_WORKGROUPS = 512;
const FEW_QUERIES = 32;

function queryStage(stages: Stages, scoreScale: number): PrepareStage<PrepareQueryConfig> {
  const { problem, keyValue, records } = stages;
  const { dtype, headDim, valueDim, queryHeads, kvHeads, sinks } = problem;
  const lengths = records.map(({ queryLength }) => queryLength);
  const blocks = tilesOf(lengths, KEY_BLOCK);
  const tiles = blocks.length * queryHeads < ENOUGH_WORKGROUPS ? tilesOf(lengths, FEW_QUERIES) : blocks;
  const headDimPadded = padDim(headDim);
  const { smoothK } = keyValue;
  const groupSize = queryHeads / Math.max(1, kvHeads);
  const config = {
    dtype,
    access: accessOf(dtype, [problem.q], [headDim]),
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK,
    sinks: sinks?.dtype,
  };
  return {
    config,
    tiles,
    heads: queryHeads,
    spansOf(unit) {
      const rows = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
        const row = (records[sequence] as SequenceRecord).queryRow + first;
        return [row, row + count];
      });
      return [
        tablesBinding(stages),
        operandSpan(stages, 7, 'q', tiles, unit),
        rowSpan(8, 'queryRows', rowVectors(headDimPadded) * 16, stages.rowsPerQueryHead, unit.heads, rows),
        ...(smoothK ? [partialSpan(stages, 4, keyHeads(unit.heads, groupSize))] : []),
        ...sinkSpans(problem, unit),
      ];
    },
    valuesOf: (base) => ({
      groupSize,
      sequences: keyValue.sequences,
      chunks: keyValue.chunks,
      sequencesAt: stages.sequencesAt,
      headStride: problem.q.headStride,
      tokenStride: problem.q.tokenStride,
      base: base('q') / BYTES_PER_ELEMENT[dtype],
      queryRowsPerHead: stages.rowsPerQueryHead,
      rowBase: base('queryRows') / 16,
      partialBase: base('partials') / 16,
      scoreScale,
      ...sinkValues(problem, base),
    }),
  };
}

/** A stage's launches by itself. */
function prepareLaunchesOf<Config>(
  stages: Stages,
  label: string,
  stage: PrepareStage<Config>,
  fields: readonly string[],
  code: string,
): Launch[] {
  const tilesAt = stages.tables.tiles(stage.tiles);
  return launchesOf(
    stages,
    label,
    code,
    allOf(stage.tiles, stage.heads),
    (unit) => stage.spansOf(unit),
    (unit, base) =>
      encodeParams(fields, {
        ...stage.valuesOf(base),
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        tilesAt,
      }),
  );
}

/** Quantization of K and conversion of V, of tokens `first` to the end of each sequence. */
export function prepareKeyValueLaunches(stages: Stages, first = 0): Launch[] {
  if (stages.keyValue.format === 'fp4') return prepareFp4KeyValueLaunches(stages, first);
  const stage = keyValueStage(stages, first);
  const code = prepareKeyValueKernel(stage.config);
  return prepareLaunchesOf(stages, 'prepare key value', stage, PREPARE_KEY_VALUE_PARAMS, code);
}

/** Quantization of Q. `scoreScale` is what a product of integers and scales is multiplied with to be a score. */
export function prepareQueryLaunches(stages: Stages, scoreScale: number): Launch[] {
  const stage = queryStage(stages, scoreScale);
  const fields = [...PREPARE_QUERY_PARAMS, ...sinkParams(stages.problem.sinks?.dtype)];
  return prepareLaunchesOf(stages, 'prepare query', stage, fields, prepareQueryKernel(stage.config));
}

/** Quantization of all of K, V and Q: in one launch, where a device binds and dispatches it at once. */
export function prepareLaunches(stages: Stages, scoreScale: number): Launch[] {
  const [keyValue, query] = [keyValueStage(stages), queryStage(stages, scoreScale)];
  const { capabilities, problem, tables } = stages;
  const tiles = [...keyValue.tiles, ...query.tiles];
  const wholes = [keyValue, query].map((stage) => [stage, allOf(stage.tiles, stage.heads)] as const);
  const atOnce = wholes.every(([stage, whole]) => unitsOf(whole, stage.spansOf, capabilities).length === 1);
  if (!atOnce || tiles.length > capabilities.dispatch || problem.sinks !== undefined) {
    return [...prepareKeyValueLaunches(stages), ...prepareQueryLaunches(stages, scoreScale)];
  }
  const tilesAt = tables.tiles(tiles);
  const spans = new Map(wholes.flatMap(([stage, whole]) => stage.spansOf(whole)).map((span) => [span.slot, span]));
  return launchesOf(
    stages,
    'prepare',
    prepareKernel(query.config, keyValue.config),
    allOf(tiles, query.heads),
    () => [...spans.values()],
    (_, base) =>
      encodeParams(PREPARE_PARAMS, {
        ...keyValue.valuesOf(base),
        ...query.valuesOf(base),
        ...{ tileStart: 0, headStart: 0, tilesAt, keyTiles: keyValue.tiles.length, keyHeads: keyValue.heads },
      }),
  );
}
