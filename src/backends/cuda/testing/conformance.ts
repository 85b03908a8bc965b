/**
 * The conformance suite on the CUDA kernels: the backend as it is, over a driver whose kernels the simulator runs. The
 * first target of each kernel gets the whole table up to a size; the others, which share its code, small cases.
 */
import { describe } from 'vitest';
import { describeConformance } from '../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../test/cuda/targets.ts';
import { CUDA_KERNELS, type CudaKernelDescriptor, descriptorOf } from '../kernel-table.ts';
import { createSimulatedBackend, forgetMemory } from './simulator/backend.ts';

/** Multiply-adds of the largest case that is simulated; more with SIMULATED_WORK. */
const WORK = {
  first: Number(process.env.SIMULATED_WORK ?? 1e6),
  others: Number(process.env.SIMULATED_WORK ?? 2e5),
} as const;

/** Shares of a target's tests that are simulated (`test/support/sample.ts`); on a card `test/cuda` runs all. */
export const SIMULATED_SHARES = { byHand: 0.03, otherwise: 0.06 };

/**
 * The kernels of the table that start at a capability, on a device of it or a later one. Each capability has a file of
 * its own, since files are what runs in parallel; so has wgmma, whose cases are others. The portable kernel is another
 * with coarser scales.
 *
 * @param from the lowest capability of the kernels
 */
export function describeSimulated(capability: number, from = capability): void {
  const kernels = CUDA_KERNELS.filter(
    ({ family, computeCapability, qkQuantGran }) =>
      // The FP4 kernels are simulated otherwise, and slower: `kernels/fp4/conformance.test.ts`.
      family !== 'wgmma' && computeCapability[0] === from && qkQuantGran.includes('per-thread'),
  );
  describe(`simulated sm_${capability}`, () => {
    const targets = kernels.flatMap(({ name }) =>
      CUDA_TARGETS.filter(({ kernel }) => kernel === name).map((target, i) => ({
        ...target,
        maxWork: i === 0 ? WORK.first : WORK.others,
        randomCases: i === 0 ? 5 : 2,
      })),
    );
    describeConformance(() => createSimulatedBackend(capability), targets, SIMULATED_SHARES, forgetMemory);
  });
}

/** The kernels of the table that `has` names, each with all its targets, on a device of a capability. */
export function describeKernels(capability: number, has: (kernel: CudaKernelDescriptor) => boolean): void {
  describeConformance(
    () => createSimulatedBackend(capability),
    CUDA_TARGETS.filter(({ kernel }) => has(descriptorOf(kernel))).map((target) => ({
      ...target,
      maxWork: WORK.first,
      randomCases: 3,
    })),
    SIMULATED_SHARES,
    forgetMemory,
  );
}
