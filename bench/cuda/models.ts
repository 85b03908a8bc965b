/**
 * Attention of public models at their real sizes, on activations that their blocks made (random weights): time of exact attention and of
 * every kernel, with its error, and what the attention of one step comes to.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-models.mjs OUTPUT_FOLDER [--models TEXT]
 *
 * Needs python3 with torch and numpy beside the card. Writes `models.json` and `models.md` there.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  download,
  emptyCudaTensor,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { messageOf } from '../../src/errors.ts';
import type { AttentionOptions, KernelName } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { slice } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, type HostInputs, type SampledRow, sampleRows, sendBits } from './inputs.ts';
import { type ModelActivations, type ModelShape, modelActivations } from './models-torch.ts';
import { factsOf, nvidiaSmi, tflops, Workbench } from './workbench.ts';

/** From the models' public configurations; lengths are those of the resolution and duration that they were made for. */
const MODELS: readonly ModelShape[] = [
  {
    name: 'CogVideoX-2B',
    tokensAre: '49 frames of 480x720 (13x30x45) and 226 of text',
    ...{ tokens: 17776, layers: 30, hidden: 1920, heads: 30, kvHeads: 30, headDim: 64, ffn: 7680 },
    ...{ isCausal: false, qkNorm: 'layer-head', rope: null, grid: [13, 30, 45], modulated: true },
  },
  {
    name: 'Wan 2.1 1.3B',
    tokensAre: '81 frames of 480x832 (21x30x52)',
    ...{ tokens: 32760, layers: 30, hidden: 1536, heads: 12, kvHeads: 12, headDim: 128, ffn: 8960 },
    ...{ isCausal: false, qkNorm: 'rms-all', grid: [21, 30, 52], modulated: true },
    rope: { channels: [44, 42, 42], theta: 10_000 },
  },
  {
    name: 'HunyuanVideo',
    tokensAre: '129 frames of 720x1280 (33x45x80) and 256 of text',
    ...{ tokens: 119_056, layers: 60, hidden: 3072, heads: 24, kvHeads: 24, headDim: 128, ffn: 12_288 },
    ...{ isCausal: false, qkNorm: 'rms-head', grid: [33, 45, 80], modulated: true },
    rope: { channels: [16, 56, 56], theta: 256 },
  },
  {
    name: 'Llama-3-8B',
    tokensAre: 'a prompt of 8192',
    ...{ tokens: 8192, layers: 32, hidden: 4096, heads: 32, kvHeads: 8, headDim: 128, ffn: 14_336 },
    ...{ isCausal: true, qkNorm: 'none', grid: [8192], modulated: false },
    rope: { channels: [128], theta: 500_000 },
  },
];

const SETTINGS: readonly { readonly kernel: KernelName; readonly options: AttentionOptions }[] = [
  { kernel: 'qk-int8-pv-fp8-cuda-sm90', options: {} },
  { kernel: 'qk-int8-pv-fp16-cuda-sm90', options: {} },
  { kernel: 'qk-int8-pv-fp8-cuda', options: {} },
  { kernel: 'qk-int8-pv-fp16-cuda', options: {} },
  { kernel: 'qk-int4-pv-fp8-cuda', options: {} },
  { kernel: 'qk-fp4-pv-fp8-cuda', options: {} },
  { kernel: 'qk-fp4-pv-fp4-cuda', options: {} },
];

const SAMPLED_ROWS = 24;

interface Result {
  readonly model: string;
  readonly kernel: KernelName;
  /** Of a call, quantization included. */
  readonly milliseconds: number;
  readonly tflops: number;
  readonly relativeL1: number;
  readonly cosineSimilarity: number;
}

const halves = (file: string): Uint16Array => {
  const { buffer, byteOffset, byteLength } = readFileSync(file);
  // A file of hundreds of megabytes has a buffer of its own; a small one may lie at an odd place of a shared one.
  return byteOffset % 2 === 0
    ? new Uint16Array(buffer, byteOffset, byteLength / 2)
    : new Uint16Array(buffer.slice(byteOffset, byteOffset + byteLength));
};

/** In float64, of one row: the keys of its head are those of its group. */
function exactOf(host: HostInputs, model: ModelShape, { head, token }: SampledRow): Float64Array {
  const { tokens, heads, kvHeads, headDim, isCausal } = model;
  const size = tokens * headDim;
  const of = (values: Uint16Array, at: number) => values.subarray(at * size, (at + 1) * size);
  const kvHead = Math.floor(head / (heads / kvHeads));
  const one = { q: of(host.q, head), k: of(host.k, kvHead), v: of(host.v, kvHead) };
  return exactRow(one, { batch: 1, heads: 1, tokens, headDim, isCausal }, { head: 0, token });
}

function measure(
  device: CudaDevice,
  model: ModelShape,
  { kernel, options: asked }: (typeof SETTINGS)[number],
  { q, k, v }: Readonly<Record<'q' | 'k' | 'v', CudaTensor>>,
  rows: readonly SampledRow[],
  exact: readonly Float64Array[],
): Result {
  const options: AttentionOptions = { ...asked, isCausal: model.isCausal };
  const problem = createProblem(q, k, v, options);
  const choice = chooseOptions(descriptorOf(kernel), problem, options);
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const bench = new Workbench(device, planLaunches(problem, choice, factsOf(device)), addresses);
  try {
    const milliseconds = timeOnDevice(device, () => bench.run());
    const actual = rows.flatMap(({ head, token }) => [
      ...toFloat32(download(slice(slice(output, 1, head, head + 1), 2, token, token + 1))),
    ]);
    const { relativeL1, cosineSimilarity } = compare(
      actual,
      exact.flatMap((row) => [...row]),
    );
    const shape = { ...model, batch: 1 };
    return {
      model: model.name,
      kernel,
      milliseconds,
      tflops: tflops(shape, milliseconds),
      relativeL1,
      cosineSimilarity,
    };
  } finally {
    bench.dispose();
    output.memory.dispose();
  }
}

