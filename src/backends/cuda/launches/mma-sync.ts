/** Launches of the kernels on `mma.sync`. */
import { isBanded } from '../../../attention/band.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import { UNPACKED_UNIT } from '../kernels/fp4/e2m1.ts';
import { attention } from '../kernels/mma-sync/attention.ts';
import {
  ATTENTION_INTEGERS,
  ATTENTION_POINTERS,
  ATTENTION_STRIDES,
  type AttentionConfig,
  BLOCK_K,
  blockQueries,
  FP4_POINTERS,
  FUSED_POINTERS,
  FUSED_ROWS,
  type GivenOperands,
  hasFp4Keys,
  hasFp4Values,
  isExact,
  LEAST_TILES,
  LENGTH_SPLIT_INTEGERS,
} from '../kernels/mma-sync/config.ts';
import { chooseTile, paddedRow, type TileBytes } from '../kernels/mma-sync/tiles.ts';
import { LOG2_E } from '../kernels/parts/constants.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { PAGE_INTEGERS, PAGE_POINTERS } from '../kernels/parts/pages.ts';
import {
  MEAN_SCORES_INTEGERS,
  MEAN_SCORES_POINTERS,
  MEAN_SCORES_THREADS,
  type MeanScoresConfig,
  meanScores,
} from '../kernels/quantize/mean-scores.ts';
import {
  bandArguments,
  f32,
  inOrder,
  launch,
  maskArgumentsOf,
  maskFormatOf,
  moduleOf,
  outputStridesOf,
  pointer,
  sinkArgumentsOf,
  sinkFormatOf,
  softcapArguments,
  strideBytes,
  u32,
} from './arguments.ts';
import {
  combineLaunches,
  combineScratch,
  hasAlignedFours,
  joinArguments,
  joinsInside,
  mostJoinedInside,
  outputPointersOf,
} from './combine.ts';
import {
  BLOCK_Q,
  type Context,
  type FamilyLaunches,
  type KeyValuePart,
  lengthSplitsOf,
  loadWidthOf,
  scalesEachTile,
  splitsOf,
} from './context.ts';
import { fp4KeyLaunch, fp4QueryLaunch, fp4QueryScratch, fp4ValueLaunch } from './fp4.ts';
import { headsAsRows } from './heads-as-rows.ts';
import type { KernelArgument, KernelLaunch } from './launch.ts';
import { quantizeKeyLaunch, quantizeQueryLaunch, queryScratch, statisticsLaunches, valueLaunches } from './quantize.ts';
import type { Scheme } from './scheme.ts';
import { blockArgumentsOf, type ListedTiles, tileListLaunches, tileListScratch } from './tile-lists.ts';
import { visibleKeysPointer } from './visible-keys.ts';

function keyValue(context: Context, parts: readonly KeyValuePart[]): KernelLaunch[] {
  const { scheme } = context;
  return [
    ...(parts.includes('means') ? statisticsLaunches(context, context.scheme.valueTileScales) : []),
    ...(parts.includes('key') ? [hasFp4Keys(scheme) ? fp4KeyLaunch(context) : quantizeKeyLaunch(context)] : []),
    ...(parts.includes('value') ? (hasFp4Values(scheme) ? [fp4ValueLaunch(context)] : valueLaunches(context)) : []),
  ];
}

/** Keys that have a score of the means of Q. */
const meanScoreKeysOf = ({ layout }: Context) => layout.keyTiles * BLOCK_K;

/** Scores of the means of Q against K as it came, which smoothing Q takes out of the quantized products. */
function meanScoresLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, queryHeads, kvHeads, dtype, headDim, k } = problem;
  const config: MeanScoresConfig = {
    target,
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: loadWidthOf(k, headDim, dtype, pointerAlignment),
    keyMean: choice.smoothK,
    hiddenKeys,
  };
  const module = moduleOf('meanScores', meanScores, config);
  return launch(
    'scores of the means of Q',
    module,
    'meanScores',
    layout.keyTiles * queryHeads * batch,
    MEAN_SCORES_THREADS,
    module.kernel().sharedBytes,
    [
      ...inOrder(MEAN_SCORES_POINTERS, {
        sequences: pointer('sequences'),
        input: pointer('k', k.offset * BYTES[dtype]),
        ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
        queryMean: pointer('queryMean'),
        meanScores: pointer('meanScores'),
        ...visibleKeysPointer(context),
      }),
      ...inOrder(MEAN_SCORES_INTEGERS, {
        queryHeads: u32(queryHeads),
        headsPerKeyHead: u32(queryHeads / kvHeads),
        keyTiles: u32(layout.keyTiles),
        paddedQueries: u32(layout.paddedQueries),
        meanScoreKeys: u32(meanScoreKeysOf(context)),
        paddedKeys: u32(layout.paddedKeys),
      }),
      ...strideBytes(k, dtype),
      f32(problem.smScale * LOG2_E),
    ],
  );
}

