import { BackendUnavailableError, ExecutionError, InvalidArgumentError } from '../../../errors.ts';
import type { KernelModule } from '../launches/launch.ts';
import {
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
  CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
  CU_EVENT_DISABLE_TIMING,
  CU_MEM_ALLOCATION_TYPE_PINNED,
  CU_MEM_LOCATION_TYPE_DEVICE,
  CU_MEMHOSTREGISTER_PORTABLE,
  CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
  type CudaApi,
  type DriverFunctionName,
  type DriverFunctions,
  STRUCTS,
} from './api.ts';
import { loadDriver } from './load.ts';
import { DeviceMemory, PinnedBuffer } from './memory.ts';
import { CudaModule } from './module.ts';
import { type CudaError, cudaError, losesContext } from './status.ts';
import { CudaEvent, CudaStream } from './stream.ts';

type Arguments<Name extends DriverFunctionName> = Parameters<DriverFunctions[Name]>;

/** Functions whose first parameter receives the handle that they make. */
type CreatingFunction =
  | 'cuStreamCreate'
  | 'cuEventCreate'
  | 'cuModuleGetFunction'
  | 'cuMemAlloc'
  | 'cuMemAllocFromPoolAsync'
  | 'cuMemPoolCreate'
  | 'cuGraphInstantiate';

type AfterFirst<T extends readonly unknown[]> = T extends readonly [unknown, ...infer Rest] ? Rest : never;

/**
 * One GPU: its primary context, its own stream and memory pool, and the modules loaded on it. The context is made current
 * for each call and taken away after it, so that a program's own CUDA use of the thread is not disturbed.
 */
export class CudaDevice {
  readonly api: CudaApi;
  readonly ordinal: number;
  readonly name: string;
  /** major * 10 + minor: 90 for an H100. */
  readonly computeCapability: number;
  readonly multiprocessors: number;
  /** Bytes. */
  readonly totalMemory: number;
  /** Bytes of shared memory that one thread block can have. */
  readonly maxSharedBytes: number;
  readonly #handle: number;
  readonly #hasPools: boolean;
  /** Undefined until it is first needed: describing a device takes none of its memory. */
  #context: bigint | undefined;
  /** 0n where the device or driver has no stream-ordered allocator, undefined until it is first needed. */
  #pool: bigint | undefined;
  #stream: CudaStream | undefined;
  readonly #streams = new Set<CudaStream>();
  readonly #freeEvents: bigint[] = [];
  readonly #modules = new Map<string, CudaModule>();
  #lost: CudaError | undefined;
  #disposed = false;

