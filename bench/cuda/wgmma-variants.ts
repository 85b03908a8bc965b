/**
 * The Hopper kernels on a card: the figures of the requirement, and every variant of the configuration table against
 * each other, each with its accuracy. Peer is torch's cuDNN attention in the same run.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-wgmma.mjs OUTPUT_FOLDER [--only TEXT] [--minutes 8.5]
 *
 * Tasks run one after another in a worker process, most important first; a worker that faults or hangs loses its task
 * and the next one goes on with the rest. Writes `wgmma.json` after every task, and `wgmma.md` at the end.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  cudaTensorOn,
  download,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf } from '../../src/backends/cuda/kernel-table.ts';
import { WGMMA_VARIANTS, type WgmmaTuning } from '../../src/backends/cuda/kernels/wgmma/table.ts';
import { planAttend, planKeyValue, planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { packBuffers } from '../../src/backends/cuda/run/bound-launches.ts';
import { emptyCudaTensor, upload } from '../../src/backends/cuda/tensor.ts';
import type { AttentionOptions, KernelName } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { median } from '../../src/measure/statistics.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { emptyTensor, slice } from '../../src/tensor/tensor.ts';
import { GOLDEN_NAMES, type GoldenName, readGolden } from '../../test/golden/golden.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { runInWorkers, work } from '../harness.ts';
import { exactRow, type HostInputs, normalBits, type SampledRow, type Shape, sampleRows, sendBits } from './inputs.ts';
import { torchTimes } from './torch.ts';
import { cacheAddresses, copyBandwidth, factsOf, isAttention, nvidiaSmi, tflops, Workbench } from './workbench.ts';

const HEADS = 32;
const SAMPLED_ROWS = 16;
const KEY_OFFSET = 2;
const LARGEST = HEADS * 16384 * 128;

const FP8: KernelName = 'qk-int8-pv-fp8-cuda-sm90';
const FP16: KernelName = 'qk-int8-pv-fp16-cuda-sm90';

const shape = (headDim: number, tokens: number, batch = 1, isCausal = false): Shape => ({
  batch,
  heads: HEADS,
  tokens,
  headDim,
  isCausal,
});

/** A speed to reach, as a multiple of cuDNN's: the kernel alone, and with quantization. */
interface Goal {
  readonly kernel: KernelName;
  readonly shape: Shape;
  readonly alone: number | undefined;
  readonly whole: number;
}

const GOALS: readonly Goal[] = [
  { kernel: FP8, shape: shape(128, 16384), alone: 1.8, whole: 1.6 },
  { kernel: FP8, shape: shape(128, 16384, 1, true), alone: 1.7, whole: 1.5 },
  { kernel: FP8, shape: shape(128, 4096, 4), alone: 1.6, whole: 1.3 },
  { kernel: FP8, shape: shape(128, 1024, 16), alone: 1.4, whole: 1.0 },
  { kernel: FP8, shape: shape(64, 16384), alone: 1.6, whole: 1.3 },
  { kernel: FP16, shape: shape(128, 16384), alone: undefined, whole: 1.2 },
];

type Task =
  /** Small problems against the exact result, and the same bits from repeated runs. */
  | {
      readonly kind: 'check';
      readonly kernel: KernelName;
      readonly variant: string;
      readonly options: AttentionOptions;
    }
  | { readonly kind: 'golden'; readonly kernel: KernelName; readonly variant: string; readonly file: GoldenName }
  | { readonly kind: 'time'; readonly kernel: KernelName; readonly variant: string; readonly shape: Shape }
  | { readonly kind: 'decode'; readonly kernel: KernelName; readonly headDim: number };

const tuningOf = (variant: string): Partial<WgmmaTuning> => {
  const tuning = WGMMA_VARIANTS[variant];
  if (tuning === undefined) throw new RangeError(`no variant '${variant}'`);
  return tuning;
};

