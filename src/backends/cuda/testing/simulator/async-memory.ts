/**
 * Shared memory with asynchronous units beside the threads: it knows which bytes a fence has made visible to them, and
 * which a copy is on its way to.
 */
import { SharedMemory, SimulationError } from './memory.ts';

/** XORs the 16-byte chunk in a row of `swizzleBytes` with the bits of the address above its 128-byte line. */
export function swizzled(address: number, swizzleBytes: number): number {
  const mask = swizzleBytes / 16 - 1;
  return swizzleBytes === 0 ? address : address ^ (((address >> 7) & mask) << 4);
}

/** States of a byte: written by a thread, readable by the asynchronous units, being copied to. */
const STATE = { ordinary: 1, visible: 2, underWay: 3 } as const;

/** What a warp had done when it arrived at an `mbarrier`, and what it knew that others had: a time of each. */
export type Released = ReadonlyMap<number, number>;

/** Takes the later of the times of each warp. */
export function mergeReleased(into: Map<number, number>, from: Released): void {
  for (const [warp, time] of from) into.set(warp, Math.max(time, into.get(warp) ?? 0));
}

/**
 * Shared memory that also knows which bytes the asynchronous units may read, and what arrivals at `mbarrier`s order
 * among the warps.
 */
export class AsyncSharedMemory extends SharedMemory {
  /** Arrivals of each warp. */
  readonly #times = new Map<number, number>();
  /** Of each warp, up to which time of each other it knows what that did. */
  readonly #known = new Map<number, Map<number, number>>();
  /** When its writer wrote a word, and when each warp last read it. */
  readonly #written = new Map<number, number>();
  readonly #read = new Map<number, Map<number, number>>();
  /** 0: never written; else see `STATE`. */
  readonly #async: Uint8Array;
  readonly #unfenced = new Map<number, Set<number>>();

  constructor(byteLength: number) {
    super(byteLength);
    this.#async = new Uint8Array(byteLength);
  }

  #timeOf(warp: number): number {
    return this.#times.get(warp) ?? 1;
  }

  #knows(warp: number, other: number, time: number): boolean {
    return (this.#known.get(warp)?.get(other) ?? 0) >= time;
  }

  /** `warp` arrives at an `mbarrier`. */
  release(warp: number): Released {
    const released = new Map(this.#known.get(warp));
    const time = this.#timeOf(warp);
    released.set(warp, time);
    this.#times.set(warp, time + 1);
    return released;
  }

  /** `warp` has seen a phase end at which others arrived. */
  acquire(warp: number, released: Released): void {
    let known = this.#known.get(warp);
    if (known === undefined) {
      known = new Map();
      this.#known.set(warp, known);
    }
    mergeReleased(known, released);
  }

  protected override writtenBefore(word: number, writer: number, warp: number): boolean {
    return this.#knows(warp, writer, this.#written.get(word) ?? 0);
  }

  protected override readBefore(word: number, warp: number): boolean {
    return [...(this.#read.get(word) ?? [])].every(
      ([reader, time]) => reader === warp || this.#knows(warp, reader, time),
    );
  }

  override reads(offset: number, length: number, warp: number, what: string): void {
    super.reads(offset, length, warp, what);
    for (let word = offset >> 2; word < (offset + length + 3) >> 2; word++) {
      let readers = this.#read.get(word);
      if (readers === undefined) {
        readers = new Map();
        this.#read.set(word, readers);
      }
      readers.set(warp, this.#timeOf(warp));
    }
  }

  override writes(offset: number, length: number, warp: number, what: string, state: 1 | 2 = 1): void {
    super.writes(offset, length, warp, what, state);
    for (let word = offset >> 2; word < (offset + length + 3) >> 2; word++) {
      this.#written.set(word, this.#timeOf(warp));
      // They were before this.
      this.#read.delete(word);
    }
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
    this.bulkCopy(offset, length, false);
  }

  endCopy(offset: number, contents: Uint8Array): void {
    this.bytes.set(contents, offset);
    this.bulkCopy(offset, contents.length, true);
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
