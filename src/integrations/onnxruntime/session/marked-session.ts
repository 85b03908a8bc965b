/** A session whose attentions are markers, behind the interface of one without; where they do not work, the model cut in pieces. */
import { messageOf } from '../../../errors.ts';
import type { DeviceHooks, Work } from '../marker/hooks.ts';
import { callOf, type MarkerEngine, type MarkerPlan, planMarker, textOf } from '../marker/plan.ts';
import { inputsReadBy, type Marker, type MarkerFacts } from '../marker/site.ts';
import { type GivenInput, KnownSizes } from '../marker/sizes.ts';
import type { GraphIndex } from '../model/graph.ts';
import {
  isWeb,
  type OrtFeeds,
  type OrtFetches,
  type OrtModule,
  type OrtResults,
  type OrtSession,
  type OrtSessionHandler,
  type OrtTensorConstructor,
  type OrtValueMetadata,
} from '../ort.ts';
import type { AttentionCall } from './call.ts';
import { checkFeeds, ownFeeds } from './feeds.ts';
import type { Lengths } from './lengths.ts';
import type { OpenedOnce } from './opened-sessions.ts';
import type { AttentionReport } from './report.ts';
import { type CutSession, reportLeft, tooShort } from './session.ts';

/** What went wrong with the markers of a run, whose results are discarded. */
class MarkersFailed extends Error {}

/** The session of a piece with markers in it: fails where not all of them were replaced. */
export function countingSession(session: OrtSession, markers: number, hooks: DeviceHooks): OrtSession {
  if (markers === 0) return session;
  return {
    inputNames: session.inputNames,
    outputNames: session.outputNames,
    async run(feeds, fetches, options) {
      const before = hooks.replaced;
      const results = await session.run(feeds, fetches, options);
      const replaced = hooks.replaced - before;
      if (hooks.failure === undefined && replaced === markers) return results;
      const given = new Set<unknown>(Array.isArray(fetches) ? [] : Object.values(fetches));
      for (const tensor of Object.values(results)) if (!given.has(tensor)) tensor.dispose();
      throw new MarkersFailed(hooks.failure ?? `${replaced} dispatches of ${markers} markers were replaced`);
    },
    release: () => session.release(),
    startProfiling: () => session.startProfiling(),
    endProfiling: () => session.endProfiling(),
  };
}

/** Calls for the shapes of one run's inputs. */
interface Planned {
  readonly works: ReadonlyMap<string, Work>;
  readonly plans: ReadonlyMap<string, MarkerPlan>;
  readonly calls: ReadonlyMap<Marker, AttentionCall>;
}

interface Refused {
  readonly reason: string;
  /** All attentions are below `minTokens`. */
  readonly isShort: boolean;
  readonly lengths?: ReadonlyMap<Marker, Lengths>;
}

/** Plans are kept for this many shapes of inputs. */
const KEPT_SHAPES = 8;

/** Integers of an input that is larger are not looked at: masks of tokens are this long. */
const MAX_NUMBERS = 2 ** 17;

export interface MarkedSessionParts {
  readonly ort: OrtModule;
  readonly hooks: DeviceHooks;
  readonly engine: MarkerEngine;
  /** The graph with all values that sizes are asked of. */
  readonly index: GraphIndex;
  readonly facts: MarkerFacts;
  readonly markers: readonly Marker[];
  /** WGSL of each kind of marker. */
  readonly codes: ReadonlyMap<string, string>;
  /** The model with markers, cut where an attention has none. */
  readonly inner: CutSession;
  readonly minTokens: number;
  /** The model cut at all attentions, for what markers cannot run. */
  createCut(): Promise<CutSession>;
  /** The model as it is; undefined where the caller does not want it. */
  readonly whole: OpenedOnce<'whole'> | undefined;
}

export class MarkedSession implements OrtSessionHandler {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly OrtValueMetadata[];
  readonly outputMetadata: readonly OrtValueMetadata[];
  readonly #parts: MarkedSessionParts;
  readonly #planned = new Map<string, Planned | Refused>();
  readonly #running = new Set<Promise<OrtResults>>();
  #cut: Promise<CutSession> | undefined;
  #opened: CutSession | undefined;
  /** Why markers are not used any more. */
  #broken: string | undefined;
  /** The last run's. */
  #last: Planned | Refused | undefined;
  #isReleased = false;
  /** Inputs of which attentions need the numbers. */
  readonly #read: ReadonlySet<string>;

