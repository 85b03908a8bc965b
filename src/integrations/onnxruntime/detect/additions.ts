/** Nodes that a rewrite adds to a graph, each once however many attentions ask for it. */

import type { GraphIndex } from '../model/graph.ts';
import { type AttributeValue, node as makeNode, type NodeProto, tensorProto } from '../onnx/codec.ts';

/** Names for values that a rewrite adds. A name says how its value is computed, so that layers share equal values. */
export const added = (what: string, ...of: readonly string[]): string => `sageattention/${what}/${of.join('+')}`;

/** Steps that a walk over the graph takes at most: real exporters write a few dozen, and a graph may have a cycle. */
export const MAX_STEPS = 256;

/** Why a match is no attention that kernels compute. */
export class NotExact extends Error {}

type Attributes = Readonly<Record<string, AttributeValue>>;

/** Names of what has been added to a graph, by operator, inputs and attributes. */
const names = new WeakMap<GraphIndex, Map<string, string>>();

/** Collects the nodes of one attention. */
export class Additions {
  readonly #nodes = new Map<string, NodeProto>();
  readonly #names: Map<string, string>;

  constructor(index: GraphIndex) {
    const known = names.get(index) ?? new Map<string, string>();
    names.set(index, known);
    this.#names = known;
  }

  get nodes(): NodeProto[] {
    return [...this.#nodes.values()];
  }

  /** Adds a node that computes something from `inputs`, and returns the name of that. */
  op(opType: string, inputs: readonly string[], attributes: Attributes = {}): string {
    return this.#add(JSON.stringify([opType, inputs, attributes]), opType, inputs, attributes);
  }

  /** A constant int64 vector. */
  ints(values: readonly number[]): string {
    const value = tensorProto('', 'int64', [values.length], BigInt64Array.from(values, BigInt));
    return this.#add(`ints ${values}`, 'Constant', [], { value });
  }

  /** Adds a node as it is, and returns the name of its output. */
  node(node: NodeProto): string {
    const [name] = node.output as [string];
    this.#nodes.set(name, node);
    return name;
  }

  #add(key: string, opType: string, inputs: readonly string[], attributes: Attributes): string {
    const name = this.#names.get(key) ?? added(opType.toLowerCase(), String(this.#names.size));
    this.#names.set(key, name);
    if (!this.#nodes.has(name)) this.#nodes.set(name, makeNode(opType, inputs, [name], { attributes }));
    return name;
  }
}
