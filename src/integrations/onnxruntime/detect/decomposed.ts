/**
 * Attention written as MatMul, scale, mask, Softmax, MatMul, in the spelling of any exporter. Matching starts at a softmax and follows the
 * values up to q, k and the mask and down to v and the output. Every step is an identity that holds for all inputs; a step
 * that cannot be proved stays outside (its value becomes an operand) or makes the whole match fail.
 */

import { type GraphIndex, intsAttribute } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { Additions, added, NotExact } from './additions.ts';
import { type ComposedScores, composeScores } from './masks.ts';
import { findOperand, transposed, transposeNode } from './operands.ts';
import { is } from './operators.ts';
import { inverse, namedOrder, type Order, swapped } from './order.ts';
import { followProbabilities, type Probabilities, type Zeroed } from './probabilities.ts';
import type { Product } from './product.ts';
import { isSame } from './same.ts';
import { followScores, type Scores } from './scores.ts';
import { type AttentionSite, type Detection, inGraphOrder, type ScoresShape } from './site.ts';
import { type SoftmaxForm, softmaxAt } from './softmax.ts';

const FORM = 'MatMul-Softmax-MatMul';
const FORM_IN_STEPS = 'MatMul-Exp-MatMul';

/** The attention around the softmax that ends in a node; undefined where none does, or nothing but the graph's caller reads it. */
export function detectDecomposed(index: GraphIndex, node: NodeProto): Detection | undefined {
  const softmax = softmaxAt(index, node);
  if (softmax === undefined) return undefined;
  const left = (reason: string): Detection => ({
    left: {
      name: node.name || (node.output[0] as string),
      form: node.opType === 'Softmax' ? FORM : FORM_IN_STEPS,
      heads: undefined,
      headDim: undefined,
      reason,
    },
  });
  if (index.consumers(node.output[0] as string).length === 0) return undefined;
  if ('reason' in softmax) return left(softmax.reason);
  const probabilities = followProbabilities(index, softmax.output);
  if ('stopped' in probabilities) return left(stoppedAt(index, softmax, probabilities.stopped));
  if (index.constants.has(probabilities.product.right)) return left('probabilities that a constant is multiplied by');
  try {
    const scores = followScores(index, softmax);
    if (scores === undefined) return left('the scores are not a scaled and masked product of two values');
    return { site: buildSite(index, softmax, scores, probabilities) };
  } catch (error) {
    if (error instanceof NotExact) return left(error.message);
    throw error;
  }
}

function stoppedAt(index: GraphIndex, softmax: SoftmaxForm, node: NodeProto | undefined): string {
  if (index.outputs.has(softmax.output)) return 'probabilities that are an output';
  return `probabilities that go into ${node === undefined ? 'nothing' : node.opType}, not into a product with values`;
}

interface Output {
  /** What the attention gives. */
  readonly value: string;
  readonly layout: 'HND' | 'NHD';
  readonly nodes: readonly NodeProto[];
}

/**
 * Takes in a transpose of the heads behind the product, so that kernels write what the graph wants. An output with its tokens last, of
 * values times transposed probabilities, is transposed behind.
 */
function outputOf(index: GraphIndex, add: Additions, product: Product): Output {
  const value = product.node.output[0] as string;
  const order = namedOrder(product.outOrder);
  if (order === 'natural') {
    const transpose = index.soleConsumer(value);
    if (
      transpose !== undefined &&
      is(transpose, 'Transpose') &&
      intsAttribute(transpose, 'perm')?.join() === '0,2,1,3'
    ) {
      return { value: transpose.output[0] as string, layout: 'NHD', nodes: [product.node, transpose] };
    }
    return { value, layout: 'HND', nodes: [product.node] };
  }
  if (typeof order !== 'string' && order.join() === '0,2,1,3') return { value, layout: 'NHD', nodes: [product.node] };
  const attended = added('attended', value);
  // onnxruntime's own output is turned to be compared, and what kernels give is turned back.
  const turned = transposeNode(index, value, order, attended);
  add.node(transposeNode(index, attended, inverse(order), value));
  return { value: attended, layout: 'HND', nodes: [product.node, turned] };
}

