/** Launches of the kernels on `wgmma`. */
import { isBanded } from '../../../attention/band.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { descriptorOf } from '../kernel-table.ts';
import { BLOCK_K } from '../kernels/mma-sync/config.ts';
import { LOG2_E4M3_MAX } from '../kernels/parts/constants.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import {
  KEY_VALUE_TILE,
  QUANTIZE_KEY_VALUE_INTEGERS,
  QUANTIZE_KEY_VALUE_POINTERS,
  type QuantizeKeyValueConfig,
  quantizeKeyValueThreads,
} from '../kernels/quantize/key-value/config.ts';
import { quantizeKeyValue } from '../kernels/quantize/key-value/kernel.ts';
import { wgmmaAttention } from '../kernels/wgmma/attention.ts';
import { sharedPlanOf, type WgmmaConfig } from '../kernels/wgmma/config.ts';
import { CONSUMER_ROWS, WGMMA_BLOCK_K, WGMMA_INTEGERS, WGMMA_POINTERS, WGMMA_STRIDES } from '../kernels/wgmma/frame.ts';
import { exactTuningOf, tuningOf, type WgmmaTuning } from '../kernels/wgmma/table.ts';
import { TARGET_FEATURES } from '../ptx/targets.ts';
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
  outputPointersOf,
} from './combine.ts';
import {
  type Context,
  type DeviceFacts,
  type FamilyLaunches,
  type KeyValuePart,
  loadWidthOf,
  splitsOf,
} from './context.ts';
import { headsAsRows } from './heads-as-rows.ts';
import type { KernelArgument, KernelLaunch, TensorMapDescription } from './launch.ts';
import { MMA_SYNC } from './mma-sync.ts';
import { quantizeQueryLaunch, queryScratch, statisticsLaunches } from './quantize.ts';
import { blockArgumentsOf, type ListedTiles, tileListLaunches, tileListScratch } from './tile-lists.ts';
import { visibleKeysPointer } from './visible-keys.ts';

/**
 * Heads that lie side by side in one tile: those over one head of K, when the queries are too short to fill a tile
 * alone.
 */
function packedHeadsOf(queryLength: number, headsPerKeyHead: number): number {
  const powerOfTwo = (headsPerKeyHead & (headsPerKeyHead - 1)) === 0;
  return powerOfTwo && headsPerKeyHead <= CONSUMER_ROWS && queryLength < CONSUMER_ROWS ? headsPerKeyHead : 1;
}

/** Smallest smScale by which scores may be multiplied after they were compared. */
const LEAST_SCALE = 2 ** -100;

interface Shape {
  readonly config: WgmmaConfig;
  readonly tuning: WgmmaTuning;
  readonly rows: number;
  readonly queryTiles: number;
  /** Heads of Q, or groups of packed ones, over all sequences. */
  readonly units: number;
  readonly splits: number;
}

