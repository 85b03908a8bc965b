/**
 * From a problem and a kernel choice to launches, as pure data: what a plan binds to device memory, and what the simulator
 * runs without a device. Quantized operands are padded (every sequence to whole tiles, channels to whole tensor-core steps)
 * and ordered `[head, token, channel]` with the sequences of a batch end to end.
 */

import { type Band, isBanded, NO_LIMIT } from '../../../attention/band.ts';
import {
  type AttentionProblem,
  lseShapeOf,
  type OperandLayout,
  outputLayoutOf,
  sequencesOf,
} from '../../../attention/problem.ts';
import { InvalidArgumentError } from '../../../errors.ts';
import { V_FP8_MAX } from '../../../quantization/schemes.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { KernelChoice } from '../../backend.ts';
import {
  COMBINE_INTEGERS,
  COMBINE_POINTERS,
  COMBINE_ROWS,
  COMBINE_STRIDES,
  type CombineConfig,
  combine,
} from '../kernels/combine.ts';
import { BYTES, LOG2_E, type LoadWidth, roundUp, SEQUENCE_INTS } from '../kernels/common.ts';
import {
  ATTENTION_INTEGERS,
  ATTENTION_POINTERS,
  ATTENTION_STRIDES,
  type AttentionConfig,
  attention,
  BLOCK_K,
  blockQueries,
} from '../kernels/mma-sync/attention.ts';
import { chooseTile } from '../kernels/mma-sync/tiles.ts';
import {
  CHANNEL_STATISTICS_INTEGERS,
  CHANNEL_STATISTICS_POINTERS,
  CHANNEL_STATISTICS_THREADS,
  type ChannelStatisticsConfig,
  channelStatistics,
} from '../kernels/quantize/channel-statistics.ts';
import {
  MEAN_SCORES_INTEGERS,
  MEAN_SCORES_POINTERS,
  MEAN_SCORES_THREADS,
  type MeanScoresConfig,
  meanScores,
} from '../kernels/quantize/mean-scores.ts';
import {
  QUANTIZE_TOKENS_INTEGERS,
  QUANTIZE_TOKENS_POINTERS,
  type QuantizeTokensConfig,
  quantizeTokens,
  quantizeTokensThreads,
} from '../kernels/quantize/tokens.ts';
import {
  convertValue,
  quantizeValue,
  quantizeValueThreads,
  VALUE_BLOCK,
  VALUE_CHUNKS,
  VALUE_INTEGERS,
  VALUE_POINTERS,
  type ValueConfig,
  valueMaximum,
  valueThreads,
} from '../kernels/quantize/value.ts';
import type { HopperTuning } from '../kernels/wgmma/table.ts';
import { printKernel } from '../ptx/printer.ts';
import { TARGET_FEATURES, type Target } from '../ptx/targets.ts';
import type { Kernel } from '../ptx/types.ts';
import { headsAsRows } from './heads-as-rows.ts';
import type { BufferName, KernelArgument, KernelLaunch, KernelModule, LaunchSequence } from './launch.ts';
import { hopperAttendLaunches, hopperKeyValueLaunch, isHopperKernel } from './wgmma.ts';

/** What planning needs to know of a device. */
export interface DeviceFacts {
  readonly target: Target;
  readonly multiprocessors: number;
  /** Alignment in bytes that the addresses of q, k and v are known to have; default 16, which allocations always have. */
  readonly pointerAlignment?: number;
}

/** A module that can also be inspected and simulated. */
export interface SimulatableModule extends KernelModule {
  readonly kernel: () => Kernel;
}

/** Rows of Q to which sequences are padded. */
export const BLOCK_Q = 128;

/** Quantized K and V: made once, attended to many times. */
export const KEY_VALUE_BUFFERS = [
  'key',
  'keyScale',
  'keyFaults',
  'keyMean',
  'value',
  'valueScale',
  'valueTileScale',
  'valueMean',
] as const;

/** Everything about a call that its launches share. */
export interface Context {
  readonly problem: AttentionProblem;
  /** Rows of Q are heads: all see the same keys. */
  readonly rowsAreHeads: boolean;
  readonly choice: KernelChoice;
  readonly device: DeviceFacts;
  readonly layout: PaddedLayout;
  readonly scheme: Scheme;
  /** Replaces parts of the table's answer for Hopper kernels: for measurements. */
  readonly hopperTuning: Partial<HopperTuning>;
}

