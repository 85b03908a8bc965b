/** A session in pieces, behind the interface of one. */
import type { KernelName } from '../../../attention/kernels.ts';
import { compare } from '../../../reference/metrics.ts';
import { decodeFloat16 } from '../../../tensor/formats/float16.ts';
import { bitsOf } from '../../../tensor/tensor.ts';
import type { Cut, PlacedSite } from '../cut.ts';
import type { LeftAttention } from '../detect/site.ts';
import type { ModelMetadata } from '../model/metadata.ts';
import type { SageAttentionOptions } from '../options.ts';
import type {
  OrtFeeds,
  OrtFetches,
  OrtResults,
  OrtSession,
  OrtSessionHandler,
  OrtTensor,
  OrtValueMetadata,
} from '../ort.ts';
import { type AttentionCall, prepareCall } from './call.ts';
import { type AttentionEngine, namedError } from './engine.ts';
import { checkFeeds } from './feeds.ts';
import { OpenedOnce } from './opened-sessions.ts';
import type { AttentionReport } from './report.ts';

interface Trial {
  readonly kernel: KernelName | 'onnxruntime';
  /** The least of all calibration runs. */
  readonly cosineSimilarity: number;
  /** Of all calibration runs together, so that in a model whose lengths differ the long ones count for what they take. */
  readonly milliseconds: number;
}

/** Calls of a contestant in one calibration run. The last is timed: the first compiles and allocates. */
const CALLS_TO_TIME = 2;

/** What is known of one attention while its session lives. */
class SiteState {
  heads: number | undefined;
  headDim: number | undefined;
  queryLength: number | undefined;
  keyLength: number | undefined;
  reason: string | undefined;
  kernel: KernelName | 'auto';
  cosineSimilarity: number | undefined;
  remainingTrials = 0;
  trials: readonly Trial[] | undefined;
  readonly placed: PlacedSite;

  constructor(placed: PlacedSite, kernel: KernelName | 'auto') {
    this.placed = placed;
    this.heads = placed.site.heads;
    this.headDim = placed.site.headDim;
    this.kernel = kernel;
  }

  report(): AttentionReport {
    const { heads, headDim, queryLength, keyLength, reason, cosineSimilarity } = this;
    const taken = reason === undefined;
    return {
      node: this.placed.site.name,
      form: this.placed.site.form,
      heads,
      headDim,
      queryLength,
      keyLength,
      taken,
      reason,
      kernel: taken ? this.kernel : undefined,
      cosineSimilarity,
    };
  }
}

export function reportLeft(left: LeftAttention): AttentionReport {
  return {
    node: left.name,
    form: left.form,
    heads: left.heads,
    headDim: left.headDim,
    queryLength: undefined,
    keyLength: undefined,
    taken: false,
    reason: left.reason,
    kernel: undefined,
    cosineSimilarity: undefined,
  };
}

export interface CutSessionParts {
  readonly cut: Cut;
  /** One session for each piece. */
  readonly sessions: readonly OrtSession[];
  readonly left: readonly LeftAttention[];
  readonly engine: AttentionEngine;
  readonly options: SageAttentionOptions & {
    readonly minTokens: number;
    readonly threshold: number;
    readonly calibrationRuns: number;
  };
  readonly metadata: ModelMetadata;
  readonly isWeb: boolean;
  /** The nodes that an attention replaces, as a session of their own. */
  createOriginal(placed: PlacedSite): Promise<OrtSession>;
  /** The model in one piece. */
  createWhole(): Promise<OrtSession>;
}

/** Shapes of inputs whose best way of running is remembered. */
const REMEMBERED_SHAPES = 256;

export class CutSession implements OrtSessionHandler {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly OrtValueMetadata[];
  readonly outputMetadata: readonly OrtValueMetadata[];
  readonly #parts: CutSessionParts;
  readonly #sites: readonly SiteState[];
  readonly #originals: OpenedOnce<PlacedSite>;
  readonly #whole: OpenedOnce<'whole'>;
  /** Input shapes for which no attention was worth replacing: they run in one piece. */
  readonly #wholeShapes = new Set<string>();
  readonly #running = new Set<Promise<OrtResults>>();
  #isReleased = false;

