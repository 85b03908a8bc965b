/** The worker of sections 1 and 3: what this device can run, whether it computes, and how fast. */
import * as Comlink from 'comlink';
import { accuracyOnRows, sampleRows } from '../../src/cli/exact.ts';
import { randomInputs } from '../../src/cli/inputs.ts';
import { median } from '../../src/cli/statistics.ts';
import { type Availability, getBackend, type KernelDescriptor, type Tensor, transpose } from '../../src/index.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import type { CheckResult } from '../self-check.ts';
import { BROWSER_BACKENDS, type BrowserBackend, loseDevice, survivingLoss, useBrowserBackends } from './backends.ts';
import { type BenchInputs, type Contestant, contestants, type Ready } from './contestants.ts';

const ready = useBrowserBackends();

export interface BackendReport {
  readonly name: BrowserBackend;
  readonly availability: Availability;
  readonly kernels: readonly Pick<KernelDescriptor, 'name' | 'summary'>[];
}

export interface DeviceReport {
  /** Where tensors of the CPU go by default. */
  readonly chosen: BrowserBackend;
  readonly backends: readonly BackendReport[];
  readonly crossOriginIsolated: boolean;
  readonly processors: number;
}

export interface BenchConfig {
  readonly contestants: readonly string[];
  readonly lengths: readonly number[];
  readonly heads: number;
  readonly headDim: number;
  readonly isCausal: boolean;
}

export interface Measurement {
  readonly contestant: string;
  readonly label: string;
  readonly kind: Contestant['kind'];
  readonly where: BrowserBackend;
  readonly length: number;
  /** Of a call, milliseconds. */
  readonly medianMs?: number;
  readonly calls?: number;
  /** 4 H L^2 D a second, halved when causal. */
  readonly flops?: number;
  /** On some query rows, against exact attention in float64. */
  readonly relativeL1?: number;
  /** Why there are no figures. */
  readonly failure?: string;
}

export interface BenchProgress {
  readonly done: number;
  readonly total: number;
  readonly doing: string;
  readonly measurement?: Measurement;
}

/** A contestant is measured this long, at least {@link LEAST_SAMPLES} times. */
const MEASURE_MS = 400;
const LEAST_SAMPLES = 3;
const MOST_SAMPLES = 60;
/** Calls submitted together to a GPU, so that waiting for it is not what is measured. */
const MOST_TOGETHER = 16;
/** A call that is expected to take longer is left out. Systems take a GPU away from a program that blocks it for seconds. */
const LONGEST_CALL_MS = { webgpu: 2_000, wasm: 15_000 } as const satisfies Record<BrowserBackend, number>;
const ACCURACY_ROWS = 64;

let stop = new AbortController();

async function available(): Promise<BrowserBackend[]> {
  await ready;
  const found: BrowserBackend[] = [];
  for (const name of BROWSER_BACKENDS) {
    if ((await (await getBackend(name)).availability()).available) found.push(name);
  }
  return found;
}

/** Milliseconds of a call, each sample the mean of calls that were submitted together. */
async function timeCalls(contestant: Ready, signal: AbortSignal): Promise<{ medianMs: number; calls: number }> {
  const sample = async (together: number) => {
    const start = performance.now();
    for (let i = 0; i < together; i++) await contestant.run(signal);
    await contestant.finish();
    return (performance.now() - start) / together;
  };
  // The first call compiles and starts workers, the second tells how many fit into the time.
  await sample(1);
  const first = await sample(1);
  const together = Math.max(1, Math.min(MOST_TOGETHER, Math.floor(MEASURE_MS / LEAST_SAMPLES / first)));
  const samples: number[] = [];
  const start = performance.now();
  while (samples.length < LEAST_SAMPLES || (performance.now() - start < MEASURE_MS && samples.length < MOST_SAMPLES)) {
    samples.push(await sample(together));
    signal.throwIfAborted();
  }
  return { medianMs: median(samples), calls: samples.length * together };
}

function benchInputs({ heads, headDim, isCausal }: BenchConfig, length: number): BenchInputs {
  const { q, k, v } = randomInputs({ batch: 1, heads, kvHeads: heads, length, headDim }, 'float32', 1);
  const nhd = (view: Tensor) => tensor(toFloat32(transpose(view, [0, 2, 1, 3])), [1, length, heads, headDim]);
  return { q: nhd(q), k: nhd(k), v: nhd(v), isCausal };
}

