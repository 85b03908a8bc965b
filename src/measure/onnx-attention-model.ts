/** ONNX models of one attention, written byte by byte: what onnxruntime is measured with, in Node and in a browser. */

/** Wire format of protocol buffers: varints, and fields with their number and type in front. */
const varint = (value: number): number[] =>
  value < 128 ? [value] : [(value % 128) + 128, ...varint(Math.floor(value / 128))];
const message = (field: number, ...parts: readonly (readonly number[])[]): number[] => {
  const bytes = parts.flat();
  return [...varint(field * 8 + 2), ...varint(bytes.length), ...bytes];
};
const text = (field: number, value: string) => message(field, [...new TextEncoder().encode(value)]);
const int = (field: number, value: number) => [...varint(field * 8), ...varint(value)];

/** Numbers of `TensorProto.DataType`. */
const ELEMENT_TYPES = { float32: 1, float16: 10 } as const;
const ATTRIBUTE_INT = 2;

/** ONNX ValueInfoProto of a tensor with free dimensions. */
const value = (name: string, elementType: number, dimensions: readonly string[]): number[][] => [
  text(1, name),
  message(
    2,
    message(1, int(1, elementType), message(2, ...dimensions.map((dimension) => message(1, text(2, dimension))))),
  ),
];

export interface AttentionModelOptions {
  /** Of all tensors; default float32. */
  readonly dtype?: keyof typeof ELEMENT_TYPES;
  /** A fourth input `bias`, `[B,1,L,L]`; default none. */
  readonly withBias?: boolean;
}

/** A model of one `com.microsoft.MultiHeadAttention`: inputs q, k and v and the `output`, `[B,L,H*D]` each. */
export function attentionModel(
  heads: number,
  { dtype = 'float32', withBias = false }: AttentionModelOptions = {},
): Uint8Array {
  const element = ELEMENT_TYPES[dtype];
  const inputs = ['q', 'k', 'v'];
  // Inputs four and five, a projection bias and a key padding mask, are left empty.
  const names = withBias ? [...inputs, '', '', 'bias'] : inputs;
  const node = message(
    1,
    ...names.map((name) => text(1, name)),
    text(2, 'output'),
    text(4, 'MultiHeadAttention'),
    message(5, text(1, 'num_heads'), int(3, heads), int(20, ATTRIBUTE_INT)),
    text(7, 'com.microsoft'),
  );
  const graph = message(
    7,
    node,
    text(2, 'attention'),
    ...inputs.map((name) => message(11, ...value(name, element, ['batch', 'length', 'width']))),
    ...(withBias ? [message(11, ...value('bias', element, ['batch', 'one', 'length', 'keys']))] : []),
    message(12, ...value('output', element, ['batch', 'length', 'width'])),
  );
  const operators = (domain: string, version: number) => message(8, text(1, domain), int(2, version));
  return Uint8Array.from([...int(1, 8), ...graph, ...operators('', 17), ...operators('com.microsoft', 1)]);
}
