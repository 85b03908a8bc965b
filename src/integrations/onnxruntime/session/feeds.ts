/** A model's inputs: what onnxruntime checks of them, and when they are read. */
import type { OrtFeeds, OrtTensor, OrtTensorConstructor, OrtValueMetadata } from '../ort.ts';

/** onnxruntime-web gives -1, an unknown size, as an unsigned number. */
export const isSize = (size: number | string): size is number =>
  typeof size === 'number' && size >= 0 && size < 2 ** 32 - 1;

/**
 * Inputs of several sessions, which run one after the other: those in the caller's memory are copied, since a caller may fill it with those of
 * the next run while this one goes on.
 */
export function ownFeeds(TensorClass: OrtTensorConstructor, feeds: OrtFeeds): OrtFeeds {
  const own = (tensor: OrtTensor): OrtTensor => {
    if (!(tensor instanceof TensorClass) || !tensor.location.startsWith('cpu')) return tensor;
    const { type, data, dims } = tensor;
    return new TensorClass(type, (data as Uint8Array | readonly string[]).slice(), dims);
  };
  return Object.fromEntries(Object.entries(feeds).map(([name, tensor]) => [name, own(tensor)]));
}

/**
 * Refuses what onnxruntime would refuse, for inputs that go into attention without passing through one of its sessions.
 *
 * @param isWeb onnxruntime-web takes no tensors that the model has no input for; onnxruntime-node does not look at them
 * @throws {Error} in the words of onnxruntime: a tensor whose dimensions are not the model's
 */
export function checkFeeds(inputs: readonly OrtValueMetadata[], feeds: OrtFeeds, isWeb: boolean): void {
  const unknown = Object.keys(feeds).find((feed) => inputs.every(({ name }) => name !== feed));
  if (isWeb && unknown !== undefined) throw new Error(`invalid input '${unknown}'`);
  for (const { name, shape = [] } of inputs) {
    const dims = feeds[name]?.dims;
    // onnxruntime gives a value of unknown rank no dimensions.
    if (!Array.isArray(dims) || shape.length === 0) continue;
    if (dims.length !== shape.length) {
      throw new Error(`Invalid rank for input: ${name} Got: ${dims.length} Expected: ${shape.length} ${ADVICE}`);
    }
    const wrong = shape.flatMap((size, i) =>
      isSize(size) && size !== dims[i] ? [` index: ${i} Got: ${dims[i]} Expected: ${size}\n`] : [],
    );
    if (wrong.length > 0) {
      throw new Error(
        `Got invalid dimensions for input: ${name} for the following indices\n${wrong.join('')} ${ADVICE}`,
      );
    }
  }
}

const ADVICE = 'Please fix either the inputs/outputs or the model.';