  /** @internal Use `Cuda.device`. */
  constructor(api: CudaApi, ordinal: number) {
    this.api = api;
    this.ordinal = ordinal;
    const int = new Int32Array(1);
    const check = (status: number, call: string) => {
      if (status !== 0) throw cudaError(api, status, call, `describing CUDA device ${ordinal}`);
    };
    check(api.cuDeviceGet(int, ordinal), 'cuDeviceGet');
    this.#handle = int[0] as number;
    const attribute = (which: number) => {
      check(api.cuDeviceGetAttribute(int, which, this.#handle), 'cuDeviceGetAttribute');
      return int[0] as number;
    };
    const name = new Uint8Array(256);
    check(api.cuDeviceGetName(name, name.length, this.#handle), 'cuDeviceGetName');
    this.name = new TextDecoder().decode(name.subarray(0, name.indexOf(0)));
    const bytes = new BigUint64Array(1);
    check(api.cuDeviceTotalMem(bytes, this.#handle), 'cuDeviceTotalMem');
    this.totalMemory = Number(bytes[0]);
    this.computeCapability =
      10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    this.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    this.maxSharedBytes = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    this.#hasPools = api.has('cuMemAllocFromPoolAsync') && attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED) !== 0;
  }

  #openContext(): bigint {
    const context = new BigUint64Array(1);
    const status = this.api.cuDevicePrimaryCtxRetain(context, this.#handle);
    if (status !== 0) throw this.error(status, 'cuDevicePrimaryCtxRetain', `opening ${this}`);
    return context[0] as bigint;
  }

  /** A pool of our own: the device's default one may be tuned by the program around us. It keeps what is freed. */
  #createPool(): bigint {
    const layout = STRUCTS.CUmemPoolProps;
    const properties = new DataView(new ArrayBuffer(layout.size));
    properties.setInt32(layout.allocType, CU_MEM_ALLOCATION_TYPE_PINNED, true);
    properties.setInt32(layout['location.type'], CU_MEM_LOCATION_TYPE_DEVICE, true);
    properties.setInt32(layout['location.id'], this.#handle, true);
    const pool = this.create('cuMemPoolCreate', `creating a memory pool on ${this}`, properties);
    const keepAll = BigUint64Array.of(0xffff_ffff_ffff_ffffn);
    this.call('cuMemPoolSetAttribute', 'setting up the memory pool', pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, keepAll);
    return pool;
  }

  toString(): string {
    return `CUDA device ${this.ordinal} (${this.name})`;
  }

  /** This library's own stream of the device: calls without a stream run on it. */
  get stream(): CudaStream {
    this.#requireUsable();
    this.#stream ??= this.createStream();
    return this.#stream;
  }

  /** The fault that made the device unusable for this process, if there was one. */
  get lost(): CudaError | undefined {
    return this.#lost;
  }

  /** Whether the context has been given up; what was made on it is gone. */
  get disposed(): boolean {
    return this.#disposed;
  }

  #requireUsable(): void {
    if (this.#disposed) throw new ExecutionError('disposed', `${this} has been disposed`);
  }

  /**
   * @internal Runs `use`, which must not be asynchronous, with the device's context current, and leaves the thread's context as
   * it was. Inside another `inContext` of the same device it costs nothing.
   */
  inContext<T>(use: () => T): T {
    this.#requireUsable();
    if (current === this) return use();
    const { api } = this;
    this.#context ??= this.#openContext();
    const pushed = api.cuCtxPushCurrent(this.#context);
    if (pushed !== 0) throw this.error(pushed, 'cuCtxPushCurrent', `using ${this}`);
    const before = current;
    current = this;
    try {
      return use();
    } finally {
      current = before;
      api.cuCtxPopCurrent(POPPED);
    }
  }

  /**
   * @internal Calls the driver with the context current and checks the status.
   *
   * @param what what is being done, for the error
   */
  call<Name extends DriverFunctionName>(name: Name, what: string, ...values: Arguments<Name>): void {
    const invoke = this.api[name] as (...values: unknown[]) => number;
    const status = this.inContext(() => invoke(...values));
    if (status !== 0) throw this.error(status, name, what);
  }

  /** @internal {@link call} of a function that makes a handle. */
  create<Name extends CreatingFunction>(name: Name, what: string, ...values: AfterFirst<Arguments<Name>>): bigint {
    const handle = new BigUint64Array(1);
    const invoke = this.api[name] as (...values: unknown[]) => number;
    const status = this.inContext(() => invoke(handle, ...values));
    if (status !== 0) throw this.error(status, name, what);
    return handle[0] as bigint;
  }

  /** @internal The error of a failed call. A fault of the device is remembered. */
  error(status: number, call: string, what: string): CudaError {
    const suspects = [...this.#streams].flatMap((stream) => stream.pendingKernels);
    const error = cudaError(this.api, status, call, what, [...new Set(suspects)]);
    if (losesContext(status)) this.#lost ??= error;
    return error;
  }

  /**
   * @internal Runs calls that give something back. After a fault of the device there is nothing left to give back, and an
   * error here would hide the one that tells of it.
   */
  release(use: () => void): void {
    if (this.#disposed) return;
    try {
      use();
    } catch (error) {
      if (this.#lost === undefined) throw error;
    }
  }

  /** A new stream. It does not synchronize with the default stream. */
  createStream(): CudaStream {
    this.#requireUsable();
    const stream = new CudaStream(this, undefined);
    this.#streams.add(stream);
    return stream;
  }

  /**
   * The caller's own stream (a `CUstream` or `cudaStream_t` of this device's primary context). It is never destroyed
   * here; dispose the returned object before destroying the stream.
   *
   * @throws {InvalidArgumentError} for the default streams 0, 1 and 2: this library enqueues nothing there
   */
  streamFromHandle(handle: bigint): CudaStream {
    this.#requireUsable();
    if (handle <= 2n) {
      throw new InvalidArgumentError('invalid-option', 'handle', 'a stream that is not a default stream', `${handle}`);
    }
    for (const known of this.#streams) if (known.handle === handle) return known;
    const stream = new CudaStream(this, handle);
    this.#streams.add(stream);
    return stream;
  }

  createEvent(): CudaEvent {
    return new CudaEvent(this);
  }

  /** @internal */
  forgetStream(stream: CudaStream): void {
    this.#streams.delete(stream);
  }

  /** @internal An event without timing, to be given back. */
  takeEvent(): bigint {
    return this.#freeEvents.pop() ?? this.create('cuEventCreate', 'creating an event', CU_EVENT_DISABLE_TIMING);
  }

  /** @internal */
  returnEvent(event: bigint): void {
    this.#freeEvents.push(event);
  }

  /**
   * Memory whose contents are undefined, at an address that is a multiple of 256.
   *
   * @param stream the memory's home, see {@link DeviceMemory}
   * @throws {CudaError} `out-of-memory`
   */
  allocate(byteLength: number, stream: CudaStream = this.stream): DeviceMemory {
    const pointer = this.allocatePointer(byteLength, stream);
    const free = pointer === 0n ? undefined : (on: CudaStream) => this.freePointer(pointer, on);
    return new DeviceMemory(this, pointer, byteLength, stream, free);
  }

  /** @internal {@link allocate} without the object. */
  allocatePointer(byteLength: number, stream: CudaStream): bigint {
    if (byteLength === 0) return 0n;
    const what = `allocating ${byteLength} bytes on ${this}`;
    this.#pool ??= this.#hasPools ? this.#createPool() : 0n;
    return this.#pool === 0n
      ? this.create('cuMemAlloc', what, byteLength)
      : this.create('cuMemAllocFromPoolAsync', what, byteLength, this.#pool, stream.handle);
  }

  /** @internal */
  freePointer(pointer: bigint, stream: CudaStream): void {
    if (pointer === 0n) return;
    if (this.#pool === undefined || this.#pool === 0n) this.call('cuMemFree', 'freeing device memory', pointer);
    else this.call('cuMemFreeAsync', 'freeing device memory', pointer, stream.handle);
  }

  /** Memory that the caller owns: it must outlive its use here, and what writes it must be ordered before the call's stream. */
  memoryFromPointer(pointer: bigint, byteLength: number): DeviceMemory {
    this.#requireUsable();
    return new DeviceMemory(this, pointer, byteLength, undefined, undefined);
  }

  /** Host memory that copies run from and to without staging. */
  allocatePinned(byteLength: number): PinnedBuffer {
    return new PinnedBuffer(this, byteLength);
  }

  /** @internal */
  lockPages(address: bigint, byteLength: number): void {
    const what = `page-locking ${byteLength} bytes of host memory`;
    this.call('cuMemHostRegister', what, address, byteLength, CU_MEMHOSTREGISTER_PORTABLE);
  }

  /** @internal */
  unlockPages(address: bigint): void {
    this.call('cuMemHostUnregister', 'unlocking host memory', address);
  }

  /** Free and total bytes, as the driver counts them: what the pool keeps counts as used. */
  memoryInfo(): { free: number; total: number } {
    const free = new BigUint64Array(1);
    const total = new BigUint64Array(1);
    this.call('cuMemGetInfo', 'reading memory sizes', free, total);
    return { free: Number(free[0]), total: Number(total[0]) };
  }

  /** Gives memory that was freed back to the driver, all but `keepBytes`, and what streams keep. Waits for the device's own stream. */
  trimMemory(keepBytes = 0): void {
    for (const stream of this.#streams) stream.freeScratch();
    if (this.#pool === undefined || this.#pool === 0n) return;
    this.stream.synchronize();
    this.call('cuMemPoolTrimTo', 'trimming the memory pool', this.#pool, keepBytes);
  }

  /** The loaded module of an id: the first use compiles it. */
  module(source: KernelModule): CudaModule {
    this.#requireUsable();
    let module = this.#modules.get(source.id);
    if (module === undefined) {
      module = new CudaModule(this, source);
      this.#modules.set(source.id, module);
    }
    return module;
  }

  /** Frees everything of this device: modules, streams, the pool with all memory still allocated from it, the context. */
  dispose(): void {
    if (this.#disposed) return;
    this.release(() => {
      for (const stream of this.#streams) if (stream.owned) stream.synchronize();
    });
    for (const module of this.#modules.values()) module.dispose();
    const own = this.#stream;
    for (const stream of [...this.#streams]) if (stream !== own) stream.dispose();
    own?.dispose();
    this.release(() => {
      for (const event of this.#freeEvents) this.call('cuEventDestroy', 'destroying an event', event);
      const pool = this.#pool ?? 0n;
      if (pool !== 0n) this.call('cuMemPoolDestroy', 'destroying the memory pool', pool);
    });
    this.#disposed = true;
    if (this.#context !== undefined) this.api.cuDevicePrimaryCtxRelease(this.#handle);
  }
}

/** The device whose context this library has made current; each thread has its own module, and its own current context. */
let current: CudaDevice | undefined;

/** Where popped contexts go; nobody reads it. */
const POPPED = new BigUint64Array(1);

/** The driver of this machine and its devices. */
export class Cuda {
  readonly api: CudaApi;
  /** 1000 * major + 10 * minor of the CUDA version that the driver supports. */
  readonly driverVersion: number;
  readonly deviceCount: number;
  readonly #devices = new Map<number, CudaDevice>();

  /** @throws {BackendUnavailableError} when the driver does not start or finds no device */
  constructor(api: CudaApi) {
    this.api = api;
    const int = new Int32Array(1);
    const unavailable = (status: number, call: string) => {
      const error = cudaError(api, status, call, 'starting the NVIDIA driver');
      const remedy = 'Check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it';
      return new BackendUnavailableError('cuda', error.message, remedy, error);
    };
    for (const [call, status] of [
      ['cuInit', () => api.cuInit(0)],
      ['cuDriverGetVersion', () => api.cuDriverGetVersion(int)],
    ] as const) {
      const result = status();
      if (result !== 0) throw unavailable(result, call);
    }
    this.driverVersion = int[0] as number;
    const counted = api.cuDeviceGetCount(int);
    if (counted !== 0) throw unavailable(counted, 'cuDeviceGetCount');
    this.deviceCount = int[0] as number;
    if (this.deviceCount === 0) {
      throw new BackendUnavailableError(
        'cuda',
        'the NVIDIA driver finds no device',
        'Check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it',
      );
    }
  }

  /**
   * @param ordinal as the driver counts devices, from 0
   * @throws {InvalidArgumentError} when there is no such device
   */
  device(ordinal = 0): CudaDevice {
    if (!Number.isInteger(ordinal) || ordinal < 0 || ordinal >= this.deviceCount) {
      throw new InvalidArgumentError('invalid-option', 'device', `0 to ${this.deviceCount - 1}`, String(ordinal));
    }
    let device = this.#devices.get(ordinal);
    if (device === undefined) {
      device = new CudaDevice(this.api, ordinal);
      this.#devices.set(ordinal, device);
    }
    return device;
  }

  /** Frees every device. The next use of `device` opens it again. */
  dispose(): void {
    for (const device of this.#devices.values()) device.dispose();
    this.#devices.clear();
  }
}

let opened: Promise<Cuda> | undefined;

/**
 * The driver of this machine; the same object for every caller in the process.
 *
 * @throws {BackendUnavailableError} which says what is missing
 */
export function openCuda(): Promise<Cuda> {
  if (opened === undefined) {
    opened = loadDriver().then((api) => new Cuda(api));
    // Koffi or the driver may be installed later.
    opened.catch(() => {
      opened = undefined;
    });
  }
  return opened;
}
