/**
 * A CUDA driver without a GPU: the functions of {@link CudaApi} over host memory, for tests of everything above them. It
 * reads the same bytes that the driver would read (structs, parameter arrays, log options), checks what the driver checks, and is
 * as asynchronous as it may be: work of a stream runs only when something waits for it, so that a missing wait between two
 * streams shows as wrong data, and memory freed too early as a fault. Kernels run in a hook.
 */
import { CUDA_ERROR_NOT_READY, type CudaApi, type DriverFunctions, STRUCTS } from '../driver/api.ts';

/** A kernel launch as the driver received it. */
export interface FakeLaunch {
  readonly ptx: string;
  readonly entry: string;
  readonly grid: readonly [number, number, number];
  readonly block: readonly [number, number, number];
  readonly cluster: readonly [number, number, number] | undefined;
  readonly sharedBytes: number;
  /** Copies of the parameters, in the sizes that the PTX declares. */
  readonly parameters: readonly Uint8Array[];
  readonly device: number;
  /** Bytes of device memory from an address on, to the end of the allocation; a wild address is a fault. */
  memory(pointer: bigint, bytes: number): Uint8Array;
  /** The description behind a tensor map parameter. */
  tensorMap(parameter: Uint8Array): FakeTensorMap;
}

export interface FakeTensorMap {
  readonly elementType: number;
  readonly pointer: bigint;
  readonly dimensions: readonly bigint[];
  readonly byteStrides: readonly bigint[];
  readonly box: readonly number[];
  readonly elementStrides: readonly number[];
  readonly interleave: number;
  readonly swizzle: number;
}

export interface FakeCudaOptions {
  /** Compute capability of each device as major * 10 + minor; default one device of 90. */
  readonly devices?: readonly number[];
  /** Runs a kernel; default does nothing. */
  readonly execute?: (launch: FakeLaunch) => void;
  /** Bytes of each device; default 1 GiB. */
  readonly memoryBytes?: number;
  /** False: a driver without stream-ordered allocation. */
  readonly pools?: boolean;
  /** True: memory that was freed is handed out again, as real pools do. Default: whoever uses it finds nothing. */
  readonly reuse?: boolean;
}

/** Names of the statuses that the fake returns, as the driver gives them. */
const STATUS_NAMES: Readonly<Record<number, readonly [name: string, text: string]>> = {
  0: ['CUDA_SUCCESS', 'no error'],
  1: ['CUDA_ERROR_INVALID_VALUE', 'invalid argument'],
  2: ['CUDA_ERROR_OUT_OF_MEMORY', 'out of memory'],
  100: ['CUDA_ERROR_NO_DEVICE', 'no CUDA-capable device is detected'],
  101: ['CUDA_ERROR_INVALID_DEVICE', 'invalid device ordinal'],
  201: ['CUDA_ERROR_INVALID_CONTEXT', 'invalid device context'],
  209: ['CUDA_ERROR_NO_BINARY_FOR_GPU', 'no kernel image is available for execution on the device'],
  218: ['CUDA_ERROR_INVALID_PTX', 'a PTX JIT compilation failed'],
  400: ['CUDA_ERROR_INVALID_HANDLE', 'invalid resource handle'],
  500: ['CUDA_ERROR_NOT_FOUND', 'named symbol not found'],
  600: ['CUDA_ERROR_NOT_READY', 'device not ready'],
  700: ['CUDA_ERROR_ILLEGAL_ADDRESS', 'an illegal memory access was encountered'],
  712: ['CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED', 'part or all of the requested memory range is already mapped'],
  713: ['CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED', 'pointer does not correspond to a registered memory region'],
  719: ['CUDA_ERROR_LAUNCH_FAILED', 'unspecified launch failure'],
  900: ['CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED', 'operation not permitted when stream is capturing'],
  901: ['CUDA_ERROR_STREAM_CAPTURE_INVALIDATED', 'operation failed due to a previous error during capture'],
};

/** A fault of the device while it ran something. */
class DeviceFault extends Error {
  readonly status: number;
  constructor(status: number) {
    super(`device fault ${status}`);
    this.status = status;
  }
}

interface Allocation {
  readonly base: bigint;
  readonly bytes: Uint8Array;
  readonly device: number;
  freed: boolean;
}

/** What a stream does: work, or a wait for a point of another stream. */
type Operation = { readonly run: () => void } | { readonly after: Point };

interface Point {
  readonly stream: Stream;
  /** Operations of that stream that come before the point. */
  readonly count: number;
}

interface Stream {
  readonly handle: bigint;
  readonly device: number;
  readonly operations: Operation[];
  done: number;
  capture: Operation[] | undefined;
  captureBroken: boolean;
  destroyed: boolean;
}

