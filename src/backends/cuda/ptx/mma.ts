/** Products of one warp's tensor core, as data; {@link KernelBuilder.mma} emits them. */
import type { Kind, Reg } from './types.ts';

/**
 * Tensor-core products by PTX's name for them: kinds of the fragments of A, B and of the accumulator, and their
 * registers.
 */
export const MMA = {
  'm16n8k32.row.col.s32.s8.s8.s32': { a: 's8x4', b: 's8x4', d: 's32', registers: [4, 2, 4] },
  'm16n8k64.row.col.s32.s4.s4.s32': { a: 's4x8', b: 's4x8', d: 's32', registers: [4, 2, 4] },
  'm16n8k16.row.col.f32.f16.f16.f32': { a: 'f16x2', b: 'f16x2', d: 'f32', registers: [4, 2, 4] },
  'm16n8k16.row.col.f32.bf16.bf16.f32': { a: 'bf16x2', b: 'bf16x2', d: 'f32', registers: [4, 2, 4] },
  'm16n8k16.row.col.f16.f16.f16.f16': { a: 'f16x2', b: 'f16x2', d: 'f16x2', registers: [4, 2, 2] },
  'm16n8k32.row.col.f32.e4m3.e4m3.f32': { a: 'e4m3x4', b: 'e4m3x4', d: 'f32', registers: [4, 2, 4] },
  'm16n8k32.row.col.f16.e4m3.e4m3.f16': { a: 'e4m3x4', b: 'e4m3x4', d: 'f16x2', registers: [4, 2, 2] },
} as const satisfies Record<string, { a: Kind; b: Kind; d: Kind; registers: readonly [number, number, number] }>;

export type MmaShape = keyof typeof MMA;

/**
 * Block-scaled products of E2M1 (PTX ISA 9.0, `mma` with `block_scale`), and the bytes of a register at which a row's
 * scales may start.
 */
export const BLOCK_SCALED_MMA = {
  /** NVFP4: four UE4M3 scales of 16 elements. */
  'm16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3': { byteIds: [0] },
  /** MXFP4: two UE8M0 scales of 32 elements. */
  'm16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0': { byteIds: [0, 2] },
} as const satisfies Record<string, { byteIds: readonly number[] }>;

export type BlockScaledShape = keyof typeof BLOCK_SCALED_MMA;
export const NVFP4_MMA = 'm16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3';
export const MXFP4_MMA = 'm16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0';

/**
 * A register of scales, the first byte that counts (default 0), and the lane of each four, or pair of lanes, that holds
 * it.
 */
export interface ScaleWord {
  readonly register: Reg<'b32'>;
  readonly byte?: number;
  readonly thread: number;
}
