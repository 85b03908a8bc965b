/**
 * Values of a graph that are another value seen differently: a Split, Slice, Gather, Transpose or Reshape of packed
 * projections moves no number, so the operand is read where the projection wrote it, by strides.
 */
import { contiguousStrides } from '../../../tensor/tensor.ts';
import { constantNumbers, type GraphIndex, intAttribute, intsAttribute } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { MAX_STEPS } from './additions.ts';
import { is } from './operators.ts';

/** Elements of a tensor, of any rank. */
export interface Strided {
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  readonly offset: number;
}

/** Numbers of a small integer value when the graph runs. */
export type Numbers = (value: string) => readonly number[];

/** Dimensions that the graph says, or the integer value that has them when the graph runs. */
export type Sizes = readonly number[] | string;

/** What an operator is given as a shape; undefined where it is given none, or none that can be read. */
export function sizesOf(index: GraphIndex, value: string | undefined): Sizes | undefined {
  if (value === undefined || value === '') return undefined;
  const constant = index.constants.get(value);
  if (constant === undefined) return value;
  // onnxruntime takes vectors alone.
  return constant.dims.length === 1 ? constantNumbers(index, value) : undefined;
}

export const parametersOf = (sizes: readonly Sizes[]): string[] => sizes.filter((entry) => typeof entry === 'string');

export const readSizes = (sizes: Sizes, numbers: Numbers): readonly number[] =>
  typeof sizes === 'string' ? numbers(sizes) : sizes;

export const sameSizes = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((size, axis) => size === b[axis]);

export const contiguous = (shape: readonly number[]): Strided => ({
  shape,
  strides: contiguousStrides(shape),
  offset: 0,
});

/** One operator on a view; undefined where its result would have to be copied, or its arguments do not fit. */
type Step = (view: Strided, numbers: Numbers) => Strided | undefined;

/** A value as a view of another one. */
export interface Source {
  readonly value: string;
  /** Operators between `value` and what was traced, in graph order. */
  readonly nodes: readonly NodeProto[];
  /** Integer values that the steps need when the graph runs: shapes. */
  readonly parameters: readonly string[];
  view(source: Strided, numbers: Numbers): Strided | undefined;
}

const normalized = (axis: number, rank: number) => (axis < 0 ? axis + rank : axis);

function narrow(view: Strided, axisGiven: number, start: number, end: number): Strided | undefined {
  const axis = normalized(axisGiven, view.shape.length);
  const size = view.shape[axis];
  if (size === undefined || start < 0 || end > size || start >= end) return undefined;
  return {
    shape: view.shape.map((whole, i) => (i === axis ? end - start : whole)),
    strides: view.strides,
    offset: view.offset + start * (view.strides[axis] as number),
  };
}

/** The view with another shape, as long as no element moves. */
export function reshaped({ shape, strides, offset }: Strided, target: readonly number[]): Strided | undefined {
  const count = (sizes: readonly number[]) => sizes.reduce((product, size) => product * size, 1);
  if (count(shape) !== count(target) || count(shape) === 0) return undefined;
  const axes = shape.flatMap((size, axis) => (size === 1 ? [] : [axis]));
  const result = new Array<number>(target.length).fill(1);
  let to = target.length - 1;
  while (axes.length > 0) {
    // Axes that lie behind each other without a gap may be cut anywhere.
    let axis = axes.pop() as number;
    const stride = strides[axis] as number;
    let elements = shape[axis] as number;
    while (axes.length > 0 && strides[axes.at(-1) as number] === stride * elements) {
      axis = axes.pop() as number;
      elements *= shape[axis] as number;
    }
    let covered = 1;
    while (to >= 0 && covered < elements) {
      result[to] = covered * stride;
      covered *= target[to] as number;
      to--;
    }
    if (covered !== elements) return undefined;
  }
  // Axes of one element take the stride that they have in a contiguous tensor: kernels look at alignment.
  for (let axis = target.length - 2; axis >= 0; axis--) {
    if (target[axis] === 1) result[axis] = (result[axis + 1] as number) * (target[axis + 1] as number);
  }
  return { shape: target, strides: result, offset };
}

