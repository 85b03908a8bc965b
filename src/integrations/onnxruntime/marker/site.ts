/** Which attentions a marker can stand for, and the nodes that put markers into a graph. */
import { added } from '../detect/additions.ts';
import { type AttentionSite, numbersReadBy } from '../detect/site.ts';
import { contiguous } from '../detect/views.ts';
import type { GraphIndex } from '../model/graph.ts';
import { elementTypeName, node as makeNode, type NodeProto, type TensorProto, tensorProto } from '../onnx/codec.ts';
import { isSize } from '../session/feeds.ts';
import { type Equation, equationOf, MAX_TAGS, type ResultSize } from './equation.ts';
import { type FreeSize, type GivenInput, KnownSizes, numbersFrom, type ShapeFacts } from './sizes.ts';

export interface Marker {
  readonly site: AttentionSite;
  readonly type: 'float16' | 'float32';
  /** Values that it binds, each once and in this order; the constant and the result follow. */
  readonly operands: readonly string[];
  /** The operand that is the mask: additive and of `type`. */
  readonly mask: string | undefined;
  readonly result: readonly ResultSize[];
  readonly equation: Equation;
  /** Markers of one kind are the same attention over different values. */
  readonly kind: string;
  /** The marker's node behind those that it needs. */
  readonly nodes: readonly NodeProto[];
  /** Constants of `nodes`. */
  readonly constants: readonly TensorProto[];
}

export interface MarkerFacts extends ShapeFacts {
  typeOf(value: string): string | undefined;
}

export interface Markers {
  readonly markers: readonly Marker[];
  /** Why attentions have none. */
  readonly reasons: ReadonlyMap<AttentionSite, string>;
}

/** The operator is older, but not its onnxruntime-web kernels. */
const LEAST_OPSET = 12;

/** Elements of the constant that gives a result its sizes. */
const MAX_CONSTANT = 2 ** 22;

/** Values of the graph of which {@link markersOf} and a run ask dimensions, and inputs of which they ask numbers. */
export function watchedByMarkers(index: GraphIndex, sites: readonly AttentionSite[]) {
  const values = new Set<string>();
  const sizes = new KnownSizes(
    index,
    {
      inputs: new Map(),
      shapeOf: (value) => {
        values.add(value);
        return undefined;
      },
    },
    new Map(),
    undefined,
    true,
  );
  for (const site of sites) {
    for (const value of boundBy(site)) sizes.dims(value);
    if (site.alignedPast) sizes.dims(site.alignedPast);
    for (const value of numbersReadBy(site)) {
      sizes.numbers(value);
      sizes.dims(value);
    }
  }
  return [...values];
}

const boundBy = ({ q, k, v, mask }: AttentionSite): string[] => [
  ...new Set([q.value, k.value, v.value, ...(mask === undefined ? [] : [mask.value])]),
];

/**
 * @param tagOf the number of a kind of markers, the same in all sessions of a device
 * @param isSketch for onnxruntime to infer shapes from: sizes that are not known yet may be any
 */
export function markersOf(
  index: GraphIndex,
  facts: MarkerFacts,
  sites: readonly AttentionSite[],
  tagOf: (kind: string) => number,
  isSketch = false,
): Markers {
  const trials = [0, 1, 2].map((trial) => {
    const sizeOf = differentSizes(trial);
    return new KnownSizes(index, facts, trialInputs(index, facts, sizeOf), isSketch ? sizeOf : undefined);
  });
  const markers: Marker[] = [];
  const reasons = new Map<AttentionSite, string>();
  const kinds = new Map<string, string[]>();
  const taken = new Set<string>();
  for (const site of sites) {
    const found = describe(index, facts, site, trials);
    if (typeof found === 'string') {
      reasons.set(site, found);
      continue;
    }
    // Two markers of one kind over the same values would be one node to onnxruntime.
    let kind = found.kind;
    for (let copy = 1; taken.has(`${kind} ${found.operands}`); copy++) kind = `${found.kind} ${copy}`;
    taken.add(`${kind} ${found.operands}`);
    const shape = JSON.stringify([found.type, found.ranks, found.result]);
    const alike = kinds.get(shape) ?? [];
    kinds.set(shape, alike);
    if (!alike.includes(kind)) alike.push(kind);
    const tag = tagOf(`${shape} ${alike.indexOf(kind)}`);
    const equation = equationOf(found.ranks, found.result, tag);
    const elements = equation?.constant.reduce((product, size) => product * size, 1) ?? 0;
    if (equation === undefined || elements > MAX_CONSTANT) {
      const many = tag >= MAX_TAGS ? 'there are too many kinds of attention' : 'its values have too many axes';
      reasons.set(site, elements > MAX_CONSTANT ? 'its result has sizes of no operand, and large ones' : many);
      continue;
    }
    markers.push({ ...found, site, kind, equation, ...nodesOf(site, found, equation) });
  }
  return { markers, reasons };
}

