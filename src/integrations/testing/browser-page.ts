/**
 * Runs in a browser, driven by browser.test.ts: each function compares one engine with exact attention or with itself.
 */
import { getWebGPUDevice, init, numpy } from '@jax-js/jax';
import { loadGraphModel } from '@tensorflow/tfjs-converter';
import * as tf from '@tensorflow/tfjs-core';
import '@tensorflow/tfjs-backend-webgl';
import '@tensorflow/tfjs-backend-webgpu';
import * as ort from 'onnxruntime-web/webgpu';
import { GraphBuilder } from '../../../test/support/graph-builder.ts';
import { buildDiT } from '../../../test/support/models.ts';
import { Random } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { backwardExact } from '../../reference/backward.ts';
import { attentionExact } from '../../reference/exact.ts';
import { type Accuracy, compare, relativeL2 } from '../../reference/metrics.ts';
import { elementCount, type Tensor, tensor } from '../../tensor/tensor.ts';
import * as jaxAttention from '../jax/index.ts';
import { withSageAttention } from '../onnxruntime/index.ts';
import * as tfAttention from '../tfjs/index.ts';
import { TopologyBuilder } from '../tfjs/testing/topology-builder.ts';
import { type CountedRuns, countRuns } from './count-commands.ts';

const SHAPE = [1, 2, 80, 32] as const;

function operands(seed: number): { q: Tensor; k: Tensor; v: Tensor; exact: Float64Array } {
  const random = new Random(seed);
  const make = () => tensor(random.normals(elementCount(SHAPE)), SHAPE);
  const [q, k, v] = [make(), make(), make()];
  return { q, k, v, exact: attentionExact(createProblem(q, k, v, { isCausal: true }), { q, k, v }).output };
}

async function onnxruntime(
  provider: 'webgpu' | 'wasm',
  seed: number,
): Promise<{ accuracy: Accuracy; taken: boolean[] }> {
  ort.env.wasm.wasmPaths = `${location.origin}/onnxruntime-web/`;
  ort.env.wasm.numThreads = 1;
  const size = { heads: 2, headDim: 32, blocks: 2 };
  const width = size.heads * size.headDim;
  const g = new GraphBuilder(new Random(seed));
  buildDiT(g, size);
  const bytes = g.build();
  const random = new Random(seed + 1);
  const feeds = {
    x: new ort.Tensor('float32', random.normals(80 * width), [1, 80, width]),
    c: new ort.Tensor('float32', random.normals(width), [1, width]),
  };
  const plain = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
  const expected = (await plain.run(feeds)).y?.data as Float32Array;
  const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes, {
    executionProviders: [provider],
  });
  const actual = (await sage.run(feeds)).y?.data as Float32Array;
  const taken = sage.sageAttention.map((attention) => attention.taken);
  await sage.release();
  return { accuracy: compare(actual, expected), taken };
}

/** The commands of a run in one session, with markers and in pieces. */
async function commands(seed: number): Promise<CountedRuns> {
  ort.env.wasm.wasmPaths = `${location.origin}/onnxruntime-web/`;
  ort.env.wasm.numThreads = 1;
  const adapter = (await navigator.gpu.requestAdapter()) as GPUAdapter;
  const wanted = ['shader-f16', 'subgroups'] as GPUFeatureName[];
  const requiredFeatures = wanted.filter((feature) => adapter.features.has(feature));
  const device = await adapter.requestDevice({ requiredFeatures });
  const counted = await countRuns(ort, device, seed);
  device.destroy();
  return counted;
}

/** Bytes of the buffers that a device has made, from now on, and that are not destroyed. */
function countBytes(device: GPUDevice): () => number {
  let bytes = 0;
  const createBuffer = device.createBuffer.bind(device);
  device.createBuffer = (descriptor) => {
    const buffer = createBuffer(descriptor);
    let { size } = buffer;
    bytes += size;
    const destroy = buffer.destroy.bind(buffer);
    buffer.destroy = () => {
      bytes -= size;
      size = 0;
      destroy();
    };
    return buffer;
  };
  return () => bytes;
}

/** Bytes that stay behind with each of a few calls; what the first calls make for all later ones does not count. */
async function leakedBytes(device: GPUDevice, call: () => Promise<void>): Promise<number> {
  const bytes = countBytes(device);
  for (let i = 0; i < 3; i++) await call();
  const before = bytes();
  for (let i = 0; i < 3; i++) await call();
  return bytes() - before;
}

/** What a promise is rejected with, as far as it can leave the page. */
async function argumentAtFault(call: Promise<unknown>): Promise<string | undefined> {
  return call.then(
    () => undefined,
    (error: { argument?: string }) => error.argument,
  );
}

interface OnGpu {
  readonly accuracy: Accuracy;
  /** None where there is no WebGPU device whose buffers could be counted. */
  readonly leakedBytes: number | undefined;
  /** The argument named where an option is unknown. */
  readonly refused: string | undefined;
}

