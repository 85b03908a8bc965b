import { describe, expect, it } from 'vitest';
import { createProblem } from '../attention/problem.ts';
import { DEFAULT_SENTENCES, DEFAULT_TEXT, pickSentences } from '../cli/demo-text.ts';
import { duration, rate, small, table } from '../cli/terminal.ts';
import { attentionExact } from '../reference/exact.ts';
import { compare } from '../reference/metrics.ts';
import { tensor, transpose } from '../tensor/tensor.ts';
import { accuracyOnRows, type ExactCall, exactOutput, sampleRows } from './accuracy.ts';
import { randomInputs } from './inputs.ts';
import { median } from './statistics.ts';

const shape = { batch: 2, heads: 4, kvHeads: 2, length: 75, headDim: 16 };

describe('exact attention in parts', () => {
  it.each([false, true])('equals exact attention at once, causal %s', async (isCausal) => {
    const { q, k, v } = randomInputs(shape, 'float32', 3);
    const expected = Float32Array.from(attentionExact(createProblem(q, k, v, { isCausal }), { q, k, v }).output);
    const call: ExactCall = { q, k, v, tensorLayout: 'HND', isCausal };
    const ranges = sampleRows(shape.length, 24);
    expect(ranges).toHaveLength(3);
    const output = tensor(expected, q.shape);
    expect((await accuracyOnRows(call, output, ranges)).maxAbsoluteError).toBeLessThan(1e-6);

    // An error in a row that is looked at shows; one in another row does not.
    const changed = (row: number) => {
      const values = expected.slice();
      values[row * shape.headDim] = 100;
      return tensor(values, q.shape);
    };
    const first = ranges[0]?.start as number;
    expect((await accuracyOnRows(call, changed(first), ranges)).maxAbsoluteError).toBeGreaterThan(90);
    const gap = ranges[0]?.end as number;
    expect((await accuracyOnRows(call, changed(gap), ranges)).maxAbsoluteError).toBeLessThan(1e-6);
  });

  it('gives the whole output of an NHD call, and counts the rows', async () => {
    const inputs = randomInputs(shape, 'float32', 4);
    const [q, k, v] = [inputs.q, inputs.k, inputs.v].map((view) => transpose(view, [0, 2, 1, 3])) as [
      typeof inputs.q,
      typeof inputs.k,
      typeof inputs.v,
    ];
    let rows = 0;
    const output = await exactOutput({ q, k, v, tensorLayout: 'NHD', smScale: 0.1 }, (done) => {
      rows += done;
    });
    const problem = createProblem(q, k, v, { tensorLayout: 'NHD', smScale: 0.1 });
    const expected = attentionExact(problem, { q, k, v }).output;
    expect(compare(output, expected).maxAbsoluteError).toBeLessThan(1e-6);
    expect(rows).toBe(shape.length);
  });

  it('samples rows from the first to the last', () => {
    expect(sampleRows(10, 16)).toEqual([{ start: 0, end: 10 }]);
    const ranges = sampleRows(1000, 32);
    expect(ranges[0]).toEqual({ start: 0, end: 8 });
    expect(ranges.at(-1)).toEqual({ start: 992, end: 1000 });
    expect(ranges.reduce((sum, { start, end }) => sum + end - start, 0)).toBe(32);
    expect(sampleRows(1000, 3)).toEqual([{ start: 0, end: 3 }]);
  });
});

describe('inputs', () => {
  it('are the same for the same seed, and standard normal but for K', () => {
    const { q, k } = randomInputs(shape, 'float32', 5);
    expect(randomInputs(shape, 'float32', 5).q.data).toEqual(q.data);
    expect(randomInputs(shape, 'float32', 6).q.data).not.toEqual(q.data);
    const values = Array.from(q.data);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
    // 9600 samples: standard errors are 0.010 and 0.014; the bounds are five of them.
    expect(Math.abs(mean)).toBeLessThan(0.05);
    expect(Math.abs(variance - 1)).toBeLessThan(0.07);
    // Each channel of K has an offset of its own, five times as spread as the noise.
    expect(Math.hypot(...Array.from(k.data)) / Math.sqrt(k.data.length)).toBeGreaterThan(2);
  });
});

describe('the default text', () => {
  it('is a chapter of thousands of words', async () => {
    const text = await DEFAULT_TEXT.read();
    expect(text.split(/\s+/).length).toBeGreaterThan(2000);
    expect(pickSentences(text)).toHaveLength(8);
    expect(new Set(DEFAULT_SENTENCES).size).toBe(8);
  });

  it('gives whole sentences, however its lines are broken', () => {
    const text = 'This sentence goes on\nover two lines. Here is another of them!\r\n\r\nA third one,\r\nlast of all.';
    expect(pickSentences(text)).toEqual([
      'This sentence goes on over two lines.',
      'Here is another of them!',
      'A third one, last of all.',
    ]);
    expect(pickSentences('Word')).toEqual(['Word']);
  });
});

describe('numbers on the terminal', () => {
  it('keep three digits in a fitting unit', () => {
    expect([0.0123, 1.5, 999, 1500, 90_000].map(duration)).toEqual([
      '12.3 us',
      '1.50 ms',
      '999 ms',
      '1.50 s',
      '1.50 min',
    ]);
    expect([1.234, 123.4, 1234].map(rate)).toEqual(['1.23 GFLOP/s', '123 GFLOP/s', '1.23 TFLOP/s']);
    expect([0, 0.00012345, 0.012345].map(small)).toEqual(['0', '1.23e-4', '0.0123']);
  });

  it('stand in columns', () => {
    expect(
      table(
        ['name', '>value'],
        [
          ['a', '1'],
          ['bc', '23'],
        ],
      ),
    ).toBe(['name  value', '----  -----', 'a         1', 'bc       23'].join('\n'));
  });

  it('have a middle', () => {
    expect(median([3, 1, 2])).toBe(2);
    expect(median([4, 1, 2, 3])).toBe(2.5);
  });
});
