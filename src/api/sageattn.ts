/** The calls of the public API: validate, choose backend and kernel, plan, run. */

import type { KernelName } from '../attention/kernels.ts';
import { type AttentionOptions, OPTION_NAMES, validateOptions } from '../attention/options.ts';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../attention/problem.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  Backend,
  BackendName,
  KernelChoice,
  Plan,
  RunContext,
} from '../backends/backend.ts';
import { chooseOptions } from '../backends/choice.ts';
import { BACKEND_PREFERENCE, getBackend } from '../backends/registry.ts';
import { BackendUnavailableError, ExecutionError, InvalidArgumentError } from '../errors.ts';
import type { Tensor, TensorView } from '../tensor/tensor.ts';
import { validateData } from '../tensor/tensor.ts';
import { withCachedPlan } from './plan-cache.ts';

/** What a call with `returnLse: true` gives. */
export interface AttentionResult<T extends TensorView = Tensor> {
  /** `[B,Hq,Lq,Dv]` (HND) or `[B,Lq,Hq,Dv]` (NHD), contiguous, q's dtype; varlen `[totalQ,Hq,Dv]`. */
  readonly output: T;
  /** Natural logarithm of the sum of exponentials of each row's scores, `[B,Hq,Lq]` (varlen `[Hq,totalQ]`), float32. */
  readonly lse: T;
}

type WithLse = AttentionOptions & { readonly returnLse: true };

/** A shape, dtype and layout to plan for; any tensor is one. */
export type TensorSpec = TensorView;

async function usable(name: BackendName): Promise<Backend> {
  const backend = await getBackend(name);
  const { available, reason, remedy } = await backend.availability();
  if (!available) throw new BackendUnavailableError(name, reason ?? 'unknown reason', remedy ?? '');
  return backend;
}

const offers = (backend: Backend, kernel: AttentionOptions['kernel']) =>
  kernel === undefined || kernel === 'auto' || backend.kernels.some(({ name }) => name === kernel);

/** CPU tensors: the most preferred backend that is accelerated and offers the kernel, else one that merely offers it. */
async function backendForCpuTensors(kernel: AttentionOptions['kernel']): Promise<Backend> {
  let fallback: Backend | undefined;
  let failure: unknown;
  for (const name of BACKEND_PREFERENCE) {
    try {
      const backend = await getBackend(name);
      if (!offers(backend, kernel)) continue;
      const availability = await backend.availability();
      if (availability.available && availability.accelerated) return backend;
      if (availability.available) fallback = backend;
      else failure ??= new BackendUnavailableError(name, availability.reason ?? '', availability.remedy ?? '');
    } catch (error) {
      failure ??= error;
    }
  }
  if (fallback !== undefined) return fallback;
  throw (
    failure ?? new BackendUnavailableError('auto', `no backend here has kernel '${kernel}'`, 'Choose another kernel')
  );
}

async function chooseBackend(problem: AttentionProblem, options: AttentionOptions): Promise<Backend> {
  const asked = options.backend ?? 'auto';
  if (problem.location === 'cpu') {
    return asked === 'auto' ? backendForCpuTensors(options.kernel) : usable(asked);
  }
  if (asked !== 'auto' && asked !== problem.location) {
    throw new InvalidArgumentError(
      'mixed-locations',
      'options.backend',
      `'${problem.location}', where the tensors are`,
      `'${asked}'`,
    );
  }
  return usable(problem.location);
}

async function chooseKernel(
  backend: Backend,
  problem: AttentionProblem,
  options: AttentionOptions,
): Promise<KernelChoice> {
  const asked = options.kernel ?? 'auto';
  const descriptor =
    asked === 'auto' ? await backend.defaultKernel(problem) : backend.kernels.find(({ name }) => name === asked);
  if (descriptor === undefined) {
    const names = backend.kernels.map(({ name }) => `'${name}'`).join(', ');
    throw new InvalidArgumentError(
      'unsupported-option',
      'options.kernel',
      `one of backend '${backend.name}': ${names}`,
      `'${asked}'`,
    );
  }
  return chooseOptions(descriptor, problem, options);
}

