/**
 * A CUDA driver without a GPU: the functions of {@link CudaApi} over host memory, for tests of everything above them.
 * It reads the same bytes that the driver would read (structs, parameter arrays, log options), checks what the driver
 * checks, and is as asynchronous as it may be: work of a stream runs only when something waits for it, so that a
 * missing wait between two streams shows as wrong data, and memory freed too early as a fault. Kernels run in a hook.
 */
import type { CudaApi, DriverFunctions } from '../driver/api.ts';
import { FakeContexts } from './fake-cuda/contexts.ts';
import { FakeHost } from './fake-cuda/host.ts';
import { FakeMemory } from './fake-cuda/memory.ts';
import { type FakeLaunch, FakeModules } from './fake-cuda/modules.ts';
import { FakeStreams } from './fake-cuda/streams.ts';

export type { FakeLaunch, FakeTensorMap } from './fake-cuda/modules.ts';

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

export class FakeCuda {
  readonly api: CudaApi;
  /** Names of all driver calls, in order. */
  readonly calls: string[] = [];
  readonly #failures = new Map<string, number[]>();
  readonly #pools: boolean;
  readonly #host = new FakeHost();
  readonly #contexts: FakeContexts;
  readonly #streams: FakeStreams;
  readonly #memory: FakeMemory;
  readonly #modules: FakeModules;

  constructor({
    devices = [90],
    execute = () => undefined,
    memoryBytes = 2 ** 30,
    pools = true,
    reuse = false,
  }: FakeCudaOptions = {}) {
    this.#pools = pools;
    this.#contexts = new FakeContexts({ devices, memoryBytes, pools }, this.#host);
    this.#streams = new FakeStreams(this.#contexts, this.#host);
    this.#memory = new FakeMemory({ memoryBytes, reuse }, this.#contexts, this.#host, this.#streams);
    this.#modules = new FakeModules(execute, this.#contexts, this.#host, this.#streams, this.#memory);
    this.api = this.#createApi();
  }

  /** Contexts made current and not popped, newest last; a test may push one of its own. */
  get contextStack(): bigint[] {
    return this.#contexts.stack;
  }

  /** Kernels that have run, by entry. */
  get executed(): string[] {
    return this.#modules.executed;
  }

  /** The next calls of a function return these statuses instead of doing anything; 0 lets one through. */
  failNext(name: keyof DriverFunctions, ...statuses: number[]): void {
    this.#failures.set(name, [...(this.#failures.get(name) ?? []), ...statuses]);
  }

  /** The next run of a kernel ends in a fault of the device, which shows at a later call. */
  faultIn(entry: string, status: number): void {
    this.#modules.faultIn(entry, status);
  }

  /** Device allocations that have not been freed, after all enqueued work. */
  get liveAllocations(): number {
    this.#streams.drainAll();
    return this.#memory.live.length;
  }

  /** Contents of the live allocations of a size, oldest first. */
  allocationsOf(bytes: number): Uint8Array[] {
    return this.#memory.live.filter(({ length }) => length === bytes);
  }

  get liveHandles(): Readonly<Record<string, number>> {
    return {
      ...this.#streams.live,
      modules: this.#modules.live,
      pools: this.#memory.pools,
      registrations: this.#host.registrations,
      contexts: this.#contexts.retained,
    };
  }

  /** A stream that the caller made with the driver. */
  foreignStream(device = 0): bigint {
    return this.#streams.newStream(device);
  }

  /** Runs all that a stream holds, as time passing would. */
  drain(handle: bigint): void {
    const stream = this.#streams.find(handle);
    if (stream !== undefined) this.#streams.drain(stream);
  }

  /** Device memory, as a kernel would see it. Work that nobody waited for has not happened yet. */
  memory(pointer: bigint, bytes: number): Uint8Array {
    return this.#memory.at(pointer, bytes);
  }

  /**
   * A function that notes its call, fails where a test asked for it, and returns the fault of a context that has one.
   */
  #guarded(name: string, body: (...values: never[]) => number, needsContext: boolean) {
    return (...values: never[]): number => {
      this.calls.push(name);
      const injected = this.#failures.get(name)?.shift() ?? 0;
      if (injected !== 0) return injected;
      if (needsContext) {
        const context = this.#contexts.current;
        if (context === undefined) return 201;
        if (context.fault !== 0) return context.fault;
      }
      return body(...values);
    };
  }

  #createApi(): CudaApi {
    const anywhere = { ...this.#contexts.functions, ...this.#host.statusFunctions };
    const inContext: Omit<DriverFunctions, keyof typeof anywhere> = {
      ...this.#host.functions,
      ...this.#streams.functions,
      ...this.#streams.graphFunctions,
      ...this.#memory.functions,
      ...this.#modules.functions,
    };
    const guarded = Object.fromEntries([
      ...Object.entries(anywhere).map(([name, body]) => [name, this.#guarded(name, body as never, false)]),
      ...Object.entries(inContext).map(([name, body]) => [name, this.#guarded(name, body as never, true)]),
    ]) as unknown as DriverFunctions;
    return {
      ...guarded,
      library: 'fake',
      has: (name) => this.#pools || !name.startsWith('cuMemPool'),
      addressOf: (buffer) => this.#host.addressOf(buffer),
      bytesAt: (address, byteLength) => this.#host.bytes(address, byteLength).slice(),
      textAt: (address) => this.#host.textAt(address),
    };
  }
}
