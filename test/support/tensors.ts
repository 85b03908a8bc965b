/** Tensors for tests: any dtype, any strides, gaps filled with NaN so that a read outside the view shows. */
import { writeValues } from '../../src/tensor/access.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { bitsOf, contiguousStrides, elementCount, extentOf, type Tensor, tensor } from '../../src/tensor/tensor.ts';

const STORAGE = {
  float32: (length: number) => new Float32Array(length).fill(Number.NaN),
  // 0x7e00 is a NaN in float16, 0x7fc0 in bfloat16.
  float16: (length: number) => new Uint16Array(length).fill(0x7e00),
  bfloat16: (length: number) => new Uint16Array(length).fill(0x7fc0),
} as const;

/** A tensor of these row-major values; `strides` and `offset` place it inside storage that is NaN elsewhere. */
export function place(
  values: Float32Array,
  shape: readonly number[],
  dtype: DType,
  strides: readonly number[] = contiguousStrides(shape),
  offset = 0,
): Tensor {
  const slack = 3;
  const view = { shape: [...shape], strides: [...strides], offset };
  const target = tensor(STORAGE[dtype](extentOf(view) + slack), shape, { dtype, strides, offset });
  if (elementCount(shape) > 0) writeValues(values, target);
  return target;
}

/** The storage's bits, to see that a call left them alone. */
export function snapshot(view: Tensor): Uint8Array {
  const { data } = view;
  const words = data instanceof Float32Array || data instanceof Uint8Array ? data : bitsOf(data as Uint16Array);
  return new Uint8Array(words.buffer, words.byteOffset, words.byteLength).slice();
}