/** CPU storage must hold the views; a backend checks its own kind of storage when it runs. */
function validateStorage(inputs: AttentionInputs): void {
  for (const [argument, view] of Object.entries({
    q: inputs.q,
    k: inputs.k,
    v: inputs.v,
    'options.attnMask': inputs.attnMask,
  })) {
    if (view?.location === 'cpu') validateData(argument, view as Tensor);
  }
}

function inputsOf<T extends TensorView>(q: T, k: T, v: T, attnMask: TensorView | undefined): AttentionInputs<T> {
  const inputs = attnMask === undefined ? { q, k, v } : { q, k, v, attnMask };
  validateStorage(inputs);
  return inputs;
}

/** What of the options belongs to the run. */
function contextOf({ signal, stream }: RunContext, backend: BackendName): RunContext {
  if (stream !== undefined && backend !== 'cuda') {
    throw new InvalidArgumentError('invalid-option', 'options.stream', `no stream on backend '${backend}'`, 'a stream');
  }
  return { ...(signal === undefined ? {} : { signal }), ...(stream === undefined ? {} : { stream }) };
}

async function attend<T extends TensorView>(
  inputs: AttentionInputs<T>,
  problem: AttentionProblem,
  options: AttentionOptions,
  given?: Backend,
): Promise<T | AttentionResult<T>> {
  options.signal?.throwIfAborted();
  const backend = given ?? (await chooseBackend(problem, options));
  const context = contextOf(options, backend.name);
  const choice = await chooseKernel(backend, problem, options);
  const outputs = await withCachedPlan(backend, problem, choice, (plan) => plan.run(inputs, context));
  // A backend answers where its inputs are, so its tensors are of the caller's kind.
  const { output, lse } = outputs as AttentionOutputs<T>;
  return lse === undefined ? output : { output, lse };
}

/**
 * Attention with quantized kernels, in place of scaled-dot-product attention: `softmax(q k^T * smScale) v`.
 *
 * Shapes (HND, the default): q `[B,Hq,Lq,D]`, k `[B,Hkv,Lk,D]`, v `[B,Hkv,Lk,Dv]`; NHD swaps heads and tokens. Hq is a
 * multiple of Hkv (grouped-query attention); D and Dv are from 1 to 256. dtypes float16, bfloat16 and float32; all three
 * alike. Inputs are never written.
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
  validateOptions(options);
  const problem = createProblem(q, k, v, options);
  return attend(inputsOf(q, k, v, options.attnMask), problem, options);
}

/** {@link sageattn} on a backend that no name stands for: one on a device of another library. */
export async function sageattnOn<T extends TensorView>(
  backend: Backend,
  q: T,
  k: T,
  v: T,
  options: AttentionOptions & { readonly returnLse?: false },
): Promise<T> {
  const problem = createProblem(q, k, v, options);
  return (await attend(inputsOf(q, k, v, options.attnMask), problem, options, backend)) as T;
}

const VARLEN_OPTIONS = OPTION_NAMES.filter((name) => name !== 'tensorLayout');

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
 * @throws as {@link sageattn}
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
  validateOptions(options, VARLEN_OPTIONS);
  const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, options);
  return attend(inputsOf(q, k, v, options.attnMask), problem, options);
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

const KERNEL_FUNCTION_OPTIONS = OPTION_NAMES.filter((name) => name !== 'kernel');

/** The function of one kernel. */
export function kernelFunction(kernel: KernelName): KernelFunction {
  return (async <T extends TensorView>(q: T, k: T, v: T, options: KernelOptions = {}) => {
    validateOptions(options, KERNEL_FUNCTION_OPTIONS);
    return sageattn(q, k, v, { ...options, kernel });
  }) as KernelFunction;
}

