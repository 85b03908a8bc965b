/** What is known of one attention while its session lives, and the comparison of kernels that `'adaptive'` makes. */
import type { KernelName } from '../../../attention/kernels.ts';
import type { Sparsity } from '../../../attention/sparsity.ts';
import { compare } from '../../../reference/metrics.ts';
import { decodeFloat16 } from '../../../tensor/formats/float16.ts';
import { bitsOf } from '../../../tensor/tensor.ts';
import type { PlacedSite } from '../cut.ts';
import type { OrtTensor } from '../ort.ts';
import type { AttentionCall } from './call.ts';
import type { AttentionEngine } from './engine.ts';
import type { AttentionReport } from './report.ts';

export interface Trial {
  readonly kernel: KernelName | 'onnxruntime';
  /** Only blocks that a sparsity chose. */
  readonly isSparse: boolean;
  /** The blocks that the last run computed of them. */
  readonly keptFraction?: number | undefined;
  /** The lowest of all calibration runs. */
  readonly cosineSimilarity: number;
  /** Sum over all calibration runs, so that long runs weigh more where lengths differ. */
  readonly milliseconds: number;
}

/** Calls of a contestant in one calibration run. The last is timed: the first compiles and allocates. */
export const CALLS_TO_TIME = 2;

/** What is known of one attention while its session lives. */
export class SiteState {
  heads: number | undefined;
  headDim: number | undefined;
  queryLength: number | undefined;
  keyLength: number | undefined;
  reason: string | undefined;
  kernel: KernelName | 'auto';
  /** The kernel that ran last. */
  ran: KernelName | undefined;
  milliseconds: number | undefined;
  cosineSimilarity: number | undefined;
  /** It computes only the blocks that `sparsity` chooses. */
  isSparse = false;
  keptFraction: number | undefined;
  remainingTrials = 0;
  trials: readonly Trial[] | undefined;
  readonly placed: PlacedSite;

  /** Why it has no marker. */
  readonly cutReason: string | undefined;

  constructor(placed: PlacedSite, kernel: KernelName | 'auto', cutReason?: string) {
    this.placed = placed;
    this.cutReason = cutReason;
    this.heads = placed.site.heads;
    this.headDim = placed.site.headDim;
    this.kernel = kernel;
  }

  report(): AttentionReport {
    const { heads, headDim, queryLength, keyLength, reason, cosineSimilarity } = this;
    const taken = reason === undefined;
    return {
      node: this.placed.site.name,
      form: this.placed.site.form,
      heads,
      headDim,
      queryLength,
      keyLength,
      taken,
      path: taken ? 'cut' : undefined,
      cutReason: taken ? this.cutReason : undefined,
      reason,
      kernel: taken ? (this.ran ?? this.kernel) : undefined,
      milliseconds: taken ? this.milliseconds : undefined,
      keptFraction: taken && this.isSparse ? this.keptFraction : undefined,
      cosineSimilarity,
    };
  }
}

/** Repeats a call; gives its last result, and how long it took. */
export async function lastOf<T>(calls: number, work: () => Promise<T>): Promise<{ result: T; milliseconds: number }> {
  for (let call = 1; call < calls; call++) await work();
  const start = performance.now();
  return { result: await work(), milliseconds: performance.now() - start };
}

export async function tryKernel(
  engine: AttentionEngine,
  call: AttentionCall,
  kernel: KernelName,
  exact: Float32Array,
  sparsity: Sparsity | undefined,
): Promise<Trial> {
  const isSparse = sparsity !== undefined;
  let keptFraction: number | undefined;
  const attend = async (): Promise<Float32Array> => {
    const { output, failure, keptFraction: kept } = await engine.attend(call, kernel, sparsity);
    try {
      keptFraction = await kept;
      const error = await failure;
      if (error !== undefined) throw error;
      return await toNumbers(output);
    } finally {
      output.dispose();
    }
  };
  try {
    const { result, milliseconds } = await lastOf(CALLS_TO_TIME, attend);
    return { kernel, isSparse, keptFraction, milliseconds, cosineSimilarity: compare(result, exact).cosineSimilarity };
  } catch {
    // A kernel that does not take this call cannot be the one that is kept.
    return { kernel, isSparse, milliseconds: Number.POSITIVE_INFINITY, cosineSimilarity: -1 };
  }
}

export const together = (a: Trial, b: Trial): Trial => ({
  kernel: a.kernel,
  isSparse: a.isSparse,
  keptFraction: b.keptFraction,
  cosineSimilarity: Math.min(a.cosineSimilarity, b.cosineSimilarity),
  milliseconds: a.milliseconds + b.milliseconds,
});

/** Keeps the fastest kernel that is close enough. */
export function settle(state: SiteState, trials: readonly Trial[], threshold: number): void {
  const [best] = trials
    .filter((trial) => trial.cosineSimilarity >= threshold)
    .sort((a, b) => a.milliseconds - b.milliseconds);
  const closest = Math.max(...trials.slice(1).map((trial) => trial.cosineSimilarity));
  if (best === undefined || best.kernel === 'onnxruntime') {
    state.reason =
      closest < threshold
        ? `no kernel reached a cosine similarity of ${threshold}; the best had ${closest.toFixed(5)}`
        : 'onnxruntime was faster';
  } else {
    state.reason = undefined;
    state.kernel = best.kernel;
    state.isSparse = best.isSparse;
    state.keptFraction ??= best.keptFraction;
    state.cosineSimilarity = best.cosineSimilarity;
  }
}

export async function toNumbers(tensor: OrtTensor): Promise<Float32Array> {
  const data = tensor.location === 'gpu-buffer' ? await tensor.getData() : tensor.data;
  if (data instanceof Float32Array) return data;
  const bits = bitsOf(data as Uint16Array);
  const numbers = new Float32Array(bits.length);
  decodeFloat16(bits, numbers, 0, 1, bits.length, 0);
  return numbers;
}
