/// <reference lib="esnext.disposable" preserve="true" />
/** Tensors in GPU buffers. */
import { DISPOSE } from '../../dispose.ts';
import { ExecutionError, InvalidArgumentError } from '../../errors.ts';
import { BYTES_PER_ELEMENT, type MaskDType } from '../../tensor/dtype.ts';
import {
  byteLengthOf,
  contiguousStrides,
  elementCount,
  extentOf,
  NativeFloat16Array,
  type Tensor,
  type TensorData,
  type TensorView,
  validateExtent,
  validateView,
} from '../../tensor/tensor.ts';

/** A view of a `GPUBuffer`. Offsets and strides count elements; the last dimension is contiguous. */
export interface GpuTensor extends TensorView {
  readonly location: 'webgpu';
  readonly buffer: GPUBuffer;
  /**
   * Destroys the buffer where this package allocated it: of outputs (which a backend with `reuseOutputs` gives to later
   * ones), {@link uploadTensor} and {@link emptyGpuTensor}. What was submitted with it still runs. A buffer that was wrapped is left to whoever made it. Afterwards no call
   * takes this tensor or a view of it (`transpose`, `slice`): `disposed`.
   */
  dispose(): void;
  [Symbol.dispose](): void;
}

/** The methods `dispose` that were called. Views share that of their tensor, so it stands for all of them. */
const disposed = new WeakSet<GpuTensor['dispose']>();

/**
 * A tensor over a buffer, unchecked.
 *
 * @param free what `dispose` does, once; default: nothing, the buffer is another's
 */
export function gpuView(
  buffer: GPUBuffer,
  { dtype, shape, strides, offset }: Omit<TensorView, 'location'>,
  free?: () => void,
): GpuTensor {
  const dispose = () => {
    if (disposed.has(dispose)) return;
    disposed.add(dispose);
    free?.();
  };
  return { location: 'webgpu', buffer, dtype, shape, strides, offset, dispose, [DISPOSE]: dispose };
}

export interface GpuTensorOptions {
  /** Default: row-major and contiguous. */
  readonly strides?: readonly number[];
  /** First element; default 0. */
  readonly offset?: number;
}

/**
 * Wraps a buffer as a tensor; nothing is copied. Inputs need the usage `STORAGE`, and so do outputs.
 *
 * @param shape sizes, integers >= 0
 * @throws {InvalidArgumentError} `invalid-shape`, `invalid-strides` or `buffer-too-small`
 */
export function gpuTensor(
  buffer: GPUBuffer,
  dtype: MaskDType,
  shape: readonly number[],
  options: GpuTensorOptions = {},
): GpuTensor {
  const strides = [...(options.strides ?? contiguousStrides(shape))];
  const tensor = gpuView(buffer, { dtype, shape: [...shape], strides, offset: options.offset ?? 0 });
  validateView('tensor', tensor);
  validateBuffer('tensor', tensor);
  return tensor;
}

/**
 * Checks that the buffer holds the view, in whole 32-bit words: WebGPU binds nothing smaller.
 *
 * @throws {InvalidArgumentError} `buffer-too-small`
 * @throws {ExecutionError} `disposed`
 */
export function validateBuffer(argument: string, tensor: GpuTensor): void {
  if (disposed.has(tensor.dispose)) {
    throw new ExecutionError('disposed', `${argument}: this tensor has been disposed`);
  }
  const bytes = BYTES_PER_ELEMENT[tensor.dtype];
  validateExtent(argument, tensor, Math.floor(tensor.buffer.size / bytes));
  const end = Math.ceil((extentOf(tensor) * bytes) / 4) * 4;
  if (end > tensor.buffer.size) {
    throw new InvalidArgumentError(
      'buffer-too-small',
      argument,
      `a buffer of at least ${end} bytes (whole 32-bit words)`,
      `${tensor.buffer.size} bytes`,
    );
  }
}

export function isGpuTensor(view: TensorView): view is GpuTensor {
  return view.location === 'webgpu' && 'buffer' in view;
}

/** Bytes of a buffer for `count` elements: whole words, and never empty. */
export const bufferBytes = (dtype: MaskDType, count: number): number =>
  Math.max(4, Math.ceil((count * BYTES_PER_ELEMENT[dtype]) / 4) * 4);

/** Writes bytes of a CPU array into a buffer, padding the last word. SharedArrayBuffers are copied first. */
export function writeBytes(device: GPUDevice, buffer: GPUBuffer, data: Uint8Array): void {
  const whole = data.byteLength % 4 === 0;
  if (whole && data.buffer instanceof ArrayBuffer) {
    device.queue.writeBuffer(buffer, 0, data.buffer, data.byteOffset, data.byteLength);
    return;
  }
  const padded = new Uint8Array(Math.ceil(data.byteLength / 4) * 4);
  padded.set(data);
  device.queue.writeBuffer(buffer, 0, padded);
}

