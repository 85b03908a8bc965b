/** Finds attention around a softmax: the product of q and k above it, and the product with v below. */
import { type ProductOrders, parseEquation } from '../einsum.ts';
import { swapped } from '../onnxruntime/detect/order.ts';
import { type Nodes, nodeName, type Readers, type TopologyNode } from './topology.ts';

/**
 * What happens to the scores on their way to the product with v. `select` hides where its condition is false,
 * `selectNot` where it is true. `softmax-kk` is a softmax in steps: whether its maximum and its sum keep their axis (k)
 * or drop it (d).
 */
export type StepKind =
  | 'mul'
  | 'div'
  | 'add'
  | 'sub'
  | 'reshape'
  | 'select'
  | 'selectNot'
  | 'softmax'
  | `softmax-${'k' | 'd'}${'k' | 'd'}`;

/** Inputs of a step beside the scores. */
export function operandsOfStep(kind: StepKind): number {
  if (kind === 'softmax') return 0;
  return kind.startsWith('softmax') || kind.startsWith('select') ? 2 : 1;
}

export interface MatchedStep {
  readonly kind: StepKind;
  /** A factor, a divisor, a mask, a shape; condition and fill value; axes of the maximum and of the sum. */
  readonly operands: readonly string[];
  readonly node: TopologyNode;
}

/** A product of the topology: `left` times `right`, whose axes lie as its orders say. */
export interface MatchedProduct extends ProductOrders {
  readonly node: TopologyNode;
  readonly left: string;
  readonly right: string;
}

export interface Match {
  /** The product with v; the probabilities are on its left. */
  readonly output: MatchedProduct;
  /** The product of q and k. */
  readonly product: MatchedProduct;
  readonly steps: readonly MatchedStep[];
  /** Nodes that hand the scores on as they are, each with the number of steps before it. */
  readonly passing: readonly { readonly node: TopologyNode; readonly steps: number }[];
}

/** Nodes that one way through the graph may have. */
const MAX_STEPS = 256;

const PRODUCTS = new Set(['BatchMatMul', 'BatchMatMulV2']);
const SELECTIONS = new Set(['Select', 'SelectV2']);
/** TensorFlow's codes and names of the types that tfjs keeps as float32. */
const FLOATS = new Set<unknown>([1, 19, 'DT_FLOAT', 'DT_HALF']);

const isSet = (node: TopologyNode, attribute: string): boolean => node.attr?.[attribute]?.b === true;

const passes = ({ op, attr }: TopologyNode): boolean =>
  op === 'Identity' || (op === 'Cast' && FLOATS.has(attr?.DstT?.type));

/** A string of a topology: base64, or its bytes. */
function textOf(value: unknown): string {
  if (Array.isArray(value)) return String.fromCharCode(...value);
  try {
    return typeof value === 'string' ? atob(value) : '';
  } catch {
    return '';
  }
}

function asProduct(node: TopologyNode): MatchedProduct | undefined {
  const [left, right, ...others] = node.input ?? [];
  if (left === undefined || right === undefined) return undefined;
  if (PRODUCTS.has(node.op)) {
    const leftOrder = isSet(node, 'adj_x') ? 'swapped' : 'natural';
    const rightOrder = isSet(node, 'adj_y') ? 'natural' : 'swapped';
    return { node, left, right, leftOrder, rightOrder, outOrder: 'natural' };
  }
  const orders =
    node.op === 'Einsum' && others.length === 0 ? parseEquation(textOf(node.attr?.equation?.s)) : undefined;
  return orders && { node, left, right, ...orders };
}

const mirrored = (product: MatchedProduct): MatchedProduct => ({
  ...product,
  left: product.right,
  right: product.left,
  leftOrder: product.rightOrder,
  rightOrder: product.leftOrder,
  outOrder: swapped(product.outOrder),
});

type Link = MatchedStep | { readonly kind: 'pass'; readonly node: TopologyNode };

function reshapeOrPass(node: TopologyNode): Link | undefined {
  if (passes(node)) return { kind: 'pass', node };
  const operand = node.input?.[1];
  return node.op === 'Reshape' && operand !== undefined ? { kind: 'reshape', operands: [operand], node } : undefined;
}

/** A softmax as one node or in steps; `input` are the scores. */
interface FoundSoftmax {
  readonly input: string;
  readonly link: MatchedStep;
}

function softmaxAt(node: TopologyNode, nodes: Nodes): FoundSoftmax | undefined {
  const [input = '', divisor = ''] = node.input ?? [];
  if (node.op === 'Softmax') return { input, link: { kind: 'softmax', operands: [], node } };
  if (node.op !== 'RealDiv' && node.op !== 'Div') return undefined;
  const find = (name: string | undefined) => nodes.get(nodeName(name ?? ''));
  const [exp, sum] = [find(input), find(divisor)];
  if (exp?.op !== 'Exp' || sum?.op !== 'Sum' || nodeName(sum.input?.[0] ?? '') !== exp.name) return undefined;
  const difference = find(exp.input?.[0]);
  const [scores = '', subtrahend] = difference?.op === 'Sub' ? (difference.input ?? []) : [];
  const max = find(subtrahend);
  const operands = [max?.input?.[1], sum.input?.[1]];
  if (max?.op !== 'Max' || max.input?.[0] !== scores || operands.some((axes) => axes === undefined)) return undefined;
  const keeps = (reduction: TopologyNode) => (isSet(reduction, 'keep_dims') ? 'k' : 'd');
  return {
    input: scores,
    link: { kind: `softmax-${keeps(max)}${keeps(sum)}`, operands: operands as string[], node },
  };
}

