import { FP4_PV_FP4_ALGORITHM, PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import { FP4_RELATIVE_L1 } from './fp4-target.ts';
import type { Target } from './suite.ts';

/** The WebGPU kernel with its default options, as the conformance suite knows it. */
export const WEBGPU_TARGET: Target = {
  name: 'webgpu',
  backend: 'webgpu',
  kernel: 'qk-int8-pv-fp16',
  // What the official INT8 kernel with FP16 PV loses on such inputs, and a half more.
  relativeL1: 0.02,
  algorithm: PORTABLE_ALGORITHM,
};

/** The integer kernel must be no less accurate than the official FP8 kernels. */
const FP8_ALGORITHM: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32' };

/** P in 8 bits and V in INT8, by the portable kernel's bound on ordinary inputs. */
export const WEBGPU_INT8_TARGET: Target = {
  name: 'webgpu INT8 PV',
  backend: 'webgpu',
  kernel: 'qk-int8-pv-int8',
  relativeL1: 0.02,
  algorithm: FP8_ALGORITHM,
};

/** The portable FP4 kernel. */
export const WEBGPU_FP4_TARGET: Target = {
  name: 'webgpu FP4',
  backend: 'webgpu',
  kernel: 'qk-fp4-pv-fp4',
  relativeL1: FP4_RELATIVE_L1,
  algorithm: FP4_PV_FP4_ALGORITHM,
};
