/**
 * Constants of a cut model. Large ones are not copied: every session refers to the same bytes, which onnxruntime reads as
 * external data straight out of the model that was loaded.
 */

import { EXTERNAL, externalTensor, type NodeProto, type TensorProto } from './codec.ts';
import type { GraphIndex } from './graph.ts';

/** Where a session can find the model's own bytes again. */
export type WeightSource =
  /** onnxruntime-web reads them from memory under this name. */
  | { readonly kind: 'mounted'; readonly bytes: Uint8Array; readonly path: string }
  /** onnxruntime-node maps the file. */
  | { readonly kind: 'file'; readonly bytes: Uint8Array; readonly path: string }
  /** Payloads are written into every session's model. */
  | { readonly kind: 'inline' };

/** Payloads below this stay inside the model: shape inference and constant folding read them. */
const EXTERNAL_FROM_BYTES = 1024;

export interface PieceWeights {
  readonly initializers: readonly TensorProto[];
  /** Files that the initializers refer to. */
  readonly files: ReadonlySet<string>;
}

/** The constants that nodes read, subgraphs included. */
export function weightsOf(index: GraphIndex, nodes: readonly NodeProto[], source: WeightSource): PieceWeights {
  const names = new Set(nodes.flatMap((node) => index.readsOf(node)));
  const files = new Set<string>();
  const initializers: TensorProto[] = [];
  for (const name of names) {
    const tensor = index.constants.get(name);
    if (tensor === undefined) continue;
    const initializer = shared({ ...tensor, name }, source);
    initializers.push(initializer);
    const file = fileOf(initializer);
    if (file !== undefined) files.add(file);
  }
  return { initializers, files };
}

function shared(tensor: TensorProto, source: WeightSource): TensorProto {
  const { rawData } = tensor;
  if (source.kind === 'inline' || tensor.dataLocation === EXTERNAL || rawData.byteLength < EXTERNAL_FROM_BYTES)
    return tensor;
  if (rawData.buffer !== source.bytes.buffer) return tensor;
  return externalTensor(tensor, source.path, rawData.byteOffset - source.bytes.byteOffset, rawData.byteLength);
}

function fileOf(tensor: TensorProto): string | undefined {
  return tensor.dataLocation === EXTERNAL
    ? tensor.externalData.find((entry) => entry.key === 'location')?.value
    : undefined;
}
