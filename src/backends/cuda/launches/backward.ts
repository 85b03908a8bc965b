/** Launches of a backward pass: the codes of the forward pass anew, what `prepare.ts` makes, and the gradient kernels. */
import { type BackwardProblem, gradientShapesOf, maskGradientSizes } from '../../../attention/backward.ts';
import { isBanded } from '../../../attention/band.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Family } from '../kernel-table.ts';
import {
  chooseGradientTile,
  GRADIENT_INTEGERS,
  GRADIENT_POINTERS,
  GRADIENT_STRIDES,
  type Gradient,
  type GradientConfig,
  gradientPasses,
  MASK_GRADIENT_INTEGERS,
  MASK_GRADIENT_TILE,
  needsTrueScores,
  OPERAND_BYTES,
  OWN_TOKENS,
  SOFTMAX_AGAIN_TILE,
} from '../kernels/backward/config.ts';
import { GRADIENT_THREADS } from '../kernels/backward/frame.ts';
import { gradients } from '../kernels/backward/gradients.ts';
import { type MaskGradientConfig, maskGradients } from '../kernels/backward/mask.ts';
import {
  COPY_TOKENS,
  COPY_TOKENS_INTEGERS,
  COPY_TOKENS_POINTERS,
  type CopyTokensConfig,
  copyTokens,
  PREPARE_ROWS_INTEGERS,
  PREPARE_ROWS_POINTERS,
  PREPARE_ROWS_STRIDES,
  PREPARE_THREADS,
  type PrepareRowsConfig,
  prepareRows,
  ROW_FAULT_BYTES,
} from '../kernels/backward/prepare.ts';
import { type SoftmaxAgainConfig, softmaxAgain } from '../kernels/backward/softmax.ts';
import {
  TRANSPOSE_INTEGERS,
  TRANSPOSE_POINTERS,
  type TransposeConfig,
  transposeTokens,
} from '../kernels/backward/transpose.ts';
import {
  VALUE_FAULTS_POINTERS,
  VALUE_FAULTS_STRIDES,
  type ValueFaultsConfig,
  valueFaults,
} from '../kernels/backward/value-faults.ts';
import {
  BLOCK_CHANNELS,
  GROUP_TOKENS,
  gradientPlanOf,
  isWgmmaGradient,
  type WgmmaGradientConfig,
  wgmmaGradientStays,
  wgmmaGradientTile,
} from '../kernels/backward/wgmma/config.ts';
import { WGMMA_PART_INTEGERS, wgmmaGradientThreads } from '../kernels/backward/wgmma/frame.ts';
import { wgmmaGradients } from '../kernels/backward/wgmma/gradients.ts';
import { LOG2_E, roundUp } from '../kernels/parts/constants.ts';
import { BYTES } from '../kernels/parts/elements.ts';
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
  softcapArguments,
  strideBytes,
  u32,
  u64,
} from './arguments.ts';
import { BLOCK_Q, type Context, constantsOf, contextOf, type DeviceFacts, loadWidthOf } from './context.ts';
import type { BufferName, KernelArgument, KernelLaunch, LaunchSequence, TensorMapDescription } from './launch.ts';
import { MMA_SYNC } from './mma-sync.ts';
import { quantizeKeyLaunch, quantizeQueryLaunch, queryScratch, statisticsLaunches } from './quantize.ts';
import { visibleKeysLaunches, visibleKeysPointer, visibleKeysScratch } from './visible-keys.ts';

type TileTuning = Partial<ReturnType<typeof wgmmaGradientTile>> & {
  readonly stays?: boolean;
  readonly family?: Family;
};

/** Replaces parts of what the tables of tiles say of kernels that own queries, or keys: for measurements. */
export interface GradientTuning {
  readonly queries?: TileTuning;
  readonly keys?: TileTuning;
  /** A launch for each. */
  readonly apart?: boolean;
}

/** A backward call with what its launches share. */
interface Backward {
  readonly tuning: GradientTuning;
  readonly problem: BackwardProblem;
  readonly context: Context;
  /** D and Dv padded to 16. */
  readonly paddedDim: number;
  readonly paddedValueDim: number;
}

