/**
 * What the gradient kernels read besides the codes of Q and K. BF16 copies of Q, K, V and dO, `[head, token, channel]`, padded with
 * zeros, in which an element that is not finite is 0: in a product, 0 * NaN would reach rows that do not see it. And three numbers
 * for each row of Q, so that P = 2^(scale * codes + shift) and dS = P * (dP - D):
 *
 * - `rowScale`: the scale of its codes, |smScale| and log2(e) included. Its sign says that the logsumexp does not give the row's weights:
 *   their softmax is made anew (`softmax.ts`).
 * - `rowShift`: what smoothing K took from its scores, less its logsumexp, in base 2. -Infinity where it saw no key, which makes P 0;
 *   NaN where the row of Q, or the logsumexp of a row that is not made anew, is not finite, which makes P NaN.
 * - `rowDelta`: -D, where D is the sum of dO * output over the channels: what the sums of dP start from. NaN where the output or dO is not
 *   finite, which makes dS NaN: dV does not depend on V, and has NaN in the channels that dO has it in (`value-faults.ts`).
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { INFINITY_BITS, LOG2_E, nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { OPERAND_BYTES } from './config.ts';

/** Tokens of a CTA, and its threads. */
export const COPY_TOKENS = 64;
export const PREPARE_THREADS = 256;

/** Of `rowFaults`, for the rows of a CTA: one for each warp, not 0 where an element of dO is not a number. */
export const ROW_FAULT_BYTES = PREPARE_THREADS / 32;

export interface CopyTokensConfig {
  readonly target: Target;
  readonly dtype: DType;
  /** Whether the tokens are queries or keys. */
  readonly operand: 'query' | 'key';
  readonly dim: number;
  /** `dim` padded to 16. */
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
  /** Subtract the vector in `mean`, of `meanDim` floats a head. */
  readonly meanDim: number | undefined;
}

export const COPY_TOKENS_POINTERS = ['sequences', 'input', 'mean', 'copy'] as const;
export const COPY_TOKENS_INTEGERS = ['heads', 'blocks', 'paddedTokens'] as const;
export const COPY_TOKENS_STRIDES = ['batchStride', 'headStride', 'tokenStride'] as const;

/** Eight channels for each of the threads that share a row. */
function rowsOf(paddedDim: number) {
  const perRow = nextPowerOfTwo(paddedDim / 8);
  return { perRow, rowsAtOnce: PREPARE_THREADS / perRow };
}

const isNumber = (b: KernelBuilder, value: Reg<'f32'>) =>
  b.setp('lt', b.and(b.as(value, 'u32'), 0x7fffffff), INFINITY_BITS);

/** Four registers of BF16 pairs; elements that are not finite are 0. */
function packFinite(b: KernelBuilder, eight: readonly Reg<'f32'>[]): Reg<'bf16x2'>[] {
  const clean = eight.map((value) => b.selp(value, b.constant('f32', 0), isNumber(b, value)));
  return [0, 2, 4, 6].map((i) => b.cvtPack('bf16x2', at(clean, i), at(clean, i + 1)));
}

