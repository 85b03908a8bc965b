/** Arrays of jax-js as tensors of this package and back. */
import { getWebGPUDevice, numpy } from '@jax-js/jax';
import { type GpuTensor, gpuView } from '../../backends/webgpu/tensor.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { byteLengthOf, contiguousStrides, type Tensor, tensor } from '../../tensor/tensor.ts';
import type { BridgeOptions } from '../bridge.ts';

export type JaxArray = numpy.Array;

/** Options of `sageattn` but for what makes no sense here: where arrays live says which backend runs. */
export type JaxAttentionOptions = BridgeOptions & {
  /** Additive, of q's dtype, broadcastable to `[B,Hq,Lq,Lk]`. */
  readonly attnMask?: JaxArray;
};

export interface Operands<T> {
  readonly q: T;
  readonly k: T;
  readonly v: T;
  readonly attnMask?: T;
}

/** Gives arrays up. One that was given up before, or is given twice, has no reference left. */
export function release(values: Iterable<unknown>): void {
  for (const value of values) if (value instanceof numpy.Array && value.refCount > 0) value.dispose();
}

/** The operands of a call. */
export const operandsOf = (q: JaxArray, k: JaxArray, v: JaxArray, options: JaxAttentionOptions): Operands<JaxArray> => {
  const attnMask = options?.attnMask;
  return { q, k, v, ...(attnMask === undefined ? {} : { attnMask }) };
};

/** @throws {InvalidArgumentError} naming the operand at fault */
export function validateOperands(operands: Operands<JaxArray>): void {
  for (const [name, value] of Object.entries(operands)) {
    validateArray(name === 'attnMask' ? 'options.attnMask' : name, value, operands.q);
  }
}

/** An array like q. */
export function validateArray(argument: string, value: unknown, q: Pick<JaxArray, 'dtype' | 'device'>): void {
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
export async function convert<T>(
  operands: Operands<JaxArray>,
  to: (value: JaxArray) => Promise<T>,
): Promise<Operands<T>> {
  const entries = Object.entries(operands).map(async ([name, value]) => [name, await to(value)] as const);
  return Object.fromEntries(await Promise.all(entries)) as unknown as Operands<T>;
}

/** An array's values, read before the call returns where they are in the memory of this process. */
export async function onCpu(value: JaxArray): Promise<Tensor> {
  const { shape, device } = value;
  // An array on the CPU may be memory of its maker's.
  const data = ['cpu', 'wasm'].includes(device) ? value.ref.dataSync().slice() : await value.ref.data();
  return tensor(data as Float32Array, shape);
}

export const fromCpu = ({ data, shape }: Tensor, device: JaxArray['device']): JaxArray =>
  numpy.array(data as Float32Array<ArrayBuffer>, { shape: [...shape], device });

/** An array's buffer. `gpuBuffer` gives up a reference, and with the last one its buffer: the caller holds one until the end. */
export const onGpu = async (value: JaxArray): Promise<GpuTensor> =>
  gpuView(await value.ref.gpuBuffer(), {
    dtype: value.dtype === numpy.float16 ? 'float16' : 'float32',
    shape: value.shape,
    strides: contiguousStrides(value.shape),
    offset: 0,
  });

/** jax-js takes no foreign buffers: a tensor is copied on the GPU, into the buffer of a fresh array. */
export async function fromGpu(value: GpuTensor): Promise<JaxArray> {
  const device = getWebGPUDevice();
  const dtype = value.dtype === 'float16' ? numpy.float16 : numpy.float32;
  const result = numpy.zeros([...value.shape], { dtype, device: 'webgpu' });
  const encoder = device.createCommandEncoder();
  const bytes = Math.ceil(byteLengthOf(value) / 4) * 4;
  encoder.copyBufferToBuffer(value.buffer, 0, await result.ref.gpuBuffer(), 0, bytes);
  device.queue.submit([encoder.finish()]);
  return result;
}
