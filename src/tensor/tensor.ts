import {
  classOf,
  ExecutionError,
  InvalidArgumentError,
  reading,
  takeOptions,
  textOf,
  typedArrayName,
} from '../errors.ts';
import { BYTES_PER_ELEMENT, type DType, type MaskDType } from './dtype.ts';

/** Where a tensor's elements live. */
export type TensorLocation = 'cpu' | 'webgpu' | 'cuda';

/**
 * A strided view of some storage. Shapes, strides and offsets count elements. The last dimension is contiguous
 * (stride 1, or any stride when its size is 1); the others may have any stride >= 0.
 */
export interface TensorView {
  readonly location: TensorLocation;
  readonly dtype: MaskDType;
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  readonly offset: number;
  /** Which of several devices of this location holds it, counted from 0 (the CUDA ordinal); absent means 0. */
  readonly device?: number;
}

/**
 * Where an operand's elements are: `offset + batch * batchStride + head * headStride + token * tokenStride + channel`.
 */
export interface OperandLayout {
  readonly offset: number;
  readonly batchStride: number;
  readonly headStride: number;
  readonly tokenStride: number;
}

/**
 * `Float16Array` where the platform has it (Node 24, current browsers); structurally a typed array of 2-byte elements.
 */
export interface Float16ArrayLike {
  readonly BYTES_PER_ELEMENT: number;
  readonly buffer: ArrayBufferLike;
  readonly byteOffset: number;
  readonly byteLength: number;
  readonly length: number;
  [index: number]: number;
}

/**
 * Storage of a CPU tensor: `Float32Array` for float32; the raw bits in a `Uint16Array` for float16 and bfloat16, or a
 * `Float16Array` for float16; `Uint8Array` for bool.
 */
export type TensorData = Float32Array | Uint16Array | Uint8Array | Float16ArrayLike;

/** Storage of a CPU tensor of one dtype. */
export type TensorDataOf<D extends MaskDType> = D extends 'float32'
  ? Float32Array
  : D extends 'bool'
    ? Uint8Array
    : D extends 'float16'
      ? Uint16Array | Float16ArrayLike
      : Uint16Array;

/**
 * A tensor in the memory of this process. `Tensor<'float32'>` is one whose dtype the compiler knows, so that `data` is
 * a `Float32Array`.
 */
export interface Tensor<D extends MaskDType = MaskDType> extends TensorView {
  readonly location: 'cpu';
  readonly dtype: D;
  readonly data: TensorDataOf<D>;
}

/** Of a logsumexp beside outputs of type T: float32 where they are, whatever their dtype. */
export type LseOf<T extends TensorView> = T extends Tensor ? Tensor<'float32'> : T;

export interface TensorOptions<D extends MaskDType = MaskDType> {
  /** Default: what `data` is. Required for a `Uint16Array`, which may hold float16 or bfloat16 bits. */
  readonly dtype?: D;
  /** Default: row-major and contiguous. */
  readonly strides?: readonly number[];
  /** First element; default 0. */
  readonly offset?: number;
}

/** Row-major strides of a shape, in elements. */
export function contiguousStrides(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length);
  let stride = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= shape[i] as number;
  }
  return strides;
}

/** Number of elements of a shape. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** Elements of storage that a view reaches, counted from the storage's start; 0 for an empty view. */
export function extentOf(view: Pick<TensorView, 'shape' | 'strides' | 'offset'>): number {
  if (elementCount(view.shape) === 0) return 0;
  return view.shape.reduce((end, size, i) => end + (size - 1) * (view.strides[i] as number), view.offset) + 1;
}

/** True when the view's elements are row-major without gaps. */
export function isContiguous(view: Pick<TensorView, 'shape' | 'strides'>): boolean {
  const expected = contiguousStrides(view.shape);
  return view.shape.every((size, i) => size === 1 || view.strides[i] === expected[i]);
}

