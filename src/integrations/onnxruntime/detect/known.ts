/** What a graph says of its values without running. */

import type { GraphIndex } from '../model/graph.ts';
import { graphFunction } from '../model/walk.ts';
import { canonicalDomain } from '../onnx/codec.ts';

const SHAPE_ARITHMETIC = new Set(
  'Cast Sqrt Div Mul Add Sub Pow Reciprocal Gather Slice Squeeze Unsqueeze Identity Constant Reshape Concat'.split(' '),
);

/** True for arithmetic on sizes of tensors, such as the `sqrt(Shape(q)[-1])` that PyTorch writes for a dynamic head dim. */
export const dependsOnShapesOnly = graphFunction<boolean>({
  cyclic: false,
  dependencies(index, value) {
    const node = index.constants.has(value) ? undefined : index.producer(value);
    return node !== undefined && SHAPE_ARITHMETIC.has(node.opType) ? index.readsOf(node) : [];
  },
  result(index, value, of) {
    if (index.constants.has(value)) return true;
    const node = index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return false;
    if (node.opType === 'Shape' || node.opType === 'Size') return true;
    return SHAPE_ARITHMETIC.has(node.opType) && index.readsOf(node).every(of);
  },
});

const UNARY = new Set('Abs Cast Clip Erf Exp Identity Log Neg Reciprocal Sigmoid Softplus Sqrt Tanh'.split(' '));
const BINARY = new Set('Add Div Max Min Mul Pow Sub'.split(' '));

/** Inputs whose dimensions decide those of `value`, which an operator computes element by element; undefined if none does. */
function elementwise(index: GraphIndex, value: string): readonly string[] | undefined {
  const node = index.constants.has(value) ? undefined : index.producer(value);
  if (node === undefined || canonicalDomain(node.domain) !== '') return undefined;
  if (UNARY.has(node.opType)) return node.input.slice(0, 1);
  // Before operator set 7 attributes said how the second one is spread.
  return BINARY.has(node.opType) && node.attribute.length === 0 ? node.input : undefined;
}

/** Dimensions of a value that is computed from constants and inputs of fixed dimensions, element by element. */
export const dimsOf = graphFunction<readonly number[] | undefined>({
  cyclic: undefined,
  dependencies: (index, value) => elementwise(index, value) ?? [],
  result(index, value, of) {
    const constant = index.constants.get(value);
    if (constant !== undefined) return constant.dims.map(Number);
    const inputs = elementwise(index, value);
    if (inputs === undefined) return index.inputs.has(value) ? inputDims(index, value) : undefined;
    return inputs.map(of).reduce((a, b) => (a === undefined || b === undefined ? undefined : broadcast(a, b)));
  },
});

/** onnxruntime takes no input of other dimensions than the graph says. */
function inputDims(index: GraphIndex, name: string): readonly number[] | undefined {
  const type = index.declared(name)?.type?.value;
  const dims = type?.case === 'tensorType' ? type.value.shape?.dim : undefined;
  const sizes = dims?.map(({ value }) => (value.case === 'dimValue' ? Number(value.value) : -1));
  return sizes?.every((size) => size >= 0) ? sizes : undefined;
}

function broadcast(a: readonly number[], b: readonly number[]): readonly number[] {
  const [long, short] = a.length >= b.length ? [a, b] : [b, a];
  const offset = long.length - short.length;
  return long.map((size, axis) => (size === 1 ? (short[axis - offset] ?? 1) : size));
}
