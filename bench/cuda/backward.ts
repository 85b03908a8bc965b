/**
 * Times the backward pass against PyTorch's on the same card in the same run, with its accuracy beside it.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-backward.mjs OUTPUT_FOLDER [--only TEXT] [--no-torch] [--accuracy-only] [--variants] [--torch-only] [--precisions fp16,int8,fp8]
 *
 * Writes `backward.json` there. TFLOP/s count 10 B H Lq Lk D, half when causal: five products. Times include all launches of
 * `attentionBackward`: quantization and copies too. Accuracy is the relative L2 of dQ, dK and dV against float64: on the golden inputs, and of
 * the first head of each shape, for which PyTorch computes them.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { type BackwardPrecision, createBackwardProblem } from '../../src/attention/backward.ts';
import { type AttentionProblem, createProblem } from '../../src/attention/problem.ts';
import type { BackwardSupport, KernelChoice } from '../../src/backends/backend.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  download,
  emptyCudaTensor,
  upload,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { type GradientTuning, planBackward } from '../../src/backends/cuda/launches/backward.ts';
import { planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { slice } from '../../src/tensor/tensor.ts';
import { GOLDEN_NAMES, readGolden } from '../../test/golden/golden.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { normalBits, type Shape, sendBits } from './inputs.ts';
import { TORCH_TIMED } from './torch.ts';
import { factsOf, type KernelTime, nvidiaSmi, Workbench } from './workbench.ts';

const HEADS = 32;
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    only: { type: 'string', default: '' },
    'no-torch': { type: 'boolean', default: false },
    'accuracy-only': { type: 'boolean', default: false },
    variants: { type: 'boolean', default: false },
    'torch-only': { type: 'boolean', default: false },
    precisions: { type: 'string', default: 'fp16' },
  },
});

const shapeOf = (headDim: number, tokens: number, batch: number, isCausal: boolean): Shape => ({
  ...{ batch, heads: HEADS, tokens, headDim, isCausal },
});
/** The shapes whose speed was asked for, and their neighbours. */
const SHAPES: readonly Shape[] = [
  shapeOf(128, 16384, 1, false),
  shapeOf(128, 16384, 1, true),
  shapeOf(128, 4096, 4, false),
  shapeOf(128, 4096, 4, true),
  shapeOf(64, 16384, 1, false),
  shapeOf(64, 16384, 1, true),
  shapeOf(64, 4096, 4, false),
];

interface Tuned {
  readonly name: string;
  readonly tuning: GradientTuning;
}

type Tile = NonNullable<GradientTuning['keys']>;

/** The same for kernels that own queries and those that own keys. */
const tuned = (name: string, tile: Tile): Tuned => ({ name, tuning: { queries: tile, keys: tile } });

/** Other ways to divide the work, by head dim; with `--variants`. */
const VARIANTS: Readonly<Record<number, readonly Tuned[]>> = {
  128: [
    tuned('as in the table', {}),
    tuned('CTAs for a tile', { stays: false }),
    tuned('CTAs that stay', { stays: true }),
    tuned('CTAs that stay, four stages', { stays: true, stages: 4 }),
  ],
  64: [
    tuned('as in the table', {}),
    tuned('CTAs for a tile', { stays: false }),
    tuned('CTAs that stay', { stays: true }),
    tuned('CTAs that stay, six stages', { stays: true, stages: 6 }),
  ],
};

const operations = ({ batch, heads, tokens, headDim, isCausal }: Shape) =>
  (10 * batch * heads * tokens ** 2 * headDim) / (isCausal ? 2 : 1);
const tflops = (shape: Shape, milliseconds: number) => operations(shape) / milliseconds / 1e9;
const nameOf = ({ headDim, tokens, batch, isCausal }: Shape) =>
  `D${headDim} ${tokens}x${batch}${isCausal ? ' causal' : ''}`;

const PROGRAM = `
import json, sys, statistics, torch
from torch.nn.attention import sdpa_kernel, SDPBackend
${TORCH_TIMED}
results = []
for s in json.load(sys.stdin):
    size = (s["batch"], s["heads"], s["tokens"], s["headDim"])
    q, k, v, g = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for x in (q, k, v): x.requires_grad_()
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                forward = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=s["isCausal"])
                out = forward()
                backward = lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
                def median(call):
                    for _ in range(2): call()
                    n = max(1, min(100, int(40 / timed(call, 1))))
                    return statistics.median(timed(call, n) for _ in range(5))
                results.append({**s, "backend": name, "forwardMilliseconds": median(forward), "milliseconds": median(backward)})
        except Exception as error:
            print(name, s, error, file=sys.stderr)
json.dump({"torch": torch.__version__, "results": results}, sys.stdout)
`;

