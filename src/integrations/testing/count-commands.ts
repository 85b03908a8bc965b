/** What onnxruntime-web records for one run of a model, with and without markers: the same in Node and in a browser. */

import { GraphBuilder } from '../../../test/support/graph-builder.ts';
import { buildDiT } from '../../../test/support/models.ts';
import { Random } from '../../../test/support/random.ts';
import { type Accuracy, compare } from '../../reference/metrics.ts';
import { attentionReportOf, withSageAttention } from '../onnxruntime/index.ts';
import type { OrtTensor } from '../onnxruntime/ort.ts';

export interface Commands {
  readonly dispatches: number;
  readonly clears: number;
  readonly passes: number;
  readonly submits: number;
}

type Method = (...args: never[]) => unknown;

/** Calls `seen` with what a method of one object returned. */
function after<T extends object, N extends keyof T>(target: T, name: N, seen: (result: unknown) => void): void {
  const original = (target[name] as Method).bind(target) as (...args: unknown[]) => unknown;
  const value = (...args: unknown[]) => {
    const result = original(...args);
    seen(result);
    return result;
  };
  Object.defineProperty(target, name, { value, configurable: true, writable: true });
}

/** Counts from now on; each call of what it gives starts again. Call it before sessions are opened on the device. */
export function countCommands(device: GPUDevice): () => Commands {
  const none = { dispatches: 0, clears: 0, passes: 0, submits: 0 };
  let count = { ...none };
  after(device, 'createCommandEncoder', (made) => {
    const encoder = made as GPUCommandEncoder;
    after(encoder, 'clearBuffer', () => void count.clears++);
    after(encoder, 'beginComputePass', (begun) => {
      count.passes++;
      after(begun as GPUComputePassEncoder, 'dispatchWorkgroups', () => void count.dispatches++);
    });
  });
  after(device.queue, 'submit', () => void count.submits++);
  return () => {
    const counted = count;
    count = { ...none };
    return counted;
  };
}

const SIZE = { heads: 2, headDim: 72, blocks: 2 };
const WIDTH = SIZE.heads * SIZE.headDim;
const TOKENS = 64;

/**
 * Of a run, input and output on the CPU. A marker puts three dispatches in the place of two; a cut clears every value that it hands over, each of
 * which ends a pass. Where an onnxruntime records otherwise, marker beside whole is what must stay: no more clears, passes and submits.
 */
export const EXPECTED_COMMANDS: Readonly<Record<'whole' | 'marker', Commands>> = {
  whole: { dispatches: 59, clears: 29, passes: 19, submits: 6 },
  marker: { dispatches: 61, clears: 19, passes: 15, submits: 6 },
};

export interface CountedRuns {
  /** Of a run when all is warm. */
  readonly whole: Commands;
  readonly marker: Commands;
  readonly cut: Commands;
  readonly paths: readonly (string | undefined)[];
  /** Markers and pieces give the same bits. */
  readonly isSame: boolean;
  /** Of markers, beside onnxruntime on a CPU: on software Vulkan its own attention is no oracle. */
  readonly accuracy: Accuracy;
}

/** A diffusion transformer of two blocks, attention as one operator, on a device that nothing else uses. */
export async function countRuns(
  ort: typeof import('onnxruntime-web/webgpu'),
  device: GPUDevice,
  seed: number,
): Promise<CountedRuns> {
  const commands = countCommands(device);
  const g = new GraphBuilder(new Random(seed));
  buildDiT(g, SIZE, 'fused');
  const bytes = g.build();
  const random = new Random(seed + 1);
  const feeds = {
    x: new ort.Tensor('float32', random.normals(TOKENS * WIDTH), [1, TOKENS, WIDTH]),
    c: new ort.Tensor('float32', random.normals(WIDTH), [1, WIDTH]),
  };
  const cpu = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
  const exact = ((await cpu.run(feeds)) as unknown as { y: OrtTensor }).y.data as Float32Array;
  await cpu.release();
  const options = { executionProviders: [{ name: 'webgpu', device }], logSeverityLevel: 3 } as const;
  const openings = {
    whole: () => ort.InferenceSession.create(bytes, options),
    marker: () => withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes, options),
    cut: () => withSageAttention(ort, { minTokens: 0, markers: false }).InferenceSession.create(bytes, options),
  };
  const counts: Partial<Record<keyof typeof openings, Commands>> = {};
  const outputs: Partial<Record<keyof typeof openings, number[]>> = {};
  let paths: CountedRuns['paths'] = [];
  for (const name of ['whole', 'marker', 'cut'] as const) {
    const session = await openings[name]();
    for (let run = 0; run < 2; run++) {
      commands();
      const { y } = (await session.run(feeds)) as unknown as { y: OrtTensor };
      outputs[name] = [...(y.data as Float32Array)];
    }
    counts[name] = commands();
    if (name === 'marker') paths = attentionReportOf(session)?.map(({ path }) => path) ?? [];
    await session.release();
  }
  const { marker = [], cut = [] } = outputs;
  const isSame = marker.length === cut.length && marker.every((value, i) => Object.is(value, cut[i]));
  return {
    ...(counts as Record<keyof typeof openings, Commands>),
    paths,
    isSame,
    accuracy: compare(Float32Array.from(marker), exact),
  };
}
