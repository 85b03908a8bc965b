/**
 * Rounding of the operands of the gradients' products to 8 bits, INT8 as SageBwd's psi (arXiv 2505.11594, section 4) or E4M3: a scale takes
 * the largest magnitude of a group to the format's.
 *
 * Of what passes by (dO, Q or K) a group is 64 tokens, and `transpose.ts` rounds it once. Of P and dS it is what one own token has of a
 * tile: four lanes hold it, so that its maximum needs no exchange between warps, and what is not a number in it spoils the gradient of
 * that token and of no other. Within psi's tiles of 64 x 64, so that it loses no more.
 */
import type { BackwardPrecision } from '../../../../attention/backward.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { MAGIC } from '../parts/constants.ts';
import { packBytes } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';

export type CodePrecision = Exclude<BackwardPrecision, 'fp16'>;

/** Largest code, and the tensor core's product. */
export const CODE_FORMATS = {
  int8: { most: 127, mma: 'm16n8k32.row.col.s32.s8.s8.s32' },
  fp8: { most: 448, mma: 'm16n8k32.row.col.f32.e4m3.e4m3.f32' },
} as const;

/** A group whose magnitudes are below it has codes as if this were its largest: scales of products stay normal numbers. */
export const SMALLEST_MAXIMUM = 2 ** -100;

/** What elements of a group are multiplied by to give codes, and codes to give elements; NaN of a group whose maximum is none. */
export function codeScalesOf(b: KernelBuilder, precision: CodePrecision, largest: Reg<'f32'>) {
  const { most } = CODE_FORMATS[precision];
  const bounded = b.maxNaN(largest, SMALLEST_MAXIMUM);
  return { toCodes: b.mul(b.rcpApprox(bounded), most), toValues: b.mul(bounded, 1 / most) };
}

/** Four elements as codes in a register, the first lowest. */
export function roundFour(
  b: KernelBuilder,
  precision: CodePrecision,
  elements: readonly Reg<'f32'>[],
  toCodes: Reg<'f32'>,
): Reg<'b32'> {
  if (precision === 'fp8') {
    const [x, y, z, w] = elements.map((element) => b.mul(element, toCodes)) as [
      Reg<'f32'>,
      Reg<'f32'>,
      Reg<'f32'>,
      Reg<'f32'>,
    ];
    return b.as(b.pack('e4m3x4', b.cvtPack('e4m3x2', x, y), b.cvtPack('e4m3x2', z, w)), 'b32');
  }
  // The low byte of 1.5 * 2^23 + n is n.
  const magic = b.constant('f32', MAGIC);
  const words = elements.map((element) => b.as(b.fma(element, toCodes, magic), 'b32'));
  return at(packBytes(b, words), 0);
}