/**
 * A whole backward pass: buffers `q`, `k`, `v`, `output`, `lse`, `dOutput` and, where the problem has one, `mask` in; `dq`, `dk`, `dv`
 * and, where it is asked for, `dMask` out.
 *
 * @param choice of the forward pass
 * @throws {InvalidArgumentError} when the problem is too large
 */
export function planBackward(
  problem: BackwardProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  tuning: GradientTuning = {},
): LaunchSequence {
  const { attention } = problem;
  // Heads of one token are not put side by side: they have dO and sums of their own.
  const { headsAsRows: _, ...family } = MMA_SYNC;
  const context = contextOf(family, attention, choice, device, { whole: true });
  const [paddedDim, paddedValueDim] = [roundUp(attention.headDim, 16), roundUp(attention.valueDim, 16)];
  const backward: Backward = { tuning, problem, context, paddedDim, paddedValueDim };
  const { batch, kvHeads, queryHeads } = attention;
  const hasKeys = context.layout.keyTiles * batch * kvHeads > 0;
  const hasQueries = context.layout.queryTiles * batch * queryHeads > 0;
  const both = hasKeys && hasQueries;
  return {
    scratch: scratchOf(backward),
    constants: constantsOf(context),
    launches: [
      ...(both ? preparing(backward) : []),
      ...gradientLaunches(
        backward,
        gradientPasses(paddedDim, paddedValueDim).filter((pass) => (pass.includes('query') ? hasQueries : hasKeys)),
      ),
      ...(both ? [valueFaultsLaunch(backward)] : []),
      ...maskGradientLaunches(backward),
    ],
  };
}

function scratchOf({
  problem: { precision },
  context,
  paddedDim,
  paddedValueDim,
}: Backward): Record<BufferName, number> {
  const { problem, choice, layout, scheme } = context;
  const { batch, kvHeads, queryHeads } = problem;
  const rows = queryHeads * layout.paddedQueries;
  const keys = kvHeads * layout.paddedKeys;
  return {
    ...queryScratch(context),
    ...visibleKeysScratch(context),
    key: keys * scheme.qkRowBytes,
    keyScale: (keys / 64) * scheme.keyGroups * 4,
    keyFaults: (keys / 64) * 8,
    keyExponents: keys,
    ...(choice.smoothK ? { keyMean: batch * kvHeads * scheme.paddedDim * 4 } : {}),
    queryOperand: rows * paddedDim * OPERAND_BYTES,
    keyOperand: keys * paddedDim * OPERAND_BYTES,
    valueOperand: keys * paddedValueDim * OPERAND_BYTES,
    outputGradient: rows * paddedValueDim * OPERAND_BYTES,
    rowNumbers: 3 * rows * 4,
    rowFaults: (rows / COPY_TOKENS) * ROW_FAULT_BYTES,
    ...(precision === 'fp16'
      ? {}
      : {
          rowWeight: rows * 4,
          queryTransposed: rows * paddedDim,
          queryTransposedScale: (rows / COPY_TOKENS) * 4,
          keyTransposed: keys * paddedDim,
          keyTransposedScale: (keys / COPY_TOKENS) * 4,
          outputGradientTransposed: rows * paddedValueDim,
          outputGradientTransposedScale: (rows / COPY_TOKENS) * 4,
        }),
  };
}

/** The three numbers of each row of Q, one array behind the other. */
function rowNumbersOf({ problem, layout }: Context) {
  const [rowScale, rowShift, rowDelta] = [0, 1, 2].map((i) =>
    pointer('rowNumbers', i * problem.queryHeads * layout.paddedQueries * 4),
  ) as [KernelArgument, KernelArgument, KernelArgument];
  return { rowScale, rowShift, rowDelta };
}

/** Everything that the gradient kernels read. */
function preparing(backward: Backward): KernelLaunch[] {
  const { context } = backward;
  const { choice } = context;
  return [
    ...visibleKeysLaunches(context),
    ...(choice.smoothK ? statisticsLaunches({ ...context, choice: { ...choice, smoothV: false } }, false) : []),
    quantizeKeyLaunch(context),
    quantizeQueryLaunch(context),
    copyLaunch(backward, 'q'),
    copyLaunch(backward, 'k'),
    copyLaunch(backward, 'v'),
    prepareRowsLaunch(backward),
    softmaxAgainLaunch(backward),
    ...transposeLaunches(backward),
  ];
}

