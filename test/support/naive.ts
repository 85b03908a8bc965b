/** Attention written a second time, as directly as it can be: what the float64 oracle itself is tested against. */
import type { AttentionOptions } from '../../src/attention/options.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';

type Read = (...indices: number[]) => number;

/** Reads elements by their indices; dimensions of size 1, and missing ones in front, broadcast. */
function reader(view: Tensor): Read {
  const values = toFloat32(view);
  return (...indices) => {
    const missing = indices.length - view.shape.length;
    const at = view.shape.reduce((sum, size, i) => sum * size + (size === 1 ? 0 : (indices[i + missing] as number)), 0);
    return values[at] as number;
  };
}

/** What the mask and the band add to a score; -Infinity: not seen. */
function bias(options: AttentionOptions, shift: number): Read {
  const mask = options.attnMask as Tensor | undefined;
  const read = mask === undefined ? () => 0 : reader(mask);
  const { blockMask } = options;
  const readBlock = blockMask === undefined ? () => 1 : reader(blockMask.map as Tensor);
  const { rows, keys } = blockMask ?? { rows: 1, keys: 1 };
  const isAbsent = (b: number, h: number, i: number, j: number) =>
    readBlock(b, h, Math.floor(i / rows), Math.floor(j / keys)) === 0;
  const side = (size: number | undefined) => (size === undefined || size === -1 ? Number.POSITIVE_INFINITY : size);
  const [left, right] = [side(options.windowSize?.[0]), side(options.windowSize?.[1])];
  return (b, h, i, j) => {
    const distance = (j as number) - ((i as number) + shift);
    if ((options.isCausal && distance > 0) || -distance > left || distance > right) return Number.NEGATIVE_INFINITY;
    if (isAbsent(b as number, h as number, i as number, j as number)) return Number.NEGATIVE_INFINITY;
    const value = read(b as number, h as number, i as number, j as number);
    if (mask?.dtype !== 'bool') return value;
    return value === 0 ? Number.NEGATIVE_INFINITY : 0;
  };
}

const range = (length: number) => Array.from({ length }, (_, i) => i);
const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);

/** Dense attention over HND tensors by the definition; output `[B,Hq,Lq,Dv]` and LSE `[B,Hq,Lq]`, row-major. */
export function naiveAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions,
): { output: number[]; lse: number[] } {
  const [batch, queryHeads, queryLength, dim] = q.shape as [number, number, number, number];
  const [, kvHeads, keyLength, valueDim] = v.shape as [number, number, number, number];
  const [readQ, readK, readV] = [reader(q), reader(k), reader(v)];
  const readBias = bias(options, options.causalAlignment === 'bottom-right' ? keyLength - queryLength : 0);
  const { smScale = dim ** -0.5, softcap = 0 } = options;
  const score: Read = (b, h, i, j) => {
    const kv = Math.floor((h as number) / (queryHeads / kvHeads));
    const raw = sum(
      range(dim).map((d) => readQ(b as number, h as number, i as number, d) * readK(b as number, kv, j as number, d)),
    );
    return softcap === 0 ? raw * smScale : softcap * Math.tanh((raw * smScale) / softcap);
  };
  const sinkOf = options.sinks === undefined ? () => Number.NEGATIVE_INFINITY : reader(options.sinks as Tensor);
  const output: number[] = [];
  const lse: number[] = [];
  for (const b of range(batch)) {
    for (const h of range(queryHeads)) {
      for (const i of range(queryLength)) {
        const seen = range(keyLength).filter((j) => readBias(b, h, i, j) > Number.NEGATIVE_INFINITY);
        const weights = seen.map((j) => Math.exp(score(b, h, i, j) + readBias(b, h, i, j)));
        const total = sum(weights) + Math.exp(sinkOf(h));
        lse.push(Math.log(total));
        for (const d of range(valueDim)) {
          const kv = Math.floor(h / (queryHeads / kvHeads));
          output.push(sum(seen.map((j, at) => ((weights[at] as number) / total) * readV(b, kv, j, d))));
        }
      }
    }
  }
  return { output, lse };
}
