/**
 * Times each launch of a call by itself: where the time of a short sequence goes, and what quantization costs. float16, 16 heads.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-launches.mjs
 *         [--lengths 64,1024,8192] [--head-dims 64,128] [--family matrix] [--variant NAME] [--kernel NAME]
 *
 * A launch is recorded {@link REPETITIONS} times in a row in one pass, each after the one before; `together` is the whole call, as often.
 */
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import {
  createWebgpuBackend,
  emptyGpuTensor,
  type Family,
  type GpuTensor,
  uploadTensor,
} from '../../src/backends/webgpu/index.ts';
import type { Launch } from '../../src/backends/webgpu/launches/launch.ts';
import { planLaunches } from '../../src/backends/webgpu/launches/plan.ts';
import { Program } from '../../src/backends/webgpu/program.ts';
import { allocate } from '../../src/backends/webgpu/scratch.ts';
import { enableNodeWebgpu } from '../../src/integrations/onnxruntime/node-webgpu.ts';
import { fromFloat32 } from '../../src/tensor/access.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { gpuMicroseconds } from './gpu-time.ts';

const { values: flags } = parseArgs({
  options: {
    lengths: { type: 'string', default: '64,512,1024,8192' },
    'head-dims': { type: 'string', default: '64,128' },
    heads: { type: 'string', default: '16' },
    family: { type: 'string' },
    variant: { type: 'string' },
    kernel: { type: 'string', default: 'qk-int8-pv-fp16' },
  },
});
const REPETITIONS = 20;
const HEADS = Number(flags.heads);

const gpu = await enableNodeWebgpu([...DAWN_FLAGS, 'disable-dawn-features=timestamp_quantization']);
const backend = createWebgpuBackend({ gpu });
const context = await backend.context();
const { device, capabilities } = context;
const descriptor = backend.kernels.find(({ name }) => name === flags.kernel) ?? backend.defaultKernel();
const random = new Random(runSeed());

for (const headDim of flags['head-dims'].split(',').map(Number)) {
  for (const tokens of flags.lengths.split(',').map(Number)) {
    const shape = [1, HEADS, tokens, headDim];
    const made = (): GpuTensor =>
      uploadTensor(device, fromFloat32(random.normals(HEADS * tokens * headDim), shape, 'float16'));
    const [q, k, v] = [made(), made(), made()] as const;
    const output = emptyGpuTensor(device, 'float16', shape);
    const problem = createProblem(q, k, v, {});
    const { launches, variant, sizes, tables } = planLaunches(
      capabilities,
      problem,
      chooseOptions(descriptor, problem, {}),
      {
        ...(flags.family === undefined ? {} : { family: flags.family as Family }),
        ...(flags.variant === undefined ? {} : { variant: flags.variant }),
      },
    );
    const buffers = {
      ...allocate(device, sizes),
      ...{ q: q.buffer, k: k.buffer, v: v.buffer, output: output.buffer },
    };
    const parts: string[] = [];
    const time = async (name: string, some: readonly Launch[]) => {
      const program = await Program.create(context, some, sizes, tables);
      parts.push(
        `${name} ${(await gpuMicroseconds(device, (pass) => program.record(pass, buffers), REPETITIONS)).toFixed(1)}`,
      );
      program.dispose();
    };
    await time('together', launches);
    for (const launch of launches) await time(`${launch.label} [${launch.groups}]`, [launch]);
    console.log(`D ${headDim}, ${tokens} tokens, ${variant.name}, microseconds: ${parts.join('; ')}`);
    for (const buffer of Object.values(buffers)) buffer.destroy();
  }
}
process.exit(0);
