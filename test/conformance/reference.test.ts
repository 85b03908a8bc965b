/**
 * The suite run on the oracle's own quantized algorithm: a case that it cannot pass would be no fair test of a kernel.
 */
import type { KernelDescriptor } from '../../src/backends/backend.ts';
import { PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import { FLOAT16_MAX } from '../../src/tensor/formats/float16.ts';
import { referenceBackend } from '../support/reference-backend.ts';
import { describeConformance } from './vitest.ts';

const ALGORITHM: QuantizedAlgorithm = PORTABLE_ALGORITHM;
const DESCRIPTOR: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'the algorithm in plain TypeScript',
  qkQuantGran: ['per-block'],
  pvAccumDtype: ['fp32'],
  smoothV: false,
  smoothQ: [false],
  maxHeadDim: 256,
  sinks: true,
  blockMask: true,
};

describeConformance(
  () => referenceBackend(DESCRIPTOR, ALGORITHM),
  [
    {
      name: 'reference',
      backend: 'wasm',
      kernel: 'qk-int8-pv-fp16',
      relativeL1: 0.025,
      algorithm: ALGORITHM,
      largestV: FLOAT16_MAX,
      randomCases: 20,
    },
  ],
  { byHand: 0.3 },
);
