/** Rows whose softmax is made anew: the property of the conformance suite, on the kernels of both families in the simulator. */
import { beforeAll, describe, test } from 'vitest';
import { backwardTests } from '../../../../../test/conformance/backward-suite.ts';
import { backwardTargets } from '../../../../../test/cuda/backward-checks.ts';
import { runSeed } from '../../../../../test/support/random.ts';
import { setBackend } from '../../../registry.ts';
import { createSimulatedBackend } from '../../testing/simulator/backend.ts';

const seed = runSeed();

describe.each([80, 90])(`softmax again, simulated sm_%i (SAGEATTENTION_SEED=${seed})`, (capability) => {
  beforeAll(() => setBackend(createSimulatedBackend(capability)));
  for (const target of backwardTargets(capability).slice(0, 1)) {
    const tests = backwardTests({ ...target, randomCases: 3 }, seed);
    for (const { name, run } of tests.filter(({ name }) => name.startsWith('rows whose logsumexp'))) test(name, run);
  }
});