/** Where sequences lie in the padded buffers. */
export interface PaddedLayout {
  /** Rows of Q and of K of all sequences, padded. */
  readonly paddedQueries: number;
  readonly paddedKeys: number;
  /** Longest padded sequences, and tiles in them. */
  readonly queryTiles: number;
  readonly keyTiles: number;
  readonly table: Int32Array;
}

/** What a kernel choice means on a target. */
export interface Scheme {
  readonly qkFormat: 's8' | 's4';
  readonly largest: 127 | 7;
  readonly paddedDim: number;
  readonly qkRowBytes: number;
  readonly pvFormat: AttentionConfig['pvFormat'];
  readonly accumulate: AttentionConfig['accumulate'];
  readonly paddedValueDim: number;
  readonly vMax: number;
  /** V in FP8 has a scale for each tile of keys, besides those of its channels, which a sample of its tokens sets. */
  readonly valueTileScales: boolean;
  readonly queryGroups: readonly [tokens: 32 | 128, groups: 1 | 8];
  readonly keyGroups: 1 | 4;
}

const ACCUMULATE = {
  f16: { fp32: 'f32', fp16: 'f16', 'fp16+fp32': 'f16-per-tile' },
  // FP8 tensor cores do not sum in true FP32: where 'fp32' asks for it, tiles are promoted as in 'fp32+fp32'.
  e4m3: { fp32: 'f32-per-tile', 'fp32+fp32': 'f32-per-tile', 'fp32+fp16': 'f16-per-tile' },
} as const;

/** The scheme of a kernel choice; see docs/cuda.md for the kernels and docs/how-it-works.md for the groups. */
export function schemeOf(problem: AttentionProblem, choice: KernelChoice, target: Target): Scheme {
  const features = TARGET_FEATURES[target];
  const { descriptor, qkQuantGran, pvAccumDtype } = choice;
  const int4 = descriptor.name === 'qk-int4-pv-fp8-cuda';
  const hopper = isHopperKernel(descriptor.name);
  const fp8 = int4 || descriptor.name === 'qk-int8-pv-fp8-cuda' || descriptor.name === 'qk-int8-pv-fp8-cuda-sm90';
  if (hopper && target !== 'sm_90a') {
    throw new InvalidArgumentError(
      'unsupported-option',
      'options.kernel',
      `a kernel without wgmma on ${target}`,
      descriptor.name,
    );
  }
  if (fp8 && !features.fp8Conversions) {
    throw new InvalidArgumentError(
      'unsupported-option',
      'options.kernel',
      `a kernel without FP8 on ${target}`,
      descriptor.name,
    );
  }
  const qkFormat = int4 && features.int4Mma ? 's4' : 's8';
  const paddedDim = roundUp(problem.headDim, qkFormat === 's4' ? 64 : 32);
  const pvFormat = !fp8 ? 'f16' : features.fp8Mma || hopper ? 'e4m3' : 'e4m3-as-f16';
  const accumulate =
    pvFormat === 'f16'
      ? ACCUMULATE.f16[pvAccumDtype as keyof typeof ACCUMULATE.f16]
      : pvFormat === 'e4m3'
        ? ACCUMULATE.e4m3[pvAccumDtype as keyof typeof ACCUMULATE.e4m3]
        : // FP16 products are summed in true FP32 at full rate: nothing is gained by less.
          'f32';
  return {
    qkFormat,
    largest: int4 ? 7 : 127,
    paddedDim,
    qkRowBytes: qkFormat === 's4' ? paddedDim / 2 : paddedDim,
    pvFormat,
    accumulate,
    paddedValueDim: roundUp(problem.valueDim, fp8 ? 32 : 16),
    vMax: accumulate === 'f16-per-tile' && fp8 ? V_FP8_MAX.fp16Accumulator : V_FP8_MAX.default,
    valueTileScales: hopper && fp8,
    queryGroups: qkQuantGran === 'per-block' ? [128, 1] : qkQuantGran === 'per-warp' ? [32, 1] : [32, 8],
    keyGroups: qkQuantGran === 'per-thread' ? 4 : 1,
  };
}

/** Room for keys that more will be appended to: what a cache has, and which part of it is worked on. */
export interface KeyRoom {
  /** Tokens that each sequence has room for, a multiple of {@link BLOCK_K}. */
  readonly capacity: number;
  /** First token that is worked on, a multiple of {@link BLOCK_K}; default 0. */
  readonly from?: number;
}