/** Q, K or V as BF16. */
export function copyTokens(config: CopyTokensConfig): Kernel {
  const { target, dtype, operand, dim, paddedDim, loadWidth, meanDim } = config;
  const b = new KernelBuilder({ name: 'copyTokens', target, threads: PREPARE_THREADS });
  const pointer = pointers(b, COPY_TOKENS_POINTERS);
  const integer = integers(b, COPY_TOKENS_INTEGERS);
  const strides = pointers(b, COPY_TOKENS_STRIDES);
  const { perRow, rowsAtOnce } = rowsOf(paddedDim);

  b.section('which tokens');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, headAndSequence, heads);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const [start, length, paddedStart] =
    operand === 'query'
      ? [table.queryStart, table.queryLength, table.paddedQueryStart]
      : [table.keyStart, table.keyLength, table.paddedKeyStart];
  const firstToken = b.mul(block, COPY_TOKENS);
  // Rows of Q are padded to twice as many tokens.
  const padding = operand === 'query' ? 127 : 63;
  b.when(b.setp('ge', firstToken, b.and(b.add(length, padding), 0xffffffff - padding)), () => b.exit());

  b.section('copy');
  const row = b.shr(thread, Math.log2(perRow));
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  const stored = b.setp('lt', channel, paddedDim);
  let mean: Reg<'f32'>[] | undefined;
  if (meanDim !== undefined) {
    const means = b.loadPointer(pointer.mean);
    const own = offset(b, means, b.mad(b.mad(sequence, heads, head), meanDim, channel), 4);
    const kept = b.regs('f32', 8);
    for (const register of kept) b.set(register, 0);
    b.if(stored, () => {
      loadEightFloats(b, own).forEach((value, i) => {
        b.mov(value, at(kept, i));
      });
    });
    mean = kept;
  }
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(strides.batchStride));
  source = offset64(b, source, head, b.loadParameter(strides.headStride));
  const tokenStride = b.loadParameter(strides.tokenStride);
  const token = b.add(firstToken, row);
  source = offset64(b, source, b.add(start, token), tokenStride);
  source = offset(b, source, channel, BYTES[dtype]);
  const step = b.as(b.mul(tokenStride, rowsAtOnce), 'global');
  const paddedRow = b.add(b.mad(head, b.loadParameter(integer.paddedTokens), paddedStart), token);
  let into = offset(b, b.loadPointer(pointer.copy), paddedRow, paddedDim * OPERAND_BYTES);
  into = offset(b, into, channel, OPERAND_BYTES);
  for (let first = 0; first < COPY_TOKENS; first += rowsAtOnce) {
    const inside = b.setp('lt', b.add(token, first), length);
    const eight = loadEight(b, dtype, loadWidth, source, channel, dim, inside);
    const smoothed = mean;
    if (smoothed !== undefined) {
      for (const [i, value] of eight.entries()) b.when(inside, () => b.sub(value, at(smoothed, i), value));
    }
    const words = packFinite(b, eight);
    const here = rowsAtOnce > COPY_TOKENS ? b.andPred(stored, b.setp('lt', row, COPY_TOKENS)) : stored;
    b.when(here, () => b.stVector(words, into, first * paddedDim * OPERAND_BYTES));
    if (first + rowsAtOnce < COPY_TOKENS) source = b.add(source, step);
  }
  return b.build();
}

export interface PrepareRowsConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly valueDim: number;
  /** Dv padded to 16. */
  readonly paddedValueDim: number;
  readonly loadWidth: LoadWidth;
  /** Rows of Q that share a set of scales, and how many are in the set. */
  readonly queryScales: readonly [rows: number, scales: number];
  /** Each row's `rowWeight` is set to 1: `softmax.ts` may give it another. */
  readonly rowWeights: boolean;
  /** What smoothing K took is added to the scores, and not in `rowShift`: see `needsTrueScores`. */
  readonly trueScores: boolean;
}

/**
 * A logsumexp, or what smoothing took from a row's scores, beyond it has lost too much to rounding to give the row's weights: a mask that
 * pushes the whole row down, or large scores. To this size a weight is right to 1 part in 8000. One that is not a number may be so for a
 * value, on which weights do not depend.
 */
const LARGEST_LSE = 1024;

export const PREPARE_ROWS_POINTERS = [
  'sequences',
  'output',
  'outputGradient',
  'lse',
  'queryScale',
  'rowBias',
  'copy',
  'rowScale',
  'rowShift',
  'rowDelta',
  'rowWeight',
  'rowFaults',
] as const;
export const PREPARE_ROWS_INTEGERS = ['heads', 'blocks', 'paddedTokens'] as const;
/** In bytes, of the output, of dO and of the logsumexp. */
export const PREPARE_ROWS_STRIDES = [
  'outputBatch',
  'outputHead',
  'outputToken',
  'gradientBatch',
  'gradientHead',
  'gradientToken',
  'lseBatch',
  'lseHead',
  'lseToken',
] as const;

