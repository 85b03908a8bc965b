import { afterAll, beforeAll, beforeEach, describe, it } from 'vitest';
import type { Backend } from '../../src/backends/backend.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { runSeed } from '../support/random.ts';
import { type Shares, sampled } from '../support/sample.ts';
import { conformanceTests, type Target } from './suite.ts';

/**
 * Runs the conformance suite for targets of one backend instance.
 *
 * @param shares of each target's tests in a sample (`test/support/sample.ts`); all where they are quick
 * @param forget what is done before each test, so that none finds in memory what another left there
 */
export function describeConformance<B extends Backend>(
  create: () => B | Promise<B>,
  targets: readonly Target[],
  shares: Shares = { byHand: 1 },
  forget?: (backend: B) => Promise<void>,
): void {
  const seed = runSeed();
  let backend: B | undefined;
  beforeAll(async () => {
    backend = await create();
    await setBackend(backend);
  });
  afterAll(() => backend?.dispose());
  if (forget !== undefined) beforeEach(() => forget(backend as B));
  for (const target of targets) {
    describe(`${target.name} (SAGEATTENTION_SEED=${seed})`, () => {
      for (const test of sampled(conformanceTests(target, seed), seed, shares, target.name)) {
        it(test.name, test.run);
      }
    });
  }
}
