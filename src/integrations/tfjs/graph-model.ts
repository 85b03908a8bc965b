/** Attention in the topology of a tfjs GraphModel: BatchMatMul, Softmax, BatchMatMul become one operator. */

import { type GraphNode, registerOp } from '@tensorflow/tfjs-converter';
import * as tf from '@tensorflow/tfjs-core';
import { InvalidArgumentError } from '../../attention/errors.ts';
import { KERNEL_NAMES, type KernelName } from '../../attention/kernels.ts';
import { sageattn } from './attention.ts';

/** Name of the operator that stands for attention in a rewritten topology. */
export const OPERATOR = 'SageAttention';

export interface GraphModelOptions {
  /** Default `'auto'`: the backend's table decides. */
  readonly kernel?: KernelName | 'auto';
}

interface TopologyNode {
  readonly name: string;
  readonly op: string;
  readonly input?: readonly string[];
  readonly attr?: Readonly<
    Record<string, { readonly b?: boolean; readonly s?: unknown; readonly [key: string]: unknown }>
  >;
}

/** What the `modelTopology` of a GraphModel's JSON holds. */
export interface ModelTopology {
  readonly node: readonly TopologyNode[];
  readonly [key: string]: unknown;
}

export interface RewrittenTopology {
  readonly topology: ModelTopology;
  /** Names of the products with v that the operator took the place of. */
  readonly taken: readonly string[];
  /** Softmaxes in front of a product that stay as they are, and why. */
  readonly left: readonly { readonly node: string; readonly reason: string }[];
}

interface Match {
  /** The product with v. */
  readonly output: TopologyNode;
  /** The product of q and k. */
  readonly product: TopologyNode;
  readonly transposeKeys: boolean;
  readonly values: string;
  readonly masks: readonly string[];
  readonly factors: readonly { readonly value: string; readonly inverse: boolean }[];
}

const PASSING = new Set(['Reshape', 'Identity', 'Cast']);
const PRODUCTS = new Set(['BatchMatMul', 'BatchMatMulV2']);

/** `name:0` and `^name` mean `name`; another output of a node is a value of its own. */
const nodeName = (input: string): string => input.replace(/^\^/, '').replace(/:\d+$/, '');

/**
 * Replaces attention in a GraphModel's topology and registers the operator that stands for it. Load the result with
 * `tf.loadGraphModel` and run it with `executeAsync`: attention is asynchronous.
 *
 * ```ts
 * const artifacts = await tf.io.http(url).load();
 * const model = await tf.loadGraphModel(tf.io.fromMemory({
 *   ...artifacts, modelTopology: withSageAttention(artifacts.modelTopology),
 * }));
 * ```
 */
export function withSageAttention<T extends object>(modelTopology: T, options: GraphModelOptions = {}): T {
  return rewriteTopology(modelTopology as unknown as ModelTopology, options).topology as unknown as T;
}

/** {@link withSageAttention} with a report. */
export function rewriteTopology(
  modelTopology: ModelTopology,
  { kernel = 'auto' }: GraphModelOptions = {},
): RewrittenTopology {
  if (!['auto', ...KERNEL_NAMES].includes(kernel)) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.kernel',
      `'auto' or one of ${KERNEL_NAMES}`,
      `'${kernel}'`,
    );
  }
  registerOp(OPERATOR, attend);
  const nodes = new Map(modelTopology.node.map((node) => [node.name, node]));
  const readers = new Map<string, TopologyNode[]>();
  for (const node of modelTopology.node) {
    for (const input of node.input ?? []) {
      const name = nodeName(input);
      readers.set(name, [...(readers.get(name) ?? []), node]);
    }
  }
  const outputs = modelTopology.node.filter((node) => !readers.has(node.name)).map((node) => node.name);
  const taken: string[] = [];
  const left: { node: string; reason: string }[] = [];
  for (const softmax of modelTopology.node) {
    if (softmax.op !== 'Softmax') continue;
    const output = productBehind(softmax, readers);
    if (output === undefined) continue;
    const match = matchAbove(softmax, output, nodes);
    if (match === undefined) {
      left.push({ node: softmax.name, reason: 'the scores are not a scaled and masked product of two values' });
      continue;
    }
    const before = nodes.get(output.name) as TopologyNode;
    nodes.set(output.name, replacement(match, kernel));
    // Something besides attention may read the scores or probabilities: then they are needed anyway.
    if (reaches(outputs, nodes).has(match.product.name)) {
      nodes.set(output.name, before);
      left.push({ node: softmax.name, reason: 'scores or probabilities that other nodes read' });
    } else taken.push(output.name);
  }
  const live = reaches(outputs, nodes);
  const node = modelTopology.node
    .filter(({ name }) => live.has(name))
    .map(({ name }) => nodes.get(name) as TopologyNode);
  return { topology: { ...modelTopology, node }, taken, left };
}

/** Everything that the outputs are computed from. */
function reaches(outputs: readonly string[], nodes: ReadonlyMap<string, TopologyNode>): Set<string> {
  const found = new Set<string>();
  const stack = [...outputs];
  for (let name = stack.pop(); name !== undefined; name = stack.pop()) {
    if (found.has(name)) continue;
    found.add(name);
    stack.push(...(nodes.get(name)?.input ?? []).map(nodeName));
  }
  return found;
}

