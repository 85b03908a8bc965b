/** From the arguments of `InferenceSession.create` to a session whose attention runs here. */
import { messageOf } from '../../../errors.ts';
import { type Cut, cutGraph, type Piece } from '../cut.ts';
import { type Detected, detectAttention } from '../detect/index.ts';
import { isRead } from '../detect/operators.ts';
import type { AttentionSite, LeftAttention } from '../detect/site.ts';
import { branchesOf } from '../model/branches.ts';
import { type GraphIndex, indexGraph, isAcyclic } from '../model/graph.ts';
import { type ModelFacts, type ModelMetadata, readFacts } from '../model/sketch.ts';
import { fileOf } from '../model/weights.ts';
import { canonicalDomain, type ModelProto, readModel, writeModel } from '../onnx/codec.ts';
import {
  DEFAULT_CALIBRATION_RUNS,
  DEFAULT_MIN_TOKENS,
  DEFAULT_THRESHOLD,
  excludedBy,
  type SageAttentionOptions,
} from '../options.ts';
import {
  type CreateArguments,
  type Engine,
  engineOf,
  isProxied,
  isWeb,
  type OrtModule,
  type OrtSession,
  type OrtTensorConstructor,
} from '../ort.ts';
import { type Branch, BranchedSession } from './branched-session.ts';
import { type AttentionEngine, cpuEngine } from './engine.ts';
import { deviceOf, gpuEngine } from './gpu-engine.ts';
import { lengthsOf, watchedBy } from './lengths.ts';
import type { MarkedSession } from './marked-session.ts';
import { OpenedOnce } from './opened-sessions.ts';
import { type EncodedPiece, type InferredShapes, PieceWriter } from './pieces.ts';
import type { AttentionReport } from './report.ts';
import { CutSession, reportLeft, tooShort } from './session.ts';
import { followLinks, loadModel, type ModelSource, ownSource, stateOf, withFolder } from './source.ts';
import { withValidationMode } from './validation-mode.ts';

export type CreateSession = (...args: CreateArguments) => Promise<OrtSession>;

export interface Opened {
  /** Undefined: `plain` is what the caller gets. */
  readonly cut: MarkedSession | CutSession | BranchedSession | undefined;
  readonly plain: OrtSession | undefined;
  report(): AttentionReport[];
}

/** A model with the attentions that are found in it. */
interface Analysis {
  readonly model: ModelProto;
  readonly index: GraphIndex;
  readonly detected: Detected;
}

/** @throws why the model is left as it is */
function analyze(bytes: Uint8Array): Analysis {
  const model = readModel(bytes);
  if (model.graph === undefined || model.graph.node.length === 0) throw new Error('it has no graph');
  if (model.graph.sparseInitializer.length > 0) throw new Error('it has sparse initializers');
  // Which of two meanings of a name wins is the runtime's to say.
  const redefined = model.functions.find(({ domain, name }) => isRead(domain, name));
  if (redefined !== undefined)
    throw new Error(`it has a function of its own by the name of an operator, '${redefined.name}'`);
  const opset = Number(model.opsetImport.find((entry) => canonicalDomain(entry.domain) === '')?.version ?? 1);
  const index = indexGraph(model.graph, opset);
  if (!isAcyclic(index)) throw new Error('its graph has a cycle');
  return { model, index, detected: detectAttention(index, model.functions) };
}

/** Everything that opening depends on. */
interface Context {
  readonly ort: OrtModule;
  readonly create: CreateSession;
  readonly options: SageAttentionOptions;
}

/**
 * Opens a model with its attention replaced, or as it is where nothing can be replaced or nothing is gained. A model that
 * onnxruntime refuses is refused, in its words.
 *
 * @param create the runtime's own `InferenceSession.create`
 * @param warn told once why a model that should have been cut was not
 */
