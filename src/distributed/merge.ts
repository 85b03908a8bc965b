/** Partial outputs over parts of the keys become one (FlashAttention's rescaling, arXiv 2205.14135, section 3.1). */

/**
 * Adds a part to a running mean. Both are normalized by their own sums: `o' = o + w (part - o)` with `w = exp(lse_part - lse')`, which
 * needs no maximum of all parts in advance. A part that saw nothing has LSE -Infinity and changes nothing.
 *
 * @param output mean so far, `dim` values from `at`; overwritten
 * @returns logsumexp of both
 */
export function mergeRow(
  output: Float64Array,
  at: number,
  dim: number,
  lse: number,
  part: ArrayLike<number>,
  partAt: number,
  partLse: number,
): number {
  if (partLse === Number.NEGATIVE_INFINITY) return lse;
  if (lse === Number.NEGATIVE_INFINITY) {
    for (let c = 0; c < dim; c++) output[at + c] = part[partAt + c] as number;
    return partLse;
  }
  const [high, low] = lse > partLse ? [lse, partLse] : [partLse, lse];
  // Of two infinite scores the sum is infinite, and of NaN it is NaN, which is what the rows are then.
  const joined = high === Number.POSITIVE_INFINITY ? high : high + Math.log1p(Math.exp(low - high));
  const weight = Math.exp(partLse - joined);
  for (let c = 0; c < dim; c++) {
    const old = output[at + c] as number;
    output[at + c] = old * (1 - weight) + (part[partAt + c] as number) * weight;
  }
  return joined;
}
