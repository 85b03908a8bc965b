/** Products of one warp's tensor core, as data; {@link KernelBuilder.mma} emits them. */
import type { Kind } from './types.ts';

/** Tensor-core products by PTX's name for them: kinds of the fragments of A, B and of the accumulator, and their registers. */
export const MMA = {
  'm16n8k32.row.col.s32.s8.s8.s32': { a: 's8x4', b: 's8x4', d: 's32', registers: [4, 2, 4] },
  'm16n8k64.row.col.s32.s4.s4.s32': { a: 's4x8', b: 's4x8', d: 's32', registers: [4, 2, 4] },
  'm16n8k16.row.col.f32.f16.f16.f32': { a: 'f16x2', b: 'f16x2', d: 'f32', registers: [4, 2, 4] },
  'm16n8k16.row.col.f16.f16.f16.f16': { a: 'f16x2', b: 'f16x2', d: 'f16x2', registers: [4, 2, 2] },
  'm16n8k32.row.col.f32.e4m3.e4m3.f32': { a: 'e4m3x4', b: 'e4m3x4', d: 'f32', registers: [4, 2, 4] },
  'm16n8k32.row.col.f16.e4m3.e4m3.f16': { a: 'e4m3x4', b: 'e4m3x4', d: 'f16x2', registers: [4, 2, 2] },
} as const satisfies Record<string, { a: Kind; b: Kind; d: Kind; registers: readonly [number, number, number] }>;

export type MmaShape = keyof typeof MMA;
