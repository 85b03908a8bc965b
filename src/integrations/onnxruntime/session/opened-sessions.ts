/** Sessions that are opened when they are first needed. */
import type { OrtSession } from '../ort.ts';

export class OpenedOnce<Key> {
  readonly #sessions = new Map<Key, Promise<OrtSession | undefined>>();
  readonly #ready = new Map<Key, OrtSession>();
  readonly #open: (key: Key) => Promise<OrtSession | undefined>;

  constructor(open: (key: Key) => Promise<OrtSession | undefined>) {
    this.#open = open;
  }

  /** One that could not be opened is tried again the next time. */
  get(key: Key): Promise<OrtSession | undefined> {
    let session = this.#sessions.get(key);
    if (session === undefined) {
      session = this.#open(key);
      this.#sessions.set(key, session);
      session.then(
        (opened) => opened && this.#ready.set(key, opened),
        () => this.#sessions.delete(key),
      );
    }
    return session;
  }

  /** One that is open, without waiting. */
  ready(key: Key): OrtSession | undefined {
    return this.#ready.get(key);
  }

  async release(): Promise<void> {
    const opened = await Promise.allSettled(this.#sessions.values());
    this.#sessions.clear();
    this.#ready.clear();
    for (const result of opened) if (result.status === 'fulfilled') await result.value?.release();
  }
}
