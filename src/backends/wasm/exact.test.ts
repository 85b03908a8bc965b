/** The kernel that quantizes nothing, in each of its ways and on either thread, against float64. */
import { afterEach, describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact, type ReferenceInputs } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import { elementCount, type Tensor, tensor } from '../../tensor/tensor.ts';
import type { AttentionInputs } from '../backend.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn, type WasmBackend } from './backend.ts';
import type { Simd } from './geometry.ts';
import {
  DOT_PRODUCTS,
  EXACT_KERNEL,
  type ExactWay,
  exactWayOf,
  fastestKernel,
  INTEGER_KERNEL,
} from './kernel-table.ts';

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;
const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
/** Largest relative L1 error: roundings of float32 sums and of a polynomial for 2^x. */
const BOUND = 3e-6;

let backend: WasmBackend | undefined;
afterEach(() => backend?.dispose());

const draw = (shape: readonly number[], scale = 1) => tensor(random.normals(elementCount(shape), scale), shape);

const ROWS = ['one row', 'few rows', 'many rows'] as const;

type Case = readonly [
  name: string,
  way: ExactWay,
  shapes: readonly [q: number[], k: number[], v: number[]],
  AttentionOptions,
];

const same = (shape: number[]): [number[], number[], number[]] => [shape, shape, shape];

const cases: readonly Case[] = [
  ['one query and one key', 'in-place', same([1, 1, 1, 8]), {}],
  [
    'one row over many keys',
    'in-place',
    [
      [2, 3, 1, 64],
      [2, 3, 1001, 64],
      [2, 3, 1001, 64],
    ],
    {},
  ],
  [
    'four heads share a key',
    'in-place',
    [
      [1, 8, 1, 36],
      [1, 2, 70, 36],
      [1, 2, 70, 20],
    ],
    { isCausal: true },
  ],
  [
    'three rows, a window',
    'in-place',
    [
      [1, 2, 3, 12],
      [1, 2, 19, 12],
      [1, 2, 19, 40],
    ],
    { windowSize: [4, 1] },
  ],
  [
    'fewer keys than a vector',
    'at-once',
    [
      [2, 6, 67, 64],
      [2, 2, 3, 64],
      [2, 2, 3, 64],
    ],
    {},
  ],
  [
    'odd lengths, grouped heads',
    'at-once',
    [
      [2, 6, 67, 64],
      [2, 2, 57, 64],
      [2, 2, 57, 64],
    ],
    {},
  ],
  [
    'more rows than a unit has',
    'at-once',
    [
      [1, 1, 300, 16],
      [1, 1, 17, 16],
      [1, 1, 17, 24],
    ],
    { isCausal: true },
  ],
  [
    'head dims that are no multiple of 4',
    'at-once',
    [
      [1, 2, 33, 37],
      [1, 2, 150, 37],
      [1, 2, 150, 51],
    ],
    {},
  ],
  [
    // Many sequences, since the relative error of a few outputs means little where they happen to be near zero.
    'one row of odd head dims',
    'at-once',
    [
      [40, 2, 1, 3],
      [40, 2, 50, 3],
      [40, 2, 50, 1],
    ],
    {},
  ],
  [
    'odd lengths, grouped heads',
    'tiles',
    [
      [2, 6, 67, 64],
      [2, 2, 257, 64],
      [2, 2, 257, 64],
    ],
    {},
  ],
  [
    'head dim 256',
    'at-once',
    [
      [1, 2, 35, 256],
      [1, 1, 140, 256],
      [1, 1, 140, 256],
    ],
    { isCausal: true, causalAlignment: 'bottom-right' },
  ],
  ['window and softcap', 'at-once', same([1, 2, 90, 16]), { windowSize: [20, 3], softcap: 2 }],
  [
    'a negative scale',
    'at-once',
    [
      [1, 1, 20, 16],
      [1, 1, 90, 16],
      [1, 1, 90, 16],
    ],
    { smScale: -0.4 },
  ],
  [
    'a negative scale, one row',
    'in-place',
    [
      [1, 1, 1, 16],
      [1, 1, 90, 16],
      [1, 1, 90, 16],
    ],
    { smScale: -0.4 },
  ],
  [
    'tokens before heads',
    'tiles',
    [
      [2, 131, 4, 40],
      [2, 300, 2, 40],
      [2, 300, 2, 24],
    ],
    { tensorLayout: 'NHD' },
  ],
];

async function attend(inputs: AttentionInputs<Tensor>, options: AttentionOptions, simd: Simd, shortWork: number) {
  backend = createWasmBackendOn({ simd, threads: 2 }, { shortWork });
  const { attnMask } = options;
  const operands = attnMask === undefined ? inputs : { ...inputs, attnMask };
  const problem = createProblem(inputs.q, inputs.k, inputs.v, { ...options, returnLse: true });
  const plan = await backend.plan(problem, chooseOptions(EXACT_KERNEL, problem, {}));
  const outputs = await plan.run(operands, {});
  return {
    problem,
    exact: attentionExact(problem, operands as ReferenceInputs),
    output: toFloat32(outputs.output as Tensor),
    lse: toFloat32(outputs.lse as Tensor),
    dtype: outputs.output.dtype,
  };
}

