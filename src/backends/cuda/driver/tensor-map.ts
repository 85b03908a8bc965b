import type { TensorMapDescription } from '../launches/launch.ts';
import type { DeviceContext } from './context.ts';

/**
 * Values of CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
 * CUtensorMapFloatOOBfill.
 */
export const TENSOR_MAP_VALUES = {
  elementType: { u8: 0, s32: 3, f16: 6, f32: 7, bf16: 9 },
  interleave: { none: 0, '16B': 1, '32B': 2 },
  swizzle: { none: 0, '32B': 1, '64B': 2, '128B': 3 },
  l2Promotion: { none: 0, '64B': 1, '128B': 2, '256B': 3 },
  outOfBounds: { zero: 0, nan: 1 },
} as const;

/** A tensor map's description in the form that the driver takes; only the tensor's address changes between runs. */
export class TensorMapEncoder {
  readonly #device: DeviceContext;
  readonly #description: TensorMapDescription;
  readonly #dimensions: BigUint64Array;
  readonly #strides: BigUint64Array;
  readonly #box: Uint32Array;
  readonly #elementStrides: Uint32Array;

  constructor(device: DeviceContext, description: TensorMapDescription) {
    const { dimensions, byteStrides, box } = description;
    this.#device = device;
    this.#description = description;
    this.#dimensions = BigUint64Array.from(dimensions, BigInt);
    this.#strides = BigUint64Array.from(byteStrides, BigInt);
    this.#box = Uint32Array.from(box);
    this.#elementStrides = Uint32Array.from(description.elementStrides ?? dimensions.map(() => 1));
  }

  /**
   * Writes the map of the tensor at `tensor`.
   *
   * @param target address of 128 bytes of host memory, a multiple of 64
   * @throws {CudaError} when the description is not one that the hardware takes
   */
  encode(target: bigint, tensor: bigint): void {
    // No box of an empty tensor is ever copied, and the driver takes no size of 0.
    if (this.#description.dimensions.includes(0)) return;
    const { elementType, interleave, swizzle, l2Promotion, outOfBounds, buffer, dimensions } = this.#description;
    this.#device.call(
      'cuTensorMapEncodeTiled',
      `encoding the tensor map of '${buffer}' ([${dimensions}], innermost first)`,
      target,
      TENSOR_MAP_VALUES.elementType[elementType],
      dimensions.length,
      tensor,
      this.#dimensions,
      this.#strides,
      this.#box,
      this.#elementStrides,
      TENSOR_MAP_VALUES.interleave[interleave ?? 'none'],
      TENSOR_MAP_VALUES.swizzle[swizzle],
      TENSOR_MAP_VALUES.l2Promotion[l2Promotion ?? 'none'],
      TENSOR_MAP_VALUES.outOfBounds[outOfBounds ?? 'zero'],
    );
  }
}
