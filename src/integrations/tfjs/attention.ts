/** `sageattn` on tensors of TensorFlow.js, whatever their backend. */
import * as tf from '@tensorflow/tfjs-core';
import { chooseOptions } from '../../attention/choice.ts';
import { InvalidArgumentError, UnsupportedOptionError } from '../../attention/errors.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { withCachedPlan } from '../../attention/plan-cache.ts';
import { createProblem } from '../../attention/problem.ts';
import { sageattn as attend } from '../../attention/sageattn.ts';
import { type GpuTensor, uploadTensor } from '../../backends/webgpu/gpu-tensor.ts';
import type { WebgpuBackend } from '../../backends/webgpu/index.ts';
import { contiguousStrides, type Tensor, tensor } from '../../tensor/tensor.ts';

/** Options of `sageattn` but for what makes no sense here: where tensors live says which backend runs. */
export type TfAttentionOptions = Omit<AttentionOptions, 'attnMask' | 'returnLse' | 'stream' | 'backend'> & {
  /** bool (true = attend) or additive float32, broadcastable to `[B,Hq,Lq,Lk]`. */
  readonly attnMask?: tf.Tensor;
};

const backends = new WeakMap<GPUDevice, Promise<WebgpuBackend>>();

function backendOn(device: GPUDevice): Promise<WebgpuBackend> {
  let backend = backends.get(device);
  if (backend === undefined) {
    backend = import('../../backends/webgpu/index.ts').then(({ createWebgpuBackend }) =>
      createWebgpuBackend({ device }),
    );
    backends.set(device, backend);
  }
  return backend;
}

/**
 * Attention on tensors of TensorFlow.js: float32, `[B,H,L,D]` or as `tensorLayout` says. On tfjs-backend-webgpu it runs on
 * tfjs' own device and nothing leaves the GPU; with every other backend it runs on the WASM backend of this package.
 *
 * The inputs are read before the call returns its promise: they may be disposed right after it, as `tf.tidy` does. The
 * caller disposes the result.
 *
 * @throws as `sageattn`
 */
export function sageattn(
  q: tf.Tensor,
  k: tf.Tensor,
  v: tf.Tensor,
  options: TfAttentionOptions = {},
): Promise<tf.Tensor4D> {
  for (const [argument, value] of Object.entries({ q, k, v })) {
    if (value.dtype !== 'float32') {
      throw new InvalidArgumentError(
        'invalid-dtype',
        argument,
        "'float32', the float type of tfjs",
        `'${value.dtype}'`,
      );
    }
  }
  const device = (tf.backend() as { device?: GPUDevice }).device;
  return tf.getBackend() === 'webgpu' && device !== undefined
    ? attendOnGpu(device, q, k, v, options)
    : attendOnCpu(q, k, v, options);
}

async function attendOnCpu(
  q: tf.Tensor,
  k: tf.Tensor,
  v: tf.Tensor,
  options: TfAttentionOptions,
): Promise<tf.Tensor4D> {
  const { attnMask, ...rest } = options;
  const read = async (value: tf.Tensor): Promise<Tensor> => {
    const { shape } = value;
    const data = await value.data();
    return tensor(value.dtype === 'bool' ? Uint8Array.from(data) : Float32Array.from(data), shape);
  };
  const [q4, k4, v4, mask] = await Promise.all([read(q), read(k), read(v), attnMask && read(attnMask)]);
  const output = await attend(q4, k4, v4, {
    ...rest,
    backend: 'wasm',
    returnLse: false,
    ...(mask === undefined ? {} : { attnMask: mask }),
  });
  return tf.tensor4d(output.data as Float32Array, output.shape as [number, number, number, number]);
}

async function attendOnGpu(
  device: GPUDevice,
  q: tf.Tensor,
  k: tf.Tensor,
  v: tf.Tensor,
  options: TfAttentionOptions,
): Promise<tf.Tensor4D> {
  const { attnMask, ...rest } = options;
  const release: (() => void)[] = [];
  /** tfjs moves data to the GPU when an operation needs it there: a fresh tensor may still be on the CPU. */
  const bufferOf = (value: tf.Tensor): GPUBuffer => {
    try {
      const { buffer, tensorRef } = value.dataToGPU();
      release.push(() => tensorRef.dispose());
      return buffer as GPUBuffer;
    } catch {
      const { buffer } = uploadTensor(device, tensor(Float32Array.from(value.dataSync()), value.shape));
      release.push(() => buffer.destroy());
      return buffer;
    }
  };
  const share = (value: tf.Tensor): GpuTensor => {
    // tfjs keeps booleans as 32-bit integers; an additive mask says the same.
    const floats = value.dtype === 'bool' ? tf.tidy(() => tf.mul(tf.sub(tf.cast(value, 'float32'), 1), 1e30)) : value;
    const buffer = bufferOf(floats);
    if (floats !== value) floats.dispose();
    const { shape } = value;
    return { location: 'webgpu', buffer, dtype: 'float32', shape, strides: contiguousStrides(shape), offset: 0 };
  };
  try {
    const [q4, k4, v4] = [share(q), share(k), share(v)] as [GpuTensor, GpuTensor, GpuTensor];
    const mask = attnMask && share(attnMask);
    const all = { ...rest, ...(mask === undefined ? {} : { attnMask: mask }) };
    const problem = createProblem(q4, k4, v4, all);
    const backend = await backendOn(device);
    const asked = options.kernel ?? 'auto';
    const descriptor =
      asked === 'auto' ? await backend.defaultKernel() : backend.kernels.find(({ name }) => name === asked);
    if (descriptor === undefined) {
      throw new UnsupportedOptionError(asked, 'options.kernel', 'a backend that has it, not webgpu', asked);
    }
    const choice = chooseOptions(descriptor, problem, all);
    const inputs = { q: q4, k: k4, v: v4, ...(mask === undefined ? {} : { attnMask: mask }) };
    const { output } = await withCachedPlan(backend, problem, choice, (plan) => plan.run(inputs, {}));
    const { buffer } = output as GpuTensor;
    return tf.tensor({ buffer, zeroCopy: true }, output.shape as [number, number, number, number], 'float32');
  } finally {
    for (const free of release) free();
  }
}
