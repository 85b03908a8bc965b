/**
 * Times every CUDA kernel against PyTorch's attention on the same card in the same run, with its accuracy beside it.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda.mjs OUTPUT_FOLDER [--lengths 1024,16384] [--head-dims 64,128] [--full-only] [--kernels TEXT]
 *
 * Writes `cuda.json` and `cuda.md` there. TFLOP/s count 4 B H Lq Lk D, half when causal.
 */

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { type AttentionProblem, createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  cudaTensorOn,
  download,
  emptyCudaTensor,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { planAttend, planKeyValue, planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { packBuffers } from '../../src/backends/cuda/run/bound-launches.ts';
import { messageOf } from '../../src/errors.ts';
import { type AttentionOptions, type KernelName, prepareKeyValue, sageattn, setBackend } from '../../src/index.ts';
import { timeOnDevice, timeOnHost } from '../../src/measure/cuda-timing.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { slice } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, type HostInputs, normalBits, type SampledRow, type Shape, sampleRows, sendBits } from './inputs.ts';
import { torchTimes } from './torch.ts';
import { copyBandwidth, factsOf, isAttention, type KernelTime, nvidiaSmi, tflops, Workbench } from './workbench.ts';

const HEADS = 32;
/** Tokens of all sequences of a batch, except where one sequence is longer. */
const TOKENS = 16384;
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    lengths: { type: 'string', default: '1024,2048,4096,8192,16384,32768' },
    'head-dims': { type: 'string', default: '128,64' },
    'full-only': { type: 'boolean', default: false },
    kernels: { type: 'string', default: '' },
  },
});
const numbers = (text: string) => text.split(',').map(Number);
const LENGTHS = numbers(flags.lengths);
const HEAD_DIMS = numbers(flags['head-dims']);
const CAUSAL = flags['full-only'] ? [false] : [false, true];
const SAMPLED_ROWS = 24;
/** K's offset per channel, which smoothing is for. */
const KEY_OFFSET = 2;

interface Setting {
  readonly kernel: KernelName;
  readonly options: AttentionOptions;
}

const FP16: KernelName = 'qk-int8-pv-fp16-cuda';
const FP8: KernelName = 'qk-int8-pv-fp8-cuda';
const SETTINGS: readonly Setting[] = [
  { kernel: FP16, options: { pvAccumDtype: 'fp32' } },
  { kernel: FP16, options: { pvAccumDtype: 'fp16+fp32' } },
  { kernel: FP16, options: { pvAccumDtype: 'fp16' } },
  { kernel: FP8, options: { pvAccumDtype: 'fp32+fp16' } },
  { kernel: FP8, options: { pvAccumDtype: 'fp32+fp32' } },
  { kernel: 'qk-int4-pv-fp8-cuda', options: {} },
  { kernel: 'qk-int8-pv-fp16', options: {} },
  { kernel: 'qk-fp4-pv-fp4', options: {} },
  { kernel: 'qk-fp4-pv-fp8-cuda', options: {} },
  { kernel: 'qk-int8-pv-fp8-cuda-sm90', options: { pvAccumDtype: 'fp32+fp32' } },
  { kernel: 'qk-int8-pv-fp8-cuda-sm90', options: { pvAccumDtype: 'fp32' } },
  { kernel: 'qk-int8-pv-fp16-cuda-sm90', options: {} },
];

interface Result extends Shape {
  readonly kernel: string;
  readonly options: AttentionOptions;
  /** Quantization and attention, as `sageattn` runs them. */
  readonly milliseconds: number;
  readonly attentionMilliseconds: number;
  readonly quantizationMilliseconds: number;
  readonly tflops: number;
  readonly attentionTflops: number;
  /** Bytes of q, k and v read and of what is written for them, over the time of quantization, over copy bandwidth. */
  readonly quantizationOfCopyBandwidth: number;
  readonly launches: readonly KernelTime[];
  readonly relativeL1: number;
  readonly cosineSimilarity: number;
}

interface Operands {
  readonly q: CudaTensor;
  readonly k: CudaTensor;
  readonly v: CudaTensor;
}

