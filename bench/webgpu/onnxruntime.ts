/** onnxruntime's own WebGPU attention on the same device: MultiHeadAttention, float16. */

import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';

export interface AttentionSize {
  readonly heads: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly isCausal: boolean;
}

/** A chain of attentions: each one's output is the next one's query. */
function chainModel({ heads, tokens, headDim, isCausal }: AttentionSize, operators: number): Uint8Array {
  const builder = new GraphBuilder(new Random(1), 'float16');
  const dims = [1, tokens, heads * headDim];
  const [query, key, value] = ['query', 'key', 'value'].map((name) => builder.input(name, dims)) as [
    string,
    string,
    string,
  ];
  let last = query;
  for (let i = 0; i < operators; i++) {
    last = builder.contrib('MultiHeadAttention', [last, key, value], {
      num_heads: heads,
      unidirectional: isCausal ? 1 : 0,
    });
  }
  builder.output(last, dims);
  return builder.build();
}

/** Operators of the short and of the long chain. */
const CHAINS = [1, 5] as const;
const WARM_UPS = 4;
const LEAST_REPETITIONS = 5;

/**
 * Milliseconds of one operator: the difference between a long and a short chain, since copies and the way through the
 * session dominate a single call. Inputs and outputs stay on the GPU.
 *
 * @param buffers `[1,L,H*D]` float16
 * @param budget milliseconds to spend; at least five runs of each chain
 */
export async function onnxruntimeMilliseconds(
  device: GPUDevice,
  size: AttentionSize,
  buffers: Readonly<Record<'query' | 'key' | 'value', GPUBuffer>>,
  budget: number,
): Promise<number> {
  const ort = await import('onnxruntime-web/webgpu');
  ort.env.logLevel = 'error';
  // With worker threads the WebGPU build waits for itself in Node.
  ort.env.wasm.numThreads = 1;
  const dims = [1, size.tokens, size.heads * size.headDim];
  const feeds = Object.fromEntries(
    Object.entries(buffers).map(([name, gpuBuffer]) => [
      name,
      ort.Tensor.fromGpuBuffer(gpuBuffer, { dataType: 'float16', dims }),
    ]),
  );
  const create = (operators: number) =>
    ort.InferenceSession.create(chainModel(size, operators), {
      executionProviders: [{ name: 'webgpu', device } as never],
      preferredOutputLocation: 'gpu-buffer',
    });
  // One after the other: onnxruntime refuses to create two sessions at once.
  const sessions = [await create(CHAINS[0]), await create(CHAINS[1])];
  const timed = async (session: (typeof sessions)[number]) => {
    const started = performance.now();
    const results = await session.run(feeds);
    await device.queue.onSubmittedWorkDone();
    const elapsed = performance.now() - started;
    for (const result of Object.values(results)) result.dispose();
    return elapsed;
  };
  const times = sessions.map((): number[] => []);
  let spent = 0;
  // The chains take turns; the first runs compile and raise the GPU's clocks.
  for (let i = -WARM_UPS; i < LEAST_REPETITIONS || spent < budget; i++) {
    for (const [index, session] of sessions.entries()) {
      const elapsed = await timed(session);
      if (i < 0) continue;
      times[index]?.push(elapsed);
      spent += elapsed;
    }
  }
  for (const session of sessions) await session.release();
  const [short, long] = times.map(median) as [number, number];
  return (long - short) / (CHAINS[1] - CHAINS[0]);
}
