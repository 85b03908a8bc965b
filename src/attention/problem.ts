/** What a call means, with every default filled in. Nothing behind this file checks arguments again. */

import { InvalidArgumentError, reading, textOf } from '../errors.ts';
import { type DType, FLOAT32_MAX, type MaskDType } from '../tensor/dtype.ts';
import { type OperandLayout, requireView, type TensorLocation, type TensorView } from '../tensor/tensor.ts';
import { type Band, createBand, NO_LIMIT } from './band.ts';
import type { AttentionOptions, BlockMask, TensorLayout } from './options.ts';

/** A mask as `[B,Hq,Lq,Lk]`; a dimension that it broadcasts over has stride 0. */
export interface MaskLayout {
  readonly kind: 'boolean' | 'additive';
  readonly dtype: MaskDType;
  readonly offset: number;
  readonly strides: readonly [batch: number, head: number, query: number, key: number];
}

/** A mask `[B,L]` of tokens, as one of scores that is alike for all heads and rows. */
export const keyMaskLayout = ({ strides: [batch = 0, token = 0], offset }: TensorView): MaskLayout => ({
  kind: 'boolean',
  dtype: 'bool',
  offset,
  strides: [batch, 0, 0, token],
});

/** Sinks as `[Hq]`; a dimension that is repeated has stride 0. */
export interface SinksLayout {
  readonly dtype: DType;
  readonly offset: number;
  readonly stride: number;
}

/** A map of blocks as bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`; a dimension that it broadcasts over has stride 0. */
export interface BlockLayout {
  readonly rows: number;
  readonly keys: number;
  readonly offset: number;
  readonly strides: readonly [batch: number, head: number, rowBlock: number, keyBlock: number];
}

/** Below it a cap leaves of every score nothing that float32 can add to another; its reciprocal is still a float32. */
const LEAST_SOFTCAP = 2 ** -100;

/**
 * Kernels compute in float32. A cap beyond its range changes no score, as the largest in it; one that would be 0 there,
 * which means none, makes all scores alike, as the least does.
 */
const softcapInFloat32 = (softcap: number): number =>
  softcap === 0 ? 0 : Math.min(Math.max(softcap, LEAST_SOFTCAP), FLOAT32_MAX);

/**
 * An additive mask hides a key from a row, as far as means and scales are concerned, where its entry lies more than
 * this below the largest entry of that row of the mask: -1e4, -65504 and float32's least number do. In the softmax such
 * an entry is added like any other. A row whose entries are all equally low hides nothing.
 */
export const MASK_HIDES_BELOW = 1000;

/** Sequences of different lengths packed end to end: sequence b has tokens `cuSeqlens[b]` to `cuSeqlens[b + 1]`. */
export interface PackedSequences {
  readonly cuSeqlensQ: Int32Array;
  readonly cuSeqlensK: Int32Array;
}

/** Largest D and Dv of any kernel; those on GPUs take less. */
export const MAX_HEAD_DIM = 512;

/** A validated, normalized call. */
export interface AttentionProblem {
  /** Sequences: the batch size, or in varlen the number of packed sequences. */
  readonly batch: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  /** Lq, in varlen the longest. */
  readonly queryLength: number;
  /** Lk, in varlen the longest. */
  readonly keyLength: number;
  /** D */
  readonly headDim: number;
  /** Dv */
  readonly valueDim: number;
  readonly dtype: DType;
  readonly location: TensorLocation;
  /** Which device of that location, see {@link TensorView}. */
  readonly device: number;
  /** In varlen `batchStride` is 0 and tokens count from the start of the packed tensor. */
  readonly q: OperandLayout;
  readonly k: OperandLayout;
  readonly v: OperandLayout;
  /** Layout of the output; varlen outputs are `[totalQ,Hq,Dv]` whatever this says. */
  readonly tensorLayout: TensorLayout;
  readonly sequences: PackedSequences | undefined;
  readonly mask: MaskLayout | undefined;
  /** A logit of each head in the sum of its softmax; the tensor is `AttentionInputs.sinks`. */
  readonly sinks: SinksLayout | undefined;
  /**
   * Blocks of scores that are computed; the map is `AttentionInputs.blockMap`. It hides keys from the softmax, not from means and
   * scales.
   */
  readonly blocks: BlockLayout | undefined;
  /** Which keys a row may see by causality, alignment and window. */
  readonly band: Band;
  /** 0: none. */
  readonly softcap: number;
  readonly smScale: number;
  readonly returnLse: boolean;
  /** A backward pass comes after it, which quantizes Q and K again: a kernel must have the codes that every call with its options has. */
  readonly forGradients?: true;
}

