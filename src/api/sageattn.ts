/** The calls of the public API: validate, choose backend and kernel, plan, run. */

import { contiguousBlocks, type SparsityFractions, type SparsityResult } from '../attention/block-choice.ts';
import type { KernelName } from '../attention/kernels.ts';
import { type AttentionOptions, OPTION_NAMES, optionNamesBut, validateOptions } from '../attention/options.ts';
import { attentionOutputs } from '../attention/outputs.ts';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../attention/problem.ts';
import { SPARSITY_PHRASE, type Sparsity, settleSparsity } from '../attention/sparsity.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  Backend,
  BlockMap,
  BlockMapPlan,
  Plan,
  RunContext,
} from '../backends/backend.ts';
import { contextOf, keepInputs, sideOf, takeInputs, withSide, withSideOptions } from '../backends/choice.ts';
import { outputsInto, takeOut } from '../backends/out.ts';
import { forgetAvailability } from '../backends/registry.ts';
import {
  BackendUnavailableError,
  ExecutionError,
  InvalidArgumentError,
  SageAttentionError,
  takeOptions,
} from '../errors.ts';
import type { LseOf, Tensor, TensorView } from '../tensor/tensor.ts';
import { withCachedBlockMap, withCachedPlan } from './plan-cache.ts';
import { chooseBackend, readyBackend } from './selection.ts';

/** What a call with `returnLse: true` gives. */
export interface AttentionResult<T extends TensorView = Tensor> {
  /** `[B,Hq,Lq,Dv]` (HND) or `[B,Lq,Hq,Dv]` (NHD), contiguous, q's dtype; varlen `[totalQ,Hq,Dv]`. */
  readonly output: T;
  /** Natural logarithm of the sum of exponentials of each row's scores, `[B,Hq,Lq]` (varlen `[Hq,totalQ]`), float32. */
  readonly lse: LseOf<T>;
}

/** What {@link sageattnSparse} gives. */
export interface SparseAttentionResult<T extends TensorView = Tensor> {
  readonly output: T;
  /** As in {@link AttentionResult}, of the blocks that were computed; present with `returnLse: true`. */
  readonly lse?: LseOf<T>;
  readonly sparsity: SparsityResult<T>;
}

type WithLse = AttentionOptions & { readonly returnLse: true };

type CreateProblem = (q: TensorView, k: TensorView, v: TensorView, options: AttentionOptions) => AttentionProblem;

/** A call's inputs as they are now, and the problem that they pose. */
export function takeCall<T extends TensorView>(
  { q, k, v }: AttentionInputs<T>,
  options: AttentionOptions,
  create: CreateProblem,
): { inputs: AttentionInputs<T>; problem: AttentionProblem } {
  let inputs: AttentionInputs<T>;
  try {
    inputs = takeInputs(withSide({ q, k, v }, sideOf(options)));
  } catch (error) {
    // A fault in a description is reported before a fault in the storage.
    create(q, k, v, options);
    throw error;
  }
  return { inputs, problem: create(inputs.q, inputs.k, inputs.v, withSideOptions(options, inputs)) };
}

async function attend<T extends TensorView>(
  taken: Taken<T>,
  options: AttentionOptions,
  given?: Backend,
): Promise<T | AttentionResult<T>> {
  const { output, lse } = await attendOn(taken, options, { backend: given });
  return lse === undefined ? output : { output, lse };
}

interface Taken<T extends TensorView> {
  readonly inputs: AttentionInputs<T>;
  readonly problem: AttentionProblem;
}

