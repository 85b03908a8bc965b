/** Masks of CPU tensors that say nothing, or say causal: kernels need not read those. */
import { decodeRun } from '../../../tensor/access.ts';
import type { Tensor } from '../../../tensor/tensor.ts';

export interface SimplifiedMask {
  /** The mask that is still needed. */
  readonly attnMask?: Tensor;
  /** The mask is exactly a causal one. */
  readonly causal?: 'top-left' | 'bottom-right';
}

/** Exporters write the lowest float, -10000 or -Infinity. */
const MASKED = -1e4;

/**
 * An additive mask of zeros and a boolean one of trues disappear; a lower triangle becomes `causal`. The mask is
 * `[B or 1,Hq or 1,Lq or 1,Lk or 1]`; anything else in it leaves it as it is. Reads each element at most once.
 */
export function simplifyMask(mask: Tensor, length: number, keys: number): SimplifiedMask {
  const [batch, heads, rows, columns] = mask.shape as [number, number, number, number];
  const [batchStride, headStride, rowStride] = mask.strides as [number, number, number, number];
  // The last key that each row sees, if it sees all before it: Lk - 1 for all rows is no mask at all.
  const diagonal = { 'top-left': 0, 'bottom-right': keys - length };
  const possible = new Set<'none' | 'top-left' | 'bottom-right'>(['none']);
  if (rows === length && columns === keys && length > 1) possible.add('top-left').add('bottom-right');
  const row = new Float32Array(columns);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < rows && possible.size > 0; i++) {
        decodeRun(mask, mask.offset + b * batchStride + h * headStride + i * rowStride, 1, columns, row, 0);
        const visible = visiblePrefix(row, mask.dtype === 'bool');
        for (const kind of possible) {
          const expected = kind === 'none' ? columns : Math.min(columns, Math.max(0, i + diagonal[kind] + 1));
          if (visible !== expected) possible.delete(kind);
        }
      }
    }
  }
  if (possible.has('none')) return {};
  if (possible.has('top-left')) return { causal: 'top-left' };
  return possible.has('bottom-right') ? { causal: 'bottom-right' } : { attnMask: mask };
}

/** Keys seen when a row sees a prefix and nothing else; -1 otherwise. */
function visiblePrefix(row: Float32Array, isBoolean: boolean): number {
  const open = isBoolean ? 1 : 0;
  let visible = 0;
  while (visible < row.length && row[visible] === open) visible++;
  for (let i = visible; i < row.length; i++) {
    const value = row[i] as number;
    if (isBoolean ? value !== 0 : !(value <= MASKED)) return -1;
  }
  return visible;
}