/** One sequence of a problem: token ranges inside the operands. */
export interface Sequence {
  readonly index: number;
  readonly queryStart: number;
  readonly queryLength: number;
  readonly keyStart: number;
  readonly keyLength: number;
}

/** The sequences of a problem; a dense problem has one per batch entry, each starting at token 0. */
export function sequencesOf(problem: AttentionProblem): Sequence[] {
  const { sequences, batch, queryLength, keyLength } = problem;
  return Array.from({ length: batch }, (_, index) => {
    if (sequences === undefined) return { index, queryStart: 0, queryLength, keyStart: 0, keyLength };
    const queryStart = sequences.cuSeqlensQ[index] as number;
    const keyStart = sequences.cuSeqlensK[index] as number;
    return {
      index,
      queryStart,
      queryLength: (sequences.cuSeqlensQ[index + 1] as number) - queryStart,
      keyStart,
      keyLength: (sequences.cuSeqlensK[index + 1] as number) - keyStart,
    };
  });
}

/** Shape of the output. */
export function outputShapeOf(problem: AttentionProblem): number[] {
  const { batch, queryHeads, queryLength, valueDim, sequences, tensorLayout } = problem;
  if (sequences !== undefined) return [sequences.cuSeqlensQ[batch] as number, queryHeads, valueDim];
  return tensorLayout === 'HND'
    ? [batch, queryHeads, queryLength, valueDim]
    : [batch, queryLength, queryHeads, valueDim];
}

/** Where the contiguous output's elements are, in the terms of {@link OperandLayout}. */
export function outputLayoutOf(problem: AttentionProblem): OperandLayout {
  const { queryHeads, queryLength, valueDim, sequences, tensorLayout } = problem;
  if (sequences !== undefined) {
    return { offset: 0, batchStride: 0, headStride: valueDim, tokenStride: queryHeads * valueDim };
  }
  const batchStride = queryHeads * queryLength * valueDim;
  return tensorLayout === 'HND'
    ? { offset: 0, batchStride, headStride: queryLength * valueDim, tokenStride: valueDim }
    : { offset: 0, batchStride, headStride: valueDim, tokenStride: queryHeads * valueDim };
}

/** Shape of the logsumexp: `[B,Hq,Lq]`, varlen `[Hq,totalQ]`. */
export function lseShapeOf(problem: AttentionProblem): number[] {
  const { batch, queryHeads, queryLength, sequences } = problem;
  return sequences === undefined
    ? [batch, queryHeads, queryLength]
    : [queryHeads, sequences.cuSeqlensQ[batch] as number];
}

const FLOAT_DTYPES: readonly string[] = ['float16', 'bfloat16', 'float32'];
const LOCATIONS: readonly string[] = ['cpu', 'webgpu', 'cuda'];

function validateLocation(argument: string, { location }: TensorView): void {
  if (!LOCATIONS.includes(location)) {
    throw new InvalidArgumentError('mixed-locations', `${argument}.location`, LOCATIONS.join(', '), textOf(location));
  }
}

function validateOperand(argument: string, view: TensorView, dimensions: readonly string[]): void {
  requireView(argument, view);
  if (!Array.isArray(view.shape) || view.shape.length !== dimensions.length) {
    throw new InvalidArgumentError(
      'invalid-rank',
      argument,
      `${dimensions.length} dimensions [${dimensions.join(',')}]`,
      `shape ${textOf(view.shape)}`,
    );
  }
  if (!FLOAT_DTYPES.includes(view.dtype)) {
    throw new InvalidArgumentError('invalid-dtype', `${argument}.dtype`, FLOAT_DTYPES.join(', '), textOf(view.dtype));
  }
  validateLocation(argument, view);
  const last = view.shape.length - 1;
  if ((view.shape[last] as number) > 1 && view.strides[last] !== 1) {
    throw new InvalidArgumentError(
      'invalid-strides',
      `${argument}.strides`,
      'a contiguous last dimension (stride 1)',
      textOf(view.strides),
    );
  }
}

function requireSame(
  argument: string,
  what: string,
  expected: unknown,
  received: unknown,
  code: 'invalid-shape' | 'invalid-dtype' | 'mixed-locations',
): void {
  if (expected !== received) {
    throw new InvalidArgumentError(
      code,
      argument,
      `${what} ${textOf(expected)}, as the other operands have`,
      textOf(received),
    );
  }
}

/** k and v must be of q's dtype, and where q is. */
function requireAlike(argument: string, q: TensorView, view: TensorView): void {
  if (q.dtype !== view.dtype) requireSame(`${argument}.dtype`, 'dtype', q.dtype, view.dtype, 'invalid-dtype');
  requireLocated(argument, q, view);
}

