/** Attention over quantized keys: its splits, its kernel's configuration, its launches. */
import { type AttentionProblem, outputLayoutOf, outputShapeOf } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { chooseVariant, type Forced } from '../families/choose.ts';
import type { AttentionKernel, AttentionVariant } from '../families/family.ts';
import { packedVariant } from '../families/packed.ts';
import { encodeParams, padDim, valueSlices } from '../kernels/layout.ts';
import { KEY_BLOCK, readsStatistics } from '../kernels/prepare.ts';
import {
  attentionParams,
  type Fp4Products,
  recordFloats,
  type ScoreConfig,
  type ScoreMeaning,
  scoresAreFloat,
} from '../kernels/scores.ts';
import { roundUp } from '../kernels/storage.ts';
import { blockSpans, blockValues } from './blocks.ts';
import {
  type Fp4Queries,
  type MeanScores,
  meanScoreBase,
  meanScoresLaunches,
  meanScoresOf,
  meanScoresSpan,
  prepareFp4QueryLaunches,
  queryMeansBytes,
  queryMeansLaunches,
} from './fp4.ts';
import type { Binding, BufferName, Launch, Unit } from './launch.ts';
import { mergeLaunches, recordsBytes } from './merge.ts';
import { prepareKeyValueLaunches, prepareLaunches, prepareQueryLaunches } from './quantize.ts';
import {
  allOf,
  extent,
  type KeySplits,
  keyHeads,
  keyValueRowBytes,
  launchesOf,
  partialSpan,
  queryRowBytes,
  rowSpan,
  type SequenceRecord,
  type Stages,
  type Tile,
  tablesBinding,
  tilesOf,
} from './stages.ts';

/** As few splits as bindings allow, and as many as give a short query's launch enough workgroups. */
export function keySplitsOf(stages: Stages, { rows, pack }: Pick<AttentionKernel, 'rows' | 'pack'>): KeySplits {
  const { problem, keyValue, capabilities, records } = stages;
  const { keys, values } = keyValueRowBytes(keyValue);
  const rowBytes = Math.max(keys, values);
  const blocks = Math.ceil(problem.keyLength / KEY_BLOCK);
  const blocksPerBinding = Math.max(
    1,
    Math.floor((capabilities.bindingBytes - capabilities.bindingAlignment) / (rowBytes * KEY_BLOCK)),
  );
  const workgroups =
    (problem.queryHeads / (pack ?? 1)) *
    records.reduce((sum, { queryLength }) => sum + Math.ceil((queryLength * (pack ?? 1)) / rows), 0);
  const enough = pack === undefined ? ENOUGH_WORKGROUPS : enoughPackedWorkgroups(problem);
  const wanted = workgroups === 0 || workgroups >= enough ? 1 : Math.floor(enough / workgroups);
  const parallel = Math.max(1, Math.min(wanted, Math.floor(blocks / BLOCKS_PER_SPLIT)));
  const span = Math.min(blocksPerBinding, Math.ceil(blocks / parallel)) * KEY_BLOCK;
  return {
    count: Math.max(1, Math.ceil(problem.keyLength / Math.max(span, KEY_BLOCK))),
    span: Math.max(span, KEY_BLOCK),
  };
}

const LARGEST_FLOAT32 = 3.4e38;

/** Below this many workgroups the keys are split among more of them (a decoder's single query). */
const ENOUGH_WORKGROUPS = 128;
/**
 * The same where the heads of a group are packed: memory is kept busy by several small workgroups a multiprocessor. On an
 * H200, 8 key heads and 32,768 keys, a step in families matrix and subgroup with 512, 792 and 1024: at D 128 56.9, 50.1, 52.0
 * and 50.7, 46.9, 49.9 microseconds; at D 64 32.2, 39.5, 34.2 and 30.4, 37.6, 34.6.
 */
const enoughPackedWorkgroups = ({ headDim, valueDim }: Pick<AttentionProblem, 'headDim' | 'valueDim'>): number =>
  Math.max(headDim, valueDim) > 64 ? 792 : 512;
/** A split has at least this many blocks of keys: less is not worth its share of merging. */
const BLOCKS_PER_SPLIT = 4;

/** Heads of a launch; the buffer of mean scores begins with the first of them. */
interface HeadRange {
  readonly scores?: MeanScores;
  readonly heads: readonly [number, number];
}