/** Padded places of a problem's sequences; with `room`, each sequence of a dense problem has its own. */
export function paddedLayoutOf(problem: AttentionProblem, room?: KeyRoom): PaddedLayout {
  const from = room?.from ?? 0;
  const sequences = sequencesOf(problem);
  const table = new Int32Array(sequences.length * SEQUENCE_INTS);
  let paddedQueries = 0;
  let paddedKeys = 0;
  for (const { index, queryStart, queryLength, keyStart, keyLength } of sequences) {
    const keys = [keyStart + from, keyLength - from] as const;
    table.set([queryStart, queryLength, ...keys, paddedQueries, paddedKeys + from], index * SEQUENCE_INTS);
    paddedQueries += roundUp(queryLength, BLOCK_Q);
    paddedKeys += room?.capacity ?? roundUp(keyLength, BLOCK_K);
  }
  const largestRow = Math.max(problem.queryHeads * paddedQueries, problem.kvHeads * paddedKeys);
  if (largestRow >= 2 ** 31 || Math.max(problem.queryLength, problem.keyLength) >= NO_LIMIT) {
    throw new InvalidArgumentError(
      'unsupported-size',
      'q',
      'fewer than 2^31 padded tokens over all heads and sequences, and sequences shorter than 2^30',
      `${largestRow} tokens`,
    );
  }
  return {
    paddedQueries,
    paddedKeys,
    queryTiles: Math.ceil(problem.queryLength / BLOCK_Q),
    keyTiles: Math.ceil((problem.keyLength - from) / BLOCK_K),
    table,
  };
}

/** The largest load that an operand's place in memory allows. */
export function loadWidthOf(operand: OperandLayout, dim: number, dtype: DType, alignment: number): LoadWidth {
  const whole = [operand.offset, operand.batchStride, operand.headStride, operand.tokenStride, dim];
  for (const width of [8, 4, 2] as const) {
    const bytes = Math.min(16, width * BYTES[dtype]);
    if (alignment % bytes === 0 && whole.every((elements) => elements % width === 0)) return width;
  }
  return 1;
}

const modules = new Map<string, SimulatableModule>();

/** One object for each configuration, so that devices load it once. */
export function moduleOf<C extends object>(make: (config: C) => Kernel, config: C): SimulatableModule {
  const id = `${make.name}:${JSON.stringify(config)}`;
  let module = modules.get(id);
  if (module === undefined) {
    let made: Kernel | undefined;
    const kernel = () => {
      made ??= make(config);
      return made;
    };
    module = { id, kernel, ptx: () => printKernel(kernel()) };
    modules.set(id, module);
  }
  return module;
}

export const pointer = (buffer: BufferName | undefined, byteOffset = 0): KernelArgument =>
  buffer === undefined ? { kind: 'null' } : { kind: 'pointer', buffer, byteOffset };
export const u32 = (value: number): KernelArgument => ({ kind: 'u32', value });
export const s32 = (value: number): KernelArgument => ({ kind: 's32', value });
export const u64 = (value: number): KernelArgument => ({ kind: 'u64', value });
export const f32 = (value: number): KernelArgument => ({ kind: 'f32', value });

/** Arguments by name, in the order in which the kernel declares them; a pointer left out is null. */
export function inOrder<N extends string>(
  names: readonly N[],
  values: Partial<Record<N, KernelArgument>>,
): KernelArgument[] {
  return names.map((name) => values[name] ?? { kind: 'null' });
}

export function launch(
  name: string,
  module: SimulatableModule,
  entry: string,
  blocks: number,
  threads: number,
  sharedBytes: number,
  args: KernelArgument[],
): KernelLaunch {
  if (blocks >= 2 ** 31) {
    throw new InvalidArgumentError('unsupported-size', 'q', 'a grid of fewer than 2^31 blocks', String(blocks));
  }
  return { name, module, entry, grid: [blocks, 1, 1], block: [threads, 1, 1], sharedBytes, arguments: args };
}

export const strideBytes = (operand: OperandLayout, dtype: DType) =>
  [operand.batchStride, operand.headStride, operand.tokenStride].map((stride) => u64(stride * BYTES[dtype]));

