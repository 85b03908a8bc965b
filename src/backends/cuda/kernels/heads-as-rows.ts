/**
 * Decoding with grouped heads: a query of one token is a single row of a tile, and every head over one head of K would read K and
 * V anew. As rows of one query, whose token stride is the stride of heads, they share a tile, and K and V are read once. The
 * kernels see nothing of it.
 */
import { type AttentionProblem, bandOf } from '../../../attention/problem.ts';
import type { KernelChoice } from '../../backend.ts';

/** Rows with this distance share a scale of Q in per-thread quantization: fewer have one each, as when they are alone. */
const ROWS_WITH_OWN_SCALE = 8;

function largestDivisor(value: number, limit: number): number {
  let divisor = Math.min(value, limit);
  while (value % divisor !== 0) divisor--;
  return divisor;
}

/** The problem with heads of one token as rows of one query, where that changes no result; else as it is. */
export function headsAsRows(problem: AttentionProblem, { qkQuantGran, smoothQ }: KernelChoice): AttentionProblem {
  const { queryLength, keyLength, queryHeads, kvHeads, sequences, q, mask } = problem;
  const rows = kvHeads === 0 ? 1 : largestDivisor(queryHeads / kvHeads, ROWS_WITH_OWN_SCALE);
  if (queryLength !== 1 || sequences !== undefined || rows <= 1) return problem;
  // Coarser scales, and the mean that smoothing takes from Q, would be those of several heads.
  if (qkQuantGran !== 'per-thread' || smoothQ) return problem;
  // A band counts from the row.
  const { lower, upper } = bandOf(problem, queryLength, keyLength);
  if (lower > 0 || upper < keyLength - 1) return problem;
  return {
    ...problem,
    isCausal: false,
    windowSize: [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY],
    queryHeads: queryHeads / rows,
    queryLength: rows,
    q: { ...q, headStride: rows * q.headStride, tokenStride: q.headStride },
    mask:
      mask === undefined
        ? undefined
        : { ...mask, strides: [mask.strides[0], rows * mask.strides[1], mask.strides[1], mask.strides[3]] },
    // With one token both layouts are the same.
    tensorLayout: 'HND',
  };
}
