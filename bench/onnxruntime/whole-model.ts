/**
 * A stack of diffusion transformer blocks (16 heads of 72, hidden 1152, float16) through onnxruntime-web's WebGPU
 * provider in Node: the whole model, with SageAttention (markers), with SageAttention between pieces (`cut`), without, and cut in
 * pieces with onnxruntime's own attention between them, which is the cost of cutting by itself; and with SageAttention as it comes, which leaves short
 * attention alone. All on one device, interleaved in the same run. Attention is written in two ways: `fused`, one
 * operator, for which onnxruntime has a kernel that never stores the scores, and `decomposed`, in single operators, as
 * exporters write it.
 *
 *     npx tsx bench/onnxruntime/whole-model.ts OUTPUT_FOLDER [--lengths 256,1024,8192,32768] [--blocks 4] [--runs 7]
 *         [--seconds 6] [--limit 120] [--patience 90] [--spellings decomposed,fused] [--float float16,float32]
 *         [--provider webgpu|wasm] [--model dit|decoder] [--variants without,byDefault]
 *
 * `--model decoder` is one step of a decoder instead: one query, a cache of as many tokens as `--lengths` says, a quarter of the heads in keys and
 * values, attention in single operators (`--spellings decomposed`).
 *
 * Each spelling and type runs in a process of its own with a time limit. Writes `onnxruntime.json` and `onnxruntime.md`
 * after every length. Times are medians of wall clock from `run` until the GPU has finished; inputs and outputs are on
 * the GPU, so that no transfer is in them.
 */

import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { WANTED_LIMITS } from '../../src/backends/webgpu/capabilities.ts';
import { createWebgpuBackend, emptyGpuTensor } from '../../src/backends/webgpu/index.ts';
import { messageOf } from '../../src/errors.ts';
import {
  enableNodeWebgpu,
  type SageAttentionOptions,
  withSageAttention,
} from '../../src/integrations/onnxruntime/index.ts';
import type { OrtFeeds, OrtSession, OrtTensor } from '../../src/integrations/onnxruntime/ort.ts';
import type { AttentionReport } from '../../src/integrations/onnxruntime/session/report.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { float16FromNumber } from '../../src/tensor/formats/float16.ts';
import { bitsOf, tensor } from '../../src/tensor/tensor.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';
import { type AttentionSpelling, buildDecoder, buildDiT } from '../../test/support/models.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    lengths: { type: 'string', default: '256,512,1024,2048,4096,8192,16384,32768' },
    spellings: { type: 'string', default: 'decomposed,fused' },
    blocks: { type: 'string', default: '4' },
    heads: { type: 'string', default: '16' },
    'head-dim': { type: 'string', default: '72' },
    runs: { type: 'string', default: '7' },
    /** Time for one length and spelling, after which no further run starts; three runs are made at least. */
    seconds: { type: 'string', default: '6' },
    /** Seconds for one spelling and type, and those until its first row. */
    limit: { type: 'string', default: '120' },
    patience: { type: 'string', default: '90' },
    provider: { type: 'string', default: 'webgpu' },
    float: { type: 'string', default: 'float16,float32' },
    model: { type: 'string', default: 'dit' },
    variants: { type: 'string', default: 'with,without,cut,cutOnly,byDefault' },
  },
});

/** Ends the program with one line. */
function fail(message: string): never {
  console.error(message);
  process.exit(1);
}

/** The first line of what went wrong: onnxruntime's errors carry its whole source behind them. */
const firstLineOf = (error: unknown): string => {
  const text = messageOf(error);
  return (text.split('\n')[0] as string).slice(0, 200);
};
process.on('uncaughtException', (error) => fail(firstLineOf(error)));
process.on('unhandledRejection', (error) => fail(firstLineOf(error)));