/** Exact gradients of one head in float64, compared with files of bfloat16. */
const COMPARISON = `
import sys, json, torch
folder, tokens, dim, causal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "true"
def read(name):
    data = torch.frombuffer(bytearray(open(f"{folder}/{name}", "rb").read()), dtype=torch.bfloat16)
    return data.reshape(tokens, dim).to("cuda", torch.float64)
q, k, v, g, dq, dk, dv = (read(name) for name in ("q", "k", "v", "dOutput", "dq", "dk", "dv"))
scale = dim ** -0.5
eq, ek, ev = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
for first in range(0, tokens, 2048):
    rows = slice(first, min(tokens, first + 2048))
    s = q[rows] @ k.T * scale
    if causal:
        i = torch.arange(tokens, device="cuda")
        s.masked_fill_(i[None, :] > i[rows][:, None], -float("inf"))
    p = torch.softmax(s, -1)
    dp = g[rows] @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    ev += p.T @ g[rows]
    ek += ds.T @ q[rows] * scale
    eq[rows] = ds @ k * scale
error = lambda a, e: ((a - e).norm() / e.norm()).item()
print(json.dumps({"dq": error(dq, eq), "dk": error(dk, ek), "dv": error(dv, ev)}))
`;

interface Errors {
  readonly dq: number;
  readonly dk: number;
  readonly dv: number;
}

interface TorchTime extends Shape {
  readonly backend: string;
  readonly forwardMilliseconds: number;
  readonly milliseconds: number;
}

interface Result extends Shape {
  readonly kernel: string;
  readonly precision: BackwardPrecision;
  readonly milliseconds: number;
  readonly tflops: number;
  readonly forwardMilliseconds: number;
  readonly launches: readonly KernelTime[];
  readonly errors: Errors | undefined;
  readonly variants: readonly Variant[];
}

/** Another way to divide the work: its gradient kernels by themselves, and how far its first head is from that of the table's way. */
interface Variant {
  readonly name: string;
  readonly launches: readonly KernelTime[];
  readonly difference: Errors;
}

function python(program: string, args: readonly string[], input = ''): string | undefined {
  const { status, stdout, stderr } = spawnSync('python3', ['-c', program, ...args], {
    ...{ input, encoding: 'utf8', timeout: 240_000, maxBuffer: 2 ** 26 },
  });
  if (stderr !== '') console.error(stderr);
  return status === 0 ? stdout : undefined;
}

const NAMES = ['dq', 'dk', 'dv'] as const;
/** The default of Hopper, and of other devices. */
const KERNELS: BackwardSupport['kernels'] = ['qk-int8-pv-fp16-cuda-sm90', 'qk-int8-pv-fp16-cuda'];

const choiceOf = (kernel: BackwardSupport['kernels'][number], problem: AttentionProblem): KernelChoice =>
  chooseOptions(descriptorOf(kernel), problem, {});

function problemsOf(
  q: CudaTensor,
  k: CudaTensor,
  v: CudaTensor,
  isCausal: boolean,
  tensors: Record<string, CudaTensor>,
  backwardPrecision: BackwardPrecision,
) {
  const attention = { ...createProblem(q, k, v, { isCausal, returnLse: true }), forGradients: true } as const;
  const { output, lse, dOutput } = tensors as Record<'output' | 'lse' | 'dOutput', CudaTensor>;
  const options = { backwardPrecision };
  return {
    attention,
    backward: createBackwardProblem(attention, { output, lse, dOutput }, undefined, options, 'fp16'),
  };
}

const bytesOf = (tensor: CudaTensor): Uint8Array => {
  const { data } = download(slice(slice(tensor, 0, 0, 1), 1, 0, 1) as CudaTensor);
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
};

