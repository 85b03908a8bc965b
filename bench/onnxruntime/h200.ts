/**
 * A stack of diffusion transformer blocks (16 heads of 72, hidden 1152, float16) through onnxruntime-web's WebGPU provider in
 * Node: the whole model, with SageAttention, without, and cut in pieces with onnxruntime's own attention between them, which
 * is the cost of cutting by itself. All three on one device, interleaved in the same run.
 *
 *     npx tsx bench/onnxruntime/h200.ts OUTPUT_FOLDER [--lengths 256,1024,8192,32768] [--blocks 4] [--runs 7] [--provider webgpu]
 *
 * Writes `onnxruntime.json` and `onnxruntime.md` after every length. Times are medians of wall clock from `run` to its output
 * on the GPU, synchronized by reading it back.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import type * as Ort from 'onnxruntime-web';
import { enableNodeWebgpu, withSageAttention } from '../../src/integrations/onnxruntime/index.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { float16FromNumber } from '../../src/tensor/formats/float16.ts';
import { bitsOf, tensor } from '../../src/tensor/tensor.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';
import { buildDiT } from '../../test/support/models.ts';
import { Random } from '../../test/support/random.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    lengths: { type: 'string', default: '256,512,1024,2048,4096,8192,16384,32768' },
    blocks: { type: 'string', default: '4' },
    heads: { type: 'string', default: '16' },
    'head-dim': { type: 'string', default: '72' },
    runs: { type: 'string', default: '7' },
    provider: { type: 'string', default: 'webgpu' },
    float: { type: 'string', default: 'float16' },
  },
});
const [folder] = positionals;
if (folder === undefined) throw new Error('give the folder for the results');
const size = { heads: Number(flags.heads), headDim: Number(flags['head-dim']), blocks: Number(flags.blocks) };
const width = size.heads * size.headDim;
const float = flags.float === 'float32' ? 'float32' : 'float16';

const gpu = flags.provider === 'webgpu' ? await enableNodeWebgpu() : undefined;
const ort = gpu === undefined ? await import('onnxruntime-web') : await import('onnxruntime-web/webgpu');
// Its WebGPU build finds no workers in Node.
if (gpu !== undefined) ort.env.wasm.numThreads = 1;
const adapter = await gpu?.requestAdapter({ powerPreference: 'high-performance' });

/** Every feature and limit of the adapter: onnxruntime and SageAttention each use what they know. */
async function openDevice(): Promise<GPUDevice | undefined> {
  if (adapter == null) return undefined;
  const requiredFeatures = [...adapter.features] as GPUFeatureName[];
  const names = [
    'maxBufferSize',
    'maxStorageBufferBindingSize',
    'maxComputeWorkgroupStorageSize',
    'maxComputeInvocationsPerWorkgroup',
    'maxComputeWorkgroupSizeX',
    'maxStorageBuffersPerShaderStage',
  ] as const;
  const requiredLimits = Object.fromEntries(names.map((name) => [name, adapter.limits[name]]));
  return adapter.requestDevice({ requiredFeatures, requiredLimits });
}
const device = await openDevice();
const options: Ort.InferenceSession.SessionOptions = {
  executionProviders: device === undefined ? ['wasm'] : [{ name: 'webgpu', device }],
  logSeverityLevel: 3,
};

function floats(random: Random, dims: readonly number[]): InstanceType<typeof ort.Tensor> {
  const values = random.normals(dims.reduce((product, n) => product * n, 1));
  return float === 'float32'
    ? new ort.Tensor('float32', values, dims)
    : new ort.Tensor('float16', Uint16Array.from(values, float16FromNumber), dims);
}

const g = new GraphBuilder(new Random(1), float);
buildDiT(g, size);
const model = g.build();

interface Variant {
  readonly name: 'without' | 'with' | 'cut only';
  readonly session: Awaited<ReturnType<typeof ort.InferenceSession.create>>;
  readonly createMilliseconds: number;
}

async function open(name: Variant['name'], create: () => Promise<unknown>): Promise<Variant> {
  const start = performance.now();
  const session = (await create()) as Variant['session'];
  return { name, session, createMilliseconds: performance.now() - start };
}

// Finite, so that the model is cut, and above every length, so that each attention is onnxruntime's, between the pieces.
const CUT_ONLY = Number.MAX_SAFE_INTEGER;
const variants = [
  await open('without', () => ort.InferenceSession.create(model, options)),
  await open('with', () => withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(model, options)),
  await open('cut only', () =>
    withSageAttention(ort, { minTokens: CUT_ONLY, wholeFallback: false }).InferenceSession.create(model, options),
  ),
];

const median = (values: readonly number[]) =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] as number;
const numbers = (data: unknown): Float32Array =>
  data instanceof Float32Array
    ? data
    : toFloat32(tensor(bitsOf(data as Uint16Array), [(data as Uint16Array).length], { dtype: 'float16' }));

const results: Record<string, unknown>[] = [];
for (const length of flags.lengths.split(',').map(Number)) {
  const random = new Random(2);
  const feeds = { x: floats(random, [1, length, width]), c: floats(random, [1, width]) };
  const times = new Map(variants.map(({ name }) => [name, [] as number[]]));
  const outputs = new Map<string, Float32Array>();
  for (let run = -2; run < Number(flags.runs); run++) {
    for (const { name, session } of variants) {
      const start = performance.now();
      const { y } = await session.run(feeds);
      const data = numbers(y?.data);
      if (run >= 0) times.get(name)?.push(performance.now() - start);
      outputs.set(name, data);
    }
  }
  const [without, sage, cut] = variants.map(({ name }) => median(times.get(name) ?? [])) as [number, number, number];
  const accuracy = compare(outputs.get('with') ?? [], outputs.get('without') ?? []);
  results.push({
    length,
    without,
    with: sage,
    cutOnly: cut,
    speedup: without / sage,
    cutCost: cut - without,
    accuracy,
  });
  console.log(
    `${length} tokens: without ${without.toFixed(2)} ms, with ${sage.toFixed(2)} ms (${(without / sage).toFixed(2)}x), cut only ${cut.toFixed(2)} ms, cosine similarity ${accuracy.cosineSimilarity.toFixed(6)}`,
  );
  write(folder);
}

function write(target: string): void {
  mkdirSync(target, { recursive: true });
  const report = {
    adapter: adapter?.info.description ?? 'CPU',
    onnxruntime: ort.env.versions.web,
    ...size,
    float,
    create: Object.fromEntries(variants.map(({ name, createMilliseconds }) => [name, createMilliseconds])),
    results,
  };
  writeFileSync(join(target, 'onnxruntime.json'), `${JSON.stringify(report, null, 2)}\n`);
  const rows = results.map((row) => {
    const { length, without, with: sage, cutOnly, speedup } = row as Record<string, number>;
    const cells = [without, sage, speedup, cutOnly].map((value) => (value as number).toFixed(2));
    return `| ${length} | ${cells.join(' | ')} |`;
  });
  const header = '| tokens | without (ms) | with (ms) | speedup | cut only (ms) |\n|---|---|---|---|---|';
  writeFileSync(join(target, 'onnxruntime.md'), `${header}\n${rows.join('\n')}\n`);
}

for (const { session } of variants) await session.release();
device?.destroy();
process.exit(0);
