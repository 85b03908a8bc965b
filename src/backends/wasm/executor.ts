/**
 * Who runs the kernels: worker threads over one shared memory, one worker with a memory of its own where memory cannot be
 * shared, or this thread where there are no workers.
 */
import { ExecutionError } from '../../errors.ts';
import { JOB_ABORT, SCRATCH_BYTES } from './job.ts';
import { MemoryPool } from './memory.ts';
import { instantiate, type KernelExports } from './modules.ts';
import { WORKER_SOURCE } from './worker-source.ts';

/** A kernel to run over a job's units. Stages of a call run one after another. */
export interface Stage {
  readonly entry: 'prepare' | 'attend';
  /** Address of the job record. */
  readonly job: number;
}

export interface Call {
  readonly stages: readonly Stage[];
  /** Most units of any stage: no more threads than this take part. */
  readonly units: number;
  /** Address of a zeroed 32-bit word for each stage. */
  readonly barriers: number;
  /** Bytes that a thread needs beyond SCRATCH_BYTES: one for each key of the longest sequence that has unseen keys. */
  readonly extraScratch: number;
}

export interface Executor {
  /** In words, for `doctor`. */
  readonly description: string;
  readonly threads: number;
  readonly memory: MemoryPool;
  /** Copies bytes into the kernels' memory. Calls that follow see them. */
  write(address: number, bytes: Uint8Array): void;
  read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Copies inside the memory, before calls that follow. */
  copy(from: number, to: number, length: number): void;
  /**
   * Why it takes no more calls: it was disposed, or its memory went with the worker that died. What was written is gone then,
   * and whatever needs it throws this. Undefined while it works.
   */
  readonly ended: ExecutionError | undefined;
  /**
   * Makes room for the scratch that a call needs.
   *
   * @throws {ExecutionError} `out-of-memory`
   */
  reserve(extraScratch: number): void;
  /**
   * Runs a call.
   *
   * @returns settles when no thread works on it any more
   */
  run(call: Call): Promise<void>;
  /** Makes a running or waiting call end at the next unit; `run` resolves then. */
  abort(call: Call): void;
  /** Ends it for good; running calls are rejected. */
  dispose(): Promise<void>;
}

/** WebAssembly's own limit; engines that cannot reserve so much address space get less. */
const LIMITS_PAGES = [65536, 32768, 16384, 8192, 4096];
const INITIAL_PAGES = 16;

function createMemory(): { memory: WebAssembly.Memory; limit: number } {
  let cause: unknown;
  for (const limit of LIMITS_PAGES) {
    try {
      return { memory: new WebAssembly.Memory({ initial: INITIAL_PAGES, maximum: limit, shared: true }), limit };
    } catch (error) {
      cause = error;
    }
  }
  throw new ExecutionError('out-of-memory', 'the engine does not give a shared WebAssembly memory', cause);
}

function writeTo(memory: WebAssembly.Memory, address: number, bytes: Uint8Array): void {
  new Uint8Array(memory.buffer, address, bytes.length).set(bytes);
}

function readFrom(memory: WebAssembly.Memory, address: number, length: number): Uint8Array<ArrayBuffer> {
  // A copy: the memory is handed out again, and views of shared memory are not taken everywhere.
  const copy = new Uint8Array(length);
  copy.set(new Uint8Array(memory.buffer, address, length));
  return copy;
}

/** What is used of a worker, alike in Node and in browsers. */
interface WorkerHandle {
  post(message: unknown, transfer?: ArrayBuffer[]): void;
  onMessage(listener: (message: Reply) => void): void;
  /** Called once when the worker ends without being asked. */
  onDeath(listener: (reason: unknown) => void): void;
  /** Whether a running worker keeps the process alive. */
  hold(held: boolean): void;
  terminate(): Promise<void>;
}

interface Reply {
  readonly id: number;
  readonly error?: string;
  readonly bytes?: Uint8Array<ArrayBuffer>;
}

type NodeWorkers = typeof import('node:worker_threads');

function nodeModule<T>(name: string): T | undefined {
  const { process } = globalThis as { process?: { getBuiltinModule?: (name: string) => T | undefined } };
  return process?.getBuiltinModule?.(name);
}

/** Time that a browser gets to stop a terminated worker before its memory is used again; nothing tells when it has. */
const TERMINATION_MS = 50;

