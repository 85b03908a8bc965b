/**
 * SageAttention on arrays of jax-js. jax-js has no hook for operations, so attention is a function that a model calls.
 *
 * @packageDocumentation
 */
import { getWebGPUDevice, numpy } from '@jax-js/jax';
import { chooseOptions } from '../../attention/choice.ts';
import { InvalidArgumentError } from '../../attention/errors.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { withCachedPlan } from '../../attention/plan-cache.ts';
import { createProblem } from '../../attention/problem.ts';
import { sageattn as attend } from '../../attention/sageattn.ts';
import type { GpuTensor } from '../../backends/webgpu/gpu-tensor.ts';
import type { WebgpuBackend } from '../../backends/webgpu/index.ts';
import { byteLengthOf, contiguousStrides, type Tensor, tensor } from '../../tensor/tensor.ts';

type JaxArray = numpy.Array;

/** Options of `sageattn` but for what makes no sense here: where arrays live says which backend runs. */
export type JaxAttentionOptions = Omit<AttentionOptions, 'attnMask' | 'returnLse' | 'stream' | 'backend'> & {
  /** Additive, of q's dtype, broadcastable to `[B,Hq,Lq,Lk]`. */
  readonly attnMask?: JaxArray;
};

let shared: { readonly device: GPUDevice; readonly backend: Promise<WebgpuBackend> } | undefined;

function backendOn(device: GPUDevice): Promise<WebgpuBackend> {
  if (shared?.device !== device) {
    const backend = import('../../backends/webgpu/index.ts').then((module) => module.createWebgpuBackend({ device }));
    shared = { device, backend };
  }
  return shared.backend;
}

/**
 * Attention on jax-js arrays `[B,H,L,D]` (or as `tensorLayout` says), float32, or float16 on WebGPU. On jax-js' WebGPU
 * backend it runs on its device and buffers; elsewhere on the WASM backend of this package.
 *
 * Like every function of jax-js it consumes its arguments: pass `q.ref` to keep `q`.
 *
 * @throws as `sageattn`
 */
export async function sageattn(
  q: JaxArray,
  k: JaxArray,
  v: JaxArray,
  options: JaxAttentionOptions = {},
): Promise<JaxArray> {
  for (const [argument, value] of Object.entries({ q, k, v })) {
    if (value.dtype !== numpy.float32 && value.dtype !== numpy.float16) {
      throw new InvalidArgumentError('invalid-dtype', argument, 'float32 or float16', String(value.dtype));
    }
  }
  return q.device === 'webgpu' ? attendOnGpu(q, k, v, options) : attendOnCpu(q, k, v, options);
}

async function attendOnCpu(q: JaxArray, k: JaxArray, v: JaxArray, options: JaxAttentionOptions): Promise<JaxArray> {
  const { attnMask, ...rest } = options;
  const read = async (value: JaxArray): Promise<Tensor> => {
    const { shape } = value;
    return tensor((await value.data()) as Float32Array, shape);
  };
  const [q4, k4, v4, mask] = await Promise.all([read(q), read(k), read(v), attnMask && read(attnMask)]);
  const output = await attend(q4, k4, v4, {
    ...rest,
    backend: 'wasm',
    returnLse: false,
    ...(mask === undefined ? {} : { attnMask: mask }),
  });
  return numpy.array(output.data as Float32Array<ArrayBuffer>, { shape: [...output.shape] });
}

async function attendOnGpu(q: JaxArray, k: JaxArray, v: JaxArray, options: JaxAttentionOptions): Promise<JaxArray> {
  const { attnMask, ...rest } = options;
  const device = getWebGPUDevice();
  // `gpuBuffer` gives up the array, and with the last reference its buffer: one reference is held until the end.
  const held = [q, k, v, ...(attnMask === undefined ? [] : [attnMask])];
  const share = async (value: JaxArray): Promise<GpuTensor> => ({
    location: 'webgpu',
    buffer: await value.ref.gpuBuffer(),
    dtype: value.dtype === numpy.float16 ? 'float16' : 'float32',
    shape: value.shape,
    strides: contiguousStrides(value.shape),
    offset: 0,
  });
  try {
    const [q4, k4, v4, mask] = await Promise.all([share(q), share(k), share(v), attnMask && share(attnMask)]);
    const all = { ...rest, ...(mask === undefined ? {} : { attnMask: mask }) };
    const problem = createProblem(q4, k4, v4, all);
    const backend = await backendOn(device);
    const choice = chooseOptions(await backend.defaultKernel(), problem, all);
    const inputs = { q: q4, k: k4, v: v4, ...(mask === undefined ? {} : { attnMask: mask }) };
    const { output } = await withCachedPlan(backend, problem, choice, (plan) => plan.run(inputs, {}));
    // jax-js takes no foreign buffers: the output is copied, on the GPU, into that of a fresh array.
    const result = numpy.zeros([...output.shape], { dtype: q.dtype, device: 'webgpu' });
    const encoder = device.createCommandEncoder();
    const bytes = Math.ceil(byteLengthOf(output) / 4) * 4;
    encoder.copyBufferToBuffer((output as GpuTensor).buffer, 0, await result.ref.gpuBuffer(), 0, bytes);
    device.queue.submit([encoder.finish()]);
    (output as GpuTensor).buffer.destroy();
    return result;
  } finally {
    for (const value of held) value.dispose();
  }
}
