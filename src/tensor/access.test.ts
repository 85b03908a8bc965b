import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { operandToFloat32, toFloat32, writeValues } from './access.ts';
import { bfloat16FromNumber } from './formats/bfloat16.ts';
import { float16FromNumber } from './formats/float16.ts';
import { emptyTensor, NativeFloat16Array, slice, tensor, transpose } from './tensor.ts';

const random = new Random(runSeed());
/** Exact in every dtype. */
const integers = (length: number) => Float32Array.from({ length }, () => random.integer(-100, 100));

describe('toFloat32', () => {
  const shape = [2, 3, 5, 4];
  const values = integers(120);
  const tensors = {
    float32: tensor(values, shape),
    float16: tensor(Uint16Array.from(values, float16FromNumber), shape, { dtype: 'float16' }),
    bfloat16: tensor(Uint16Array.from(values, bfloat16FromNumber), shape, { dtype: 'bfloat16' }),
  };

  it.each(Object.entries(tensors))('reads %s: contiguous, transposed and sliced', (_, view) => {
    expect(toFloat32(view)).toEqual(values);
    const at = (b: number, h: number, l: number, d: number) => values[((b * 3 + h) * 5 + l) * 4 + d];
    const swapped = toFloat32(slice(transpose(view, [0, 2, 1, 3]), 1, 2, 4));
    let i = 0;
    for (let b = 0; b < 2; b++)
      for (let l = 2; l < 4; l++)
        for (let h = 0; h < 3; h++) for (let d = 0; d < 4; d++) expect(swapped[i++]).toBe(at(b, h, l, d));
    expect(i).toBe(swapped.length);
    const reversed = toFloat32(transpose(view, [3, 2, 1, 0]));
    expect(reversed[1]).toBe(at(1, 0, 0, 0));
    expect(reversed[119]).toBe(at(1, 2, 4, 3));
  });

  it('reads bool as 0 and 1, stride 0, scalars and nothing', () => {
    expect([...toFloat32(tensor(Uint8Array.of(0, 1, 255), [3]))]).toEqual([0, 1, 1]);
    expect([...toFloat32(tensor(Float32Array.of(7, 8), [3, 2], { strides: [0, 1] }))]).toEqual([7, 8, 7, 8, 7, 8]);
    expect([...toFloat32(tensor(Float32Array.of(1, 2, 3), [], { offset: 2 }))]).toEqual([3]);
    expect(toFloat32(tensor(new Float32Array(0), [2, 0, 4])).length).toBe(0);
  });

  it.runIf(NativeFloat16Array !== undefined)('reads a native Float16Array', () => {
    const native = emptyTensor([3], 'float16');
    writeValues(Float32Array.of(1, -2.5, 65520), native);
    expect([...toFloat32(native)]).toEqual([1, -2.5, Number.POSITIVE_INFINITY]);
  });
});

it('operandToFloat32 gives [B,H,L,D] from the views of a packed QKV tensor', () => {
  // [B,L,3,H,D]
  const values = integers(2 * 3 * 3 * 2 * 4);
  const packed = tensor(values, [2, 3, 3, 2, 4]);
  const layout = { offset: 8, batchStride: 72, headStride: 4, tokenStride: 24 };
  const k = operandToFloat32(packed, layout, { batch: 2, heads: 2, length: 3, dim: 4 });
  for (let b = 0; b < 2; b++)
    for (let h = 0; h < 2; h++)
      for (let l = 0; l < 3; l++)
        for (let d = 0; d < 4; d++) {
          expect(k[((b * 2 + h) * 3 + l) * 4 + d]).toBe(values[(((b * 3 + l) * 3 + 1) * 2 + h) * 4 + d]);
        }
});

describe('writeValues', () => {
  it.each(['float32', 'float16', 'bfloat16'] as const)('rounds to %s once, from float64 and from float32', (dtype) => {
    // Just above halfway between 1 and the next bfloat16: rounding to float32 first would make it a tie.
    const value = 1 + 2 ** -8 + 2 ** -40;
    const target = emptyTensor([2, 2], dtype);
    writeValues(Float64Array.of(value, -value, 0.5, Number.NaN), target);
    const bfloat16 = [1 + 2 ** -7, -1 - 2 ** -7, 0.5, Number.NaN];
    const finer = [1 + 2 ** -8, -1 - 2 ** -8, 0.5, Number.NaN];
    expect([...toFloat32(target)]).toEqual(dtype === 'bfloat16' ? bfloat16 : finer);
    writeValues(Float32Array.of(1, 2, 3, 4), target);
    expect([...toFloat32(target)]).toEqual([1, 2, 3, 4]);
  });

  it('writes strided views and nothing beside them', () => {
    const data = new Float32Array(12).fill(Number.NaN);
    writeValues(Float32Array.of(1, 2, 3, 4), tensor(data, [2, 2], { strides: [1, 4], offset: 1 }));
    expect([...data]).toEqual([NaN, 1, 3, NaN, NaN, 2, 4, NaN, NaN, NaN, NaN, NaN]);
  });
});
