/**
 * Who runs the kernels: worker threads over one shared memory, one worker with a memory of its own where memory cannot be
 * shared, or the calling thread, which takes short calls everywhere and all calls where there are no workers.
 */
import { ExecutionError, messageOf } from '../../errors.ts';
import { CallRing, type RingCall, type Stage } from './call-ring.ts';
import { JOB_ABORT } from './generated/fields.ts';
import { SCRATCH_BYTES } from './job.ts';
import { MemoryPool } from './memory.ts';
import { instantiate, type KernelExports } from './modules.ts';
import { copyRuns, gather, type Runs } from './staging.ts';
import { canShare, type WorkerFactory, WorkerGroup, workerFactory } from './workers.ts';

export type { Stage };

export interface Call {
  readonly stages: readonly Stage[];
  /** Most units of any stage: no more threads than this take part. */
  readonly units: number;
  /** Address of a zeroed 32-bit word for each stage, where there are several. */
  readonly barriers: number;
  /** Bytes that a thread needs beyond SCRATCH_BYTES: one for each key of the longest sequence that has unseen keys. */
  readonly extraScratch: number;
  /** About how many multiply-adds it has. */
  readonly work: number;
}

export interface Executor {
  /** In words, for `doctor`. */
  readonly description: string;
  readonly threads: number;
  readonly memory: MemoryPool;
  /** Copies bytes into the kernels' memory. Calls that follow see them. */
  write(address: number, bytes: Uint8Array): void;
  /** The same of some of the bytes. */
  writeRuns(address: number, source: Uint8Array, runs: Runs): void;
  read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
  /** The same to where the caller wants it. */
  readInto(address: number, target: Uint8Array): Promise<void>;
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

/**
 * @returns with what it begins and how far it can grow, in pages
 * @throws {ExecutionError} `out-of-memory`
 */
export function createMemory(shared: boolean): { memory: WebAssembly.Memory; limit: number; pages: number } {
  let cause: unknown;
  for (const limit of LIMITS_PAGES) {
    try {
      const memory = new WebAssembly.Memory({ initial: INITIAL_PAGES, maximum: limit, shared });
      return { memory, limit, pages: INITIAL_PAGES };
    } catch (error) {
      cause = error;
    }
  }
  throw new ExecutionError('out-of-memory', `the engine gives no ${shared ? 'shared ' : ''}WebAssembly memory`, cause);
}

/** The bytes of a memory, seen by one view: making one takes as long as copying a kilobyte. */
class MemoryBytes {
  readonly #memory: WebAssembly.Memory;
  #view: Uint8Array;

  constructor(memory: WebAssembly.Memory) {
    this.#memory = memory;
    this.#view = new Uint8Array(memory.buffer);
  }

  /** Memory that has grown is another buffer, or a longer one of the same bytes. */
  #bytes(): Uint8Array {
    const { buffer } = this.#memory;
    if (this.#view.buffer !== buffer) this.#view = new Uint8Array(buffer);
    return this.#view;
  }

  write(address: number, bytes: Uint8Array): void {
    this.#bytes().set(bytes, address);
  }