const COPIES = {
  q: { name: 'copy Q', operand: 'query', copy: 'queryOperand' },
  k: { name: 'copy K', operand: 'key', copy: 'keyOperand' },
  v: { name: 'copy V', operand: 'key', copy: 'valueOperand' },
} as const;

function copyLaunch(
  { problem: { partOfKeys }, context, paddedDim, paddedValueDim }: Backward,
  which: keyof typeof COPIES,
): KernelLaunch {
  const { problem, choice, device, layout, scheme } = context;
  const { target, pointerAlignment = 16 } = device;
  const { dtype, batch, headDim, valueDim, queryHeads, kvHeads, softcap } = problem;
  const { name, operand, copy } = COPIES[which];
  const layoutOf = problem[which];
  const dim = which === 'v' ? valueDim : headDim;
  // The rows of dS add up to 0, so that K's mean changes no sum, but what their rounding leaves; those under a softcap, or
  // over a part of the keys, do not.
  const smoothed = which === 'k' && choice.smoothK && softcap === 0 && partOfKeys !== true;
  const config: CopyTokensConfig = {
    target,
    dtype,
    operand,
    dim,
    paddedDim: which === 'v' ? paddedValueDim : paddedDim,
    loadWidth: loadWidthOf(layoutOf, dim, dtype, pointerAlignment),
    meanDim: smoothed ? scheme.paddedDim : undefined,
  };
  const heads = operand === 'query' ? queryHeads : kvHeads;
  const blocks = operand === 'query' ? layout.queryTiles * (BLOCK_Q / COPY_TOKENS) : layout.keyTiles;
  return launch(
    name,
    moduleOf('copyTokens', copyTokens, config),
    'copyTokens',
    blocks * heads * batch,
    PREPARE_THREADS,
    0,
    [
      ...inOrder(COPY_TOKENS_POINTERS, {
        sequences: pointer('sequences'),
        input: pointer(which, layoutOf.offset * BYTES[dtype]),
        ...(smoothed ? { mean: pointer('keyMean') } : {}),
        copy: pointer(copy),
      }),
      ...inOrder(COPY_TOKENS_INTEGERS, {
        heads: u32(heads),
        blocks: u32(blocks),
        paddedTokens: u32(operand === 'query' ? layout.paddedQueries : layout.paddedKeys),
      }),
      ...strideBytes(layoutOf, dtype),
    ],
  );
}

const named = (name: string, { batchStride, headStride, tokenStride }: OperandLayout, dtype: DType) => ({
  [`${name}Batch`]: u64(batchStride * BYTES[dtype]),
  [`${name}Head`]: u64(headStride * BYTES[dtype]),
  [`${name}Token`]: u64(tokenStride * BYTES[dtype]),
});

function prepareRowsLaunch(backward: Backward): KernelLaunch {
  const { problem, context, paddedValueDim } = backward;
  const { output, dOutput, lseOffset } = problem;
  const { device, layout, scheme } = context;
  const { target, pointerAlignment = 16 } = device;
  const { dtype, valueDim, queryHeads, batch, smScale } = context.problem;
  const widths = [output, dOutput].map((operand) => loadWidthOf(operand, valueDim, dtype, pointerAlignment));
  const config: PrepareRowsConfig = {
    target,
    dtype,
    valueDim,
    paddedValueDim,
    loadWidth: Math.min(...widths) as PrepareRowsConfig['loadWidth'],
    queryScales: scheme.queryGroups,
    trueScores: needsTrueScores(featuresOf(backward)),
    rowWeights: problem.precision !== 'fp16',
  };
  const blocks = layout.queryTiles * (BLOCK_Q / COPY_TOKENS);
  const module = moduleOf('prepareRows', prepareRows, config);
  return launch('prepare rows', module, 'prepareRows', blocks * queryHeads * batch, PREPARE_THREADS, 0, [
    ...inOrder(PREPARE_ROWS_POINTERS, {
      sequences: pointer('sequences'),
      output: pointer('output', output.offset * BYTES[dtype]),
      outputGradient: pointer('dOutput', dOutput.offset * BYTES[dtype]),
      lse: pointer('lse', lseOffset * 4),
      queryScale: pointer('queryScale'),
      rowBias: pointer('rowBias'),
      copy: pointer('outputGradient'),
      ...rowNumbersOf(context),
      ...(problem.precision === 'fp16' ? {} : { rowWeight: pointer('rowWeight') }),
      rowFaults: pointer('rowFaults'),
    }),
    ...inOrder(PREPARE_ROWS_INTEGERS, {
      heads: u32(queryHeads),
      blocks: u32(blocks),
      paddedTokens: u32(layout.paddedQueries),
    }),
    ...inOrder(PREPARE_ROWS_STRIDES, {
      ...named('output', output, dtype),
      ...named('gradient', dOutput, dtype),
      lseBatch: outputStridesOf(context.problem).lseBatch,
      lseHead: outputStridesOf(context.problem).lseHead,
      lseToken: u64(4),
    }),
    f32(Math.abs(smScale) * LOG2_E),
  ]);
}