interface Event {
  point: Point | undefined;
  queries: number;
  readonly timing: boolean;
}

interface Context {
  readonly handle: bigint;
  readonly device: number;
  retained: number;
  /** A fault that every call returns from now on. */
  fault: number;
}

interface Entry {
  readonly name: string;
  readonly ptx: string;
  readonly parameterBytes: readonly number[];
  sharedLimit: number;
}

/** Functions that need no current context. */
type WithoutContext =
  | 'cuInit'
  | 'cuDriverGetVersion'
  | 'cuGetErrorName'
  | 'cuGetErrorString'
  | 'cuDeviceGetCount'
  | 'cuDeviceGet'
  | 'cuDeviceGetName'
  | 'cuDeviceGetAttribute'
  | 'cuDeviceTotalMem'
  | 'cuDevicePrimaryCtxRetain'
  | 'cuDevicePrimaryCtxRelease'
  | 'cuCtxPushCurrent'
  | 'cuCtxPopCurrent'
  | 'cuCtxGetCurrent';

const DEFAULT_SHARED_LIMIT = 48 * 1024;
const MAX_SHARED = 227 * 1024;
const POISON = 0xff;
const SCALAR_BYTES: Readonly<Record<string, number>> = { 8: 1, 16: 2, 32: 4, 64: 8 };

/** Entries of a PTX module with the sizes of their parameters, read from the text as the driver does. */
function parseEntries(ptx: string): Entry[] {
  return [...ptx.matchAll(/\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?/g)].map(([, name, parameters]) => ({
    name: name as string,
    ptx,
    parameterBytes: (parameters ?? '')
      .split(',')
      .map((text) => text.trim())
      .filter((text) => text !== '')
      .map((text) => {
        const array = text.match(/\.b8\s+\S+\[(\d+)\]/);
        if (array !== null) return Number(array[1]);
        const scalar = text.match(/\.[usbf](8|16|32|64)\b/);
        if (scalar === null) throw new Error(`parameter not understood: ${text}`);
        return SCALAR_BYTES[scalar[1] as string] as number;
      }),
    sharedLimit: DEFAULT_SHARED_LIMIT,
  }));
}

export class FakeCuda {
  readonly api: CudaApi;
  /** Names of all driver calls, in order. */
  readonly calls: string[] = [];
  /** Contexts made current and not popped, newest last; a test may push one of its own. */
  readonly contextStack: bigint[] = [];
  /** Kernels that have run, by entry. */
  readonly executed: string[] = [];

  readonly #options: Required<FakeCudaOptions>;
  readonly #failures = new Map<string, number[]>();
  readonly #faults = new Map<string, number>();
  readonly #contexts: Context[];
  readonly #streams = new Map<bigint, Stream>();
  readonly #events = new Map<bigint, Event>();
  readonly #modules = new Map<bigint, Entry[]>();
  readonly #functions = new Map<bigint, Entry>();
  readonly #pools = new Set<bigint>();
  readonly #graphs = new Map<bigint, readonly Operation[]>();
  readonly #graphExecutables = new Map<bigint, readonly Operation[]>();
  readonly #allocations: Allocation[] = [];
  readonly #hostAddresses = new WeakMap<ArrayBufferLike, bigint>();
  readonly #hostBuffers: { readonly base: bigint; readonly buffer: ArrayBufferLike }[] = [];
  readonly #registered: { readonly start: bigint; readonly bytes: bigint }[] = [];
  readonly #texts = new Map<bigint, string>();
  readonly #tensorMaps: FakeTensorMap[] = [];
  #nextHandle = 0x1000n;
  #nextDevice = 0x7000_0000_0000n;
  #nextHost = 0x5000_0000_0008n;

