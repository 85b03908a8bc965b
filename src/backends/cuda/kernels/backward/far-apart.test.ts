/** Gradients beside keys that are a hundred times as large: the logsumexp is of scores whose keys have exponents of their own. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { toFloat32 } from '../../../../tensor/access.ts';
import type { Tensor } from '../../../../tensor/tensor.ts';
import { type Options, relativeL2, train } from '../../testing/gradients.ts';

const seed = runSeed();
const [LENGTH, DIM] = [90, 64];

describe(`gradients of keys far apart (SAGEATTENTION_SEED=${seed})`, () => {
  test.each([
    ['sm_80', {}],
    ['sm_80', { softcap: 5 }],
    ['sm_90a', {}],
    ['sm_90a', { kernel: 'qk-int8-pv-fp16' }],
  ] as const)('%s %o', (target, options: Options) => {
    const largeFrom = 40 + Math.floor(new Random(seed).uniform() * 40);
    const rowsBefore = (times: number) => {
      const enlarge = ({ k }: Record<'k', Tensor>) => {
        const data = k.data as Float32Array;
        for (let i = largeFrom * DIM; i < data.length; i++) data[i] = (data[i] as number) * times;
      };
      const sizes = { lengths: [LENGTH, LENGTH], dims: [DIM, DIM] } as const;
      const causal = { ...options, isCausal: true };
      const { got, exact } = train(seed, sizes, causal, { target, multiprocessors: 1 }, enlarge);
      // Rows that see none of them.
      return relativeL2(toFloat32(got.dq).slice(0, largeFrom * DIM), exact.dq.slice(0, largeFrom * DIM));
    };
    const alone = rowsBefore(1);
    expect(rowsBefore(100)).toBeLessThan(2 * alone + 0.01);
  });
});
