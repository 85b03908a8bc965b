/** Parts of graphs as exporters write them: projections, heads, and what stands around attention. */
import type { GraphBuilder } from '../../../../../test/support/graph-builder.ts';
import type { Random } from '../../../../../test/support/random.ts';
import { type Feeds, floats } from '../case.ts';

export const B = 2;
export const L = 10;
export const H = 3;
export const D = 16;
export const C = H * D;

export const hidden = (random: Random): Feeds => ({ x: floats(random, [B, L, C]) });

/** `[B,L,C]` to `[B,H,L,D]`. */
export const heads = (g: GraphBuilder, x: string, count = H, perm = [0, 2, 1, 3]) =>
  g.op('Transpose', [g.op('Reshape', [x, g.ints([0, 0, count, D])])], { perm });
export const merge = (g: GraphBuilder, o: string) =>
  g.op('Reshape', [g.op('Transpose', [o], { perm: [0, 2, 1, 3] }), g.ints([0, 0, C])]);
export const project = (g: GraphBuilder, x: string) => g.linear(x, C, C, 2);
export const finish = (g: GraphBuilder, o: string) => {
  g.op('Add', [g.linear(merge(g, o), C, C), 'x'], {}, { outputs: ['y'] });
  g.output('y', ['batch', 'length', C]);
};
export const input = (g: GraphBuilder) => g.input('x', ['batch', 'length', C]);

/** q, k, v projected and attention between them as `attend` writes it. */
export const block = (attend: (g: GraphBuilder, q: string, k: string, v: string) => string) => (g: GraphBuilder) => {
  const x = input(g);
  const [q, k, v] = [heads(g, project(g, x)), heads(g, project(g, x), H, [0, 2, 3, 1]), heads(g, project(g, x))];
  finish(g, attend(g, q as string, k as string, v as string));
};

export type Parts = [q: string, k: string, v: string];

/** Attention of `[B,H,L,D]` to itself. */
export const attendTo = (g: GraphBuilder, [q, k, v]: Parts) => {
  const scores = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 1, 3, 2] })]);
  return g.op('MatMul', [g.op('Softmax', [g.op('Mul', [scores, g.scalar(scale)])], { axis: -1 }), v]);
};

/** `sqrt(1 / sqrt(D))` from the shape, as PyTorch's TorchScript exporter writes it for a dynamic head dim. */
export const dynamicRootScale = (g: GraphBuilder, q: string) => {
  const size = g.op('Slice', [g.op('Shape', [q]), g.ints([-1]), g.ints([2 ** 31 - 1]), g.ints([0])]);
  const root = g.op('Sqrt', [g.op('Cast', [size], { to: 1 })]);
  return g.op('Sqrt', [g.op('Div', [g.scalar(1), root])]);
};
export const causalBools = (rows: number, columns: number) =>
  Array.from({ length: rows * columns }, (_, i) => (i % columns <= Math.floor(i / columns) ? 1 : 0));
export const scale = 1 / Math.sqrt(D);
export const LOWEST = -3.4028234663852886e38;