function markdown(activations: readonly ModelActivations[], results: readonly Result[]): string {
  const lines: string[] = [];
  for (const { name, exact, blockMilliseconds } of activations) {
    const model = MODELS.find((one) => one.name === name) as ModelShape;
    const fastest = Math.min(...exact.map(({ milliseconds }) => milliseconds));
    const row = (what: string, milliseconds: number, error: string) =>
      `| ${what} | ${milliseconds.toFixed(2)} | ${tflops({ ...model, batch: 1 }, milliseconds).toFixed(0)} | ${(fastest / milliseconds).toFixed(2)}x | ${((model.layers * milliseconds) / 1000).toFixed(2)} | ${error} |`;
    lines.push(
      `\n## ${name}: ${model.tokensAre}; ${model.heads} heads of ${model.headDim}, ${model.layers} layers; a block ${blockMilliseconds.toFixed(2)} ms\n`,
      '| attention | ms a call | TFLOP/s | of the fastest exact | s of a step, all layers | relative L1 / cosine |',
      '|---|---|---|---|---|---|',
      ...exact.map(({ backend, milliseconds }) => row(`torch ${backend}`, milliseconds, '')),
      ...results
        .filter((result) => result.model === name)
        .map(({ kernel, milliseconds, relativeL1, cosineSimilarity }) =>
          row(kernel, milliseconds, `${relativeL1.toFixed(4)} / ${cosineSimilarity.toFixed(5)}`),
        ),
    );
  }
  return lines.join('\n');
}

function measureModel(device: CudaDevice, random: Random, { name, files }: ModelActivations): Result[] {
  const model = MODELS.find((one) => one.name === name) as ModelShape;
  const { tokens, heads, kvHeads, headDim } = model;
  const host: HostInputs = { q: halves(files.q), k: halves(files.k), v: halves(files.v) };
  const tensors = {
    q: sendBits(device, host.q, [1, heads, tokens, headDim]),
    k: sendBits(device, host.k, [1, kvHeads, tokens, headDim]),
    v: sendBits(device, host.v, [1, kvHeads, tokens, headDim]),
  };
  const rows = sampleRows(random, { batch: 1, ...model }, SAMPLED_ROWS);
  const exact = rows.map((row) => exactOf(host, model, row));
  const results: Result[] = [];
  try {
    for (const setting of SETTINGS) {
      if (lackedBy(setting.kernel, device.computeCapability) !== undefined) continue;
      try {
        const result = measure(device, model, setting, tensors, rows, exact);
        results.push(result);
        console.error(
          `${name}, ${setting.kernel}: ${result.milliseconds.toFixed(2)} ms, L1 ${result.relativeL1.toFixed(4)}`,
        );
      } catch (error) {
        console.error(`${name}, ${setting.kernel}: ${messageOf(error)}`);
        if (device.lost !== undefined) throw error;
      }
    }
  } finally {
    for (const { memory } of Object.values(tensors)) memory.dispose();
  }
  return results;
}

async function main(): Promise<number> {
  const { values: flags, positionals } = parseArgs({
    allowPositionals: true,
    options: { models: { type: 'string', default: '' } },
  });
  const [folder] = positionals;
  if (folder === undefined) {
    console.error('usage: bench-cuda-models.mjs OUTPUT_FOLDER [--models TEXT]');
    return 2;
  }
  const backend = new CudaBackend();
  const { available, reason, remedy, details } = await backend.availability();
  if (!available) {
    console.error(`the benchmark could not run: ${reason}. ${remedy}`);
    return 2;
  }
  const device = (await backend.cuda()).device();
  const seed = runSeed();
  const random = new Random(seed);
  mkdirSync(folder, { recursive: true });
  const scratch = mkdtempSync(join(tmpdir(), 'models-'));
  try {
    const models = MODELS.filter(({ name }) => name.includes(flags.models));
    const { torch, results: activations } = modelActivations(models, scratch, seed);
    const results = activations.flatMap((one) => measureModel(device, random, one));
    const report = {
      schema: 'sageattention-bench-models/1',
      date: new Date().toISOString(),
      commit: process.env.SAGEATTENTION_COMMIT,
      device: details,
      smi: nvidiaSmi(),
      torch,
      seed,
      models,
      exact: activations.map(({ name, exact, blockMilliseconds }) => ({ name, exact, blockMilliseconds })),
      results,
    };
    writeFileSync(join(folder, 'models.json'), `${JSON.stringify(report, null, 2)}\n`);
    const table = markdown(activations, results);
    writeFileSync(join(folder, 'models.md'), `${table}\n`);
    console.log(table);
    return results.length > 0 ? 0 : 1;
  } finally {
    rmSync(scratch, { recursive: true });
    await backend.dispose();
  }
}

process.exitCode = await main();
