/** The part of `trained-models.ts` that runs the model: in Node and in a page alike. */
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { setBackend } from '../../src/index.ts';
import { type SageAttentionOptions, withSageAttention } from '../../src/integrations/onnxruntime/index.ts';
import { median } from '../../src/measure/statistics.ts';

export const VARIANTS = ['without', 'with'] as const;
export type Variant = (typeof VARIANTS)[number];

export interface Feed {
  /** Default: the model's first. */
  readonly name?: string;
  readonly type: 'int64' | 'float32';
  readonly dims: readonly number[];
  readonly data: readonly number[];
}

export interface Job {
  /** Name of the model's file. */
  readonly model: string;
  /** Default: the model's first. */
  readonly output?: string;
  /** `classes`: of the output's last dimension only which is largest. */
  readonly reduce: 'values' | 'classes';
  /** The input that is timed. */
  readonly input: readonly Feed[];
  /** Inputs that the task needs besides, run once. */
  readonly others: readonly (readonly Feed[])[];
  readonly threads: number;
  /** In turns. */
  readonly variants: readonly Variant[];
  readonly runs: number;
  readonly options: SageAttentionOptions;
}

export interface Outcome {
  readonly variant: Variant;
  /** Medians: wall clock, and the time that all threads spent. */
  readonly milliseconds: number;
  readonly processorMilliseconds: number;
  /** Of the timed input, then of the others. */
  readonly outputs: readonly (readonly number[])[];
  /** Attentions that this package computes, of those found. */
  readonly taken: number;
  readonly found: number;
}

export interface Result {
  readonly outcomes: readonly Outcome[];
  /** Size of all WebAssembly memories together: they never shrink, so that this is the most that was used. */
  readonly wasmMiB: number;
}

const memories: WebAssembly.Memory[] = [];

/** Before an engine is loaded: counts the memories that it makes. */
export function watchMemories(): void {
  WebAssembly.Memory = class extends WebAssembly.Memory {
    constructor(descriptor: WebAssembly.MemoryDescriptor) {
      super(descriptor);
      // A probe has a page or two.
      if (descriptor.initial > 2) memories.push(this);
    }
  };
}

type Ort = typeof import('onnxruntime-web');

function tensorOf(ort: Ort, { type, dims, data }: Feed): InstanceType<Ort['Tensor']> {
  return type === 'int64'
    ? new ort.Tensor('int64', BigInt64Array.from(data, BigInt), dims)
    : new ort.Tensor('float32', Float32Array.from(data), dims);
}

function largest(values: Float32Array, classes: number): number[] {
  return Array.from({ length: values.length / classes }, (_, row) => {
    const part = values.subarray(row * classes, (row + 1) * classes);
    return part.reduce((best, value, i) => (value > (part[best] as number) ? i : best), 0);
  });
}

const WARM_UPS = 2;

/** @param processorTime milliseconds that all threads have spent so far */
export async function run(
  ort: Ort,
  bytes: Uint8Array,
  job: Job,
  processorTime: () => number | Promise<number>,
): Promise<Result> {
  ort.env.wasm.numThreads = job.threads;
  await setBackend(createWasmBackend({ threads: job.threads }));
  const engines = { without: ort, with: withSageAttention(ort, job.options) } as const;
  const feedsOf = (feeds: readonly Feed[], first = '') =>
    Object.fromEntries(feeds.map((feed) => [feed.name ?? first, tensorOf(ort, feed)]));
  const contestants = await Promise.all(
    job.variants.map(async (variant) => ({
      variant,
      session: await engines[variant].InferenceSession.create(bytes, { executionProviders: ['wasm'] }),
      wall: [] as number[],
      processor: [] as number[],
      outputs: [] as number[][],
    })),
  );
  const [{ session: model }] = contestants as [(typeof contestants)[number]];
  const input = feedsOf(job.input, model.inputNames[0]);
  const name = job.output ?? (model.outputNames[0] as string);
  for (let i = -WARM_UPS; i < job.runs; i++) {
    for (const { session, wall, processor, outputs } of contestants) {
      const spent = await processorTime();
      const start = performance.now();
      const { [name]: output } = await session.run(input, [name]);
      if (i >= 0) wall.push(performance.now() - start);
      const used = (await processorTime()) - spent;
      if (i >= 0) processor.push(used);
      outputs[0] = reduced(output, job.reduce);
    }
  }
  for (const { session, outputs } of contestants) {
    for (const other of job.others) {
      const { [name]: output } = await session.run(feedsOf(other), [name]);
      outputs.push(reduced(output, job.reduce));
    }
  }
  const outcomes = contestants.map(({ variant, session, wall, processor, outputs }): Outcome => {
    const report = 'sageAttention' in session ? (session.sageAttention as readonly { taken: boolean }[]) : [];
    return {
      variant,
      milliseconds: median(wall),
      processorMilliseconds: median(processor),
      outputs,
      taken: report.filter(({ taken }) => taken).length,
      found: report.length,
    };
  });
  return { outcomes, wasmMiB: memories.reduce((sum, { buffer }) => sum + buffer.byteLength, 0) / 2 ** 20 };
}

function reduced(output: InstanceType<Ort['Tensor']> | undefined, how: Job['reduce']): number[] {
  if (output === undefined) throw new Error('the model has no such output');
  const values = output.data as Float32Array;
  return how === 'values' ? [...values] : largest(values, output.dims.at(-1) as number);
}
