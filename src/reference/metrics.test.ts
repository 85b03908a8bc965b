import { describe, expect, it } from 'vitest';
import { InvalidArgumentError } from '../errors.ts';
import { compare } from './metrics.ts';

const WORST = {
  cosineSimilarity: -1,
  relativeL1: Number.POSITIVE_INFINITY,
  rmse: Number.POSITIVE_INFINITY,
  maxAbsoluteError: Number.POSITIVE_INFINITY,
};

describe('compare', () => {
  it('computes the four figures', () => {
    const { cosineSimilarity, relativeL1, rmse, maxAbsoluteError } = compare([3, 0, -1], [3, 4, 0]);
    expect(cosineSimilarity).toBeCloseTo(9 / (Math.sqrt(10) * 5), 12);
    expect(relativeL1).toBeCloseTo(5 / 7, 12);
    expect(rmse).toBeCloseTo(Math.sqrt(17 / 3), 12);
    expect(maxAbsoluteError).toBe(4);
  });

  it('never lets a NaN or a stray infinity pass', () => {
    const { NaN: nan, POSITIVE_INFINITY: infinity } = Number;
    for (const [actual, expected] of [
      [nan, 1],
      [1, nan],
      [nan, nan],
      [infinity, 1],
      [1, infinity],
      [infinity, -infinity],
    ] as const) {
      expect(compare([1, actual], [1, expected])).toEqual({ ...WORST, spoiledBy: { index: 1, actual, expected } });
    }
    expect(compare([1, -infinity], [1, -infinity])).toMatchObject({ relativeL1: 0, rmse: 0, maxAbsoluteError: 0 });
  });

  it('defines zeros and nothing', () => {
    expect(compare([0, 0], [0, 0])).toEqual({ cosineSimilarity: 1, relativeL1: 0, rmse: 0, maxAbsoluteError: 0 });
    expect(compare([0, 1], [0, 0])).toMatchObject({ cosineSimilarity: 0, relativeL1: Number.POSITIVE_INFINITY });
    expect(compare([0, 0], [0, 2])).toMatchObject({ cosineSimilarity: 0, relativeL1: 1 });
    expect(compare([], [])).toEqual({ cosineSimilarity: 1, relativeL1: 0, rmse: 0, maxAbsoluteError: 0 });
  });

  it('refuses different lengths', () => {
    expect(() => compare([1], [1, 2])).toThrow(InvalidArgumentError);
  });
});
