/** A softmax over the last axis: as one node, or in the steps that JAX's and some TensorFlow converters write. */

import { constantNumbers, type GraphIndex, intAttribute, intsAttribute, isOp } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { is, unknownAttribute } from './operators.ts';
import { type Sizes, sizesOf } from './views.ts';

/** Dimensions that must fit beside the scores at the softmax. */
export interface SoftmaxOperand {
  readonly dims: Sizes;
  /** `dims` is what a Reshape is asked to make of one number for each row. */
  readonly ofRows: boolean;
}

export interface SoftmaxForm {
  /** Name of the node that gives the probabilities, or of its output if the node has none. */
  readonly name: string;
  readonly input: string;
  readonly output: string;
  readonly nodes: readonly NodeProto[];
  /** What the scores may be read by. */
  readonly readers: readonly NodeProto[];
  /** Rank of the scores for the softmax to be over their last axis; undefined where any will do. */
  readonly rank: number | undefined;
  readonly operands: readonly SoftmaxOperand[];
}

export const nameOf = (node: NodeProto): string => node.name || (node.output[0] as string);

/** The softmax that ends in a node; a reason where it is one that kernels do not have; undefined for any other node. */
export function softmaxAt(index: GraphIndex, node: NodeProto): SoftmaxForm | { readonly reason: string } | undefined {
  if (!isOp(node, 'Softmax')) {
    const reason = 'a softmax in steps of which one is not as expected';
    return softmaxInSteps(index, node) ?? (resemblesSteps(index, node) ? { reason } : undefined);
  }
  const attribute = unknownAttribute(node);
  if (attribute !== undefined) return { reason: `attribute '${attribute}' of Softmax` };
  const axis = intAttribute(node, 'axis') ?? (index.opset >= 13 ? -1 : 1);
  // Before operator set 13 a softmax is over an axis and all behind it.
  if (axis !== -1 && axis < 2) return { reason: 'softmax over an axis that is not the last' };
  return {
    name: nameOf(node),
    input: node.input[0] as string,
    output: node.output[0] as string,
    nodes: [node],
    readers: [node],
    rank: axis === -1 ? undefined : axis + 1,
    operands: [],
  };
}

/** `e / sum(e)` where `e = exp(x - max(x))`. */
function softmaxInSteps(index: GraphIndex, node: NodeProto): SoftmaxForm | undefined {
  for (const [exponentials, divisor, between] of quotients(index, node)) {
    const exp = index.producer(exponentials);
    const sub = is(exp, 'Exp') ? index.producer(exp.input[0] as string) : undefined;
    if (exp === undefined || !is(sub, 'Sub')) continue;
    const [input, subtrahend] = sub.input as [string, string];
    const max = rowsReduced(index, subtrahend, 'ReduceMax', input);
    const sum = rowsReduced(index, divisor, 'ReduceSum', exponentials);
    if (max === undefined || sum === undefined) continue;
    const ranks = [max.rank, sum.rank].filter((rank) => rank !== undefined);
    if (new Set(ranks).size > 1) continue;
    return {
      name: nameOf(node),
      input,
      output: node.output[0] as string,
      nodes: [...max.nodes, sub, exp, ...sum.nodes, ...between, node],
      readers: [max.nodes[0] as NodeProto, sub],
      rank: ranks[0],
      operands: [...max.operands, ...sum.operands],
    };
  }
  return undefined;
}

/** Exponentials divided by their sum, whatever the nodes on the way say exactly. */
function resemblesSteps(index: GraphIndex, node: NodeProto): boolean {
  const inputs = isOp(node, 'Div') ? [node.input[1]] : isOp(node, 'Mul') ? node.input : [];
  const exponentials = node.input.filter((input) => isOp(index.producer(input), 'Exp'));
  return (
    exponentials.length === 1 &&
    inputs.some((input) => {
      let at = input;
      for (let step = 0; step < 8 && at !== undefined; step++) {
        const producer = index.producer(at);
        at = producer?.input[0];
        if (isOp(producer, 'ReduceSum')) return at === exponentials[0];
      }
      return false;
    })
  );
}