  constructor(parts: MarkedSessionParts) {
    this.#parts = parts;
    const { index, markers } = parts;
    this.#read = new Set(markers.flatMap(({ site }) => [...inputsReadBy(index, site)]));
    this.inputMetadata = parts.inner.inputMetadata;
    this.outputMetadata = parts.inner.outputMetadata;
    this.inputNames = parts.inner.inputNames;
    this.outputNames = parts.inner.outputNames;
  }

  report(): AttentionReport[] {
    const last = this.#last;
    const { markers, inner, engine } = this.#parts;
    if (last !== undefined && 'reason' in last && !last.isShort && this.#opened !== undefined) {
      return this.#opened.report().map((entry) => (entry.taken ? { ...entry, cutReason: last.reason } : entry));
    }
    const own = markers.map((marker): AttentionReport => {
      const { name, form, heads, headDim } = marker.site;
      const left = { name, form, heads, headDim };
      if (last !== undefined && 'reason' in last) {
        return reportLeft({ ...left, reason: last.reason, ...last.lengths?.get(marker) });
      }
      const call = last?.calls.get(marker);
      return {
        ...reportLeft({ ...left, reason: '' }),
        ...(call === undefined ? {} : sizesOf(call)),
        path: 'marker',
        taken: true,
        reason: undefined,
        kernel: last?.plans.get(marker.kind)?.kernel ?? engine.kernel,
      };
    });
    return [...own, ...inner.report()];
  }

  async run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    if (this.#isReleased) throw new Error('Session already disposed.');
    const { ort } = this.#parts;
    checkFeeds(this.inputMetadata, feeds, isWeb(ort));
    const running = this.#run(ownFeeds(ort.Tensor as OrtTensorConstructor, feeds), fetches, options);
    this.#running.add(running);
    try {
      return await running;
    } finally {
      this.#running.delete(running);
    }
  }

  async #run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    let refused: Refused;
    if (this.#broken === undefined) {
      const outcome = await this.#parts.hooks.exclusive(() => this.#runMarked(feeds, fetches, options));
      if (!('reason' in outcome)) return outcome.results;
      refused = outcome;
    } else refused = { reason: this.#broken, isShort: false };
    const whole = refused.isShort ? await this.#parts.whole?.get('whole').catch(() => undefined) : undefined;
    const session = whole ?? (await this.#openCut());
    const results = await session.run(feeds, fetches, options);
    this.#last = refused;
    return results;
  }

  async #runMarked(
    feeds: OrtFeeds,
    fetches: OrtFetches,
    options: object,
  ): Promise<{ readonly results: OrtResults } | Refused> {
    const { hooks, inner } = this.#parts;
    const planned = await this.#plannedFor(feeds);
    if ('reason' in planned) return planned;
    try {
      const results = await hooks.replacing(planned.works, () => inner.run(feeds, fetches, options));
      this.#last = planned;
      return { results };
    } catch (error) {
      const reason = `its marker failed: ${messageOf(error)}`;
      if (error instanceof MarkersFailed) {
        this.#broken = reason;
        console.warn(`sageattention: the model runs in pieces: ${reason}`);
      }
      // Anything else onnxruntime says again, in the model as it is or in pieces, or does not find wrong there.
      return { reason, isShort: false };
    }
  }