async function attendOn<T extends TensorView>(
  taken: Taken<T>,
  options: AttentionOptions,
  {
    backend: given,
    returnSparsity = false,
  }: { readonly backend?: Backend | undefined; readonly returnSparsity?: boolean },
): Promise<Omit<SparseAttentionResult<T>, 'sparsity'> & Partial<Pick<SparseAttentionResult<T>, 'sparsity'>>> {
  options.signal?.throwIfAborted();
  const sparsity = options.sparsity && settleSparsity(options.sparsity);
  const problem = sparsity ? { ...taken.problem, blocks: contiguousBlocks(taken.problem, sparsity) } : taken.problem;
  const out = options.out && takeOut(options.out, { location: problem.location, outputs: attentionOutputs(problem) });
  // Inputs count as they are at the moment of the call. A plan that is at hand reads them now; where it must be waited for,
  // copies wait.
  let inputs: AttentionInputs<T> | undefined;
  const wait = () => {
    inputs ??= keepInputs(taken.inputs);
  };
  let backend = given ?? readyBackend(problem, options);
  if (backend === undefined) {
    wait();
    backend = await chooseBackend(problem, options);
  }
  const ofRun = contextOf(options, backend.name);
  const context: RunContext = out === undefined ? ofRun : { ...ofRun, out };
  const run = (plan: Plan) => plan.run(inputs ?? taken.inputs, context);
  let outputs: AttentionOutputs;
  let chosen: BlockMap | undefined;
  let fractions: SparsityFractions | undefined;
  try {
    if (sparsity) {
      const { out: _, ...own } = context;
      const choose = (plan: BlockMapPlan) => plan.run(inputs ?? taken.inputs, own);
      // Choosing is waited for before the inputs are read again.
      wait();
      chosen = await withCachedBlockMap(backend, problem, sparsity, choose, wait);
      inputs = { ...(inputs as AttentionInputs<T>), blockMap: chosen.map as T };
    }
    outputs = await withCachedPlan(backend, problem, options, run, wait);
    if (returnSparsity) fractions = await chosen?.fractions();
    else chosen?.dispose();
  } catch (error) {
    chosen?.dispose();
    if (error instanceof ExecutionError || error instanceof BackendUnavailableError) forgetAvailability(backend);
    throw error;
  }
  // A backend answers where its inputs are, so its tensors are of the caller's kind.
  const { output, lse } = outputsInto(outputs as AttentionOutputs<T>, options.out, context);
  if (!(chosen && fractions && sparsity)) return { output, ...(lse && { lse }) };
  const blockMask = { rows: sparsity.rows, keys: sparsity.keys, map: chosen.map as T };
  return { output, ...(lse && { lse }), sparsity: { blockMask, ...fractions } };
}

/**
 * Attention with quantized kernels, in place of scaled-dot-product attention: `softmax(q k^T * smScale) v`.
 *
 * Shapes (HND, the default): q `[B,Hq,Lq,D]`, k `[B,Hkv,Lk,D]`, v `[B,Hkv,Lk,Dv]`; NHD swaps heads and tokens. Hq is a
 * multiple of Hkv (grouped-query attention); D and Dv are from 1 to 256, on WASM and WebGPU to 512. dtypes float16, bfloat16 and
 * float32; the same for all three. Inputs are never written but where `out` is one, and are read as they are at the
 * moment of the call: writing to them, transferring or resizing them afterwards changes nothing.
 *
 * @returns the output, `[B,Hq,Lq,Dv]` in the same layout and dtype as q; with `returnLse: true` also the logsumexp
 * @throws {InvalidArgumentError} an argument that no kernel takes
 * @throws {UnsupportedOptionError} an option that the chosen kernel does not honour
 * @throws {BackendUnavailableError} the backend asked for cannot run here
 * @throws {ExecutionError} a device or worker failed
 * @see SageAttention, arXiv 2410.02367, Algorithm 1; SageAttention2, arXiv 2411.10958, Algorithm 1
 */
export function sageattn<T extends TensorView>(q: T, k: T, v: T, options: WithLse): Promise<AttentionResult<T>>;
export function sageattn<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options?: AttentionOptions & { readonly returnLse?: false },
): Promise<T>;
export function sageattn<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options?: AttentionOptions,
): Promise<T | AttentionResult<T>>;
export async function sageattn<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options: AttentionOptions = {},
): Promise<T | AttentionResult<T>> {
  const own = validateOptions(options);
  return attend(takeCall({ q, k, v }, own, createProblem), own);
}

/** {@link sageattn} on a backend that no name stands for: one on a device of another library. */
export async function sageattnOn<T extends TensorView>(
  backend: Backend,
  q: T,
  k: T,
  v: T,
  options: AttentionOptions & { readonly returnLse?: false },
): Promise<T> {
  return (await attend(takeCall({ q, k, v }, options, createProblem), options, backend)) as T;
}

const VARLEN_OPTIONS = optionNamesBut('tensorLayout');

/** Options of {@link sageattnVarlen}: packed tensors have one layout only. */
export type VarlenOptions = Omit<AttentionOptions, 'tensorLayout'>;

/**
 * Attention over sequences of different lengths packed end to end. Sequence b's queries are tokens `cuSeqlensQ[b]` to
 * `cuSeqlensQ[b + 1]` of q, and likewise for keys; sequences may be empty. K's smoothing is per sequence. A mask is
 * `[B,Hq,maxLq,maxLk]`, of which each sequence uses the top left part.
 *
 * @param q `[totalQ,Hq,D]`
 * @param k `[totalK,Hkv,D]`
 * @param v `[totalK,Hkv,Dv]`
 * @param cuSeqlensQ B + 1 integers that start at 0 and never fall, the last at most totalQ; cuSeqlensK likewise
 * @returns `[cuSeqlensQ[B],Hq,Dv]`; with `returnLse: true` also the logsumexp `[Hq,cuSeqlensQ[B]]`
 * @throws {SageAttentionError} as {@link sageattn}
 */