/** Starts workers, or undefined where there are none. */
function workerFactory(): (() => WorkerHandle) | undefined {
  const node = nodeModule<NodeWorkers>('node:worker_threads');
  if (node !== undefined) {
    return () => {
      const worker = new node.Worker(WORKER_SOURCE, { eval: true, execArgv: [], name: 'sageattention' });
      worker.unref();
      return {
        post: (message, transfer) => worker.postMessage(message, transfer ?? []),
        onMessage: (listener) => worker.on('message', listener),
        onDeath: (listener) => {
          worker.on('error', listener);
          worker.on('exit', (code) => listener(new Error(`the worker exited with code ${code}`)));
        },
        hold: (held) => (held ? worker.ref() : worker.unref()),
        terminate: async () => {
          await worker.terminate();
        },
      };
    };
  }
  if (typeof Worker !== 'function' || typeof Blob !== 'function') return undefined;
  return () => {
    const url = URL.createObjectURL(new Blob([WORKER_SOURCE], { type: 'text/javascript' }));
    const worker = new Worker(url, { name: 'sageattention' });
    return {
      post: (message, transfer) => worker.postMessage(message, transfer ?? []),
      onMessage: (listener) => {
        worker.onmessage = (event: MessageEvent<Reply>) => {
          URL.revokeObjectURL(url);
          listener(event.data);
        };
      },
      onDeath: (listener) => {
        worker.onerror = (event) => listener(new Error(event.message));
      },
      hold: () => {},
      terminate: () => {
        worker.terminate();
        return new Promise((resolve) => setTimeout(resolve, TERMINATION_MS));
      },
    };
  };
}

/** Whether a memory made here can be given to workers. */
function canShare(): boolean {
  const { crossOriginIsolated } = globalThis as { crossOriginIsolated?: boolean };
  return typeof SharedArrayBuffer === 'function' && crossOriginIsolated !== false;
}

/** Processors that threads can run on. */
function availableThreads(): number {
  const os = nodeModule<typeof import('node:os')>('node:os');
  return os?.availableParallelism() ?? globalThis.navigator?.hardwareConcurrency ?? 1;
}

const MOST_DEFAULT_THREADS = 16;

/** Threads that are started where nobody says how many. */
export const defaultThreads = (): number => Math.min(MOST_DEFAULT_THREADS, availableThreads());

interface Pending {
  /** Replies still to come. */
  left: number;
  error: string | undefined;
  bytes: Uint8Array<ArrayBuffer> | undefined;
  readonly resolve: (bytes: Uint8Array<ArrayBuffer> | undefined) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * Workers and the replies they owe. One that dies takes the calls in hand with it. The next call starts new ones, unless the
 * memory went with them.
 */
class WorkerGroup {
  readonly #factory: () => WorkerHandle;
  readonly #init: unknown;
  readonly #count: number;
  readonly #ownsMemory: boolean;
  #workers: WorkerHandle[] = [];
  readonly #pending = new Map<number, Pending>();
  #nextId = 1;
  #ended: ExecutionError | undefined;

  /** @param ownsMemory workers that end take the memory along */
  constructor(factory: () => WorkerHandle, count: number, init: unknown, ownsMemory: boolean) {
    this.#factory = factory;
    this.#count = count;
    this.#init = init;
    this.#ownsMemory = ownsMemory;
  }

  get ended(): ExecutionError | undefined {
    return this.#ended;
  }

