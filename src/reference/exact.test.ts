import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { denseCall } from '../../test/support/arbitrary-attention.ts';
import { naiveAttention } from '../../test/support/naive.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { toFloat32 } from '../tensor/access.ts';
import { type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { compare, exactAttention, exactAttentionVarlen } from './index.ts';

const seed = runSeed();
const settings = { seed: seed | 0, numRuns: 150 };

const normal = (random: Random, ...shape: number[]) =>
  tensor(random.normals(shape.reduce((product, size) => product * size, 1)), shape);

describe(`exact attention (seed ${seed})`, () => {
  it('agrees with the definition written a second time', () => {
    fc.assert(
      fc.property(denseCall, ({ q, k, v, options }) => {
        const { output, lse } = exactAttention(q, k, v, { ...options, returnLse: true });
        const expected = naiveAttention(q, k, v, options);
        // Two orders of summation in float64, and exponentials that the second one does not shift by the maximum.
        expect(compare(output, expected.output).maxAbsoluteError).toBeLessThan(1e-12);
        expect(compare(lse ?? [], expected.lse).maxAbsoluteError).toBeLessThan(1e-12);
      }),
      settings,
    );
  });

  it('agrees with it about sinks and blocks', () => {
    fc.assert(
      fc.property(denseCall, fc.constantFrom(16, 32), fc.constantFrom(16, 48), (call, rows, keys) => {
        const random = new Random(call.seed);
        const { q, k, v } = call;
        const [batch, heads, lq] = q.shape as [number, number, number];
        const shape = [
          random.uniform() < 0.5 ? 1 : batch,
          heads,
          Math.ceil(lq / rows),
          Math.ceil((k.shape[2] as number) / keys),
        ];
        const length = shape.reduce((product, size) => product * size, 1);
        const map = tensor(
          Uint8Array.from({ length }, () => (random.uniform() < 0.6 ? 1 : 0)),
          shape,
        );
        const sinks = tensor(
          Float32Array.from({ length: heads }, () =>
            random.uniform() < 0.2 ? Number.NEGATIVE_INFINITY : random.normal(),
          ),
          [heads],
        );
        const options = { ...call.options, sinks, blockMask: { rows, keys, map } };
        const { output, lse } = exactAttention(q, k, v, { ...options, returnLse: true });
        const expected = naiveAttention(q, k, v, options);
        expect(compare(output, expected.output).maxAbsoluteError).toBeLessThan(1e-12);
        expect(compare(lse ?? [], expected.lse).maxAbsoluteError).toBeLessThan(1e-12);
      }),
      settings,
    );
  });

  it('is unchanged when a constant is taken from all keys of a sequence', () => {
    fc.assert(
      fc.property(denseCall, fc.double({ min: -4, max: 4, noNaN: true }), ({ q, k, v, options }, constant) => {
        const { softcap: _, ...plain } = options;
        const keys = toFloat32(k);
        // Quarters are exact in float32 beside normal values, so that K - c is K - c.
        const shifted = keys.map((value) => Math.round(value * 4) / 4);
        const offset = Math.round(constant * 4) / 4;
        const whole = (values: Float32Array): Tensor => tensor(values, k.shape);
        const asFloat32 = (x: Tensor) => tensor(toFloat32(x), x.shape);
        const before = exactAttention(asFloat32(q), whole(shifted), asFloat32(v), plain);
        const after = exactAttention(asFloat32(q), whole(shifted.map((value) => value - offset)), asFloat32(v), plain);
        expect(compare(after.output, before.output).maxAbsoluteError).toBeLessThan(1e-12);
      }),
      settings,
    );
  });

  it('averages: with V all ones every row that sees a key is 1, and rows that see none are 0', () => {
    fc.assert(
      fc.property(denseCall, ({ q, k, v, options }) => {
        const ones = tensor(new Float32Array(toFloat32(v).length).fill(1), v.shape);
        const asFloat32 = (x: Tensor) => tensor(toFloat32(x), x.shape);
        const { output, lse } = exactAttention(asFloat32(q), asFloat32(k), ones, { ...options, returnLse: true });
        const valueDim = v.shape[3] as number;
        lse?.forEach((value, row) => {
          const expected = value === Number.NEGATIVE_INFINITY ? 0 : 1;
          for (let d = 0; d < valueDim; d++) expect(output[row * valueDim + d]).toBeCloseTo(expected, 12);
        });
      }),
      settings,
    );
  });

  it('reads NHD and writes NHD', () => {
    const random = new Random(seed);
    const [q, k, v] = [normal(random, 2, 4, 5, 3), normal(random, 2, 2, 7, 3), normal(random, 2, 2, 7, 2)];
    const nhd = (x: Tensor) => transpose(x, [0, 2, 1, 3]);
    const expected = exactAttention(q, k, v);
    const actual = exactAttention(nhd(q), nhd(k), nhd(v), { tensorLayout: 'NHD' });
    expect(actual.shape).toEqual([2, 5, 4, 2]);
    const swapped = toFloat32(nhd(tensor(Float32Array.from(expected.output), [2, 4, 5, 2])));
    expect(Float32Array.from(actual.output)).toEqual(swapped);
    expect(actual.lse).toBeUndefined();
  });

  it('treats packed sequences as one dense call each, empty ones included', () => {
    const random = new Random(seed);
    const cuSeqlensQ = [0, 3, 3, 8, 9];
    const cuSeqlensK = [0, 5, 7, 7, 20];
    const [q, k, v] = [normal(random, 9, 4, 3), normal(random, 20, 2, 3), normal(random, 20, 2, 6)];
    const options = { isCausal: true, causalAlignment: 'bottom-right', returnLse: true } as const;
    const packed = exactAttentionVarlen(q, k, v, cuSeqlensQ, cuSeqlensK, options);
    expect([packed.shape, packed.lseShape]).toEqual([
      [9, 4, 6],
      [4, 9],
    ]);
    for (let b = 0; b < 4; b++) {
      const [startQ, endQ, startK, endK] = [cuSeqlensQ[b], cuSeqlensQ[b + 1], cuSeqlensK[b], cuSeqlensK[b + 1]] as [
        number,
        number,
        number,
        number,
      ];
      const rows = (x: Tensor, start: number, end: number) => {
        const row = (x.shape[1] as number) * (x.shape[2] as number);
        return tensor((x.data as Float32Array).slice(start * row, end * row), [1, end - start, ...x.shape.slice(1)]);
      };
      const dense = exactAttention(rows(q, startQ, endQ), rows(k, startK, endK), rows(v, startK, endK), {
        ...options,
        tensorLayout: 'NHD',
      });
      expect(packed.output.slice(startQ * 24, endQ * 24)).toEqual(dense.output);
      for (let h = 0; h < 4; h++) {
        const length = endQ - startQ;
        expect(packed.lse?.slice(h * 9 + startQ, h * 9 + endQ)).toEqual(dense.lse?.slice(h * length, (h + 1) * length));
      }
    }
  });

  it('keeps NaNs of excluded positions out and those of visible ones in', () => {
    const random = new Random(seed);
    const [q, k, v] = [normal(random, 1, 1, 3, 4), normal(random, 1, 1, 5, 4), normal(random, 1, 1, 5, 2)];
    const clean = exactAttention(q, k, v, { isCausal: true }).output;
    (k.data as Float32Array).fill(Number.NaN, 12);
    (v.data as Float32Array).fill(Number.NaN, 6);
    const attnMask = tensor(Float32Array.of(0, 0, 0, Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY), [5]);
    expect(exactAttention(q, k, v, { isCausal: true }).output).toEqual(clean);
    expect(exactAttention(q, k, v, { attnMask }).output.every(Number.isFinite)).toBe(true);
    expect(exactAttention(q, k, v).output.every(Number.isNaN)).toBe(true);
  });

  it('is finite for scores beyond what exp can take', () => {
    const q = tensor(Float32Array.of(3e4), [1, 1, 1, 1]);
    const k = tensor(Float32Array.of(1, 2, -2), [1, 1, 3, 1]);
    const v = tensor(Float32Array.of(5, 7, 9), [1, 1, 3, 1]);
    const { output, lse } = exactAttention(q, k, v, { returnLse: true });
    expect([...output, ...(lse ?? [])]).toEqual([7, 6e4]);
  });

  it('names what is wrong with its arguments', () => {
    const x = tensor(new Float32Array(4), [1, 1, 2, 2]);
    expect(() => exactAttention(x, x, x, { smoothK: true } as object)).toThrow(/options\.smoothK/);
    expect(() => exactAttentionVarlen(x, x, x, [0, 1], [0, 1], { tensorLayout: 'HND' } as object)).toThrow(
      /tensorLayout/,
    );
    const remote = { ...x, location: 'webgpu' } as unknown as Tensor;
    expect(() => exactAttention(remote, remote, remote)).toThrow(/webgpu/);
    expect(() => exactAttention(x, x, { ...x, data: new Float32Array(3) })).toThrow(/storage of at least 4/);
  });
});
