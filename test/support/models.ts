/** Models of a kind, with random weights, in the spelling of PyTorch's exporter. */
import type { GraphBuilder } from './graph-builder.ts';

export interface TransformerSize {
  readonly heads: number;
  readonly headDim: number;
  readonly blocks: number;
}

/** `[B,L,H*D]` to `[B,H,L,D]`, or to `[B,H,D,L]` with the last two of `perm` exchanged. */
function splitHeads(g: GraphBuilder, x: string, { heads, headDim }: TransformerSize, perm = [0, 2, 1, 3]): string {
  return g.op('Transpose', [g.op('Reshape', [x, g.ints([0, 0, heads, headDim])])], { perm });
}

function mergeHeads(g: GraphBuilder, x: string, width: number): string {
  return g.op('Reshape', [g.op('Transpose', [x], { perm: [0, 2, 1, 3] }), g.ints([0, 0, width])]);
}

function norm(g: GraphBuilder, x: string, width: number): string {
  const ones = g.floats([width], new Float32Array(width).fill(1));
  return g.op('LayerNormalization', [x, ones, g.floats([width], new Float32Array(width))], { axis: -1 });
}

/** Scaled-dot-product attention as `torch.onnx` writes it: the root of the scale on both sides. */
function attention(g: GraphBuilder, q: string, kT: string, v: string, headDim: number, mask?: string): string {
  const root = g.scalar(headDim ** -0.25);
  const scores = g.op('MatMul', [g.op('Mul', [q, root]), g.op('Mul', [kT, root])]);
  const masked = mask === undefined ? scores : g.op('Add', [scores, mask]);
  return g.op('MatMul', [g.op('Softmax', [masked], { axis: -1 }), v]);
}

/**
 * `[B,L,width]` attended to itself: projections packed into one, and attention in single operators, as timm is
 * exported.
 */
function packedAttention(g: GraphBuilder, x: string, { heads, headDim }: TransformerSize): string {
  const width = heads * headDim;
  const packed = g.op('Reshape', [g.linear(x, width, 3 * width), g.ints([0, 0, 3, heads, headDim])]);
  const parts = g.op('Transpose', [packed], { perm: [2, 0, 3, 1, 4] });
  const [q, k, v] = [0, 1, 2].map((i) => g.op('Gather', [parts, g.int(i)], { axis: 0 })) as [string, string, string];
  const kT = g.op('Transpose', [k], { perm: [0, 1, 3, 2] });
  return mergeHeads(g, attention(g, q, kT, v, headDim), width);
}

/** The same function as onnxruntime's optimizer writes it: three projections and one operator. */
function fusedAttention(g: GraphBuilder, x: string, { heads, headDim }: TransformerSize): string {
  const width = heads * headDim;
  const [q, k, v] = [0, 1, 2].map(() => g.linear(x, width, width)) as [string, string, string];
  return g.contrib('MultiHeadAttention', [q, k, v], { num_heads: heads });
}

/** How a model's attention is written: in single operators, or as the `MultiHeadAttention` of `com.microsoft`. */
export type AttentionSpelling = 'decomposed' | 'fused';

/**
 * A stack of diffusion transformer blocks (Peebles and Xie 2023, arXiv 2212.09748, adaLN-Zero): inputs `x`
 * `[batch,tokens,width]` and the conditioning `c` `[batch,width]`, output `y` like `x`.
 */
export function buildDiT(g: GraphBuilder, size: TransformerSize, spelling: AttentionSpelling = 'decomposed'): void {
  const { heads, headDim, blocks } = size;
  const width = heads * headDim;
  const attend = spelling === 'fused' ? fusedAttention : packedAttention;
  let x = g.input('x', ['batch', 'tokens', width]);
  const c = g.input('c', ['batch', width]);
  const active = g.op('Mul', [c, g.op('Sigmoid', [c])]);
  for (let block = 0; block < blocks; block++) {
    const six = g.op('Unsqueeze', [g.linear(active, width, 6 * width, 0.5), g.ints([1])]);
    const names = ['shift1', 'scale1', 'gate1', 'shift2', 'scale2', 'gate2'].map((name) => `${name}.${block}`);
    g.op('Split', [six, g.ints(new Array(6).fill(width))], { axis: 2 }, { outputs: names });
    const [shift1, scale1, gate1, shift2, scale2, gate2] = names as [string, string, string, string, string, string];
    const modulate = (value: string, shift: string, scale: string) =>
      g.op('Add', [g.op('Mul', [norm(g, value, width), g.op('Add', [scale, g.scalar(1)])]), shift]);
    const inner = modulate(x, shift1, scale1);
    const attended = g.linear(attend(g, inner, size), width, width);
    const middle = g.op('Add', [x, g.op('Mul', [gate1, attended])]);
    const hidden = g.linear(modulate(middle, shift2, scale2), width, 4 * width);
    const gelu = g.op('Mul', [hidden, g.op('Sigmoid', [g.op('Mul', [hidden, g.scalar(1.702)])])]);
    x = g.op('Add', [middle, g.op('Mul', [gate2, g.linear(gelu, 4 * width, width)])]);
  }
  g.op('Identity', [x], {}, { outputs: ['y'] });
  g.output('y', ['batch', 'tokens', width]);
}

