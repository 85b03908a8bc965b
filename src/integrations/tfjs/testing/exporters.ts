/** Topologies as converters write real models: what the tests run, and what the documentation's table is made of. */
import type { TopologyBuilder } from './topology-builder.ts';

export interface ExportedTopology {
  readonly models: string;
  readonly exporter: string;
  /** Attentions that our kernels compute when it runs; default 1. */
  readonly calls?: number;
  /** Builds it; gives the names of its outputs. */
  readonly build: (g: TopologyBuilder) => readonly string[];
}

/** q `[...batch,5,8]`, k `[...batch,7,8]` and v `[...batch,7,4]`. */
const operands = (g: TopologyBuilder, ...batch: number[]) =>
  [g.input([...batch, 5, 8]), g.input([...batch, 7, 8]), g.input([...batch, 7, 4])] as const;

export const EXPORTED: readonly ExportedTopology[] = [
  {
    models: 'Keras `MultiHeadAttention`: the products by Einsum',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = [g.input([2, 5, 3, 8]), g.input([2, 7, 3, 8]), g.input([2, 7, 3, 8])];
      const scores = g.node('Einsum', [k, g.node('Mul', [q, g.scalar(0.3)])], { equation: 'aecd,abcd->acbe' });
      const p = g.node('Softmax', [g.node('AddV2', [scores, g.input([2, 1, 5, 7])])]);
      return [g.node('Einsum', [p, v], { equation: 'acbe,aecd->abcd' })];
    },
  },
  {
    models: 'BERT and its relatives in TensorFlow',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = operands(g, 2, 3);
      const scores = g.node('RealDiv', [g.node('BatchMatMulV2', [q, k], { adj_y: true }), g.scalar(2.8)]);
      const p = g.node('Softmax', [g.node('AddV2', [scores, g.input([2, 1, 1, 7])])]);
      return [g.node('BatchMatMulV2', [p, v])];
    },
  },
  {
    models: 'TensorFlow 1: a softmax over rows that the shape of the scores flattens',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = operands(g, 2, 3);
      const scores = g.node('Add', [g.node('BatchMatMul', [q, k], { adj_y: true }), g.input([2, 1, 1, 7])]);
      const shape = g.node('Shape', [scores]);
      const last = g.node('Slice', [shape, g.shape([3]), g.shape([1])]);
      const rows = g.node('Reshape', [scores, g.node('ConcatV2', [g.shape([-1]), last, g.integer(0)])]);
      return [g.node('BatchMatMul', [g.node('Reshape', [g.node('Softmax', [rows]), shape]), v])];
    },
  },
  {
    models: 'BART, Whisper: heads folded into the batch, unfolded for the mask',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = operands(g, 6);
      const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
      const unfolded = g.node('Reshape', [scores, g.shape([2, 3, 5, 7])]);
      const masked = g.node('AddV2', [unfolded, g.input([2, 1, 1, 7])]);
      const folded = g.node('Reshape', [masked, g.shape([-1, 5, 7])]);
      return [g.node('BatchMatMulV2', [g.node('Softmax', [folded]), v])];
    },
  },
  {
    models: 'Swin: windows with a mask each',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = [g.input([8, 3, 6, 8]), g.input([8, 3, 6, 8]), g.input([8, 3, 6, 4])];
      const scores = g.node('BatchMatMulV2', [g.node('Mul', [q, g.scalar(0.35)]), k], { adj_y: true });
      const biased = g.node('AddV2', [scores, g.constant([1, 3, 6, 6])]);
      const windows = g.node('Reshape', [biased, g.shape([2, 4, 3, 6, 6])]);
      const masked = g.node('AddV2', [windows, g.constant([1, 4, 1, 6, 6])]);
      const back = g.node('Reshape', [masked, g.shape([-1, 3, 6, 6])]);
      return [g.node('BatchMatMulV2', [g.node('Softmax', [back]), v])];
    },
  },
  {
    models: 'a mask by `tf.where`',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = operands(g, 2, 3);
      const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
      const condition = g.node('Greater', [g.input([2, 1, 5, 7]), g.scalar(-0.7)]);
      const p = g.node('Softmax', [g.node('SelectV2', [condition, scores, g.scalar(-1e9)])]);
      return [g.node('BatchMatMulV2', [p, v])];
    },
  },
  {
    models: 'JAX and Flax models, softmax in steps',
    exporter: 'jax2tf',
    build: (g) => {
      const [q, k, v] = operands(g, 2, 3);
      const scores = g.node('Mul', [g.node('BatchMatMulV2', [q, k], { adj_y: true }), g.scalar(0.3)]);
      const max = g.node('Max', [scores, g.shape([-1])], { keep_dims: true });
      const e = g.node('Exp', [g.node('Sub', [scores, max])]);
      const p = g.node('RealDiv', [e, g.node('Sum', [e, g.shape([-1])], { keep_dims: true })]);
      return [g.node('BatchMatMulV2', [p, v])];
    },
  },
  {
    models: 'YOLO: values times transposed probabilities',
    exporter: 'tensorflowjs_converter',
    build: (g) => {
      const [q, k, v] = [g.input([2, 3, 8, 5]), g.input([2, 3, 8, 7]), g.input([2, 3, 4, 7])];
      const scores = g.node('Mul', [g.node('BatchMatMulV2', [q, k], { adj_x: true }), g.scalar(0.3)]);
      return [g.node('BatchMatMulV2', [v, g.node('Softmax', [scores])], { adj_y: true })];
    },
  },
  {
    models: 'ViTDet, SAM: positions added to the two axes of an image',
    exporter: 'tensorflowjs_converter',
    calls: 0,
    build: (g) => {
      const [q, k, v] = [g.input([2, 12, 8]), g.input([2, 12, 8]), g.input([2, 12, 4])];
      const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
      const image = g.node('Reshape', [scores, g.shape([2, 3, 4, 3, 4])]);
      const rows = g.node('AddV2', [image, g.input([2, 3, 4, 3, 1])]);
      const flat = g.node('Reshape', [g.node('AddV2', [rows, g.input([2, 3, 4, 1, 4])]), g.shape([2, 12, 12])]);
      return [g.node('BatchMatMulV2', [g.node('Softmax', [flat]), v])];
    },
  },
  {
    models: 'autoencoders of diffusion models: one head of 512 channels',
    exporter: 'tensorflowjs_converter',
    calls: 0,
    build: (g) => {
      const [q, k, v] = [g.input([1, 4, 512]), g.input([1, 4, 512]), g.input([1, 4, 512])];
      const scores = g.node('Mul', [g.node('BatchMatMulV2', [q, k], { adj_y: true }), g.scalar(512 ** -0.5)]);
      return [g.node('BatchMatMulV2', [g.node('Softmax', [scores]), v])];
    },
  },
];