/** Configuration and grid of a problem. */
function shapeOf(context: Context): Shape {
  const { problem, choice, device, scheme, layout } = context;
  const { queryHeads, kvHeads, batch, queryLength, keyLength, dtype, headDim, valueDim, mask } = problem;
  const packedHeads = packedHeadsOf(queryLength, queryHeads / kvHeads);
  const totalRows = queryLength * packedHeads;
  const pvFormat = scheme.pvFormat === 'f16' || scheme.pvFormat === 'bf16' ? scheme.pvFormat : 'e4m3';
  const qkFormat = scheme.qkFormat === 'f16' || scheme.qkFormat === 'bf16' ? scheme.qkFormat : 's8';
  const exact = qkFormat !== 's8';
  const size = {
    qkRowBytes: scheme.qkRowBytes,
    paddedValueDim: scheme.paddedValueDim,
    rows: totalRows,
    scoresAreFloat: mask !== undefined || problem.softcap !== 0,
  };
  const tuning: WgmmaTuning = {
    ...(exact
      ? exactTuningOf({ ...size, banded: isBanded(problem.band) })
      : tuningOf({
          ...size,
          pvFormat: pvFormat === 'e4m3' ? 'e4m3' : 'f16',
          promoted: choice.pvAccumDtype !== 'fp32',
          capped: problem.softcap !== 0,
          blockRows: problem.blocks?.rows,
        })),
    ...context.overrides,
  };
  const { fuseQuery, persistent: _persistent, groupMegabytes: _groupMegabytes, ...tile } = tuning;
  const rows = tile.consumers * CONSUMER_ROWS;
  const queryTiles = Math.ceil(totalRows / rows);
  const units = (queryHeads / packedHeads) * batch;
  // A part of fewer than two tiles is not worth its prologue.
  const splits = splitsOf(device, Math.ceil(keyLength / WGMMA_BLOCK_K), 2, queryTiles * units, tile.minBlocks);
  const joins = joinsInside(context, Math.min(rows, totalRows), splits);
  const aligned = loadWidthOf(problem.q, headDim, dtype, device.pointerAlignment ?? 16) >= 4;
  // Q quantized by the kernel has scales of other rows than Q quantized by itself.
  const fused = fuseQuery && aligned && choice.qkQuantGran === 'per-thread' && problem.forGradients !== true;
  const keyMean = choice.smoothK && layout.keyTiles > 0;
  const wholeRows = packedHeads === 1 && (problem.blocks?.rows ?? 0) % rows === 0;
  const blocks = problem.blocks === undefined ? 'none' : wholeRows ? 'whole rows' : 'any';
  const config: WgmmaConfig = {
    ...tile,
    // Rows i and i + 8 are heads of different magnitude when more than eight lie side by side.
    queryScalePerRow: fused && (tile.queryScalePerRow || packedHeads > 8),
    qkFormat,
    pvFormat,
    packedSequences: exact && problem.sequences !== undefined,
    // Also where a subnormal scale would be flushed to 0, of which -Infinity makes NaN.
    scalesFirst: exact && problem.smScale < LEAST_SCALE,
    qkRowBytes: scheme.qkRowBytes,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    fusedQuery: fused ? { dtype, headDim, keyMean } : undefined,
    queryScales: scheme.queryGroups,
    keyScales: scheme.keyGroups,
    packedHeads,
    exponentOffset: pvFormat === 'e4m3' ? LOG2_E4M3_MAX - tile.rescaleThreshold : 0,
    banded: isBanded(problem.band),
    mask: maskFormatOf(problem),
    blocks,
    softcap: problem.softcap !== 0,
    sinks: splits > 1 && !joins ? 'none' : sinkFormatOf(problem),
    smoothV: choice.smoothV,
    outputType: dtype,
    // Allocations begin at multiples of 16 bytes, and rows are contiguous.
    alignedOutput: exact && splits === 1 && valueDim % 8 === 0,
    lse: problem.returnLse,
    split: splits > 1,
    joins,
    alignedFours: joins && hasAlignedFours(context),
  };
  return { config, tuning, rows, queryTiles, units, splits };
}

/** Tensor maps of the caller's operands, likewise. */
function exactMapsOf({ problem }: Context, { config, rows }: Shape): KernelArgument[] {
  const { q, k, v, batch, queryHeads, kvHeads, queryLength, keyLength, sequences, headDim, valueDim } = problem;
  const { packedHeads } = config;
  const { rowLayout, valueLayout, valueBlockChannels } = sharedPlanOf(config);
  const [totalQueries, totalKeys] =
    sequences === undefined
      ? [queryLength, keyLength]
      : [sequences.cuSeqlensQ[batch] as number, sequences.cuSeqlensK[batch] as number];
  const entries = sequences === undefined ? batch : 1;
  const mapOf = (
    buffer: 'q' | 'k' | 'v',
    operand: OperandLayout,
    dim: number,
    extents: readonly [tokens: number, heads: number],
    box: readonly number[],
    rowBytes: number,
    headsFirst = false,
  ): KernelArgument => {
    // The stride of a single one is never used, but must be valid.
    const strideOf = (count: number, stride: number) => (count <= 1 ? 16 : stride * 2);
    const [tokens, heads] = [
      [extents[0], strideOf(extents[0], operand.tokenStride)],
      [extents[1], strideOf(extents[1], operand.headStride)],
    ] as const;
    const outer = [
      ...(headsFirst ? [heads, tokens] : [tokens, heads]),
      [entries, strideOf(entries, operand.batchStride)],
    ];
    // A cache without keys has no memory. Its maps are never followed, but must be valid.
    const place = extents[0] === 0 ? { buffer: 'sequences' } : { buffer, byteOffset: operand.offset * 2 };
    const map: TensorMapDescription = {
      ...place,
      elementType: config.qkFormat === 'f16' ? 'f16' : 'bf16',
      dimensions: [dim, ...outer.map(([count]) => Math.max(1, count as number))],
      byteStrides: outer.map(([, stride]) => stride as number),
      box: [...box, 1],
      swizzle: rowBytes === 128 ? '128B' : '64B',
      l2Promotion: '256B',
    };
    return { kind: 'tensor-map', map };
  };
  const qkBox = rowLayout.rowBytes / 2;
  const queryBox = packedHeads === 1 ? [qkBox, rows, 1] : [qkBox, packedHeads, rows / packedHeads];
  const keys = [totalKeys, kvHeads] as const;
  return [
    mapOf('q', q, headDim, [totalQueries, queryHeads], queryBox, rowLayout.rowBytes, packedHeads > 1),
    mapOf('k', k, headDim, keys, [qkBox, WGMMA_BLOCK_K, 1], rowLayout.rowBytes),
    mapOf('v', v, valueDim, keys, [valueBlockChannels, WGMMA_BLOCK_K, 1], valueLayout.rowBytes),
  ];
}