/** A stack of vision transformer blocks (Dosovitskiy et al. 2020, arXiv 2010.11929): input `x` `[batch,tokens,width]`, output `y` like it. */
export function buildViT(g: GraphBuilder, size: TransformerSize & { readonly mlpRatio: number }): void {
  const { heads, headDim, blocks, mlpRatio } = size;
  const width = heads * headDim;
  let x = g.input('x', ['batch', 'tokens', width]);
  for (let block = 0; block < blocks; block++) {
    const attended = g.linear(packedAttention(g, norm(g, x, width), size), width, width);
    const middle = g.op('Add', [x, attended]);
    const hidden = g.linear(norm(g, middle, width), width, mlpRatio * width);
    const gelu = g.op('Mul', [hidden, g.op('Sigmoid', [g.op('Mul', [hidden, g.scalar(1.702)])])]);
    x = g.op('Add', [middle, g.linear(gelu, mlpRatio * width, width)]);
  }
  g.op('Identity', [x], {}, { outputs: ['y'] });
  g.output('y', ['batch', 'tokens', width]);
}

/**
 * A decoder with grouped key heads and a cache: inputs `x` `[batch,length,width]`, `mask` `[batch,1,length,total]`
 * (additive), `past_key.i` and `past_value.i` `[batch,kvHeads,past,headDim]`; outputs `y`, `present_key.i`,
 * `present_value.i`.
 */
export function buildDecoder(g: GraphBuilder, size: TransformerSize, kvHeads: number): void {
  const { heads, headDim, blocks } = size;
  const width = heads * headDim;
  const narrow: TransformerSize = { ...size, heads: kvHeads };
  let x = g.input('x', ['batch', 'length', width]);
  const mask = g.input('mask', ['batch', 1, 'length', 'total']);
  const repeat = (value: string) => {
    const shape = g.op('Shape', [value]);
    const [batch, length] = [0, 2].map((i) => g.op('Gather', [shape, g.ints([i])])) as [string, string];
    const target = (counts: string[]) => g.op('Concat', counts, { axis: 0 });
    const wide = target([batch, g.ints([kvHeads, heads / kvHeads]), length, g.ints([headDim])]);
    const expanded = g.op('Expand', [g.op('Unsqueeze', [value, g.ints([2])]), wide]);
    return g.op('Reshape', [expanded, target([batch, g.ints([heads]), length, g.ints([headDim])])]);
  };
  for (let block = 0; block < blocks; block++) {
    const inner = norm(g, x, width);
    const cached = (kind: 'key' | 'value') => {
      const past = g.input(`past_${kind}.${block}`, ['batch', kvHeads, 'past', headDim]);
      const now = splitHeads(g, g.linear(inner, width, kvHeads * headDim), narrow);
      const present = g.op('Concat', [past, now], { axis: 2 }, { outputs: [`present_${kind}.${block}`] });
      g.output(present, ['batch', kvHeads, 'total', headDim]);
      return repeat(present);
    };
    const q = splitHeads(g, g.linear(inner, width, width), size);
    const kT = g.op('Transpose', [cached('key')], { perm: [0, 1, 3, 2] });
    const attended = mergeHeads(g, attention(g, q, kT, cached('value'), headDim, mask), width);
    x = g.op('Add', [x, g.linear(attended, width, width)]);
  }
  g.op('Identity', [x], {}, { outputs: ['y'] });
  g.output('y', ['batch', 'length', width]);
}
