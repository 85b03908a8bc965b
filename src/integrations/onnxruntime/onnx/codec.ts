/**
 * Reading and writing of ONNX models. The only file that touches the protobuf library; the build bundles the library
 * into it, so that a program which installs this package alone can import the integration.
 */

import { create, fromBinary, toBinary } from '@bufbuild/protobuf';
import { float16ToNumber } from '../../../tensor/formats/float16.ts';
import {
  type AttributeProto,
  AttributeProtoSchema,
  type FunctionProto,
  FunctionProtoSchema,
  type GraphProto,
  GraphProtoSchema,
  type ModelProto,
  ModelProtoSchema,
  type NodeProto,
  NodeProtoSchema,
  StringStringEntryProtoSchema,
  TensorPayloadSchema,
  type TensorProto,
  TensorProtoSchema,
  type ValueInfoProto,
  ValueInfoProtoSchema,
} from './onnx_pb.ts';

export type { AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto };

/** Numbers of `TensorProto.DataType` by onnxruntime's names for them. */
export const ELEMENT_TYPES = {
  float32: 1,
  uint8: 2,
  int8: 3,
  uint16: 4,
  int16: 5,
  int32: 6,
  int64: 7,
  string: 8,
  bool: 9,
  float16: 10,
  float64: 11,
  uint32: 12,
  uint64: 13,
  bfloat16: 16,
  uint4: 21,
  int4: 22,
} as const;

export type ElementTypeName = keyof typeof ELEMENT_TYPES;

const TYPE_NAMES = new Map(
  Object.entries(ELEMENT_TYPES).map(([name, number]) => [number as number, name as ElementTypeName]),
);

/** Undefined for types that onnxruntime has no name for. */
export const elementTypeName = (elementType: number): ElementTypeName | undefined => TYPE_NAMES.get(elementType);

/** Numbers of `AttributeProto.AttributeType`. */
export const ATTRIBUTE_TYPES = { float: 1, int: 2, string: 3, tensor: 4, graph: 5, floats: 6, ints: 7 } as const;

/** `TensorProto.DataLocation.EXTERNAL`. */
export const EXTERNAL = 1;

/** Parses a model. Payloads are views of `bytes`, not copies. */
export function readModel(bytes: Uint8Array): ModelProto {
  return fromBinary(ModelProtoSchema, bytes);
}

export function writeModel(model: ModelProto): Uint8Array {
  return toBinary(ModelProtoSchema, model);
}

/** A model with `model`'s versions, operator sets and functions around another graph. */
export function modelLike(model: ModelProto, graph: GraphProto, extraDomains: readonly string[] = []): ModelProto {
  const copy: ModelProto = { ...model, graph };
  const known = new Set(model.opsetImport.map((entry) => canonicalDomain(entry.domain)));
  const missing = extraDomains.filter((domain) => !known.has(domain));
  if (missing.length > 0) {
    const additions = create(ModelProtoSchema, {
      opsetImport: missing.map((domain) => ({ domain, version: 1n })),
    }).opsetImport;
    copy.opsetImport = [...model.opsetImport, ...additions];
  }
  return copy;
}

/** A function of a model that any node of its domain and name calls, over operator set 17. */
export const functionProto = (of: {
  readonly name: string;
  readonly domain: string;
  readonly nodes: readonly NodeProto[];
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
}): FunctionProto =>
  create(FunctionProtoSchema, {
    name: of.name,
    domain: of.domain,
    node: [...of.nodes],
    input: [...of.inputs],
    output: [...of.outputs],
    opsetImport: [{ domain: '', version: 17n }],
  });

/** `ai.onnx` is another name of the default domain. */
export function canonicalDomain(domain: string): string {
  return domain === 'ai.onnx' ? '' : domain;
}

export type AttributeValue =
  | number
  | bigint
  | string
  | readonly number[]
  | TensorProto
  | GraphProto
  | { readonly float: number };

/** An attribute: a bare number is an int, `{ float }` a float. */
export function attribute(name: string, value: AttributeValue): AttributeProto {
  const init = (fields: Partial<Omit<AttributeProto, '$typeName' | '$unknown'>>) =>
    create(AttributeProtoSchema, { name, ...fields });
  if (typeof value === 'number' || typeof value === 'bigint') {
    return init({ type: ATTRIBUTE_TYPES.int, i: BigInt(value) });
  }
  if (typeof value === 'string') return init({ type: ATTRIBUTE_TYPES.string, s: new TextEncoder().encode(value) });
  if ('float' in value) return init({ type: ATTRIBUTE_TYPES.float, f: value.float });
  if ('$typeName' in value) {
    return value.$typeName === 'onnx.GraphProto'
      ? init({ type: ATTRIBUTE_TYPES.graph, g: value })
      : init({ type: ATTRIBUTE_TYPES.tensor, t: value });
  }
  return init({ type: ATTRIBUTE_TYPES.ints, ints: value.map(BigInt) });
}

export interface NodeOptions {
  readonly name?: string;
  readonly domain?: string;
  readonly attributes?: Readonly<Record<string, AttributeValue>>;
}

