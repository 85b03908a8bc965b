/** Language and speech models. */
import * as ort from 'onnxruntime-node';
import type { GraphBuilder } from '../../../../../test/support/graph-builder.ts';
import type { Random } from '../../../../../test/support/random.ts';
import type { Case, Feeds } from '../case.ts';
import { B, block, causalBools, D, finish, H, heads, hidden, input, L, LOWEST, project, scale } from './blocks.ts';

const TORCHSCRIPT = 'torch.onnx (TorchScript)';
const SINCE = '0.1.0';

const softmax = (g: GraphBuilder, scores: string) => g.op('Softmax', [scores], { axis: -1 });
const scaled = (g: GraphBuilder, q: string, kT: string) => g.op('Mul', [g.op('MatMul', [q, kT]), g.scalar(scale)]);

const hiding = (random: Random): Feeds => ({
  ...hidden(random),
  hide: new ort.Tensor(
    'bool',
    Uint8Array.from({ length: B * L }, (_, i) => Number(i % L > 6 + (i < L ? 0 : 2))),
    [B, 1, 1, L],
  ),
});
const hideInput = (g: GraphBuilder) => g.input('hide', ['batch', 1, 1, 'length'], 'bool');

/** Scores of relative positions, shifted as Transformer-XL does it: `[B,H,L,2L-1]` to `[B,H,L,L]`. */
const shiftedPositions = (g: GraphBuilder, x: string) => {
  const padded = g.op('Concat', [g.op('Expand', [g.scalar(0), g.ints([B, H, L, 1])]), x], { axis: 3 });
  const rows = g.op('Reshape', [padded, g.ints([B, H, 2 * L, L])]);
  const rest = g.op('Slice', [rows, g.ints([1]), g.ints([1000]), g.ints([2])]);
  const back = g.op('Reshape', [rest, g.ints([B, H, L, 2 * L - 1])]);
  return g.op('Slice', [back, g.ints([0]), g.ints([L]), g.ints([3])]);
};

const FILLED: Case[] = [
  {
    name: 'Conformer: masked_fill before and behind the softmax, each with a Cast of its own',
    exported: { models: 'ESPnet, WeNet, FunASR and NeMo conformers', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      hideInput(g);
      block((g, q, kT, v) => {
        const hide = () => g.op('Cast', ['hide'], { to: 9 });
        const p = softmax(g, g.op('Where', [hide(), g.scalar(LOWEST), scaled(g, q, kT)]));
        return g.op('MatMul', [g.op('Where', [hide(), g.scalar(0), p]), v]);
      })(g);
    },
    feeds: hiding,
  },
  {
    name: 'DeBERTa: XSoftmax, with the mask negated',
    exported: { models: 'DeBERTa v1 to v3 (XSoftmax)', exporter: 'Optimum', since: SINCE },
    build: (g) => {
      g.input('mask', ['batch', 1, 'length', 'length'], 'bool');
      block((g, q, kT, v) => {
        const hide = g.op('Not', ['mask']);
        const biased = g.op('Add', [scaled(g, q, kT), g.weight([B, H, L, L], 0.5)]);
        const p = softmax(g, g.op('Where', [hide, g.scalar(LOWEST), biased]));
        return g.op('MatMul', [g.op('Where', [hide, g.scalar(0), p]), v]);
      })(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      mask: new ort.Tensor(
        'bool',
        Uint8Array.from({ length: B * L * L }, (_, i) => Number(i % L <= (i / L) % L)),
        [B, 1, L, L],
      ),
    }),
  },
  {
    name: 'left: probabilities set to zero by another mask',
    build: (g) => {
      hideInput(g);
      block((g, q, kT, v) => {
        const p = softmax(g, scaled(g, q, kT));
        return g.op('MatMul', [g.op('Where', ['hide', g.scalar(0), p]), v]);
      })(g);
    },
    feeds: hiding,
    taken: 0,
    left: 'set to zero by another mask',
  },
];

