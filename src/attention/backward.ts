/** What a backward call means: the forward call, its results, and how its gradients are computed. */

import { InvalidArgumentError, reading, takeOptions, textOf } from '../errors.ts';
import type { DType } from '../tensor/dtype.ts';
import { isContiguous, type LseOf, type OperandLayout, requireView, type TensorView } from '../tensor/tensor.ts';
import { type AttentionOptions, checkOption, oneOf, optionNamesBut, validateOptions } from './options.ts';
import type { OutputSpec } from './outputs.ts';
import {
  type AttentionProblem,
  createProblem,
  createVarlenProblem,
  lseShapeOf,
  outputLayoutOf,
  outputShapeOf,
} from './problem.ts';

/**
 * Format of the operands of dV, dK and dQ's products. The scores are computed from the forward pass's INT8 codes in each;
 * `dOutput . V` is in 16 bits or more in each.
 */
export const BACKWARD_PRECISIONS = ['fp8', 'int8', 'fp16'] as const;
export type BackwardPrecision = (typeof BACKWARD_PRECISIONS)[number];

/** Options of a backward pass by itself. */
export interface GradientOptions {
  /**
   * Format of the operands of the three gradients' products: `fp8` E4M3, `int8` scales as fine as SageBwd's (arXiv 2505.11594,
   * section 4) or finer, `fp16` 16 bits or more. Default: the backend's first, `fp16`.
   */
  readonly backwardPrecision?: BackwardPrecision;
  /** The same inputs give the same bits. Default true; false lets a backend add in any order where that is faster. */
  readonly deterministic?: boolean;
  /** dtype of dq, dk and dv: q's (the default), or `float32`. */
  readonly gradientDtype?: 'float32';
  /** Also compute the gradient of an additive `attnMask`, summed over the dimensions that it broadcasts over. Default false. */
  readonly maskGradient?: boolean;
}

/** Options of a call with gradients: the options of `sageattn`, of packed sequences and of the backward pass. */
export interface TrainableOptions extends Omit<AttentionOptions, (typeof NO_FORWARD_NAMES)[number]>, GradientOptions {
  /** Starts of packed sequences, as `sageattnVarlen` takes them; with `cuSeqlensK`. q is `[totalQ,Hq,D]` then. */
  readonly cuSeqlensQ?: ArrayLike<number>;
  readonly cuSeqlensK?: ArrayLike<number>;
}

/** A validated, normalized backward call. Nothing behind it checks arguments again. */
export interface BackwardProblem {
  /** The forward call; `returnLse` is true. */
  readonly attention: AttentionProblem;
  /** The forward pass's output, in q's dtype, and the gradient of it, as `[B,Hq,Lq,Dv]`. */
  readonly output: OperandLayout;
  readonly dOutput: OperandLayout;
  /** First element of the contiguous float32 LSE, `[B,Hq,Lq]` or `[Hq,totalQ]`. */
  readonly lseOffset: number;
  readonly precision: BackwardPrecision;
  readonly deterministic: boolean;
  /** dtype of dq, dk and dv; dMask is always float32. */
  readonly gradientDtype: DType;
  /** Shape of the additive mask, if its gradient is wanted. */
  readonly maskGradient: readonly number[] | undefined;
  /**
   * The keys are a part of those that the rows saw: output and LSE are of all of them. Rows of dS do not add up to 0 then, so that what
   * smoothing took from K counts in dQ.
   */
  readonly partOfKeys?: true;
}

const GRADIENT_OPTIONS = {
  backwardPrecision: oneOf(...BACKWARD_PRECISIONS),
  deterministic: [(value: unknown) => typeof value === 'boolean', 'a boolean'],
  gradientDtype: oneOf('float32'),
  maskGradient: [(value: unknown) => typeof value === 'boolean', 'a boolean'],
} as const satisfies Record<keyof GradientOptions, readonly [(value: unknown) => boolean, string]>;

const NO_FORWARD_NAMES = ['returnLse', 'out', 'sinks', 'blockMask', 'sparsity'] as const;
const FORWARD_NAMES = optionNamesBut(...NO_FORWARD_NAMES);
const TRAINABLE_NAMES = [...FORWARD_NAMES, ...Object.keys(GRADIENT_OPTIONS), 'cuSeqlensQ', 'cuSeqlensK'];

