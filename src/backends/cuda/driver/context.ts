/**
 * A device's primary context: every call of the driver goes through it, with the context current and the status
 * checked.
 */
import { ExecutionError } from '../../../errors.ts';
import type { CudaApi, DriverFunctionName, DriverFunctions } from './api.ts';
import { CUDA_SUCCESS } from './api.ts';
import { type CudaError, cudaError, losesContext } from './status.ts';

type Arguments<Name extends DriverFunctionName> = Parameters<DriverFunctions[Name]>;

/** Functions whose first parameter receives the handle that they make. */
type CreatingFunction =
  | 'cuStreamCreate'
  | 'cuEventCreate'
  | 'cuModuleGetFunction'
  | 'cuMemAlloc'
  | 'cuIpcOpenMemHandle'
  | 'cuMemAllocFromPoolAsync'
  | 'cuMemPoolCreate'
  | 'cuGraphInstantiate';

type AfterFirst<T extends readonly unknown[]> = T extends readonly [unknown, ...infer Rest] ? Rest : never;

/**
 * The context is made current for each call and taken away after it, so that a program's own CUDA use of the thread is
 * not disturbed.
 */
export abstract class DeviceContext {
  readonly api: CudaApi;
  readonly ordinal: number;
  /** The driver's number of the device. */
  readonly #device: number;
  /** Undefined until it is first needed: describing a device takes none of its memory. */
  #context: bigint | undefined;
  #lost: CudaError | undefined;
  #disposed = false;

  /** @throws {CudaError} the driver has no such device */
  constructor(api: CudaApi, ordinal: number) {
    this.api = api;
    this.ordinal = ordinal;
    const int = new Int32Array(1);
    const status = api.cuDeviceGet(int, ordinal);
    if (status !== CUDA_SUCCESS) throw cudaError(api, status, 'cuDeviceGet', `describing CUDA device ${ordinal}`);
    this.#device = int[0] as number;
  }

  /** @internal The driver's `CUdevice`. */
  get deviceHandle(): number {
    return this.#device;
  }

  /** @internal Kernels of this library that may be under way, for the error of a fault. */
  abstract pendingKernels(): Iterable<string>;

  /** The fault that made the device unusable for this process, if there was one. */
  get lost(): CudaError | undefined {
    return this.#lost;
  }

  /** Whether the context has been given up; what was made on it is gone. */
  get disposed(): boolean {
    return this.#disposed;
  }

  /** @internal */
  requireUsable(): void {
    if (this.#disposed) throw new ExecutionError('disposed', `${this} has been disposed`);
  }

  #openContext(): bigint {
    const context = new BigUint64Array(1);
    const status = this.api.cuDevicePrimaryCtxRetain(context, this.#device);
    if (status !== CUDA_SUCCESS) throw this.error(status, 'cuDevicePrimaryCtxRetain', `opening ${this}`);
    return context[0] as bigint;
  }

  /** @internal The driver's `CUcontext`, opened if it was not. */
  get contextHandle(): bigint {
    this.requireUsable();
    this.#context ??= this.#openContext();
    return this.#context;
  }

  /**
   * @internal Runs `use`, which must not be asynchronous, with the device's context current, and leaves the thread's
   *     context as it was. Inside another `inContext` of the same device it costs nothing.
   */
  inContext<T>(use: () => T): T {
    this.requireUsable();
    if (current === this) return use();
    const { api } = this;
    const pushed = api.cuCtxPushCurrent(this.contextHandle);
    if (pushed !== CUDA_SUCCESS) throw this.error(pushed, 'cuCtxPushCurrent', `using ${this}`);
    const before = current;
    current = this;
    let result: T;
    try {
      result = use();
    } catch (error) {
      current = before;
      // Its status would hide the error that is on its way; a fault that it reports is remembered.
      const popped = api.cuCtxPopCurrent(POPPED);
      if (popped !== CUDA_SUCCESS) this.error(popped, 'cuCtxPopCurrent', `leaving ${this}`);
      throw error;
    }
    current = before;
    const popped = api.cuCtxPopCurrent(POPPED);
    if (popped !== CUDA_SUCCESS) throw this.error(popped, 'cuCtxPopCurrent', `leaving ${this}`);
    return result;
  }

  /**
   * @internal Calls the driver with the context current and checks the status.
   *
   * @param what the operation under way, for the error message
   */
  call<Name extends DriverFunctionName>(name: Name, what: string, ...values: Arguments<Name>): void {
    const invoke = this.api[name] as (...values: unknown[]) => number;
    const status = this.inContext(() => invoke(...values));
    if (status !== CUDA_SUCCESS) throw this.error(status, name, what);
  }

  /** @internal {@link call} of a function that makes a handle. */
  create<Name extends CreatingFunction>(name: Name, what: string, ...values: AfterFirst<Arguments<Name>>): bigint {
    const handle = new BigUint64Array(1);
    const invoke = this.api[name] as (...values: unknown[]) => number;
    const status = this.inContext(() => invoke(handle, ...values));
    if (status !== CUDA_SUCCESS) throw this.error(status, name, what);
    return handle[0] as bigint;
  }

  /** @internal The error of a failed call. A fault of the device is remembered. */
  error(status: number, call: string, what: string): CudaError {
    const error = cudaError(this.api, status, call, what, [...new Set(this.pendingKernels())]);
    if (losesContext(status)) this.#lost ??= error;
    return error;
  }

  /**
   * @internal Runs calls that give something back. After a fault of the device there is nothing left to give back, and
   *     an error here would hide the one that tells of it.
   */
  release(use: () => void): void {
    if (this.#disposed) return;
    try {
      use();
    } catch (error) {
      if (this.#lost === undefined) throw error;
    }
  }

  /** @internal Gives the context up. */
  protected closeContext(): void {
    this.#disposed = true;
    if (this.#context === undefined) return;
    const status = this.api.cuDevicePrimaryCtxRelease(this.#device);
    // After a fault the context went with it.
    if (status !== CUDA_SUCCESS && this.#lost === undefined) {
      throw this.error(status, 'cuDevicePrimaryCtxRelease', `closing ${this}`);
    }
  }
}

/**
 * The device whose context this library has made current; each thread has its own module, and its own current context.
 */
let current: DeviceContext | undefined;

/** Where popped contexts go; nobody reads it. */
const POPPED = new BigUint64Array(1);
