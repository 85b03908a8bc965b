/**
 * The operators that detection reads, each with the attributes whose meaning it knows and the values that it understands. A node with
 * anything else (an attribute of a later operator set, say) may be another function: it is read by nothing here.
 */

import { isOp } from '../model/graph.ts';
import { ATTRIBUTE_TYPES, type AttributeProto, canonicalDomain, type NodeProto } from '../onnx/codec.ts';

type Check = (attribute: AttributeProto) => boolean;

const anyInt: Check = ({ type }) => type === ATTRIBUTE_TYPES.int;
const count: Check = (attribute) => anyInt(attribute) && attribute.i > 0n;
const flag: Check = (attribute) => anyInt(attribute) && (attribute.i === 0n || attribute.i === 1n);
const zero: Check = (attribute) => anyInt(attribute) && attribute.i === 0n;
const anyInts: Check = ({ type }) => type === ATTRIBUTE_TYPES.ints;
const finite: Check = ({ type, f }) => type === ATTRIBUTE_TYPES.float && Number.isFinite(f);
const notNegative: Check = (attribute) => finite(attribute) && attribute.f >= 0;
const text: Check = ({ type }) => type === ATTRIBUTE_TYPES.string;
const permutation: Check = (attribute) =>
  anyInts(attribute) &&
  attribute.ints.map(Number).every((axis, _, axes) => axis >= 0 && axis < axes.length) &&
  new Set(attribute.ints).size === attribute.ints.length;
/** A string of whatever value, or a number: it has a meaning only together with inputs or attributes that are refused. */
const anything: Check = () => true;

type Attributes = Readonly<Record<string, Check>>;

const NONE: Attributes = {};
const REDUCTION: Attributes = { axes: anyInts, keepdims: flag, noop_with_empty_axes: flag };

const DEFAULT_DOMAIN: Readonly<Record<string, Attributes>> = {
  ...Object.fromEntries(
    'Abs Add And Div Equal Exp Expand Identity IsNaN MatMul Max Min Mul Neg Not Pow Reciprocal Sqrt Sub Sum Tanh Where'
      .split(' ')
      .map((name) => [name, NONE]),
  ),
  Attention: {
    is_causal: flag,
    kv_num_heads: count,
    q_num_heads: count,
    // Concerns an output that is refused if anything reads it.
    qk_matmul_output_mode: anything,
    scale: notNegative,
    softcap: notNegative,
    softmax_precision: anyInt,
  },
  Cast: { to: count, saturate: flag, round_mode: text },
  Concat: { axis: anyInt },
  Constant: {},
  Dropout: { ratio: finite, seed: anyInt },
  Einsum: { equation: text },
  Gather: { axis: anyInt },
  ReduceMax: REDUCTION,
  ReduceSum: REDUCTION,
  Reshape: { allowzero: zero },
  Shape: { start: anyInt, end: anyInt },
  Size: {},
  Slice: { axes: anyInts, ends: anyInts, starts: anyInts },
  Softmax: { axis: anyInt },
  Split: { axis: anyInt, num_outputs: count, split: anyInts },
  Squeeze: { axes: anyInts },
  Tile: {},
  Transpose: { perm: permutation },
  Unsqueeze: { axes: anyInts },
};

const MICROSOFT: Readonly<Record<string, Attributes>> = {
  Attention: {
    do_rotary: flag,
    mask_filter_value: finite,
    num_heads: count,
    past_present_share_buffer: zero,
    qkv_hidden_sizes: (attribute) => anyInts(attribute) && attribute.ints.every((size) => size > 0n),
    // Concerns a rotary embedding, which is refused.
    rotary_embedding_dim: anything,
    scale: notNegative,
    unidirectional: flag,
  },
  FusedMatMul: { alpha: finite, transA: flag, transB: flag, transBatchA: zero, transBatchB: zero },
  GroupQueryAttention: {
    do_rotary: flag,
    // Concerns a quantized cache, whose scales are refused.
    k_quant_type: (attribute) => new TextDecoder().decode(attribute.s) === 'NONE',
    kv_cache_bit_width: anything,
    kv_num_heads: count,
    local_window_size: (attribute) => anyInt(attribute) && (attribute.i === -1n || attribute.i > 0n),
    num_heads: count,
    // Concerns an output that is refused.
    qk_output: anything,
    rotary_interleaved: flag,
    scale: notNegative,
    smooth_softmax: (attribute) => anyInt(attribute) && attribute.i <= 1n,
    softcap: notNegative,
    v_quant_type: (attribute) => new TextDecoder().decode(attribute.s) === 'NONE',
  },
  MultiHeadAttention: { mask_filter_value: finite, num_heads: count, scale: notNegative, unidirectional: flag },
};

const DOMAINS: Readonly<Record<string, Readonly<Record<string, Attributes>>>> = {
  '': DEFAULT_DOMAIN,
  'com.microsoft': MICROSOFT,
};

/** An entry of a table; names of operators and attributes come from the model, and may equal names of an object's own members. */
export const own = <T>(table: Readonly<Record<string, T>>, name: string): T | undefined =>
  Object.hasOwn(table, name) ? table[name] : undefined;

/** True for an operator that would be read by its name although a model has a function of that name. */
export function isRead(domain: string, opType: string): boolean {
  const canonical = canonicalDomain(domain);
  return canonical === '' || own(own(DOMAINS, canonical) ?? {}, opType) !== undefined;
}

/** The attribute for which a node is another function than its operator's name says; undefined for a node that is understood. */
export function unknownAttribute(node: NodeProto): string | undefined {
  const known = own(own(DOMAINS, canonicalDomain(node.domain)) ?? {}, node.opType) ?? NONE;
  const seen = new Set<string>();
  return node.attribute.find((attribute) => {
    const isOnce = !seen.has(attribute.name) && attribute.refAttrName === '';
    seen.add(attribute.name);
    return !isOnce || own(known, attribute.name)?.(attribute) !== true;
  })?.name;
}

/** True for a node of an operator whose attributes are all understood. */
export function is(node: NodeProto, opType: string, domain?: string): boolean;
export function is(node: NodeProto | undefined, opType: string, domain?: string): node is NodeProto;
export function is(node: NodeProto | undefined, opType: string, domain?: string): boolean {
  return isOp(node, opType, domain) && unknownAttribute(node) === undefined;
}
