/**
 * Times every family and variant of the WebGPU backend on one GPU, beside onnxruntime's WebGPU attention on the same
 * device in the same run, with the accuracy of each. float16, 16 heads, quantization included.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu.mjs OUTPUT_FOLDER [--quick]
 *         [--lengths 1024,8192] [--head-dims 64,128] [--families matrix,subgroup,base] [--variants 4s64r16k-qk4-pv1,...] [--no-peers]
 *         [--kernel qk-int8-pv-int8]   `--variants default`: only what a caller gets
 *
 * All sizes of docs/choosing-a-kernel.md and the other head dims: `--lengths 8192,1024,512,64 --head-dims 128,64,256,80`.
 *
 * Writes `webgpu.json` and `webgpu.md` there, after every size, so that a run that is cut short leaves its results.
 * TFLOP/s count 4 H L^2 D, half when causal. Times are medians of timestamp queries around the whole plan; where the
 * device has none, of the clock around submission and completion, and the table says so. Everything that waits for the
 * CPU (compiling, accuracy) comes before; then contenders take turns, on a GPU that is kept at work, since an idle one
 * lowers its clock several times over.
 */

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import { chooseVariant, variantsOf } from '../../src/backends/webgpu/families/choose.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  emptyGpuTensor,
  type Family,
  type GpuTensor,
  gpuTensor,
  type WebgpuPlan,
} from '../../src/backends/webgpu/index.ts';
import { messageOf } from '../../src/errors.ts';
import { enableNodeWebgpu } from '../../src/integrations/onnxruntime/node-webgpu.ts';
import { attentionOperations } from '../../src/measure/operations.ts';
import { median } from '../../src/measure/statistics.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { type Accuracy, compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { float16FromNumber } from '../../src/tensor/formats/float16.ts';
import { slice, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { onnxruntimeMilliseconds } from './onnxruntime.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  allowNegative: true,
  options: {
    quick: { type: 'boolean', default: false },
    heads: { type: 'string', default: '16' },
    lengths: { type: 'string', default: '8192,1024,4096,32768' },
    'head-dims': { type: 'string', default: '64,128' },
    families: { type: 'string', default: 'matrix,subgroup,base' },
    variants: { type: 'string' },
    kernel: { type: 'string', default: 'qk-int8-pv-fp16' },
    peers: { type: 'boolean', default: true },
    'dawn-flags': {
      type: 'string',
      default: `${DAWN_FLAGS.join(' ')} disable-dawn-features=timestamp_quantization`,
    },
  },
});
const folder = positionals[0];
if (folder === undefined) throw new Error('give the folder for the results');

const HEADS = Number(flags.heads);
const list = (text: string) => text.split(',');
const LENGTHS = list(flags.lengths).map(Number);
const HEAD_DIMS = list(flags['head-dims']).map(Number);
const FAMILIES = list(flags.families) as Family[];
/** Among `--variants`: what a caller gets. */
const DEFAULT = 'default';
/** Every variant is timed at this length; elsewhere only the best few of each family. */
const TUNING_LENGTH = LENGTHS[0] as number;
const KEPT_VARIANTS = 2;
/** A relative L1 error that no right kernel has on these inputs. */
const WRONG_FROM = 0.05;
const SAMPLED_ROWS = 32;
/** K's offset per channel, which smoothing is for. */
const KEY_OFFSET = 2;
/** Contenders take turns this many times. */
const ROUNDS = flags.quick ? 3 : 5;
/** GPU time to spend on one contender's turn, milliseconds; at least {@link LEAST_REPETITIONS}. */
const BUDGET = flags.quick ? 20 : 60;
const LEAST_REPETITIONS = 2;
const MOST_REPETITIONS = 20;
/** GPU time before each round, milliseconds: clocks rise. */
const WARM_UP = 300;

interface Timing {
  readonly family: Family;
  readonly variant: string;
  readonly milliseconds: number;
  readonly tflops: number;
  readonly timestamps: boolean;
  readonly compileMilliseconds: number;
  readonly accuracy: Accuracy;
}

interface Contender {
  readonly family: Family;
  readonly variant: string;
  readonly plan: WebgpuPlan;
  /** Milliseconds of a run on a GPU that may be cold. */
  readonly once: number;
  readonly accuracy: Accuracy;
  readonly times: number[];
}

const repetitionsOf = ({ once }: Contender) =>
  Math.max(LEAST_REPETITIONS, Math.min(MOST_REPETITIONS, Math.floor(BUDGET / Math.max(once, 1e-3))));

interface Size {
  readonly headDim: number;
  readonly tokens: number;
  readonly isCausal: boolean;
}

