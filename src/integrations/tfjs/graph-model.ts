/** Attention in the topology of a tfjs GraphModel: BatchMatMul, Softmax, BatchMatMul become one operator. */

import { KERNEL_NAMES, type KernelName } from '../../attention/kernels.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { type Match, matchAttention } from './match.ts';
import { OPERATOR, registerOperators, SHAPE_OPERATOR } from './operator.ts';
import { type ModelTopology, nodeName, type Readers, reaches, readersOf, type TopologyNode } from './topology.ts';

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
  /** Softmaxes in front of a product that stay as they are, and why. */
  readonly left: readonly { readonly node: string; readonly reason: string }[];
}

/**
 * Replaces attention in a GraphModel's topology and registers the operator that stands for it. Load the result with
 * `tf.loadGraphModel` and run it with `executeAsync`: attention is asynchronous.
 *
 * Where the shapes of a run show something that the kernels do not compute (heads wider than 256, a mask that adds
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
    const received = Object.prototype.toString.call(modelTopology).slice(8, -1);
    const expected = "the modelTopology of a GraphModel's JSON, which has a list 'node'";
    throw new InvalidArgumentError('invalid-option', 'modelTopology', expected, `${received} without one`);
  }
  const original = new Map(modelTopology.node.map((node) => [node.name, node]));
  validate(options, original);
  const { kernel = 'auto' } = options;
  registerOperators();
  const nodes = new Map(original);
  const readers = readersOf(modelTopology);
  const unread = modelTopology.node.filter((node) => !readers.has(node.name)).map((node) => node.name);
  const outputs = [...unread, ...(options.outputs ?? []).map(nodeName)];
  const taken: string[] = [];
  const left: { node: string; reason: string }[] = [];
  for (const softmax of modelTopology.node) {
    if (softmax.op !== 'Softmax') continue;
    const match = matchAttention(softmax, nodes, readers);
    if (match === undefined) continue;
    if ('reason' in match) {
      left.push({ node: softmax.name, reason: match.reason });
      continue;
    }
    const replaced = replacements(match, readers, kernel);
    const before = replaced.map(({ name }) => nodes.get(name) as TopologyNode);
    for (const node of replaced) nodes.set(node.name, node);
    // Something besides attention may read the scores or probabilities: then they are needed anyway.
    if (reaches(outputs, nodes).has(match.product.name)) {
      for (const node of before) nodes.set(node.name, node);
      left.push({ node: softmax.name, reason: 'scores or probabilities that other nodes read' });
    } else taken.push(match.output.name);
  }
  const live = reaches(outputs, nodes);
  const node = modelTopology.node
    .filter(({ name }) => live.has(name))
    .map(({ name }) => nodes.get(name) as TopologyNode);
  return { topology: { ...modelTopology, node }, taken, left };
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
  const { output, product, transposeKeys, values, steps, passing } = match;
  const keysAndSteps = (count: number): TopologyNode['attr'] => ({
    transposeKeys: { b: transposeKeys },
    // Strings are base64 in this format.
    steps: {
      s: btoa(
        steps
          .slice(0, count)
          .map(({ kind }) => kind)
          .join(),
      ),
    },
  });
  const operands = (count: number) => steps.slice(0, count).flatMap(({ operand }) => operand ?? []);
  const [q, k] = product.input as [string, string];
  const stages = [{ node: product, steps: 0 }, ...passing, ...steps.map(({ node }, i) => ({ node, steps: i + 1 }))];
  const shapes = stages.flatMap((stage) =>
    (readers.get(stage.node.name) ?? [])
      .filter(({ op }) => op === 'Shape')
      .map(({ name }) => ({
        name,
        op: SHAPE_OPERATOR,
        input: [q, k, ...operands(stage.steps)],
        attr: keysAndSteps(stage.steps) ?? {},
      })),
  );
  const attention = {
    name: output.name,
    op: OPERATOR,
    input: [q, k, values, ...operands(steps.length)],
    attr: { ...keysAndSteps(steps.length), kernel: { s: btoa(kernel) } },
  };
  return [attention, ...shapes];
}
