/** The one interface that every backend implements. A backend knows nothing of another. */

import type { BackwardPrecision, BackwardProblem, ForwardResults } from '../attention/backward.ts';
import type { SparsityFractions } from '../attention/block-choice.ts';
import type { KernelName } from '../attention/kernels.ts';
import type { BackendName, StreamHandle } from '../attention/options.ts';
import type { OutputSpec, Outputs } from '../attention/outputs.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import type { SettledSparsity } from '../attention/sparsity.ts';
import type { ScaleSearch } from '../quantization/fp4-blocks.ts';
import type { Granularity, PvAccumDtype, QuerySmoothing } from '../quantization/schemes.ts';
import type { DType } from '../tensor/dtype.ts';
import type { LseOf, Tensor, TensorView } from '../tensor/tensor.ts';

/**
 * What a kernel honours. The first entry of each list is its default; an empty list means the option has no meaning
 * there.
 */
export interface KernelDescriptor {
  readonly name: KernelName;
  /** One line for `doctor` and tables. */
  readonly summary: string;
  readonly qkQuantGran: readonly Granularity[];
  readonly pvAccumDtype: readonly PvAccumDtype[];
  /** FP4 only; default: no meaning. */
  readonly scaleSearch?: readonly ScaleSearch[];
  /** Smoothing that may be switched on (K always may be switched either way). */
  readonly smoothV: boolean;
  readonly smoothQ: readonly [first: false | QuerySmoothing, ...others: (false | QuerySmoothing)[]];
  /** Largest D and Dv. */
  readonly maxHeadDim: number;
  /** Of q, k and v; default all. */
  readonly dtypes?: readonly DType[];
  /** It adds sinks to its sums; default false: a call that has them is refused. */
  readonly sinks?: boolean;
  /** It computes only the blocks of a block mask; default false: a call that has one is refused. */
  readonly blockMask?: boolean;
}

/** A kernel with its options settled: the kernel honours all of it, and what has no meaning for it is left out. */
export interface KernelChoice {
  readonly descriptor: KernelDescriptor;
  readonly qkQuantGran?: Granularity;
  readonly pvAccumDtype?: PvAccumDtype;
  readonly smoothK: boolean;
  readonly scaleSearch?: ScaleSearch;
  readonly smoothV: boolean;
  readonly smoothQ: false | QuerySmoothing;
}

export interface Availability {
  readonly available: boolean;
  /** It runs on accelerator hardware, not on a software driver. CPU tensors are sent to another backend only then. */
  readonly accelerated: boolean;
  /** Why not, in a sentence without its full stop. */
  readonly reason?: string;
  /** What to install or enable. */
  readonly remedy?: string;
  /** What was found: adapter, features, driver, threads. For `doctor`. */
  readonly details: Readonly<Record<string, string>>;
}

/** Blocks that were chosen; see `SparsityResult`. */
export interface BlockMap {
  /** bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`, contiguous, where the inputs are. */
  readonly map: TensorView;
  /** Reads how much of all it is, once: a GPU is waited for. */
  fractions(): Promise<SparsityFractions>;
  /** Frees GPU memory, the map's too. What was enqueued with it still runs. */
  dispose(): void;
}

export type BlockMapInputs = Pick<AttentionInputs, 'q' | 'k' | 'attnMask'>;

/** Chooses blocks of one shape; as {@link Plan} in all else. */
export interface BlockMapPlan extends Pick<Plan, 'ended' | 'dispose'> {
  run(inputs: BlockMapInputs, context: RunContext): Promise<BlockMap>;
}

/** What a call may have beside q, k and v. */
export interface SideInputs {
  readonly attnMask?: TensorView;
  /** `[Hq]`, see `AttentionProblem.sinks`. */
  readonly sinks?: TensorView;
  /** bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`, see `AttentionProblem.blocks`. */
  readonly blockMap?: TensorView;
}

export interface AttentionInputs<T extends TensorView = TensorView> extends SideInputs {
  readonly q: T;
  readonly k: T;
  readonly v: T;
}

export interface AttentionOutputs<T extends TensorView = TensorView> {
  /** `[B,Hq,Lq,Dv]` or `[B,Lq,Hq,Dv]` as the layout says, contiguous; varlen `[totalQ,Hq,Dv]`. q's dtype. */
  readonly output: T;
  /** `[B,Hq,Lq]`; varlen `[Hq,totalQ]`. float32, natural logarithm. Present exactly when the problem asks for it. */
  readonly lse?: LseOf<T>;
}

/** What belongs to one run and not to the plan. */
export interface RunContext {
  readonly signal?: AbortSignal;
  /** Where a CUDA backend enqueues the run; default: its own stream of the device. Other backends take none. */
  readonly stream?: StreamHandle;
  /** The caller's tensor for the output of attention, contiguous: a backend that writes into it answers with it. */
  readonly out?: Tensor;
}

