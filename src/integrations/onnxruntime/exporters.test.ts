/** Attention in each exporter's spelling. */
import * as ortNode from 'onnxruntime-node';
import type { GraphBuilder } from '../../../test/support/graph-builder.ts';
import type { Random } from '../../../test/support/random.ts';
import { type Case, type Feeds, floats, testCases } from './testing/cases.ts';

const B = 2;
const L = 10;
const H = 3;
const D = 16;
const C = H * D;

const hidden = (random: Random): Feeds => ({ x: floats(random, [B, L, C]) });

/** `[B,L,C]` to `[B,H,L,D]`. */
const heads = (g: GraphBuilder, x: string, count = H, perm = [0, 2, 1, 3]) =>
  g.op('Transpose', [g.op('Reshape', [x, g.ints([0, 0, count, D])])], { perm });
const merge = (g: GraphBuilder, o: string) =>
  g.op('Reshape', [g.op('Transpose', [o], { perm: [0, 2, 1, 3] }), g.ints([0, 0, C])]);
const project = (g: GraphBuilder, x: string) => g.linear(x, C, C, 2);
const finish = (g: GraphBuilder, o: string) => {
  g.op('Add', [g.linear(merge(g, o), C, C), 'x'], {}, { outputs: ['y'] });
  g.output('y', ['batch', 'length', C]);
};
const input = (g: GraphBuilder) => g.input('x', ['batch', 'length', C]);

/** q, k, v projected and attention between them as `attend` writes it. */
const block = (attend: (g: GraphBuilder, q: string, k: string, v: string) => string) => (g: GraphBuilder) => {
  const x = input(g);
  const [q, k, v] = [heads(g, project(g, x)), heads(g, project(g, x), H, [0, 2, 3, 1]), heads(g, project(g, x))];
  finish(g, attend(g, q as string, k as string, v as string));
};

type Parts = [q: string, k: string, v: string];

/** Attention of `[B,H,L,D]` to itself. */
const attendTo = (g: GraphBuilder, [q, k, v]: Parts) => {
  const scores = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 1, 3, 2] })]);
  return g.op('MatMul', [g.op('Softmax', [g.op('Mul', [scores, g.scalar(scale)])], { axis: -1 }), v]);
};

/** `sqrt(1 / sqrt(D))` from the shape, as PyTorch's TorchScript exporter writes it for a dynamic head dim. */
const dynamicRootScale = (g: GraphBuilder, q: string) => {
  const size = g.op('Slice', [g.op('Shape', [q]), g.ints([-1]), g.ints([2 ** 31 - 1]), g.ints([0])]);
  const root = g.op('Sqrt', [g.op('Cast', [size], { to: 1 })]);
  return g.op('Sqrt', [g.op('Div', [g.scalar(1), root])]);
};
const causalBools = (rows: number, columns: number) =>
  Array.from({ length: rows * columns }, (_, i) => (i % columns <= Math.floor(i / columns) ? 1 : 0));
const scale = 1 / Math.sqrt(D);
const LOWEST = -3.4028234663852886e38;

