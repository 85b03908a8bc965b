/** Sessions that are opened when they are first needed. */
import type { OrtSession } from '../ort.ts';

export class OpenedOnce<Key> {
  readonly #sessions = new Map<Key, Promise<OrtSession | undefined>>();
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
      session.catch(() => this.#sessions.delete(key));
    }
    return session;
  }

  async release(): Promise<void> {
    const opened = await Promise.allSettled(this.#sessions.values());
    this.#sessions.clear();
    for (const result of opened) if (result.status === 'fulfilled') await result.value?.release();
  }
}
