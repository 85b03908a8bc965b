/** Scalar options over their whole range, on every family that a software driver compiles in seconds. */
import fc from 'fast-check';
import { afterAll, describe, expect } from 'vitest';
import { runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { SCALAR_EXAMPLES, scalarCalls, scalarCase, scalarFault } from '../../../test/support/scalar-options.ts';
import { toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { createWebgpuBackendOn } from './backend.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();

describe.each(['base', 'subgroup'] as const)(`family %s (SAGEATTENTION_SEED=${seed})`, (family) => {
  const backend = createWebgpuBackendOn({ family });
  afterAll(() => backend.dispose());

  it('gives what the options say', () =>
    fc.assert(
      fc.asyncProperty(scalarCalls([5, 64]), async (call) => {
        const { q, k, v, options, ...expected } = scalarCase(call, seed);
        const plan = await backend.createPlan({ q, k, v }, options);
        const { output, lse } = await plan.run({ q, k, v });
        plan.dispose();
        const actual = { output: toFloat32(output as Tensor), lse: toFloat32(lse as Tensor) };
        expect(scalarFault(expected, actual)).toBeUndefined();
      }),
      { seed, numRuns: 12, examples: SCALAR_EXAMPLES },
    ));
});
