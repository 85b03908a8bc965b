import { expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createDense } from './dense.ts';

const seed = runSeed();
const uniform = new Random(seed);
const random = (length: number) => Float32Array.from({ length }, () => uniform.uniform() * 2 - 1);

// Sizes that fill no block, no pair of rows and no panel, and some that do.
it.each([
  [0, 4, 4],
  [1, 3, 1],
  [2, 7, 6],
  [63, 5, 7],
  [65, 12, 13],
  [129, 64, 96],
])(`%i rows, %i inputs, %i outputs (SAGEATTENTION_SEED=${seed})`, async (rows, inputs, outputs) => {
  const [x, kernel, bias] = [random(rows * inputs), random(inputs * outputs), random(outputs)];
  const actual = await createDense(kernel, bias, inputs, outputs).apply(x, rows);
  expect(actual).toHaveLength(rows * outputs);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < outputs; column++) {
      let sum = bias[column] as number;
      let size = Math.abs(sum);
      for (let i = 0; i < inputs; i++) {
        const product = (x[row * inputs + i] as number) * (kernel[i * outputs + column] as number);
        sum += product;
        size += Math.abs(product);
      }
      // Every product and every sum is rounded to float32: of a term, once as a product and at most `inputs` times as a part of a sum.
      const bound = (inputs + 1) * 2 ** -24 * size;
      expect(Math.abs((actual[row * outputs + column] as number) - sum)).toBeLessThanOrEqual(bound);
    }
  }
});
