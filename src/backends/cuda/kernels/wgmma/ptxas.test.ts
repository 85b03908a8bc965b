import { expect, test } from 'vitest';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { TARGET_FEATURES } from '../../ptx/targets.ts';
import { configurations } from '../../testing/configurations.ts';
import { ASSEMBLED_SHARES, assemble, ptxasVersion } from '../../testing/ptxas.ts';

/** All with WGMMA_PTXAS=all: `npx tsx scripts/ptxas-report.ts` keeps that report. */
const all = process.env.WGMMA_PTXAS === 'all';
const kernels = sampled(configurations(all, 'wgmma'), runSeed(), all ? { byHand: 1 } : ASSEMBLED_SHARES);

test.skipIf(ptxasVersion() === undefined).each(kernels)(
  '$name: no spills, products in the background, registers moved',
  ({ kernel, spillLimit }) => {
    const made = kernel();
    expect(made.sharedBytes).toBeLessThanOrEqual(TARGET_FEATURES.sm_90a.sharedBytesPerBlock);
    const report = assemble(made);
    expect(report.remarks).toEqual([]);
    // A limit other than 0 is a debt, named in `configurations.ts`.
    expect(report.spillStoreBytes).toBeLessThanOrEqual(spillLimit);
    if (spillLimit === 0) expect(report).toMatchObject({ spillStoreBytes: 0, spillLoadBytes: 0, stackBytes: 0 });
  },
  60_000,
);