function contextOf(
  asked: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  room?: KeyRoom,
  hopperTuning: Partial<HopperTuning> = {},
): Context {
  // Hopper's kernel has tiles of grouped heads of its own.
  const grouped = isHopperKernel(choice.descriptor.name) ? undefined : headsAsRows(asked, choice);
  const problem = grouped ?? asked;
  const layout = paddedLayoutOf(problem, room);
  const scheme = schemeOf(problem, choice, device.target);
  return { problem, rowsAreHeads: grouped !== undefined, choice, device, layout, scheme, hopperTuning };
}

/** Bytes of the buffers that hold quantized K and V. */
function keyValueBytes({ problem, choice, layout, scheme }: Context): Record<BufferName, number> {
  const { kvHeads, batch } = problem;
  const rows = kvHeads * layout.paddedKeys;
  const fp8 = scheme.pvFormat !== 'f16';
  return {
    key: rows * scheme.qkRowBytes,
    keyScale: (rows / BLOCK_K) * scheme.keyGroups * 4,
    keyFaults: (rows / BLOCK_K) * 8,
    ...(choice.smoothK ? { keyMean: batch * kvHeads * scheme.paddedDim * 4 } : {}),
    value: rows * scheme.paddedValueDim * (fp8 ? 1 : 2),
    ...(fp8 ? { valueScale: batch * kvHeads * scheme.paddedValueDim * 4 } : {}),
    ...(scheme.valueTileScales ? { valueTileScale: (rows / BLOCK_K) * 4 } : {}),
    ...(choice.smoothV ? { valueMean: batch * kvHeads * scheme.paddedValueDim * 4 } : {}),
  };
}

/** The parts of quantizing K and V. A cache keeps its means, and the tiles that nothing was appended to. */
export type KeyValuePart = 'means' | 'key' | 'value';
const ALL_PARTS: readonly KeyValuePart[] = ['means', 'key', 'value'];

/** Means of K and V where they are smoothed, and with `valueScales` scales of V's channels: one launch, or none. */
export function statisticsLaunches(
  { problem, choice, device, scheme }: Context,
  valueScales: boolean,
): readonly KernelLaunch[] {
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, headDim, valueDim, k, v } = problem;
  const { paddedDim, paddedValueDim } = scheme;
  const { smoothK, smoothV } = choice;
  const [keyWidth, valueWidth] = [
    loadWidthOf(k, headDim, dtype, pointerAlignment),
    loadWidthOf(v, valueDim, dtype, pointerAlignment),
  ];
  const key = { dim: headDim, paddedDim, loadWidth: keyWidth, mean: true, scale: false };
  const value = {
    dim: valueDim,
    paddedDim: paddedValueDim,
    loadWidth: valueWidth,
    mean: smoothV,
    scale: valueScales,
  };
  const config: ChannelStatisticsConfig = {
    target,
    dtype,
    key: smoothK ? key : undefined,
    value: smoothV || valueScales ? value : undefined,
  };
  const operands = [config.key, config.value].filter((of) => of !== undefined);
  if (operands.length === 0) return [];
  const module = moduleOf(channelStatistics, config);
  const blocks = operands.length * batch * kvHeads;
  return [
    launch('statistics', module, 'channelStatistics', blocks, CHANNEL_STATISTICS_THREADS, module.kernel().sharedBytes, [
      ...inOrder(CHANNEL_STATISTICS_POINTERS, {
        sequences: pointer('sequences'),
        ...(config.key === undefined ? {} : { k: pointer('k', k.offset * BYTES[dtype]), keyMean: pointer('keyMean') }),
        ...(config.value === undefined ? {} : { v: pointer('v', v.offset * BYTES[dtype]) }),
        ...(smoothV ? { valueMean: pointer('valueMean') } : {}),
        ...(valueScales ? { valueScale: pointer('valueScale') } : {}),
      }),
      ...inOrder(CHANNEL_STATISTICS_INTEGERS, { heads: u32(kvHeads), sequenceHeads: u32(batch * kvHeads) }),
      ...strideBytes(k, dtype),
      ...strideBytes(v, dtype),
    ]),
  ];
}

