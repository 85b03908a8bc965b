import { expect, it } from 'vitest';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import type { DType } from '../../tensor/dtype.ts';
import { emptyTensor } from '../../tensor/tensor.ts';
import { EXACT_RULES, fastestKernel } from './fastest.ts';
import { defaultKernelFor } from './kernel-table.ts';

interface Size {
  readonly keys: number;
  readonly dim: number;
  readonly dtype?: DType;
}

function nameFor(
  { keys, dim, dtype = 'bfloat16' }: Size,
  options: AttentionOptions,
  capability: number,
): string | undefined {
  const operand = {
    ...emptyTensor([0], dtype),
    ...{ location: 'cuda' as const, device: 0, shape: [1, 1, keys, dim], strides: [keys * dim, keys * dim, dim, 1] },
  };
  return fastestKernel(createProblem(operand, operand, operand, options), capability)?.name;
}

it.each(EXACT_RULES)('takes 16 bits as given up to $keys keys at D = $headDim, banded: $banded', (rule) => {
  const { from, below, headDim: dim, banded: isCausal, keys } = rule;
  const otherwise = defaultKernelFor(from)?.name;
  expect(nameFor({ keys, dim }, { isCausal }, from)).toBe('exact');
  expect(nameFor({ keys, dim, dtype: 'float16' }, { isCausal }, from)).toBe('exact');
  expect(nameFor({ keys: keys + 1, dim }, { isCausal }, from)).toBe(otherwise);
  expect(nameFor({ keys, dim, dtype: 'float32' }, { isCausal }, from)).toBe(otherwise);
  // What the rule was not measured on.
  expect(nameFor({ keys, dim: dim - 1 }, { isCausal }, from)).toBe(otherwise);
  expect(nameFor({ keys, dim }, { isCausal, softcap: 20 }, from)).toBe(otherwise);
  const attnMask = {
    ...{ location: 'cuda' as const, dtype: 'bool' as const, offset: 0 },
    ...{ device: 0, shape: [keys, keys], strides: [keys, 1] },
  };
  expect(nameFor({ keys, dim }, { isCausal, attnMask }, from)).toBe(otherwise);
  expect(nameFor({ keys, dim }, { isCausal }, below)).toBe(defaultKernelFor(below)?.name);
});

it('knows no kernel for a device that is too old', () => {
  expect(nameFor({ keys: 100, dim: 64 }, {}, 75)).toBeUndefined();
});
