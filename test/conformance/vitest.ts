import { afterAll, beforeAll, describe, it } from 'vitest';
import type { Backend } from '../../src/backends/backend.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { runSeed } from '../support/random.ts';
import { sampled } from '../support/sample.ts';
import { conformanceTests, type Target } from './suite.ts';

/**
 * Runs the conformance suite for targets of one backend instance.
 *
 * @param share of each target's tests in a sample (`test/support/sample.ts`); 1 where they are quick
 * @param options `always`: never more than a sample, unless SAGEATTENTION_TESTS=all
 */
export function describeConformance(
  create: () => Backend | Promise<Backend>,
  targets: readonly Target[],
  share = 1,
  { always = false }: { readonly always?: boolean } = {},
): void {
  const seed = runSeed();
  let backend: Backend | undefined;
  beforeAll(async () => {
    backend = await create();
    await setBackend(backend);
  });
  afterAll(() => backend?.dispose());
  for (const target of targets) {
    describe(`${target.name} (SAGEATTENTION_SEED=${seed})`, () => {
      for (const test of sampled(conformanceTests(target, seed), seed, share, target.name, always)) {
        it(test.name, test.run);
      }
    });
  }
}