  #start(): void {
    const workers = Array.from({ length: this.#count }, () => this.#factory());
    this.#workers = workers;
    for (const worker of workers) {
      worker.onMessage((reply) => this.#settle(reply));
      worker.onDeath((reason) => {
        if (this.#workers === workers) this.fail('execution-failed', 'a worker died', reason);
      });
      worker.post({ id: 0, init: this.#init });
    }
  }

  #settle({ id, error, bytes }: Reply): void {
    if (id === 0) {
      if (error !== undefined) this.fail('execution-failed', `a worker did not start: ${error}`);
      return;
    }
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    pending.error ??= error;
    pending.bytes ??= bytes;
    if (--pending.left > 0) return;
    this.#forget(id);
    if (pending.error === undefined) pending.resolve(pending.bytes);
    else pending.reject(new ExecutionError('execution-failed', `a kernel failed: ${pending.error}`));
  }

  #forget(id: number): void {
    this.#pending.delete(id);
    if (this.#pending.size === 0) for (const worker of this.#workers) worker.hold(false);
  }

  /** Sends a message that is not answered. */
  tell(message: Record<string, unknown>, transfer?: ArrayBuffer[]): void {
    if (this.#ended !== undefined) throw this.#ended;
    if (this.#workers.length === 0) this.#start();
    for (const worker of this.#workers) worker.post(message, transfer);
  }

  /** Sends each of the first workers its message; resolves when all have answered. */
  ask(messages: readonly Record<string, unknown>[]): Promise<Uint8Array<ArrayBuffer> | undefined> {
    if (this.#ended !== undefined) return Promise.reject(this.#ended);
    if (this.#workers.length === 0) this.#start();
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { left: messages.length, error: undefined, bytes: undefined, resolve, reject });
      for (const [i, message] of messages.entries()) {
        const worker = this.#workers[i] as WorkerHandle;
        worker.hold(true);
        worker.post({ id, ...message });
      }
    });
  }

  /** Ends all workers and rejects what they held, once none of them can write to memory any more. */
  async fail(code: 'execution-failed' | 'disposed' | 'out-of-memory', message: string, cause?: unknown): Promise<void> {
    const error = new ExecutionError(code, message, cause);
    const workers = this.#workers;
    const pending = [...this.#pending.values()];
    this.#workers = [];
    this.#pending.clear();
    if (this.#ownsMemory || code === 'disposed') this.#ended ??= error;
    await Promise.all(workers.map((worker) => worker.terminate()));
    for (const { reject } of pending) reject(error);
  }
}

/** Scratch of each thread; it grows to what the largest call needs. */
class Scratch {
  readonly #memory: MemoryPool;
  readonly #threads: number;
  #bytes = 0;
  #addresses: number[] = [];

  constructor(memory: MemoryPool, threads: number) {
    this.#memory = memory;
    this.#threads = threads;
  }

  /**
   * Addresses for each thread. A larger scratch is a new one and the old one is lost: calls that wait may still be told
   * to use it. Sizes double, so that this costs at most as much again.
   */
  provide(extra: number): readonly number[] {
    if (SCRATCH_BYTES + extra > this.#bytes) {
      const bytes = SCRATCH_BYTES + (extra === 0 ? 0 : 2 ** Math.ceil(Math.log2(extra)));
      const addresses: number[] = [];
      try {
        while (addresses.length < this.#threads) addresses.push(this.#memory.allocate(bytes));
      } catch (error) {
        for (const address of addresses) this.#memory.free(address, bytes);
        throw error;
      }
      this.#addresses = addresses;
      this.#bytes = bytes;
    }
    return this.#addresses;
  }
}

const DISPOSED = 'the WASM backend was disposed before the call ended';

class ThreadExecutor implements Executor {
  readonly description: string;
  readonly threads: number;
  readonly memory: MemoryPool;
  readonly #memory: WebAssembly.Memory;
  readonly #group: WorkerGroup;
  readonly #scratch: Scratch;

  constructor(factory: () => WorkerHandle, module: WebAssembly.Module, threads: number) {
    const { memory, limit } = createMemory();
    this.#memory = memory;
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => memory.grow(pages));
    this.threads = threads;
    this.description = `${threads} worker thread${threads === 1 ? '' : 's'} over one shared memory`;
    this.#group = new WorkerGroup(factory, threads, { module, memory }, false);
    this.#scratch = new Scratch(this.memory, threads);
  }

  get ended(): ExecutionError | undefined {
    return this.#group.ended;
  }

  write(address: number, bytes: Uint8Array): void {
    writeTo(this.#memory, address, bytes);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return readFrom(this.#memory, address, length);
  }

  copy(from: number, to: number, length: number): void {
    new Uint8Array(this.#memory.buffer).copyWithin(to, from, from + length);
  }

  reserve(extraScratch: number): void {
    this.#scratch.provide(extraScratch);
  }

  async run({ stages, units, barriers, extraScratch }: Call): Promise<void> {
    const participants = Math.max(1, Math.min(this.threads, units));
    const steps = stages.map((stage, i) => ({ ...stage, barrier: i + 1 < stages.length ? barriers + 4 * i : 0 }));
    const scratch = this.#scratch.provide(extraScratch);
    const messages = Array.from({ length: participants }, (_, i) => ({
      stages: steps,
      scratch: scratch[i],
      participants,
    }));
    await this.#group.ask(messages);
  }

  abort({ stages }: Call): void {
    const words = new Int32Array(this.#memory.buffer);
    for (const { job } of stages) Atomics.store(words, (job + JOB_ABORT) >>> 2, 1);
  }

  dispose(): Promise<void> {
    return this.#group.fail('disposed', DISPOSED);
  }
}

/** One worker whose memory this thread cannot see: everything goes by message. */
class IsolatedWorkerExecutor implements Executor {
  readonly description = 'one worker with a memory of its own (memory cannot be shared here)';
  readonly threads = 1;
  readonly memory: MemoryPool;
  readonly #group: WorkerGroup;
  readonly #scratch: Scratch;

  constructor(factory: () => WorkerHandle, module: WebAssembly.Module) {
    const limit = createMemory().limit;
    this.#group = new WorkerGroup(factory, 1, { module, pages: INITIAL_PAGES, limit }, true);
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => {
      this.#group.ask([{ grow: pages }]).catch((error) => this.#group.fail('out-of-memory', String(error)));
    });
    this.#scratch = new Scratch(this.memory, 1);
  }

  write(address: number, bytes: Uint8Array): void {
    const copy = bytes.slice();
    this.#group.tell({ write: copy, address }, [copy.buffer]);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return (await this.#group.ask([{ read: length, address }])) ?? new Uint8Array(0);
  }

  copy(from: number, to: number, length: number): void {
    this.#group.tell({ copy: length, from, to });
  }

  get ended(): ExecutionError | undefined {
    return this.#group.ended;
  }

  reserve(extraScratch: number): void {
    this.#scratch.provide(extraScratch);
  }

  async run({ stages, extraScratch }: Call): Promise<void> {
    const scratch = this.#scratch.provide(extraScratch)[0];
    await this.#group.ask([{ stages: stages.map((stage) => ({ ...stage, barrier: 0 })), scratch, participants: 1 }]);
  }

  abort({ stages }: Call): void {
    if (this.ended !== undefined) return;
    for (const { job } of stages) this.#group.tell({ abort: job + JOB_ABORT });
  }

  dispose(): Promise<void> {
    return this.#group.fail('disposed', DISPOSED);
  }
}

/** Milliseconds of work on this thread before others get their turn. */
const TURN_MS = 10;

/** Lets timers, input and messages be handled. */
function breathe(): Promise<void> {
  const { setImmediate } = globalThis as { setImmediate?: (callback: () => void) => void };
  return new Promise((resolve) => (setImmediate === undefined ? setTimeout(resolve) : setImmediate(resolve)));
}

class InlineExecutor implements Executor {
  readonly description = 'this thread, in turns of 10 ms (no workers here)';
  readonly threads = 1;
  readonly memory: MemoryPool;
  readonly #memory: WebAssembly.Memory;
  readonly #module: WebAssembly.Module;
  readonly #scratch: Scratch;
  #kernels: Promise<KernelExports> | undefined;
  #ended: ExecutionError | undefined;

  constructor(module: WebAssembly.Module) {
    const { memory, limit } = createMemory();
    this.#module = module;
    this.#memory = memory;
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => memory.grow(pages));
    this.#scratch = new Scratch(this.memory, 1);
  }

  get ended(): ExecutionError | undefined {
    return this.#ended;
  }

  write(address: number, bytes: Uint8Array): void {
    writeTo(this.#memory, address, bytes);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return readFrom(this.#memory, address, length);
  }

  copy(from: number, to: number, length: number): void {
    new Uint8Array(this.#memory.buffer).copyWithin(to, from, from + length);
  }

  reserve(extraScratch: number): void {
    this.#scratch.provide(extraScratch);
  }

  async run({ stages, extraScratch }: Call): Promise<void> {
    this.#kernels ??= instantiate(this.#module, this.#memory);
    const kernels = await this.#kernels;
    if (this.#ended !== undefined) throw this.#ended;
    const scratch = this.#scratch.provide(extraScratch)[0] as number;
    let since = performance.now();
    for (const { entry, job } of stages) {
      while (this.#step(kernels[entry], job, scratch)) {
        if (performance.now() - since < TURN_MS) continue;
        await breathe();
        if (this.#ended !== undefined) throw this.#ended;
        since = performance.now();
      }
    }
  }

  #step(kernel: KernelExports['attend'], job: number, scratch: number): boolean {
    try {
      return kernel(job, scratch) !== 0;
    } catch (error) {
      throw new ExecutionError('execution-failed', `a kernel failed: ${error}`, error);
    }
  }

  abort({ stages }: Call): void {
    const words = new Int32Array(this.#memory.buffer);
    for (const { job } of stages) words[(job + JOB_ABORT) >>> 2] = 1;
  }

  async dispose(): Promise<void> {
    this.#ended ??= new ExecutionError('disposed', DISPOSED);
  }
}

/** Where kernels run; `createExecutor` takes the first that works here. */
export type ExecutorKind = 'threads' | 'worker' | 'inline';

/**
 * @param threads workers to start
 * @param kind only for tests: what to use instead of the best there is
 */
export function createExecutor(module: WebAssembly.Module, threads: number, kind?: ExecutorKind): Executor {
  const factory = kind === 'inline' ? undefined : workerFactory();
  if (factory === undefined) return new InlineExecutor(module);
  if (kind === 'worker' || !canShare()) return new IsolatedWorkerExecutor(factory, module);
  return new ThreadExecutor(factory, module, threads);
}
