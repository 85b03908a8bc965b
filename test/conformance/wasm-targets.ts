/** What the conformance suite runs on the WASM backend. */
import type { Simd } from '../../src/backends/wasm/geometry.ts';
import { FP4_PV_FP4_ALGORITHM, PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import type { BackwardTarget } from './backward-suite.ts';
import { FP4_RELATIVE_L1 } from './fp4-target.ts';
import type { Target } from './suite.ts';

/** The integer kernel must be no less accurate than the official FP8 kernels. */
const FP8_ALGORITHM: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32' };

export const WASM_TARGETS: readonly Target[] = [
  { name: 'integer PV', backend: 'wasm', kernel: 'qk-int8-pv-int8', relativeL1: 0.05, algorithm: FP8_ALGORITHM },
  { name: 'float32 PV', backend: 'wasm', kernel: 'qk-int8-pv-fp16', relativeL1: 0.02, algorithm: PORTABLE_ALGORITHM },
  {
    name: 'integer PV, V smoothed',
    backend: 'wasm',
    kernel: 'qk-int8-pv-int8',
    options: { smoothV: true },
    relativeL1: 0.05,
    algorithm: FP8_ALGORITHM,
    randomCases: 10,
  },
  {
    name: 'FP4',
    backend: 'wasm',
    kernel: 'qk-fp4-pv-fp4',
    relativeL1: FP4_RELATIVE_L1,
    algorithm: FP4_PV_FP4_ALGORITHM,
    randomCases: 15,
  },
  // Beside a mask entry of -65504 on every key of a row, float32 knows a score to 1/256.
  { name: 'exact', backend: 'wasm', kernel: 'exact', relativeL1: 1e-3, algorithm: PORTABLE_ALGORITHM },
];

const FLOAT_GRADIENTS: BackwardTarget = {
  name: 'float32 gradients',
  backend: 'wasm',
  kernel: 'qk-int8-pv-fp16',
  precision: 'fp16',
  relativeL2: 0.02,
  algorithm: PORTABLE_ALGORITHM,
};

/**
 * Integers of 12 bits lose no more than float32. With 8 the worst seen is 0.080, in a row under a softcap, where K is not smoothed, of two
 * hundred; other ordinary inputs stay below 0.051.
 */
export const WASM_BACKWARD_TARGETS: Readonly<Record<Simd, readonly BackwardTarget[]>> = {
  simd128: [FLOAT_GRADIENTS, { ...FLOAT_GRADIENTS, name: '12-bit gradients', precision: 'int8', randomCases: 10 }],
  relaxed: [
    FLOAT_GRADIENTS,
    { ...FLOAT_GRADIENTS, name: '8-bit gradients', precision: 'int8', relativeL2: 0.16, randomCases: 10 },
  ],
};
