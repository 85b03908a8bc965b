import { BackendUnavailableError, InvalidArgumentError } from '../../../errors.ts';
import type { KernelModule } from '../launches/launch.ts';
import {
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
  CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
  CU_DEVICE_ATTRIBUTE_PCI_BUS_ID,
  CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID,
  CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
  type CudaApi,
} from './api.ts';
import { DeviceContext } from './context.ts';
import { defaultKernelFolder, KernelFiles } from './kernel-files.ts';
import { loadDriver } from './load.ts';
import { DeviceMemory, PinnedBuffer } from './memory.ts';
import { CudaModule } from './module.ts';
import { EventPool, MemoryPool, requireByteLength } from './pool.ts';
import { cudaError } from './status.ts';
import { CudaEvent, CudaStream, requireStreamOn } from './stream.ts';

/** Where a driver's compiled kernels are kept. */
interface KernelShelf {
  readonly driverVersion: number;
  /** @internal */
  readonly kernelFiles: KernelFiles | undefined;
}

/**
 * One GPU: its primary context, its own stream and pools, and the modules loaded on it.
 */
export class CudaDevice extends DeviceContext {
  readonly name: string;
  /** major * 10 + minor: 90 for an H100. */
  readonly computeCapability: number;
  readonly multiprocessors: number;
  /** Bytes. */
  readonly totalMemory: number;
  /** Bytes of shared memory that one thread block can have. */
  readonly maxSharedBytes: number;
  /** @internal */
  readonly memoryPool: MemoryPool;
  /** @internal */
  readonly eventPool: EventPool;
  #stream: CudaStream | undefined;
  readonly #streams = new Set<CudaStream>();
  readonly #modules = new Map<string, CudaModule>();
  readonly #kernels: KernelShelf;

