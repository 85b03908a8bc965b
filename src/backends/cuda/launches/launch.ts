/**
 * What kernels hand to the driver: launches as data. `kernels/` makes them from a problem without touching a device,
 * `plan.ts` binds their buffers to device memory, and the simulator runs them without one.
 */

/** Operands of a run by name: `q`, `k`, `v`, `mask`, `output`, `lse`, and what {@link LaunchSequence} declares. */
export type BufferName = string;

/**
 * A tiled tensor map for TMA (`cuTensorMapEncodeTiled`). Dimensions are innermost first; strides leave out the
 * innermost.
 */
export interface TensorMapDescription {
  readonly buffer: BufferName;
  /** Where the tensor starts in the buffer; the address must be a multiple of 16. */
  readonly byteOffset?: number;
  readonly elementType: 'u8' | 'f16' | 'bf16' | 'f32' | 's32';
  /** Elements of each dimension, 1 to 5 of them, each up to 2^32. */
  readonly dimensions: readonly number[];
  /** Bytes between neighbours of each dimension but the innermost: multiples of 16 below 2^40. */
  readonly byteStrides: readonly number[];
  /** Elements of the box that one copy moves, each up to 256. */
  readonly box: readonly number[];
  readonly elementStrides?: readonly number[];
  readonly swizzle: 'none' | '32B' | '64B' | '128B';
  readonly interleave?: 'none' | '16B' | '32B';
  readonly l2Promotion?: 'none' | '64B' | '128B' | '256B';
  /** What elements outside the tensor read as; default zero. */
  readonly outOfBounds?: 'zero' | 'nan';
}

/**
 * One kernel parameter; its kind settles size and alignment (`pointer`, `u64`, `s64`: 8 bytes; `tensor-map`: 128,
 * aligned to 64).
 */
export type KernelArgument =
  | { readonly kind: 'pointer'; readonly buffer: BufferName; readonly byteOffset?: number }
  /** A pointer that the kernel takes but this problem does not use. */
  | { readonly kind: 'null' }
  | { readonly kind: 'u32' | 's32' | 'f32'; readonly value: number }
  | { readonly kind: 'u64' | 's64'; readonly value: number | bigint }
  | { readonly kind: 'tensor-map'; readonly map: TensorMapDescription };

/** PTX of one module. The same object for the same configuration lets the device keep one loaded module for both. */
export interface KernelModule {
  /** Identifies configuration and target; equal ids mean equal text. */
  readonly id: string;
  /** Makes the text; called once per device and id. */
  readonly ptx: () => string;
}

export type Dimensions3 = readonly [x: number, y: number, z: number];

/** One kernel launch. */
export interface KernelLaunch {
  /** For errors and profiles: `quantizeKey`, `attend`, ... */
  readonly name: string;
  readonly module: KernelModule;
  /** Name of the `.entry` in the module. */
  readonly entry: string;
  readonly grid: Dimensions3;
  readonly block: Dimensions3;
  /** Thread blocks of a cluster; default none. */
  readonly cluster?: Dimensions3;
  /** Dynamic shared memory in bytes; above 48 KiB the plan raises the function's limit. */
  readonly sharedBytes: number;
  readonly arguments: readonly KernelArgument[];
}

/** All launches of one run, in order, on one stream. */
export interface LaunchSequence {
  /** Device memory that one run needs for itself, in bytes; contents are undefined at the start. */
  readonly scratch: Readonly<Record<BufferName, number>>;
  /** Device memory in bytes that is all zeros when a run starts, and that its launches leave so; default none. */
  readonly zeroed?: Readonly<Record<BufferName, number>>;
  /** Data uploaded once with the plan, such as cumulative sequence lengths. */
  readonly constants: Readonly<Record<BufferName, Uint8Array>>;
  readonly launches: readonly KernelLaunch[];
}