describe.each(relaxedRuns ? (['simd128', 'relaxed'] as const) : (['simd128'] as const))('%s', (simd) => {
  describe.each([
    ['this thread', Number.POSITIVE_INFINITY],
    ['workers', 0],
  ])('%s', (_, shortWork) => {
    test.each(cases)('%s, %s', async (_name, way, [q, k, v], options) => {
      // An offset by channel, which quantized kernels would smooth away.
      const offsets = random.normals(k.at(-1) as number, 3);
      const keys = random.normals(elementCount(k)).map((x, i) => x + (offsets[i % offsets.length] as number));
      const inputs = { q: draw(q), k: tensor(keys, k), v: draw(v) };
      const { problem, output, lse, exact } = await attend(inputs, options, simd, shortWork);
      expect(exactWayOf(problem)).toBe(way);
      expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(BOUND);
      exact.lse.forEach((value, i) => {
        expect(Math.abs((lse[i] as number) - value), seed).toBeLessThan(2e-5);
      });
    });

    test.each(ROWS)('%s: NaN in keys and values reaches those who see it, and nobody else', async (rows) => {
      const length = { 'one row': 1, 'few rows': 4, 'many rows': 40 }[rows];
      const [tokens, hidden, seen, channel] = [40, 7, 9, 5];
      const inputs = { q: draw([1, 2, length, 32]), k: draw([1, 2, tokens, 32]), v: draw([1, 2, tokens, 32]) };
      const at = (head: number, token: number) => (head * tokens + token) * 32 + channel;
      // Head 0 has spoilt keys, head 1 spoilt values; nobody sees the first of each, the last row sees the second.
      for (const token of [hidden, seen]) {
        (inputs.k.data as Float32Array)[at(0, token)] = Number.NaN;
        (inputs.v.data as Float32Array)[at(1, token)] = Number.POSITIVE_INFINITY;
      }
      const mask = Uint8Array.from({ length: length * tokens }, (_, i) => {
        const [row, key] = [Math.floor(i / tokens), i % tokens];
        return key === hidden || (key === seen && row !== length - 1) ? 0 : 1;
      });
      const options = { attnMask: tensor(mask, [length, tokens]) };
      const { output, exact } = await attend(inputs, options, simd, shortWork);
      output.forEach((value, i) => {
        const [head, row, c] = [Math.floor(i / 32 / length), Math.floor(i / 32) % length, i % 32];
        const spoilt = row === length - 1 && (head === 0 || c === channel);
        if (spoilt) expect(value, seed).not.toSatisfy(Number.isFinite);
        else expect(Math.abs(value - (exact.output[i] as number)), seed).toBeLessThan(1e-5);
      });
    });

    test.each(ROWS)('%s that sees nothing: zeros and -Infinity, in a NaN query too', async (rows) => {
      const length = { 'one row': 1, 'few rows': 4, 'many rows': 40 }[rows];
      const inputs = { q: draw([1, 1, length, 16]), k: draw([1, 1, 20, 16]), v: draw([1, 1, 20, 16]) };
      (inputs.q.data as Float32Array)[3] = Number.NaN;
      const mask = tensor(
        Uint8Array.from({ length: length * 20 }, (_, i) => (i < 20 ? 0 : 1)),
        [length, 20],
      );
      const { output, lse, exact } = await attend(inputs, { attnMask: mask }, simd, shortWork);
      expect([...output.subarray(0, 16)]).toEqual(Array(16).fill(0));
      expect(lse[0]).toBe(Number.NEGATIVE_INFINITY);
      if (length > 1) expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(BOUND);
    });

    test('values at the end of float32 mix without overflow', async () => {
      const inputs = { q: draw([1, 2, 9, 8]), k: draw([1, 2, 30, 8]), v: draw([1, 2, 30, 8]) };
      (inputs.v.data as Float32Array).fill(3.4e38);
      const { output } = await attend(inputs, {}, simd, shortWork);
      for (const value of output) expect(Math.abs(value / 3.4e38 - 1), seed).toBeLessThan(1e-5);
    });

    test('float16 in and out', async () => {
      const half = () => fromFloat32(random.normals(3 * 50 * 64), [1, 3, 50, 64], 'float16');
      const { output, exact, dtype } = await attend({ q: half(), k: half(), v: half() }, {}, simd, shortWork);
      expect(dtype).toBe('float16');
      expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(4e-4);
    });
  });

  test('few keys or rows are not quantized, others are', () => {
    const problem = (rows: number, keys: number, options: AttentionOptions = {}) => {
      const [q, kv] = [draw([1, 1, rows, 8]), draw([1, 1, keys, 8])];
      return createProblem(q, kv, kv, options);
    };
    for (const dotProduct of ['one-step', 'two-steps', '16-bit'] as const) {
      const { exactKeys } = DOT_PRODUCTS[dotProduct];
      expect(fastestKernel(problem(1, 2000), dotProduct)).toBe(EXACT_KERNEL);
      expect(fastestKernel(problem(100, exactKeys), dotProduct)).toBe(EXACT_KERNEL);
      expect(fastestKernel(problem(100, exactKeys + 1), dotProduct)).toBe(INTEGER_KERNEL);
    }
  });
});