/** Tensor maps of the quantized operands, in the order of the kernel's parameters. */
function mapsOf({ problem, layout }: Context, { config, rows }: Shape): KernelArgument[] {
  const { queryHeads, kvHeads } = problem;
  const { qkRowBytes, paddedValueDim, packedHeads, pvFormat, fusedQuery } = config;
  const { rowLayout, valueLayout, valueBlockChannels } = sharedPlanOf(config);
  const rowSwizzle = rowLayout.rowBytes === 128 ? '128B' : '64B';
  // Without keys the maps are never followed, but must be valid.
  const paddedKeys = layout.paddedKeys === 0 ? WGMMA_BLOCK_K : layout.paddedKeys;
  const keys = kvHeads * paddedKeys;
  const key: TensorMapDescription = {
    buffer: 'key',
    elementType: 'u8',
    dimensions: [qkRowBytes, keys],
    byteStrides: [qkRowBytes],
    box: [rowLayout.rowBytes, WGMMA_BLOCK_K],
    swizzle: rowSwizzle,
    l2Promotion: '256B',
  };
  const query: TensorMapDescription =
    packedHeads === 1
      ? {
          ...key,
          buffer: 'query',
          dimensions: [qkRowBytes, queryHeads * layout.paddedQueries],
          box: [rowLayout.rowBytes, rows],
        }
      : {
          ...key,
          buffer: 'query',
          dimensions: [qkRowBytes, queryHeads, layout.paddedQueries],
          byteStrides: [layout.paddedQueries * qkRowBytes, qkRowBytes],
          box: [rowLayout.rowBytes, packedHeads, rows / packedHeads],
        };
  const value: TensorMapDescription =
    pvFormat === 'e4m3'
      ? {
          buffer: 'value',
          elementType: 'u8',
          dimensions: [WGMMA_BLOCK_K, (keys / WGMMA_BLOCK_K) * paddedValueDim],
          byteStrides: [WGMMA_BLOCK_K],
          box: [WGMMA_BLOCK_K, paddedValueDim],
          swizzle: '128B',
          l2Promotion: '256B',
        }
      : {
          buffer: 'value',
          elementType: 'f16',
          dimensions: [paddedValueDim, keys],
          byteStrides: [paddedValueDim * 2],
          box: [valueBlockChannels, WGMMA_BLOCK_K],
          swizzle: valueLayout.rowBytes === 128 ? '128B' : '64B',
          l2Promotion: '256B',
        };
  // A kernel that quantizes Q itself does not look at the map of Q.
  return [fusedQuery === undefined ? query : key, key, value].map((map) => ({ kind: 'tensor-map', map }));
}

/** Heads that are worked on together, so that their K and V stay in the L2 cache. */
function headGroupOf({ problem, scheme }: Context, { tuning, units }: Shape): number {
  const valueBytes = scheme.paddedValueDim * (scheme.pvFormat.startsWith('e4m3') ? 1 : 2);
  const bytes = Math.max(1, problem.keyLength) * (scheme.qkRowBytes + valueBytes);
  return Math.max(1, Math.min(units, Math.floor((tuning.groupMegabytes * 2 ** 20) / bytes)));
}