function validateHeadDim(argument: string, size: number): void {
  if (size < 1 || size > MAX_HEAD_DIM) {
    throw new InvalidArgumentError('unsupported-size', argument, `a head dim from 1 to ${MAX_HEAD_DIM}`, String(size));
  }
}

/**
 * Most sequences of a call. Each is planned in a loop, which takes time even if the tensors are empty or repeat one
 * element, so a larger number is a mistake.
 */
const MAX_BATCH = 2 ** 20;
const MAX_HEADS = 2 ** 24;

function requireCountable(argument: string, what: string, size: number, below: number): void {
  if (size >= below) {
    throw new InvalidArgumentError('unsupported-size', argument, `a ${what} below 2^${Math.log2(below)}`, textOf(size));
  }
}

function operandLayout(view: TensorView, layout: TensorLayout): OperandLayout {
  const [batchStride, second, third] = view.strides as [number, number, number, number];
  return layout === 'HND'
    ? { offset: view.offset, batchStride, headStride: second, tokenStride: third }
    : { offset: view.offset, batchStride, headStride: third, tokenStride: second };
}

function maskLayout(mask: TensorView, target: readonly [number, number, number, number]): MaskLayout {
  const argument = 'options.attnMask';
  requireView(argument, mask);
  if (mask.dtype !== 'bool' && !FLOAT_DTYPES.includes(mask.dtype)) {
    throw new InvalidArgumentError(
      'invalid-dtype',
      `${argument}.dtype`,
      `bool, ${FLOAT_DTYPES.join(', ')}`,
      textOf(mask.dtype),
    );
  }
  const missing = 4 - mask.shape.length;
  const broadcasts = missing >= 0 && mask.shape.every((size, i) => size === 1 || size === target[i + missing]);
  if (!broadcasts) {
    throw new InvalidArgumentError(
      'invalid-mask',
      argument,
      `a shape that broadcasts to [B,Hq,Lq,Lk] = [${target}]`,
      textOf(mask.shape),
    );
  }
  const strideOf = (dimension: number) => {
    const i = dimension - missing;
    return i < 0 || mask.shape[i] === 1 ? 0 : (mask.strides[i] as number);
  };
  return {
    kind: mask.dtype === 'bool' ? 'boolean' : 'additive',
    dtype: mask.dtype,
    offset: mask.offset,
    strides: [strideOf(0), strideOf(1), strideOf(2), strideOf(3)],
  };
}

const requireLocated = (argument: string, q: TensorView, view: TensorView): void => {
  requireSame(argument, 'location', q.location, view.location, 'mixed-locations');
  requireSame(argument, 'device', q.device ?? 0, view.device ?? 0, 'mixed-locations');
};

function sinksLayout(q: TensorView, sinks: TensorView, queryHeads: number): SinksLayout {
  const argument = 'options.sinks';
  requireView(argument, sinks);
  requireLocated(argument, q, sinks);
  if (!FLOAT_DTYPES.includes(sinks.dtype)) {
    throw new InvalidArgumentError('invalid-dtype', `${argument}.dtype`, FLOAT_DTYPES.join(', '), textOf(sinks.dtype));
  }
  if (sinks.shape.length !== 1 || sinks.shape[0] !== queryHeads) {
    throw new InvalidArgumentError('invalid-shape', argument, `shape [Hq] = [${queryHeads}]`, textOf(sinks.shape));
  }
  return { dtype: sinks.dtype as DType, offset: sinks.offset, stride: sinks.strides[0] as number };
}

function blockLayout(q: TensorView, { rows, keys, map }: BlockMask, dimensions: Dimensions): BlockLayout {
  const argument = 'options.blockMask.map';
  requireView(argument, map);
  requireLocated(argument, q, map);
  if (map.dtype !== 'bool') {
    throw new InvalidArgumentError('invalid-dtype', `${argument}.dtype`, 'bool', textOf(map.dtype));
  }
  const { batch, queryHeads, queryLength, keyLength } = dimensions;
  const target = [batch, queryHeads, Math.ceil(queryLength / rows), Math.ceil(keyLength / keys)];
  const missing = 4 - map.shape.length;
  const fits = (size: number, i: number) => size === target[i + missing] || (size === 1 && i + missing < 2);
  if (missing < 0 || missing > 2 || !map.shape.every(fits)) {
    throw new InvalidArgumentError(
      'invalid-mask',
      argument,
      `shape [B,Hq,ceil(Lq/rows),ceil(Lk/keys)] = [${target}], or one that broadcasts over B and Hq`,
      textOf(map.shape),
    );
  }
  const strideOf = (dimension: number) => {
    const i = dimension - missing;
    return i < 0 || map.shape[i] === 1 ? 0 : (map.strides[i] as number);
  };
  return { rows, keys, offset: map.offset, strides: [strideOf(0), strideOf(1), strideOf(2), strideOf(3)] };
}

