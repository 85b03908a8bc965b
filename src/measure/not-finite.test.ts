import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { tensor, transpose } from '../tensor/tensor.ts';
import { notFinite } from './not-finite.ts';

describe('notFinite', () => {
  it('names the tensor, how many there are, and the first in order of the shape', () => {
    const value = fc.constantFrom(0, 1, Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY);
    fc.assert(
      fc.property(fc.array(value, { minLength: 24, maxLength: 24 }), fc.boolean(), (values, isTransposed) => {
        const made = tensor(Float32Array.from(values), [1, 2, 3, 4]);
        const view = isTransposed ? transpose(made, [0, 2, 1, 3]) : made;
        const [, rows, columns] = view.shape as [number, number, number, number];
        const bad = Array.from({ length: 24 }, (_, i) => [
          Math.floor(i / 4 / columns),
          Math.floor(i / 4) % columns,
          i % 4,
        ])
          .map(([a = 0, b = 0, c = 0]) => ({
            a,
            b,
            c,
            found: values[(isTransposed ? b * rows + a : a * columns + b) * 4 + c],
          }))
          .filter(({ found, a }) => a < rows && !Number.isFinite(found))
          .map(({ a, b, c, found }) => `${found} at [0,${a},${b},${c}]`);
        const many = bad.length === 1 ? '1 value that is' : `${bad.length} values that are`;
        const expected = bad.length === 0 ? [] : [`k holds ${many} not finite, first ${bad[0]}`];
        expect(notFinite({ q: tensor(new Float32Array(4), [4]), k: view })).toEqual(expected);
      }),
    );
  });
});
