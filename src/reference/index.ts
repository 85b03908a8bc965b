/**
 * `sageattention/reference`: what attention gives exactly, what a quantized kernel gives step by step, and how far
 * apart two results are. Plain TypeScript, slow, for tests and for measuring accuracy on tensors of one's own.
 *
 * @module sageattention/reference
 */

import { type AttentionOptions, EXACT_OPTIONS, validateOptions } from '../attention/options.ts';
import {
  type AttentionProblem,
  createProblem,
  createVarlenProblem,
  lseShapeOf,
  outputShapeOf,
} from '../attention/problem.ts';
import { InvalidArgumentError, reading, takeOptions, textOf } from '../errors.ts';
import { type Tensor, validateData } from '../tensor/tensor.ts';
import { attentionExact, type ReferenceInputs, type ReferenceOutputs } from './exact.ts';
import { attentionQuantized, PORTABLE_ALGORITHM, type QuantizedAlgorithm } from './quantized.ts';

export * from '../quantization/fp4-blocks.ts';
export * from '../quantization/groups.ts';
export {
  CUDA_ROUNDING,
  type IntegerRounding,
  type QuantizedIntegers,
  quantizeIntegers,
  TRITON_BLOCK_ROUNDING,
  TRITON_THREAD_ROUNDING,
} from '../quantization/integers.ts';
export * from '../quantization/outer-scale.ts';
export {
  type Granularity,
  type PvAccumDtype,
  type PvFormat,
  type QkFormat,
  type QuerySmoothing,
  TILINGS,
  type Tiling,
} from '../quantization/schemes.ts';
export * from '../quantization/smoothing.ts';
export * from '../quantization/two-level.ts';
export * from '../quantization/value-fp8.ts';
export * from '../tensor/formats/bfloat16.ts';
export * from '../tensor/formats/float4.ts';
export * from '../tensor/formats/float8.ts';
export * from '../tensor/formats/float16.ts';
export * from '../tensor/formats/int4.ts';
export * from '../tensor/formats/ue8m0.ts';
export { type Accuracy, compare } from './metrics.ts';
export {
  FP4_ALGORITHM,
  FP4_PV_FP4_ALGORITHM,
  FP4_PV_FP8_ALGORITHM,
  type Fp4Algorithm,
  OFFICIAL_FP4_ALGORITHM,
  PORTABLE_ALGORITHM,
  type QuantizedAlgorithm,
} from './quantized.ts';

/** Options of `sageattn` that decide how it is quantized. */
const QUANTIZATION_OPTIONS = [
  'smoothK',
  'smoothV',
  'smoothQ',
  'qkQuantGran',
  'pvAccumDtype',
  'scaleSearch',
] as const satisfies readonly (keyof AttentionOptions)[];

/** Options of exact attention; names and meaning as in `sageattn`. */
export type ExactOptions = Pick<AttentionOptions, (typeof EXACT_OPTIONS)[number]>;

/** Options of quantized attention: the options of `sageattn`, and an algorithm. */
export interface QuantizedOptions extends ExactOptions, Pick<AttentionOptions, (typeof QUANTIZATION_OPTIONS)[number]> {
  /**
   * Steps of the emulated kernel; missing ones are taken from {@link PORTABLE_ALGORITHM}. The options above override it.
   */
  readonly algorithm?: Partial<QuantizedAlgorithm>;
}

/** A result in float64. */
export interface ReferenceResult {
  /** Contiguous, in `shape`'s order. Not rounded to q's dtype. */
  readonly output: Float64Array;
  /** `[B,Hq,Lq,Dv]` (HND) or `[B,Lq,Hq,Dv]` (NHD); varlen `[totalQ,Hq,Dv]`. */
  readonly shape: readonly number[];
  /** Natural logarithm of the sum of exponentials of each row's true scores; present with `returnLse`. */
  readonly lse?: Float64Array;
  /** `[B,Hq,Lq]`; varlen `[Hq,totalQ]`. */
  readonly lseShape: readonly number[];
}

function requireCpu(argument: string, view: Tensor): void {
  if (view.location !== 'cpu') {
    throw new InvalidArgumentError('mixed-locations', argument, "a tensor in the process's memory", view.location);
  }
  validateData(argument, view);
}

function inputsOf(q: Tensor, k: Tensor, v: Tensor, options: ExactOptions): ReferenceInputs {
  requireCpu('q', q);
  requireCpu('k', k);
  requireCpu('v', v);
  const attnMask = options.attnMask as Tensor | undefined;
  const sinks = options.sinks as Tensor | undefined;
  const blockMap = options.blockMask?.map as Tensor | undefined;
  if (attnMask !== undefined) requireCpu('options.attnMask', attnMask);
  if (sinks !== undefined) requireCpu('options.sinks', sinks);
  if (blockMap !== undefined) requireCpu('options.blockMask.map', blockMap);
  return { q, k, v, attnMask, sinks, blockMap };
}