interface Dimensions {
  readonly batch: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly queryLength: number;
  readonly keyLength: number;
}

function normalize(
  q: TensorView,
  k: TensorView,
  v: TensorView,
  options: AttentionOptions,
  dimensions: Dimensions,
  layouts: Pick<AttentionProblem, 'q' | 'k' | 'v' | 'sequences' | 'tensorLayout'>,
): AttentionProblem {
  const { batch, queryHeads, kvHeads, queryLength, keyLength } = dimensions;
  requireAlike('k', q, k);
  requireAlike('v', q, v);
  if (kvHeads === 0 ? queryHeads !== 0 : queryHeads % kvHeads !== 0) {
    throw new InvalidArgumentError(
      'invalid-shape',
      'q',
      `a number of heads that is a multiple of k's ${kvHeads}`,
      `${queryHeads} heads`,
    );
  }
  requireCountable('q', 'batch size', batch, MAX_BATCH);
  requireCountable('q', 'number of heads over the batch', batch * queryHeads, MAX_HEADS);
  requireCountable('k', 'number of heads over the batch', batch * kvHeads, MAX_HEADS);
  requireCountable('q', 'length', queryLength, NO_LIMIT);
  requireCountable('k', 'length', keyLength, NO_LIMIT);
  const headDim = q.shape.at(-1) as number;
  const valueDim = v.shape.at(-1) as number;
  validateHeadDim('q', headDim);
  validateHeadDim('v', valueDim);
  requireSame('k', 'head dim', headDim, k.shape.at(-1), 'invalid-shape');

  const mask = options.attnMask;
  if (mask !== undefined) requireLocated('options.attnMask', q, mask);
  const { sinks, blockMask } = options;
  // Named one by one: this runs in every call, and V8 spreads objects slowly.
  return {
    batch,
    queryHeads,
    kvHeads,
    queryLength,
    keyLength,
    q: layouts.q,
    k: layouts.k,
    v: layouts.v,
    sequences: layouts.sequences,
    tensorLayout: layouts.tensorLayout,
    headDim,
    valueDim,
    dtype: q.dtype as DType,
    location: q.location,
    device: q.device ?? 0,
    mask: mask === undefined ? undefined : maskLayout(mask, [batch, queryHeads, queryLength, keyLength]),
    sinks: sinks === undefined ? undefined : sinksLayout(q, sinks, queryHeads),
    blocks: blockMask === undefined ? undefined : blockLayout(q, blockMask, dimensions),
    band: createBand(options),
    softcap: softcapInFloat32(options.softcap ?? 0),
    smScale: options.smScale ?? 1 / Math.sqrt(headDim),
    returnLse: options.returnLse ?? false,
  };
}

