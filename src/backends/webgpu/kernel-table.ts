/** The kernels of this backend that a caller may name. */
import { MAX_HEAD_DIM } from '../../attention/problem.ts';
import type { KernelDescriptor } from '../backend.ts';

export const QK_INT8_PV_FP16: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'INT8 QK, FP16 PV in WGSL: subgroup matrices, dot4I8Packed with subgroups, or core WebGPU',
  qkQuantGran: ['per-block', 'per-warp', 'per-thread'],
  pvAccumDtype: ['fp32', 'fp16'],
  smoothV: true,
  smoothQ: [false],
  maxHeadDim: MAX_HEAD_DIM,
};
