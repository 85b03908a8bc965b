/** The FP4 kernels are accepted by ptxas, do not spill, and fit on a multiprocessor as often as they say. */
import { describe, expect, test } from 'vitest';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { configurations } from '../../testing/configurations.ts';
import { ASSEMBLED_SHARES, assemble, ptxasVersion } from '../../testing/ptxas.ts';

const kernels = configurations(false, 'mma-sync').filter(({ name }) => name.includes('fp4') && / D128 /.test(name));

describe.skipIf(ptxasVersion() === undefined)('ptxas', () => {
  test.each(sampled(kernels, runSeed(), ASSEMBLED_SHARES))('$name', ({ kernel }) => {
    const made = kernel();
    const { registers, spillStoreBytes } = assemble(made);
    expect(spillStoreBytes).toBe(0);
    expect(registers * made.threads * made.minBlocksPerMultiprocessor).toBeLessThanOrEqual(65536);
    if (made.name === 'attention' && made.target === 'sm_120f') expect(made.minBlocksPerMultiprocessor).toBe(2);
  });
});
