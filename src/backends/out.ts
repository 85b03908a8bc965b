/** The caller's own tensor for an output: checked, and filled by whichever backend ran. */
import type { OutputSpec, PlannedOutputs } from '../attention/outputs.ts';
import { InvalidArgumentError, reading, textOf } from '../errors.ts';
import { BYTES_PER_ELEMENT } from '../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  requireView,
  type Tensor,
  type TensorView,
  validateData,
} from '../tensor/tensor.ts';
import type { AttentionOutputs, RunContext } from './backend.ts';

/**
 * The caller's tensor for an output as it is now.
 *
 * @throws {InvalidArgumentError} it is not like the output, or not on the CPU
 */
export function takeOut(out: TensorView, { location, outputs }: PlannedOutputs): Tensor {
  return reading('options.out', () => {
    requireView('options.out', out);
    if (location !== 'cpu' || out.location !== 'cpu') {
      const where = location === 'cpu' ? out.location : location;
      throw new InvalidArgumentError('invalid-option', 'options.out', 'tensors on the CPU', `tensors on '${where}'`);
    }
    const { shape, dtype } = outputs[0] as OutputSpec;
    if (out.dtype !== dtype) throw new InvalidArgumentError('invalid-dtype', 'options.out', dtype, out.dtype);
    if (textOf(out.shape) !== textOf(shape)) {
      throw new InvalidArgumentError(
        'invalid-shape',
        'options.out',
        `the output's shape ${textOf(shape)}`,
        textOf(out.shape),
      );
    }
    const strides = contiguousStrides(shape);
    if (shape.some((size, axis) => size > 1 && out.strides[axis] !== strides[axis])) {
      throw new InvalidArgumentError(
        'invalid-shape',
        'options.out',
        'a contiguous tensor',
        `strides ${textOf(out.strides)}`,
      );
    }
    return validateData('options.out', out as Tensor);
  });
}

/**
 * What a call answers with: its output in the caller's tensor, if one was given.
 *
 * @param given what {@link takeOut} took `out` from
 */
export function outputsInto<T extends TensorView>(
  { output, lse }: AttentionOutputs<T>,
  given: TensorView | undefined,
  { out }: RunContext,
): AttentionOutputs<T> {
  if (given === undefined || out === undefined) return lse === undefined ? { output } : { output, lse };
  if ((output as TensorView) !== out) {
    const { data } = output as TensorView as Tensor;
    outBytes(out).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  return { ...(lse === undefined ? {} : { lse }), output: given as T };
}

/**
 * The bytes of the caller's tensor now: it may have been transferred since it was taken.
 *
 * @throws {InvalidArgumentError} `buffer-too-small`
 */
export function outBytes({ data, shape, dtype }: Tensor): Uint8Array {
  const bytes = elementCount(shape) * BYTES_PER_ELEMENT[dtype];
  if (data.byteLength < bytes) {
    throw new InvalidArgumentError('buffer-too-small', 'options.out', `data of ${bytes} bytes`, `${data.byteLength}`);
  }
  return new Uint8Array(data.buffer, data.byteOffset, bytes);
}