/** Dividend and divisor, in either spelling, and the nodes between. */
function quotients(index: GraphIndex, node: NodeProto): [string, string, NodeProto[]][] {
  const [a, b] = node.input as [string, string];
  if (is(node, 'Div')) return [[a, b, []]];
  if (!is(node, 'Mul')) return [];
  return [[a, b] as const, [b, a] as const].flatMap(([x, y]) => {
    const reciprocal = index.producer(y);
    return is(reciprocal, 'Reciprocal')
      ? [[x, reciprocal.input[0] as string, [reciprocal]] as [string, string, NodeProto[]]]
      : [];
  });
}

interface Reduced {
  /** The reduction first. */
  readonly nodes: readonly NodeProto[];
  readonly rank: number | undefined;
  readonly operands: readonly SoftmaxOperand[];
}

/** Reads a value as one number for each row of `of`, in a shape that broadcasts to it. */
function rowsReduced(
  index: GraphIndex,
  value: string,
  opType: 'ReduceMax' | 'ReduceSum',
  of: string,
): Reduced | undefined {
  let found: Spread = { value, nodes: [], operands: [], axis: undefined, hasRowAxis: false };
  // Unsqueeze or Reshape, Expand, and copies: a handful.
  for (let step = 0; step < 8; step++) {
    const node = index.producer(found.value);
    if (node === undefined) return undefined;
    if (is(node, opType)) return reduction(index, node, of, found);
    const next = spreadStep(index, node, found);
    if (next === undefined) return undefined;
    found = { ...next, value: node.input[0] as string, nodes: [node, ...found.nodes] };
  }
  return undefined;
}

/** What stands behind a reduction. */
interface Spread {
  readonly value: string;
  readonly nodes: readonly NodeProto[];
  readonly operands: readonly SoftmaxOperand[];
  /** Axis of an Unsqueeze. */
  readonly axis: number | undefined;
  /** The reduced axis has been put back. */
  readonly hasRowAxis: boolean;
}

function spreadStep(index: GraphIndex, node: NodeProto, found: Spread): Spread | undefined {
  if (is(node, 'Identity')) return found;
  if (found.hasRowAxis) return undefined;
  if (is(node, 'Unsqueeze')) {
    const [axis, ...others] = intsAttribute(node, 'axes') ?? constantNumbers(index, node.input[1] ?? '') ?? [];
    return axis === undefined || axis < -1 || others.length > 0 ? undefined : { ...found, axis, hasRowAxis: true };
  }
  const dims = sizesOf(index, node.input[1]);
  const ofRows = is(node, 'Reshape');
  if (dims === undefined || !(ofRows || is(node, 'Expand'))) return undefined;
  return { ...found, operands: [...found.operands, { dims, ofRows }], hasRowAxis: ofRows };
}

function reduction(index: GraphIndex, node: NodeProto, of: string, behind: Spread): Reduced | undefined {
  const axis = lastAxis(index, node);
  const keepsAxis = (intAttribute(node, 'keepdims') ?? 1) === 1;
  if (axis === undefined || node.input[0] !== of || keepsAxis === behind.hasRowAxis) return undefined;
  const ranks = [axis, behind.axis ?? -1].filter((one) => one !== -1).map((one) => one + 1);
  if (new Set(ranks).size > 1) return undefined;
  return { nodes: [node, ...behind.nodes], rank: ranks[0], operands: behind.operands };
}

function lastAxis(index: GraphIndex, node: NodeProto): number | undefined {
  const axes = node.input[1] ? constantNumbers(index, node.input[1]) : intsAttribute(node, 'axes');
  const [axis] = axes ?? [];
  return axes?.length === 1 && axis !== undefined && (axis === -1 || axis >= 2) ? axis : undefined;
}
