/** The kernels of this backend that a caller may name. */
import { SCALE_SEARCHES } from '../../quantization/fp4-blocks.ts';
import type { KernelChoice, KernelDescriptor } from '../backend.ts';

/** Largest D and Dv of these kernels. */
export const MAX_HEAD_DIM = 256;

export const QK_INT8_PV_FP16: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'INT8 QK, FP16 PV in WGSL: subgroup matrices, dot4I8Packed with subgroups, or core WebGPU',
  qkQuantGran: ['per-block', 'per-warp', 'per-thread'],
  pvAccumDtype: ['fp32', 'fp16'],
  smoothV: true,
  smoothQ: [false],
  maxHeadDim: MAX_HEAD_DIM,
  sinks: true,
  blockMask: true,
};

/** What FP4 tensor cores give: for trying SageAttention3 without them, and for caches of 4 bits. Not chosen unless it is named. */
export const QK_FP4_PV_FP4: KernelDescriptor = {
  name: 'qk-fp4-pv-fp4',
  summary: 'QK and PV in FP4 (SageAttention3): exact sums of the blocks in integers, PV of float16 codes',
  qkQuantGran: [],
  pvAccumDtype: [],
  scaleSearch: SCALE_SEARCHES,
  smoothV: true,
  smoothQ: ['block', 'sequence', false],
  maxHeadDim: MAX_HEAD_DIM,
  sinks: true,
  blockMask: true,
};

export const KERNELS: readonly KernelDescriptor[] = [QK_INT8_PV_FP16, QK_FP4_PV_FP4];

export const isFp4 = ({ descriptor }: Pick<KernelChoice, 'descriptor'>): boolean =>
  descriptor.name === QK_FP4_PV_FP4.name;
