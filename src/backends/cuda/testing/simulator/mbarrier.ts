/**
 * What the warps of a CTA share besides memory: `mbarrier` phases, bulk copies through tensor maps that complete them,
 * and named barriers. Copies land at random times.
 */
import { type AsyncSharedMemory, mergeReleased, swizzled } from './async-memory.ts';
import { type DeviceAddresses, requireWritten, SHARED_BASE, SimulationError } from './memory.ts';

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

/** A warp that a named barrier can hold up. */
interface Blockable {
  /** Why it does not run. */
  blocked: string | undefined;
}

interface Barrier {
  readonly count: number;
  arrivals: number;
  bytes: number;
  phase: number;
  /** What those who arrived had done: in this phase, and in those that have ended. */
  arriving: Map<number, number>;
  readonly ended: Map<number, number>;
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

/** The barriers and copies of a CTA. */
export class AsyncUnits {
  readonly shared: AsyncSharedMemory;
  readonly #global: DeviceAddresses;
  readonly #maps: readonly SimulatedTensorMap[];
  readonly random: () => number;
  readonly #barriers = new Map<number, Barrier>();
  readonly #copies: PendingCopy[] = [];
  readonly #named = new Map<number, { arrived: number; waiting: Blockable[] }>();
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
    this.#barriers.set(address, { count, arrivals: 0, bytes: 0, phase: 0, arriving: new Map(), ended: new Map() });
  }

  arrive(address: number, bytes: number, warp: number, what: string): void {
    const barrier = this.#barrier(address, what);
    mergeReleased(barrier.arriving, this.shared.release(warp));
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
    mergeReleased(barrier.ended, barrier.arriving);
    barrier.arriving = new Map();
  }

  /** Whether the phase of this parity has completed; a warp that sees it knows what those did who arrived. */
  test(address: number, parity: number, warp: number, what: string): boolean {
    const { phase, ended } = this.#barrier(address, what);
    if ((phase & 1) === parity) return false;
    this.shared.acquire(warp, ended);
    return true;
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

  named(id: number, threads: number, warp: Blockable, waits: boolean): void {
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
