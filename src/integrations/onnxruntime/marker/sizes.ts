/**
 * What the inputs of a run say of values inside the graph before it runs: their dimensions, in the symbols that onnxruntime infers, and
 * the numbers of small values that are computed from dimensions (targets of a Reshape, lengths, scales).
 */

import { constantNumbers, type GraphIndex, intAttribute, intsAttribute } from '../model/graph.ts';
import { elementKind } from '../model/types.ts';
import { canonicalDomain, ELEMENT_TYPES, type NodeProto } from '../onnx/codec.ts';
import type { OrtDimension } from '../ort.ts';
import { isSize } from '../session/feeds.ts';
import { derivedDims } from './derived-dims.ts';

/** An input of a run. */
export interface GivenInput {
  readonly dims: readonly number[];
  /** Elements, where they are a few integers in the memory of this process. */
  readonly numbers: readonly number[] | undefined;
}

export interface ShapeFacts {
  /** Names of the dimensions of inputs. */
  readonly inputs: ReadonlyMap<string, readonly OrtDimension[]>;
  /** Dimensions of a value in those names, where onnxruntime infers them. */
  shapeOf(value: string): readonly OrtDimension[] | undefined;
}

/** A size for a name that no input has: to see what follows from what, before onnxruntime infers more. */
export type FreeSize = (symbol: string) => number;

/** A walk over the graph that is longer is none that an exporter wrote. */
const MAX_DEPTH = 512;

/** The same from one number to the inputs. */
const MAX_STEPS = 64;

export class KnownSizes {
  readonly #index: GraphIndex;
  readonly #facts: ShapeFacts;
  readonly #inputs: ReadonlyMap<string, GivenInput>;
  readonly #symbols = new Map<string, number>();
  readonly #dims = new Map<string, readonly number[] | undefined>();
  readonly #numbers = new Map<string, readonly number[] | undefined>();
  readonly #freeSize: FreeSize | undefined;
  readonly #isShallow: boolean;
  #depth = 0;

  /** @param isShallow to see which values are asked for, which behind most operators would be all of the graph */
  constructor(
    index: GraphIndex,
    facts: ShapeFacts,
    inputs: ReadonlyMap<string, GivenInput>,
    freeSize?: FreeSize,
    isShallow = false,
  ) {
    this.#freeSize = freeSize;
    this.#isShallow = isShallow;
    this.#index = index;
    this.#facts = facts;
    this.#inputs = inputs;
    for (const [name, { dims }] of inputs) this.#bind(facts.inputs.get(name), dims);
  }