  /** @internal Use `Cuda.device`. */
  constructor(api: CudaApi, ordinal: number, kernels: KernelShelf) {
    super(api, ordinal);
    this.#kernels = kernels;
    const handle = this.deviceHandle;
    const int = new Int32Array(1);
    const check = (status: number, call: string) => {
      if (status !== 0) throw cudaError(api, status, call, `describing CUDA device ${ordinal}`);
    };
    const attribute = (which: number) => {
      check(api.cuDeviceGetAttribute(int, which, handle), 'cuDeviceGetAttribute');
      return int[0] as number;
    };
    const name = new Uint8Array(256);
    check(api.cuDeviceGetName(name, name.length, handle), 'cuDeviceGetName');
    this.name = new TextDecoder().decode(name.subarray(0, name.indexOf(0)));
    const bytes = new BigUint64Array(1);
    check(api.cuDeviceTotalMem(bytes, handle), 'cuDeviceTotalMem');
    this.totalMemory = Number(bytes[0]);
    this.computeCapability =
      10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    this.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    this.maxSharedBytes = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    const pools = api.has('cuMemAllocFromPoolAsync') && attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED) !== 0;
    this.memoryPool = new MemoryPool(this, pools);
    this.eventPool = new EventPool(this);
  }

  override toString(): string {
    return `CUDA device ${this.ordinal} (${this.name})`;
  }

  /** Where it is on the machine, `domain:bus:device`: the same in every process, whatever ordinal it has there. */
  get pciAddress(): string {
    const parts = [
      CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
      CU_DEVICE_ATTRIBUTE_PCI_BUS_ID,
      CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID,
    ];
    const value = new Int32Array(1);
    return parts
      .map((which) => {
        this.call('cuDeviceGetAttribute', `describing ${this}`, value, which, this.deviceHandle);
        return (value[0] as number).toString(16).padStart(2, '0');
      })
      .join(':');
  }

  /** This library's own stream of the device: calls without a stream run on it. */
  get stream(): CudaStream {
    this.requireUsable();
    this.#stream ??= this.createStream();
    return this.#stream;
  }

  /** @internal */
  override *pendingKernels(): Iterable<string> {
    for (const stream of this.#streams) yield* stream.pendingKernels;
  }

  /** A new stream. It does not synchronize with the default stream. */
  createStream(): CudaStream {
    this.requireUsable();
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
    this.requireUsable();
    if (typeof handle !== 'bigint' || handle <= 2n || handle >= 2n ** 64n) {
      const received = `${handle}`.slice(0, 40);
      throw new InvalidArgumentError('invalid-option', 'handle', 'a stream that is not a default stream', received);
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

  /**
   * Memory whose contents are undefined, at an address that is a multiple of 256.
   *
   * @param stream the memory's home, see {@link DeviceMemory}
   * @throws {CudaError} `out-of-memory`
   */
  allocate(byteLength: number, stream: CudaStream = this.stream): DeviceMemory {
    requireStreamOn(this, 'stream', stream);
    const { capture } = stream;
    if (capture !== undefined) {
      requireByteLength('byteLength', byteLength);
      const pointer = capture.allocate(byteLength);
      const memory = new DeviceMemory(this, pointer, byteLength, this.stream, () => capture.giveBack(pointer), capture);
      capture.own(memory);
      return memory;
    }
    const pointer = this.memoryPool.allocate(byteLength, stream.handle);
    const free = pointer === 0n ? undefined : (on: CudaStream) => this.memoryPool.free(pointer, on.handle);
    return new DeviceMemory(this, pointer, byteLength, stream, free);
  }

  /**
   * Memory that the caller owns: it must outlive its use here, and what writes it must be ordered before the call's
   * stream.
   */
  memoryFromPointer(pointer: bigint, byteLength: number): DeviceMemory {
    this.requireUsable();
    requireByteLength('byteLength', byteLength);
    if (typeof pointer !== 'bigint' || pointer < 0n || pointer + BigInt(byteLength) > 2n ** 64n) {
      const received = `${pointer}`.slice(0, 40);
      throw new InvalidArgumentError('invalid-option', 'pointer', 'a device address (bigint)', received);
    }
    return new DeviceMemory(this, pointer, byteLength, undefined, undefined);
  }

  /** Host memory that copies run from and to without staging. */
  allocatePinned(byteLength: number): PinnedBuffer {
    return new PinnedBuffer(this, byteLength);
  }

  /** Free and total bytes, as the driver counts them: what the pool keeps counts as used. */
  memoryInfo(): { free: number; total: number } {
    const free = new BigUint64Array(1);
    const total = new BigUint64Array(1);
    this.call('cuMemGetInfo', 'reading memory sizes', free, total);
    return { free: Number(free[0]), total: Number(total[0]) };
  }

  /**
   * Gives memory that was freed back to the driver, all but `keepBytes`, and what streams keep. Waits for the device's
   * own stream.
   */
  trimMemory(keepBytes = 0): void {
    requireByteLength('keepBytes', keepBytes);
    for (const stream of this.#streams) stream.freeScratch();
    if (!this.memoryPool.keepsMemory) return;
    this.stream.synchronize();
    this.memoryPool.trim(keepBytes);
  }

  /** The loaded module of an id: the first use compiles it. */
  module(source: KernelModule): CudaModule {
    this.requireUsable();
    let module = this.#modules.get(source.id);
    if (module === undefined) {
      const { kernelFiles: files, driverVersion } = this.#kernels;
      const place = { computeCapability: this.computeCapability, driverVersion };
      module = new CudaModule(this, source, files && { files, place });
      this.#modules.set(source.id, module);
    }
    return module;
  }

  /**
   * Frees everything of this device: modules, streams, the pool with all memory still allocated from it, the context.
   */
  dispose(): void {
    if (this.disposed) return;
    this.release(() => {
      for (const stream of this.#streams) if (stream.owned) stream.synchronize();
    });
    for (const module of this.#modules.values()) module.dispose();
    const own = this.#stream;
    for (const stream of [...this.#streams]) if (stream !== own) stream.dispose();
    own?.dispose();
    this.release(() => {
      this.eventPool.destroy();
      this.memoryPool.destroy();
    });
    this.closeContext();
  }
}

/** The driver of this machine and its devices. */
export class Cuda {
  readonly api: CudaApi;
  /** 1000 * major + 10 * minor of the CUDA version that the driver supports. */
  readonly driverVersion: number;
  readonly deviceCount: number;
  readonly #devices = new Map<number, CudaDevice>();
  #kernelFiles: KernelFiles | undefined;

  /**
   * Folder in which compiled kernels are looked for and kept; undefined: none, kernels are compiled in each process. `openCuda` takes
   * `SAGEATTENTION_KERNELS`, else `sageattention/cuda` in the user's cache. Set it before the first call: a kernel that
   * is loaded stays.
   */
  get kernelFolder(): string | undefined {
    return this.#kernelFiles?.folder;
  }

  set kernelFolder(folder: string | undefined) {
    if (folder !== undefined && (typeof folder !== 'string' || folder === '')) {
      throw new InvalidArgumentError('invalid-option', 'kernelFolder', 'a folder or undefined', JSON.stringify(folder));
    }
    this.#kernelFiles = folder === undefined ? undefined : new KernelFiles(folder);
  }

  /** @internal */
  get kernelFiles(): KernelFiles | undefined {
    return this.#kernelFiles;
  }

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
      device = new CudaDevice(this.api, ordinal, this);
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
    opened = loadDriver().then((api) => {
      const cuda = new Cuda(api);
      cuda.kernelFolder = defaultKernelFolder();
      return cuda;
    });
    // Koffi or the driver may be installed later.
    opened.catch(() => {
      opened = undefined;
    });
  }
  return opened;
}
