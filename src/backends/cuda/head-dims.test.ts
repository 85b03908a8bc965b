/** Head dims above 256, whose values are attended to in parts, on simulated kernels. */
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { sampled } from '../../../test/support/sample.ts';
import { place } from '../../../test/support/tensors.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { settleSparsity } from '../../attention/sparsity.ts';
import { UnsupportedOptionError } from '../../errors.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createSimulatedBackend } from './testing/simulator/backend.ts';

const seed = runSeed();

interface WideCase {
  readonly name: string;
  readonly capability: number;
  readonly heads: readonly [queries: number, keys: number];
  readonly lengths: readonly [queries: number, keys: number];
  readonly dims: readonly [key: number, value: number];
  readonly options?: AttentionOptions;
}

const CASES: readonly WideCase[] = [
  { name: 'a VAE: one head of 512', capability: 90, heads: [1, 1], lengths: [5, 70], dims: [512, 512] },
  {
    name: 'uneven dims: causal, grouped heads',
    capability: 80,
    heads: [4, 2],
    lengths: [3, 9],
    dims: [300, 260],
    options: { isCausal: true, causalAlignment: 'bottom-right' },
  },
  { name: 'uneven dims: wide V alone, NHD', capability: 89, heads: [2, 1], lengths: [4, 33], dims: [40, 511] },
  { name: 'uneven dims: wide K alone', capability: 89, heads: [1, 1], lengths: [4, 20], dims: [511, 40] },
  {
    name: 'smoothed V: heads as rows',
    capability: 80,
    heads: [2, 1],
    lengths: [1, 40],
    dims: [64, 320],
    options: { smoothV: true },
  },
  { name: 'splits: decoding', capability: 80, heads: [1, 1], lengths: [1, 530], dims: [272, 288] },
];

function draw(random: Random, [heads, tokens, dim]: readonly [number, number, number], isNhd: boolean): Tensor {
  const values = random.normals(heads * tokens * dim);
  return place(values, isNhd ? [1, tokens, heads, dim] : [1, heads, tokens, dim], 'bfloat16');
}

describe(`head dims above 256 (SAGEATTENTION_SEED=${seed})`, () => {
  it.each(sampled(CASES, seed, { byHand: 0.3, otherwise: 0.6 }))('$name', async (one) => {
    const { capability, heads, lengths, dims } = one;
    const isNhd = one.name.endsWith('NHD');
    const options = { ...one.options, returnLse: true, ...(isNhd && { tensorLayout: 'NHD' as const }) };
    const random = new Random(seed);
    const q = draw(random, [heads[0], lengths[0], dims[0]], isNhd);
    const k = draw(random, [heads[1], lengths[1], dims[0]], isNhd);
    const v = draw(random, [heads[1], lengths[1], dims[1]], isNhd);
    const problem = createProblem(q, k, v, options);
    const backend = createSimulatedBackend(capability);
    const kernel = await backend.defaultKernel(problem);
    expect(kernel.name).toBe('qk-int8-pv-fp16-cuda');
    const plan = await backend.plan(problem, chooseOptions(kernel, problem, options));
    const { output, lse } = await plan.run({ q, k, v }, {});
    const exact = attentionExact(problem, { q, k, v });
    const of = (view: unknown) => toFloat32(view as Tensor);
    expect(compare(of(output), exact.output).relativeL1).toBeLessThan(0.02);
    of(lse).forEach((value, i) => {
      expect(Math.abs(value - (exact.lse[i] as number))).toBeLessThan(0.05);
    });
    await backend.dispose();
  });

  it('are refused where keys and values are prepared, for gradients and for sparsity', async () => {
    const backend = createSimulatedBackend(80);
    const wide = draw(new Random(seed), [1, 4, 320], false);
    const problem = createProblem(wide, wide, wide, {});
    const choice = chooseOptions(await backend.defaultKernel(problem, { quantized: true }), problem, {});
    const preparing = backend.prepareKeyValue(problem, choice, wide, wide, {});
    await expect(preparing).rejects.toThrow(UnsupportedOptionError);
    expect(await backend.backwardSupport(problem)).toBeUndefined();
    const choosing = backend.planBlockMap(problem, settleSparsity({ topK: 0.5 }));
    await expect(choosing).rejects.toThrow(UnsupportedOptionError);
    await backend.dispose();
  });
});
