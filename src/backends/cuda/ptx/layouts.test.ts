import { describe, expect, test } from 'vitest';
import { type Layout, rowMajor, tma128Swizzle, xorSwizzle } from './layouts.ts';

const layouts: [Layout, rows: number][] = [
  [rowMajor(48), 16],
  [xorSwizzle(16), 64],
  [xorSwizzle(32), 64],
  [xorSwizzle(64), 64],
  [xorSwizzle(128), 64],
  [xorSwizzle(256), 64],
  [xorSwizzle(384), 64],
  [xorSwizzle(512), 64],
  [tma128Swizzle(), 64],
];

/** The bank group (16 bytes wide, 8 of them) that a byte offset falls on. */
const bankGroup = (offset: number) => Math.floor(offset / 16) % 8;

describe.each(layouts.map(([layout, rows]) => ({ name: `${layout.name} ${layout.rowBytes}`, layout, rows })))(
  '$name',
  ({ layout, rows }) => {
    test('is a bijection onto the tile', () => {
      const seen = new Set<number>();
      for (let row = 0; row < rows; row++) {
        for (let byte = 0; byte < layout.rowBytes; byte++) {
          const at = layout.at(row, byte);
          expect(at).toBeGreaterThanOrEqual(0);
          expect(at).toBeLessThan(rows * layout.rowBytes);
          seen.add(at);
        }
      }
      expect(seen.size).toBe(rows * layout.rowBytes);
    });

    test('keeps 16-byte chunks whole', () => {
      for (let row = 0; row < rows; row++) {
        for (let byte = 0; byte < layout.rowBytes; byte++) {
          const chunk = layout.at(row, byte - (byte % 16));
          expect(chunk % 16).toBe(0);
          expect(layout.at(row, byte)).toBe(chunk + (byte % 16));
        }
      }
    });

    // Rows that are not permuted promise nothing.
    if (layout.rowMask === 0) return;
    test('gives ldmatrix eight different bank groups', () => {
      for (let row = 0; row < rows; row += 8) {
        for (let byte = 0; byte < layout.rowBytes; byte += 16) {
          const groups = Array.from({ length: 8 }, (_, i) => bankGroup(layout.at(row + i, byte)));
          expect(new Set(groups).size).toBe(8);
        }
      }
    });
  },
);

test('row-major rows of 128 bytes put all eight rows on one bank group', () => {
  const layout = rowMajor(128);
  const groups = Array.from({ length: 8 }, (_, row) => bankGroup(layout.at(row, 0)));
  expect(new Set(groups).size).toBe(1);
});

test('xorSwizzle refuses rows that it cannot permute', () => {
  expect(() => xorSwizzle(96)).toThrow(RangeError);
  expect(() => xorSwizzle(8)).toThrow(RangeError);
});