/** The softmax of rows that `prepareRows` marks, made anew. */
function softmaxAgainLaunch(backward: Backward): KernelLaunch {
  const { problem, context, paddedDim, paddedValueDim } = backward;
  const config: SoftmaxAgainConfig = {
    target: context.device.target,
    ...{ codeBytes: context.scheme.qkRowBytes, paddedDim, paddedValueDim },
    ...SOFTMAX_AGAIN_TILE,
    ...featuresOf(backward),
    partOfKeys: problem.partOfKeys === true,
  };
  const module = moduleOf('softmaxAgain', softmaxAgain, config);
  const { tiles, blocks } = blocksOf(backward, ['query'], OWN_TOKENS);
  const args = [...gradientArguments(backward, [], tiles), pointer('keyFaults')];
  return launch('softmax again', module, 'softmaxAgain', blocks, GRADIENT_THREADS, module.kernel().sharedBytes, args);
}

const TRANSPOSES = {
  q: { name: 'transpose Q', operand: 'query', copy: 'queryOperand', codes: 'queryTransposed' },
  k: { name: 'transpose K', operand: 'key', copy: 'keyOperand', codes: 'keyTransposed' },
  dO: { name: 'transpose dO', operand: 'query', copy: 'outputGradient', codes: 'outputGradientTransposed' },
} as const;

/** Codes of what the products over tokens multiply P and dS by. */
function transposeLaunches({ problem: { precision }, context, paddedDim, paddedValueDim }: Backward): KernelLaunch[] {
  if (precision === 'fp16') return [];
  const { problem, device, layout, hiddenKeys } = context;
  return Object.values(TRANSPOSES).map(({ name, operand, copy, codes }) => {
    const config: TransposeConfig = {
      ...{ target: device.target, precision, operand },
      paddedDim: copy === 'outputGradient' ? paddedValueDim : paddedDim,
      hidden: operand === 'query' ? 'none' : hiddenKeys,
    };
    const isQuery = operand === 'query';
    const heads = isQuery ? problem.queryHeads : problem.kvHeads;
    const blocks = isQuery ? layout.queryTiles * (BLOCK_Q / COPY_TOKENS) : layout.keyTiles;
    const module = moduleOf('transposeTokens', transposeTokens, config);
    const grid = blocks * heads * problem.batch;
    return launch(name, module, 'transposeTokens', grid, PREPARE_THREADS, module.kernel().sharedBytes, [
      ...inOrder(TRANSPOSE_POINTERS, {
        sequences: pointer('sequences'),
        copy: pointer(copy),
        ...(isQuery ? { rowShift: rowNumbersOf(context).rowShift } : visibleKeysPointer(context)),
        codes: pointer(codes),
        scales: pointer(`${codes}Scale`),
      }),
      ...inOrder(TRANSPOSE_INTEGERS, {
        heads: u32(heads),
        blocks: u32(blocks),
        paddedTokens: u32(isQuery ? layout.paddedQueries : layout.paddedKeys),
      }),
    ]);
  });
}

/** Where the gradients lie, by the names of the kernels' parameters. */
function gradientStridesOf(attention: AttentionProblem, dtype: DType) {
  const { dq, dk, dv } = gradientShapesOf(attention);
  return {
    ...named('query', dq.layout, dtype),
    ...named('key', dk.layout, dtype),
    ...named('value', dv.layout, dtype),
  };
}

