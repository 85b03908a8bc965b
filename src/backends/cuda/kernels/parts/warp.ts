/** What the lanes of a warp find together. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';

/** The sum of all lanes' numbers, in every lane; in their own register. */
export function sumOverWarp(b: KernelBuilder, value: Reg<'f32'>): Reg<'f32'> {
  for (let lanes = 1; lanes < 32; lanes *= 2) b.add(value, b.shflBfly(value, lanes), value);
  return value;
}

/** The sum of the lanes' numbers, and of those of the lanes before. */
export function sumsOfWarp(
  b: KernelBuilder,
  lane: Reg<'u32'>,
  own: Reg<'u32'>,
): Readonly<Record<'before' | 'total', Reg<'u32'>>> {
  const before = b.constant('u32', 0);
  const total = b.mov(own);
  for (let mask = 1; mask < 32; mask *= 2) {
    const other = b.shflBfly(total, mask);
    b.when(b.setp('ne', b.and(lane, mask), 0), () => b.add(before, other, before));
    b.add(total, other, total);
  }
  return { before, total };
}
