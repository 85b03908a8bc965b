/** Random attention inputs of the kind that the SageAttention papers measure on. */
import { writeValues } from '../tensor/access.ts';
import type { DType } from '../tensor/dtype.ts';
import { emptyTensor, type Tensor } from '../tensor/tensor.ts';

export interface InputShape {
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly length: number;
  readonly headDim: number;
}

/** Uniform in [0, 1), from 32-bit state; the algorithm is Mulberry32. */
function uniform(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Standard normal (Box and Muller). */
function normal(random: () => number): () => number {
  return () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/**
 * q, k, v of shape `[B,H,L,D]`: standard normal, and K with an offset for each channel (normal, five times as large), the
 * outlier channels of real models that smoothing K is for. Equal seeds give equal tensors.
 */
export function randomInputs(shape: InputShape, dtype: DType, seed: number): { q: Tensor; k: Tensor; v: Tensor } {
  const { batch, heads, kvHeads, length, headDim } = shape;
  const next = normal(uniform(seed));
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
