/** Launches that quantize Q, K and V for the kernel families, and the buffers that they fill. */

import { FP4_BLOCK } from '../kernels/fp4/e2m1.ts';
import { BLOCK_K, hasFp4Keys, hasFp4Values, isExact } from '../kernels/mma-sync/config.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import {
  CHANNEL_STATISTICS_INTEGERS,
  CHANNEL_STATISTICS_POINTERS,
  CHANNEL_STATISTICS_THREADS,
  type ChannelStatisticsConfig,
  channelStatistics,
} from '../kernels/quantize/channel-statistics.ts';
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
import { f32, inOrder, launch, moduleOf, pointer, strideBytes, u32 } from './arguments.ts';
import { BLOCK_Q, type Context, loadWidthOf, oneMean, scalesEachTile } from './context.ts';
import type { BufferName, KernelLaunch } from './launch.ts';
import { visibleKeysPointer, visibleKeysScratch } from './visible-keys.ts';

/** Quantized K and V: made once, attended to many times. */
export const KEY_VALUE_BUFFERS = [
  'key',
  'keyScale',
  'keyFaults',
  'keyExponents',
  'keyMean',
  'value',
  'valueScale',
  'rangeShift',
  'valueTileScale',
  'valueMean',
  'keyBlockScale',
  'valueBlockScale',
] as const;

/** Bytes of the buffers that hold quantized K and V. */
export function keyValueBytes(context: Context): Record<BufferName, number> {
  const { problem, choice, layout, scheme } = context;
  const { kvHeads, batch } = problem;
  if (isExact(scheme)) return {};
  const rows = kvHeads * layout.paddedKeys;
  const fp8 = scheme.pvFormat.startsWith('e4m3');
  const [fp4Keys, fp4Values] = [hasFp4Keys(scheme), hasFp4Values(scheme)];
  const valueScales = scalesEachTile(context) ? rows / BLOCK_K : batch * kvHeads;
  return {
    key: rows * scheme.qkRowBytes,
    keyScale: (rows / BLOCK_K) * scheme.keyGroups * 4,
    keyFaults: (rows / BLOCK_K) * 8,
    ...(fp4Keys ? {} : { keyExponents: rows }),
    ...(choice.smoothK ? { keyMean: batch * kvHeads * scheme.paddedDim * 4 } : {}),
    value: rows * scheme.paddedValueDim * (fp4Values ? 0.5 : fp8 ? 1 : 2),
    ...(fp4Keys ? { keyBlockScale: rows * (scheme.paddedDim / FP4_BLOCK) } : {}),
    ...(fp4Values ? { valueBlockScale: rows * (scheme.paddedValueDim / FP4_BLOCK) } : {}),
    ...(fp8 ? { valueScale: valueScales * scheme.paddedValueDim * 4 } : {}),
    ...(scheme.sharesRange ? { rangeShift: batch * kvHeads * 4 } : {}),
    ...(scheme.valueTileScales || fp4Values ? { valueTileScale: (rows / BLOCK_K) * 4 } : {}),
    ...(choice.smoothV ? { valueMean: batch * kvHeads * scheme.paddedValueDim * 4 } : {}),
  };
}

/** Scratch that quantizing K and V needs for itself. */
export function keyValueScratch(context: Context): Record<BufferName, number> {
  const { problem, scheme } = context;
  if (isExact(scheme)) return {};
  const visible = visibleKeysScratch(context);
  if (!scheme.pvFormat.startsWith('e4m3') || scheme.valueTileScales || scalesEachTile(context)) return visible;
  return { ...visible, valueMaximum: problem.batch * problem.kvHeads * VALUE_CHUNKS * scheme.paddedValueDim * 4 };
}

/** Means of K and V where they are smoothed, and with `valueScales` scales of V's channels: one launch, or none. */
export function statisticsLaunches(context: Context, valueScales: boolean): readonly KernelLaunch[] {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
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
    hiddenKeys,
  };
  const operands = [config.key, config.value].filter((of) => of !== undefined);
  if (operands.length === 0) return [];
  const module = moduleOf('channelStatistics', channelStatistics, config);
  const blocks = operands.length * batch * kvHeads;
  return [
    launch('statistics', module, 'channelStatistics', blocks, CHANNEL_STATISTICS_THREADS, module.kernel().sharedBytes, [
      ...inOrder(CHANNEL_STATISTICS_POINTERS, {
        sequences: pointer('sequences'),
        ...(config.key === undefined ? {} : { k: pointer('k', k.offset * BYTES[dtype]), keyMean: pointer('keyMean') }),
        ...(config.value === undefined ? {} : { v: pointer('v', v.offset * BYTES[dtype]) }),
        ...(smoothV ? { valueMean: pointer('valueMean') } : {}),
        ...(valueScales ? { valueScale: pointer('valueScale') } : {}),
        ...visibleKeysPointer(context),
      }),
      ...inOrder(CHANNEL_STATISTICS_INTEGERS, {
        heads: u32(kvHeads),
        sequenceHeads: u32(batch * kvHeads),
        paddedTokens: u32(layout.paddedKeys),
      }),
      ...strideBytes(k, dtype),
      ...strideBytes(v, dtype),
    ]),
  ];
}

