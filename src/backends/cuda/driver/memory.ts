import { DISPOSE } from '../../../dispose.ts';
import { ExecutionError } from '../../../errors.ts';
import { CU_MEMHOSTREGISTER_PORTABLE } from './api.ts';
import type { DeviceContext } from './context.ts';
import { requireByteLength } from './pool.ts';
import { type ActiveCapture, type CudaStream, requireStreamOn, type StreamDevice } from './stream.ts';

/**
 * Memory of a device. It is freed by {@link dispose} and by nothing else: a garbage collector knows neither how much
 * device memory a small object holds nor which stream still reads it.
 *
 * It belongs to a stream, its home: allocated, written and freed in that stream's order. A call on another stream waits
 * for the home first, and freeing waits for every stream that has used it.
 */
export class DeviceMemory {
  readonly device: StreamDevice;
  /** 0n for memory of no bytes. */
  readonly pointer: bigint;
  readonly byteLength: number;
  /** Undefined for the caller's own memory, which is neither ordered nor freed here. */
  readonly home: CudaStream | undefined;
  readonly #users = new Set<CudaStream>();
  readonly #free: ((stream: CudaStream) => void) | undefined;
  #disposed = false;
  /** Holders of the memory past its disposal. */
  #retained = 0;
  /** The capture that the memory was made in, as long as that goes on. */
  #pending: ActiveCapture | undefined;

  /** @internal Use `CudaDevice.allocate` or `CudaDevice.memoryFromPointer`. */
  constructor(
    device: StreamDevice,
    pointer: bigint,
    byteLength: number,
    home: CudaStream | undefined,
    free: ((stream: CudaStream) => void) | undefined,
    pending?: ActiveCapture,
  ) {
    this.device = device;
    this.pointer = pointer;
    this.byteLength = byteLength;
    this.home = home;
    this.#free = free;
    this.#pending = pending;
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /**
   * Makes `stream` wait for what wrote this memory, and keeps the memory until the stream's work has ended.
   *
   * @throws {ExecutionError} `disposed`
   */
  useOn(stream: CudaStream): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this device memory has been disposed');
    requireStreamOn(this.device, 'stream', stream);
    if (this.#pending !== undefined && stream.capture !== this.#pending) {
      throw new ExecutionError(
        'execution-failed',
        'nothing has been computed there yet: it is an output of a capture under way',
      );
    }
    if (stream.capture !== undefined) {
      if (this.#pending === undefined) stream.capture.use(this);
      return;
    }
    if (this.home === undefined || this.home === stream) return;
    stream.waitFor(this.home);
    this.#users.add(stream);
  }

  /** Frees the memory, in stream order: kernels enqueued before still find it. Foreign memory is only forgotten. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    if (this.#retained === 0) this.#release();
  }

  /** @internal The capture that made it has ended. */
  settle(): void {
    this.#pending = undefined;
  }

  /** @internal Keeps the memory, past its disposal too, until the result is called. */
  retain(): () => void {
    this.#retained++;
    return () => {
      this.#retained--;
      if (this.#disposed && this.#retained === 0) this.#release();
    };
  }

  /** @internal Makes the home wait for every stream that has used the memory: what it writes there next is seen by none of them. */
  awaitUsers(): void {
    const stream = this.home?.orSuccessor;
    for (const user of this.#users) stream?.waitFor(user);
    this.#users.clear();
  }

  #release(): void {
    const { home, device } = this;
    const free = this.#free;
    if (home === undefined || free === undefined) return;
    device.release(() => {
      this.awaitUsers();
      free(home.orSuccessor);
    });
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

const PAGE = 4096;

function allocateHost(byteLength: number): ArrayBuffer {
  try {
    return new ArrayBuffer(byteLength);
  } catch (error) {
    throw new ExecutionError('out-of-memory', `allocating ${byteLength} bytes of host memory`, error);
  }
}

/**
 * Host memory that is page-locked, so that copies to and from it run beside the program. The pages belong to an
 * ordinary `ArrayBuffer`: a view that outlives `dispose` is still memory of this process, only no longer locked.
 */
export class PinnedBuffer {
  /** The locked bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Their address in this process. */
  readonly address: bigint;
  readonly #device: DeviceContext;
  #disposed = false;

  /** @internal Use `CudaDevice.allocatePinned`. */
  constructor(device: DeviceContext, byteLength: number) {
    requireByteLength('byteLength', byteLength);
    this.#device = device;
    // Whole pages of its own: a page locked twice is an error of the driver.
    const lockedBytes = Math.max(1, Math.ceil(byteLength / PAGE)) * PAGE;
    const buffer = allocateHost(lockedBytes + PAGE);
    const start = device.api.addressOf(buffer);
    const skip = Number((BigInt(PAGE) - (start % BigInt(PAGE))) % BigInt(PAGE));
    this.bytes = new Uint8Array(buffer, skip, byteLength);
    this.address = start + BigInt(skip);
    const what = `page-locking ${lockedBytes} bytes of host memory`;
    device.call('cuMemHostRegister', what, this.address, lockedBytes, CU_MEMHOSTREGISTER_PORTABLE);
  }

  /** A view of other elements over the same bytes: `pinned.view(Float32Array)`. */
  view<T>(type: {
    readonly BYTES_PER_ELEMENT: number;
    new (buffer: ArrayBuffer, byteOffset: number, length: number): T;
  }): T {
    const { buffer, byteOffset, byteLength } = this.bytes;
    return new type(buffer, byteOffset, Math.floor(byteLength / type.BYTES_PER_ELEMENT));
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /** Unlocks the pages. Copies under way must have ended. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    const device = this.#device;
    device.release(() => device.call('cuMemHostUnregister', 'unlocking host memory', this.address));
  }

  [DISPOSE](): void {
    this.dispose();
  }
}
