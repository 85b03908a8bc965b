/** K and V quantized once and attended to many times: what a decoder's cache needs. */

import {
  type AttentionOptions,
  type BackendName,
  OPTION_NAMES,
  type TensorLayout,
  validateOptions,
} from '../attention/options.ts';
import { type AttentionProblem, createProblem } from '../attention/problem.ts';
import type { AttentionOutputs, PreparedKeyValue, RunContext } from '../backends/backend.ts';
import { chooseKernel, contextOf, RUN_OPTIONS, validateStorage } from '../backends/choice.ts';
import { DISPOSE } from '../dispose.ts';
import { ExecutionError, InvalidArgumentError } from '../errors.ts';
import type { Tensor, TensorView } from '../tensor/tensor.ts';
import { contiguousStrides } from '../tensor/tensor.ts';
import type { AttentionResult } from './sageattn.ts';
import { chooseBackend } from './selection.ts';

/** Options that are settled when K and V are prepared. */
export type KeyValueOptions = Pick<
  AttentionOptions,
  | 'backend'
  | 'kernel'
  | 'tensorLayout'
  | 'smoothK'
  | 'smoothV'
  | 'smoothQ'
  | 'qkQuantGran'
  | 'pvAccumDtype'
  | 'signal'
  | 'stream'
>;

/** Options of each call over prepared K and V. */
export type AttendOptions = Omit<AttentionOptions, Exclude<keyof KeyValueOptions, keyof RunContext>>;

const PREPARE_OPTIONS = [
  'backend',
  'kernel',
  'tensorLayout',
  'smoothK',
  'smoothV',
  'smoothQ',
  'qkQuantGran',
  'pvAccumDtype',
  'signal',
  'stream',
] as const satisfies readonly (keyof KeyValueOptions)[];
const ATTEND_OPTIONS = OPTION_NAMES.filter(
  (name) => name === 'signal' || name === 'stream' || !(PREPARE_OPTIONS as readonly string[]).includes(name),
);

type Axes = readonly [headAxis: 1 | 2, tokenAxis: 1 | 2];
const axesOf = (layout: TensorLayout): Axes => (layout === 'HND' ? [1, 2] : [2, 1]);

/** A tensor's description with another number of tokens, contiguous; for problems about K and V that are held quantized. */
function withTokens(view: TensorView, tokenAxis: number, tokens: number): TensorView {
  const shape = view.shape.map((size, i) => (i === tokenAxis ? tokens : size));
  return { ...view, shape, strides: contiguousStrides(shape), offset: 0 };
}

/** Prepared keys and values; see {@link prepareKeyValue}. */
export class KeyValueCache<T extends TensorView = Tensor> {
  readonly #backend: BackendName;
  readonly #prepared: PreparedKeyValue;
  readonly #layout: TensorLayout;
  readonly #k: TensorView;
  readonly #v: TensorView;
  #disposed = false;
  /** Calls run one after another: an append must not change what an attend before it reads. */
  #last: Promise<unknown> = Promise.resolve();

  /** @internal */
  constructor(backend: BackendName, prepared: PreparedKeyValue, layout: TensorLayout, k: TensorView, v: TensorView) {
    this.#backend = backend;
    this.#prepared = prepared;
    this.#layout = layout;
    this.#k = k;
    this.#v = v;
  }

  /** Tokens held. Appends under way are not counted. */
  get length(): number {
    return this.#prepared.length;
  }

  #problem(q: TensorView, tokens: number, options: AttendOptions): AttentionProblem {
    const [, tokenAxis] = axesOf(this.#layout);
    return createProblem(q, withTokens(this.#k, tokenAxis, tokens), withTokens(this.#v, tokenAxis, tokens), {
      ...options,
      tensorLayout: this.#layout,
    });
  }

