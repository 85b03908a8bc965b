/**
 * Attention in the topology of a tfjs GraphModel: the product of q and k, a softmax and the product with v become one
 * operator.
 */

import { KERNEL_NAMES, type KernelName } from '../../attention/kernels.ts';
import { classOf, InvalidArgumentError } from '../../errors.ts';
import { swapped } from '../onnxruntime/detect/order.ts';
import { type Match, matchAttention } from './match.ts';
import { OPERATOR, registerOperators, SHAPE_OPERATOR } from './operator.ts';
import {
  functionsOf,
  type ModelTopology,
  nodeName,
  type Readers,
  reaches,
  readersOf,
  type TopologyNode,
} from './topology.ts';

export interface GraphModelOptions {
  /** Default `'auto'`: the backend's table decides. */
  readonly kernel?: KernelName | 'auto';
  /**
   * Nodes that are read by name besides those that no other node reads: outputs of the model's signature, or given to
   * `executeAsync`. Attention whose scores or probabilities they need stays as it is.
   */
  readonly outputs?: readonly string[];
}

export interface RewrittenTopology {
  readonly topology: ModelTopology;
  /** Names of the products with v that the operator took the place of. */
  readonly taken: readonly string[];
  /** Softmaxes that something reads and that stay as they are, and why. */
  readonly left: readonly { readonly node: string; readonly reason: string }[];
}

/**
 * Replaces attention in a GraphModel's topology and registers the operator that stands for it. Load the result with
 * `tf.loadGraphModel` and run it with `executeAsync`: attention is asynchronous.
 *
 * Where the shapes of a run show something that the kernels do not compute (heads wider than 512, a mask that adds
 * scores, a softmax over several heads), the operator does what the nodes in its place did, with tfjs.
 *
 * ```ts
 * const artifacts = await tf.io.http(url).load();
 * const model = await tf.loadGraphModel(tf.io.fromMemory({
 *   ...artifacts, modelTopology: withSageAttention(artifacts.modelTopology),
 * }));
 * ```
 *
 * @throws {InvalidArgumentError} no topology of a GraphModel, or a wrong option
 */
export function withSageAttention<T extends object>(modelTopology: T, options: GraphModelOptions = {}): T {
  return rewriteTopology(modelTopology, options).topology as unknown as T;
}

/** {@link withSageAttention} with a report. */
export function rewriteTopology(modelTopology: object, options: GraphModelOptions = {}): RewrittenTopology {
  if (!isTopology(modelTopology)) {
    const expected = "the modelTopology of a GraphModel's JSON, which has a list 'node'";
    throw new InvalidArgumentError(
      'invalid-option',
      'modelTopology',
      expected,
      `${classOf(modelTopology)} without one`,
    );
  }
  const original = new Map(modelTopology.node.map((node) => [node.name, node]));
  validate(options, original);
  const { kernel = 'auto' } = options;
  registerOperators();
  const nodes = new Map(original);
  const readers = readersOf(modelTopology.node);
  const unread = modelTopology.node.filter((node) => !readers.has(node.name)).map((node) => node.name);
  const outputs = [...unread, ...(options.outputs ?? []).map(nodeName)];
  const left: { node: string; reason: string }[] = [];
  let replaced: Replacement[] = [];
  for (const softmax of modelTopology.node) {
    const match = matchAttention(softmax, original, readers);
    if (match === undefined) continue;
    if ('reason' in match) left.push({ node: softmax.name, reason: match.reason });
    else replaced.push({ softmax: softmax.name, match, nodes: replacements(match, readers, kernel) });
  }
  for (const replacement of replaced) for (const node of replacement.nodes) nodes.set(node.name, node);
  // Something besides attention may read the scores or probabilities: then they are needed anyway.
  for (let needed = replaced; needed.length > 0; ) {
    const live = reaches(outputs, nodes);
    needed = replaced.filter(({ match }) => live.has(match.product.node.name));
    for (const { softmax, nodes: put } of needed) {
      for (const { name } of put) nodes.set(name, original.get(name) as TopologyNode);
      left.push({ node: softmax, reason: 'scores or probabilities that other nodes read' });
    }
    replaced = replaced.filter((replacement) => !needed.includes(replacement));
  }
  left.push(...functionsOf(modelTopology).flatMap(leftInside));
  const taken = replaced.map(({ match }) => match.output.node.name);
  const live = reaches(outputs, nodes);
  const node = modelTopology.node
    .filter(({ name }) => live.has(name))
    .map(({ name }) => nodes.get(name) as TopologyNode);
  return { topology: { ...modelTopology, node }, taken, left };
}

/** Attention that runs in control flow or a call. */
function leftInside({ name, node }: ReturnType<typeof functionsOf>[number]): RewrittenTopology['left'] {
  const nodes = new Map(node.map((each) => [each.name, each]));
  const readers = readersOf(node);
  const reason = `inside the function '${name}', which control flow or a call runs`;
  return node
    .filter((each) => matchAttention(each, nodes, readers) !== undefined)
    .map((each) => ({ node: each.name, reason }));
}

interface Replacement {
  readonly softmax: string;
  readonly match: Match;
  readonly nodes: readonly TopologyNode[];
}

const isTopology = (value: object): value is ModelTopology => Array.isArray((value as ModelTopology | undefined)?.node);

function validate({ kernel, outputs, ...unknown }: GraphModelOptions, nodes: ReadonlyMap<string, TopologyNode>): void {
  for (const name of Object.keys(unknown)) {
    throw new InvalidArgumentError('unknown-option', `options.${name}`, 'kernel or outputs', `'${name}'`);
  }
  if (kernel !== undefined && !['auto', ...KERNEL_NAMES].includes(kernel)) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.kernel',
      `'auto' or one of ${KERNEL_NAMES}`,
      `'${kernel}'`,
    );
  }
  const missing = outputs?.find((name) => !nodes.has(nodeName(name)));
  if (missing !== undefined) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.outputs',
      'names of nodes of the topology',
      `'${missing}'`,
    );
  }
}

/** The operator, and what gives the shapes of scores that are no longer there. */
function replacements(match: Match, readers: Readers, kernel: KernelName | 'auto'): TopologyNode[] {
  const { output, product, steps, passing } = match;
  // Strings are base64 in this format.
  const text = (parts: readonly string[]) => ({ s: btoa(parts.join()) });
  const orders = [product.leftOrder, product.rightOrder, swapped(output.rightOrder), output.outOrder];
  const described = (count: number) => ({
    orders: text(orders.map((order) => (typeof order === 'string' ? order : order.join('.')))),
    steps: text(steps.slice(0, count).map(({ kind }) => kind)),
  });
  const operands = (count: number) => steps.slice(0, count).flatMap((step) => step.operands);
  const { left: q, right: k } = product;
  const stages = [
    { node: product.node, steps: 0 },
    ...passing,
    ...steps.map(({ node }, i) => ({ node, steps: i + 1 })),
  ];
  const shapes = stages.flatMap((stage) =>
    (readers.get(stage.node.name) ?? [])
      .filter(({ op }) => op === 'Shape')
      .map(({ name }) => ({
        name,
        op: SHAPE_OPERATOR,
        input: [q, k, ...operands(stage.steps)],
        attr: described(stage.steps),
      })),
  );
  const attention = {
    name: output.node.name,
    op: OPERATOR,
    input: [q, k, output.right, ...operands(steps.length)],
    attr: { ...described(steps.length), kernel: { s: btoa(kernel) } },
  };
  return [attention, ...shapes];
}
