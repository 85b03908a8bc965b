import { describe, expect, it } from 'vitest';
import { fromFloat32, toFloat32 } from './access.ts';
import {
  bitsOf,
  byteLengthOf,
  contiguousStrides,
  emptyTensor,
  extentOf,
  isContiguous,
  NativeFloat16Array,
  slice,
  tensor,
  transpose,
} from './tensor.ts';

describe('tensor', () => {
  it('takes the dtype from the data where that is clear', () => {
    expect(tensor(new Float32Array(6), [2, 3])).toMatchObject({ dtype: 'float32', strides: [3, 1], offset: 0 });
    expect(tensor(new Uint8Array(6), [6]).dtype).toBe('bool');
    expect(tensor(new Uint16Array(6), [6], { dtype: 'bfloat16' }).dtype).toBe('bfloat16');
    if (NativeFloat16Array !== undefined) expect(tensor(new NativeFloat16Array(2), [2]).dtype).toBe('float16');
  });

  it.each([
    ['bits of no stated dtype', () => tensor(new Uint16Array(2), [2]), 'invalid-dtype'],
    [
      'a dtype that the data cannot hold',
      () => tensor(new Float32Array(2), [2], { dtype: 'float16' }),
      'invalid-dtype',
    ],
    ['data that is no typed array', () => tensor([1, 2] as unknown as Float32Array, [2]), 'invalid-dtype'],
    [
      'float64 with a dtype',
      () => tensor(new Float64Array(2) as unknown as Float32Array, [2], { dtype: 'float32' }),
      'invalid-dtype',
    ],
    ['a negative size', () => tensor(new Float32Array(2), [-2]), 'invalid-shape'],
    ['2^53 elements', () => tensor(new Float32Array(2), [2 ** 30, 2 ** 30]), 'invalid-shape'],
    ['too few strides', () => tensor(new Float32Array(2), [1, 2], { strides: [1] }), 'invalid-strides'],
    ['storage too small', () => tensor(new Float32Array(5), [2, 3]), 'buffer-too-small'],
    ['no shape', () => tensor(new Float32Array(2), undefined as unknown as number[]), 'invalid-shape'],
    ['no options', () => tensor(new Float32Array(2), [2], null as unknown as object), 'invalid-option'],
    ['an empty tensor of -1', () => emptyTensor([-1], 'float32'), 'invalid-shape'],
    ['an empty tensor of int8', () => emptyTensor([1], 'int8' as 'float32'), 'invalid-dtype'],
    ['too few values', () => fromFloat32(new Float32Array(2), [3], 'float16'), 'buffer-too-small'],
    ['no order', () => transpose(emptyTensor([1], 'float32'), undefined as unknown as number[]), 'invalid-shape'],
    ['an offset past the end', () => tensor(new Float32Array(6), [2, 3], { offset: 1 }), 'buffer-too-small'],
  ])('refuses %s', (_, call, code) => {
    expect(call).toThrowError(expect.objectContaining({ name: 'InvalidArgumentError', code }));
  });
});

describe('views', () => {
  const base = tensor(
    Float32Array.from({ length: 24 }, (_, i) => i),
    [2, 3, 4],
  );

  it('transpose and slice without copying', () => {
    const view = slice(transpose(base, [1, 0, 2]), 0, 1, 3);
    expect(view).toMatchObject({ shape: [2, 2, 4], strides: [4, 12, 1], offset: 4 });
    expect(view.data).toBe(base.data);
    expect(isContiguous(view)).toBe(false);
    expect(isContiguous(base)).toBe(true);
  });

  it('refuse what does not fit', () => {
    expect(() => transpose(base, [0, 0, 1])).toThrowError(/permutation/);
    expect(() => transpose(base, [0, 1])).toThrowError(/permutation/);
    for (const [start, end] of [
      [-1, 1],
      [2, 1],
      [0, 4],
      [0.5, 2],
    ] as const) {
      expect(() => slice(base, 1, start, end)).toThrowError(expect.objectContaining({ code: 'invalid-shape' }));
    }
    expect(() => slice(base, 3, 0, 1)).toThrowError(/dimension 3/);
  });

  it('reach as far as their strides', () => {
    expect(extentOf({ shape: [2, 3], strides: [10, 2], offset: 5 })).toBe(5 + 10 + 4 + 1);
    expect(extentOf({ shape: [2, 0], strides: [10, 2], offset: 5 })).toBe(0);
    expect(extentOf({ shape: [], strides: [], offset: 5 })).toBe(6);
    expect(contiguousStrides([2, 3, 4])).toEqual([12, 4, 1]);
    expect(isContiguous({ shape: [1, 4], strides: [99, 1] })).toBe(true);
  });
});

describe('fromFloat32', () => {
  it.each(['float32', 'float16', 'bfloat16'] as const)('comes back as %s rounds it', (dtype) => {
    const step = { float32: 2 ** -23, float16: 2 ** -10, bfloat16: 2 ** -7 }[dtype];
    const values = Float32Array.of(1, -2, 1 + step, 0.1);
    const back = toFloat32(fromFloat32(values, [2, 2], dtype));
    expect([...back.subarray(0, 3)]).toEqual([1, -2, 1 + step]);
    expect(Math.abs((back[3] as number) - 0.1)).toBeLessThanOrEqual(0.1 * step);
  });
});

describe('emptyTensor', () => {
  it.each(['float32', 'float16', 'bfloat16'] as const)('holds %s zeros', (dtype) => {
    const view = emptyTensor([2, 5], dtype);
    expect(view.data).toHaveLength(10);
    expect(byteLengthOf(view)).toBe(dtype === 'float32' ? 40 : 20);
    if (dtype !== 'float32') expect(bitsOf(view.data as Uint16Array)).toEqual(new Uint16Array(10));
  });
});
