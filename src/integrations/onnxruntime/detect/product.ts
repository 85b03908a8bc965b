/** Products of the graph: MatMul, FusedMatMul and Einsum of two operands, as `[.., row, contraction]` times `[.., contraction, column]`. */

import { type ProductOrders, parseEquation } from '../../einsum.ts';
import { floatAttribute, intAttribute, stringAttribute } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { is } from './operators.ts';
import { swapped } from './order.ts';

export interface Product extends ProductOrders {
  readonly node: NodeProto;
  readonly left: string;
  readonly right: string;
  readonly alpha: number;
}

/** Undefined for a node that is no batched product. */
export function asProduct(node: NodeProto | undefined): Product | undefined {
  if (node === undefined) return undefined;
  const [left, right] = node.input;
  if (left === undefined || right === undefined) return undefined;
  if (is(node, 'MatMul')) {
    return { node, left, right, leftOrder: 'natural', rightOrder: 'swapped', outOrder: 'natural', alpha: 1 };
  }
  if (is(node, 'FusedMatMul', 'com.microsoft')) {
    const isSet = (name: string) => (intAttribute(node, name) ?? 0) !== 0;
    return {
      node,
      left,
      right,
      leftOrder: isSet('transA') ? 'swapped' : 'natural',
      rightOrder: isSet('transB') ? 'natural' : 'swapped',
      outOrder: 'natural',
      alpha: floatAttribute(node, 'alpha') ?? 1,
    };
  }
  return is(node, 'Einsum') ? einsumProduct(node, left, right) : undefined;
}

function einsumProduct(node: NodeProto, left: string, right: string): Product | undefined {
  const parsed = parseEquation(stringAttribute(node, 'equation') ?? '');
  return parsed && { node, left, right, ...parsed, alpha: 1 };
}

/** The same product with its operands exchanged: its result is transposed. */
export const mirrored = (product: Product): Product => ({
  ...product,
  left: product.right,
  right: product.left,
  leftOrder: product.rightOrder,
  rightOrder: product.leftOrder,
  outOrder: swapped(product.outOrder),
});