/** 1 for the keys up to each query. */
const computedTriangle = (g: GraphBuilder) => {
  const range = () => g.op('Range', [g.int(0), g.int(L), g.int(1)]);
  const rows = g.op('Unsqueeze', [range(), g.ints([1])]);
  const open = g.op('Cast', [g.op('GreaterOrEqual', [rows, range()])], { to: 1 });
  return g.op('Reshape', [open, g.ints([1, 1, L, L])]);
};
const slicedTriangle = (g: GraphBuilder) => {
  const rows = g.op('Slice', [g.floats([1, 1, 16, 16], causalBools(16, 16)), g.ints([0]), g.ints([L]), g.ints([2])]);
  return g.op('Slice', [rows, g.ints([0]), g.ints([L]), g.ints([3])]);
};
/** `s * b + fill * (1 - b)`, in a spelling of it. */
const multiplied = (g: GraphBuilder, s: string, b: string, fill: number, spelling: 'Sub' | 'Add' | 'first') => {
  const product = g.op('Mul', spelling === 'first' ? [b, s] : [s, b]);
  if (spelling === 'Sub') return g.op('Sub', [product, g.op('Mul', [g.scalar(-fill), g.op('Sub', [g.scalar(1), b])])]);
  if (spelling === 'Add') return g.op('Add', [product, g.op('Mul', [g.op('Sub', [g.scalar(1), b]), g.scalar(fill)])]);
  return g.op('Add', [g.op('Mul', [g.op('Sub', [b, g.scalar(1)]), g.scalar(-fill)]), product]);
};
const withMultiplied = (mask: (g: GraphBuilder) => string, fill: number, spelling: 'Sub' | 'Add' | 'first') =>
  block((g, q, kT, v) => g.op('MatMul', [softmax(g, multiplied(g, scaled(g, q, kT), mask(g), fill, spelling)), v]));

const MULTIPLIED: Case[] = [
  {
    name: 'TF GPT-2: scores times a triangle, and -10000 elsewhere',
    exported: { models: 'GPT-2 of TensorFlow: a multiplied mask', exporter: 'tf2onnx', since: SINCE },
    build: withMultiplied(computedTriangle, -1e4, 'Sub'),
    feeds: hidden,
  },
  {
    name: 'GPT: a triangle that is a constant, and a padding mask behind',
    exported: { models: 'GPT: a multiplied mask', exporter: TORCHSCRIPT, since: SINCE },
    build: block((g, q, kT, v) => {
      g.input('padding', ['batch', 1, 1, 'length']);
      const s = multiplied(g, scaled(g, q, kT), slicedTriangle(g), -1e4, 'Add');
      return g.op('MatMul', [softmax(g, g.op('Add', [s, 'padding'])), v]);
    }),
    feeds: (random) => ({
      ...hidden(random),
      padding: new ort.Tensor(
        'float32',
        Float32Array.from({ length: B * L }, (_, i) => (i % L > 6 ? -1e4 : 0)),
        [B, 1, 1, L],
      ),
    }),
  },
  {
    name: 'a multiplied mask in front of the scores, behind a bias',
    build: block((g, q, kT, v) => {
      const s = g.op('Add', [scaled(g, q, kT), g.weight([1, H, L, L], 0.5)]);
      return g.op('MatMul', [softmax(g, multiplied(g, s, computedTriangle(g), -1e9, 'first')), v]);
    }),
    feeds: hidden,
  },
  {
    name: 'left: a multiplied mask that hides with -100',
    build: withMultiplied(computedTriangle, -100, 'Sub'),
    feeds: hidden,
    taken: 0,
    left: 'not a scaled and masked product',
  },
  {
    name: 'left: a multiplied mask of which nothing says that it is 0 or 1',
    build: (g) => {
      g.input('weights', ['batch', 1, 1, 'length']);
      withMultiplied(() => 'weights', -1e4, 'Add')(g);
    },
    feeds: (random) => ({
      ...hidden(random),
      weights: new ort.Tensor(
        'float32',
        Float32Array.from({ length: B * L }, () => random.uniform()),
        [B, 1, 1, L],
      ),
    }),
    taken: 0,
    left: 'not a scaled and masked product',
  },
];

