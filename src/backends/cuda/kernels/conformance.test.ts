/** The conformance suite on every CUDA kernel: the real backend and launches, kernels run by the simulator. */

import { describeConformance } from '../../../../test/conformance/vitest.ts';
import { TILINGS } from '../../../quantization/schemes.ts';
import { PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../../reference/quantized.ts';
import { createSimulatedBackend } from '../testing/simulator/backend.ts';

const ALGORITHM: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, granularity: 'per-thread', tiling: TILINGS.sm80 };
/** Multiply-adds of a case that a second or two simulates. */
const MAX_WORK = 3e6;

describeConformance(
  () => createSimulatedBackend(80),
  [
    {
      name: 'cuda sm_80: INT8, FP16',
      backend: 'cuda',
      kernel: 'qk-int8-pv-fp16-cuda',
      relativeL1: 0.016,
      algorithm: ALGORITHM,
      largestV: 65504,
      maxWork: MAX_WORK,
      randomCases: 10,
    },
  ],
);
