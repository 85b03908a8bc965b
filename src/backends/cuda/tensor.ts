/** Tensors in the memory of a GPU. */
import { DISPOSE } from '../../dispose.ts';
import { ExecutionError, InvalidArgumentError } from '../../errors.ts';
import { BYTES_PER_ELEMENT, type MaskDType } from '../../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  emptyTensor,
  extentOf,
  type Tensor,
  type TensorOptions,
  type TensorView,
  tensor,
  validateData,
  validateExtent,
  validateView,
} from '../../tensor/tensor.ts';
import type { CudaDevice } from './driver/device.ts';
import { DeviceMemory, type PinnedBuffer } from './driver/memory.ts';
import { requireByteLength } from './driver/pool.ts';
import type { CudaStream } from './driver/stream.ts';

/**
 * A strided view of device memory. Views made of it (`transpose`, `slice`) share the memory: disposing any of them
 * frees it for all.
 */
export interface CudaTensor extends TensorView {
  readonly location: 'cuda';
  /** Ordinal of the device. */
  readonly device: number;
  readonly memory: DeviceMemory;
  /** Frees the memory, in stream order: calls enqueued before still find it. */
  dispose(): void;
  [Symbol.dispose](): void;
}

export interface StreamOption {
  /** Default: the device's own stream. */
  readonly stream?: CudaStream;
}

export const isCudaTensor = (view: TensorView): view is CudaTensor =>
  view?.location === 'cuda' && (view as Partial<CudaTensor>).memory instanceof DeviceMemory;

/** Checks what a caller says of a tensor, before anything is allocated for it. */
function validateLayout(
  dtype: MaskDType,
  shape: readonly number[],
  { strides, offset = 0 }: Pick<TensorOptions, 'strides' | 'offset'> = {},
): Pick<CudaTensor, 'location' | 'dtype' | 'shape' | 'strides' | 'offset'> {
  if (!Object.hasOwn(BYTES_PER_ELEMENT, dtype)) {
    const known = Object.keys(BYTES_PER_ELEMENT).map((name) => `'${name}'`);
    throw new InvalidArgumentError('invalid-dtype', 'dtype', known.join(' or '), String(dtype).slice(0, 40));
  }
  // The shape by itself first: strides are made of it.
  const zeros = Array.isArray(shape) ? shape.map(() => 0) : [];
  validateView('tensor', { location: 'cuda', dtype, shape, strides: zeros, offset: 0 });
  const layout = { location: 'cuda', dtype, shape, strides: strides ?? contiguousStrides(shape), offset } as const;
  validateView('tensor', layout);
  return { ...layout, shape: [...shape], strides: [...layout.strides] };
}

/** Checks that an argument is a tensor of a device. */
function requireCudaTensor(argument: string, view: CudaTensor): void {
  if (isCudaTensor(view)) return;
  const location = String((view as TensorView | undefined)?.location).slice(0, 40);
  throw new InvalidArgumentError('mixed-locations', argument, 'a CudaTensor', `location '${location}'`);
}

/** A view of memory; the memory must hold all of it. */
export function cudaTensorOn(
  memory: DeviceMemory,
  dtype: MaskDType,
  shape: readonly number[],
  options: Pick<TensorOptions, 'strides' | 'offset'> = {},
): CudaTensor {
  const dispose = () => memory.dispose();
  const layout = validateLayout(dtype, shape, options);
  const view: CudaTensor = { ...layout, device: memory.device.ordinal, memory, dispose, [DISPOSE]: dispose };
  validateStorage('tensor', view);
  return view;
}

/** Checks that a tensor's memory holds it. */
export function validateStorage(argument: string, view: CudaTensor): void {
  validateExtent(argument, view, Math.floor(view.memory.byteLength / BYTES_PER_ELEMENT[view.dtype]));
}

/** A new contiguous tensor whose contents are undefined. */
export function emptyCudaTensor(
  device: CudaDevice,
  shape: readonly number[],
  dtype: MaskDType,
  { stream = device.stream }: StreamOption = {},
): CudaTensor {
  validateLayout(dtype, shape);
  const memory = device.allocate(elementCount(shape) * BYTES_PER_ELEMENT[dtype], stream);
  return cudaTensorOn(memory, dtype, shape);
}

/** A vectorized load's alignment. Kernels see from a tensor's offset whether its elements have it. */
const POINTER_ALIGNMENT = 16n;