/** Bytes of what a CTA holds of Q, K and V. */
function tileBytesOf(context: Context): TileBytes {
  const { scheme } = context;
  const eachTile = scalesEachTile(context);
  const { qkRowBytes, queryRowBytes, paddedValueDim, pvFormat } = scheme;
  const [fp4Keys, fp4Values] = [hasFp4Keys(scheme), hasFp4Values(scheme)];
  const [exact, halves] = [isExact(scheme), pvFormat === 'f16' || pvFormat === 'bf16'];
  // Wide types lie with a key's channels in a row, narrow ones with a channel's keys.
  const rows = halves ? BLOCK_K * paddedRow(2 * paddedValueDim) : paddedValueDim * (fp4Values ? BLOCK_K / 2 : BLOCK_K);
  const ofValue = rows + (exact ? BLOCK_K : 0);
  return {
    queryRow: queryRowBytes,
    keyRow: qkRowBytes,
    // Four bytes for 64 channels of a row.
    queryScales: scheme.qkFormat === 'e2m1' ? qkRowBytes / 8 : 0,
    keyScales: fp4Keys ? qkRowBytes / 8 : 0,
    valueTile: ofValue + (fp4Values || eachTile ? paddedValueDim * 4 : 0),
    // With the sum of its weights.
    resultRow: 4 * (paddedValueDim + 1),
  };
}

function givenOf({ problem, device }: Context): GivenOperands {
  const { q, k, v, headDim, valueDim, dtype } = problem;
  const { pointerAlignment = 16 } = device;
  const widthOf = (operand: OperandLayout, dim: number) => loadWidthOf(operand, dim, dtype, pointerAlignment);
  return { headDim, loadWidths: { query: widthOf(q, headDim), key: widthOf(k, headDim), value: widthOf(v, valueDim) } };
}

/** What kernels of 16-bit operands take in place of what kernels of quantized ones do. */
function givenArguments({ problem }: Context) {
  const { q, k, v, dtype } = problem;
  const bytes = BYTES[dtype];
  const strides = [q, k, v].flatMap((operand) => strideBytes(operand, dtype));
  const pointers = {
    query: pointer('q', q.offset * bytes),
    // A cache without keys has no memory.
    ...(problem.keyLength === 0 ? {} : { key: pointer('k', k.offset * bytes), value: pointer('v', v.offset * bytes) }),
  };
  return { pointers, strides };
}

/**
 * Whether the kernel quantizes Q itself: when decoding, a few rows that have a scale each. Blocks of FP4, whose scales are searched for, are
 * made by a launch of their own.
 */
function fusesQuery({ problem, choice, scheme }: Context, keyWarps: number): boolean {
  const { queryLength } = problem;
  if (keyWarps === 1 || isExact(scheme) || choice.smoothQ !== false || queryLength > FUSED_ROWS) return false;
  if (scheme.qkFormat === 's8') return queryLength === 1 || scheme.queryGroups[1] === FUSED_ROWS;
  return scheme.qkFormat === 'e2m1-as-f16' && scheme.queryFormat === 'exact-halves';
}

function fusedQueryOf({ problem, choice, device, layout }: Context): NonNullable<AttentionConfig['fusedQuery']> {
  const { q, headDim, dtype, returnLse, softcap, sinks } = problem;
  // Where only differences of a row's scores count, the mean key's share falls out.
  const wholeScores = returnLse || softcap !== 0 || sinks !== undefined;
  return {
    ...{ dtype, headDim, loadWidth: loadWidthOf(q, headDim, dtype, device.pointerAlignment ?? 16) },
    keyMean: wholeScores && choice.smoothK && layout.keyTiles > 0,
  };
}

/** What a kernel that quantizes Q takes besides. */
function fusedArguments({ problem }: Context, { fusedQuery }: AttentionConfig): KernelArgument[] {
  if (fusedQuery === undefined) return [];
  const [queryBatch, queryHead, queryToken] = strideBytes(problem.q, problem.dtype);
  return [
    ...inOrder(FUSED_POINTERS, {
      ...(fusedQuery.keyMean ? { keyMean: pointer('keyMean') } : {}),
      ...{ queryBatch, queryHead, queryToken },
    }),
    f32(problem.smScale * LOG2_E),
  ];
}

/** Rows beyond which partial results would be as much to read and write as the keys of a part: splits by length are for decoding. */
const MOST_ROWS_BY_LENGTH = 16;

