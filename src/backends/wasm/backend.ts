/** The WASM backend. */

import { type BackwardProblem, gradientOutputs } from '../../attention/backward.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { debugPlan } from '../../debug.ts';
import { ASYNC_DISPOSE, DISPOSE } from '../../dispose.ts';
import { BackendUnavailableError, ExecutionError, InvalidArgumentError, takeOptions, textOf } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  Availability,
  Backend,
  BackwardPlan,
  BackwardSupport,
  KernelChoice,
  KernelDescriptor,
  KeyValueContext,
  Plan,
  PreparedKeyValue,
} from '../backend.ts';
import { unavailable } from '../load-code.ts';
import { backwardCall } from './backward.ts';
import { arithmeticOf, wholeCall } from './calls.ts';
import { createExecutor, type ExecutorKind } from './executor.ts';
import type { Simd } from './geometry.ts';
import { ACCURATE_KERNEL, BACKWARD, FP4_KERNEL, INTEGER_KERNEL, MAX_BACKWARD_HEAD_DIM } from './kernel-table.ts';
import { WasmKeyValue } from './key-value.ts';
import { type KernelSources, type LoadedModule, loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';
import { ownInputs } from './staging.ts';
import { defaultThreads } from './workers.ts';

export interface WasmBackendOptions {
  /** Worker threads, 1 to 256; default: one for each processor, at most 16. */
  readonly threads?: number;
  /** `'auto'`: relaxed SIMD where the engine computes it exactly, else SIMD128. */
  readonly simd?: 'auto' | Simd;
  /**
   * Address of the workers' program in browsers, the file `sageattention/wasm/worker` of this package: for pages whose
   * Content-Security-Policy allows workers of their own origin but not `blob:`, which is the default. Where no worker
   * can be started, calls run on the calling thread.
   */
  readonly workerUrl?: string | URL;
}

/** A backend of its own, with its own threads and memory. */
export interface WasmBackend extends Backend, Disposable, AsyncDisposable {
  readonly name: 'wasm';
}

/** What is chosen for a backend besides its options. */
export interface WasmBackendParts {
  /** Default: the best there is. */
  readonly kind?: ExecutorKind;
  /** Default: each is imported when it is needed. */
  readonly sources?: KernelSources;
}

const OPTION_NAMES = ['threads', 'simd', 'workerUrl'] as const satisfies readonly (keyof WasmBackendOptions)[];
const MOST_THREADS = 256;

class WasmBackendImplementation implements WasmBackend {
  readonly name = 'wasm';
  readonly kernels: readonly KernelDescriptor[] = [INTEGER_KERNEL, ACCURATE_KERNEL, FP4_KERNEL];
  readonly #threads: number;
  readonly #simd: 'auto' | Simd;
  readonly #workerUrl: string | URL | undefined;
  readonly #kind: ExecutorKind | undefined;
  readonly #sources: KernelSources | undefined;
  #module: Promise<LoadedModule> | undefined;
  #runtime: Promise<Runtime> | undefined;
  /** The last one that was seen running. */
  #started: Runtime | undefined;

  constructor(options: WasmBackendOptions, { kind, sources }: WasmBackendParts) {
    this.#threads = options.threads ?? defaultThreads();
    this.#simd = options.simd ?? 'auto';
    this.#workerUrl = options.workerUrl;
    this.#kind = kind;
    this.#sources = sources;
  }

  async #start(): Promise<Runtime> {
    if (typeof WebAssembly !== 'object') {
      throw new BackendUnavailableError('wasm', 'there is no WebAssembly here', 'Use Node 20 or a current browser');
    }
    this.#module ??= loadModule(this.#simd, this.#sources).catch((error: unknown) => {
      // Code that a host did not serve may come the next time.
      this.#module = undefined;
      throw error;
    });
    const { module, simd, relaxed } = await this.#module;
    const kind = this.#kind;
    const executor = await createExecutor(module, { threads: this.#threads, workerUrl: this.#workerUrl, kind });
    return new Runtime(executor, simd, relaxed);
  }

  /**
   * The runtime; a new one after a failure that took the memory along.
   *
   * @throws {ExecutionError} `disposed` when the backend is disposed while the runtime starts
   */
  async #current(): Promise<Runtime> {
    for (;;) {
      this.#runtime ??= this.#start();
      const started = this.#runtime;
      let runtime: Runtime;
      try {
        runtime = await started;
      } catch (error) {
        if (this.#runtime === started) this.#runtime = undefined;
        throw error;
      }
      const { ended } = runtime.executor;
      const replaced = this.#runtime !== started;
      if (ended === undefined && !replaced) {
        this.#started = runtime;
        return runtime;
      }
      // dispose() lets go of its runtime at once and ends it a little later.
      if (replaced && (ended === undefined || ended.code === 'disposed')) {
        throw ended ?? new ExecutionError('disposed', 'the WASM backend was disposed before the call began');
      }
      if (!replaced) this.#runtime = undefined;
    }
  }

  /** The runtime if it runs already. */
  #ready(): Runtime | undefined {
    return this.#started?.executor.ended === undefined ? this.#started : undefined;
  }

  async availability(): Promise<Availability> {
    try {
      const { simd, relaxed, executor } = await this.#current();
      const { usedBytes, capacityBytes } = executor.memory;
      return {
        available: true,
        accelerated: false,
        details: {
          simd,
          'relaxed SIMD': relaxed,
          threads: executor.description,
          memory: `${usedBytes / 1024} KiB in use of ${capacityBytes / 1024} KiB`,
        },
      };
    } catch (error) {
      return unavailable(error);
    }
  }

  defaultKernel(): KernelDescriptor {
    return INTEGER_KERNEL;
  }

  async plan(problem: AttentionProblem, kernel: KernelChoice): Promise<Plan> {
    const { simd, executor } = await this.#current();
    debugPlan(() => ({
      backend: 'wasm',
      kernel: kernel.descriptor.name,
      settings: { pvAccumDtype: kernel.pvAccumDtype, simd, threads: executor.description },
      // One module of functions for everything: `generated/` has it, and `assembly/` its source.
      launches: [],
    }));
    return {
      kernel,
      outputs: attentionOutputs(problem),
      // Inputs are read before this returns: at once, or as copies where the threads must be started again.
      run: async (inputs, context) => {
        const ready = this.#ready();
        const operands = ready === undefined ? ownInputs(inputs) : inputs;
        const runtime = ready ?? (await this.#current());
        return runtime.run(context, wholeCall(runtime, problem, arithmeticOf(kernel), operands));
      },
      dispose: () => {},
    };
  }

  async backwardSupport({ headDim, valueDim }: AttentionProblem): Promise<BackwardSupport | undefined> {
    return Math.max(headDim, valueDim) > MAX_BACKWARD_HEAD_DIM ? undefined : BACKWARD;
  }

  async planBackward(problem: BackwardProblem, kernel: KernelChoice): Promise<BackwardPlan> {
    await this.#current();
    const arithmetic = { ...arithmeticOf(kernel), smoothV: false };
    return {
      kernel,
      outputs: gradientOutputs(problem),
      run: async (inputs, context) => {
        const ready = this.#ready();
        const operands = ready === undefined ? ownInputs(inputs) : inputs;
        const runtime = ready ?? (await this.#current());
        return runtime.run(context, backwardCall(runtime, problem, arithmetic, operands));
      },
      dispose: () => {},
    };
  }

  async prepareKeyValue(
    problem: AttentionProblem,
    kernel: KernelChoice,
    k: TensorView,
    v: TensorView,
    context: KeyValueContext,
  ): Promise<PreparedKeyValue> {
    const ready = this.#ready();
    const given = { k, v, keyMask: context.keyMask };
    const { keyMask, ...operands } = ready === undefined ? ownInputs(given) : given;
    const prepared = new WasmKeyValue(ready ?? (await this.#current()), problem, kernel);
    try {
      await prepared.append(operands.k, operands.v, problem, keyMask === undefined ? context : { ...context, keyMask });
    } catch (error) {
      prepared.dispose();
      throw error;
    }
    return prepared;
  }

  async dispose(): Promise<void> {
    const runtime = this.#runtime;
    this.#runtime = undefined;
    this.#started = undefined;
    await (await runtime?.catch(() => undefined))?.executor.dispose();
  }

  [DISPOSE](): void {
    void this.dispose();
  }

  [ASYNC_DISPOSE](): Promise<void> {
    return this.dispose();
  }
}

/**
 * A WASM backend. `sageattn` uses one of default options by itself; give this one to `setBackend`, or use it directly,
 * to choose threads or SIMD.
 *
 * @throws {InvalidArgumentError} `invalid-option` or `unknown-option`
 */
export function createWasmBackend(options: WasmBackendOptions = {}): WasmBackend {
  return createWasmBackendOn(options);
}

/**
 * @internal With chosen parts.
 */
export function createWasmBackendOn(options: WasmBackendOptions, parts: WasmBackendParts = {}): WasmBackend {
  const own = takeOptions(options, OPTION_NAMES);
  const { threads, simd, workerUrl } = own;
  if (threads !== undefined && !(Number.isInteger(threads) && threads >= 1 && threads <= MOST_THREADS)) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.threads',
      `an integer from 1 to ${MOST_THREADS}`,
      textOf(threads),
    );
  }
  if (simd !== undefined && !['auto', 'simd128', 'relaxed'].includes(simd)) {
    throw new InvalidArgumentError('invalid-option', 'options.simd', "'auto', 'simd128' or 'relaxed'", textOf(simd));
  }
  if (workerUrl !== undefined && typeof workerUrl !== 'string' && !(workerUrl instanceof URL)) {
    throw new InvalidArgumentError('invalid-option', 'options.workerUrl', 'a string or URL', typeof workerUrl);
  }
  return new WasmBackendImplementation(own, parts);
}
