import type { StreamHandle } from '../../../attention/options.ts';
import { DISPOSE } from '../../../dispose.ts';
import { ExecutionError, InvalidArgumentError } from '../../../errors.ts';
import {
  CU_EVENT_DISABLE_TIMING,
  CU_STREAM_CAPTURE_STATUS_NONE,
  CU_STREAM_NON_BLOCKING,
  CUDA_ERROR_NOT_READY,
} from './api.ts';
import type { DeviceContext } from './context.ts';
import type { EventPool, MemoryPool } from './pool.ts';

/**
 * Scratch up to this size stays with a stream between runs: beside the time of larger runs an allocation's is nothing.
 */
const KEPT_SCRATCH = 2 ** 24;

/** Polls that yield to the event loop without waiting, before they are a millisecond apart. */
const EAGER_POLLS = 200;

const nextPoll = (poll: number) =>
  new Promise<void>((resolve) => (poll < EAGER_POLLS ? setImmediate(resolve) : setTimeout(resolve, 1)));

/** What a device is to its streams. */
export interface StreamDevice extends DeviceContext {
  /** The library's own stream, which outlives every other. */
  readonly stream: CudaStream;
  /** @internal */
  readonly memoryPool: MemoryPool;
  /** @internal */
  readonly eventPool: EventPool;
  /** @internal */
  forgetStream(stream: CudaStream): void;
}

/** The capture that a stream is in: what would otherwise be done with the stream is noted for the graph. */
export interface ActiveCapture {
  /** Bytes at an address that is the graph's as long as it lives. */
  allocate(byteLength: number): bigint;
  /** Lets a later call of the same capture have the bytes. */
  giveBack(pointer: bigint): void;
  withScratch(byteLength: number, enqueue: (pointer: bigint) => void): void;
  /** Bytes that are zeros whenever the graph starts, as long as its launches leave them so. */
  withZeros(byteLength: number, enqueue: (pointer: bigint) => void): void;
  /** Memory of others that the graph uses: it must be there at each launch. */
  use(memory: CapturedMemory): void;
  /** Memory of this library that the graph keeps, past its disposal too. */
  retain(memory: CapturedMemory): void;
  /** Memory made for the capture, which ends with the graph. */
  own(memory: CapturedMemory): void;
  noteLaunch(kernel: string): void;
  /** Notes launches whose buffers may be exchanged. */
  noteRun(run: CapturedRun): void;
  /** The driver's node of the latest launch. */
  readonly latestNode: bigint;
}

/** Launches of a capture, and the addresses of their buffers by name. */
export interface CapturedRun {
  readonly nodes: readonly bigint[];
  readonly addresses: Map<string, bigint>;
  /** Writes `addresses` into the launches of a graph, where they belong to a buffer of `changed`. */
  update(executable: bigint, changed: ReadonlySet<string>): void;
  /** The caller's tensors, by the buffers that they are. */
  inputs: readonly CapturedInput[];
}

/** A tensor of the caller's that captured launches read. */
export interface CapturedInput {
  readonly buffer: string;
  readonly tensor: { readonly memory: CapturedMemory; readonly offset: number };
  /** Offset that the launches were planned with. */
  readonly offset: number;
}

/** What a capture knows of device memory. */
export interface CapturedMemory {
  retain(): () => void;
  settle(): void;
  useOn(stream: CudaStream): void;
  dispose(): void;
}

/**
 * A stream of one device. Work of one stream runs in order; the order between streams is made by {@link waitFor}.
 * Streams of this library do not synchronize with the default stream.
 */
export class CudaStream implements StreamHandle {
  readonly handle: bigint;
  readonly device: number;
  /** False for a stream that the caller made elsewhere: it is never destroyed here. */
  readonly owned: boolean;
  readonly #device: StreamDevice;
  /** The end of this stream's work when it was last marked; 0 before the first mark. */
  #mark = 0n;
  /** @internal Set as long as `capture` of this library captures the stream. */
  capture: ActiveCapture | undefined;
  #disposed = false;
  /** Kernels enqueued and not known to have ended, each with the number of its latest launch. */
  readonly #pending = new Map<string, number>();
  /** Launches and holds so far. When work ends, everything numbered below this has ended too. */
  #enqueued = 0;
  /** Memory that runs on this stream share: one has ended before the next begins. */
  #scratch = { pointer: 0n, byteLength: 0 };
  /** Zeros that each run leaves as it found them. */
  #zeros = { pointer: 0n, byteLength: 0 };
  /** Host memory that enqueued copies read. */
  readonly #held: { readonly enqueued: number; readonly memory: unknown }[] = [];

  /** @internal Use `CudaDevice.createStream` or `CudaDevice.streamFromHandle`. */
  constructor(device: StreamDevice, handle: bigint | undefined) {
    this.#device = device;
    this.device = device.ordinal;
    this.owned = handle === undefined;
    this.handle = handle ?? device.create('cuStreamCreate', 'creating a stream', CU_STREAM_NON_BLOCKING);
  }