/** From the softmax down to the product with v; a reason where something else is on the way. */
function below(
  { node: softmax, kind }: MatchedStep,
  readers: Readers,
): { links: Link[]; output: MatchedProduct } | { reason: string } | undefined {
  const links: Link[] = [];
  let name = softmax.name;
  for (let step = 0; step < MAX_STEPS; step++) {
    // Shapes of the probabilities may be read as well: they are known without them, unless a reduction drops its axis.
    const isKnown = kind === 'softmax' || kind === 'softmax-kk';
    const next = (readers.get(name) ?? []).filter(({ op }) => op !== 'Shape' || !isKnown);
    const [reader] = next;
    if (reader === undefined) return step === 0 ? undefined : { reason: 'probabilities that are an output' };
    if (next.length > 1) return { reason: 'probabilities that several nodes read' };
    const product = asProduct(reader);
    if (product !== undefined) {
      const output = nodeName(product.left) === name ? product : mirrored(product);
      const isAlone = nodeName(output.left) === name && nodeName(output.right) !== name;
      return isAlone && output.leftOrder === 'natural'
        ? { links, output }
        : { reason: 'probabilities with permuted axes' };
    }
    const link = nodeName(reader.input?.[0] ?? '') === name ? reshapeOrPass(reader) : undefined;
    if (link === undefined)
      return { reason: `probabilities that go into ${reader.op}, not into a product with values` };
    links.push(link);
    name = reader.name;
  }
  return { reason: 'probabilities that lead in a circle' };
}

/** Ways up through a node, each with the step that it is. */
function stepsUp(node: TopologyNode): readonly { readonly input: string; readonly link: Link }[] {
  const [a, b, c] = node.input ?? [];
  if (a === undefined) return [];
  const link = reshapeOrPass(node);
  if (link !== undefined) return [{ input: a, link }];
  if (b === undefined) return [];
  const way = (kind: StepKind, input: string, ...operands: string[]) => ({ input, link: { kind, operands, node } });
  if (SELECTIONS.has(node.op)) return c === undefined ? [] : [way('select', b, a, c), way('selectNot', c, a, b)];
  if (node.op === 'RealDiv') return [way('div', a, b)];
  if (node.op === 'Sub') return [way('sub', a, b)];
  const kind = node.op === 'Mul' ? 'mul' : node.op === 'Add' || node.op === 'AddV2' ? 'add' : undefined;
  return kind === undefined ? [] : [way(kind, a, b), way(kind, b, a)];
}

/** From the softmax up to the product of q and k; links in the order in which they are computed. */
function above(input: string, nodes: Nodes): { links: Link[]; product: MatchedProduct } | undefined {
  // What leads nowhere leads nowhere from elsewhere either: each node is looked at once.
  const visited = new Set<string>();
  const visit = (from: string, links: Link[]): { links: Link[]; product: MatchedProduct } | undefined => {
    const node = nodes.get(nodeName(from));
    if (node === undefined || visited.has(node.name) || links.length > MAX_STEPS) return undefined;
    visited.add(node.name);
    const found = asProduct(node);
    if (found !== undefined) {
      const product = found.outOrder === 'natural' ? found : mirrored(found);
      return product.outOrder === 'natural' ? { links, product } : undefined;
    }
    for (const { input: next, link } of stepsUp(node)) {
      const way = visit(next, [link, ...links]);
      if (way !== undefined) return way;
    }
    return undefined;
  };
  return visit(input, []);
}

/** The attention around a softmax; undefined where nothing reads one, a reason where it is no attention. */
export function matchAttention(
  node: TopologyNode,
  nodes: Nodes,
  readers: Readers,
): Match | { readonly reason: string } | undefined {
  const softmax = softmaxAt(node, nodes);
  const end = softmax && below(softmax.link, readers);
  if (softmax === undefined || end === undefined) return undefined;
  if ('reason' in end) return end;
  const start = above(softmax.input, nodes);
  if (start === undefined) return { reason: 'the scores are not a scaled and masked product of two values' };
  const steps: MatchedStep[] = [];
  const passing: { node: TopologyNode; steps: number }[] = [];
  for (const link of [...start.links, softmax.link, ...end.links]) {
    if (link.kind === 'pass') passing.push({ node: link.node, steps: steps.length });
    else steps.push(link);
  }
  return { output: end.output, product: start.product, steps, passing };
}
