/** The exact peer of benches, against float64. */
import { afterEach, describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import { elementCount, type Tensor, tensor } from '../../tensor/tensor.ts';
import { createExactAttention, type ExactAttention, type ExactAttentionOptions } from './exact-wasm.ts';

const random = new Random(runSeed());
const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
/** Of the relative L1 error: roundings of float32 sums and of a polynomial for 2^x. */
const BOUND = 3e-6;

let running: ExactAttention | undefined;
afterEach(() => running?.dispose());

const draw = (shape: readonly number[], scale = 1) => tensor(random.normals(elementCount(shape), scale), shape);

const cases: readonly (readonly [string, readonly [q: number[], k: number[], v: number[]], ExactAttentionOptions])[] = [
  [
    'one query and one key',
    [
      [1, 1, 1, 8],
      [1, 1, 1, 8],
      [1, 1, 1, 8],
    ],
    {},
  ],
  [
    'odd lengths, grouped heads',
    [
      [2, 6, 67, 64],
      [2, 2, 257, 64],
      [2, 2, 257, 64],
    ],
    {},
  ],
  [
    'tokens before heads, causal',
    [
      [2, 131, 4, 40],
      [2, 131, 2, 40],
      [2, 131, 2, 24],
    ],
    { tensorLayout: 'NHD', isCausal: true },
  ],
  [
    'head dims that are no multiple of 4',
    [
      [1, 2, 33, 37],
      [1, 2, 150, 37],
      [1, 2, 150, 51],
    ],
    {},
  ],
  [
    'head dim 256',
    [
      [1, 2, 35, 256],
      [1, 1, 140, 256],
      [1, 1, 140, 256],
    ],
    { isCausal: true, causalAlignment: 'bottom-right' },
  ],
  [
    'window and softcap',
    [
      [1, 2, 90, 16],
      [1, 2, 90, 16],
      [1, 2, 90, 16],
    ],
    { windowSize: [20, 3], softcap: 2 },
  ],
  [
    'a negative scale',
    [
      [1, 1, 20, 16],
      [1, 1, 90, 16],
      [1, 1, 90, 16],
    ],
    { smScale: -0.4 },
  ],
];

describe.each(relaxedRuns ? (['simd128', 'relaxed'] as const) : (['simd128'] as const))(
  'exact attention, %s',
  (simd) => {
    test.each(cases)('%s', async (_, [q, k, v], options) => {
      // An offset by channel, which quantized kernels would smooth away.
      const offsets = random.normals(k.at(-1) as number, 3);
      const keys = random.normals(elementCount(k)).map((x, i) => x + (offsets[i % offsets.length] as number));
      const inputs = { q: draw(q), k: tensor(keys, k), v: draw(v) };
      running = await createExactAttention(inputs, { ...options, simd, threads: 2 });
      const { output } = await running.run();
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), inputs);
      expect(compare(toFloat32(output as Tensor), exact.output).relativeL1, `seed ${random.seed}`).toBeLessThan(BOUND);
    });

    test('masks, LSE, and NaN where a row sees it only', async () => {
      const [shape, hidden, seen] = [[1, 2, 40, 32], 7, 9];
      const inputs = { q: draw(shape), k: draw(shape), v: draw(shape) };
      for (const token of [hidden, seen]) (inputs.k.data as Float32Array)[token * 32] = Number.NaN;
      // Nobody sees one of the two; the first head's last row sees the other.
      const mask = Uint8Array.from({ length: 2 * 40 * 40 }, (_, i) => {
        const [head, row, key] = [Math.floor(i / 1600), Math.floor(i / 40) % 40, i % 40];
        return key === hidden || (key === seen && !(head === 0 && row === 39)) ? 0 : 1;
      });
      const options = { attnMask: tensor(mask, [1, 2, 40, 40]), returnLse: true } as const;
      running = await createExactAttention(inputs, { ...options, simd, threads: 2 });
      const { output, lse } = await running.run();
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), { ...inputs, ...options });
      const values = toFloat32(output as Tensor);
      const poisoned = (i: number) => Math.floor(i / 32) === 39;
      expect(values.findIndex(Number.isNaN)).toBe(39 * 32);
      values.forEach((value, i) => {
        if (poisoned(i)) expect(value).toBeNaN();
        else expect(Math.abs(value - (exact.output[i] as number)), `seed ${random.seed}`).toBeLessThan(1e-5);
      });
      toFloat32(lse as Tensor).forEach((value, row) => {
        if (row !== 39) expect(Math.abs(value - (exact.lse[row] as number))).toBeLessThan(1e-5);
      });
    });

    test('float16 in and out', async () => {
      const half = () => fromFloat32(random.normals(3 * 50 * 64), [1, 3, 50, 64], 'float16');
      const inputs = { q: half(), k: half(), v: half() };
      running = await createExactAttention(inputs, { simd, threads: 1 });
      const { output } = await running.run();
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, {}), inputs);
      expect(output.dtype).toBe('float16');
      expect(compare(toFloat32(output as Tensor), exact.output).relativeL1, `seed ${random.seed}`).toBeLessThan(4e-4);
    });
  },
);
