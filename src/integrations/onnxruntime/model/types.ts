/** Which values of a graph are integers: shapes and indices, which onnxruntime keeps on the CPU. */

import { canonicalDomain, ELEMENT_TYPES } from './codec.ts';
import { type GraphIndex, intAttribute } from './graph.ts';

export type ElementKind = 'float' | 'integer' | 'bool';

const FLOATS: readonly number[] = [
  ELEMENT_TYPES.float32,
  ELEMENT_TYPES.float16,
  ELEMENT_TYPES.float64,
  ELEMENT_TYPES.bfloat16,
];

/** Of a number of `TensorProto.DataType`. */
export const kindOf = (elementType: number): ElementKind => {
  if (elementType === ELEMENT_TYPES.bool) return 'bool';
  return FLOATS.includes(elementType) ? 'float' : 'integer';
};

const INTEGER_RESULTS = new Set('Shape Size NonZero ArgMax ArgMin OneHotIndices'.split(' '));
const BOOL_RESULTS = new Set('Equal Less LessOrEqual Greater GreaterOrEqual And Or Not Xor IsNaN IsInf'.split(' '));
/** Operators whose first output has the type of one input. */
const PASSED_ON: Readonly<Record<string, number>> = Object.fromEntries([
  ...'Gather GatherElements GatherND Slice Concat Unsqueeze Squeeze Reshape Identity Add Sub Mul Div Mod Neg Abs Min Max Expand Tile Transpose Range Split CumSum ReduceProd ReduceSum ReduceMax ReduceMin ScatterND ScatterElements Flatten Pad Trilu Clip Sign'
    .split(' ')
    .map((name) => [name, 0] as const),
  ['Where', 1] as const,
]);

/** Float where nothing says otherwise. */
export function elementKind(index: GraphIndex, value: string, depth = 0): ElementKind {
  const constant = index.constants.get(value);
  if (constant !== undefined) return kindOf(constant.dataType);
  const declared = [...index.graph.input, ...index.graph.valueInfo].find((info) => info.name === value)?.type?.value;
  if (declared?.case === 'tensorType') return kindOf(declared.value.elemType);
  const node = index.producer(value);
  if (node === undefined || depth > 64 || canonicalDomain(node.domain) !== '') return 'float';
  if (INTEGER_RESULTS.has(node.opType)) return 'integer';
  if (BOOL_RESULTS.has(node.opType)) return 'bool';
  if (node.opType === 'Cast') return kindOf(intAttribute(node, 'to') ?? ELEMENT_TYPES.float32);
  if (node.opType === 'ConstantOfShape') {
    const fill = node.attribute.find((entry) => entry.name === 'value')?.t;
    return fill === undefined ? 'float' : kindOf(fill.dataType);
  }
  const from = PASSED_ON[node.opType];
  const input = from === undefined ? undefined : node.input[from];
  return input === undefined ? 'float' : elementKind(index, input, depth + 1);
}
