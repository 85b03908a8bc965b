/**
 * Times decoding on one GPU through WebGPU: one query row of 32 heads over a prepared cache of 8 key heads, float16, for
 * each family that the device offers, beside the device's own copy of as many bytes in the same run.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-decoding.mjs [--keys 32768] [--head-dim 128]
 *
 * Bytes are those of the cache that a step reads: INT8 K with its facts, float16 V. A copy reads and writes each byte, so
 * its rate counts both. Times are of the clock around many steps that are submitted without waiting for one another.
 */
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { familiesOf } from '../../src/backends/webgpu/families/choose.ts';
import { createWebgpuBackend, findGpu, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { padDim } from '../../src/backends/webgpu/kernels/layout.ts';
import { GPU_BUFFER_USAGE } from '../../src/backends/webgpu/tensor.ts';
import { median } from '../../src/measure/statistics.ts';
import { fromFloat32 } from '../../src/tensor/access.ts';
import { Random, runSeed } from '../../test/support/random.ts';

const { values: flags } = parseArgs({
  options: { keys: { type: 'string', default: '32768' }, 'head-dim': { type: 'string', default: '128' } },
});
const [KEYS, D] = [Number(flags.keys), Number(flags['head-dim'])];
const [QUERY_HEADS, KEY_HEADS] = [32, 8];
/** Steps of a timing, and timings of which the median is taken. */
const STEPS = 50;
const TIMINGS = 9;

const gpu = await findGpu();
const opened = createWebgpuBackend({ gpu });
const { device, capabilities } = await opened.context();
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

const bytes = KEY_HEADS * KEYS * (padDim(D) + 16 + 2 * padDim(D));
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
const copying = await timed(() => {
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, group);
  pass.dispatchWorkgroups(8192);
  pass.end();
  device.queue.submit([encoder.finish()]);
});
for (const buffer of [from, to]) buffer.destroy();
const copyRate = (2 * bytes) / copying / 1e6;
console.log(`copy of ${bytes} bytes: ${copying.toFixed(4)} ms, ${copyRate.toFixed(0)} GB/s`);

const random = new Random(runSeed());
const made = (heads: number, tokens: number) =>
  uploadTensor(device, fromFloat32(random.normals(heads * tokens * D), [1, heads, tokens, D], 'float16'));
const [q, k, v] = [made(QUERY_HEADS, 1), made(KEY_HEADS, KEYS), made(KEY_HEADS, KEYS)] as const;
for (const family of familiesOf(capabilities).offered) {
  const backend = createWebgpuBackendOn({ device, gpu, family });
  const problem = createProblem(q, k, v, {});
  const choice = chooseOptions(backend.defaultKernel(), problem, {});
  const cache = await backend.prepareKeyValue(problem, choice, k, v, {});
  const milliseconds = await timed(() => cache.attend(q, problem, {}, {}));
  const rate = bytes / milliseconds / 1e6;
  console.log(
    `${family}: ${milliseconds.toFixed(4)} ms a step, ${rate.toFixed(0)} GB/s, ${((100 * rate) / copyRate).toFixed(0)}% of the copy's rate`,
  );
  cache.dispose();
}
process.exit(0);
