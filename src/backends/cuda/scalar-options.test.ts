/** Scalar options over their whole range, on simulated kernels of each family. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { runSeed } from '../../../test/support/random.ts';
import { sampled } from '../../../test/support/sample.ts';
import { SCALAR_EXAMPLES, scalarCalls, scalarCase, scalarFault } from '../../../test/support/scalar-options.ts';
import { place } from '../../../test/support/tensors.ts';
import { createProblem } from '../../attention/problem.ts';
import { UnsupportedOptionError } from '../../errors.ts';
import { toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { descriptorOf } from './kernel-table.ts';
import { createSimulatedBackend } from './testing/simulator/backend.ts';

const seed = runSeed();

/** A kernel of each way of computing scores, with the largest `smScale` that it takes, and the bits of Q and K. */
const KERNELS = [
  { name: 'qk-int8-pv-fp16-cuda', capability: 80, most: 2 ** 80, bits: 8 },
  { name: 'qk-int4-pv-fp8-cuda', capability: 89, most: 2 ** 80, bits: 4 },
  { name: 'exact', capability: 80, most: 2 ** 80, bits: 16 },
  { name: 'qk-int8-pv-fp8-cuda-sm90', capability: 90, most: 2 ** 30, bits: 8 },
  { name: 'qk-fp4-pv-fp4', capability: 80, most: 2 ** 80, bits: 4 },
] as const;

it.each(sampled(KERNELS, seed, { byHand: 0.4, otherwise: 0.6 }))(
  `$name on a simulated device (SAGEATTENTION_SEED=${seed})`,
  async ({ name, capability, most, bits }) => {
    const backend = createSimulatedBackend(capability);
    const kernel = descriptorOf(name);
    const run = async ({ q, k, v, options }: ReturnType<typeof scalarCase>) => {
      const problem = createProblem(q, k, v, options);
      const plan = await backend.plan(problem, chooseOptions(kernel, problem, options));
      const { output, lse } = await plan.run({ q, k, v }, {});
      plan.dispose();
      return { output: toFloat32(output as Tensor), lse: toFloat32(lse as Tensor) };
    };
    await fc.assert(
      fc.asyncProperty(scalarCalls([5]), async (call) => {
        const made = scalarCase(call, seed);
        const half = (t: Tensor) => (name === 'exact' ? place(toFloat32(t), t.shape, 'float16') : t);
        const { q, k, v, options, ...expected } = { ...made, q: half(made.q), k: half(made.k), v: half(made.v) };
        const running = run({ q, k, v, options, ...expected });
        if (Math.abs(call.smScale) > most) await expect(running).rejects.toThrow(UnsupportedOptionError);
        else expect(scalarFault(expected, await running, bits === 4 ? 0.2 : 0.02)).toBeUndefined();
      }),
      { seed, numRuns: 6, examples: SCALAR_EXAMPLES },
    );
    await backend.dispose();
  },
);