/** The attention kernel of a problem, its grid without splits and its splits. */
function shapeOf(context: Context) {
  const { problem, rowsAreHeads, choice, device, layout, scheme } = context;
  const { batch, queryHeads, queryLength, dtype, valueDim } = problem;
  const { target } = device;
  const tile = {
    ...chooseTile(target, tileBytesOf(context), scheme.paddedValueDim, {
      queryLength,
      smoothQ: choice.smoothQ !== false,
      unpacksFp4: scheme.qkFormat === 'e2m1-as-f16',
      fp4Values: scheme.pvFormat === 'e2m1-as-f16',
      exact: isExact(scheme),
    }),
    ...context.overrides,
  };
  const queryTiles = Math.ceil(queryLength / blockQueries(tile));
  const blocks = queryTiles * queryHeads * batch;
  const tileRows = Math.min(blockQueries(tile), queryLength);
  const resident = tile.minBlocksPerMultiprocessor;
  const byLength =
    queryTiles > 1 || tileRows > MOST_ROWS_BY_LENGTH || problem.blocks !== undefined
      ? undefined
      : lengthSplitsOf(context, LEAST_TILES, blocks, resident, mostJoinedInside(context, tileRows));
  // Of keys in pages nobody here knows the lengths; several tiles of rows mostly fill the card anyway.
  const inPages = context.pages !== undefined;
  const splits = byLength?.slots ?? (inPages ? 1 : splitsOf(device, layout.keyTiles, LEAST_TILES, blocks, resident));
  const joins = byLength !== undefined || joinsInside(context, tileRows, splits);
  const fused = fusesQuery(context, tile.keyWarps ?? 1);
  const config: AttentionConfig = {
    target,
    fusedQuery: fused ? fusedQueryOf(context) : undefined,
    given: isExact(scheme) ? givenOf(context) : undefined,
    qkFormat: scheme.qkFormat,
    codeOrder: scheme.codeOrder,
    qkRowBytes: scheme.qkRowBytes,
    queryRowBytes: scheme.queryRowBytes,
    quantizedWeights: scheme.quantizedWeights,
    pvFormat: scheme.pvFormat,
    accumulate: scheme.accumulate,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    ...tile,
    keyStages: tile.keyStages ?? 2,
    keyWarps: tile.keyWarps ?? 1,
    eightRows: tile.warps === 1 && tile.rowsPerWarp === 16 && queryLength <= 8 && !scheme.quantizedWeights,
    queryScales: scheme.queryGroups,
    keyScales: scheme.keyGroups,
    // FP16 holds P up to 2^8 as well as up to 1; FP16 sums and E4M3, whose maximum is P's already, have no room.
    // FP4 uses all of its range for P up to 1.
    rescaleThreshold: scheme.pvFormat !== 'e4m3' && scheme.accumulate === 'f32' && !scheme.quantizedWeights ? 8 : 0,
    banded: isBanded(problem.band),
    sameBand: rowsAreHeads,
    mask: maskFormatOf(problem),
    blocks: problem.blocks !== undefined,
    softcap: problem.softcap !== 0,
    sinks: splits > 1 && !joins ? 'none' : sinkFormatOf(problem),
    smoothQ: choice.smoothQ !== false,
    smoothV: choice.smoothV,
    outputType: dtype,
    lse: problem.returnLse,
    split: splits > 1,
    joins,
    alignedFours: joins && hasAlignedFours(context),
    ...(byLength === undefined ? {} : { splitsByLength: true as const }),
    ...(context.pages === undefined ? {} : { pageTokens: context.pages.pageTokens }),
  };
  const tiles: ListedTiles = { tileRows: blockQueries(tile), packedHeads: 1, tileKeys: BLOCK_K, queryTiles };
  return { config, queryTiles, blocks, splits, byLength, tiles };
}

const quantizedPointers = (scheme: Scheme) => ({
  query: pointer('query'),
  queryScale: pointer('queryScale'),
  rowBias: pointer('rowBias'),
  key: pointer('key'),
  keyScale: pointer('keyScale'),
  keyFaults: pointer('keyFaults'),
  ...(hasFp4Keys(scheme) ? {} : { keyExponents: pointer('keyExponents') }),
  value: pointer('value'),
});

