/** The WASM backend. */

import { type BackwardProblem, gradientOutputs } from '../../attention/backward.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { SettledSparsity } from '../../attention/sparsity.ts';
import { debugPlan } from '../../debug.ts';
import { ASYNC_DISPOSE, DISPOSE } from '../../dispose.ts';
import { BackendUnavailableError, InvalidArgumentError, takeOptions, textOf } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  Availability,
  Backend,
  BackwardPlan,
  BackwardSupport,
  BlockMapPlan,
  KernelChoice,
  KernelDescriptor,
  KeyValueContext,
  Plan,
  PreparedKeyValue,
} from '../backend.ts';
import { loadCode, unavailable } from '../load-code.ts';
import { backwardCall } from './backward.ts';
import { chooseBlockMap } from './block-map.ts';
import { HeadsAtOnce, runByHeads } from './by-heads.ts';
import { arithmeticOf, WholeCalls, workOf } from './calls.ts';
import { CallerExecutor, createWorkers, type ExecutorKind, SHORT_WORK } from './executor.ts';
import type { DotProduct, Simd } from './geometry.ts';
import {
  BACKWARD,
  choiceInWords,
  DOT_PRODUCTS,
  fastestKernel,
  INTEGER_KERNEL,
  KERNELS,
  MAX_BACKWARD_HEAD_DIM,
} from './kernel-table.ts';
import { WasmKeyValue } from './key-value.ts';
import { compileUnshared, type KernelSources, type LoadedModule, loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';
import { RuntimeSlot } from './runtime-slot.ts';
import { ownInputs } from './staging.ts';
import { canShare, defaultThreads } from './workers.ts';

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
  /**
   * `true`: vectors of 256 bits through V8's `--experimental-wasm-revectorize`, in Node 24 and later and nowhere else. The flag holds for all
   * WebAssembly that the process compiles afterwards. It is tried by value first; `availability()` says what became of it. Default: `false`.
   */
  readonly wide?: boolean;
}

/** A backend of its own, with its own threads and memory. */
export interface WasmBackend extends Backend, Disposable, AsyncDisposable {
  readonly name: 'wasm';
}

/**
 * Choices for a backend that are not among its public options.
 *
 * @internal
 */
export interface WasmBackendParts {
  /** Default: the best there is. */
  readonly kind?: ExecutorKind;
  /** Default: each is imported when it is needed. */
  readonly sources?: KernelSources;
  /** Multiply-adds up to which a call runs on the calling thread; default: {@link SHORT_WORK}. */
  readonly shortWork?: number;
  /** Only for tests, with kind `'inline'`: how dot products are taken, whatever the machine. */
  readonly twoSteps?: boolean;
}

const OPTION_NAMES = ['threads', 'simd', 'workerUrl', 'wide'] as const satisfies readonly (keyof WasmBackendOptions)[];
const MOST_THREADS = 256;

/** Runs a call. Inputs are read before this returns: at once, or as copies where the runtime must be started again. */
async function run<Inputs extends object, Result>(
  slot: RuntimeSlot,
  inputs: Inputs,
  begin: (runtime: Runtime, inputs: Inputs) => Promise<Result>,
): Promise<Result> {
  const ready = slot.ready();
  const operands = ready === undefined ? ownInputs(inputs) : inputs;
  const runtime = ready ?? (await slot.current());
  return begin(runtime, operands);
}

class WasmBackendImplementation implements WasmBackend {
  readonly name = 'wasm';
  readonly kernels = KERNELS;
  readonly #options: WasmBackendOptions;
  readonly #threads: number;
  readonly #parts: WasmBackendParts;
  readonly #shortWork: number;
  #module: Promise<LoadedModule> | undefined;
  /** How wide vectors are, where they were to be wider. */
  #vectors: Promise<string> | undefined;
  /** Of the module, once it is loaded. */
  #dotProduct: DotProduct | undefined;
  /** This thread, for short calls. */
  readonly #caller = new RuntimeSlot(() => this.#startCaller(`calls of up to ${this.#shortWork} multiply-adds`));
  /** Workers, for the others; this thread where there are none. */
  readonly #workers = new RuntimeSlot(() => this.#startWorkers());

  constructor(options: WasmBackendOptions, parts: WasmBackendParts) {
    this.#options = options;
    this.#parts = parts;
    this.#threads = options.threads ?? defaultThreads();
    const several = this.#threads > 1 && canShare() && parts.kind !== 'worker';
    this.#shortWork = parts.shortWork ?? (several ? SHORT_WORK.several : SHORT_WORK.one);
  }

