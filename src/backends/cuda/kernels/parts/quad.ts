/** Reductions over the four neighbouring lanes that hold a row of a product's fragment. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg, Value } from '../../ptx/types.ts';

export function quadSum(b: KernelBuilder, value: Reg<'f32'>): Reg<'f32'> {
  const ofPair = b.add(value, b.shflBfly(value, 1));
  return b.add(ofPair, b.shflBfly(ofPair, 2));
}

export function quadMax<K extends 'f32' | 'u32'>(b: KernelBuilder, value: Reg<K>): Reg<K> {
  const larger = (x: Reg<K>, y: Reg<K>) => b.max<K>(x, y as Value<K>);
  const ofPair = larger(value, b.shflBfly(value, 1));
  return larger(ofPair, b.shflBfly(ofPair, 2));
}
