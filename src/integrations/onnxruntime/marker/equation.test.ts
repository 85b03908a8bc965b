import fc from 'fast-check';
import { expect, it } from 'vitest';
import { equationOf, MAX_TAGS } from './equation.ts';

it('gives each axis a letter, each size of the result one of them, and each tag letters of its own', () => {
  const ranks = fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 4 });
  fc.assert(
    fc.property(ranks, fc.integer({ min: 0, max: MAX_TAGS - 1 }), fc.nat(), (sizes, tag, pick) => {
      const operand = pick % sizes.length;
      const axis = pick % (sizes[operand] as number);
      const equation = equationOf(sizes, [{ operand, axis }, 7], tag);
      const [left, right] = (equation?.text ?? '').split('->') as [string, string];
      const terms = left.split(',');
      expect(terms.map((term) => term.length)).toEqual([...sizes, 3]);
      const letters = terms.join('');
      expect(new Set(letters).size).toBe(letters.length);
      expect(right).toBe(`${terms[operand]?.[axis]}${terms.at(-1)?.[0]}`);
      expect(equation?.constant).toEqual([7, 1, 1]);
    }),
  );
  const tags = Array.from({ length: MAX_TAGS }, (_, tag) => equationOf([1], [], tag)?.text);
  expect(new Set(tags).size).toBe(MAX_TAGS);
});

it('says where letters do not suffice', () => {
  expect(equationOf([20, 7], [], 0)).toBeUndefined();
  expect(equationOf([26], [], 0)).toBeDefined();
  expect(equationOf([26], [3], 0)).toBeUndefined();
  expect(equationOf([1], [], MAX_TAGS)).toBeUndefined();
});