  async #load(): Promise<LoadedModule> {
    if (typeof WebAssembly !== 'object') {
      throw new BackendUnavailableError('wasm', 'there is no WebAssembly here', 'Use Node 20 or a current browser');
    }
    this.#module ??= loadModule(this.#options.simd ?? 'auto', this.#parts.sources).catch((error: unknown) => {
      // Code that a host did not serve may come the next time.
      this.#module = undefined;
      throw error;
    });
    const loaded = await this.#module;
    if (this.#options.wide === true) {
      this.#vectors ??= loadCode('wasm', () => import('./wide.ts')).then(({ widen }) =>
        widen(loaded.simd, this.#parts.sources),
      );
      await this.#vectors;
    }
    this.#dotProduct = loaded.dotProduct;
    return loaded;
  }

  async #startCaller(reason: string): Promise<Runtime> {
    const { simd, relaxed } = await this.#load();
    const module = await compileUnshared(simd, this.#parts.sources);
    return new Runtime(await CallerExecutor.create(module, reason, this.#parts.twoSteps), simd, relaxed);
  }

  async #startWorkers(): Promise<Runtime> {
    const { module, simd, relaxed } = await this.#load();
    const workers = await createWorkers(module, {
      threads: this.#threads,
      workerUrl: this.#options.workerUrl,
      shortWork: this.#shortWork,
      kind: this.#parts.kind,
    });
    return typeof workers === 'string' ? this.#startCaller(workers) : new Runtime(workers, simd, relaxed);
  }

  async availability(): Promise<Availability> {
    try {
      const { simd, relaxed, executor } = await this.#workers.current();
      const { dotProduct } = await this.#load();
      const { usedBytes, capacityBytes } = executor.memory;
      return {
        available: true,
        accelerated: false,
        details: {
          simd,
          'relaxed SIMD': relaxed,
          'dot product': DOT_PRODUCTS[dotProduct].inWords,
          ...(this.#vectors === undefined ? {} : { vectors: await this.#vectors }),
          kernels: choiceInWords(dotProduct),
          threads: executor.description,
          'short calls': `this thread, up to ${this.#shortWork} multiply-adds`,
          memory: `${usedBytes / 1024} KiB in use of ${capacityBytes / 1024} KiB`,
        },
      };
    } catch (error) {
      return unavailable(error);
    }
  }

  defaultKernel(problem: AttentionProblem, { quantized = false } = {}): KernelDescriptor | Promise<KernelDescriptor> {
    if (quantized) return INTEGER_KERNEL;
    if (this.#dotProduct !== undefined) return fastestKernel(problem, this.#dotProduct);
    return this.#load().then(({ dotProduct }) => fastestKernel(problem, dotProduct));
  }

  async planBlockMap(problem: AttentionProblem, sparsity: SettledSparsity): Promise<BlockMapPlan> {
    const slot = workOf(problem) <= this.#shortWork ? this.#caller : this.#workers;
    return {
      run: (inputs, context) =>
        run(slot, inputs, (runtime, own) => chooseBlockMap(runtime, problem, sparsity, own, context)),
      dispose: () => undefined,
    };
  }

  async plan(problem: AttentionProblem, kernel: KernelChoice): Promise<Plan> {
    const slot = workOf(problem) <= this.#shortWork ? this.#caller : this.#workers;
    const { simd, executor } = await slot.current();
    const arithmetic = arithmeticOf(kernel);
    const calls = new WholeCalls(problem, arithmetic, simd);
    const fitting = new HeadsAtOnce(problem, arithmetic, simd);
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
      run: (inputs, context) =>
        run(slot, inputs, (runtime, own) => {
          const heads = fitting.in(runtime.executor.memory);
          return heads < problem.kvHeads
            ? runByHeads(runtime, problem, arithmetic, own, context, heads)
            : runtime.run(context, calls.parts(runtime, own, context.out));
        }),
      dispose: () => {},
    };
  }

  async backwardSupport({ headDim, valueDim }: AttentionProblem): Promise<BackwardSupport | undefined> {
    return Math.max(headDim, valueDim) > MAX_BACKWARD_HEAD_DIM ? undefined : BACKWARD;
  }

  async planBackward(problem: BackwardProblem, kernel: KernelChoice): Promise<BackwardPlan> {
    await this.#workers.current();
    const arithmetic = { ...arithmeticOf(kernel), smoothV: false };
    return {
      kernel,
      outputs: gradientOutputs(problem),
      run: (inputs, context) =>
        run(this.#workers, inputs, (runtime, own) =>
          runtime.run(context, backwardCall(runtime, problem, arithmetic, own)),
        ),
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
    const ready = this.#workers.ready();
    const given = { k, v, keyMask: context.keyMask };
    const { keyMask, ...operands } = ready === undefined ? ownInputs(given) : given;
    const prepared = new WasmKeyValue(ready ?? (await this.#workers.current()), problem, kernel);
    try {
      await prepared.append(operands.k, operands.v, problem, keyMask === undefined ? context : { ...context, keyMask });
    } catch (error) {
      prepared.dispose();
      throw error;
    }
    return prepared;
  }

  async dispose(): Promise<void> {
    await Promise.all([this.#caller.dispose(), this.#workers.dispose()]);
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
  const { threads, simd, workerUrl, wide } = own;
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
  if (wide !== undefined && typeof wide !== 'boolean') {
    throw new InvalidArgumentError('invalid-option', 'options.wide', 'a boolean', textOf(wide));
  }
  if (workerUrl !== undefined && typeof workerUrl !== 'string' && !(workerUrl instanceof URL)) {
    throw new InvalidArgumentError('invalid-option', 'options.workerUrl', 'a string or URL', typeof workerUrl);
  }
  return new WasmBackendImplementation(own, parts);
}
