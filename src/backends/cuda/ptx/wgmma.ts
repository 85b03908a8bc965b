/**
 * Warpgroup products of sm_90a, matrix descriptors and register budgets. Functions that emit into a builder; names are
 * PTX's.
 */
import type { KernelBuilder } from './builder.ts';
import { immediate } from './operands.ts';
import type { Kind, Operand, Reg } from './types.ts';

/**
 * Products by PTX's name without `m64n{N}`: kinds of A's registers and of the accumulator, and what follows `scale-d`.
 */
export const WGMMA = {
  'k32.s32.s8.s8': { a: 's8x4', d: 's32', scales: false, transposes: false },
  'k32.f32.e4m3.e4m3': { a: 'e4m3x4', d: 'f32', scales: true, transposes: false },
  'k32.f16.e4m3.e4m3': { a: 'e4m3x4', d: 'f16x2', scales: true, transposes: false },
  'k16.f32.f16.f16': { a: 'f16x2', d: 'f32', scales: true, transposes: true },
  'k16.f32.bf16.bf16': { a: 'bf16x2', d: 'f32', scales: true, transposes: true },
} as const satisfies Record<string, { a: Kind; d: Kind; scales: boolean; transposes: boolean }>;

export type WgmmaShape = keyof typeof WGMMA;

/** Swizzle modes of matrix descriptors. */
const SWIZZLE_BITS = { none: 0, '128B': 1, '64B': 2, '32B': 3 } as const;

/**
 * Descriptor of a matrix in shared memory (PTX ISA, "Matrix Descriptor Format"). For K-major tiles of 128-byte rows
 * with the 128-byte swizzle: `strideBytes` 1024 (eight rows), `leadingBytes` not used. A step of `n` bytes along K
 * inside the swizzle's 128 bytes adds `n / 16`, see {@link advanceDescriptor}.
 */
export function matrixDescriptor(
  b: KernelBuilder,
  address: Reg<'shared'>,
  options: { leadingBytes?: number; strideBytes: number; swizzle: keyof typeof SWIZZLE_BITS },
): Reg<'u64'> {
  const start = b.shr(b.and(b.as(address, 'u32'), 0x3ffff), 4);
  const low = b.or(start, ((options.leadingBytes ?? 16) >> 4) << 16);
  const high = b.constant('u32', (options.strideBytes >> 4) + SWIZZLE_BITS[options.swizzle] * 2 ** 30);
  return b.pack('u64', low, high);
}

/** A descriptor of the same matrix `bytes` further. */
export function advanceDescriptor(b: KernelBuilder, descriptor: Reg<'u64'>, bytes: number): Reg<'u64'> {
  return bytes === 0 ? descriptor : b.add(descriptor, bytes >> 4);
}

/**
 * D (64 x n over the warpgroup) = A B, plus D where `accumulate` is true. `a`: registers (of `mma`'s A fragment for
 * each warp's 16 rows), or a descriptor. `d` must not be touched until {@link wgmmaWaitGroup} says so.
 *
 * @param transposeB only of 16-bit types: B's rows are its channels (MN-major)
 */
export function wgmma<S extends WgmmaShape>(
  b: KernelBuilder,
  n: number,
  shape: S,
  d: readonly Reg<(typeof WGMMA)[S]['d']>[],
  a: readonly Reg<(typeof WGMMA)[S]['a']>[] | Reg<'u64'>,
  descriptorB: Reg<'u64'>,
  accumulate: Reg<'pred'> | boolean,
  transposeB = false,
): void {
  const { scales, transposes, d: accumulator } = WGMMA[shape];
  const expected = (n * 64) / 128 / (accumulator === 'f16x2' ? 2 : 1);
  const inRegisters = Array.isArray(a);
  if (n % 8 !== 0 || n < 8 || n > 256 || d.length !== expected || (inRegisters && a.length !== 4)) {
    throw new RangeError(`wgmma.m64n${n}${shape}: accumulator of ${d.length} registers, expected ${expected}`);
  }
  if (transposeB && !transposes) throw new RangeError(`wgmma ${shape} cannot transpose B`);
  const tail: Operand[] = [];
  if (scales) tail.push(immediate(1), immediate(1));
  if (transposes) tail.push(...(inRegisters ? [] : [immediate(0)]), immediate(transposeB ? 1 : 0));
  b.emit(
    `wgmma.mma_async.sync.aligned.m64n${n}${shape}`,
    [{ type: 'group', registers: d }],
    [
      inRegisters ? { type: 'group', registers: a as readonly Reg[] } : (a as Reg<'u64'>),
      descriptorB,
      typeof accumulate === 'boolean' ? immediate(accumulate ? 1 : 0) : accumulate,
      ...tail,
    ],
    accumulate !== false,
  );
}

/** Orders register accesses before the warpgroup products that follow. */
export function wgmmaFence(b: KernelBuilder): void {
  b.emit('wgmma.fence.sync.aligned', [], []);
}

export function wgmmaCommitGroup(b: KernelBuilder): void {
  b.emit('wgmma.commit_group.sync.aligned', [], []);
}

/** Waits until at most `pending` groups of products are under way. */
export function wgmmaWaitGroup(b: KernelBuilder, pending: number): void {
  b.emit('wgmma.wait_group.sync.aligned', [], [immediate(pending)]);
}

/** Gives registers back to the multiprocessor (`dec`) or waits for more (`inc`); all warps of a warpgroup together. */
export function setMaxNReg(b: KernelBuilder, direction: 'inc' | 'dec', registers: number): void {
  if (registers % 8 !== 0 || registers < 24 || registers > 256) throw new RangeError(`setmaxnreg ${registers}`);
  b.emit(`setmaxnreg.${direction}.sync.aligned.u32`, [], [immediate(registers)]);
}