function accuracyOf(output: CudaTensor, { heads }: Shape, rows: readonly SampledRow[], exact: readonly Float64Array[]) {
  const actual: number[] = [];
  const expected: number[] = [];
  rows.forEach(({ head, token }, i) => {
    const batch = Math.floor(head / heads);
    const row = slice(
      slice(slice(output, 0, batch, batch + 1), 1, head % heads, (head % heads) + 1),
      2,
      token,
      token + 1,
    );
    actual.push(...toFloat32(download(row)));
    expected.push(...(exact[i] as Float64Array));
  });
  return compare(actual, expected);
}

function measure(
  device: CudaDevice,
  setting: Setting,
  shape: Shape,
  operands: Operands,
  rows: readonly SampledRow[],
  exact: readonly Float64Array[],
  bandwidth: number,
): Result {
  const { q, k, v } = operands;
  const options: AttentionOptions = { ...setting.options, isCausal: shape.isCausal };
  const problem = createProblem(q, k, v, options);
  const choice = chooseOptions(descriptorOf(setting.kernel), problem, options);
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const bench = new Workbench(device, planLaunches(problem, choice, factsOf(device)), addresses);
  try {
    const milliseconds = timeOnDevice(device, () => bench.run());
    const attentionMilliseconds = timeOnDevice(device, () => bench.run(isAttention));
    const quantizationMilliseconds = timeOnDevice(device, () => bench.run((name) => !isAttention(name)));
    // A kernel that quantizes Q itself reads it there.
    const operandsRead = bench.sequence.launches.some(({ name }) => name === 'quantize Q') ? 3 : 2;
    const inputBytes = operandsRead * 2 * shape.batch * shape.heads * shape.tokens * shape.headDim;
    const written = bench.bytesOf(['query', 'queryScale', 'rowBias', 'key', 'keyScale', 'keyFaults', 'value']);
    const { relativeL1, cosineSimilarity } = accuracyOf(output, shape, rows, exact);
    return {
      ...shape,
      kernel: setting.kernel,
      options: setting.options,
      milliseconds,
      attentionMilliseconds,
      quantizationMilliseconds,
      tflops: tflops(shape, milliseconds),
      attentionTflops: tflops(shape, attentionMilliseconds),
      quantizationOfCopyBandwidth: (inputBytes + written) / (quantizationMilliseconds / 1000) / bandwidth,
      launches: bench.kernels,
      relativeL1,
      cosineSimilarity,
    };
  } finally {
    bench.dispose();
    output.memory.dispose();
  }
}

/** One row of Q, 32 heads over 8, over keys already quantized: bytes of K and V over time, over copy bandwidth. */
function measureDecoding(device: CudaDevice, setting: Setting, bandwidth: number, bits: CudaTensor) {
  const [keys, headDim] = [65536, 128];
  const view = (heads: number, tokens: number) => cudaTensorOn(bits.memory, 'bfloat16', [1, heads, tokens, headDim]);
  const [q, k] = [view(HEADS, 1), view(8, keys)];
  const problem: AttentionProblem = createProblem(q, k, k, setting.options);
  const choice = chooseOptions(descriptorOf(setting.kernel), problem, setting.options);
  const facts = factsOf(device);
  const quantize = planKeyValue(problem, choice, facts);
  const { offsets, byteLength } = packBuffers(quantize.kept);
  const kept = device.allocate(byteLength);
  const output = emptyCudaTensor(device, [1, HEADS, 1, headDim], 'bfloat16');
  const pointer = bits.memory.pointer;
  const addresses: Record<string, bigint> = { q: pointer, k: pointer, v: pointer, output: output.memory.pointer };
  for (const [name, offset] of offsets) addresses[name] = kept.pointer + BigInt(offset);
  const preparing = new Workbench(device, quantize, addresses);
  preparing.run();
  const attending = new Workbench(device, planAttend(problem, choice, facts), addresses);
  const milliseconds = timeOnDevice(device, () => attending.run());
  const bytes = (quantize.kept.key ?? 0) + (quantize.kept.value ?? 0);
  const result = {
    kernel: setting.kernel,
    options: setting.options,
    keys,
    milliseconds,
    bytes,
    ofCopyBandwidth: bytes / (milliseconds / 1000) / bandwidth,
    launches: attending.kernels,
  };
  preparing.dispose();
  attending.dispose();
  kept.dispose();
  output.memory.dispose();
  return result;
}