function attentionLaunch(
  context: Context,
  { config, queryTiles, blocks, splits, byLength, tiles }: ReturnType<typeof shapeOf>,
) {
  const { problem, choice, layout, scheme, pages } = context;
  const { queryHeads, kvHeads } = problem;
  const module = moduleOf('attention', attention, config);
  const { mask, strides } = maskArgumentsOf(problem);
  const given = isExact(scheme) ? givenArguments(context) : undefined;
  // The sign of smScale is in the codes of Q, where there are such.
  const scoreScale = given === undefined ? Math.abs(problem.smScale) : problem.smScale;
  return launch(
    'attention',
    module,
    'attention',
    (byLength === undefined ? blocks : blocks / problem.batch) * splits,
    config.warps * config.keyWarps * 32,
    module.kernel().sharedBytes,
    [
      ...inOrder(ATTENTION_POINTERS, {
        sequences: pointer('sequences'),
        ...(given === undefined ? quantizedPointers(scheme) : given.pointers),
        ...(config.fusedQuery === undefined
          ? {}
          : {
              query: pointer('q', problem.q.offset * BYTES[problem.dtype]),
              queryScale: pointer(undefined),
              rowBias: pointer(undefined),
            }),
        ...(scheme.pvFormat.startsWith('e4m3') ? { valueScale: pointer('valueScale') } : {}),
        ...(scheme.sharesRange ? { rangeShift: pointer('rangeShift') } : {}),
        ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
        ...(choice.smoothQ ? { meanScores: pointer('meanScores') } : {}),
        mask,
        ...outputPointersOf(context, splits),
      }),
      ...inOrder(ATTENTION_INTEGERS, {
        queryHeads: u32(queryHeads),
        headsPerKeyHead: u32(queryHeads / kvHeads),
        queryTiles: u32(queryTiles),
        splits: u32(splits),
        paddedQueries: u32(layout.paddedQueries),
        paddedKeys: u32(layout.paddedKeys),
        meanScoreKeys: u32(meanScoreKeysOf(context)),
      }),
      ...inOrder(ATTENTION_STRIDES, { ...strides, ...outputStridesOf(problem, context.channels.of) }),
      ...bandArguments(problem.band),
      // K that is unpacked to FP16 comes out smaller.
      f32(scoreScale * LOG2_E * (scheme.qkFormat === 'e2m1-as-f16' ? UNPACKED_UNIT : 1)),
      ...softcapArguments(problem),
      ...(hasFp4Keys(scheme)
        ? inOrder(FP4_POINTERS, {
            ...(scheme.qkFormat === 'e2m1' ? { queryBlockScale: pointer('queryBlockScale') } : {}),
            keyBlockScale: pointer('keyBlockScale'),
            ...(hasFp4Values(scheme)
              ? { valueBlockScale: pointer('valueBlockScale'), valueTileScale: pointer('valueTileScale') }
              : {}),
          })
        : []),
      ...(given === undefined ? [] : given.strides),
      ...(splits > 1 && !config.joins ? [] : sinkArgumentsOf(problem)),
      ...fusedArguments(context, config),
      ...(config.joins ? joinArguments(context) : []),
      ...blockArgumentsOf(context, tiles),
      ...(byLength === undefined
        ? []
        : inOrder(LENGTH_SPLIT_INTEGERS, { sequenceCount: u32(problem.batch), mostSplits: u32(byLength.mostSplits) })),
      ...(pages === undefined
        ? []
        : [
            ...inOrder(PAGE_POINTERS, { pages: pointer('pages'), lengths: pointer('lengths') }),
            ...inOrder(PAGE_INTEGERS, {
              poolPages: u32(pages.poolPages),
              pagesPerSequence: u32(pages.pagesPerSequence),
            }),
          ]),
    ],
  );
}

function attend(context: Context): ReturnType<FamilyLaunches['attend']> {
  const { problem, choice, layout, scheme } = context;
  if (layout.queryTiles * problem.queryHeads * problem.batch === 0) return { launches: [], scratch: {} };
  const shape = shapeOf(context);
  const exact = isExact(scheme);
  const quantizes = !exact && shape.config.fusedQuery === undefined;
  const blocks = (problem.queryHeads * layout.paddedQueries) / BLOCK_Q;
  return {
    launches: [
      ...(!quantizes ? [] : [hasFp4Keys(scheme) ? fp4QueryLaunch(context) : quantizeQueryLaunch(context)]),
      ...(choice.smoothQ && layout.keyTiles > 0 ? [meanScoresLaunch(context)] : []),
      ...tileListLaunches(context, shape.tiles),
      attentionLaunch(context, shape),
      ...(shape.config.joins ? [] : combineLaunches(context, shape.splits)),
    ],
    scratch: {
      ...(!quantizes ? {} : { ...queryScratch(context), ...fp4QueryScratch(context) }),
      ...tileListScratch(context, shape.tiles),
      ...(choice.smoothQ
        ? {
            queryMean: blocks * scheme.paddedDim * 4,
            meanScores: Math.max(4, blocks * meanScoreKeysOf(context) * 4),
          }
        : {}),
      ...combineScratch(
        context,
        shape.splits,
        shape.byLength && (shape.blocks / problem.batch) * blockQueries(shape.config),
      ),
    },
    zeroed: shape.config.joins ? { arrivals: 4 * shape.blocks } : {},
  };
}

/** 1.5 * 2^23 times smScale and the scales of Q and K, each up to FP16's largest number / 127, stays a float32. */
const MOST_SM_SCALE = 2 ** 80;

export const MMA_SYNC: FamilyLaunches = { mostSmScale: MOST_SM_SCALE, headsAsRows, keyValue, attend };