/** Quantizes K and V. */
function keyValueLaunches(context: Context, parts: readonly KeyValuePart[] = ALL_PARTS): KernelLaunch[] {
  const { problem, choice, device, layout, scheme } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, headDim, valueDim, k, v } = problem;
  const launches: KernelLaunch[] = [];
  if (layout.keyTiles === 0 || batch * kvHeads === 0) return launches;
  if (parts.includes('means')) launches.push(...statisticsLaunches(context, scheme.valueTileScales));
  if (isHopperKernel(choice.descriptor.name)) {
    if (parts.includes('key') || parts.includes('value')) launches.push(hopperKeyValueLaunch(context));
    return launches;
  }
  const keyWidth = loadWidthOf(k, headDim, dtype, pointerAlignment);
  const valueWidth = loadWidthOf(v, valueDim, dtype, pointerAlignment);

  const keyConfig: QuantizeTokensConfig = {
    target,
    operand: 'key',
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: keyWidth,
    container: scheme.qkFormat,
    largest: scheme.largest,
    blockTokens: BLOCK_K,
    groupTokens: BLOCK_K,
    groups: scheme.keyGroups,
    keyMean: choice.smoothK,
    smoothQ: false,
  };
  const keyModule = moduleOf(quantizeTokens, keyConfig);
  if (parts.includes('key')) {
    launches.push(
      launch(
        'quantize K',
        keyModule,
        'quantizeKey',
        layout.keyTiles * kvHeads * batch,
        quantizeTokensThreads(keyConfig),
        keyModule.kernel().sharedBytes,
        [
          ...inOrder(QUANTIZE_TOKENS_POINTERS, {
            sequences: pointer('sequences'),
            input: pointer('k', k.offset * BYTES[dtype]),
            ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
            quantized: pointer('key'),
            scale: pointer('keyScale'),
            keyFaults: pointer('keyFaults'),
          }),
          ...inOrder(QUANTIZE_TOKENS_INTEGERS, {
            heads: u32(kvHeads),
            blocks: u32(layout.keyTiles),
            paddedTokens: u32(layout.paddedKeys),
            headsPerKeyHead: u32(1),
          }),
          ...strideBytes(k, dtype),
          f32(0),
        ],
      ),
    );
  }

  if (!parts.includes('value')) return launches;
  const valueConfig: ValueConfig = {
    target,
    dtype,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    loadWidth: valueWidth,
    smoothV: choice.smoothV,
    keyScales: scheme.keyGroups,
  };
  const valueArguments = (blocks: number) => [
    ...inOrder(VALUE_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer('v', v.offset * BYTES[dtype]),
      ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
      ...(scheme.pvFormat === 'f16'
        ? {}
        : { valueMaximum: pointer('valueMaximum'), valueScale: pointer('valueScale') }),
      value: pointer('value'),
      keyScale: pointer('keyScale'),
      keyFaults: pointer('keyFaults'),
    }),
    ...inOrder(VALUE_INTEGERS, { heads: u32(kvHeads), blocks: u32(blocks), paddedTokens: u32(layout.paddedKeys) }),
    ...strideBytes(v, dtype),
  ];
  const valueTiles = (layout.keyTiles * BLOCK_K) / VALUE_BLOCK;
  if (scheme.pvFormat === 'f16') {
    const module = moduleOf(convertValue, valueConfig);
    const blocks = valueTiles * kvHeads * batch;
    launches.push(
      launch('convert V', module, 'convertValue', blocks, valueThreads(valueConfig), 0, valueArguments(valueTiles)),
    );
    return launches;
  }
  const maximumModule = moduleOf(valueMaximum, valueConfig);
  launches.push(
    launch(
      'maxima of V',
      maximumModule,
      'valueMaximum',
      VALUE_CHUNKS * kvHeads * batch,
      valueThreads(valueConfig),
      maximumModule.kernel().sharedBytes,
      valueArguments(VALUE_CHUNKS),
    ),
  );
  const quantizeConfig = { ...valueConfig, vMax: scheme.vMax };
  launches.push(
    launch(
      'quantize V',
      moduleOf(quantizeValue, quantizeConfig),
      'quantizeValue',
      valueTiles * kvHeads * batch,
      quantizeValueThreads(valueConfig),
      0,
      valueArguments(valueTiles),
    ),
  );
  return launches;
}

/** Into how many parts the keys are split so that the card is filled; 1 when it is anyway. */
function splitsOf({ device, layout }: Context, blocks: number, residentBlocks: number): number {
  if (blocks === 0) return 1;
  // A part of fewer than four tiles is not worth its prologue.
  const most = Math.max(1, Math.floor(layout.keyTiles / 4));
  return Math.max(1, Math.min(64, most, Math.floor((device.multiprocessors * residentBlocks) / blocks)));
}

