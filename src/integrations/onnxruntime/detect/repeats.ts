/** Key heads repeated for grouped queries, in the nodes that exporters write for it. */

import { constantNumbers, type GraphIndex, intAttribute, intsAttribute } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { is } from './operators.ts';
import { type Numbers, parametersOf, readSizes, sameSizes, sizesOf, targetShape } from './views.ts';

export interface Repeat {
  /** A value of rank 4, with each head once. */
  readonly value: string;
  readonly nodes: readonly NodeProto[];
  /** Integer values that `count` reads. */
  readonly parameters: readonly string[];
  /**
   * How often each head stands behind itself, where `value` has the dimensions `shape`; undefined where the nodes do
   * anything else with it.
   */
  count(shape: readonly number[], numbers: Numbers): number | undefined;
}

/** Unsqueeze, Expand or Tile, Reshape; or a Gather. */
export function repeatedHeads(index: GraphIndex, node: NodeProto, headAxis: number): Repeat | undefined {
  return is(node, 'Gather') ? gatheredHeads(index, node, headAxis) : expandedHeads(index, node, headAxis);
}

function gatheredHeads(index: GraphIndex, node: NodeProto, headAxis: number): Repeat | undefined {
  const axis = intAttribute(node, 'axis') ?? 0;
  const indices = constantNumbers(index, node.input[1] as string);
  const groups = indices === undefined ? 0 : indices.filter((i) => i === 0).length;
  const interleaved = groups > 1 && indices?.every((head, i) => head === Math.floor(i / groups));
  if (!interleaved || (axis !== headAxis && axis !== headAxis - 4)) return undefined;
  return {
    value: node.input[0] as string,
    nodes: [node],
    parameters: [],
    // A Gather of fewer heads than there are would leave heads out.
    count: (shape) => ((shape[headAxis] as number) * groups === indices?.length ? groups : undefined),
  };
}

function expandedHeads(index: GraphIndex, last: NodeProto, headAxis: number): Repeat | undefined {
  const expand = is(last, 'Reshape') ? index.producer(last.input[0] as string) : undefined;
  if (!is(expand, 'Expand') && !is(expand, 'Tile')) return undefined;
  const unsqueeze = index.producer(expand.input[0] as string);
  if (!is(unsqueeze, 'Unsqueeze')) return undefined;
  const axes = intsAttribute(unsqueeze, 'axes') ?? constantNumbers(index, unsqueeze.input[1] ?? '');
  if (axes?.length !== 1 || (axes[0] !== headAxis + 1 && axes[0] !== headAxis - 4)) return undefined;
  const [wide, merged] = [sizesOf(index, expand.input[1]), sizesOf(index, last.input[1])];
  if (wide === undefined || merged === undefined || (intAttribute(last, 'allowzero') ?? 0) !== 0) return undefined;
  const widen = is(expand, 'Tile') ? tiled : expanded;
  return {
    value: unsqueeze.input[0] as string,
    nodes: [unsqueeze, expand, last],
    parameters: parametersOf([wide, merged]),
    count: (shape, numbers) => {
      const [before, heads, behind] = [shape.slice(0, headAxis), shape[headAxis] as number, shape.slice(headAxis + 1)];
      const result = widen([...before, heads, 1, ...behind], readSizes(wide, numbers));
      const count = result?.[headAxis + 1];
      if (result === undefined || count === undefined) return undefined;
      const target = targetShape(readSizes(merged, numbers), result);
      const isRepeat =
        sameSizes(result, [...before, heads, count, ...behind]) &&
        target !== undefined &&
        sameSizes(target, [...before, heads * count, ...behind]);
      return isRepeat ? count : undefined;
    },
  };
}

function tiled(shape: readonly number[], repeats: readonly number[]): number[] | undefined {
  return repeats.length === shape.length ? shape.map((size, axis) => size * (repeats[axis] as number)) : undefined;
}

function expanded(shape: readonly number[], asked: readonly number[]): number[] | undefined {
  if (asked.length > shape.length) return undefined;
  const offset = shape.length - asked.length;
  return shape.map((size, axis) => (size === 1 && axis >= offset ? (asked[axis - offset] as number) : size));
}
