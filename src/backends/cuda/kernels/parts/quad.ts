/** Reductions over the four neighbouring lanes that hold a row of a product's fragment. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg, Value } from '../../ptx/types.ts';
import { at } from './lists.ts';

export function quadSum(b: KernelBuilder, value: Reg<'f32'>): Reg<'f32'> {
  const ofPair = b.add(value, b.shflBfly(value, 1));
  return b.add(ofPair, b.shflBfly(ofPair, 2));
}

export function quadMax<K extends 'f32' | 'u32'>(b: KernelBuilder, value: Reg<K>): Reg<K> {
  const larger = (x: Reg<K>, y: Reg<K>) => b.max<K>(x, y as Value<K>);
  const ofPair = larger(value, b.shflBfly(value, 1));
  return larger(ofPair, b.shflBfly(ofPair, 2));
}

/** NaN where one of them is. */
export function quadMaxNaN(b: KernelBuilder, value: Reg<'f32'>): Reg<'f32'> {
  const ofPair = b.maxNaN(value, b.shflBfly(value, 1));
  return b.maxNaN(ofPair, b.shflBfly(ofPair, 2));
}

/**
 * Word i of lane t becomes word t of lane i, over the four lanes of a row.
 *
 * @param odd whether t is odd
 * @param upper whether t is 2 or 3
 */
export function transposeInQuad(
  b: KernelBuilder,
  words: readonly Reg<'b32'>[],
  odd: Reg<'pred'>,
  upper: Reg<'pred'>,
): Reg<'b32'>[] {
  const rows = [...words];
  for (const [step, isSecond] of [
    [1, odd],
    [2, upper],
  ] as const) {
    for (const low of step === 1 ? [0, 2] : [0, 1]) {
      const [first, second] = [at(rows, low), at(rows, low + step)];
      const other = b.shflBfly(b.selp(first, second, isSecond), step);
      rows[low] = b.selp(other, first, isSecond);
      rows[low + step] = b.selp(second, other, isSecond);
    }
  }
  return rows;
}
