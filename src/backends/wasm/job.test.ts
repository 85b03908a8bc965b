import { expect, it } from 'vitest';
import * as job from './job.ts';

it.each(['FLAG_', 'TILE_(?!APART_COUNT|APART_KEYS)'])('flags %s are bits of their own', (pattern) => {
  const bits = Object.entries(job).flatMap(([name, value]) => (RegExp(`^${pattern}`).test(name) ? [value] : []));
  expect(bits.length).toBeGreaterThan(4);
  for (const bit of bits) expect(Number.isInteger(Math.log2(bit))).toBe(true);
  expect(new Set(bits).size).toBe(bits.length);
});
