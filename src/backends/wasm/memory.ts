/** Hands out pieces of one WebAssembly memory and takes them back. */
import { ExecutionError } from '../../errors.ts';

const ALIGNMENT = 64;
const PAGE_BYTES = 65536;
/** Address 0 stays free: records use it for "none". */
const FIRST_ADDRESS = 1024;

interface Block {
  start: number;
  end: number;
}

/**
 * First-fit allocation. The memory grows when nothing free is large enough; it never shrinks (WebAssembly has no way
 * to), but freed memory is used again.
 */
export class MemoryPool {
  /** Free ranges by address; neighbours are merged. */
  readonly #free: Block[] = [];
  readonly #limitBytes: number;
  readonly #grow: (pages: number) => void;
  #capacity: number;
  #used = 0;

  /**
   * @param grow adds pages to the memory; throws when the engine refuses
   */
  constructor(initialPages: number, limitPages: number, grow: (pages: number) => void) {
    this.#capacity = initialPages * PAGE_BYTES;
    this.#limitBytes = limitPages * PAGE_BYTES;
    this.#grow = grow;
    if (this.#capacity > FIRST_ADDRESS) this.#free.push({ start: FIRST_ADDRESS, end: this.#capacity });
  }

  /** Bytes that it can ever have. */
  get limitBytes(): number {
    return this.#limitBytes;
  }

  /** Bytes handed out now. */
  get usedBytes(): number {
    return this.#used;
  }

  /** Bytes that the memory has. */
  get capacityBytes(): number {
    return this.#capacity;
  }

  /**
   * @returns the address of `bytes` bytes, aligned to 64; their content is whatever was there
   * @throws {ExecutionError} `out-of-memory`
   */
  allocate(bytes: number): number {
    const size = Math.max(ALIGNMENT, Math.ceil(bytes / ALIGNMENT) * ALIGNMENT);
    let index = this.#free.findIndex((block) => block.end - block.start >= size);
    if (index < 0) {
      this.#extend(size);
      index = this.#free.length - 1;
    }
    const block = this.#free[index] as Block;
    const { start } = block;
    block.start += size;
    if (block.start === block.end) this.#free.splice(index, 1);
    this.#used += size;
    return start;
  }

  /** Gives back what `allocate` returned for the same number of bytes. */
  free(address: number, bytes: number): void {
    const size = Math.max(ALIGNMENT, Math.ceil(bytes / ALIGNMENT) * ALIGNMENT);
    this.#used -= size;
    this.#insert({ start: address, end: address + size });
  }

  #insert(block: Block): void {
    let index = this.#free.findIndex((other) => other.start > block.start);
    if (index < 0) index = this.#free.length;
    const before = this.#free[index - 1];
    const after = this.#free[index];
    if (before?.end === block.start) {
      before.end = block.end;
      if (after?.start === before.end) {
        before.end = after.end;
        this.#free.splice(index, 1);
      }
    } else if (after?.start === block.end) {
      after.start = block.start;
    } else {
      this.#free.splice(index, 0, block);
    }
  }

  #extend(size: number): void {
    const last = this.#free.at(-1);
    const atEnd = last !== undefined && last.end === this.#capacity ? last.end - last.start : 0;
    const missing = Math.ceil((size - atEnd) / PAGE_BYTES);
    const needed = this.#capacity + missing * PAGE_BYTES;
    if (needed > this.#limitBytes) throw this.#outOfMemory(size);
    // Grow by a quarter of what there is where that is more: few growths, bounded waste.
    const generous = Math.ceil(this.#capacity / 4 / PAGE_BYTES);
    const room = (this.#limitBytes - this.#capacity) / PAGE_BYTES;
    const attempts = [Math.min(Math.max(missing, generous), room), missing];
    for (const [i, pages] of attempts.entries()) {
      try {
        this.#grow(pages);
      } catch (cause) {
        if (i + 1 < attempts.length) continue;
        throw this.#outOfMemory(size, cause);
      }
      const start = this.#capacity;
      this.#capacity += pages * PAGE_BYTES;
      this.#insert({ start, end: this.#capacity });
      return;
    }
  }

  #outOfMemory(size: number, cause?: unknown): ExecutionError {
    const mib = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
    return new ExecutionError(
      'out-of-memory',
      `the WASM backend needs ${mib(size)} more in one piece and has ${mib(this.#used)} in use; a WebAssembly memory holds ` +
        `at most ${mib(this.#limitBytes)}`,
      cause,
    );
  }
}
