/** Scalar options over their whole range, on every kernel. */
import fc from 'fast-check';
import { afterAll, expect, it } from 'vitest';
import { runSeed } from '../../../test/support/random.ts';
import { SCALAR_EXAMPLES, scalarCalls, scalarCase, scalarFault } from '../../../test/support/scalar-options.ts';
import { createProblem } from '../../attention/problem.ts';
import { toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn } from './backend.ts';

const seed = runSeed();
const backend = createWasmBackendOn({ simd: 'simd128', threads: 1 });
afterAll(() => backend.dispose());

it.each(backend.kernels)('$name', { timeout: 60_000 }, async (kernel) => {
  console.info(`seed ${seed}`);
  await fc.assert(
    fc.asyncProperty(scalarCalls([5, 24, 64]), async (call) => {
      const { q, k, v, options, ...expected } = scalarCase(call, seed);
      const problem = createProblem(q, k, v, options);
      const plan = await backend.plan(problem, chooseOptions(kernel, problem, options));
      const { output, lse } = await plan.run({ q, k, v }, {});
      plan.dispose?.();
      const actual = { output: toFloat32(output as Tensor), lse: toFloat32(lse as Tensor) };
      expect(scalarFault(expected, actual, kernel.name.includes('fp4') ? 0.2 : 0.02)).toBeUndefined();
    }),
    { seed, numRuns: 150, examples: SCALAR_EXAMPLES },
  );
});
