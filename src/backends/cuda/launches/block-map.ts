/** The launches that choose which blocks of scores a call computes. */
import { isBanded } from '../../../attention/band.ts';
import { blockShapeOf } from '../../../attention/block-choice.ts';
import { type AttentionProblem, sequencesOf } from '../../../attention/problem.ts';
import type { SettledSparsity } from '../../../attention/sparsity.ts';
import {
  CHOOSE_FLOATS,
  CHOOSE_INTEGERS,
  CHOOSE_POINTERS,
  CHOOSE_WARPS,
  type ChooseConfig,
  chooseBlocks,
} from '../kernels/block-map/choose.ts';
import { MEAN_INTEGERS, MEAN_POINTERS, MEAN_THREADS, meanOfBlocks } from '../kernels/block-map/mean.ts';
import {
  meanFloats,
  POOL_INTEGERS,
  POOL_POINTERS,
  POOL_THREADS,
  type PoolConfig,
  poolBlocks,
} from '../kernels/block-map/pool.ts';
import {
  VISIBLE_BLOCKS_INTEGERS,
  VISIBLE_BLOCKS_POINTERS,
  VISIBLE_BLOCKS_THREADS,
  visibleBlocks,
} from '../kernels/block-map/visible.ts';
import { LOG2_E } from '../kernels/parts/constants.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { SEQUENCE_INTS } from '../kernels/parts/sequences.ts';
import { MASK_STRIDES } from '../kernels/quantize/visible-keys.ts';
import {
  bandArguments,
  f32,
  inOrder,
  launch,
  maskArgumentsOf,
  maskFormatOf,
  moduleOf,
  pointer,
  strideBytes,
  u32,
} from './arguments.ts';
import { type DeviceFacts, loadWidthOf } from './context.ts';
import type { KernelLaunch, LaunchSequence } from './launch.ts';

/** One of q and k, in blocks. */
interface Pooled {
  readonly operand: 'q' | 'k';
  readonly heads: number;
  readonly blocks: number;
  readonly blockRows: number;
}

/** Buffers of an operand's blocks: means, and how much alike the rows of each are. */
const BUFFERS = {
  q: { means: 'queryMeans', similarities: 'querySimilarities' },
  k: { means: 'keyMeans', similarities: 'keySimilarities' },
} as const;

function poolLaunch(
  problem: AttentionProblem,
  { target, pointerAlignment = 16 }: DeviceFacts,
  { operand, heads, blocks, blockRows }: Pooled,
  what: Pick<PoolConfig, 'means' | 'similarities'>,
): KernelLaunch {
  const { dtype, headDim, batch } = problem;
  const layout = problem[operand];
  const config: PoolConfig = {
    target,
    dtype,
    dim: headDim,
    loadWidth: loadWidthOf(layout, headDim, dtype, pointerAlignment),
    operand: operand === 'q' ? 'query' : 'key',
    ...what,
  };
  const module = moduleOf('poolBlocks', poolBlocks, config);
  const { means, similarities } = BUFFERS[operand];
  const [batchStride, headStride, tokenStride] = strideBytes(layout, dtype);
  const name = what.means ? `pool ${operand}` : `similarities of ${operand}`;
  return launch(name, module, 'poolBlocks', blocks * heads * batch, POOL_THREADS, module.kernel().sharedBytes, [
    ...inOrder(POOL_POINTERS, {
      sequences: pointer('sequences'),
      input: pointer(operand, layout.offset * BYTES[dtype]),
      ...(what.similarities === 'less a mean' && { shift: pointer('keyMean') }),
      ...(what.means && { means: pointer(means) }),
      ...(what.similarities !== 'none' && { similarities: pointer(similarities) }),
      batch: batchStride,
      head: headStride,
      token: tokenStride,
    }),
    ...inOrder(POOL_INTEGERS, { heads: u32(heads), blocks: u32(blocks), blockRows: u32(blockRows) }),
  ]);
}

/** The mean of all keys, from those of the blocks. */
function keyMeanLaunch(problem: AttentionProblem, { target }: DeviceFacts, keys: Pooled): KernelLaunch {
  const module = moduleOf('meanOfBlocks', meanOfBlocks, { target, dim: problem.headDim });
  const count = keys.heads * problem.batch;
  return launch('mean of k', module, 'meanOfBlocks', count, MEAN_THREADS, module.kernel().sharedBytes, [
    ...inOrder(MEAN_POINTERS, {
      sequences: pointer('sequences'),
      means: pointer('keyMeans'),
      mean: pointer('keyMean'),
    }),
    ...inOrder(MEAN_INTEGERS, { heads: u32(keys.heads), blocks: u32(keys.blocks), blockKeys: u32(keys.blockRows) }),
  ]);
}

/** Heads that a mask has of its own. */
const maskHeadsOf = ({ mask, queryHeads }: AttentionProblem) => (mask?.strides[1] === 0 ? 1 : queryHeads);

