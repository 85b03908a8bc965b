/** Which inputs are not finite: a comparison of outputs says little where they are, and should say so. */
import { toFloat32 } from '../tensor/access.ts';
import type { Tensor } from '../tensor/tensor.ts';

/** Of each tensor with values that are not finite, one phrase: `k holds 3 values that are not finite, first NaN at [0,1,5,2]`. */
export function notFinite(tensors: Readonly<Record<string, Tensor>>): string[] {
  return Object.entries(tensors).flatMap(([name, view]) => {
    let count = 0;
    let first = -1;
    const values = toFloat32(view);
    for (let i = 0; i < values.length; i++) {
      if (Number.isFinite(values[i])) continue;
      count++;
      if (first < 0) first = i;
    }
    if (count === 0) return [];
    const place: number[] = [];
    let rest = first;
    for (const size of [...view.shape].reverse()) {
      place.unshift(rest % size);
      rest = Math.floor(rest / size);
    }
    const many = count === 1 ? '1 value that is' : `${count} values that are`;
    return [`${name} holds ${many} not finite, first ${values[first]} at [${place}]`];
  });
}
