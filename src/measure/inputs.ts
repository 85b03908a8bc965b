/** Random attention inputs of the kind that the SageAttention papers measure on. */
import { writeValues } from '../tensor/access.ts';
import type { DType } from '../tensor/dtype.ts';
import { emptyTensor, type Tensor } from '../tensor/tensor.ts';
import { Random } from './random.ts';

export interface InputShape {
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly length: number;
  readonly headDim: number;
}

/**
 * q, k, v of shape `[B,H,L,D]`: standard normal, and K with an offset for each channel (normal, five times as large),
 * the outlier channels of real models that smoothing K is for. Equal seeds give equal tensors.
 */
export function randomInputs(shape: InputShape, dtype: DType, seed: number): { q: Tensor; k: Tensor; v: Tensor } {
  const { batch, heads, kvHeads, length, headDim } = shape;
  const random = new Random(seed);
  const next = () => random.normal();
  const operand = (operandHeads: number, offset: (channel: number) => number): Tensor => {
    const result = emptyTensor([batch, operandHeads, length, headDim], dtype);
    const values = new Float32Array(batch * operandHeads * length * headDim);
    for (let i = 0; i < values.length; i++) values[i] = next() + offset(i % headDim);
    writeValues(values, result);
    return result;
  };
  const offsets = Array.from({ length: headDim }, () => 5 * next());
  return {
    q: operand(heads, () => 0),
    k: operand(kvHeads, (channel) => offsets[channel] as number),
    v: operand(kvHeads, () => 0),
  };
}
