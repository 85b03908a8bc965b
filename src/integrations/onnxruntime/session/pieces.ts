/** Sessions for parts of a model, and the types of the values between them. */
import type { Cut, Piece, PlacedSite } from '../cut.ts';
import { boundaryOf, numbersReadBy } from '../detect/site.ts';
import type { GraphIndex } from '../model/graph.ts';
import type { ModelMetadata } from '../model/sketch.ts';
import { elementKind } from '../model/types.ts';
import { type MountedModel, weightsOf } from '../model/weights.ts';
import {
  canonicalDomain,
  ELEMENT_TYPES,
  type ElementTypeName,
  elementTypeName,
  type ModelProto,
  graph as makeGraph,
  modelLike,
  untypedValue,
  type ValueInfoProto,
  valueInfo,
  writeModel,
} from '../onnx/codec.ts';
import type { Engine, OrtDimension, OrtSessionOptions, OrtValueMetadata } from '../ort.ts';
import { isSize } from './feeds.ts';
import { type ModelSource, withFolder } from './source.ts';

export interface EncodedPiece {
  /** Arguments of `InferenceSession.create`. */
  readonly bytes: Uint8Array;
  readonly options: OrtSessionOptions;
  /** Files that onnxruntime itself opens. */
  readonly files: readonly string[];
}

/** Shapes of values in the model in one piece, where they are known; a piece alone loses those behind an attention. */
export type InferredShapes = ReadonlyMap<string, readonly OrtDimension[]>;

/** In front of dimension names that onnxruntime made up for the whole model: in a piece it makes up others. */
const OF_THE_WHOLE = 'whole ';

export interface PieceContext {
  readonly model: ModelProto;
  readonly cut: Cut;
  readonly source: ModelSource;
  readonly engine: Engine;
  readonly mounted: MountedModel | undefined;
  readonly shapes?: InferredShapes | undefined;
}

/** Writes parts of the model as models and keeps the types of the values between them. */
export class PieceWriter {
  readonly #context: PieceContext;
  readonly #index: GraphIndex;
  /** Types as onnxruntime inferred them, and dimensions that mean the same in every session. */
  readonly #types = new Map<string, OrtValueMetadata>();
  /** Dimension names that the model's author gave; names that onnxruntime makes up hold within one session only. */
  readonly #symbols: ReadonlySet<string>;
  readonly #names: { readonly inputs: readonly string[]; readonly outputs: readonly string[] };