/** Target shape of a Reshape. A zero copies a size; -1 takes all elements that remain. */
export function targetShape(asked: readonly number[], shape: readonly number[]): number[] | undefined {
  const target = asked.map((size, axis) => (size === 0 ? (shape[axis] ?? -2) : size));
  const open = target.indexOf(-1);
  if (open >= 0) {
    const rest = target.reduce((product, size, axis) => (axis === open ? product : product * size), 1);
    target[open] = shape.reduce((product, size) => product * size, 1) / rest;
  }
  return target.every((size) => Number.isInteger(size) && size > 0) ? target : undefined;
}

/** Where the walk stands. */
interface Place {
  readonly value: string;
  readonly steps: readonly Step[];
  readonly nodes: readonly NodeProto[];
  readonly parameters: readonly string[];
  readonly rank: number | undefined;
  /** Axes that `value` has more than what was traced. */
  readonly axesMore: number;
  /** The channels' axis, counted from the last (0). */
  readonly channels: number;
  /** Above a Reshape only steps are followed behind which it stays possible: parts of rows. */
  readonly rowsOnly: boolean;
}

/** One operator up; undefined at anything that is no view. */
function stepUp(index: GraphIndex, place: Place): Place | undefined {
  const node = index.producer(place.value);
  const value = node?.input[0];
  if (node === undefined || value === undefined || index.constants.has(value)) return undefined;
  const up = (step: Step, changes: Partial<Place> = {}): Place => ({
    ...place,
    value,
    steps: [step, ...place.steps],
    nodes: [node, ...place.nodes],
    ...changes,
  });
  if (is(node, 'Identity')) return up((view) => view);
  if (is(node, 'Split')) return splitStep(index, node, place, up);
  if (is(node, 'Slice')) return sliceStep(index, node, up);
  if (is(node, 'Reshape')) return reshapeStep(index, node, place, up);
  if (place.rowsOnly) return undefined;
  if (is(node, 'Transpose')) {
    const permutation = intsAttribute(node, 'perm');
    if (permutation === undefined) return undefined;
    const rank = permutation.length;
    // More axes than kernels know are folded, which takes them as they lie in a tensor of their own.
    if (rank - place.axesMore > 4) return undefined;
    const channels = rank - 1 - (permutation[rank - 1 - place.channels] as number);
    return up(
      ({ shape, strides, offset }) =>
        shape.length === rank
          ? {
              shape: permutation.map((axis) => shape[axis] as number),
              strides: permutation.map((axis) => strides[axis] as number),
              offset,
            }
          : undefined,
      { rank, channels },
    );
  }
  if (is(node, 'Gather')) return gatherStep(index, node, place, up);
  if (is(node, 'Squeeze')) return squeezeStep(index, node, place, up);
  return undefined;
}

type Up = (step: Step, changes?: Partial<Place>) => Place;

function splitStep(index: GraphIndex, node: NodeProto, place: Place, up: Up): Place | undefined {
  const axis = intAttribute(node, 'axis') ?? 0;
  const part = node.output.indexOf(place.value);
  const given = node.input[1];
  const sizes = given ? constantNumbers(index, given) : intsAttribute(node, 'split');
  if (given && sizes === undefined) return undefined;
  const parts = sizes?.length ?? intAttribute(node, 'num_outputs') ?? node.output.length;
  return up((view) => {
    const total = view.shape[normalized(axis, view.shape.length)];
    if (total === undefined || (sizes === undefined && total % parts !== 0)) return undefined;
    const all = sizes ?? new Array<number>(parts).fill(total / parts);
    const start = all.slice(0, part).reduce((sum, size) => sum + size, 0);
    return narrow(view, axis, start, start + (all[part] as number));
  });
}

