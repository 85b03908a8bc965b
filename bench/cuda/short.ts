/**
 * Short sequences and the shapes of real models: the exact kernel, the FP8 kernel with its quantization, and cuDNN in BF16,
 * in one run on one card.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-short.mjs OUTPUT_FOLDER [--variants] [--only TEXT] [--seconds 85]
 *
 * `--variants` times the exact kernel with every variant of its tuning besides. Kernels run in a worker process, most
 * important first: one that faults or hangs loses its row only. Writes `short.json` after each, and `short.md` at the end.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
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
import { EXACT_VARIANTS, type WgmmaTuning } from '../../src/backends/cuda/kernels/wgmma/table.ts';
import { planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { emptyCudaTensor } from '../../src/backends/cuda/tensor.ts';
import type { KernelName } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { slice } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { runInWorkers, work } from '../harness.ts';
import { exactRow, type HostInputs, normalBits, type Shape, sampleRows, sendBits } from './inputs.ts';
import { torchTimes } from './torch.ts';
import { factsOf, nvidiaSmi, tflops, Workbench } from './workbench.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    variants: { type: 'boolean', default: false },
    only: { type: 'string', default: '' },
    seconds: { type: 'string', default: '85' },
    worker: { type: 'string' },
    seed: { type: 'string', default: '1' },
  },
});

interface Named extends Shape {
  readonly name: string;
}

/** Tokens times batch of the table. */
const TOKENS = 16384;
const LENGTHS = [128, 256, 512, 1024, 2048, 4096, 16384];
const TABLE: readonly Named[] = [128, 64].flatMap((headDim) =>
  [false, true].flatMap((isCausal) =>
    LENGTHS.map((tokens) => ({
      name: `${tokens} x ${TOKENS / tokens} D=${headDim} ${isCausal ? 'causal' : 'full'}`,
      ...{ batch: TOKENS / tokens, heads: 32, tokens, headDim, isCausal },
    })),
  ),
);
/** Batches as the SageAttention paper (arXiv 2410.02367) has them, or 1; and two so small that a launch is what counts. */
const MODELS: readonly Named[] = [
  { name: 'TIMM ViT', batch: 12, heads: 64, tokens: 197, headDim: 64, isCausal: false },
  { name: 'Unidiffuser', batch: 4, heads: 24, tokens: 1105, headDim: 64, isCausal: false },
  { name: 'Whisper encoder', batch: 8, heads: 20, tokens: 1500, headDim: 64, isCausal: false },
  { name: 'Llama 2', batch: 4, heads: 32, tokens: 1536, headDim: 128, isCausal: true },
  { name: 'FLUX', batch: 1, heads: 24, tokens: 4608, headDim: 128, isCausal: false },
  { name: 'UltraPixel', batch: 2, heads: 32, tokens: 7285, headDim: 64, isCausal: false },
  { name: 'CogVideoX', batch: 2, heads: 30, tokens: 17776, headDim: 64, isCausal: false },
  { name: 'Wan', batch: 1, heads: 12, tokens: 32760, headDim: 128, isCausal: false },
  { name: '512 x 2', batch: 2, heads: 32, tokens: 512, headDim: 128, isCausal: false },
  { name: '64 x 1', batch: 1, heads: 16, tokens: 64, headDim: 64, isCausal: false },
];
const VARIANT_LENGTHS = [128, 512, 1024, 16384];
const CAUSAL_VARIANT_LENGTHS = [128, 256, 512, 1024, 2048];
const SAMPLED_ROWS = 8;

interface Task {
  readonly shape: Named;
  readonly kernel: KernelName;
  readonly variant: string;
}

/** What a task found; `error` instead when it failed. */
interface Outcome {
  readonly task: Task;
  readonly error?: string;
  readonly milliseconds?: number;
  readonly tflops?: number;
  readonly relativeL1?: number;
}