/** What INT8 and INT4 quantizers store. */
function containerOf({ qkFormat }: Context['scheme']): 's8' | 's4' {
  if (qkFormat === 's8' || qkFormat === 's4') return qkFormat;
  throw new RangeError(`${qkFormat} has quantizers of its own`);
}

/** Quantizes K, 64 tokens a block: buffers `key`, `keyScale`, `keyFaults` and `keyExponents`. */
export function quantizeKeyLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, headDim, k } = problem;
  const config: QuantizeTokensConfig = {
    target,
    operand: 'key',
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: loadWidthOf(k, headDim, dtype, pointerAlignment),
    container: containerOf(scheme),
    largest: scheme.largest,
    blockTokens: BLOCK_K,
    groupTokens: BLOCK_K,
    groups: scheme.keyGroups,
    keyMean: choice.smoothK,
    ...oneMean(context),
    smoothQ: false,
    hiddenKeys,
  };
  const module = moduleOf('quantizeTokens', quantizeTokens, config);
  return launch(
    'quantize K',
    module,
    'quantizeKey',
    layout.keyTiles * kvHeads * batch,
    quantizeTokensThreads(config),
    module.kernel().sharedBytes,
    [
      ...inOrder(QUANTIZE_TOKENS_POINTERS, {
        sequences: pointer('sequences'),
        input: pointer('k', k.offset * BYTES[dtype]),
        ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
        quantized: pointer('key'),
        scale: pointer('keyScale'),
        keyFaults: pointer('keyFaults'),
        keyExponents: pointer('keyExponents'),
        ...visibleKeysPointer(context),
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
  );
}

/** Converts V to FP16, or finds its maxima and quantizes it to E4M3: buffers `value` and `valueScale`. After K. */
export function valueLaunches(context: Context): KernelLaunch[] {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, valueDim, v } = problem;
  const valueConfig: ValueConfig = {
    target,
    dtype,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    loadWidth: loadWidthOf(v, valueDim, dtype, pointerAlignment),
    smoothV: choice.smoothV,
    keyScales: scheme.keyGroups,
    hiddenKeys,
  };
  const valueArguments = (blocks: number) => [
    ...inOrder(VALUE_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer('v', v.offset * BYTES[dtype]),
      ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
      ...(scheme.pvFormat === 'f16'
        ? {}
        : {
            ...(scalesEachTile(context) ? {} : { valueMaximum: pointer('valueMaximum') }),
            valueScale: pointer('valueScale'),
          }),
      value: pointer('value'),
      keyScale: pointer('keyScale'),
      keyFaults: pointer('keyFaults'),
      ...visibleKeysPointer(context),
      ...(scheme.sharesRange ? { rangeShift: pointer('rangeShift') } : {}),
    }),
    ...inOrder(VALUE_INTEGERS, { heads: u32(kvHeads), blocks: u32(blocks), paddedTokens: u32(layout.paddedKeys) }),
    ...strideBytes(v, dtype),
  ];
  const valueTiles = (layout.keyTiles * BLOCK_K) / VALUE_BLOCK;
  if (scheme.pvFormat === 'f16') {
    const module = moduleOf('convertValue', convertValue, valueConfig);
    const blocks = valueTiles * kvHeads * batch;
    return [
      launch('convert V', module, 'convertValue', blocks, valueThreads(valueConfig), 0, valueArguments(valueTiles)),
    ];
  }
  const quantizeConfig = {
    ...valueConfig,
    ...{ vMax: scheme.vMax, sharesRange: scheme.sharesRange, scalesEachTile: scalesEachTile(context) },
  };
  const quantizeModule = moduleOf('quantizeValue', quantizeValue, quantizeConfig);
  const quantize = launch(
    'quantize V',
    quantizeModule,
    'quantizeValue',
    valueTiles * kvHeads * batch,
    quantizeValueThreads(valueConfig),
    quantizeModule.kernel().sharedBytes,
    valueArguments(valueTiles),
  );
  if (quantizeConfig.scalesEachTile) return [quantize];
  const maximumModule = moduleOf('valueMaximum', valueMaximum, valueConfig);
  return [
    launch(
      'maxima of V',
      maximumModule,
      'valueMaximum',
      VALUE_CHUNKS * kvHeads * batch,
      valueThreads(valueConfig),
      maximumModule.kernel().sharedBytes,
      valueArguments(VALUE_CHUNKS),
    ),
    quantize,
  ];
}

/** Quantizes Q: buffers `query`, `queryScale`, `rowBias` (and `queryMean`). */
export function quantizeQueryLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme } = context;
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
    container: containerOf(scheme),
    largest: scheme.largest,
    blockTokens: BLOCK_Q,
    groupTokens,
    groups,
    keyMean: choice.smoothK && layout.keyTiles > 0,
    ...oneMean(context),
    smoothQ: choice.smoothQ !== false,
    hiddenKeys: 'none',
  };
  const queryModule = moduleOf('quantizeTokens', quantizeTokens, queryConfig);
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

/** Buffers that {@link quantizeQueryLaunch} fills, without `queryMean`. */
export function queryScratch({ problem, layout, scheme }: Context): Record<BufferName, number> {
  const rows = problem.queryHeads * layout.paddedQueries;
  const [groupTokens, groups] = scheme.queryGroups;
  return { query: rows * scheme.queryRowBytes, queryScale: (rows / groupTokens) * groups * 4, rowBias: rows * 4 };
}
