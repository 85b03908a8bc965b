import { describe, expect, it } from 'vitest';
import { checkMeasured } from './suite.ts';

/** Measures the errors given, one a call, against a limit of 1; the last one ever after. */
function errors(...values: readonly number[]) {
  const seeds: number[] = [];
  const measure = async (seed: number) => {
    const error = values[Math.min(seeds.length, values.length - 1)] as number;
    seeds.push(seed);
    return [{ what: 'output: relative L1', error, limit: 1 }];
  };
  return { seeds, run: () => checkMeasured(measure, 7) };
}

describe('checkMeasured', () => {
  it('measures once what is within its limit', async () => {
    const { seeds, run } = errors(1);
    await run();
    expect(seeds).toEqual([7]);
  });

  it('measures again what is beyond, on other inputs', async () => {
    const { seeds, run } = errors(1.9, 0.5);
    await run();
    expect(seeds).toEqual([7, 8, 9, 10, 11]);
  });

  it('fails where one of them is beyond too, and names both', async () => {
    const { seeds, run } = errors(1.5, 0.5, 0.5, 1.1, 0.5);
    await expect(run()).rejects.toThrow(
      'relative L1 1.1, limit 1, with seed 10; with 7 output: relative L1 1.5, limit 1',
    );
    expect(seeds).toEqual([7, 8, 9, 10]);
  });

  it('fails at once where there is no doubt', async () => {
    const { seeds, run } = errors(2.1, 0.5);
    await expect(run()).rejects.toThrow('relative L1 2.1, limit 1');
    expect(seeds).toEqual([7]);
  });
});
