/** Inputs of the CUDA benchmark and their exact results, fast enough for a hundred million elements. */
import { type CudaDevice, type CudaTensor, cudaTensorOn } from '../../src/backends/cuda/index.ts';
import { bfloat16FromNumber, bfloat16ToNumber } from '../../src/tensor/formats/bfloat16.ts';
import type { Random } from '../../test/support/random.ts';

export interface Shape {
  readonly batch: number;
  readonly heads: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly isCausal: boolean;
}

/** Channels after which K's offsets repeat: the smallest head dim that is measured. */
const OFFSETS = 64;
const NORMALS = 2 ** 16;

/**
 * bfloat16 bits of standard normal numbers, drawn from a table; with `offset` each channel has a constant of that size
 * added, as the keys of real models do.
 */
export function normalBits(random: Random, length: number, offset: number): Uint16Array {
  const channels = Array.from({ length: OFFSETS }, () => offset * random.normal());
  // A table for each channel that has an offset of its own; one table if none has.
  const rows = offset === 0 ? 1 : OFFSETS;
  const normals = random.normals(NORMALS);
  const table = new Uint16Array(rows * NORMALS);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < NORMALS; i++) {
      table[row * NORMALS + i] = bfloat16FromNumber((normals[i] as number) + (channels[row] as number));
    }
  }
  const bits = new Uint16Array(length);
  let state = random.integer(1, 2 ** 31 - 1);
  for (let i = 0; i < length; i++) {
    // xorshift32
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    bits[i] = table[(offset === 0 ? 0 : i % OFFSETS) * NORMALS + (state >>> 16)] as number;
  }
  return bits;
}

/** bfloat16 bits on a device; flat without a shape. */
export function sendBits(device: CudaDevice, bits: Uint16Array, shape: readonly number[] = [bits.length]): CudaTensor {
  const memory = device.allocate(bits.byteLength);
  device.call('cuMemcpyHtoDAsync', 'copying', memory.pointer, bits, bits.byteLength, device.stream.handle);
  device.stream.synchronize();
  return cudaTensorOn(memory, 'bfloat16', [...shape]);
}

export interface HostInputs {
  readonly q: Uint16Array;
  readonly k: Uint16Array;
  readonly v: Uint16Array;
}

/** A row of the output: which head of all, and which token. */
export interface SampledRow {
  readonly head: number;
  readonly token: number;
}

/** Rows spread over heads and tokens, the first and the last among them. */
export function sampleRows(random: Random, { batch, heads, tokens }: Shape, count: number): SampledRow[] {
  return Array.from({ length: count }, (_, i) => ({
    head: i === 0 ? 0 : random.integer(0, batch * heads - 1),
    token: i === 0 ? 0 : i === 1 ? tokens - 1 : random.integer(0, tokens - 1),
  }));
}

/** Attention of one row in float64; q, k and v are `[B,H,L,D]` without gaps. */
export function exactRow({ q, k, v }: HostInputs, { tokens, headDim, isCausal }: Shape, row: SampledRow): Float64Array {
  const base = row.head * tokens * headDim;
  const query = Float64Array.from({ length: headDim }, (_, i) =>
    bfloat16ToNumber(q[base + row.token * headDim + i] as number),
  );
  const keys = isCausal ? row.token + 1 : tokens;
  const scores = new Float64Array(keys);
  let maximum = Number.NEGATIVE_INFINITY;
  for (let j = 0; j < keys; j++) {
    let score = 0;
    const at = base + j * headDim;
    for (let i = 0; i < headDim; i++) score += (query[i] as number) * bfloat16ToNumber(k[at + i] as number);
    scores[j] = score / Math.sqrt(headDim);
    maximum = Math.max(maximum, scores[j] as number);
  }
  const output = new Float64Array(headDim);
  let sum = 0;
  for (let j = 0; j < keys; j++) {
    const weight = Math.exp((scores[j] as number) - maximum);
    sum += weight;
    const at = base + j * headDim;
    for (let i = 0; i < headDim; i++)
      output[i] = (output[i] as number) + weight * bfloat16ToNumber(v[at + i] as number);
  }
  return output.map((value) => value / sum);
}