async function hostCosts(device: CudaDevice, backend: CudaBackend, operands: Operands) {
  const small = (view: CudaTensor) => cudaTensorOn(view.memory, 'bfloat16', [1, 4, 128, 64]);
  const [q, k, v] = [small(operands.q), small(operands.k), small(operands.v)];
  const problem = createProblem(q, k, v, {});
  const choice = chooseOptions(await backend.defaultKernel(problem), problem, {});
  const plan = await backend.plan(problem, choice);
  const enqueue = await timeOnHost(device, () => plan.enqueue({ q, k, v }).output.memory.dispose());
  const call = await timeOnHost(device, async () => (await sageattn(q, k, v)).memory.dispose());
  const captured = await backend.capture(problem, choice, { q, k, v });
  const replay = await timeOnHost(device, () => captured.launch());
  const deviceMicroseconds = 1000 * timeOnDevice(device, () => plan.enqueue({ q, k, v }).output.memory.dispose());
  captured.dispose();
  plan.dispose();
  const cache = await prepareKeyValue(k, v);
  const attend = await timeOnHost(device, async () => (await cache.attend(q)).memory.dispose());
  cache.dispose();
  return { enqueue, sageattn: call, graphReplay: replay, cacheAttend: attend, deviceMicroseconds };
}

const fixed = (value: number | undefined, digits: number) => (value === undefined ? '-' : value.toFixed(digits));

function markdown(results: readonly Result[], torch: ReturnType<typeof torchTimes>): string {
  const lines: string[] = [];
  for (const headDim of HEAD_DIMS) {
    for (const isCausal of CAUSAL) {
      lines.push(
        `\n## D=${headDim}, ${isCausal ? 'causal' : 'full'}\n`,
        '| tokens (batch) | kernel | TFLOP/s with quantization | attention alone | of FA2 | of cuDNN | quantization, of copy bandwidth | relative L1 |',
        '|---|---|---|---|---|---|---|---|',
      );
      for (const result of results) {
        if (result.headDim !== headDim || result.isCausal !== isCausal) continue;
        const of = (backend: string) => {
          const other = torch?.results.find(
            (entry) =>
              entry.backend === backend &&
              entry.tokens === result.tokens &&
              entry.headDim === headDim &&
              entry.isCausal === isCausal,
          );
          return other === undefined ? '-' : `${fixed(other.milliseconds / result.milliseconds, 2)}x`;
        };
        const settings = Object.values(result.options).join(' ');
        lines.push(
          `| ${result.tokens} (${result.batch}) | ${result.kernel} ${settings} | ${fixed(result.tflops, 0)} | ${fixed(result.attentionTflops, 0)} | ${of('FLASH_ATTENTION')} | ${of('CUDNN_ATTENTION')} | ${fixed(100 * result.quantizationOfCopyBandwidth, 0)}% | ${fixed(result.relativeL1, 4)} |`,
        );
      }
    }
  }
  return lines.join('\n');
}

