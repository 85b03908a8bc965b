/** A session that is another one for each value of an input: of a model whose `If` nodes ask that input. */

import type { LeftAttention } from '../detect/site.ts';
import type { OrtFeeds, OrtFetches, OrtResults, OrtSession, OrtSessionHandler, OrtValueMetadata } from '../ort.ts';
import type { MarkedSession } from './marked-session.ts';
import type { OpenedOnce } from './opened-sessions.ts';
import type { AttentionReport } from './report.ts';
import { type CutSession, reportLeft } from './session.ts';

export interface Branch {
  /** Value of the input that decides between the branches. */
  readonly value: boolean;
  /** Undefined where no attention is replaced. */
  readonly session: MarkedSession | CutSession | undefined;
  /** Attentions of a branch in which none is replaced. */
  readonly left: readonly LeftAttention[];
}

export class BranchedSession implements OrtSessionHandler {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly OrtValueMetadata[];
  readonly outputMetadata: readonly OrtValueMetadata[];
  readonly #condition: string;
  readonly #branches: readonly Branch[];
  readonly #whole: OpenedOnce<'whole'>;
  readonly #running = new Set<Promise<OrtResults>>();
  #isReleased = false;

  /** @param parts.branches at least one has a session; `whole` is released with this session */
  constructor(parts: {
    readonly condition: string;
    readonly branches: readonly Branch[];
    readonly whole: OpenedOnce<'whole'>;
  }) {
    this.#condition = parts.condition;
    this.#branches = parts.branches;
    this.#whole = parts.whole;
    const [first] = this.#sessions() as [MarkedSession | CutSession];
    this.inputMetadata = first.inputMetadata;
    this.outputMetadata = first.outputMetadata;
    this.inputNames = first.inputNames;
    this.outputNames = first.outputNames;
  }

  #sessions(): (MarkedSession | CutSession)[] {
    return this.#branches.flatMap(({ session }) => session ?? []);
  }

  report(): AttentionReport[] {
    return this.#branches.flatMap(({ session, left }) => session?.report() ?? left.map(reportLeft));
  }

  async run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    if (this.#isReleased) throw new Error('Session already disposed.');
    const running = this.#run(feeds, fetches, options);
    this.#running.add(running);
    try {
      return await running;
    } finally {
      this.#running.delete(running);
    }
  }

  async #run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    const asked = feeds[this.#condition];
    const value = asked === undefined || asked.location === 'gpu-buffer' ? [] : [...(asked.data as Uint8Array)];
    // Anything else than one value onnxruntime refuses itself.
    const branch = this.#branches.find((one) => value.length === 1 && one.value === (value[0] !== 0));
    if (branch?.session !== undefined) return branch.session.run(feeds, fetches, options);
    const whole = (await this.#whole.get('whole')) as OrtSession | undefined;
    if (whole === undefined) throw new Error('files of the model have changed since it was opened');
    return whole.run(feeds, fetches, options);
  }

  /** Runs in flight end first. */
  async dispose(): Promise<void> {
    if (this.#isReleased) throw new Error('Session already disposed.');
    this.#isReleased = true;
    await Promise.allSettled(this.#running);
    for (const session of this.#sessions()) await session.dispose();
    await this.#whole.release();
  }

  startProfiling(): void {
    for (const session of this.#sessions()) session.startProfiling();
  }

  endProfiling(): void {
    for (const session of this.#sessions()) session.endProfiling();
  }
}
