/**
 * Head dims above 256, as the attention of image autoencoders has them: V's channels are divided among workgroups, and Q
 * stays in storage where a device has little workgroup memory. Against float64.
 */
import fc from 'fast-check';
import { describe, expect, vi } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { sampled } from '../../../test/support/sample.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { createWebgpuBackendOn } from './backend.ts';
import type { Capabilities } from './capabilities.ts';
import type { Forced } from './families/choose.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();
/** Every case compiles kernels of its own, which takes a software driver many seconds; the seed differs from run to run. */
const RUNS = 1;
/** SwiftShader runs them on every device, in a quarter of the time. */
const SHARES = process.env.SAGEATTENTION_SOFTWARE_GPU === 'lavapipe' ? { byHand: 0.5, otherwise: 0.5 } : { byHand: 1 };
vi.setConfig({ testTimeout: 400_000 });

/** What INT8 QK with FP16 PV loses on normal inputs, and a half more. */
const BOUND = 0.02;

/** Devices, and what they run. */
const DEVICES: readonly (Forced & { readonly name: string; readonly capabilities?: Partial<Capabilities> })[] = [
  { name: 'with the core limits', family: 'base', capabilities: { workgroupBytes: 16384 } },
  {
    name: 'with 32 KiB of workgroup memory',
    family: 'base',
    variant: '32x32sq',
    capabilities: { workgroupBytes: 32768 },
  },
];

const CASE = fc.record({
  headDim: fc.constantFrom(264, 512, 512),
  valueDim: fc.constantFrom(40, 300, 512, 512),
  dtype: fc.constantFrom('float32', 'float16', 'bfloat16'),
  keys: fc.integer({ min: 1, max: 90 }),
  queries: fc.integer({ min: 5, max: 40 }),
  isCausal: fc.boolean(),
  smoothV: fc.boolean(),
  salt: fc.integer({ min: 0, max: 1e6 }),
} as const);

describe(`wide heads (SAGEATTENTION_SEED=${seed})`, () => {
  for (const { name, ...forced } of sampled(DEVICES, seed, SHARES)) {
    it(`are right on a device ${name}`, async () => {
      const backend = createWebgpuBackendOn(forced);
      await fc.assert(
        fc.asyncProperty(CASE, async ({ headDim, valueDim, dtype, keys, queries, isCausal, smoothV, salt }) => {
          const random = new Random(seed + salt);
          const made = (tokens: number, dim: number): Tensor =>
            fromFloat32(random.normals(2 * tokens * dim), [1, 2, tokens, dim], dtype as 'float32');
          const inputs = { q: made(queries, headDim), k: made(keys, headDim), v: made(keys, valueDim) };
          const options: AttentionOptions = { isCausal, smoothV, returnLse: true };
          const plan = await backend.createPlan(inputs, options);
          const { output, lse } = await plan.run(inputs);
          plan.dispose();
          const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), inputs);
          expect(compare(toFloat32(output as Tensor), exact.output).relativeL1).toBeLessThan(BOUND);
          for (const [i, value] of toFloat32(lse as Tensor).entries()) {
            expect(Math.abs(value - (exact.lse[i] as number))).toBeLessThan(0.07);
          }
        }),
        { seed, numRuns: RUNS, endOnFailure: true },
      );
      await backend.dispose();
    });
  }
});