const folder = positionals[0] ?? fail('give the folder for the results');
const size = { heads: Number(flags.heads), headDim: Number(flags['head-dim']), blocks: Number(flags.blocks) };
const width = size.heads * size.headDim;
const floatTypes = flags.float.split(',') as ('float16' | 'float32')[];
const spellings = flags.spellings.split(',') as AttentionSpelling[];
const lengths = flags.lengths.split(',').map(Number);

interface Row {
  readonly spelling: AttentionSpelling;
  readonly float: 'float16' | 'float32';
  readonly length: number;
  /** Milliseconds. */
  readonly without: number | undefined;
  readonly with: number | undefined;
  /** How the attentions of `with` were taken: `marker`, or why they were cut. */
  readonly paths: readonly string[];
  /** Without markers. */
  readonly cut: number | undefined;
  readonly cutOnly: number | undefined;
  /** With no options: attention below the default of `minTokens` stays with onnxruntime. */
  readonly byDefault: number | undefined;
  readonly speedup: number | undefined;
  readonly defaultSpeedup: number | undefined;
  readonly cutCost: number | undefined;
  /** Of one block. */
  readonly attentionAlone: number | undefined;
  readonly accuracy: ReturnType<typeof compare> | undefined;
  readonly failures: Readonly<Record<string, string>>;
}

interface Report {
  readonly [what: string]: unknown;
  readonly results?: readonly Row[];
}

const resultFile = (target: string) => join(target, 'onnxruntime.json');
const readReport = (target: string): Report =>
  existsSync(resultFile(target)) ? (JSON.parse(readFileSync(resultFile(target), 'utf8')) as Report) : {};

/** Writes a report, with its rows as a table. */
function writeReport(target: string, report: Report): void {
  mkdirSync(target, { recursive: true });
  writeFileSync(resultFile(target), `${JSON.stringify(report, null, 2)}\n`);
  const cell = (value: number | null | undefined, digits = 2) => value?.toFixed(digits) ?? '';
  const lines = (report.results ?? []).map((row) => {
    const { without, speedup, cutOnly, byDefault, defaultSpeedup, attentionAlone } = row;
    const times = [without, row.with, speedup, row.cut, byDefault, defaultSpeedup, cutOnly, attentionAlone];
    const numbers = times.map((value) => cell(value));
    return `| ${row.spelling} | ${row.float} | ${row.length} | ${numbers.join(' | ')} | ${cell(row.accuracy?.cosineSimilarity, 6)} |`;
  });
  const header =
    '| attention | type | tokens | without (ms) | with (ms) | speedup | cut (ms) | by default (ms) | speedup | cut only (ms) | one attention alone (ms) | cosine similarity |\n|---|---|---|---|---|---|---|---|---|---|---|---|';
  writeFileSync(join(target, 'onnxruntime.md'), `${header}\n${lines.join('\n')}\n`);
}

/** What a process is doing, which it cannot say itself while a driver keeps it. */
const currentFile = (target: string) => join(target, 'current.txt');

/** One spelling and type in a process of its own, which is ended when it takes too long. */
function runProcess(target: string, spelling: AttentionSpelling, float: string): Promise<void> {
  mkdirSync(target, { recursive: true });
  const own = { ...flags, spellings: spelling, float };
  const rest = Object.entries(own).flatMap(([name, value]) => [`--${name}`, `${value}`]);
  const child = spawn(process.execPath, [...process.execArgv, process.argv[1] as string, target, ...rest], {
    stdio: 'inherit',
  });
  const start = performance.now();
  const watch = setInterval(() => {
    const seconds = (performance.now() - start) / 1000;
    const limit = existsSync(resultFile(target)) ? flags.limit : flags.patience;
    if (seconds < Number(limit)) return;
    const doing = existsSync(currentFile(target)) ? readFileSync(currentFile(target), 'utf8') : 'starting';
    console.error(`${spelling}, ${float}: ended after ${seconds.toFixed(0)} s, while ${doing}`);
    child.kill('SIGKILL');
  }, 1000);
  return new Promise((resolve) => {
    child.on('exit', () => {
      clearInterval(watch);
      resolve();
    });
  });
}