/** Options of a call with gradients, in parts. */
export interface TakenOptions {
  /** Options of the forward call, including `returnLse`. */
  readonly forward: AttentionOptions;
  readonly gradient: GradientOptions;
  readonly packed: { readonly cuSeqlensQ: ArrayLike<number>; readonly cuSeqlensK: ArrayLike<number> } | undefined;
}

/**
 * Checks the options of a call with gradients.
 *
 * @throws {InvalidArgumentError} `unknown-option` or `invalid-option`
 */
export function takeTrainableOptions(options: TrainableOptions): TakenOptions {
  const { backwardPrecision, deterministic, gradientDtype, maskGradient, cuSeqlensQ, cuSeqlensK, ...plain } =
    takeOptions(options, TRAINABLE_NAMES);
  const gradient: Record<string, unknown> = {};
  for (const [name, value] of Object.entries({ backwardPrecision, deterministic, gradientDtype, maskGradient })) {
    if (value === undefined) continue;
    checkOption(name, value, GRADIENT_OPTIONS[name as keyof GradientOptions]);
    gradient[name] = value;
  }
  const isPacked = cuSeqlensQ !== undefined || cuSeqlensK !== undefined;
  const taken = isPacked ? FORWARD_NAMES.filter((name) => name !== 'tensorLayout') : FORWARD_NAMES;
  const forward: AttentionOptions = { ...validateOptions(plain, taken), returnLse: true };
  if (maskGradient === true && (forward.attnMask === undefined || forward.attnMask.dtype === 'bool')) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.maskGradient',
      'an additive attnMask to differentiate by',
      forward.attnMask === undefined ? 'no mask' : 'a boolean mask',
    );
  }
  if (!isPacked) return { forward, gradient, packed: undefined };
  if (cuSeqlensQ === undefined || cuSeqlensK === undefined) {
    const missing = cuSeqlensQ === undefined ? 'cuSeqlensQ' : 'cuSeqlensK';
    throw new InvalidArgumentError('invalid-option', `options.${missing}`, 'both cuSeqlens or none', 'none');
  }
  return { forward, gradient, packed: { cuSeqlensQ, cuSeqlensK } };
}

/** The forward problem of a call with gradients. */
export function trainableProblem(
  q: TensorView,
  k: TensorView,
  v: TensorView,
  { packed }: Pick<TakenOptions, 'packed'>,
  forward: AttentionOptions,
): AttentionProblem {
  const problem =
    packed === undefined
      ? createProblem(q, k, v, forward)
      : createVarlenProblem(q, k, v, packed.cuSeqlensQ, packed.cuSeqlensK, forward);
  return { ...problem, forGradients: true };
}

/** A tensor beside q, k and v: its shape, dtype and place are known. */
function requireCompanion(
  argument: string,
  view: TensorView,
  shape: readonly number[],
  dtype: DType,
  { location, device }: AttentionProblem,
): void {
  requireView(argument, view);
  if (view.shape.length !== shape.length || shape.some((size, i) => size !== view.shape[i])) {
    throw new InvalidArgumentError('invalid-shape', argument, `shape ${textOf(shape)}`, textOf(view.shape));
  }
  if (view.dtype !== dtype) {
    throw new InvalidArgumentError('invalid-dtype', `${argument}.dtype`, `'${dtype}'`, textOf(view.dtype));
  }
  if (view.location !== location || (view.device ?? 0) !== device) {
    const place = (where: string, ordinal: number) => `${where} (device ${ordinal})`;
    throw new InvalidArgumentError(
      'mixed-locations',
      argument,
      `${place(location, device)}, as the other operands have`,
      place(textOf(view.location), view.device ?? 0),
    );
  }
}

/** Where the elements of something shaped as the output are. */
function outputLike(argument: string, view: TensorView, attention: AttentionProblem): OperandLayout {
  requireCompanion(argument, view, outputShapeOf(attention), attention.dtype, attention);
  const { strides, offset } = view;
  const last = strides.length - 1;
  if ((view.shape[last] as number) > 1 && strides[last] !== 1) {
    throw new InvalidArgumentError(
      'invalid-strides',
      `${argument}.strides`,
      'a contiguous last dimension (stride 1)',
      textOf(strides),
    );
  }
  if (attention.sequences !== undefined) {
    const [tokenStride, headStride] = strides as [number, number];
    return { offset, batchStride: 0, headStride, tokenStride };
  }
  const [batchStride, second, third] = strides as [number, number, number];
  return attention.tensorLayout === 'HND'
    ? { offset, batchStride, headStride: second, tokenStride: third }
    : { offset, batchStride, headStride: third, tokenStride: second };
}

