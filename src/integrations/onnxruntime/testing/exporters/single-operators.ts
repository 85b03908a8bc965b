/** Attention in single operators, in each exporter's spelling. */
import * as ortNode from 'onnxruntime-node';
import { type Case, floats } from '../case.ts';
import {
  attendTo,
  B,
  block,
  C,
  causalBools,
  D,
  dynamicRootScale,
  finish,
  H,
  heads,
  hidden,
  input,
  L,
  LOWEST,
  merge,
  type Parts,
  project,
  scale,
} from './blocks.ts';

export const SINGLE_OPERATORS: readonly Case[] = [
  {
    name: 'PyTorch TorchScript sdpa: square root of a dynamic scale on both sides',
    exported: {
      models: '`scaled_dot_product_attention` of PyTorch: most models since torch 2',
      exporter: 'torch.onnx (TorchScript)',
      since: '0.1.0',
    },
    build: block((g, q, kT, v) => {
      const root = dynamicRootScale(g, q);
      const scores = g.op('MatMul', [g.op('Mul', [q, root]), g.op('Mul', [kT, root])]);
      return g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'PyTorch dynamo sdpa: constant roots, boolean mask to additive, NaN guard',
    exported: { models: 'the same, with a boolean mask', exporter: 'torch.onnx (dynamo)', since: '0.1.0' },
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
    exported: { models: 'BERT and its relatives, sentence encoders', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'GPT-2', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'DistilBERT, MPNet: masked_fill', exporter: 'torch.onnx (TorchScript)', since: '0.1.0' },
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
    exported: { models: 'PaddleOCR (SVTR)', exporter: 'Paddle2ONNX', since: '0.1.0' },
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
    exported: { models: 'TensorFlow transformers', exporter: 'tf2onnx', since: '0.1.0' },
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
    exported: { models: 'Keras `MultiHeadAttention`', exporter: 'tf2onnx, Keras 3', since: '0.1.0' },
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
    exported: { models: 'Stable Diffusion of older diffusers', exporter: 'torch.onnx (TorchScript)', since: '0.1.0' },
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
    exported: { models: 'BART, Whisper, M2M100, older Wav2Vec2', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'T5, mT5', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'Llama, Qwen, Mistral: grouped heads', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'Gemma 2: softcap', exporter: 'Optimum', since: '0.1.0' },
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
    exported: { models: 'graphs that onnxruntime optimized', exporter: 'onnxruntime', since: '0.1.0' },
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
    exported: { models: 'ViT, DeiT, EVA of timm', exporter: 'torch.onnx (TorchScript)', since: '0.1.0' },
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
    exported: { models: 'DINOv2, BEiT: one projection split', exporter: 'torch.onnx (dynamo)', since: '0.1.0' },
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
    exported: { models: 'attention whose weights are an output', exporter: 'any', since: '0.1.0' },
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
    name: 'a mask added before the scale',
    build: block((g, q, kT, v) => {
      const masked = g.op('Add', [g.op('MatMul', [q, kT]), g.weight([1, 1, L, L], 1)]);
      return g.op('MatMul', [g.op('Softmax', [g.op('Mul', [masked, g.scalar(scale)])], { axis: -1 }), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'left: softmax over the queries',
    build: block((g, q, kT, v) => g.op('MatMul', [g.op('Softmax', [g.op('MatMul', [q, kT])], { axis: 1 }), v])),
    feeds: hidden,
    taken: 0,
    left: 'not the last',
  },
];
