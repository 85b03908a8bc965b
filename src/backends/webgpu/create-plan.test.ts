/** What `createPlan` refuses before it asks for a device. */
import { describe, expect, test } from 'vitest';
import { InvalidArgumentError } from '../../errors.ts';
import { tensor } from '../../tensor/tensor.ts';
import { createWebgpuBackend } from './index.ts';

const specs = () => {
  const view = () => tensor(new Float32Array(32 * 8), [1, 1, 32, 8]);
  return { q: view(), k: view(), v: view() };
};

describe('createPlan', () => {
  test.each([
    ['a sparsity, whose blocks it would not choose', {}, { sparsity: { topK: 0.5 } }, 'options.sparsity'],
    [
      'a map without the sizes of its blocks',
      { blockMap: tensor(new Uint8Array(1), [1, 1], { dtype: 'bool' }) },
      {},
      'options.blockMask',
    ],
  ])('refuses %s', async (_, inputs, options, argument) => {
    const made = createWebgpuBackend().createPlan({ ...specs(), ...inputs }, options as object);
    const error = await made.then(() => undefined).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(InvalidArgumentError);
    expect(error).toMatchObject({ argument });
  });
});