/** What the forward pass gave, and the gradient that comes in. */
export interface ForwardResults<T extends TensorView = TensorView> {
  /** `[B,Hq,Lq,Dv]` or `[B,Lq,Hq,Dv]`, q's dtype; varlen `[totalQ,Hq,Dv]`. */
  readonly output: T;
  /** `[B,Hq,Lq]`, varlen `[Hq,totalQ]`; float32, contiguous. */
  readonly lse: LseOf<T>;
  /** Shape and dtype of `output`. */
  readonly dOutput: T;
}

/**
 * The problem of a backward call.
 *
 * @param mask the mask given, for the shape of its gradient
 * @param defaultPrecision where the options say none
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function createBackwardProblem(
  attention: AttentionProblem,
  { output, lse, dOutput }: ForwardResults,
  mask: TensorView | undefined,
  { backwardPrecision, deterministic, gradientDtype, maskGradient }: GradientOptions,
  defaultPrecision: BackwardPrecision,
): BackwardProblem {
  return reading('output, lse or dOutput', () => {
    const outputLayout = outputLike('output', output, attention);
    const gradientLayout = outputLike('dOutput', dOutput, attention);
    requireCompanion('lse', lse, lseShapeOf(attention), 'float32', attention);
    if (!isContiguous(lse)) {
      throw new InvalidArgumentError('invalid-strides', 'lse.strides', 'a contiguous tensor', textOf(lse.strides));
    }
    return {
      attention,
      output: outputLayout,
      dOutput: gradientLayout,
      lseOffset: lse.offset,
      precision: backwardPrecision ?? defaultPrecision,
      deterministic: deterministic ?? true,
      gradientDtype: gradientDtype ?? attention.dtype,
      maskGradient: maskGradient === true ? mask?.shape : undefined,
    };
  });
}

/** A gradient of q, k or v: contiguous, in the layout of the call. */
export interface GradientShape {
  readonly shape: readonly number[];
  readonly layout: OperandLayout;
}

/**
 * Where gradients lie: shapes of q, k and v in the call's layout, contiguous. In varlen they have the tokens that the sequences
 * cover: `[cuSeqlensQ[B],Hq,D]`, `[cuSeqlensK[B],Hkv,D]`, `[cuSeqlensK[B],Hkv,Dv]`.
 */
export function gradientShapesOf(problem: AttentionProblem): Record<'dq' | 'dk' | 'dv', GradientShape> {
  const { headDim, valueDim, kvHeads, keyLength, sequences } = problem;
  // The output's shape and layout, with other sizes in it.
  const shaped = (other: AttentionProblem): GradientShape => ({
    shape: outputShapeOf(other),
    layout: outputLayoutOf(other),
  });
  const keys: AttentionProblem = {
    ...problem,
    queryHeads: kvHeads,
    queryLength: keyLength,
    sequences: sequences && { cuSeqlensQ: sequences.cuSeqlensK, cuSeqlensK: sequences.cuSeqlensK },
  };
  return {
    dq: shaped({ ...problem, valueDim: headDim }),
    dk: shaped({ ...keys, valueDim: headDim }),
    dv: shaped({ ...keys, valueDim }),
  };
}

/** The outputs of a backward pass. */
export function gradientOutputs({ attention, gradientDtype, maskGradient }: BackwardProblem): OutputSpec[] {
  const shapes = gradientShapesOf(attention);
  const outputs: OutputSpec[] = (['dq', 'dk', 'dv'] as const).map((name) => ({
    name,
    shape: shapes[name].shape,
    dtype: gradientDtype,
  }));
  if (maskGradient !== undefined) outputs.push({ name: 'dMask', shape: maskGradient, dtype: 'float32' });
  return outputs;
}

/** Sizes of the gradient of an additive mask as `[B,Hq,Lq,Lk]`: 1 where the mask broadcasts. */
export function maskGradientSizes(shape: readonly number[]): readonly [number, number, number, number] {
  const [batch, heads, rows, keys] = [1, 1, 1, 1, ...shape].slice(-4) as [number, number, number, number];
  return [batch, heads, rows, keys];
}
