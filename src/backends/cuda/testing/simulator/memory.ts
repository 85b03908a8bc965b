/**
 * Memories of the simulator: they know which bytes exist, which have been written, and who touched them since the last
 * barrier.
 */

/** Something that a correct kernel never does. */
export class SimulationError extends Error {
  override readonly name = 'SimulationError';
}

/** Where shared memory begins in the shared window; not 0, so that an offset taken for an address shows. */
export const SHARED_BASE = 1024;

/** A buffer of device memory. */
export interface Allocation {
  readonly name: string;
  readonly address: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  /** 1 where a byte has a value; absent where that is not known. */
  readonly written?: Uint8Array;
}

/** Device memory as kernels reach it. */
export interface DeviceAddresses {
  /** The buffer that holds `length` bytes at `address`. */
  at(address: number, length: number, what: string): Allocation;
}

/** Refuses to read what nobody wrote. */
export function requireWritten({ name, written }: Allocation, offset: number, length: number, what: string): void {
  if (written === undefined) return;
  for (let i = offset; i < offset + length; i++) {
    if (written[i] === 0) throw new SimulationError(`${what}: byte ${i} of '${name}' was never written`);
  }
}

/** Buffers of device memory, far apart, so that no offset of one reaches another. */
export class GlobalMemory implements DeviceAddresses {
  readonly #allocations: Required<Allocation>[] = [];
  #next = 0x7f_0000_0000;
  #last: Required<Allocation> | undefined;

  /** Reserves a buffer; `contents` makes its bytes defined. Returns its address, a multiple of 256. */
  allocate(name: string, byteLength: number, contents?: Uint8Array): number {
    const address = this.#next;
    const bytes = new Uint8Array(byteLength);
    const written = new Uint8Array(byteLength);
    if (contents !== undefined) {
      bytes.set(contents);
      written.fill(1, 0, contents.byteLength);
    }
    this.#allocations.push({ name, address, bytes, written, view: new DataView(bytes.buffer) });
    this.#next = Math.ceil((address + byteLength + 2 ** 24) / 256) * 256;
    return address;
  }

  /** A buffer's bytes; which of them have been written is in `written`. */
  read(name: string): { bytes: Uint8Array; written: Uint8Array } {
    const found = this.#allocations.find((allocation) => allocation.name === name);
    if (found === undefined) throw new Error(`no buffer '${name}'`);
    return found;
  }

  at(address: number, length: number, what: string): Allocation {
    let found = this.#last;
    if (found === undefined || address < found.address || address + length > found.address + found.bytes.length) {
      found = this.#allocations.find(
        (allocation) =>
          address >= allocation.address && address + length <= allocation.address + allocation.bytes.length,
      );
      if (found === undefined) throw new SimulationError(`${what}: ${this.#describe(address)} is outside every buffer`);
      this.#last = found;
    }
    if (address % length !== 0) {
      throw new SimulationError(`${what}: ${this.#describe(address)} is not a multiple of ${length}`);
    }
    return found;
  }

  #describe(address: number): string {
    const nearest = this.#allocations.filter((allocation) => allocation.address <= address + 2 ** 20).at(-1);
    return nearest === undefined
      ? `address ${address}`
      : `byte ${address - nearest.address} of '${nearest.name}' (${nearest.bytes.length} bytes)`;
  }
}

const PENDING = 2;

/**
 * Shared memory of a CTA. An access by one warp to a word that another warp touched since the last barrier, one of them
 * writing, is a race; so is any access to a word that `cp.async` is on its way to.
 */
export class SharedMemory {
  readonly bytes: Uint8Array;
  readonly view: DataView;
  /** 0: never written; 1: written; 2: a copy is under way. */
  readonly #state: Uint8Array;
  readonly #writer: Int32Array;
  readonly #writeEpoch: Int32Array;
  readonly #reader: Int32Array;
  readonly #readEpoch: Int32Array;
  /** Barriers passed. */
  epoch = 1;

