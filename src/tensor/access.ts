/** Reading and writing the elements of CPU tensors, whatever their dtype and strides. */

import { InvalidArgumentError, reading, textOf, typedArrayName } from '../errors.ts';
import type { DType } from './dtype.ts';
import { decodeBfloat16, encodeBfloat16 } from './formats/bfloat16.ts';
import { decodeFloat16, encodeFloat16 } from './formats/float16.ts';
import {
  contiguousStrides,
  elementCount,
  emptyTensor,
  type OperandLayout,
  requireView,
  type Tensor,
  validateData,
} from './tensor.ts';

/** Copies `count` elements `start, start + stride, ...` of the storage as float32; bool elements become 0 or 1. */
export function decodeRun(
  source: Pick<Tensor, 'data' | 'dtype'>,
  start: number,
  stride: number,
  count: number,
  target: Float32Array,
  at: number,
): void {
  const { data, dtype } = source;
  if (dtype === 'float16') decodeFloat16(data as Uint16Array, target, start, stride, count, at);
  else if (dtype === 'bfloat16') decodeBfloat16(data as Uint16Array, target, start, stride, count, at);
  else if (dtype === 'bool') {
    for (let i = 0; i < count; i++) target[at + i] = data[start + i * stride] === 0 ? 0 : 1;
  } else if (stride === 1) target.set((data as Float32Array).subarray(start, start + count), at);
  else for (let i = 0; i < count; i++) target[at + i] = data[start + i * stride] as number;
}

/** Calls `run` with the storage index and the row-major index of every run of elements along the last dimension. */
function forEachRun(
  shape: readonly number[],
  strides: readonly number[],
  offset: number,
  run: (start: number, at: number) => void,
): void {
  const rowMajor = contiguousStrides(shape);
  const visit = (dimension: number, start: number, at: number): void => {
    if (dimension >= shape.length - 1) {
      run(start, at);
      return;
    }
    for (let i = 0; i < (shape[dimension] as number); i++) {
      visit(dimension + 1, start + i * (strides[dimension] as number), at + i * (rowMajor[dimension] as number));
    }
  };
  if (elementCount(shape) > 0) visit(0, offset, 0);
}

/**
 * All elements of a strided view as a new row-major `Float32Array`. float16 and bfloat16 convert exactly.
 *
 * @throws {InvalidArgumentError} no tensor, or one that its array does not hold
 */
export function toFloat32(view: Tensor): Float32Array {
  requireView('view', view);
  const own = reading('view', () => validateData('view', view));
  const { shape, strides, offset } = own;
  const target = new Float32Array(elementCount(shape));
  const length = shape.at(-1) ?? 1;
  const stride = strides.at(-1) ?? 1;
  forEachRun(shape, strides, offset, (start, at) => decodeRun(own, start, stride, length, target, at));
  return target;
}

/**
 * A new contiguous tensor of float32 values in a dtype, each rounded once to nearest even: how float16 and bfloat16
 * tensors are made where the platform has no `Float16Array`.
 *
 * @param values row-major, as many as the shape has elements
 * @throws {InvalidArgumentError} `invalid-shape`, `invalid-dtype`, `buffer-too-small`
 */
export function fromFloat32<D extends DType>(values: Float32Array, shape: readonly number[], dtype: D): Tensor<D> {
  if (!/^Float(32|64)Array$/.test(typedArrayName.call(values) ?? '')) {
    throw new InvalidArgumentError('invalid-dtype', 'values', 'a Float32Array', textOf(values));
  }
  const target = emptyTensor(shape, dtype);
  if (values.length !== target.data.length) {
    throw new InvalidArgumentError(
      'buffer-too-small',
      'values',
      `${target.data.length} values for shape ${textOf(shape)}`,
      `${values.length} values`,
    );
  }
  writeValues(values, target);
  return target;
}

/** Sizes of an attention operand in `[B,H,L,D]` order. In varlen B is 1 and L the packed length. */
export interface OperandSize {
  readonly batch: number;
  readonly heads: number;
  readonly length: number;
  readonly dim: number;
}

/** An attention operand as a new contiguous `Float32Array` in `[B,H,L,D]` order, whatever its layout in memory. */
export function operandToFloat32(operand: Tensor, layout: OperandLayout, size: OperandSize): Float32Array {
  const { offset, batchStride, headStride, tokenStride } = layout;
  return toFloat32({
    ...operand,
    shape: [size.batch, size.heads, size.length, size.dim],
    strides: [batchStride, headStride, tokenStride, 1],
    offset,
  });
}

/** Writes row-major `values` into a tensor of the same number of elements, rounding once, to nearest even. */
export function writeValues(values: Float32Array | Float64Array, target: Tensor): void {
  const { shape, strides, offset, data, dtype } = target;
  const length = shape.at(-1) ?? 1;
  if ((strides.at(-1) ?? 1) !== 1 && length > 1) {
    // One more dimension of size 1 makes every element a run of its own.
    writeValues(values, { ...target, shape: [...shape, 1], strides: [...strides, 1] });
    return;
  }
  forEachRun(shape, strides, offset, (start, at) => {
    const run = values.subarray(at, at + length);
    if (dtype === 'float16') encodeFloat16(run, data as Uint16Array, start);
    else if (dtype === 'bfloat16') encodeBfloat16(run, data as Uint16Array, start);
    else (data as Float32Array).set(run, start);
  });
}
