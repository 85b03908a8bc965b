/** Opens a model with markers in the place of its attentions, once they have been tried on its device. */
import type { KernelName } from '../../../attention/kernels.ts';
import { messageOf } from '../../../errors.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import { backendOn } from '../../bridge.ts';
import { cutGraph, type Piece } from '../cut.ts';
import type { AttentionSite } from '../detect/site.ts';
import { DeviceHooks } from '../marker/hooks.ts';
import { learnMarker, openMarker, testMarker } from '../marker/learn.ts';
import { callOf, type MarkerEngine, planMarker } from '../marker/plan.ts';
import { inputsReadBy, type Marker, type MarkerFacts, markersOf, watchedByMarkers } from '../marker/site.ts';
import { KnownSizes } from '../marker/sizes.ts';
import { type GraphIndex, indexGraph } from '../model/graph.ts';
import { readFacts } from '../model/sketch.ts';
import { weightsOf } from '../model/weights.ts';
import type { GraphProto, ModelProto, NodeProto } from '../onnx/codec.ts';
import type {
  CreateArguments,
  OrtDimension,
  OrtModule,
  OrtSession,
  OrtSessionOptions,
  OrtTensorConstructor,
} from '../ort.ts';
import { isSize } from './feeds.ts';
import { deviceOf } from './gpu-engine.ts';
import { countingSession, MarkedSession } from './marked-session.ts';
import type { OpenedOnce } from './opened-sessions.ts';
import type { CutSession } from './session.ts';

export interface MarkedParts {
  readonly ort: OrtModule;
  create(...args: CreateArguments): Promise<OrtSession>;
  readonly model: ModelProto;
  readonly index: GraphIndex;
  readonly options: OrtSessionOptions;
  /** Attentions that are worth a marker. */
  readonly sites: readonly AttentionSite[];
  readonly kernel: KernelName | 'auto';
  readonly minTokens: number;
  /**
   * Opens the graph with markers in it, cut at other attentions: `wrap` makes of the session of a piece the one that runs. The order of
   * calls is that of the pieces.
   */
  openInner(
    cut: ReturnType<typeof cutGraph>,
    reasons: ReadonlyMap<AttentionSite, string>,
    wrap: (session: OrtSession, piece: Piece) => OrtSession,
  ): Promise<CutSession>;
  createCut(): Promise<CutSession>;
  /** The model as it is; undefined where the caller does not want it. */
  readonly whole: OpenedOnce<'whole'> | undefined;
  /** False for an attention that is too short for a cut, where it has no marker. */
  isWorthCutting(site: AttentionSite): boolean;
}

/** The attentions that get no marker by the reason, when none gets one; or the session. */
export async function openMarked(
  parts: MarkedParts,
): Promise<MarkedSession | { readonly reasons: ReadonlyMap<AttentionSite, string> }> {
  const { sites, index } = parts;
  const nobody = (reason: string) => ({ reasons: new Map(sites.map((site) => [site, reason])) });
  const { graph, opset } = index;
  const extra = uniqueNodes(sites.flatMap((site) => site.extra));
  const extended = indexGraph({ ...graph, node: [...graph.node, ...extra] }, opset);
  let facts: MarkerFacts;
  try {
    // Values that both have stay those of the graph: a value has one producer.
    const own = extra.filter(({ output }) => output.every((name) => index.producer(name) === undefined));
    const watched = watchedByMarkers(extended, sites);
    const first = await factsOf(parts, indexGraph({ ...graph, node: [...graph.node, ...own] }, opset), watched);
    // With markers in it onnxruntime knows what an attention gives, however the graph writes it.
    const sketched = markersOf(extended, first, sites, () => 0, true).markers;
    facts = sketched.length === 0 ? first : await factsOf(parts, liveGraph(extended, sketched, opset), watched);
  } catch (error) {
    return nobody(`its shapes cannot be read: ${messageOf(error)}`);
  }
  // The tags are the device's, and the device is there when a session is: an equation with any tag shows what has no marker.
  const possible = markersOf(extended, facts, sites, () => 0);
  if (possible.markers.length === 0) return { reasons: possible.reasons };
  const holder = await openMarker(parts.create, parts.options, possible.markers[0] as Marker).catch(messageOf);
  if (typeof holder === 'string') return nobody(`onnxruntime takes no marker: ${holder}`);
  let inner: CutSession | undefined;
  try {
    const device = await deviceOf(parts.ort, parts.options);
    const engine: MarkerEngine = { device, backend: await backendOn(device), kernel: parts.kernel };
    const hooks = DeviceHooks.on(device);
    const { markers, reasons } = markersOf(extended, facts, sites, (kind) => hooks.tagOf(kind));
    const codes = await hooks.exclusive(() => tryMarkers(parts, hooks, engine, extended, facts, markers));
    const cut = cutGraph(
      markedGraph(extended, markers),
      opset,
      sites.filter((site) => reasons.has(site) && parts.isWorthCutting(site)),
    );
    const isMarker = new Set(markers.map((marker) => marker.nodes.at(-1)));
    inner = await parts.openInner(cut, reasons, (session, piece) =>
      countingSession(session, piece.nodes.filter((node) => isMarker.has(node)).length, hooks),
    );
    return new MarkedSession({ ...parts, hooks, engine, index: extended, facts, markers, codes, inner });
  } catch (error) {
    await inner?.dispose();
    return nobody(messageOf(error));
  } finally {
    await holder.release();
  }
}