function sliceStep(index: GraphIndex, node: NodeProto, up: Up): Place | undefined {
  const read = (at: number, name: string) => {
    const input = node.input[at];
    return input ? constantNumbers(index, input) : intsAttribute(node, name);
  };
  const [starts, ends, steps] = [read(1, 'starts'), read(2, 'ends'), read(4, 'steps')];
  if (starts === undefined || ends === undefined) return undefined;
  const axes = read(3, 'axes') ?? (node.input[3] ? undefined : starts.map((_, axis) => axis));
  const whole = node.input[4] ? steps?.every((step) => step === 1) === true : true;
  if (axes === undefined || !whole) return undefined;
  return up((view) =>
    axes.reduce<Strided | undefined>((current, axis, i) => {
      const size = current?.shape[normalized(axis, view.shape.length)];
      if (current === undefined || size === undefined) return undefined;
      const clamp = (at: number) => Math.min(size, Math.max(0, at < 0 ? at + size : at));
      return narrow(current, axis, clamp(starts[i] as number), clamp(ends[i] as number));
    }, view),
  );
}

function reshapeStep(index: GraphIndex, node: NodeProto, place: Place, up: Up): Place | undefined {
  const target = sizesOf(index, node.input[1]);
  if (target === undefined || (intAttribute(node, 'allowzero') ?? 0) !== 0 || place.channels !== 0) return undefined;
  return up(
    (view, numbers) => {
      const sizes = targetShape(readSizes(target, numbers), view.shape);
      return sizes && reshaped(view, sizes);
    },
    { rank: undefined, rowsOnly: true, parameters: [...place.parameters, ...parametersOf([target])] },
  );
}

/** A Gather of one index takes an axis away. */
function gatherStep(index: GraphIndex, node: NodeProto, place: Place, up: Up): Place | undefined {
  const indices = index.constants.get(node.input[1] ?? '');
  const [at] = indices?.dims.length === 0 ? (constantNumbers(index, node.input[1] as string) ?? []) : [];
  const given = intAttribute(node, 'axis') ?? 0;
  if (at === undefined || (given !== 0 && place.rank === undefined)) return undefined;
  const rank = place.rank === undefined ? undefined : place.rank + 1;
  const axis = rank === undefined ? 0 : normalized(given, rank);
  // With an unknown rank the axis is the first one, which is in front of the channels.
  const isBehindChannels = rank !== undefined && place.channels >= rank - 1 - axis;
  const channels = place.channels + (isBehindChannels ? 1 : 0);
  return up(
    (view) => {
      const size = view.shape[axis];
      const start = at < 0 ? at + (size ?? 0) : at;
      const one = narrow(view, axis, start, start + 1);
      const without = (sizes: readonly number[]) => sizes.filter((_, i) => i !== axis);
      return one && { ...one, shape: without(one.shape), strides: without(one.strides) };
    },
    { rank, channels, axesMore: place.axesMore + 1 },
  );
}

function squeezeStep(index: GraphIndex, node: NodeProto, place: Place, up: Up): Place | undefined {
  const given = node.input[1];
  const axes = given ? constantNumbers(index, given) : intsAttribute(node, 'axes');
  // Only a leading axis, which the parts of a packed projection have.
  if (axes?.length !== 1 || axes[0] !== 0) return undefined;
  return up(
    ({ shape, strides, offset }) =>
      shape[0] === 1 ? { shape: shape.slice(1), strides: strides.slice(1), offset } : undefined,
    { rank: place.rank === undefined ? undefined : place.rank + 1, axesMore: place.axesMore + 1 },
  );
}

/**
 * Goes up from a value as far as it is a view of another one whose channels are its last axis.
 *
 * @param channels axis of the channels of `value`, counted from its last (0)
 * @returns undefined where `value` is computed
 */
export function sourceOf(
  index: GraphIndex,
  value: string,
  channels: number,
  rank: number | undefined,
): Source | undefined {
  let place: Place = { value, steps: [], nodes: [], parameters: [], rank, axesMore: 0, channels, rowsOnly: false };
  let best: Place | undefined;
  if (rank !== undefined && rank > 4) return undefined;
  for (let step = 0; step < MAX_STEPS; step++) {
    const next = stepUp(index, place);
    if (next === undefined) break;
    place = next;
    if (place.channels === 0) best = place;
  }
  if (best === undefined) return undefined;
  const { steps, nodes, parameters } = best;
  return {
    value: best.value,
    nodes,
    parameters,
    view: (source, numbers) => steps.reduce<Strided | undefined>((view, step) => view && step(view, numbers), source),
  };
}
