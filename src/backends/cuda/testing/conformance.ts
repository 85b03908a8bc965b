/**
 * The conformance suite on the CUDA kernels: the backend as it is, over a driver whose kernels the simulator runs. The first
 * target of each kernel gets the whole table up to a size; the others, which share its code, small cases.
 */
import { describe } from 'vitest';
import { describeConformance } from '../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../test/cuda/targets.ts';
import type { KernelName } from '../../../index.ts';
import { createSimulatedBackend } from './simulator/backend.ts';

/** Multiply-adds of the largest case that is simulated; more with SIMULATED_WORK. */
const WORK = {
  first: Number(process.env.SIMULATED_WORK ?? 1e6),
  others: Number(process.env.SIMULATED_WORK ?? 2e5),
} as const;

/** Share of a target's tests that `npm test` by hand simulates; see test/support/sample.ts. */
export const SIMULATED_SHARE = 0.1;

/** One capability's kernels; each capability has a file of its own, since files are what runs in parallel. */
export function describeSimulated(capability: number, kernels: readonly KernelName[]): void {
  describe(`simulated sm_${capability}`, () => {
    const targets = kernels.flatMap((kernel) =>
      CUDA_TARGETS.filter((target) => target.kernel === kernel).map((target, i) => ({
        ...target,
        maxWork: i === 0 ? WORK.first : WORK.others,
        randomCases: i === 0 ? 5 : 2,
      })),
    );
    describeConformance(() => createSimulatedBackend(capability), targets, SIMULATED_SHARE);
  });
}
