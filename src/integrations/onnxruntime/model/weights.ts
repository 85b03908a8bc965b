/**
 * Constants of a cut model. Large ones are not copied: every session refers to the same bytes, which onnxruntime reads as
 * external data straight out of the model that was loaded.
 */

import { EXTERNAL, externalTensor, type NodeProto, type TensorProto } from '../onnx/codec.ts';
import type { GraphIndex } from './graph.ts';

/** The model's own bytes under a name by which sessions refer to them. */
export interface MountedModel {
  readonly bytes: Uint8Array;
  readonly path: string;
}

/** Payloads below this stay inside the model: shape inference and constant folding read them. */
const EXTERNAL_FROM_BYTES = 1024;

export interface PieceWeights {
  readonly initializers: readonly TensorProto[];
  /** Files that the initializers refer to. */
  readonly files: ReadonlySet<string>;
}

/**
 * The constants that nodes read, subgraphs included.
 *
 * @param mounted undefined: payloads are written into the session's model
 * @param isInMemory false for a file that onnxruntime opens itself: it reads all external data from files, or all from memory
 */
export function weightsOf(
  index: GraphIndex,
  nodes: readonly NodeProto[],
  mounted: MountedModel | undefined,
  isInMemory: (file: string) => boolean,
): PieceWeights {
  const names = new Set(nodes.flatMap((node) => index.readsOf(node)));
  const tensors = [...names].flatMap((name) => {
    const tensor = index.constants.get(name);
    return tensor === undefined ? [] : [{ ...tensor, name }];
  });
  const given = tensors.map(fileOf).filter((file) => file !== undefined);
  const source = given.every(isInMemory) ? mounted : undefined;
  const initializers = tensors.map((tensor) => shared(tensor, source));
  return { initializers, files: new Set(initializers.map(fileOf).filter((file) => file !== undefined)) };
}

function shared(tensor: TensorProto, mounted: MountedModel | undefined): TensorProto {
  const { rawData } = tensor;
  const isOutside = tensor.dataLocation === EXTERNAL;
  if (mounted === undefined || isOutside || rawData.byteLength < EXTERNAL_FROM_BYTES) return tensor;
  if (rawData.buffer !== mounted.bytes.buffer) return tensor;
  return externalTensor(tensor, mounted.path, rawData.byteOffset - mounted.bytes.byteOffset, rawData.byteLength);
}

/** The file that holds a tensor's external data. */
export function fileOf(tensor: TensorProto): string | undefined {
  return tensor.dataLocation === EXTERNAL
    ? tensor.externalData.find((entry) => entry.key === 'location')?.value
    : undefined;
}