/**
 * The problem of a dense call. Options must have passed `validateOptions`.
 *
 * @param q `[B,Hq,Lq,D]`, k `[B,Hkv,Lk,D]`, v `[B,Hkv,Lk,Dv]` (HND; NHD swaps the middle two)
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function createProblem(
  q: TensorView,
  k: TensorView,
  v: TensorView,
  options: AttentionOptions,
): AttentionProblem {
  return reading('q, k or v', () => denseProblem(q, k, v, options));
}

function denseProblem(q: TensorView, k: TensorView, v: TensorView, options: AttentionOptions): AttentionProblem {
  const tensorLayout = options.tensorLayout ?? 'HND';
  const [headAxis, tokenAxis] = tensorLayout === 'HND' ? ([1, 2] as const) : ([2, 1] as const);
  const names = (length: string, heads: string, dim: string) =>
    tensorLayout === 'HND' ? ['B', heads, length, dim] : ['B', length, heads, dim];
  // k and v first: a caller without a query passes k for q, and the error names k.
  validateOperand('k', k, names('Lk', 'Hkv', 'D'));
  validateOperand('v', v, names('Lk', 'Hkv', 'Dv'));
  validateOperand('q', q, names('Lq', 'Hq', 'D'));
  const batch = q.shape[0] as number;
  const kvHeads = k.shape[headAxis] as number;
  const keyLength = k.shape[tokenAxis] as number;
  requireSame('k', 'batch size', batch, k.shape[0], 'invalid-shape');
  requireSame('v', 'batch size', batch, v.shape[0], 'invalid-shape');
  requireSame('v', 'number of heads', kvHeads, v.shape[headAxis], 'invalid-shape');
  requireSame('v', 'length', keyLength, v.shape[tokenAxis], 'invalid-shape');
  return normalize(
    q,
    k,
    v,
    options,
    {
      batch,
      queryHeads: q.shape[headAxis] as number,
      kvHeads,
      queryLength: q.shape[tokenAxis] as number,
      keyLength,
    },
    {
      q: operandLayout(q, tensorLayout),
      k: operandLayout(k, tensorLayout),
      v: operandLayout(v, tensorLayout),
      sequences: undefined,
      tensorLayout,
    },
  );
}

function validateCuSeqlens(argument: string, cuSeqlens: ArrayLike<number>, total: number): Int32Array {
  if (typeof cuSeqlens !== 'object' || cuSeqlens === null || !Number.isSafeInteger(cuSeqlens.length)) {
    throw new InvalidArgumentError('invalid-cu-seqlens', argument, 'an array of integers', textOf(cuSeqlens));
  }
  requireCountable(argument, 'number of entries', cuSeqlens.length, MAX_BATCH);
  const values = Array.from(cuSeqlens);
  const fail = (expected: string) => new InvalidArgumentError('invalid-cu-seqlens', argument, expected, textOf(values));
  if (!values.every((value) => Number.isSafeInteger(value) && value < 2 ** 31)) throw fail('integers below 2^31');
  if (values.length < 2) throw fail('at least two entries');
  if (values[0] !== 0) throw fail('a first entry of 0');
  if (values.some((value, i) => i > 0 && value < (values[i - 1] as number))) throw fail('entries that never fall');
  if ((values.at(-1) as number) > total) throw fail(`a last entry of at most the ${total} tokens given`);
  return Int32Array.from(values);
}

const longest = (cuSeqlens: Int32Array) =>
  cuSeqlens.reduce((most, end, i) => Math.max(most, i === 0 ? 0 : end - (cuSeqlens[i - 1] as number)), 0);

/**
 * The problem of a varlen call. Options must have passed `validateOptions`.
 *
 * @param q `[totalQ,Hq,D]`, k `[totalK,Hkv,D]`, v `[totalK,Hkv,Dv]`
 * @param cuSeqlensQ starts of the sequences and the end of the last: `B + 1` integers, the first 0; k's likewise
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export function createVarlenProblem(
  q: TensorView,
  k: TensorView,
  v: TensorView,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: AttentionOptions,
): AttentionProblem {
  return reading('q, k or v', () => packedProblem(q, k, v, cuSeqlensQ, cuSeqlensK, options));
}

function packedProblem(
  q: TensorView,
  k: TensorView,
  v: TensorView,
  cuSeqlensQ: ArrayLike<number>,
  cuSeqlensK: ArrayLike<number>,
  options: AttentionOptions,
): AttentionProblem {
  validateOperand('q', q, ['totalQ', 'Hq', 'D']);
  validateOperand('k', k, ['totalK', 'Hkv', 'D']);
  validateOperand('v', v, ['totalK', 'Hkv', 'Dv']);
  requireSame('v', 'number of heads', k.shape[1], v.shape[1], 'invalid-shape');
  requireSame('v', 'length', k.shape[0], v.shape[0], 'invalid-shape');
  const startsQ = validateCuSeqlens('cuSeqlensQ', cuSeqlensQ, q.shape[0] as number);
  const startsK = validateCuSeqlens('cuSeqlensK', cuSeqlensK, k.shape[0] as number);
  if (startsQ.length !== startsK.length) {
    throw new InvalidArgumentError(
      'invalid-cu-seqlens',
      'cuSeqlensK',
      `${startsQ.length} entries, as cuSeqlensQ has`,
      `${startsK.length} entries`,
    );
  }
  const layout = (view: TensorView): OperandLayout => ({
    offset: view.offset,
    batchStride: 0,
    headStride: view.strides[1] as number,
    tokenStride: view.strides[0] as number,
  });
  return normalize(
    q,
    k,
    v,
    options,
    {
      batch: startsQ.length - 1,
      queryHeads: q.shape[1] as number,
      kvHeads: k.shape[1] as number,
      queryLength: longest(startsQ),
      keyLength: longest(startsK),
    },
    {
      q: layout(q),
      k: layout(k),
      v: layout(v),
      sequences: { cuSeqlensQ: startsQ, cuSeqlensK: startsK },
      tensorLayout: 'NHD',
    },
  );
}