/** What of the problem decides the code of the gradient kernels. */
function featuresOf({ problem: { attention, gradientDtype, precision }, context }: Backward) {
  const { headDim, valueDim, band, softcap } = attention;
  return {
    headDim,
    valueDim,
    keyScales: context.scheme.keyGroups,
    banded: isBanded(band),
    mask: maskFormatOf(attention),
    softcap: softcap !== 0,
    gradientType: gradientDtype,
    rowWeights: precision !== 'fp16',
  };
}

const TRANSPOSED_POINTERS = Object.fromEntries(
  Object.values(TRANSPOSES).flatMap(({ codes }) => [codes, `${codes}Scale`].map((name) => [name, pointer(name)])),
);

/** Arguments of every gradient kernel. */
function gradientArguments({ problem, context }: Backward, pass: readonly Gradient[], tiles: number): KernelArgument[] {
  const { attention, gradientDtype } = problem;
  const { layout } = context;
  const { queryHeads, kvHeads, smScale, band } = attention;
  const { mask, strides } = maskArgumentsOf(attention);
  return [
    ...inOrder(GRADIENT_POINTERS, {
      sequences: pointer('sequences'),
      query: pointer('query'),
      ...rowNumbersOf(context),
      rowBias: pointer('rowBias'),
      key: pointer('key'),
      keyScale: pointer('keyScale'),
      keyExponents: pointer('keyExponents'),
      queryOperand: pointer('queryOperand'),
      keyOperand: pointer('keyOperand'),
      valueOperand: pointer('valueOperand'),
      outputGradient: pointer('outputGradient'),
      ...(problem.precision === 'fp16' ? {} : { ...TRANSPOSED_POINTERS, rowWeight: pointer('rowWeight') }),
      mask,
      ...(pass.includes('query') ? { queryGradient: pointer('dq') } : {}),
      ...(pass.includes('key') ? { keyGradient: pointer('dk') } : {}),
      ...(pass.includes('value') ? { valueGradient: pointer('dv') } : {}),
    }),
    ...inOrder(GRADIENT_INTEGERS, {
      queryHeads: u32(queryHeads),
      headsPerKeyHead: u32(queryHeads / kvHeads),
      tiles: u32(tiles),
      paddedQueries: u32(layout.paddedQueries),
      paddedKeys: u32(layout.paddedKeys),
    }),
    ...inOrder(GRADIENT_STRIDES, { ...strides, ...gradientStridesOf(attention, gradientDtype) }),
    ...bandArguments(band),
    f32(smScale),
    ...softcapArguments(attention),
  ];
}

const nameOf = (gradients: readonly Gradient[]) => `gradients of ${gradients.join(' and ')}`;

/** What a kernel of these gradients is tuned with, and whether it runs on wgmma. */
function familyOf(
  { tuning, problem: { precision }, context }: Backward,
  pass: readonly Gradient[],
  features: ReturnType<typeof featuresOf>,
) {
  const { family, ...tile } = tuning[pass.includes('query') ? 'queries' : 'keys'] ?? {};
  const fits = context.device.target === 'sm_90a' && precision === 'fp16' && isWgmmaGradient(features);
  return { isWgmma: fits && family !== 'mma-sync', tile };
}

function gradientLaunches(backward: Backward, passes: readonly (readonly Gradient[])[]): KernelLaunch[] {
  const features = featuresOf(backward);
  const parts = passes
    .filter((pass) => familyOf(backward, pass, features).isWgmma)
    .map((pass) => wgmmaPart(backward, pass));
  const others = passes.filter((pass) => !familyOf(backward, pass, features).isWgmma);
  const together =
    backward.tuning.apart !== true &&
    parts.every(
      ({ config }) => config.consumers === parts[0]?.config.consumers && config.stays === parts[0].config.stays,
    );
  return [
    ...(together && parts.length > 0
      ? [wgmmaLaunch(backward, parts)]
      : parts.map((part) => wgmmaLaunch(backward, [part]))),
    ...others.map((pass) => gradientLaunch(backward, pass)),
  ];
}

/** CTAs of a kernel that gives each `ownTokens` tokens. */
function blocksOf({ problem: { attention } }: Backward, pass: readonly Gradient[], ownTokens: number) {
  const { batch, queryHeads, kvHeads, queryLength, keyLength } = attention;
  const ownsQueries = pass.includes('query');
  const tiles = Math.ceil((ownsQueries ? queryLength : keyLength) / ownTokens);
  return { tiles, blocks: tiles * (ownsQueries ? queryHeads : kvHeads) * batch };
}

