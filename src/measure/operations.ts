/** Sizes that decide how much attention computes. */
export interface AttentionSize {
  /** Default 1. */
  readonly batch?: number;
  /** Of the queries. */
  readonly heads: number;
  /** Of queries and of keys. */
  readonly tokens: number;
  readonly headDim: number;
  readonly isCausal?: boolean;
}

/**
 * Operations of attention as the papers count them: 4 B H L L D for the two products, a multiplication and an addition
 * each; half of it when causal. Every rate in this project's tables is this over time.
 */
export function attentionOperations({ batch = 1, heads, tokens, headDim, isCausal = false }: AttentionSize): number {
  return (4 * batch * heads * tokens * tokens * headDim) / (isCausal ? 2 : 1);
}
