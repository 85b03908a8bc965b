/**
 * Short sequences and the shapes of real models: the exact kernel, the FP8 kernel with its quantization, and cuDNN in BF16,
 * in one run on one card, with the host's time of a call.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-short.mjs OUTPUT_FOLDER [--variants] [--only TEXT] [--no-torch]
 *
 * `--variants` times the exact kernel with every variant of its tuning besides. Writes `short.json` and `short.md` there.
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
import { defaultKernelFor, descriptorOf } from '../../src/backends/cuda/kernel-table.ts';
import { EXACT_VARIANTS, type WgmmaTuning } from '../../src/backends/cuda/kernels/wgmma/table.ts';
import { planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { emptyCudaTensor } from '../../src/backends/cuda/tensor.ts';
import { messageOf } from '../../src/errors.ts';
import { type KernelName, sageattn, setBackend } from '../../src/index.ts';
import { timeOnDevice, timeOnHost } from '../../src/measure/cuda-timing.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { slice } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, type HostInputs, normalBits, type Shape, sampleRows } from './inputs.ts';
import { torchTimes } from './torch.ts';
import { factsOf, nvidiaSmi, tflops, Workbench } from './workbench.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    variants: { type: 'boolean', default: false },
    only: { type: 'string', default: '' },
    'no-torch': { type: 'boolean', default: false },
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
const SAMPLED_ROWS = 8;

interface Result extends Named {
  readonly kernel: KernelName;
  readonly variant: string;
  readonly milliseconds: number;
  readonly tflops: number;
  readonly relativeL1: number;
}

interface Operands {
  readonly q: CudaTensor;
  readonly k: CudaTensor;
  readonly v: CudaTensor;
}

function measure(
  device: CudaDevice,
  shape: Named,
  kernel: KernelName,
  { variant, tuning }: { readonly variant: string; readonly tuning: Partial<WgmmaTuning> },
  host: HostInputs,
  { q, k, v }: Operands,
): Result {
  const { name, batch, heads, tokens, headDim, isCausal } = shape;
  const problem = createProblem(q, k, v, { isCausal });
  const choice = chooseOptions(descriptorOf(kernel), problem, {});
  const output = emptyCudaTensor(device, q.shape, 'bfloat16');
  const addresses = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const bench = new Workbench(device, planLaunches(problem, choice, factsOf(device), { overrides: tuning }), addresses);
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
    return {
      ...{ name, batch, heads, tokens, headDim, isCausal, kernel, variant },
      ...{ milliseconds, tflops: tflops(shape, milliseconds), relativeL1 },
    };
  } finally {
    bench.dispose();
    output.memory.dispose();
  }
}

const fixed = (value: number | undefined, digits: number) => (value === undefined ? '-' : value.toFixed(digits));

async function main(): Promise<number> {
  const [folder] = positionals;
  if (folder === undefined) {
    console.error('usage: bench-cuda-short.mjs OUTPUT_FOLDER [--variants] [--only TEXT] [--no-torch]');
    return 2;
  }
  const backend = new CudaBackend();
  const { available, reason, remedy, details } = await backend.availability();
  if (!available) {
    console.error(`the benchmark could not run: ${reason}. ${remedy}`);
    return 2;
  }
  await setBackend(backend);
  mkdirSync(folder, { recursive: true });
  const device = (await backend.cuda()).device();
  const fastest = defaultKernelFor(device.computeCapability)?.name as KernelName;
  const shapes = [...TABLE, ...MODELS].filter(({ name }) => name.includes(flags.only));
  const torch = flags['no-torch'] ? undefined : torchTimes(shapes, ['CUDNN_ATTENTION']);

  for (const { tokens, batch, headDim, isCausal, milliseconds } of torch?.results ?? []) {
    console.error(
      `cuDNN ${tokens} x ${batch} D=${headDim} ${isCausal ? 'causal' : 'full'}: ${fixed(milliseconds, 4)} ms`,
    );
  }
  const seed = runSeed();
  const random = new Random(seed);
  const largest = Math.max(...shapes.map(({ batch, heads, tokens, headDim }) => batch * heads * tokens * headDim));
  const host: HostInputs = {
    q: normalBits(random, largest, 0),
    k: normalBits(random, largest, 2),
    v: normalBits(random, largest, 0),
  };
  const onDevice = (bits: Uint16Array): CudaTensor => {
    const memory = device.allocate(bits.byteLength);
    device.call('cuMemcpyHtoDAsync', 'copying', memory.pointer, bits, bits.byteLength, device.stream.handle);
    device.stream.synchronize();
    return cudaTensorOn(memory, 'bfloat16', [bits.length]);
  };
  const flat = { q: onDevice(host.q), k: onDevice(host.k), v: onDevice(host.v) };
  const results: Result[] = [];
  const write = (hostMicroseconds: readonly object[]) =>
    writeFileSync(
      join(folder, 'short.json'),
      `${JSON.stringify({ date: new Date().toISOString(), commit: process.env.SAGEATTENTION_COMMIT, seed, details, nvidiaSmi: nvidiaSmi(), torch, hostMicroseconds, results }, null, 1)}\n`,
    );
  const operandsOf = ({ batch, heads, tokens, headDim }: Shape): Operands => {
    const view = ({ memory }: CudaTensor) => cudaTensorOn(memory, 'bfloat16', [batch, heads, tokens, headDim]);
    return { q: view(flat.q), k: view(flat.k), v: view(flat.v) };
  };
  for (const shape of shapes) {
    const variants =
      flags.variants && TABLE.includes(shape) && !shape.isCausal && VARIANT_LENGTHS.includes(shape.tokens);
    const tried = [
      { kernel: 'exact' as const, variant: '', tuning: {} },
      { kernel: fastest, variant: '', tuning: {} },
      ...Object.entries(variants ? EXACT_VARIANTS : {}).map(([variant, tuning]) => ({
        kernel: 'exact' as const,
        variant,
        tuning,
      })),
    ];
    for (const { kernel, ...own } of tried) {
      try {
        const result = measure(device, shape, kernel, own, host, operandsOf(shape));
        results.push(result);
        console.error(
          `${shape.name}, ${kernel} ${own.variant}: ${fixed(result.milliseconds, 4)} ms, ${fixed(result.tflops, 0)} TFLOP/s, L1 ${fixed(result.relativeL1, 4)}`,
        );
      } catch (error) {
        console.error(`${shape.name}, ${kernel} ${own.variant}: ${messageOf(error)}`);
        if (device.lost !== undefined) throw error;
      }
    }
    write([]);
  }
  const hostMicroseconds: { readonly tokens: number; readonly kernel: string; readonly median: number }[] = [];
  for (const tokens of [128, 1024, 4096]) {
    for (const kernel of ['exact', fastest] as const) {
      const { q, k, v } = operandsOf({ batch: 1, heads: 32, tokens, headDim: 128, isCausal: false });
      const call = async () => (await sageattn(q, k, v, { kernel })).memory.dispose();
      hostMicroseconds.push({ tokens, kernel, median: (await timeOnHost(device, call, 500)).median });
    }
  }
  write(hostMicroseconds);
  const cudnn = ({ batch, heads, tokens, headDim, isCausal }: Shape) =>
    torch?.results.find(
      (row) =>
        row.batch === batch &&
        row.heads === heads &&
        row.tokens === tokens &&
        row.headDim === headDim &&
        row.isCausal === isCausal,
    )?.milliseconds;
  const summary = [
    `# Short sequences and models on ${device.name}`,
    '',
    '| shape | exact | FP8 with quantization | cuDNN BF16 | exact over cuDNN | FP8 over cuDNN |',
    '|---|---|---|---|---|---|',
    ...shapes.map((shape) => {
      const of = (kernel: string) =>
        results.find((row) => row.name === shape.name && row.kernel === kernel && row.variant === '')?.milliseconds;
      const [exact, fp8, peer] = [of('exact'), of(fastest), cudnn(shape)];
      const ratio = (own?: number) => (own === undefined || peer === undefined ? '-' : `${fixed(peer / own, 2)}x`);
      return `| ${shape.name} | ${fixed(exact, 4)} | ${fixed(fp8, 4)} | ${fixed(peer, 4)} | ${ratio(exact)} | ${ratio(fp8)} |`;
    }),
    '',
    ...results
      .filter(({ variant }) => variant !== '')
      .map((row) => `${row.name}, ${row.variant}: ${fixed(row.milliseconds, 4)} ms, ${fixed(row.tflops, 0)} TFLOP/s`),
    ...hostMicroseconds.map((row) => `host, ${row.tokens} tokens, ${row.kernel}: ${fixed(row.median, 1)} us`),
  ].join('\n');
  writeFileSync(join(folder, 'short.md'), `${summary}\n`);
  console.log(summary);
  await backend.dispose();
  return 0;
}

process.exitCode = await main();