/** The native `Float16Array`, where there is one. */
export const NativeFloat16Array = (
  globalThis as {
    Float16Array?: new (source: number | ArrayBufferLike, byteOffset?: number, length?: number) => Float16ArrayLike;
  }
).Float16Array;

/** The dtypes that each class of typed array can hold. */
const HELD_DTYPES: Readonly<Record<string, readonly MaskDType[]>> = {
  Float32Array: ['float32'],
  Uint16Array: ['float16', 'bfloat16'],
  Uint8Array: ['bool'],
  Float16Array: ['float16'],
};

/** The dtypes that a kind of typed array, of whatever realm, can hold; empty when it can hold none. */
const dtypesOf = (data: unknown): readonly MaskDType[] => HELD_DTYPES[typedArrayName.call(data) ?? ''] ?? [];

/**
 * Elements of an array, nothing copied, as an array of this realm: one of an iframe or of `vm` is an instance of no
 * class here.
 */
function part(data: TensorData, start: number, length: number): TensorData {
  const name = typedArrayName.call(data);
  const Own = name === 'Float16Array' ? NativeFloat16Array : { Float32Array, Uint16Array, Uint8Array }[name ?? ''];
  if (Own === undefined || (start === 0 && length === data.length && data instanceof Own)) return data;
  return new Own(data.buffer, data.byteOffset + start * data.BYTES_PER_ELEMENT, length);
}

/**
 * Wraps a typed array as a tensor. Nothing is copied.
 *
 * @param data elements, see {@link TensorData}
 * @param shape sizes, integers >= 0
 * @throws {InvalidArgumentError} `invalid-dtype`, `invalid-shape`, `invalid-strides` or `buffer-too-small`
 */
export function tensor(
  data: Float32Array,
  shape: readonly number[],
  options?: TensorOptions<'float32'>,
): Tensor<'float32'>;
export function tensor(data: Uint8Array, shape: readonly number[], options?: TensorOptions<'bool'>): Tensor<'bool'>;
export function tensor(
  data: Float16ArrayLike & { readonly [Symbol.toStringTag]: 'Float16Array' },
  shape: readonly number[],
  options?: TensorOptions<'float16'>,
): Tensor<'float16'>;
export function tensor<D extends 'float16' | 'bfloat16'>(
  data: Uint16Array,
  shape: readonly number[],
  options: TensorOptions & { readonly dtype: D },
): Tensor<D>;
export function tensor(data: TensorData, shape: readonly number[], options?: TensorOptions): Tensor;
export function tensor(data: TensorData, shape: readonly number[], options: TensorOptions = {}): Tensor {
  const { dtype: asked, strides, offset } = takeOptions(options, ['dtype', 'strides', 'offset']);
  const possible = dtypesOf(data);
  const dtype = asked ?? (possible.length === 1 ? possible[0] : undefined);
  if (dtype === undefined) {
    throw new InvalidArgumentError(
      'invalid-dtype',
      'options.dtype',
      possible.length === 0
        ? 'data to be a Float32Array, Float16Array, Uint16Array or Uint8Array'
        : "'float16' or 'bfloat16' for the bits of a Uint16Array",
      possible.length === 0 ? textOf(data) : 'none',
    );
  }
  if (!possible.includes(dtype)) {
    throw new InvalidArgumentError(
      'invalid-dtype',
      'options.dtype',
      possible.length === 0
        ? 'data to be a Float32Array, Float16Array, Uint16Array or Uint8Array'
        : possible.join(' or '),
      textOf(dtype),
    );
  }
  validateShape('tensor', shape);
  const view: Tensor = {
    location: 'cpu',
    dtype,
    data: part(data, 0, data.length),
    shape: [...shape],
    // A value that is no array is refused below.
    strides: Array.isArray(strides) ? [...strides] : (strides ?? contiguousStrides(shape)),
    offset: offset ?? 0,
  };
  validateView('tensor', view);
  validateExtent('tensor', view, data.length);
  return view;
}

