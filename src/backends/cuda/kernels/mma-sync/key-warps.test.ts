/** Warps of a CTA that take different keys: the same rows from any number of them, with splits over CTAs and without. */
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { attentionExact } from '../../../../reference/exact.ts';
import { compare } from '../../../../reference/metrics.ts';
import { toFloat32 } from '../../../../tensor/access.ts';
import { type Tensor, tensor } from '../../../../tensor/tensor.ts';
import { chooseOptions } from '../../../choice.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { planLaunches } from '../../launches/plan.ts';
import type { Target } from '../../ptx/targets.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';

const seed = runSeed();

describe(`warps with keys of their own (SAGEATTENTION_SEED=${seed})`, () => {
  it.each([
    ['qk-int8-pv-fp16-cuda', 'sm_80', 5, 2, 2, 1, 64, 0.02],
    ['qk-int8-pv-fp16-cuda', 'sm_80', 3, 1, 2, 6, 64, 0.02],
    ['qk-int8-pv-fp8-cuda', 'sm_89', 4, 2, 2, 6, 64, 0.08],
    ['qk-int8-pv-fp8-cuda', 'sm_90a', 2, 2, 1, 1, 128, 0.08],
    ['qk-int8-pv-fp8-cuda', 'sm_90a', 3, 1, 1, 1, 64, 0.08],
    ['qk-fp4-pv-fp4', 'sm_90a', 5, 1, 1, 6, 64, 0.3],
  ] as const)('%s, %s, %i warps with %i and %i stages of K and V, %i multiprocessors, D %i', (...row) => {
    const [kernel, target, keyWarps, keyStages, valueStages, multiprocessors, dim, bound] = row;
    const random = new Random(seed);
    const [heads, keys] = [8, 300 + Math.floor(random.uniform() * 400)];
    const make = (count: number, length: number): Tensor =>
      tensor(random.normals(count * length * dim), [1, count, length, dim]);
    const given = { q: make(heads, 1), k: make(2, keys), v: make(2, keys) };
    const problem = createProblem(given.q, given.k, given.v, { returnLse: true });
    const choice = chooseOptions(descriptorOf(kernel), problem, {});
    const device = { target: target as Target, multiprocessors };
    const overrides = { keyWarps, keyStages, valueStages, minBlocksPerMultiprocessor: 1 };
    const plan = planLaunches(problem, choice, device, { overrides });
    const launch = plan.launches.find(({ name }) => name === 'attention');
    expect(launch?.block[0]).toBe(32 * keyWarps);
    expect(plan.launches.some(({ name }) => name === 'combine splits')).toBe(false);
    const { output, lse } = simulateAttention(problem, choice, device, given, plan);
    const exact = attentionExact(problem, given);
    expect(compare(toFloat32(output), exact.output).relativeL1).toBeLessThan(bound);
    expect(compare(toFloat32(lse as Tensor), exact.lse as Float64Array).relativeL1).toBeLessThan(0.02);
  });
});