/**
 * A problem made ready: kernel chosen, code compiled, scratch sized. Reusable for every input of the same shape, also
 * before an earlier run has ended. `run` checks that the storage behind GPU tensors holds them, and reads inputs on the
 * CPU (copies or uploads them) before it returns its promise: the caller may write into them then.
 *
 * Attention unless the parameters say otherwise: a gradient is a plan with inputs and outputs of its own.
 */
export interface Plan<Inputs = AttentionInputs, Made extends Outputs = AttentionOutputs> {
  readonly kernel: KernelChoice;
  /** What a run makes. */
  readonly outputs: readonly OutputSpec[];
  /**
   * True once the plan can run no more, because its backend was disposed; absent where a plan starts anew by itself.
   */
  readonly ended?: boolean;
  run(inputs: Inputs, context: RunContext): Promise<Made>;
  dispose(): void;
}

/** Inputs of a backward pass: the forward pass's inputs and results, and the gradient of its output. */
export interface BackwardInputs<T extends TensorView = TensorView> extends AttentionInputs<T>, ForwardResults<T> {}

/** Contiguous; see `gradientShapesOf`. Masked positions contribute exact zeros; rows and keys that see nothing have zeros. */
export interface BackwardOutputs<T extends TensorView = TensorView> {
  /** Shape of q. */
  readonly dq: T;
  readonly dk: T;
  readonly dv: T;
  /** Shape of the mask, float32. Present exactly when the problem asks for it. */
  readonly dMask?: LseOf<T>;
}

/** What a backend's backward pass can do. The first entry of each list is its default. */
export interface BackwardSupport {
  /**
   * Kernels whose forward pass it continues. It computes the scores from the same codes as they do, and their P.V is in 16 bits
   * or more: `rowsum(dO o O)` must equal `rowsum(P o dP)`, or the rows of dS do not add up to 0.
   */
  readonly kernels: readonly KernelName[];
  readonly precisions: readonly BackwardPrecision[];
  readonly maskGradient: boolean;
}

/** The plan of a backward pass; its `outputs` come from `gradientOutputs`. */
export type BackwardPlan = Plan<BackwardInputs, BackwardOutputs>;

/** What belongs to one preparation or append. */
export interface KeyValueContext extends RunContext {
  /**
   * bool `[B,L]` where K is, nonzero: the token counts. Others are padding that every `attend` hides: they count in no
   * mean and no scale, and their codes may be 0 or clamped.
   */
  readonly keyMask?: TensorView;
}

/**
 * K and V of one call, quantized once. `problem` of `attend` has the cache's keys. Like `Plan.run`, `append` and
 * `attend` read inputs on the CPU before they return.
 */
export interface PreparedKeyValue {
  /** Tokens held. */
  readonly length: number;
  append(k: TensorView, v: TensorView, problem: AttentionProblem, context: KeyValueContext): Promise<void>;
  attend(q: TensorView, problem: AttentionProblem, side: SideInputs, context: RunContext): Promise<AttentionOutputs>;
  dispose(): void;
}

export interface Backend {
  readonly name: BackendName;
  readonly kernels: readonly KernelDescriptor[];
  availability(): Promise<Availability>;
  /**
   * The fastest kernel for this problem, from the backend's table.
   *
   * @param needs `quantized`: one that quantizes, since keys and values are to be held, or options say how to quantize
   */
  defaultKernel(
    problem: AttentionProblem,
    needs?: { readonly quantized?: boolean },
  ): KernelDescriptor | Promise<KernelDescriptor>;
  plan(problem: AttentionProblem, kernel: KernelChoice): Promise<Plan>;
  /**
   * Makes ready to choose the blocks that a call computes; `problem.blocks` says how their map lies: contiguous from its first element on.
   * Absent: the backend cannot.
   */
  planBlockMap?(problem: AttentionProblem, sparsity: SettledSparsity): Promise<BlockMapPlan>;
  /** Absent, like {@link planBackward}: the backend has no backward pass. undefined: it has none for this problem on this device. */
  backwardSupport?(problem: AttentionProblem): Promise<BackwardSupport | undefined>;
  /**
   * @param kernel of the forward pass, one of `BackwardSupport.kernels`, with its options
   */
  planBackward?(problem: BackwardProblem, kernel: KernelChoice): Promise<BackwardPlan>;
  /**
   * Quantizes `k` and `v`; `problem` is that of a query of length 0 or more over them. Inputs on the CPU are read before this
   * returns its promise.
   */
  prepareKeyValue(
    problem: AttentionProblem,
    kernel: KernelChoice,
    k: TensorView,
    v: TensorView,
    context: KeyValueContext,
  ): Promise<PreparedKeyValue>;
  /** Frees workers, devices and memory. The next call starts them again. */
  dispose(): Promise<void>;
}
