/** Chooses blocks of scores: a kernel pools q and k, and what is left, one line for each block, is chosen from here. */
import { blockShapeOf, chooseBlocks, fractionsOf, noTotals, type Pooled } from '../../attention/block-choice.ts';
import { type AttentionProblem, type Sequence, sequencesOf } from '../../attention/problem.ts';
import type { SettledSparsity } from '../../attention/sparsity.ts';
import { type VisibleBlocks, visibleBlocksOf } from '../../attention/visible-blocks.ts';
import { elementCount, type Tensor, type TensorView, tensor, validateData } from '../../tensor/tensor.ts';
import type { BlockMap, BlockMapInputs, RunContext } from '../backend.ts';
import { extentOf, placed } from './calls.ts';
import { tileGeometry } from './geometry.ts';
import { BLOCK_Q, FLAG_SIMILARITIES, FLAG_SMOOTH_K, POOLED_EXTRA } from './job.ts';
import {
  jobSettings,
  NO_ADDRESSES,
  NO_SEQUENCE,
  recordBytes,
  type SequenceRecord,
  startOf,
  writeRecords,
} from './records.ts';
import type { CallParts, Runtime } from './runtime.ts';
import { keep, stageOperand } from './staging.ts';

/** What is pooled of q or of k. */
interface PooledOperand {
  readonly argument: 'q' | 'k';
  readonly heads: number;
  readonly blockRows: number;
  /** The mean over all tokens is taken off before rows are compared. */
  readonly smooth: boolean;
  readonly startOf: (sequence: Sequence) => number;
  readonly lengthOf: (sequence: Sequence) => number;
}

/** The means and similarities of each head of each sequence: of sequence s and head h at `s * heads + h`. */
function poolCall(
  runtime: Runtime,
  problem: AttentionProblem,
  operand: PooledOperand,
  similarities: boolean,
  view: TensorView,
): CallParts<Pooled[]> {
  const { argument, heads, blockRows, smooth } = operand;
  const { headDim, batch } = problem;
  const extent = extentOf(problem, argument === 'q' ? 'queryLength' : 'keyLength');
  let staged = stageOperand(argument, view, problem[argument], { ...extent, heads, dim: headDim });
  const sequences = sequencesOf(problem);
  const longest = sequences.reduce((most, sequence) => Math.max(most, operand.lengthOf(sequence)), 0);
  const geometry = tileGeometry(headDim, 1, runtime.simd, { precision: 'integer', smoothV: false });
  const lineFloats = geometry.headDimPadded + POOLED_EXTRA;
  const headStride = Math.ceil(longest / blockRows) * lineFloats;
  return {
    keepInputs: () => {
      staged = keep(staged);
    },
    prepare: (lease) => {
      const layouts = { q: staged.layout, k: undefined, v: undefined, mask: undefined };
      const blocks = { rows: blockRows, keys: 0, offset: 0, strides: [0, 0, 0, 0] } as const;
      const records = sequences.map(
        (sequence, i): SequenceRecord => ({
          ...NO_SEQUENCE,
          q: startOf(staged.layout, sequence.index, operand.startOf(sequence)),
          out: i * heads * headStride,
          queryLength: operand.lengthOf(sequence),
        }),
      );
      const units = sequences.flatMap((_, sequence) =>
        Array.from({ length: heads }, (__, head) => ({ sequence, head, row: 0 })),
      );
      const bytes = batch * heads * headStride * 4;
      const out = lease.allocate(bytes);
      const address = lease.allocate(recordBytes(records.length, units.length));
      const flags = (similarities ? FLAG_SIMILARITIES : 0) | (smooth ? FLAG_SMOOTH_K : 0);
      const settings = {
        ...jobSettings({ ...problem, queryHeads: heads }, geometry, flags, { ...layouts, blocks }),
        out: { offset: 0, batchStride: 0, headStride, tokenStride: 0 },
      };
      const addresses = { ...NO_ADDRESSES, out, q: placed(lease, staged) };
      runtime.executor.write(address, writeRecords(address, settings, addresses, records, units));
      return {
        stages: [{ entry: 'pool', job: address }],
        units: units.length,
        extraScratch: 0,
        // Reading an element takes about as long as laying it out.
        work: extent.batch * extent.tokens * heads * headDim * BLOCK_Q,
        finish: async () => {
          const floats = new Float32Array((await runtime.executor.read(out, bytes)).buffer);
          return units.map(({ sequence, head }) => {
            const length = operand.lengthOf(sequences[sequence] as Sequence);
            const from = (sequence * heads + head) * headStride;
            return pooledOf(floats, from, Math.ceil(length / blockRows), lineFloats, headDim, similarities);
          });
        },
      };
    },
  };
}