function productBehind(
  softmax: TopologyNode,
  readers: ReadonlyMap<string, readonly TopologyNode[]>,
): TopologyNode | undefined {
  for (let name = softmax.name; ; ) {
    // Shapes of the probabilities may be read as well; they die with them.
    const next = (readers.get(name) ?? []).filter(
      (node) => node.op !== 'Shape' && nodeName(node.input?.[0] ?? '') === name,
    );
    const [reader] = next;
    if (reader === undefined || next.length > 1) return undefined;
    if (PRODUCTS.has(reader.op)) return isSet(reader, 'adj_x') || isSet(reader, 'adj_y') ? undefined : reader;
    if (!PASSING.has(reader.op)) return undefined;
    name = reader.name;
  }
}

const isSet = (node: TopologyNode, attribute: string): boolean => node.attr?.[attribute]?.b === true;

/** Goes up from the softmax to the product of q and k. */
function matchAbove(
  softmax: TopologyNode,
  output: TopologyNode,
  nodes: ReadonlyMap<string, TopologyNode>,
): Match | undefined {
  const values = output.input?.[1] as string;
  const visit = (input: string, masks: readonly string[], factors: Match['factors']): Match | undefined => {
    const node = nodes.get(nodeName(input));
    const [a, b] = node?.input ?? [];
    if (node === undefined || a === undefined) return undefined;
    if (PRODUCTS.has(node.op)) {
      if (isSet(node, 'adj_x')) return undefined;
      return { output, product: node, transposeKeys: !isSet(node, 'adj_y'), values, masks, factors };
    }
    if (PASSING.has(node.op)) return visit(a, masks, factors);
    if (b === undefined) return undefined;
    if (node.op === 'Add' || node.op === 'AddV2') {
      // A mask that is scaled with the scores is another function.
      if (factors.length > 0) return undefined;
      return visit(a, [...masks, b], factors) ?? visit(b, [...masks, a], factors);
    }
    if (node.op === 'Mul' || node.op === 'RealDiv') {
      if (nodes.get(nodeName(b))?.op === 'Const') {
        return visit(a, masks, [...factors, { value: b, inverse: node.op === 'RealDiv' }]);
      }
      const first = node.op === 'Mul' && nodes.get(nodeName(a))?.op === 'Const';
      return first ? visit(b, masks, [...factors, { value: a, inverse: false }]) : undefined;
    }
    return undefined;
  };
  return visit(softmax.input?.[0] ?? '', [], []);
}

/** The operator: inputs q, k, v, then masks, then factors of the scores. */
function replacement(match: Match, kernel: KernelName | 'auto'): TopologyNode {
  const { output, product, transposeKeys, values, masks, factors } = match;
  const [q, k] = product.input as [string, string];
  return {
    name: output.name,
    op: OPERATOR,
    input: [q, k, values, ...masks, ...factors.map(({ value }) => value)],
    attr: {
      transposeKeys: { b: transposeKeys },
      masks: { i: String(masks.length) },
      // Strings are base64 in this format.
      kernel: { s: btoa(kernel) },
      inverse: { list: { b: factors.map(({ inverse }) => inverse) } },
    },
  };
}

async function attend(node: GraphNode): Promise<tf.Tensor> {
  const {
    transposeKeys,
    masks: maskCount,
    inverse,
    kernel,
  } = node.attrs as unknown as {
    kernel: KernelName | 'auto';
    transposeKeys: boolean;
    masks: number;
    inverse: readonly boolean[];
  };
  const [q, k, v, ...others] = node.inputs as [tf.Tensor, tf.Tensor, tf.Tensor, ...tf.Tensor[]];
  const factors = others.slice(maskCount);
  const operands = tf.tidy(() => {
    const mask = others
      .slice(0, maskCount)
      .reduce<tf.Tensor | undefined>((sum, value) => (sum ? tf.add(sum, value) : value), undefined);
    const scaled = factors.reduce(
      (product, factor, i) => (inverse[i] ? tf.div(product, factor) : tf.mul(product, factor)),
      q,
    );
    // [L,D], [B,L,D] and [B,H,L,D] alike.
    const to4 = (value: tf.Tensor): tf.Tensor4D => {
      const [rows, columns] = value.shape.slice(-2) as [number, number];
      const [first, second] = [1, 1, ...value.shape.slice(0, -2)].slice(-2) as [number, number];
      return value.shape.length > 4
        ? tf.reshape(value, [-1, 1, rows, columns])
        : tf.reshape(value, [first, second, rows, columns]);
    };
    const keys = to4(k);
    const result: tf.Tensor[] = [to4(scaled), transposeKeys ? tf.transpose(keys, [0, 1, 3, 2]) : keys, to4(v)];
    if (mask !== undefined) result.push(mask.shape.length === 4 ? tf.clone(mask) : to4(mask));
    return result;
  });
  const [q4, k4, v4, attnMask] = operands as [tf.Tensor4D, tf.Tensor4D, tf.Tensor4D, tf.Tensor4D | undefined];
  const pending = sageattn(q4, k4, v4, { kernel, smScale: 1, ...(attnMask === undefined ? {} : { attnMask }) });
  tf.dispose(operands);
  const output = await pending;
  const shape = [...q.shape.slice(0, -1), v.shape.at(-1) as number];
  if (shape.length === 4) return output;
  const reshaped = tf.reshape(output, shape);
  output.dispose();
  return reshaped;
}
