/** The worker of sections 1 and 3: what this device can run, whether it computes, and how fast. */
import * as Comlink from 'comlink';
import { createProblem } from '../../src/attention/problem.ts';
import {
  type Availability,
  getBackend,
  type KernelDescriptor,
  type KernelName,
  type Tensor,
  type TensorView,
  transpose,
} from '../../src/index.ts';
import { randomInputs } from '../../src/measure/inputs.ts';
import { attentionOperations } from '../../src/measure/operations.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import type { CheckResult } from '../self-check.ts';
import {
  BROWSER_BACKENDS,
  type BrowserBackend,
  loseDevice,
  survivingLoss,
  type Told,
  useBrowserBackends,
  watchDevice,
} from './backends.ts';
import { type BenchInputs, type Contestant, contestants } from './contestants.ts';
import { isTiming, measureInTurns, type Outcome, STEPS } from './in-turns.ts';

const ready = useBrowserBackends();

export interface BackendReport {
  readonly name: BrowserBackend;
  readonly availability: Availability;
  readonly kernels: readonly Pick<KernelDescriptor, 'name' | 'summary'>[];
  /** The one that it takes for thousands of tokens; none where it is not available. */
  readonly defaultKernel: KernelName | undefined;
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
  readonly dtype: Contestant['dtype'];
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
  /** Steps: making a contestant ready for a length, and each of its samples. */
  readonly done: number;
  readonly total: number;
  readonly doing: string;
  /** Of a length, when it is done. */
  readonly measurements: readonly Measurement[];
}

/** A call that is expected to take longer is left out. Systems take a GPU away from a program that blocks it for seconds. */
const LONGEST_CALL_MS = { webgpu: 2_000, wasm: 15_000 } as const satisfies Record<BrowserBackend, number>;
const ACCURACY_ROWS = 64;

/** 4096 tokens, 8 heads of 64. */
const USUAL_TENSOR: TensorView = {
  location: 'cpu',
  dtype: 'float32',
  shape: [1, 8, 4096, 64],
  strides: [8 * 4096 * 64, 4096 * 64, 64, 1],
  offset: 0,
};
const USUAL_PROBLEM = createProblem(USUAL_TENSOR, USUAL_TENSOR, USUAL_TENSOR, {});

let stop = new AbortController();

async function available(): Promise<BrowserBackend[]> {
  await ready;
  const found: BrowserBackend[] = [];
  for (const name of BROWSER_BACKENDS) {
    if ((await (await getBackend(name)).availability()).available) found.push(name);
  }
  return found;
}

function benchInputs({ heads, headDim, isCausal }: BenchConfig, length: number): BenchInputs {
  const { q, k, v } = randomInputs({ batch: 1, heads, kvHeads: heads, length, headDim }, 'float32', 1);
  const nhd = (view: Tensor) => tensor(toFloat32(transpose(view, [0, 2, 1, 3])), [1, length, heads, headDim]);
  return { q: nhd(q), k: nhd(k), v: nhd(v), isCausal };
}

/** Rows to compare with float64, fewer of long ones: each costs as much as it is long. */
const accuracyRows = (length: number) => Math.max(8, Math.min(ACCURACY_ROWS, Math.floor(2 ** 17 / length)));

const api = {
  async describe(): Promise<DeviceReport> {
    await ready;
    const backends = await Promise.all(
      BROWSER_BACKENDS.map(async (name) => {
        const backend = await getBackend(name);
        const kernels = backend.kernels.map(({ name: kernel, summary }) => ({ name: kernel, summary }));
        const availability = await backend.availability();
        const defaultKernel = availability.available ? (await backend.defaultKernel(USUAL_PROBLEM)).name : undefined;
        return { name, availability, kernels, defaultKernel };
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

  /** Resolves when `onResult` has heard of every check. */
  async check(onResult: (result: CheckResult, total: number) => Told): Promise<void> {
    const { selfCheck, checkCount } = await import('../self-check.ts');
    const backends = await Promise.all((await available()).map(getBackend));
    const total = checkCount(backends);
    // A fresh seed each time: a check that always sees the same numbers says less.
    const seed = Math.floor(Math.random() * 2 ** 31);
    for await (const result of selfCheck(backends, seed)) await onResult(result, total);
  },

  /** @param ortBase the folder of onnxruntime-web's files, if they are there */
  async contestants(ortBase: string | undefined): Promise<Omit<Contestant, 'prepare'>[]> {
    const all = await contestants(await available(), ortBase);
    return all.map(({ prepare: _, ...told }) => told);
  },

  async bench(
    config: BenchConfig,
    ortBase: string | undefined,
    onProgress: (progress: BenchProgress) => Told,
  ): Promise<void> {
    stop = new AbortController();
    const { signal } = stop;
    const chosen = (await contestants(await available(), ortBase)).filter(({ id }) => config.contestants.includes(id));
    const lengths = [...config.lengths].sort((a, b) => a - b);
    const total = chosen.length * lengths.length * STEPS;
    const lastMs = new Map<string, { length: number; ms: number }>();
    for (const [i, length] of lengths.entries()) {
      const before = i * chosen.length * STEPS;
      const inputs = benchInputs(config, length);
      const expected = ({ id }: Contestant) => {
        const last = lastMs.get(id);
        return last === undefined ? 0 : last.ms * (length / last.length) ** 2;
      };
      const running = chosen.filter((contestant) => expected(contestant) <= LONGEST_CALL_MS[contestant.where]);
      const leftOut = (chosen.length - running.length) * STEPS;
      const onStep = (done: number, doing: string) =>
        void onProgress({
          done: before + leftOut + done,
          total,
          doing: `${length} tokens, ${doing}`,
          measurements: [],
        });
      let outcomes: ReadonlyMap<string, Outcome>;
      try {
        const measure = () => measureInTurns(running, inputs, { rows: accuracyRows(length), signal, onStep });
        outcomes = await survivingLoss(measure);
      } catch (error) {
        if (signal.aborted) return;
        // The GPU was lost a second time.
        const failure = error instanceof Error ? error.message : String(error);
        outcomes = new Map(running.map(({ id }) => [id, { failure }]));
      }
      const measurements = chosen.map((contestant): Measurement => {
        const { id, label, kind, where, dtype } = contestant;
        const facts = { contestant: id, label, kind, where, dtype, length };
        const outcome = outcomes.get(id);
        if (!isTiming(outcome)) {
          const seconds = Math.round(expected(contestant) / 1000);
          return { ...facts, failure: outcome?.failure ?? `left out: a call would take about ${seconds} s` };
        }
        const { medianMs, calls, relativeL1 } = outcome;
        lastMs.set(id, { length, ms: medianMs });
        const operations = attentionOperations({ ...config, tokens: length });
        return { ...facts, medianMs, calls, flops: (operations / medianMs) * 1000, relativeL1 };
      });
      await onProgress({ done: before + chosen.length * STEPS, total, doing: `${length} tokens`, measurements });
    }
  },

  stop(): void {
    stop.abort();
  },

  watchDevice,
  loseDevice,
};

export type DeviceApi = typeof api;
Comlink.expose(api);
