/** Errors of an output's rows, grouped by the keys that they see, so that rows of large values hide no error of others. */
import { type AttentionProblem, outputLayoutOf, sequencesOf } from '../../src/attention/problem.ts';
import { ONE_SIZE } from '../../src/quantization/smoothing.ts';
import { type ReferenceInputs, type ReferenceOutputs, readOperands } from '../../src/reference/exact.ts';
import { biasReader, rowClasses } from '../../src/reference/visibility.ts';

/** Rows of one sequence that see keys and values of about the same size. */
export interface ClassError {
  /** Which sequence and class: the same for other inputs of the same kind. */
  readonly name: string;
  /**
   * Relative L1 of the output over the rows that are finite in the exact one. None where rows see keys of hundreds:
   * their softmax takes single keys, of which a near tie takes another, so the error has no limit that holds for all
   * inputs.
   */
  readonly output: number | undefined;
  /** Largest absolute error of a finite logsumexp, and the exact value there. */
  readonly lse: { readonly error: number; readonly exact: number };
  /** Its keys are so much larger than others of its sequence that the vector which smooths K is theirs (`smoothingMean`). */
  readonly smoothedByOthers: boolean;
}

/**
 * Where rows cancel to almost nothing, their error is taken relative to this part of the largest value that they see.
 */
const LEAST_PART = 0.05;

/** Largest magnitude of keys beside which a softmax still is one of many keys; ordinary ones have up to 10. */
const ONE_KEY_TAKES_ALL = 50;

interface Sums {
  error: number;
  magnitude: number;
  elements: number;
  largestValue: number;
  largestKey: number;
  lse: { error: number; exact: number };
}

/**
 * Rows without a key that counts are left out: all they see is hidden as far as means and scales are concerned.
 *
 * @param underflow absolute error of an element that is the format's own
 */
export function classErrors(
  problem: AttentionProblem,
  inputs: ReferenceInputs,
  actual: { readonly output: ArrayLike<number>; readonly lse?: ArrayLike<number> | undefined },
  exact: ReferenceOutputs,
  underflow: number,
): ClassError[] {
  const { queryHeads, kvHeads, headDim, valueDim, sequences } = problem;
  const { k, v, keyTokens, queryTokens } = readOperands(problem, inputs);
  const layout = outputLayoutOf(problem);
  const readBias = biasReader(problem, inputs.attnMask);
  const sums = new Map<string, Sums>();
  const addRow = (own: Sums, at: number, lseAt: number) => {
    const row = exact.output.subarray(at, at + valueDim);
    if (row.some((value) => !Number.isFinite(value))) return;
    row.forEach((expected, d) => {
      own.error += Math.max(0, Math.abs((actual.output[at + d] as number) - expected) - underflow);
      own.magnitude += Math.abs(expected);
    });
    own.elements += valueDim;
    const expected = exact.lse[lseAt] as number;
    const error = actual.lse === undefined ? 0 : Math.abs((actual.lse[lseAt] as number) - expected);
    if (error > own.lse.error) own.lse = { error, exact: expected };
  };
  for (const sequence of sequencesOf(problem)) {
    const batch = sequences === undefined ? sequence.index : 0;
    for (let kvHead = 0; kvHead < kvHeads; kvHead++) {
      const first = (batch * kvHeads + kvHead) * keyTokens + sequence.keyStart;
      const part = (x: Float32Array, dim: number) => x.slice(first * dim, (first + sequence.keyLength) * dim);
      const group = queryHeads / kvHeads;
      const heads = Array.from({ length: group }, (_, i) => kvHead * group + i);
      const classes = rowClasses(problem, sequence, heads, readBias, part(k, headDim), part(v, valueDim));
      for (const { name: ofClass, rows, largestValue, largestKey } of classes) {
        const name = `sequence ${sequence.index}, class ${ofClass}`;
        const own = sums.get(name) ?? {
          error: 0,
          magnitude: 0,
          elements: 0,
          largestValue: 0,
          largestKey: 0,
          lse: { error: 0, exact: 0 },
        };
        sums.set(name, own);
        own.largestValue = Math.max(own.largestValue, largestValue);
        own.largestKey = Math.max(own.largestKey, largestKey);
        for (const { head, row, keys } of rows) {
          if (keys === 0) continue;
          const token = sequence.queryStart + row;
          addRow(
            own,
            sequence.index * layout.batchStride + head * layout.headStride + token * layout.tokenStride,
            (batch * queryHeads + head) * queryTokens + token,
          );
        }
      }
    }
  }
  const sequenceOf = (name: string) => name.split(',', 1)[0];
  const isOfOthers = (name: string, largestKey: number) =>
    [...sums].some(([other, own]) => sequenceOf(other) === sequenceOf(name) && ONE_SIZE * own.largestKey < largestKey);
  return [...sums].map(([name, { error, magnitude, elements, largestValue, largestKey, lse }]) => ({
    name,
    smoothedByOthers: largestKey > ONE_KEY_TAKES_ALL && isOfOthers(name, largestKey),
    output:
      largestKey > ONE_KEY_TAKES_ALL
        ? undefined
        : error / Math.max(magnitude, LEAST_PART * largestValue * elements, Number.MIN_VALUE),
    lse,
  }));
}
