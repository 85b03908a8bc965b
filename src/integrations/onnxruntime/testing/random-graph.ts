/** Random graphs between the two products of an attention. */
import type * as ort from 'onnxruntime-node';
import type { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import type { Random } from '../../../../test/support/random.ts';
import { ELEMENT_TYPES } from '../onnx/codec.ts';
import { type Feeds, floats } from './case.ts';

/**
 * Scores scaled, masked and reshaped at random; often attention, sometimes not.
 *
 * @param isNamed sizes of the inputs are names, one for each axis
 */
export function randomGraph(
  g: GraphBuilder,
  random: Random,
  isNamed = false,
): { readonly feeds: Feeds; readonly steps: readonly string[] } {
  const batch = Array.from({ length: random.integer(1, 3) }, () => random.integer(1, 3));
  const rows: [number, number] = [random.integer(1, 2), random.integer(1, 3)];
  const queries = rows[0] * rows[1];
  const [keys, dim, values] = [random.integer(1, 6), random.integer(1, 6), random.integer(1, 6)];
  const size = batch.reduce((product, length) => product * length, 1);
  const feeds: Record<string, ort.Tensor> = {};
  const input = (name: string, dims: readonly number[]) => {
    feeds[name] = floats(random, dims);
    return g.input(name, isNamed ? dims.map((_, axis) => `${name}_${axis}`) : [...dims]);
  };
  const swap = (rank: number) => [...Array.from({ length: rank - 2 }, (_, axis) => axis), rank - 1, rank - 2];
  const isTurned = random.uniform() < 0.5;
  const q = input('q', [...batch, queries, dim]);
  const k = input('k', [...batch, ...(isTurned ? [keys, dim] : [dim, keys])]);
  const turned = isTurned ? g.op('Transpose', [k], { perm: swap(batch.length + 2) }) : k;
  let scores = g.op('MatMul', [q, turned]);
  let shape = [...batch, queries, keys];
  let isHidden = false;
  const smaller = () =>
    shape.map((length) => (random.uniform() < 0.4 ? 1 : length)).slice(random.integer(0, shape.length - 1));
  const either = (op: string, other: string) => g.op(op, random.uniform() < 0.5 ? [scores, other] : [other, scores]);
  const reshape = (to: number[]) => {
    shape = to;
    const asked = to.map((length, axis) => (axis === 0 && random.uniform() < 0.5 ? -1 : length));
    return g.op('Reshape', [scores, g.ints(asked)]);
  };
  const steps: Readonly<Record<string, () => string>> = {
    factor: () => either('Mul', g.scalar(0.2 + random.uniform())),
    'factor of rows': () => either('Mul', g.weight([...smaller().slice(0, -1), 1], 1)),
    'any factor': () => either('Mul', g.weight(smaller(), 1)),
    divisor: () => g.op('Div', [scores, g.scalar(1 + random.uniform())]),
    mask: () => either('Add', g.weight(smaller(), 1)),
    'subtracted mask': () => g.op('Sub', [scores, g.weight(smaller(), 1)]),
    'several masks': () => g.op('Sum', [g.weight(smaller(), 1), scores, g.weight(smaller(), 1)]),
    hidden: () => {
      // The first key stays visible: what a row that sees nothing gives is not ONNX's to say.
      if (isHidden) return scores;
      isHidden = true;
      const dims = smaller();
      const last = shape.at(-1) as number;
      const count = dims.reduce((product, length) => product * length, 1);
      const hide = Array.from({ length: count }, (_, at) =>
        Number(dims.at(-1) === keys && last === keys && at % keys > 0 && random.uniform() < 0.4),
      );
      return g.op('Where', [g.bools(dims, hide), g.scalar(-1e9), scores]);
    },
    multiplied: () => {
      // Zeros and ones, sometimes among them a number that is neither; the first key stays visible.
      if (isHidden) return scores;
      isHidden = true;
      const last = shape.at(-1) as number;
      const keep = Array.from({ length: last }, (_, at) => Number(at === 0 || last !== keys || random.uniform() < 0.7));
      if (random.uniform() < 0.2) keep[0] = 1.5;
      const mask = g.floats([last], keep);
      const fill = g.op('Mul', [g.op('Sub', [g.scalar(1), mask]), g.scalar(1e9)]);
      return g.op('Sub', [either('Mul', mask), fill]);
    },
    cast: () => g.op('Cast', [g.op('Cast', [scores], { to: ELEMENT_TYPES.float64 })], { to: ELEMENT_TYPES.float32 }),
    folded: () => reshape([size, queries, keys]),
    unfolded: () => reshape([...batch, queries, keys]),
    spread: () => reshape([...batch, ...rows, keys]),
    'more axes': () => reshape([1, ...batch, queries, keys]),
    flat: () => reshape([...batch, queries * keys]),
    tanh: () => g.op('Tanh', [scores]),
  };
  const names: string[] = [];
  for (let count = random.integer(0, 5); count > 0; count--) {
    const name = random.pick(Object.keys(steps));
    names.push(name);
    scores = (steps[name] as () => string)();
  }
  if (shape.at(-1) !== keys || random.uniform() < 0.5) scores = reshape([...batch, queries, keys]);
  scores = softmax(g, random, scores, names);
  scores = reshape([...batch, queries, keys]);
  const rank = batch.length + 2;
  if (random.uniform() < 0.3) {
    names.push('values first');
    const v = input('v', [...batch, values, keys]);
    g.op('MatMul', [v, g.op('Transpose', [scores], { perm: swap(rank) })], {}, { outputs: ['y'] });
  } else g.op('MatMul', [scores, input('v', [...batch, keys, values])], {}, { outputs: ['y'] });
  g.output('y');
  return { feeds, steps: names };
}

function softmax(g: GraphBuilder, random: Random, scores: string, names: string[]): string {
  if (random.uniform() < 0.6) return g.op('Softmax', [scores], { axis: -1 });
  names.push('softmax in steps');
  const max = g.op('ReduceMax', [scores], { axes: [-1], keepdims: 1 });
  const e = g.op('Exp', [g.op('Sub', [scores, max])]);
  return g.op('Div', [e, g.op('ReduceSum', [e, g.ints([-1])], { keepdims: 1 })]);
}