/** Set back to zero by the mask that hides the scores: rows with nothing to attend to have an output of 0, as with kernels. */
function isHidden(index: GraphIndex, { steps }: Scores, zeroed: Zeroed): boolean {
  const lastReshape = steps.map(({ kind }) => kind).lastIndexOf('reshape');
  const plain = (condition: string, hides: boolean): { condition: string; hides: boolean } => {
    const node = index.producer(condition);
    return is(node, 'Not') ? { condition: node.input[0] as string, hides: !hides } : { condition, hides };
  };
  const wanted = plain(zeroed.condition, zeroed.hides);
  return steps.some((step, i) => {
    if (step.kind !== 'where' || i < lastReshape || zeroed.reshapes > 0) return false;
    const { condition, hides } = plain(step.condition, step.hides);
    return hides === wanted.hides && isSame(index, condition, wanted.condition);
  });
}

/** The queries with the factors that differ between rows, and the order of their axes. */
function queriesOf(
  index: GraphIndex,
  add: Additions,
  product: Product,
  factors: ComposedScores['rowFactors'],
): { value: string; order: Order } {
  if (factors.length === 0) return { value: product.left, order: product.leftOrder };
  const natural = transposed(index, add, product.left, product.leftOrder);
  const value = factors.reduce((queries, { opType, operand }) => add.op(opType, [queries, operand]), natural);
  return { value, order: 'natural' };
}

function buildSite(
  index: GraphIndex,
  softmax: SoftmaxForm,
  scores: Scores,
  probabilities: Probabilities,
): AttentionSite {
  const add = new Additions(index);
  const { product } = scores;
  if (probabilities.product.alpha !== 1) throw new NotExact('a factor on the product with the values');
  if (!probabilities.zeroed.every((zeroed) => isHidden(index, scores, zeroed))) {
    throw new NotExact('probabilities that are set to zero by another mask than the scores have');
  }
  const composed = composeScores(index, scores, add);
  const queries = queriesOf(index, add, product, composed.rowFactors);
  const q = findOperand(index, add, queries.value, queries.order, { scales: true, repeats: false });
  const k = findOperand(index, add, product.right, product.rightOrder, { scales: true, repeats: true });
  const { right, rightOrder } = probabilities.product;
  const v = findOperand(index, add, right, swapped(rightOrder), { scales: false, repeats: true });
  if ([q, k, v].some(({ operand }) => index.constants.has(operand.value)))
    throw new NotExact('an operand that is a constant');
  const output = outputOf(index, add, probabilities.product);
  const softmaxAt = composed.reshapes.length;
  const shape: ScoresShape = {
    reshapes: [...composed.reshapes, ...probabilities.reshapes],
    softmaxAt,
    softmaxRank: softmax.rank,
    maskAt: composed.maskAt,
    operands: [
      ...composed.operands,
      ...softmax.operands.map(({ dims, ofRows }) => ({ dims, at: softmaxAt, ofRows })),
      ...probabilities.zeroed.map(({ dims }) => ({ dims, at: softmaxAt })),
    ],
  };
  return {
    name: softmax.name,
    form: softmax.nodes.length === 1 ? FORM : FORM_IN_STEPS,
    heads: undefined,
    headDim: undefined,
    q: q.operand,
    k: k.operand,
    v: v.operand,
    mask: composed.mask === undefined ? undefined : { value: composed.mask, form: 'scores' },
    scale: product.alpha * composed.scale * q.scale * k.scale,
    runtimeScales: composed.runtimeScales,
    softcap: composed.softcap,
    isCausal: false,
    causalAlignment: 'top-left',
    windowLength: undefined,
    alignedPast: undefined,
    lastKeys: undefined,
    output: output.value,
    outputLayout: () => output.layout,
    outputDims: ([batch, heads, length, dim], _, before) =>
      output.layout === 'NHD' ? [batch, length, heads, dim] : [...before, length, dim],
    scores: shape,
    nodes: inGraphOrder(index, [
      ...q.nodes,
      ...k.nodes,
      ...v.nodes,
      ...scores.nodes,
      ...softmax.nodes,
      ...probabilities.nodes,
      ...output.nodes,
    ]),
    overrides: [],
    extra: add.nodes,
  };
}