  constructor(byteLength: number) {
    const words = Math.ceil(byteLength / 4);
    this.bytes = new Uint8Array(words * 4);
    this.view = new DataView(this.bytes.buffer);
    this.#state = new Uint8Array(byteLength);
    this.#writer = new Int32Array(words);
    this.#writeEpoch = new Int32Array(words);
    this.#reader = new Int32Array(words);
    this.#readEpoch = new Int32Array(words);
  }

  /** Whether something but a barrier of all warps orders the last write of a word before what `warp` does now. */
  protected writtenBefore(_word: number, _writer: number, _warp: number): boolean {
    return false;
  }

  /** Likewise of all reads of a word. */
  protected readBefore(_word: number, _warp: number): boolean {
    return false;
  }

  #check(offset: number, length: number, what: string): void {
    if (offset < 0 || offset + length > this.#state.length) {
      throw new SimulationError(`${what}: shared bytes ${offset}..${offset + length} of ${this.#state.length}`);
    }
    if (offset % length !== 0)
      throw new SimulationError(`${what}: shared address ${offset} is not a multiple of ${length}`);
  }

  reads(offset: number, length: number, warp: number, what: string): void {
    this.#check(offset, length, what);
    for (let i = offset; i < offset + length; i++) {
      if (this.#state[i] === 0) throw new SimulationError(`${what}: shared byte ${i} was never written`);
      if (this.#state[i] === PENDING) throw new SimulationError(`${what}: shared byte ${i} has a copy under way`);
    }
    for (let word = offset >> 2; word < (offset + length + 3) >> 2; word++) {
      const writer = this.#writer[word] as number;
      if (this.#writeEpoch[word] === this.epoch && writer !== warp && !this.writtenBefore(word, writer, warp)) {
        throw new SimulationError(
          `${what}: warp ${warp} reads shared word ${word}, written by warp ${this.#writer[word]} with no barrier between`,
        );
      }
      // Two readers: whoever writes races with one of them.
      this.#reader[word] = this.#readEpoch[word] === this.epoch && this.#reader[word] !== warp ? -1 : warp;
      this.#readEpoch[word] = this.epoch;
    }
  }

  writes(offset: number, length: number, warp: number, what: string, state: 1 | 2 = 1): void {
    this.#check(offset, length, what);
    for (let word = offset >> 2; word < (offset + length + 3) >> 2; word++) {
      const writer = this.#writer[word] as number;
      if (this.#writeEpoch[word] === this.epoch && writer !== warp && !this.writtenBefore(word, writer, warp)) {
        throw new SimulationError(
          `${what}: warp ${warp} writes shared word ${word}, written by warp ${this.#writer[word]} with no barrier between`,
        );
      }
      if (this.#readEpoch[word] === this.epoch && this.#reader[word] !== warp && !this.readBefore(word, warp)) {
        throw new SimulationError(
          `${what}: warp ${warp} writes shared word ${word}, read by another warp with no barrier between`,
        );
      }
      this.#writer[word] = warp;
      this.#writeEpoch[word] = this.epoch;
    }
    for (let i = offset; i < offset + length; i++) {
      if (state === 1 && this.#state[i] === PENDING) {
        throw new SimulationError(`${what}: shared byte ${i} is written with a copy under way`);
      }
      this.#state[i] = state;
    }
  }

  /** A bulk copy is under way to these bytes, or has landed; its `mbarrier` orders it with the accesses of threads. */
  bulkCopy(offset: number, length: number, landed: boolean): void {
    this.#state.fill(landed ? 1 : PENDING, offset, offset + length);
  }

  /** A copy announced by `writes(..., 2)` lands. */
  land(offset: number, source: Uint8Array, warp: number): void {
    this.bytes.set(source, offset);
    this.#state.fill(1, offset, offset + source.length);
    for (let word = offset >> 2; word < (offset + source.length) >> 2; word++) {
      this.#writer[word] = warp;
      this.#writeEpoch[word] = this.epoch;
    }
  }
}