/** Quantizes K and V in one launch. */
function keyValueLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, headDim, valueDim, k, v } = problem;
  const fp8 = scheme.pvFormat !== 'f16';
  const config: QuantizeKeyValueConfig = {
    target,
    dtype,
    valueFormat: fp8 ? 'e4m3' : 'f16',
    headDim,
    paddedDim: scheme.paddedDim,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    keyLoadWidth: loadWidthOf(k, headDim, dtype, pointerAlignment),
    valueLoadWidth: loadWidthOf(v, valueDim, dtype, pointerAlignment),
    keyScales: scheme.keyGroups,
    smoothK: choice.smoothK,
    smoothV: choice.smoothV,
    hiddenKeys,
  };
  const module = moduleOf('quantizeKeyValue', quantizeKeyValue, config);
  const tiles = Math.ceil((layout.keyTiles * BLOCK_K) / KEY_VALUE_TILE);
  return launch(
    'quantize K and V',
    module,
    'quantizeKeyValue',
    tiles * kvHeads * batch,
    quantizeKeyValueThreads(config),
    module.kernel().sharedBytes,
    [
      ...inOrder(QUANTIZE_KEY_VALUE_POINTERS, {
        sequences: pointer('sequences'),
        k: pointer('k', k.offset * BYTES[dtype]),
        v: pointer('v', v.offset * BYTES[dtype]),
        ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
        ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
        ...(fp8 ? { valueScale: pointer('valueScale'), valueTileScale: pointer('valueTileScale') } : {}),
        key: pointer('key'),
        keyScale: pointer('keyScale'),
        keyFaults: pointer('keyFaults'),
        keyExponents: pointer('keyExponents'),
        value: pointer('value'),
        ...visibleKeysPointer(context),
      }),
      ...inOrder(QUANTIZE_KEY_VALUE_INTEGERS, {
        heads: u32(kvHeads),
        tiles: u32(tiles),
        paddedTokens: u32(layout.paddedKeys),
      }),
      ...strideBytes(k, dtype),
      ...strideBytes(v, dtype),
    ],
  );
}

function keyValue(context: Context, parts: readonly KeyValuePart[]): KernelLaunch[] {
  return [
    ...(parts.includes('means') ? statisticsLaunches(context, context.scheme.valueTileScales) : []),
    ...(parts.includes('key') || parts.includes('value') ? [keyValueLaunch(context)] : []),
  ];
}

const listedTilesOf = ({ config, rows, queryTiles }: Shape): ListedTiles => ({
  tileRows: rows,
  packedHeads: config.packedHeads,
  wholeRows: config.blocks === 'whole rows',
  tileKeys: WGMMA_BLOCK_K,
  queryTiles,
});

function attentionLaunch(context: Context, shape: Shape): KernelLaunch {
  const { problem, choice, device, layout, scheme } = context;
  const { config, tuning, queryTiles, units, splits } = shape;
  const { queryHeads, kvHeads, dtype, q } = problem;
  const module = moduleOf('wgmmaAttention', wgmmaAttention, config);
  const { sharedBytes, threads } = module.kernel();
  if (sharedBytes > TARGET_FEATURES.sm_90a.sharedBytesPerBlock) {
    throw new RangeError(`${sharedBytes} bytes of shared memory for one CTA`);
  }
  const { mask, strides } = maskArgumentsOf(problem);
  const [queryBatch, queryHead, queryToken] = strideBytes(q, dtype);
  const exact = config.qkFormat !== 's8';
  const work = queryTiles * units * splits;
  const blocks = tuning.persistent ? Math.min(work, device.multiprocessors * config.minBlocks) : work;
  return launch('attention', module, 'wgmmaAttention', blocks, threads, sharedBytes, [
    ...inOrder(WGMMA_POINTERS, {
      sequences: pointer('sequences'),
      ...(exact
        ? {}
        : config.fusedQuery === undefined
          ? { queryScale: pointer('queryScale'), rowBias: pointer('rowBias') }
          : { query: pointer('q', q.offset * BYTES[dtype]) }),
      ...(config.fusedQuery?.keyMean === true ? { keyMean: pointer('keyMean') } : {}),
      ...(exact
        ? {}
        : {
            keyScale: pointer('keyScale'),
            keyFaults: pointer('keyFaults'),
            keyExponents: pointer('keyExponents'),
          }),
      ...(config.pvFormat === 'e4m3' ? { valueScale: pointer('valueScale') } : {}),
      ...(scheme.valueTileScales ? { valueTileScale: pointer('valueTileScale') } : {}),
      ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
      mask,
      ...outputPointersOf(context, splits),
    }),
    ...inOrder(WGMMA_INTEGERS, {
      queryHeads: u32(queryHeads),
      headsPerKeyHead: u32(queryHeads / kvHeads),
      queryTiles: u32(queryTiles),
      splits: u32(splits),
      paddedQueries: u32(layout.paddedQueries),
      paddedKeys: u32(layout.paddedKeys),
      work: u32(work),
      headGroup: u32(headGroupOf(context, shape)),
    }),
    ...inOrder(WGMMA_STRIDES, { queryBatch, queryHead, queryToken, ...strides, ...outputStridesOf(problem) }),
    ...bandArguments(problem.band),
    f32(problem.smScale),
    ...softcapArguments(problem),
    ...(exact ? exactMapsOf(context, shape) : mapsOf(context, shape)),
    ...(splits > 1 && !config.joins ? [] : sinkArgumentsOf(problem)),
    ...(config.joins ? joinArguments(context) : []),
    ...blockArgumentsOf(context, listedTilesOf(shape)),
  ]);
}

