/** A runtime that is started when it is first needed, and again after a failure that took its memory along. */
import { ExecutionError } from '../../errors.ts';
import type { Runtime } from './runtime.ts';

export class RuntimeSlot {
  readonly #start: () => Promise<Runtime>;
  #runtime: Promise<Runtime> | undefined;
  /** The last one that was seen running. */
  #started: Runtime | undefined;

  constructor(start: () => Promise<Runtime>) {
    this.#start = start;
  }

  /**
   * The runtime that runs, or a new one.
   *
   * @throws {ExecutionError} `disposed` when the backend is disposed while the runtime starts
   */
  async current(): Promise<Runtime> {
    for (;;) {
      this.#runtime ??= this.#start();
      const started = this.#runtime;
      let runtime: Runtime;
      try {
        runtime = await started;
      } catch (error) {
        if (this.#runtime === started) this.#runtime = undefined;
        throw error;
      }
      const { ended } = runtime.executor;
      const replaced = this.#runtime !== started;
      if (ended === undefined && !replaced) {
        this.#started = runtime;
        return runtime;
      }
      // dispose() lets go of its runtime at once and ends it a little later.
      if (replaced && (ended === undefined || ended.code === 'disposed')) {
        throw ended ?? new ExecutionError('disposed', 'the WASM backend was disposed before the call began');
      }
      if (!replaced) this.#runtime = undefined;
    }
  }

  /** The runtime if it runs already. */
  ready(): Runtime | undefined {
    return this.#started?.executor.ended === undefined ? this.#started : undefined;
  }

  async dispose(): Promise<void> {
    const runtime = this.#runtime;
    this.#runtime = undefined;
    this.#started = undefined;
    await (await runtime?.catch(() => undefined))?.executor.dispose();
  }
}