  constructor(parts: CutSessionParts) {
    this.#parts = parts;
    this.#originals = new OpenedOnce((placed) => parts.createOriginal(placed));
    this.#whole = new OpenedOnce(() => parts.createWhole());
    this.inputMetadata = parts.metadata.inputs;
    this.outputMetadata = parts.metadata.outputs;
    this.inputNames = this.inputMetadata.map(({ name }) => name);
    this.outputNames = this.outputMetadata.map(({ name }) => name);
    this.#sites = parts.cut.sites.map((placed) => {
      const state = new SiteState(placed, parts.options.kernel ?? 'auto');
      if (parts.options.policy === 'adaptive') state.remainingTrials = parts.options.calibrationRuns;
      return state;
    });
  }

  report(): AttentionReport[] {
    return [...this.#sites.map((state) => state.report()), ...this.#parts.left.map(reportLeft)];
  }

  async run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    this.#requireSession();
    checkFeeds(this.inputMetadata, feeds, this.#parts.isWeb);
    const running = this.#run(feeds, fetches, options);
    this.#running.add(running);
    try {
      return await running;
    } finally {
      this.#running.delete(running);
    }
  }

  /** @throws {Error} in the words of onnxruntime */
  #requireSession(): void {
    if (this.#isReleased) throw new Error('Session already disposed.');
  }

  async #run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    const shapes = this.inputNames.map((name) => `${feeds[name]?.dims}`).join(';');
    if (this.#wholeShapes.has(shapes)) {
      return (await this.#whole.get('whole')).run(feeds, fetches, options);
    }
    const run = new Run(this.#parts.cut, feeds, fetches);
    try {
      let replaced = false;
      for (let level = 0; level < this.#parts.cut.levels; level++) {
        await this.#runPieces(run, level, options);
        for (const state of this.#sites) {
          if (state.placed.level === level && (await this.#runSite(run, state, options))) replaced = true;
        }
        run.endLevel(level);
      }
      await run.throwFailures();
      if (!replaced && this.#parts.options.wholeFallback !== false) this.#remember(shapes);
      return run.results();
    } catch (error) {
      run.releaseAll();
      throw error;
    }
  }

  #remember(shapes: string): void {
    const [oldest] = this.#wholeShapes;
    if (this.#wholeShapes.size >= REMEMBERED_SHAPES && oldest !== undefined) this.#wholeShapes.delete(oldest);
    this.#wholeShapes.add(shapes);
  }

  async #runPieces(run: Run, level: number, options: object): Promise<void> {
    const { pieces } = this.#parts.cut;
    for (const [i, piece] of pieces.entries()) {
      if (piece.level !== level) continue;
      const names = piece.outputs.filter((name) => run.needs(name));
      if (names.length === 0) continue;
      const session = this.#parts.sessions[i] as OrtSession;
      run.store(await session.run(run.take(piece.inputs), run.fetchesOf(names), options));
    }
  }

  /** True when SageAttention computed it. */
  async #runSite(run: Run, state: SiteState, options: object): Promise<boolean> {
    const { site, result } = state.placed;
    if (!run.needs(result)) return false;
    const prepared = prepareCall(site, run.values);
    const reason = 'reason' in prepared ? prepared.reason : this.#tooShort(state, prepared.call);
    if ('reason' in prepared || reason !== undefined) {
      state.reason = reason;
      await this.#runOriginal(run, state, options);
      return false;
    }
    if (state.remainingTrials > 0) {
      await this.#calibrate(run, state, prepared.call, options);
      return true;
    }
    if (state.trials !== undefined) settle(state, state.trials, this.#parts.options.threshold);
    else state.reason = undefined;
    if (state.reason !== undefined) {
      await this.#runOriginal(run, state, options);
      return false;
    }
    try {
      const { output, failure } = await this.#parts.engine.attend(prepared.call, state.kernel);
      run.store({ [result]: output });
      run.failures.push({ node: site.name, failure });
      return true;
    } catch (error) {
      throw namedError(site.name, error);
    }
  }

  #tooShort(state: SiteState, call: AttentionCall): string | undefined {
    const [, heads, queryLength, headDim] = call.q.view.shape;
    const keyLength = call.k.view.shape[2];
    Object.assign(state, { heads, headDim, queryLength, keyLength });
    const { minTokens } = this.#parts.options;
    const tokens = Math.min(queryLength, keyLength);
    return tokens < minTokens ? `${tokens} tokens are fewer than minTokens, ${minTokens}` : undefined;
  }

  async #runOriginal(run: Run, state: SiteState, options: object): Promise<OrtTensor> {
    const { placed } = state;
    const session = await this.#originals.get(placed);
    const names = session.outputNames.filter((name) => name === placed.site.output || run.needs(name));
    const outputs = await session.run(run.take(session.inputNames), run.fetchesOf(names), options);
    const { [placed.site.output]: output, ...overrides } = outputs;
    run.store({ ...overrides, [placed.result]: output as OrtTensor });
    return output as OrtTensor;
  }

  /** Runs the attention with onnxruntime, whose result goes on, and with every kernel. */
  async #calibrate(run: Run, state: SiteState, call: AttentionCall, options: object): Promise<void> {
    const { engine } = this.#parts;
    state.reason = undefined;
    const kernels = await engine.kernels();
    const { result: exact, milliseconds } = await lastOf(CALLS_TO_TIME, async () =>
      toNumbers(await this.#runOriginal(run, state, options)),
    );
    const seen: Trial[] = [{ kernel: 'onnxruntime', cosineSimilarity: 1, milliseconds }];
    for (const kernel of kernels) seen.push(await tryKernel(engine, call, kernel, exact));
    state.trials =
      state.trials === undefined ? seen : state.trials.map((trial, i) => together(trial, seen[i] as Trial));
    // Runs at the same time may each have found one left to do.
    state.remainingTrials = Math.max(0, state.remainingTrials - 1);
    if (state.remainingTrials === 0) settle(state, state.trials, this.#parts.options.threshold);
  }

  /** Runs in flight end first, as in onnxruntime, where they cannot be interrupted. */
  async dispose(): Promise<void> {
    this.#requireSession();
    this.#isReleased = true;
    await Promise.allSettled(this.#running);
    await this.#originals.release();
    await this.#whole.release();
    for (const session of this.#parts.sessions) await session.release();
    this.#parts.engine.release();
  }

  startProfiling(): void {
    for (const session of this.#parts.sessions) session.startProfiling();
  }

  endProfiling(): void {
    for (const session of this.#parts.sessions) session.endProfiling();
  }
}

/** Does the same several times; gives the last result, and what it took. */
async function lastOf<T>(calls: number, work: () => Promise<T>): Promise<{ result: T; milliseconds: number }> {
  for (let call = 1; call < calls; call++) await work();
  const start = performance.now();
  return { result: await work(), milliseconds: performance.now() - start };
}

async function tryKernel(
  engine: AttentionEngine,
  call: AttentionCall,
  kernel: KernelName,
  exact: Float32Array,
): Promise<Trial> {
  const attend = async (): Promise<Float32Array> => {
    const { output, failure } = await engine.attend(call, kernel);
    try {
      const error = await failure;
      if (error !== undefined) throw error;
      return await toNumbers(output);
    } finally {
      output.dispose();
    }
  };
  try {
    const { result, milliseconds } = await lastOf(CALLS_TO_TIME, attend);
    return { kernel, milliseconds, cosineSimilarity: compare(result, exact).cosineSimilarity };
  } catch {
    // A kernel that does not take this call cannot be the one that is kept.
    return { kernel, milliseconds: Number.POSITIVE_INFINITY, cosineSimilarity: -1 };
  }
}

const together = (a: Trial, b: Trial): Trial => ({
  kernel: a.kernel,
  cosineSimilarity: Math.min(a.cosineSimilarity, b.cosineSimilarity),
  milliseconds: a.milliseconds + b.milliseconds,
});

/** Keeps the fastest kernel that is close enough. */
function settle(state: SiteState, trials: readonly Trial[], threshold: number): void {
  const [best] = trials
    .filter((trial) => trial.cosineSimilarity >= threshold)
    .sort((a, b) => a.milliseconds - b.milliseconds);
  const closest = Math.max(...trials.slice(1).map((trial) => trial.cosineSimilarity));
  if (best === undefined || best.kernel === 'onnxruntime') {
    state.reason =
      closest < threshold
        ? `no kernel reached a cosine similarity of ${threshold}; the best had ${closest.toFixed(5)}`
        : 'onnxruntime was faster';
  } else {
    state.reason = undefined;
    state.kernel = best.kernel;
    state.cosineSimilarity = best.cosineSimilarity;
  }
}

async function toNumbers(tensor: OrtTensor): Promise<Float32Array> {
  const data = tensor.location === 'gpu-buffer' ? await tensor.getData() : tensor.data;
  if (data instanceof Float32Array) return data;
  const bits = bitsOf(data as Uint16Array);
  const numbers = new Float32Array(bits.length);
  decodeFloat16(bits, numbers, 0, 1, bits.length, 0);
  return numbers;
}

/** Values of one run, each held until its last reader has run. */
class Run {
  readonly values = new Map<string, OrtTensor>();
  readonly failures: { readonly node: string; readonly failure: Promise<Error | undefined> }[] = [];
  readonly #cut: Cut;
  readonly #feeds: OrtFeeds;
  readonly #fetches: OrtFetches;

  constructor(cut: Cut, feeds: OrtFeeds, fetches: OrtFetches) {
    this.#cut = cut;
    this.#feeds = feeds;
    this.#fetches = fetches;
    for (const [name, tensor] of Object.entries(feeds)) this.values.set(name, tensor);
  }

  needs(name: string): boolean {
    return this.#isWanted(name) || this.#cut.lastUse.has(name);
  }

  #isWanted(name: string): boolean {
    return Object.hasOwn(this.#fetches, name);
  }

  take(names: readonly string[]): Record<string, OrtTensor> {
    return Object.fromEntries(
      names.map((name) => {
        const tensor = this.values.get(name);
        if (tensor === undefined) throw new Error(`value '${name}' was not computed`);
        return [name, tensor];
      }),
    );
  }

  /** Tensors that the caller wants results written to stay what they are. */
  fetchesOf(names: readonly string[]): OrtFetches {
    return Object.fromEntries(names.map((name) => [name, this.#fetches[name] ?? null]));
  }

  store(results: OrtResults): void {
    for (const [name, tensor] of Object.entries(results)) {
      const before = this.values.get(name);
      if (before !== undefined && before !== tensor) this.#release(name, before);
      this.values.set(name, tensor);
    }
  }

  endLevel(level: number): void {
    for (const [name, tensor] of this.values) {
      if (this.#isWanted(name) || (this.#cut.lastUse.get(name) ?? -1) > level) continue;
      this.#release(name, tensor);
      this.values.delete(name);
    }
  }

  /** @throws {ExecutionError} what a kernel reported since, with the attention's name */
  async throwFailures(): Promise<void> {
    for (const { node, failure } of this.failures) {
      const error = await failure;
      if (error !== undefined) throw namedError(node, error);
    }
  }

  releaseAll(): void {
    for (const [name, tensor] of this.values) this.#release(name, tensor);
    this.values.clear();
  }

  results(): OrtResults {
    return this.take(Object.keys(this.#fetches));
  }

  /** What the caller gave is the caller's. */
  #release(name: string, tensor: OrtTensor): void {
    if (this.#feeds[name] === tensor || this.#fetches[name] === tensor) return;
    tensor.dispose();
  }
}