function resultOf(problem: AttentionProblem, { output, lse }: ReferenceOutputs): ReferenceResult {
  const result = { output, shape: outputShapeOf(problem), lseShape: lseShapeOf(problem) };
  return problem.returnLse ? { ...result, lse } : result;
}

/** The checked options of quantized attention: the options of `sageattn`, and the algorithm that results. */
function takeQuantized(given: QuantizedOptions, names: readonly string[]) {
  const known = [...names, ...QUANTIZATION_OPTIONS];
  const { algorithm = {}, ...unchecked } = takeOptions(given, [...known, 'algorithm']);
  const options = validateOptions(unchecked, known);
  if (typeof algorithm !== 'object' || algorithm === null) {
    throw new InvalidArgumentError('invalid-option', 'options.algorithm', 'an object', textOf(algorithm));
  }
  const base = reading('options.algorithm', () => ({ ...PORTABLE_ALGORITHM, ...algorithm }), 'invalid-option');
  const settled: QuantizedAlgorithm = {
    ...base,
    granularity: options.qkQuantGran ?? base.granularity,
    pvAccumDtype: options.pvAccumDtype ?? base.pvAccumDtype,
    smoothK: options.smoothK ?? base.smoothK,
    smoothQ: options.smoothQ ?? base.smoothQ,
    smoothV: options.smoothV ?? base.smoothV,
    fp4: options.scaleSearch === undefined ? base.fp4 : { ...base.fp4, scaleSearch: options.scaleSearch },
  };
  return { options, algorithm: settled };
}

/** Options that calls over packed sequences take: these have one layout. */
const VARLEN_OPTIONS = EXACT_OPTIONS.filter((name) => name !== 'tensorLayout');

/**
 * Exact attention in float64: softmax(q k^T smScale) v, with every option that changes its meaning.
 *
 * @param q `[B,Hq,Lq,D]` (HND) or `[B,Lq,Hq,D]` (NHD), float16, bfloat16 or float32
 * @param k `[B,Hkv,Lk,D]`
 * @param v `[B,Hkv,Lk,Dv]`
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function exactAttention(q: Tensor, k: Tensor, v: Tensor, options: ExactOptions = {}): ReferenceResult {
  const own = validateOptions(options, EXACT_OPTIONS);
  const problem = createProblem(q, k, v, own);
  return resultOf(problem, attentionExact(problem, inputsOf(q, k, v, own)));
}

/**
 * Exact attention over sequences packed end to end.
 *
 * @param q `[totalQ,Hq,D]`
 * @param k `[totalK,Hkv,D]`
 * @param v `[totalK,Hkv,Dv]`
 * @param cuSeqlensQ starts of the sequences and the end of the last, `B + 1` integers from 0; `cuSeqlensK` likewise
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function exactAttentionVarlen(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: Omit<ExactOptions, 'tensorLayout'> = {},
): ReferenceResult {
  const own = validateOptions(options, VARLEN_OPTIONS);
  const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, own);
  return resultOf(problem, attentionExact(problem, inputsOf(q, k, v, own)));
}

/**
 * Quantized attention in plain TypeScript, step by step as a kernel computes it: SageAttention (arXiv 2410.02367),
 * SageAttention2 (2411.10958), SageAttention2++ (2505.21136) or SageAttention3 (2505.11594), as `options.algorithm`
 * says.
 *
 * Arguments are as in {@link exactAttention}.
 *
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function quantizedAttention(q: Tensor, k: Tensor, v: Tensor, options: QuantizedOptions = {}): ReferenceResult {
  const { options: own, algorithm } = takeQuantized(options, EXACT_OPTIONS);
  const problem = createProblem(q, k, v, own);
  return resultOf(problem, attentionQuantized(problem, inputsOf(q, k, v, own), algorithm));
}

/**
 * Quantized attention over sequences packed end to end; each sequence is smoothed and quantized by itself. Arguments
 * are as in {@link exactAttentionVarlen}.
 *
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function quantizedAttentionVarlen(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: Omit<QuantizedOptions, 'tensorLayout'> = {},
): ReferenceResult {
  const { options: own, algorithm } = takeQuantized(options, VARLEN_OPTIONS);
  const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, own);
  return resultOf(problem, attentionQuantized(problem, inputsOf(q, k, v, own), algorithm));
}
