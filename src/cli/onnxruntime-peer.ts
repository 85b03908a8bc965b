/**
 * onnxruntime-web's float32 attention on WebAssembly, as a measure of speed beside SageAttention's. Used where the
 * package is installed.
 */
import { availableParallelism } from 'node:os';
import type * as OnnxRuntime from 'onnxruntime-web';
import { attentionModel } from '../measure/onnx-attention-model.ts';
import { importOptional } from '../optional-package.ts';
import { type AttentionCall, messageOf, type Tensor, toFloat32 } from './library.ts';

export interface Peer {
  readonly threads: number;
  /** A function that runs one attention, and answers when it is done. Rejects with the engine's reason. */
  prepare(call: Pick<AttentionCall, 'q' | 'k' | 'v' | 'attnMask'>): Promise<() => Promise<void>>;
}

/** None where onnxruntime-web is not installed. */
export async function openPeer(): Promise<Peer | undefined> {
  let ort: typeof OnnxRuntime;
  try {
    ort = (await importOptional('onnxruntime-web')) as typeof OnnxRuntime;
  } catch {
    return undefined;
  }
  const threads = availableParallelism();
  ort.env.wasm.numThreads = threads;
  // What goes wrong is reported by the exception; the engine's own log would repeat it.
  ort.env.logLevel = 'fatal';

  async function prepare({ q, k, v, attnMask }: Parameters<Peer['prepare']>[0]): Promise<() => Promise<void>> {
    const [batch, length, heads, headDim] = q.shape as [number, number, number, number];
    const input = (view: Tensor) => new ort.Tensor('float32', toFloat32(view), [batch, length, heads * headDim]);
    const feeds: Record<string, OnnxRuntime.Tensor> = { q: input(q), k: input(k), v: input(v) };
    if (attnMask !== undefined) {
      // The engine broadcasts over heads, not over queries.
      const strides = [attnMask.strides[0] as number, 0, 0, attnMask.strides[3] as number];
      const shape = [batch, 1, length, length];
      feeds.bias = new ort.Tensor('float32', toFloat32({ ...attnMask, shape, strides }), shape);
    }
    const session = await ort.InferenceSession.create(attentionModel(heads, { withBias: attnMask !== undefined }), {
      executionProviders: ['wasm'],
      logSeverityLevel: 4,
    });
    return async () => {
      await session.run(feeds);
    };
  }
  return { threads, prepare };
}

/** The part of an engine's error message that fits into a table. */
export const failureOf = (error: unknown): string =>
  /SafeInt|overflow/i.test(messageOf(error)) ? 'fails: integer overflow' : 'fails';