export function attentionLaunches(
  stages: Stages,
  config: ScoreConfig,
  kernel: AttentionKernel,
  splits: KeySplits,
  { scores, heads }: HeadRange = { heads: [0, stages.problem.queryHeads] },
): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { queryHeads, kvHeads, queryLength, mask } = problem;
  const output = outputLayoutOf(problem);
  const { pack = 1 } = kernel;
  const packed = kernel.pack !== undefined;
  // The packed kernel holds all channels of V; of the others' tiles each is listed once for a slice of them.
  const slices = packed ? 1 : valueSlices(config.valueDimPadded);
  const tiles = tilesOf(
    records.map(({ queryLength: length }) => length * pack),
    kernel.rows,
  ).flatMap((tile) => Array.from({ length: slices }, () => tile));
  /** Queries of a tile's rows. */
  const tokensOf = (tile: Tile): Tile => {
    const first = Math.floor(tile.first / pack);
    return { ...tile, first, count: Math.floor((tile.first + tile.count - 1) / pack) - first + 1 };
  };
  const tokens = tiles.map(tokensOf);
  const tilesAt = tables.tiles(tiles);
  const groupSize = queryHeads / Math.max(1, kvHeads);
  const queryBytes = queryRowBytes(keyValue);
  const rowBytes = keyValueRowBytes(keyValue);
  // A word of codes, or the vectors that rows of INT8 and float16 consist of.
  const [keyUnit, valueUnit] = keyValue.format === 'fp4' ? [4, 4] : [16, keyValue.values.integers ? 16 : 8];
  const outputBytes = BYTES_PER_ELEMENT[problem.dtype];
  const lseHeadStride = lseHeadStrideOf(problem);
  const recordBytes = recordFloats(config.valueDimPadded) * 4;
  const final = config.result === 'final';

  const spansOf = (unit: Unit): Binding[] => {
    const [h0, h1] = [unit.heads[0] * pack, unit.heads[1] * pack];
    const kv = keyHeads([h0, h1], groupSize);
    const keyRange = extent(tiles, unit.tiles, ({ sequence }) => {
      const { keyRow, keyLength } = records[sequence] as SequenceRecord;
      const first = Math.min(keyLength, unit.splits[0] * splits.span);
      const last = Math.min(keyLength, unit.splits[1] * splits.span);
      return [keyRow + first, keyRow + roundUp(Math.max(last, first + 1), KEY_BLOCK)];
    });
    const outputRange = extent(tokens, unit.tiles, ({ sequence, first, count }) => {
      const start = (records[sequence] as SequenceRecord).output + first * output.tokenStride;
      return [start, start + (count - 1) * output.tokenStride + problem.valueDim];
    });
    const outputStart = outputRange[0] + h0 * output.headStride;
    const outputEnd = outputRange[1] + (h1 - 1) * output.headStride;
    const bindings: Binding[] = [
      tablesBinding(stages),
      rowSpan(
        2,
        'queryRows',
        queryBytes,
        stages.rowsPerQueryHead,
        [h0, h1],
        // Rows are read by whole tiles; packed ones are not.
        extent(tokens, unit.tiles, ({ sequence, first, count }) => {
          const row = (records[sequence] as SequenceRecord).queryRow + first;
          return [row, row + (packed ? count : kernel.rows)];
        }),
      ),
      rowSpan(3, 'keys', rowBytes.keys, keyValue.rowsPerHead, kv, keyRange),
      rowSpan(4, 'values', rowBytes.values, keyValue.rowsPerHead, kv, keyRange),
    ];
    if (config.mask !== undefined && mask !== undefined) {
      const [, headStride, queryStride, keyStride] = mask.strides;
      const [low, high] = extent(tokens, unit.tiles, ({ sequence, first, count }) => {
        const { mask: start, keyLength } = records[sequence] as SequenceRecord;
        const row = start + first * queryStride;
        return [
          row + Math.min(keyLength, unit.splits[0] * splits.span) * keyStride,
          row +
            (count - 1) * queryStride +
            Math.max(0, Math.min(keyLength, unit.splits[1] * splits.span) - 1) * keyStride +
            1,
        ];
      });
      const bytes = BYTES_PER_ELEMENT[mask.dtype];
      bindings.push({
        slot: 5,
        buffer: 'mask',
        start: (low + h0 * headStride) * bytes,
        end: (high + (h1 - 1) * headStride) * bytes,
      });
    }
    if (final) {
      bindings.push({ slot: 6, buffer: 'output', start: outputStart * outputBytes, end: outputEnd * outputBytes });
      if (config.returnLse) {
        const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
          const start = (records[sequence] as SequenceRecord).lse + first;
          return [start, start + count];
        });
        bindings.push({
          slot: 7,
          buffer: 'lse',
          start: (low + h0 * lseHeadStride) * 4,
          end: (high + (h1 - 1) * lseHeadStride) * 4,
        });
      }
    } else {
      const row = recordBytes * splits.count;
      bindings.push({
        slot: 6,
        buffer: 'records',
        start: (outputStart / problem.valueDim) * row,
        end: Math.ceil(outputEnd / problem.valueDim) * row,
      });
    }
    if (scores !== undefined) bindings.push(meanScoresSpan(stages, scores, heads[0], 7, tiles, unit));
    if (readsStatistics(config.values)) bindings.push(partialSpan(stages, 8, kv));
    if (config.blocks) bindings.push(...blockSpans(problem, tokens, { ...unit, heads: [h0, h1] }));
    return bindings;
  };

  return launchesOf(
    stages,
    kernel.label,
    kernel.source(config),
    { ...allOf(tiles, queryHeads, splits.count), heads: [heads[0] / pack, heads[1] / pack] },
    spansOf,
    (unit, base) =>
      encodeParams(attentionParams(config), {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        queryRowsPerHead: stages.rowsPerQueryHead,
        keyRowsPerHead: keyValue.rowsPerHead,
        queryRowBase: base('queryRows') / 16,
        keyRowBase: base('keys') / keyUnit,
        valueRowBase: base('values') / (packed ? 16 : valueUnit),
        partialBase: base('partials') / 16,
        outputHeadStride: output.headStride,
        outputTokenStride: output.tokenStride,
        outputBase: base('output') / outputBytes,
        lseHeadStride,
        lseBase: base('lse') / 4,
        maskHeadStride: mask?.strides[1] ?? 0,
        maskQueryStride: mask?.strides[2] ?? 0,
        maskKeyStride: mask?.strides[3] ?? 0,
        maskBase: mask === undefined ? 0 : base('mask') / BYTES_PER_ELEMENT[mask.dtype],
        keyStart: unit.splits[0] * splits.span,
        keySpan: splits.span,
        splitIndex: unit.splits[0],
        splits: splits.count,
        recordBase: base('records') / 4,
        softcap: problem.softcap,
        inverseQuarterSoftcap: inverseQuarterSoftcapOf(problem.softcap),
        ...(config.blocks ? blockValues(problem, base) : {}),
        ...(scores === undefined
          ? {}
          : {
              meanGroups: scores.groups,
              scoreStride: scores.stride,
              scoreBase: meanScoreBase(scores, heads[0], base),
            }),
      }),
  ).filter(() => queryLength > 0);
}

