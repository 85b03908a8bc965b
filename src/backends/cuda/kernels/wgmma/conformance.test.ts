/** The conformance suite on the Hopper kernels: the real backend and launches, kernels run by the simulator. */
import { describeConformance } from '../../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../../test/cuda/targets.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { SIMULATED_SHARES } from '../../testing/conformance.ts';
import { createSimulatedBackend, forgetMemory } from '../../testing/simulator/backend.ts';

/** Multiply-adds of a case that a second simulates; more with SIMULATED_WORK. */
const MAX_WORK = Number(process.env.SIMULATED_WORK ?? 1e6);

describeConformance(
  () => createSimulatedBackend(90),
  CUDA_TARGETS.filter(({ kernel }) => descriptorOf(kernel).family === 'wgmma').map((target) => ({
    ...target,
    maxWork: MAX_WORK,
    randomCases: 3,
  })),
  SIMULATED_SHARES,
  forgetMemory,
);
