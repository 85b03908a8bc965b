/**
 * Scores that a mask of zeros and ones is multiplied into, with a large negative number put where it is zero:
 * `s * b - 1e4 * (1 - b)`, as GPT and the GPT-2 of TensorFlow hide later tokens.
 */
import { constantScalar } from '../model/constants.ts';
import type { GraphIndex } from '../model/graph.ts';
import { isZeroOrOne } from '../model/types.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { is } from './operators.ts';
import { isSame } from './same.ts';

export interface Multiplied {
  /** Before the mask. */
  readonly scores: string;
  /** 1 where a score stays, 0 where it is hidden. */
  readonly mask: string;
  /** What is added: 0 where a score stays, `number` where it is hidden. */
  readonly summand: string;
  readonly number: number;
  /** Gives the product with the mask. */
  readonly product: NodeProto;
}

/** The readings of a node as a sum of multiplied scores and what hides them; none for any other node. */
export function multipliedMasks(index: GraphIndex, node: NodeProto): Multiplied[] {
  const isDifference = is(node, 'Sub');
  if (!isDifference && !is(node, 'Add')) return [];
  const [a, b] = node.input as [string, string];
  const orders = isDifference ? [[a, b] as const] : [[a, b] as const, [b, a] as const];
  return orders.flatMap(([masked, summand]) => {
    const product = index.producer(masked);
    if (!is(product, 'Mul')) return [];
    const [x, y] = product.input as [string, string];
    return [[x, y] as const, [y, x] as const].flatMap(([scores, mask]) => {
      const added = isZeroOrOne(index, mask) ? whereZero(index, summand, mask) : undefined;
      if (added === undefined) return [];
      return [{ scores, mask, summand, number: isDifference ? -added : added, product }];
    });
  });
}

/** What `c * (1 - mask)` or `c * (mask - 1)` is where the mask is 0; undefined for any other value. */
function whereZero(index: GraphIndex, value: string, mask: string): number | undefined {
  const node = index.producer(value);
  if (!is(node, 'Mul')) return undefined;
  const [a, b] = node.input as [string, string];
  for (const [factor, difference] of [[a, b] as const, [b, a] as const]) {
    const number = constantScalar(index, factor);
    const sub = index.producer(difference);
    if (number === undefined || !is(sub, 'Sub')) continue;
    const [minuend, subtrahend] = sub.input as [string, string];
    if (constantScalar(index, minuend) === 1 && isSame(index, subtrahend, mask)) return number;
    if (constantScalar(index, subtrahend) === 1 && isSame(index, minuend, mask)) return -number;
  }
  return undefined;
}