  #openCut(): Promise<CutSession> {
    this.#cut ??= this.#parts.createCut().then(
      (session) => {
        this.#opened = session;
        return session;
      },
      (error: unknown) => {
        this.#cut = undefined;
        throw error;
      },
    );
    return this.#cut;
  }

  async #plannedFor(feeds: OrtFeeds): Promise<Planned | Refused> {
    const inputs = new Map(
      this.inputNames.flatMap((name): [string, GivenInput][] => {
        const tensor = feeds[name];
        const numbers = tensor !== undefined && this.#read.has(name) ? numbersOf(tensor) : undefined;
        return tensor === undefined ? [] : [[name, { dims: tensor.dims, numbers }]];
      }),
    );
    let key = '';
    for (const [name, { dims, numbers }] of inputs)
      key += `${name}:${dims}:${numbers === undefined ? '' : inRuns(numbers)};`;
    const known = this.#planned.get(key);
    const planned =
      known ??
      (await this.#plan(inputs).catch((error: unknown) => ({
        reason: `no plan: ${messageOf(error)}`,
        isShort: false,
      })));
    // The Map iterates in order of insertion: the first key is the one used longest ago. Nothing else runs meanwhile.
    this.#planned.delete(key);
    this.#planned.set(key, planned);
    if (this.#planned.size > KEPT_SHAPES) this.#forget(this.#planned.keys().next().value as string);
    return planned;
  }

  #forget(key: string): void {
    const planned = this.#planned.get(key);
    this.#planned.delete(key);
    if (planned === undefined || 'reason' in planned) return;
    for (const { plan } of planned.plans.values()) plan.dispose();
  }

  async #plan(inputs: ReadonlyMap<string, GivenInput>): Promise<Planned | Refused> {
    const { index, facts, markers, engine, codes, minTokens, inner } = this.#parts;
    const sizes = new KnownSizes(index, facts, inputs);
    const calls = new Map<Marker, AttentionCall>();
    const texts = new Map<string, string>();
    for (const marker of markers) {
      const found = callOf(marker, sizes, engine);
      if ('reason' in found) return { reason: found.reason, isShort: false };
      const text = textOf(found.call);
      if ((texts.get(marker.kind) ?? text) !== text) {
        return { reason: 'attentions that looked alike are not, with these inputs', isShort: false };
      }
      texts.set(marker.kind, text);
      calls.set(marker, found.call);
    }
    const lengths = new Map(markers.map((marker) => [marker, sizesOf(calls.get(marker) as AttentionCall)]));
    const short = [...lengths.values()].map((entry) => tooShort(entry, minTokens));
    if (short.every((reason) => reason !== undefined) && inner.report().every(({ taken }) => !taken)) {
      return { reason: short[0] as string, isShort: true, lengths };
    }
    const plans = new Map<string, MarkerPlan>();
    try {
      for (const [marker, call] of calls) {
        if (!plans.has(marker.kind)) plans.set(marker.kind, await planMarker(marker, call, sizes, engine));
      }
    } catch (error) {
      for (const { plan } of plans.values()) plan.dispose();
      throw error;
    }
    const works = new Map([...plans].map(([kind, { work }]) => [codes.get(kind) as string, work]));
    return { works, plans, calls };
  }

  /** Runs in flight end first. */
  async dispose(): Promise<void> {
    if (this.#isReleased) throw new Error('Session already disposed.');
    this.#isReleased = true;
    await Promise.allSettled(this.#running);
    for (const key of [...this.#planned.keys()]) this.#forget(key);
    await this.#parts.inner.dispose();
    await (await this.#cut)?.dispose();
    await this.#parts.whole?.release();
  }

  startProfiling(): void {
    this.#parts.inner.startProfiling();
  }

  endProfiling(): void {
    this.#parts.inner.endProfiling();
  }
}

function sizesOf({ q, k }: AttentionCall) {
  const [, heads, queryLength, headDim] = q.view.shape;
  return { heads, headDim, queryLength, keyLength: k.view.shape[2] };
}

/** Numbers as text: each with how often it follows itself, as a mask of tokens is long and all alike. */
function inRuns(numbers: readonly number[]): string {
  let text = '';
  for (let start = 0; start < numbers.length; ) {
    let end = start + 1;
    while (end < numbers.length && numbers[end] === numbers[start]) end++;
    text += `${numbers[start]}x${end - start},`;
    start = end;
  }
  return text;
}

/** Of integers on the CPU. */
function numbersOf(tensor: OrtFeeds[string]): readonly number[] | undefined {
  const isSmall = (tensor.type === 'int64' || tensor.type === 'int32') && tensor.size <= MAX_NUMBERS;
  if (!isSmall || !tensor.location.startsWith('cpu')) return undefined;
  return Array.from(tensor.data as ArrayLike<number | bigint>, Number);
}
