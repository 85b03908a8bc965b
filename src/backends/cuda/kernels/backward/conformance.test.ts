/** The conformance suite of gradients: the real backend and launches, kernels run by the simulator. */
import { beforeAll, describe, it } from 'vitest';
import { backwardTargets, conformanceOf } from '../../../../../test/cuda/backward-checks.ts';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { setBackend } from '../../../registry.ts';
import { createSimulatedBackend } from '../../testing/simulator/backend.ts';

/** Multiply-adds of the largest case that is simulated; more with SIMULATED_WORK. */
const MAX_WORK = Number(process.env.SIMULATED_WORK ?? 2e5);

const seed = runSeed();

// Nine of ten cases are head dims and options that run on mma.sync on every device.
for (const [capability, shares] of [
  [80, { byHand: 0.05, otherwise: 0.25 }],
  [90, { byHand: 0.03, otherwise: 0.1 }],
] as const) {
  describe(`gradients, simulated sm_${capability} (SAGEATTENTION_SEED=${seed})`, () => {
    beforeAll(() => setBackend(createSimulatedBackend(capability)));
    for (const target of backwardTargets(capability)) {
      const tests = conformanceOf({ ...target, maxWork: MAX_WORK, randomCases: 2 }, seed);
      for (const { name, run } of sampled(tests, seed, shares, `${capability}`)) it(`${target.name}: ${name}`, run);
    }
  });
}
