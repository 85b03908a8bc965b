/**
 * Forward and backward of attention on one GPU: `sageattnTrainable` on tensors of the device, and the same attention in operations of
 * tfjs' WebGPU backend (float32), in turns. With it the variants of the gradient kernels that are asked for, and the error of the gradients.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-backward.mjs FOLDER [--lengths 1024,4096] [--head-dims 64,128]
 *         [--variants NAME,NAME]
 *
 * Writes `webgpu-backward.json` there after every size. Times are medians of the clock around several calls. TFLOP/s count 14 H L^2 D:
 * two products forward and five backward.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import type * as Tf from '@tensorflow/tfjs-core';
import { create, globals } from 'webgpu';
import { createProblem } from '../../src/attention/problem.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import { familiesOf } from '../../src/backends/webgpu/families/choose.ts';
import { downloadTensor, type GpuTensor, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { sageattnTrainable, tensor } from '../../src/index.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { relativeL2 } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { elementCount, type Tensor } from '../../src/tensor/tensor.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    heads: { type: 'string', default: '16' },
    lengths: { type: 'string', default: '512,1024,2048,4096' },
    'head-dims': { type: 'string', default: '64,128' },
    variants: { type: 'string' },
  },
});
const [folder = '.'] = positionals;
const numbers = (text: string) => text.split(',').map(Number);
const HEADS = Number(flags.heads);
const ROUNDS = 5;
/** Of a turn, milliseconds. */
const TURN = 100;
/** The longest problem whose gradients are computed in float64 too. */
const EXACT = { heads: 1, length: 1024 };

interface Inputs<T> {
  readonly q: T;
  readonly k: T;
  readonly v: T;
  readonly dOutput: T;
}

function inputsOf(heads: number, length: number, dim: number): Inputs<Tensor> {
  const random = new Random(length + dim);
  const shape = [1, heads, length, dim];
  const normal = () => tensor(random.normals(elementCount(shape)), shape);
  return { q: normal(), k: normal(), v: normal(), dOutput: normal() };
}

/** Something that is timed: `calls` calls, waited for once. */
interface Contender {
  readonly name: string;
  run(calls: number): Promise<void>;
  dispose(): void;
}

/** What tfjs' backend has besides its types. */
interface TfjsBackend {
  readonly device: GPUDevice;
  readonly commandEncoder: GPUCommandEncoder | null;
  endComputePassEncoder(): void;
  submitQueue(): void;
}

/** tfjs finds WebGPU as in a browser; so do our backends, which need Dawn's toggles for float16 and for matrices. */
async function tfjsOnWebgpu() {
  Object.assign(globalThis, globals);
  const navigator = { gpu: create([...DAWN_FLAGS]), userAgent: '' };
  Object.defineProperty(globalThis, 'navigator', { value: navigator, configurable: true });
  const tf = await import('@tensorflow/tfjs-core');
  // The core registers no gradients by itself.
  await import('@tensorflow/tfjs-core/dist/register_all_gradients.js');
  await import('@tensorflow/tfjs-backend-webgpu');
  await tf.setBackend('webgpu');
  await tf.ready();
  return { tf, backend: tf.backend() as unknown as TfjsBackend };
}

type Peer = Awaited<ReturnType<typeof tfjsOnWebgpu>>;

function tfjsContender({ tf, backend }: Peer, inputs: Inputs<Tensor>, dim: number): Contender {
  const [q, k, v, dy] = [inputs.q, inputs.k, inputs.v, inputs.dOutput].map((x) =>
    tf.tensor(x.data as Float32Array, x.shape as number[]),
  ) as [Tf.Tensor, Tf.Tensor, Tf.Tensor, Tf.Tensor];
  const gradients = tf.valueAndGrads((...args: Tf.Tensor[]) => {
    const [a, b, c] = args as [Tf.Tensor, Tf.Tensor, Tf.Tensor];
    return tf.matMul(tf.softmax(tf.mul(tf.matMul(a, b, false, true), dim ** -0.5)), c);
  });
  return {
    name: 'tfjs WebGPU, float32',
    async run(calls) {
      for (let i = 0; i < calls; i++) tf.dispose(gradients([q, k, v], dy) as unknown as Tf.TensorContainer);
      if (backend.commandEncoder !== null) {
        backend.endComputePassEncoder();
        backend.submitQueue();
      }
      await backend.device.queue.onSubmittedWorkDone();
    },
    dispose: () => tf.dispose([q, k, v, dy]),
  };
}

const upload = (device: GPUDevice, inputs: Inputs<Tensor>): Inputs<GpuTensor> => ({
  q: uploadTensor(device, inputs.q),
  k: uploadTensor(device, inputs.k),
  v: uploadTensor(device, inputs.v),
  dOutput: uploadTensor(device, inputs.dOutput),
});

const release = (tensors: object) => {
  for (const made of Object.values(tensors)) (made as Partial<GpuTensor> | undefined)?.dispose?.();
};

