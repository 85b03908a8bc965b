import type { KernelName } from '../../../attention/kernels.ts';

/** What became of one attention of a model. */
export interface AttentionReport {
  readonly node: string;
  /** The pattern that was recognized: an operator's name, or `MatMul-Softmax-MatMul`. */
  readonly form: string;
  /** Query heads; undefined until a run shows them where the graph does not say. */
  readonly heads: number | undefined;
  readonly headDim: number | undefined;
  /** Tokens of the last run. */
  readonly queryLength: number | undefined;
  readonly keyLength: number | undefined;
  /** True when the last run used SageAttention, or the next one will as far as is known. */
  readonly taken: boolean;
  /**
   * How it is taken: by a marker in the model's one session, whose dispatch is replaced, or between two pieces of the model. Undefined
   * when left.
   */
  readonly path: 'marker' | 'cut' | undefined;
  /** Why it is cut and not a marker; undefined otherwise. */
  readonly cutReason: string | undefined;
  /** Why onnxruntime computes it; undefined when taken. */
  readonly reason: string | undefined;
  /** The kernel that ran last; before the first run the one asked for; undefined when left. */
  readonly kernel: KernelName | 'auto' | undefined;
  /** What the attention took in the last run; undefined when left, and on a GPU, which runs it later. */
  readonly milliseconds: number | undefined;
  /**
   * With `sparsity`, the blocks that the last run computed, of those that causality and window leave; on a GPU known a little after it.
   * Undefined where all were computed.
   */
  readonly keptFraction?: number | undefined;
  /** Least cosine similarity seen while `'adaptive'` compared the kept kernel. */
  readonly cosineSimilarity: number | undefined;
}