  /** Kernels that a fault found now may come from, oldest first. */
  get pendingKernels(): readonly string[] {
    return [...this.#pending.keys()];
  }

  /** @internal Notes a launch, for the error of a fault that shows later. */
  noteLaunch(kernel: string): void {
    if (this.capture !== undefined) {
      this.capture.noteLaunch(kernel);
      return;
    }
    this.#pending.delete(kernel);
    this.#pending.set(kernel, ++this.#enqueued);
  }

  /** @internal Keeps host memory referenced until the work enqueued so far, a copy from it, is known to have ended. */
  hold(memory: unknown): void {
    this.#held.push({ enqueued: ++this.#enqueued, memory });
  }

  #forgetUpTo(enqueued: number): void {
    for (const [kernel, latest] of this.#pending) if (latest <= enqueued) this.#pending.delete(kernel);
    const kept = this.#held.findIndex((held) => held.enqueued > enqueued);
    this.#held.splice(0, kept < 0 ? this.#held.length : kept);
  }

  /**
   * @internal Lends device memory, of undefined contents, to what `enqueue` puts on this stream.
   *
   * @param enqueue gets its address; 0n for no bytes
   */
  withScratch(byteLength: number, enqueue: (pointer: bigint) => void): void {
    if (this.capture !== undefined) {
      this.capture.withScratch(byteLength, enqueue);
      return;
    }
    const device = this.#device;
    // Callers may destroy their own streams: nothing stays with one.
    if (!this.owned || byteLength > KEPT_SCRATCH) {
      const pointer = device.memoryPool.allocate(byteLength, this.handle);
      try {
        enqueue(pointer);
      } finally {
        device.release(() => device.memoryPool.free(pointer, this.handle));
      }
      return;
    }
    if (byteLength > this.#scratch.byteLength) {
      this.#freeKept();
      this.#scratch = { pointer: device.memoryPool.allocate(byteLength, this.handle), byteLength };
    }
    enqueue(byteLength === 0 ? 0n : this.#scratch.pointer);
  }

  /**
   * @internal Lends device memory that is all zeros, and is left so, to what `enqueue` puts on this stream.
   *
   * @param enqueue gets its address; 0n for no bytes
   */
  withZeros(byteLength: number, enqueue: (pointer: bigint) => void): void {
    if (this.capture !== undefined) {
      this.capture.withZeros(byteLength, enqueue);
      return;
    }
    if (!this.owned) {
      // Those of the device's stream, which waits for a caller's after each run as that does before: their runs are in order.
      const home = this.#device.stream;
      const before = home.#zeros;
      home.withZeros(byteLength, (pointer) => {
        if (home.#zeros !== before) this.waitFor(home);
        enqueue(pointer);
      });
      return;
    }
    if (byteLength > this.#zeros.byteLength) {
      this.#freeZeros();
      this.#zeros = { pointer: this.#makeZeros(byteLength), byteLength };
    }
    enqueue(byteLength === 0 ? 0n : this.#zeros.pointer);
  }

  #makeZeros(byteLength: number): bigint {
    const device = this.#device;
    const pointer = device.memoryPool.allocate(byteLength, this.handle);
    try {
      device.call('cuMemsetD8Async', 'clearing device memory', pointer, 0, byteLength, this.handle);
    } catch (error) {
      device.release(() => device.memoryPool.free(pointer, this.handle));
      throw error;
    }
    return pointer;
  }

  /** @internal Gives back what {@link withScratch} and {@link withZeros} keep. */
  freeScratch(): void {
    if (this.capture !== undefined) return;
    this.#freeKept();
    this.#freeZeros();
  }

  #freeKept(): void {
    const { pointer } = this.#scratch;
    this.#scratch = { pointer: 0n, byteLength: 0 };
    this.#device.memoryPool.free(pointer, this.handle);
  }

  #freeZeros(): void {
    const { pointer } = this.#zeros;
    this.#zeros = { pointer: 0n, byteLength: 0 };
    this.#device.memoryPool.free(pointer, this.handle);
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /** @internal This stream or, once it has been disposed, the device's own one, which waits for its work. */
  get orSuccessor(): CudaStream {
    return this.#disposed ? this.#device.stream : this;
  }

  /** @internal */
  requireUsable(): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this CUDA stream has been disposed');
  }

  /** @internal A stream under capture does nothing that could be waited for or copied to the host. */
  requireRunning(): void {
    this.requireUsable();
    if (this.capture !== undefined) {
      throw new InvalidArgumentError('invalid-option', 'stream', 'a stream that runs', 'one under capture');
    }
  }

  /** True while the stream is being captured into a graph. */
  get isCapturing(): boolean {
    const status = new Int32Array(1);
    this.#device.call('cuStreamIsCapturing', 'asking whether a stream is captured', this.handle, status);
    return status[0] !== CU_STREAM_CAPTURE_STATUS_NONE;
  }

  /** @internal Remembers the end of the work enqueued so far, for {@link waitFor} of other streams. */
  mark(): void {
    if (this.#mark === 0n) {
      this.#mark = this.#device.create('cuEventCreate', 'creating an event', CU_EVENT_DISABLE_TIMING);
    }
    this.#device.call('cuEventRecord', 'recording an event', this.#mark, this.handle);
  }

  /** Work enqueued here from now on starts after all that `other` holds now. Returns at once. */
  waitFor(other: CudaStream): void {
    this.requireUsable();
    const source = other.orSuccessor;
    if (source === this) return;
    this.requireRunning();
    // Callers may have destroyed their own streams since: the last mark stands for such a stream, as for one under capture.
    if (source.owned && source.capture === undefined) source.mark();
    if (source.#mark === 0n) return;
    this.#device.call('cuStreamWaitEvent', 'waiting for another stream', this.handle, source.#mark, 0);
  }

  /** @internal Marks the work enqueued so far: calling the result, once, blocks until the stream has done it. */
  checkpoint(): () => void {
    const device = this.#device;
    const event = device.eventPool.take();
    try {
      device.call('cuEventRecord', 'recording an event', event, this.handle);
    } catch (error) {
      device.eventPool.giveBack(event);
      throw error;
    }
    return () => {
      try {
        device.call('cuEventSynchronize', `waiting for a stream of ${device}`, event);
      } finally {
        device.eventPool.giveBack(event);
      }
    };
  }

  /**
   * Blocks until everything enqueued has ended.
   *
   * @throws {CudaError} for a fault on the device, naming the kernels that may have caused it
   */
  synchronize(): void {
    this.requireRunning();
    const enqueued = this.#enqueued;
    this.#device.call('cuStreamSynchronize', `synchronizing a stream of ${this.#device}`, this.handle);
    this.#forgetUpTo(enqueued);
  }

  /**
   * Resolves when everything enqueued so far has ended, without blocking the thread.
   *
   * @throws {CudaError} as {@link synchronize}
   */
  async completed(): Promise<void> {
    this.requireRunning();
    const device = this.#device;
    const enqueued = this.#enqueued;
    const event = device.eventPool.take();
    try {
      device.call('cuEventRecord', 'recording an event', event, this.handle);
      for (let poll = 0; ; poll++) {
        const status = device.inContext(() => device.api.cuEventQuery(event));
        if (status === 0) break;
        if (status !== CUDA_ERROR_NOT_READY) {
          throw device.error(status, 'cuEventQuery', `waiting for a stream of ${device}`);
        }
        await nextPoll(poll);
      }
      this.#forgetUpTo(enqueued);
    } finally {
      device.eventPool.giveBack(event);
    }
  }

  /** Destroys an owned stream once its work has ended, and forgets a caller's. Memory that it used stays usable. */
  dispose(): void {
    if (this.#disposed) return;
    if (this.capture !== undefined) this.requireRunning();
    const device = this.#device;
    device.release(() => {
      this.freeScratch();
      if (this !== device.stream) device.stream.waitFor(this);
      if (this.#mark !== 0n) device.call('cuEventDestroy', 'destroying an event', this.#mark);
      if (this.owned) device.call('cuStreamDestroy', 'destroying a stream', this.handle);
    });
    this.#disposed = true;
    device.forgetStream(this);
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/** Checks that a stream is one of a device, and not disposed. */
export function requireStreamOn(device: DeviceContext, argument: string, stream: CudaStream): void {
  if (stream.device !== device.ordinal) {
    const expected = `a stream of device ${device.ordinal}`;
    throw new InvalidArgumentError('mixed-locations', argument, expected, `one of device ${stream.device}`);
  }
  stream.requireUsable();
}

/** A point in a stream's work, with its time. */
export class CudaEvent {
  readonly #device: StreamDevice;
  readonly #handle: bigint;
  #disposed = false;

  /** @internal Use `CudaDevice.createEvent`. */
  constructor(device: StreamDevice) {
    this.#device = device;
    this.#handle = device.create('cuEventCreate', 'creating an event', 0);
  }

  /** Moves the event to the end of what `stream` holds now. */
  record(stream: CudaStream): this {
    this.#device.call('cuEventRecord', 'recording an event', this.#handle, stream.handle);
    return this;
  }

  /** Work enqueued on `stream`, of any device, from now on starts after the work before the event. */
  holdBack(stream: CudaStream): void {
    stream.requireUsable();
    this.#device.call('cuStreamWaitEvent', 'waiting for an event', stream.handle, this.#handle, 0);
  }

  /** Blocks until the work before the event has ended. */
  synchronize(): void {
    this.#device.call('cuEventSynchronize', 'waiting for an event', this.#handle);
  }

  /** Milliseconds from this event to a later one; both must have been reached. */
  millisecondsTo(later: CudaEvent): number {
    const milliseconds = new Float32Array(1);
    this.#device.call(
      'cuEventElapsedTime',
      'reading the time between events',
      milliseconds,
      this.#handle,
      later.#handle,
    );
    return milliseconds[0] as number;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#device.release(() => this.#device.call('cuEventDestroy', 'destroying an event', this.#handle));
  }

  [DISPOSE](): void {
    this.dispose();
  }
}
