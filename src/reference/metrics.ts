import { InvalidArgumentError, reading, textOf } from '../errors.ts';

/** How far a result is from the exact one. */
export interface Accuracy {
  /** sum(a e) / sqrt(sum(a^2) sum(e^2)); 1 is perfect. */
  readonly cosineSimilarity: number;
  /** sum|a - e| / sum|e|. */
  readonly relativeL1: number;
  /** sqrt(mean((a - e)^2)), in the unit of the values. */
  readonly rmse: number;
  /** max|a - e|. */
  readonly maxAbsoluteError: number;
  /** Where the figures are the worst possible: the first element that is not finite on both sides alike. */
  readonly spoiledBy?: { readonly index: number; readonly actual: number; readonly expected: number };
}

const WORST: Accuracy = {
  cosineSimilarity: -1,
  relativeL1: Number.POSITIVE_INFINITY,
  rmse: Number.POSITIVE_INFINITY,
  maxAbsoluteError: Number.POSITIVE_INFINITY,
};

/**
 * Compares a result with the exact one, element by element, in float64: the metrics of SageAttention2 (arXiv 2411.10958).
 *
 * - A NaN on either side, or an infinity that the other side does not have in the same place, makes every figure the worst
 *   possible (-1 and Infinity), so that no bound can pass it, and `spoiledBy` names it. Infinities that agree (the LSE of
 *   a row without keys) count as no error and stay out of the sums.
 * - Where all of `expected` is 0: relative L1 is 0 if `actual` is 0 too, else Infinity; cosine similarity 1, else 0.
 * - No elements: no error.
 *
 * @throws {InvalidArgumentError} `invalid-shape` when the lengths differ
 */
export function compare(actual: ArrayLike<number>, expected: ArrayLike<number>): Accuracy {
  for (const [argument, values] of Object.entries({ actual, expected })) {
    const isArray = () => typeof values === 'object' && values !== null && Number.isSafeInteger(values.length);
    if (!reading(argument, isArray)) {
      throw new InvalidArgumentError('invalid-shape', argument, 'an array of numbers', textOf(values));
    }
  }
  if (actual.length !== expected.length) {
    throw new InvalidArgumentError('invalid-shape', 'actual', `${expected.length} elements`, `${actual.length}`);
  }
  let dot = 0;
  let actualSquares = 0;
  let expectedSquares = 0;
  let errors = 0;
  let squaredErrors = 0;
  let magnitudes = 0;
  let maxAbsoluteError = 0;
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i] as number;
    const e = expected[i] as number;
    if (!Number.isFinite(a) || !Number.isFinite(e)) {
      if (a === e) continue;
      return { ...WORST, spoiledBy: { index: i, actual: a, expected: e } };
    }
    const error = Math.abs(a - e);
    dot += a * e;
    actualSquares += a * a;
    expectedSquares += e * e;
    errors += error;
    squaredErrors += error * error;
    magnitudes += Math.abs(e);
    maxAbsoluteError = Math.max(maxAbsoluteError, error);
  }
  const norms = Math.sqrt(actualSquares) * Math.sqrt(expectedSquares);
  return {
    cosineSimilarity: norms > 0 ? dot / norms : actualSquares === expectedSquares ? 1 : 0,
    relativeL1: errors === 0 ? 0 : errors / magnitudes,
    rmse: expected.length === 0 ? 0 : Math.sqrt(squaredErrors / expected.length),
    maxAbsoluteError,
  };
}

/** sqrt(sum((a - e)^2) / sum(e^2)): what papers about gradients give. Infinity where an element is not finite, 0 for nothing. */
export function relativeL2(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  const { rmse } = compare(actual, expected);
  let squares = 0;
  for (let i = 0; i < expected.length; i++) squares += (expected[i] as number) ** 2;
  return rmse === 0 ? 0 : rmse / Math.sqrt(squares / expected.length);
}
