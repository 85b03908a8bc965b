/**
 * Prints what each CUDA target's algorithm loses on the conformance suite's ordinary cases: where their bounds come
 * from.
 */
import { createProblem, createVarlenProblem } from '../../src/attention/problem.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { attentionQuantized } from '../../src/reference/quantized.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';
import { CASES } from '../conformance/cases.ts';
import { Random, runSeed } from '../support/random.ts';
import { CUDA_TARGETS } from './targets.ts';

const seed = runSeed();
for (const { name, algorithm, relativeL1, largestV = Number.POSITIVE_INFINITY } of CUDA_TARGETS) {
  const errors: { error: number; title: string }[] = [];
  CASES.forEach((entry, i) => {
    if (entry.bound !== 'kernel' || entry.largestV > largestV || entry.work > 2 ** 24) return;
    const { q, k, v, options, cuSeqlens } = entry.make(new Random(seed + i));
    const problem =
      cuSeqlens === undefined
        ? createProblem(q, k, v, options)
        : createVarlenProblem(q, k, v, cuSeqlens.q, cuSeqlens.k, options);
    const attnMask = options.attnMask as Tensor | undefined;
    const inputs = attnMask === undefined ? { q, k, v } : { q, k, v, attnMask };
    const exact = attentionExact(problem, inputs).output;
    const emulated = attentionQuantized(problem, inputs, algorithm).output;
    let [error, magnitude] = [0, 0];
    for (let j = 0; j < exact.length; j++) {
      const [e, a] = [exact[j] as number, emulated[j] as number];
      if (!Number.isFinite(e)) continue;
      error += Math.abs(a - e);
      magnitude += Math.abs(e);
    }
    if (magnitude > 0) errors.push({ error: error / magnitude, title: `${entry.group}: ${entry.name}` });
  });
  errors.sort((a, b) => b.error - a.error);
  const shown = errors.slice(0, 3).map(({ error, title }) => `${error.toFixed(4)} (${title})`);
  const median = errors[errors.length >> 1]?.error ?? 0;
  console.log(`${name}: bound ${relativeL1}, median ${median.toFixed(4)}, worst ${shown.join(', ')}`);
}
