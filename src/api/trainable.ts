/** Attention with gradients: a forward pass that keeps what its backward pass needs, and the backward pass by itself. */

import {
  type BackwardPrecision,
  createBackwardProblem,
  type ForwardResults,
  type TakenOptions,
  type TrainableOptions,
  takeTrainableOptions,
  trainableProblem,
} from '../attention/backward.ts';
import type { AttentionOptions } from '../attention/options.ts';
import { validateOptions } from '../attention/options.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  Backend,
  BackwardInputs,
  BackwardOutputs,
  BackwardSupport,
  RunContext,
} from '../backends/backend.ts';
import { chooseKernel, contextOf, keepInputs, RUN_OPTIONS, settleBackward, takeTensor } from '../backends/choice.ts';
import { forgetAvailability, getBackend } from '../backends/registry.ts';
import { DISPOSE } from '../dispose.ts';
import {
  BackendUnavailableError,
  ExecutionError,
  InvalidArgumentError,
  reading,
  textOf,
  UnsupportedOptionError,
} from '../errors.ts';
import { copyOfCpu, type LseOf, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { withCachedBackward, withCachedPlan } from './plan-cache.ts';
import { takeCall } from './sageattn.ts';
import { chooseBackend } from './selection.ts';

/** Gradients of q, k and v: contiguous, of their shapes, where they are. */
export interface Gradients<T extends TensorView = Tensor> extends BackwardOutputs<T> {}

/** A backend, what its backward pass can do, and the options with its defaults filled in. */
interface Chosen {
  readonly backend: Backend;
  readonly support: BackwardSupport;
  readonly forward: AttentionOptions;
  readonly precision: BackwardPrecision;
}

const isCpuAuto = (problem: AttentionProblem, { backend = 'auto' }: AttentionOptions) =>
  problem.location === 'cpu' && backend === 'auto';

/**
 * The backend of a call with gradients: as `sageattn` chooses, but for CPU tensors without a backend asked for one that has a
 * backward pass.
 *
 * @throws {InvalidArgumentError} `unsupported-option`: the backend has no backward pass for this problem
 */
async function choose(problem: AttentionProblem, options: TakenOptions, given?: Backend): Promise<Chosen> {
  const { forward, gradient } = options;
  const { kernel: _, ...anyKernel } = forward;
  let backend = given ?? (await chooseBackend(problem, isCpuAuto(problem, forward) ? anyKernel : forward));
  let support = await backend.backwardSupport?.(problem);
  if (support === undefined && given === undefined && isCpuAuto(problem, forward)) {
    backend = await getBackend('wasm');
    support = await backend.backwardSupport?.(problem);
  }
  const { maskGradient, backwardPrecision } = gradient;
  const { kernel, precision } = settleBackward(backend, support, forward.kernel, backwardPrecision);
  if (maskGradient === true && support?.maskGradient !== true) {
    throw new UnsupportedOptionError(kernel, 'options.maskGradient', 'false', 'true');
  }
  return { backend, support: support as BackwardSupport, forward: { ...forward, kernel }, precision };
}

/** Runs, and asks a backend that failed anew next time. */
async function watched<R>(backend: Backend, run: () => Promise<R>): Promise<R> {
  try {
    return await run();
  } catch (error) {
    if (error instanceof ExecutionError || error instanceof BackendUnavailableError) forgetAvailability(backend);
    throw error;
  }
}

/** Runs the backward pass. `inputs` are as they are now and may be the caller's: they are copied where they must wait. */
async function runBackward<T extends TensorView, G extends TensorView>(
  attention: AttentionProblem,
  { backend, forward, precision }: Chosen,
  gradient: TakenOptions['gradient'],
  inputs: BackwardInputs<T>,
  context: RunContext,
): Promise<Gradients<G>> {
  const problem = createBackwardProblem(attention, inputs, inputs.attnMask, gradient, precision);
  const choice = await chooseKernel(backend, attention, forward);
  const outputs = await watched(backend, () =>
    withCachedBackward(
      backend,
      problem,
      choice,
      (plan) => plan.run(inputs, contextOf(context, backend.name)),
      () => {},
    ),
  );
  return outputs as Gradients<G>;
}

const takeResults = <T extends TensorView>({ output, lse, dOutput }: ForwardResults<T>): ForwardResults<T> => ({
  output: takeTensor('output', output),
  lse: takeTensor('lse', lse),
  dOutput: takeTensor('dOutput', dOutput),
});

/** What {@link sageattnTrainable} gives: the output, and the way to its gradients. */
export class TrainableAttention<T extends TensorView = Tensor, G extends TensorView = T> {
  /** As `sageattn` returns it. Yours: writing into it before `backward` spoils the gradients. */
  readonly output: T;
  /** Logsumexp, as `sageattn` returns it. */
  readonly lse: LseOf<T>;
  #saved: { readonly inputs: AttentionInputs<T>; readonly problem: AttentionProblem } | undefined;
  readonly #chosen: Chosen;
  readonly #gradient: TakenOptions['gradient'];

  /** @internal */
  constructor(
    { output, lse }: AttentionOutputs<T>,
    inputs: AttentionInputs<T>,
    problem: AttentionProblem,
    chosen: Chosen,
    gradient: TakenOptions['gradient'],
  ) {
    this.output = output;
    this.lse = lse as LseOf<T>;
    this.#saved = { inputs, problem };
    this.#chosen = chosen;
    this.#gradient = gradient;
  }

  /**
   * Gradients of q, k and v, and with `maskGradient` of the mask. May be called more than once.
   *
   * @param dOutput gradient of the output; its shape and dtype, any strides whose last dimension is contiguous
   * @throws {InvalidArgumentError} a tensor unlike the output
   * @throws {ExecutionError} `disposed` after {@link dispose}; a device or worker that failed
   */
  async backward(dOutput: T, context: RunContext = {}): Promise<Gradients<G>> {
    const saved = this.#saved;
    if (saved === undefined) throw new ExecutionError('disposed', 'this TrainableAttention has been disposed');
    const own = validateOptions(context, RUN_OPTIONS);
    own.signal?.throwIfAborted();
    const { output, lse } = this;
    // A fault in a description is reported before a fault in the storage.
    createBackwardProblem(saved.problem, { output, lse, dOutput }, undefined, {}, this.#chosen.precision);
    const results = takeResults({ output, lse, dOutput: copyOfCpu(takeTensor('dOutput', dOutput)) });
    return runBackward(saved.problem, this.#chosen, this.#gradient, { ...saved.inputs, ...results }, own);
  }

  /** Lets go of q, k and v. Calls under way end first. */
  dispose(): void {
    this.#saved = undefined;
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/**
 * Attention as {@link sageattn} computes it, with its backward pass. The kernel is one whose P.V is in 16 bits or more, which
 * gradients need: `qk-int8-pv-fp16` and its like.
 *
 * q, k, v and the mask are kept until `dispose`: CPU tensors as copies, those on a GPU as they are, so that they must not be
 * written to before the backward pass.
 *
 * @param q `[B,Hq,Lq,D]` (HND) or `[B,Lq,Hq,D]` (NHD), or `[totalQ,Hq,D]` with `cuSeqlensQ` and `cuSeqlensK`
 * @throws {InvalidArgumentError} an argument that no kernel takes, or a backend without a backward pass
 * @throws {SageAttentionError} as `sageattn`
 * @see SageAttention3, arXiv 2505.11594, section 4; SageBwd, arXiv 2603.02170
 */
export function sageattnTrainable<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options: TrainableOptions & { readonly gradientDtype: 'float32' },
): Promise<TrainableAttention<T, LseOf<T>>>;
export function sageattnTrainable<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options?: TrainableOptions & { readonly gradientDtype?: never },
): Promise<TrainableAttention<T>>;
export async function sageattnTrainable<T extends TensorView>(
  q: T,
  k: T,
  v: T,
  options: TrainableOptions = {},
): Promise<TrainableAttention<T, TensorView>> {
  return trainableOn(undefined, q, k, v, options);
}

/** {@link sageattnTrainable} on a backend that no name stands for. */
export async function trainableOn<T extends TensorView>(
  given: Backend | undefined,
  q: T,
  k: T,
  v: T,
  options: TrainableOptions,
): Promise<TrainableAttention<T, TensorView>> {
  const taken = takeTrainableOptions(options);
  taken.forward.signal?.throwIfAborted();
  const { inputs, problem } = takeCall({ q, k, v }, taken.forward, (ownQ, ownK, ownV, own) =>
    trainableProblem(ownQ, ownK, ownV, taken, own),
  );
  const kept = keepInputs(inputs);
  const chosen = await choose(problem, taken, given);
  const { backend, forward } = chosen;
  const context = contextOf(forward, backend.name);
  const outputs = await watched(backend, () =>
    withCachedPlan(backend, problem, forward, (plan) => plan.run(kept, context)),
  );
  return new TrainableAttention<T, TensorView>(outputs as AttentionOutputs<T>, kept, problem, chosen, taken.gradient);
}

/** What {@link attentionBackward} takes. */
export interface AttentionBackwardInputs<T extends TensorView = Tensor> extends ForwardResults<T> {
  readonly q: T;
  readonly k: T;
  readonly v: T;
}

/**
 * The backward pass by itself, for frameworks that save tensors themselves. `output` and `lse` must come from the same q, k, v and
 * options on the same backend, from {@link sageattnTrainable} or from a kernel of its kind (`sageattn` with
 * `kernel: 'qk-int8-pv-fp16'` and `returnLse`): gradients of another kernel's output are less accurate.
 *
 * @param inputs `output` `[B,Hq,Lq,Dv]`, `lse` `[B,Hq,Lq]` float32 contiguous, `dOutput` as `output`; the others as in `sageattn`
 * @returns dq, dk, dv of the shapes of q, k, v, contiguous; with `maskGradient` also dMask, float32
 * @throws {SageAttentionError} as {@link sageattnTrainable}
 */
export function attentionBackward<T extends TensorView>(
  inputs: AttentionBackwardInputs<T>,
  options: TrainableOptions & { readonly gradientDtype: 'float32' },
): Promise<Gradients<LseOf<T>>>;
export function attentionBackward<T extends TensorView>(
  inputs: AttentionBackwardInputs<T>,
  options?: TrainableOptions & { readonly gradientDtype?: never },
): Promise<Gradients<T>>;
export async function attentionBackward<T extends TensorView>(
  inputs: AttentionBackwardInputs<T>,
  options: TrainableOptions = {},
): Promise<Gradients<TensorView>> {
  return backwardOn(undefined, inputs, options);
}

/** {@link attentionBackward} on a backend that no name stands for. */
export async function backwardOn<T extends TensorView>(
  given: Backend | undefined,
  inputs: AttentionBackwardInputs<T>,
  options: TrainableOptions,
): Promise<Gradients<TensorView>> {
  const taken = takeTrainableOptions(options);
  taken.forward.signal?.throwIfAborted();
  if (typeof inputs !== 'object' || inputs === null) {
    throw new InvalidArgumentError('invalid-shape', 'inputs', 'an object of tensors', textOf(inputs));
  }
  const { q, k, v, output, lse, dOutput } = reading('inputs', () => ({ ...inputs }));
  const call = takeCall({ q, k, v }, taken.forward, (ownQ, ownK, ownV, own) =>
    trainableProblem(ownQ, ownK, ownV, taken, own),
  );
  createBackwardProblem(call.problem, { output, lse, dOutput }, undefined, {}, 'fp16');
  const results = takeResults({ output, lse, dOutput });
  const kept = {
    ...keepInputs(call.inputs),
    output: copyOfCpu(results.output),
    lse: copyOfCpu(results.lse),
    dOutput: copyOfCpu(results.dOutput),
  };
  const chosen = await choose(call.problem, taken, given);
  return runBackward(call.problem, chosen, taken.gradient, kept, contextOf(taken.forward, chosen.backend.name));
}
