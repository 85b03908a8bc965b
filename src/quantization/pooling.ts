/** Means of blocks of rows, and how much alike the rows of each are: what blocks of scores are chosen by. */

import type { Pooled } from '../attention/block-choice.ts';

/** Mean over tokens of one head, `[D]`. */
function meanOf(x: Float32Array, dim: number): Float64Array {
  const mean = new Float64Array(dim);
  for (let i = 0; i < x.length; i++) mean[i % dim] = (mean[i % dim] as number) + (x[i] as number);
  const tokens = x.length / dim;
  return mean.map((sum) => (tokens === 0 ? 0 : sum / tokens));
}

/**
 * The mean cosine of all pairs of rows, each with itself too: `|sum of normalized rows|^2 / rows^2`. A row of zeros has a cosine of 0
 * with each.
 */
function similarityOf(x: Float32Array, dim: number, first: number, end: number, mean: Float64Array): number {
  const sum = new Float64Array(dim);
  for (let row = first; row < end; row++) {
    let squares = 0;
    for (let d = 0; d < dim; d++) squares += ((x[row * dim + d] as number) - (mean[d] as number)) ** 2;
    const inverse = squares === 0 ? 0 : 1 / Math.sqrt(squares);
    for (let d = 0; d < dim; d++) {
      sum[d] = (sum[d] as number) + ((x[row * dim + d] as number) - (mean[d] as number)) * inverse;
    }
  }
  return sum.reduce((total, value) => total + value ** 2, 0) / (end - first) ** 2;
}

/**
 * Pools one head of one sequence, in float64.
 *
 * @param x `[L,D]`
 * @param blockRows tokens of a block; the last may have fewer
 * @param smooth take the mean over all tokens off before rows are compared, as for K: what all share says nothing. Means of blocks keep
 *     it, as it moves all scores of a row alike
 */
export function poolBlocks(
  x: Float32Array,
  dim: number,
  blockRows: number,
  { smooth, similarities: wanted }: { readonly smooth: boolean; readonly similarities: boolean },
): Pooled {
  const tokens = x.length / dim;
  const blocks = Math.ceil(tokens / blockRows);
  const means = new Float32Array(blocks * dim);
  const similarities = wanted ? new Float32Array(blocks) : undefined;
  const shift = wanted && smooth ? meanOf(x, dim) : new Float64Array(dim);
  for (let block = 0; block < blocks; block++) {
    const first = block * blockRows;
    const end = Math.min(first + blockRows, tokens);
    means.set(meanOf(x.subarray(first * dim, end * dim), dim), block * dim);
    if (similarities !== undefined) similarities[block] = similarityOf(x, dim, first, end, shift);
  }
  return { means, similarities };
}
