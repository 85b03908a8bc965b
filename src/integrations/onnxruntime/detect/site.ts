/** What detection finds: one attention in a graph, as the operands of `sageattn` and the nodes that it replaces. */

import { type GraphIndex, isOp } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { type Numbers, parametersOf, type Sizes, type Strided, sourceOf } from './views.ts';

/** `[B,H,L,D]` seen in the elements of a tensor. */
export interface View {
  readonly shape: readonly [batch: number, heads: number, length: number, dim: number];
  readonly strides: readonly [number, number, number, number];
  readonly offset: number;
  /** Rank of the tensor that the graph has there: 3 where heads are part of the batch or of the channels. */
  readonly rank: number;
  /** Dimensions in front of the last two, where the graph has it in single operators: B and H are folded out of them. */
  readonly batch?: readonly number[];
  /** How often the graph repeats each head before it multiplies; default 1. */
  readonly repeats?: number;
}

/** How an operand lies in a value of the graph. `view` is undefined for sizes that it does not cover. */
export interface Operand {
  readonly value: string;
  /** Integer values that `view` reads. */
  readonly parameters: readonly string[];
  view(tensor: Strided, numbers: Numbers): View | undefined;
  /** Axis of the channels in `value`, counted from its last one. */
  readonly channels: number;
  /** Rank of `value`, where it is known. */
  readonly valueRank: number | undefined;
}

export interface Mask {
  /** bool (true = attend) or additive float; the tensor's type says which. */
  readonly value: string;
  /**
   * `full`: broadcasts to `[B,H,L,S]`. `scores`: broadcasts to the scores as they are at `ScoresShape.maskAt`. `padding`:
   * `[B,S]`, or `[B,L,S]` for all heads.
   */
  readonly form: 'full' | 'scores' | 'padding';
}

/** A factor of the scores that is known only when the graph runs: a tensor of one element. */
export interface RuntimeScale {
  readonly value: string;
  readonly inverse: boolean;
}

/** What must hold when the graph runs of scores that are a tensor of the graph. Stage 0 is the product of q and k. */
export interface ScoresShape {
  /** Reshapes from the product of q and k to that with v; each makes the next stage. */
  readonly reshapes: readonly Sizes[];
  readonly softmaxAt: number;
  /** Rank at the Softmax for its axis to be the last one; undefined where any will do. */
  readonly softmaxRank: number | undefined;
  readonly maskAt: number;
  /**
   * Dimensions of factors and of what masked scores become: they must not make the scores larger. `ofRows`: what a Reshape is asked to
   * make of one number for each row.
   */
  readonly operands: readonly { readonly dims: Sizes; readonly at: number; readonly ofRows?: boolean }[];
}

export interface AttentionSite {
  /** Name of the node, or of its output where it has none. */
  readonly name: string;
  /** What was matched: `com.microsoft.MultiHeadAttention`, `MatMul-Softmax-MatMul`, ... */
  readonly form: string;
  readonly heads: number | undefined;
  readonly headDim: number | undefined;
  readonly q: Operand;
  readonly k: Operand;
  readonly v: Operand;
  readonly mask: Mask | undefined;
  /** Factor of q k^T; undefined: 1/sqrt(D). */
  readonly scale: number | undefined;
  readonly runtimeScales: readonly RuntimeScale[];
  readonly softcap: number;
  readonly isCausal: boolean;
  readonly causalAlignment: 'top-left' | 'bottom-right';
  /** Keys that a row sees up to and with the one on its diagonal; undefined: all. */
  readonly windowLength: number | undefined;
  /**
   * Set where runtimes align a causal mask in different ways unless the keys in front of the first query are as many as the
   * past has tokens: the past keys `[B,H,P,D]`, or an empty name where there are none.
   */
  readonly alignedPast: string | undefined;
  /** `seqlens_k` of GroupQueryAttention, the last key of each sequence: in every one it must be the last of all keys. */
  readonly lastKeys: Sizes | undefined;
  /** The attention output and how `[B,H,Lq,Dv]` lies in it. */
  readonly output: string;
  /** `rank` of the tensor that holds q. */
  outputLayout(rank: number): 'HND' | 'NHD';
  /** @param batch of the view of q */
  outputDims(view: View['shape'], rank: number, batch: readonly number[]): number[];
  /** Undefined where attention is one operator. */
  readonly scores: ScoresShape | undefined;
  /** The replaced nodes in topological order: onnxruntime computes `output` and `overrides` with them when it must. */
  readonly nodes: readonly NodeProto[];
  /** Outputs of `nodes` that `extra` computes too (present keys and values). */
  readonly overrides: readonly string[];
  /** Nodes to add to the graph: they compute operands that the graph has in another form. */
  readonly extra: readonly NodeProto[];
}

