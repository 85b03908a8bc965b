/** `sageattention bench`: time and accuracy of kernels on random inputs. */
import { performance } from 'node:perf_hooks';
import { accuracyOnRows, sampleRows } from '../measure/accuracy.ts';
import { type InputShape, randomInputs } from '../measure/inputs.ts';
import { type Machine, thisMachine } from '../measure/machine.ts';
import { attentionOperations } from '../measure/operations.ts';
import { median } from '../measure/statistics.ts';
import { availableBackends, offeredKernels } from './backends.ts';
import type { BenchPeer, BenchReport, BenchResult } from './bench-report.ts';
import { isRefusal, UserError } from './errors.ts';
import {
  type Accuracy,
  type BackendName,
  createAttention,
  type DType,
  type KernelName,
  SageAttentionError,
  type Tensor,
  transpose,
} from './library.ts';
import { failureOf, openPeer, type Peer } from './onnxruntime-peer.ts';
import { writeReport } from './report-file.ts';
import { bold, cosine, dim, duration, print, progress, rate, small, table } from './terminal.ts';

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

async function measure(
  { backend, kernel, shape, isCausal }: Case,
  { q, k, v }: ReturnType<typeof randomInputs>,
  { repetitions, rows }: BenchOptions,
): Promise<Pick<BenchResult, 'medianMs' | 'fastestMs' | 'gflops' | 'accuracy' | 'rows'>> {
  const attention = await createAttention({ q, k, v }, { backend, kernel, isCausal });
  try {
    // The first call compiles and starts workers; its output is as good as any other.
    const { output } = await attention.run({ q, k, v });
    const times = await timesOf(() => attention.run({ q, k, v }), repetitions);
    const medianMs = median(times);
    const { length } = shape;
    const operations = attentionOperations({ ...shape, tokens: length, isCausal });
    const ranges = sampleRows(length, rows);
    return {
      medianMs,
      fastestMs: Math.min(...times),
      gflops: operations / medianMs / 1e6,
      accuracy: await accuracyOnRows({ q, k, v, tensorLayout: 'HND', isCausal }, output, ranges),
      rows: ranges.reduce((sum, { start, end }) => sum + end - start, 0),
    };
  } finally {
    attention.dispose();
  }
}

/** What a kernel does not take, or fails at, is a line of the table: the other measurements go on. */
async function measureOrExplain(which: Case, inputs: ReturnType<typeof randomInputs>, options: BenchOptions) {
  try {
    return await measure(which, inputs, options);
  } catch (error) {
    if (!(error instanceof SageAttentionError)) throw error;
    return isRefusal(error) ? { refused: error.message } : { failed: error.message };
  }
}

/** onnxruntime's attention has no grouped heads, and here no causal mask. */
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

/** For each shape the fastest kernel that quantizes, beside exact float32 of this package and the other engine. */
function verdicts(results: readonly BenchResult[], peers: readonly BenchPeer[]): string[] {
  const shapes = [...new Set(results.map(shapeText))];
  return shapes.flatMap((shape) => {
    const measured = results.filter((result) => shapeText(result) === shape && result.medianMs !== undefined);
    const byTime = measured.sort((a, b) => (a.medianMs as number) - (b.medianMs as number));
    const best = byTime.find(({ kernel }) => kernel !== 'exact');
    if (best === undefined) return [];
    const exact = byTime.find(({ kernel }) => kernel === 'exact');
    const peer = best.isCausal ? undefined : peers.find((other) => shapeText({ ...other, isCausal: false }) === shape);
    const against = (name: string, time: number | undefined) =>
      time === undefined ? [] : [`${(time / (best.medianMs as number)).toFixed(1)} times as fast as ${name}`];
    const ratios = [
      ...against('exact float32 of this package', exact?.medianMs),
      ...against('onnxruntime-web', peer?.medianMs),
    ];
    return [
      `${shape}: ${best.kernel} on ${best.backend} is fastest, ${duration(best.medianMs as number)}` +
        `${ratios.length === 0 ? '' : `, ${ratios.join(' and ')}`}; relative L1 ${small((best.accuracy as Accuracy).relativeL1)}.`,
    ];
  });
}

const shapeText = ({ length, headDim, isCausal }: Pick<BenchResult, 'length' | 'headDim' | 'isCausal'>) =>
  `${length} tokens, head dim ${headDim}${isCausal ? ', causal' : ''}`;

function row(result: BenchResult): string[] {
  const { backend, kernel, length, headDim, isCausal, medianMs, gflops, accuracy, failed } = result;
  const shape = [backend, kernel, String(length), String(headDim), isCausal ? 'yes' : 'no'];
  if (medianMs === undefined || gflops === undefined || accuracy === undefined) {
    return [...shape, failed === undefined ? 'refused' : 'failed', '', '', '', ''];
  }
  return [
    ...shape,
    duration(medianMs),
    rate(gflops),
    cosine(accuracy.cosineSimilarity),
    small(accuracy.relativeL1),
    String(result.rows),
  ];
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
  let inputs: { shape: InputShape; tensors: ReturnType<typeof randomInputs> } | undefined;
  try {
    for (const which of cases) {
      if (inputs?.shape.length !== which.shape.length || inputs.shape.headDim !== which.shape.headDim) {
        inputs = { shape: which.shape, tensors: randomInputs(which.shape, dtype, seed) };
        if (peer !== undefined) peers.push(await measurePeer(peer, which.shape, inputs.tensors, repetitions));
      }
      const { backend, kernel, isCausal, shape } = which;
      const figures = await measureOrExplain(which, inputs.tensors, options);
      results.push({ backend, kernel, isCausal, ...shape, ...figures });
      bar.advance();
    }
  } finally {
    bar.stop();
  }

  const machine = thisMachine();
  print(bold(`Batch ${batch}, ${heads} heads${kvHeads === heads ? '' : ` (${kvHeads} of keys and values)`}, ${dtype}`));
  print(dim(`${machine.runtime}, ${machine.cpu}, ${machine.cores} cores; median of ${repetitions} runs, seed ${seed}`));
  print(
    table(
      [
        'backend',
        'kernel',
        '>length',
        '>head dim',
        'causal',
        '>time',
        '>speed',
        '>cosine',
        '>relative L1',
        '>rows checked',
      ],
      results.map(row),
    ),
  );
  for (const { kernel, length, headDim, refused, failed } of results) {
    const reason = refused ?? failed;
    if (reason !== undefined) print(`${kernel}, ${length} tokens, head dim ${headDim}: ${reason}`);
  }
  for (const { length, headDim, failed } of peers) {
    if (failed !== undefined) print(`onnxruntime-web, ${length} tokens, head dim ${headDim}: ${failed}`);
  }
  const lines = verdicts(results, peers);
  if (lines.length > 0) print(bold('Verdict'));
  for (const line of lines) print(line);
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
    schema: 'sageattention-bench/1',
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