/** Most important first. */
function tasks(): Task[] {
  const variants = Object.keys(WGMMA_VARIANTS);
  const base = 'base';
  const list: Task[] = [];
  for (const kernel of [FP8, FP16]) {
    list.push({ kind: 'check', kernel, variant: base, options: {} });
    list.push({ kind: 'check', kernel, variant: base, options: { isCausal: true } });
  }
  for (const goal of GOALS) list.push({ kind: 'time', kernel: goal.kernel, variant: base, shape: goal.shape });
  list.push({ kind: 'decode', kernel: FP8, headDim: 128 });
  for (const variant of variants) {
    list.push({ kind: 'check', kernel: FP8, variant, options: {} });
    list.push({ kind: 'time', kernel: FP8, variant, shape: shape(128, 16384) });
  }
  for (const file of GOLDEN_NAMES) {
    for (const kernel of [FP8, FP16]) list.push({ kind: 'golden', kernel, variant: base, file });
  }
  for (const variant of variants) list.push({ kind: 'time', kernel: FP8, variant, shape: shape(128, 16384, 1, true) });
  for (const variant of variants.slice(1)) {
    list.push({ kind: 'golden', kernel: FP8, variant, file: 'outlier-d128' });
    list.push({ kind: 'time', kernel: FP8, variant, shape: shape(128, 1024, 16) });
  }
  list.push({ kind: 'time', kernel: FP8, variant: base, shape: shape(256, 8192) });
  list.push({ kind: 'time', kernel: FP16, variant: base, shape: shape(64, 16384) });
  list.push({ kind: 'time', kernel: FP16, variant: base, shape: shape(128, 16384, 1, true) });
  list.push({ kind: 'decode', kernel: FP16, headDim: 128 });
  return list;
}

/** What a task found; `error` instead when it failed. */
interface Outcome {
  readonly task: Task;
  readonly error?: string;
  readonly relativeL1?: number;
  readonly cosineSimilarity?: number;
  /** Of the official sm90 kernel on the same golden file. */
  readonly official?: number;
  readonly sameBits?: boolean;
  /** Of the attention kernel (and the joining of splits) alone, and of everything. */
  readonly aloneMilliseconds?: number;
  readonly milliseconds?: number;
  /** Time of the launches before attention, by themselves. */
  readonly quantizeMilliseconds?: number;
  readonly registers?: number;
  readonly localBytes?: number;
  readonly ofCopyBandwidth?: number;
}

// ---- the worker

interface Bench {
  readonly device: CudaDevice;
  readonly seed: number;
  readonly host: HostInputs;
  readonly q: CudaTensor;
  readonly k: CudaTensor;
  readonly v: CudaTensor;
  readonly bandwidth: number;
}

async function openBench(seed: number): Promise<Bench> {
  const device = (await new CudaBackend().cuda()).device();
  const random = new Random(seed);
  const host = {
    q: normalBits(random, LARGEST, 0),
    k: normalBits(random, LARGEST, KEY_OFFSET),
    v: normalBits(random, LARGEST, 0),
  };
  return {
    device,
    seed,
    host,
    q: sendBits(device, host.q),
    k: sendBits(device, host.k),
    v: sendBits(device, host.v),
    bandwidth: copyBandwidth(device),
  };
}

