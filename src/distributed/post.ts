/** Hands things from rank to rank of one process. */
import { ExecutionError, messageOf } from '../errors.ts';

interface Waiting<T> {
  readonly resolve: (value: T) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * What is sent under a name by one rank is received once by another, whichever comes first. Where one rank fails, whatever others
 * wait for or will wait for fails too: none hangs.
 */
export class Post {
  readonly #sent = new Map<string, unknown>();
  readonly #waiting = new Map<string, Waiting<never>>();
  #failure: ExecutionError | undefined;

  send(from: number, to: number, name: string, value: unknown): void {
    const address = `${from} ${to} ${name}`;
    const waiting = this.#waiting.get(address);
    if (waiting === undefined) this.#sent.set(address, value);
    else {
      this.#waiting.delete(address);
      waiting.resolve(value as never);
    }
  }

  /** @throws {ExecutionError} another rank failed; its error is the cause */
  async receive<T>(from: number, to: number, name: string): Promise<T> {
    const address = `${from} ${to} ${name}`;
    if (this.#sent.has(address)) {
      const value = this.#sent.get(address) as T;
      this.#sent.delete(address);
      return value;
    }
    if (this.#failure !== undefined) throw this.#failure;
    return new Promise<T>((resolve, reject) => {
      this.#waiting.set(address, { resolve, reject } as Waiting<never>);
    });
  }

  /** A rank failed: the others get no more from it. */
  abort(rank: number, cause: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = new ExecutionError('execution-failed', `rank ${rank} failed: ${messageOf(cause)}`, cause);
    for (const { reject } of this.#waiting.values()) reject(this.#failure);
    this.#waiting.clear();
  }
}
