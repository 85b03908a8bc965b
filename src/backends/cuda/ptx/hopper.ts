/**
 * Instructions of sm_90a: warpgroup products, TMA, barriers in shared memory, clusters, register budgets. Functions that emit
 * into a builder; names are PTX's.
 */
import type { KernelBuilder } from './builder.ts';
import type { Kind, Operand, Reg } from './types.ts';

const immediate = (value: number): Operand => ({ type: 'immediate', kind: 'u32', value });
const memory = (base: Reg, offset = 0): Operand => ({ type: 'memory', base, offset });
const SINK: Operand = { type: 'sink' };

// ---- warpgroup products

/** Products by PTX's name without `m64n{N}`: kinds of A's registers and of the accumulator, and what follows `scale-d`. */
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
 * Descriptor of a matrix in shared memory (PTX ISA, "Matrix Descriptor Format"). For K-major tiles of 128-byte rows with
 * the 128-byte swizzle: `strideBytes` 1024 (eight rows), `leadingBytes` not used. A step of `n` bytes along K inside the
 * swizzle's 128 bytes adds `n / 16`, see {@link advanceDescriptor}.
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
 * D (64 x n over the warpgroup) = A B, plus D where `accumulate` is true. `a`: registers (of `mma`'s A fragment for each
 * warp's 16 rows), or a descriptor. `d` must not be touched until {@link wgmmaWaitGroup} says so.
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

// ---- barriers in shared memory (8 bytes each)

/** Makes a barrier that a phase of `arrivals` arrivals (and the bytes announced to it) completes. */
export function mbarrierInit(b: KernelBuilder, barrier: Reg<'shared'>, arrivals: number, offset = 0): void {
  b.emit('mbarrier.init.shared::cta.b64', [], [memory(barrier, offset), immediate(arrivals)]);
}

/** Makes initialized barriers known to the cluster and to TMA. */
export function fenceMbarrierInit(b: KernelBuilder): void {
  b.emit('fence.mbarrier_init.release.cluster', [], []);
}

export function mbarrierArrive(b: KernelBuilder, barrier: Reg<'shared'>, offset = 0): void {
  b.emit('mbarrier.arrive.shared::cta.b64', [SINK], [memory(barrier, offset)]);
}

/** Arrives, and announces `bytes` more that copies will bring in this phase. */
export function mbarrierArriveExpectTx(b: KernelBuilder, barrier: Reg<'shared'>, bytes: number, offset = 0): void {
  b.emit('mbarrier.arrive.expect_tx.shared::cta.b64', [SINK], [memory(barrier, offset), immediate(bytes)]);
}

/** Arrives at a barrier of another CTA of the cluster, an address from {@link mapa}. */
export function mbarrierArriveRemote(b: KernelBuilder, barrier: Reg<'u32'>, offset = 0): void {
  b.emit('mbarrier.arrive.release.cluster.shared::cluster.b64', [SINK], [memory(barrier, offset)]);
}

/** Whether the phase of this parity is over. Does not wait. */
export function mbarrierTest(
  b: KernelBuilder,
  barrier: Reg<'shared'>,
  parity: Reg<'u32'>,
  offset: number,
  into: Reg<'pred'>,
): void {
  b.emit('mbarrier.test_wait.parity.shared::cta.b64', [into], [memory(barrier, offset), parity]);
}

/** Waits until the phase of this parity has completed. */
export function mbarrierWait(b: KernelBuilder, barrier: Reg<'shared'>, parity: Reg<'u32'>, offset = 0): void {
  b.repeatUntil(() => {
    const done = b.reg('pred');
    b.emit('mbarrier.try_wait.parity.shared::cta.b64', [done], [memory(barrier, offset), parity]);
    return done;
  });
}

// ---- TMA

export interface BulkCopyOptions {
  /** CTAs of the cluster that receive the box, one bit each, as a 16-bit register. */
  readonly multicast?: Reg<'b16'>;
}

/** Copies a box of a tensor map into shared memory; `barrier` learns of its bytes. One thread issues it. */
export function tensorLoad(
  b: KernelBuilder,
  into: Reg<'shared'>,
  map: Reg<'global'>,
  coordinates: readonly Reg<'s32'>[],
  barrier: Reg<'shared'>,
  {
    intoOffset = 0,
    barrierOffset = 0,
    multicast,
  }: BulkCopyOptions & { intoOffset?: number; barrierOffset?: number } = {},
): void {
  const mode = multicast === undefined ? '' : '.multicast::cluster';
  b.emit(
    `cp.async.bulk.tensor.${coordinates.length}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes${mode}`,
    [],
    [
      memory(into, intoOffset),
      { type: 'tensor', map, coordinates },
      memory(barrier, barrierOffset),
      ...(multicast === undefined ? [] : [multicast]),
    ],
  );
}

/** Copies shared memory into a box of a tensor map; complete for reuse of `from` after {@link bulkWaitGroup}. */
export function tensorStore(
  b: KernelBuilder,
  map: Reg<'global'>,
  coordinates: readonly Reg<'s32'>[],
  from: Reg<'shared'>,
): void {
  b.emit(
    `cp.async.bulk.tensor.${coordinates.length}d.global.shared::cta.tile.bulk_group`,
    [],
    [{ type: 'tensor', map, coordinates }, memory(from)],
  );
}

/** Copies `bytes` consecutive bytes (a multiple of 16, both addresses too) from global to shared memory. */
export function bulkLoad(
  b: KernelBuilder,
  into: Reg<'shared'>,
  from: Reg<'global'>,
  bytes: number,
  barrier: Reg<'shared'>,
  barrierOffset = 0,
): void {
  b.emit(
    'cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes',
    [],
    [memory(into), memory(from), immediate(bytes), memory(barrier, barrierOffset)],
  );
}

export function bulkCommitGroup(b: KernelBuilder): void {
  b.emit('cp.async.bulk.commit_group', [], []);
}

/** Waits until at most `pending` groups of bulk stores still read their source. */
export function bulkWaitGroup(b: KernelBuilder, pending: number): void {
  b.emit('cp.async.bulk.wait_group.read', [], [immediate(pending)]);
}

export function prefetchTensorMap(b: KernelBuilder, map: Reg<'global'>): void {
  b.emit('prefetch.tensormap', [], [memory(map)]);
}

/** Makes this thread's shared writes visible to TMA and to warpgroup products. */
export function fenceProxyAsync(b: KernelBuilder): void {
  b.emit('fence.proxy.async.shared::cta', [], []);
}

// ---- warps, warpgroups, clusters

/** Gives registers back to the multiprocessor (`dec`) or waits for more (`inc`); all warps of a warpgroup together. */
export function setMaxNReg(b: KernelBuilder, direction: 'inc' | 'dec', registers: number): void {
  if (registers % 8 !== 0 || registers < 24 || registers > 256) throw new RangeError(`setmaxnreg ${registers}`);
  b.emit(`setmaxnreg.${direction}.sync.aligned.u32`, [], [immediate(registers)]);
}

/** True in one lane of the warp. */
export function electSync(b: KernelBuilder): Reg<'pred'> {
  const [lane, elected] = [b.reg('u32'), b.reg('pred')];
  // `elect.sync d|p, mask` writes two registers joined by a bar.
  b.emit('elect.sync', [{ type: 'pair', first: lane, second: elected }], [immediate(0xffffffff)]);
  return elected;
}

/** The address of the same place in shared memory of another CTA of the cluster. */
export function mapa(b: KernelBuilder, address: Reg<'shared'>, rank: Reg<'u32'>): Reg<'u32'> {
  const mapped = b.reg('u32');
  b.emit('mapa.shared::cluster.u32', [mapped], [address, rank]);
  return mapped;
}

export function clusterArrive(b: KernelBuilder): void {
  b.emit('barrier.cluster.arrive.aligned', [], []);
}

export function clusterWait(b: KernelBuilder): void {
  b.emit('barrier.cluster.wait.aligned', [], []);
}

/** Stores 8x8 matrices of 16-bit elements: the inverse of `ldmatrix`. */
export function stmatrix(
  b: KernelBuilder,
  registers: readonly Reg<'b32' | 'f16x2' | 'bf16x2'>[],
  address: Reg<'shared'>,
  { offset = 0, trans = false } = {},
): void {
  b.emit(
    `stmatrix.sync.aligned.m8n8.x${registers.length}${trans ? '.trans' : ''}.shared.b16`,
    [],
    [memory(address, offset), { type: 'group', registers }],
  );
}