/** Plans a call of CUDA tensors, runs it `runs` times over poisoned outputs, and gives its outputs. */
function runWhole(
  { device }: Bench,
  kernel: KernelName,
  variant: string,
  options: AttentionOptions,
  inputs: { q: CudaTensor; k: CudaTensor; v: CudaTensor },
  runs: number,
): Uint16Array[] {
  const { q, k, v } = inputs;
  const problem = createProblem(q, k, v, options);
  const choice = chooseOptions(descriptorOf(kernel), problem, options);
  const [batch, heads, length] = q.shape as [number, number, number];
  const output = emptyCudaTensor(device, [batch, heads, length, v.shape[3] as number], 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const bench = new Workbench(
    device,
    planLaunches(problem, choice, factsOf(device), { overrides: tuningOf(variant) }),
    addresses,
  );
  const results: Uint16Array[] = [];
  for (let i = 0; i < runs; i++) {
    const { pointer, byteLength } = output.memory;
    device.call('cuMemsetD8Async', 'poisoning', pointer, 0xff, byteLength, device.stream.handle);
    bench.run();
    if (i < 2 || i === runs - 1) results.push((download(output).data as Uint16Array).slice());
  }
  bench.dispose();
  output.memory.dispose();
  return results;
}

const toTensor = (bits: Uint16Array, shapeOf: readonly number[]) => {
  const made = emptyTensor(shapeOf, 'bfloat16');
  (made.data as Uint16Array).set(bits);
  return made;
};

function check(bench: Bench, task: Task & { kind: 'check' }): Partial<Outcome> {
  // Odd lengths, several tiles, two heads to one of K.
  const random = new Random(bench.seed);
  const made = (heads: number, tokens: number, offset: number) =>
    toTensor(normalBits(random, heads * tokens * 128, offset), [1, heads, tokens, 128]);
  const host = { q: made(4, 700, 0), k: made(2, 900, KEY_OFFSET), v: made(2, 900, 0) };
  const inputs = {
    q: upload(host.q, bench.device),
    k: upload(host.k, bench.device),
    v: upload(host.v, bench.device),
  };
  const outputs = runWhole(bench, task.kernel, task.variant, task.options, inputs, 20);
  for (const { memory } of Object.values(inputs)) memory.dispose();
  const first = outputs[0] as Uint16Array;
  const exact = attentionExact(createProblem(host.q, host.k, host.v, task.options), host).output;
  const { relativeL1 } = compare(toFloat32(toTensor(first, [1, 4, 700, 128])), exact);
  return { relativeL1, sameBits: outputs.every((other) => other.every((bits, i) => bits === first[i])) };
}

function golden(bench: Bench, task: Task & { kind: 'golden' }): Partial<Outcome> {
  const file = readGolden(task.file);
  const { isCausal } = file;
  const inputs = {
    q: upload(file.q, bench.device),
    k: upload(file.k, bench.device),
    v: upload(file.v, bench.device),
  };
  const [bits] = runWhole(bench, task.kernel, task.variant, { isCausal }, inputs, 1);
  for (const { memory } of Object.values(inputs)) memory.dispose();
  const exact = file.float32('exact.o');
  const family = task.kernel === FP8 ? 'qk_int8_pv_fp8_cuda_sm90.per_thread' : 'qk_int8_pv_fp16_cuda.fp32';
  const theirs = file.outputs
    .filter((name) => name.startsWith(family))
    .map((name) => compare(file.float32(`out.${name}`), exact).relativeL1);
  const { relativeL1 } = compare(toFloat32(toTensor(bits as Uint16Array, file.q.shape)), exact);
  return { relativeL1, official: Math.min(...theirs) };
}

function accuracyOf(actual: ArrayLike<number>, expected: ArrayLike<number>): Partial<Outcome> {
  const { relativeL1, cosineSimilarity } = compare(actual, expected);
  return { relativeL1, cosineSimilarity };
}

const exactRows = new Map<string, Float64Array>();

/** Variants are compared on the same rows. */
function exactRowOnce(host: HostInputs, of: Shape, row: SampledRow): Float64Array {
  const key = JSON.stringify([of, row]);
  const found = exactRows.get(key) ?? exactRow(host, of, row);
  exactRows.set(key, found);
  return found;
}

function time(bench: Bench, task: Task & { kind: 'time' }): Partial<Outcome> {
  const { device, host } = bench;
  const { batch, heads, tokens, headDim, isCausal } = task.shape;
  const view = ({ memory }: CudaTensor) => cudaTensorOn(memory, 'bfloat16', [batch, heads, tokens, headDim]);
  const [q, k, v] = [view(bench.q), view(bench.k), view(bench.v)];
  const problem = createProblem(q, k, v, { isCausal });
  const choice = chooseOptions(descriptorOf(task.kernel), problem, {});
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const plan = planLaunches(problem, choice, factsOf(device), { overrides: tuningOf(task.variant) });
  const workbench = new Workbench(device, plan, addresses);
  const milliseconds = timeOnDevice(device, () => workbench.run());
  const aloneMilliseconds = timeOnDevice(device, () => workbench.run(isAttention));
  const quantizeMilliseconds = timeOnDevice(device, () => workbench.run((name) => !isAttention(name)));
  const { registers, localBytes } = workbench.resourcesOf('attention');
  const rows = sampleRows(new Random(bench.seed), task.shape, SAMPLED_ROWS);
  const actual: number[] = [];
  const expected: number[] = [];
  for (const row of rows) {
    const [b, h] = [Math.floor(row.head / heads), row.head % heads];
    const one = slice(slice(slice(output, 0, b, b + 1), 1, h, h + 1), 2, row.token, row.token + 1);
    actual.push(...toFloat32(download(one)));
    expected.push(...exactRowOnce(host, task.shape, row));
  }
  workbench.dispose();
  output.memory.dispose();
  return {
    milliseconds,
    aloneMilliseconds,
    quantizeMilliseconds,
    registers,
    localBytes,
    ...accuracyOf(actual, expected),
  };
}

/** One row of Q, 32 heads over 8, over 65,536 keys already quantized. */
function decode(bench: Bench, task: Task & { kind: 'decode' }): Partial<Outcome> {
  const { device, bandwidth } = bench;
  const { headDim } = task;
  const keys = 65536;
  const [q, k] = [
    cudaTensorOn(bench.q.memory, 'bfloat16', [1, HEADS, 1, headDim]),
    cudaTensorOn(bench.k.memory, 'bfloat16', [1, 8, keys, headDim]),
  ];
  const v = cudaTensorOn(bench.v.memory, 'bfloat16', [1, 8, keys, headDim]);
  const problem = createProblem(q, k, v, {});
  const choice = chooseOptions(descriptorOf(task.kernel), problem, {});
  const quantize = planKeyValue(problem, choice, factsOf(device));
  const { offsets, byteLength } = packBuffers(quantize.kept);
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  // Several copies, so that the L2 cache holds none of the next.
  const copies = Array.from({ length: 3 }, () => {
    const kept = device.allocate(byteLength);
    const addresses = cacheAddresses({ q, k, v, output }, offsets, kept.pointer);
    const preparing = new Workbench(device, quantize, addresses);
    preparing.run();
    device.stream.synchronize();
    preparing.dispose();
    return { kept, attending: new Workbench(device, planAttend(problem, choice, factsOf(device)), addresses) };
  });
  let turn = 0;
  const milliseconds = timeOnDevice(device, () => copies[turn++ % copies.length]?.attending.run());
  const bytes = (quantize.kept.key ?? 0) + (quantize.kept.value ?? 0) + (quantize.kept.keyScale ?? 0);
  const random = new Random(bench.seed);
  const actual: number[] = [];
  const expected: number[] = [];
  for (const head of [0, 5, random.integer(0, HEADS - 1)]) {
    actual.push(...toFloat32(download(slice(output, 1, head, head + 1))));
    expected.push(...exactDecodingRow(bench.host, head, headDim, keys));
  }
  for (const { kept, attending } of copies) {
    attending.dispose();
    kept.dispose();
  }
  output.memory.dispose();
  return {
    milliseconds,
    ofCopyBandwidth: bytes / (milliseconds / 1000) / bandwidth,
    ...accuracyOf(actual, expected),
  };
}

/** The exact output of one head of one row of Q over the keys of its group's head. */
function exactDecodingRow({ q, k, v }: HostInputs, head: number, headDim: number, keys: number): Float64Array {
  const keyHead = Math.floor(head / (HEADS / 8));
  const from = keyHead * keys * headDim;
  const part = (bits: Uint16Array) => bits.subarray(from, from + keys * headDim);
  const whole = new Uint16Array(keys * headDim);
  // As row 0 of a problem with as many queries as keys, of which only that row is asked for.
  whole.set(q.subarray(head * headDim, (head + 1) * headDim));
  const only = { batch: 1, heads: 1, tokens: keys, headDim, isCausal: false };
  return exactRow({ q: whole, k: part(k), v: part(v) }, only, { head: 0, token: 0 });
}

function perform(bench: Bench, task: Task): Partial<Outcome> {
  switch (task.kind) {
    case 'check':
      return check(bench, task);
    case 'golden':
      return golden(bench, task);
    case 'time':
      return time(bench, task);
    case 'decode':
      return decode(bench, task);
  }
}

async function worker(first: number, only: string, seed: number): Promise<never> {
  const bench = await openBench(seed);
  return work(
    selected(only),
    first,
    { bandwidth: bench.bandwidth },
    (task) => perform(bench, task),
    // A device that is lost to this process serves the next one.
    () => bench.device.lost !== undefined,
  );
}

const labelOf = (task: Task): string => {
  const name = task.kernel === FP8 ? 'fp8' : 'fp16';
  if (task.kind === 'decode') return `decode ${name} D=${task.headDim}`;
  const what =
    task.kind === 'golden'
      ? task.file
      : task.kind === 'check'
        ? JSON.stringify(task.options)
        : `D=${task.shape.headDim} ${task.shape.tokens}x${task.shape.batch} ${task.shape.isCausal ? 'causal' : 'full'}`;
  return `${task.kind} ${name} ${what} [${task.variant}]`;
};

const selected = (only: string): Task[] => tasks().filter((task) => labelOf(task).includes(only));

// ---- the parent

const argument = (name: string, otherwise: string): string => {
  const at = process.argv.indexOf(name);
  return at < 0 ? otherwise : (process.argv[at + 1] ?? otherwise);
};

const fixed = (value: number | undefined, digits = 2) => (value === undefined ? '-' : value.toFixed(digits));

function summaryOf(
  outcomes: readonly Outcome[],
  torch: ReturnType<typeof torchTimes>,
  bandwidth: number | undefined,
): string {
  const cudnn = (of: Shape) =>
    torch?.results.find(
      (entry) =>
        entry.backend === 'CUDNN_ATTENTION' &&
        entry.tokens === of.tokens &&
        entry.batch === of.batch &&
        entry.headDim === of.headDim &&
        entry.isCausal === of.isCausal,
    )?.milliseconds;
  const lines = [`copy ${fixed(bandwidth === undefined ? undefined : bandwidth / 1e9, 0)} GB/s`];
  for (const outcome of outcomes) {
    const { task } = outcome;
    const parts = [labelOf(task)];
    if (outcome.error !== undefined) parts.push(`ERROR ${outcome.error.slice(0, 160)}`);
    if (task.kind === 'time' && outcome.milliseconds !== undefined) {
      const peer = cudnn(task.shape);
      const alone = outcome.aloneMilliseconds as number;
      const ratio = (milliseconds: number) => (peer === undefined ? '-' : `${fixed(peer / milliseconds)}x`);
      parts.push(
        `alone ${fixed(tflops(task.shape, alone), 0)} (${ratio(alone)})`,
        `whole ${fixed(tflops(task.shape, outcome.milliseconds), 0)} (${ratio(outcome.milliseconds)})`,
        `quantize ${fixed(outcome.quantizeMilliseconds, 3)} ms`,
      );
      const goal = GOALS.find(
        ({ kernel, shape: of }) => kernel === task.kernel && JSON.stringify(of) === JSON.stringify(task.shape),
      );
      if (goal !== undefined && task.variant === 'base')
        parts.push(`goal ${fixed(goal.alone)}x / ${fixed(goal.whole)}x`);
    }
    if (task.kind === 'decode')
      parts.push(
        `${fixed((outcome.milliseconds ?? 0) * 1000, 1)} us, ${fixed((outcome.ofCopyBandwidth ?? 0) * 100, 0)}% of copy`,
      );
    if (outcome.relativeL1 !== undefined) parts.push(`L1 ${fixed(outcome.relativeL1, 4)}`);
    if (outcome.official !== undefined) parts.push(`official ${fixed(outcome.official, 4)}`);
    if (outcome.sameBits === false) parts.push('BITS DIFFER');
    if ((outcome.localBytes ?? 0) > 0) parts.push(`local ${outcome.localBytes}`);
    lines.push(parts.join(' | '));
  }
  return lines.join('\n');
}

async function main(): Promise<number> {
  const only = argument('--only', '');
  if (process.argv.includes('--worker')) {
    return worker(Number(argument('--worker', '0')), only, Number(argument('--seed', '1')));
  }
  const folder = process.argv.slice(2).find((value) => !value.startsWith('--'));
  if (folder === undefined) {
    console.error('usage: bench-wgmma.mjs OUTPUT_FOLDER [--only TEXT] [--minutes 8.5]');
    return 2;
  }
  const { available, reason, remedy } = await new CudaBackend().availability();
  if (!available) {
    console.error(`the benchmark could not run: ${reason}. ${remedy}`);
    return 2;
  }
  const started = Date.now();
  const deadline = started + Number(argument('--minutes', '8.5')) * 60_000;
  mkdirSync(folder, { recursive: true });
  const seed = runSeed();
  const list = selected(only);
  const shapes = list.flatMap((task) => (task.kind === 'time' ? [task.shape] : []));
  const distinct = [...new Map(shapes.map((one) => [JSON.stringify(one), one])).values()];
  const torch = torchTimes(distinct);
  const outcomes: Outcome[] = [];
  let bandwidth: number | undefined;
  const write = () =>
    writeFileSync(
      join(folder, 'wgmma.json'),
      `${JSON.stringify({ date: new Date().toISOString(), commit: process.env.SAGEATTENTION_COMMIT, seed, copyBandwidth: bandwidth, gpu: nvidiaSmi(), torch, outcomes }, null, 1)}\n`,
    );
  await runInWorkers<Partial<Outcome>, { readonly bandwidth: number }>({
    argumentsFor: (first) => ['--worker', String(first), '--only', only, '--seed', String(seed)],
    tasks: list.length,
    deadline,
    onFacts: (facts) => {
      bandwidth = facts.bandwidth;
    },
    onOutcome: (index, outcome) => {
      outcomes.push({ task: list[index] as Task, ...outcome });
      write();
    },
  });
  const summary = summaryOf(outcomes, torch, bandwidth);
  const times = outcomes.flatMap(({ aloneMilliseconds }) =>
    aloneMilliseconds === undefined ? [] : [aloneMilliseconds],
  );
  writeFileSync(join(folder, 'wgmma.md'), `${summary}\n`);
  console.log(summary);
  console.log(
    `${outcomes.length} of ${list.length} tasks in ${Math.round((Date.now() - started) / 1000)} s, median kernel ${fixed(times.length === 0 ? undefined : median(times), 3)} ms`,
  );
  return outcomes.some(({ error }) => error !== undefined) ? 1 : 0;
}

process.exitCode = await main();
