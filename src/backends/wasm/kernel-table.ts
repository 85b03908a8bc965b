/** The kernels of this backend as data. */

import { type AttentionProblem, MAX_HEAD_DIM } from '../../attention/problem.ts';
import { SCALE_SEARCHES } from '../../quantization/fp4-blocks.ts';
import type { BackwardSupport, KernelDescriptor } from '../backend.ts';
import type { DotProduct } from './geometry.ts';

const COMMON = {
  // Groups of one token: as the portable kernel's blocks, but finer.
  qkQuantGran: ['per-block'],
  pvAccumDtype: ['fp32'],
  smoothV: true,
  smoothQ: [false],
  maxHeadDim: MAX_HEAD_DIM,
  sinks: true,
  blockMask: true,
} as const;

/** The default: at least as accurate as the FP8 kernels of the reference implementation. */
export const INTEGER_KERNEL: KernelDescriptor = {
  name: 'qk-int8-pv-int8',
  summary: 'QK and PV in integers (the default)',
  ...COMMON,
};

/** At least as accurate as the FP16 kernels of the reference implementation. */
export const ACCURATE_KERNEL: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'K in INT8, Q in 14-bit integers, PV in float32 (accurate)',
  ...COMMON,
};

/** What FP4 tensor cores give, in float32: for trying SageAttention3 without them. Not chosen unless it is named. */
export const FP4_KERNEL: KernelDescriptor = {
  name: 'qk-fp4-pv-fp4',
  summary: 'QK and PV in FP4 (SageAttention3), computed in float32',
  qkQuantGran: [],
  pvAccumDtype: [],
  scaleSearch: SCALE_SEARCHES,
  smoothV: true,
  smoothQ: ['block', 'sequence', false],
  maxHeadDim: MAX_HEAD_DIM,
  sinks: true,
  blockMask: true,
};

/** Scratch has room for rows of so many channels of Q, dO, dQ and O at a time. */
export const MAX_BACKWARD_HEAD_DIM = 256;

/**
 * Scores from the accurate kernel's integers; the rest in float32, which is more than the 16 bits that `fp16` promises, or with the last
 * three products in integers. `fp16` over `int8`, Zen 1: 12 bits (Node 20) 1.12 to 1.18, 8 bits in two steps (Node 24) 0.96 to 1.03.
 */
export const BACKWARD: BackwardSupport = {
  kernels: [ACCURATE_KERNEL.name],
  precisions: ['fp16', 'int8'],
  maskGradient: true,
};

/** Nothing is quantized. */
export const EXACT_KERNEL: KernelDescriptor = {
  name: 'exact',
  summary: 'float32, nothing quantized (chosen for few keys, and for a row or a few over any number)',
  ...COMMON,
  qkQuantGran: [],
};

export const KERNELS: readonly KernelDescriptor[] = [INTEGER_KERNEL, ACCURATE_KERNEL, FP4_KERNEL, EXACT_KERNEL];

/** Rows that share a key up to which keys and values are used where they lie. */
const FEW_ROWS = 4;
/** Keys up to which a whole head is laid out in float32 at once; more go tile by tile. */
const MOST_KEYS_AT_ONCE = 256;
interface Crossover {
  /** Of the dot product, for `doctor`. */
  readonly inWords: string;
  /** Keys up to which quantizing costs more than integers save. */
  readonly exactKeys: number;
}

/**
 * The probe of the dot product's values picks the row. Time of the integer kernel over the exact one's, 8 heads, as many queries as keys,
 * D = 32, 64, 128. One step, Zen 4: 40 keys 1.28, 1.20, 1.22; 48 keys 1.18, 1.08, 1.07; 64 keys 0.96, 0.89, 0.82. Two steps, Zen 1 (Node 24):
 * 48 keys 1.29, 1.26, 1.25; 64 keys 1.19, 1.18, 1.17; 80 keys 1.16, 1.12, 1.07. 16 bits, Zen 4: 40 keys 1.13, 1.11, 1.15; 48 keys 1.03, 1.03,
 * 1.06; 64 keys 0.90, 0.92, 0.80; Zen 1: 32 keys 1.05, 1.01, 1.02; 40 keys 1.05, 1.00, 0.99; 48 keys 0.92, 0.89, 0.89.
 */
export const DOT_PRODUCTS: Readonly<Record<DotProduct, Crossover>> = {
  'one-step': { inWords: 'relaxed, one instruction', exactKeys: 48 },
  'two-steps': { inWords: 'relaxed, in two steps (sums of pairs saturate in 16 bits: no VNNI)', exactKeys: 64 },
  '16-bit': { inWords: '16-bit integers', exactKeys: 40 },
};

/** How the kernel that quantizes nothing takes keys and values: where they lie, a head at once, or tile by tile. */
export type ExactWay = 'in-place' | 'at-once' | 'tiles';

export function exactWayOf(problem: AttentionProblem): ExactWay {
  const { dtype, queryLength, keyLength, headDim, valueDim, queryHeads, kvHeads } = problem;
  const rows = queryLength * (queryHeads / kvHeads);
  const vectors = dtype === 'float32' && headDim % 4 === 0 && valueDim % 4 === 0;
  if (vectors && rows <= FEW_ROWS) return 'in-place';
  return keyLength <= MOST_KEYS_AT_ONCE ? 'at-once' : 'tiles';
}

/** Which calls {@link fastestKernel} gives to which kernel, in words, for `doctor`. */
export const choiceInWords = (dotProduct: DotProduct): string =>
  `${EXACT_KERNEL.name} up to ${DOT_PRODUCTS[dotProduct].exactKeys} keys or ${FEW_ROWS} rows that share a key, else ${INTEGER_KERNEL.name}`;

/** The fastest kernel for a call whose keys and values are not quantized yet. */
export function fastestKernel(problem: AttentionProblem, dotProduct: DotProduct): KernelDescriptor {
  const exact = exactWayOf(problem) === 'in-place' || problem.keyLength <= DOT_PRODUCTS[dotProduct].exactKeys;
  return exact ? EXACT_KERNEL : INTEGER_KERNEL;
}