/** Quantizes Q: buffers `query`, `queryScale`, `rowBias` (and `queryMean`). */
export function quantizeQueryLaunch({ problem, choice, device, layout, scheme }: Context): KernelLaunch {
  const { target, pointerAlignment = 16 } = device;
  const { batch, queryHeads, kvHeads, dtype, headDim, q } = problem;
  const [groupTokens, groups] = scheme.queryGroups;
  const queryConfig: QuantizeTokensConfig = {
    target,
    operand: 'query',
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: loadWidthOf(q, headDim, dtype, pointerAlignment),
    container: scheme.qkFormat,
    largest: scheme.largest,
    blockTokens: BLOCK_Q,
    groupTokens,
    groups,
    keyMean: choice.smoothK && layout.keyTiles > 0,
    smoothQ: choice.smoothQ,
  };
  const queryModule = moduleOf(quantizeTokens, queryConfig);
  return launch(
    'quantize Q',
    queryModule,
    'quantizeQuery',
    layout.queryTiles * queryHeads * batch,
    quantizeTokensThreads(queryConfig),
    queryModule.kernel().sharedBytes,
    [
      ...inOrder(QUANTIZE_TOKENS_POINTERS, {
        sequences: pointer('sequences'),
        input: pointer('q', q.offset * BYTES[dtype]),
        ...(queryConfig.keyMean ? { keyMean: pointer('keyMean') } : {}),
        quantized: pointer('query'),
        scale: pointer('queryScale'),
        rowBias: pointer('rowBias'),
        ...(choice.smoothQ ? { queryMean: pointer('queryMean') } : {}),
      }),
      ...inOrder(QUANTIZE_TOKENS_INTEGERS, {
        heads: u32(queryHeads),
        blocks: u32(layout.queryTiles),
        paddedTokens: u32(layout.paddedQueries),
        headsPerKeyHead: u32(queryHeads / kvHeads),
      }),
      ...strideBytes(q, dtype),
      f32(problem.smScale),
    ],
  );
}

/** The band as the attention kernels take it: keys left and right of the diagonal, and where that starts. */
export const bandArguments = ({ lower, upper, align }: Band): KernelArgument[] => [
  s32(0 - lower),
  s32(upper),
  u32(align),
];

/** Byte strides of output and LSE by the names of the kernels' parameters. */
export function outputStridesOf(problem: AttentionProblem) {
  const { dtype, queryHeads } = problem;
  const output = outputLayoutOf(problem);
  const varlen = problem.sequences !== undefined;
  const lseLength = lseShapeOf(problem).at(-1) as number;
  return {
    outputBatch: u64(output.batchStride * BYTES[dtype]),
    outputHead: u64(output.headStride * BYTES[dtype]),
    outputToken: u64(output.tokenStride * BYTES[dtype]),
    lseBatch: u64(varlen ? 0 : queryHeads * lseLength * 4),
    lseHead: u64(lseLength * 4),
  };
}

/** Joins the splits' `partialOutput` and `partialLse`. */
export function combineLaunch({ problem, device, layout, scheme }: Context, splits: number): KernelLaunch {
  const { batch, queryHeads, dtype, valueDim } = problem;
  const { target } = device;
  const combineConfig: CombineConfig = {
    target,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    outputType: dtype,
    lse: problem.returnLse,
  };
  const rowBlocks = Math.ceil(problem.queryLength / COMBINE_ROWS);
  return launch(
    'combine splits',
    moduleOf(combine, combineConfig),
    'combine',
    rowBlocks * queryHeads * batch,
    COMBINE_ROWS * 32,
    0,
    [
      ...inOrder(COMBINE_POINTERS, {
        sequences: pointer('sequences'),
        partialOutput: pointer('partialOutput'),
        partialLse: pointer('partialLse'),
        output: pointer('output'),
        ...(problem.returnLse ? { lse: pointer('lse') } : {}),
      }),
      ...inOrder(COMBINE_INTEGERS, {
        queryHeads: u32(queryHeads),
        rowBlocks: u32(rowBlocks),
        splits: u32(splits),
        paddedQueries: u32(layout.paddedQueries),
      }),
      ...inOrder(COMBINE_STRIDES, outputStridesOf(problem)),
    ],
  );
}