/** The bytes of elements `start` to `end` of a typed array. */
export function bytesOf(data: TensorData, start: number, end: number): Uint8Array {
  const size = data.BYTES_PER_ELEMENT;
  return new Uint8Array(data.buffer, data.byteOffset + start * size, (end - start) * size);
}

/**
 * Copies a CPU tensor to the GPU, strides and all. The caller disposes of it.
 *
 * @param usage added to STORAGE | COPY_DST | COPY_SRC
 */
export function uploadTensor(device: GPUDevice, tensor: Tensor, usage = 0): GpuTensor {
  const end = Math.max(extentOf(tensor), tensor.offset);
  const buffer = device.createBuffer({
    label: 'sageattention upload',
    size: bufferBytes(tensor.dtype, end - tensor.offset),
    usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST | GPU_BUFFER_USAGE.COPY_SRC | usage,
  });
  if (end > tensor.offset) writeBytes(device, buffer, bytesOf(tensor.data, tensor.offset, end));
  return gpuView(buffer, { ...tensor, offset: 0 }, () => buffer.destroy());
}

/** A zeroed, contiguous tensor on the GPU. The caller disposes of it. */
export function emptyGpuTensor(device: GPUDevice, dtype: MaskDType, shape: readonly number[]): GpuTensor {
  const buffer = device.createBuffer({
    label: 'sageattention output',
    size: bufferBytes(dtype, elementCount(shape)),
    usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_SRC | GPU_BUFFER_USAGE.COPY_DST,
  });
  const layout = { dtype, shape: [...shape], strides: contiguousStrides(shape), offset: 0 };
  return gpuView(buffer, layout, () => buffer.destroy());
}

/**
 * Copies a contiguous GPU tensor to the CPU and waits for it. The buffer needs the usage `COPY_SRC`.
 *
 * @throws {InvalidArgumentError} `invalid-strides` when the view has gaps
 * @throws {ExecutionError} `device-lost`, `out-of-memory`, `execution-failed` or `disposed`
 */
export async function downloadTensor(device: GPUDevice, tensor: GpuTensor): Promise<Tensor> {
  validateBuffer('tensor', tensor);
  const { dtype, shape, strides, offset } = tensor;
  const expected = contiguousStrides(shape);
  if (!shape.every((size, i) => size <= 1 || strides[i] === expected[i])) {
    throw new InvalidArgumentError('invalid-strides', 'tensor.strides', 'a contiguous tensor', `[${strides}]`);
  }
  const size = BYTES_PER_ELEMENT[dtype];
  const start = Math.floor((offset * size) / 4) * 4;
  const length = byteLengthOf(tensor);
  const span = Math.ceil((offset * size + length) / 4) * 4 - start;
  if (length === 0)
    return { location: 'cpu', dtype, shape, strides: expected, offset: 0, data: arrayOf(dtype, new ArrayBuffer(0)) };
  device.pushErrorScope('validation');
  device.pushErrorScope('out-of-memory');
  const staging = device.createBuffer({
    label: 'sageattention download',
    size: span,
    usage: GPU_BUFFER_USAGE.MAP_READ | GPU_BUFFER_USAGE.COPY_DST,
  });
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(tensor.buffer, start, staging, 0, span);
  device.queue.submit([encoder.finish()]);
  const scopes = [device.popErrorScope(), device.popErrorScope()] as const;
  try {
    const [outOfMemory, validation] = await Promise.all(scopes);
    const failure = outOfMemory ?? validation;
    if (failure) {
      throw new ExecutionError(outOfMemory ? 'out-of-memory' : 'execution-failed', failure.message);
    }
    await staging.mapAsync(GPU_MAP_READ);
    const bytes = new Uint8Array(staging.getMappedRange()).slice(offset * size - start, offset * size - start + length);
    return { location: 'cpu', dtype, shape, strides: expected, offset: 0, data: arrayOf(dtype, bytes.buffer) };
  } finally {
    staging.destroy();
  }
}

/** The array class of `tensor()` for a dtype, over a whole buffer. */
export function arrayOf(dtype: MaskDType, bytes: ArrayBuffer): TensorData {
  if (dtype === 'float32') return new Float32Array(bytes);
  if (dtype === 'bool') return new Uint8Array(bytes);
  return dtype === 'float16' && NativeFloat16Array !== undefined
    ? new NativeFloat16Array(bytes)
    : new Uint16Array(bytes);
}

/** WebGPU's constants, which Node has only once a package defines them. */
export const GPU_BUFFER_USAGE = {
  MAP_READ: 0x1,
  COPY_SRC: 0x4,
  COPY_DST: 0x8,
  UNIFORM: 0x40,
  STORAGE: 0x80,
  QUERY_RESOLVE: 0x200,
} as const;

export const GPU_MAP_READ = 1;
