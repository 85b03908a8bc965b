/** Vision models. */
import * as ort from 'onnxruntime-node';
import type { GraphBuilder } from '../../../../../test/support/graph-builder.ts';
import type { Random } from '../../../../../test/support/random.ts';
import { type Case, type Feeds, floats } from '../case.ts';
import { B, C, D, finish, H, heads, hidden, input, L, type Parts, project, scale } from './blocks.ts';

const TORCHSCRIPT = 'torch.onnx (TorchScript)';
const SINCE = '0.1.0';

const tokensFirst = (random: Random): Feeds => ({ x: floats(random, [L, B, C]) });

/** `[L,B,C]` projected to `[L,B*H,D]` and turned, as nn.MultiheadAttention does it. */
const turned = (g: GraphBuilder, perm: readonly number[]) =>
  g.op('Transpose', [g.op('Reshape', [project(g, 'x'), g.ints([L, B * H, D])])], { perm });
const turnedBack = (g: GraphBuilder, o: string) => {
  const rows = g.op('Reshape', [g.op('Transpose', [o], { perm: [1, 0, 2] }), g.ints([L * B, C])]);
  const y = g.op('Reshape', [g.op('Gemm', [rows, g.weight([C, C], 0.2)]), g.ints([L, B, C])]);
  g.op('Identity', [y], {}, { outputs: ['y'] });
  g.output('y', [L, B, C]);
};

const softmax = (g: GraphBuilder, scores: string) => g.op('Softmax', [scores], { axis: -1 });

const MULTIHEAD_ATTENTION: Case[] = [
  {
    name: 'nn.MultiheadAttention: bmm over heads in the batch, keys turned in one Transpose',
    exported: {
      models:
        'torch.nn.MultiheadAttention with weights asked for, or of torch 1: DETR, CLIP, nn.Transformer, torchvision ViT',
      exporter: TORCHSCRIPT,
      since: SINCE,
    },
    build: (g) => {
      g.input('x', [L, B, C]);
      const q = g.op('Mul', [turned(g, [1, 0, 2]), g.scalar(scale)]);
      turnedBack(g, g.op('MatMul', [softmax(g, g.op('MatMul', [q, turned(g, [1, 2, 0])])), turned(g, [1, 0, 2])]));
    },
    feeds: tokensFirst,
  },
  {
    name: 'nn.MultiheadAttention: baddbmm with a key padding mask of each head',
    exported: {
      models: 'torch.nn.MultiheadAttention with a key padding mask: DETR',
      exporter: TORCHSCRIPT,
      since: SINCE,
    },
    build: (g) => {
      g.input('x', [L, B, C]);
      g.input('padding', [B, L], 'bool');
      const wide = g.op('Expand', [g.op('Reshape', ['padding', g.ints([B, 1, 1, L])]), g.ints([B, H, 1, L])]);
      const hide = g.op('Reshape', [wide, g.ints([B * H, 1, L])]);
      const fill = g.op('Where', [hide, g.scalar(Number.NEGATIVE_INFINITY), g.scalar(0)]);
      const q = g.op('Div', [turned(g, [1, 0, 2]), g.scalar(Math.sqrt(D))]);
      const scores = g.op('Mul', [g.op('MatMul', [q, turned(g, [1, 2, 0])]), g.scalar(1)]);
      const p = softmax(g, g.op('Add', [g.op('Mul', [fill, g.scalar(1)]), scores]));
      turnedBack(g, g.op('MatMul', [p, turned(g, [1, 0, 2])]));
    },
    feeds: (random) => ({
      ...tokensFirst(random),
      padding: new ort.Tensor(
        'bool',
        Uint8Array.from({ length: B * L }, (_, i) => Number(i % L > 6 + (i < L ? 1 : 0))),
        [B, L],
      ),
    }),
  },
  {
    name: 'nn.MultiheadAttention: heads split again for scaled_dot_product_attention',
    exported: {
      models: 'torch.nn.MultiheadAttention without weights: torchvision ViT, CLIP',
      exporter: TORCHSCRIPT,
      since: SINCE,
    },
    build: (g) => {
      g.input('x', [L, B, C]);
      const part = () => g.op('Reshape', [turned(g, [1, 0, 2]), g.ints([B, H, L, D])]);
      const root = g.scalar(Math.sqrt(scale));
      const kT = g.op('Transpose', [part()], { perm: [0, 1, 3, 2] });
      const scores = g.op('MatMul', [g.op('Mul', [part(), root]), g.op('Mul', [kT, root])]);
      const o = g.op('Transpose', [g.op('MatMul', [softmax(g, scores), part()])], { perm: [2, 0, 1, 3] });
      g.op('Reshape', [o, g.ints([L, B, C])], {}, { outputs: ['y'] });
      g.output('y', [L, B, C]);
    },
    feeds: tokensFirst,
  },
];

