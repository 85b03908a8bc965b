/** Finds attention around a Softmax: the product of q and k above it, and the product with v below. */
import { type Nodes, nodeName, type Readers, type TopologyNode } from './topology.ts';

/** What happens to the scores on their way to the product with v. */
export type StepKind = 'mul' | 'div' | 'add' | 'reshape' | 'softmax';

export interface MatchedStep {
  readonly kind: StepKind;
  /** The other input: a factor, a divisor, a mask, a shape. None of a softmax. */
  readonly operand?: string;
  readonly node: TopologyNode;
}

export interface Match {
  /** The product with v. */
  readonly output: TopologyNode;
  /** The product of q and k. */
  readonly product: TopologyNode;
  readonly transposeKeys: boolean;
  readonly values: string;
  readonly steps: readonly MatchedStep[];
  /** Nodes that hand the scores on as they are, each with the number of steps before it. */
  readonly passing: readonly { readonly node: TopologyNode; readonly steps: number }[];
}

const PRODUCTS = new Set(['BatchMatMul', 'BatchMatMulV2']);
/** TensorFlow's codes and names of the types that tfjs keeps as float32. */
const FLOATS = new Set<unknown>([1, 19, 'DT_FLOAT', 'DT_HALF']);

const isSet = (node: TopologyNode, attribute: string): boolean => node.attr?.[attribute]?.b === true;

const passes = ({ op, attr }: TopologyNode): boolean =>
  op === 'Identity' || (op === 'Cast' && FLOATS.has(attr?.DstT?.type));

type Link = MatchedStep | { readonly kind: 'pass'; readonly node: TopologyNode };

function reshapeOrPass(node: TopologyNode): Link | undefined {
  if (passes(node)) return { kind: 'pass', node };
  const operand = node.input?.[1];
  return node.op === 'Reshape' && operand !== undefined ? { kind: 'reshape', operand, node } : undefined;
}

/** From the softmax down to the product with v; undefined where there is none, or where something else reads on the way. */
function below(softmax: TopologyNode, readers: Readers): { links: Link[]; output: TopologyNode } | undefined {
  const links: Link[] = [{ kind: 'softmax', node: softmax }];
  for (let name = softmax.name; ; ) {
    // Shapes of the probabilities may be read as well: they are known without them.
    const next = (readers.get(name) ?? []).filter(
      (node) => node.op !== 'Shape' && nodeName(node.input?.[0] ?? '') === name,
    );
    const [reader] = next;
    if (reader === undefined || next.length > 1) return undefined;
    if (PRODUCTS.has(reader.op)) {
      return isSet(reader, 'adj_x') || isSet(reader, 'adj_y') ? undefined : { links, output: reader };
    }
    const link = reshapeOrPass(reader);
    if (link === undefined) return undefined;
    links.push(link);
    name = reader.name;
  }
}

/** From the softmax up to the product of q and k; links in the order in which they are computed. */
function above(softmax: TopologyNode, nodes: Nodes): { links: Link[]; product: TopologyNode } | undefined {
  const visit = (input: string, links: Link[]): { links: Link[]; product: TopologyNode } | undefined => {
    const node = nodes.get(nodeName(input));
    const [a, b] = node?.input ?? [];
    if (node === undefined || a === undefined) return undefined;
    if (PRODUCTS.has(node.op)) return isSet(node, 'adj_x') ? undefined : { links, product: node };
    const link = reshapeOrPass(node);
    if (link !== undefined) return visit(a, [link, ...links]);
    if (b === undefined) return undefined;
    if (node.op === 'RealDiv') return visit(a, [{ kind: 'div', operand: b, node }, ...links]);
    const kind = node.op === 'Mul' ? 'mul' : node.op === 'Add' || node.op === 'AddV2' ? 'add' : undefined;
    if (kind === undefined) return undefined;
    // A mask that is scaled with the scores is another function.
    if (kind === 'add' && links.some((later) => later.kind === 'mul' || later.kind === 'div')) return undefined;
    return visit(a, [{ kind, operand: b, node }, ...links]) ?? visit(b, [{ kind, operand: a, node }, ...links]);
  };
  return visit(softmax.input?.[0] ?? '', []);
}

/** The attention around a softmax; undefined where no product follows it, a reason where what precedes it is no attention. */
export function matchAttention(
  softmax: TopologyNode,
  nodes: Nodes,
  readers: Readers,
): Match | { readonly reason: string } | undefined {
  const end = below(softmax, readers);
  if (end === undefined) return undefined;
  const start = above(softmax, nodes);
  if (start === undefined) return { reason: 'the scores are not a scaled and masked product of two values' };
  const steps: MatchedStep[] = [];
  const passing: { node: TopologyNode; steps: number }[] = [];
  for (const link of [...start.links, ...end.links]) {
    if (link.kind === 'pass') passing.push({ node: link.node, steps: steps.length });
    else steps.push(link);
  }
  const { product } = start;
  const { output } = end;
  return {
    output,
    product,
    transposeKeys: !isSet(product, 'adj_y'),
    values: output.input?.[1] as string,
    steps,
    passing,
  };
}
