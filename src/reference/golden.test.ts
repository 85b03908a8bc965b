import { describe, expect, it } from 'vitest';
import { goldenAccuracy } from '../../test/golden/accuracy.ts';
import { goldenAlgorithm } from '../../test/golden/algorithms.ts';
import { GOLDEN_NAMES, readGolden } from '../../test/golden/golden.ts';
import { createProblem } from '../attention/problem.ts';
import { roundToBfloat16 } from '../tensor/formats/bfloat16.ts';
import { attentionExact } from './exact.ts';
import { compare } from './metrics.ts';
import { attentionQuantized } from './quantized.ts';

/**
 * An emulated kernel may be this much worse than the official one. Code points one unit apart (ex2.approx, a reciprocal
 * in place of a division) move the error itself by chance either way; on a few hundred rows that is well under 1%.
 */
const SLACK = 1.01;

/**
 * Emulated and official outputs share their quantization error: they differ by far less than either does from the exact
 * result. What differs is a few codes of Q, K and V in ten thousand, by one unit, and bfloat16's last bit.
 */
const SHARED = 0.06;

describe.each(GOLDEN_NAMES)('the official kernels on %s', (name) => {
  const golden = readGolden(name);
  const problem = createProblem(golden.q, golden.k, golden.v, { isCausal: golden.isCausal });

  it('exact output and LSE are reproduced', () => {
    const { output, lse } = attentionExact(problem, golden);
    const outputAccuracy = compare(output, golden.float32('exact.o'));
    // The file holds float32 roundings of the exact result: relative error up to 2^-24.
    expect(outputAccuracy.relativeL1).toBeLessThan(1e-7);
    expect(outputAccuracy.maxAbsoluteError).toBeLessThan(1e-6);
    expect(compare(lse, golden.float32('exact.lse')).relativeL1).toBeLessThan(1e-7);
  });

  it.each(goldenAccuracy(name))('$kernel is emulated to its own error', ({ official, emulated, between }) => {
    expect(emulated.relativeL1).toBeLessThanOrEqual(official.relativeL1 * SLACK);
    expect(emulated.rmse).toBeLessThanOrEqual(official.rmse * SLACK);
    expect(1 - emulated.cosineSimilarity).toBeLessThanOrEqual((1 - official.cosineSimilarity) * SLACK ** 2);
    expect(between.relativeL1).toBeLessThan(Math.min(official.relativeL1, emulated.relativeL1) * SHARED);
  });
});

/** Evidence for the model of the FP8 accumulator: which width brings the emulation closest to the H200's output. */
describe.each(GOLDEN_NAMES)("the H200's FP8 accumulators on %s", (name) => {
  const golden = readGolden(name);
  const problem = createProblem(golden.q, golden.k, golden.v, { isCausal: golden.isCausal });
  const closest = (kernel: string, widths: readonly number[]) => {
    const distances = widths.map((fp8AccumulatorBits) => {
      const algorithm = { ...goldenAlgorithm(kernel, problem.headDim), fp8AccumulatorBits };
      const { output } = attentionQuantized(problem, golden, algorithm);
      return compare(output.map(roundToBfloat16), golden.float32(`out.${kernel}`)).relativeL1;
    });
    return widths[distances.indexOf(Math.min(...distances))];
  };

  it('keep 13 mantissa bits in wgmma', () => {
    expect(closest('qk_int8_pv_fp8_cuda_sm90.per_thread', [12, 13, 14, 23])).toBe(13);
  });

  it('are true float32 in mma, which does not run on the FP8 unit there', () => {
    expect(closest('qk_int8_pv_fp8_cuda.per_thread.fp32', [13, 14, 23])).toBe(23);
    // So both of mma's ways to accumulate give the same sums; with 13 bits they would differ by 1e-4 and more.
    const direct = golden.float32('out.qk_int8_pv_fp8_cuda.per_thread.fp32');
    const promoted = golden.float32('out.qk_int8_pv_fp8_cuda.per_thread.fp32+fp32');
    expect(compare(direct, promoted).relativeL1).toBeLessThan(1e-6);
  });
});
