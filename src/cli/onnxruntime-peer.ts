/**
 * onnxruntime-web's float32 attention on WebAssembly, as a measure of speed beside SageAttention's. Used where the package
 * is installed.
 */
import { availableParallelism } from 'node:os';
import type * as OnnxRuntime from 'onnxruntime-web';
import { messageOf } from './errors.ts';
import { type AttentionCall, type Tensor, toFloat32 } from './library.ts';

/** Wire format of protocol buffers: varints, and fields with their number and type in front. */
const varint = (value: number): number[] =>
  value < 128 ? [value] : [(value % 128) + 128, ...varint(Math.floor(value / 128))];
const message = (field: number, ...parts: readonly (readonly number[])[]): number[] => {
  const bytes = parts.flat();
  return [...varint(field * 8 + 2), ...varint(bytes.length), ...bytes];
};
const text = (field: number, value: string) => message(field, [...new TextEncoder().encode(value)]);
const int = (field: number, value: number) => [...varint(field * 8), ...varint(value)];

const FLOAT = 1;
const ATTRIBUTE_INT = 2;

/** ONNX ValueInfoProto of a float32 tensor with free dimensions. */
const value = (name: string, dimensions: readonly string[]): number[][] => [
  text(1, name),
  message(2, message(1, int(1, FLOAT), message(2, ...dimensions.map((dimension) => message(1, text(2, dimension)))))),
];

/** An ONNX model of one `com.microsoft.MultiHeadAttention`: q, k, v `[B,L,H*D]`, and if asked for a bias `[B,1,L,L]`. */
function attentionModel(heads: number, withBias: boolean): Uint8Array {
  const inputs = ['q', 'k', 'v'];
  // Inputs four and five, a projection bias and a key padding mask, are left empty.
  const names = withBias ? [...inputs, '', '', 'bias'] : inputs;
  const node = message(
    1,
    ...names.map((name) => text(1, name)),
    text(2, 'output'),
    text(4, 'MultiHeadAttention'),
    message(5, text(1, 'num_heads'), int(3, heads), int(20, ATTRIBUTE_INT)),
    text(7, 'com.microsoft'),
  );
  const graph = message(
    7,
    node,
    text(2, 'attention'),
    ...inputs.map((name) => message(11, ...value(name, ['batch', 'length', 'width']))),
    ...(withBias ? [message(11, ...value('bias', ['batch', 'one', 'length', 'keys']))] : []),
    message(12, ...value('output', ['batch', 'length', 'width'])),
  );
  const operators = (domain: string, version: number) => message(8, text(1, domain), int(2, version));
  return Uint8Array.from([...int(1, 8), ...graph, ...operators('', 17), ...operators('com.microsoft', 1)]);
}

export interface Peer {
  readonly threads: number;
  /** A function that runs one attention, and answers when it is done. Rejects with the engine's reason. */
  prepare(call: AttentionCall): Promise<() => Promise<void>>;
}

/** None where onnxruntime-web is not installed. */
export async function openPeer(): Promise<Peer | undefined> {
  const name = 'onnxruntime-web';
  let ort: typeof OnnxRuntime;
  try {
    ort = await import(/* @vite-ignore */ name);
  } catch {
    return undefined;
  }
  const threads = availableParallelism();
  ort.env.wasm.numThreads = threads;
  // What goes wrong is reported by the exception; the engine's own log would repeat it.
  ort.env.logLevel = 'fatal';

  async function prepare({ q, k, v, attnMask }: AttentionCall): Promise<() => Promise<void>> {
    const [batch, length, heads, headDim] = q.shape as [number, number, number, number];
    const input = (view: Tensor) => new ort.Tensor('float32', toFloat32(view), [batch, length, heads * headDim]);
    const feeds: Record<string, OnnxRuntime.Tensor> = { q: input(q), k: input(k), v: input(v) };
    if (attnMask !== undefined) {
      // The engine broadcasts over heads, not over queries.
      const strides = [attnMask.strides[0] as number, 0, 0, attnMask.strides[3] as number];
      const shape = [batch, 1, length, length];
      feeds.bias = new ort.Tensor('float32', toFloat32({ ...attnMask, shape, strides }), shape);
    }
    const session = await ort.InferenceSession.create(attentionModel(heads, attnMask !== undefined), {
      executionProviders: ['wasm'],
      logSeverityLevel: 4,
    });
    return async () => {
      await session.run(feeds);
    };
  }
  return { threads, prepare };
}

/** Of an engine's failure the part that a table has room for. */
export const failureOf = (error: unknown): string =>
  /SafeInt|overflow/i.test(messageOf(error)) ? 'integer overflow' : 'failed';