function gradientLaunch(backward: Backward, pass: readonly Gradient[]): KernelLaunch {
  const { context, paddedDim, paddedValueDim } = backward;
  const { device, scheme } = context;
  const { target } = device;
  const { precision } = backward.problem;
  const sizes = { gradients: pass, precision, codeBytes: scheme.qkRowBytes, paddedDim, paddedValueDim };
  const features = featuresOf(backward);
  const { tiles, blocks } = blocksOf(backward, pass, OWN_TOKENS);
  const args = gradientArguments(backward, pass, tiles);
  const own = chooseGradientTile(target, { ...sizes, softcap: features.softcap, rowWeights: features.rowWeights });
  const config: GradientConfig = { target, ...sizes, ...own, ...features };
  const module = moduleOf('gradients', gradients, config);
  return launch(nameOf(pass), module, 'gradients', blocks, GRADIENT_THREADS, module.kernel().sharedBytes, args);
}

/** A part of a launch on wgmma. */
interface WgmmaPart {
  readonly config: WgmmaGradientConfig;
  readonly tiles: number;
  readonly blocks: number;
}

function wgmmaPart(backward: Backward, pass: readonly Gradient[]): WgmmaPart {
  const features = featuresOf(backward);
  const { headDim, valueDim, keyScales, banded, gradientType } = features;
  const { queryLength, keyLength, sequences } = backward.problem.attention;
  const packed = sequences !== undefined;
  const config: WgmmaGradientConfig = {
    ...{ headDim, valueDim, keyScales, banded, gradientType },
    gradients: pass,
    codeBytes: backward.context.scheme.qkRowBytes,
    stays: wgmmaGradientStays({ headDim, banded, packed, tokens: Math.max(queryLength, keyLength) }),
    ...wgmmaGradientTile(headDim, pass.includes('query'), queryLength),
    ...familyOf(backward, pass, features).tile,
  };
  return { config, ...blocksOf(backward, pass, config.consumers * GROUP_TOKENS) };
}

function wgmmaLaunch(backward: Backward, parts: readonly WgmmaPart[]): KernelLaunch {
  const pass = parts.flatMap(({ config }) => config.gradients);
  const [{ config: first }] = parts as readonly [WgmmaPart];
  const module = moduleOf('wgmmaGradients', wgmmaGradients, { parts: parts.map(({ config }) => config) });
  let blocks = 0;
  const own = parts.flatMap((part): KernelArgument[] => {
    const firstBlock = blocks;
    blocks += part.blocks;
    const integers = inOrder(WGMMA_PART_INTEGERS, {
      ...{ firstBlock: u32(firstBlock), lastBlock: u32(blocks), tiles: u32(part.tiles) },
    });
    return [...integers, ...mapsOf(backward, part.config)];
  });
  const threads = wgmmaGradientThreads(first);
  const args = [...gradientArguments(backward, pass, 0), ...own];
  const ctas = first.stays ? Math.min(blocks, backward.context.device.multiprocessors) : blocks;
  return launch(nameOf(pass), module, 'wgmmaGradients', ctas, threads, module.kernel().sharedBytes, args);
}

/** NaN of dO in dV's channels, on every device. */
function valueFaultsLaunch(backward: Backward): KernelLaunch {
  const { problem, context } = backward;
  const { dOutput } = problem;
  const { target, pointerAlignment = 16 } = context.device;
  const { dtype, valueDim } = problem.attention;
  const { headDim, banded, mask, gradientType } = featuresOf(backward);
  const config: ValueFaultsConfig = {
    ...{ target, headDim, valueDim, banded, mask, gradientType, dtype },
    loadWidth: loadWidthOf(dOutput, valueDim, dtype, pointerAlignment),
  };
  const module = moduleOf('valueFaults', valueFaults, config);
  const { tiles, blocks } = blocksOf(backward, ['value'], OWN_TOKENS);
  return launch('NaN of dO', module, 'valueFaults', blocks, GRADIENT_THREADS, module.kernel().sharedBytes, [
    ...gradientArguments(backward, ['value'], tiles),
    ...inOrder(VALUE_FAULTS_POINTERS, {
      givenGradient: pointer('dOutput', dOutput.offset * BYTES[dtype]),
      rowFaults: pointer('rowFaults'),
    }),
    ...inOrder(VALUE_FAULTS_STRIDES, named('gradient', dOutput, dtype)),
  ]);
}

