/**
 * Graphs that look like attention and are not quite, or that spell a part of it in an unusual way: whatever is taken must be the same
 * function for all inputs.
 */
import * as ortNode from 'onnxruntime-node';
import type { GraphBuilder } from '../../../test/support/graph-builder.ts';
import type { Random } from '../../../test/support/random.ts';
import { tensorProto } from './onnx/codec.ts';
import { type Case, type Feeds, floats } from './testing/case.ts';
import { testCases } from './testing/cases.ts';

const B = 2;
const H = 2;
const L = 4;
const D = 8;
const FLOAT = 1;
const DOUBLE = 11;
const INT64 = 7;

type Inputs = Record<string, readonly number[]>;

/** q, k and v as inputs of the graph, k transposed; what `scores` and `probabilities` add stands in between. */
function around(
  name: string,
  parts: {
    readonly inputs?: Inputs;
    readonly scores?: (g: GraphBuilder, scores: string) => string;
    readonly probabilities?: (g: GraphBuilder, probabilities: string) => string;
    readonly axis?: number;
    readonly masks?: Feeds;
  } & Pick<Case, 'opset' | 'taken' | 'left'>,
): Case {
  const inputs = parts.inputs ?? { q: [B, H, L, D], k: [B, H, D, L], v: [B, H, L, D] };
  const { masks = {}, axis = -1, scores = (_, s) => s, probabilities = (_, p) => p, ...expected } = parts;
  return {
    name,
    ...expected,
    build: (g) => {
      for (const [input, dims] of Object.entries(inputs)) g.input(input, dims);
      for (const [input, { dims, type }] of Object.entries(masks)) g.input(input, dims, type as 'bool');
      const p = g.op('Softmax', [scores(g, g.op('MatMul', ['q', 'k']))], { axis });
      g.op('MatMul', [probabilities(g, p), 'v'], {}, { outputs: ['y'] });
      g.output('y');
    },
    feeds: (random) => ({ ...feedsOf(inputs)(random), ...masks }),
  };
}

const feedsOf = (inputs: Inputs) => (random: Random) =>
  Object.fromEntries(Object.entries(inputs).map(([name, dims]) => [name, floats(random, dims)]));

/** Attention over keys and values that `repeat` makes of `[B,heads,L,D]`. */
const repeated = (
  name: string,
  heads: readonly [query: number, key: number],
  repeat: (g: GraphBuilder, x: string) => string,
  expected: Pick<Case, 'taken' | 'left'> = {},
): Case => {
  const inputs = { q: [1, heads[0], L, D], k: [1, heads[1], L, D], v: [1, heads[1], L, D] };
  return {
    name,
    ...expected,
    build: (g) => {
      for (const [input, dims] of Object.entries(inputs)) g.input(input, dims);
      const kT = g.op('Transpose', [repeat(g, 'k')], { perm: [0, 1, 3, 2] });
      const p = g.op('Softmax', [g.op('MatMul', ['q', kT])], { axis: -1 });
      g.op('MatMul', [p, repeat(g, 'v')], {}, { outputs: ['y'] });
      g.output('y');
    },
    feeds: feedsOf(inputs),
  };
};

const causal = new ortNode.Tensor(
  'bool',
  Uint8Array.from({ length: L * L }, (_, i) => Number(i % L <= Math.floor(i / L))),
  [L, L],
);
const folded: Inputs = { q: [B * H, L, D], k: [B * H, D, L], v: [B * H, L, D] };
const unsqueezed = (g: GraphBuilder, x: string) => g.op('Unsqueeze', [x, g.ints([2])]);
const toInteger = (g: GraphBuilder, x: string) => g.op('Cast', [g.op('Cast', [x], { to: INT64 })], { to: FLOAT });

