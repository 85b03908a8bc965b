/** Worker threads, alike in Node and in browsers, and the replies that they owe. */
import { ExecutionError } from '../../errors.ts';
import { WORKER_SOURCE } from './worker-source.ts';

/** The parts of a worker's interface that are used here, the same in Node and in browsers. */
export interface WorkerHandle {
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

/** A worker that says nothing for so long is none of ours. */
const START_MS = 10_000;
/** Time that a browser gets to stop a terminated worker before its memory is used again; nothing tells when it has. */
const TERMINATION_MS = 50;

function startNodeWorker({ Worker }: NodeWorkers): WorkerHandle {
  const worker = new Worker(WORKER_SOURCE, { eval: true, execArgv: [], name: 'sageattention' });
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
}

/** @param workerUrl of `sageattention/wasm/worker`; default: a `blob:` of the same program */
function startWebWorker(workerUrl: string | URL | undefined): WorkerHandle {
  const url = workerUrl ?? URL.createObjectURL(new Blob([WORKER_SOURCE], { type: 'text/javascript' }));
  const release = () => {
    if (workerUrl === undefined) URL.revokeObjectURL(url as string);
  };
  let worker: Worker;
  try {
    worker = new Worker(url, { name: 'sageattention' });
  } catch (error) {
    release();
    throw error;
  }
  return {
    post: (message, transfer) => worker.postMessage(message, transfer ?? []),
    onMessage: (listener) => {
      worker.onmessage = (event: MessageEvent<Reply>) => {
        release();
        listener(event.data);
      };
    },
    onDeath: (listener) => {
      worker.onerror = (event) => {
        event.preventDefault();
        listener(new Error(event.message || 'its script was not loaded'));
      };
    },
    hold: () => {},
    terminate: () => {
      worker.terminate();
      return new Promise((resolve) => setTimeout(resolve, TERMINATION_MS));
    },
  };
}

/** How workers are started here. */
export interface WorkerFactory {
  start(): WorkerHandle;
  /** Whether a policy, a page's or of Node's permission model, may forbid them, which only the first one tells. */
  readonly mayBeForbidden: boolean;
}

/** Whether Node was started with its permission model. */
const hasPermissions = (): boolean =>
  (globalThis as { process?: { permission?: unknown } }).process?.permission !== undefined;

/** Starts workers, or undefined where there are none. */
export function workerFactory(workerUrl?: string | URL): WorkerFactory | undefined {
  const node = nodeModule<NodeWorkers>('node:worker_threads');
  if (node !== undefined) return { start: () => startNodeWorker(node), mayBeForbidden: hasPermissions() };
  if (typeof Worker !== 'function' || typeof Blob !== 'function') return undefined;
  return { start: () => startWebWorker(workerUrl), mayBeForbidden: true };
}

/** Whether a memory made here can be given to workers. */
export function canShare(): boolean {
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
 * Workers and their outstanding replies. When a worker dies, the calls that it was running fail. The next call starts
 * new workers, unless the memory went with them.
 */
export class WorkerGroup {
  readonly #factory: WorkerFactory;
  readonly #init: unknown;
  readonly #count: number;
  readonly #ownsMemory: boolean;
  #workers: WorkerHandle[] = [];
  readonly #pending = new Map<number, Pending>();
  /** Told of each worker that runs, or why one does not, while the first are started. */
  #opening: ((error?: unknown) => void) | undefined;
  #nextId = 1;
  #ended: ExecutionError | undefined;

  /** @param ownsMemory workers that end take the memory along */
  constructor(factory: WorkerFactory, count: number, init: unknown, ownsMemory: boolean) {
    this.#factory = factory;
    this.#count = count;
    this.#init = init;
    this.#ownsMemory = ownsMemory;
  }

  get ended(): ExecutionError | undefined {
    return this.#ended;
  }

  #start(): void {
    const workers = Array.from({ length: this.#count }, () => this.#factory.start());
    this.#workers = workers;
    for (const worker of workers) {
      worker.onMessage((reply) => this.#settle(reply));
      worker.onDeath((reason) => {
        this.#opening?.(reason);
        if (this.#workers === workers) this.fail('execution-failed', 'a worker died', reason);
      });
      worker.post({ id: 0, init: this.#init });
    }
  }

  /**
   * Starts the workers now where a policy may forbid them.
   *
   * @returns settles when all of them run; rejects with the reason where one does not
   */
  async open(): Promise<void> {
    if (!this.#factory.mayBeForbidden) return;
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        let missing = this.#count;
        this.#opening = (error) => {
          if (error !== undefined) reject(error);
          else if (--missing === 0) resolve();
        };
        timer = setTimeout(() => reject(new Error(`no worker answered in ${START_MS / 1000} s`)), START_MS);
        this.#start();
      });
    } catch (error) {
      await this.fail('execution-failed', 'workers cannot be started here', error);
      throw error;
    } finally {
      clearTimeout(timer);
      this.#opening = undefined;
    }
  }

  #settle({ id, error, bytes }: Reply): void {
    if (id === 0) {
      this.#opening?.(error === undefined ? undefined : new Error(error));
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