  #bind(shape: readonly OrtDimension[] | undefined, dims: readonly number[]): void {
    for (const [axis, size] of (shape ?? []).entries()) {
      const known = dims[axis];
      if (typeof size === 'string' && size !== '' && known !== undefined) this.#symbols.set(size, known);
    }
  }

  /** Undefined where they are known only when the graph runs. */
  dims(value: string): readonly number[] | undefined {
    return this.#once(this.#dims, value, () => this.#readDims(value));
  }

  /** The elements in order, without their dimensions; undefined as for {@link dims}. */
  numbers(value: string): readonly number[] | undefined {
    return this.#once(this.#numbers, value, () => this.#readNumbers(value));
  }

  #once<T>(known: Map<string, T | undefined>, value: string, read: () => T | undefined): T | undefined {
    if (known.has(value)) return known.get(value);
    if (this.#depth >= MAX_DEPTH) return undefined;
    this.#depth++;
    // A value that depends on itself is not known.
    known.set(value, undefined);
    const found = read();
    known.set(value, found);
    this.#depth--;
    return found;
  }

  #readDims(value: string): readonly number[] | undefined {
    const given = this.#inputs.get(value)?.dims ?? this.#index.constants.get(value)?.dims.map(Number);
    if (given !== undefined) return given;
    const shape = this.#facts.shapeOf(value);
    const known = shape?.map((size) => (isSize(size) ? size : this.#symbols.get(`${size}`)));
    if (shape !== undefined && shape.length > 0 && known?.every((size) => size !== undefined)) return known as number[];
    const node = this.#index.producer(value);
    const found = node && derivedDims(node, value, this, this.#isShallow);
    if (found !== undefined) this.#bind(shape, found);
    if (found !== undefined || this.#freeSize === undefined || !shape?.length) return found;
    const free = this.#freeSize;
    return shape.map(
      (size, axis) => known?.[axis] ?? free(typeof size === 'string' && size !== '' ? size : `${value} ${axis}`),
    );
  }

  #readNumbers(value: string): readonly number[] | undefined {
    const constant = constantNumbers(this.#index, value);
    if (constant !== undefined) return constant;
    const given = this.#inputs.get(value);
    if (given !== undefined) return given.numbers;
    const node = this.#index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return undefined;
    switch (node.opType) {
      case 'Shape':
        return this.dims(node.input[0] ?? '')?.slice(
          intAttribute(node, 'start') ?? 0,
          intAttribute(node, 'end') ?? Number.POSITIVE_INFINITY,
        );
      case 'Size':
        return product(this.dims(node.input[0] ?? ''));
      default:
        if (!Object.hasOwn(COMPUTED, node.opType)) return undefined;
        return COMPUTED[node.opType]?.({
          node,
          isInteger: elementKind(this.#index, value) === 'integer',
          of: (input) => (node.input[input] ? this.numbers(node.input[input]) : undefined),
          dimsOf: (input) => (node.input[input] ? this.dims(node.input[input]) : undefined),
        });
    }
  }
}

type Numbers = readonly number[] | undefined;

/** A node of which {@link COMPUTED} gives the numbers. */
interface Computation {
  readonly node: NodeProto;
  /** The result's elements are. */
  readonly isInteger: boolean;
  /** Numbers of an input. */
  of(input: number): Numbers;
  dimsOf(input: number): readonly number[] | undefined;
}

const sameNumbers = ({ of }: Computation): Numbers => of(0);

const elementwise =
  (operation: (a: number, b: number) => number) =>
  ({ isInteger, of }: Computation): Numbers =>
    arithmetic(operation, isInteger, of(0), of(1));

/** Operators whose numbers {@link KnownSizes} computes from those of their inputs. */
const COMPUTED: Readonly<Record<string, (computation: Computation) => Numbers>> = {
  Identity: sameNumbers,
  Squeeze: sameNumbers,
  Unsqueeze: sameNumbers,
  Reshape: sameNumbers,
  Cast: ({ node, of }) => cast(node, of(0)),
  Gather: ({ of }) => gather(of(0), of(1)),
  Concat: ({ node, of }) => joined(node.input.map((_, i) => of(i))),
  Slice: ({ node, of }) => slice(node.input.map((_, i) => of(i))),
  ReduceSum: ({ node, of, dimsOf }) => sumOfRows(of(0), dimsOf(0), intsAttribute(node, 'axes') ?? of(1)),
  Add: elementwise((a, b) => a + b),
  Sub: elementwise((a, b) => a - b),
  Mul: elementwise((a, b) => a * b),
  Div: elementwise((a, b) => a / b),
  Sqrt: ({ isInteger, of }) => arithmetic(Math.sqrt, isInteger, of(0), of(0)),
};

/**
 * Inputs of the graph from whose numbers a value's are computed before a run, where a run gives them: a mask of tokens, of which
 * sequence lengths are sums. Undefined: the value is known only when the graph runs.
 */
export function numbersFrom(index: GraphIndex, value: string, depth = 0): ReadonlySet<string> | undefined {
  if (index.inputs.has(value)) return new Set([value]);
  if (index.constants.has(value)) return new Set();
  const node = index.producer(value);
  if (node === undefined || canonicalDomain(node.domain) !== '' || depth > MAX_STEPS) return undefined;
  if (['Shape', 'Size', 'Constant'].includes(node.opType)) return new Set();
  if (!Object.hasOwn(COMPUTED, node.opType)) return undefined;
  const found = new Set<string>();
  for (const input of node.input.filter((name) => name !== '')) {
    const inputs = numbersFrom(index, input, depth + 1);
    if (inputs === undefined) return undefined;
    for (const name of inputs) found.add(name);
  }
  return found;
}

/** Sums of a matrix' rows, or of a vector. */
function sumOfRows(
  numbers: readonly number[] | undefined,
  dims: readonly number[] | undefined,
  axes: readonly number[] | undefined,
): number[] | undefined {
  if (numbers === undefined || dims === undefined || dims.length > 2 || dims.length === 0) return undefined;
  const axis = axes?.length === 1 ? (axes[0] as number) : undefined;
  if (axis === undefined || (axis !== -1 && axis !== dims.length - 1)) return undefined;
  const length = dims.at(-1) as number;
  const rows = dims.length === 1 ? 1 : (dims[0] as number);
  if (rows * length !== numbers.length) return undefined;
  return Array.from({ length: rows }, (_, row) =>
    numbers.slice(row * length, (row + 1) * length).reduce((sum, number) => sum + number, 0),
  );
}

const product = (dims: readonly number[] | undefined) => dims && [dims.reduce((all, size) => all * size, 1)];

/** Integers, and float32 as it rounds; everything else is onnxruntime's to round. */
function cast(node: NodeProto, numbers: readonly number[] | undefined): readonly number[] | undefined {
  const to = intAttribute(node, 'to');
  if (to === ELEMENT_TYPES.float32) return numbers?.map(Math.fround);
  return to === ELEMENT_TYPES.int64 || to === ELEMENT_TYPES.int32 ? numbers?.map(Math.trunc) : undefined;
}

function gather(from: readonly number[] | undefined, at: readonly number[] | undefined): number[] | undefined {
  if (from === undefined || at === undefined) return undefined;
  const found = at.map((index) => from.at(index));
  return found.every((number) => number !== undefined) ? (found as number[]) : undefined;
}

const joined = (parts: readonly (readonly number[] | undefined)[]) =>
  parts.every((part) => part !== undefined) ? parts.flatMap((part) => part as number[]) : undefined;

/** Of a vector, forwards. */
function slice([from, starts, ends, axes = [0], steps = [1]]: readonly (readonly number[] | undefined)[]) {
  const isPlain = starts?.length === 1 && ends?.length === 1 && axes[0] === 0 && steps[0] === 1;
  return isPlain ? from?.slice(starts[0], ends[0]) : undefined;
}

/** float32 or integers, element by element. */
function arithmetic(
  operation: (a: number, b: number) => number,
  isInteger: boolean,
  a: Numbers,
  b: Numbers,
): number[] | undefined {
  if (a === undefined || b === undefined) return undefined;
  const length = Math.max(a.length, b.length);
  if ([a, b].some((list) => list.length !== length && list.length !== 1)) return undefined;
  const at = (list: readonly number[], i: number) => list[list.length === 1 ? 0 : i] as number;
  return Array.from({ length }, (_, i) => {
    const exact = operation(at(a, i), at(b, i));
    return isInteger ? Math.trunc(exact) : Math.fround(exact);
  });
}
