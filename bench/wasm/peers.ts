/** The engines that the WASM backend is measured against: ONNX Runtime's MultiHeadAttention, float32. */

import { Random } from '../../src/measure/random.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';

/** One attention over fixed operands, `[B,Lq,H,D]` and `[B,Lk,H,D]`; the result is the output in the same layout. */
export interface Contender {
  readonly name: string;
  run(): Promise<Float32Array>;
  release(): Promise<void>;
}

export interface Operands {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly batch: number;
  readonly heads: number;
  /** Of k and v. */
  readonly tokens: number;
  /** Of q; default: as many. */
  readonly queries?: number;
  readonly headDim: number;
}

/** A model of one node. */
function attentionModel({ batch, heads, tokens, queries = tokens, headDim }: Operands): Uint8Array {
  const builder = new GraphBuilder(new Random(1));
  const dims = [batch, queries, heads * headDim];
  const keyDims = [batch, tokens, heads * headDim];
  const inputs = [builder.input('query', dims), builder.input('key', keyDims), builder.input('value', keyDims)];
  const output = builder.contrib('MultiHeadAttention', inputs, { num_heads: heads });
  builder.output(output, dims);
  return builder.build();
}

type Ort = typeof import('onnxruntime-web');

async function contender(name: string, ort: Ort, operands: Operands, session: object): Promise<Contender> {
  const { q, k, v, batch, heads, headDim } = operands;
  const created = await ort.InferenceSession.create(attentionModel(operands), session);
  const feed = (tensor: Tensor) =>
    new ort.Tensor('float32', tensor.data as Float32Array, [batch, tensor.shape[1] as number, heads * headDim]);
  const feeds = { query: feed(q), key: feed(k), value: feed(v) };
  const output = created.outputNames[0] as string;
  return {
    name,
    run: async () => (await created.run(feeds))[output]?.data as Float32Array,
    release: () => created.release(),
  };
}

/** onnxruntime-web on its WASM backend. Its number of threads is settled by the first session of the process. */
export async function ortWeb(operands: Operands, threads: number): Promise<Contender> {
  const ort = await import('onnxruntime-web');
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = 'fatal';
  return contender('onnxruntime-web (WASM, f32)', ort, operands, { executionProviders: ['wasm'] });
}

/** onnxruntime-node: native code with the vector instructions of the processor. */
export async function ortNode(operands: Operands, threads: number): Promise<Contender> {
  const ort = (await import('onnxruntime-node')) as unknown as Ort;
  return contender('onnxruntime-node (native, f32)', ort, operands, {
    executionProviders: ['cpu'],
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
  });
}