  writeRuns(address: number, source: Uint8Array, runs: Runs): void {
    copyRuns(source, runs, this.#bytes(), address);
  }

  /** A copy: the memory is handed out again, and views of shared memory are not taken everywhere. */
  read(address: number, length: number): Uint8Array<ArrayBuffer> {
    return this.#bytes().slice(address, address + length) as Uint8Array<ArrayBuffer>;
  }

  readInto(address: number, target: Uint8Array): void {
    target.set(new Uint8Array(this.#memory.buffer, address, target.length));
  }

  copy(from: number, to: number, length: number): void {
    this.#bytes().copyWithin(to, from, from + length);
  }
}

/**
 * Multiply-adds of a call that the calling thread does sooner than workers: with several of them, and with one, whose work
 * costs a round trip and saves nothing but the calling thread's time, a few milliseconds of it. In longer calls it takes part
 * where no more than that falls to it; the others are the workers' alone, as many as there are threads.
 */
export const SHORT_WORK = { one: 2 ** 27, several: 2 ** 24 } as const;

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

/** Milliseconds of work on the calling thread before others get their turn. */
const TURN_MS = 10;

/** Lets timers, input and messages be handled. */
function breathe(): Promise<void> {
  const { setImmediate } = globalThis as { setImmediate?: (callback: () => void) => void };
  return new Promise((resolve) => (setImmediate === undefined ? setTimeout(resolve) : setImmediate(resolve)));
}

function step(kernel: KernelExports['attend'], job: number, scratch: number): boolean {
  try {
    return kernel(job, scratch) !== 0;
  } catch (error) {
    throw new ExecutionError('execution-failed', `a kernel failed: ${error}`, error);
  }
}

/** Multiply-adds between two looks at the clock: some hundredths of a millisecond. */
const WORK_BETWEEN_LOOKS = 2 ** 20;

/**
 * Runs a call on the calling thread, in turns.
 *
 * @param ended why the executor takes no more calls, if it does not
 */
async function runHere(
  kernels: KernelExports,
  { stages, work, units }: Call,
  scratch: number,
  ended: () => ExecutionError | undefined,
): Promise<void> {
  // Reading the clock takes as long as a call of one token.
  const unitsBetweenLooks = Math.ceil((units * WORK_BETWEEN_LOOKS) / work);
  let since: number | undefined;
  let done = 0;
  for (const { entry, job } of stages) {
    while (step(kernels[entry], job, scratch)) {
      if (++done % unitsBetweenLooks !== 0) continue;
      const now = performance.now();
      since ??= now;
      if (now - since < TURN_MS) continue;
      await breathe();
      const error = ended();
      if (error !== undefined) throw error;
      since = performance.now();
    }
  }
}

class ThreadExecutor implements Executor {
  readonly description: string;
  readonly threads: number;
  readonly memory: MemoryPool;
  readonly #memory: WebAssembly.Memory;
  readonly #bytes: MemoryBytes;
  readonly #group: WorkerGroup;
  readonly #ring: CallRing;
  /** The calls that are not done, by their records. */
  readonly #recorded: (Promise<unknown> | undefined)[] = [];
  readonly #scratch: Scratch;
  readonly #module: WebAssembly.Module;
  /** The same kernels on this thread, which takes part in calls that do not hold it long. */
  #kernels: KernelExports | undefined;

  readonly #shortWork: number;

  constructor(factory: WorkerFactory, module: WebAssembly.Module, threads: number, shortWork: number) {
    this.#shortWork = shortWork;
    const { memory, limit } = createMemory(true);
    this.#memory = memory;
    this.#bytes = new MemoryBytes(memory);
    this.#module = module;
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => memory.grow(pages));
    this.threads = threads;
    this.description = `${threads} worker thread${threads === 1 ? '' : 's'} over one shared memory`;
    const ring = new CallRing(memory, this.memory.allocate(CallRing.bytesFor(threads)), threads);
    this.#ring = ring;
    this.#group = new WorkerGroup(factory, threads, (i) => ({ module, memory, ...ring.introduce(i) }), false);
    this.#scratch = new Scratch(this.memory, threads + 1);
  }

  get ended(): ExecutionError | undefined {
    return this.#group.ended;
  }

  write(address: number, bytes: Uint8Array): void {
    this.#bytes.write(address, bytes);
  }

  writeRuns(address: number, source: Uint8Array, runs: Runs): void {
    this.#bytes.writeRuns(address, source, runs);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return this.#bytes.read(address, length);
  }

  async readInto(address: number, target: Uint8Array): Promise<void> {
    this.#bytes.readInto(address, target);
  }

  copy(from: number, to: number, length: number): void {
    this.#bytes.copy(from, to, length);
  }

  reserve(extraScratch: number): void {
    this.#scratch.provide(extraScratch);
  }

  /** Rejects where workers cannot be started. */
  async open(): Promise<void> {
    this.#kernels = await instantiate(this.#module, this.#memory);
    await this.#group.open();
  }

  async run(call: Call): Promise<void> {
    const { stages, units, barriers, extraScratch, work } = call;
    const participants = Math.max(1, Math.min(this.threads, units));
    const kernels = work <= SHORT_WORK.one * participants ? this.#kernels : undefined;
    if (kernels !== undefined && (participants === 1 || work <= this.#shortWork)) {
      const scratch = this.#scratch.provide(extraScratch)[0] as number;
      return runHere(kernels, call, scratch, () => this.ended);
    }
    for (;;) {
      // Workers that are about to end would take part; a call that is not done would lose its record.
      const hindrance = this.#group.ending ?? this.#recorded[this.#ring.next];
      if (hindrance === undefined) break;
      await hindrance.catch(() => {});
    }
    const scratch = this.#scratch.provide(extraScratch);
    let slot = 0;
    const { id, done } = this.#group.begin(() => this.#ring.failed(slot));
    const record = this.#ring.next;
    this.#recorded[record] = done;
    const workers = kernels === undefined ? participants : participants - 1;
    const ringCall: RingCall = { id, stages, barriers, scratch, workers, joined: kernels !== undefined };
    slot = this.#ring.publish(ringCall);
    this.#group.wake(
      workers,
      (worker) => this.#ring.listens(worker),
      (worker) => this.#ring.claim(worker),
    );
    if (kernels !== undefined) {
      const { ended, error } = this.#ring.compute(slot, ringCall, kernels, TURN_MS);
      if (error !== undefined) this.#group.settle({ id, error: String(error), unfinished: true });
      if (ended) this.#group.settle({ id });
    }
    this.#group.hold(id);
    try {
      await done;
    } finally {
      if (this.#recorded[record] === done) this.#recorded[record] = undefined;
    }
  }

  abort({ stages, barriers }: Call): void {
    this.#ring.stop(stages, barriers);
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
    const limit = createMemory(true).limit;
    this.#group = new WorkerGroup(factory, 1, () => ({ module, pages: INITIAL_PAGES, limit }), true);
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => {
      this.#group.ask({ grow: pages }).catch((error) => this.#group.fail('out-of-memory', String(error)));
    });
    this.#scratch = new Scratch(this.memory, 1);
  }

  write(address: number, bytes: Uint8Array): void {
    const copy = bytes.slice();
    this.#group.tell({ write: copy, address }, [copy.buffer]);
  }

  writeRuns(address: number, source: Uint8Array, runs: Runs): void {
    const copy = gather(source, runs);
    this.#group.tell({ write: copy, address }, [copy.buffer]);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return (await this.#group.ask({ read: length, address })) ?? new Uint8Array(0);
  }

  async readInto(address: number, target: Uint8Array): Promise<void> {
    target.set(await this.read(address, target.length));
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
    await this.#group.ask({ stages, scratch });
  }

  abort({ stages }: Call): void {
    if (this.ended !== undefined) return;
    for (const { job } of stages) this.#group.tell({ abort: job + JOB_ABORT });
  }

  dispose(): Promise<void> {
    return this.#group.fail('disposed', DISPOSED);
  }
}

/** The calling thread, over a memory that is not shared: copies to it are faster, and every engine gives one. */
export class CallerExecutor implements Executor {
  readonly description: string;
  readonly threads = 1;
  readonly memory: MemoryPool;
  readonly #memory: WebAssembly.Memory;
  readonly #bytes: MemoryBytes;
  readonly #kernels: KernelExports;
  readonly #scratch: Scratch;
  #ended: ExecutionError | undefined;

  private constructor(memory: WebAssembly.Memory, limit: number, kernels: KernelExports, reason: string) {
    this.description = `this thread, in turns of ${TURN_MS} ms (${reason})`;
    this.#memory = memory;
    this.#bytes = new MemoryBytes(memory);
    this.#kernels = kernels;
    this.memory = new MemoryPool(INITIAL_PAGES, limit, (pages) => memory.grow(pages));
    this.#scratch = new Scratch(this.memory, 1);
  }

  /**
   * @param module kernels over a memory that is not shared
   * @param reason why it runs calls, for `doctor`
   * @param twoSteps only for tests: how dot products are taken, whatever the machine
   */
  static async create(module: WebAssembly.Module, reason: string, twoSteps?: boolean): Promise<CallerExecutor> {
    const { memory, limit } = createMemory(false);
    const kernels = await instantiate(module, memory);
    if (twoSteps !== undefined) kernels.setTwoSteps(Number(twoSteps));
    return new CallerExecutor(memory, limit, kernels, reason);
  }

  get ended(): ExecutionError | undefined {
    return this.#ended;
  }

  write(address: number, bytes: Uint8Array): void {
    this.#bytes.write(address, bytes);
  }

  writeRuns(address: number, source: Uint8Array, runs: Runs): void {
    this.#bytes.writeRuns(address, source, runs);
  }

  async read(address: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    return this.#bytes.read(address, length);
  }

  async readInto(address: number, target: Uint8Array): Promise<void> {
    this.#bytes.readInto(address, target);
  }

  copy(from: number, to: number, length: number): void {
    this.#bytes.copy(from, to, length);
  }

  reserve(extraScratch: number): void {
    this.#scratch.provide(extraScratch);
  }

  readNow(address: number, length: number): Uint8Array<ArrayBuffer> {
    return this.#bytes.read(address, length);
  }

  /** A call from end to end, before this returns. */
  runNow({ stages, extraScratch }: Pick<Call, 'stages' | 'extraScratch'>): void {
    const scratch = this.#scratch.provide(extraScratch)[0] as number;
    for (const { entry, job } of stages) while (step(this.#kernels[entry], job, scratch));
  }

  run(call: Call): Promise<void> {
    const scratch = this.#scratch.provide(call.extraScratch)[0] as number;
    return runHere(this.#kernels, call, scratch, () => this.#ended);
  }

  abort({ stages }: Call): void {
    const words = new Int32Array(this.#memory.buffer);
    for (const { job } of stages) words[(job + JOB_ABORT) >>> 2] = 1;
  }

  async dispose(): Promise<void> {
    this.#ended ??= new ExecutionError('disposed', DISPOSED);
  }
}

/** Where long calls run; `createWorkers` takes the first that works here. */
export type ExecutorKind = 'threads' | 'worker' | 'inline';

export interface WorkersOptions {
  /** Workers to start. */
  readonly threads: number;
  /** Where the program of workers is, in browsers; default: a `blob:` URL. */
  readonly workerUrl?: string | URL | undefined;
  /** Multiply-adds up to which a call runs on the calling thread where that sees the workers' memory. */
  readonly shortWork: number;
  /** Only for tests: what to use instead of the best there is. */
  readonly kind?: ExecutorKind | undefined;
}

/**
 * The best executor with workers; in words why there is none where there are none, or a page's policy forbids them.
 *
 * @param module kernels over a shared memory
 */
export async function createWorkers(
  module: WebAssembly.Module,
  { threads, workerUrl, shortWork, kind }: WorkersOptions,
): Promise<Executor | string> {
  const factory = kind === 'inline' ? undefined : workerFactory(workerUrl);
  if (factory === undefined) return 'no workers here';
  try {
    const executor =
      kind === 'worker' || !canShare()
        ? new IsolatedWorkerExecutor(factory, module)
        : new ThreadExecutor(factory, module, threads, shortWork);
    await executor.open();
    return executor;
  } catch (error) {
    return `workers cannot be started: ${messageOf(error)}`;
  }
}
