/** Shapes of scores that are never made, computed by the graph: what a mask must be spread over before it is reshaped with them. */

import { constantNumbers, type GraphIndex } from '../model/graph.ts';
import { type Additions, NotExact } from './additions.ts';
import { is } from './operators.ts';
import type { Product } from './product.ts';

const END = 2 ** 31 - 1;

/** The shape of a product, from the shapes of its operands. */
export function productShape(
  index: GraphIndex,
  add: Additions,
  { left, right, leftOrder, rightOrder }: Product,
): string {
  if (index.opset < 10) throw new NotExact('masks of scores of several shapes in an operator set before 10');
  if (typeof leftOrder !== 'string' || typeof rightOrder !== 'string') {
    throw new NotExact('masks of scores of several shapes that an Einsum gives');
  }
  const [one, minusTwo, minusOne, zero] = [[1], [-2], [-1], [0]].map((values) => add.ints(values)) as [
    string,
    string,
    string,
    string,
  ];
  const slice = (value: string, from: string, to: string) => add.op('Slice', [value, from, to]);
  const [rows, columns] = [add.op('Shape', [left]), add.op('Shape', [right])];
  const batch = (shape: string) =>
    add.op('ConstantOfShape', [add.op('Concat', [slice(shape, zero, minusTwo), one], { axis: 0 })]);
  // Broadcast as the product does it, on tensors that have the batch alone.
  const both = add.op('Shape', [add.op('Add', [batch(rows), batch(columns)])]);
  const secondLast = (shape: string) => slice(shape, minusTwo, minusOne);
  const last = (shape: string) => slice(shape, minusOne, add.ints([END]));
  const parts = [
    slice(both, zero, minusOne),
    leftOrder === 'natural' ? secondLast(rows) : last(rows),
    rightOrder === 'natural' ? secondLast(columns) : last(columns),
  ];
  return add.op('Concat', parts, { axis: 0 });
}

/** The shape that a Reshape to `asked` gives to a value of a shape: with its zeros and its -1 filled in. */
export function reshapedShape(index: GraphIndex, add: Additions, shape: string, asked: string): string {
  if (constantNumbers(index, asked)?.every((size) => size > 0)) return asked;
  const [zero, one] = [add.ints([0]), add.ints([1])];
  const length = add.op('Shape', [asked]);
  const ones = add.op('Add', [add.op('Mul', [asked, zero]), one]);
  const copied = add.op('Slice', [add.op('Concat', [shape, ones], { axis: 0 }), zero, length]);
  const sizes = add.op('Where', [add.op('Equal', [asked, zero]), copied, asked]);
  // The product of all sizes is negative where one of them is -1.
  const product = add.op('ReduceProd', [sizes], { keepdims: 1 });
  const divisor = add.op('Where', [add.op('Less', [product, zero]), add.op('Neg', [product]), one]);
  const rest = add.op('Div', [add.op('ReduceProd', [shape], { keepdims: 1 }), divisor]);
  return add.op('Where', [add.op('Less', [sizes, zero]), rest, sizes]);
}

/** How many dimensions a shape has; undefined where only a run shows it. */
export function lengthOfShape(index: GraphIndex, value: string): number | undefined {
  const constant = index.constants.get(value);
  if (constant !== undefined) return constant.dims.length === 1 ? Number(constant.dims[0]) : undefined;
  const node = index.producer(value);
  if (!is(node, 'Concat')) return undefined;
  let length = 0;
  for (const input of node.input) {
    const part = index.constants.get(input);
    const producer = index.producer(input);
    if (part !== undefined) length += part.dims.length === 1 ? Number(part.dims[0]) : Number.NaN;
    // A size of a tensor that a Gather took out of its shape, or arithmetic on some.
    else if (is(producer, 'Unsqueeze')) length += 1;
    else return undefined;
  }
  return Number.isNaN(length) ? undefined : length;
}