export async function openModel(
  ort: OrtModule,
  create: CreateSession,
  args: CreateArguments,
  options: SageAttentionOptions,
  warn: (message: string) => void,
): Promise<Opened> {
  let source: ModelSource;
  let found: Analysis;
  try {
    source = await loadModel(ort, args);
    source = { ...source, options: withValidationMode(source.options, options.validationMode) };
    found = analyze(source.bytes);
  } catch (error) {
    // Whatever is wrong with the arguments or the file, onnxruntime says it in its own words.
    const opened = await create(...args);
    warn(`the model runs unmodified: ${messageOf(error)}`);
    return asItIs(opened, []);
  }
  // What a URL gave is not asked for again, and a worker takes away the buffer that it is given.
  const whole = () => {
    if (isProxied(ort)) return create(source.bytes.slice(), source.options);
    if (isWeb(ort) && options.validationMode !== undefined) return create(source.bytes, source.options);
    return isWeb(ort) && !source.isBorrowed && typeof args[0] === 'string'
      ? create(source.bytes, source.options)
      : create(...args);
  };
  const context = { ort, create, options };
  const variants = variantsOf(found);
  const chosen = variants.map(({ detected }) => chooseSites(context, source, detected));
  if (chosen.every(({ sites }) => sites.length === 0)) {
    return asItIs(await whole(), chooseSites(context, source, found.detected).left);
  }
  source = await ownSource(ort, source);
  // The parsed model refers to the bytes.
  found = analyze(source.bytes);
  const graphs = variantsOf(found);
  const watched = graphs.length > 1 ? [] : chooseSites(context, source, found.detected).sites.flatMap(watchedBy);
  let facts = await readFacts(create, found.model, found.index, source.options, watched);
  if (facts === undefined) {
    const opened = await whole();
    facts = factsOf(opened);
    await opened.release();
  }
  const judged: Judged[] = [];
  for (const variant of graphs)
    judged.push(await judge(context, source, variant, await factsFor(context, source, variant, facts)));
  const report = judged.flatMap(({ left }) => left);
  const without = noMarkers(context, judged);
  const common = { ...context, model: found.model, source, metadata: facts.metadata };
  try {
    if (typeof args[0] === 'string') source = await followLinks(source, args[0], found.index.graph);
    const session = await openReplaced({ ...common, source }, judged, without);
    return session === undefined
      ? asItIs(await whole(), report)
      : { cut: session, plain: undefined, report: () => session.report() };
  } catch (error) {
    const reason = `the graph could not be cut: ${messageOf(error)}`;
    const opened = await whole();
    warn(`the model runs unmodified: ${reason}`);
    return asItIs(opened, [...judged.flatMap(({ worth }) => worth.map((site) => leave(site, reason))), ...report]);
  }
}

/** A graph that the model is: always, or where an input of it has a value. */
interface Variant {
  readonly condition: { readonly input: string; readonly value: boolean } | undefined;
  readonly model: ModelProto;
  readonly index: GraphIndex;
  readonly detected: Detected;
}

/** One for each value of an input that decides between graphs with attention in them. */
function variantsOf({ model, index, detected }: Analysis): readonly Variant[] {
  const branches = detected.left.some(({ isInBranch }) => isInBranch === true) ? branchesOf(index) : undefined;
  if (branches === undefined) return [{ condition: undefined, model, index, detected }];
  return [true, false].map((value) => {
    const graph = value ? branches.whereTrue : branches.whereFalse;
    const ofBranch = indexGraph(graph, index.opset);
    const condition = { input: branches.condition, value };
    return {
      condition,
      model: { ...model, graph },
      index: ofBranch,
      detected: detectAttention(ofBranch, model.functions),
    };
  });
}

interface Judged {
  readonly variant: Variant;
  readonly facts: ModelFacts;
  /** Attentions to replace. */
  readonly worth: readonly AttentionSite[];
  readonly left: readonly LeftAttention[];
  readonly engine: Engine;
  readonly minTokens: number;
}

/** The graph that a value of an input makes has other shapes than that with all its branches. */
async function factsFor(
  context: Context,
  source: ModelSource,
  { condition, model, index, detected }: Variant,
  ofAll: ModelFacts,
): Promise<ModelFacts> {
  if (condition === undefined) return ofAll;
  const watched = chooseSites(context, source, detected).sites.flatMap(watchedBy);
  return (await readFacts(context.create, model, index, source.options, watched)) ?? ofAll;
}

