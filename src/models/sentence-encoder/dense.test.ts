import { expect, it } from 'vitest';
import { createDense } from './dense.ts';

const random = (length: number) => Float32Array.from({ length }, () => Math.random() * 2 - 1);

// Sizes that fill no block, no pair of rows and no panel, and some that do.
it.each([
  [0, 4, 4],
  [1, 3, 1],
  [2, 7, 6],
  [63, 5, 7],
  [65, 12, 13],
  [129, 64, 96],
])('%i rows, %i inputs, %i outputs', async (rows, inputs, outputs) => {
  const [x, kernel, bias] = [random(rows * inputs), random(inputs * outputs), random(outputs)];
  const actual = await createDense(kernel, bias, inputs, outputs).apply(x, rows);
  expect(actual).toHaveLength(rows * outputs);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < outputs; column++) {
      let sum = bias[column] as number;
      for (let i = 0; i < inputs; i++) {
        sum += (x[row * inputs + i] as number) * (kernel[i * outputs + column] as number);
      }
      // Sums of at most 64 products below 1, rounded to float32 at each.
      expect(Math.abs((actual[row * outputs + column] as number) - sum)).toBeLessThan(64 * 2 ** -24);
    }
  }
});