/** The graph with markers behind its own nodes, whose results they take over. */
function markedGraph({ graph }: GraphIndex, markers: readonly Marker[]): GraphProto {
  const constants = new Map(markers.flatMap((marker) => marker.constants).map((tensor) => [tensor.name, tensor]));
  return {
    ...graph,
    node: [...graph.node, ...uniqueNodes(markers.flatMap((marker) => marker.nodes))],
    initializer: [...graph.initializer, ...constants.values()],
  };
}

/** The same without what nobody reads any more. */
function liveGraph(extended: GraphIndex, markers: readonly Marker[], opset: number): GraphIndex {
  const { index, pieces } = cutGraph(markedGraph(extended, markers), opset, []);
  const node = pieces.flatMap(({ nodes }) => nodes);
  const { initializers } = weightsOf(index, node, undefined, () => true);
  return indexGraph({ ...index.graph, node, initializer: [...initializers] }, opset);
}

async function factsOf(
  { create, model, options }: MarkedParts,
  index: GraphIndex,
  watched: readonly string[],
): Promise<MarkerFacts> {
  const read = await readFacts(create, model, index, options, watched);
  if (read?.metadata === undefined) throw new Error('onnxruntime does not say the shapes of the model');
  const inputs = new Map<string, readonly OrtDimension[]>();
  for (const { name, shape = [] } of read.metadata.inputs) inputs.set(name, shape);
  return { inputs, shapeOf: (value) => read.shapes.get(value), typeOf: (value) => read.types.get(value) };
}

/** Each output once, although several layers may ask for it. */
function uniqueNodes(nodes: readonly NodeProto[]): NodeProto[] {
  return [...new Map(nodes.map((node) => [node.output[0] as string, node])).values()];
}

/** Learns and tests one marker of each kind; gives the shaders. @throws what does not work */
async function tryMarkers(
  { create, options, ort }: MarkedParts,
  hooks: DeviceHooks,
  engine: MarkerEngine,
  index: GraphIndex,
  facts: MarkerFacts,
  markers: readonly Marker[],
): Promise<Map<string, string>> {
  const codes = new Map<string, string>();
  const TensorClass = ort.Tensor as OrtTensorConstructor;
  for (const marker of markers) {
    if (codes.has(marker.kind)) continue;
    const session = await openMarker(create, options, marker);
    try {
      const code = await learnMarker(hooks, session, marker, TensorClass);
      codes.set(marker.kind, code);
      const sizes = smallSizes(index, facts, marker, engine);
      if (sizes === undefined) throw new Error('no small inputs were found to test a marker with');
      const found = callOf(marker, sizes, engine);
      if ('reason' in found) throw new Error(found.reason);
      const plan = await planMarker(marker, found.call, sizes, engine);
      try {
        const { site, mask, operands } = marker;
        const dims = operands.map((name) => sizes.dims(name === mask ? (site.mask?.value ?? name) : name) ?? []);
        await testMarker(hooks, session, marker, plan, code, dims, engine, TensorClass);
      } finally {
        plan.plan.dispose();
      }
    } finally {
      await session.release();
    }
  }
  return codes;
}

/** Sizes that a model leaves open, tried in turn: all different, all equal, one a step of a decoder and its cache. */
const SMALL: readonly ((place: number) => number)[] = [
  (place) => 2 + place,
  () => 3,
  (place) => [1, 5, 6, 5][place % 4] as number,
  () => 1,
];

/** Numbers of inputs from which lengths are computed, tried in turn: none, those of a mask without padding, the last key of few. */
const FILLS: readonly (number | undefined)[] = [undefined, 1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10];

function smallSizes(
  index: GraphIndex,
  facts: MarkerFacts,
  marker: Marker,
  engine: MarkerEngine,
): KnownSizes | undefined {
  const read = inputsReadBy(index, marker.site);
  const fills = read.size === 0 ? [undefined] : FILLS;
  for (const [sizeAt, fill] of SMALL.flatMap((size) => fills.map((number) => [size, number] as const))) {
    const places = new Map<string, number>();
    const inputs = [...index.inputs].map((name) => {
      const dims = (facts.inputs.get(name) ?? []).map((size, axis) => {
        if (isSize(size)) return size;
        const symbol = typeof size === 'string' && size !== '' ? size : `${name} ${axis}`;
        const place = places.get(symbol) ?? places.size;
        places.set(symbol, place);
        return sizeAt(place);
      });
      const isFilled = fill !== undefined && read.has(name);
      return [
        name,
        { dims, numbers: isFilled ? new Array<number>(elementCount(dims)).fill(fill) : undefined },
      ] as const;
    });
    const sizes = new KnownSizes(index, facts, new Map(inputs));
    if ('call' in callOf(marker, sizes, engine)) return sizes;
  }
  return undefined;
}