  constructor(options: FakeCudaOptions = {}) {
    this.#options = {
      devices: options.devices ?? [90],
      execute: options.execute ?? (() => undefined),
      memoryBytes: options.memoryBytes ?? 2 ** 30,
      pools: options.pools ?? true,
      reuse: options.reuse ?? false,
    };
    this.#contexts = this.#options.devices.map((_, device) => ({
      handle: 0xc000n + BigInt(device),
      device,
      retained: 0,
      fault: 0,
    }));
    this.api = this.#createApi();
  }

  /** The next calls of a function return these statuses instead of doing anything; 0 lets one through. */
  failNext(name: keyof DriverFunctions, ...statuses: number[]): void {
    this.#failures.set(name, [...(this.#failures.get(name) ?? []), ...statuses]);
  }

  /** The next run of a kernel ends in a fault of the device, which shows at a later call. */
  faultIn(entry: string, status: number): void {
    this.#faults.set(entry, status);
  }

  /** Device allocations that have not been freed, after all enqueued work. */
  get liveAllocations(): number {
    for (const stream of this.#streams.values()) this.#runUpTo({ stream, count: stream.operations.length });
    return this.#allocations.filter(({ freed }) => !freed).length;
  }

  /** Contents of the live allocations of a size, oldest first. */
  allocationsOf(bytes: number): Uint8Array[] {
    return this.#allocations.filter((a) => !a.freed && a.bytes.length === bytes).map((a) => a.bytes);
  }

  get liveHandles(): Readonly<Record<string, number>> {
    const streams = [...this.#streams.values()].filter(({ destroyed }) => !destroyed).length;
    return {
      streams,
      events: this.#events.size,
      modules: this.#modules.size,
      pools: this.#pools.size,
      graphs: this.#graphs.size + this.#graphExecutables.size,
      registrations: this.#registered.length,
      contexts: this.#contexts.reduce((sum, { retained }) => sum + retained, 0),
    };
  }

  /** A stream that the caller made with the driver himself. */
  foreignStream(device = 0): bigint {
    return this.#newStream(device);
  }

  /** Runs all that a stream holds, as time passing would. */
  drain(stream: bigint): void {
    const found = this.#streams.get(stream);
    if (found !== undefined) this.#runUpTo({ stream: found, count: found.operations.length });
  }

  /** Device memory, as a kernel would see it. Work that nobody waited for has not happened yet. */
  memory(pointer: bigint, bytes: number): Uint8Array {
    const found = this.#allocations.find(
      ({ base, bytes: { length } }) => pointer >= base && pointer + BigInt(bytes) <= base + BigInt(length),
    );
    if (found === undefined || found.freed) throw new DeviceFault(700);
    return found.bytes.subarray(Number(pointer - found.base));
  }

  #handle(): bigint {
    this.#nextHandle += 0x10n;
    return this.#nextHandle;
  }

  #newStream(device: number): bigint {
    const handle = this.#handle();
    const operations: Operation[] = [];
    const state = { handle, device, operations, done: 0, capture: undefined, captureBroken: false, destroyed: false };
    this.#streams.set(handle, state);
    return handle;
  }

  #allocate(bytes: number, device: number): bigint | undefined {
    const used = this.#allocations.reduce((sum, a) => sum + (a.freed || a.device !== device ? 0 : a.bytes.length), 0);
    if (used + bytes > this.#options.memoryBytes) return undefined;
    const again = this.#options.reuse
      ? this.#allocations.find((a) => a.freed && a.device === device && a.bytes.length === bytes)
      : undefined;
    if (again !== undefined) {
      again.freed = false;
      return again.base;
    }
    const base = this.#nextDevice;
    // A gap after each allocation: what runs over the end of one finds nothing.
    this.#nextDevice += BigInt(Math.ceil(bytes / 256) * 256 + 4096);
    this.#allocations.push({ base, bytes: new Uint8Array(bytes).fill(POISON), device, freed: false });
    return base;
  }

  #free(pointer: bigint): void {
    const found = this.#allocations.find(({ base }) => base === pointer);
    if (found === undefined || found.freed) throw new DeviceFault(700);
    found.freed = true;
    found.bytes.fill(POISON);
  }

  /** Runs a stream up to a point, and before each wait what it waits for. */
  #runUpTo({ stream, count }: Point): void {
    const context = this.#contexts[stream.device] as Context;
    while (stream.done < count && context.fault === 0) {
      const operation = stream.operations[stream.done] as Operation;
      stream.done++;
      if ('after' in operation) {
        this.#runUpTo(operation.after);
        continue;
      }
      try {
        operation.run();
      } catch (error) {
        if (!(error instanceof DeviceFault)) throw error;
        context.fault = error.status;
      }
    }
  }

  #hostAddress(buffer: ArrayBufferLike): bigint {
    let base = this.#hostAddresses.get(buffer);
    if (base === undefined) {
      base = this.#nextHost;
      this.#nextHost += BigInt(buffer.byteLength) + 4096n;
      // Addresses end in 8, as malloc's may: nothing may count on more.
      this.#nextHost += (8n - (this.#nextHost % 16n) + 16n) % 16n;
      this.#hostAddresses.set(buffer, base);
      this.#hostBuffers.push({ base, buffer });
    }
    return base;
  }

  /** Host memory behind a `memory` parameter. */
  #host(memory: ArrayBufferView | bigint | null, bytes: number): Uint8Array {
    if (memory === null) throw new Error('the driver would read address 0');
    if (typeof memory !== 'bigint') {
      if (memory.byteLength < bytes) throw new Error(`the driver would go ${bytes - memory.byteLength} bytes too far`);
      return new Uint8Array(memory.buffer, memory.byteOffset, bytes);
    }
    const found = this.#hostBuffers.find(
      ({ base, buffer }) => memory >= base && memory + BigInt(bytes) <= base + BigInt(buffer.byteLength),
    );
    if (found === undefined) throw new Error(`the driver would touch unknown host memory at ${memory}`);
    return new Uint8Array(found.buffer, Number(memory - found.base), bytes);
  }

  #view(memory: ArrayBufferView | bigint | null, bytes: number): DataView {
    const { buffer, byteOffset } = this.#host(memory, bytes);
    return new DataView(buffer, byteOffset, bytes);
  }

  #isRegistered(memory: ArrayBufferView | bigint | null, bytes: number): boolean {
    const start = typeof memory === 'bigint' ? memory : memory === null ? 0n : this.#viewAddress(memory);
    return this.#registered.some((range) => start >= range.start && start + BigInt(bytes) <= range.start + range.bytes);
  }

  #viewAddress(view: ArrayBufferView): bigint {
    return this.#hostAddress(view.buffer) + BigInt(view.byteOffset);
  }

  #launch(
    functionHandle: bigint,
    geometry: Pick<FakeLaunch, 'grid' | 'block' | 'cluster' | 'sharedBytes'>,
    streamHandle: bigint,
    parameterTable: ArrayBufferView | bigint | null,
  ): number {
    const kernel = this.#functions.get(functionHandle);
    const stream = this.#streams.get(streamHandle);
    if (kernel === undefined || stream === undefined || stream.destroyed) return 400;
    const { grid, block, cluster, sharedBytes } = geometry;
    const threads = block[0] * block[1] * block[2];
    const tooLarge = threads > 1024 || grid[1] > 65535 || grid[2] > 65535;
    const divisible = cluster === undefined || grid.every((size, i) => size % (cluster[i] as number) === 0);
    if (threads < 1 || grid.some((size) => size < 1) || tooLarge || !divisible) return 1;
    if (sharedBytes > kernel.sharedLimit) return 1;
    const { parameterBytes, name: entry, ptx } = kernel;
    const table = this.#view(parameterTable, 8 * parameterBytes.length);
    const parameters = parameterBytes.map((bytes, i) => this.#host(table.getBigUint64(8 * i, true), bytes).slice());
    const launch: FakeLaunch = {
      ...geometry,
      ptx,
      entry,
      parameters,
      device: stream.device,
      memory: (pointer, bytes) => this.memory(pointer, bytes),
      tensorMap: (parameter) => {
        const index = new DataView(parameter.buffer, parameter.byteOffset).getUint32(0, true);
        const map = this.#tensorMaps[index];
        if (map === undefined) throw new DeviceFault(700);
        return map;
      },
    };
    return this.#enqueue(stream, () => {
      this.executed.push(entry);
      const fault = this.#faults.get(entry);
      this.#faults.delete(entry);
      if (fault !== undefined) throw new DeviceFault(fault);
      this.#options.execute(launch);
    });
  }

  #enqueue(stream: Stream, run: () => void): number {
    (stream.capture ?? stream.operations).push({ run });
    return 0;
  }

  #onStream(handle: bigint | number, run: () => void): number {
    const stream = this.#streams.get(BigInt(handle));
    if (stream === undefined || stream.destroyed) return 400;
    return this.#enqueue(stream, run);
  }

  #describeText(status: number, index: 0 | 1, out: ArrayBufferView | bigint | null): number {
    const known = STATUS_NAMES[status];
    if (known === undefined) return 1;
    const address = 0x9000_0000n + BigInt(status * 2 + index);
    this.#texts.set(address, known[index]);
    this.#view(out, 8).setBigUint64(0, address, true);
    return 0;
  }

  /** The device of the current context. */
  get #current(): Context | undefined {
    const top = this.contextStack.at(-1);
    return this.#contexts.find(({ handle }) => handle === top);
  }

  #createApi(): CudaApi {
    const out64 = (memory: ArrayBufferView | bigint | null, value: bigint) =>
      this.#view(memory, 8).setBigUint64(0, value, true);
    const out32 = (memory: ArrayBufferView | bigint | null, value: number) =>
      this.#view(memory, 4).setInt32(0, value, true);
    const capability = (device: number) => this.#options.devices[device] as number;

    const anywhere: Pick<DriverFunctions, WithoutContext> = {
      cuInit: () => 0,
      cuDriverGetVersion: (version) => {
        out32(version, 13000);
        return 0;
      },
      cuGetErrorName: (status, text) => this.#describeText(status, 0, text),
      cuGetErrorString: (status, text) => this.#describeText(status, 1, text),
      cuDeviceGetCount: (count) => {
        out32(count, this.#options.devices.length);
        return 0;
      },
      cuDeviceGet: (device, ordinal) => {
        if (ordinal < 0 || ordinal >= this.#options.devices.length) return 101;
        out32(device, ordinal);
        return 0;
      },
      cuDeviceGetName: (name, length, device) => {
        const text = new TextEncoder().encode(`Fake GPU ${device}\0`);
        this.#host(name, length).set(text);
        return 0;
      },
      cuDeviceGetAttribute: (value, attribute, device) => {
        const values: Readonly<Record<number, number>> = {
          16: 4,
          75: Math.floor(capability(device) / 10),
          76: capability(device) % 10,
          97: MAX_SHARED,
          115: this.#options.pools ? 1 : 0,
        };
        const found = values[attribute];
        if (found === undefined) return 1;
        out32(value, found);
        return 0;
      },
      cuDeviceTotalMem: (bytes) => {
        out64(bytes, BigInt(this.#options.memoryBytes));
        return 0;
      },
      cuDevicePrimaryCtxRetain: (context, device) => {
        const found = this.#contexts[device];
        if (found === undefined) return 101;
        found.retained++;
        out64(context, found.handle);
        return 0;
      },
      cuDevicePrimaryCtxRelease: (device) => {
        const found = this.#contexts[device];
        if (found === undefined || found.retained === 0) return 201;
        found.retained--;
        return 0;
      },
      cuCtxPushCurrent: (context) => {
        this.contextStack.push(BigInt(context));
        return 0;
      },
      cuCtxPopCurrent: (context) => {
        const popped = this.contextStack.pop();
        if (popped === undefined) return 201;
        out64(context, popped);
        return 0;
      },
      cuCtxGetCurrent: (context) => {
        out64(context, this.contextStack.at(-1) ?? 0n);
        return 0;
      },
    };

    /** Functions that need a current context, and return its fault once it has one. */
    const inContext: Omit<DriverFunctions, WithoutContext> = {
      cuStreamCreate: (stream, flags) => {
        if (flags !== 1) throw new Error('a stream that synchronizes with the default stream');
        out64(stream, this.#newStream((this.#current as Context).device));
        return 0;
      },
      cuStreamDestroy: (handle) => {
        const stream = this.#streams.get(BigInt(handle));
        if (stream === undefined || stream.destroyed) return 400;
        this.#runUpTo({ stream, count: stream.operations.length });
        stream.destroyed = true;
        return 0;
      },
      cuStreamSynchronize: (handle) => {
        const stream = this.#streams.get(BigInt(handle));
        if (stream === undefined || stream.destroyed) return 400;
        if (stream.capture !== undefined) {
          stream.captureBroken = true;
          return 900;
        }
        this.#runUpTo({ stream, count: stream.operations.length });
        return (this.#contexts[stream.device] as Context).fault;
      },
      cuStreamWaitEvent: (handle, eventHandle) => {
        const stream = this.#streams.get(BigInt(handle));
        const event = this.#events.get(BigInt(eventHandle));
        if (stream === undefined || stream.destroyed || event === undefined) return 400;
        if (stream.capture !== undefined) {
          stream.captureBroken = true;
          return 905;
        }
        if (event.point !== undefined) stream.operations.push({ after: event.point });
        return 0;
      },
      cuStreamIsCapturing: (handle, status) => {
        const stream = this.#streams.get(BigInt(handle));
        if (stream === undefined || stream.destroyed) return 400;
        out32(status, stream.capture === undefined ? 0 : stream.captureBroken ? 2 : 1);
        return 0;
      },
      cuStreamBeginCapture: (handle) => {
        const stream = this.#streams.get(BigInt(handle));
        if (stream === undefined || stream.destroyed) return 400;
        stream.capture = [];
        stream.captureBroken = false;
        return 0;
      },
      cuStreamEndCapture: (handle, graph) => {
        const stream = this.#streams.get(BigInt(handle));
        if (stream?.capture === undefined) return 1;
        const operations = stream.capture;
        stream.capture = undefined;
        if (stream.captureBroken) return 901;
        const made = this.#handle();
        this.#graphs.set(made, operations);
        out64(graph, made);
        return 0;
      },
      cuEventCreate: (event, flags) => {
        const handle = this.#handle();
        this.#events.set(handle, { point: undefined, queries: 0, timing: flags !== 2 });
        out64(event, handle);
        return 0;
      },
      cuEventDestroy: (handle) => (this.#events.delete(BigInt(handle)) ? 0 : 400),
      cuEventRecord: (handle, streamHandle) => {
        const event = this.#events.get(BigInt(handle));
        const stream = this.#streams.get(BigInt(streamHandle));
        if (event === undefined || stream === undefined || stream.destroyed) return 400;
        if (stream.capture !== undefined) return 900;
        event.point = { stream, count: stream.operations.length };
        event.queries = 0;
        return 0;
      },
      cuEventQuery: (handle) => {
        const event = this.#events.get(BigInt(handle));
        if (event === undefined) return 400;
        if (event.point === undefined) return 0;
        // Not ready at first, so that waiting is really done.
        if (event.queries++ < 2) return CUDA_ERROR_NOT_READY;
        this.#runUpTo(event.point);
        return (this.#contexts[event.point.stream.device] as Context).fault;
      },
      cuEventSynchronize: (handle) => {
        const event = this.#events.get(BigInt(handle));
        if (event === undefined) return 400;
        if (event.point === undefined) return 0;
        this.#runUpTo(event.point);
        return (this.#contexts[event.point.stream.device] as Context).fault;
      },
      cuEventElapsedTime: (milliseconds, start, end) => {
        const events = [start, end].map((handle) => this.#events.get(BigInt(handle)));
        if (events.some((event) => event === undefined || !event.timing)) return 400;
        this.#view(milliseconds, 4).setFloat32(0, 0.25, true);
        return 0;
      },
      cuMemGetInfo: (free, total) => {
        out64(free, BigInt(this.#options.memoryBytes));
        out64(total, BigInt(this.#options.memoryBytes));
        return 0;
      },
      cuMemAlloc: (pointer, bytes) => {
        const made = this.#allocate(Number(bytes), (this.#current as Context).device);
        if (made === undefined) return 2;
        out64(pointer, made);
        return 0;
      },
      cuMemFree: (pointer) => {
        // The driver waits for all work before it frees synchronously.
        for (const stream of this.#streams.values()) this.#runUpTo({ stream, count: stream.operations.length });
        this.#free(BigInt(pointer));
        return 0;
      },
      cuMemPoolCreate: (pool, properties) => {
        const layout = STRUCTS.CUmemPoolProps;
        const view = this.#view(properties, layout.size);
        const { device } = this.#current as Context;
        if (view.getInt32(layout.allocType, true) !== 1 || view.getInt32(layout['location.type'], true) !== 1) return 1;
        if (view.getInt32(layout['location.id'], true) !== device) return 1;
        const handle = this.#handle();
        this.#pools.add(handle);
        out64(pool, handle);
        return 0;
      },
      cuMemPoolDestroy: (pool) => (this.#pools.delete(BigInt(pool)) ? 0 : 400),
      cuMemPoolSetAttribute: (pool) => (this.#pools.has(BigInt(pool)) ? 0 : 400),
      cuMemPoolTrimTo: (pool) => (this.#pools.has(BigInt(pool)) ? 0 : 400),
      cuMemAllocFromPoolAsync: (pointer, bytes, pool, handle) => {
        const stream = this.#streams.get(BigInt(handle));
        if (!this.#pools.has(BigInt(pool)) || stream === undefined || stream.destroyed) return 400;
        if (stream.capture !== undefined) {
          stream.captureBroken = true;
          return 900;
        }
        const made = this.#allocate(Number(bytes), stream.device);
        if (made === undefined) return 2;
        out64(pointer, made);
        return 0;
      },
      cuMemFreeAsync: (pointer, stream) => this.#onStream(stream, () => this.#free(BigInt(pointer))),
      cuMemHostRegister: (memory, bytes) => {
        const start = typeof memory === 'bigint' ? memory : this.#viewAddress(memory as ArrayBufferView);
        const end = start + BigInt(bytes);
        this.#host(start, Number(bytes));
        const firstPage = start / 4096n;
        const lastPage = (end - 1n) / 4096n;
        const overlaps = this.#registered.some(
          (range) => firstPage <= (range.start + range.bytes - 1n) / 4096n && lastPage >= range.start / 4096n,
        );
        if (overlaps) return 712;
        this.#registered.push({ start, bytes: BigInt(bytes) });
        return 0;
      },
      cuMemHostUnregister: (memory) => {
        const index = this.#registered.findIndex(({ start }) => start === memory);
        if (index < 0) return 713;
        this.#registered.splice(index, 1);
        return 0;
      },
      cuMemcpyHtoDAsync: (target, source, bytes, stream) => {
        const size = Number(bytes);
        const host = this.#host(source, size);
        // Read only when the copy runs: a source that changes before is a mistake that shows.
        return this.#onStream(stream, () => this.memory(BigInt(target), size).set(host));
      },
      cuMemcpyDtoHAsync: (target, source, bytes, handle) => {
        const size = Number(bytes);
        const host = this.#host(target, size);
        const status = this.#onStream(handle, () => host.set(this.memory(BigInt(source), size).subarray(0, size)));
        if (status !== 0 || this.#isRegistered(target, size)) return status;
        // Into pageable memory the driver returns only when the bytes are there.
        const stream = this.#streams.get(BigInt(handle)) as Stream;
        if (stream.capture !== undefined) return 900;
        this.#runUpTo({ stream, count: stream.operations.length });
        return (this.#contexts[stream.device] as Context).fault;
      },
      cuMemcpyDtoDAsync: (target, source, bytes, stream) => {
        const size = Number(bytes);
        return this.#onStream(stream, () =>
          this.memory(BigInt(target), size).set(this.memory(BigInt(source), size).subarray(0, size)),
        );
      },
      cuMemcpy2DAsync: (parameters, stream) => {
        const layout = STRUCTS.CUDA_MEMCPY2D;
        const view = this.#view(parameters, layout.size);
        const at = (offset: number) => view.getBigUint64(offset, true);
        const [source, target] = [at(layout.srcDevice), at(layout.dstDevice)];
        const [sourcePitch, targetPitch] = [at(layout.srcPitch), at(layout.dstPitch)];
        const [width, height] = [Number(at(layout.WidthInBytes)), Number(at(layout.Height))];
        const onDevice = [layout.srcMemoryType, layout.dstMemoryType].every((o) => view.getUint32(o, true) === 2);
        const pitched = height <= 1 || (sourcePitch >= BigInt(width) && targetPitch >= BigInt(width));
        if (!onDevice || !pitched || sourcePitch >= 2n ** 31n || targetPitch >= 2n ** 31n) return 1;
        return this.#onStream(stream, () => {
          for (let row = 0n; row < BigInt(height); row++) {
            const from = this.memory(source + row * sourcePitch, width).subarray(0, width);
            this.memory(target + row * targetPitch, width).set(from);
          }
        });
      },
      cuMemsetD8Async: (target, value, bytes, stream) =>
        this.#onStream(stream, () => {
          this.memory(BigInt(target), Number(bytes)).fill(value, 0, Number(bytes));
        }),
      cuModuleLoadDataEx: (module, image, count, options, values) => {
        const ptx = new TextDecoder().decode((image as Uint8Array).subarray(0, -1));
        const codes = this.#view(options, 4 * count);
        const logs = this.#view(values, 8 * count);
        const log = (option: number, sizeOption: number, text: string) => {
          const index = Array.from({ length: count }, (_, i) => codes.getUint32(4 * i, true));
          const size = Number(logs.getBigUint64(8 * index.indexOf(sizeOption), true));
          const address = logs.getBigUint64(8 * index.indexOf(option), true);
          this.#host(address, size).set(new TextEncoder().encode(`${text}\0`));
        };
        const target = Number(ptx.match(/\.target\s+sm_(\d+)/)?.[1] ?? Number.NaN);
        const entries = parseEntries(ptx);
        if (Number.isNaN(target) || entries.length === 0) {
          log(
            5,
            6,
            "ptxas application ptx input, line 1; fatal : Missing .version directive at start of file '(null)'",
          );
          return 218;
        }
        const { device } = this.#current as Context;
        if (target > capability(device)) {
          log(5, 6, `ptxas fatal : SM version specified by .target is higher than default SM version assumed`);
          return 209;
        }
        log(3, 4, `ptxas info : Compiling entry function '${entries[0]?.name}' for 'sm_${capability(device)}'`);
        const handle = this.#handle();
        this.#modules.set(handle, entries);
        out64(module, handle);
        return 0;
      },
      cuModuleUnload: (module) => (this.#modules.delete(BigInt(module)) ? 0 : 400),
      cuModuleGetFunction: (kernel, module, name) => {
        const text = new TextDecoder().decode((name as Uint8Array).subarray(0, -1));
        const entry = this.#modules.get(BigInt(module))?.find((candidate) => candidate.name === text);
        if (entry === undefined) return 500;
        const handle = this.#handle();
        this.#functions.set(handle, entry);
        out64(kernel, handle);
        return 0;
      },
      cuFuncGetAttribute: (value, attribute) => {
        out32(value, attribute === 4 ? 168 : 0);
        return 0;
      },
      cuFuncSetAttribute: (kernel, attribute, value) => {
        const entry = this.#functions.get(BigInt(kernel));
        if (entry === undefined) return 400;
        if (attribute === 8 && value > MAX_SHARED) return 1;
        if (attribute === 8) entry.sharedLimit = value;
        return 0;
      },
      cuLaunchKernel: (kernel, gx, gy, gz, bx, by, bz, sharedBytes, stream, parameters) =>
        this.#launch(
          BigInt(kernel),
          { grid: [gx, gy, gz], block: [bx, by, bz], cluster: undefined, sharedBytes },
          BigInt(stream),
          parameters,
        ),
      cuLaunchKernelEx: (config, kernel, parameters) => {
        const layout = STRUCTS.CUlaunchConfig;
        const view = this.#view(config, layout.size);
        const u32 = (offset: number) => view.getUint32(offset, true);
        let cluster: FakeLaunch['cluster'];
        for (let i = 0; i < u32(layout.numAttrs); i++) {
          const { size, id, value } = STRUCTS.CUlaunchAttribute;
          const attribute = this.#view(view.getBigUint64(layout.attrs, true) + BigInt(i * size), size);
          if (attribute.getUint32(id, true) !== 4) return 1;
          cluster = [0, 4, 8].map((offset) => attribute.getUint32(value + offset, true)) as [number, number, number];
        }
        return this.#launch(
          BigInt(kernel),
          {
            grid: [u32(layout.gridDimX), u32(layout.gridDimY), u32(layout.gridDimZ)],
            block: [u32(layout.blockDimX), u32(layout.blockDimY), u32(layout.blockDimZ)],
            cluster,
            sharedBytes: u32(layout.sharedMemBytes),
          },
          view.getBigUint64(layout.hStream, true),
          parameters,
        );
      },
      cuTensorMapEncodeTiled: (map, elementType, rank, pointer, dims, strides, box, elements, interleave, swizzle) => {
        const address = map as bigint;
        const u64s = (memory: ArrayBufferView | bigint | null, count: number) => {
          const view = this.#view(memory, 8 * count);
          return Array.from({ length: count }, (_, i) => view.getBigUint64(8 * i, true));
        };
        const u32s = (memory: ArrayBufferView | bigint | null) => {
          const view = this.#view(memory, 4 * rank);
          return Array.from({ length: rank }, (_, i) => view.getUint32(4 * i, true));
        };
        const description: FakeTensorMap = {
          elementType,
          pointer: BigInt(pointer),
          dimensions: u64s(dims, rank),
          byteStrides: u64s(strides, rank - 1),
          box: u32s(box),
          elementStrides: u32s(elements),
          interleave,
          swizzle,
        };
        const valid =
          address % 64n === 0n &&
          rank >= 1 &&
          rank <= 5 &&
          description.pointer % 16n === 0n &&
          description.dimensions.every((size) => size > 0n && size <= 2n ** 32n) &&
          description.byteStrides.every((stride) => stride % 16n === 0n && stride < 2n ** 40n) &&
          description.box.every((size) => size > 0 && size <= 256) &&
          description.elementStrides.every((stride) => stride > 0 && stride <= 8);
        if (!valid) return 1;
        this.#view(address, STRUCTS.CUtensorMap.size).setUint32(0, this.#tensorMaps.length, true);
        this.#tensorMaps.push(description);
        return 0;
      },
      cuGraphInstantiate: (executable, graph) => {
        const operations = this.#graphs.get(BigInt(graph));
        if (operations === undefined) return 400;
        const handle = this.#handle();
        this.#graphExecutables.set(handle, operations);
        out64(executable, handle);
        return 0;
      },
      cuGraphLaunch: (executable, handle) => {
        const operations = this.#graphExecutables.get(BigInt(executable));
        const stream = this.#streams.get(BigInt(handle));
        if (operations === undefined || stream === undefined || stream.destroyed) return 400;
        stream.operations.push(...operations);
        return 0;
      },
      cuGraphExecDestroy: (executable) => (this.#graphExecutables.delete(BigInt(executable)) ? 0 : 400),
      cuGraphDestroy: (graph) => (this.#graphs.delete(BigInt(graph)) ? 0 : 400),
    };

    const guard =
      (name: string, body: (...values: never[]) => number, needsContext: boolean) =>
      (...values: never[]): number => {
        this.calls.push(name);
        const injected = this.#failures.get(name)?.shift() ?? 0;
        if (injected !== 0) return injected;
        if (needsContext) {
          const context = this.#current;
          if (context === undefined) return 201;
          if (context.fault !== 0) return context.fault;
        }
        return body(...values);
      };
    const guarded = Object.fromEntries([
      ...Object.entries(anywhere).map(([name, body]) => [name, guard(name, body as never, false)]),
      ...Object.entries(inContext).map(([name, body]) => [name, guard(name, body as never, true)]),
    ]) as unknown as DriverFunctions;

    return {
      ...guarded,
      library: 'fake',
      has: (name) => this.#options.pools || !name.startsWith('cuMemPool'),
      addressOf: (buffer) => this.#hostAddress(buffer),
      textAt: (address) => this.#texts.get(address) ?? '',
    };
  }
}
