/** Where q, k and v are read: before transposes, factors and repeated heads, as long as their channels lie side by side. */

import { type GraphIndex, intsAttribute } from '../model/graph.ts';
import { node as makeNode, type NodeProto } from '../onnx/codec.ts';
import { type Additions, added, MAX_STEPS, NotExact } from './additions.ts';
import { is } from './operators.ts';
import {
  columnsFromLast,
  hasColumnsLast,
  namedOrder,
  type Order,
  permutationOf,
  rankOf,
  throughTranspose,
} from './order.ts';
import { type Repeat, repeatedHeads } from './repeats.ts';
import { scaleStep } from './scores.ts';
import type { Operand, View } from './site.ts';
import { reshaped, type Strided, sourceOf } from './views.ts';

interface Peeled {
  readonly value: string;
  /** Order of the axes `[.., token, channel]`. */
  readonly order: Order;
  readonly scale: number;
  readonly nodes: readonly NodeProto[];
  /** How the graph repeats the heads of `value`. */
  readonly repeat?: { readonly of: Repeat; readonly axes: readonly number[] };
}

export interface FoundOperand {
  readonly operand: Operand;
  /** Factor that the graph multiplies it by. */
  readonly scale: number;
  /** Between where it is read and the product. */
  readonly nodes: readonly NodeProto[];
}

/**
 * @param order of `[.., token, channel]` in the product's operand `value`
 * @throws {NotExact} where it would have to be transposed and cannot
 */
export function findOperand(
  index: GraphIndex,
  add: Additions,
  value: string,
  order: Order,
  options: { readonly scales: boolean; readonly repeats: boolean },
): FoundOperand {
  const peeled = peel(index, { value, order, scale: 1, nodes: [] }, options);
  if (hasColumnsLast(peeled.order)) return { operand: operandOf(peeled), scale: peeled.scale, nodes: peeled.nodes };
  // A Transpose of all axes of a packed projection, say: the channels lie side by side where it was computed.
  const start: Peeled = { value, order, scale: 1, nodes: [] };
  if (sourceOf(index, value, columnsFromLast(order), rankOf(order)) !== undefined) {
    return { operand: operandOf(start), scale: 1, nodes: [] };
  }
  return {
    operand: operandOf({ ...start, value: transposed(index, add, value, order), order: 'natural' }),
    scale: 1,
    nodes: [],
  };
}

/** The value with its axes in an order. */
export function transposed(index: GraphIndex, add: Additions, value: string, order: Order): string {
  if (order === 'natural') return value;
  const name = added('transposed', value, String(order));
  return add.node(transposeNode(index, value, order, name));
}

export function transposeNode(index: GraphIndex, input: string, order: Order, output: string): NodeProto {
  if (typeof order !== 'string') return makeNode('Transpose', [input], [output], { attributes: { perm: order } });
  if (index.opset < 12) throw new NotExact('operands stored transposed in an operator set without Einsum');
  return makeNode('Einsum', [input], [output], { attributes: { equation: '...ij->...ji' } });
}

function peel(
  index: GraphIndex,
  start: Peeled,
  options: { readonly scales: boolean; readonly repeats: boolean },
): Peeled {
  let best = start;
  let current = start;
  for (let step = 0; step < MAX_STEPS; step++) {
    const next = peelOne(index, current, options);
    if (next === undefined) break;
    current = next;
    if (hasColumnsLast(current.order)) best = current;
  }
  return best;
}

function peelOne(
  index: GraphIndex,
  current: Peeled,
  options: { readonly scales: boolean; readonly repeats: boolean },
): Peeled | undefined {
  const node = index.producer(current.value);
  if (node === undefined) return undefined;
  const nodes = [node, ...current.nodes];
  const value = node.input[0] as string;
  if (is(node, 'Identity')) return { ...current, value, nodes };
  if (is(node, 'Transpose')) {
    const permutation = intsAttribute(node, 'perm');
    const order = permutation && throughTranspose(current.order, permutation);
    if (order === undefined) return undefined;
    // More axes than kernels know are folded, which takes them as they lie.
    return order.length > 4 && typeof namedOrder(order) !== 'string' ? undefined : { ...current, value, order, nodes };
  }
  const scaled = options.scales ? scaleStep(index, node) : undefined;
  if (scaled?.of.kind === 'number' && isOneNumber(scaled.of.dims)) {
    return { ...current, value: scaled.value, scale: current.scale * scaled.of.factor, nodes };
  }
  const axes = permutationOf(current.order, 4);
  const isFirst = options.repeats && current.repeat === undefined;
  const repeated = isFirst && axes !== undefined ? repeatedHeads(index, node, axes[1] as number) : undefined;
  if (repeated === undefined || axes === undefined) return undefined;
  return {
    ...current,
    value: repeated.value,
    order: axes,
    nodes: [...repeated.nodes, ...current.nodes],
    repeat: { of: repeated, axes },
  };
}

/** A factor that gives no operand, which has three dimensions at least, another shape. */
const isOneNumber = (dims: readonly number[]) => dims.length <= 3 && dims.every((size) => size === 1);

function operandOf({ value, order, repeat }: Peeled): Operand {
  return {
    value,
    parameters: repeat?.of.parameters ?? [],
    channels: columnsFromLast(order),
    valueRank: rankOf(order),
    view: (tensor, numbers) => {
      const view = viewOf(tensor, order);
      if (view === undefined || repeat === undefined) return view;
      // In the order of the axes where heads are repeated.
      const shape = [0, 1, 2, 3].map((axis) => view.shape[repeat.axes.indexOf(axis)] as number);
      const repeats = repeat.of.count(shape, numbers);
      return repeats === undefined ? undefined : { ...view, repeats };
    },
  };
}

/** `[.., L, D]` as `[B,H,L,D]`: one head where there is one axis in front of the tokens, the last one of several. */
function viewOf(tensor: Strided, order: Order): View | undefined {
  const rank = tensor.shape.length;
  const axes = permutationOf(order, rank);
  if (axes === undefined || rank < 3) return undefined;
  const pick = (sizes: readonly number[]) => axes.map((axis) => sizes[axis] as number);
  const [shape, strides] = [pick(tensor.shape), pick(tensor.strides)];
  const batch = shape.slice(0, -2);
  const [length, dim] = shape.slice(-2) as [number, number];
  const rest = { offset: tensor.offset, rank, batch };
  if (rank === 3) {
    const [first, token, channel] = strides as [number, number, number];
    return { shape: [shape[0] as number, 1, length, dim], strides: [first, dim, token, channel], ...rest };
  }
  const heads = batch.at(-1) as number;
  const folded = [batch.slice(0, -1).reduce((product, size) => product * size, 1), heads, length, dim];
  const view = rank === 4 ? { shape, strides } : reshaped({ shape, strides, offset: tensor.offset }, folded);
  return (
    view && {
      ...rest,
      shape: view.shape as unknown as View['shape'],
      strides: view.strides as unknown as View['strides'],
    }
  );
}