  #enqueue<R>(work: () => Promise<R>): Promise<R> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this KeyValueCache has been disposed');
    const result = this.#last.then(work);
    this.#last = result.catch(() => undefined);
    return result;
  }

  /**
   * Adds tokens at the end.
   *
   * K keeps the smoothing vector of the first preparation: any constant vector leaves softmax unchanged exactly.
   *
   * @param k `[B,Hkv,L,D]` in the layout of the preparation, same dtype and heads
   * @param v `[B,Hkv,L,Dv]`
   * @throws {InvalidArgumentError} tensors that do not continue the ones held
   */
  async append(k: T, v: T, options: RunContext = {}): Promise<void> {
    validateOptions(options, RUN_OPTIONS);
    const [headAxis] = axesOf(this.#layout);
    const problem = createProblem(k, k, v, { tensorLayout: this.#layout });
    for (const [argument, given, held] of [
      ['k', k, this.#k],
      ['v', v, this.#v],
    ] as const) {
      const alike =
        given.dtype === held.dtype && [0, headAxis, 3].every((axis) => given.shape[axis] === held.shape[axis]);
      if (!alike || given.location !== held.location) {
        throw new InvalidArgumentError(
          'invalid-shape',
          argument,
          `${held.location} ${held.dtype} like [${held.shape}] but for the tokens`,
          `${given.location} ${given.dtype} [${given.shape}]`,
        );
      }
    }
    validateStorage({ q: k, k, v });
    const context = contextOf(options, this.#backend);
    return this.#enqueue(() => {
      context.signal?.throwIfAborted();
      return this.#prepared.append(k, v, problem, context);
    });
  }

  /**
   * Attention of `q` over all tokens held. For decoding with a causal mask pass `causalAlignment: 'bottom-right'`.
   *
   * @param q `[B,Hq,Lq,D]` in the layout of the preparation
   * @returns as `sageattn`
   * @throws as `sageattn`
   */
  attend(q: T, options: AttendOptions & { readonly returnLse: true }): Promise<AttentionResult<T>>;
  attend(q: T, options?: AttendOptions & { readonly returnLse?: false }): Promise<T>;
  attend(q: T, options?: AttendOptions): Promise<T | AttentionResult<T>>;
  async attend(q: T, options: AttendOptions = {}): Promise<T | AttentionResult<T>> {
    validateOptions(options, ATTEND_OPTIONS);
    const { attnMask } = options;
    const context = contextOf(options, this.#backend);
    // The heads, dtype and rank of q are checked now; the mask's shape against the keys held when the call's turn comes.
    const { attnMask: _, ...unmasked } = options;
    this.#problem(q, this.length, unmasked);
    validateStorage({ q, k: q, v: q, ...(attnMask === undefined ? {} : { attnMask }) });
    const outputs = await this.#enqueue(() => {
      context.signal?.throwIfAborted();
      const problem = this.#problem(q, this.length, options);
      return this.#prepared.attend(q, problem, attnMask, context);
    });
    const { output, lse } = outputs as AttentionOutputs<T>;
    return lse === undefined ? output : { output, lse };
  }

  /** Frees the quantized keys and values, once calls under way have ended. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#last.then(() => this.#prepared.dispose());
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/**
 * Quantizes K and V once, to be attended to many times and appended to. Any constant smoothing vector leaves softmax
 * unchanged exactly (SageAttention, arXiv 2410.02367, section on smoothing K), so tokens added later keep the first one.
 *
 * @param k `[B,Hkv,Lk,D]` (HND) or `[B,Lk,Hkv,D]` (NHD); Lk may be 0
 * @param v `[B,Hkv,Lk,Dv]` (HND) or `[B,Lk,Hkv,Dv]` (NHD)
 * @throws as `sageattn`
 */
export async function prepareKeyValue<T extends TensorView>(
  k: T,
  v: T,
  options: KeyValueOptions = {},
): Promise<KeyValueCache<T>> {
  validateOptions(options, PREPARE_OPTIONS);
  const layout = options.tensorLayout ?? 'HND';
  const problem = createProblem(k, k, v, { tensorLayout: layout });
  validateStorage({ q: k, k, v });
  const backend = await chooseBackend(problem, options);
  const context = contextOf(options, backend.name);
  const choice = await chooseKernel(backend, problem, options);
  const prepared = await backend.prepareKeyValue(problem, choice, k, v, context);
  return new KeyValueCache<T>(backend.name, prepared, layout, k, v);
}
