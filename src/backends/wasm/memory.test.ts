import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { ExecutionError } from '../../errors.ts';
import { MemoryPool } from './memory.ts';

const PAGE = 65536;

test('pieces never overlap, are aligned, and all come back', () => {
  const random = new Random(runSeed());
  let pages = 1;
  const pool = new MemoryPool(pages, 4096, (more) => {
    pages += more;
  });
  const held: [start: number, bytes: number][] = [];
  for (let i = 0; i < 3000; i++) {
    if (held.length > 0 && random.uniform() < 0.5) {
      const [[start, bytes]] = held.splice(random.integer(0, held.length - 1), 1) as [[number, number]];
      pool.free(start, bytes);
    } else {
      const bytes = random.integer(0, 20000);
      const start = pool.allocate(bytes);
      expect(start % 64, `seed ${random.seed}`).toBe(0);
      expect(start).toBeGreaterThan(0);
      expect(start + bytes).toBeLessThanOrEqual(pages * PAGE);
      for (const [other, size] of held) expect(start >= other + size || start + bytes <= other).toBe(true);
      held.push([start, bytes]);
    }
  }
  for (const [start, bytes] of held) pool.free(start, bytes);
  expect(pool.usedBytes).toBe(0);
  // All of it is one piece again: nothing has to grow.
  const before = pages;
  pool.allocate(before * PAGE - 1024);
  expect(pages).toBe(before);
});

test('beyond the limit, an error names what was needed and the limit', () => {
  const pool = new MemoryPool(1, 16, () => {});
  const error = (() => {
    try {
      pool.allocate(17 * PAGE);
      return undefined;
    } catch (caught) {
      return caught as ExecutionError;
    }
  })();
  expect(error).toBeInstanceOf(ExecutionError);
  expect(error?.code).toBe('out-of-memory');
  expect(error?.message).toContain('1.1 MiB');
  expect(error?.message).toContain('1.0 MiB');
  // What fits still does.
  expect(pool.allocate(15 * PAGE)).toBeGreaterThan(0);
});

test('where the engine refuses to grow generously, it is asked for no more than needed', () => {
  const asked: number[] = [];
  const pool = new MemoryPool(100, 4096, (pages) => {
    asked.push(pages);
    if (pages > 2) throw new RangeError('no');
  });
  pool.allocate(100 * PAGE);
  expect(asked).toEqual([25, 1]);
  const refusing = new MemoryPool(1, 4096, () => {
    throw new RangeError('no');
  });
  expect(() => refusing.allocate(2 * PAGE)).toThrow(ExecutionError);
});
