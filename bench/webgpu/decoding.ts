/**
 * Times decoding on one GPU through WebGPU: one query row of 32 heads over a prepared cache of 8 key heads, float16, for
 * each family that the device offers, beside the device's own copy of as many bytes in the same run.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-decoding.mjs
 *         [--keys 1024,8192,32768] [--head-dims 64,128] [--heads 32] [--key-heads 8]
 *
 * Bytes are those of the cache that a step reads: INT8 K with its facts, float16 V. A copy reads and writes each byte, so
 * its rate counts both. `GPU` is the time of a step's launches, recorded many times in a row in one pass, between two
 * timestamps, with each launch's by itself; `clock` that of many calls of a cache that are submitted without waiting
 * for one another, which takes as long as the processor needs to record them.
 */
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import { familiesOf, keyValueLayoutOf } from '../../src/backends/webgpu/families/choose.ts';
import { createWebgpuBackend, emptyGpuTensor, type GpuTensor, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { padDim } from '../../src/backends/webgpu/kernels/layout.ts';
import { attentionParts } from '../../src/backends/webgpu/launches/attention.ts';
import type { Launch } from '../../src/backends/webgpu/launches/launch.ts';
import { planLaunches } from '../../src/backends/webgpu/launches/plan.ts';
import { keyValueShapeOf } from '../../src/backends/webgpu/launches/quantize.ts';
import { createStages } from '../../src/backends/webgpu/launches/stages.ts';
import { Program } from '../../src/backends/webgpu/program.ts';
import { allocate } from '../../src/backends/webgpu/scratch.ts';
import { GPU_BUFFER_USAGE } from '../../src/backends/webgpu/tensor.ts';
import { enableNodeWebgpu } from '../../src/integrations/onnxruntime/node-webgpu.ts';
import { median } from '../../src/measure/statistics.ts';
import { fromFloat32 } from '../../src/tensor/access.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { gpuMicroseconds } from './gpu-time.ts';

const { values: flags } = parseArgs({
  options: {
    keys: { type: 'string', default: '1024,8192,32768' },
    'head-dims': { type: 'string', default: '64,128' },
    heads: { type: 'string', default: '32' },
    'key-heads': { type: 'string', default: '8' },
  },
});
const numbers = (text: string) => text.split(',').map(Number);
const [QUERY_HEADS, KEY_HEADS] = [Number(flags.heads), Number(flags['key-heads'])];
/** Steps of a timing, and timings of which the median is taken. */
const STEPS = 50;
const TIMINGS = 9;

const gpu = await enableNodeWebgpu([...DAWN_FLAGS, 'disable-dawn-features=timestamp_quantization']);
const opened = createWebgpuBackend({ gpu });
const context = await opened.context();
const { device, capabilities } = context;
console.log((await opened.availability()).details);

/** Milliseconds of one step. */
async function timed(step: () => unknown): Promise<number> {
  const times: number[] = [];
  for (let i = 0; i <= TIMINGS; i++) {
    const started = performance.now();
    await Promise.all(Array.from({ length: STEPS }, step));
    await device.queue.onSubmittedWorkDone();
    // The first one compiles and warms up.
    if (i > 0) times.push((performance.now() - started) / STEPS);
  }
  return median(times);
}

/** GB/s of a copy, reads and writes together. */
async function copyRateOf(bytes: number): Promise<number> {
  const usage = GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST;
  const [from, to] = [0, 1].map(() => device.createBuffer({ size: bytes, usage })) as [GPUBuffer, GPUBuffer];
  // A copy by a kernel: a driver's own copies may go through a slower engine.
  const module = device.createShaderModule({
    code: `
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> copy: array<vec4<u32>>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < ${bytes / 16}u; i += groups.x * 256u) { copy[i] = source[i]; }
}`,
  });
  const pipeline = device.createComputePipeline({ layout: 'auto', compute: { module } });
  const group = device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [from, to].map((buffer, binding) => ({ binding, resource: { buffer } })),
  });
  const record = (pass: GPUComputePassEncoder) => {
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(8192);
  };
  const submit = () => {
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    record(pass);
    pass.end();
    device.queue.submit([encoder.finish()]);
  };
  // By the clock that times a step: the processor's gives a copy of small caches the cost of submitting it.
  const microseconds = capabilities.timestamps
    ? await gpuMicroseconds(device, record, STEPS)
    : 1000 * (await timed(submit));
  for (const buffer of [from, to]) buffer.destroy();
  const rate = (2 * bytes) / microseconds / 1e3;
  console.log(`copy of ${bytes} bytes: ${microseconds.toFixed(1)} us, ${rate.toFixed(0)} GB/s`);
  return rate;
}

