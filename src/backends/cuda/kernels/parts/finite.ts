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

/**
 * The larger magnitudes of the halves of two words, NaN where either is; signs are of no meaning. One operation, where
 * {@link carryOfExponents} with what gathers it takes three. From sm_86 on.
 */
export function largerMagnitudes(
  b: KernelBuilder,
  format: keyof typeof EXPONENTS,
  first: Reg<'b32'>,
  second: Reg<'b32'>,
  into: Reg<'b32'>,
): void {
  b.maxMagnitude(`${format}x2`, first, second, into);
}