/** @param facts of the variant's graph */
function judge(context: Context, source: ModelSource, variant: Variant, facts: ModelFacts, hasMarkers = false): Judged {
  const { ort, options } = context;
  const { sites, left, engine } = chooseSites(context, source, variant.detected);
  const minTokens = minTokensOf(ort, engine, options, hasMarkers);
  const short = sites.flatMap((site) => {
    const lengths = lengthsOf(site, facts.shapes);
    const reason = tooShort(lengths, minTokens);
    return reason === undefined ? [] : [{ ...leave(site, reason), ...lengths, site }];
  });
  const worth = sites.filter((site) => short.every((entry) => entry.site !== site));
  const allLeft = [...short.map(({ site: _, ...entry }) => entry), ...left];
  return { variant, facts, worth, left: allLeft, engine, minTokens };
}

/** The model with attention replaced, or one session for each value of the input that decides; undefined where nothing is worth it. */
async function openReplaced(
  common: Common,
  judged: readonly Judged[],
  without: string | undefined,
): Promise<MarkedSession | CutSession | BranchedSession | undefined> {
  const [first] = judged as [Judged, ...Judged[]];
  const { condition } = first.variant;
  if (condition === undefined) return openVariant(common, first, without);
  const files = new Set(
    judged.flatMap(({ variant }) => variant.index.graph.initializer.flatMap((tensor) => fileOf(tensor) ?? [])),
  );
  const whole = new OpenedOnce<'whole'>(await wholeModel(common, files));
  const shared = sharing(whole);
  const branches: Branch[] = [];
  try {
    for (const one of judged) {
      const session = await openVariant(common, one, without, shared);
      branches.push({ value: one.variant.condition?.value === true, session, left: one.left });
    }
  } catch (error) {
    for (const { session } of branches) await session?.dispose();
    throw error;
  }
  if (branches.every(({ session }) => session === undefined)) return undefined;
  return new BranchedSession({ condition: condition.input, branches, whole });
}

/**
 * With markers where they work, otherwise in pieces.
 *
 * @param without why there are no markers to try
 * @param createWhole how several variants open the model in one piece together
 */
async function openVariant(
  common: Common,
  judged: Judged,
  without: string | undefined,
  createWhole?: CutParts['createWhole'],
): Promise<MarkedSession | CutSession | undefined> {
  const marked =
    without === undefined
      ? await openWithMarkers(common, judged, createWhole)
      : { reasons: new Map(judged.worth.map((site) => [site, without])) };
  if (!('reasons' in marked)) return marked;
  return judged.worth.length === 0
    ? undefined
    : openInPieces({ ...common, cutReasons: marked.reasons }, judged, createWhole);
}

async function openInPieces(
  common: Common,
  { variant, worth, ...rest }: Judged,
  createWhole?: CutParts['createWhole'],
): Promise<CutSession> {
  const cut = cutGraph(variant.index.graph, variant.index.opset, worth);
  const crossing = cut.pieces.flatMap(({ inputs }) => inputs);
  const facts = await readFacts(common.create, variant.model, variant.index, common.source.options, crossing);
  const shapes = { shapes: facts?.shapes };
  return openCut({ ...common, ...rest, ...shapes, cut, ...(createWhole === undefined ? {} : { createWhole }) });
}

/** Opens the one that several sessions have together: each releases what it opened itself, and not this one. */
const sharing = (whole: OpenedOnce<'whole'>) => async () => {
  const session = await whole.get('whole');
  return session && ({ run: session.run.bind(session), release: async () => {} } as unknown as OrtSession);
};

/** Why no attention of a model can be a marker; undefined where that is to be tried. */
function noMarkers({ ort, options }: Context, judged: readonly Judged[]): string | undefined {
  if (judged.some(({ engine }) => engine !== 'webgpu')) return 'a marker needs onnxruntime-web on WebGPU';
  if (options.markers === false) return 'excluded by the options';
  if (options.policy === 'adaptive') return "'adaptive' compares kernels between pieces";
  if (options.sparsity !== undefined) return "blocks of 'sparsity' are chosen between pieces";
  return isProxied(ort) ? 'onnxruntime runs in a worker, with a device that is out of reach' : undefined;
}

