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

/**
 * Gradients in INT8. WASM's bound on 8-bit gradients is 0.16, with operands of 7 bits beside P and dS; here those have 8, so that they lose
 * half as much.
 */
export const WEBGPU_INT8_BACKWARD_TARGET: BackwardTarget = {
  ...WEBGPU_BACKWARD_TARGET,
  name: 'WebGPU 8-bit gradients',
  precision: 'int8',
  relativeL2: 0.08,
};

/** Layouts, odd channels, groups, bands, masks, a cap, packed sequences, softmax anew, and what is not a number. */
export const WEBGPU_BACKWARD_KINDS = [
  'dtype and layout: float16 NHD',
  'Dv 61',
  'GQA 8',
  'causal: bottom-right 200 over 70',
  'window: [33,20] 140 over 140 causal bottom-right',
  'mask: bool [1,H,Lq,1]',
  'causal, window and softcap together',
  "mask: float32's least number on every key of every third row",
  'varlen: different',
  'empty: no keys',
  'not a number: in one',
  'not a number: in a value',
  'a NaN in dO',
  'calls: again',
  'additive mask: [Lq,Lk], softcap',
  'additive mask: [b,1,1,Lk]',
  'additive mask: [b,h,Lq,Lk], packed',
  'additive mask: [1,1]',
  'additive mask: [Lq,Lk], all hidden',
  'additive mask: [b,1,Lq,1], no keys',
  'additive mask: [b,h,Lq,Lk], a NaN in V',
];