export const inverseQuarterSoftcapOf = (softcap: number): number =>
  softcap > 0 ? Math.min(4 / softcap, LARGEST_FLOAT32) : 0;

export const lseHeadStrideOf = ({ sequences, batch, queryLength }: AttentionProblem) =>
  sequences === undefined ? queryLength : (sequences.cuSeqlensQ[batch] as number);

/** What a problem's attention kernels are configured with. */
export function scoreConfigOf(
  stages: Stages,
  splits: KeySplits,
  fp4: Fp4Products | undefined,
  packed = false,
): ScoreConfig {
  const { problem } = stages;
  const { dtype, headDim, valueDim, mask, keyLength, softcap, returnLse } = problem;
  // Two rows of 16-bit elements share a word when Dv is odd; the merging kernel writes words from partial results.
  const sharesWords = dtype !== 'float32' && valueDim % 2 === 1;
  const sinks = problem.sinks !== undefined;
  const { values } = stages.keyValue;
  const blocks = problem.blocks !== undefined && keyLength > 0;
  // The mask, the map, V's statistics and one more buffer would be nine: more than core WebGPU binds.
  const manyBindings = blocks && mask !== undefined && readsStatistics(values);
  if (manyBindings && fp4?.smoothQ) {
    const received = 'a block mask with a mask and smoothV';
    throw new UnsupportedOptionError('qk-fp4-pv-fp4', 'options.smoothQ', 'false', `${fp4.smoothQ} for ${received}`);
  }
  // The merging kernel also writes the logsumexp, and joins sinks, where rounded weights do not give it, and where its binding is taken.
  const merged =
    packed ||
    splits.count > 1 ||
    sharesWords ||
    ((returnLse || sinks) && fp4?.weights === true) ||
    (sinks && values.smoothed) ||
    (manyBindings && returnLse);
  return {
    dtype,
    headDimPadded: padDim(headDim),
    valueDim,
    valueDimPadded: padDim(valueDim),
    mask: keyLength === 0 ? undefined : mask?.dtype,
    blocks,
    softcap: softcap > 0,
    returnLse,
    sinks,
    values,
    sharedScale: stages.keyValue.sharedScale,
    fp4,
    result: merged ? 'partial' : 'final',
  };
}

