/** How a process's part in a group ends: the first failure counts, and no call of any rank can succeed after it. */
import { ExecutionError, messageOf } from '../errors.ts';
import type { CudaPlace } from './cuda-place.ts';

export class Fate {
  readonly #rank: number;
  readonly #timeout: number;
  readonly #onFailure: (failure: ExecutionError, cause: unknown) => void;
  #failure: ExecutionError | undefined;
  #noteFailed: (() => void) | undefined;
  /** Resolves when something has failed. */
  readonly failed = new Promise<void>((resolve) => {
    this.#noteFailed = resolve;
  });

  /**
   * @param timeout milliseconds that a step may take in which other ranks take part
   * @param onFailure is called once; whoever waits for another rank is let go there
   */
  constructor(rank: number, timeout: number, onFailure: (failure: ExecutionError, cause: unknown) => void) {
    this.#rank = rank;
    this.#timeout = timeout;
    this.#onFailure = onFailure;
  }

  get failure(): ExecutionError | undefined {
    return this.#failure;
  }

  fail(cause: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure =
      cause instanceof ExecutionError ? cause : new ExecutionError('execution-failed', messageOf(cause), cause);
    this.#noteFailed?.();
    this.#onFailure(this.#failure, cause);
  }

  /** @throws {ExecutionError} the failure */
  requireUsable(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /** Connects a transport within the time; one that does not come about is disposed of. */
  async connected<T extends { dispose(): void }>(transport: T, connect: () => Promise<void>): Promise<T> {
    const limit = this.limit('connecting the ranks');
    try {
      await connect();
      return transport;
    } catch (error) {
      this.fail(error);
      transport.dispose();
      throw error;
    } finally {
      clearTimeout(limit);
    }
  }

  /**
   * Ends this process's part of a call on its place.
   *
   * @throws {ExecutionError} the failure, which may come until all is done
   */
  async closeCall(place: CudaPlace): Promise<void> {
    try {
      if (this.#failure !== undefined) place.settle([place]);
      // Only when all is done is it certain that no rank failed meanwhile. What waits for one that has is ended elsewhere.
      else await Promise.race([place.device.stream.completed(), this.failed]);
      this.requireUsable();
    } finally {
      place.endCall();
    }
  }

  /** Fails when the time is over, unless it is cleared. */
  limit(what: string): NodeJS.Timeout {
    return setTimeout(() => {
      this.fail(
        new ExecutionError('execution-failed', `rank ${this.#rank}: ${what} took longer than ${this.#timeout} ms`),
      );
    }, this.#timeout);
  }
}
