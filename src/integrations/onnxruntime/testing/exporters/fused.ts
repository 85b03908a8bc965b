/** Attention as one node, as optimizers and exporters of operator set 23 write it. */
import * as ortNode from 'onnxruntime-node';
import { type Case, type Feeds, floats } from '../case.ts';
import { B, C, D, finish, H, heads, hidden, input, L, project } from './blocks.ts';

export const FUSED: readonly Case[] = [
  {
    name: 'com.microsoft MultiHeadAttention: bias and padding mask',
    exported: { models: '`MultiHeadAttention` of `com.microsoft`', exporter: 'onnxruntime optimizer', since: '0.1.0' },
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
    exported: { models: '`Attention` of `com.microsoft`', exporter: 'onnxruntime optimizer', since: '0.1.0' },
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
  ...[
    [17, false],
    [17, true],
    [11, false],
    [11, true],
  ].map(
    ([opset, isMasked]): Case => ({
      name: `com.microsoft Attention: past and present in one tensor${isMasked ? ', mask over both' : ', causal'}, operator set ${opset}`,
      opset: Number(opset),
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
      ...(rotary
        ? {
            exported: {
              models: 'Llama, Phi, Qwen with `GroupQueryAttention`',
              exporter: 'onnxruntime-genai',
              since: '0.1.0',
            },
          }
        : {}),
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
    exported: { models: '`Attention` of operator set 23', exporter: 'torch.onnx (dynamo)', since: '0.1.0' },
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
