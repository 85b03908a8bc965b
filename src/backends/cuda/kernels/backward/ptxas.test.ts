/** ptxas accepts the gradient kernels for every target, and those whose speed counts do not spill. */
import { describe, expect, test } from 'vitest';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { gradientConfigurations } from '../../testing/configurations.ts';
import { ASSEMBLED_SHARES, assemble, ptxasVersion } from '../../testing/ptxas.ts';

const kernels = sampled(gradientConfigurations(false), runSeed(), ASSEMBLED_SHARES);

describe.skipIf(ptxasVersion() === undefined)('ptxas takes the backward pass', () => {
  test.each(kernels)('$name', ({ family, kernel, mayDraw = /^$/, spillLimit }) => {
    const made = kernel();
    const { registers, spillStoreBytes, remarks } = assemble(made);
    expect(spillStoreBytes).toBeLessThanOrEqual(spillLimit);
    if (family === 'wgmma') expect(remarks.filter((remark) => !mayDraw.test(remark))).toEqual([]);
    expect(registers * made.threads * made.minBlocksPerMultiprocessor).toBeLessThanOrEqual(65536);
  });
});
