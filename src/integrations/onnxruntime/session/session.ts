/** A session in pieces, behind the interface of one. */
import { ExecutionError, messageOf } from '../../../errors.ts';
import type { Cut, PlacedSite } from '../cut.ts';
import type { AttentionSite, LeftAttention } from '../detect/site.ts';
import type { ModelMetadata } from '../model/sketch.ts';
import type { SageAttentionOptions } from '../options.ts';
import {
  isProxied,
  isWeb,
  type OrtFeeds,
  type OrtFetches,
  type OrtModule,
  type OrtResults,
  type OrtSession,
  type OrtSessionHandler,
  type OrtTensor,
  type OrtTensorConstructor,
  type OrtValueMetadata,
} from '../ort.ts';
import { CALLS_TO_TIME, lastOf, SiteState, settle, type Trial, together, toNumbers, tryKernel } from './calibration.ts';
import { type AttentionCall, prepareCall } from './call.ts';
import { CutTrials } from './cut-trials.ts';
import { type AttentionEngine, namedError } from './engine.ts';
import { checkFeeds, ownFeeds } from './feeds.ts';
import type { Lengths } from './lengths.ts';
import { OpenedOnce } from './opened-sessions.ts';
import type { AttentionReport } from './report.ts';
import { Run } from './run.ts';
import { type InputShape, inputShapeOf, WholeShapes } from './whole-shapes.ts';

export function reportLeft(left: LeftAttention & Partial<Lengths>): AttentionReport {
  return {
    node: left.name,
    form: left.form,
    heads: left.heads,
    headDim: left.headDim,
    queryLength: left.queryLength,
    keyLength: left.keyLength,
    taken: false,
    path: undefined,
    cutReason: undefined,
    reason: left.reason,
    kernel: undefined,
    milliseconds: undefined,
    cosineSimilarity: undefined,
  };
}

/** Why an attention of so many tokens is left; undefined where its lengths are no reason. */
export function tooShort({ queryLength, keyLength }: Lengths, minTokens: number): string | undefined {
  const tokens = Math.min(queryLength ?? Number.POSITIVE_INFINITY, keyLength ?? Number.POSITIVE_INFINITY);
  return tokens < minTokens ? `${tokens} tokens are fewer than minTokens, ${minTokens}` : undefined;
}

export interface CutSessionParts {
  readonly ort: OrtModule;
  readonly cut: Cut;
  /** One session for each piece. */
  readonly sessions: readonly OrtSession[];
  readonly left: readonly LeftAttention[];
  readonly engine: AttentionEngine;
  readonly options: SageAttentionOptions & {
    readonly minTokens: number;
    /** Shorter attention is taken where a model's first runs show that it pays: {@link CutTrials}. */
    readonly triesShort?: boolean;
    readonly threshold: number;
    readonly calibrationRuns: number;
  };
  readonly metadata: ModelMetadata;
  /** Why attentions have no marker. */
  readonly cutReasons?: ReadonlyMap<AttentionSite, string> | undefined;
  /** Inputs are copies already. */
  readonly hasOwnFeeds?: boolean | undefined;
  /** The nodes that an attention replaces, as a session of their own. */
  createOriginal(placed: PlacedSite): Promise<OrtSession>;
  /** The model in one piece, or undefined where it cannot be opened any more. Absent: it stays in pieces. */
  readonly createWhole: (() => Promise<OrtSession | undefined>) | undefined;
}

export class CutSession implements OrtSessionHandler {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly OrtValueMetadata[];
  readonly outputMetadata: readonly OrtValueMetadata[];
  readonly #parts: CutSessionParts;
  readonly #sites: readonly SiteState[];
  readonly #originals: OpenedOnce<PlacedSite>;
  readonly #whole: OpenedOnce<'whole'>;
  readonly #wholeShapes = new WholeShapes();
  readonly #running = new Set<Promise<OrtResults>>();
  readonly #trials: CutTrials | undefined;
  /** The session of a model that is not cut at all: there is nothing to hand from one to another. */
  readonly #only: OrtSession | undefined;
  /** Runs left, and milliseconds by now, in pieces and in one. */
  readonly #comparison: { remaining: number; cut: number; whole: number };
  /** Every run is in one piece. */
  #isWhole = false;
  #isReleased = false;

