/**
 * Decoding with grouped heads: a query of one token is a single row of a tile, and every head over one head of K would
 * read K and V anew. As rows of one query, whose token stride is the stride of heads, they share a tile, and K and V
 * are read once. The kernels see nothing of it.
 */
import { bandOf, NO_LIMIT } from '../../../attention/band.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import type { KernelChoice } from '../../backend.ts';

/**
 * Rows with this distance share a scale of Q in per-thread quantization: fewer have one each, as when they are alone.
 */
const ROWS_WITH_OWN_SCALE = 8;

function largestDivisor(value: number, limit: number): number {
  let divisor = Math.min(value, limit);
  while (value % divisor !== 0) divisor--;
  return divisor;
}

/** The problem with heads of one token as rows of one query, where that changes no result; else undefined. */
export function headsAsRows(
  problem: AttentionProblem,
  { descriptor, qkQuantGran, smoothQ }: KernelChoice,
): AttentionProblem | undefined {
  const { queryLength, keyLength, queryHeads, kvHeads, sequences, q, mask, blocks } = problem;
  const rows = kvHeads === 0 ? 1 : largestDivisor(queryHeads / kvHeads, ROWS_WITH_OWN_SCALE);
  // A list of tiles is that of one head.
  if (queryLength !== 1 || sequences !== undefined || rows <= 1 || blocks !== undefined) return undefined;
  // Coarser scales, and the mean that smoothing subtracts from Q, would mix several heads.
  // FP4 has scales of single rows.
  const ofRows = qkQuantGran === 'per-thread' || descriptor.qkQuantGran.length === 0;
  if (!ofRows || smoothQ) return undefined;
  const { lower, upper } = bandOf(problem, problem);
  return {
    ...problem,
    queryHeads: queryHeads / rows,
    queryLength: rows,
    q: { ...q, headStride: rows * q.headStride, tokenStride: q.headStride },
    mask:
      mask === undefined
        ? undefined
        : { ...mask, strides: [mask.strides[0], rows * mask.strides[1], mask.strides[1], mask.strides[3]] },
    // Every row sees what the one token sees: the kernel counts the band from row 0 (`sameBand`).
    // A side that hides nothing is none, which is faster.
    band: { lower: lower <= 0 ? -NO_LIMIT : lower, upper: upper >= keyLength - 1 ? NO_LIMIT : upper, align: 0 },
    // With one token both layouts are the same.
    tensorLayout: 'HND',
  };
}