const POSITIONS: Case[] = [
  ...[false, true].map(
    (isShifted): Case => ({
      name: `Conformer: content and position scores added, then scaled${isShifted ? ', positions shifted' : ''}`,
      ...(isShifted
        ? {
            exported: {
              models: 'XLNet, Conformer: (ac + bd) / sqrt(d)',
              exporter: TORCHSCRIPT,
              since: SINCE,
            },
          }
        : {}),
      build: (g) => {
        hideInput(g);
        input(g);
        const q = g.op('Reshape', [project(g, 'x'), g.ints([0, 0, H, D])]);
        const biased = () => g.op('Transpose', [g.op('Add', [q, g.weight([H, D], 0.5)])], { perm: [0, 2, 1, 3] });
        const content = g.op('MatMul', [biased(), heads(g, project(g, 'x'), H, [0, 2, 3, 1])]);
        const positions = g.weight([1, H, D, isShifted ? 2 * L - 1 : L], 0.5);
        const product = g.op('MatMul', [biased(), positions]);
        const sum = g.op('Add', [content, isShifted ? shiftedPositions(g, product) : product]);
        const scores = g.op('Div', [sum, g.scalar(Math.sqrt(D))]);
        const p = softmax(g, g.op('Where', ['hide', g.scalar(-1e9), scores]));
        finish(g, g.op('MatMul', [p, heads(g, project(g, 'x'))]));
      },
      feeds: hiding,
    }),
  ),
  {
    name: 'left: Transformer-XL, whose scores have heads last and a softmax over their second axis',
    exported: { models: 'Transformer-XL', exporter: TORCHSCRIPT, since: SINCE },
    build: (g) => {
      input(g);
      const [q, k, v] = [0, 1, 2].map(() => {
        const rows = g.op('Reshape', [project(g, 'x'), g.ints([0, 0, H, D])]);
        return g.op('Transpose', [rows], { perm: [1, 0, 2, 3] });
      }) as [string, string, string];
      const scores = g.op('Mul', [g.op('Einsum', [q, k], { equation: 'ibnd,jbnd->ijbn' }), g.scalar(scale)]);
      const p = g.op('Softmax', [scores], { axis: 1 });
      const o = g.op('Einsum', [p, v], { equation: 'ijbn,jbnd->ibnd' });
      finish(g, g.op('Transpose', [o], { perm: [1, 2, 0, 3] }));
    },
    feeds: hidden,
    taken: 0,
    left: 'softmax over an axis that is not the last',
  },
  {
    name: 'masks in one Sum',
    exported: {
      models: 'graphs whose additions an optimizer joined in a Sum',
      exporter: 'onnxoptimizer',
      since: SINCE,
    },
    build: block((g, q, kT, v) => {
      const causal = g.floats(
        [1, 1, L, L],
        causalBools(L, L).map((open) => (open === 1 ? 0 : LOWEST)),
      );
      return g.op('MatMul', [softmax(g, g.op('Sum', [g.weight([1, H, L, L], 1), scaled(g, q, kT), causal])), v]);
    }),
    feeds: hidden,
  },
];

/** `exp(x - max(x)) / sum`, with reductions as `reduce` writes them. */
const steps = (reduce: (g: GraphBuilder, opType: string, x: string) => string, isReciprocal = false) =>
  block((g, q, kT, v) => {
    const s = scaled(g, q, kT);
    const e = g.op('Exp', [g.op('Sub', [s, reduce(g, 'ReduceMax', s)])]);
    const sum = reduce(g, 'ReduceSum', e);
    const p = isReciprocal ? g.op('Mul', [e, g.op('Reciprocal', [sum])]) : g.op('Div', [e, sum]);
    return g.op('MatMul', [p, v]);
  });

/** Operator set 13 gives ReduceSum its axes as an input, 18 the others too. */
const reduced = (g: GraphBuilder, opType: string, x: string, axis: number, keepdims: number) =>
  opType === 'ReduceSum'
    ? g.op(opType, [x, g.ints([axis])], { keepdims })
    : g.op(opType, [x], { axes: [axis], keepdims });

const IN_STEPS: Case[] = [
  {
    name: 'a softmax in steps',
    exported: { models: 'JAX and Flax models, softmax in steps', exporter: 'jax2onnx', since: SINCE },
    build: steps((g, opType, x) => reduced(g, opType, x, -1, 1)),
    feeds: hidden,
  },
  {
    name: 'a softmax in steps: reductions without their axis, then Unsqueeze',
    exported: { models: 'TensorFlow Lite models, softmax in steps', exporter: 'tf2onnx', since: SINCE },
    build: steps((g, opType, x) => g.op('Unsqueeze', [reduced(g, opType, x, 3, 0), g.ints([3])]), true),
    feeds: hidden,
  },
  {
    name: 'a softmax in steps: broadcast_in_dim as Reshape and Expand',
    build: steps((g, opType, x) => {
      const rows = g.op('Reshape', [reduced(g, opType, x, 3, 0), g.ints([B, H, L, 1])]);
      return g.op('Identity', [g.op('Expand', [rows, g.ints([B, H, L, L])])]);
    }),
    feeds: hidden,
  },
  {
    name: 'left: a softmax in steps whose sum is over the queries',
    build: steps((g, opType, x) => {
      const rows = g.op('Reshape', [reduced(g, opType, x, 3, 0), g.ints([B, H, 1, L])]);
      return g.op('Identity', [rows]);
    }),
    feeds: hidden,
    taken: 0,
    left: 'a factor or fill value',
  },
];

export const TEXT_AND_SPEECH: readonly Case[] = [...FILLED, ...MULTIPLIED, ...POSITIONS, ...IN_STEPS];
