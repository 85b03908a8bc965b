/** The gradient kernels against exact gradients in float64. Kernels run in the simulator. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { sampled } from '../../../../../test/support/sample.ts';
import { fromFloat32, toFloat32 } from '../../../../tensor/access.ts';
import type { Tensor } from '../../../../tensor/tensor.ts';
import { type Options, relativeL2, type Sizes, train } from '../../testing/gradients.ts';

const seed = runSeed();

/** Relative L2 of a gradient: that of INT8 scores, and room for chance. */
const BOUND = 0.05;

function expectClose({ got, exact }: Pick<ReturnType<typeof train>, 'got' | 'exact'>, bound = BOUND): void {
  for (const name of ['dq', 'dk', 'dv'] as const) {
    expect(relativeL2(toFloat32(got[name]), exact[name]), name).toBeLessThan(bound);
  }
}

/** Zeros beside ones: some rows see no key, and some keys are seen by no row. */
function booleanMask(shape: readonly [number, number, number, number]): Tensor {
  const [, , rows, keys] = shape;
  const random = new Random(seed + 1);
  const data = Uint8Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => {
    const [row, key] = [Math.floor(i / keys) % rows, i % keys];
    return row === 3 || key === 5 ? 0 : Number(random.uniform() < 0.7);
  });
  return { location: 'cpu', dtype: 'bool', shape, strides: stridesOf(shape), offset: 0, data } as Tensor;
}

function additiveMask(shape: readonly [number, number, number, number]): Tensor {
  const random = new Random(seed + 2);
  const values = random.normals(shape.reduce((a, b) => a * b));
  for (let i = 0; i < values.length; i += 9) values[i] = Number.NEGATIVE_INFINITY;
  return fromFloat32(values, shape, 'float32');
}

const stridesOf = (shape: readonly number[]) => shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));

describe(`gradients (SAGEATTENTION_SEED=${seed})`, () => {
  const CASES: readonly (readonly [name: string, sizes: Sizes, options: Options])[] = [
    ['odd lengths, grouped heads', { batch: 2, heads: [4, 2], lengths: [70, 100], dims: [32, 48] }, {}],
    ['head dims that are no multiples', { lengths: [67, 131], dims: [20, 33] }, {}],
    ['causal', { heads: [2, 1], lengths: [100, 100], dims: [32, 32] }, { isCausal: true }],
    ['causal, more keys', { lengths: [40, 150], dims: [32, 32] }, { isCausal: true, causalAlignment: 'bottom-right' }],
    [
      'causal, more queries',
      { lengths: [150, 40], dims: [32, 32] },
      { isCausal: true, causalAlignment: 'bottom-right' },
    ],
    ['window', { lengths: [150, 150], dims: [32, 32] }, { windowSize: [20, 7] }],
    ['boolean mask', { heads: [2, 1], lengths: [40, 70], dims: [32, 32] }, { attnMask: booleanMask([1, 2, 40, 70]) }],
    ['additive mask', { heads: [2, 1], lengths: [40, 70], dims: [32, 32] }, { attnMask: additiveMask([1, 1, 40, 70]) }],
    ['softcap', { lengths: [70, 70], dims: [32, 32] }, { softcap: 3, isCausal: true }],
    [
      'softcap and additive mask',
      { lengths: [40, 70], dims: [32, 32] },
      { softcap: 2, attnMask: additiveMask([1, 1, 40, 70]) },
    ],
    [
      'negative scale, NHD',
      { heads: [2, 1], lengths: [33, 65], dims: [32, 32] },
      { smScale: -0.3, tensorLayout: 'NHD' },
    ],
    [
      'packed',
      { heads: [2, 1], lengths: [90, 110], dims: [32, 32] },
      { cuSeqlensQ: [0, 20, 20, 90], cuSeqlensK: [0, 70, 80, 110], isCausal: true },
    ],
    ['scales per block', { lengths: [70, 100], dims: [32, 32] }, { kernel: 'qk-int8-pv-fp16' }],
    ['no keys', { lengths: [5, 0], dims: [32, 32] }, {}],
    ['no queries', { lengths: [0, 5], dims: [32, 32] }, {}],
    ['one query', { heads: [4, 1], lengths: [1, 70], dims: [32, 32] }, {}],
    [
      'bfloat16, gradients in float32',
      { lengths: [40, 70], dims: [64, 64], dtype: 'bfloat16' },
      { gradientDtype: 'float32' },
    ],
    ['float16', { lengths: [40, 70], dims: [64, 64], dtype: 'float16' }, {}],
    ['dims beyond what one kernel holds', { lengths: [20, 70], dims: [256, 144] }, { isCausal: true }],
  ];
  test.each(
    sampled(
      CASES.map(([name, sizes, options]) => ({ name, sizes, options })),
      seed,
      0.3,
    ),
  )('$name', ({ sizes, options }) => {
    expectClose(train(seed, sizes, options));
  });

  test('small gradients are as accurate as large ones', () => {
    const scaled = (operands: Record<'dOutput', Tensor>) => {
      const data = operands.dOutput.data as Float32Array;
      for (let i = 0; i < data.length; i++) data[i] = (data[i] as number) * 2 ** -60;
    };
    expectClose(train(seed, { lengths: [40, 70], dims: [32, 32] }, {}, undefined, scaled));
  });

  test('masked positions give exact zeros, and rows without keys none', () => {
    const { got } = train(seed, { lengths: [40, 70], dims: [32, 32] }, { attnMask: booleanMask([1, 1, 40, 70]) });
    const rowOf = (tensor: Tensor, row: number) => toFloat32(tensor).subarray(row * 32, (row + 1) * 32);
    for (const row of [rowOf(got.dq, 3), rowOf(got.dk, 5), rowOf(got.dv, 5)])
      expect([...row].every((x) => x === 0)).toBe(true);
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
