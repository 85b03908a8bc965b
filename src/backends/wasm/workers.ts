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
  /** It failed, and others still work on the call. */
  readonly unfinished?: boolean;
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
  return {
    post: (message, transfer) => worker.postMessage(message, transfer ?? []),
    onMessage: (listener) => {
      worker.on('message', listener);
      // The process may end without it. Only from now on: a listener that is added holds it.
      worker.unref();
    },
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
  ended: boolean;
  error: string | undefined;
  /** Whether an error is still to come. */
  readonly failed: () => boolean;
  readonly resolve: (bytes: Uint8Array<ArrayBuffer> | undefined) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * Workers and their outstanding replies. When a worker dies, the calls that it was running fail. The next call starts
 * new workers, unless the memory went with them.
 */
export class WorkerGroup {
  readonly #factory: WorkerFactory;
  readonly #init: (worker: number) => unknown;
  readonly #count: number;
  readonly #ownsMemory: boolean;
  #workers: WorkerHandle[] = [];
  readonly #pending = new Map<number, Pending>();
  /** Told of each worker that runs, or why one does not, while the first are started. */
  #opening: ((error?: unknown) => void) | undefined;
  #nextId = 1;
  /** Settles when workers that failed are gone. */
  #ending: Promise<void> | undefined;
  #ended: ExecutionError | undefined;

  /**
   * @param init what a worker is told when it starts
   * @param ownsMemory workers that end take the memory along
   */
  constructor(factory: WorkerFactory, count: number, init: (worker: number) => unknown, ownsMemory: boolean) {
    this.#factory = factory;
    this.#count = count;
    this.#init = init;
    this.#ownsMemory = ownsMemory;
  }

  get ended(): ExecutionError | undefined {
    return this.#ended;
  }

  /** Settles when no worker is left that would find a call that is none of its own; undefined while there is none. */
  get ending(): Promise<void> | undefined {
    return this.#ending;
  }

  #start(): void {
    const workers = Array.from({ length: this.#count }, () => this.#factory.start());
    this.#workers = workers;
    for (const [i, worker] of workers.entries()) {
      worker.onMessage((reply) => this.settle(reply));
      worker.onDeath((reason) => {
        this.#opening?.(reason);
        if (this.#workers === workers) this.fail('execution-failed', 'a worker died', reason);
      });
      worker.post({ id: 0, init: this.#init(i) });
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

  /** Takes note of what became of a call; those that are settled already are ignored. */
  settle({ id, error, bytes, unfinished = false }: Reply): void {
    if (id === 0) {
      this.#opening?.(error === undefined ? undefined : new Error(error));
      if (error !== undefined) this.fail('execution-failed', `a worker did not start: ${error}`);
      return;
    }
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    pending.error ??= error;
    pending.ended ||= !unfinished;
    // The one that saw the end and the one that failed may be two, whose messages come in any order.
    if (!pending.ended || (pending.error === undefined && pending.failed())) return;
    this.#forget(id);
    if (pending.error === undefined) pending.resolve(bytes);
    else pending.reject(new ExecutionError('execution-failed', `a kernel failed: ${pending.error}`));
  }

  #forget(id: number): void {
    this.#pending.delete(id);
    if (this.#pending.size === 0) this.#workers[0]?.hold(false);
  }

  /** Sends a message that is not answered. */
  tell(message: Record<string, unknown>, transfer?: ArrayBuffer[]): void {
    if (this.#ended !== undefined) throw this.#ended;
    if (this.#workers.length === 0) this.#start();
    for (const worker of this.#workers) worker.post(message, transfer);
  }

  /** Sends the first worker a message; resolves when it has answered. */
  ask(message: Record<string, unknown>): Promise<Uint8Array<ArrayBuffer> | undefined> {
    if (this.#ended !== undefined) return Promise.reject(this.#ended);
    const { id, done } = this.begin(() => false);
    this.hold(id);
    this.#workers[0]?.post({ id, ...message });
    return done;
  }

  /**
   * A call that workers find by themselves; {@link settle} says what became of it.
   *
   * @param failed whether a thread failed in it, which says how by message
   */
  begin(failed: () => boolean): { readonly id: number; readonly done: Promise<Uint8Array<ArrayBuffer> | undefined> } {
    if (this.#ended !== undefined) throw this.#ended;
    if (this.#workers.length === 0) this.#start();
    const id = this.#nextId++;
    const done = new Promise<Uint8Array<ArrayBuffer> | undefined>((resolve, reject) => {
      this.#pending.set(id, { ended: false, error: undefined, failed, resolve, reject });
    });
    return { id, done };
  }

  /** Keeps the process alive until the call is settled. */
  hold(id: number): void {
    if (this.#pending.has(id)) this.#workers[0]?.hold(true);
  }

  /**
   * Sees to it that so many workers look for calls.
   *
   * @param claim whether a worker that does not needs a message
   */
  wake(count: number, listens: (worker: number) => boolean, claim: (worker: number) => boolean): void {
    let missing = count;
    for (let i = 0; i < this.#workers.length; i++) if (listens(i)) missing--;
    for (let i = 0; i < this.#workers.length && missing > 0; i++) {
      if (!claim(i)) continue;
      this.#workers[i]?.post({ wake: true });
      missing--;
    }
  }

  /** Ends all workers and rejects what they held, once none of them can write to memory any more. */
  async fail(code: 'execution-failed' | 'disposed' | 'out-of-memory', message: string, cause?: unknown): Promise<void> {
    const error = new ExecutionError(code, message, cause);
    const workers = this.#workers;
    const pending = [...this.#pending.values()];
    this.#workers = [];
    this.#pending.clear();
    if (this.#ownsMemory || code === 'disposed') this.#ended ??= error;
    const ending = Promise.all([this.#ending, ...workers.map((worker) => worker.terminate())]).then(() => {
      if (this.#ending === ending) this.#ending = undefined;
    });
    this.#ending = ending;
    await ending;
    for (const { reject } of pending) reject(error);
  }
}