/** What Q's scales are multiplied with: the caller's scale, and log2(e) where scores are in base 2. */
export function scoreScaleOf(problem: AttentionProblem, config: ScoreMeaning): number {
  const scale = problem.smScale * (scoresAreFloat(config) ? 1 : Math.LOG2E);
  return Math.max(-LARGEST_FLOAT32, Math.min(LARGEST_FLOAT32, scale));
}

/** The stages of attention over keys that are in scratch or in a cache. */
export interface AttentionParts {
  readonly launches: readonly Launch[];
  readonly sizes: Partial<Record<BufferName, number>>;
  readonly variant: AttentionVariant;
  readonly keySplits: number;
}

/** Launches for Q and, where they are not held, for K and V, for attention and merging, and the scratch that they take. */
export function attentionParts(stages: Stages, choice: KernelChoice, options: Forced): AttentionParts {
  const { problem, capabilities } = stages;
  const variant = packedVariant(
    capabilities,
    problem,
    stages.keyValue,
    chooseVariant(capabilities, problem, choice, options, stages.keyValue.layout),
    options,
    choice.pvAccumDtype === 'fp16',
  );
  const splits = keySplitsOf(stages, variant.kernel);
  const queries = fp4QueriesOf(stages, choice);
  const products = queries && { weights: !stages.keyValue.held, smoothQ: queries.smoothQ };
  const packed = variant.kernel.pack !== undefined;
  const config = scoreConfigOf(stages, splits, products, packed);
  const empty = elementCount(outputShapeOf(problem)) === 0;
  const scoreScale = scoreScaleOf(problem, config);
  const scores = queries?.smoothQ ? meanScoresOf(stages, queries.smoothQ) : undefined;
  const { held } = stages.keyValue;
  const prepare = () => {
    if (queries === undefined)
      return held ? prepareQueryLaunches(stages, scoreScale) : prepareLaunches(stages, scoreScale);
    const keyValue = held ? [] : prepareKeyValueLaunches(stages);
    const means = queries.smoothQ ? queryMeansLaunches(stages, queries.smoothQ) : [];
    return [...keyValue, ...means, ...prepareFp4QueryLaunches(stages, scoreScale, queries)];
  };
  const attend = () => {
    if (scores === undefined) return attentionLaunches(stages, config, variant.kernel, splits);
    const launches: Launch[] = [];
    for (let first = 0; first < problem.queryHeads; first += scores.heads) {
      const heads = [first, Math.min(problem.queryHeads, first + scores.heads)] as const;
      launches.push(
        ...meanScoresLaunches(stages, scores, heads, scoreScale),
        ...attentionLaunches(stages, config, variant.kernel, splits, { scores, heads }),
      );
    }
    return launches;
  };
  const launches = empty
    ? []
    : [...prepare(), ...attend(), ...(config.result === 'partial' ? mergeLaunches(stages, config, splits) : [])];
  const sizes: Partial<Record<BufferName, number>> = {
    queryRows: problem.queryHeads * stages.rowsPerQueryHead * queryRowBytes(stages.keyValue),
    ...(scores === undefined ? {} : { queryMeans: queryMeansBytes(stages, scores.smoothQ), meanScores: scores.bytes }),
    ...(config.result === 'partial' ? { records: recordsBytes(problem, splits) } : {}),
  };
  return { launches, sizes, variant, keySplits: splits.count };
}

/**
 * How Q is treated over FP4 keys; undefined over others. Smoothing serves to quantize Q to FP4, so there is none over a cache.
 */
function fp4QueriesOf(
  { keyValue, problem }: Stages,
  { smoothQ, scaleSearch = 'mse' }: KernelChoice,
): Fp4Queries | undefined {
  if (keyValue.format !== 'fp4') return undefined;
  return { scaleSearch, smoothQ: keyValue.held || problem.keyLength === 0 ? false : smoothQ };
}