const SHAPES = [...TABLE, ...MODELS].filter(({ name }) => name.includes(flags.only));
const PEER: KernelName = 'qk-int8-pv-fp8-cuda-sm90';

/** Most important first. */
function tasks(): Task[] {
  const of = (kernel: KernelName) => SHAPES.map((shape): Task => ({ shape, kernel, variant: '' }));
  const varied = flags.variants
    ? SHAPES.filter(
        (shape) =>
          TABLE.includes(shape) && (shape.isCausal ? CAUSAL_VARIANT_LENGTHS : VARIANT_LENGTHS).includes(shape.tokens),
      )
    : [];
  const variants = varied.flatMap((shape) =>
    Object.entries(EXACT_VARIANTS)
      .filter(([, { consumers, minBlocks }]) => (consumers !== 3 && minBlocks !== 2) || shape.headDim === 64)
      .map(([variant]): Task => ({ shape, kernel: 'exact', variant })),
  );
  return [...of('exact'), ...of(PEER), ...variants];
}

interface Operands {
  readonly q: CudaTensor;
  readonly k: CudaTensor;
  readonly v: CudaTensor;
}

function measure(device: CudaDevice, { shape, kernel, variant }: Task, host: HostInputs, flat: Operands) {
  const { batch, heads, tokens, headDim, isCausal } = shape;
  const view = ({ memory }: CudaTensor) => cudaTensorOn(memory, 'bfloat16', [batch, heads, tokens, headDim]);
  const [q, k, v] = [view(flat.q), view(flat.k), view(flat.v)];
  const problem = createProblem(q, k, v, { isCausal });
  const choice = chooseOptions(descriptorOf(kernel), problem, {});
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const overrides = variant === '' ? {} : (EXACT_VARIANTS[variant] as Partial<WgmmaTuning>);
  const bench = new Workbench(device, planLaunches(problem, choice, factsOf(device), { overrides }), addresses);
  try {
    const milliseconds = timeOnDevice(device, () => bench.run());
    const [actual, expected]: [number[], number[]] = [[], []];
    for (const row of sampleRows(new Random(1), shape, SAMPLED_ROWS)) {
      const entry = Math.floor(row.head / heads);
      const ofHead = slice(slice(output, 0, entry, entry + 1), 1, row.head % heads, (row.head % heads) + 1);
      actual.push(...toFloat32(download(slice(ofHead, 2, row.token, row.token + 1))));
      expected.push(...exactRow(host, shape, row));
    }
    const { relativeL1 } = compare(actual, expected);
    return { milliseconds, tflops: tflops(shape, milliseconds), relativeL1 };
  } finally {
    bench.dispose();
    output.memory.dispose();
  }
}

async function worker(first: number): Promise<never> {
  const device = (await new CudaBackend().cuda()).device();
  const random = new Random(Number(flags.seed));
  const largest = Math.max(...SHAPES.map(({ batch, heads, tokens, headDim }) => batch * heads * tokens * headDim));
  const host: HostInputs = {
    q: normalBits(random, largest, 0),
    k: normalBits(random, largest, 2),
    v: normalBits(random, largest, 0),
  };
  const flat = { q: sendBits(device, host.q), k: sendBits(device, host.k), v: sendBits(device, host.v) };
  const perform = (task: Task) => measure(device, task, host, flat);
  return work(tasks(), first, {}, perform, () => device.lost !== undefined);
}

const fixed = (value: number | undefined, digits: number) => (value === undefined ? '-' : value.toFixed(digits));

