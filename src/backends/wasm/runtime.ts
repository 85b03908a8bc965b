/** Runs calls on an executor: gives each its memory, and takes it back when no thread works on it any more. */
import type { RunContext } from '../backend.ts';
import type { Call, Executor, Stage } from './executor.ts';
import type { Simd } from './geometry.ts';

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

  /** Allocates for bytes, plus what vector loads may reach beyond, and writes them. */
  place(bytes: Uint8Array, padding = 0): number {
    const address = this.allocate(bytes.length + padding);
    if (bytes.length > 0) this.#executor.write(address, bytes);
    return address;
  }

  release(): void {
    for (const [address, bytes] of this.#blocks.splice(0)) this.#executor.memory.free(address, bytes);
  }
}

/** What a call needs, once its memory is there. */
export interface PreparedCall<Result> {
  readonly stages: readonly Stage[];
  readonly units: number;
  readonly extraScratch: number;
  finish(): Promise<Result>;
}

/** An executor with the queue of its calls. */
export class Runtime {
  readonly executor: Executor;
  readonly simd: Simd;
  /** Why relaxed SIMD is or is not in use. */
  readonly relaxed: string;
  #active = 0;
  readonly #waiting: (() => void)[] = [];

  constructor(executor: Executor, simd: Simd, relaxed: string) {
    this.executor = executor;
    this.simd = simd;
    this.relaxed = relaxed;
  }

  async #enter(): Promise<void> {
    if (this.#active < CALLS_IN_MEMORY) {
      this.#active++;
      return;
    }
    await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  #leave(): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.#active--;
    else next();
  }

  /**
   * Makes a call ready and runs it.
   *
   * @param prepare fills the lease; everything it allocates is freed after the call
   * @returns rejects with the executor's `ended` when it ended before the call's turn came, and with the signal's reason as soon as it aborts; the memory is freed when the threads have stopped
   */
  run<Result>(context: RunContext, prepare: (lease: Lease) => PreparedCall<Result>): Promise<Result> {
    const { signal } = context;
    if (signal?.aborted) return Promise.reject(signal.reason);
    let stop: (() => void) | undefined;
    const work = async (): Promise<Result> => {
      await this.#enter();
      const lease = new Lease(this.executor);
      try {
        signal?.throwIfAborted();
        const { ended } = this.executor;
        if (ended !== undefined) throw ended;
        const { stages, units, extraScratch, finish } = prepare(lease);
        const call: Call = { stages, units, extraScratch, barriers: lease.place(new Uint8Array(4 * stages.length)) };
        stop = () => this.executor.abort(call);
        if (units > 0) await this.executor.run(call);
        signal?.throwIfAborted();
        return await finish();
      } finally {
        // From here on the memory may be another call's.
        stop = undefined;
        lease.release();
        this.#leave();
      }
    };
    const done = work();
    if (signal === undefined) return done;
    return new Promise((resolve, reject) => {
      const onAbort = () => {
        stop?.();
        reject(signal.reason);
      };
      signal.addEventListener('abort', onAbort, { once: true });
      done.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort));
    });
  }
}