function validateShape(argument: string, shape: unknown): void {
  if (!Array.isArray(shape) || !shape.every((size) => Number.isSafeInteger(size) && size >= 0)) {
    throw new InvalidArgumentError('invalid-shape', `${argument}.shape`, 'integers >= 0', textOf(shape));
  }
}

/** Checks shape, strides and offset of a view by themselves. */
export function validateView(argument: string, view: TensorView): void {
  const { shape, strides, offset } = view;
  validateShape(argument, shape);
  const wellFormed = Array.isArray(strides) && strides.length === shape.length;
  if (!wellFormed || !strides.every((stride) => Number.isSafeInteger(stride) && stride >= 0)) {
    throw new InvalidArgumentError(
      'invalid-strides',
      `${argument}.strides`,
      `${shape.length} integers >= 0`,
      textOf(strides),
    );
  }
  if (!Number.isSafeInteger(offset) || offset < 0) {
    throw new InvalidArgumentError('invalid-strides', `${argument}.offset`, 'an integer >= 0', textOf(offset));
  }
  if (!Number.isSafeInteger(extentOf(view))) {
    throw new InvalidArgumentError('invalid-shape', `${argument}.shape`, 'fewer than 2^53 elements', textOf(shape));
  }
}

/** Checks that storage of `elements` elements holds the whole view. */
export function validateExtent(argument: string, view: TensorView, elements: number): void {
  const extent = extentOf(view);
  if (extent > elements) {
    throw new InvalidArgumentError(
      'buffer-too-small',
      argument,
      `storage of at least ${extent} ${view.dtype} elements for shape ${textOf(view.shape)}, strides ${textOf(view.strides)}, offset ${view.offset}`,
      `${elements} elements`,
    );
  }
}

/** Bytes that a view's elements take when stored without gaps. */
export function byteLengthOf(view: Pick<TensorView, 'shape' | 'dtype'>): number {
  return elementCount(view.shape) * BYTES_PER_ELEMENT[view.dtype];
}

/**
 * Checks that a CPU tensor's array is of a class that can hold its dtype, long enough, and still there.
 *
 * @returns the tensor over just the elements that it reaches: what the caller changes in its description changes
 *     nothing then, and equal views anywhere in a larger array are alike
 */
export function validateData(argument: string, view: Tensor): Tensor {
  const { data, dtype, shape, strides, offset, device } = view;
  const possible = dtypesOf(data);
  if (!possible.includes(dtype)) {
    const held = possible.length === 0 ? 'no dtype' : possible.join(' or ');
    throw new InvalidArgumentError(
      'invalid-dtype',
      `${argument}.data`,
      `an array of ${textOf(dtype)}`,
      `${classOf(data)}, which holds ${held}`,
    );
  }
  validateExtent(argument, view, data.length);
  const extent = extentOf(view);
  const own = extent === 0 ? part(data, 0, 0) : part(data, offset, extent - offset);
  const taken: Tensor = { location: 'cpu', dtype, shape: [...shape], strides: [...strides], offset: 0, data: own };
  return device === undefined ? taken : { ...taken, device };
}

/** A tensor's description as it is now, without its data. */
export function specOf(argument: string, view: TensorView): TensorView {
  requireView(argument, view);
  const { location, dtype, shape, strides, offset, device } = view;
  const spec = { location, dtype, shape: [...shape], strides: [...strides], offset };
  return device === undefined ? spec : { ...spec, device };
}

/** A CPU tensor's elements in an array of their own, gaps included; other tensors as they are. */
export function copyOfCpu<T extends TensorView>(view: T): T {
  if (view.location !== 'cpu') return view;
  const { data } = view as unknown as Tensor;
  // Arrays of every class have it, and its result has a buffer of its own, also where the array's is shared.
  return { ...view, data: (data as Float32Array).slice() };
}

