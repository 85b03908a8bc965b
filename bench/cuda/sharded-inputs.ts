/** Inputs of sharded calls on devices, and the error of what comes out, by rows: a whole output of long sequences is gigabytes. */
import { copyPeer } from '../../src/backends/cuda/driver/copy.ts';
import { type CudaDevice, type CudaTensor, cudaTensorOn, emptyCudaTensor } from '../../src/backends/cuda/index.ts';
import { copyToDevice } from '../../src/backends/cuda/tensor.ts';
import { lengthOf, movesOf, type Span, spansOf, type TokenOrder, totalOf } from '../../src/distributed/shards.ts';
import { compare } from '../../src/reference/metrics.ts';
import { bfloat16ToNumber } from '../../src/tensor/formats/bfloat16.ts';
import type { Random } from '../../test/support/random.ts';
import { exactRow, type HostInputs, normalBits, type SampledRow, type Shape, sampleRows } from './inputs.ts';

const BYTES = 2;

export type Triple<T> = [q: T, k: T, v: T];

/** Of queries, keys that have offsets, and values; `[1,H,L,D]`. */
export function hostInputs(random: Random, { heads, tokens, headDim }: Shape): Triple<Uint16Array> {
  return [0, 1, 0].map((offset) => normalBits(random, heads * tokens * headDim, offset)) as Triple<Uint16Array>;
}

/** A whole tensor on a device. */
export function uploadBits(device: CudaDevice, bits: Uint16Array, { heads, tokens, headDim }: Shape): CudaTensor {
  const memory = device.allocate(bits.byteLength);
  const bytes = new Uint8Array(bits.buffer as ArrayBuffer, bits.byteOffset, bits.byteLength);
  copyToDevice(device, memory, bytes, device.stream);
  device.stream.synchronize();
  return cudaTensorOn(memory, 'bfloat16', [1, heads, tokens, headDim]);
}

/** The tokens of a rank, copied from a whole tensor of any device. */
export function partOf(whole: CudaTensor, device: CudaDevice, spans: readonly Span[]): CudaTensor {
  const [, heads, tokens, headDim] = whole.shape as [number, number, number, number];
  const own = totalOf(spans);
  const part = emptyCudaTensor(device, [1, heads, own, headDim], 'bfloat16');
  const row = headDim * BYTES;
  for (let head = 0; head < heads; head++) {
    let at = 0;
    for (const span of spans) {
      const from = whole.memory.pointer + BigInt((head * tokens + span.start) * row);
      const to = part.memory.pointer + BigInt((head * own + at) * row);
      const source = whole.memory.device;
      copyPeer({ device: source, pointer: from }, { device, pointer: to }, lengthOf(span) * row, device.stream);
      at += lengthOf(span);
    }
  }
  device.stream.synchronize();
  return part;
}

/** Rows of the exact output, to compare others with. */
export interface ExactRows {
  readonly sampled: readonly SampledRow[];
  readonly values: readonly Float64Array[];
}

export function exactRows(random: Random, inputs: Triple<Uint16Array>, shape: Shape, count: number): ExactRows {
  const [q, k, v] = inputs;
  const host: HostInputs = { q, k, v };
  const sampled = sampleRows(random, shape, count);
  return { sampled, values: sampled.map((row) => exactRow(host, shape, row)) };
}

function readRow(part: CudaTensor, head: number, token: number): Float32Array {
  const [, , tokens, headDim] = part.shape as [number, number, number, number];
  const device = part.memory.device;
  const row = new Uint16Array(headDim);
  const from = part.memory.pointer + BigInt((head * tokens + token) * headDim * BYTES);
  const bytes = new Uint8Array(row.buffer);
  device.call('cuMemcpyDtoHAsync', 'reading a row', bytes, from, bytes.length, device.stream.handle);
  device.stream.synchronize();
  return Float32Array.from(row, bfloat16ToNumber);
}

export interface OutputPart {
  readonly rank: number;
  readonly tensor: CudaTensor;
}

/** Relative L1 of the rows that these parts hold; undefined: none of them. */
export function errorOf(
  { sampled, values }: ExactRows,
  parts: readonly OutputPart[],
  { tokens }: Shape,
  { ranks, order }: { readonly ranks: number; readonly order: TokenOrder },
): number | undefined {
  const actual: number[] = [];
  const expected: number[] = [];
  for (const { rank, tensor } of parts) {
    const spans = spansOf(tokens, ranks, rank, order);
    for (const [i, { head, token }] of sampled.entries()) {
      const [move] = movesOf([{ start: token, end: token + 1 }], spans);
      if (move === undefined) continue;
      actual.push(...readRow(tensor, head, move.to));
      expected.push(...(values[i] as Float64Array));
    }
  }
  return actual.length === 0 ? undefined : compare(Float32Array.from(actual), Float64Array.from(expected)).relativeL1;
}
