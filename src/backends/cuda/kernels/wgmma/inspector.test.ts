/** Values that are not finite in the kernel of 16-bit operands: rows that see them are NaN, others are right. */
import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { place } from '../../../../../test/support/tensors.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { attentionExact } from '../../../../reference/exact.ts';
import { toFloat32 } from '../../../../tensor/access.ts';
import { chooseOptions } from '../../../choice.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';

const seed = runSeed();

test.each([
  ['float16', 64],
  ['bfloat16', 128],
] as const)(`%s, D = %i: either inspector finds them in any tile (SAGEATTENTION_SEED=${seed})`, (dtype, dim) => {
  const random = new Random(seed + dim);
  // One multiprocessor: stages are used again, by tiles with faults and without.
  const [heads, tokens] = [3, random.integer(257, 384)];
  const shape = [1, heads, tokens, dim];
  const make = () => random.normals(heads * tokens * dim);
  const values = make();
  const faulty = Array.from({ length: heads }, () => [
    random.integer(100, tokens - 1),
    random.integer(100, tokens - 1),
  ]);
  for (const [head, list] of faulty.entries()) {
    // The last head has none.
    if (head === heads - 1) continue;
    for (const token of list) {
      const at = (head * tokens + token) * dim + random.integer(0, dim - 1);
      values[at] = random.pick([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]);
    }
  }
  const [q, k, v] = [place(make(), shape, dtype), place(make(), shape, dtype), place(values, shape, dtype)];
  const problem = createProblem(q, k, v, { isCausal: true });
  const choice = chooseOptions(descriptorOf('exact'), problem, {});
  const run = simulateAttention(problem, choice, { target: 'sm_90a', multiprocessors: 1 }, { q, k, v });
  const [actual, exact] = [toFloat32(run.output), attentionExact(problem, { q, k, v }).output];
  let wrong = 0;
  for (let row = 0; row < heads * tokens; row++) {
    const [head, token] = [Math.floor(row / tokens), row % tokens];
    const sees = head < heads - 1 && (faulty[head] as number[]).some((fault) => fault <= token);
    for (let channel = 0; channel < dim; channel++) {
      const [own, expected] = [actual[row * dim + channel] as number, exact[row * dim + channel] as number];
      // A row that sees one may be NaN in every channel.
      const isWrong = sees ? Number.isFinite(own) && !Number.isFinite(expected) : !(Math.abs(own - expected) < 0.05);
      if (isWrong) wrong++;
    }
  }
  expect(wrong).toBe(0);
});
