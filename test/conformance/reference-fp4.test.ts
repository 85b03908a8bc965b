/** The suite run on the oracle's own FP4: a case that it cannot pass would be no fair test of an FP4 kernel. */
import { FP4_PV_FP4_ALGORITHM } from '../../src/reference/quantized.ts';
import { referenceBackend } from '../support/reference-backend.ts';
import { FP4_RELATIVE_L1 } from './fp4-target.ts';
import { describeConformance } from './vitest.ts';

describeConformance(
  () =>
    referenceBackend(
      {
        name: 'qk-fp4-pv-fp4',
        summary: 'the algorithm in plain TypeScript',
        qkQuantGran: [],
        pvAccumDtype: [],
        smoothV: false,
        smoothQ: ['block'],
        maxHeadDim: 256,
      },
      FP4_PV_FP4_ALGORITHM,
    ),
  [
    {
      name: 'reference FP4',
      backend: 'wasm',
      kernel: 'qk-fp4-pv-fp4',
      relativeL1: FP4_RELATIVE_L1,
      algorithm: FP4_PV_FP4_ALGORITHM,
      randomCases: 8,
    },
  ],
  { byHand: 0.2, otherwise: 0.5 },
);