/** Quantizes Q and attends to quantized K and V. */
function attendLaunches(context: Context): Pick<LaunchSequence, 'launches' | 'scratch'> {
  if (isHopperKernel(context.choice.descriptor.name)) return hopperAttendLaunches(context);
  const { problem, rowsAreHeads, choice, device, layout, scheme } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, queryHeads, kvHeads, dtype, headDim, valueDim, mask } = problem;
  const launches: KernelLaunch[] = [];
  const blocks = layout.queryTiles * queryHeads * batch;
  if (blocks === 0) return { launches, scratch: {} };
  const rows = queryHeads * layout.paddedQueries;
  const headsPerKeyHead = queryHeads / kvHeads;
  const [groupTokens, groups] = scheme.queryGroups;

  launches.push(quantizeQueryLaunch(context));

  const meanScoreKeys = layout.keyTiles * BLOCK_K;
  if (choice.smoothQ && layout.keyTiles > 0) {
    const config: MeanScoresConfig = {
      target,
      dtype,
      headDim,
      paddedDim: scheme.paddedDim,
      loadWidth: loadWidthOf(problem.k, headDim, dtype, pointerAlignment),
      keyMean: choice.smoothK,
    };
    const module = moduleOf(meanScores, config);
    launches.push(
      launch(
        'scores of the means of Q',
        module,
        'meanScores',
        layout.keyTiles * queryHeads * batch,
        MEAN_SCORES_THREADS,
        module.kernel().sharedBytes,
        [
          ...inOrder(MEAN_SCORES_POINTERS, {
            sequences: pointer('sequences'),
            input: pointer('k', problem.k.offset * BYTES[dtype]),
            ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
            queryMean: pointer('queryMean'),
            meanScores: pointer('meanScores'),
          }),
          ...inOrder(MEAN_SCORES_INTEGERS, {
            queryHeads: u32(queryHeads),
            headsPerKeyHead: u32(headsPerKeyHead),
            keyTiles: u32(layout.keyTiles),
            paddedQueries: u32(layout.paddedQueries),
            meanScoreKeys: u32(meanScoreKeys),
          }),
          ...strideBytes(problem.k, dtype),
          f32(problem.smScale * LOG2_E),
        ],
      ),
    );
  }

  const fp8 = scheme.pvFormat !== 'f16';
  const valueTileBytes = BLOCK_K * scheme.paddedValueDim * (fp8 ? 1 : 2);
  const tile = chooseTile(target, scheme.qkRowBytes, scheme.paddedValueDim, valueTileBytes, {
    queryLength: problem.queryLength,
    smoothQ: choice.smoothQ,
  });
  const attentionTiles = Math.ceil(problem.queryLength / blockQueries(tile));
  const attentionBlocks = attentionTiles * queryHeads * batch;
  const splits = splitsOf(context, attentionBlocks, tile.minBlocksPerMultiprocessor);
  const config: AttentionConfig = {
    target,
    qkFormat: scheme.qkFormat,
    qkRowBytes: scheme.qkRowBytes,
    pvFormat: scheme.pvFormat,
    accumulate: scheme.accumulate,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    ...tile,
    queryScales: scheme.queryGroups,
    keyScales: scheme.keyGroups,
    // FP16 holds P up to 2^8 as well as up to 1; FP16 sums and E4M3, whose maximum is P's already, have no room.
    rescaleThreshold: scheme.pvFormat !== 'e4m3' && scheme.accumulate === 'f32' ? 8 : 0,
    banded: isBanded(problem.band),
    sameBand: rowsAreHeads,
    mask: mask === undefined ? 'none' : mask.dtype === 'bool' ? 'boolean' : mask.dtype,
    softcap: problem.softcap !== 0,
    smoothQ: choice.smoothQ,
    smoothV: choice.smoothV,
    outputType: dtype,
    lse: problem.returnLse,
    split: splits > 1,
  };
  const outputStrides = outputStridesOf(problem);
  const maskBytes = mask === undefined ? 0 : mask.dtype === 'bool' ? 1 : BYTES[mask.dtype];
  const [maskBatch, maskHead, maskQuery, maskKey] = (mask?.strides ?? [0, 0, 0, 0]).map((stride) =>
    u64(stride * maskBytes),
  ) as [KernelArgument, KernelArgument, KernelArgument, KernelArgument];
  const module = moduleOf(attention, config);
  launches.push(
    launch('attention', module, 'attention', attentionBlocks * splits, tile.warps * 32, module.kernel().sharedBytes, [
      ...inOrder(ATTENTION_POINTERS, {
        sequences: pointer('sequences'),
        query: pointer('query'),
        queryScale: pointer('queryScale'),
        rowBias: pointer('rowBias'),
        key: pointer('key'),
        keyScale: pointer('keyScale'),
        keyFaults: pointer('keyFaults'),
        value: pointer('value'),
        ...(fp8 ? { valueScale: pointer('valueScale') } : {}),
        ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
        ...(choice.smoothQ ? { meanScores: pointer('meanScores') } : {}),
        ...(mask === undefined ? {} : { mask: pointer('mask', mask.offset * maskBytes) }),
        output: splits > 1 ? pointer('partialOutput') : pointer('output'),
        ...(splits > 1 ? { lse: pointer('partialLse') } : problem.returnLse ? { lse: pointer('lse') } : {}),
      }),
      ...inOrder(ATTENTION_INTEGERS, {
        queryHeads: u32(queryHeads),
        headsPerKeyHead: u32(headsPerKeyHead),
        queryTiles: u32(attentionTiles),
        splits: u32(splits),
        paddedQueries: u32(layout.paddedQueries),
        paddedKeys: u32(layout.paddedKeys),
        meanScoreKeys: u32(meanScoreKeys),
      }),
      ...inOrder(ATTENTION_STRIDES, { maskBatch, maskHead, maskQuery, maskKey, ...outputStrides }),
      ...bandArguments(problem.band),
      f32(Math.abs(problem.smScale) * LOG2_E),
      f32(problem.softcap * LOG2_E),
    ]),
  );

  if (splits > 1) launches.push(combineLaunch(context, splits));
  return {
    launches,
    scratch: {
      query: rows * scheme.qkRowBytes,
      queryScale: (rows / groupTokens) * groups * 4,
      rowBias: rows * 4,
      ...(choice.smoothQ
        ? {
            queryMean: (rows / BLOCK_Q) * scheme.paddedDim * 4,
            meanScores: Math.max(4, (rows / BLOCK_Q) * meanScoreKeys * 4),
          }
        : {}),
      ...(splits > 1
        ? { partialOutput: splits * rows * scheme.paddedValueDim * 4, partialLse: splits * rows * 4 }
        : {}),
    },
  };
}