if (spellings.length * floatTypes.length > 1) {
  // A process each: a runtime that fails or waits for ever in one leaves the others their numbers.
  let merged: Report = {};
  for (const float of floatTypes) {
    for (const spelling of spellings) {
      const target = join(folder, `${spelling}-${float}`);
      await runProcess(target, spelling, float);
      const report = readReport(target);
      merged = { ...report, ...merged, results: [...(merged.results ?? []), ...(report.results ?? [])] };
      writeReport(folder, merged);
    }
  }
  process.exit(0);
}
const [spelling] = spellings as [AttentionSpelling];
const [float] = floatTypes as ['float16' | 'float32'];
mkdirSync(folder, { recursive: true });
const mark = (what: string) => writeFileSync(currentFile(folder), what);

/** The current step, for the log: a long step is reported, unless it blocks this thread. */
let current = { what: 'start', since: performance.now() };
function step(what: string): void {
  const now = performance.now();
  if (now - current.since > 2000)
    console.log(`${spelling}: ${current.what} took ${((now - current.since) / 1000).toFixed(1)} s`);
  current = { what, since: now };
  mark(what);
}
setInterval(() => {
  console.log(`${spelling}: ${current.what} since ${((performance.now() - current.since) / 1000).toFixed(0)} s`);
}, 15_000).unref();

const gpu = flags.provider === 'webgpu' ? await enableNodeWebgpu() : undefined;
const adapter = await gpu?.requestAdapter({ powerPreference: 'high-performance' });
if (gpu !== undefined && adapter == null) fail('no GPU adapter was found');
if (float === 'float16' && adapter != null && !adapter.features.has('shader-f16')) {
  fail(
    `${adapter.info.description}: no feature 'shader-f16', which onnxruntime needs for a float16 model; use --float float32`,
  );
}
const ort = gpu === undefined ? await import('onnxruntime-web') : await import('onnxruntime-web/webgpu');
// Its WebGPU build finds no workers in Node.
if (gpu !== undefined) ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'fatal';

/** What WebGPU reported outside any call since it was last looked at: results behind it are worth nothing. */
let gpuError: string | undefined;

/** Every feature and limit of the adapter: onnxruntime and SageAttention each use the ones that they know. */
async function openDevice(): Promise<GPUDevice | undefined> {
  if (adapter == null) return undefined;
  const requiredFeatures = [...adapter.features] as GPUFeatureName[];
  const requiredLimits = Object.fromEntries(WANTED_LIMITS.map((name) => [name, adapter.limits[name]]));
  const opened = await adapter.requestDevice({ requiredFeatures, requiredLimits });
  opened.addEventListener('uncapturederror', (event) => {
    gpuError ??= firstLineOf((event as GPUUncapturedErrorEvent).error.message);
  });
  // Drivers have been seen to compile for minutes: the shader that they are at is kept.
  const createShaderModule = opened.createShaderModule.bind(opened);
  opened.createShaderModule = (descriptor) => {
    writeFileSync(join(folder, 'current.wgsl'), descriptor.code);
    return createShaderModule(descriptor);
  };
  let pipelines = 0;
  for (const name of ['createComputePipeline', 'createComputePipelineAsync'] as const) {
    const create = opened[name].bind(opened) as (descriptor: GPUComputePipelineDescriptor) => never;
    opened[name] = (descriptor: GPUComputePipelineDescriptor) => {
      mark(`compiling pipeline ${++pipelines} (current.wgsl) in ${current.what}`);
      return create(descriptor);
    };
  }
  opened.lost.then((info) => {
    if (info.reason !== 'destroyed') fail(`the device was lost: ${firstLineOf(info.message)}`);
  });
  return opened;
}
const device = await openDevice();
const backend = device && createWebgpuBackend({ device });
const { details } = (await backend?.availability()) ?? { details: { adapter: 'CPU' } as Record<string, string> };
console.log(
  Object.entries(details)
    .map(([name, value]) => `${name}: ${value}`)
    .join('\n'),
);