  constructor(context: PieceContext) {
    this.#context = context;
    this.#index = context.cut.index;
    const { graph } = this.#index;
    this.#symbols = new Set(
      graph.input.flatMap((info) => (metadataOf(info).shape ?? []).filter((size) => typeof size === 'string')),
    );
    this.#names = {
      inputs: graph.input.map(({ name }) => name).filter((name) => this.#index.inputs.has(name)),
      outputs: graph.output.map(({ name }) => name),
    };
    for (const name of this.#names.inputs) {
      const info = this.#index.declared(name);
      if (info !== undefined) this.#types.set(name, metadataOf(info));
    }
  }

  write({ level, nodes, inputs, outputs }: Piece): EncodedPiece {
    const { model, mounted, source } = this.#context;
    const given = source.options.externalData ?? [];
    const inMemory = new Set(given.map((entry) => (typeof entry === 'string' ? entry : entry.path)));
    const weights = weightsOf(this.#index, nodes, mounted, (file) => inMemory.has(file));
    const used = new Set(nodes.flatMap((node) => node.output));
    const proto = makeGraph({
      name: `${this.#index.graph.name}/${level}`,
      nodes,
      inputs: inputs.map((name) => this.#inputInfo(name)),
      outputs: outputs.map((name) => this.#index.declared(name) ?? untypedValue(name)),
      initializers: weights.initializers,
      valueInfo: this.#index.graph.valueInfo.filter((info) => used.has(info.name) && !outputs.includes(info.name)),
    });
    const domains = [...new Set(nodes.map((node) => canonicalDomain(node.domain)))];
    const bytes = writeModel(modelLike(model, proto, domains));
    const files = [...weights.files].filter((file) => !inMemory.has(file) && file !== mounted?.path);
    return { bytes, options: this.#optionsFor(outputs, weights.files, files), files };
  }

  /** The nodes that an attention replaces. */
  writeOriginal({ site, level }: PlacedSite): EncodedPiece {
    const outputs = [site.output, ...site.overrides];
    return this.write({ level, nodes: site.nodes, inputs: boundaryOf(this.#index, site.nodes), outputs });
  }

  /** What a session says of its outputs. */
  learn(metadata: readonly OrtValueMetadata[]): void {
    for (const value of metadata) this.#types.set(value.name, value);
  }

  /** An attention's result is of q's type. */
  declareResult({ site, result }: PlacedSite): void {
    const q = this.#types.get(site.q.value);
    if (q?.type === undefined) throw new Error(`the type of '${site.q.value}' is not known`);
    const declared = this.#index.declared(site.output);
    const shape = declared && metadataOf(declared).shape;
    this.#types.set(result, { name: result, isTensor: true, type: q.type, ...(shape === undefined ? {} : { shape }) });
  }

  #inputInfo(name: string): ValueInfoProto {
    const metadata = this.#types.get(name);
    const declared = this.#index.declared(name);
    if (metadata === undefined && declared?.type !== undefined) return declared;
    if (metadata?.isTensor !== true || !(String(metadata.type) in ELEMENT_TYPES)) {
      throw new Error(`value '${name}' between attentions is no tensor of a known type`);
    }
    // onnxruntime gives a value of unknown rank no dimensions; a scalar loses nothing by being one of those.
    const shape = metadata.shape?.length ? metadata.shape : undefined;
    const known = shape?.map((size) => (this.#isKnown(size) ? size : undefined));
    const sizes = this.#inferredSizes(name, known?.length) ?? known;
    return valueInfo(name, metadata.type as ElementTypeName, sizes);
  }

  #isKnown(size: OrtDimension): boolean {
    return typeof size === 'string' ? this.#symbols.has(size) : isSize(size);
  }

  /** As it is in the whole model; undefined where that says less, or has another rank. */
  #inferredSizes(name: string, rank: number | undefined): (OrtDimension | undefined)[] | undefined {
    const shape = this.#context.shapes?.get(name);
    if (shape === undefined || shape.length === 0 || (rank !== undefined && rank !== shape.length)) return undefined;
    return shape.map((size) => {
      if (this.#isKnown(size)) return size;
      return typeof size === 'string' && size !== '' ? `${OF_THE_WHOLE}${size}` : undefined;
    });
  }

  /** The model's metadata, as far as the pieces know it. */
  metadata(): ModelMetadata {
    const of = (name: string) => this.#types.get(name) ?? { name, isTensor: false };
    return { inputs: this.#names.inputs.map(of), outputs: this.#names.outputs.map(of) };
  }

  #optionsFor(outputs: readonly string[], used: ReadonlySet<string>, files: readonly string[]): OrtSessionOptions {
    const { engine, mounted, source } = this.#context;
    const { options, folder } = source;
    const given = options.externalData?.filter((entry) => used.has(typeof entry === 'string' ? entry : entry.path));
    const own = mounted !== undefined && used.has(mounted.path) ? [{ path: mounted.path, data: mounted.bytes }] : [];
    const externalData = given === undefined && own.length === 0 ? {} : { externalData: [...(given ?? []), ...own] };
    const adapted: Record<string, unknown> = { ...options, ...externalData };
    if (engine === 'webgpu') {
      adapted.preferredOutputLocation = Object.fromEntries(outputs.map((name) => [name, this.#locationOf(name)]));
    }
    return files.length > 0 && folder !== undefined ? withFolder(adapted, folder) : adapted;
  }

  /** Values between sessions stay on the GPU, but for those that onnxruntime itself needs on the CPU: shapes and indices. */
  #locationOf(name: string): string {
    const { cut, source } = this.#context;
    if (this.#index.outputs.has(name)) {
      const asked = source.options.preferredOutputLocation;
      return (typeof asked === 'string' ? asked : asked?.[name]) ?? 'cpu';
    }
    const onCpu = cut.sites.some(({ site }) => numbersReadBy(site).includes(name));
    return onCpu || elementKind(this.#index, name) === 'integer' ? 'cpu' : 'gpu-buffer';
  }
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
