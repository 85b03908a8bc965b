/**
 * SageAttention on arrays of jax-js. jax-js has no hook for operations, so attention is a function that a model calls.
 *
 * @module sageattention/jax
 */
import { getWebGPUDevice, numpy } from '@jax-js/jax';
import { sageattn as attend } from '../../api/sageattn.ts';
import { type GpuTensor, gpuView } from '../../backends/webgpu/tensor.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { byteLengthOf, contiguousStrides, type Tensor, tensor } from '../../tensor/tensor.ts';
import { attendOnDevice, type BridgeOptions, validateBridgeOptions } from '../bridge.ts';

type JaxArray = numpy.Array;

/** Options of `sageattn` but for what makes no sense here: where arrays live says which backend runs. */
export type JaxAttentionOptions = BridgeOptions & {
  /** Additive, of q's dtype, broadcastable to `[B,Hq,Lq,Lk]`. */
  readonly attnMask?: JaxArray;
};

interface Operands<T> {
  readonly q: T;
  readonly k: T;
  readonly v: T;
  readonly attnMask?: T;
}

/**
 * Attention on jax-js arrays `[B,H,L,D]` (or as `tensorLayout` says), float32, or float16 where the platform has a
 * `Float16Array`. On jax-js' WebGPU backend it runs on its device and buffers; elsewhere on the WASM backend of this
 * package.
 *
 * Like every function of jax-js it consumes its arguments, the mask among them, and also when it fails: pass `q.ref` to
 * keep `q`. It reads values, so it cannot be traced: call it outside of `jit`, `grad` and `vmap`.
 *
 * @throws {SageAttentionError} as `sageattn`
 */
export async function sageattn(
  q: JaxArray,
  k: JaxArray,
  v: JaxArray,
  options: JaxAttentionOptions = {},
): Promise<JaxArray> {
  const attnMask = options?.attnMask;
  const operands = { q, k, v, ...(attnMask === undefined ? {} : { attnMask }) };
  try {
    validateBridgeOptions(options);
    for (const [name, value] of Object.entries(operands)) {
      validateArray(name === 'attnMask' ? 'options.attnMask' : name, value, q);
    }
    const { attnMask: _, ...rest } = options;
    return await (q.device === 'webgpu' ? attendOnGpu(operands, rest) : attendOnCpu(operands, rest));
  } finally {
    // One that was given up before, or is given twice, has no reference left.
    for (const value of Object.values(operands)) {
      if (value instanceof numpy.Array && value.refCount > 0) value.dispose();
    }
  }
}

function validateArray(argument: string, value: unknown, q: JaxArray): void {
  if (!(value instanceof numpy.Array)) {
    throw new InvalidArgumentError('invalid-shape', argument, 'an array of jax-js with values', String(value));
  }
  if (value.dtype !== numpy.float32 && value.dtype !== numpy.float16) {
    throw new InvalidArgumentError('invalid-dtype', argument, 'float32 or float16', String(value.dtype));
  }
  if (value.dtype !== q.dtype) {
    throw new InvalidArgumentError('invalid-dtype', argument, `${q.dtype}, as q has`, String(value.dtype));
  }
  if (q.device === 'webgpu' && value.device !== 'webgpu') {
    throw new InvalidArgumentError('mixed-locations', argument, "an array on 'webgpu', as q is", `'${value.device}'`);
  }
}

/** The operands as another kind of tensor; all are read at once. */
async function convert<T>(operands: Operands<JaxArray>, to: (value: JaxArray) => Promise<T>): Promise<Operands<T>> {
  const entries = Object.entries(operands).map(async ([name, value]) => [name, await to(value)] as const);
  return Object.fromEntries(await Promise.all(entries)) as unknown as Operands<T>;
}

async function attendOnCpu(operands: Operands<JaxArray>, options: BridgeOptions): Promise<JaxArray> {
  const { device } = operands.q;
  const { q, k, v, ...mask } = await convert<Tensor>(operands, async (value) => {
    const { shape } = value;
    // An array on the CPU may be memory of its maker's: it is read before the call returns.
    const data = ['cpu', 'wasm'].includes(device) ? value.ref.dataSync().slice() : await value.ref.data();
    return tensor(data as Float32Array, shape);
  });
  const output = await attend(q, k, v, { ...options, ...mask, backend: 'wasm' });
  return numpy.array(output.data as Float32Array<ArrayBuffer>, { shape: [...output.shape], device });
}

async function attendOnGpu(operands: Operands<JaxArray>, options: BridgeOptions): Promise<JaxArray> {
  const device = getWebGPUDevice();
  const { dtype } = operands.q;
  // `gpuBuffer` gives up the array, and with the last reference its buffer: the caller holds one until the end.
  const { q, k, v, ...mask } = await convert<GpuTensor>(operands, async (value) =>
    gpuView(await value.ref.gpuBuffer(), {
      dtype: dtype === numpy.float16 ? 'float16' : 'float32',
      shape: value.shape,
      strides: contiguousStrides(value.shape),
      offset: 0,
    }),
  );
  const output = await attendOnDevice(device, q, k, v, { ...options, ...mask });
  // jax-js takes no foreign buffers: the output is copied on the GPU, into the buffer of a fresh array.
  const result = numpy.zeros([...output.shape], { dtype, device: 'webgpu' });
  const encoder = device.createCommandEncoder();
  const bytes = Math.ceil(byteLengthOf(output) / 4) * 4;
  encoder.copyBufferToBuffer(output.buffer, 0, await result.ref.gpuBuffer(), 0, bytes);
  device.queue.submit([encoder.finish()]);
  output.dispose();
  return result;
}
