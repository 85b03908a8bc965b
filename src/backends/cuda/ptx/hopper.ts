/**
 * Hopper's instructions (sm_90a): products of a warpgroup that run beside it (`wgmma`), bulk copies through tensor maps that
 * complete on barriers in shared memory (`mbarrier`), registers moved between warpgroups (`setmaxnreg`), named barriers.
 */
import type { KernelBuilder } from './builder.ts';
import type { AddressKind, Kind, Operand, Parameter, Reg, Value } from './types.ts';

const group = (registers: readonly Reg[]): Operand => ({ type: 'group', registers });
const integer = (value: number): Operand => ({ type: 'immediate', kind: 'u32', value });
const memory = (base: Reg<AddressKind>, offset: number): Operand => ({ type: 'memory', base, offset });
const valueOperand = (value: Value<'u32'>): Operand => (typeof value === 'number' ? integer(value) : value);
/** A result that nobody reads. */
const SINK: Operand = { type: 'label', name: '_' };

// ---- wgmma

/** Swizzles of shared tiles that matrix descriptors know, by the bytes of a row. */
export const DESCRIPTOR_SWIZZLE = { 128: 1, 64: 2, 32: 3 } as const;
export type SwizzleBytes = keyof typeof DESCRIPTOR_SWIZZLE;

/**
 * Where an operand of `wgmma` lies. Rows of `swizzle` bytes, eight to an atom. K-major operands (rows along k): `stride` is the
 * distance of atoms along m or n, `leading` unused. Others (rows along m or n): `stride` is that of atoms along k, `leading`
 * that of neighbouring rows of atoms along m or n.
 */
export interface DescriptorLayout {
  readonly swizzle: SwizzleBytes;
  readonly strideBytes: number;
  readonly leadingBytes?: number;
}

/** A matrix descriptor in two halves: moving the start changes the low one only. */
export interface MatrixDescriptor {
  readonly low: Reg<'b32'>;
  readonly high: Reg<'b32'>;
}

/** The descriptor of an operand that starts at a shared address, a multiple of 16. */
export function matrixDescriptor(b: KernelBuilder, start: Reg<'shared'>, layout: DescriptorLayout): MatrixDescriptor {
  const { swizzle, strideBytes, leadingBytes = 16 } = layout;
  const address = b.shr(b.and(b.as(start, 'b32'), 0x3ffff), 4);
  return {
    low: b.or(address, (leadingBytes >> 4) << 16),
    high: b.constant('b32', (strideBytes >> 4) + DESCRIPTOR_SWIZZLE[swizzle] * 2 ** 30),
  };
}

/** The same descriptor, `bytes` further on. */
export function descriptorAt(b: KernelBuilder, { low, high }: MatrixDescriptor, bytes: number): Reg<'u64'> {
  const start = bytes === 0 ? low : b.as(b.add(b.as(low, 'u32'), bytes >> 4), 'b32');
  return b.pack('u64', start, high);
}

/** Products by operand type: k of an instruction, and the kind of a register of A and of the sums. */
export const WGMMA = {
  s8: { k: 32, a: 's8x4', d: 's32', opcode: 's32.s8.s8' },
  e4m3: { k: 32, a: 'e4m3x4', d: 'f32', opcode: 'f32.e4m3.e4m3' },
  f16: { k: 16, a: 'f16x2', d: 'f32', opcode: 'f32.f16.f16' },
} as const satisfies Record<string, { k: number; a: Kind; d: Kind; opcode: string }>;
export type WgmmaType = keyof typeof WGMMA;

export interface WgmmaOptions {
  /** False: d = a * b. A predicate decides at run time. Default true: d += a * b. */
  readonly accumulate?: boolean | Reg<'pred'>;
  /** B lies along n, not along k: 16-bit types only. */
  readonly transposeB?: boolean;
}

/**
 * d (64 x n) = a (64 x k) * b (k x n) + d for a warpgroup, in the background. Thread t of warp w holds of d, for each 8
 * columns, rows 16w + t/4 and + 8, columns 2(t%4) and the next, as `mma.m16n8` has them.
 *
 * @param d n / 2 registers
 * @param a a descriptor, or the fragment in registers as `mma.m16n8k32` (`m16n8k16`) takes it
 */
export function wgmma<T extends WgmmaType>(
  b: KernelBuilder,
  type: T,
  n: number,
  d: readonly Reg<(typeof WGMMA)[T]['d']>[],
  a: Reg<'u64'> | readonly Reg<(typeof WGMMA)[T]['a']>[],
  bDescriptor: Reg<'u64'>,
  options: WgmmaOptions = {},
): void {
  const { k, opcode } = WGMMA[type];
  const { accumulate = true, transposeB = false } = options;
  const columns = type === 's8' && n > 32 ? 16 : 8;
  if (n % columns !== 0 || n < 8 || n > 256 || d.length !== n / 2) {
    throw new RangeError(`wgmma ${type}: ${n} columns in ${d.length} registers`);
  }
  const scaleD = typeof accumulate === 'boolean' ? b.setp('eq', b.constant('u32', accumulate ? 1 : 0), 1) : accumulate;
  const aOperand = 'type' in a ? a : group(a);
  const inputs: Operand[] = [group(d), aOperand, bDescriptor, scaleD];
  if (type !== 's8') inputs.push(integer(1), integer(1));
  if (type === 'f16') inputs.push(...('type' in a ? [integer(0)] : []), integer(transposeB ? 1 : 0));
  b.emit(`wgmma.mma_async.sync.aligned.m64n${n}k${k}.${opcode}`, [group(d)], inputs.slice(1));
}

