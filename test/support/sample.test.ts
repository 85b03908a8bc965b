import { afterEach, expect, test, vi } from 'vitest';
import { Random, runSeed } from './random.ts';
import { sampled } from './sample.ts';

afterEach(() => vi.unstubAllEnvs());

const seed = runSeed();
const tests = Array.from({ length: 40 }, (_, i) => ({ name: `test ${i}` }));

const shares = { byHand: 0.25, otherwise: 0.5 };

test('a sample is of the size that the run asks for', () => {
  for (const [asked, size] of [
    ['sample', 10],
    ['', 20],
    ['all', 40],
  ] as const) {
    vi.stubEnv('SAGEATTENTION_TESTS', asked);
    expect(sampled(tests, seed, shares), asked).toHaveLength(size);
    expect(sampled(tests, seed, { byHand: 0.001, otherwise: 0.001 }).length, asked).toBe(asked === 'all' ? 40 : 1);
    expect(sampled([], seed, shares), asked).toEqual([]);
  }
  vi.stubEnv('SAGEATTENTION_TESTS', '');
  expect(sampled(tests, seed, { byHand: 0.1 })).toEqual(tests);
});

test(`a sample is that of its seed, in order (SAGEATTENTION_SEED=${seed})`, () => {
  vi.stubEnv('SAGEATTENTION_TESTS', 'sample');
  const sample = sampled(tests, seed, shares, 'a list');
  expect(sample).toEqual(sampled(tests, seed, shares, 'a list'));
  expect(sample).toEqual(tests.filter((entry) => sample.includes(entry)));
});

test(`over many seeds every test has its turn (SAGEATTENTION_SEED=${seed})`, () => {
  vi.stubEnv('SAGEATTENTION_TESTS', 'sample');
  const random = new Random(seed);
  const seen = new Set(
    Array.from({ length: 200 }, () => sampled(tests, random.integer(0, 2 ** 32 - 1), { byHand: 0.1 })).flat(),
  );
  expect(seen.size).toBe(tests.length);
});

test(`each kind of tests is in every sample (SAGEATTENTION_SEED=${seed})`, () => {
  vi.stubEnv('SAGEATTENTION_TESTS', 'sample');
  const kinds = ['mask', 'band', 'poison', 'cache'];
  // In the order of a table: kinds need not stand together.
  const table = Array.from({ length: 40 }, (_, i) => ({ name: `${kinds[i % 4]}: ${i}` }));
  const random = new Random(seed);
  for (let run = 0; run < 100; run++) {
    const sample = sampled(table, random.integer(0, 2 ** 32 - 1), { byHand: 0.1 });
    expect(sample.map(({ name }) => name.split(':')[0]).sort()).toEqual([...kinds].sort());
  }
});