export function sageattnVarlen<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: VarlenOptions & { readonly returnLse: true },
): Promise<AttentionResult<T>>;
export function sageattnVarlen<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options?: VarlenOptions & { readonly returnLse?: false },
): Promise<T>;
export function sageattnVarlen<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options?: VarlenOptions,
): Promise<T | AttentionResult<T>>;
export async function sageattnVarlen<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: VarlenOptions = {},
): Promise<T | AttentionResult<T>> {
  const own: AttentionOptions = validateOptions(options, VARLEN_OPTIONS);
  const create: CreateProblem = (ownQ, ownK, ownV, all) =>
    createVarlenProblem(ownQ, ownK, ownV, cuSeqlensQ, cuSeqlensK, all);
  return attend(takeCall({ q, k, v }, own, create), own);
}

/** Options of {@link sageattnSparse}. */
export type SparseOptions = AttentionOptions & {
  readonly sparsity: Sparsity;
  /** Packed sequences, as {@link sageattnVarlen} takes them; both or none, and without `tensorLayout`. */
  readonly cuSeqlensQ?: ArrayLike<number>;
  readonly cuSeqlensK?: ArrayLike<number>;
};

/**
 * {@link sageattn} with `sparsity`, or {@link sageattnVarlen}; tells besides which blocks were computed. Their map may serve other
 * calls, as the `blockMask` of a next step or layer.
 *
 * @throws {SageAttentionError} as {@link sageattn}
 * @see SpargeAttn, arXiv 2502.18137
 */
export async function sageattnSparse<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options: SparseOptions,
): Promise<SparseAttentionResult<T>> {
  const { cuSeqlensQ, cuSeqlensK, ...others } = takeOptions(options, [...OPTION_NAMES, 'cuSeqlensQ', 'cuSeqlensK']);
  if ((cuSeqlensQ === undefined) !== (cuSeqlensK === undefined)) {
    const missing = cuSeqlensQ === undefined ? 'cuSeqlensQ' : 'cuSeqlensK';
    throw new InvalidArgumentError('invalid-option', `options.${missing}`, 'both cuSeqlens or none', 'none');
  }
  const packed = cuSeqlensQ !== undefined && cuSeqlensK !== undefined;
  const own: AttentionOptions = validateOptions(others, packed ? VARLEN_OPTIONS : OPTION_NAMES);
  if (own.sparsity === undefined) {
    throw new InvalidArgumentError('invalid-option', 'options.sparsity', SPARSITY_PHRASE, 'undefined');
  }
  const create: CreateProblem = packed
    ? (ownQ, ownK, ownV, all) => createVarlenProblem(ownQ, ownK, ownV, cuSeqlensQ, cuSeqlensK, all)
    : createProblem;
  return (await attendOn(takeCall({ q, k, v }, own, create), own, {
    returnSparsity: true,
  })) as SparseAttentionResult<T>;
}

type KernelOptions = Omit<AttentionOptions, 'kernel'>;

/** A kernel's own function: `sageattn` with the kernel fixed. */
export interface KernelFunction {
  <T extends TensorView>(
    q: T,
    k: T,
    v: T,
    options: KernelOptions & { readonly returnLse: true },
  ): Promise<AttentionResult<T>>;
  <T extends TensorView>(q: T, k: T, v: T, options?: KernelOptions & { readonly returnLse?: false }): Promise<T>;
  <T extends TensorView>(q: T, k: T, v: T, options?: KernelOptions): Promise<T | AttentionResult<T>>;
}

/** The kernel is not on any backend or device that the call could run on. */
const isMissing = (error: unknown) =>
  error instanceof BackendUnavailableError ||
  (error instanceof SageAttentionError &&
    error.code === 'unsupported-option' &&
    (error.argument === 'options.kernel' || error.argument === 'device'));

const KERNEL_FUNCTION_OPTIONS = optionNamesBut('kernel');

/** The function of the first of `kernels` that the call can run on, or of the last. */
export function firstKernelFunction(...kernels: readonly KernelName[]): KernelFunction {
  return (async <T extends TensorView>(q: T, k: T, v: T, options: KernelOptions = {}) => {
    const own = validateOptions(options, KERNEL_FUNCTION_OPTIONS);
    const { inputs, problem } = takeCall({ q, k, v }, own, createProblem);
    const kept = { inputs: keepInputs(inputs), problem };
    for (const kernel of kernels.slice(0, -1)) {
      try {
        return await attend(kept, { ...own, kernel });
      } catch (error) {
        if (!isMissing(error)) throw error;
      }
    }
    return attend(kept, { ...own, kernel: kernels.at(-1) as KernelName });
  }) as KernelFunction;
}

/** The function of one kernel. */
export function kernelFunction(kernel: KernelName): KernelFunction {
  return (async <T extends TensorView>(q: T, k: T, v: T, options: KernelOptions = {}) => {
    return sageattn(q, k, v, { ...validateOptions(options, KERNEL_FUNCTION_OPTIONS), kernel });
  }) as KernelFunction;
}
