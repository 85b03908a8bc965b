/** K and V quantized once and attended to many times: what a decoder's cache needs. */

import type { KernelName } from '../attention/kernels.ts';
import {
  type AttentionOptions,
  type BackendName,
  optionNamesBut,
  type TensorLayout,
  validateOptions,
} from '../attention/options.ts';
import { attentionOutputs } from '../attention/outputs.ts';
import { type AttentionProblem, createProblem } from '../attention/problem.ts';
import type {
  AttentionOutputs,
  KernelDescriptor,
  KeyValueContext,
  PreparedKeyValue,
  RunContext,
} from '../backends/backend.ts';
import {
  chooseKernel,
  contextOf,
  keepSide,
  mapSide,
  obstacleTo,
  RUN_OPTIONS,
  sideOf,
  takeTensor,
  withSideOptions,
} from '../backends/choice.ts';
import { outputsInto, takeOut } from '../backends/out.ts';
import { DISPOSE } from '../dispose.ts';
import { ExecutionError, InvalidArgumentError, takeOptions, textOf, UnsupportedOptionError } from '../errors.ts';
import { contiguousStrides, copyOfCpu, requireView, specOf, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { type AttentionResult, takeCall } from './sageattn.ts';
import { chooseBackend, readyBackend } from './selection.ts';

/** Options that are settled when K and V are prepared. */
export type KeyValueOptions = Pick<
  AttentionOptions,
  | 'backend'
  | 'kernel'
  | 'tensorLayout'
  | 'smoothK'
  | 'smoothV'
  | 'smoothQ'
  | 'perBlockMean'
  | 'scaleSearch'
  | 'qkQuantGran'
  | 'pvAccumDtype'
  | 'signal'
  | 'stream'
> &
  TokenOptions & {
    /**
     * What keys and values are held in. `'int8'` (default): as the chosen kernel holds them. `'nvfp4'`: 4.5 bits an
     * element, in blocks of 16 with E4M3 scales (SageAttention3, arXiv 2505.11594), by kernel `qk-fp4-pv-fp4`.
     * Over a cache, queries and weights are not rounded to FP4, so `smoothQ` has no effect; where a card multiplies FP4, they are
     * beyond 32 rows.
     */
    readonly format?: KeyValueFormat;
  };

export type KeyValueFormat = 'int8' | 'nvfp4';

/** Kernels whose caches hold NVFP4; the first is what a format alone means. */
const NVFP4_KERNELS: readonly (KernelName | 'auto')[] = ['qk-fp4-pv-fp4', 'qk-fp4-pv-fp4-cuda'];

/** The kernel that a format and a kernel asked for mean together. */
function kernelOf(format: unknown, kernel: KernelName | 'auto' | undefined): KernelName | 'auto' | undefined {
  if (format === undefined) return kernel;
  if (format !== 'int8' && format !== 'nvfp4') {
    throw new InvalidArgumentError('invalid-option', 'options.format', "'int8', 'nvfp4'", textOf(format));
  }
  const named = kernel !== undefined && kernel !== 'auto';
  const fp4 = NVFP4_KERNELS.includes(kernel ?? 'auto');
  if (named && fp4 !== (format === 'nvfp4')) {
    const expected = `'${fp4 ? 'nvfp4' : 'int8'}' with kernel '${kernel}'`;
    throw new InvalidArgumentError('invalid-option', 'options.format', expected, `'${format}'`);
  }
  return format === 'nvfp4' && !named ? (NVFP4_KERNELS[0] as KernelName) : kernel;
}

/** Which of the tokens given count. */
export interface TokenOptions {
  /**
   * bool `[B,L]`, nonzero: the token counts in the means and scales of quantization. For what pads a batch, which every
   * `attend` must hide with its own mask: it is quantized like the others, but coarsens nothing. Default: all count.
   */
  readonly keyMask?: TensorView;
}

/** Options of `append`. */
export type AppendOptions = RunContext & TokenOptions;

/** Options of each call over prepared K and V. Blocks of these are not chosen: their keys are held quantized. */
export type AttendOptions = Omit<
  AttentionOptions,
  Exclude<keyof KeyValueOptions, keyof RunContext | 'keyMask' | 'format'> | 'sparsity'
>;

const PREPARE_OPTIONS = [
  'backend',
  'kernel',
  'tensorLayout',
  'smoothK',
  'smoothV',
  'smoothQ',
  'perBlockMean',
  'scaleSearch',
  'qkQuantGran',
  'pvAccumDtype',
  'signal',
  'stream',
] as const satisfies readonly (keyof KeyValueOptions & keyof AttentionOptions)[];
const ATTEND_OPTIONS = [...optionNamesBut(...PREPARE_OPTIONS, 'sparsity'), 'signal', 'stream'];

type Axes = readonly [headAxis: 1 | 2, tokenAxis: 1 | 2];
const axesOf = (layout: TensorLayout): Axes => (layout === 'HND' ? [1, 2] : [2, 1]);

/** Options of a preparation or an append without the mask of tokens, and that mask as it is now. */
function takeKeyMask<O extends TokenOptions>(
  options: O,
  taken: readonly string[],
  k: TensorView,
  tokenAxis: number,
): { options: Omit<O, 'keyMask'>; keyMask: TensorView | undefined } {
  const { keyMask, ...rest } = takeOptions(options, [...taken, 'keyMask']);
  if (keyMask === undefined) return { options: rest, keyMask };
  const argument = 'options.keyMask';
  requireView(argument, keyMask);
  const shape = [k.shape[0], k.shape[tokenAxis]];
  const fits = keyMask.dtype === 'bool' && keyMask.shape.length === 2 && shape.every((n, i) => n === keyMask.shape[i]);
  if (!fits || keyMask.location !== k.location || (keyMask.device ?? 0) !== (k.device ?? 0)) {
    throw new InvalidArgumentError(
      'invalid-mask',
      argument,
      `a bool tensor [B,L] = ${textOf(shape)} where the keys are (${k.location})`,
      `${textOf(keyMask.location)} ${textOf(keyMask.dtype)} ${textOf(keyMask.shape)}`,
    );
  }
  return { options: rest, keyMask: takeTensor(argument, keyMask) };
}

const withKeyMask = (context: RunContext, keyMask: TensorView | undefined): KeyValueContext =>
  keyMask === undefined ? context : { ...context, keyMask };

/**
 * A tensor's description with another number of tokens, contiguous; for problems about K and V that are held quantized.
 */
function withTokens(view: TensorView, tokenAxis: number, tokens: number): TensorView {
  const shape = view.shape.map((size, i) => (i === tokenAxis ? tokens : size));
  return { ...view, shape, strides: contiguousStrides(shape), offset: 0 };
}

/** Prepared keys and values; see {@link prepareKeyValue}. */
export class KeyValueCache<T extends TensorView = Tensor> {
  readonly #backend: BackendName;
  readonly #kernel: KernelDescriptor;
  readonly #prepared: PreparedKeyValue;
  readonly #layout: TensorLayout;
  /** Descriptions of what was prepared, not the tensors: those are the caller's. */
  readonly #k: TensorView;
  readonly #v: TensorView;
  #disposed = false;
  /** Calls run one after another: an append must not change what an attend before it reads. */
  #last: Promise<unknown> = Promise.resolve();
  #underWay = 0;

  /** @internal */
  constructor(
    backend: BackendName,
    kernel: KernelDescriptor,
    prepared: PreparedKeyValue,
    layout: TensorLayout,
    k: TensorView,
    v: TensorView,
  ) {
    this.#backend = backend;
    this.#kernel = kernel;
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

  /**
   * Runs `work` once the calls before have ended: now, if there are none. Inputs count as they are at the call,
   * so where it must wait, `keep` is called now.
   */
  async #inTurn<R>(keep: () => void, work: () => Promise<R>): Promise<R> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this KeyValueCache has been disposed');
    const isFirst = this.#underWay === 0;
    if (!isFirst) keep();
    this.#underWay++;
    // `work` of the first is called before this returns.
    const result = isFirst ? (async () => work())() : this.#last.then(work);
    this.#last = result.then(
      () => this.#underWay--,
      () => this.#underWay--,
    );
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
  async append(k: T, v: T, options: AppendOptions = {}): Promise<void> {
    const [headAxis, tokenAxis] = axesOf(this.#layout);
    const { inputs, problem } = takeCall({ q: k, k, v }, { tensorLayout: this.#layout }, createProblem);
    const taken = takeKeyMask(options, RUN_OPTIONS, k, tokenAxis);
    const context = contextOf(validateOptions(taken.options, RUN_OPTIONS), this.#backend);
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
          `${held.location} ${held.dtype} like ${textOf(held.shape)} but for the tokens`,
          `${given.location} ${given.dtype} ${textOf(given.shape)}`,
        );
      }
    }
    let { keyMask } = taken;
    let [ownK, ownV] = [inputs.k, inputs.v];
    const keep = () => {
      [ownK, ownV] = [copyOfCpu(ownK), copyOfCpu(ownV)];
      keyMask &&= copyOfCpu(keyMask);
    };
    return this.#inTurn(keep, () => {
      context.signal?.throwIfAborted();
      return this.#prepared.append(ownK, ownV, problem, withKeyMask(context, keyMask));
    });
  }

  /**
   * Attention of `q` over all tokens held. For decoding with a causal mask pass `causalAlignment: 'bottom-right'`.
   *
   * @param q `[B,Hq,Lq,D]` in the layout of the preparation
   * @returns as `sageattn`
   * @throws {SageAttentionError} as `sageattn`
   */
  attend(q: T, options: AttendOptions & { readonly returnLse: true }): Promise<AttentionResult<T>>;
  attend(q: T, options?: AttendOptions & { readonly returnLse?: false }): Promise<T>;
  attend(q: T, options?: AttendOptions): Promise<T | AttentionResult<T>>;
  async attend(q: T, options: AttendOptions = {}): Promise<T | AttentionResult<T>> {
    const checked: AttentionOptions = validateOptions(options, ATTEND_OPTIONS);
    const { attnMask: _, blockMask: __, ...unmasked } = checked;
    // The heads, dtype and rank of q are checked now; the masks' shapes against the keys held when the call's turn
    // comes.
    const { out: given } = unmasked;
    const planned = this.#problem(q, this.length, unmasked);
    const out = given && takeOut(given, { location: planned.location, outputs: attentionOutputs(planned) });
    const context: RunContext = { ...contextOf(unmasked, this.#backend), ...(out && { out }) };
    let own = takeTensor('q', q);
    let side = mapSide(sideOf(checked), takeTensor);
    const keep = () => {
      own = copyOfCpu(own);
      side = keepSide(side);
    };
    const outputs = await this.#inTurn(keep, () => {
      context.signal?.throwIfAborted();
      const problem = this.#problem(own, this.length, withSideOptions(checked, side));
      const obstacle = obstacleTo(this.#kernel, problem);
      if (obstacle !== undefined) throw new UnsupportedOptionError(this.#kernel.name, ...obstacle);
      return this.#prepared.attend(own, problem, side, context);
    });
    const { output, lse } = outputsInto(outputs as AttentionOutputs<T>, given, context);
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
 * unchanged exactly (SageAttention, arXiv 2410.02367, section on smoothing K), so tokens added later keep the first
 * one.
 *
 * @param k `[B,Hkv,Lk,D]` (HND) or `[B,Lk,Hkv,D]` (NHD); Lk may be 0
 * @param v `[B,Hkv,Lk,Dv]` (HND) or `[B,Lk,Hkv,Dv]` (NHD)
 * @throws {SageAttentionError} as `sageattn`
 */
export async function prepareKeyValue<T extends TensorView>(
  k: T,
  v: T,
  options: KeyValueOptions = {},
): Promise<KeyValueCache<T>> {
  const { format, ...unchecked } = takeOptions(options, [...PREPARE_OPTIONS, 'keyMask', 'format']);
  const { keyMask: _, ...others } = unchecked;
  const valid = validateOptions(others, PREPARE_OPTIONS);
  const kernel = kernelOf(format, valid.kernel);
  const own = kernel === undefined ? valid : { ...valid, kernel };
  own.signal?.throwIfAborted();
  const layout = own.tensorLayout ?? 'HND';
  const { inputs, problem } = takeCall({ q: k, k, v }, { tensorLayout: layout }, createProblem);
  const { keyMask } = takeKeyMask(unchecked, PREPARE_OPTIONS, k, axesOf(layout)[1]);
  const [heldK, heldV] = [specOf('k', k), specOf('v', v)];
  let [ownK, ownV, mask, isKept] = [inputs.k, inputs.v, keyMask, false];
  // Where something must be waited for, copies wait.
  const keep = () => {
    if (isKept) return;
    [ownK, ownV, mask, isKept] = [copyOfCpu(ownK), copyOfCpu(ownV), mask && copyOfCpu(mask), true];
  };
  let backend = readyBackend(problem, own);
  if (backend === undefined) {
    keep();
    backend = await chooseBackend(problem, own);
  }
  const context = contextOf(own, backend.name);
  let choice = chooseKernel(backend, problem, own, true);
  if (choice instanceof Promise) {
    keep();
    choice = await choice;
  }
  const prepared = await backend.prepareKeyValue(problem, choice, ownK, ownV, withKeyMask(context, mask));
  return new KeyValueCache<T>(backend.name, choice.descriptor, prepared, layout, heldK, heldV);
}
