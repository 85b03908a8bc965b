import { expect, test } from 'vitest';
import { TARGET_FEATURES } from '../../ptx/targets.ts';
import { configurations } from '../../testing/configurations.ts';
import { assemble, ptxasVersion } from '../../testing/ptxas.ts';

/** All with WGMMA_PTXAS=all: `npx tsx scripts/ptxas-report.ts` keeps that report. */
const kernels = configurations(process.env.WGMMA_PTXAS === 'all', 'wgmma');

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