const sameLayout = (a: TensorView, b: TensorView) =>
  a.location === b.location &&
  a.dtype === b.dtype &&
  a.offset === b.offset &&
  a.shape.length === b.shape.length &&
  a.shape.every((size, i) => size === b.shape[i]) &&
  a.strides.every((stride, i) => stride === b.strides[i]);

const layoutText = (view: TensorView | undefined) =>
  view === undefined
    ? 'none'
    : `${view.location} ${view.dtype} [${view.shape}] strides [${view.strides}] offset ${view.offset}`;

const RUN_OPTIONS = ['signal', 'stream'] as const;

/** Attention planned for one shape; see {@link createAttention}. */
export class Attention<T extends TensorView = Tensor> {
  /** The kernel and the options that it runs with. */
  readonly kernel: KernelChoice;
  readonly #backend: BackendName;
  readonly #plan: Plan;
  readonly #specs: AttentionInputs<TensorSpec>;
  #disposed = false;

  /** @internal */
  constructor(backend: BackendName, plan: Plan, specs: AttentionInputs<TensorSpec>) {
    this.#backend = backend;
    this.kernel = plan.kernel;
    this.#plan = plan;
    this.#specs = specs;
  }

  /**
   * @param inputs tensors with the location, dtype, shape, strides and offset that were planned for
   * @returns the output and, if planned with `returnLse`, the logsumexp
   * @throws {InvalidArgumentError} a tensor unlike the planned one
   * @throws {ExecutionError} `disposed` after {@link dispose}; a device or worker that failed
   */
  async run(inputs: AttentionInputs<T>, context: RunContext = {}): Promise<AttentionOutputs<T>> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this Attention has been disposed');
    validateOptions(context, RUN_OPTIONS);
    if (typeof inputs !== 'object' || inputs === null) {
      throw new InvalidArgumentError('invalid-shape', 'inputs', 'an object with q, k and v', String(inputs));
    }
    context.signal?.throwIfAborted();
    for (const name of ['q', 'k', 'v', 'attnMask'] as const) {
      const planned = this.#specs[name];
      const given = inputs[name];
      const fits = planned === undefined || given === undefined ? planned === given : sameLayout(planned, given);
      if (!fits) {
        throw new InvalidArgumentError('invalid-shape', name, `${layoutText(planned)}, as planned`, layoutText(given));
      }
    }
    validateStorage(inputs);
    return (await this.#plan.run(inputs, contextOf(context, this.#backend))) as AttentionOutputs<T>;
  }

  /** Frees what the plan holds. Runs under way end first. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#plan.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/**
 * Plans attention for one shape, for callers who hold the plan themselves: kernel chosen, code compiled, scratch
 * allocated. `specs` are tensors, or shape, strides, offset, dtype and location without data; their shapes are those of
 * {@link sageattn}.
 *
 * @throws as {@link sageattn}
 */
export async function createAttention<T extends TensorView = Tensor>(
  specs: AttentionInputs<TensorSpec>,
  options: Omit<AttentionOptions, 'attnMask' | 'signal' | 'stream'> = {},
): Promise<Attention<T>> {
  validateOptions(
    options,
    OPTION_NAMES.filter((name) => name !== 'attnMask' && name !== 'signal' && name !== 'stream'),
  );
  if (typeof specs !== 'object' || specs === null) {
    throw new InvalidArgumentError('invalid-shape', 'specs', 'an object with q, k and v', String(specs));
  }
  const { q, k, v, attnMask } = specs;
  const all: AttentionOptions = attnMask === undefined ? options : { ...options, attnMask };
  const problem = createProblem(q, k, v, all);
  const backend = await chooseBackend(problem, all);
  const plan = await backend.plan(problem, await chooseKernel(backend, problem, all));
  return new Attention<T>(backend.name, plan, specs);
}

/** @internal Shared with the key-value cache. */
export const selection = { chooseBackend, chooseKernel, contextOf, validateStorage, RUN_OPTIONS };
