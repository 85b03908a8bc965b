/** Which values of a graph are integers: shapes and indices, which onnxruntime keeps on the CPU. */

import { canonicalDomain, ELEMENT_TYPES, tensorNumbers } from '../onnx/codec.ts';
import { type GraphIndex, intAttribute } from './graph.ts';
import { graphFunction } from './walk.ts';

export type ElementKind = 'float' | 'integer' | 'bool';

const FLOATS: readonly number[] = [
  ELEMENT_TYPES.float32,
  ELEMENT_TYPES.float16,
  ELEMENT_TYPES.float64,
  ELEMENT_TYPES.bfloat16,
];

/** The kind that a number of `TensorProto.DataType` stands for. */
export const kindOf = (elementType: number): ElementKind => {
  if (elementType === ELEMENT_TYPES.bool) return 'bool';
  return FLOATS.includes(elementType) ? 'float' : 'integer';
};

const INTEGER_RESULTS = new Set('Shape Size NonZero ArgMax ArgMin OneHotIndices'.split(' '));
const BOOL_RESULTS = new Set('Equal Less LessOrEqual Greater GreaterOrEqual And Or Not Xor IsNaN IsInf'.split(' '));
/** Operators whose first output has the type of one input. */
const PASSED_ON = new Map<string, number>([
  ...'Gather GatherElements GatherND Slice Concat Unsqueeze Squeeze Reshape Identity Add Sub Mul Div Mod Neg Abs Min Max Expand Tile Transpose Range Split CumSum ReduceProd ReduceSum ReduceMax ReduceMin ScatterND ScatterElements Flatten Pad Trilu Clip Sign'
    .split(' ')
    .map((name) => [name, 0] as const),
  ['Where', 1] as const,
]);

/** The input that the type of a value comes from. */
function typedBy(index: GraphIndex, value: string): string | undefined {
  const node = index.producer(value);
  if (node === undefined || canonicalDomain(node.domain) !== '') return undefined;
  const from = PASSED_ON.get(node.opType);
  return from === undefined ? undefined : node.input[from];
}

function declaredKind(index: GraphIndex, value: string): ElementKind | undefined {
  const constant = index.constants.get(value);
  if (constant !== undefined) return kindOf(constant.dataType);
  const declared = index.declared(value)?.type?.value;
  return declared?.case === 'tensorType' && declared.value.elemType !== 0 ? kindOf(declared.value.elemType) : undefined;
}

/** Float where nothing says otherwise. */
export const elementKind = graphFunction<ElementKind>({
  cyclic: 'float',
  dependencies(index, value) {
    const from = declaredKind(index, value) === undefined ? typedBy(index, value) : undefined;
    return from === undefined ? [] : [from];
  },
  result(index, value, of) {
    const declared = declaredKind(index, value);
    if (declared !== undefined) return declared;
    const node = index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return 'float';
    if (INTEGER_RESULTS.has(node.opType)) return 'integer';
    if (BOOL_RESULTS.has(node.opType)) return 'bool';
    if (node.opType === 'Cast') return kindOf(intAttribute(node, 'to') ?? ELEMENT_TYPES.float32);
    if (node.opType === 'ConstantOfShape') {
      const fill = node.attribute.find((entry) => entry.name === 'value')?.t;
      return fill === undefined ? 'float' : kindOf(fill.dataType);
    }
    const from = typedBy(index, value);
    return from === undefined ? 'float' : of(from);
  },
});

/** Operators that hand on elements of their first input, some of them or more than once. */
const MOVING = new Set('Expand Flatten Gather Identity Reshape Slice Squeeze Tile Transpose Unsqueeze'.split(' '));
/** A constant of more elements is not looked through. */
const MAX_ELEMENTS = 2 ** 24;

/** True for a number that is 0 or 1 wherever it is computed from: a boolean made a number, and parts of it. */
export const isZeroOrOne = graphFunction<boolean>({
  cyclic: false,
  dependencies(index, value) {
    const node = index.constants.has(value) ? undefined : index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return [];
    return MOVING.has(node.opType) || node.opType === 'Cast' ? node.input.slice(0, 1) : [];
  },
  result(index, value, of) {
    const constant = index.constants.get(value);
    if (constant !== undefined) {
      const elements = constant.dims.reduce((product, size) => product * Number(size), 1);
      return elements <= MAX_ELEMENTS && tensorNumbers(constant)?.every((x) => x === 0 || x === 1) === true;
    }
    if (elementKind(index, value) === 'bool') return true;
    const node = index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return false;
    const [input] = node.input;
    return (MOVING.has(node.opType) || node.opType === 'Cast') && input !== undefined && of(input);
  },
});