/** The model in one session with markers, or why it has none. */
async function openWithMarkers(
  common: Common,
  forCut: Judged,
  createWhole: CutParts['createWhole'],
): ReturnType<typeof import('./open-marked.ts')['openMarked']> {
  const { ort, create, options, source } = common;
  const judged = judge(common, source, forCut.variant, forCut.facts, true);
  const { worth, variant, minTokens } = judged;
  if (worth.length === 0) return { reasons: new Map() };
  const whole = new OpenedOnce<'whole'>(createWhole ?? (await wholeModel(common, new Set())));
  const inPieces = { ...judged, minTokens: forCut.minTokens };
  // What runs on a GPU alone is loaded where there is one.
  const { openMarked } = await import('./open-marked.ts');
  return openMarked({
    ort,
    create,
    model: variant.model,
    index: variant.index,
    options: source.options,
    sites: worth,
    kernel: options.kernel ?? 'auto',
    minTokens,
    whole: options.wholeFallback === false ? undefined : whole,
    isWorthCutting: (site) => forCut.worth.includes(site),
    openInner: (cut, reasons, wrap) => {
      const short = [...reasons.keys()].filter((site) => !forCut.worth.includes(site));
      const left = forCut.left.filter(({ name }) => short.some((site) => site.name === name));
      return openCut({
        ...common,
        ...inPieces,
        options: { ...options, wholeFallback: false },
        left: [...left, ...judged.left],
        cut,
        cutReasons: reasons,
        wrap,
        hasOwnFeeds: true,
      });
    },
    createCut: () => openInPieces(common, inPieces, sharing(whole)),
  });
}

const asItIs = (plain: OrtSession, left: readonly LeftAttention[]): Opened => {
  const report = left.map(reportLeft);
  return { cut: undefined, plain, report: () => report };
};

function factsOf({ inputMetadata, outputMetadata }: OrtSession): ModelFacts {
  const metadata = inputMetadata && outputMetadata && { inputs: inputMetadata, outputs: outputMetadata };
  return { metadata, shapes: new Map(), types: new Map() };
}

/** The attentions that may be replaced, whatever their lengths. */
function chooseSites({ ort, options }: Context, source: ModelSource, detected: Detected) {
  const engine = engineOf(ort, source.options);
  const left: LeftAttention[] = [...detected.left];
  const sites = detected.sites.filter((site) => {
    const reason = typeof engine === 'string' ? leftOn(ort, engine, options, site.name) : engine.reason;
    if (reason !== undefined) left.push(leave(site, reason));
    return reason === undefined;
  });
  return { sites, left, engine: typeof engine === 'string' ? engine : 'cpu' } as const;
}

const runtimeOf = (ort: OrtModule, engine: Engine): keyof typeof DEFAULT_MIN_TOKENS => {
  if (engine === 'webgpu') return 'webgpu';
  return isWeb(ort) ? 'onnxruntime-web' : 'onnxruntime-node';
};

/** `'adaptive'` measures for itself what pays off. */
const minTokensOf = (ort: OrtModule, engine: Engine, options: SageAttentionOptions, hasMarkers = false): number => {
  const runtime = hasMarkers ? 'webgpu-marker' : runtimeOf(ort, engine);
  return options.minTokens ?? (options.policy === 'adaptive' ? 0 : DEFAULT_MIN_TOKENS[runtime]);
};

/** Why an attention stays where it is whatever its size. */
function leftOn(ort: OrtModule, engine: Engine, options: SageAttentionOptions, name: string): string | undefined {
  if (Number.isFinite(minTokensOf(ort, engine, options))) return excludedBy(options, name);
  return options.minTokens === undefined
    ? `${runtimeOf(ort, engine)} is faster on a CPU at any length; options.minTokens replaces it all the same`
    : 'minTokens is Infinity';
}

function leave(site: AttentionSite, reason: string): LeftAttention {
  const { name, form, heads, headDim } = site;
  return { name, form, heads, headDim, reason };
}

