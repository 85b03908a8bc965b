/** Values that are equal because they are computed alike: exporters write the same mask once for each place that needs it. */

import type { GraphIndex } from '../model/graph.ts';
import { type AttributeProto, type NodeProto, type TensorProto, tensorNumbers } from '../onnx/codec.ts';
import { is } from './operators.ts';

/** Nodes that a comparison looks at. */
const MAX_NODES = 64;

/** True where two values are provably equal. */
export function isSame(index: GraphIndex, a: string, b: string): boolean {
  const pending: [string, string][] = [[a, b]];
  for (let looked = 0; looked < MAX_NODES; looked++) {
    const [x, y] = pending.pop() ?? [];
    if (x === undefined || y === undefined) return true;
    if (x === y) continue;
    const [left, right] = [index.constants.get(x), index.constants.get(y)];
    if (left !== undefined && right !== undefined && areEqual(left, right)) continue;
    const [p, q] = [index.producer(x), index.producer(y)];
    if (p === undefined || q === undefined || !isAlike(p, q)) return false;
    if (p.output.indexOf(x) !== q.output.indexOf(y)) return false;
    for (const [i, input] of p.input.entries()) pending.push([input, q.input[i] as string]);
  }
  return false;
}

function areEqual(a: TensorProto, b: TensorProto): boolean {
  if (a.dataType !== b.dataType || a.dims.join() !== b.dims.join()) return false;
  if (a.dims.reduce((product, size) => product * size, 1n) > 64n) return false;
  const [x, y] = [tensorNumbers(a), tensorNumbers(b)];
  return x !== undefined && y !== undefined && x.every((number, i) => Object.is(number, y[i]));
}

/** Nodes that give the same for the same inputs: none that draws numbers, since the operators that are read draw none. */
function isAlike(a: NodeProto, b: NodeProto): boolean {
  if (!is(a, b.opType, b.domain) || !is(b, a.opType, a.domain) || a.opType === 'Dropout') return false;
  if (a.input.length !== b.input.length || a.attribute.length !== b.attribute.length) return false;
  return a.attribute.every((attribute) => b.attribute.some((other) => textOf(other) === textOf(attribute)));
}

const textOf = ({ name, type, f, i, s, ints }: AttributeProto): string => [name, type, f, i, s, ints].join('|');
