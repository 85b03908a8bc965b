/** `sageattention bench`: time and accuracy of kernels on random inputs. */
import { performance } from 'node:perf_hooks';
import type { GpuTensor, WebgpuBackend } from '../backends/webgpu/index.ts';
import { accuracyOnRows, sampleRows } from '../measure/accuracy.ts';
import { type InputShape, randomInputs } from '../measure/inputs.ts';
import { type Machine, thisMachine } from '../measure/machine.ts';
import { attentionOperations } from '../measure/operations.ts';
import { median } from '../measure/statistics.ts';
import { availableBackends, offeredKernels } from './backends.ts';
import { printBench } from './bench-print.ts';
import type { BenchPeer, BenchReport, BenchResult } from './bench-report.ts';
import { isRefusal, UserError } from './errors.ts';
import {
  type BackendName,
  createAttention,
  type DType,
  getBackend,
  type KernelName,
  messageOf,
  SageAttentionError,
  type Tensor,
  transpose,
} from './library.ts';
import { failureOf, openPeer, type Peer } from './onnxruntime-peer.ts';
import { type Place, placeOf, release } from './place.ts';
import { writeReport } from './report-file.ts';
import { progress } from './terminal.ts';

export interface BenchOptions {
  readonly backend?: readonly BackendName[];
  readonly kernel?: readonly KernelName[];
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads?: number;
  readonly length: readonly number[];
  readonly headDim: readonly number[];
  readonly causal: 'no' | 'yes' | 'both';
  readonly dtype: DType;
  readonly repetitions: number;
  readonly rows: number;
  readonly seed: number;
  readonly json?: string;
  readonly html?: string;
}

interface Case {
  readonly backend: BackendName;
  readonly kernel: KernelName;
  readonly shape: InputShape;
  readonly isCausal: boolean;
}

/** Batch and heads, lengths, head dims and causality, each with each; kernels innermost, so that inputs are shared. */
async function casesOf(options: BenchOptions): Promise<Case[]> {
  const { batch, heads, kvHeads = heads, length: lengths, headDim: headDims, causal } = options;
  const offered = offeredKernels(await availableBackends('auto', options.backend), options.kernel);
  const masks = { no: [false], yes: [true], both: [false, true] }[causal];
  return lengths.flatMap((length) =>
    headDims.flatMap((headDim) =>
      masks.flatMap((isCausal) =>
        offered.map((which) => ({ ...which, isCausal, shape: { batch, heads, kvHeads, length, headDim } })),
      ),
    ),
  );
}

/** How long the calls of one timing take at least: a clock that is read once is then no part of it. */
const LEAST_TIMED_MS = 20;
const MOST_CALLS = 32;

/** Inputs of one shape, on the CPU and where each backend computes. */
interface Inputs {
  readonly shape: InputShape;
  readonly cpu: ReturnType<typeof randomInputs>;
  readonly at: Map<BackendName, Record<'q' | 'k' | 'v', Tensor>>;
}

function inputsAt(inputs: Inputs, backend: BackendName, place: Place): Record<'q' | 'k' | 'v', Tensor> {
  const { q, k, v } = inputs.cpu;
  let there = inputs.at.get(backend);
  if (there === undefined) {
    there = place.isRemote
      ? ({ q: place.put(q), k: place.put(k), v: place.put(v) } as typeof there & object)
      : inputs.cpu;
    inputs.at.set(backend, there);
  }
  return there;
}

function releaseInputs(inputs: Inputs | undefined): void {
  for (const there of inputs?.at.values() ?? []) for (const view of Object.values(there)) release(view);
}

/** Milliseconds of one call over tensors on the device: several in a row where one is short. */
async function timesOnDevice(run: () => Promise<void>, place: Place, repetitions: number): Promise<number[]> {
  const timed = async (calls: number) => {
    await place.settle();
    const start = performance.now();
    for (let i = 0; i < calls; i++) await run();
    await place.settle();
    return (performance.now() - start) / calls;
  };
  await timed(1);
  const once = await timed(1);
  const calls = Math.min(MOST_CALLS, Math.max(1, Math.ceil(LEAST_TIMED_MS / once)));
  const times: number[] = [];
  for (let i = 0; i < repetitions; i++) times.push(await timed(calls));
  return times;
}

