/**
 * Hopper's asynchronous units in the simulator: `wgmma` from matrix descriptors and swizzled tiles, bulk copies through tensor
 * maps, `mbarrier` phases, named barriers, warps that progress apart.
 *
 * Adversarial where the hardware is free: products read their operands and write their sums only when they are waited for (the
 * sums hold nonsense until then), copies land at random times, warps take turns at random. Found are deadlocks, ordinary
 * writes that reach `wgmma` or a copy without `fence.proxy.async`, tiles read before they have landed, too many arrivals, and a
 * stage handed back too early (its new contents meet the old products). The four warps of a warpgroup compute their
 * 16 rows apart; the hardware's requirement that they issue together is not checked.
 *
 * FP8 sums keep 13 mantissa bits and cut off what lies below, see `accumulateTile` of the reference.
 */
import { e4m3ToNumber } from '../../../../tensor/formats/float8.ts';
import { float16Table } from '../../../../tensor/formats/float16.ts';
import type { Instruction, Operand, Reg } from '../../ptx/types.ts';
import { type DeviceAddresses, requireWritten, SharedMemory, SimulationError } from './memory.ts';

/** A tensor map as the copy engine sees it. */
export interface SimulatedTensorMap {
  readonly address: number;
  readonly elementBytes: number;
  /** Innermost first; strides leave out the innermost dimension. */
  readonly dimensions: readonly number[];
  readonly byteStrides: readonly number[];
  readonly box: readonly number[];
  /** Bytes of a swizzled row; 0 for none. */
  readonly swizzleBytes: 0 | 32 | 64 | 128;
}

const HALF = float16Table();
const E4M3 = Float64Array.from({ length: 256 }, (_, code) => e4m3ToNumber(code));
/** Mantissa bits that FP8 products are aligned and cut to. */
const FP8_BITS = 13;
const POISON = 0x7fc0dead;
/** See SHARED_BASE of warp.ts, which imports this file. */
const SHARED_BASE = 1024;

/** XORs the 16-byte chunk in a row of `swizzleBytes` with the bits of the address above its 128-byte line. */
function swizzled(address: number, swizzleBytes: number): number {
  const mask = swizzleBytes / 16 - 1;
  return swizzleBytes === 0 ? address : address ^ (((address >> 7) & mask) << 4);
}

/** Of a byte: written by a thread, readable by the asynchronous units, being copied to. */
const STATE = { ordinary: 1, visible: 2, underWay: 3 } as const;

/** Shared memory that also knows which bytes the asynchronous units may read. */
export class AsyncSharedMemory extends SharedMemory {
  /** 0: never written; else see `STATE`. */
  readonly #async: Uint8Array;
  readonly #unfenced = new Map<number, Set<number>>();

  constructor(byteLength: number) {
    super(byteLength);
    this.#async = new Uint8Array(byteLength);
  }

