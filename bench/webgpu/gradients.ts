/**
 * Times each launch of a backward call by itself, for every variant of the gradient kernels, and prints their errors: relative L2 of dQ, dK
 * and dV of a small head against float64. float32, 16 heads.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-gradients.mjs
 *         [--lengths 1024,4096] [--head-dims 64,128] [--variants NAME,NAME] [--causal]
 *
 * A variant is a name of either table (families/backward.ts), or two with a space between: of own queries, of own keys. Tiles with `int8 `
 * before the name have dV, dQ and dK's products in INT8.
 */
import { parseArgs } from 'node:util';
import { createBackwardProblem } from '../../src/attention/backward.ts';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import {
  GRADIENT_VARIANTS,
  type GradientVariant,
  INT8_GRADIENT_VARIANTS,
  MATRIX_GRADIENT_VARIANTS,
} from '../../src/backends/webgpu/families/backward.ts';
import type { Forced } from '../../src/backends/webgpu/families/choose.ts';
import { gradientErrors } from '../../src/backends/webgpu/gradient-trial.ts';
import { createWebgpuBackend, type GpuTensor, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { planBackwardLaunches } from '../../src/backends/webgpu/launches/backward.ts';
import type { Launch } from '../../src/backends/webgpu/launches/launch.ts';
import { Program } from '../../src/backends/webgpu/program.ts';
import { allocate } from '../../src/backends/webgpu/scratch.ts';
import { enableNodeWebgpu } from '../../src/integrations/onnxruntime/node-webgpu.ts';
import { Random } from '../../src/measure/random.ts';
import { elementCount, tensor } from '../../src/tensor/tensor.ts';
import { gpuMicroseconds } from './gpu-time.ts';

const { values: flags } = parseArgs({
  options: {
    lengths: { type: 'string', default: '1024,4096' },
    'head-dims': { type: 'string', default: '64,128' },
    variants: { type: 'string' },
    heads: { type: 'string', default: '16' },
    causal: { type: 'boolean', default: false },
  },
});
const HEADS = Number(flags.heads);
const REPETITIONS = 3;

const gpu = await enableNodeWebgpu([...DAWN_FLAGS, 'disable-dawn-features=timestamp_quantization']);
const backend = createWebgpuBackend({ gpu });
const context = await backend.context();
const { device, capabilities } = context;
const [{ name: tile }] = GRADIENT_VARIANTS as [GradientVariant];
const [{ name: int8Tile }] = INT8_GRADIENT_VARIANTS as [GradientVariant];
const names = flags.variants?.split(',') ?? [
  ...MATRIX_GRADIENT_VARIANTS.map(({ name }) => name),
  tile,
  `int8 ${int8Tile}`,
];
const precisionOf = (name: string) => (name.startsWith('int8 ') ? 'int8' : 'fp16');
const forcedOf = (name: string): Forced => {
  const gradientVariant = name.replace('int8 ', '');
  const isTile = INT8_GRADIENT_VARIANTS.some((one) => one.name === gradientVariant);
  return { gradientVariant, ...(isTile ? { family: 'subgroup' as const } : {}) };
};

for (const headDim of flags['head-dims'].split(',').map(Number)) {
  const random = new Random(headDim);
  const problemOf = (tokens: number) => {
    const shape = [1, HEADS, tokens, headDim];
    const made = (): GpuTensor => uploadTensor(device, tensor(random.normals(elementCount(shape)), shape));
    const [q, k, v, output, dOutput] = [made(), made(), made(), made(), made()] as const;
    // What the scores of normal inputs come to.
    const lse = uploadTensor(
      device,
      tensor(new Float32Array(HEADS * tokens).fill(Math.log(tokens) + 0.5), shape.slice(0, 3)),
    );
    const attention = createProblem(q, k, v, { isCausal: flags.causal });
    const problem = createBackwardProblem(attention, { output, lse, dOutput }, undefined, {}, 'fp16');
    return { problem, tensors: { q, k, v, output, dOutput, lse } };
  };
  const choice = chooseOptions(backend.defaultKernel(), problemOf(64).problem.attention, {});
  const shape = { dtype: 'float32', headDim, valueDim: headDim } as const;
  // Compiled side by side.
  const errors = new Map(
    names.map((name) => {
      const started = performance.now();
      const text = gradientErrors(context, shape, choice, forcedOf(name), precisionOf(name)).then(
        ({ dq, dk, dv }) =>
          `${[dq, dk, dv].map((error) => error.toFixed(4)).join(' / ')}, after ${((performance.now() - started) / 1e3).toFixed(1)} s`,
        (error: unknown) => `${error}`.slice(0, 300),
      );
      return [name, text];
    }),
  );
  for (const [name, text] of errors) console.log(`D ${headDim} ${name}: relative L2 of dQ / dK / dV ${await text}`);
  for (const tokens of flags.lengths.split(',').map(Number)) {
    const { problem, tensors } = problemOf(tokens);
    let first = true;
    for (const name of names) {
      try {
        const asked = { ...problem, precision: precisionOf(name) } as const;
        const { launches, sizes, tables } = planBackwardLaunches(capabilities, asked, choice, forcedOf(name));
        const own = Object.fromEntries(Object.entries(tensors).map(([key, { buffer }]) => [key, buffer]));
        const gradients = Object.fromEntries(['dq', 'dk', 'dv'].map((key) => [key, HEADS * tokens * headDim * 4]));
        const made = allocate(device, { ...sizes, ...gradients });
        const buffers = { ...made, ...own } as unknown as Parameters<Program['record']>[1];
        const time = async (some: readonly Launch[], repetitions = REPETITIONS) => {
          const program = await Program.create(context, some, sizes, tables);
          const microseconds = await gpuMicroseconds(device, (pass) => program.record(pass, buffers), repetitions);
          program.dispose();
          return microseconds;
        };
        const together = await time(launches);
        const parts: string[] = [];
        for (const launch of launches) {
          const own = launch.label.startsWith('d') || launch.label.startsWith('gradient codes');
          if (own || first) parts.push(`${launch.label} ${(await time([launch])).toFixed(1)}`);
        }
        first = false;
        const tera = (14 * HEADS * tokens ** 2 * headDim) / together / 1e6 / (flags.causal ? 2 : 1);
        console.log(
          `D ${headDim}, ${tokens} tokens, ${name}: together ${together.toFixed(1)} us (${tera.toFixed(1)} TFLOP/s of 7 products); ${parts.join('; ')}`,
        );
        for (const buffer of Object.values(made)) buffer?.destroy();
      } catch (error) {
        console.log(`D ${headDim}, ${tokens} tokens, ${name}: ${`${error}`.slice(0, 300)}`);
      }
    }
    for (const { buffer } of Object.values(tensors)) buffer.destroy();
  }
}
process.exit(0);
