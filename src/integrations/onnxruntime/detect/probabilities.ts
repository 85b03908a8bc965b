/** From the softmax down to the product with v. */

import { constantScalar, uniformOf } from '../model/constants.ts';
import { type GraphIndex, intAttribute, intsAttribute } from '../model/graph.ts';
import { kindOf } from '../model/types.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { MAX_STEPS } from './additions.ts';
import { is } from './operators.ts';
import { namedOrder, type Order, throughTranspose } from './order.ts';
import { asProduct, mirrored, type Product } from './product.ts';
import { type Sizes, sizesOf } from './views.ts';

/** Probabilities that are set to zero again where a mask hides their scores. */
export interface Zeroed {
  readonly condition: string;
  readonly hides: boolean;
  /** Shape of the zero. */
  readonly dims: readonly number[];
  /** Reshapes between the softmax and it. */
  readonly reshapes: number;
}

export interface Probabilities {
  /** From the softmax to the product with v, both left out. */
  readonly nodes: readonly NodeProto[];
  readonly reshapes: readonly Sizes[];
  readonly zeroed: readonly Zeroed[];
  /** The product that has the probabilities on its left. */
  readonly product: Product;
}

/** The product with v; or the node that the probabilities do not get through, undefined where nothing reads them. */
export function followProbabilities(
  index: GraphIndex,
  output: string,
): Probabilities | { readonly stopped: NodeProto | undefined } {
  const nodes: NodeProto[] = [];
  const reshapes: Sizes[] = [];
  const zeroed: Zeroed[] = [];
  let value = output;
  let order: Order = 'natural';
  for (let step = 0; step < MAX_STEPS; step++) {
    const guarded = nanGuard(index, value);
    const next = guarded?.at(-1) ?? index.soleConsumer(value);
    if (next === undefined) break;
    const zero = guarded === undefined ? zeroing(index, next, value) : undefined;
    if (guarded !== undefined) nodes.push(...guarded);
    else if (isFloatCast(next) || is(next, 'Identity') || isInferenceDropout(index, next)) nodes.push(next);
    else if (zero !== undefined && order === 'natural') {
      nodes.push(next);
      zeroed.push({ ...zero, reshapes: reshapes.length });
    } else if (is(next, 'Transpose')) {
      const turned = transposedOrder(order, next);
      if (turned === undefined) return { stopped: next };
      order = turned;
      nodes.push(next);
    } else if (is(next, 'Reshape') && next.input[0] === value && order === 'natural') {
      const sizes = sizesOf(index, next.input[1]);
      if (sizes === undefined) return { stopped: next };
      nodes.push(next);
      reshapes.push(sizes);
    } else {
      const product = productWith(next, value, order);
      return product === undefined ? { stopped: next } : { nodes, reshapes, zeroed, product };
    }
    value = next.output[0] as string;
  }
  return { stopped: index.consumers(value)[0] };
}

/** Rows and keys exchanged, or back as they were; any other permutation would mix heads and tokens. */
function transposedOrder(order: Order, transpose: NodeProto): 'natural' | 'swapped' | undefined {
  const permutation = intsAttribute(transpose, 'perm');
  const turned = permutation && throughTranspose(order, permutation);
  const named = turned && namedOrder(turned);
  return named === 'natural' || named === 'swapped' ? named : undefined;
}

/** The product with the value on its left, whose axes lie in the given order. */
function productWith(node: NodeProto, value: string, order: Order): Product | undefined {
  const product = asProduct(node);
  if (product === undefined || product.left === product.right) return undefined;
  const turned = product.left === value ? product : mirrored(product);
  return turned.left === value && turned.leftOrder === order ? turned : undefined;
}

export const isFloatCast = (node: NodeProto): boolean =>
  is(node, 'Cast') && kindOf(intAttribute(node, 'to') ?? 0) === 'float';

/** `Where(IsNaN(p), 0, p)`: PyTorch's way to give rows with nothing to attend to an output of 0, which is ours too. */
function nanGuard(index: GraphIndex, value: string): NodeProto[] | undefined {
  const users = index.consumers(value);
  const test = users.find((user) => is(user, 'IsNaN'));
  const where = users.find((user) => is(user, 'Where'));
  if (users.length !== 2 || test === undefined || where === undefined || index.outputs.has(value)) return undefined;
  const [condition, yes, no] = where.input;
  const matches = condition === test.output[0] && no === value && yes !== undefined && constantScalar(index, yes) === 0;
  return matches && index.soleConsumer(condition as string) === where ? [test, where] : undefined;
}

/** `Where(mask, 0, p)`, or the other way around. */
function zeroing(index: GraphIndex, node: NodeProto, value: string): Omit<Zeroed, 'reshapes'> | undefined {
  if (!is(node, 'Where')) return undefined;
  const [condition, yes, no] = node.input as [string, string, string];
  const hides = no === value;
  const zero = uniformOf(index, hides ? yes : no);
  if (hides === (yes === value) || zero?.number !== 0 || zero.dims === undefined) return undefined;
  return { condition, hides, dims: zero.dims };
}

function isInferenceDropout(index: GraphIndex, node: NodeProto): boolean {
  if (!is(node, 'Dropout')) return false;
  const [, ratio, training] = node.input;
  const isOff = (value: string | undefined) =>
    value !== undefined && value !== '' && constantScalar(index, value) === 0;
  return training === undefined || training === '' || isOff(training) || isOff(ratio);
}
