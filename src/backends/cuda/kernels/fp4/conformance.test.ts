/**
 * The conformance suite on the FP4 kernels, in the simulator: on cards without FP4 products, and on cards with them.
 */
import { describe } from 'vitest';
import { describeConformance } from '../../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../../test/cuda/targets.ts';
import { descriptorOf, lackedBy } from '../../kernel-table.ts';
import { createSimulatedBackend, forgetMemory } from '../../testing/simulator/backend.ts';

/** Multiply-adds of a case that a second or two simulate; more with SIMULATED_WORK. */
const MAX_WORK = Number(process.env.SIMULATED_WORK ?? 2e5);
const SHARES = { byHand: 0.01, otherwise: 0.025 };

const TARGETS = CUDA_TARGETS.filter(({ kernel }) => descriptorOf(kernel).qkFormat === 'e2m1');

/** What each device is simulated with: 12.0 takes its own products, 8.0 FP16, and 8.9 FP8 for PV. */
const KERNELS = {
  80: ['qk-fp4-pv-fp4'],
  89: ['qk-fp4-pv-fp8-cuda'],
  120: ['qk-fp4-pv-fp4-cuda', 'qk-fp4-pv-fp8-cuda'],
} as const;

for (const [name, kernels] of Object.entries(KERNELS)) {
  const capability = Number(name);
  describe(`simulated sm_${capability}`, () => {
    const targets = TARGETS.filter(
      ({ kernel }) => (kernels as readonly string[]).includes(kernel) && lackedBy(kernel, capability) === undefined,
    ).map((target) => ({ ...target, maxWork: MAX_WORK, randomCases: 3 }));
    describeConformance(() => createSimulatedBackend(capability), targets, SHARES, forgetMemory);
  });
}
