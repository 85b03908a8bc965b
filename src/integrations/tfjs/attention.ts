/** `sageattn` on tensors of TensorFlow.js, whatever their backend. */
import * as tf from '@tensorflow/tfjs-core';
import { sageattn as attend } from '../../api/sageattn.ts';
import { type GpuTensor, gpuView, uploadTensor } from '../../backends/webgpu/tensor.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { contiguousStrides, type Tensor, tensor } from '../../tensor/tensor.ts';
import { attendOnDevice, type BridgeOptions, validateBridgeOptions } from '../bridge.ts';

/** Options of `sageattn` but for what makes no sense here: where tensors live says which backend runs. */
export type TfAttentionOptions = BridgeOptions & {
  /** bool (true = attend) or additive float32, broadcastable to `[B,Hq,Lq,Lk]`. */
  readonly attnMask?: tf.Tensor;
};

export function requireTensor(argument: string, value: unknown, dtypes: readonly tf.DataType[]): void {
  if (!(value instanceof tf.Tensor)) {
    throw new InvalidArgumentError('invalid-shape', argument, 'a tf.Tensor', String(value));
  }
  if (!dtypes.includes(value.dtype)) {
    const expected = dtypes.map((dtype) => `'${dtype}'`).join(' or ');
    throw new InvalidArgumentError('invalid-dtype', argument, expected, `'${value.dtype}'`);
  }
}

/**
 * Attention on tensors of TensorFlow.js: float32, `[B,H,L,D]` or as `tensorLayout` says. On tfjs-backend-webgpu it runs
 * on tfjs' own device and nothing leaves the GPU; with every other backend it runs on the WASM backend of this package.
 *
 * The inputs are read before the call returns its promise: they may be disposed right after it, as `tf.tidy` does. The
 * caller disposes the result. No gradient is defined, since `tf.grad` takes no asynchronous functions: see
 * `createTrainableAttention`.
 *
 * @throws {SageAttentionError} as `sageattn`
 */
export async function sageattn(
  q: tf.Tensor,
  k: tf.Tensor,
  v: tf.Tensor,
  options: TfAttentionOptions = {},
): Promise<tf.Tensor4D> {
  validateBridgeOptions(options);
  for (const [argument, value] of Object.entries({ q, k, v })) requireTensor(argument, value, ['float32']);
  if (options.attnMask !== undefined) requireTensor('options.attnMask', options.attnMask, ['bool', 'float32']);
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
    const { shape, dtype } = value;
    // Where a tensor is memory of its maker's, it is read before the call returns.
    const data = ['cpu', 'wasm'].includes(tf.getBackend()) ? value.dataSync() : await value.data();
    return tensor(dtype === 'bool' ? new Uint8Array(data) : new Float32Array(data), shape);
  };
  const [q4, k4, v4, mask] = await Promise.all([read(q), read(k), read(v), attnMask && read(attnMask)]);
  const output = await attend(q4, k4, v4, {
    ...rest,
    backend: 'wasm',
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
      const { buffer } = uploadTensor(device, tensor(new Float32Array(value.dataSync()), value.shape));
      release.push(() => buffer.destroy());
      return buffer;
    }
  };
  const share = (value: tf.Tensor): GpuTensor => {
    // tfjs keeps booleans as 32-bit integers; an additive mask says the same, and -Infinity as exactly.
    const floats =
      value.dtype === 'bool'
        ? tf.tidy(() => tf.where(value, tf.scalar(0), tf.scalar(Number.NEGATIVE_INFINITY)))
        : value;
    const buffer = bufferOf(floats);
    if (floats !== value) floats.dispose();
    const { shape } = value;
    return gpuView(buffer, { dtype: 'float32', shape, strides: contiguousStrides(shape), offset: 0 });
  };
  try {
    const [q4, k4, v4] = [share(q), share(k), share(v)] as [GpuTensor, GpuTensor, GpuTensor];
    const mask = attnMask && share(attnMask);
    const all = { ...rest, ...(mask === undefined ? {} : { attnMask: mask }) };
    const attended = await attendOnDevice(device, q4, k4, v4, all);
    const { buffer, shape } = attended;
    // Copied, on the GPU: tfjs never frees a buffer that it takes over as it is.
    const output = tf.tensor({ buffer }, shape as [number, number, number, number], 'float32') as tf.Tensor4D;
    attended.dispose();
    return output;
  } finally {
    for (const free of release) free();
  }
}
