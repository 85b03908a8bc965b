/**
 * Processor time of a run under onnxruntime-web on WebGPU in Node, with markers and without, where the GPU takes none: Dawn's null adapter accepts commands
 * and executes nothing. A model of few tokens is as fast as its processor, so this is what a marker costs there; a driver's own work comes to it.
 *
 *     npx tsx bench/onnxruntime/host-cost.ts [--blocks 12] [--tokens 1024] [--rounds 41] [--spelling fused] [--variants marker,whole]
 *
 * Prints medians and minima of processor time (all threads) in rounds that take turns, and how often a run calls WebGPU. One variant alone is for
 * `node --cpu-prof --import tsx`.
 */
import { parseArgs } from 'node:util';
import { emptyGpuTensor } from '../../src/backends/webgpu/tensor.ts';
import { enableNodeWebgpu, withSageAttention } from '../../src/integrations/onnxruntime/index.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';
import { type AttentionSpelling, buildDiT } from '../../test/support/models.ts';

const { values: flags } = parseArgs({
  options: {
    blocks: { type: 'string', default: '12' },
    heads: { type: 'string', default: '8' },
    'head-dim': { type: 'string', default: '16' },
    tokens: { type: 'string', default: '1024' },
    rounds: { type: 'string', default: '41' },
    spelling: { type: 'string', default: 'fused' },
    variants: { type: 'string', default: 'marker,whole' },
  },
});
const [heads, headDim, blocks, tokens, rounds] = [
  flags.heads,
  flags['head-dim'],
  flags.blocks,
  flags.tokens,
  flags.rounds,
].map(Number) as [number, number, number, number, number];
const REPEATS = 4;
const WARM_UPS = 5;

const gpu = await enableNodeWebgpu(['backend=null']);
const adapter = await gpu.requestAdapter();
if (adapter === null) throw new Error('this Dawn has no null adapter');

/** Calls by the method's name, since the count was last cleared. */
const calls = new Map<string, number>();
const METHODS = {
  GPUDevice: ['createBindGroup', 'createBuffer'],
  GPUComputePassEncoder: ['setBindGroup', 'dispatchWorkgroups'],
  GPUCommandEncoder: ['beginComputePass', 'clearBuffer'],
  GPUQueue: ['submit', 'writeBuffer'],
};
type Method = (...args: unknown[]) => unknown;
const classes = globalThis as unknown as Record<string, { readonly prototype: Record<string, Method> }>;
for (const [name, methods] of Object.entries(METHODS)) {
  const prototype = classes[name]?.prototype as Record<string, Method>;
  for (const method of methods) {
    const original = prototype[method] as Method;
    prototype[method] = function (this: unknown, ...args) {
      calls.set(method, (calls.get(method) ?? 0) + 1);
      return original.apply(this, args);
    };
  }
}
// The null adapter's memory holds anything. Read as zeros, a marker's result is that of its attention, as the test at opening asks.
const buffers = classes.GPUBuffer?.prototype as Record<string, Method>;
const getMappedRange = buffers.getMappedRange as Method;
buffers.getMappedRange = function (this: GPUBuffer, ...args) {
  const range = getMappedRange.apply(this, args) as ArrayBuffer;
  if ((this.usage & GPUBufferUsage.MAP_READ) !== 0) new Uint8Array(range).fill(0);
  return range;
};

const device = await adapter.requestDevice({
  requiredFeatures: [...adapter.features] as GPUFeatureName[],
  requiredLimits: { maxStorageBufferBindingSize: adapter.limits.maxStorageBufferBindingSize },
});
const ort = await import('onnxruntime-web/webgpu');
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'fatal';
const options = {
  executionProviders: [{ name: 'webgpu', device }],
  preferredOutputLocation: 'gpu-buffer',
  logSeverityLevel: 4,
} as never;
const g = new GraphBuilder(new Random(1), 'float32');
buildDiT(g, { heads, headDim, blocks }, flags.spelling as AttentionSpelling);
const model = g.build();
const onGpu = (dims: readonly number[]) =>
  ort.Tensor.fromGpuBuffer(emptyGpuTensor(device, 'float32', dims).buffer, { dataType: 'float32', dims });
const feeds = { x: onGpu([1, tokens, heads * headDim]), c: onGpu([1, heads * headDim]) };

const openings = {
  // First, since it spares the process the half minute that onnxruntime-web waits in Node.
  marker: () => withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(model, options),
  cut: () => withSageAttention(ort, { minTokens: 0, markers: false }).InferenceSession.create(model, options),
  whole: () => ort.InferenceSession.create(model, options),
};
interface Variant {
  readonly name: string;
  readonly run: () => Promise<void>;
  readonly milliseconds: number[];
  calls: Record<string, number>;
}
const variants: Variant[] = [];
for (const [name, open] of Object.entries(openings)) {
  if (!flags.variants.split(',').includes(name)) continue;
  const session = await open();
  const run = async () => {
    const { y } = (await session.run(feeds as never)) as unknown as { y: { dispose(): void } };
    await device.queue.onSubmittedWorkDone();
    y.dispose();
  };
  variants.push({ name, run, milliseconds: [], calls: {} });
}
for (let round = -WARM_UPS; round < rounds; round++) {
  for (const variant of variants) {
    calls.clear();
    const before = process.cpuUsage();
    for (let i = 0; i < REPEATS; i++) await variant.run();
    const { user, system } = process.cpuUsage(before);
    if (round < 0) continue;
    variant.milliseconds.push((user + system) / 1000 / REPEATS);
    variant.calls = Object.fromEntries([...calls].map(([name, count]) => [name, count / REPEATS]));
  }
}
console.table(
  Object.fromEntries(
    variants.map(({ name, milliseconds, calls }) => [
      name,
      { 'median ms': median(milliseconds).toFixed(2), 'least ms': Math.min(...milliseconds).toFixed(2), ...calls },
    ]),
  ),
);
process.exit(0);