const CASES: Case[] = [
  {
    name: 'PyTorch TorchScript sdpa: square root of a dynamic scale on both sides',
    build: block((g, q, kT, v) => {
      const root = dynamicRootScale(g, q);
      const scores = g.op('MatMul', [g.op('Mul', [q, root]), g.op('Mul', [kT, root])]);
      return g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'PyTorch dynamo sdpa: constant roots, boolean mask to additive, NaN guard',
    build: (g) => {
      g.input('mask', ['batch', 1, 1, 'length'], 'bool');
      block((g, q, kT, v) => {
        const root = g.scalar(Math.sqrt(scale));
        const mask = g.op('Where', ['mask', g.scalar(0), g.scalar(Number.NEGATIVE_INFINITY)]);
        const scores = g.op('MatMul', [g.op('Mul', [q, root]), g.op('Mul', [kT, root])]);
        const p = g.op('Softmax', [g.op('Add', [scores, mask])], { axis: -1 });
        const safe = g.op('Where', [g.op('IsNaN', [p]), g.scalar(0), p]);
        return g.op('MatMul', [safe, v]);
      })(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      mask: new ortNode.Tensor(
        'bool',
        Uint8Array.from({ length: B * L }, (_, i) => Number(i % L < L - (i < L ? 0 : 4))),
        [B, 1, 1, L],
      ),
    }),
    opset: 18,
  },
  {
    name: 'Optimum BERT: Div by a constant, additive mask of the lowest float, Dropout',
    build: (g) => {
      g.input('attention_mask', ['batch', 'length'], 'int64');
      block((g, q, kT, v) => {
        const wide = g.op('Unsqueeze', [g.op('Unsqueeze', ['attention_mask', g.ints([1])]), g.ints([2])]);
        const inverse = g.op('Sub', [g.scalar(1), g.op('Cast', [wide], { to: 1 })]);
        const mask = g.op('Mul', [inverse, g.scalar(LOWEST)]);
        const scores = g.op('Div', [g.op('MatMul', [q, kT]), g.scalar(Math.sqrt(D))]);
        const p = g.op('Softmax', [g.op('Add', [scores, mask])], { axis: -1 });
        return g.op('MatMul', [g.op('Dropout', [p]), v]);
      })(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      attention_mask: new ortNode.Tensor(
        'int64',
        BigInt64Array.from({ length: B * L }, (_, i) => BigInt(i % L < 7)),
        [B, L],
      ),
    }),
  },
  {
    name: 'GPT-2: Where over a sliced causal buffer, then an additive mask',
    build: (g) => {
      g.input('bias', ['batch', 1, 1, 'length']);
      block((g, q, kT, v) => {
        const scores = g.op('Div', [g.op('MatMul', [q, kT]), g.scalar(Math.sqrt(D))]);
        const buffer = g.bools([1, 1, 16, 16], causalBools(16, 16));
        const length = g.op('Gather', [g.op('Shape', ['x']), g.ints([1])]);
        const rows = g.op('Slice', [buffer, g.ints([0]), length, g.ints([2])]);
        const causal = g.op('Slice', [rows, g.ints([0]), length, g.ints([3])]);
        const masked = g.op('Where', [causal, scores, g.scalar(LOWEST)]);
        return g.op('MatMul', [g.op('Softmax', [g.op('Add', [masked, 'bias'])], { axis: 3 }), v]);
      })(g);
    },
    feeds: (random) => ({ ...hidden(random), bias: floats(random, [B, 1, 1, L]) }),
  },
  {
    name: 'masked_fill: Where that replaces where a mask is true',
    build: (g) => {
      g.input('hide', ['batch', 1, 'length', 'length'], 'bool');
      block((g, q, kT, v) => {
        const scores = g.op('Mul', [g.op('MatMul', [q, kT]), g.scalar(scale)]);
        const masked = g.op('Where', ['hide', g.scalar(-1e9), scores]);
        return g.op('MatMul', [g.op('Softmax', [masked], { axis: -1 }), v]);
      })(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      hide: new ortNode.Tensor(
        'bool',
        Uint8Array.from({ length: B * L * L }, (_, i) => Number(i % L !== 0 && random.uniform() < 0.4)),
        [B, 1, L, L],
      ),
    }),
  },
  {
    name: 'Paddle2ONNX: packed projection, Slice and Squeeze, scale on q, axis 3, operator set 9',
    build: (g) => {
      const packed = g.op('Reshape', [g.linear(input(g), C, 3 * C, 2), g.ints([0, -1, 3, H, D])]);
      const parts = g.op('Transpose', [packed], { perm: [2, 0, 3, 1, 4] });
      const part = (i: number) =>
        g.op('Squeeze', [g.op('Slice', [parts], { axes: [0], starts: [i], ends: [i + 1] })], { axes: [0] });
      const q = g.op('Mul', [part(0), g.floats([1], [scale])]);
      const kT = g.op('Transpose', [part(1)], { perm: [0, 1, 3, 2] });
      const p = g.op('Softmax', [g.op('MatMul', [q, kT])], { axis: 3 });
      finish(g, g.op('MatMul', [p, part(2)]));
    },
    feeds: hidden,
    opset: 9,
  },
  {
    name: 'tf2onnx: scale on q behind its transpose, k transposed twice',
    build: (g) => {
      const x = input(g);
      const q = g.op('Mul', [heads(g, project(g, x)), g.scalar(scale)]);
      const kT = g.op('Transpose', [heads(g, project(g, x))], { perm: [0, 1, 3, 2] });
      const p = g.op('Softmax', [g.op('MatMul', [q, kT])], { axis: -1 });
      finish(g, g.op('MatMul', [p, heads(g, project(g, x))]));
    },
    feeds: hidden,
  },
  {
    name: 'Keras MultiHeadAttention: Einsum with the key first',
    build: (g) => {
      const x = input(g);
      const [q, k, v] = [0, 1, 2].map(() => g.op('Reshape', [project(g, x), g.ints([0, 0, H, D])])) as [
        string,
        string,
        string,
      ];
      const scores = g.op('Einsum', [k, g.op('Mul', [q, g.scalar(scale)])], { equation: 'aecd,abcd->acbe' });
      const o = g.op('Einsum', [g.op('Softmax', [scores], { axis: -1 }), v], { equation: 'acbe,aecd->abcd' });
      finish(g, g.op('Transpose', [o], { perm: [0, 2, 1, 3] }));
    },
    feeds: hidden,
  },
  {
    name: 'einsum on [B,H,L,D]',
    build: (g) => {
      const x = input(g);
      const [q, k, v] = [0, 1, 2].map(() => heads(g, project(g, x))) as [string, string, string];
      const scores = g.op('Mul', [
        g.op('Einsum', [q, k], { equation: 'b h i d, b h j d -> b h i j' }),
        g.scalar(scale),
      ]);
      finish(g, g.op('Einsum', [g.op('Softmax', [scores], { axis: -1 }), v], { equation: 'bhij,bhjd->bhid' }));
    },
    feeds: hidden,
  },
  {
    name: 'diffusers: heads folded into the batch, Einsum of rank 3',
    build: (g) => {
      const x = input(g);
      const fold = (value: string) => g.op('Reshape', [heads(g, value), g.ints([-1, L, D])]);
      const [q, k, v] = [0, 1, 2].map(() => fold(project(g, x))) as [string, string, string];
      const scores = g.op('Mul', [g.op('Einsum', [q, k], { equation: 'bid,bjd->bij' }), g.scalar(scale)]);
      const o = g.op('Einsum', [g.op('Softmax', [scores], { axis: -1 }), v], { equation: 'bij,bjd->bid' });
      finish(g, g.op('Reshape', [o, g.ints([-1, H, L, D])]));
    },
    feeds: hidden,
  },
  {
    name: 'BART: heads folded into the batch, the mask added to reshaped scores',
    build: (g) => {
      g.input('mask', ['batch', 1, 'length', 'length']);
      const x = input(g);
      const fold = (value: string) => g.op('Reshape', [heads(g, value), g.ints([-1, L, D])]);
      const q = fold(g.op('Mul', [project(g, x), g.scalar(scale)]));
      const kT = g.op('Transpose', [fold(project(g, x))], { perm: [0, 2, 1] });
      const split = g.op('Reshape', [g.op('MatMul', [q, kT]), g.ints([B, H, L, L])]);
      const folded = g.op('Reshape', [g.op('Add', [split, 'mask']), g.ints([-1, L, L])]);
      const o = g.op('MatMul', [g.op('Softmax', [folded], { axis: 2 }), fold(project(g, x))]);
      finish(g, g.op('Reshape', [o, g.ints([-1, H, L, D])]));
    },
    feeds: (random) => ({ ...hidden(random), mask: floats(random, [B, 1, L, L]) }),
  },
  {
    name: 'T5: position bias of every head, no scale, a residual mask constant',
    build: block((g, q, kT, v) => {
      const bias = g.op('Add', [
        g.weight([1, H, L, L], 1),
        g.floats(
          [1, 1, 1, L],
          Array.from({ length: L }, (_, i) => (i < 8 ? 0 : LOWEST)),
        ),
      ]);
      const p = g.op('Softmax', [g.op('Add', [g.op('MatMul', [q, kT]), bias])], { axis: -1 });
      return g.op('MatMul', [g.op('Cast', [p], { to: 1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'a mask that is an initializer',
    build: block((g, q, kT, v) => {
      const mask = g.floats(
        [1, 1, L, L],
        causalBools(L, L).map((open) => (open === 1 ? 0 : LOWEST)),
      );
      const scores = g.op('Mul', [g.op('MatMul', [q, kT]), g.scalar(scale)]);
      return g.op('MatMul', [g.op('Softmax', [g.op('Add', [scores, mask])], { axis: -1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'Llama: key and value heads repeated by Unsqueeze, Expand, Reshape; Cast around the softmax',
    build: (g) => {
      const x = input(g);
      const kv = () => {
        const narrow = heads(g, g.linear(x, C, D, 2), 1);
        const expanded = g.op('Expand', [g.op('Unsqueeze', [narrow, g.ints([2])]), g.ints([1, 1, H, 1, 1])]);
        return g.op('Reshape', [expanded, g.ints([0, H, -1, D])]);
      };
      const kT = g.op('Transpose', [kv()], { perm: [0, 1, 3, 2] });
      const scores = g.op('Mul', [g.op('MatMul', [heads(g, project(g, x)), kT]), g.scalar(scale)]);
      const p = g.op('Softmax', [g.op('Cast', [scores], { to: 1 })], { axis: -1 });
      finish(g, g.op('MatMul', [g.op('Cast', [p], { to: 1 }), kv()]));
    },
    feeds: hidden,
  },
  {
    name: 'Gemma 2: softcap by Div, Tanh, Mul',
    build: block((g, q, kT, v) => {
      const scores = g.op('Mul', [g.op('MatMul', [q, kT]), g.scalar(scale * 4)]);
      const capped = g.op('Mul', [g.op('Tanh', [g.op('Div', [scores, g.scalar(5)])]), g.scalar(5)]);
      const mask = g.floats(
        [1, 1, 1, L],
        Array.from({ length: L }, (_, i) => (i < 6 ? 0 : LOWEST)),
      );
      return g.op('MatMul', [g.op('Softmax', [g.op('Add', [capped, mask])], { axis: -1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'keys that a cache stores transposed',
    build: (g) => {
      g.input('past', ['batch', H, D, 'past']);
      g.input('past_v', ['batch', H, 'past', D]);
      block((g, q, kT, v) => {
        const keys = g.op('Concat', ['past', kT], { axis: 3 });
        const values = g.op('Concat', ['past_v', v], { axis: 2 });
        const scores = g.op('Mul', [g.op('MatMul', [q, keys]), g.scalar(scale)]);
        return g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), values]);
      })(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      past: floats(random, [B, H, D, 5]),
      past_v: floats(random, [B, H, 5, D]),
    }),
  },
  {
    name: 'an optimized graph: FusedMatMul with transB and alpha',
    build: (g) => {
      const x = input(g);
      const [q, k, v] = [0, 1, 2].map(() => heads(g, project(g, x))) as [string, string, string];
      const scores = g.contrib('FusedMatMul', [q, k], { alpha: { float: scale }, transB: 1 });
      finish(g, g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), v]));
    },
    feeds: hidden,
  },
  {
    name: 'an attention whose output is an output of the graph',
    build: (g) => {
      const x = input(g);
      const kT = heads(g, project(g, x), H, [0, 2, 3, 1]);
      const scores = g.op('Mul', [g.op('MatMul', [heads(g, project(g, x)), kT]), g.scalar(scale)]);
      g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), heads(g, project(g, x))], {}, { outputs: ['y'] });
      g.output('y', ['batch', H, 'length', D]);
    },
    feeds: hidden,
  },
  {
    name: 'two attentions side by side, then a third',
    build: (g) => {
      const x = input(g);
      const attend = (from: string) => {
        const kT = heads(g, project(g, from), H, [0, 2, 3, 1]);
        const scores = g.op('Mul', [g.op('MatMul', [heads(g, project(g, from)), kT]), g.scalar(scale)]);
        return merge(g, g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), heads(g, project(g, from))]));
      };
      const both = g.op('Add', [attend(x), attend(x)]);
      g.op('Add', [attend(both), x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: hidden,
    taken: 3,
  },
  {
    name: 'timm: one projection, Reshape, Transpose, and a Gather for each part',
    build: (g) => {
      const packed = g.op('Reshape', [g.linear(input(g), C, 3 * C, 2), g.ints([0, -1, 3, H, D])]);
      const parts = g.op('Transpose', [packed], { perm: [2, 0, 3, 1, 4] });
      finish(g, attendTo(g, [0, 1, 2].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as Parts));
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'the same with shapes that are computed, and the last part counted from the end',
    build: (g) => {
      const x = input(g);
      const shape = g.op('Shape', [x]);
      const [batch, length] = [0, 1].map((i) => g.op('Gather', [shape, g.ints([i])])) as [string, string];
      const target = g.op('Concat', [batch, length, g.ints([3, H, D])], { axis: 0 });
      const parts = g.op('Transpose', [g.op('Reshape', [g.linear(x, C, 3 * C, 2), target])], { perm: [2, 0, 3, 1, 4] });
      finish(g, attendTo(g, [0, 1, -1].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as Parts));
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'ViT: Split of the transposed projection, Squeeze',
    build: (g) => {
      const packed = g.op('Reshape', [g.linear(input(g), C, 3 * C, 2), g.ints([0, 0, 3, H, D])]);
      const parts = g.op('Transpose', [packed], { perm: [2, 0, 3, 1, 4] });
      g.op('Split', [parts, g.ints([1, 1, 1])], { axis: 0 }, { outputs: ['q1', 'k1', 'v1'] });
      finish(g, attendTo(g, ['q1', 'k1', 'v1'].map((part) => g.op('Squeeze', [part, g.ints([0])])) as Parts));
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'GPT-2: Split of the projection, then heads',
    build: (g) => {
      g.op('Split', [g.linear(input(g), C, 3 * C, 2)], { axis: -1, num_outputs: 3 }, { outputs: ['q1', 'k1', 'v1'] });
      finish(g, attendTo(g, ['q1', 'k1', 'v1'].map((part) => heads(g, part)) as Parts));
    },
    feeds: hidden,
    opset: 18,
    sources: 1,
  },
  {
    name: 'Slices of the projection with negative bounds, heads of the keys moved behind in one Transpose',
    build: (g) => {
      const packed = g.linear(input(g), C, 3 * C, 2);
      const slice = (from: number, to: number) => g.op('Slice', [packed, g.ints([from]), g.ints([to]), g.ints([2])]);
      const [q, k, v] = [slice(0, C), slice(C, -C), slice(-C, 2 ** 31 - 1)] as Parts;
      const scores = g.op('MatMul', [heads(g, q), heads(g, k, H, [0, 2, 3, 1])]);
      const p = g.op('Softmax', [g.op('Mul', [scores, g.scalar(scale)])], { axis: -1 });
      finish(g, g.op('MatMul', [p, heads(g, v)]));
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'keys transposed with all axes of the packed projection, tokens sliced off in front',
    build: (g) => {
      const packed = g.op('Reshape', [g.linear(input(g), C, 3 * C, 2), g.ints([0, 0, 3, H, D])]);
      const tail = g.op('Slice', [packed, g.ints([2]), g.ints([1000]), g.ints([1])]);
      const part = (i: number, perm: number[]) =>
        g.op('Gather', [g.op('Transpose', [tail], { perm }), g.int(i)], { axis: 0 });
      const kT = part(1, [2, 0, 3, 4, 1]);
      const scores = g.op('Mul', [g.op('MatMul', [part(0, [2, 0, 3, 1, 4]), kT]), g.scalar(scale)]);
      const o = g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), part(2, [2, 0, 3, 1, 4])]);
      g.op('Identity', [merge(g, o)], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'rest', C]);
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'an operand that is a view only by a copy: heads folded into the batch behind a Split',
    build: (g) => {
      g.op('Split', [g.linear(input(g), C, 3 * C, 2)], { axis: 2, num_outputs: 3 }, { outputs: ['q1', 'k1', 'v1'] });
      const fold = (value: string) => g.op('Reshape', [heads(g, value), g.ints([-1, L, D])]);
      const [q, k, v] = ['q1', 'k1', 'v1'].map(fold) as Parts;
      const scores = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 2, 1] })]);
      const p = g.op('Softmax', [g.op('Mul', [scores, g.scalar(scale)])], { axis: -1 });
      finish(g, g.op('Reshape', [g.op('MatMul', [p, v]), g.ints([-1, H, L, D])]));
    },
    feeds: hidden,
    opset: 18,
    sources: 3,
  },
  {
    name: 'com.microsoft MultiHeadAttention over a Split projection',
    build: (g) => {
      const x = input(g);
      g.op('Split', [g.linear(x, C, 3 * C, 2), g.ints([C, C, C])], { axis: 2 }, { outputs: ['q1', 'k1', 'v1'] });
      const o = g.contrib('MultiHeadAttention', ['q1', 'k1', 'v1'], { num_heads: H });
      g.op('Add', [o, x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'left: attention weights that are an output',
    build: (g) => {
      block((g, q, kT, v) => {
        g.op('Softmax', [g.op('MatMul', [q, kT])], { axis: -1 }, { outputs: ['p'] });
        g.output('p', ['batch', H, 'length', 'length']);
        return g.op('MatMul', ['p', v]);
      })(g);
    },
    feeds: hidden,
    taken: 0,
  },
  {
    name: 'left: a mask added before the scale',
    build: block((g, q, kT, v) => {
      const masked = g.op('Add', [g.op('MatMul', [q, kT]), g.weight([1, 1, L, L], 1)]);
      return g.op('MatMul', [g.op('Softmax', [g.op('Mul', [masked, g.scalar(scale)])], { axis: -1 }), v]);
    }),
    feeds: hidden,
    taken: 0,
    left: 'before the scale',
  },
  {
    name: 'left: softmax over the queries',
    build: block((g, q, kT, v) => g.op('MatMul', [g.op('Softmax', [g.op('MatMul', [q, kT])], { axis: 1 }), v])),
    feeds: hidden,
    taken: 0,
    left: 'not the last',
  },
  {
    name: 'com.microsoft MultiHeadAttention: bias and padding mask',
    build: (g) => {
      g.input('padding', ['batch', 'length'], 'int32');
      const x = input(g);
      const bias = g.weight([3 * C], 0.3);
      const o = g.contrib('MultiHeadAttention', [project(g, x), project(g, x), project(g, x), bias, 'padding'], {
        num_heads: H,
      });
      g.op('Add', [g.linear(o, C, C), x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: (random) => ({
      ...hidden(random),
      padding: new ortNode.Tensor(
        'int32',
        Int32Array.from({ length: B * L }, (_, i) => Number(i % L < 6 + Math.floor(i / L))),
        [B, L],
      ),
    }),
  },
  {
    name: 'com.microsoft MultiHeadAttention: past, present, attention bias, scale',
    build: (g) => {
      const x = input(g);
      g.input('past_k', ['batch', H, 'past', D]);
      g.input('past_v', ['batch', H, 'past', D]);
      g.input('bias', ['batch', 1, 'length', 'total']);
      const inputs = [project(g, x), project(g, x), project(g, x), '', '', 'bias', 'past_k', 'past_v'];
      g.contrib('MultiHeadAttention', inputs, { num_heads: H, scale: { float: 0.3 } }, ['o', 'present_k', 'present_v']);
      g.op('Add', [g.linear('o', C, C), x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
      g.output('present_k', ['batch', H, 'total', D]);
      g.output('present_v', ['batch', H, 'total', D]);
    },
    feeds: (random) => ({
      ...hidden(random),
      past_k: floats(random, [B, H, 4, D]),
      past_v: floats(random, [B, H, 4, D]),
      bias: floats(random, [B, 1, L, L + 4]),
    }),
  },
  {
    name: 'com.microsoft MultiHeadAttention: unidirectional',
    build: (g) => {
      const x = input(g);
      const o = g.contrib('MultiHeadAttention', [project(g, x), project(g, x), project(g, x)], {
        num_heads: H,
        unidirectional: 1,
      });
      g.op('Add', [o, x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: hidden,
  },
  {
    name: 'com.microsoft MultiHeadAttention: cross-attention with keys in [B,H,L,D]',
    build: (g) => {
      const x = input(g);
      g.input('k', ['batch', H, 'keys', D]);
      g.input('v', ['batch', H, 'keys', D]);
      const o = g.contrib('MultiHeadAttention', [project(g, x), 'k', 'v'], { num_heads: H });
      g.op('Add', [o, x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: (random) => ({ ...hidden(random), k: floats(random, [B, H, 7, D]), v: floats(random, [B, H, 7, D]) }),
  },
  {
    name: 'com.microsoft Attention: projection inside, widths of their own, mask',
    build: (g) => {
      g.input('mask', ['batch', 'length'], 'int32');
      const x = input(g);
      const weights = [g.weight([C, 3 * C], 0.4), g.weight([3 * C], 0.2)];
      const o = g.contrib('Attention', [x, ...weights, 'mask'], { num_heads: H, unidirectional: 1 });
      g.op('Add', [o, x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: (random) => ({
      ...hidden(random),
      mask: new ortNode.Tensor(
        'int32',
        Int32Array.from({ length: B * L }, (_, i) => Number(i % L < 8)),
        [B, L],
      ),
    }),
  },
  ...[false, true].map(
    (isMasked): Case => ({
      name: `com.microsoft Attention: past and present in one tensor${isMasked ? ', mask over both' : ', causal'}`,
      build: (g) => {
        const x = input(g);
        g.input('past', [2, 'batch', H, 'past', D]);
        if (isMasked) g.input('mask', ['batch', 'total'], 'int32');
        const weights = [g.weight([C, 3 * C], 0.4), g.weight([3 * C], 0.2)];
        g.contrib(
          'Attention',
          [x, ...weights, isMasked ? 'mask' : '', 'past'],
          { num_heads: H, unidirectional: Number(!isMasked) },
          ['o', 'present'],
        );
        g.op('Add', ['o', x], {}, { outputs: ['y'] });
        g.output('y', ['batch', 'length', C]);
        g.output('present', [2, 'batch', H, 'total', D]);
      },
      feeds: (random): Feeds => ({
        ...hidden(random),
        past: floats(random, [2, B, H, 4, D]),
        ...(isMasked
          ? {
              mask: new ortNode.Tensor(
                'int32',
                Int32Array.from({ length: B * (L + 4) }, (_, i) => Number(i % (L + 4) !== 2)),
                [B, L + 4],
              ),
            }
          : {}),
      }),
    }),
  ),
  ...[1, 3, 100].map(
    (window): Case => ({
      name: `com.microsoft GroupQueryAttention: a local window of ${window}`,
      build: (g) => {
        const x = g.input('x', [1, 'length', C]);
        g.input('past_k', [1, 1, 'past', D]);
        g.input('past_v', [1, 1, 'past', D]);
        g.input('seqlens', [1, 1], 'int32');
        g.input('total', [], 'int32');
        const inputs = [
          project(g, x),
          g.linear(x, C, D, 2),
          g.linear(x, C, D, 2),
          'past_k',
          'past_v',
          'seqlens',
          'total',
        ];
        const attributes = { num_heads: H, kv_num_heads: 1, local_window_size: window };
        g.contrib('GroupQueryAttention', inputs, attributes, ['o', 'present_k', 'present_v']);
        g.op('Add', ['o', x], {}, { outputs: ['y'] });
        g.output('y', [1, 'length', C]);
        g.output('present_k', [1, 1, 'total', D]);
        g.output('present_v', [1, 1, 'total', D]);
      },
      feeds: (random) => ({
        x: floats(random, [1, L, C]),
        past_k: floats(random, [1, 1, 4, D]),
        past_v: floats(random, [1, 1, 4, D]),
        seqlens: new ortNode.Tensor('int32', Int32Array.of(L + 3), [1, 1]),
        total: new ortNode.Tensor('int32', Int32Array.of(L + 4), []),
      }),
    }),
  ),
  ...[false, true].map(
    (rotary): Case => ({
      name: `com.microsoft GroupQueryAttention: past and present${rotary ? ', packed, rotary' : ''}`,
      build: (g) => {
        const x = g.input('x', [1, 'length', C]);
        g.input('past_k', [1, 1, 'past', D]);
        g.input('past_v', [1, 1, 'past', D]);
        g.input('seqlens', [1, 1], 'int32');
        g.input('total', [], 'int32');
        const kv = () => g.linear(x, C, D, 2);
        const qkv = rotary ? [g.linear(x, C, C + 2 * D, 2), '', ''] : [project(g, x), kv(), kv()];
        const angles = Array.from({ length: (32 * D) / 2 }, (_, i) => Math.floor(i / (D / 2)) * 10 ** -(i % (D / 2)));
        const tables = rotary
          ? [g.floats([32, D / 2], angles.map(Math.cos)), g.floats([32, D / 2], angles.map(Math.sin))]
          : [];
        const attributes = { num_heads: H, kv_num_heads: 1, do_rotary: Number(rotary) };
        g.contrib('GroupQueryAttention', [...qkv, 'past_k', 'past_v', 'seqlens', 'total', ...tables], attributes, [
          'o',
          'present_k',
          'present_v',
        ]);
        g.op('Add', ['o', x], {}, { outputs: ['y'] });
        g.output('y', [1, 'length', C]);
        g.output('present_k', [1, 1, 'total', D]);
        g.output('present_v', [1, 1, 'total', D]);
      },
      feeds: (random) => ({
        x: floats(random, [1, L, C]),
        past_k: floats(random, [1, 1, 4, D]),
        past_v: floats(random, [1, 1, 4, D]),
        seqlens: new ortNode.Tensor('int32', Int32Array.of(L + 3), [1, 1]),
        total: new ortNode.Tensor('int32', Int32Array.of(L + 4), []),
      }),
    }),
  ),
  {
    name: 'ONNX Attention: [B,L,H*D], causal, grouped heads',
    build: (g) => {
      const x = input(g);
      const kv = () => g.linear(x, C, D, 2);
      const o = g.op('Attention', [project(g, x), kv(), kv()], { q_num_heads: H, kv_num_heads: 1, is_causal: 1 });
      g.op('Add', [o, x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
    },
    feeds: hidden,
    opset: 23,
  },
  {
    name: 'ONNX Attention: causal with past and present',
    build: (g) => {
      const x = input(g);
      g.input('past_k', ['batch', 1, 'past', D]);
      g.input('past_v', ['batch', 1, 'past', D]);
      const inputs = [project(g, x), g.linear(x, C, D, 2), g.linear(x, C, D, 2), '', 'past_k', 'past_v'];
      const attributes = { q_num_heads: H, kv_num_heads: 1, is_causal: 1 };
      g.op('Attention', inputs, attributes, { outputs: ['o', 'present_k', 'present_v'] });
      g.op('Add', ['o', x], {}, { outputs: ['y'] });
      g.output('y', ['batch', 'length', C]);
      g.output('present_k', ['batch', 1, 'total', D]);
      g.output('present_v', ['batch', 1, 'total', D]);
    },
    feeds: (random) => ({
      ...hidden(random),
      past_k: floats(random, [B, 1, 4, D]),
      past_v: floats(random, [B, 1, 4, D]),
    }),
    opset: 23,
  },
  {
    name: 'left: ONNX Attention, causal over more keys than queries without a past, which runtimes align differently',
    build: (g) => {
      const x = input(g);
      g.input('keys', ['batch', H, 'keys', D]);
      const o = g.op('Attention', [heads(g, project(g, x)), 'keys', 'keys'], { is_causal: 1 });
      finish(g, o);
    },
    feeds: (random) => ({ ...hidden(random), keys: floats(random, [B, H, L + 3, D]) }),
    opset: 23,
    taken: 0,
    left: 'a causal mask of 10 queries over 13 keys',
  },
  {
    name: 'ONNX Attention: [B,H,L,D], additive mask, past and present',
    build: (g) => {
      const x = input(g);
      g.input('mask', ['batch', 1, 'length', 'total']);
      g.input('past_k', ['batch', H, 'past', D]);
      g.input('past_v', ['batch', H, 'past', D]);
      const [q, k, v] = [0, 1, 2].map(() => heads(g, project(g, x))) as [string, string, string];
      g.op(
        'Attention',
        [q, k, v, 'mask', 'past_k', 'past_v'],
        { scale: { float: 0.4 } },
        { outputs: ['o', 'present_k', 'present_v'] },
      );
      finish(g, 'o');
      g.output('present_k', ['batch', H, 'total', D]);
      g.output('present_v', ['batch', H, 'total', D]);
    },
    feeds: (random) => ({
      ...hidden(random),
      mask: floats(random, [B, 1, L, L + 4]),
      past_k: floats(random, [B, H, 4, D]),
      past_v: floats(random, [B, H, 4, D]),
    }),
    opset: 23,
  },
];

testCases(CASES);