/**
 * A tensor over memory that belongs to someone else: another library's allocation, an ONNX Runtime value. It is neither
 * freed nor ordered here: it must outlive its use, and what writes it must come earlier in the stream that a call is
 * given.
 *
 * @param pointer device address of the first element, a multiple of the element size
 * @param options `byteLength`: bytes from `pointer` on; default what shape and strides reach
 */
export function cudaTensorFromPointer(
  device: CudaDevice,
  pointer: bigint,
  shape: readonly number[],
  dtype: MaskDType,
  options: Pick<TensorOptions, 'strides'> & { readonly byteLength?: number } = {},
): CudaTensor {
  const { strides } = validateLayout(dtype, shape, options);
  const elementBytes = BYTES_PER_ELEMENT[dtype];
  const isAddress = typeof pointer === 'bigint' && pointer > 0n && pointer < 2n ** 64n;
  if (!isAddress || pointer % BigInt(elementBytes) !== 0n) {
    throw new InvalidArgumentError(
      'invalid-strides',
      'pointer',
      `a device address that is a multiple of ${elementBytes}`,
      `${pointer}`.slice(0, 40),
    );
  }
  if (options.byteLength !== undefined) requireByteLength('options.byteLength', options.byteLength);
  // The address is kept aligned and the rest goes into the offset, where kernels look for alignment.
  const skip = pointer % POINTER_ALIGNMENT;
  const reached = extentOf({ shape, strides, offset: 0 }) * elementBytes;
  const memory = device.memoryFromPointer(pointer - skip, Number(skip) + (options.byteLength ?? reached));
  return cudaTensorOn(memory, dtype, shape, { strides, offset: Number(skip) / elementBytes });
}

/** The bytes of a CPU tensor that its view reaches, and the element where they start. */
function reachedBytes(source: Tensor): { readonly bytes: Uint8Array; readonly firstElement: number } {
  const elementBytes = BYTES_PER_ELEMENT[source.dtype];
  const extent = extentOf(source);
  const { buffer, byteOffset } = source.data;
  if (extent === 0) return { bytes: new Uint8Array(0), firstElement: 0 };
  // Whole groups of 16 bytes, so that elements keep their alignment.
  const firstElement = source.offset - (source.offset % (Number(POINTER_ALIGNMENT) / elementBytes));
  const start = byteOffset + firstElement * elementBytes;
  return { bytes: new Uint8Array(buffer, start, (extent - firstElement) * elementBytes), firstElement };
}

/** Enqueues a copy; {@link uploadAsync} says what `bytes` must be. */
export function copyToDevice(device: CudaDevice, memory: DeviceMemory, bytes: Uint8Array, stream: CudaStream): void {
  if (bytes.byteLength === 0) return;
  const what = `copying ${bytes.byteLength} bytes to ${device}`;
  device.call('cuMemcpyHtoDAsync', what, memory.pointer, bytes, bytes.byteLength, stream.handle);
}

/**
 * Enqueues an upload. The stream keeps the source's storage referenced until it has been read.
 *
 * @param copied the upload reads a copy, made now
 */
export function startUpload(source: Tensor, device: CudaDevice, stream: CudaStream, copied = false): CudaTensor {
  if (source?.location !== 'cpu') {
    const location = String((source as TensorView | undefined)?.location).slice(0, 40);
    throw new InvalidArgumentError('mixed-locations', 'source', 'a CPU tensor', `location '${location}'`);
  }
  validateView('source', source);
  validateData('source', source);
  // A graph would read the source again at each launch.
  stream.requireRunning();
  const { bytes: reached, firstElement } = reachedBytes(source);
  const bytes = copied ? reached.slice() : reached;
  const memory = device.allocate(bytes.byteLength, stream);
  try {
    copyToDevice(device, memory, bytes, stream);
    stream.hold(bytes);
    const { dtype, shape, strides, offset } = source;
    return cudaTensorOn(memory, dtype, shape, { strides, offset: offset - firstElement });
  } catch (error) {
    memory.dispose();
    throw error;
  }
}

/**
 * Copies a CPU tensor to a device and returns when it is there. Strides are kept: the part of the storage that the view
 * reaches is copied as it is.
 */
export function upload(source: Tensor, device: CudaDevice, { stream = device.stream }: StreamOption = {}): CudaTensor {
  const target = startUpload(source, device, stream);
  try {
    stream.synchronize();
    return target;
  } catch (error) {
    target.memory.dispose();
    throw error;
  }
}

