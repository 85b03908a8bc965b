/** The kernels of this backend that a caller may name. */
import type { KernelName } from '../../attention/kernels.ts';
import { SCALE_SEARCHES } from '../../quantization/fp4-blocks.ts';
import type { KernelChoice, KernelDescriptor } from '../backend.ts';

/** Largest D and Dv of kernels, the matrix family's and gradients'. */
export const MAX_HEAD_DIM = 256;

/** The same of attention in tiles: one head of 512 channels is that of image autoencoders. */
export const MAX_TILED_HEAD_DIM = 512;

export const QK_INT8_PV_FP16: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'INT8 QK, FP16 PV in WGSL: subgroup matrices, dot4I8Packed with subgroups, or core WebGPU',
  qkQuantGran: ['per-block', 'per-warp', 'per-thread'],
  pvAccumDtype: ['fp32', 'fp16'],
  smoothV: true,
  smoothQ: [false],
  maxHeadDim: MAX_TILED_HEAD_DIM,
  sinks: true,
  blockMask: true,
};

/** Both products in integers, for GPUs whose `dot4I8Packed` is several times faster than float32. Not chosen unless it is named. */
export const QK_INT8_PV_INT8: KernelDescriptor = {
  ...QK_INT8_PV_FP16,
  name: 'qk-int8-pv-int8',
  summary: 'INT8 QK, P in 8 bits and V in INT8 in WGSL: dot4I8Packed and dot4U8Packed',
  pvAccumDtype: [],
  maxHeadDim: MAX_HEAD_DIM,
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

export const KERNELS: readonly KernelDescriptor[] = [QK_INT8_PV_FP16, QK_INT8_PV_INT8, QK_FP4_PV_FP4];

/** What a kernel's V is multiplied in. */
export type ValueFormat = 'fp16' | 'int8' | 'fp4';

const VALUE_FORMATS: Partial<Record<KernelName, ValueFormat>> = {
  [QK_INT8_PV_INT8.name]: 'int8',
  [QK_FP4_PV_FP4.name]: 'fp4',
};

export const valueFormatOf = (kernel: KernelName): ValueFormat => VALUE_FORMATS[kernel] ?? 'fp16';

export const isFp4 = ({ descriptor }: Pick<KernelChoice, 'descriptor'>): boolean =>
  valueFormatOf(descriptor.name) === 'fp4';
