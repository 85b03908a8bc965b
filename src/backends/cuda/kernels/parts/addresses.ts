/** Parameters by name, and addresses computed from them. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';

/** `base + index * bytes`, in 64 bits. */
export function offset(
  b: KernelBuilder,
  base: Reg<'global'>,
  index: Reg<'u32'>,
  bytes: number | Reg<'u32'>,
): Reg<'global'> {
  return b.add(base, b.as(b.mulWide(index, bytes), 'global'));
}

/** `base + index * stride`, the stride a 64-bit parameter in bytes. */
export function offset64(b: KernelBuilder, base: Reg<'global'>, index: Reg<'u32'>, stride: Reg<'u64'>): Reg<'global'> {
  return b.add(base, b.as(b.mul(b.cvt('u64', index), stride), 'global'));
}

/** Splits a linear index: `index % extent` and `index / extent`. */
export function divide(
  b: KernelBuilder,
  index: Reg<'u32'>,
  extent: Reg<'u32'>,
): [rest: Reg<'u32'>, quotient: Reg<'u32'>] {
  const quotient = b.div(index, extent);
  return [b.sub(index, b.mul(quotient, extent)), quotient];
}

/** `u64` parameters by name, in order: pointers, and strides in bytes. */
export function pointers<const N extends string>(b: KernelBuilder, names: readonly N[]): Record<N, Parameter<'u64'>> {
  return Object.fromEntries(names.map((name) => [name, b.parameter(name, 'u64')])) as Record<N, Parameter<'u64'>>;
}

/** `u32` parameters by name, in order. */
export function integers<const N extends string>(b: KernelBuilder, names: readonly N[]): Record<N, Parameter<'u32'>> {
  return Object.fromEntries(names.map((name) => [name, b.parameter(name, 'u32')])) as Record<N, Parameter<'u32'>>;
}

/** Strides of the caller's K and V, in bytes, for kernels that read both. */
export const KEY_VALUE_STRIDES = ['keyBatch', 'keyHead', 'keyToken', 'valueBatch', 'valueHead', 'valueToken'] as const;
/** With Q's before them. */
export const OPERAND_STRIDES = ['queryBatch', 'queryHead', 'queryToken', ...KEY_VALUE_STRIDES] as const;
