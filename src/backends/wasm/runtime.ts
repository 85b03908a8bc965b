/** Runs calls on an executor: gives each its memory, and takes it back when no thread works on it any more. */
import { ExecutionError } from '../../errors.ts';
import type { RunContext } from '../backend.ts';
import type { Call, Executor, Stage } from './executor.ts';
import type { Simd } from './geometry.ts';
import { type Runs, runsBytes } from './staging.ts';

/** Calls that hold memory at a time: one runs while the next is being made ready. Others wait without holding any. */
const CALLS_IN_MEMORY = 2;

/** Memory of one call. */
export class Lease {
  readonly #executor: Executor;
  readonly #blocks: [address: number, bytes: number][] = [];

  constructor(executor: Executor) {
    this.#executor = executor;
  }

  allocate(bytes: number): number {
    const address = this.#executor.memory.allocate(bytes);
    this.#blocks.push([address, bytes]);
    return address;
  }

  /** Allocates for bytes, or runs of them, plus what vector loads may reach beyond, and writes them. */
  place(bytes: Uint8Array, padding = 0, runs?: Runs): number {
    const address = this.allocate((runs === undefined ? bytes.length : runsBytes(runs)) + padding);
    if (runs !== undefined) this.#executor.writeRuns(address, bytes, runs);
    else if (bytes.length > 0) this.#executor.write(address, bytes);
    return address;
  }

  release(): void {
    for (const [address, bytes] of this.#blocks.splice(0)) this.#executor.memory.free(address, bytes);
  }
}

/** Reads the kernels' memory. */
export type ReadBytes = (address: number, length: number) => Uint8Array<ArrayBuffer>;

/** What a call needs, once its memory is there. */
export interface PreparedCall<Result> {
  readonly stages: readonly Stage[];
  readonly units: number;
  readonly extraScratch: number;
  readonly work: number;
  finish(): Promise<Result>;
  /** As `finish`, but synchronous, for memory that can be read at once; absent where no synchronous call exists. */
  collect?(read: ReadBytes): Result;
}

/** What a call is made of. */
export interface CallParts<Result> {
  /**
   * Fills the lease; everything it allocates is freed after the call. It may be asked again after it ran out of memory.
   */
  prepare(lease: Lease): PreparedCall<Result>;
  /** Called when the call has to wait: copies the caller's data, which may change meanwhile. */
  keepInputs(): void;
}

interface Begun<Result> {
  readonly lease: Lease;
  readonly call: Call;
  finish(): Promise<Result>;
}

/** An executor with the queue of its calls. */
export class Runtime {
  readonly executor: Executor;
  readonly simd: Simd;
  /** Why relaxed SIMD is or is not in use. */
  readonly relaxed: string;
  #active = 0;
  /** Calls that wait, first come first; each is told when its turn may have come. */
  readonly #waiting: { wake(): void }[] = [];

  constructor(executor: Executor, simd: Simd, relaxed: string) {
    this.executor = executor;
    this.simd = simd;
    this.relaxed = relaxed;
  }

  /** Fills a call's memory; undefined where it must wait for calls that hold theirs to end. */
  #begin<Result>({ prepare }: CallParts<Result>): Begun<Result> | undefined {
    if (this.executor.ended !== undefined) throw this.executor.ended;
    if (this.#active >= CALLS_IN_MEMORY) return undefined;
    const lease = new Lease(this.executor);
    try {
      // Object rest and spread are slow in Node 20, and a call of one token takes as long as a few of them.
      const { stages, units, extraScratch, work, finish } = prepare(lease);
      const barriers = stages.length > 1 ? lease.place(new Uint8Array(4 * stages.length)) : 0;
      const call: Call = { stages, units, extraScratch, work, barriers };
      this.executor.reserve(call.extraScratch);
      this.#active++;
      return { lease, call, finish };
    } catch (error) {
      lease.release();
      const full = error instanceof ExecutionError && error.code === 'out-of-memory';
      if (full && this.#active > 0) return undefined;
      throw error;
    }
  }

  #wakeNext(): void {
    this.#waiting[0]?.wake();
  }

  async #wait<Result>(parts: CallParts<Result>, signal: AbortSignal | undefined): Promise<Begun<Result>> {
    let wake = () => {};
    const waiter = { wake: () => wake() };
    this.#waiting.push(waiter);
    const onAbort = () => wake();
    signal?.addEventListener('abort', onAbort);
    try {
      for (;;) {
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
        signal?.throwIfAborted();
        const begun = this.#begin(parts);
        if (begun !== undefined) return begun;
      }
    } finally {
      signal?.removeEventListener('abort', onAbort);
      this.#waiting.splice(this.#waiting.indexOf(waiter), 1);
      this.#wakeNext();
    }
  }

  async #finish<Result>({ lease, call, finish }: Begun<Result>, signal: AbortSignal | undefined): Promise<Result> {
    const onAbort = () => this.executor.abort(call);
    signal?.addEventListener('abort', onAbort);
    try {
      if (call.units > 0) await this.executor.run(call);
      signal?.throwIfAborted();
      return await finish();
    } finally {
      // From here on the memory may be another call's.
      signal?.removeEventListener('abort', onAbort);
      lease.release();
      this.#active--;
      this.#wakeNext();
    }
  }

  /**
   * Makes a call ready and runs it. Inputs are read before this returns, or kept where the call must wait: for others
   * that came before it, or for memory that they hold.
   *
   * @returns rejects with the executor's `ended` when it ended before the call's turn came, and with the signal's
   *     reason as soon as it aborts; the memory is freed when the threads have stopped
   */
  run<Result>({ signal }: RunContext, parts: CallParts<Result>): Promise<Result> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    let begun: Begun<Result> | undefined;
    try {
      if (this.#waiting.length === 0) begun = this.#begin(parts);
      if (begun === undefined) parts.keepInputs();
    } catch (error) {
      return Promise.reject(error);
    }
    const done =
      begun === undefined
        ? this.#wait(parts, signal).then((later) => this.#finish(later, signal))
        : this.#finish(begun, signal);
    if (signal === undefined) return done;
    return new Promise((resolve, reject) => {
      const onAbort = () => reject(signal.reason);
      signal.addEventListener('abort', onAbort, { once: true });
      done.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort));
    });
  }
}
