import { afterEach, expect, test, vi } from 'vitest';
import { Random, runSeed } from './random.ts';
import { sampled } from './sample.ts';

afterEach(() => vi.unstubAllEnvs());

const seed = runSeed();
const tests = Array.from({ length: 40 }, (_, i) => ({ name: `test ${i}` }));

test('without being asked for, a sample is everything', () => {
  vi.stubEnv('SAGEATTENTION_TESTS', '');
  expect(sampled(tests, seed, 0.1)).toEqual(tests);
});

test(`a sample is that of its seed, in order, of the size asked for, and never empty (SAGEATTENTION_SEED=${seed})`, () => {
  vi.stubEnv('SAGEATTENTION_TESTS', 'sample');
  const sample = sampled(tests, seed, 0.25, 'a group');
  expect(sample).toHaveLength(10);
  expect(sample).toEqual(sampled(tests, seed, 0.25, 'a group'));
  expect(sample).toEqual(tests.filter((entry) => sample.includes(entry)));
  expect(sampled(tests, seed, 0.001)).toHaveLength(1);
  expect(sampled([], seed, 0.5)).toEqual([]);
});

test(`over many seeds every test has its turn (SAGEATTENTION_SEED=${seed})`, () => {
  vi.stubEnv('SAGEATTENTION_TESTS', 'sample');
  const random = new Random(seed);
  const seen = new Set(Array.from({ length: 200 }, () => sampled(tests, random.integer(0, 2 ** 32 - 1), 0.1)).flat());
  expect(seen.size).toBe(tests.length);
});
