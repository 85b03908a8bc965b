/** What the conformance suite runs on the WASM backend. */
import { PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
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
];