async function main(): Promise<number> {
  const [folder] = positionals;
  if (folder === undefined) {
    console.error('usage: bench-cuda.mjs OUTPUT_FOLDER [--lengths 1024,16384] [--head-dims 64,128] [--full-only]');
    return 2;
  }
  const backend = new CudaBackend();
  const { available, reason, remedy, details } = await backend.availability();
  if (!available) {
    console.error(`the benchmark could not run: ${reason}. ${remedy}`);
    return 2;
  }
  await setBackend(backend);
  const device = (await backend.cuda()).device();
  const seed = runSeed();
  const random = new Random(seed);
  mkdirSync(folder, { recursive: true });

  const shapes = LENGTHS.flatMap((tokens) =>
    HEAD_DIMS.flatMap((headDim) =>
      CAUSAL.map(
        (isCausal): Shape => ({
          batch: Math.max(1, TOKENS / tokens),
          heads: HEADS,
          tokens,
          headDim,
          isCausal,
        }),
      ),
    ),
  );
  console.error('torch');
  const torch = torchTimes(shapes);

  const largest = Math.max(...shapes.map(({ batch, heads, tokens, headDim }) => batch * heads * tokens * headDim));
  console.error(`inputs of ${largest} elements, seed ${seed}`);
  const host: HostInputs = {
    q: normalBits(random, largest, 0),
    k: normalBits(random, largest, KEY_OFFSET),
    v: normalBits(random, largest, 0),
  };
  const flat = { q: sendBits(device, host.q), k: sendBits(device, host.k), v: sendBits(device, host.v) };

  const bandwidth = copyBandwidth(device);
  const settings = SETTINGS.filter(
    ({ kernel }) => kernel.includes(flags.kernels) && lackedBy(kernel, device.computeCapability) === undefined,
  );
  const results: Result[] = [];
  for (const shape of shapes) {
    const { batch, heads, tokens, headDim } = shape;
    const view = ({ memory }: CudaTensor) => cudaTensorOn(memory, 'bfloat16', [batch, heads, tokens, headDim]);
    const operands = { q: view(flat.q), k: view(flat.k), v: view(flat.v) };
    const rows = sampleRows(random, shape, SAMPLED_ROWS);
    const exact = rows.map((row) => exactRow(host, shape, row));
    for (const setting of settings) {
      try {
        const result = measure(device, setting, shape, operands, rows, exact, bandwidth);
        results.push(result);
        const { kernel, options, milliseconds, relativeL1 } = result;
        const what = `${kernel} ${Object.values(options).join(' ')} ${tokens} D=${headDim} ${shape.isCausal ? 'causal' : 'full'}`;
        console.error(
          `${what}: ${fixed(milliseconds, 3)} ms, ${fixed(result.tflops, 0)} TFLOP/s, L1 ${fixed(relativeL1, 4)}`,
        );
      } catch (error) {
        console.error(`${setting.kernel} at ${tokens}: ${messageOf(error)}`);
        if (device.lost !== undefined) throw error;
      }
    }
  }
  const decoding = settings
    .filter(({ kernel }) => kernel !== 'qk-int4-pv-fp8-cuda')
    .map((setting) => measureDecoding(device, setting, bandwidth, flat.k));
  const hostSide = await hostCosts(device, backend, flat);
  const report = {
    date: new Date().toISOString(),
    commit: process.env.SAGEATTENTION_COMMIT,
    seed,
    details,
    nvidiaSmi: nvidiaSmi(),
    torch,
    copyBandwidth: bandwidth,
    hostMicroseconds: hostSide,
    decoding,
    results,
  };
  writeFileSync(join(folder, 'cuda.json'), `${JSON.stringify(report, null, 1)}\n`);
  const summary = [
    `# CUDA kernels on ${device.name}`,
    '',
    `Copy bandwidth ${(bandwidth / 1e9).toFixed(0)} GB/s. Host side of a repeated call: plan.enqueue ${fixed(hostSide.enqueue.median, 1)} us, sageattn ${fixed(hostSide.sageattn.median, 1)} us, graph replay ${fixed(hostSide.graphReplay.median, 1)} us.`,
    '',
    ...decoding.map(
      ({ kernel, options, milliseconds, ofCopyBandwidth }) =>
        `Decoding over 65,536 prepared keys, ${kernel} ${Object.values(options).join(' ')}: ${fixed(1000 * milliseconds, 1)} us, ${fixed(100 * ofCopyBandwidth, 0)}% of copy bandwidth.`,
    ),
    markdown(results, torch),
    '',
  ].join('\n');
  writeFileSync(join(folder, 'cuda.md'), summary);
  console.log(summary);
  await backend.dispose();
  return 0;
}

process.exitCode = await main();