/** What the mask leaves of each block; none without a mask. */
function visibleLaunches(
  problem: AttentionProblem,
  { target }: DeviceFacts,
  [queries, keys]: readonly [Pooled, Pooled],
): KernelLaunch[] {
  const mask = maskFormatOf(problem);
  if (mask === 'none') return [];
  const module = moduleOf('visibleBlocks', visibleBlocks, { target, mask, banded: isBanded(problem.band) });
  const heads = maskHeadsOf(problem);
  const { mask: maskPointer, strides } = maskArgumentsOf(problem);
  const lines = problem.batch * heads * queries.blocks;
  const { sharedBytes } = module.kernel();
  return [
    launch('visible blocks', module, 'visibleBlocks', lines, VISIBLE_BLOCKS_THREADS, sharedBytes, [
      ...inOrder(VISIBLE_BLOCKS_POINTERS, {
        sequences: pointer('sequences'),
        mask: maskPointer,
        seen: pointer('seen'),
        visibleBlocks: pointer('visibleBlocks'),
      }),
      ...inOrder(VISIBLE_BLOCKS_INTEGERS, {
        maskHeads: u32(heads),
        rowBlocks: u32(queries.blocks),
        keyBlocks: u32(keys.blocks),
        blockRows: u32(queries.blockRows),
        blockKeys: u32(keys.blockRows),
      }),
      ...inOrder(MASK_STRIDES, strides),
      ...bandArguments(problem.band),
    ]),
  ];
}

function chooseLaunch(
  problem: AttentionProblem,
  sparsity: SettledSparsity,
  { target }: DeviceFacts,
  lines: number,
  [queries, keys]: readonly [Pooled, Pooled],
  similarities: boolean,
): KernelLaunch {
  const { topK, mass, similarity, sinkBlocks } = sparsity;
  const config: ChooseConfig = {
    target,
    dim: problem.headDim,
    banded: isBanded(problem.band),
    by: topK === undefined ? 'mass' : 'count',
    similarities,
    masked: problem.mask === undefined ? 'none' : maskHeadsOf(problem) === 1 ? 'of all heads' : 'of each head',
  };
  const blocks = Math.ceil(lines / CHOOSE_WARPS);
  return launch(
    'choose blocks',
    moduleOf('chooseBlocks', chooseBlocks, config),
    'chooseBlocks',
    blocks,
    CHOOSE_WARPS * 32,
    0,
    [
      ...inOrder(CHOOSE_POINTERS, {
        sequences: pointer('sequences'),
        queryMeans: pointer('queryMeans'),
        keyMeans: pointer('keyMeans'),
        ...(similarities && {
          querySimilarities: pointer('querySimilarities'),
          keySimilarities: pointer('keySimilarities'),
        }),
        ...(problem.mask && { visibleBlocks: pointer('visibleBlocks') }),
        weights: pointer('weights'),
        map: pointer('map'),
        lines: pointer('lines'),
      }),
      ...inOrder(CHOOSE_INTEGERS, {
        count: u32(lines),
        rowBlocks: u32(queries.blocks),
        keyBlocks: u32(keys.blocks),
        heads: u32(queries.heads),
        headsPerKeyHead: u32(queries.heads / Math.max(1, keys.heads)),
        blockRows: u32(queries.blockRows),
        blockKeys: u32(keys.blockRows),
        sinkBlocks: u32(Math.min(sinkBlocks, keys.blocks)),
      }),
      ...inOrder(CHOOSE_FLOATS, {
        scale: f32(problem.smScale * LOG2_E),
        wanted: f32(topK ?? mass),
        similarity: f32(similarity),
      }),
      ...bandArguments(problem.band),
    ],
  );
}

/** Buffers `q`, `k` and `mask` in, `map` and `lines` of `blockMapOutputs` out. */
export function planBlockMap(
  problem: AttentionProblem,
  sparsity: SettledSparsity,
  device: DeviceFacts,
): LaunchSequence {
  const { batch, queryHeads, kvHeads, headDim } = problem;
  const [, , rowBlocks, keyBlocks] = blockShapeOf(problem, sparsity);
  const queries: Pooled = { operand: 'q', heads: queryHeads, blocks: rowBlocks, blockRows: sparsity.rows };
  const keys: Pooled = { operand: 'k', heads: kvHeads, blocks: keyBlocks, blockRows: sparsity.keys };
  const similarities = sparsity.similarity > -1;
  const lines = batch * queryHeads * rowBlocks;
  const [queryLines, keyLines] = [lines, batch * kvHeads * keyBlocks];
  const lineBytes = meanFloats(headDim) * 4;
  const asTheyAre = similarities ? 'as they are' : 'none';
  const launches = [
    poolLaunch(problem, device, queries, { means: true, similarities: asTheyAre }),
    poolLaunch(problem, device, keys, { means: true, similarities: 'none' }),
    ...(similarities
      ? [
          keyMeanLaunch(problem, device, keys),
          poolLaunch(problem, device, keys, { means: false, similarities: 'less a mean' }),
        ]
      : []),
    ...visibleLaunches(problem, device, [queries, keys]),
    chooseLaunch(problem, sparsity, device, lines, [queries, keys], similarities),
  ];
  const maskLines = problem.mask === undefined ? 0 : batch * maskHeadsOf(problem) * rowBlocks;
  const table = new Int32Array(batch * SEQUENCE_INTS);
  for (const { index, queryStart, queryLength, keyStart, keyLength } of sequencesOf(problem)) {
    table.set([queryStart, queryLength, keyStart, keyLength], index * SEQUENCE_INTS);
  }
  return {
    scratch: {
      queryMeans: queryLines * lineBytes,
      keyMeans: keyLines * lineBytes,
      weights: lines * keyBlocks * 4,
      ...(similarities && {
        querySimilarities: queryLines * 4,
        keySimilarities: keyLines * 4,
        keyMean: batch * kvHeads * lineBytes,
      }),
      ...(problem.mask && {
        seen: maskLines * sparsity.rows * keyBlocks,
        visibleBlocks: maskLines * keyBlocks * 4,
      }),
    },
    constants: { sequences: new Uint8Array(table.buffer) },
    launches: launches.filter(({ grid: [blocks] }) => blocks > 0),
  };
}