async function measure(
  { backend, kernel, shape, isCausal }: Case,
  inputs: Inputs,
  { repetitions, rows }: BenchOptions,
): Promise<Pick<BenchResult, 'medianMs' | 'withCopiesMs' | 'fastestMs' | 'gflops' | 'accuracy' | 'rows'>> {
  const { q, k, v } = inputs.cpu;
  const attention = await createAttention({ q, k, v }, { backend, kernel, isCausal });
  let copied: number[];
  let output: Tensor;
  try {
    // The first call compiles and starts workers; its output is as good as any other.
    ({ output } = await attention.run({ q, k, v }));
    copied = await timesOf(() => attention.run({ q, k, v }), repetitions);
  } finally {
    attention.dispose();
  }
  const place = await placeOf(await getBackend(backend));
  const times = place.isRemote ? await timesThere({ backend, kernel, isCausal }, inputs, place, repetitions) : copied;
  const medianMs = median(times);
  const { length } = shape;
  const ranges = sampleRows(length, rows);
  return {
    medianMs,
    ...(place.isRemote && { withCopiesMs: median(copied) }),
    fastestMs: Math.min(...times),
    gflops: attentionOperations({ ...shape, tokens: length, isCausal }) / medianMs / 1e6,
    accuracy: await accuracyOnRows({ q, k, v, tensorLayout: 'HND', isCausal }, output, ranges),
    rows: ranges.reduce((sum, { start, end }) => sum + end - start, 0),
  };
}

async function timesThere(
  options: Pick<Case, 'backend' | 'kernel' | 'isCausal'>,
  inputs: Inputs,
  place: Place,
  repetitions: number,
): Promise<number[]> {
  const there = inputsAt(inputs, options.backend, place);
  const attention = await createAttention(there, options);
  try {
    return await timesOnDevice(async () => release((await attention.run(there)).output), place, repetitions);
  } finally {
    attention.dispose();
  }
}

/** What a kernel does not take, or fails at, is a line of the table: the other measurements go on. */
async function measureOrExplain(which: Case, inputs: Inputs, options: BenchOptions) {
  try {
    return await measure(which, inputs, options);
  } catch (error) {
    if (!(error instanceof SageAttentionError)) throw error;
    return isRefusal(error) ? { refused: error.message } : { failed: error.message };
  }
}

/** Its attention has no grouped heads, and here no causal mask. */
async function measurePeer(
  peer: Peer,
  shape: InputShape,
  { q, k, v }: ReturnType<typeof randomInputs>,
  repetitions: number,
): Promise<BenchPeer> {
  try {
    const [ownQ, ownK, ownV] = [q, k, v].map((view) => transpose(view, [0, 2, 1, 3])) as [Tensor, Tensor, Tensor];
    const run = await peer.prepare({ q: ownQ, k: ownK, v: ownV, attnMask: undefined });
    await run();
    return { name: 'onnxruntime-web', ...shape, medianMs: median(await timesOf(run, repetitions)) };
  } catch (error) {
    return { name: 'onnxruntime-web', ...shape, failed: failureOf(error) };
  }
}

async function timesOf(run: () => Promise<unknown>, repetitions: number): Promise<number[]> {
  const times: number[] = [];
  for (let i = 0; i < repetitions; i++) {
    const start = performance.now();
    await run();
    times.push(performance.now() - start);
  }
  return times;
}