const flopsOf = (size: Size) => attentionOperations({ ...size, heads: HEADS });
const nameOf = ({ headDim, tokens, isCausal }: Size) => `D ${headDim} L ${tokens}${isCausal ? ' causal' : ''}`;

interface Row extends Size {
  onnxruntime?: { readonly milliseconds: number; readonly tflops: number } | { readonly error: string };
  readonly timings: readonly (Timing | { readonly family: Family; readonly variant: string; readonly error: string })[];
}

/** Bits of normal numbers as float16, out of a table: quick enough for a hundred million of them. */
function normalBits(random: Random, tokens: number, headDim: number, offset: number): Uint16Array {
  const size = 2 ** 14;
  const normals = random.normals(size);
  const shifts = random.normals(headDim, offset);
  const table = new Uint16Array(size * headDim);
  for (let c = 0; c < headDim; c++) {
    for (let i = 0; i < size; i++)
      table[c * size + i] = float16FromNumber((normals[i] as number) + (shifts[c] as number));
  }
  const bits = new Uint16Array(HEADS * tokens * headDim);
  let state = random.integer(1, 2 ** 31 - 1);
  for (let i = 0; i < bits.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    bits[i] = table[(i % headDim) * size + (state >>> 18)] as number;
  }
  return bits;
}

const seed = runSeed();
const gpu = await enableNodeWebgpu(flags['dawn-flags'].split(' '));
const first = createWebgpuBackend({ gpu });
const context = await first.context();
const { device, capabilities } = context;
const KERNEL = first.kernels.find(({ name }) => name === flags.kernel) ?? first.defaultKernel();
const { details } = await first.availability();
console.log(details);

const upload = (data: Uint16Array): GPUBuffer => {
  const buffer = device.createBuffer({
    size: data.byteLength,
    usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC,
  });
  device.queue.writeBuffer(buffer, 0, data as Uint16Array<ArrayBuffer>);
  return buffer;
};

