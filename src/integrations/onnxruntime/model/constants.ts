/** Numbers that a graph computes from constants alone: scales, and what masked scores become. */

import { canonicalDomain, type NodeProto, tensorNumbers } from '../onnx/codec.ts';
import { constantNumbers, type GraphIndex, intAttribute } from './graph.ts';
import { type ElementKind, kindOf } from './types.ts';
import { graphFunction } from './walk.ts';

/** A tensor all of whose elements are equal. */
export interface Uniform {
  readonly number: number;
  readonly kind: ElementKind;
  /** Undefined where only a run shows them. */
  readonly dims: readonly number[] | undefined;
}

const UNARY: Readonly<Record<string, (x: number) => number>> = {
  __proto__: null as never,
  Sqrt: Math.sqrt,
  Reciprocal: (x) => 1 / x,
  Neg: (x) => -x,
};

const BINARY: Readonly<Record<string, (x: number, y: number) => number>> = {
  __proto__: null as never,
  Add: (x, y) => x + y,
  Sub: (x, y) => x - y,
  Mul: (x, y) => x * y,
  Div: (x, y) => x / y,
  Pow: (x, y) => x ** y,
};

/** Operators that give the elements of their first input other dimensions. */
const RESHAPING = new Set('Unsqueeze Squeeze Reshape Expand Flatten'.split(' '));

function uniform(numbers: readonly number[] | undefined, rest: Omit<Uniform, 'number'>): Uniform | undefined {
  const [first] = numbers ?? [];
  return first !== undefined && numbers?.every((x) => Object.is(x, first)) ? { number: first, ...rest } : undefined;
}

/** Integers of a graph are divided as in C. */
const inKind = (number: number, kind: ElementKind) => (kind === 'integer' ? Math.trunc(number) : number);

/** Attributes of operators that have any. */
const ATTRIBUTES: Readonly<Record<string, readonly string[]>> = {
  __proto__: null as never,
  Cast: ['to', 'saturate'],
  ConstantOfShape: ['value'],
};

/** An operator of the default domain that {@link uniformOf} can compute. */
function computable(index: GraphIndex, value: string): NodeProto | undefined {
  const node = index.constants.has(value) ? undefined : index.producer(value);
  if (node === undefined || canonicalDomain(node.domain) !== '') return undefined;
  // With another attribute it may be another function; those that only reshape give the same numbers whatever theirs say.
  const known = ATTRIBUTES[node.opType] ?? [];
  return RESHAPING.has(node.opType) || node.attribute.every(({ name }) => known.includes(name)) ? node : undefined;
}

/** The value of an expression of constants all of whose elements are equal; undefined when it is none. */
export const uniformOf = graphFunction<Uniform | undefined>({
  cyclic: undefined,
  dependencies(index, value) {
    const { opType = '', input = [] } = computable(index, value) ?? {};
    if (opType in BINARY) return input.slice(0, 2);
    return opType in UNARY || RESHAPING.has(opType) || opType === 'Identity' || opType === 'Cast'
      ? input.slice(0, 1)
      : [];
  },
  result(index, value, of) {
    const tensor = index.constants.get(value);
    if (tensor !== undefined) {
      const rest = { kind: kindOf(tensor.dataType), dims: tensor.dims.map(Number) };
      return uniform(constantNumbers(index, value), rest);
    }
    const node = computable(index, value);
    if (node === undefined) return undefined;
    const [a, b] = node.input;
    if (node.opType === 'ConstantOfShape') {
      const dims = constantNumbers(index, a as string);
      const fill = node.attribute.find((entry) => entry.name === 'value')?.t;
      return fill === undefined
        ? { number: 0, kind: 'float', dims }
        : uniform(tensorNumbers(fill), { kind: kindOf(fill.dataType), dims });
    }
    const x = a === undefined ? undefined : of(a);
    if (x === undefined) return undefined;
    if (node.opType === 'Identity') return x;
    if (RESHAPING.has(node.opType)) return { ...x, dims: undefined };
    if (node.opType === 'Cast') {
      const kind = kindOf(intAttribute(node, 'to') ?? 0);
      return kind === 'bool' ? undefined : { ...x, kind, number: inKind(x.number, kind) };
    }
    const unary = UNARY[node.opType];
    if (unary !== undefined) return { ...x, number: unary(x.number) };
    const binary = BINARY[node.opType];
    const y = binary === undefined || b === undefined ? undefined : of(b);
    if (binary === undefined || y === undefined) return undefined;
    const { kind } = x;
    return { kind, number: inKind(binary(x.number, y.number), kind), dims: broadcastDims(x.dims, y.dims) };
  },
});

/** The number of {@link uniformOf}. */
export const constantScalar = (index: GraphIndex, value: string): number | undefined => uniformOf(index, value)?.number;

function broadcastDims(a: Uniform['dims'], b: Uniform['dims']): Uniform['dims'] {
  if (a === undefined || b === undefined) return undefined;
  const [long, short] = a.length >= b.length ? [a, b] : [b, a];
  const offset = long.length - short.length;
  return long.map((size, i) => (size === 1 ? (short[i - offset] ?? 1) : size));
}
