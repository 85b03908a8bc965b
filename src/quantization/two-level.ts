/** P in two levels (SageAttention3, arXiv 2505.11594, equation 5): the row to 448 * 6, then its blocks. */
import { E2M1_MAX, E2M1_VALUES, e2m1FromNumber } from '../tensor/formats/float4.ts';
import { type Fp4Rules, fp4Block, fp4Scale, quantizeFp4Block } from './fp4-blocks.ts';
import { NVFP4_MAX } from './outer-scale.ts';

/**
 * What a row's largest probability is scaled to before its blocks: their scales then use E4M3's whole range, which P in
 * 0..1 would leave unused (its scales would lie in 0..1/6).
 */
export const P_TWO_LEVEL_MAX = NVFP4_MAX;

const block = /* @__PURE__ */ new Float32Array(32);
const codes = /* @__PURE__ */ new Uint8Array(32);

/**
 * Rounds one row of one tile of P, scaled so that the row's largest is {@link P_TWO_LEVEL_MAX}, in place to what the
 * product with V sees: code times scale. There is no search: P is quantized inside the kernel. Elements that are not
 * finite stay unchanged.
 *
 * @param divisor whether `p` is divided by the rounded scale or, as in the official kernel, by the scale before
 *     rounding
 * @returns the sum of the rounded row: divided by it, the output is a convex combination of V's codes
 */
export function quantizeProbabilities(
  p: Float32Array,
  count: number,
  rules: Fp4Rules,
  divisor: 'rounded' | 'exact' = 'rounded',
): number {
  const size = fp4Block(rules.format);
  const own: Fp4Rules = { ...rules, scaleSearch: 'none' };
  let sum = 0;
  for (let first = 0; first < count; first += size) {
    const end = Math.min(first + size, count);
    let largest = 0;
    for (let i = first; i < end; i++) {
      block[i - first] = p[i] as number;
      largest = Math.max(largest, p[i] as number);
    }
    const scale = fp4Scale(rules.format, quantizeFp4Block(block, end - first, own, codes));
    const exact = largest / E2M1_MAX;
    for (let i = first; i < end; i++) {
      const value = p[i] as number;
      const code =
        divisor === 'rounded' ? (codes[i - first] as number) : exact === 0 ? 0 : e2m1FromNumber(value / exact);
      if (Number.isFinite(value)) p[i] = scale * (E2M1_VALUES[code] as number);
      sum += p[i] as number;
    }
  }
  return sum;
}