function summaryOf(outcomes: readonly Outcome[], torch: ReturnType<typeof torchTimes>): string {
  const cudnn = ({ batch, heads, tokens, headDim, isCausal }: Shape) =>
    torch?.results.find(
      (row) =>
        row.batch === batch &&
        row.heads === heads &&
        row.tokens === tokens &&
        row.headDim === headDim &&
        row.isCausal === isCausal,
    )?.milliseconds;
  return [
    '| shape | exact | FP8 with quantization | cuDNN BF16 | exact over cuDNN | FP8 over cuDNN | relative L1 of exact, FP8 |',
    '|---|---|---|---|---|---|---|',
    ...SHAPES.map((shape) => {
      const of = (kernel: KernelName) =>
        outcomes.find(({ task }) => task.shape.name === shape.name && task.kernel === kernel && task.variant === '');
      const [exact, fp8, peer] = [of('exact'), of(PEER), cudnn(shape)];
      const ratio = (own: Outcome | undefined) =>
        own?.milliseconds === undefined || peer === undefined ? '-' : `${fixed(peer / own.milliseconds, 2)}x`;
      const errors = [exact, fp8].map((own) => fixed(own?.relativeL1, 4)).join(', ');
      return `| ${shape.name} | ${fixed(exact?.milliseconds, 4)} | ${fixed(fp8?.milliseconds, 4)} | ${fixed(peer, 4)} | ${ratio(exact)} | ${ratio(fp8)} | ${errors} |`;
    }),
    '',
    ...outcomes
      .filter(({ task, error }) => task.variant !== '' || error !== undefined)
      .map(
        ({ task, error, milliseconds, tflops: rate }) =>
          `${task.shape.name}, ${task.kernel} ${task.variant}: ${error ?? `${fixed(milliseconds, 4)} ms, ${fixed(rate, 0)} TFLOP/s`}`,
      ),
  ].join('\n');
}

async function main(): Promise<number> {
  if (flags.worker !== undefined) return worker(Number(flags.worker));
  const [folder] = positionals;
  if (folder === undefined) {
    console.error('usage: bench-cuda-short.mjs OUTPUT_FOLDER [--variants] [--only TEXT] [--seconds 85]');
    return 2;
  }
  const deadline = Date.now() + Number(flags.seconds) * 1000;
  const { available, reason, remedy } = await new CudaBackend().availability();
  if (!available) {
    console.error(`the benchmark could not run: ${reason}. ${remedy}`);
    return 2;
  }
  mkdirSync(folder, { recursive: true });
  const list = tasks();
  console.error(`${list.length} tasks; torch first`);
  const torch = torchTimes(SHAPES, ['CUDNN_ATTENTION']);
  for (const { tokens, batch, headDim, isCausal, milliseconds } of torch?.results ?? []) {
    console.error(
      `cuDNN ${tokens} x ${batch} D=${headDim} ${isCausal ? 'causal' : 'full'}: ${fixed(milliseconds, 4)} ms`,
    );
  }
  const seed = runSeed();
  const outcomes: Outcome[] = [];
  await runInWorkers<Omit<Outcome, 'task'>, object>({
    argumentsFor: (first) => [
      ...['--worker', String(first), '--seed', String(seed), '--only', flags.only],
      ...(flags.variants ? ['--variants'] : []),
    ],
    tasks: list.length,
    deadline,
    silenceSeconds: 12,
    onFacts: () => {},
    onOutcome: (index, outcome) => {
      const task = list[index] as Task;
      outcomes.push({ task, ...outcome });
      const { milliseconds, relativeL1, error } = outcome as Outcome;
      console.error(
        `${task.shape.name}, ${task.kernel} ${task.variant}: ${error ?? `${fixed(milliseconds, 4)} ms, L1 ${fixed(relativeL1, 4)}`}`,
      );
      const report = {
        date: new Date().toISOString(),
        commit: process.env.SAGEATTENTION_COMMIT,
        seed,
        torch,
        outcomes,
      };
      writeFileSync(join(folder, 'short.json'), `${JSON.stringify(report, null, 1)}\n`);
    },
  });
  const summary = `${nvidiaSmi()}\n${summaryOf(outcomes, torch)}\n`;
  writeFileSync(join(folder, 'short.md'), summary);
  console.log(summary);
  return outcomes.length === list.length ? 0 : 1;
}

process.exitCode = await main();
