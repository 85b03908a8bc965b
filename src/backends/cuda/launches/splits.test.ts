/** Splits by the length of each sequence, where sequences are of unequal lengths. Kernels run in the simulator. */
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { createVarlenProblem } from '../../../attention/problem.ts';
import { attentionExact } from '../../../reference/exact.ts';
import { compare } from '../../../reference/metrics.ts';
import { toFloat32 } from '../../../tensor/access.ts';
import { type Tensor, tensor } from '../../../tensor/tensor.ts';
import { chooseOptions } from '../../choice.ts';
import { descriptorOf } from '../kernel-table.ts';
import { simulateAttention } from '../testing/simulator/run.ts';
import { planLaunches } from './plan.ts';

const seed = runSeed();

function starts(lengths: readonly number[]): number[] {
  const ends = [0];
  for (const length of lengths) ends.push((ends.at(-1) as number) + length);
  return ends;
}

describe(`packed sequences of unequal lengths (SAGEATTENTION_SEED=${seed})`, () => {
  it.each([
    ['qk-int8-pv-fp16-cuda', 40, 0, 0.02],
    // Nobody has written the range of values that are not there, and nothing comes of reading it.
    ['qk-int8-pv-fp8-cuda', 3, 1, 0.08],
  ] as const)('%s on %i multiprocessors, one row for each', (kernel, multiprocessors, shortest, bound) => {
    const random = new Random(seed);
    const [dim, heads] = [32, random.pick([1, 2])];
    // One is much longer than the others.
    const lengths = Array.from({ length: random.integer(3, 6) }, () => random.integer(1, 200));
    lengths[random.integer(0, lengths.length - 1)] = random.integer(700, 1500);
    lengths.push(shortest);
    const [rows, keys] = [starts(lengths.map(() => 1)), starts(lengths)];
    const make = (length: number): Tensor => tensor(random.normals(length * heads * dim), [length, heads, dim]);
    const given = { q: make(lengths.length), k: make(keys.at(-1) as number), v: make(keys.at(-1) as number) };
    const options = { returnLse: true, ...random.pick([{}, { windowSize: [400, 0] as const }]) };
    const problem = createVarlenProblem(given.q, given.k, given.v, rows, keys, {
      ...options,
      causalAlignment: 'bottom-right',
    });
    const choice = chooseOptions(descriptorOf(kernel), problem, {});
    const device = { target: 'sm_89' as const, multiprocessors };
    const plan = planLaunches(problem, choice, device);
    const launch = plan.launches.at(-1);
    expect(launch?.name).toBe('attention');
    // A CTA for each slot of each head: more than there are sequences.
    expect(launch?.grid[0]).toBeGreaterThan(heads * lengths.length);
    const { output, lse } = simulateAttention(problem, choice, device, given, plan);
    const exact = attentionExact(problem, given);
    expect(compare(toFloat32(output), exact.output).relativeL1).toBeLessThan(bound);
    toFloat32(lse as Tensor).forEach((own, i) => {
      const expected = exact.lse[i] as number;
      if (Number.isFinite(expected)) expect(Math.abs(own - expected)).toBeLessThan(0.07);
      else expect(own).toBe(expected);
    });
  });
});