type Description = Pick<Marker, 'type' | 'operands' | 'mask' | 'result' | 'kind'> & {
  readonly ranks: readonly number[];
};

/** Inputs of the graph whose numbers an attention needs before a run. */
export const inputsReadBy = (index: GraphIndex, site: AttentionSite): ReadonlySet<string> =>
  new Set(numbersReadBy(site).flatMap((value) => [...(numbersFrom(index, value) ?? [])]));

/** Or why there is no marker for it. */
function describe(
  index: GraphIndex,
  facts: MarkerFacts,
  site: AttentionSite,
  trials: readonly KnownSizes[],
): Description | string {
  if (index.opset < LEAST_OPSET) return `Einsum needs operator set ${LEAST_OPSET}, the model has ${index.opset}`;
  const typeOf = (value: string) => {
    const constant = index.constants.get(value);
    return constant === undefined ? facts.typeOf(value) : elementTypeName(constant.dataType);
  };
  const type = typeOf(site.q.value);
  if (type !== 'float16' && type !== 'float32') return `queries of type ${type ?? 'unknown'}`;
  for (const { value } of [site.k, site.v]) {
    if (typeOf(value) !== type) return `'${value}' is of another type than the queries`;
  }
  const masked = site.mask?.value;
  const maskType = masked === undefined ? undefined : typeOf(masked);
  if (masked !== undefined && maskType !== type && maskType !== 'bool') {
    return `a mask of type ${maskType ?? 'unknown'} beside queries of type ${type}`;
  }
  const values = boundBy(site);
  const dims = trials.map((trial) => values.map((value) => trial.dims(value)));
  const unknown = values.find((_, i) => dims.some((list) => list[i] === undefined));
  if (unknown !== undefined) return `the dimensions of '${unknown}' are known only when the graph runs`;
  const late = numbersReadBy(site).find(
    (value) => trials[0]?.numbers(value) === undefined && numbersFrom(index, value) === undefined,
  );
  if (late !== undefined) return `the numbers of '${late}' are known only when the graph runs`;
  const known = dims as readonly (readonly (readonly number[])[])[];
  const results = trials.map((trial) => resultDims(site, trial));
  if (results.some((result) => result === undefined))
    return 'the dimensions of its result are known only when the graph runs';
  const result = resultSizes(results as readonly (readonly number[])[], known);
  if (result === undefined) return 'its result has a size of no operand';
  const mask = maskType === 'bool' ? added('additive', masked as string, type) : masked;
  const operands = values.map((value) => (value === masked ? (mask as string) : value));
  // A mask of booleans that is an operand as well would be bound twice.
  const ranks = (known[0] as readonly (readonly number[])[]).map((list) => list.length);
  const { scale, softcap, isCausal, causalAlignment, windowLength, form, heads, headDim, alignedPast, lastKeys } = site;
  const kind = JSON.stringify([
    type,
    known,
    [site.q, site.k, site.v, ...(site.mask === undefined ? [] : [site.mask])].map(({ value }) => values.indexOf(value)),
    [form, heads, headDim, scale, softcap, isCausal, causalAlignment, windowLength, alignedPast !== undefined],
    [site.mask?.form, maskType, lastKeys !== undefined, site.runtimeScales.length],
  ]);
  return { type, operands, mask, result, kind, ranks };
}