/** Microseconds of launches, in a row in one pass; undefined without timestamps. */
async function gpuTime(
  launches: readonly Launch[],
  { sizes, tables }: Pick<ReturnType<typeof planLaunches>, 'sizes' | 'tables'>,
  buffers: Parameters<Program['record']>[1],
): Promise<number | undefined> {
  if (!capabilities.timestamps) return undefined;
  const program = await Program.create(context, launches, sizes, tables);
  const microseconds = await gpuMicroseconds(device, (pass) => program.record(pass, buffers), STEPS);
  program.dispose();
  return microseconds;
}

const random = new Random(runSeed());
for (const headDim of numbers(flags['head-dims'])) {
  for (const keys of numbers(flags.keys)) {
    const bytes = KEY_HEADS * keys * (padDim(headDim) + 16 + 2 * padDim(headDim));
    const copyRate = await copyRateOf(bytes);
    const made = (heads: number, tokens: number) =>
      uploadTensor(
        device,
        fromFloat32(random.normals(heads * tokens * headDim), [1, heads, tokens, headDim], 'float16'),
      );
    const [q, k, v] = [made(QUERY_HEADS, 1), made(KEY_HEADS, keys), made(KEY_HEADS, keys)] as const;
    const output = emptyGpuTensor(device, 'float16', [1, QUERY_HEADS, 1, headDim]);
    for (const family of familiesOf(capabilities).offered) {
      const backend = createWebgpuBackendOn({ device, gpu, family });
      const problem = createProblem(q, k, v, {});
      const choice = chooseOptions(backend.defaultKernel(), problem, {});
      const share = (microseconds: number) =>
        `${(bytes / microseconds / 1e3).toFixed(0)} GB/s, ${((100 * bytes) / microseconds / 1e3 / copyRate).toFixed(0)}% of the copy's rate`;

      const plan = planLaunches(capabilities, problem, choice, { family });
      const buffers = {
        ...allocate(device, plan.sizes),
        ...{ q: q.buffer, k: k.buffer, v: v.buffer, output: output.buffer },
      };
      // Quantizes K and V, over which a step does what it does over a cache.
      await gpuTime(plan.launches, plan, buffers);
      const layout = keyValueLayoutOf(capabilities, problem, choice, { family });
      const held = keyValueShapeOf(problem, choice, capabilities, layout, true);
      const stages = createStages(problem, capabilities, held);
      const { launches, sizes } = attentionParts(stages, choice, { family });
      const step = { sizes, tables: stages.tables.bytes };
      const whole = await gpuTime(launches, step, buffers);
      const parts: string[] = [];
      for (const launch of launches) {
        const time = await gpuTime([launch], step, buffers);
        parts.push(`${launch.label} [${launch.groups}] ${time?.toFixed(1)}`);
      }
      for (const buffer of Object.values(buffers)) {
        if (![q, k, v, output].some((own) => own.buffer === buffer)) buffer.destroy();
      }

      const cache = await backend.prepareKeyValue(problem, choice, k, v, {});
      const clock =
        1e3 * (await timed(async () => ((await cache.attend(q, problem, {}, {})).output as GpuTensor).dispose()));
      cache.dispose();
      const gpuText = whole === undefined ? '' : `GPU ${whole.toFixed(1)} us, ${share(whole)} (${parts.join('; ')}); `;
      console.log(
        `D ${headDim}, ${keys} keys, ${family} ${plan.variant.name}, ${plan.keySplits} splits: ${gpuText}clock ${clock.toFixed(1)} us, ${share(clock)}`,
      );
    }
    for (const { buffer } of [q, k, v, output]) buffer.destroy();
  }
}
process.exit(0);
