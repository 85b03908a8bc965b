import { PORTABLE_ALGORITHM } from '../../src/reference/quantized.ts';
import type { BackwardTarget } from './backward-suite.ts';

/** Gradients on WebGPU, as the conformance suite knows them. */
export const WEBGPU_BACKWARD_TARGET: BackwardTarget = {
  name: 'WebGPU gradients',
  backend: 'webgpu',
  kernel: 'qk-int8-pv-fp16',
  precision: 'fp16',
  relativeL2: 0.02,
  algorithm: PORTABLE_ALGORITHM,
};