export function node(
  opType: string,
  input: readonly string[],
  output: readonly string[],
  options: NodeOptions = {},
): NodeProto {
  return create(NodeProtoSchema, {
    opType,
    input: [...input],
    output: [...output],
    name: options.name ?? '',
    domain: options.domain ?? '',
    attribute: Object.entries(options.attributes ?? {}).map(([name, value]) => attribute(name, value)),
  });
}

/** A tensor that holds its payload. `data` is little-endian, row-major. */
export function tensorProto(
  name: string,
  type: ElementTypeName,
  dims: readonly number[],
  data: ArrayBufferView,
): TensorProto {
  return create(TensorProtoSchema, {
    name,
    dims: dims.map(BigInt),
    dataType: ELEMENT_TYPES[type],
    rawData: new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength),
  });
}

/** The same tensor with its payload at `offset` of the external file `location`. */
export function externalTensor(tensor: TensorProto, location: string, offset: number, length: number): TensorProto {
  const entry = (key: string, value: string) => create(StringStringEntryProtoSchema, { key, value });
  return create(TensorProtoSchema, {
    name: tensor.name,
    dims: tensor.dims,
    dataType: tensor.dataType,
    dataLocation: EXTERNAL,
    externalData: [entry('location', location), entry('offset', String(offset)), entry('length', String(length))],
  });
}

/** Name and type of a value. A dimension is a size, a symbol, or undefined where nothing is known. */
export function valueInfo(
  name: string,
  type: ElementTypeName,
  shape?: readonly (number | string | undefined)[],
): ValueInfoProto {
  const dimension = (size: number | string | undefined) => {
    if (typeof size === 'number' && size >= 0) return { value: { case: 'dimValue' as const, value: BigInt(size) } };
    return typeof size === 'string' && size !== '' ? { value: { case: 'dimParam' as const, value: size } } : {};
  };
  return create(ValueInfoProtoSchema, {
    name,
    type: {
      value: {
        case: 'tensorType',
        value: {
          elemType: ELEMENT_TYPES[type],
          ...(shape === undefined ? {} : { shape: { dim: shape.map(dimension) } }),
        },
      },
    },
  });
}

/** A graph output whose type the runtime infers. */
export function untypedValue(name: string): ValueInfoProto {
  return create(ValueInfoProtoSchema, { name });
}

export interface GraphParts {
  readonly name: string;
  readonly nodes: readonly NodeProto[];
  readonly inputs: readonly ValueInfoProto[];
  readonly outputs: readonly ValueInfoProto[];
  readonly initializers?: readonly TensorProto[];
  readonly valueInfo?: readonly ValueInfoProto[];
}

export function graph(parts: GraphParts): GraphProto {
  return create(GraphProtoSchema, {
    name: parts.name,
    node: [...parts.nodes],
    input: [...parts.inputs],
    output: [...parts.outputs],
    initializer: [...(parts.initializers ?? [])],
    valueInfo: [...(parts.valueInfo ?? [])],
  });
}

/** A model from nothing. */
export function model(graphProto: GraphProto, opsets: Readonly<Record<string, number>>, irVersion = 10): ModelProto {
  return create(ModelProtoSchema, {
    irVersion: BigInt(irVersion),
    graph: graphProto,
    opsetImport: Object.entries(opsets).map(([domain, version]) => ({ domain, version: BigInt(version) })),
  });
}

/** Elements of a small tensor as numbers; undefined for external payloads and for types that are no plain number. */
export function tensorNumbers(tensor: TensorProto): number[] | undefined {
  if (tensor.dataLocation === EXTERNAL) return undefined;
  const payload = fromBinary(TensorPayloadSchema, toBinary(TensorProtoSchema, tensor));
  const raw = payload.rawData;
  const read = <T>(size: number, at: (view: DataView, offset: number) => T): T[] => {
    const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
    return Array.from({ length: Math.floor(raw.byteLength / size) }, (_, i) => at(view, i * size));
  };
  switch (tensor.dataType) {
    case ELEMENT_TYPES.float32:
      return raw.length > 0 ? read(4, (view, offset) => view.getFloat32(offset, true)) : payload.floatData;
    case ELEMENT_TYPES.float64:
      return raw.length > 0 ? read(8, (view, offset) => view.getFloat64(offset, true)) : payload.doubleData;
    case ELEMENT_TYPES.float16:
      return raw.length > 0
        ? read(2, (view, offset) => float16ToNumber(view.getUint16(offset, true)))
        : payload.int32Data.map(float16ToNumber);
    case ELEMENT_TYPES.int64:
      return raw.length > 0
        ? read(8, (view, offset) => Number(view.getBigInt64(offset, true)))
        : payload.int64Data.map(Number);
    case ELEMENT_TYPES.int32:
      return raw.length > 0 ? read(4, (view, offset) => view.getInt32(offset, true)) : payload.int32Data;
    case ELEMENT_TYPES.bool:
    case ELEMENT_TYPES.uint8:
      return raw.length > 0 ? [...raw] : payload.int32Data;
    default:
      return undefined;
  }
}