/** Before the first `wgmma`, and before one whose registers ordinary instructions wrote. */
export const wgmmaFence = (b: KernelBuilder) => b.emit('wgmma.fence.sync.aligned', [], []);
export const wgmmaCommitGroup = (b: KernelBuilder) => b.emit('wgmma.commit_group.sync.aligned', [], []);
/** Waits until at most `pending` groups of this warpgroup are under way. */
export const wgmmaWaitGroup = (b: KernelBuilder, pending: number) =>
  b.emit('wgmma.wait_group.sync.aligned', [], [integer(pending)]);

// ---- mbarrier

/** A barrier of `count` arrivals a phase, 8 bytes. By one thread, before a barrier of all. */
export function mbarrierInit(b: KernelBuilder, at: Reg<'shared'>, count: number, offset = 0): void {
  b.emit('mbarrier.init.shared::cta.b64', [], [memory(at, offset), integer(count)]);
}

/** Makes initialized barriers known to the copy engine. */
export const fenceMbarrierInit = (b: KernelBuilder) => b.emit('fence.mbarrier_init.release.cluster', [], []);

export function mbarrierArrive(b: KernelBuilder, at: Reg<'shared'>, offset = 0): void {
  b.emit('mbarrier.arrive.shared::cta.b64', [SINK], [memory(at, offset)]);
}

/** Arrives, and makes the phase wait for so many bytes of copies too. */
export function mbarrierArriveExpect(b: KernelBuilder, at: Reg<'shared'>, bytes: Value<'u32'>, offset = 0): void {
  b.emit('mbarrier.arrive.expect_tx.shared::cta.b64', [SINK], [memory(at, offset), valueOperand(bytes)]);
}

/** Waits until the phase of this parity has completed: 0 for the first. */
export function mbarrierWait(b: KernelBuilder, at: Reg<'shared'>, parity: Value<'u32'>, offset = 0): void {
  const incomplete = () => {
    const done = b.reg('pred');
    b.emit('mbarrier.try_wait.parity.shared::cta.b64', [done], [memory(at, offset), valueOperand(parity)]);
    return b.notPred(done);
  };
  b.loop(incomplete, () => {});
}

// ---- bulk copies

/** The generic address of a tensor map among the kernel's parameters, which the copy engine takes. */
export function tensorMapAddress(b: KernelBuilder, parameter: Parameter<'tensorMap'>): Reg<'global'> {
  const inParameters = b.tensorMapAddress(parameter);
  const generic = b.reg('global');
  b.emit('cvta.param.u64', [generic], [inParameters]);
  return generic;
}

export const prefetchTensorMap = (b: KernelBuilder, map: Reg<'global'>) =>
  b.emit('prefetch.tensormap', [], [memory(map, 0)]);

/** Copies the box of a tensor map at `coordinates` (innermost first) to shared memory; its bytes count down at `barrier`. */
export function copyTensor(
  b: KernelBuilder,
  to: Reg<'shared'>,
  map: Reg<'global'>,
  coordinates: readonly Reg<'s32'>[],
  barrier: Reg<'shared'>,
  barrierOffset = 0,
): void {
  b.emit(
    `cp.async.bulk.tensor.${coordinates.length}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes`,
    [],
    [memory(to, 0), { type: 'tensor', map, coordinates }, memory(barrier, barrierOffset)],
  );
}

/** Makes this thread's ordinary writes to shared memory visible to `wgmma` and the copy engine. */
export const fenceProxyAsync = (b: KernelBuilder) => b.emit('fence.proxy.async.shared::cta', [], []);

// ---- warpgroups

/** Takes or gives registers so that each thread of this warpgroup has `count`, a multiple of 8. */
export function setMaxRegisters(b: KernelBuilder, direction: 'inc' | 'dec', count: number): void {
  b.emit(`setmaxnreg.${direction}.sync.aligned.u32`, [], [integer(count)]);
}

/** Waits at one of 16 barriers for `threads` threads to arrive or wait there. */
export function namedBarrierSync(b: KernelBuilder, barrier: Value<'u32'>, threads: number): void {
  b.emit('barrier.sync.aligned', [], [valueOperand(barrier), integer(threads)]);
}

/** Arrives there without waiting. */
export function namedBarrierArrive(b: KernelBuilder, barrier: Value<'u32'>, threads: number): void {
  b.emit('barrier.arrive.aligned', [], [valueOperand(barrier), integer(threads)]);
}

// ---- packed halves

/** E4M3 of a pair of halves, round to nearest even, saturating. */
export function e4m3FromHalves(b: KernelBuilder, pair: Reg<'f16x2'>): Reg<'e4m3x2'> {
  const d = b.reg('e4m3x2');
  b.emit('cvt.rn.satfinite.e4m3x2.f16x2', [d], [pair]);
  return d;
}

/** Larger of each half; NaN where either is. */
export function maxNanHalves(b: KernelBuilder, x: Reg<'f16x2'>, y: Reg<'f16x2'>): Reg<'f16x2'> {
  const d = b.reg('f16x2');
  b.emit('max.NaN.f16x2', [d], [x, y]);
  return d;
}

/** The value of the warp's first lane, known to be the same in all: what descriptors and roles are computed from. */
export function uniform(b: KernelBuilder, value: Reg<'u32'>): Reg<'u32'> {
  const d = b.reg('u32');
  const bits = (value: number): Operand => ({ type: 'immediate', kind: 'b32', value });
  b.emit('shfl.sync.idx.b32', [d], [value, bits(0), bits(31), bits(0xffffffff)]);
  return d;
}
