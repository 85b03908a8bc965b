/** The kernel of 16-bit operands on Hopper: the conformance suite, on wgmma where its copies take the operands as they lie. */
import { describeConformance } from '../../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../../test/cuda/targets.ts';
import { SIMULATED_SHARES } from '../../testing/conformance.ts';
import { createSimulatedBackend, forgetMemory } from '../../testing/simulator/backend.ts';

/** Multiply-adds of a case that a second simulates; more with SIMULATED_WORK. */
const MAX_WORK = Number(process.env.SIMULATED_WORK ?? 1e6);

describeConformance(
  () => createSimulatedBackend(90),
  CUDA_TARGETS.filter(({ kernel }) => kernel === 'exact').map((target) => ({
    ...target,
    maxWork: MAX_WORK,
    randomCases: 3,
  })),
  SIMULATED_SHARES,
  forgetMemory,
);
