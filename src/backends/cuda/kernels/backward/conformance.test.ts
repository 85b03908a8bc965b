/** The conformance suite of gradients: the real backend and launches, kernels run by the simulator. */
import { beforeAll, describe, it } from 'vitest';
import { type BackwardTarget, backwardTests } from '../../../../../test/conformance/backward-suite.ts';
import { backwardTargets } from '../../../../../test/cuda/backward-checks.ts';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { setBackend } from '../../../registry.ts';
import { createSimulatedBackend } from '../../testing/simulator/backend.ts';

/** Multiply-adds of the largest case that is simulated; more with SIMULATED_WORK. */
const MAX_WORK = Number(process.env.SIMULATED_WORK ?? 2e5);

const seed = runSeed();

const FEW = { byHand: 0.005, otherwise: 0.02 };
// Nine of ten cases are head dims and options that run on mma.sync on every device; codes do on each.
for (const [capability, precisions, shares] of [
  [80, ['fp16'], { byHand: 0.03, otherwise: 0.12 }],
  [80, ['int8'], FEW],
  [89, ['fp8'], FEW],
  [90, ['fp16'], { byHand: 0.02, otherwise: 0.06 }],
  [90, ['int8', 'fp8'], { byHand: 0.002, otherwise: 0.005 }],
] as const) {
  describe(`gradients in ${precisions.join(' and ')}, simulated sm_${capability} (SAGEATTENTION_SEED=${seed})`, () => {
    beforeAll(() => setBackend(createSimulatedBackend(capability)));
    const isHere = ({ precision }: BackwardTarget) => (precisions as readonly string[]).includes(precision);
    for (const target of backwardTargets(capability).filter(isHere)) {
      const tests = backwardTests({ ...target, maxWork: MAX_WORK, randomCases: 2 }, seed);
      for (const { name, run } of sampled(tests, seed, shares, `${capability} ${precisions}`))
        it(`${target.name}: ${name}`, run);
    }
  });
}