const options = {
  executionProviders: device === undefined ? ['wasm'] : [{ name: 'webgpu', device }],
  preferredOutputLocation: device === undefined ? 'cpu' : 'gpu-buffer',
  logSeverityLevel: 4,
} as never;

/** Normal numbers, where the model runs. */
function floats(random: Random, dims: readonly number[]): OrtTensor {
  const values = random.normals(dims.reduce((product, n) => product * n, 1));
  // Buffers are written in words of four bytes.
  const bits = new Uint16Array(float === 'float16' ? values.length + (values.length % 2) : 0);
  for (let i = 0; i < values.length && float === 'float16'; i++) bits[i] = float16FromNumber(values[i] as number);
  const data = float === 'float16' ? bits : values;
  if (device === undefined)
    return new ort.Tensor(float, data.subarray(0, values.length) as never, dims) as unknown as OrtTensor;
  const { buffer } = emptyGpuTensor(device, float, dims);
  device.queue.writeBuffer(buffer, 0, data as BufferSource);
  return ort.Tensor.fromGpuBuffer(buffer, {
    dataType: float,
    dims,
    dispose: () => buffer.destroy(),
  }) as unknown as OrtTensor;
}

async function numbersOf(output: OrtTensor): Promise<Float32Array> {
  const data = output.location === 'gpu-buffer' ? await output.getData() : output.data;
  return data instanceof Float32Array
    ? data
    : toFloat32(tensor(bitsOf(data as Uint16Array), [output.size], { dtype: 'float16' }));
}

/** Normal numbers that come again: as good as new ones for time, and a model has a hundred million of them. */
class RepeatedRandom extends Random {
  readonly #numbers = super.normals(65_537);
  #at = 0;

