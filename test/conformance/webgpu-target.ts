import { PORTABLE_ALGORITHM } from '../../src/reference/quantized.ts';
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
