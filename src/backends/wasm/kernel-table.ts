/** The kernels of this backend as data. */

import { MAX_HEAD_DIM } from '../../attention/problem.ts';
import { SCALE_SEARCHES } from '../../quantization/fp4-blocks.ts';
import type { BackwardSupport, KernelDescriptor } from '../backend.ts';

const COMMON = {
  // Groups of one token: as the portable kernel's blocks, but finer.
  qkQuantGran: ['per-block'],
  pvAccumDtype: ['fp32'],
  smoothV: true,
  smoothQ: [false],
  maxHeadDim: MAX_HEAD_DIM,
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
};

/** Scratch has room for rows of so many channels of Q, dO, dQ and O at a time. */
export const MAX_BACKWARD_HEAD_DIM = 256;

/** Scores from the accurate kernel's integers, the rest in float32: more than the 16 bits that `fp16` promises. */
export const BACKWARD: BackwardSupport = {
  kernels: [ACCURATE_KERNEL.name],
  precisions: ['fp16'],
  maskGradient: true,
};