  override writes(offset: number, length: number, warp: number, what: string, state: 1 | 2 = 1): void {
    super.writes(offset, length, warp, what, state);
    if (this.#async[offset] === STATE.underWay) throw new SimulationError(`${what}: writes under a bulk copy`);
    this.#async.fill(STATE.ordinary, offset, offset + length);
    let words = this.#unfenced.get(warp);
    if (words === undefined) {
      words = new Set();
      this.#unfenced.set(warp, words);
    }
    for (let word = offset >> 2; word < (offset + length + 3) >> 2; word++) words.add(word);
  }

  /** `fence.proxy.async` of a warp. */
  fence(warp: number): void {
    for (const word of this.#unfenced.get(warp) ?? []) {
      for (let i = 4 * word; i < 4 * word + 4; i++)
        if (this.#async[i] === STATE.ordinary) this.#async[i] = STATE.visible;
    }
    this.#unfenced.delete(warp);
  }

  beginCopy(offset: number, length: number, what: string): void {
    if (offset < 0 || offset + length > this.#async.length) throw new SimulationError(`${what}: beyond shared memory`);
    for (let i = offset; i < offset + length; i++) {
      if (this.#async[i] === STATE.underWay) throw new SimulationError(`${what}: two copies to shared byte ${i}`);
      if (this.#async[i] === STATE.ordinary) {
        throw new SimulationError(`${what}: no fence.proxy.async after the ordinary write of shared byte ${i}`);
      }
    }
    this.#async.fill(STATE.underWay, offset, offset + length);
  }

  endCopy(offset: number, contents: Uint8Array): void {
    this.bytes.set(contents, offset);
    this.#async.fill(STATE.visible, offset, offset + contents.length);
  }

  /** Checks a read of 16 bytes by `wgmma`. */
  productReads(offset: number, what: string): void {
    if (offset < 0 || offset + 16 > this.#async.length) throw new SimulationError(`${what}: beyond shared memory`);
    for (let i = offset; i < offset + 16; i++) {
      if (this.#async[i] === STATE.visible) continue;
      const why = ['was never written', 'has no fence.proxy.async after its write', '', 'has a copy under way'];
      throw new SimulationError(`${what}: shared byte ${i} ${why[this.#async[i] as number]}`);
    }
  }
}

interface Barrier {
  readonly count: number;
  arrivals: number;
  bytes: number;
  phase: number;
}

interface PendingCopy {
  readonly offset: number;
  readonly contents: Uint8Array;
  readonly barrier: number;
}

/** A small generator of numbers in [0, 1), so that a schedule can be had again. */
function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** What the warps of a CTA share besides memory. */
export class AsyncUnits {
  readonly shared: AsyncSharedMemory;
  readonly #global: DeviceAddresses;
  readonly #maps: readonly SimulatedTensorMap[];
  readonly random: () => number;
  readonly #barriers = new Map<number, Barrier>();
  readonly #copies: PendingCopy[] = [];
  readonly #named = new Map<number, { arrived: number; waiting: HopperWarp[] }>();
  /** Counts events that may let a waiting warp go on. */
  progress = 0;

  constructor(shared: AsyncSharedMemory, global: DeviceAddresses, maps: readonly SimulatedTensorMap[], seed: number) {
    this.shared = shared;
    this.#global = global;
    this.#maps = maps;
    this.random = randomOf(seed);
  }

  #barrier(address: number, what: string): Barrier {
    const barrier = this.#barriers.get(address);
    if (barrier === undefined) throw new SimulationError(`${what}: no barrier at shared address ${address}`);
    return barrier;
  }

  init(address: number, count: number): void {
    if (address % 8 !== 0) throw new SimulationError(`mbarrier at ${address}, no multiple of 8`);
    this.#barriers.set(address, { count, arrivals: 0, bytes: 0, phase: 0 });
  }

  arrive(address: number, bytes: number, what: string): void {
    const barrier = this.#barrier(address, what);
    barrier.bytes += bytes;
    if (++barrier.arrivals > barrier.count) {
      throw new SimulationError(`${what}: ${barrier.arrivals} arrivals at a barrier of ${barrier.count}`);
    }
    this.#settle(barrier);
  }

  #settle(barrier: Barrier): void {
    this.progress++;
    if (barrier.arrivals !== barrier.count || barrier.bytes !== 0) return;
    barrier.arrivals = 0;
    barrier.phase++;
  }

  /** Whether the phase of this parity has completed. */
  test(address: number, parity: number, what: string): boolean {
    return (this.#barrier(address, what).phase & 1) !== parity;
  }

  /** Reads the box now, lands it now or later. */
  copy(mapIndex: number, to: number, coordinates: readonly number[], barrier: number, what: string): void {
    const map = this.#maps[mapIndex];
    if (map === undefined) throw new SimulationError(`${what}: no tensor map ${mapIndex}`);
    const { box, dimensions, byteStrides, elementBytes, swizzleBytes } = map;
    const rowBytes = (box[0] as number) * elementBytes;
    if (box.length !== coordinates.length) throw new SimulationError(`${what}: ${box.length} dimensions`);
    if (swizzleBytes !== 0 && rowBytes !== swizzleBytes) {
      throw new SimulationError(`${what}: rows of ${rowBytes} bytes swizzled by ${swizzleBytes}`);
    }
    const rows = box.slice(1).reduce((product, size) => product * size, 1);
    const offset = to - SHARED_BASE;
    if (offset % (swizzleBytes === 0 ? 128 : 8 * swizzleBytes) !== 0) {
      throw new SimulationError(`${what}: shared offset ${offset} is not aligned for the swizzle`);
    }
    const contents = new Uint8Array(rows * rowBytes);
    const inner = coordinates[0] as number;
    const innerBytes = Math.min(rowBytes, ((dimensions[0] as number) - inner) * elementBytes);
    if ((inner * elementBytes) % 16 !== 0) throw new SimulationError(`${what}: starts within 16 bytes`);
    for (let row = 0; row < rows; row++) {
      let rest = row;
      let address = map.address + inner * elementBytes;
      let inside = true;
      for (let d = 1; d < box.length; d++) {
        const at = (coordinates[d] as number) + (rest % (box[d] as number));
        rest = Math.floor(rest / (box[d] as number));
        inside &&= at >= 0 && at < (dimensions[d] as number);
        address += at * (byteStrides[d - 1] as number);
      }
      if (!inside) continue;
      for (let byte = 0; byte < innerBytes; byte += 16) {
        const length = Math.min(16, innerBytes - byte);
        const source = this.#global.at(address + byte, 16, what);
        const at = address + byte - source.address;
        requireWritten(source, at, length, what);
        contents.set(source.bytes.subarray(at, at + length), swizzled(row * rowBytes + byte, swizzleBytes));
      }
    }
    this.shared.beginCopy(offset, contents.length, what);
    this.#barrier(barrier, what);
    this.#copies.push({ offset, contents, barrier });
    if (this.random() < 0.3) this.landCopies(1);
  }

  /** Lands up to `count` copies, in any order; false when there was none. */
  landCopies(count: number): boolean {
    if (this.#copies.length === 0) return false;
    for (let i = 0; i < count && this.#copies.length > 0; i++) {
      const [copy] = this.#copies.splice(Math.floor(this.random() * this.#copies.length), 1) as [PendingCopy];
      this.shared.endCopy(copy.offset, copy.contents);
      const barrier = this.#barriers.get(copy.barrier) as Barrier;
      barrier.bytes -= copy.contents.length;
      this.#settle(barrier);
    }
    return true;
  }

  named(id: number, threads: number, warp: HopperWarp, waits: boolean): void {
    let barrier = this.#named.get(id);
    if (barrier === undefined) {
      barrier = { arrived: 0, waiting: [] };
      this.#named.set(id, barrier);
    }
    barrier.arrived += 32;
    if (waits) {
      barrier.waiting.push(warp);
      warp.blocked = `barrier ${id}`;
    }
    if (barrier.arrived < threads) return;
    if (barrier.arrived > threads)
      throw new SimulationError(`${barrier.arrived} threads at barrier ${id} of ${threads}`);
    for (const waiting of barrier.waiting) waiting.blocked = undefined;
    this.#named.delete(id);
    this.progress++;
    this.shared.epoch++;
  }
}

interface Product {
  readonly n: number;
  readonly type: 's8' | 'e4m3' | 'f16';
  /** Row of A's descriptor, or of its registers. */
  readonly aDescriptor: readonly [low: number, high: number] | undefined;
  readonly aRows: readonly number[];
  readonly bDescriptor: readonly [low: number, high: number];
  readonly transposeB: boolean;
  readonly accumulate: boolean;
  readonly sums: Sums;
  readonly what: string;
}

/** Accumulator registers under way: their values, and how many products still write them. */
interface Sums {
  readonly rows: readonly number[];
  readonly values: Float64Array;
  products: number;
}

interface Registers {
  readonly index: number;
  readonly active: number;
  readonly u: Uint32Array;
  readonly i: Int32Array;
  readonly f: Float32Array;
  readonly h: Uint16Array;
  readonly bytes: Uint8Array;
}

const floatBits = new Float32Array(1);
const floatWords = new Uint32Array(floatBits.buffer);

/** What a warp has under way. */
export class HopperWarp {
  readonly #warp: Registers;
  readonly units: AsyncUnits;
  readonly #groups: Product[][] = [[]];
  readonly #sums = new Map<number, Sums>();
  /** Why it does not run. */
  blocked: string | undefined;
  /** It stopped of its own accord, not at a barrier of the CTA. */
  yielded = false;
  /** It waits for an mbarrier since this count of events. */
  failedAt = -1;
  /** The instruction that it last waited at. */
  waitsFor = 'the start';

  constructor(warp: Registers, units: AsyncUnits) {
    this.#warp = warp;
    this.units = units;
  }

  #whole(what: string): void {
    if (this.#warp.active !== 32) throw new SimulationError(`${what}: ${this.#warp.active} lanes`);
  }

  tryWait(address: number, parity: number, what: string): number {
    this.yielded = true;
    this.waitsFor = what;
    const done = this.units.test(address, parity, what);
    this.failedAt = done ? -1 : this.units.progress;
    return done ? 1 : 0;
  }

  named(id: number, threads: number, waits: boolean, what: string): void {
    this.#whole(what);
    this.yielded = true;
    this.units.named(id, threads, this, waits);
  }

  issue(
    type: Product['type'],
    n: number,
    d: readonly number[],
    a: readonly number[],
    bRow: number,
    accumulate: boolean,
    transposeB: boolean,
    what: string,
  ): void {
    this.#whole(what);
    const { u } = this.#warp;
    const descriptor = (row: number) => [u[row] as number, u[row + 32] as number] as const;
    const key = d[0] as number;
    let sums = this.#sums.get(key);
    if (sums === undefined) {
      sums = { rows: d, values: new Float64Array(d.length * 32), products: 0 };
      const from = type === 's8' ? this.#warp.i : this.#warp.f;
      d.forEach((row, r) => {
        (sums as Sums).values.set(from.subarray(row, row + 32), r * 32);
        u.fill(POISON, row, row + 32);
      });
      this.#sums.set(key, sums);
    }
    sums.products++;
    (this.#groups.at(-1) as Product[]).push({
      n,
      type,
      aDescriptor: a.length === 1 ? descriptor(a[0] as number) : undefined,
      aRows: a,
      bDescriptor: descriptor(bRow),
      transposeB,
      accumulate,
      sums,
      what,
    });
  }

  commit(): void {
    this.#groups.push([]);
  }

  wait(pending: number): void {
    while (this.#groups.length - 1 > pending) {
      for (const product of this.#groups.shift() as Product[]) this.#execute(product);
    }
  }

  /** Elements of a shared operand, `rows` x 32 bytes of k. */
  #operand(
    [low, high]: readonly [number, number],
    type: Product['type'],
    firstRow: number,
    rows: number,
    what: string,
  ) {
    const { shared } = this.units;
    const start = (low & 0x3fff) << 4;
    const stride = (high & 0x3fff) << 4;
    const swizzle = [0, 128, 64, 32][high >>> 30] as number;
    const k = type === 'f16' ? 16 : 32;
    const matrix = new Float64Array(rows * k);
    for (let r = 0; r < rows; r++) {
      const row = firstRow + r;
      for (let chunk = 0; chunk < 2; chunk++) {
        const address = swizzled(start + (row >> 3) * stride + (row & 7) * swizzle + chunk * 16, swizzle);
        const at = address - SHARED_BASE;
        shared.productReads(at, what);
        for (let e = 0; e < k / 2; e++) matrix[r * k + chunk * (k / 2) + e] = this.#element(at, e, type);
      }
    }
    return matrix;
  }

  /** The same where rows of shared memory run along n. */
  #transposed([low, high]: readonly [number, number], n: number, what: string): Float64Array {
    const { shared } = this.units;
    const start = (low & 0x3fff) << 4;
    const leading = ((low >>> 16) & 0x3fff) << 4;
    const stride = (high & 0x3fff) << 4;
    const swizzle = [0, 128, 64, 32][high >>> 30] as number;
    const perRow = swizzle / 2;
    const matrix = new Float64Array(n * 16);
    for (let k = 0; k < 16; k++) {
      for (let first = 0; first < n; first += 8) {
        const line = start + Math.floor(first / perRow) * leading + (k >> 3) * stride + (k & 7) * swizzle;
        const at = swizzled(line + (first % perRow) * 2, swizzle) - SHARED_BASE;
        shared.productReads(at, what);
        for (let e = 0; e < 8; e++) matrix[(first + e) * 16 + k] = this.#element(at, e, 'f16');
      }
    }
    return matrix;
  }

  #element(at: number, e: number, type: Product['type']): number {
    const { bytes, view } = this.units.shared;
    if (type === 's8') return view.getInt8(at + e);
    if (type === 'e4m3') return E4M3[bytes[at + e] as number] as number;
    return HALF[view.getUint16(at + 2 * e, true)] as number;
  }

  #fragment(rows: readonly number[], type: Product['type']): Float64Array {
    const { bytes, h } = this.#warp;
    const k = type === 'f16' ? 16 : 32;
    const per = k / 8;
    const matrix = new Float64Array(16 * k);
    rows.forEach((row, register) => {
      for (let lane = 0; lane < 32; lane++) {
        const at = ((lane >> 2) + 8 * (register & 1)) * k + (register >> 1) * (k / 2) + (lane & 3) * per;
        for (let e = 0; e < per; e++) {
          matrix[at + e] =
            type === 'f16'
              ? (HALF[h[(row + lane) * 2 + e] as number] as number)
              : type === 's8'
                ? ((bytes[(row + lane) * 4 + e] as number) << 24) >> 24
                : (E4M3[bytes[(row + lane) * 4 + e] as number] as number);
        }
      }
    });
    return matrix;
  }

  #execute({ n, type, aDescriptor, aRows, bDescriptor, transposeB, accumulate, sums, what }: Product): void {
    const k = type === 'f16' ? 16 : 32;
    const warpInGroup = this.#warp.index & 3;
    const left =
      aDescriptor === undefined
        ? this.#fragment(aRows, type)
        : this.#operand(aDescriptor, type, warpInGroup * 16, 16, what);
    const right = transposeB ? this.#transposed(bDescriptor, n, what) : this.#operand(bDescriptor, type, 0, n, what);
    const { values, rows } = sums;
    for (let lane = 0; lane < 32; lane++) {
      for (let r = 0; r < rows.length; r++) {
        const row = (lane >> 2) + 8 * ((r >> 1) & 1);
        const column = 8 * (r >> 2) + 2 * (lane & 3) + (r & 1);
        const at = r * 32 + lane;
        const before = accumulate ? (values[at] as number) : 0;
        values[at] =
          type === 'e4m3'
            ? alignedSum(before, left, row * k, right, column * k)
            : plainSum(before, left, row * k, right, column * k, k, type === 's8');
      }
    }
    if (--sums.products > 0) return;
    const into = type === 's8' ? this.#warp.i : this.#warp.f;
    rows.forEach((row, r) => {
      for (let lane = 0; lane < 32; lane++) into[row + lane] = values[r * 32 + lane] as number;
    });
    this.#sums.delete(rows[0] as number);
  }

  /** At its end a warp must have nothing under way. */
  finish(): void {
    if (this.#sums.size > 0) throw new SimulationError(`warp ${this.#warp.index} ends with products under way`);
  }
}

function plainSum(
  before: number,
  a: Float64Array,
  aStart: number,
  b: Float64Array,
  bStart: number,
  k: number,
  integers: boolean,
): number {
  let sum = before;
  for (let i = 0; i < k; i++) sum += (a[aStart + i] as number) * (b[bStart + i] as number);
  return integers ? sum | 0 : Math.fround(sum);
}

/** 32 products and the sum, aligned to the largest of them and cut off FP8_BITS below it. */
function alignedSum(before: number, a: Float64Array, aStart: number, b: Float64Array, bStart: number): number {
  let largest = Math.abs(before);
  let sum = before;
  for (let i = 0; i < 32; i++) {
    const product = (a[aStart + i] as number) * (b[bStart + i] as number);
    sum += product;
    const magnitude = Math.abs(product);
    if (magnitude > largest) largest = magnitude;
  }
  if (!Number.isFinite(sum) || largest === 0) return sum;
  floatBits[0] = largest;
  const exponent = ((floatWords[0] as number) >>> 23) - 127;
  const steps = 2 ** (FP8_BITS - exponent);
  let aligned = Math.trunc(before * steps);
  for (let i = 0; i < 32; i++) aligned += Math.trunc((a[aStart + i] as number) * (b[bStart + i] as number) * steps);
  const magnitude = Math.abs(aligned);
  // Carries past the leading bit cost the lowest ones.
  const excess = magnitude < 2 ** (FP8_BITS + 1) ? 1 : 2 ** (Math.floor(Math.log2(magnitude)) - FP8_BITS);
  return (Math.trunc(aligned / excess) * excess) / steps;
}

// ---- code

/** What the compiler of instructions gives. */
interface Emitting {
  row(register: Reg): number;
  value(operand: Operand, as: 'u' | 'i' | 'f'): string;
}

/** A barrier of some of the CTA's warps. */
export const isNamedBarrier = ({ opcode, inputs }: Instruction) =>
  opcode === 'bar.arrive' || (opcode === 'bar.sync' && inputs.length === 2);

/** Instructions after which another warp may run. */
export const endsTurn = (instruction: Instruction) =>
  instruction.opcode.startsWith('mbarrier.try_wait') || isNamedBarrier(instruction);

export const usesHopper = (instructions: readonly Instruction[]) =>
  instructions.some(({ opcode }) => opcode.startsWith('mbarrier.init'));

/** As `laneWise` of the compiler. */
export function hopperLaneWise(emitter: Emitting, { opcode, outputs, inputs }: Instruction): string | undefined {
  const [d] = outputs;
  const [a, b] = inputs;
  if (opcode === 'cvta.param.u64' && d?.type === 'reg' && a?.type === 'reg') {
    return `u[${emitter.row(d)}+l]=u[${emitter.row(a)}+l];u[${emitter.row(d) + 32}+l]=0;`;
  }
  if (opcode === 'mov.b64' && d?.type === 'reg' && a?.type === 'parameter') {
    return `u[${emitter.row(d)}+l]=W.cta.tensorMapIndex(${JSON.stringify(a.name)});u[${emitter.row(d) + 32}+l]=0;`;
  }
  if (opcode === 'max.NaN.f16x2' && d !== undefined && a !== undefined && b !== undefined) {
    return `${emitter.value(d, 'u')}=R.halves(Math.max,${emitter.value(a, 'u')},${emitter.value(b, 'u')});`;
  }
  if (opcode === 'cvt.rn.satfinite.e4m3x2.f16x2' && d !== undefined && a !== undefined) {
    const pair = emitter.value(a, 'u');
    return `${emitter.value(d, 'u')}=R.packE4m3(R.halfTo(${pair}>>>16),R.halfTo(${pair}));`;
  }
  return undefined;
}

/** As `collective` of the compiler; undefined for what is not Hopper's. */
export function hopperCollective(
  emitter: Emitting,
  { opcode, outputs, inputs }: Instruction,
  guarded: (statement: string) => string,
  what: string,
): string | undefined {
  const address = (operand: Operand | undefined) => {
    if (operand?.type !== 'memory') throw new Error(`${opcode}: no address`);
    return `u[${emitter.row(operand.base)}+l]+${operand.offset}`;
  };
  const rows = (operand: Operand | undefined): number[] => {
    if (operand?.type === 'group') return operand.registers.map((register) => emitter.row(register));
    if (operand?.type === 'reg') return [emitter.row(operand)];
    throw new Error(`${opcode}: no registers`);
  };
  const value = (operand: Operand | undefined) => emitter.value(operand as Operand, 'u');
  const [first, second, third] = inputs;
  if (opcode.startsWith('wgmma.mma_async')) {
    const match = opcode.match(/m64n(\d+)k\d+\.\w+\.(\w+)\./);
    const [, n, type] = match as RegExpMatchArray;
    const last = inputs.at(-1);
    const transposed = type === 'f16' && last?.type === 'immediate' && last.value === 1;
    const [b] = rows(second);
    const accumulate = third?.type === 'reg' ? `u[${emitter.row(third)}]===1` : `${value(third)}===1`;
    return `W.hopper.issue('${type}',${n},[${rows(outputs[0])}],[${rows(first)}],${b},${accumulate},${transposed},${what});`;
  }
  switch (opcode) {
    case 'wgmma.fence.sync.aligned':
    case 'fence.mbarrier_init.release.cluster':
    case 'prefetch.tensormap':
      return '';
    case 'wgmma.commit_group.sync.aligned':
      return 'W.hopper.commit();';
    case 'wgmma.wait_group.sync.aligned':
      return `W.hopper.wait(${first?.type === 'immediate' ? first.value : 0});`;
    case 'mbarrier.init.shared::cta.b64':
      return guarded(`W.hopper.units.init(${address(first)},${value(second)});`);
    case 'mbarrier.arrive.shared::cta.b64':
      return guarded(`W.hopper.units.arrive(${address(first)},0,${what});`);
    case 'mbarrier.arrive.expect_tx.shared::cta.b64':
      return guarded(`W.hopper.units.arrive(${address(first)},${value(second)},${what});`);
    case 'mbarrier.test_wait.parity.shared::cta.b64':
    case 'mbarrier.try_wait.parity.shared::cta.b64':
      return guarded(`${value(outputs[0])}=W.hopper.tryWait(${address(first)},${value(second)},${what});`);
    case 'fence.proxy.async.shared::cta':
      return 'W.hopper.units.shared.fence(W.index);';
    case 'bar.sync':
    case 'bar.arrive': {
      const id = first?.type === 'reg' ? `u[${emitter.row(first)}]` : value(first);
      return `W.hopper.named(${id},${value(second)},${opcode === 'bar.sync'},${what});`;
    }
    case 'shfl.sync.idx.b32': {
      const [from] = rows(first);
      const [to] = rows(outputs[0]);
      const lane = second?.type === 'immediate' ? second.value : 0;
      return `u.fill(u[${(from as number) + lane}],${to},${(to as number) + 32});`;
    }
    default:
      break;
  }
  if (opcode.startsWith('setmaxnreg.')) return '';
  if (opcode.startsWith('cp.async.bulk.tensor.') && second?.type === 'tensor') {
    const coordinates = second.coordinates.map((register) => `i[${emitter.row(register)}+l]`);
    return guarded(
      `W.hopper.units.copy(u[${emitter.row(second.map)}+l],${address(first)},[${coordinates}],${address(third)},${what});`,
    );
  }
  return undefined;
}