function zeros(length: number, dtype: DType): TensorData {
  try {
    if (dtype === 'float32') return new Float32Array(length);
    return dtype === 'float16' && NativeFloat16Array !== undefined
      ? new NativeFloat16Array(length)
      : new Uint16Array(length);
  } catch (error) {
    throw new ExecutionError('out-of-memory', `no memory for an array of ${length} elements of ${dtype}`, error);
  }
}

/**
 * A new contiguous CPU tensor of zeros. float16 data is a `Float16Array` where the platform has it and a `Uint16Array`
 * of bits elsewhere.
 *
 * @param shape sizes, integers >= 0
 * @throws {InvalidArgumentError} `invalid-shape`, `invalid-dtype`
 * @throws {ExecutionError} `out-of-memory`
 */
export function emptyTensor<D extends DType>(shape: readonly number[], dtype: D): Tensor<D> {
  validateShape('emptyTensor', shape);
  if (dtype !== 'float32' && dtype !== 'float16' && dtype !== 'bfloat16') {
    throw new InvalidArgumentError('invalid-dtype', 'dtype', 'float16, bfloat16, float32', textOf(dtype));
  }
  const data = zeros(elementCount(shape), dtype) as TensorDataOf<D>;
  return { location: 'cpu', dtype, data, shape: [...shape], strides: contiguousStrides(shape), offset: 0 };
}

/** The 16-bit words under a float16 or bfloat16 tensor's data, whichever array class holds it. */
export function bitsOf(data: Uint16Array | Float16ArrayLike): Uint16Array {
  return data instanceof Uint16Array ? data : new Uint16Array(data.buffer, data.byteOffset, data.length);
}

/** Checks that something is a view, whatever it was said to be. */
export function requireView(argument: string, view: TensorView): void {
  const isObject = typeof view === 'object' && view !== null;
  if (!isObject || !reading(argument, () => 'shape' in view && 'strides' in view && 'dtype' in view)) {
    throw new InvalidArgumentError('invalid-shape', argument, 'a tensor (tensor(data, shape) makes one)', textOf(view));
  }
  reading(argument, () => validateView(argument, view));
}

/**
 * A view with its dimensions reordered, nothing copied: `transpose(nhd, [0, 2, 1, 3])` sees `[B,L,H,D]` as `[B,H,L,D]`.
 *
 * @throws {InvalidArgumentError} `invalid-shape` when `order` is no permutation of the dimensions
 */
export function transpose<T extends TensorView>(view: T, order: readonly number[]): T {
  requireView('view', view);
  const sorted = Array.isArray(order) && order.every(Number.isInteger) ? [...order].sort((a, b) => a - b) : [];
  if (sorted.length !== view.shape.length || sorted.some((dimension, i) => dimension !== i)) {
    throw new InvalidArgumentError(
      'invalid-shape',
      'order',
      `a permutation of 0..${view.shape.length - 1}`,
      textOf(order),
    );
  }
  return {
    ...view,
    shape: order.map((dimension) => view.shape[dimension] as number),
    strides: order.map((dimension) => view.strides[dimension] as number),
  };
}

/**
 * Elements `start` (inclusive) to `end` (exclusive) of one dimension, nothing copied.
 *
 * @throws {InvalidArgumentError} `invalid-shape` when the range does not lie inside the dimension
 */
export function slice<T extends TensorView>(view: T, dimension: number, start: number, end: number): T {
  requireView('view', view);
  const size = Number.isInteger(dimension) ? view.shape[dimension] : undefined;
  if (
    size === undefined ||
    !Number.isInteger(start) ||
    !Number.isInteger(end) ||
    start < 0 ||
    end < start ||
    end > size
  ) {
    throw new InvalidArgumentError(
      'invalid-shape',
      'slice',
      `0 <= start <= end <= the size of dimension ${textOf(dimension)} of ${textOf(view.shape)}`,
      `${textOf(start)}..${textOf(end)}`,
    );
  }
  return {
    ...view,
    shape: view.shape.map((other, i) => (i === dimension ? end - start : other)),
    offset: view.offset + start * (view.strides[dimension] as number),
  };
}
