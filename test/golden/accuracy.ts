/** The official kernels' outputs and the reference's emulation of them, each compared with exact attention. */
import { createProblem } from '../../src/attention/problem.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { type Accuracy, compare } from '../../src/reference/metrics.ts';
import { attentionQuantized } from '../../src/reference/quantized.ts';
import { roundToBfloat16 } from '../../src/tensor/formats/bfloat16.ts';
import { goldenAlgorithm } from './algorithms.ts';
import { type GoldenName, readGolden } from './golden.ts';

export interface KernelAccuracy {
  /** The `out.*` entry without its prefix. */
  readonly kernel: string;
  /** The official output against the exact one. */
  readonly official: Accuracy;
  /** The emulated output, rounded to bfloat16 as the official one is, against the exact one. */
  readonly emulated: Accuracy;
  /** The emulated output against the official one. */
  readonly between: Accuracy;
}

/** Accuracy of every official kernel on one golden file. */
export function goldenAccuracy(name: GoldenName): KernelAccuracy[] {
  const golden = readGolden(name);
  const problem = createProblem(golden.q, golden.k, golden.v, { isCausal: golden.isCausal });
  const exact = attentionExact(problem, golden).output;
  return golden.outputs.map((kernel) => {
    const official = golden.float32(`out.${kernel}`);
    const emulated = attentionQuantized(problem, golden, goldenAlgorithm(kernel, problem.headDim)).output;
    const rounded = emulated.map(roundToBfloat16);
    return {
      kernel,
      official: compare(official, exact),
      emulated: compare(rounded, exact),
      between: compare(rounded, official),
    };
  });
}
