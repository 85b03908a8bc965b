/** What a device reuses instead of making it anew: memory and events. */
import { InvalidArgumentError } from '../../../errors.ts';
import {
  CU_EVENT_DISABLE_TIMING,
  CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
  CU_MEM_ALLOCATION_TYPE_PINNED,
  CU_MEM_LOCATION_TYPE_DEVICE,
  CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
  STRUCTS,
} from './api.ts';
import type { DeviceContext } from './context.ts';

/**
 * Checks a number of bytes that a caller gave.
 *
 * @throws {InvalidArgumentError} `unsupported-size`
 */
export function requireByteLength(argument: string, byteLength: number): void {
  if (Number.isSafeInteger(byteLength) && byteLength >= 0) return;
  const received = typeof byteLength === 'number' ? String(byteLength) : `a ${typeof byteLength}`;
  throw new InvalidArgumentError('unsupported-size', argument, 'a whole number of bytes, 0 or more', received);
}

/** Device memory, allocated and freed in the order of streams where the driver can. */
export class MemoryPool {
  readonly #context: DeviceContext;
  /** 0n where the device or driver has no stream-ordered allocator, undefined until it is first needed. */
  #pool: bigint | undefined;

  /** @param supported whether device and driver have stream-ordered allocators */
  constructor(context: DeviceContext, supported: boolean) {
    this.#context = context;
    if (!supported) this.#pool = 0n;
  }

  /** A pool of our own: the device's default one may be tuned by the program around us. It keeps freed memory. */
  #create(): bigint {
    const context = this.#context;
    const layout = STRUCTS.CUmemPoolProps;
    const properties = new DataView(new ArrayBuffer(layout.size));
    properties.setInt32(layout.allocType, CU_MEM_ALLOCATION_TYPE_PINNED, true);
    properties.setInt32(layout['location.type'], CU_MEM_LOCATION_TYPE_DEVICE, true);
    properties.setInt32(layout['location.id'], context.deviceHandle, true);
    const pool = context.create('cuMemPoolCreate', `creating a memory pool on ${context}`, properties);
    const keepAll = BigUint64Array.of(0xffff_ffff_ffff_ffffn);
    const what = 'setting up the memory pool';
    try {
      context.call('cuMemPoolSetAttribute', what, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, keepAll);
    } catch (error) {
      context.release(() => context.call('cuMemPoolDestroy', 'destroying the memory pool', pool));
      throw error;
    }
    return pool;
  }

  /**
   * The address of memory of undefined contents, a multiple of 256; 0n for no bytes.
   *
   * @param stream handle of the stream in whose order it is allocated
   */
  allocate(byteLength: number, stream: bigint): bigint {
    requireByteLength('byteLength', byteLength);
    if (byteLength === 0) return 0n;
    const context = this.#context;
    const what = `allocating ${byteLength} bytes on ${context}`;
    this.#pool ??= this.#create();
    return this.#pool === 0n
      ? context.create('cuMemAlloc', what, byteLength)
      : context.create('cuMemAllocFromPoolAsync', what, byteLength, this.#pool, stream);
  }

  /** Frees memory of {@link allocate} after what `stream` holds now. */
  free(pointer: bigint, stream: bigint): void {
    if (pointer === 0n) return;
    const context = this.#context;
    if (this.#pool === undefined || this.#pool === 0n) context.call('cuMemFree', 'freeing device memory', pointer);
    else context.call('cuMemFreeAsync', 'freeing device memory', pointer, stream);
  }

  /** Lets another device read and write what is allocated here: a pool's memory does not follow the context's access. */
  shareWith(other: DeviceContext): void {
    const context = this.#context;
    this.#pool ??= this.#create();
    if (this.#pool === 0n || !context.api.has('cuMemPoolSetAccess')) return;
    const layout = STRUCTS.CUmemAccessDesc;
    const description = new DataView(new ArrayBuffer(layout.size));
    description.setInt32(layout['location.type'], CU_MEM_LOCATION_TYPE_DEVICE, true);
    description.setInt32(layout['location.id'], other.deviceHandle, true);
    description.setInt32(layout.flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, true);
    context.call('cuMemPoolSetAccess', `sharing memory of ${context} with ${other}`, this.#pool, description, 1);
  }

  /** Whether freed memory may still be here. */
  get keepsMemory(): boolean {
    return this.#pool !== undefined && this.#pool !== 0n;
  }

  /**
   * Gives what was freed back to the driver, all but `keepBytes`. What was freed in a stream's order is free once that
   * has ended.
   */
  trim(keepBytes: number): void {
    if (this.#pool === undefined || this.#pool === 0n) return;
    this.#context.call('cuMemPoolTrimTo', 'trimming the memory pool', this.#pool, keepBytes);
  }

  /** Frees the pool with all memory still allocated from it. */
  destroy(): void {
    const pool = this.#pool ?? 0n;
    this.#pool = 0n;
    if (pool !== 0n) this.#context.call('cuMemPoolDestroy', 'destroying the memory pool', pool);
  }
}

/** Events without timing. */
export class EventPool {
  readonly #context: DeviceContext;
  /** All that exist, those that are lent too. */
  readonly #made: bigint[] = [];
  readonly #free: bigint[] = [];

  constructor(context: DeviceContext) {
    this.#context = context;
  }

  /** An event to be given back. */
  take(): bigint {
    const free = this.#free.pop();
    if (free !== undefined) return free;
    const made = this.#context.create('cuEventCreate', 'creating an event', CU_EVENT_DISABLE_TIMING);
    this.#made.push(made);
    return made;
  }

  giveBack(event: bigint): void {
    this.#free.push(event);
  }

  /** Destroys them, also under whoever still waits for one: the device ends. */
  destroy(): void {
    this.#free.length = 0;
    for (const event of this.#made.splice(0)) this.#context.call('cuEventDestroy', 'destroying an event', event);
  }
}
