/** Attention written a second time, as directly as it can be: what the float64 oracle itself is tested against. */
import type { AttentionOptions } from '../../src/attention/options.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';

/** One element of a tensor by its indices; `undefined` broadcasts. */
function element(view: Tensor, values: Float32Array, indices: readonly number[]): number {
  let at = 0;
  const missing = indices.length - view.shape.length;
  view.shape.forEach((size, dimension) => {
    at = at * size + (size === 1 ? 0 : (indices[dimension + missing] as number));
  });
  return values[at] as number;
}

/** Dense attention over HND tensors by the definition; output `[B,Hq,Lq,Dv]` and LSE `[B,Hq,Lq]`, row-major. */
export function naiveAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions,
): { output: number[]; lse: number[] } {
  const [batch, queryHeads, queryLength, dim] = q.shape as [number, number, number, number];
  const [, kvHeads, keyLength, valueDim] = v.shape as [number, number, number, number];
  const [qs, ks, vs] = [toFloat32(q), toFloat32(k), toFloat32(v)];
  const mask = options.attnMask as Tensor | undefined;
  const maskValues = mask === undefined ? undefined : toFloat32(mask);
  const scale = options.smScale ?? dim ** -0.5;
  const [left, right] = (options.windowSize ?? [-1, -1]).map((side) =>
    side === -1 ? Number.POSITIVE_INFINITY : side,
  ) as [number, number];
  const shift = options.causalAlignment === 'bottom-right' ? keyLength - queryLength : 0;
  const output: number[] = [];
  const lse: number[] = [];
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < queryHeads; h++) {
      const kv = Math.floor(h / (queryHeads / kvHeads));
      for (let i = 0; i < queryLength; i++) {
        const weights = Array.from({ length: keyLength }, (_, j) => {
          const distance = j - (i + shift);
          if ((options.isCausal && distance > 0) || -distance > left || distance > right) return 0;
          const bias =
            mask === undefined || maskValues === undefined ? undefined : element(mask, maskValues, [b, h, i, j]);
          if (mask?.dtype === 'bool' ? bias === 0 : bias === Number.NEGATIVE_INFINITY) return 0;
          let score = 0;
          for (let d = 0; d < dim; d++) score += element(q, qs, [b, h, i, d]) * element(k, ks, [b, kv, j, d]);
          score *= scale;
          if (options.softcap) score = options.softcap * Math.tanh(score / options.softcap);
          return Math.exp(score + (mask === undefined || mask.dtype === 'bool' ? 0 : (bias as number)));
        });
        const total = weights.reduce((sum, weight) => sum + weight, 0);
        lse.push(Math.log(total));
        for (let d = 0; d < valueDim; d++) {
          let sum = 0;
          for (let j = 0; j < keyLength; j++) {
            if ((weights[j] as number) > 0) sum += ((weights[j] as number) / total) * element(v, vs, [b, kv, j, d]);
          }
          output.push(sum);
        }
      }
    }
  }
  return { output, lse };
}