/** An attention that stays with onnxruntime. */
export interface LeftAttention {
  readonly name: string;
  readonly form: string;
  readonly heads: number | undefined;
  readonly headDim: number | undefined;
  readonly reason: string;
  /** It is inside an `If`, which may be a graph of its own for each value of an input. */
  readonly isInBranch?: boolean;
}

export type Detection = { readonly site: AttentionSite } | { readonly left: LeftAttention };

type Four = readonly [number, number, number, number];

const operand = (
  value: string,
  view: (tensor: Strided) => View | undefined,
  { channels = 0, valueRank }: { readonly channels?: number; readonly valueRank?: number } = {},
): Operand => ({ value, parameters: [], view, channels, valueRank });

function permuted({ shape, strides, offset }: Strided, axes: Four, rank = 4): View {
  const pick = (sizes: readonly number[]) => axes.map((axis) => sizes[axis] as number) as unknown as Four;
  return { shape: pick(shape), strides: pick(strides), offset, rank };
}

/** The operand `[B,H,L,D]` whose axes are `axes` of a value of rank 4. */
export function permutedOperand(value: string, axes: Four): Operand {
  return operand(value, (tensor) => (tensor.shape.length === 4 ? permuted(tensor, axes) : undefined), {
    channels: 3 - axes[3],
    valueRank: 4,
  });
}

/** Columns `[start, start + heads * dim)` of a value `[B,L,columns]`, where start and dim are fractions of the columns. */
export function hiddenOperand(value: string, heads: number, part = 0, parts: readonly number[] = [1]): Operand {
  const total = parts.reduce((sum, size) => sum + size, 0);
  const before = parts.slice(0, part).reduce((sum, size) => sum + size, 0);
  return operand(value, (tensor) => {
    if (tensor.shape.length !== 3) return undefined;
    const [batch, length, columns] = tensor.shape as [number, number, number];
    const [batchStride, token, channel] = tensor.strides as [number, number, number];
    const start = (columns * before) / total;
    const width = (columns * (parts[part] as number)) / total;
    const dim = width / heads;
    if (!Number.isInteger(start) || !Number.isInteger(dim)) return undefined;
    return {
      shape: [batch, heads, length, dim],
      strides: [batchStride, dim * channel, token, channel],
      offset: tensor.offset + start * channel,
      rank: 3,
    };
  });
}

/** `[B,L,H*D]`, or `[B,H,L,D]`. */
export const hiddenOrHeadsOperand = (value: string, heads: number): Operand =>
  anyOperand(hiddenOperand(value, heads), permutedOperand(value, [0, 1, 2, 3]));

/** Part `part` of `parts` in a value `[B,L,H,parts,D]`. */
export function packedOperand(value: string, part: number, parts: number): Operand {
  return operand(
    value,
    ({ shape, strides, offset }) => {
      if (shape.length !== 5 || shape[3] !== parts) return undefined;
      const [batch, length, heads, , dim] = shape as [number, number, number, number, number];
      const [batchStride, token, head, each, channel] = strides as [number, number, number, number, number];
      return {
        shape: [batch, heads, length, dim],
        strides: [batchStride, head, token, channel],
        offset: offset + part * each,
        rank: 5,
      };
    },
    { valueRank: 5 },
  );
}