/** Lines as the kernel leaves them: a mean, padded, then how much alike its rows are. */
function pooledOf(
  floats: Float32Array,
  from: number,
  blocks: number,
  lineFloats: number,
  dim: number,
  similarities: boolean,
): Pooled {
  const means = new Float32Array(blocks * dim);
  const alike = new Float32Array(blocks);
  for (let block = 0; block < blocks; block++) {
    const at = from + block * lineFloats;
    means.set(floats.subarray(at, at + dim), block * dim);
    alike[block] = floats[at + lineFloats - POOLED_EXTRA] as number;
  }
  return { means, similarities: similarities ? alike : undefined };
}

/** What a mask leaves of all blocks, read at once. */
function readVisibleBlocks(problem: AttentionProblem, attnMask: Tensor, sparsity: SettledSparsity): VisibleBlocks {
  validateData('options.attnMask', attnMask);
  const visible = visibleBlocksOf(problem, attnMask, sparsity);
  for (const sequence of sequencesOf(problem)) {
    for (let head = 0; head < problem.queryHeads; head++) visible(sequence, head);
  }
  return visible;
}

/** Chooses the blocks of every head of every sequence. Inputs are read or copied before this returns its promise. */
export async function chooseBlockMap(
  runtime: Runtime,
  problem: AttentionProblem,
  sparsity: SettledSparsity,
  { q, k, attnMask }: BlockMapInputs,
  context: RunContext,
): Promise<BlockMap> {
  const { queryHeads, kvHeads } = problem;
  const similarities = sparsity.similarity > -1;
  const visible = attnMask && readVisibleBlocks(problem, attnMask as Tensor, sparsity);
  const pool = (operand: PooledOperand, view: TensorView) =>
    runtime.run(context, poolCall(runtime, problem, operand, similarities, view));
  const [queries, keys] = await Promise.all([
    pool(
      {
        ...{ argument: 'q', heads: queryHeads, blockRows: sparsity.rows, smooth: false },
        startOf: ({ queryStart }) => queryStart,
        lengthOf: ({ queryLength }) => queryLength,
      },
      q,
    ),
    pool(
      {
        ...{ argument: 'k', heads: kvHeads, blockRows: sparsity.keys, smooth: true },
        startOf: ({ keyStart }) => keyStart,
        lengthOf: ({ keyLength }) => keyLength,
      },
      k,
    ),
  ]);
  const shape = blockShapeOf(problem, sparsity);
  const [, , nq, nk] = shape;
  const flags = new Uint8Array(elementCount(shape));
  const totals = noTotals();
  for (const [i, sequence] of sequencesOf(problem).entries()) {
    for (let head = 0; head < queryHeads; head++) {
      const own = queries[i * queryHeads + head] as Pooled;
      const shared = keys[i * kvHeads + Math.floor((head * kvHeads) / queryHeads)] as Pooled;
      const at = (sequence.index * queryHeads + head) * nq * nk;
      const facts = { q: own, k: shared, visible: visible?.(sequence, head) };
      chooseBlocks(problem, sequence, sparsity, facts, flags, at, nk, totals);
    }
  }
  return {
    map: tensor(flags, shape, { dtype: 'bool' }),
    fractions: async () => fractionsOf(totals),
    dispose: () => undefined,
  };
}