  constructor(parts: CutSessionParts) {
    this.#parts = parts;
    this.#comparison = { remaining: parts.options.calibrationRuns, cut: 0, whole: 0 };
    const isTried = parts.options.triesShort === true && parts.createWhole !== undefined;
    this.#trials = isTried && parts.engine.done !== undefined ? new CutTrials(parts.cut.sites.length) : undefined;
    this.#originals = new OpenedOnce((placed) => parts.createOriginal(placed));
    this.#whole = new OpenedOnce(async () => parts.createWhole?.());
    this.inputMetadata = parts.metadata.inputs;
    this.outputMetadata = parts.metadata.outputs;
    this.inputNames = this.inputMetadata.map(({ name }) => name);
    this.outputNames = this.outputMetadata.map(({ name }) => name);
    this.#only = parts.hasOwnFeeds ? this.#onlySession() : undefined;
    this.#sites = parts.cut.sites.map((placed) => {
      const state = new SiteState(placed, parts.options.kernel ?? 'auto', parts.cutReasons?.get(placed.site));
      if (parts.options.policy === 'adaptive') state.remainingTrials = parts.options.calibrationRuns;
      else state.isSparse = parts.options.sparsity !== undefined;
      return state;
    });
  }

  report(): AttentionReport[] {
    return [...this.#sites.map((state) => state.report()), ...this.#parts.left.map(reportLeft)];
  }

  async run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    this.#requireSession();
    // A session of onnxruntime checks its inputs itself.
    if (this.#only === undefined) checkFeeds(this.inputMetadata, feeds, isWeb(this.#parts.ort));
    const running = this.#only?.run(feeds, fetches, options) ?? this.#run(feeds, fetches, options);
    this.#running.add(running);
    try {
      return await running;
    } finally {
      this.#running.delete(running);
    }
  }

  /** Undefined where an attention is cut out, and where an input is not read or given back as it is. */
  #onlySession(): OrtSession | undefined {
    const { cut, sessions } = this.#parts;
    const [piece, ...more] = cut.pieces;
    if (piece === undefined || more.length > 0 || cut.sites.length > 0) return undefined;
    const isSame = (some: readonly string[], all: readonly string[]) =>
      some.length === all.length && all.every((name) => some.includes(name));
    const isWhole = isSame(piece.inputs, this.inputNames) && isSame(piece.outputs, this.outputNames);
    return isWhole ? sessions[0] : undefined;
  }

  /** @throws {Error} in the words of onnxruntime */
  #requireSession(): void {
    if (this.#isReleased) throw new Error('Session already disposed.');
  }

  async #run(given: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults> {
    const shape = inputShapeOf(this.inputNames.map((name) => given[name]?.dims ?? []));
    const isWhole = this.#isWhole || this.#wholeShapes.has(shape);
    if (isWhole && this.#trials !== undefined && this.#wholeShapes.isShort(shape)) {
      return this.#tryWays(this.#trials, given, fetches, options, shape);
    }
    const ready = isWhole ? this.#whole.ready('whole') : undefined;
    if (ready !== undefined) return ready.run(given, fetches, options);
    const { ort, hasOwnFeeds } = this.#parts;
    const feeds = hasOwnFeeds ? given : ownFeeds(ort.Tensor as OrtTensorConstructor, given);
    const known = isWhole ? await this.#openWhole() : undefined;
    if (known !== undefined) return known.run(feeds, fetches, options);
    try {
      if (this.#isSettled()) return await this.#compareWhole(feeds, fetches, options, shape);
      return await this.#runCut(feeds, fetches, options, shape);
    } catch (error) {
      // What a kernel reports is no fault of the model's. Anything else onnxruntime says itself, or does not find wrong.
      const whole = error instanceof ExecutionError ? undefined : await this.#openWhole();
      if (whole === undefined) throw error;
      const results = await whole.run(feeds, fetches, options);
      for (const state of this.#sites) state.reason = `onnxruntime ran the model in one piece: ${messageOf(error)}`;
      this.#wholeShapes.add(shape, undefined);
      return results;
    }
  }

  /** Short attention, in one piece or in pieces: timed until it is known which is faster. */
  async #tryWays(
    trials: CutTrials,
    given: OrtFeeds,
    fetches: OrtFetches,
    options: object,
    shape: InputShape,
  ): Promise<OrtResults> {
    const { way, tell } = trials.next(shape);
    const whole = this.#whole.ready('whole') ?? (await this.#openWhole());
    // Other runs at the same time would be in the times of this one.
    const time = this.#running.size <= 1 ? tell : undefined;
    const start = performance.now();
    const results = await this.#runWay(trials, way === 'whole' ? whole : undefined, given, fetches, options, shape);
    if (time !== undefined) {
      const recorded = performance.now() - start;
      await this.#parts.engine.done?.();
      time({ recorded, done: performance.now() - start });
    }
    const reason = trials.reason(shape);
    if (reason !== undefined) for (const state of this.#sites) state.reason = reason;
    return results;
  }

  /** @param whole undefined: in pieces, all attentions replaced */
  async #runWay(
    trials: CutTrials,
    whole: OrtSession | undefined,
    given: OrtFeeds,
    fetches: OrtFetches,
    options: object,
    shape: InputShape,
  ): Promise<OrtResults> {
    if (whole !== undefined) return whole.run(given, fetches, options);
    const { ort, hasOwnFeeds } = this.#parts;
    const feeds = hasOwnFeeds ? given : ownFeeds(ort.Tensor as OrtTensorConstructor, given);
    try {
      return await this.#runCut(feeds, fetches, options, shape, 0);
    } catch (error) {
      const opened = error instanceof ExecutionError ? undefined : await this.#openWhole();
      if (opened === undefined) throw error;
      trials.refuse(shape, `onnxruntime ran the model in one piece: ${messageOf(error)}`);
      return opened.run(feeds, fetches, options);
    }
  }

  /** True when `'adaptive'` has chosen for every attention, and is to choose between the pieces and the whole. */
  #isSettled(): boolean {
    const { createWhole, options } = this.#parts;
    const isDue = options.policy === 'adaptive' && createWhole !== undefined && this.#comparison.remaining > 0;
    return isDue && this.#sites.every(({ trials, remainingTrials }) => trials !== undefined && remainingTrials === 0);
  }

  /** Runs the model both ways: attention by itself may be faster, and the model in pieces slower all the same. */
  async #compareWhole(feeds: OrtFeeds, fetches: OrtFetches, options: object, shape: InputShape): Promise<OrtResults> {
    const comparison = this.#comparison;
    comparison.remaining--;
    const cut = await lastOf(1, async () => ended(await this.#runCut(feeds, fetches, options, shape)));
    const whole = await this.#openWhole();
    if (whole === undefined) return cut.result;
    const wanted = Object.fromEntries(Object.keys(fetches).map((name) => [name, null]));
    const plain = await lastOf(CALLS_TO_TIME, async () => {
      const results = await ended(await whole.run(this.#sent(feeds), wanted, options));
      for (const tensor of Object.values(results)) tensor.dispose();
    });
    comparison.cut += cut.milliseconds;
    comparison.whole += plain.milliseconds;
    if (comparison.remaining === 0 && comparison.whole <= comparison.cut) this.#becomeWhole();
    return cut.result;
  }

  #becomeWhole(): void {
    this.#isWhole = true;
    for (const state of this.#sites) state.reason ??= 'the model in one piece was faster';
  }

  /** Where it cannot be opened (for want of memory, say) the pieces do. */
  #openWhole(): Promise<OrtSession | undefined> {
    return this.#whole.get('whole').catch(() => undefined);
  }

  async #runCut(
    feeds: OrtFeeds,
    fetches: OrtFetches,
    options: object,
    shape: InputShape,
    minTokens = this.#parts.options.minTokens,
  ): Promise<OrtResults> {
    const run = new Run(this.#parts.cut, feeds, fetches, minTokens);
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
      if (!replaced && this.#parts.createWhole !== undefined) this.#wholeShapes.add(shape, this.#shortQueries());
      return run.results();
    } catch (error) {
      run.releaseAll();
      throw error;
    }
  }

  /** The lengths of all queries, where none is long enough. */
  #shortQueries(): string | undefined {
    const { minTokens } = this.#parts.options;
    const lengths = this.#sites.map(({ queryLength }) => queryLength);
    return lengths.every((length) => length !== undefined && length < minTokens) ? lengths.join() : undefined;
  }

  async #runPieces(run: Run, level: number, options: object): Promise<void> {
    const { pieces } = this.#parts.cut;
    for (const [i, piece] of pieces.entries()) {
      if (piece.level !== level) continue;
      const names = piece.outputs.filter((name) => run.needs(name));
      if (names.length === 0) continue;
      const session = this.#parts.sessions[i] as OrtSession;
      run.store(await session.run(this.#sent(run.take(piece.inputs)), run.fetchesOf(names), options));
    }
  }

  /** True when SageAttention computed it. */
  async #runSite(run: Run, state: SiteState, options: object): Promise<boolean> {
    const { site, result } = state.placed;
    if (!run.needs(result)) return false;
    const prepared = prepareCall(site, run.values, this.#parts.engine.maxHeadDim);
    const reason = 'reason' in prepared ? prepared.reason : this.#tooShort(state, prepared.call, run.minTokens);
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
      const sparsity = state.isSparse ? this.#parts.options.sparsity : undefined;
      const attended = await this.#parts.engine.attend(prepared.call, state.kernel, sparsity);
      const { output, failure, kernel, milliseconds, keptFraction } = attended;
      Object.assign(state, { ran: kernel, milliseconds });
      // A device that fails says so in `failure`.
      keptFraction?.then(
        (fraction) => {
          state.keptFraction = fraction;
        },
        () => undefined,
      );
      run.store({ [result]: output });
      run.failures.push({ node: site.name, failure });
      return true;
    } catch (error) {
      throw namedError(site.name, error);
    }
  }

  #tooShort(state: SiteState, call: AttentionCall, minTokens: number): string | undefined {
    const [, heads, queryLength, headDim] = call.q.view.shape;
    const keyLength = call.k.view.shape[2];
    Object.assign(state, { heads, headDim, queryLength, keyLength });
    return tooShort({ queryLength, keyLength }, minTokens);
  }

  /** Opens what {@link CutSessionParts.createOriginal} gives before it is needed. */
  async openOriginal(placed: PlacedSite): Promise<void> {
    await this.#originals.get(placed);
  }

  /** What a session is given: a worker takes the buffers of its inputs away, which others read too. */
  #sent(inputs: OrtFeeds): OrtFeeds {
    const { ort } = this.#parts;
    if (!isProxied(ort)) return inputs;
    const TensorClass = ort.Tensor as OrtTensorConstructor;
    const copy = ({ type, data, dims }: OrtTensor) => new TensorClass(type, (data as Float32Array).slice(), dims);
    return Object.fromEntries(Object.entries(inputs).map(([name, tensor]) => [name, copy(tensor)]));
  }

  async #runOriginal(run: Run, state: SiteState, options: object): Promise<OrtTensor> {
    const { placed } = state;
    const session = (await this.#originals.get(placed)) as OrtSession;
    const names = session.outputNames.filter((name) => name === placed.site.output || run.needs(name));
    const outputs = await session.run(this.#sent(run.take(session.inputNames)), run.fetchesOf(names), options);
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
    const seen: Trial[] = [{ kernel: 'onnxruntime', isSparse: false, cosineSimilarity: 1, milliseconds }];
    const { sparsity } = this.#parts.options;
    for (const each of sparsity === undefined ? [undefined] : [undefined, sparsity]) {
      for (const kernel of kernels) seen.push(await tryKernel(engine, call, kernel, exact, each));
    }
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

/** The results when what computes them has ended: a GPU's session gives them before. */
async function ended(results: OrtResults): Promise<OrtResults> {
  for (const tensor of Object.values(results)) if (tensor.location === 'gpu-buffer') await tensor.getData();
  return results;
}
