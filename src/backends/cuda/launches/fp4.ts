/** Launches that quantize Q, K and V to NVFP4 for the kernels on `mma.sync`. */
import {
  FP4_TOKENS_INTEGERS,
  FP4_TOKENS_POINTERS,
  type Fp4TokensConfig,
  fp4TokensThreads,
  quantizeFp4Tokens,
} from '../kernels/fp4/tokens.ts';
import {
  FP4_VALUE_INTEGERS,
  FP4_VALUE_POINTERS,
  FP4_VALUE_THREADS,
  type Fp4ValueConfig,
  quantizeFp4Value,
} from '../kernels/fp4/value.ts';
import { hasFp4Keys, hasFp4Values } from '../kernels/mma-sync/config.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { f32, inOrder, launch, moduleOf, pointer, strideBytes, u32 } from './arguments.ts';
import { type Context, loadWidthOf, oneMean } from './context.ts';
import type { BufferName, KernelLaunch } from './launch.ts';
import { visibleKeysPointer } from './visible-keys.ts';

/** Kernels of FP4 have the option; its first value is the default. */
const scaleSearchOf = ({ choice }: Context) => choice.scaleSearch ?? 'mse';

/** Quantizes K, 64 tokens a block: buffers `key`, `keyBlockScale`, `keyScale`, `keyFaults`. */
export function fp4KeyLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, headDim, k } = problem;
  const config: Fp4TokensConfig = {
    target,
    operand: 'key',
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: loadWidthOf(k, headDim, dtype, pointerAlignment),
    format: 'codes',
    scaleSearch: scaleSearchOf(context),
    codeOrder: scheme.codeOrder,
    permuted: hasFp4Values(scheme),
    keyMean: choice.smoothK,
    ...oneMean(context),
    smoothQ: false,
    hiddenKeys,
  };
  const module = moduleOf('quantizeFp4Tokens', quantizeFp4Tokens, config);
  const blocks = layout.keyTiles * kvHeads * batch;
  const { sharedBytes } = module.kernel();
  return launch('quantize K', module, 'quantizeFp4Key', blocks, fp4TokensThreads(config), sharedBytes, [
    ...inOrder(FP4_TOKENS_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer('k', k.offset * BYTES[dtype]),
      ...(choice.smoothK ? { keyMean: pointer('keyMean') } : {}),
      quantized: pointer('key'),
      blockScale: pointer('keyBlockScale'),
      scale: pointer('keyScale'),
      keyFaults: pointer('keyFaults'),
      ...visibleKeysPointer(context),
    }),
    ...inOrder(FP4_TOKENS_INTEGERS, {
      heads: u32(kvHeads),
      blocks: u32(layout.keyTiles),
      paddedTokens: u32(layout.paddedKeys),
      headsPerKeyHead: u32(1),
    }),
    ...strideBytes(k, dtype),
    f32(0),
  ]);
}

/** Quantizes and transposes V, 64 tokens a block: buffers `value`, `valueBlockScale`, `valueTileScale`. After K. */
export function fp4ValueLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme, hiddenKeys } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, kvHeads, dtype, valueDim, v } = problem;
  const config: Fp4ValueConfig = {
    target,
    dtype,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    loadWidth: loadWidthOf(v, valueDim, dtype, pointerAlignment),
    scaleSearch: scaleSearchOf(context),
    codeOrder: scheme.codeOrder,
    smoothV: choice.smoothV,
    hiddenKeys,
  };
  const module = moduleOf('quantizeFp4Value', quantizeFp4Value, config);
  const blocks = layout.keyTiles * kvHeads * batch;
  const { sharedBytes } = module.kernel();
  return launch('quantize V', module, 'quantizeFp4Value', blocks, FP4_VALUE_THREADS, sharedBytes, [
    ...inOrder(FP4_VALUE_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer('v', v.offset * BYTES[dtype]),
      ...(choice.smoothV ? { valueMean: pointer('valueMean') } : {}),
      value: pointer('value'),
      valueBlockScale: pointer('valueBlockScale'),
      valueTileScale: pointer('valueTileScale'),
      keyScale: pointer('keyScale'),
      keyFaults: pointer('keyFaults'),
      ...visibleKeysPointer(context),
    }),
    ...inOrder(FP4_VALUE_INTEGERS, {
      heads: u32(kvHeads),
      blocks: u32(layout.keyTiles),
      paddedTokens: u32(layout.paddedKeys),
    }),
    ...strideBytes(v, dtype),
  ]);
}

/** Quantizes Q: buffers `query`, `queryBlockScale` (of codes), `queryScale`, `rowBias` (and `queryMean`). */
export function fp4QueryLaunch(context: Context): KernelLaunch {
  const { problem, choice, device, layout, scheme } = context;
  const { target, pointerAlignment = 16 } = device;
  const { batch, queryHeads, kvHeads, dtype, headDim, q } = problem;
  const config: Fp4TokensConfig = {
    target,
    operand: 'query',
    dtype,
    headDim,
    paddedDim: scheme.paddedDim,
    loadWidth: loadWidthOf(q, headDim, dtype, pointerAlignment),
    format: scheme.queryFormat,
    scaleSearch: scaleSearchOf(context),
    codeOrder: scheme.codeOrder,
    permuted: false,
    keyMean: choice.smoothK && layout.keyTiles > 0,
    ...oneMean(context),
    smoothQ: choice.smoothQ !== false,
    hiddenKeys: 'none',
  };
  const module = moduleOf('quantizeFp4Tokens', quantizeFp4Tokens, config);
  const blocks = layout.queryTiles * queryHeads * batch;
  const { sharedBytes } = module.kernel();
  return launch('quantize Q', module, 'quantizeFp4Query', blocks, fp4TokensThreads(config), sharedBytes, [
    ...inOrder(FP4_TOKENS_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer('q', q.offset * BYTES[dtype]),
      ...(config.keyMean ? { keyMean: pointer('keyMean') } : {}),
      quantized: pointer('query'),
      ...(scheme.queryFormat === 'codes' ? { blockScale: pointer('queryBlockScale') } : {}),
      scale: pointer('queryScale'),
      rowBias: pointer('rowBias'),
      ...(config.smoothQ ? { queryMean: pointer('queryMean') } : {}),
    }),
    ...inOrder(FP4_TOKENS_INTEGERS, {
      heads: u32(queryHeads),
      blocks: u32(layout.queryTiles),
      paddedTokens: u32(layout.paddedQueries),
      headsPerKeyHead: u32(queryHeads / kvHeads),
    }),
    ...strideBytes(q, dtype),
    f32(problem.smScale),
  ]);
}

/** What {@link fp4QueryLaunch} fills besides what every kernel's Q has. */
export function fp4QueryScratch({ problem, layout, scheme }: Context): Record<BufferName, number> {
  if (!hasFp4Keys(scheme) || scheme.queryFormat !== 'codes') return {};
  return { queryBlockScale: problem.queryHeads * layout.paddedQueries * (scheme.paddedDim / 16) };
}