/**
 * {@link upload} without waiting. The source must not change until `done` resolves to it; calls on the same stream may
 * use the tensor at once. From a tensor over a `PinnedBuffer` the copy runs beside the program.
 */
export function uploadAsync(
  source: Tensor,
  device: CudaDevice,
  { stream = device.stream }: StreamOption = {},
): { readonly tensor: CudaTensor; readonly done: Promise<Tensor> } {
  const target = startUpload(source, device, stream);
  return { tensor: target, done: stream.completed().then(() => source) };
}

/** Where the elements that a tensor's view reaches lie in device memory. */
function reachedMemory(source: CudaTensor): { readonly pointer: bigint; readonly byteLength: number } {
  const elementBytes = BYTES_PER_ELEMENT[source.dtype];
  const extent = extentOf(source);
  return {
    pointer: source.memory.pointer + BigInt(source.offset * elementBytes),
    byteLength: extent === 0 ? 0 : (extent - source.offset) * elementBytes,
  };
}

/** A CPU tensor over bytes copied from a device, with the strides of the source. */
function overBytes(source: CudaTensor, bytes: Uint8Array<ArrayBuffer>): Tensor {
  const { dtype, shape, strides } = source;
  const { buffer, byteOffset } = bytes;
  const length = bytes.byteLength / BYTES_PER_ELEMENT[dtype];
  const options = { dtype, strides };
  if (dtype === 'float32') return tensor(new Float32Array(buffer, byteOffset, length), shape, options);
  if (dtype === 'bool') return tensor(new Uint8Array(buffer, byteOffset, length), shape, options);
  const kind = emptyTensor([0], dtype).data.constructor as new (
    buffer: ArrayBuffer,
    byteOffset: number,
    length: number,
  ) => Uint16Array;
  return tensor(new kind(buffer, byteOffset, length), shape, options);
}

function startDownload(source: CudaTensor, target: Uint8Array, pointer: bigint, stream: CudaStream): void {
  if (target.byteLength === 0) return;
  const { device } = source.memory;
  const what = `copying ${target.byteLength} bytes from ${device}`;
  device.call('cuMemcpyDtoHAsync', what, target, pointer, target.byteLength, stream.handle);
}

/** Blocks until everything that `stream` holds has ended, and copies the tensor. The strides stay the source's. */
export function download(source: CudaTensor, options: StreamOption = {}): Tensor {
  requireCudaTensor('source', source);
  const { stream = source.memory.device.stream } = options;
  validateStorage('source', source);
  stream.requireRunning();
  source.memory.useOn(stream);
  const { pointer, byteLength } = reachedMemory(source);
  const bytes = new Uint8Array(byteLength);
  startDownload(source, bytes, pointer, stream);
  stream.synchronize();
  return overBytes(source, bytes);
}

/**
 * {@link download} without blocking. Option `into` is page-locked memory of at least the tensor's size: the copy then
 * runs beside the program, and the result lies in it. Without it the thread stands still for the copy itself, though
 * not for the work before it.
 */
export async function downloadAsync(
  source: CudaTensor,
  options: StreamOption & { readonly into?: PinnedBuffer } = {},
): Promise<Tensor> {
  requireCudaTensor('source', source);
  const { stream = source.memory.device.stream, into } = options;
  validateStorage('source', source);
  stream.requireRunning();
  source.memory.useOn(stream);
  const { pointer, byteLength } = reachedMemory(source);
  if (into === undefined) {
    await stream.completed();
    // It may have been disposed meanwhile, and its handle be another's.
    const after = stream.orSuccessor;
    const bytes = new Uint8Array(byteLength);
    startDownload(source, bytes, pointer, after);
    after.synchronize();
    return overBytes(source, bytes);
  }
  if (into.disposed) throw new ExecutionError('disposed', 'options.into has been disposed');
  if (into.bytes.byteLength < byteLength) {
    throw new InvalidArgumentError(
      'buffer-too-small',
      'options.into',
      `at least ${byteLength} bytes`,
      `${into.bytes.byteLength} bytes`,
    );
  }
  const bytes = into.bytes.subarray(0, byteLength);
  startDownload(source, bytes, pointer, stream);
  await stream.completed();
  return overBytes(source, bytes);
}
