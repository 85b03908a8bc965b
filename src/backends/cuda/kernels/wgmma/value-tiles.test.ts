/**
 * Tiles of V with scales of their own, through the attention kernel and through a growing cache. Kernels run in the
 * simulator.
 */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { prepareKeyValue } from '../../../../api/key-value-cache.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { attentionExact } from '../../../../reference/exact.ts';
import { compare } from '../../../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../../../tensor/access.ts';
import { slice, type Tensor } from '../../../../tensor/tensor.ts';
import type { KernelChoice } from '../../../backend.ts';
import { setBackend } from '../../../registry.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { createSimulatedBackend } from '../../testing/simulator/backend.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';
import { sampledTokens } from '../quantize/channel-statistics.ts';

const KERNEL = 'qk-int8-pv-fp8-cuda-sm90';
/** Relative L1 of the kernel over a row of all heads: 0.04, and room for chance. */
const TOLERANCE = 0.06;
const seed = runSeed();

const normals = (random: Random, shape: readonly number[], scale = 1): Tensor =>
  fromFloat32(
    random.normals(
      shape.reduce((a, b) => a * b),
      scale,
    ),
    shape,
    'float32',
  );

describe(`tiles of V (SAGEATTENTION_SEED=${seed})`, () => {
  const length = 640;
  const rows = 7;
  const heads = 4;

  /** V's tiles differ by powers of two, and one holds a token that the sample has missed. */
  function inputs([dim, valueDim]: readonly [number, number]): { q: Tensor; k: Tensor; v: Tensor; attnMask: Tensor } {
    const random = new Random(seed);
    const sampled = new Set(sampledTokens(length));
    const missed = Array.from({ length: 128 }, (_, i) => 512 + i).find((token) => !sampled.has(token)) as number;
    const magnitudes = [2 ** 12, 1, 0, 2 ** -12, 2 ** 5];
    const v = normals(random, [1, heads, length, valueDim]);
    const values = v.data as Float32Array;
    for (let i = 0; i < values.length; i++) {
      const token = Math.floor(i / valueDim) % length;
      const magnitude = token === missed ? 2 ** 22 : (magnitudes[token >> 7] as number);
      values[i] = (values[i] as number) * magnitude;
    }
    // Rows 0 to 4 see one tile each, row 5 all but the first, row 6 all.
    const mask = Uint8Array.from({ length: rows * length }, (_, i) => {
      const [row, token] = [Math.floor(i / length), i % length];
      return row === 6 || (row === 5 ? token >= 128 : token >> 7 === row) ? 1 : 0;
    });
    return {
      q: normals(random, [1, heads, rows, dim], 0.5),
      k: normals(random, [1, heads, length, dim]),
      v,
      attnMask: {
        location: 'cpu',
        dtype: 'bool',
        data: mask,
        shape: [1, 1, rows, length],
        strides: [0, 0, length, 1],
        offset: 0,
      },
    };
  }

  test.each([
    { dims: [32, 64], accum: 'fp32+fp32', multiprocessors: 1, what: 'one part' },
    { dims: [32, 64], accum: 'fp32', multiprocessors: 1, what: 'one part' },
    { dims: [64, 32], accum: 'fp32+fp32', multiprocessors: 32, what: 'split over CTAs' },
    { dims: [32, 256], accum: 'fp32+fp32', multiprocessors: 1, what: 'columns in parts' },
    { dims: [32, 256], accum: 'fp32', multiprocessors: 1, what: 'serial' },
  ] as const)('$dims, $accum, $what', ({ dims, accum, multiprocessors }) => {
    const given = inputs(dims);
    const problem = createProblem(given.q, given.k, given.v, { attnMask: given.attnMask });
    const choice: KernelChoice = {
      descriptor: descriptorOf(KERNEL),
      qkQuantGran: 'per-thread',
      pvAccumDtype: accum,
      smoothK: true,
      smoothV: false,
      smoothQ: false,
    };
    const { output, buffer } = simulateAttention(problem, choice, { target: 'sm_90a', multiprocessors }, given);
    const exact = attentionExact(problem, given).output;
    const width = dims[1];
    const actual = toFloat32(output);
    for (let row = 0; row < rows; row++) {
      const ofRow = (all: ArrayLike<number>) =>
        Array.from(
          { length: heads * width },
          (_, i) => all[(Math.floor(i / width) * rows + row) * width + (i % width)] as number,
        );
      if (row === 2) expect(ofRow(actual).every((value) => value === 0)).toBe(true);
      else expect(compare(ofRow(actual), ofRow(exact)).relativeL1, `row ${row}`).toBeLessThan(TOLERANCE);
    }
    const { bytes } = buffer('valueTileScale');
    const scales = new Float32Array(bytes.buffer).filter((_, slot) => slot % 2 === 0);
    expect(new Set(scales).size).toBeGreaterThanOrEqual(3);
  });

  test('a cache goes on with the statistics of its first keys, whatever is appended', async () => {
    const random = new Random(seed);
    const backend = createSimulatedBackend(90);
    await setBackend(backend);
    const dim = 32;
    const steps = [600, 5, 90];
    const total = 695;
    const q = normals(random, [1, 4, 4, dim], 0.5);
    const [k, v] = [normals(random, [1, 1, total, dim]), normals(random, [1, 1, total, dim])];
    // The appended values are far larger than the first ones.
    const values = v.data as Float32Array;
    for (let i = 600 * dim; i < values.length; i++) values[i] = (values[i] as number) * 500;
    const part = (of: Tensor, start: number, end: number) => slice(of, 2, start, end);
    const cache = await prepareKeyValue(part(k, 0, 600), part(v, 0, 600), {
      backend: 'cuda',
      kernel: KERNEL,
    });
    try {
      let held = 0;
      for (const step of steps) {
        if (held > 0) await cache.append(part(k, held, held + step), part(v, held, held + step));
        held += step;
        const output = await cache.attend(q);
        const given = { q, k: part(k, 0, held), v: part(v, 0, held) };
        const exact = attentionExact(createProblem(given.q, given.k, given.v, {}), given).output;
        expect(compare(toFloat32(output), exact).relativeL1, `${held} keys`).toBeLessThan(TOLERANCE);
      }
    } finally {
      cache.dispose();
      await backend.dispose();
    }
  });
});