async function gradientsOf({ q, k, v, dOutput }: Inputs<GpuTensor>) {
  const attention = await sageattnTrainable(q, k, v, { backend: 'webgpu' });
  const gradients = await attention.backward(dOutput);
  const { output, lse } = attention;
  attention.dispose();
  release({ output, lse });
  return gradients;
}

interface OwnOptions {
  readonly gradientVariant?: string;
  readonly reuseOutputs?: boolean;
}

/** One for all sizes, so that a kernel is compiled once. */
const backends = new Map<string, ReturnType<typeof createWebgpuBackendOn>>();
function backendWith(options: OwnOptions) {
  const key = JSON.stringify(options);
  const backend = backends.get(key) ?? createWebgpuBackendOn(options);
  backends.set(key, backend);
  return backend;
}

async function ownContender(name: string, options: OwnOptions, inputs: Inputs<Tensor>) {
  const backend = backendWith(options);
  const context = await backend.context();
  const own = upload(context.device, inputs);
  return {
    name,
    async run(calls: number) {
      await setBackend(backend);
      for (let i = 0; i < calls; i++) release(await gradientsOf(own));
      await context.unlessLost(context.device.queue.onSubmittedWorkDone());
    },
    dispose: () => release(own),
  };
}

async function accuracyOf(dim: number): Promise<number[]> {
  const inputs = inputsOf(EXACT.heads, EXACT.length, dim);
  const backend = backendWith({});
  await setBackend(backend);
  const { device } = await backend.context();
  const own = upload(device, inputs);
  const gradients = await gradientsOf(own);
  const { q, k, v, dOutput } = inputs;
  const exact = backwardExact(createProblem(q, k, v, {}), { q, k, v, dOutput });
  const errors: number[] = [];
  for (const name of ['dq', 'dk', 'dv'] as const) {
    errors.push(relativeL2(toFloat32(await downloadTensor(device, gradients[name])), exact[name]));
  }
  release({ ...own, ...gradients });
  return errors;
}

async function main(): Promise<void> {
  const peer = await tfjsOnWebgpu().catch((error: unknown) => {
    console.log(`no tfjs: ${error}`);
    return undefined;
  });
  const { capabilities } = await backendWith({}).context();
  const { adapter } = capabilities;
  const [family] = familiesOf(capabilities).offered;
  console.log(`${adapter}, family ${family}`);
  const rows: object[] = [];
  mkdirSync(folder, { recursive: true });
  for (const dim of numbers(flags['head-dims'])) {
    const errors = await accuracyOf(dim);
    console.log(`D=${dim}: relative L2 of dQ / dK / dV ${errors.map((error) => error.toFixed(4)).join(' / ')}`);
    for (const length of numbers(flags.lengths)) {
      const inputs = inputsOf(HEADS, length, dim);
      const contenders: Contender[] = peer === undefined ? [] : [tfjsContender(peer, inputs, dim)];
      contenders.push(await ownContender('sageattnTrainable', {}, inputs));
      contenders.push(await ownContender('sageattnTrainable, reuseOutputs', { reuseOutputs: true }, inputs));
      for (const name of flags.variants?.split(',') ?? []) {
        contenders.push(await ownContender(`sageattnTrainable ${name}`, { gradientVariant: name }, inputs));
      }
      const milliseconds: Record<string, number> = {};
      const ready: { contender: Contender; calls: number; times: number[] }[] = [];
      for (const contender of contenders) {
        try {
          await contender.run(1);
          const started = performance.now();
          await contender.run(2);
          const one = (performance.now() - started) / 2;
          ready.push({ contender, calls: Math.max(1, Math.min(64, Math.floor(TURN / one))), times: [] });
        } catch (error) {
          console.log(`${contender.name}: ${error}`);
        }
      }
      for (let round = 0; round < ROUNDS; round++) {
        for (const { contender, calls, times } of ready) {
          const started = performance.now();
          await contender.run(calls);
          times.push((performance.now() - started) / calls);
        }
      }
      for (const { contender, times } of ready) {
        const time = median(times);
        milliseconds[contender.name] = time;
        const tera = (14 * HEADS * length ** 2 * dim) / time / 1e9;
        console.log(`D=${dim} L=${length} ${contender.name}: ${time.toFixed(3)} ms, ${tera.toFixed(2)} TFLOP/s`);
      }
      for (const contender of contenders) contender.dispose();
      rows.push({ heads: HEADS, dim, length, milliseconds, relativeL2: errors });
      const report = {
        commit: process.env.SAGEATTENTION_COMMIT,
        node: process.version,
        adapter,
        family,
        rounds: ROUNDS,
        rows,
      };
      writeFileSync(join(folder, 'webgpu-backward.json'), `${JSON.stringify(report, undefined, 1)}\n`);
    }
  }
  process.exit(0);
}

await main();
