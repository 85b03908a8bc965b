/**
 * The conformance suite on the CUDA kernels: the backend as it is, over a driver whose kernels the simulator runs. The first
 * target of each kernel gets the whole table up to a size; the others, which share its code, small cases.
 */
import { describe } from 'vitest';
import { describeConformance } from '../../../../test/conformance/vitest.ts';
import { CUDA_TARGETS } from '../../../../test/cuda/targets.ts';
import { createSimulatedBackend } from '../testing/simulator/backend.ts';

/** Multiply-adds of the largest case that is simulated; more with SIMULATED_WORK. */
const WORK = {
  first: Number(process.env.SIMULATED_WORK ?? 1e6),
  others: Number(process.env.SIMULATED_WORK ?? 2e5),
} as const;

/** Compute capabilities whose kernels differ, and the kernels that are tested there. */
const DEVICES = [
  [80, ['qk-int8-pv-fp16-cuda']],
  [89, ['qk-int8-pv-fp8-cuda', 'qk-int4-pv-fp8-cuda']],
  [90, ['qk-int8-pv-fp8-cuda', 'qk-int4-pv-fp8-cuda']],
] as const;

for (const [capability, kernels] of DEVICES) {
  describe(`simulated sm_${capability}`, () => {
    const targets = kernels.flatMap((kernel) =>
      CUDA_TARGETS.filter((target) => target.kernel === kernel).map((target, i) => ({
        ...target,
        maxWork: i === 0 ? WORK.first : WORK.others,
        randomCases: i === 0 ? 5 : 2,
      })),
    );
    describeConformance(() => createSimulatedBackend(capability), targets);
  });
}
