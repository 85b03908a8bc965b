/** Which keys a row may see, and what the mask adds to their scores. */
import { bandOf } from '../attention/band.ts';
import type { AttentionProblem, Sequence } from '../attention/problem.ts';
import { decodeRun } from '../tensor/access.ts';
import type { Tensor } from '../tensor/tensor.ts';

/**
 * Fills `bias[0..keyLength)` for row `row` of query head `head`: -Infinity for keys that band or mask exclude, the additive
 * mask's value or 0 for the others.
 */
export type BiasReader = (sequence: Sequence, head: number, row: number, bias: Float32Array) => void;

/**
 * @param attnMask the mask tensor that `problem.mask` describes
 */
export function biasReader(problem: AttentionProblem, attnMask: Tensor | undefined): BiasReader {
  const { mask } = problem;
  return (sequence, head, row, bias) => {
    const { keyLength, index } = sequence;
    if (mask === undefined || attnMask === undefined) {
      bias.fill(0, 0, keyLength);
    } else {
      const [batchStride, headStride, queryStride, keyStride] = mask.strides;
      const start = mask.offset + index * batchStride + head * headStride + row * queryStride;
      decodeRun(attnMask, start, keyStride, keyLength, bias, 0);
      if (mask.kind === 'boolean') {
        for (let key = 0; key < keyLength; key++) bias[key] = bias[key] === 0 ? Number.NEGATIVE_INFINITY : 0;
      }
    }
    const { lower, upper } = bandOf(problem, sequence);
    const first = Math.min(Math.max(row + lower, 0), keyLength);
    const end = Math.min(Math.max(row + upper + 1, first), keyLength);
    bias.fill(Number.NEGATIVE_INFINITY, 0, first);
    bias.fill(Number.NEGATIVE_INFINITY, end, keyLength);
  };
}