/** The first of several readings that covers a tensor's dimensions; all have the channels last. */
export function anyOperand(...readings: readonly [Operand, ...Operand[]]): Operand {
  return operand(readings[0].value, (tensor) => {
    for (const reading of readings) {
      const view = reading.view(tensor, () => []);
      if (view !== undefined) return view;
    }
    return undefined;
  });
}

/** The graph with nodes added to it. */
function indexBehind(index: GraphIndex, extra: readonly NodeProto[]): GraphIndex {
  if (extra.length === 0) return index;
  const producers = new Map(extra.flatMap((node) => node.output.map((name) => [name, node] as const)));
  const constants = new Map(index.constants);
  for (const node of extra) {
    const value = isOp(node, 'Constant') ? node.attribute.find(({ name }) => name === 'value')?.t : undefined;
    if (value !== undefined) constants.set(node.output[0] as string, value);
  }
  return { ...index, constants, producer: (value) => producers.get(value) ?? index.producer(value) };
}

/**
 * The site with its operands read where they were computed, before splits, slices and transposes. The nodes in between
 * join those that the site replaces.
 */
export function withSources(index: GraphIndex, site: AttentionSite): AttentionSite {
  const all = indexBehind(index, site.extra);
  const nodes = new Set<NodeProto>(site.nodes);
  const read = (from: Operand): Operand => {
    const source = sourceOf(all, from.value, from.channels, from.valueRank);
    if (source === undefined) return from;
    for (const node of source.nodes) nodes.add(node);
    return {
      value: source.value,
      parameters: [...source.parameters, ...from.parameters],
      channels: 0,
      valueRank: undefined,
      view: (tensor, numbers) => {
        const view = source.view(tensor, numbers);
        return view && from.view(view, numbers);
      },
    };
  };
  const [q, k, v] = [read(site.q), read(site.k), read(site.v)];
  return { ...site, q, k, v, nodes: inGraphOrder(index, [...nodes]) };
}

/** Each node once, in the graph's order; those that the graph does not have stay behind it. */
export function inGraphOrder(index: GraphIndex, nodes: readonly NodeProto[]): NodeProto[] {
  const positions = positionsOf(index);
  const position = (node: NodeProto) => positions.get(node) ?? positions.size;
  return [...new Set(nodes)].sort((a, b) => position(a) - position(b));
}

const positions = new WeakMap<GraphIndex, ReadonlyMap<NodeProto, number>>();

function positionsOf(index: GraphIndex): ReadonlyMap<NodeProto, number> {
  const known = positions.get(index) ?? new Map(index.nodes.map((node, i) => [node, i]));
  positions.set(index, known);
  return known;
}

/** Names that the nodes read and do not write, constants left out. */
export function boundaryOf(index: GraphIndex, nodes: readonly NodeProto[]): string[] {
  const written = new Set(nodes.flatMap((node) => node.output));
  const read = nodes.flatMap((node) => index.readsOf(node));
  return [...new Set(read)].filter((name) => !written.has(name) && !index.constants.has(name));
}

/** Values whose numbers are read before the site can run: shapes, scales, lengths. */
export function numbersReadBy({ q, k, v, scores, runtimeScales, lastKeys }: AttentionSite): string[] {
  return [
    ...[q, k, v].flatMap((operand) => operand.parameters),
    ...parametersOf(scores?.reshapes ?? []),
    ...parametersOf(scores?.operands.map(({ dims }) => dims) ?? []),
    ...runtimeScales.map((scale) => scale.value),
    ...parametersOf(lastKeys === undefined ? [] : [lastKeys]),
  ];
}

/** Everything that must exist before the site can run. */
export function inputsOf(index: GraphIndex, site: AttentionSite): string[] {
  const values = [
    site.q.value,
    site.k.value,
    site.v.value,
    ...numbersReadBy(site),
    ...(site.mask === undefined ? [] : [site.mask.value]),
    ...(site.alignedPast ? [site.alignedPast] : []),
    ...boundaryOf(index, site.nodes),
  ];
  return [...new Set(values)].filter((name) => !index.constants.has(name));
}
