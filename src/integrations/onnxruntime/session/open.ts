/** From the arguments of `InferenceSession.create` to a session whose attention runs here. */
import { type Cut, cutGraph, type PlacedSite } from '../cut.ts';
import { detectAttention } from '../detect/index.ts';
import type { AttentionSite, LeftAttention } from '../detect/site.ts';
import { boundaryOf, numbersReadBy } from '../detect/site.ts';
import {
  canonicalDomain,
  ELEMENT_TYPES,
  type ElementTypeName,
  elementTypeName,
  type ModelProto,
  graph as makeGraph,
  modelLike,
  type NodeProto,
  readModel,
  untypedValue,
  type ValueInfoProto,
  valueInfo,
  writeModel,
} from '../model/codec.ts';
import { type GraphIndex, indexGraph, isAcyclic } from '../model/graph.ts';
import { type ModelMetadata, readMetadata } from '../model/metadata.ts';
import { elementKind } from '../model/types.ts';
import { type WeightSource, weightsOf } from '../model/weights.ts';
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
  type OrtDimension,
  type OrtModule,
  type OrtSession,
  type OrtSessionOptions,
  type OrtTensorConstructor,
  type OrtValueMetadata,
  versionsOf,
} from '../ort.ts';
import { type AttentionEngine, cpuEngine } from './engine.ts';
import { isSize } from './feeds.ts';
import { deviceOf, gpuEngine } from './gpu-engine.ts';
import type { AttentionReport } from './report.ts';
import { CutSession, reportLeft } from './session.ts';

export type CreateSession = (...args: CreateArguments) => Promise<OrtSession>;

export interface Opened {
  /** Undefined: `plain` is what the caller gets. */
  readonly cut: CutSession | undefined;
  readonly plain: OrtSession | undefined;
  report(): AttentionReport[];
}

interface ModelSource {
  readonly bytes: Uint8Array;
  /** Path or URL that the caller gave. */
  readonly path: string | undefined;
  readonly options: OrtSessionOptions;
}

/**
 * Opens a model with its attention replaced, or as it is where nothing can be replaced.
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
  const plain = async (report: AttentionReport[]): Promise<Opened> => ({
    cut: undefined,
    plain: await create(...args),
    report: () => report,
  });
  let sessionOptions: OrtSessionOptions;
  let model: ModelProto;
  let source: ModelSource;
  let index: GraphIndex;
  let opset: number;
  try {
    sessionOptions = sessionOptionsOf(args);
    source = await loadModel(args, sessionOptions);
    model = readModel(source.bytes);
    if (model.graph === undefined || model.graph.node.length === 0) throw new Error('it has no graph');
    if (model.graph.sparseInitializer.length > 0) throw new Error('it has sparse initializers');
    opset = Number(model.opsetImport.find((entry) => canonicalDomain(entry.domain) === '')?.version ?? 1);
    index = indexGraph(model.graph, opset);
    if (!isAcyclic(index)) throw new Error('its graph has a cycle');
  } catch (error) {
    // Whatever is wrong with the arguments or the file, onnxruntime says it in its own words.
    const opened = await plain([]);
    warn(`the model runs unmodified: ${messageOf(error)}`);
    return opened;
  }
  const detected = detectAttention(index);
  const left: LeftAttention[] = [...detected.left];
  const engine = engineOf(ort, sessionOptions);
  const sites = detected.sites.filter((site) => {
    const reason = typeof engine === 'string' ? leftOn(ort, engine, options, site.name) : engine.reason;
    if (reason !== undefined) left.push(leave(site, reason));
    return reason === undefined;
  });
  if (typeof engine !== 'string' || sites.length === 0) return plain(left.map(reportLeft));
  try {
    const cut = cutGraph(index.graph, opset, sites);
    const metadata = await readMetadata(create, model, index, sessionOptions).catch(() => undefined);
    const session = await openCut({ ort, create, args, model, source, cut, metadata, left, engine, options });
    return { cut: session, plain: undefined, report: () => session.report() };
  } catch (error) {
    const reason = `the graph could not be cut: ${messageOf(error)}`;
    const opened = await plain([...sites.map((site) => leave(site, reason)), ...left].map(reportLeft));
    warn(`the model runs unmodified: ${reason}`);
    return opened;
  }
}

const runtimeOf = (ort: OrtModule, engine: Engine): keyof typeof DEFAULT_MIN_TOKENS => {
  if (engine === 'webgpu') return 'webgpu';
  return versionsOf(ort).node === undefined ? 'onnxruntime-web' : 'onnxruntime-node';
};

/** `'adaptive'` measures for itself what pays off. */
const minTokensOf = (ort: OrtModule, engine: Engine, options: SageAttentionOptions): number =>
  options.minTokens ?? (options.policy === 'adaptive' ? 0 : DEFAULT_MIN_TOKENS[runtimeOf(ort, engine)]);