const N = 16;
const WINDOWS = 4;
const SIDE = 4;

const ones = (count: number) => new Array<number>(count).fill(1);
const shiftMask = (g: GraphBuilder, dims: readonly number[]) =>
  g.floats(
    dims,
    Float32Array.from({ length: WINDOWS * N * N }, (_, i) => (i % 7 === 3 ? -100 : 0)),
  );
const windows = (random: Random): Feeds => ({ x: floats(random, [B * WINDOWS, N, C]) });
const windowInput = (g: GraphBuilder) => g.input('x', ['windows', N, C]);

/** Scores of shifted windows: the bias of every window, then the mask of the window's place in the image. */
const shifted = (g: GraphBuilder, scores: string, split: string) => {
  const biased = g.op('Add', [scores, g.weight([1, H, N, N], 1)]);
  const spread = g.op('Reshape', [biased, split]);
  return g.op('Reshape', [g.op('Add', [spread, shiftMask(g, [1, WINDOWS, 1, N, N])]), g.ints([-1, H, N, N])]);
};

const WINDOWED: Case[] = [
  ...[false, true].map(
    (isDynamic): Case => ({
      name: `Swin: shifted windows, bias and mask of scores in two shapes${isDynamic ? ', computed' : ''}`,
      ...(isDynamic
        ? {}
        : {
            exported: {
              models: 'Swin, Swin2SR, Donut, BiRefNet: shifted windows',
              exporter: TORCHSCRIPT,
              since: SINCE,
            },
          }),
      build: (g) => {
        windowInput(g);
        const scores = g.op('Mul', [
          g.op('MatMul', [heads(g, project(g, 'x')), heads(g, project(g, 'x'), H, [0, 2, 3, 1])]),
          g.scalar(scale),
        ]);
        const batch = g.op('Div', [g.op('Gather', [g.op('Shape', ['x']), g.ints([0])]), g.ints([WINDOWS])]);
        const split = isDynamic
          ? g.op('Concat', [batch, g.ints([WINDOWS, H, N, N])], { axis: 0 })
          : g.ints([-1, WINDOWS, H, N, N]);
        finish(g, g.op('MatMul', [softmax(g, shifted(g, scores, split)), heads(g, project(g, 'x'))]));
      },
      feeds: windows,
    }),
  ),
  {
    name: 'Swin v2: cosine attention with a factor for each head, shifted windows',
    exported: { models: 'Swin v2', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      windowInput(g);
      const unit = (value: string) => {
        const norm = g.op('ReduceL2', [value], { axes: [-1], keepdims: 1 });
        const safe = g.op('Clip', [norm, g.scalar(1e-12)]);
        return g.op('Div', [value, g.op('Expand', [safe, g.op('Shape', [value])])]);
      };
      const [q, k] = [unit(heads(g, project(g, 'x'))), unit(heads(g, project(g, 'x')))] as [string, string];
      const cosine = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 1, 3, 2] })]);
      const factor = g.op('Exp', [g.op('Min', [g.weight([H, 1, 1], 1), g.scalar(4.6)])]);
      const scores = g.op('Mul', [cosine, factor]);
      finish(
        g,
        g.op('MatMul', [softmax(g, shifted(g, scores, g.ints([B, WINDOWS, H, N, N]))), heads(g, project(g, 'x'))]),
      );
    },
    feeds: windows,
  },
  {
    name: 'Twins: windows of rank 5',
    exported: { models: 'Twins', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      g.input('x', ['batch', WINDOWS, N, C]);
      const packed = g.op('Reshape', [g.linear('x', C, 3 * C, 2), g.ints([0, WINDOWS, N, 3, H * D])]);
      const split = g.op('Reshape', [packed, g.ints([0, WINDOWS, N, 3, H, D])]);
      const parts = g.op('Transpose', [split], { perm: [3, 0, 1, 4, 2, 5] });
      const [q, k, v] = [0, 1, 2].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as Parts;
      const scores = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 1, 2, 4, 3] })]);
      const o = g.op('MatMul', [softmax(g, g.op('Mul', [scores, g.scalar(scale)])), v]);
      const y = g.op('Reshape', [g.op('Transpose', [o], { perm: [0, 1, 3, 2, 4] }), g.ints([0, 0, N, C])]);
      g.op('Identity', [y], {}, { outputs: ['y'] });
      g.output('y', ['batch', WINDOWS, N, C]);
    },
    feeds: (random) => ({ x: floats(random, [B, WINDOWS, N, C]) }),
  },
  {
    name: 'Hiera: windows behind the heads, rank 5',
    exported: { models: 'Hiera, SAM 2', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      g.input('x', ['batch', N * WINDOWS, C]);
      const split = g.op('Reshape', [g.linear('x', C, 3 * C, 2), g.ints([0, N, WINDOWS, 3, H, D])]);
      const parts = g.op('Transpose', [split], { perm: [3, 0, 4, 2, 1, 5] });
      const [q, k, v] = [0, 1, 2].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as Parts;
      const root = g.scalar(Math.sqrt(scale));
      const kT = g.op('Mul', [g.op('Transpose', [k], { perm: [0, 1, 2, 4, 3] }), root]);
      const o = g.op('MatMul', [softmax(g, g.op('MatMul', [g.op('Mul', [q, root]), kT])), v]);
      const y = g.op('Reshape', [g.op('Transpose', [o], { perm: [0, 3, 2, 1, 4] }), g.ints([0, N * WINDOWS, C])]);
      g.op('Identity', [y], {}, { outputs: ['y'] });
      g.output('y', ['batch', N * WINDOWS, C]);
    },
    feeds: (random) => ({ x: floats(random, [B, N * WINDOWS, C]) }),
  },
];

