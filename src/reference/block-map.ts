/** The map of blocks that a call with `sparsity` computes, with means in float64. */

import { blockShapeOf, chooseBlocks, fractionsOf, noTotals, type Pooled } from '../attention/block-choice.ts';
import { type AttentionProblem, sequencesOf } from '../attention/problem.ts';
import type { SettledSparsity } from '../attention/sparsity.ts';
import { visibleBlocksOf } from '../attention/visible-blocks.ts';
import { poolBlocks } from '../quantization/pooling.ts';
import { elementCount, type Tensor, tensor } from '../tensor/tensor.ts';
import { type ReferenceInputs, readOperands } from './exact.ts';

/** bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`, and what of all it is. */
export interface ReferenceBlockMap {
  readonly map: Tensor<'bool'>;
  readonly keptFraction: number;
  readonly lostMass: number;
}

/**
 * Chooses blocks for every head of every sequence.
 *
 * @see SpargeAttn, arXiv 2502.18137, section 3
 */
export function buildBlockMap(
  problem: AttentionProblem,
  sparsity: SettledSparsity,
  inputs: Pick<ReferenceInputs, 'q' | 'k' | 'attnMask'>,
): ReferenceBlockMap {
  const { queryHeads, kvHeads, headDim, sequences } = problem;
  const { q, k, queryTokens, keyTokens } = readOperands({ ...problem, valueDim: 1 }, { ...inputs, v: inputs.k });
  const shape = blockShapeOf(problem, sparsity);
  const [, , nq, nk] = shape;
  const flags = new Uint8Array(elementCount(shape));
  const totals = noTotals();
  const similarities = sparsity.similarity > -1;
  const visible = inputs.attnMask && visibleBlocksOf(problem, inputs.attnMask, sparsity);
  const pool = (x: Float32Array, first: number, tokens: number, rows: number, smooth: boolean): Pooled =>
    poolBlocks(x.subarray(first * headDim, (first + tokens) * headDim), headDim, rows, { smooth, similarities });
  for (const sequence of sequencesOf(problem)) {
    const { index, queryStart, queryLength, keyStart, keyLength } = sequence;
    const batch = sequences === undefined ? index : 0;
    const keys = Array.from({ length: kvHeads }, (_, head) =>
      pool(k, (batch * kvHeads + head) * keyTokens + keyStart, keyLength, sparsity.keys, true),
    );
    for (let head = 0; head < queryHeads; head++) {
      const first = (batch * queryHeads + head) * queryTokens + queryStart;
      const queries = pool(q, first, queryLength, sparsity.rows, false);
      const own = keys[Math.floor((head * kvHeads) / queryHeads)] as Pooled;
      const facts = { q: queries, k: own, visible: visible?.(sequence, head) };
      chooseBlocks(problem, sequence, sparsity, facts, flags, (index * queryHeads + head) * nq * nk, nk, totals);
    }
  }
  return { map: tensor(flags, shape) as Tensor<'bool'>, ...fractionsOf(totals) };
}