/** Why an attention stays where it is whatever its size. */
function leftOn(ort: OrtModule, engine: Engine, options: SageAttentionOptions, name: string): string | undefined {
  if (Number.isFinite(minTokensOf(ort, engine, options))) return excludedBy(options, name);
  return options.minTokens === undefined
    ? `${runtimeOf(ort, engine)} is faster on a CPU at any length; options.minTokens replaces it all the same`
    : 'minTokens is Infinity';
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

function leave(site: AttentionSite, reason: string): LeftAttention {
  const { name, form, heads, headDim } = site;
  return { name, form, heads, headDim, reason };
}

/** Behind the model; behind its place in a buffer too. */
function sessionOptionsOf([model, ...rest]: CreateArguments): OrtSessionOptions {
  const isBuffer = typeof model !== 'string' && !ArrayBuffer.isView(model);
  const at = isBuffer ? rest.findIndex((arg) => typeof arg !== 'number') : 0;
  const options = rest[at] ?? {};
  if (rest[at] === null || !isPlainObject(options)) throw new TypeError('the session options are no object');
  return options as OrtSessionOptions;
}

function isPlainObject(value: unknown): boolean {
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return false;
  return !(value instanceof ArrayBuffer) && Object.prototype.toString.call(value) !== '[object SharedArrayBuffer]';
}

async function loadModel(args: CreateArguments, options: OrtSessionOptions): Promise<ModelSource> {
  const [model, offset, length] = args;
  if (typeof model === 'string') return { bytes: await loadBytes(model), path: model, options };
  if (model instanceof Uint8Array) return { bytes: model, path: undefined, options };
  const start = typeof offset === 'number' ? offset : 0;
  const size = typeof length === 'number' ? length : (model as ArrayBufferLike).byteLength - start;
  return { bytes: new Uint8Array(model as ArrayBuffer, start, size), path: undefined, options };
}

async function loadBytes(location: string): Promise<Uint8Array> {
  const fs = nodeModule<typeof import('node:fs/promises')>('node:fs/promises');
  if (fs !== undefined && !/^(https?|data|blob):/.test(location)) return await fs.readFile(location);
  const response = await fetch(location);
  if (!response.ok) throw new Error(`${location}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** A module of Node where there is one; bundles for browsers stay free of it. */
function nodeModule<T>(name: string): T | undefined {
  return globalThis.process?.getBuiltinModule?.(name) as T | undefined;
}

interface CutParts {
  readonly ort: OrtModule;
  readonly create: CreateSession;
  readonly args: CreateArguments;
  readonly model: ModelProto;
  readonly source: ModelSource;
  readonly cut: Cut;
  /** Undefined: what the pieces say must do. */
  readonly metadata: ModelMetadata | undefined;
  readonly left: readonly LeftAttention[];
  readonly engine: Engine;
  readonly options: SageAttentionOptions;
}

async function openCut(parts: CutParts): Promise<CutSession> {
  const { ort, create, args, cut, metadata, left, engine, options } = parts;
  const builder = new SessionBuilder(parts);
  const sessions: OrtSession[] = [];
  try {
    for (let level = 0; level < cut.levels; level++) {
      for (const piece of cut.pieces) {
        if (piece.level === level)
          sessions.push(await builder.open(piece.nodes, piece.inputs, piece.outputs, piece.level));
      }
      for (const placed of cut.sites) if (placed.level === level) builder.declareResult(placed);
    }
    return new CutSession({
      cut,
      sessions,
      left,
      engine: await engineFor(parts),
      options: {
        ...options,
        minTokens: minTokensOf(ort, engine, options),
        threshold: options.threshold ?? DEFAULT_THRESHOLD,
        calibrationRuns: options.calibrationRuns ?? DEFAULT_CALIBRATION_RUNS,
      },
      metadata: metadata ?? builder.metadata(),
      isWeb: versionsOf(ort).node === undefined,
      createOriginal: (placed) => builder.openOriginal(placed),
      createWhole: () => create(...args),
    });
  } catch (error) {
    for (const session of sessions) await session.release();
    throw error;
  }
}

async function engineFor({ ort, engine, source }: CutParts): Promise<AttentionEngine> {
  const TensorClass = ort.Tensor as OrtTensorConstructor;
  return engine === 'cpu' ? cpuEngine(TensorClass) : gpuEngine(TensorClass, await deviceOf(ort, source.options));
}

/** Opens sessions for parts of the model and keeps the types of the values between them. */
class SessionBuilder {
  readonly #parts: CutParts;
  readonly #index: GraphIndex;
  readonly #weights: WeightSource;
  readonly #declared: Map<string, ValueInfoProto>;
  /** Types as onnxruntime inferred them, and dimensions that mean the same in every session. */
  readonly #types = new Map<string, OrtValueMetadata>();
  /** Dimension names that the model's author gave; names that onnxruntime makes up hold within one session only. */
  readonly #symbols: ReadonlySet<string>;
  readonly #names: { readonly inputs: readonly string[]; readonly outputs: readonly string[] };

  constructor(parts: CutParts) {
    this.#parts = parts;
    this.#index = parts.cut.index;
    this.#weights = weightSource(parts);
    const { graph } = this.#index;
    this.#declared = new Map([...graph.valueInfo, ...graph.output, ...graph.input].map((info) => [info.name, info]));
    this.#symbols = new Set(
      graph.input.flatMap((info) => (metadataOf(info).shape ?? []).filter((size) => typeof size === 'string')),
    );
    this.#names = {
      inputs: graph.input.map(({ name }) => name).filter((name) => this.#index.inputs.has(name)),
      outputs: graph.output.map(({ name }) => name),
    };
    for (const name of this.#names.inputs) {
      const info = this.#declared.get(name);
      if (info !== undefined) this.#types.set(name, metadataOf(info));
    }
  }

  async open(
    nodes: readonly NodeProto[],
    inputs: readonly string[],
    outputs: readonly string[],
    level: number,
  ): Promise<OrtSession> {
    const weights = weightsOf(this.#index, nodes, this.#weights);
    const used = new Set(nodes.flatMap((node) => node.output));
    const proto = makeGraph({
      name: `${this.#index.graph.name}/${level}`,
      nodes,
      inputs: inputs.map((name) => this.#inputInfo(name)),
      outputs: outputs.map((name) => this.#declared.get(name) ?? untypedValue(name)),
      initializers: weights.initializers,
      valueInfo: this.#index.graph.valueInfo.filter((info) => used.has(info.name) && !outputs.includes(info.name)),
    });
    const domains = [...new Set(nodes.map((node) => canonicalDomain(node.domain)))];
    const bytes = writeModel(modelLike(this.#parts.model, proto, domains));
    const session = await this.#parts.create(bytes, this.#optionsFor(outputs, weights.files));
    for (const metadata of session.outputMetadata ?? []) this.#types.set(metadata.name, metadata);
    return session;
  }

  /** An attention's result is of q's type. */
  declareResult({ site, result }: PlacedSite): void {
    const q = this.#types.get(site.q.value);
    if (q?.type === undefined) throw new Error(`the type of '${site.q.value}' is not known`);
    const declared = this.#declared.get(site.output);
    const shape = declared && metadataOf(declared).shape;
    this.#types.set(result, { name: result, isTensor: true, type: q.type, ...(shape === undefined ? {} : { shape }) });
  }

  openOriginal({ site, level }: PlacedSite): Promise<OrtSession> {
    return this.open(site.nodes, boundaryOf(this.#index, site.nodes), [site.output, ...site.overrides], level);
  }

  #inputInfo(name: string): ValueInfoProto {
    const metadata = this.#types.get(name);
    const declared = this.#declared.get(name);
    if (metadata === undefined && declared?.type !== undefined) return declared;
    if (metadata?.isTensor !== true || !(String(metadata.type) in ELEMENT_TYPES)) {
      throw new Error(`value '${name}' between attentions is no tensor of a known type`);
    }
    // onnxruntime gives a value of unknown rank no dimensions; a scalar loses nothing by being one of those.
    const shape = metadata.shape?.length ? metadata.shape : undefined;
    const sizes = shape?.map((size) => (this.#isKnown(size) ? size : undefined));
    return valueInfo(name, metadata.type as ElementTypeName, sizes);
  }

  #isKnown(size: OrtDimension): boolean {
    return typeof size === 'string' ? this.#symbols.has(size) : isSize(size);
  }

  /** As far as the pieces know it. */
  metadata(): ModelMetadata {
    const of = (name: string) => this.#types.get(name) ?? { name, isTensor: false };
    return { inputs: this.#names.inputs.map(of), outputs: this.#names.outputs.map(of) };
  }

  #optionsFor(outputs: readonly string[], files: ReadonlySet<string>): OrtSessionOptions {
    const { options, path } = this.#parts.source;
    const adapted: Record<string, unknown> = { ...options };
    if (options.externalData !== undefined || this.#weights.kind === 'mounted') {
      const given = (options.externalData ?? []).filter((entry) =>
        files.has(typeof entry === 'string' ? entry : entry.path),
      );
      const mounted =
        this.#weights.kind === 'mounted' && files.has(this.#weights.path)
          ? [{ path: this.#weights.path, data: this.#weights.bytes }]
          : [];
      adapted.externalData = [...given, ...mounted];
    }
    if (path !== undefined && versionsOf(this.#parts.ort).node !== undefined && files.size > 0) {
      adapted.extra = withFolder(options.extra, folderOf(path));
    }
    if (this.#parts.engine === 'webgpu') {
      adapted.preferredOutputLocation = Object.fromEntries(outputs.map((name) => [name, this.#locationOf(name)]));
    }
    return adapted;
  }

  /** Values between sessions stay on the GPU, but for those that onnxruntime itself needs on the CPU: shapes and indices. */
  #locationOf(name: string): string {
    const { cut, source } = this.#parts;
    if (this.#index.outputs.has(name)) {
      const asked = source.options.preferredOutputLocation;
      return (typeof asked === 'string' ? asked : asked?.[name]) ?? 'cpu';
    }
    const onCpu = cut.sites.some(({ site }) => numbersReadBy(site).includes(name));
    return onCpu || elementKind(this.#index, name) === 'integer' ? 'cpu' : 'gpu-buffer';
  }
}

function weightSource({ ort, source }: CutParts): WeightSource {
  if (versionsOf(ort).node === undefined) return { kind: 'mounted', bytes: source.bytes, path: 'sageattention.model' };
  return source.path === undefined
    ? { kind: 'inline' }
    : {
        kind: 'file',
        bytes: source.bytes,
        path: source.path.slice(folderOf(source.path).length).replace(/^[/\\]/, ''),
      };
}

function folderOf(path: string): string {
  const end = Math.max(path.lastIndexOf('/'), path.lastIndexOf('\\'));
  return end < 0 ? '.' : path.slice(0, Math.max(end, 1));
}

/** onnxruntime looks for external data here when a model comes from memory. */
function withFolder(extra: OrtSessionOptions['extra'], folder: string): Record<string, unknown> {
  const session = (extra?.session ?? {}) as Record<string, unknown>;
  return { ...extra, session: { ...session, model_external_initializers_file_folder_path: folder } };
}

function metadataOf(info: ValueInfoProto): OrtValueMetadata {
  const tensor = info.type?.value.case === 'tensorType' ? info.type.value.value : undefined;
  const type = tensor && elementTypeName(tensor.elemType);
  if (tensor === undefined || type === undefined) return { name: info.name, isTensor: false };
  const shape = tensor.shape?.dim.map((dimension): OrtDimension => {
    if (dimension.value.case === 'dimValue') return Number(dimension.value.value);
    return dimension.value.case === 'dimParam' ? dimension.value.value : '';
  });
  return { name: info.name, isTensor: true, type, ...(shape === undefined ? {} : { shape }) };
}