/**
 * Different sizes for all that a model leaves open: what comes out equal each time is equal always. They grow with the trial, each at its own rate, and no
 * sum of them is one of them; small ones, since a model may have a table of positions that ends.
 */
function differentSizes(trial: number): (symbol: string) => number {
  const open = new Map<string, number>();
  return (symbol) => {
    const found = open.get(symbol) ?? 13 + 4 * open.size + trial * (3 + 2 * open.size);
    open.set(symbol, found);
    return found;
  };
}

function trialInputs(index: GraphIndex, facts: ShapeFacts, sizeOf: FreeSize): Map<string, GivenInput> {
  return new Map(
    [...index.inputs].map((name) => {
      const shape = facts.inputs.get(name) ?? [];
      const dims = shape.map((size, axis) => {
        if (isSize(size)) return size;
        return sizeOf(typeof size === 'string' && size !== '' ? size : `${name} ${axis}`);
      });
      return [name, { dims, numbers: undefined }];
    }),
  );
}

function resultDims(site: AttentionSite, sizes: KnownSizes): readonly number[] | undefined {
  let isKnown = true;
  const numbers = (value: string) => {
    const found = sizes.numbers(value);
    if (found === undefined) isKnown = false;
    return found ?? [];
  };
  const [q, v] = [site.q, site.v].map((operand) => operand.view(contiguous(sizes.dims(operand.value) ?? []), numbers));
  if (q === undefined || v === undefined || !isKnown) return undefined;
  const [batch, heads, length] = q.shape;
  return site.outputDims([batch, heads, length, v.shape[3]], q.rank, q.batch ?? []);
}

/** Each size of the result as that of an axis, or as a number. */
function resultSizes(
  results: readonly (readonly number[])[],
  dims: readonly (readonly (readonly number[])[])[],
): ResultSize[] | undefined {
  const used = new Set<string>();
  const [first] = results as [readonly number[]];
  const found = first.map((size, at): ResultSize | undefined => {
    for (const [operand, axes] of (dims[0] as readonly (readonly number[])[]).entries()) {
      for (const axis of axes.keys()) {
        const isSame = results.every((result, trial) => dims[trial]?.[operand]?.[axis] === result[at]);
        if (!isSame || used.has(`${operand} ${axis}`)) continue;
        used.add(`${operand} ${axis}`);
        return { operand, axis };
      }
    }
    return results.every((result) => result[at] === size) ? size : undefined;
  });
  return found.every((size) => size !== undefined) ? found : undefined;
}

const zeros = (type: Marker['type'], count: number) =>
  type === 'float16' ? new Uint16Array(count) : new Float32Array(count);

/** -Infinity, which hides a key. */
const hidden = (type: Marker['type']) =>
  type === 'float16' ? Uint16Array.of(0xfc00) : Float32Array.of(Number.NEGATIVE_INFINITY);

function nodesOf(
  site: AttentionSite,
  { type, operands, mask }: Description,
  { text, constant }: Equation,
): Pick<Marker, 'nodes' | 'constants'> {
  const name = added('sizes', type, ...constant.map(String));
  const count = constant.reduce((product, size) => product * size, 1);
  const constants = [tensorProto(name, type, constant, zeros(type, count))];
  const nodes: NodeProto[] = [];
  const from = site.mask?.value;
  if (mask !== undefined && from !== undefined && mask !== from) {
    const [zero, low] = [added('zero', type), added('hidden', type)];
    constants.push(tensorProto(zero, type, [], zeros(type, 1)), tensorProto(low, type, [], hidden(type)));
    nodes.push(makeNode('Where', [from, zero, low], [mask]));
  }
  const attributes = { equation: text };
  nodes.push(makeNode('Einsum', [...operands, name], [site.output], { name: `${site.name}/marker`, attributes }));
  return { nodes, constants };
}
