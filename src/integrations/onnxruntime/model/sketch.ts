/**
 * A model without its weights, which stand among the inputs instead. Opening it takes a few percent of the time of
 * opening the model and almost no memory, and onnxruntime judges it as it judges the model: whether it is valid, and the
 * shapes of its values.
 */

import {
  ELEMENT_TYPES,
  EXTERNAL,
  elementTypeName,
  type GraphProto,
  type ModelProto,
  modelLike,
  type NodeProto,
  type TensorProto,
  untypedValue,
  type ValueInfoProto,
  valueInfo,
  writeModel,
} from '../onnx/codec.ts';
import type { OrtDimension, OrtSession, OrtSessionOptions, OrtValueMetadata } from '../ort.ts';
import { type GraphIndex, isOp } from './graph.ts';

export interface ModelMetadata {
  readonly inputs: readonly OrtValueMetadata[];
  readonly outputs: readonly OrtValueMetadata[];
}

export interface ModelFacts {
  /** In onnxruntime's words; undefined where this onnxruntime does not say it. */
  readonly metadata: ModelMetadata | undefined;
  /** Shapes of the watched values as far as onnxruntime infers them. */
  readonly shapes: ReadonlyMap<string, readonly OrtDimension[]>;
  /** Their element types, and those of inputs. */
  readonly types: ReadonlyMap<string, string>;
}

/** Payloads below this may be shapes, which the shapes of other values depend on. */
const WEIGHT_BYTES = 1024;

const isWeight = (tensor: TensorProto): boolean =>
  tensor.dataLocation === EXTERNAL || tensor.rawData.byteLength >= WEIGHT_BYTES;

const BITS = new Map<number, number>([
  [ELEMENT_TYPES.float32, 32],
  [ELEMENT_TYPES.uint8, 8],
  [ELEMENT_TYPES.int8, 8],
  [ELEMENT_TYPES.uint16, 16],
  [ELEMENT_TYPES.int16, 16],
  [ELEMENT_TYPES.int32, 32],
  [ELEMENT_TYPES.int64, 64],
  [ELEMENT_TYPES.bool, 8],
  [ELEMENT_TYPES.float16, 16],
  [ELEMENT_TYPES.float64, 64],
  [ELEMENT_TYPES.uint32, 32],
  [ELEMENT_TYPES.uint64, 64],
  [ELEMENT_TYPES.bfloat16, 16],
  [ELEMENT_TYPES.uint4, 4],
  [ELEMENT_TYPES.int4, 4],
]);

/** True where the payload is as long as type and dimensions say; not known of a payload that is elsewhere. */
function isWhole(tensor: TensorProto): boolean {
  const bits = BITS.get(tensor.dataType);
  if (bits === undefined || tensor.dims.some((size) => size < 0n)) return false;
  const bytes = (tensor.dims.reduce((product, size) => product * size, BigInt(bits)) + 7n) / 8n;
  return tensor.dataLocation === EXTERNAL || bytes === BigInt(tensor.rawData.byteLength);
}

/** The payload of a `Constant` node that says one thing in the one way that is common. */
function constantWeight(node: NodeProto): TensorProto | undefined {
  const [attribute, ...others] = node.attribute;
  const isPlain = isOp(node, 'Constant') && node.input.length === 0 && node.output.length === 1 && others.length === 0;
  const value = isPlain && attribute?.name === 'value' ? attribute.t : undefined;
  return value !== undefined && isWeight(value) && isWhole(value) ? value : undefined;
}