  override normals(length: number, scale = 1): Float32Array {
    const values = new Float32Array(length);
    for (let i = 0; i < length; i++) {
      values[i] = (this.#numbers[this.#at] as number) * scale;
      this.#at = this.#at === 65_536 ? 0 : this.#at + 1;
    }
    return values;
  }
}

interface Variant {
  readonly name: 'without' | 'with' | 'cut' | 'cutOnly' | 'byDefault';
  readonly session: OrtSession & { readonly sageAttention?: readonly AttentionReport[] };
  readonly createMilliseconds: number;
  /** Why it is not run any more: what failed at one length fails at longer ones. */
  failure: string | undefined;
}

// Finite, so that the model is cut, and above every length, so that each attention is onnxruntime's, between the
// pieces.
const CUT_ONLY = Number.MAX_SAFE_INTEGER;

async function openVariants(model: Uint8Array): Promise<Variant[]> {
  const open = async (name: Variant['name'], create: () => Promise<unknown>): Promise<Variant> => {
    step(`opening '${name}'`);
    const start = performance.now();
    const session = (await create()) as Variant['session'];
    return { name, session, createMilliseconds: performance.now() - start, failure: undefined };
  };
  const sage = (own: SageAttentionOptions) => withSageAttention(ort, own).InferenceSession.create(model, options);
  const creates: Record<Variant['name'], () => Promise<unknown>> = {
    // First, since it spares the process the half minute that onnxruntime-web waits in Node.
    byDefault: () => sage({}),
    with: () => sage({ minTokens: 0 }),
    without: () => ort.InferenceSession.create(model, options),
    cut: () => sage({ minTokens: 0, markers: false }),
    cutOnly: () => sage({ minTokens: CUT_ONLY, markers: false, wholeFallback: false }),
  };
  const wanted = flags.variants.split(',');
  const opened: Variant[] = [];
  for (const [name, create] of Object.entries(creates)) {
    if (wanted.includes(name)) opened.push(await open(name as Variant['name'], create));
  }
  return opened;
}

/** One run, until the GPU has finished. */
async function timed(
  { name, session }: Variant,
  feeds: OrtFeeds,
): Promise<{ milliseconds: number; output: OrtTensor }> {
  step(`a run of '${name}'`);
  const start = performance.now();
  const { y, ...others } = await (session.run as (feeds: OrtFeeds) => Promise<Record<string, OrtTensor>>)(feeds);
  await device?.queue.onSubmittedWorkDone();
  const milliseconds = performance.now() - start;
  for (const tensor of Object.values(others)) tensor.dispose();
  if (gpuError !== undefined) {
    const error = new Error(gpuError);
    gpuError = undefined;
    throw error;
  }
  return { milliseconds, output: y as OrtTensor };
}

const WARM_UPS = 2;
const LEAST_RUNS = 3;

interface Measured {
  readonly times: Map<Variant['name'], number[]>;
  readonly outputs: Map<Variant['name'], Float32Array>;
}

/** Times of all variants, interleaved; outputs are read between the times. */
async function measure(variants: readonly Variant[], feeds: OrtFeeds): Promise<Measured> {
  const times = new Map(variants.map(({ name }) => [name, [] as number[]]));
  const outputs = new Map<Variant['name'], Float32Array>();
  const start = performance.now();
  for (let run = -WARM_UPS; run < Number(flags.runs); run++) {
    if (run >= LEAST_RUNS && performance.now() - start > 1000 * Number(flags.seconds)) break;
    for (const variant of variants) {
      if (variant.failure !== undefined) continue;
      try {
        const { milliseconds, output } = await timed(variant, feeds);
        if (run >= 0) times.get(variant.name)?.push(milliseconds);
        if (!outputs.has(variant.name)) outputs.set(variant.name, await numbersOf(output));
        output.dispose();
      } catch (error) {
        variant.failure = firstLineOf(error);
        outputs.delete(variant.name);
        times.set(variant.name, []);
        // Later reports of this run must not count for the next one.
        await device?.queue.onSubmittedWorkDone();
        await new Promise((resolve) => setTimeout(resolve, 10));
        gpuError = undefined;
      }
    }
  }
  return { times, outputs };
}

/** One attention of the model by itself, several in a row without a wait. */
async function attentionAlone(length: number): Promise<number | undefined> {
  if (device === undefined || backend === undefined) return undefined;
  const shape = [1, length, size.heads, size.headDim];
  const operands = [0, 1, 2].map(() => emptyGpuTensor(device, float, shape));
  const [q, k, v] = operands as [(typeof operands)[0], (typeof operands)[0], (typeof operands)[0]];
  const plan = await backend.createPlan({ q, k, v }, { tensorLayout: 'NHD' });
  const output = emptyGpuTensor(device, float, shape);
  const times: number[] = [];
  for (let run = 0; run < WARM_UPS + LEAST_RUNS; run++) {
    const start = performance.now();
    const encoder = device.createCommandEncoder();
    for (let block = 0; block < size.blocks; block++) plan.encode(encoder, { q, k, v }, { output });
    device.queue.submit([encoder.finish()]);
    await device.queue.onSubmittedWorkDone();
    if (run >= WARM_UPS) times.push((performance.now() - start) / size.blocks);
  }
  if (length === lengths[0]) console.log(`attention: ${plan.details.family} ${plan.details.variant}`);
  plan.dispose();
  for (const { buffer } of [...operands, output]) buffer.destroy();
  return median(times);
}

const isDecoder = flags.model === 'decoder';
const kvHeads = Math.max(1, size.heads / 4);

const ditFeeds = (random: Random, length: number): OrtFeeds => ({
  x: floats(random, [1, length, width]),
  c: floats(random, [1, width]),
});

/** One query behind `length` tokens. */
function stepFeeds(random: Random, length: number): OrtFeeds {
  const feeds: Record<string, OrtTensor> = {
    x: floats(random, [1, 1, width]),
    mask: floats(random, [1, 1, 1, length + 1]),
  };
  for (let block = 0; block < size.blocks; block++) {
    for (const kind of ['key', 'value']) {
      feeds[`past_${kind}.${block}`] = floats(random, [1, kvHeads, length, size.headDim]);
    }
  }
  return feeds;
}

const rows: Row[] = [];
step('building the model');
const g = new GraphBuilder(new RepeatedRandom(1), float);
if (isDecoder) buildDecoder(g, size, kvHeads);
else buildDiT(g, size, spelling);
const variants = await openVariants(g.build());
const created = Object.fromEntries(variants.map(({ name, createMilliseconds }) => [name, createMilliseconds]));
for (const length of lengths) {
  const random = new RepeatedRandom(2);
  const feeds = isDecoder ? stepFeeds(random, length) : ditFeeds(random, length);
  const { times, outputs } = await measure(variants, feeds);
  for (const value of Object.values(feeds)) value.dispose();
  const [without, sage, cut, cutOnly, byDefault] = (['without', 'with', 'cut', 'cutOnly', 'byDefault'] as const).map(
    (name) => (times.get(name)?.length ? median(times.get(name) ?? []) : undefined),
  );
  const replaced = variants.find(({ name }) => name === 'with' || name === 'byDefault')?.session.sageAttention;
  const expected = outputs.get('without') ?? outputs.get('cutOnly');
  const actual = outputs.get('with') ?? outputs.get('byDefault');
  const row: Row = {
    spelling,
    float,
    length,
    without,
    with: sage,
    paths: [...new Set(replaced?.map(({ path, cutReason }) => cutReason ?? path ?? 'left'))],
    cut,
    cutOnly,
    byDefault,
    speedup: without !== undefined && sage !== undefined ? without / sage : undefined,
    defaultSpeedup: without !== undefined && byDefault !== undefined ? without / byDefault : undefined,
    cutCost: without !== undefined && cutOnly !== undefined ? cutOnly - without : undefined,
    attentionAlone: await (isDecoder ? Promise.resolve(undefined) : attentionAlone(length)).catch((error: unknown) => {
      console.error(`attention alone: ${firstLineOf(error)}`);
      return undefined;
    }),
    accuracy: expected && actual && compare(actual, expected),
    failures: Object.fromEntries(
      variants.flatMap(({ name, failure }) => (failure === undefined ? [] : [[name, failure]])),
    ),
  };
  rows.push(row);
  writeReport(folder, {
    machine: thisMachine(),
    ...details,
    onnxruntime: ort.env.versions.web,
    ...size,
    created,
    results: rows,
  });
  const left = replaced?.find(({ taken }) => !taken);
  console.log(
    [
      `${spelling}, ${float}, ${length} tokens: without ${without?.toFixed(2)} ms, with ${sage?.toFixed(2)} ms (${row.speedup?.toFixed(2)}x, ${row.paths})`,
      `cut ${cut?.toFixed(2)} ms`,
      `by default ${byDefault?.toFixed(2)} ms (${row.defaultSpeedup?.toFixed(2)}x)`,
      `cut only ${cutOnly?.toFixed(2)} ms, attention alone ${size.blocks} x ${row.attentionAlone?.toFixed(2)} ms`,
      `cosine similarity ${row.accuracy?.cosineSimilarity.toFixed(6)}`,
      ...(left === undefined ? [] : [`left: ${left.reason}`]),
      ...Object.entries(row.failures).map(([name, failure]) => `${name} failed: ${failure}`),
    ].join(', '),
  );
}
step('release');
for (const { session } of variants) await session.release();
device?.destroy();
for (const file of [currentFile(folder), join(folder, 'current.wgsl')]) rmSync(file, { force: true });
process.exit(0);