type TfBackend = 'webgpu' | 'webgl';

async function useTfBackend(backend: TfBackend): Promise<void> {
  if (!(await tf.setBackend(backend))) throw new Error(`tfjs has no ${backend} here`);
}

async function tfjs(backend: TfBackend, seed: number): Promise<OnGpu & { leaked: number; unseeing: number[] }> {
  await useTfBackend(backend);
  const { q, k, v, exact } = operands(seed);
  const inputs = [q, k, v].map((value) => tf.tensor(value.data as Float32Array, [...SHAPE])) as [
    tf.Tensor,
    tf.Tensor,
    tf.Tensor,
  ];
  const before = tf.memory().numTensors;
  const output = await tfAttention.sageattn(...inputs, { isCausal: true });
  const accuracy = compare(await output.data(), exact);
  output.dispose();
  const { device } = tf.backend() as { device?: GPUDevice };
  const bytes =
    device &&
    (await leakedBytes(device, async () => {
      (await tfAttention.sageattn(...inputs, { isCausal: true })).dispose();
    }));
  const refused = await argumentAtFault(tfAttention.sageattn(...inputs, { isCasual: true } as never));
  // No query sees a key.
  const attnMask = tf.zeros([1, SHAPE[2]], 'bool');
  const blind = await tfAttention.sageattn(...inputs, { attnMask });
  const unseeing = [...new Set(await blind.data())];
  tf.dispose([blind, attnMask]);
  return { accuracy, leaked: tf.memory().numTensors - before, leakedBytes: bytes, refused, unseeing };
}

/** A GraphModel that flattens rows for its softmax by a shape that it computes, beside tfjs alone. */
async function tfjsModel(
  backend: TfBackend,
  seed: number,
): Promise<{ accuracy: Accuracy; taken: number; leaked: number }> {
  await useTfBackend(backend);
  const g = new TopologyBuilder(new Random(seed));
  const [q, k, v] = [g.input(SHAPE), g.input(SHAPE), g.input(SHAPE)];
  const scaled = g.node('Mul', [g.node('BatchMatMul', [q, k], { adj_y: true }), g.scalar(SHAPE[3] ** -0.5)]);
  const scores = g.node('Add', [scaled, g.input([1, 1, 1, SHAPE[2]])]);
  const shape = g.node('Shape', [scores]);
  const last = g.node('Slice', [shape, g.shape([3]), g.shape([1])]);
  const rows = g.node('Reshape', [scores, g.node('ConcatV2', [g.shape([-1]), last, g.integer(0)])]);
  g.node('BatchMatMul', [g.node('Reshape', [g.node('Softmax', [rows]), shape]), v]);
  const { topology, taken } = tfAttention.rewriteTopology(g.topology());
  const feeds = g.feeds();
  const run = async (modelTopology: object) => {
    const model = await loadGraphModel(tf.io.fromMemory({ ...g.weights(), modelTopology }));
    const before = tf.memory().numTensors;
    const output = (await model.executeAsync(feeds)) as tf.Tensor;
    const values = (await output.data()) as Float32Array;
    output.dispose();
    return { values, leaked: tf.memory().numTensors - before };
  };
  const plain = await run(g.topology());
  const sage = await run(topology);
  return { accuracy: compare(sage.values, plain.values), taken: taken.length, leaked: sage.leaked };
}

async function jax(seed: number): Promise<OnGpu & { device: string; kept: number; gradients: number[] }> {
  await init('webgpu');
  const { q, k, v, exact } = operands(seed);
  const make = (value: Tensor) =>
    numpy.array(value.data as Float32Array<ArrayBuffer>, { shape: [...SHAPE], device: 'webgpu' });
  const output = await jaxAttention.sageattn(make(q), make(k), make(v), { isCausal: true });
  const { device } = output;
  const accuracy = compare((await output.data()) as Float32Array, exact);
  const bytes = await leakedBytes(getWebGPUDevice(), async () => {
    (await jaxAttention.sageattn(make(q), make(k), make(v), { isCausal: true })).dispose();
  });
  const exactGradients = backwardExact(createProblem(q, k, v, { isCausal: true }), { q, k, v, dOutput: q });
  const attention = await jaxAttention.sageattnTrainable(make(q), make(k), make(v), { isCausal: true });
  const made = await attention.backward(make(q));
  attention.dispose();
  const gradients: number[] = [];
  for (const name of ['dq', 'dk', 'dv'] as const) {
    gradients.push(relativeL2((await made[name].data()) as Float32Array, exactGradients[name]));
  }
  const kept = make(q);
  const refused = await argumentAtFault(jaxAttention.sageattn(kept, make(k), make(v), { isCasual: true } as never));
  return { accuracy, device, leakedBytes: bytes, refused, kept: kept.refCount, gradients };
}

/** What the test calls. */
export const page = { onnxruntime, commands, tfjs, tfjsModel, jax };
export type Page = typeof page;

(globalThis as { page?: Page }).page = page;