async function measure(contestant: Contestant, inputs: BenchInputs, signal: AbortSignal) {
  const prepared = await contestant.prepare(inputs);
  try {
    const [, length = 0, heads = 0, dim = 0] = inputs.q.shape;
    const times = await timeCalls(prepared, signal);
    const output = await prepared.output(signal);
    const { relativeL1 } = await accuracyOnRows(
      { ...inputs, tensorLayout: 'NHD' },
      output,
      sampleRows(length, Math.max(8, Math.min(ACCURACY_ROWS, Math.floor(2 ** 17 / length)))),
    );
    const operations = (4 * heads * length ** 2 * dim) / (inputs.isCausal ? 2 : 1);
    return { ...times, flops: (operations / times.medianMs) * 1000, relativeL1 };
  } finally {
    prepared.dispose();
  }
}

const api = {
  async describe(): Promise<DeviceReport> {
    await ready;
    const backends = await Promise.all(
      BROWSER_BACKENDS.map(async (name) => {
        const backend = await getBackend(name);
        const kernels = backend.kernels.map(({ name: kernel, summary }) => ({ name: kernel, summary }));
        return { name, availability: await backend.availability(), kernels };
      }),
    );
    const accelerated = backends.find(({ availability }) => availability.available && availability.accelerated);
    return {
      chosen: accelerated?.name ?? 'wasm',
      backends,
      crossOriginIsolated,
      processors: navigator.hardwareConcurrency,
    };
  },

  /** @returns the number of lines that `onResult` hears of */
  async check(onResult: (result: CheckResult, total: number) => void): Promise<void> {
    const { selfCheck, checkCount } = await import('../self-check.ts');
    const backends = await Promise.all((await available()).map(getBackend));
    const total = checkCount(backends);
    // A fresh seed each time: a check that always sees the same numbers says less.
    for await (const result of selfCheck(backends, Math.floor(Math.random() * 2 ** 31))) onResult(result, total);
  },

  /** @param ortBase the folder of onnxruntime-web's files, if they are there */
  async contestants(
    ortBase: string | undefined,
  ): Promise<Pick<Contestant, 'id' | 'label' | 'kind' | 'where' | 'note'>[]> {
    const all = await contestants(await available(), ortBase);
    return all.map(({ id, label, kind, where, note }) => ({ id, label, kind, where, note }));
  },

  async bench(
    config: BenchConfig,
    ortBase: string | undefined,
    onProgress: (progress: BenchProgress) => void,
    onLoss: (reason: string) => void,
  ): Promise<void> {
    stop = new AbortController();
    const { signal } = stop;
    const chosen = (await contestants(await available(), ortBase)).filter(({ id }) => config.contestants.includes(id));
    const lengths = [...config.lengths].sort((a, b) => a - b);
    const total = chosen.length * lengths.length;
    const lastMs = new Map<string, { length: number; ms: number }>();
    let done = 0;
    for (const length of lengths) {
      const inputs = benchInputs(config, length);
      for (const contestant of chosen) {
        const { id, label, kind, where } = contestant;
        if (signal.aborted) return;
        onProgress({ done, total, doing: `${label}, ${length} tokens` });
        const last = lastMs.get(id);
        const expected = last === undefined ? 0 : last.ms * (length / last.length) ** 2;
        let outcome: Partial<Measurement>;
        if (expected > LONGEST_CALL_MS[where]) {
          outcome = { failure: `left out: a call would take about ${Math.round(expected / 1000)} s` };
        } else {
          try {
            const figures = await survivingLoss(() => measure(contestant, inputs, signal), onLoss);
            lastMs.set(id, { length, ms: figures.medianMs });
            outcome = figures;
          } catch (error) {
            if (signal.aborted) return;
            outcome = { failure: error instanceof Error ? error.message : String(error) };
          }
        }
        done++;
        const measurement = { contestant: id, label, kind, where, length, ...outcome };
        onProgress({ done, total, doing: `${label}, ${length} tokens`, measurement });
      }
    }
  },

  stop(): void {
    stop.abort();
  },

  loseDevice,
};

export type DeviceApi = typeof api;
Comlink.expose(api);
