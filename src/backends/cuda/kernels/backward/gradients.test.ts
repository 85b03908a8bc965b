/** The gradient kernels against exact gradients in float64. Kernels run in the simulator. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { toFloat32 } from '../../../../tensor/access.ts';
import type { Tensor } from '../../../../tensor/tensor.ts';
import { additiveMask, booleanMask, gradientCases, relativeL2, train } from '../../testing/gradients.ts';

const seed = runSeed();

/** Relative L2 of a gradient: the error that INT8 scores cause, and room for chance. */
const BOUND = 0.05;

function expectClose({ got, exact }: Pick<ReturnType<typeof train>, 'got' | 'exact'>, bound = BOUND): void {
  for (const name of ['dq', 'dk', 'dv'] as const) {
    expect(relativeL2(toFloat32(got[name]), exact[name]), name).toBeLessThan(bound);
  }
}

describe(`gradients (SAGEATTENTION_SEED=${seed})`, () => {
  test.each(sampled(gradientCases(seed), seed, { byHand: 0.3 }))('$name', ({ sizes, options }) => {
    expectClose(train(seed, sizes, options));
  });

  test('small gradients are as accurate as large ones', () => {
    const scaled = (operands: Record<'dOutput', Tensor>) => {
      const data = operands.dOutput.data as Float32Array;
      for (let i = 0; i < data.length; i++) data[i] = (data[i] as number) * 2 ** -60;
    };
    expectClose(train(seed, { lengths: [40, 70], dims: [32, 32] }, {}, undefined, scaled));
  });

  test('a NaN in dO stays in its channel, with the keys of its row', () => {
    const masks = {
      none: {},
      causal: { isCausal: true },
      window: { windowSize: [9, 4] },
      boolean: { attnMask: booleanMask(seed, [1, 2, 40, 70]) },
      additive: { attnMask: additiveMask(seed, [1, 1, 40, 70]) },
    } as const;
    const spoiled = fc.record({
      mask: fc.constantFrom(...Object.keys(masks)) as fc.Arbitrary<keyof typeof masks>,
      kernel: fc.constantFrom(['sm_80', 'fp16'] as const, ['sm_80', 'int8'] as const, ['sm_90a', 'fp16'] as const),
      dtype: fc.constantFrom('float32' as const, 'bfloat16' as const),
      elements: fc.array(fc.tuple(fc.nat(79), fc.nat(63)), { minLength: 1, maxLength: 3 }),
    });
    const property = fc.property(spoiled, ({ mask, kernel: [target, backwardPrecision], dtype, elements }) => {
      const spoil = ({ dOutput }: Record<'dOutput', Tensor>) => {
        const data = dOutput.data as Float32Array | Uint16Array;
        const nan = dtype === 'float32' ? Number.NaN : 0x7fc0;
        for (const [row, channel] of elements) data[row * 64 + channel] = nan;
      };
      const sizes = { heads: [2, 1], lengths: [40, 70], dims: [64, 64], dtype } as const;
      const options = { ...masks[mask], backwardPrecision };
      const { got, exact } = train(seed, sizes, options, { target, multiprocessors: 1 }, spoil);
      for (const name of ['dq', 'dk', 'dv'] as const) {
        const places = (x: ArrayLike<number>) => Array.from(x, Number.isNaN);
        expect(places(toFloat32(got[name])), name).toEqual(places(exact[name]));
      }
    });
    fc.assert(property, { seed: seed | 0, numRuns: 4 });
  });

  test('masked positions give exact zeros, and rows without keys none', () => {
    const { got } = train(seed, { lengths: [40, 70], dims: [32, 32] }, { attnMask: booleanMask(seed, [1, 1, 40, 70]) });
    const rowOf = (tensor: Tensor, row: number) => toFloat32(tensor).subarray(row * 32, (row + 1) * 32);
    for (const row of [rowOf(got.dq, 3), rowOf(got.dk, 5), rowOf(got.dv, 5)])
      expect([...row].every((x) => x === 0)).toBe(true);
  });

  test.each([
    ['int8', 'sm_80'],
    ['fp8', 'sm_89'],
  ] as const)('%s: what no row sees, and what sees nothing, is in no scale', (backwardPrecision, target) => {
    // Row 3 sees no key, and key 5 is seen by no row.
    const gradientsWith = (times: number) => {
      const enlarge = (operands: Record<'k' | 'v' | 'dOutput', Tensor>) => {
        for (const [name, row] of [['k', 5] as const, ['v', 5] as const, ['dOutput', 3] as const]) {
          const data = operands[name].data as Float32Array;
          for (let i = row * 32; i < (row + 1) * 32; i++) data[i] = (data[i] as number) * times;
        }
      };
      const options = { attnMask: booleanMask(seed, [1, 1, 40, 70]), backwardPrecision };
      const facts = { target, multiprocessors: 1 };
      return train(seed, { lengths: [40, 70], dims: [32, 32] }, options, facts, enlarge).got;
    };
    const [plain, enlarged] = [gradientsWith(1), gradientsWith(1e4)];
    for (const name of ['dq', 'dk', 'dv'] as const) expect(toFloat32(enlarged[name])).toEqual(toFloat32(plain[name]));
  });

  test('what is not a number stays in rows that see it', () => {
    // Causal: query 50 sees keys 0 to 50. Key 60 is seen by queries from 60 on.
    for (const [operand, row] of [
      ['q', 50],
      ['k', 60],
      ['v', 60],
      ['dOutput', 50],
    ] as const) {
      const spoil = (operands: Record<'q' | 'k' | 'v' | 'dOutput', Tensor>) => {
        (operands[operand].data as Float32Array)[row * 32 + 3] = Number.NaN;
      };
      const { got } = train(seed, { lengths: [80, 80], dims: [32, 32] }, { isCausal: true }, undefined, spoil);
      const isSpoiled = (tensor: Tensor) => {
        const values = toFloat32(tensor);
        return Array.from({ length: 80 }, (_, i) => values.subarray(i * 32, (i + 1) * 32).some(Number.isNaN));
      };
      const ofQuery = operand === 'q' || operand === 'dOutput';
      expect(isSpoiled(got.dq), operand).toEqual(
        Array.from({ length: 80 }, (_, i) => (ofQuery ? i === row : i >= row)),
      );
      const keys = Array.from({ length: 80 }, (_, i) => !ofQuery || i <= row);
      expect(isSpoiled(got.dk), operand).toEqual(keys);
    }
  });
});
