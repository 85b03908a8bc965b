/** What a model takes and gives, in onnxruntime's words: pieces of it know less of their shapes than the whole. */

import type { OrtSession, OrtSessionOptions, OrtValueMetadata } from '../ort.ts';
import {
  EXTERNAL,
  elementTypeName,
  type ModelProto,
  graph as makeGraph,
  modelLike,
  type TensorProto,
  valueInfo,
  writeModel,
} from './codec.ts';
import type { GraphIndex } from './graph.ts';

export interface ModelMetadata {
  readonly inputs: readonly OrtValueMetadata[];
  readonly outputs: readonly OrtValueMetadata[];
}

/** Payloads below this may be shapes, which the shapes of other values depend on. */
const WEIGHT_BYTES = 1024;

const isWeight = (tensor: TensorProto): boolean =>
  tensor.dataLocation === EXTERNAL || tensor.rawData.byteLength >= WEIGHT_BYTES;

/**
 * Opens the model for a moment, with inputs in the place of its weights: that takes a few percent of the time of opening it, and no
 * memory to speak of.
 */
export async function readMetadata(
  create: (model: Uint8Array, options: OrtSessionOptions) => Promise<OrtSession>,
  model: ModelProto,
  { graph, nodes, constants, inputs }: GraphIndex,
  { freeDimensionOverrides, graphOptimizationLevel }: OrtSessionOptions,
): Promise<ModelMetadata> {
  const named = [...constants].map(([name, tensor]) => ({ ...tensor, name }));
  const weights = named.filter(isWeight).map(({ name, dataType, dims }) => {
    const type = elementTypeName(dataType);
    if (type === undefined) throw new Error(`weights '${name}' are of no known type`);
    return valueInfo(name, type, dims.map(Number));
  });
  const sketch = makeGraph({
    name: graph.name,
    nodes,
    inputs: [...graph.input.filter(({ name }) => inputs.has(name)), ...weights],
    outputs: graph.output,
    initializers: named.filter((tensor) => !isWeight(tensor)),
    valueInfo: graph.valueInfo,
  });
  const session = await create(writeModel(modelLike(model, sketch)), {
    // Errors are those of the model, which its pieces will show.
    logSeverityLevel: 4,
    ...(freeDimensionOverrides === undefined ? {} : { freeDimensionOverrides }),
    ...(graphOptimizationLevel === undefined ? {} : { graphOptimizationLevel }),
  });
  const metadata = {
    inputs: (session.inputMetadata ?? []).filter(({ name }) => inputs.has(name)),
    outputs: session.outputMetadata ?? [],
  };
  await session.release();
  return metadata;
}