/** Positions along both sides of an image, added to scores `[B*H,qh,qw,kh,kw]`. */
const relativePositions = (g: GraphBuilder, q: string, scores: string, rows: string, spread: string) => {
  const image = g.op('Reshape', [q, g.ints([-1, SIDE, SIDE, D])]);
  const along = (equation: string) => g.op('Einsum', [image, g.weight([SIDE, SIDE, D], 0.5)], { equation });
  const high = g.op('Unsqueeze', [along('bhwc,hkc->bhwk'), g.ints([4])]);
  const wide = g.op('Unsqueeze', [along('bhwc,wkc->bhwk'), g.ints([3])]);
  const biased = g.op('Add', [g.op('Add', [g.op('Reshape', [scores, spread]), high]), wide]);
  return g.op('Reshape', [biased, rows]);
};

const IMAGES: Case[] = [
  {
    name: 'SAM: relative positions along both sides of the image',
    exported: { models: 'SAM: image encoder', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      input(g);
      const packed = g.op('Reshape', [g.linear('x', C, 3 * C, 2), g.ints([0, N, 3, H, D])]);
      const parts = g.op('Reshape', [g.op('Transpose', [packed], { perm: [2, 0, 3, 1, 4] }), g.ints([3, B * H, N, D])]);
      const [q, k, v] = [0, 1, 2].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as Parts;
      const scores = g.op('MatMul', [g.op('Mul', [q, g.scalar(scale)]), g.op('Transpose', [k], { perm: [0, 2, 1] })]);
      const rows = g.ints([B * H, N, N]);
      const p = softmax(g, relativePositions(g, q, scores, rows, g.ints([B * H, SIDE, SIDE, SIDE, SIDE])));
      const o = g.op('Reshape', [g.op('MatMul', [p, v]), g.ints([B, H, N, D])]);
      finish(g, o);
    },
    feeds: (random) => ({ x: floats(random, [B, N, C]) }),
  },
  {
    name: 'MViT v2: relative positions behind a scale, shapes that are computed',
    exported: { models: 'MViT v2, ViTDet', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      input(g);
      const [q, k, v] = [
        heads(g, project(g, 'x')),
        heads(g, project(g, 'x'), H, [0, 2, 3, 1]),
        heads(g, project(g, 'x')),
      ] as Parts;
      const scores = g.op('Mul', [g.op('MatMul', [q, k]), g.scalar(scale)]);
      const batch = g.op('Unsqueeze', [g.op('Gather', [g.op('Shape', ['x']), g.int(0)]), g.ints([0])]);
      const shape = (...sizes: number[]) => g.op('Concat', [batch, g.ints(sizes)], { axis: 0 });
      const image = g.op('Reshape', [q, shape(H, SIDE, SIDE, D)]);
      const high = g.op('Unsqueeze', [g.op('MatMul', [image, g.weight([D, SIDE], 0.5)]), g.ints([5])]);
      const wide = g.op('Unsqueeze', [g.op('MatMul', [image, g.weight([D, SIDE], 0.5)]), g.ints([4])]);
      const spread = g.op('Reshape', [scores, shape(-1, SIDE, SIDE, SIDE, SIDE)]);
      const biased = g.op('Add', [g.op('Add', [spread, high]), wide]);
      const p = softmax(g, g.op('Reshape', [biased, shape(-1, N, N)]));
      finish(g, g.op('MatMul', [p, v]));
    },
    feeds: (random) => ({ x: floats(random, [B, N, C]) }),
  },
  {
    name: 'YOLOv10, YOLO11: channels first, values times transposed probabilities',
    exported: { models: 'YOLOv10, YOLO11', exporter: 'ultralytics (TorchScript)', since: SINCE },
    build: (g) => {
      g.input('x', [B, C, L]);
      const packed = g.op('Reshape', [g.op('Conv', ['x', g.weight([3 * C, C, 1], 0.2)]), g.ints([B, H, 3 * D, L])]);
      g.op('Split', [packed, g.ints([D, D, D])], { axis: 2 }, { outputs: ['q1', 'k1', 'v1'] });
      const scores = g.op('MatMul', [g.op('Transpose', ['q1'], { perm: [0, 1, 3, 2] }), 'k1']);
      const p = softmax(g, g.op('Mul', [scores, g.scalar(scale)]));
      const o = g.op('MatMul', ['v1', g.op('Transpose', [p], { perm: [0, 1, 3, 2] })]);
      const positions = g.op('Conv', [g.op('Reshape', ['v1', g.ints([B, C, L])]), g.weight([C, C, 1], 0.1)]);
      g.op('Add', [g.op('Reshape', [o, g.ints([B, C, L])]), positions], {}, { outputs: ['y'] });
      g.output('y', [B, C, L]);
    },
    feeds: (random) => ({ x: floats(random, [B, C, L]) }),
  },
  {
    name: 'YOLO12: area attention, parts of a turned projection',
    exported: { models: 'YOLO12', exporter: 'ultralytics (TorchScript)', since: SINCE },
    build: (g) => {
      input(g);
      const packed = g.op('Reshape', [g.linear('x', C, 3 * C, 2), g.ints([B, L, H, 3 * D])]);
      g.op(
        'Split',
        [g.op('Transpose', [packed], { perm: [0, 2, 3, 1] }), g.ints([D, D, D])],
        { axis: 2 },
        { outputs: ['q1', 'k1', 'v1'] },
      );
      const scores = g.op('MatMul', [g.op('Transpose', ['q1'], { perm: [0, 1, 3, 2] }), 'k1']);
      const p = softmax(g, g.op('Mul', [scores, g.scalar(scale)]));
      const o = g.op('MatMul', ['v1', g.op('Transpose', [p], { perm: [0, 1, 3, 2] })]);
      g.op('Reshape', [g.op('Transpose', [o], { perm: [0, 3, 1, 2] }), g.ints([B, L, C])], {}, { outputs: ['y'] });
      g.output('y', [B, L, C]);
    },
    feeds: hidden,
    sources: 1,
  },
  {
    name: 'a non-local block: one head, channels first, an output with its tokens last',
    exported: {
      models: 'autoencoders of diffusion models, SAGAN, non-local blocks',
      exporter: TORCHSCRIPT,
      since: SINCE,
    },
    build: (g) => {
      g.input('x', [B, C, L]);
      const part = () => g.op('Conv', ['x', g.weight([C, C, 1], 0.2)]);
      const scores = g.op('MatMul', [g.op('Transpose', [part()], { perm: [0, 2, 1] }), part()]);
      const p = g.op('Softmax', [g.op('Mul', [scores, g.scalar(scale)])], { axis: 2 });
      g.op('MatMul', [part(), g.op('Transpose', [p], { perm: [0, 2, 1] })], {}, { outputs: ['y'] });
      g.output('y', [B, C, L]);
    },
    feeds: (random) => ({ x: floats(random, [B, C, L]) }),
  },
  {
    name: 'a factor for each head that is an input',
    build: (g) => {
      g.input('temperature', [H, 1, 1]);
      input(g);
      const [q, k, v] = [
        heads(g, project(g, 'x')),
        heads(g, project(g, 'x'), H, [0, 2, 3, 1]),
        heads(g, project(g, 'x')),
      ] as Parts;
      finish(g, g.op('MatMul', [softmax(g, g.op('Mul', [g.op('MatMul', [q, k]), 'temperature'])), v]));
    },
    feeds: (random) => ({ ...hidden(random), temperature: floats(random, [H, 1, 1]) }),
  },
  {
    name: 'Dropout in training mode with a ratio of 0',
    exported: { models: 'models exported in training mode', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      input(g);
      const parts = [heads(g, project(g, 'x')), heads(g, project(g, 'x')), heads(g, project(g, 'x'))] as Parts;
      const scores = g.op('MatMul', [parts[0], g.op('Transpose', [parts[1]], { perm: [0, 1, 3, 2] })]);
      const dropped = g.op('Dropout', [softmax(g, scores), g.scalar(0), g.bools([], ones(1))]);
      finish(g, g.op('MatMul', [dropped, parts[2]]));
    },
    feeds: hidden,
  },
];

export const VISION: readonly Case[] = [...MULTIHEAD_ATTENTION, ...WINDOWED, ...IMAGES];