/** GPU milliseconds of each of `repetitions` runs. */
async function measure(
  plan: WebgpuPlan,
  inputs: { q: GpuTensor; k: GpuTensor; v: GpuTensor },
  output: GpuTensor,
  repetitions: number,
): Promise<number[]> {
  if (!capabilities.timestamps) {
    const times: number[] = [];
    for (let i = 0; i < repetitions; i++) {
      const encoder = device.createCommandEncoder();
      plan.encode(encoder, inputs, { output });
      const started = performance.now();
      device.queue.submit([encoder.finish()]);
      await device.queue.onSubmittedWorkDone();
      times.push(performance.now() - started);
    }
    return times;
  }
  const querySet = device.createQuerySet({ type: 'timestamp', count: 2 * repetitions });
  const size = 16 * repetitions;
  const resolved = device.createBuffer({ size, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const encoder = device.createCommandEncoder();
  for (let i = 0; i < repetitions; i++) {
    const timestampWrites = { querySet, beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 };
    plan.encode(encoder, inputs, { output }, { timestampWrites });
  }
  encoder.resolveQuerySet(querySet, 0, 2 * repetitions, resolved, 0);
  encoder.copyBufferToBuffer(resolved, 0, staging, 0, size);
  device.queue.submit([encoder.finish()]);
  await staging.mapAsync(GPUMapMode.READ);
  const stamps = new BigUint64Array(staging.getMappedRange().slice(0));
  for (const buffer of [resolved, staging]) buffer.destroy();
  querySet.destroy();
  return Array.from(
    { length: repetitions },
    (_, i) => Number((stamps[2 * i + 1] as bigint) - (stamps[2 * i] as bigint)) / 1e6,
  );
}

/** Attention of sampled rows in float64 against the same rows of the output. */
function accuracyOf(random: Random, q: Tensor, k: Tensor, v: Tensor, output: Tensor, isCausal: boolean): Accuracy {
  const tokens = q.shape[2] as number;
  const actual: number[] = [];
  const expected: number[] = [];
  for (let i = 0; i < SAMPLED_ROWS; i++) {
    const token = i === 0 ? 0 : i === 1 ? tokens - 1 : random.integer(0, tokens - 1);
    const head = random.integer(0, HEADS - 1);
    const part = (view: Tensor, start: number, end: number) => slice(slice(view, 1, head, head + 1), 2, start, end);
    const row = part(q, token, token + 1);
    const [keys, values] = [part(k, 0, isCausal ? token + 1 : tokens), part(v, 0, isCausal ? token + 1 : tokens)];
    expected.push(...attentionExact(createProblem(row, keys, values, {}), { q: row, k: keys, v: values }).output);
    actual.push(...toFloat32(part(output, token, token + 1)));
  }
  return compare(actual, expected);
}

const timedVariants = (family: Family): string[] => {
  const all = variantsOf(family).map(({ name }) => name);
  return flags.variants === undefined ? all : all.filter((name) => list(flags.variants as string).includes(name));
};

/** The variant that a caller gets, where all are timed that were not asked for by name. */
function chosenByTable(family: Family, [q, k, v]: readonly GpuTensor[], isCausal: boolean): string[] {
  if (flags.variants !== undefined && !list(flags.variants).includes(DEFAULT)) return [];
  try {
    const problem = createProblem(q as GpuTensor, k as GpuTensor, v as GpuTensor, { isCausal });
    return [chooseVariant(capabilities, problem, chooseOptions(KERNEL, problem, {}), { family }).name];
  } catch {
    // A family that does not take the head dim: its variants say so one by one.
    return [];
  }
}

const rows: Row[] = [];
const best = new Map<string, string[]>();

function save(): void {
  mkdirSync(folder as string, { recursive: true });
  const peak = { i8: 1289, f16: 647, source: 'registers only, one H200, 2026-11-23 (TOP/s, TFLOP/s)' };
  const report = {
    date: new Date().toISOString(),
    commit: process.env.SAGEATTENTION_COMMIT,
    device: details,
    dialect: capabilities.matrixDialect,
    seed,
    kernel: KERNEL.name,
    heads: HEADS,
    peak,
    rows,
  };
  writeFileSync(join(folder as string, 'webgpu.json'), `${JSON.stringify(report, null, 1)}\n`);
  // QK runs at the INT8 peak and PV at the FP16 peak: half of the operations each.
  const ceiling = 2 / (1 / peak.i8 + 1 / peak.f16);
  const lines = [
    '| D | tokens | causal | kernel | ms | TFLOP/s | of the matrix peak | x onnxruntime | relative L1 |',
    '|---|---|---|---|---|---|---|---|---|',
  ];
  for (const { headDim, tokens, isCausal, onnxruntime, timings } of rows) {
    const place = `| ${headDim} | ${tokens} | ${isCausal ? 'yes' : 'no'} |`;
    const peer = onnxruntime !== undefined && 'milliseconds' in onnxruntime ? onnxruntime : undefined;
    if (peer)
      lines.push(`${place} onnxruntime | ${peer.milliseconds.toFixed(3)} | ${peer.tflops.toFixed(1)} | | 1 | |`);
    else if (onnxruntime !== undefined && 'error' in onnxruntime)
      lines.push(`${place} onnxruntime | ${onnxruntime.error.slice(0, 200)} | | | | |`);
    for (const timing of timings) {
      const name = `${timing.family} ${timing.variant}`;
      if ('error' in timing) {
        lines.push(`${place} ${name} | ${timing.error.slice(0, 200)} | | | | |`);
        continue;
      }
      const ratio = peer === undefined ? '' : (peer.milliseconds / timing.milliseconds).toFixed(2);
      const share = timing.family === 'matrix' ? `${((100 * timing.tflops) / ceiling).toFixed(0)}%` : '';
      const clock = timing.timestamps ? '' : ' (clock)';
      lines.push(
        `${place} ${name} | ${timing.milliseconds.toFixed(3)}${clock} | ${timing.tflops.toFixed(1)} | ${share} | ${ratio} | ${timing.accuracy.relativeL1.toPrecision(3)} |`,
      );
    }
  }
  writeFileSync(join(folder as string, 'webgpu.md'), `${lines.join('\n')}\n`);
}

/** The peer's time for a size. */
async function timePeer(row: Row): Promise<void> {
  const { headDim, tokens, isCausal } = row;
  const name = nameOf(row);
  const random = new Random(seed);
  const [query, key, value] = [0, 0, 0].map((offset) => upload(normalBits(random, tokens, headDim, offset))) as [
    GPUBuffer,
    GPUBuffer,
    GPUBuffer,
  ];
  try {
    const size = { heads: HEADS, tokens, headDim, isCausal };
    const budget = flags.quick ? 300 : 1500;
    const milliseconds = await onnxruntimeMilliseconds(device, size, { query, key, value }, budget);
    row.onnxruntime = { milliseconds, tflops: flopsOf(row) / milliseconds / 1e9 };
    console.log(`${name} onnxruntime: ${milliseconds.toFixed(3)} ms, ${row.onnxruntime.tflops.toFixed(1)} TFLOP/s`);
  } catch (error) {
    const message = messageOf(error).split('\n')[0] as string;
    row.onnxruntime = { error: message };
    console.log(`${name} onnxruntime: ${message.slice(0, 200)}`);
  }
  save();
  for (const buffer of [query, key, value]) buffer.destroy();
}

for (const headDim of HEAD_DIMS) {
  for (const tokens of LENGTHS) {
    const random = new Random(seed + tokens + headDim);
    const shape = [1, HEADS, tokens, headDim];
    const host = [0, KEY_OFFSET, 0].map((offset) => normalBits(random, tokens, headDim, offset));
    const buffers = host.map(upload);
    const [q, k, v] = buffers.map((buffer) => gpuTensor(buffer, 'float16', shape)) as [GpuTensor, GpuTensor, GpuTensor];
    const [hostQ, hostK, hostV] = host.map((bits) => tensor(bits, shape, { dtype: 'float16' })) as [
      Tensor,
      Tensor,
      Tensor,
    ];
    const output = emptyGpuTensor(device, 'float16', shape);
    for (const isCausal of [false, true]) {
      const flops = flopsOf({ headDim, tokens, isCausal });
      const timings: Row['timings'][number][] = [];
      const name = nameOf({ headDim, tokens, isCausal });
      const row: Row = { headDim, tokens, isCausal, timings };
      rows.push(row);
      if (flags.peers && !isCausal) await timePeer(row);
      // Family by family, so that a run that is cut short leaves those before.
      for (const family of FAMILIES) {
        const contenders: Contender[] = [];
        const kept = flags.variants === undefined ? best.get(`${family} ${headDim}`) : undefined;
        const timed = kept ?? timedVariants(family);
        for (const variant of new Set([...chosenByTable(family, [q, k, v], isCausal), ...timed])) {
          try {
            const backend = createWebgpuBackendOn({ device, gpu, family, variant });
            const problem = createProblem(q, k, v, { isCausal });
            const plan = await backend.plan(problem, chooseOptions(KERNEL, problem, {}));
            const once = median(await measure(plan, { q, k, v }, output, LEAST_REPETITIONS));
            const actual = await downloadTensor(device, output);
            const accuracy = accuracyOf(new Random(seed), hostQ, hostK, hostV, actual, isCausal);
            contenders.push({ family, variant, plan, once, accuracy, times: [] });
          } catch (error) {
            const message = messageOf(error).split('\n')[0] as string;
            timings.push({ family, variant, error: message });
            console.log(`${name} ${family} ${variant}: ${message.slice(0, 200)}`);
          }
        }
        for (let round = 0; round < ROUNDS && contenders.length > 0; round++) {
          const warm = contenders[0] as Contender;
          for (let spent = 0; spent < WARM_UP; ) {
            const times = await measure(warm.plan, { q, k, v }, output, repetitionsOf(warm));
            spent += times.reduce((sum, time) => sum + time, 0);
          }
          for (const contender of contenders) {
            contender.times.push(...(await measure(contender.plan, { q, k, v }, output, repetitionsOf(contender))));
          }
        }
        for (const { family, variant, plan, accuracy, times } of contenders) {
          const milliseconds = median(times);
          const timing: Timing = {
            family,
            variant,
            milliseconds,
            tflops: flops / milliseconds / 1e9,
            timestamps: capabilities.timestamps,
            compileMilliseconds: plan.details.compileMilliseconds,
            accuracy,
          };
          timings.push(timing);
          plan.dispose();
          console.log(
            `${name} ${family} ${variant}: ${milliseconds.toFixed(3)} ms (${Math.min(...times).toFixed(3)} to ${Math.max(...times).toFixed(3)}), ${timing.tflops.toFixed(1)} TFLOP/s, relative L1 ${accuracy.relativeL1.toPrecision(3)}, compiled in ${timing.compileMilliseconds.toFixed(0)} ms`,
          );
        }
        if (tokens === TUNING_LENGTH && !isCausal) {
          const right = timings.filter(
            (timing): timing is Timing =>
              !('error' in timing) && timing.family === family && timing.accuracy.relativeL1 < WRONG_FROM,
          );
          const fastest = right.sort((x, y) => x.milliseconds - y.milliseconds).slice(0, KEPT_VARIANTS);
          best.set(
            `${family} ${headDim}`,
            fastest.map(({ variant }) => variant),
          );
        }
        save();
      }
    }
    for (const buffer of [...buffers, output.buffer]) buffer.destroy();
  }
}

// The peer's causal calls come last: one that hangs takes nothing with it.
for (const row of flags.peers ? rows.filter(({ isCausal }) => isCausal) : []) await timePeer(row);
// onnxruntime's session and Dawn's threads would keep the process alive.
process.exit(0);