/** The weights by name, or undefined where they may be what onnxruntime refuses the model for. */
function weightsIn(index: GraphIndex): Map<string, TensorProto> | undefined {
  const weights = new Map<string, TensorProto>();
  const names = new Set<string>();
  for (const tensor of index.graph.initializer) {
    if (tensor.name === '' || names.has(tensor.name) || index.producer(tensor.name) !== undefined) return undefined;
    names.add(tensor.name);
    if (!isWeight(tensor)) continue;
    // Nothing of this package reads a payload outside of the model that no node reads.
    const isRead = tensor.dataLocation !== EXTERNAL || index.consumers(tensor.name).length > 0;
    if (!isRead || !isWhole(tensor)) return undefined;
    weights.set(tensor.name, tensor);
  }
  for (const node of index.graph.node) {
    const value = constantWeight(node);
    if (value === undefined) continue;
    const [name] = node.output as [string];
    if (names.has(name) || index.producer(name) !== undefined) return undefined;
    names.add(name);
    weights.set(name, value);
  }
  const { input, output, valueInfo: inner } = index.graph;
  const agrees = (info: ValueInfoProto) => {
    const tensor = weights.get(info.name);
    return tensor === undefined || agreesWith(info, tensor);
  };
  return [...input, ...output, ...inner].every(agrees) ? weights : undefined;
}

function agreesWith({ type }: ValueInfoProto, { dataType, dims }: TensorProto): boolean {
  if (type?.value.case !== 'tensorType' || type.value.value.elemType !== dataType) return false;
  const declared = type.value.value.shape?.dim;
  return (
    declared === undefined ||
    (declared.length === dims.length &&
      declared.every(({ value }, axis) => value.case === 'dimValue' && value.value === dims[axis]))
  );
}

function sketchOf(
  index: GraphIndex,
  weights: ReadonlyMap<string, TensorProto>,
  watched: readonly string[],
): GraphProto {
  const { graph, outputs } = index;
  const inputs = [...weights].map(([name, { dataType, dims }]) => {
    const type = elementTypeName(dataType);
    if (type === undefined) throw new Error(`weights '${name}' are of no known type`);
    return valueInfo(name, type, dims.map(Number));
  });
  return {
    ...graph,
    node: graph.node.filter((node) => constantWeight(node) === undefined),
    initializer: graph.initializer.filter(({ name }) => !weights.has(name)),
    input: [...graph.input.filter(({ name }) => !weights.has(name)), ...inputs],
    output: [...graph.output, ...watched.filter((name) => !outputs.has(name)).map(untypedValue)],
  };
}

/**
 * What onnxruntime says of a model, or undefined where only the model itself shows it.
 *
 * @param watched values whose shapes are asked for
 */
export async function readFacts(
  create: (model: Uint8Array, options: OrtSessionOptions) => Promise<OrtSession>,
  model: ModelProto,
  index: GraphIndex,
  options: OrtSessionOptions,
  watched: readonly string[],
): Promise<ModelFacts | undefined> {
  const weights = weightsIn(index);
  if (weights === undefined) return undefined;
  const inner = [...new Set(watched)].filter((name) => index.producer(name) !== undefined);
  const bytes = writeModel(modelLike(model, sketchOf(index, weights, inner)));
  const { freeDimensionOverrides, graphOptimizationLevel, executionProviders, extra } = options;
  const given = { freeDimensionOverrides, graphOptimizationLevel, executionProviders, extra };
  const set = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  // Errors are reported when onnxruntime opens the model itself, which comes next.
  const session = await create(bytes, { ...set, logSeverityLevel: 4 }).catch(() => undefined);
  if (session === undefined) return undefined;
  const { inputMetadata, outputMetadata } = session;
  const all = [...(inputMetadata ?? []), ...(outputMetadata ?? [])];
  const shapeOf = new Map(all.map(({ name, shape }) => [name, shape]));
  await session.release();
  return {
    metadata: inputMetadata &&
      outputMetadata && {
        inputs: inputMetadata.filter(({ name }) => index.inputs.has(name)),
        outputs: outputMetadata.filter(({ name }) => index.outputs.has(name)),
      },
    shapes: new Map(
      watched.flatMap((name) => (shapeOf.get(name) === undefined ? [] : [[name, shapeOf.get(name) ?? []]])),
    ),
    types: new Map(all.flatMap(({ name, type }) => (type === undefined ? [] : [[name, type]]))),
  };
}
