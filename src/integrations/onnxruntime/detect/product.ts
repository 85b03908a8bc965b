/** Products of the graph: MatMul, FusedMatMul and Einsum of two operands, as `[.., row, contraction]` times `[.., contraction, column]`. */

import type { NodeProto } from '../model/codec.ts';
import { floatAttribute, intAttribute, stringAttribute } from '../model/graph.ts';
import { is } from './operators.ts';
import { namedOrder, type Order, swapped } from './order.ts';

export interface Product {
  readonly node: NodeProto;
  readonly left: string;
  readonly right: string;
  /** Of `[.., row, contraction]` in the left operand. */
  readonly leftOrder: Order;
  /** Of `[.., column, contraction]` in the right operand. */
  readonly rightOrder: Order;
  /** Of `[.., row, column]` in the output. */
  readonly outOrder: Order;
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

/** An equation of two operands that is a batched product, as orders of {@link Product}. */
export function parseEquation(equation: string): Pick<Product, 'leftOrder' | 'rightOrder' | 'outOrder'> | undefined {
  const match = /^([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)$/.exec(equation.replaceAll(' ', ''));
  if (match === null) return undefined;
  const [, a, b, out] = match as unknown as [string, string, string, string];
  const isRegular = [a, b, out].every(
    (letters) => letters.length === out.length && letters.length >= 3 && new Set(letters).size === out.length,
  );
  const only = (letters: string, ...excluded: string[]) =>
    [...letters].filter((letter) => excluded.every((other) => !other.includes(letter)));
  const row = only(a, b);
  const column = only(b, a);
  const contraction = only(a, out);
  const batch = only(out, row.join(''), column.join(''));
  if (!isRegular || row.length !== 1 || column.length !== 1 || contraction.length !== 1) return undefined;
  const order = (letters: string, ...axes: string[]) => namedOrder(axes.map((letter) => letters.indexOf(letter)));
  return {
    leftOrder: order(a, ...batch, ...row, ...contraction),
    rightOrder: order(b, ...batch, ...column, ...contraction),
    outOrder: order(out, ...batch, ...row, ...column),
  };
}

/** The same product with its operands exchanged: what it gives is transposed. */
export const mirrored = (product: Product): Product => ({
  ...product,
  left: product.right,
  right: product.left,
  leftOrder: product.rightOrder,
  rightOrder: product.leftOrder,
  outOrder: swapped(product.outOrder),
});