function attend(context: Context): ReturnType<FamilyLaunches['attend']> {
  const shape = shapeOf(context);
  const { config, queryTiles, units, splits } = shape;
  if (queryTiles * units === 0) return { launches: [], scratch: {} };
  const quantizes = config.qkFormat === 's8' && config.fusedQuery === undefined;
  return {
    launches: [
      ...(quantizes ? [quantizeQueryLaunch(context)] : []),
      ...tileListLaunches(context, listedTilesOf(shape)),
      attentionLaunch(context, shape),
      ...(config.joins ? [] : combineLaunches(context, splits)),
    ],
    scratch: {
      ...(quantizes ? queryScratch(context) : {}),
      ...tileListScratch(context, listedTilesOf(shape)),
      ...combineScratch(context, splits),
    },
    zeroed: config.joins ? { arrivals: 4 * queryTiles * units } : {},
  };
}

/** Scores of ordinary inputs stay below 2^36. From there on, between two floats lie more than the 128 that P's exponents are kept within. */
const MOST_SM_SCALE = 2 ** 30;

/** Whether the copies of this kernel take 16-bit operands as they lie: rows of whole chunks of 16 bytes, none twice. */
export function takesAsTheyLie({
  problem,
  device,
}: {
  readonly problem: AttentionProblem;
  readonly device: Pick<DeviceFacts, 'pointerAlignment'>;
}): boolean {
  const { q, k, v, batch, queryHeads, kvHeads, queryLength, keyLength, sequences, headDim, valueDim, dtype } = problem;
  const entries = sequences === undefined ? batch : 1;
  const alignment = device.pointerAlignment ?? 16;
  const takes = (operand: OperandLayout, dim: number, heads: number, tokens: number) =>
    loadWidthOf(operand, dim, dtype, alignment) === 8 &&
    [
      [entries, operand.batchStride],
      [heads, operand.headStride],
      [tokens, operand.tokenStride],
    ].every(([count, stride]) => (count as number) <= 1 || ((stride as number) > 0 && (stride as number) < 2 ** 38));
  return (
    takes(q, headDim, queryHeads, queryLength) &&
    takes(k, headDim, kvHeads, keyLength) &&
    takes(v, valueDim, kvHeads, keyLength)
  );
}

const ALONE: FamilyLaunches = { mostSmScale: MOST_SM_SCALE, keyPadding: KEY_VALUE_TILE, keyValue, attend };

/**
 * One token with V in FP16: the warps of `mma.sync`, each with keys of its own, took an H200 54 us for 59 over 65,536 keys and 95 for 109
 * over 16 x 8192 (`bench/results/cuda-caches-h200*.json`); with V in FP8 it is the other way about. Only where the heads over
 * one head of K are rows of one tile there too.
 */
function insteadFor(problem: AttentionProblem, choice: KernelChoice): FamilyLaunches | undefined {
  const { headDim, valueDim, queryHeads, kvHeads, queryLength } = problem;
  const { pvFormat } = descriptorOf(choice.descriptor.name);
  if (queryLength !== 1 || pvFormat !== 'f16' || Math.max(headDim, valueDim) > 128) return undefined;
  // Blocks that are all kept give the bits of a call without them, so they are no reason for another kernel.
  const rows = headsAsRows({ ...problem, blocks: undefined }, choice)?.queryLength;
  return rows === queryHeads / kvHeads ? { ...ALONE, headsAsRows, attend: MMA_SYNC.attend } : undefined;
}

export const WGMMA: FamilyLaunches = { ...ALONE, insteadFor };
