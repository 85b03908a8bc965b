/** Which 16-bit floats are finite, two at a time. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';

/** All bits of the exponents of two halves, and what added to them carries into the sign only if all are set. */
const EXPONENTS = { f16: [0x7c007c00, 0x04000400], bf16: [0x7f807f80, 0x00800080] } as const;

/** Signs of two halves. */
export const SIGN_BITS = 0x80008000;

/** Among others, the {@link SIGN_BITS} of those halves of a word that are not finite. */
export function carryOfExponents(b: KernelBuilder, format: keyof typeof EXPONENTS, word: Reg<'b32'>): Reg<'b32'> {
  const [mask, carry] = EXPONENTS[format];
  return b.as(b.add(b.as(b.and(word, mask), 'u32'), carry), 'b32');
}