/** Errors of the first head, by PyTorch. */
function headErrors(tensors: Readonly<Record<string, CudaTensor>>, { tokens, headDim, isCausal }: Shape) {
  const folder = mkdtempSync(join(tmpdir(), 'backward-'));
  try {
    for (const name of ['q', 'k', 'v', 'dOutput', 'dq', 'dk', 'dv']) {
      writeFileSync(join(folder, name), bytesOf(tensors[name] as CudaTensor));
    }
    const text = python(COMPARISON, [folder, String(tokens), String(headDim), String(isCausal)]);
    return text === undefined ? undefined : (JSON.parse(text) as Errors);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function measure(
  device: CudaDevice,
  kernel: BackwardSupport['kernels'][number],
  precision: BackwardPrecision,
  shape: Shape,
  random: Random,
  variants: readonly Tuned[],
): Result {
  const { batch, heads, tokens, headDim } = shape;
  const size = [batch, heads, tokens, headDim];
  const count = batch * heads * tokens * headDim;
  const tensors: Record<string, CudaTensor> = {};
  for (const name of ['q', 'k', 'v', 'dOutput']) {
    tensors[name] = sendBits(device, normalBits(random, count, name === 'k' ? 1 : 0), size);
  }
  for (const name of ['output', 'dq', 'dk', 'dv']) tensors[name] = emptyCudaTensor(device, size, 'bfloat16');
  tensors.lse = emptyCudaTensor(device, [batch, heads, tokens], 'float32');
  const { q, k, v } = tensors as Record<'q' | 'k' | 'v', CudaTensor>;
  const { attention, backward } = problemsOf(q, k, v, shape.isCausal, tensors, precision);
  const addresses = Object.fromEntries(Object.entries(tensors).map(([name, { memory }]) => [name, memory.pointer]));
  const choice = choiceOf(kernel, attention);
  const forwardBench = new Workbench(device, planLaunches(attention, choice, factsOf(device)), addresses);
  const bench = new Workbench(device, planBackward(backward, choice, factsOf(device)), addresses);
  try {
    forwardBench.run();
    bench.run();
    device.stream.synchronize();
    const errors = flags['no-torch'] ? undefined : headErrors(tensors, shape);
    const milliseconds = timeOnDevice(device, () => bench.run());
    const forwardMilliseconds = timeOnDevice(device, () => forwardBench.run());
    const rate = tflops(shape, milliseconds);
    const firstHead = () => NAMES.map((name) => floatsOf(tensors[name] as CudaTensor));
    const own = variants.length > 0 ? firstHead() : [];
    const variantTimes = variants.map(({ name, tuning }) => {
      const other = new Workbench(device, planBackward(backward, choice, factsOf(device), tuning), addresses);
      other.run();
      device.stream.synchronize();
      const [dq, dk, dv] = firstHead().map((values, i) => relativeL2(values, own[i] as Float32Array));
      const launches = other.timesOf((launch) => launch.startsWith('gradients'));
      other.dispose();
      const variant = { name, launches, difference: { dq, dk, dv } as Errors };
      console.log(
        `  [${nameOf(shape)}, ${name}] ${launches.map(timeText).join('; ')}; off by ${three(variant.difference)}`,
      );
      return variant;
    });
    const times = { milliseconds, tflops: rate, forwardMilliseconds, launches: bench.kernels };
    return { ...shape, kernel, precision, ...times, errors, variants: variantTimes };
  } finally {
    bench.dispose();
    forwardBench.dispose();
    for (const { memory } of Object.values(tensors)) memory.dispose();
  }
}

const timeText = ({ name, milliseconds, registers, localBytes }: KernelTime) =>
  `${name}: ${milliseconds.toFixed(3)} ms, ${registers} registers, ${localBytes} local bytes`;

const floatsOf = (tensor: CudaTensor): Float32Array =>
  toFloat32(download(slice(slice(tensor, 0, 0, 1), 1, 0, 1) as CudaTensor));

function relativeL2(actual: Float32Array, expected: Float32Array | Float64Array): number {
  let [error, size] = [0, 0];
  expected.forEach((x, i) => {
    error += ((actual[i] as number) - x) ** 2;
    size += x ** 2;
  });
  return Math.sqrt(error / size);
}

/** On the golden inputs, with a normal dO. */
function goldenErrors(
  device: CudaDevice,
  kernel: BackwardSupport['kernels'][number],
  precision: BackwardPrecision,
  seed: number,
) {
  return GOLDEN_NAMES.map((name) => {
    const { q, k, v, isCausal } = readGolden(name);
    const dtype = q.dtype as DType;
    const [batch, heads, tokens] = q.shape as [number, number, number, number];
    const shape = [...q.shape.slice(0, 3), v.shape.at(-1) as number];
    const dOutput = fromFloat32(new Random(seed).normals(shape.reduce((a, b) => a * b)), shape, dtype);
    const tensors: Record<string, CudaTensor> = {
      ...{ q: upload(q, device), k: upload(k, device), v: upload(v, device), dOutput: upload(dOutput, device) },
      output: emptyCudaTensor(device, shape, dtype),
      lse: emptyCudaTensor(device, [batch, heads, tokens], 'float32'),
      dq: emptyCudaTensor(device, q.shape, dtype),
      dk: emptyCudaTensor(device, k.shape, dtype),
      dv: emptyCudaTensor(device, v.shape, dtype),
    };
    const operands = tensors as Record<'q' | 'k' | 'v', CudaTensor>;
    const { attention, backward } = problemsOf(operands.q, operands.k, operands.v, isCausal, tensors, precision);
    const addresses = Object.fromEntries(Object.entries(tensors).map(([key, { memory }]) => [key, memory.pointer]));
    const choice = choiceOf(kernel, attention);
    const benches = [planLaunches(attention, choice, factsOf(device)), planBackward(backward, choice, factsOf(device))];
    for (const sequence of benches) {
      const bench = new Workbench(device, sequence, addresses);
      bench.run();
      device.stream.synchronize();
      bench.dispose();
    }
    const exact = backwardExact(attention, { q, k, v, dOutput });
    const error = (of: 'dq' | 'dk' | 'dv') => relativeL2(toFloat32(download(tensors[of] as CudaTensor)), exact[of]);
    return { name, kernel, precision, dq: error('dq'), dk: error('dk'), dv: error('dv') };
  });
}

const asksForGolden = !flags['torch-only'] && !flags.variants && flags.only === '';

const three = ({ dq, dk, dv }: Errors) => [dq, dk, dv].map((error) => error.toFixed(4)).join(' / ');

async function main(): Promise<void> {
  const folder = positionals[0] ?? '.';
  mkdirSync(folder, { recursive: true });
  const device = await new CudaBackend().device({ location: 'cpu', device: 0 });
  const seed = runSeed();
  const kernels = KERNELS.filter((kernel) => lackedBy(kernel, device.computeCapability) === undefined);
  const shapes = SHAPES.filter((shape) => nameOf(shape).includes(flags.only));
  const precisions = flags.precisions.split(',') as BackwardPrecision[];
  const ways = kernels.flatMap((kernel) => precisions.map((precision) => ({ kernel, precision })));
  const golden = asksForGolden
    ? ways.flatMap(({ kernel, precision }) => goldenErrors(device, kernel, precision, seed))
    : [];
  for (const row of golden) console.log(`${row.name}, ${row.kernel}, ${row.precision}: dQ / dK / dV ${three(row)}`);
  const results: Result[] = [];
  for (const shape of flags['accuracy-only'] || flags['torch-only'] ? [] : shapes) {
    for (const { kernel, precision } of flags.variants ? ways.slice(0, 1) : ways) {
      const variants = flags.variants ? (VARIANTS[shape.headDim] ?? []) : [];
      const result = measure(device, kernel, precision, shape, new Random(seed), variants);
      results.push(result);
      const errors = result.errors === undefined ? '' : `, dQ / dK / dV ${three(result.errors)}`;
      console.log(
        `${nameOf(shape)}, ${kernel}, ${precision}: ${result.milliseconds.toFixed(3)} ms, ${result.tflops.toFixed(0)} TFLOP/s${errors}; forward ${result.forwardMilliseconds.toFixed(3)} ms`,
      );
      for (const launch of result.launches) console.log(`    ${timeText(launch)}`);
    }
  }
  const save = (torch: unknown) =>
    writeFileSync(
      join(folder, 'backward.json'),
      `${JSON.stringify({ commit: process.env.SAGEATTENTION_COMMIT, gpu: nvidiaSmi(), seed, golden, results, torch }, undefined, 1)}\n`,
    );
  save(undefined);
  if (flags['no-torch'] || flags['accuracy-only']) return;
  const text = python(PROGRAM, [], JSON.stringify(shapes));
  if (text === undefined) return;
  const torch = JSON.parse(text) as { torch: string; results: readonly TorchTime[] };
  save(torch);
  for (const time of torch.results) {
    console.log(
      `${nameOf(time)}, torch ${time.backend}: ${time.milliseconds.toFixed(3)} ms, ${tflops(time, time.milliseconds).toFixed(0)} TFLOP/s; forward ${time.forwardMilliseconds.toFixed(3)} ms`,
    );
  }
}

await main();