const CASES: Case[] = [
  around('scores cut to integers', { scores: toInteger, taken: 0, left: 'not a scaled and masked product' }),
  around('probabilities cut to integers', { probabilities: toInteger, taken: 0 }),
  around('a factor divided as integers are', {
    scores: (g, s) => g.op('Mul', [s, g.op('Cast', [g.op('Div', [g.int(5), g.int(2)])], { to: FLOAT })]),
  }),
  around('a factor with more axes than the scores', {
    scores: (g, s) => g.op('Mul', [s, g.floats([1, 1, 1, 1, 1], [0.3])]),
    taken: 0,
    left: 'a factor or fill value [1,1,1,1,1]',
  }),
  around('a factor with more axes than folded scores', {
    inputs: folded,
    scores: (g, s) => g.op('Mul', [s, g.floats([1, 1, 1, 1], [0.3])]),
    taken: 0,
    left: 'a factor or fill value [1,1,1,1]',
  }),
  around('a factor that makes the batch larger', {
    inputs: { q: [1, H, L, D], k: [1, H, D, L], v: [1, H, L, D] },
    scores: (g, s) => g.op('Mul', [s, g.floats([3, 1, 1, 1], [0.3, 0.3, 0.3])]),
    taken: 0,
    left: 'a factor or fill value [3,1,1,1]',
  }),
  around('a factor for each head, all of them equal', {
    scores: (g, s) => g.op('Mul', [s, g.floats([1, H, 1, 1], [0.3, 0.3])]),
  }),
  around('a factor from sizes with more axes than the scores', {
    inputs: folded,
    scores: (g, s) => {
      const size = g.op('Cast', [g.op('Size', ['q'])], { to: FLOAT });
      return g.op('Div', [s, g.op('Reshape', [size, g.ints([1, 1, 1, 1])])]);
    },
    taken: 0,
    left: 'no single finite number',
  }),
  around('scores times a mask of zeros and ones, which hides nothing', {
    scores: (g, s) => g.op('Mul', [s, g.op('Cast', ['keep'], { to: FLOAT })]),
    masks: { keep: causal },
    taken: 0,
    left: 'not a scaled and masked product',
  }),
  around('a mask that multiplies, and is subtracted where it does (GPT-2 of 2019)', {
    scores: (g, s) => {
      const keep = g.op('Cast', ['keep'], { to: FLOAT });
      const hidden = g.op('Mul', [g.op('Sub', [g.scalar(1), keep]), g.scalar(1e4)]);
      return g.op('Sub', [g.op('Mul', [s, keep]), hidden]);
    },
    masks: { keep: causal },
  }),
  around('a mask before the softcap', {
    scores: (g, s) => g.op('Tanh', [g.op('Where', ['keep', s, g.scalar(-1e4)])]),
    masks: { keep: causal },
    taken: 0,
    left: 'softcap',
  }),
  around('scores divided by zero', {
    scores: (g, s) => g.op('Div', [s, g.scalar(0)]),
    taken: 0,
    left: 'no single finite number',
  }),
  around('scores times zero', { scores: (g, s) => g.op('Mul', [s, g.scalar(0)]) }),
  around('scores times a negative number', { scores: (g, s) => g.op('Mul', [g.scalar(-0.7), s]) }),
  {
    name: 'a factor on q that makes it longer',
    build: (g) => {
      g.input('q', [1, H, 1, D]);
      g.input('k', [1, H, D, L]);
      g.input('v', [1, H, L, D]);
      const q = g.op('Mul', ['q', g.floats([3, 1], [0.3, 0.3, 0.3])]);
      const p = g.op('Softmax', [g.op('MatMul', [q, 'k'])], { axis: -1 });
      g.op('MatMul', [p, 'v'], {}, { outputs: ['y'] });
      g.output('y');
    },
    feeds: feedsOf({ q: [1, H, 1, D], k: [1, H, D, L], v: [1, H, L, D] }),
  },
  around('a softmax over all scores of a head', {
    inputs: folded,
    scores: (g, s) => g.op('Reshape', [s, g.ints([B * H, L * L])]),
    probabilities: (g, p) => g.op('Reshape', [p, g.ints([B * H, L, L])]),
    taken: 0,
    left: 'in another shape: [4,16]',
  }),
  around('a softmax over halves of rows', {
    scores: (g, s) => g.op('Reshape', [s, g.ints([B, H, 2 * L, L / 2])]),
    probabilities: (g, p) => g.op('Reshape', [p, g.ints([B, H, L, L])]),
    taken: 0,
    left: 'in another shape: [2,2,8,2]',
  }),
  around('the same, with shapes that are computed', {
    scores: (g, s) => {
      const double = g.op('Mul', [g.op('Slice', [g.op('Shape', ['q']), g.ints([2]), g.ints([3])]), g.ints([2])]);
      return g.op('Reshape', [s, g.op('Concat', [g.ints([B, H]), double, g.ints([-1])], { axis: 0 })]);
    },
    probabilities: (g, p) => g.op('Reshape', [p, g.ints([B, H, L, L])]),
    taken: 0,
    left: 'in another shape: [2,2,8,2]',
  }),
  around('heads split for a mask, with a shape that is computed', {
    inputs: folded,
    scores: (g, s) => {
      const tokens = g.op('Slice', [g.op('Shape', ['k']), g.ints([2]), g.ints([3])]);
      const split = g.op('Reshape', [s, g.op('Concat', [g.ints([-1, H]), tokens, tokens], { axis: 0 })]);
      return g.op('Reshape', [g.op('Add', [split, 'mask']), g.ints([B * H, L, L])]);
    },
    masks: {
      mask: new ortNode.Tensor(
        'float32',
        Float32Array.from({ length: B * L }, (_, i) => i % 3),
        [B, 1, 1, L],
      ),
    },
  }),
  around('a softmax over the queries of scores split for a mask', {
    inputs: folded,
    scores: (g, s) => g.op('Add', [g.op('Reshape', [s, g.ints([B, H, L, L])]), g.floats([1, 1, 1, L], [0, 1, 2, 3])]),
    axis: 2,
    probabilities: (g, p) => g.op('Reshape', [p, g.ints([B * H, L, L])]),
    taken: 0,
    left: 'softmax over axis 2 of scores of rank 4',
  }),
  around('a floor that a factor lifts to visible scores', {
    scores: (g, s) => {
      const masked = g.op('Where', ['mask', s, g.scalar(Number.NEGATIVE_INFINITY)]);
      return g.op('Mul', [g.op('Max', [masked, g.scalar(-1e4)]), g.scalar(2e-4)]);
    },
    masks: { mask: causal },
    taken: 0,
  }),
  around('a fill value that a factor from sizes lifts to visible scores', {
    scores: (g, s) => {
      const size = g.op('Cast', [g.op('Size', ['q'])], { to: FLOAT });
      return g.op('Div', [g.op('Where', ['mask', s, g.scalar(-1e4)]), g.op('Mul', [size, size])]);
    },
    masks: { mask: causal },
    taken: 0,
  }),
  around('a fill value with more axes than the scores', {
    inputs: folded,
    scores: (g, s) => g.op('Where', ['mask', s, g.floats([1, 1, 1, 1], [-1e9])]),
    masks: { mask: causal },
    taken: 0,
    left: 'a factor or fill value [1,1,1,1]',
  }),
  around('a fill value as large as the scores', {
    scores: (g, s) => {
      const fill = g.op('Expand', [g.scalar(-1e9), g.op('Shape', [s])]);
      return g.op('Where', ['mask', s, fill]);
    },
    masks: { mask: causal },
    taken: 0,
  }),
  around('a fill value as large as q k^T, made of the shape of q', {
    scores: (g, s) => {
      const rows = g.op('Slice', [g.op('Shape', ['q']), g.ints([0]), g.ints([3])]);
      const fill = g.op('Expand', [g.scalar(-1e9), g.op('Concat', [rows, g.ints([1])], { axis: 0 })]);
      return g.op('Where', ['mask', s, fill]);
    },
    masks: { mask: causal },
  }),
  around('masks of two types', {
    scores: (g, s) => {
      const bias = g.op('Cast', [g.floats([1, 1, 1, L], [0, 1, 2, -1])], { to: DOUBLE });
      const biased = g.op('Add', [g.op('Cast', [s], { to: DOUBLE }), bias]);
      return g.op('Where', ['mask', g.op('Cast', [biased], { to: FLOAT }), g.scalar(-1e9)]);
    },
    masks: { mask: causal },
  }),
  around('a mask that is subtracted', {
    scores: (g, s) => g.op('Sub', [g.op('Mul', [s, g.scalar(0.3)]), g.floats([1, 1, 1, L], [0, 1e9, 2, 0])]),
  }),
  around('a factor in a Constant of floats', {
    scores: (g, s) => g.op('Mul', [s, g.op('Constant', [], { value_float: { float: 0.25 } })]),
  }),
  repeated(
    'heads tiled as well as repeated',
    [8, 2],
    (g, x) => {
      const tiled = g.op('Tile', [unsqueezed(g, x), g.ints([1, 2, 2, 1, 1])]);
      return g.op('Reshape', [tiled, g.ints([1, 8, L, D])]);
    },
    { taken: 0 },
  ),
  repeated('heads repeated by Tile', [8, 2], (g, x) => {
    const tiled = g.op('Tile', [unsqueezed(g, x), g.ints([1, 1, 4, 1, 1])]);
    return g.op('Reshape', [tiled, g.ints([0, -1, L, D])]);
  }),
  repeated(
    'heads repeated into tokens',
    [2, 2],
    (g, x) => {
      const wide = g.op('Expand', [unsqueezed(g, x), g.ints([1, 2, 2, L, D])]);
      return g.op('Reshape', [wide, g.ints([1, 1, 4 * L, D])]);
    },
    { taken: 0 },
  ),
  repeated('all heads repeated by a Gather', [4, 2], (g, x) => g.op('Gather', [x, g.ints([0, 0, 1, 1])], { axis: 1 })),
  repeated(
    'some heads repeated by a Gather',
    [4, 4],
    (g, x) => g.op('Gather', [x, g.ints([0, 0, 1, 1])], { axis: 1 }),
    { taken: 0 },
  ),
  repeated(
    'one query head over repeated key heads',
    [1, 1],
    (g, x) => {
      const wide = g.op('Expand', [unsqueezed(g, x), g.ints([3, 1, 1])]);
      return g.op('Reshape', [wide, g.ints([1, 3, L, D])]);
    },
    { taken: 0 },
  ),
  around('keys and values of rank 3, one for each head', {
    inputs: { q: [2, 2, L, D], k: [2, D, L], v: [2, L, D] },
    taken: 0,
    left: 'operands of shapes',
  }),
  around('values of rank 3, one for each head', {
    inputs: { q: [2, 1, L, D], k: [2, 1, D, L], v: [2, L, D] },
    taken: 0,
    left: 'operands of shapes',
  }),
  {
    name: 'an initializer and a Constant that are outputs',
    build: (g) => {
      around('', {}).build(g);
      g.output(g.floats([2], [1, 2]), [2]);
      const value = tensorProto('', 'float32', [3], Float32Array.of(3, 4, 5));
      g.op('Constant', [], { value }, { outputs: ['constant'] });
      g.output('constant', [3]);
    },
    feeds: feedsOf({ q: [B, H, L, D], k: [B, H, D, L], v: [B, H, L, D] }),
  },
  {
    name: 'an input that is an output',
    build: (g) => {
      around('', {}).build(g);
      g.output('q');
    },
    feeds: feedsOf({ q: [B, H, L, D], k: [B, H, D, L], v: [B, H, L, D] }),
  },
  {
    name: 'com.microsoft MultiHeadAttention: a bias beside keys in [B,H,L,D], which onnxruntime adds to q alone',
    build: (g) => {
      g.input('q', [B, L, H * D]);
      g.input('k', [B, H, 5, D]);
      g.input('v', [B, H, 5, D]);
      g.contrib('MultiHeadAttention', ['q', 'k', 'v', g.weight([3 * H * D], 1)], { num_heads: H }, ['y']);
      g.output('y', [B, L, H * D]);
    },
    feeds: feedsOf({ q: [B, L, H * D], k: [B, H, 5, D], v: [B, H, 5, D] }),
    taken: 0,
    left: 'operands of shapes',
  },
  ...[0, 2].map(
    (past): Case => ({
      name: `com.microsoft MultiHeadAttention: unidirectional over more keys than queries, past ${past}`,
      build: (g) => {
        g.input('q', [B, L, H * D]);
        for (const input of ['k', 'v']) g.input(input, [B, L + 1, H * D]);
        for (const input of ['pk', 'pv']) g.input(input, [B, H, past, D]);
        const inputs = ['q', 'k', 'v', '', '', '', 'pk', 'pv'];
        g.contrib('MultiHeadAttention', inputs, { num_heads: H, unidirectional: 1 }, ['y', 'present_k', 'present_v']);
        g.output('y', [B, L, H * D]);
      },
      feeds: feedsOf({
        q: [B, L, H * D],
        k: [B, L + 1, H * D],
        v: [B, L + 1, H * D],
        pk: [B, H, past, D],
        pv: [B, H, past, D],
      }),
      taken: 0,
      left: `a causal mask of ${L} queries over ${L + 1 + past} keys`,
    }),
  ),
  {
    name: 'com.microsoft GroupQueryAttention: sequence lengths that are an initializer',
    build: (g) => {
      for (const input of ['q', 'k', 'v']) g.input(input, [1, L, H * 16]);
      for (const input of ['pk', 'pv']) g.input(input, [1, H, 0, 16]);
      const constant = (dims: readonly number[], value: number) =>
        g.op('Constant', [], { value: tensorProto('', 'int32', dims, Int32Array.of(value)) });
      const [lengths, total] = [constant([1], L - 1), constant([], L)] as [string, string];
      const attributes = { num_heads: H, kv_num_heads: H };
      g.contrib('GroupQueryAttention', ['q', 'k', 'v', 'pk', 'pv', lengths, total], attributes, ['y', 'k1', 'v1']);
      for (const output of ['y', 'k1', 'v1']) g.output(output);
    },
    feeds: feedsOf({
      q: [1, L, H * 16],
      k: [1, L, H * 16],
      v: [1, L, H * 16],
      pk: [1, H, 0, 16],
      pv: [1, H, 0, 16],
    }),
  },
];

testCases(CASES);