/** The gradient of the mask, on `mma.sync` on every device. */
function maskGradientLaunches(backward: Backward): KernelLaunch[] {
  const { problem, context, paddedDim, paddedValueDim } = backward;
  const { attention, maskGradient } = problem;
  if (maskGradient === undefined) return [];
  const [maskBatches, maskHeads, maskRows, maskKeys] = maskGradientSizes(maskGradient);
  const rowTiles = Math.ceil(maskRows / OWN_TOKENS);
  const keyTiles = Math.ceil(maskKeys / MASK_GRADIENT_TILE.streamTokens);
  const blocks = keyTiles * rowTiles * maskHeads * maskBatches;
  if (blocks === 0) return [];
  const config: MaskGradientConfig = {
    target: context.device.target,
    ...{ codeBytes: context.scheme.qkRowBytes, paddedDim, paddedValueDim },
    ...MASK_GRADIENT_TILE,
    ...featuresOf(backward),
    sumsRows: maskRows === 1,
    sumsKeys: maskKeys === 1,
  };
  const module = moduleOf('maskGradients', maskGradients, config);
  const sizes = { maskBatches, maskHeads, maskRows, maskKeys, rowTiles, keyTiles, sequenceCount: attention.batch };
  return [
    launch('gradients of mask', module, 'maskGradients', blocks, GRADIENT_THREADS, module.kernel().sharedBytes, [
      ...gradientArguments(backward, ['mask'], rowTiles),
      pointer('dMask'),
      ...inOrder(
        MASK_GRADIENT_INTEGERS,
        Object.fromEntries(MASK_GRADIENT_INTEGERS.map((name) => [name, u32(sizes[name])])),
      ),
    ]),
  ];
}

/** Tensor maps of own tokens and of those that pass by, in the order of the kernel's parameters. */
function mapsOf({ context }: Backward, config: WgmmaGradientConfig): KernelArgument[] {
  const { problem, layout } = context;
  const { queryHeads, kvHeads } = problem;
  const { codeBytes, headDim, valueDim, streamTokens, gradients: pass } = config;
  const queries = queryHeads * layout.paddedQueries;
  const keys = kvHeads * layout.paddedKeys;
  const plan = gradientPlanOf(config);
  const codes = (buffer: BufferName, rows: number, tokens: number): TensorMapDescription => ({
    ...{ buffer, elementType: 'u8', dimensions: [codeBytes, rows], byteStrides: [codeBytes] },
    ...{ box: [codeBytes, tokens], swizzle: plan.codesSwizzle, l2Promotion: '256B' },
  });
  const channels = (buffer: BufferName, rows: number, dim: number, tokens: number): TensorMapDescription => ({
    ...{ buffer, elementType: 'bf16', dimensions: [dim, rows], byteStrides: [dim * OPERAND_BYTES] },
    ...{ box: [BLOCK_CHANNELS, tokens], swizzle: '128B', l2Promotion: '256B' },
  });
  const rows: TensorMapDescription = {
    ...{ buffer: 'rowNumbers', elementType: 'u8', dimensions: [queries * 4, 3], byteStrides: [queries * 4] },
    ...{ box: [streamTokens * 4, 3], swizzle: 'none' },
  };
  const maps = pass.includes('query')
    ? [
        codes('query', queries, GROUP_TOKENS),
        channels('outputGradient', queries, valueDim, GROUP_TOKENS),
        codes('key', keys, streamTokens),
        channels('valueOperand', keys, valueDim, streamTokens),
        channels('keyOperand', keys, headDim, streamTokens),
        rows,
      ]
    : [
        codes('key', keys, GROUP_TOKENS),
        channels('valueOperand', keys, valueDim, GROUP_TOKENS),
        codes('query', queries, streamTokens),
        channels('outputGradient', queries, valueDim, streamTokens),
        channels('queryOperand', queries, headDim, streamTokens),
        rows,
      ];
  return maps.map((map) => ({ kind: 'tensor-map', map }));
}