/** dO as BF16, and the numbers of each row of Q. */
export function prepareRows(config: PrepareRowsConfig): Kernel {
  const { target, dtype, valueDim, paddedValueDim, loadWidth, queryScales } = config;
  const b = new KernelBuilder({ name: 'prepareRows', target, threads: PREPARE_THREADS });
  const pointer = pointers(b, PREPARE_ROWS_POINTERS);
  const integer = integers(b, PREPARE_ROWS_INTEGERS);
  const strides = pointers(b, PREPARE_ROWS_STRIDES);
  const scoreScale = b.parameter('scoreScale', 'f32');
  const { perRow, rowsAtOnce } = rowsOf(paddedValueDim);

  b.section('which rows');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, headAndSequence, heads);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const { queryStart, queryLength, paddedQueryStart } = table;
  const firstToken = b.mul(block, COPY_TOKENS);
  b.when(b.setp('ge', firstToken, b.and(b.add(queryLength, 127), 0xffffff80)), () => b.exit());
  const row = b.shr(thread, Math.log2(perRow));
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  const stored = b.setp('lt', channel, paddedValueDim);
  const isFirst = b.setp('eq', channel, 0);
  const token = b.add(firstToken, row);
  const paddedRow = b.add(b.mad(head, b.loadParameter(integer.paddedTokens), paddedQueryStart), token);

  const ofHead = (name: 'output' | 'gradient' | 'lse', base: Reg<'global'>) => {
    const ofSequence = offset64(b, base, sequence, b.loadParameter(strides[`${name}Batch`]));
    return offset64(b, ofSequence, head, b.loadParameter(strides[`${name}Head`]));
  };
  const rowsOfTensor = (name: 'output' | 'gradient', base: Reg<'global'>) => {
    const stride = b.loadParameter(strides[`${name}Token`]);
    const first = offset64(b, ofHead(name, base), b.add(queryStart, token), stride);
    return { address: offset(b, first, channel, BYTES[dtype]), step: b.as(b.mul(stride, rowsAtOnce), 'global') };
  };
  const output = rowsOfTensor('output', b.loadPointer(pointer.output));
  const gradient = rowsOfTensor('gradient', b.loadPointer(pointer.outputGradient));
  const lseStride = b.loadParameter(strides.lseToken);
  const lseAt = offset64(b, ofHead('lse', b.loadPointer(pointer.lse)), b.add(queryStart, token), lseStride);
  const biasAt = offset(b, b.loadPointer(pointer.rowBias), paddedRow, 4);
  const numbers = (['rowScale', 'rowShift', 'rowDelta'] as const).map((name) =>
    offset(b, b.loadPointer(pointer[name]), paddedRow, 4),
  ) as [Reg<'global'>, Reg<'global'>, Reg<'global'>];
  const weightAt = config.rowWeights ? offset(b, b.loadPointer(pointer.rowWeight), paddedRow, 4) : undefined;
  let into = offset(b, b.loadPointer(pointer.copy), paddedRow, paddedValueDim * OPERAND_BYTES);
  into = offset(b, into, channel, OPERAND_BYTES);

  const hasFault = b.constant('u32', 0);
  let [outputAt, gradientAt] = [output.address, gradient.address];
  for (let first = 0; first < COPY_TOKENS; first += rowsAtOnce) {
    b.section('dO, and D');
    const inside = b.setp('lt', b.add(token, first), queryLength);
    const inBlock = rowsAtOnce > COPY_TOKENS ? b.setp('lt', row, COPY_TOKENS) : undefined;
    const dO = loadEight(b, dtype, loadWidth, gradientAt, channel, valueDim, inside);
    const o = loadEight(b, dtype, loadWidth, outputAt, channel, valueDim, inside);
    let delta = b.constant('f32', 0);
    // Not a number where an element of dO is none.
    let fault = b.constant('f32', 0);
    for (const [i, value] of dO.entries()) delta = b.fma(value, at(o, i), delta);
    for (const value of dO) fault = b.fma(value, 0, fault);
    for (let mask = 1; mask < perRow; mask *= 2) {
      delta = b.add(delta, b.shflBfly(delta, mask));
      fault = b.add(fault, b.shflBfly(fault, mask));
    }
    b.when(b.notPred(isNumber(b, fault)), () => b.set(hasFault, 1));
    const words = packFinite(b, dO);
    const here = inBlock === undefined ? stored : b.andPred(stored, inBlock);
    b.when(here, () => b.stVector(words, into, first * paddedValueDim * OPERAND_BYTES));

    b.section('scale and shift');
    b.if(inBlock === undefined ? isFirst : b.andPred(isFirst, inBlock), () => {
      const [scale, shift] = [b.constant('f32', 0), b.constant('f32', Number.NEGATIVE_INFINITY)];
      b.if(inside, () => {
        const ownRow = b.add(paddedRow, first);
        const [scaleRows, scaleCount] = queryScales;
        const group = b.shr(ownRow, Math.log2(scaleRows));
        const index = scaleCount === 8 ? b.add(b.shl(group, 3), b.and(ownRow, 7)) : group;
        const codes = b.ld('f32', offset(b, b.loadPointer(pointer.queryScale), index, 4), 0, { readOnly: true });
        b.mul(codes, b.loadParameter(scoreScale), scale);
        const lse = b.ld('f32', first === 0 ? lseAt : b.add(lseAt, b.as(b.mul(lseStride, first), 'global')));
        const bias = b.ld('f32', biasAt, first * 4, { readOnly: true });
        // A row of Q that is not finite has a NaN bias.
        const own = config.trueScores ? b.mul(bias, 0) : bias;
        b.fma(lse, -LOG2_E, own, shift);
        const isNear = b.andPred(b.setp('le', b.abs(lse), LARGEST_LSE), b.setp('le', b.abs(bias), LARGEST_LSE));
        const empty = b.setp('eq', lse, Number.NEGATIVE_INFINITY);
        const finite = isNumber(b, bias);
        const isAgain = b.andPred(b.notPred(b.orPred(isNear, empty)), finite);
        b.when(isAgain, () => b.neg(scale, scale));
        b.when(b.notPred(b.andPred(finite, isNumber(b, shift))), () => b.set(shift, Number.NaN));
        b.when(empty, () => b.set(shift, Number.NEGATIVE_INFINITY));
      });
      b.when(b.notPred(isNumber(b, delta)), () => b.set(delta, Number.NaN));
      if (weightAt !== undefined) b.st(b.constant('f32', 1), weightAt, first * 4);
      const values = [scale, shift, b.neg(delta)];
      values.forEach((value, i) => {
        b.st(value, at(numbers, i), first * 4);
      });
    });
    if (first + rowsAtOnce < COPY_TOKENS) {
      outputAt = b.add(outputAt, output.step);
      gradientAt = b.add(gradientAt, gradient.step);
    }
  }
  b.section('whether an element of dO is not a number');
  const ofWarp = b.selp<'u32'>(1, b.constant('u32', 0), b.voteAny(b.setp('ne', hasFault, 0)));
  const blockRow = b.add(b.mad(head, b.loadParameter(integer.paddedTokens), paddedQueryStart), firstToken);
  const ofBlock = offset(b, b.loadPointer(pointer.rowFaults), b.shr(blockRow, Math.log2(COPY_TOKENS)), ROW_FAULT_BYTES);
  const faultAt = b.add(ofBlock, b.as(b.cvt('u64', b.shr(thread, 5)), 'global'));
  b.when(b.setp('eq', b.and(thread, 31), 0), () => b.stByte(ofWarp, faultAt));
  return b.build();
}
