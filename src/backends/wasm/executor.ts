/**
 * Who runs the kernels: worker threads over one shared memory, one worker with a memory of its own where memory cannot
 * be shared, or this thread where there are no workers.
 */
import { ExecutionError, messageOf } from '../../errors.ts';
import { JOB_ABORT } from './generated/fields.ts';
import { SCRATCH_BYTES } from './job.ts';
import { MemoryPool } from './memory.ts';
import { instantiate, type KernelExports } from './modules.ts';
import { canShare, type WorkerFactory, WorkerGroup, workerFactory } from './workers.ts';

/** A kernel to run over a job's units. Stages of a call run one after another. */
export interface Stage {
  readonly entry: 'prepare' | 'attend' | 'prepareBackward' | 'backward' | 'storeGradients';
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
   * Why it takes no more calls: it was disposed, or its memory went with the worker that died. What was written is gone
   * then, and whatever needs it throws this. Undefined while it works.
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

  constructor(factory: WorkerFactory, module: WebAssembly.Module, threads: number) {
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

  /** Rejects where workers cannot be started. */
  open(): Promise<void> {
    return this.#group.open();
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

  constructor(factory: WorkerFactory, module: WebAssembly.Module) {
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

  /** Rejects where the worker cannot be started. */
  open(): Promise<void> {
    return this.#group.open();
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

export class InlineExecutor implements Executor {
  readonly description: string;
  readonly threads = 1;
  readonly memory: MemoryPool;
  readonly #memory: WebAssembly.Memory;
  readonly #module: WebAssembly.Module;
  readonly #scratch: Scratch;
  #kernels: Promise<KernelExports> | undefined;
  #ended: ExecutionError | undefined;

  /** @param reason why there are no workers */
  constructor(module: WebAssembly.Module, reason: string) {
    this.description = `this thread, in turns of ${TURN_MS} ms (${reason})`;
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

  /** A call from end to end, before this returns. @param kernels of {@link start} */
  runNow({ stages, extraScratch }: Pick<Call, 'stages' | 'extraScratch'>, kernels: KernelExports): void {
    const scratch = this.#scratch.provide(extraScratch)[0] as number;
    for (const { entry, job } of stages) while (this.#step(kernels[entry], job, scratch));
  }

  /** The kernels over its memory. */
  start(): Promise<KernelExports> {
    this.#kernels ??= instantiate(this.#module, this.#memory);
    return this.#kernels;
  }

  readNow(address: number, length: number): Uint8Array<ArrayBuffer> {
    return readFrom(this.#memory, address, length);
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

export interface ExecutorOptions {
  /** Workers to start. */
  readonly threads: number;
  /** Where the program of workers is, in browsers; default: a `blob:` URL. */
  readonly workerUrl?: string | URL | undefined;
  /** Only for tests: what to use instead of the best there is. */
  readonly kind?: ExecutorKind | undefined;
}

/** The best executor that works here; this thread where a page's policy forbids workers. */
export async function createExecutor(
  module: WebAssembly.Module,
  { threads, workerUrl, kind }: ExecutorOptions,
): Promise<Executor> {
  const factory = kind === 'inline' ? undefined : workerFactory(workerUrl);
  if (factory === undefined) return new InlineExecutor(module, 'no workers here');
  const executor =
    kind === 'worker' || !canShare()
      ? new IsolatedWorkerExecutor(factory, module)
      : new ThreadExecutor(factory, module, threads);
  try {
    await executor.open();
    return executor;
  } catch (error) {
    const reason = messageOf(error);
    return new InlineExecutor(module, `workers cannot be started: ${reason}`);
  }
}