/** Exact attention on a WebGPU device, of this package's benches, over tensors that lie there: in the dtype of the inputs. */
async function measureExactWebgpu(
  shape: InputShape,
  isCausal: boolean,
  inputs: Inputs,
  dtype: DType,
  repetitions: number,
): Promise<BenchPeer> {
  const name = `exact ${dtype} on WebGPU`;
  try {
    const backend = (await getBackend('webgpu')) as WebgpuBackend;
    const place = await placeOf(backend);
    const { createExactAttention } = await import('../measure/peers/exact-webgpu.ts');
    const { q, k, v } = inputsAt(inputs, 'webgpu', place) as unknown as Record<'q' | 'k' | 'v', GpuTensor>;
    const attention = await createExactAttention(await backend.context(), { q, k, v }, { isCausal });
    try {
      const output = attention.run();
      const times = await timesOnDevice(async () => void attention.run(output), place, repetitions);
      output.buffer.destroy();
      return { name, ...shape, isCausal, medianMs: median(times) };
    } finally {
      attention.dispose();
    }
  } catch (error) {
    return { name, ...shape, isCausal, failed: messageOf(error) };
  }
}

export async function bench(options: BenchOptions, version: string): Promise<void> {
  const { batch, heads, kvHeads = heads, dtype, repetitions, seed } = options;
  if (heads % kvHeads !== 0) throw new UserError(`--heads ${heads} is not a multiple of --kv-heads ${kvHeads}`);
  const cases = await casesOf(options);
  const bar = progress(`${cases.length} measurements`, cases.length);
  const results: BenchResult[] = [];
  const peers: BenchPeer[] = [];
  // Another CPU engine says something about speed only beside a CPU backend.
  const onWasm = cases.some(({ backend, isCausal }) => backend === 'wasm' && !isCausal);
  const peer = onWasm && dtype === 'float32' && heads === kvHeads ? await openPeer() : undefined;
  let inputs: Inputs | undefined;
  const measuredPeers = new Set<string>();
  try {
    for (const which of cases) {
      const { backend, kernel, isCausal, shape } = which;
      if (inputs?.shape.length !== shape.length || inputs.shape.headDim !== shape.headDim) {
        releaseInputs(inputs);
        inputs = { shape, cpu: randomInputs(shape, dtype, seed), at: new Map() };
        if (peer !== undefined) peers.push(await measurePeer(peer, shape, inputs.cpu, repetitions));
      }
      const problem = `${shape.length} ${shape.headDim} ${isCausal}`;
      if (backend === 'webgpu' && !measuredPeers.has(problem)) {
        measuredPeers.add(problem);
        peers.push(await measureExactWebgpu(shape, isCausal, inputs, dtype, repetitions));
      }
      const figures = await measureOrExplain(which, inputs, options);
      results.push({ backend, kernel, isCausal, ...shape, ...figures });
      bar.advance();
    }
  } finally {
    releaseInputs(inputs);
    bar.stop();
  }

  const machine = thisMachine();
  const title = `Batch ${batch}, ${heads} heads${kvHeads === heads ? '' : ` (${kvHeads} of keys and values)`}, ${dtype}`;
  printBench(title, machine, options, results, peers);
  await writeReports(results, peers, options, machine, version);
  const failures = results.filter(({ failed }) => failed !== undefined).length;
  if (failures > 0) throw new UserError(`${failures} of ${results.length} measurements failed`);
  if (results.every(({ refused }) => refused !== undefined)) throw new UserError('no kernel took any of these shapes');
}

async function writeReports(
  results: readonly BenchResult[],
  peers: readonly BenchPeer[],
  options: BenchOptions,
  machine: Machine,
  version: string,
): Promise<void> {
  if (options.json === undefined && options.html === undefined) return;
  const { dtype, repetitions, seed } = options;
  const found = await availableBackends('auto', options.backend);
  const details = await Promise.all(
    found.map(async ({ backend }) => [backend.name, (await backend.availability()).details] as const),
  );
  const report: BenchReport = {
    schema: 'sageattention-bench/2',
    version,
    date: new Date().toISOString(),
    machine,
    dtype,
    repetitions,
    seed,
    backends: Object.fromEntries(details),
    results,
    peers,
  };
  if (options.json !== undefined) await writeReport(options.json, JSON.stringify(report, null, 2));
  if (options.html !== undefined) {
    const { benchHtml } = await import('./bench-html.ts');
    await writeReport(options.html, benchHtml(report));
  }
}