/** Scratch that quantizing K and V needs for itself. */
function keyValueScratch({ problem, scheme }: Context): Record<BufferName, number> {
  if (scheme.pvFormat === 'f16' || scheme.valueTileScales) return {};
  return { valueMaximum: problem.batch * problem.kvHeads * VALUE_CHUNKS * scheme.paddedValueDim * 4 };
}

const constantsOf = ({ layout }: Context): Record<BufferName, Uint8Array> => ({
  sequences: new Uint8Array(layout.table.buffer),
});

/**
 * A whole call: buffers `q`, `k`, `v`, `output` and, where the problem has them, `mask` and `lse`.
 *
 * @throws {InvalidArgumentError} when the problem is too large or the target lacks the kernel's formats
 */
export function planLaunches(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  hopperTuning: Partial<HopperTuning> = {},
): LaunchSequence {
  const context = contextOf(problem, choice, device, undefined, hopperTuning);
  const attend = attendLaunches(context);
  return {
    scratch: { ...keyValueBytes(context), ...keyValueScratch(context), ...attend.scratch },
    constants: constantsOf(context),
    launches: [...keyValueLaunches(context), ...attend.launches],
  };
}

/**
 * The part of a call that depends on K and V only: buffers `k`, `v` in, `KEY_VALUE_BUFFERS` out, whose sizes are `kept`.
 *
 * @param room where the buffers have room for keys to come, and from which token on they are filled
 * @param parts what is done; the rest must have been done before, over the same room
 */
export function planKeyValue(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  room?: KeyRoom,
  parts?: readonly KeyValuePart[],
): LaunchSequence & { readonly kept: Readonly<Record<BufferName, number>> } {
  const context = contextOf(problem, choice, device, room);
  return {
    kept: keyValueBytes(context),
    scratch: keyValueScratch(context),
    constants: constantsOf(context),
    launches: keyValueLaunches(context, parts),
  };
}

/**
 * The rest of it: attends to the buffers that {@link planKeyValue} filled, over the same room. (`smoothQ` reads `k` once
 * more.)
 */
export function planAttend(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  room?: KeyRoom,
  hopperTuning: Partial<HopperTuning> = {},
): LaunchSequence {
  const context = contextOf(problem, choice, device, room, hopperTuning);
  return { ...attendLaunches(context), constants: constantsOf(context) };
}