interface CutParts extends Context {
  readonly model: ModelProto;
  readonly source: ModelSource;
  readonly cut: Cut;
  /** Undefined: what the pieces say must do. */
  readonly metadata: ModelMetadata | undefined;
  readonly left: readonly LeftAttention[];
  readonly engine: Engine;
  readonly minTokens: number;
  /** Why attentions have no marker. */
  readonly cutReasons?: ReadonlyMap<AttentionSite, string>;
  /** What runs in the place of a piece's session. */
  readonly wrap?: (session: OrtSession, piece: Piece) => OrtSession;
  readonly hasOwnFeeds?: boolean;
  readonly shapes?: InferredShapes | undefined;
  /** How several cuts of one model open it in one piece. Default: each opens its own. */
  readonly createWhole?: () => Promise<OrtSession | undefined>;
}

type Common = Pick<CutParts, 'ort' | 'create' | 'options' | 'model' | 'source' | 'metadata' | 'cutReasons'>;

async function openCut(parts: CutParts): Promise<CutSession> {
  const { ort, create, cut, source, options } = parts;
  // A worker gets a copy of the mounted bytes with each session; there every session is given its own weights alone.
  const mounted = isProxied(ort) ? undefined : { bytes: source.bytes, path: 'sageattention.model' };
  const writer = new PieceWriter({ ...parts, mounted });
  const open = ({ bytes, options }: EncodedPiece) => create(isProxied(ort) ? bytes.slice() : bytes, options);
  const sessions: OrtSession[] = [];
  try {
    const files = new Set<string>();
    for (let level = 0; level < cut.levels; level++) {
      for (const piece of cut.pieces) {
        if (piece.level !== level) continue;
        const encoded = writer.write(piece);
        for (const file of encoded.files) files.add(file);
        const session = await open(encoded);
        sessions.push(parts.wrap?.(session, piece) ?? session);
        writer.learn(session.outputMetadata ?? []);
      }
      for (const placed of cut.sites) if (placed.level === level) writer.declareResult(placed);
    }
    const originals = new Map(cut.sites.map((placed) => [placed, writer.writeOriginal(placed)]));
    const session = new CutSession({
      ...parts,
      sessions,
      engine: await engineFor(parts),
      options: {
        ...options,
        minTokens: parts.minTokens,
        triesShort: options.minTokens === undefined && options.policy !== 'adaptive',
        threshold: options.threshold ?? DEFAULT_THRESHOLD,
        calibrationRuns: options.calibrationRuns ?? DEFAULT_CALIBRATION_RUNS,
      },
      metadata: parts.metadata ?? writer.metadata(),
      createOriginal: (placed) => open(originals.get(placed) as EncodedPiece),
      createWhole:
        options.wholeFallback === false ? undefined : (parts.createWhole ?? (await wholeModel(parts, files))),
    });
    // Files may change before they are needed.
    for (const [placed, { files }] of originals) if (files.length > 0) await session.openOriginal(placed);
    return session;
  } catch (error) {
    for (const session of sessions) await session.release();
    throw error;
  }
}

/** The model in one piece, as it was when it was opened; undefined where files of it have changed since. */
async function wholeModel(
  { ort, create, model, source }: Pick<CutParts, 'ort' | 'create' | 'model' | 'source'>,
  files: ReadonlySet<string>,
): Promise<() => Promise<OrtSession | undefined>> {
  const { bytes, folder } = source;
  if (folder === undefined || files.size === 0) {
    return () => create(isProxied(ort) ? bytes.slice() : bytes, source.options);
  }
  const before = await stateOf(folder, files);
  return async () =>
    (await stateOf(folder, files).catch(() => undefined)) === before
      ? create(writeModel(model), withFolder(source.options, folder))
      : undefined;
}

async function engineFor({ ort, engine, source }: CutParts): Promise<AttentionEngine> {
  const TensorClass = ort.Tensor as OrtTensorConstructor;
  return engine === 'cpu' ? cpuEngine(TensorClass) : gpuEngine(TensorClass, await deviceOf(ort, source.options));
}
