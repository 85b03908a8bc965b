/**
 * Attention as one node: MultiHeadAttention, Attention and GroupQueryAttention of `com.microsoft`, and Attention of the
 * default operator set. Where a node does more than attention (projection, bias, rotary embedding, concatenation with past
 * keys), that part becomes ordinary nodes in front of it.
 */

import { floatAttribute, type GraphIndex, intAttribute, intsAttribute } from '../model/graph.ts';
import { canonicalDomain, node as makeNode, type NodeOptions, type NodeProto, tensorProto } from '../onnx/codec.ts';
import { added, NotExact } from './additions.ts';
import { own, unknownAttribute } from './operators.ts';
import {
  type AttentionSite,
  anyOperand,
  type Detection,
  hiddenOperand,
  hiddenOrHeadsOperand,
  type Mask,
  type Operand,
  packedOperand,
  permutedOperand,
} from './site.ts';
import { sizesOf } from './views.ts';

const MICROSOFT = 'com.microsoft';
const BOOL = 9;
const INT64 = 7;

/** Collects nodes that are put in front of an attention; names come from the attention's output. */
class Prelude {
  readonly nodes: NodeProto[] = [];
  readonly #of: string;
  readonly #opset: number;

  constructor(attention: NodeProto, { opset }: GraphIndex) {
    this.#of = attention.output[0] as string;
    this.#opset = opset;
  }

  /** Adds a node and returns its output's name. */
  add(
    opType: string,
    label: string,
    inputs: readonly string[],
    options: NodeOptions & { readonly output?: string } = {},
  ): string {
    const output = options.output ?? added(label, this.#of);
    this.nodes.push(makeNode(opType, inputs, [output], options));
    return output;
  }

  /** A constant int64 vector. */
  ints(label: string, values: readonly number[]): string {
    const data = BigInt64Array.from(values, BigInt);
    const value = tensorProto('', 'int64', [values.length], data);
    return this.add('Constant', label, [], { attributes: { value } });
  }

  /** Elements `[start, end)` of an axis; bounds are int64 vectors of one element. */
  slice(label: string, value: string, start: string, end: string, axis: number): string {
    refuse(this.#opset < 10, 'parts of operands in an operator set before 10');
    return this.add('Slice', label, [value, start, end, this.ints(`${label}.axes`, [axis])]);
  }

  /** Takes the first axis, which has one element, away, or adds it. */
  firstAxis(opType: 'Squeeze' | 'Unsqueeze', label: string, value: string): string {
    return this.#opset < 13
      ? this.add(opType, label, [value], { attributes: { axes: [0] } })
      : this.add(opType, label, [value, this.ints(`${label}.axes`, [0])]);
  }

  /** `[B,L,H*D]` to `[B,L,H,D]`. */
  splitHeads(label: string, value: string, heads: number): string {
    return this.add('Reshape', label, [value, this.ints(`${label}.shape`, [0, 0, heads, -1])]);
  }

  /** `[B,L,H,D]` to `[B,H,L,D]`, or back. */
  swapHeads(label: string, value: string, output?: string): string {
    const options = { attributes: { perm: [0, 2, 1, 3] }, ...(output === undefined ? {} : { output }) };
    return this.add('Transpose', label, [value], options);
  }
}

const given = (name: string | undefined): name is string => name !== undefined && name !== '';

function refuse(condition: boolean, reason: string): void {
  if (condition) throw new NotExact(reason);
}

/** Past and present can be computed in front only if nothing else reads what the node would have written. */
function requireOnlyOutput(index: GraphIndex, value: string | undefined): void {
  refuse(given(value) && index.consumers(value).length > 0, 'present keys or values that other nodes read');
}

/** Keys or values `[B,H,L,D]` appended to the past ones; the result is the node's present output where it has one. */
function withPast(
  prelude: Prelude,
  label: string,
  past: string | undefined,
  heads4: string,
  present: string | undefined,
): string {
  const named = given(present) ? { output: present } : {};
  if (given(past)) return prelude.add('Concat', label, [past, heads4], { attributes: { axis: 2 }, ...named });
  return given(present) ? prelude.add('Identity', label, [heads4], named) : heads4;
}

type SiteParts = Pick<AttentionSite, 'heads' | 'q' | 'k' | 'v'> & Partial<AttentionSite>;

function site(index: GraphIndex, node: NodeProto, prelude: Prelude, parts: SiteParts): AttentionSite {
  for (const operand of [parts.q, parts.k, parts.v]) {
    refuse(index.constants.has(operand.value), 'an operand that is a constant');
  }
  return {
    name: nameOf(node),
    form: formOf(node),
    headDim: undefined,
    mask: undefined,
    scale: undefined,
    runtimeScales: [],
    softcap: 0,
    isCausal: false,
    causalAlignment: 'top-left',
    windowLength: undefined,
    alignedPast: undefined,
    lastKeys: undefined,
    output: node.output[0] as string,
    outputLayout: () => 'NHD',
    outputDims: ([batch, heads, length, dim]) => [batch, length, heads * dim],
    scores: undefined,
    nodes: [node],
    overrides: node.output.slice(1).filter(given),
    extra: prelude.nodes,
    ...parts,
  };
}

const nameOf = (node: NodeProto): string => node.name || (node.output[0] as string);
const formOf = (node: NodeProto): string => [canonicalDomain(node.domain), node.opType].filter(Boolean).join('.');

/** A `scale` attribute; 0 and absent both mean 1/sqrt(D). */
const scaleOf = (node: NodeProto): number | undefined => floatAttribute(node, 'scale') || undefined;

function paddingMask(node: NodeProto, prelude: Prelude, value: string): Mask {
  refuse((floatAttribute(node, 'mask_filter_value') ?? -1e4) > -1e4, 'a mask_filter_value above -10000');
  return { value: prelude.add('Cast', 'mask', [value], { attributes: { to: BOOL } }), form: 'padding' };
}

/**
 * Keys or values `[B,L,columns]` with a bias of as many columns. Where they are `[B,H,L,D]`, to which onnxruntime adds no bias, this is
 * something that may be computed and is not used.
 */
function biasedRows(prelude: Prelude, label: string, value: string, bias: string): string {
  const columns = prelude.add('Shape', `${label}.columns`, [bias]);
  const shape = [prelude.ints(`${label}.all`, [-1]), columns];
  const rows = prelude.add('Concat', `${label}.rowsShape`, shape, { attributes: { axis: 0 } });
  const biased = prelude.add('Add', `${label}.biasedRows`, [
    prelude.add('Reshape', `${label}.rows`, [value, rows]),
    bias,
  ]);
  return prelude.add('Reshape', `${label}.biased`, [biased, prelude.add('Shape', `${label}.shape`, [value])]);
}

function multiHeadAttention(index: GraphIndex, node: NodeProto): AttentionSite {
  const [query, key, value, bias, padding, attentionBias, pastKey, pastValue, pastLength, indirection] = node.input;
  const [, presentKey, presentValue, scores] = node.output;
  const heads = intAttribute(node, 'num_heads') ?? 0;
  refuse(given(pastLength) || given(indirection), 'a key-value buffer shared by past and present');
  refuse(given(scores), 'scores that are an output');
  refuse(given(padding) && given(attentionBias), 'a padding mask and an attention bias together');
  refuse(!given(query), 'no query');
  const prelude = new Prelude(node, index);
  const state = given(pastKey) || given(pastValue) || given(presentKey) || given(presentValue);
  const operands = { q: query as string, k: key, v: value };
  if (given(bias)) {
    refuse(!given(key) || !given(value), 'a bias on packed operands');
    // The bias is [q, k, v] end to end; q and k have the same width, which only the graph's run knows.
    const width = prelude.add('Gather', 'bias.width', [
      prelude.add('Shape', 'bias.shape', [operands.q]),
      prelude.ints('bias.axis', [2]),
    ]);
    const zero = prelude.ints('bias.zero', [0]);
    const end = prelude.ints('bias.end', [2 ** 31 - 1]);
    const both = prelude.add('Add', 'bias.both', [width, width]);
    const part = (name: string, from: string, to: string) => prelude.slice(`${name}.bias`, bias, from, to, 0);
    operands.q = prelude.add('Add', 'q.biased', [operands.q, part('q', zero, width)]);
    operands.k = biasedRows(prelude, 'k', key as string, part('k', width, both));
    operands.v = biasedRows(prelude, 'v', value as string, part('v', both, end));
  }
  requireOnlyOutput(index, presentKey);
  requireOnlyOutput(index, presentValue);
  const causal = (intAttribute(node, 'unidirectional') ?? 0) !== 0;
  const mask: Mask | undefined = given(attentionBias)
    ? { value: attentionBias, form: 'full' }
    : given(padding)
      ? paddingMask(node, prelude, padding)
      : undefined;
  const common = {
    heads,
    mask,
    scale: scaleOf(node),
    isCausal: causal,
    ...(causal ? { causalAlignment: 'bottom-right' as const, alignedPast: pastKey ?? '' } : {}),
  };
  if (!given(operands.k)) {
    refuse(state, 'past or present with packed operands');
    const [q, k, v] = [0, 1, 2].map((part) => packedOperand(operands.q, part, 3)) as [Operand, Operand, Operand];
    return site(index, node, prelude, { ...common, q, k, v });
  }
  const q = hiddenOperand(operands.q, heads);
  if (!given(operands.v)) {
    refuse(state, 'past or present with packed operands');
    const [k, v] = [0, 1].map((part) => packedOperand(operands.k as string, part, 2)) as [Operand, Operand];
    return site(index, node, prelude, { ...common, q, k, v });
  }
  if (!state) {
    const read = given(bias) ? hiddenOperand : hiddenOrHeadsOperand;
    const [k, v] = [operands.k, operands.v].map((name) => read(name, heads)) as [Operand, Operand];
    return site(index, node, prelude, { ...common, q, k, v });
  }
  const cached = (label: string, name: string, past: string | undefined, present: string | undefined) => {
    const split = prelude.splitHeads(`${label}.heads`, name, heads);
    const swapped = prelude.swapHeads(`${label}.swapped`, split);
    return permutedOperand(withPast(prelude, `${label}.present`, past, swapped, present), [0, 1, 2, 3]);
  };
  return site(index, node, prelude, {
    ...common,
    q,
    k: cached('k', operands.k, pastKey, presentKey),
    v: cached('v', operands.v, pastValue, presentValue),
  });
}

function microsoftAttention(index: GraphIndex, node: NodeProto): AttentionSite {
  const [input, weights, bias, maskIndex, past, attentionBias, pastLength] = node.input as [
    string,
    string,
    ...string[],
  ];
  const present = node.output[1];
  const heads = intAttribute(node, 'num_heads') ?? 0;
  refuse(given(pastLength), 'a key-value buffer shared by past and present');
  refuse((intAttribute(node, 'do_rotary') ?? 0) !== 0, 'rotary embedding inside the node');
  refuse(given(maskIndex) && given(attentionBias), 'a mask and an attention bias together');
  const prelude = new Prelude(node, index);
  const product = prelude.add('MatMul', 'projection', [input, weights]);
  const packed = given(bias) ? prelude.add('Add', 'biased', [product, bias]) : product;
  const sizes = intsAttribute(node, 'qkv_hidden_sizes');
  const parts = sizes?.length === 3 ? sizes : [1, 1, 1];
  const isCausal = (intAttribute(node, 'unidirectional') ?? 0) !== 0;
  const q = hiddenOperand(packed, heads, 0, parts);
  const common = {
    heads,
    q,
    mask: given(attentionBias)
      ? ({ value: attentionBias, form: 'full' } as const)
      : given(maskIndex)
        ? paddingMask(node, prelude, maskIndex)
        : undefined,
    scale: scaleOf(node),
    isCausal,
  };
  if (!given(past) && !given(present)) {
    const [k, v] = [1, 2].map((part) => hiddenOperand(packed, heads, part, parts)) as [Operand, Operand];
    return site(index, node, prelude, { ...common, k, v });
  }
  requireOnlyOutput(index, present);
  const [k, v] = packedState(node, prelude, packed, heads) as [string, string];
  return site(index, node, prelude, {
    ...common,
    k: permutedOperand(k, [0, 1, 2, 3]),
    v: permutedOperand(v, [0, 1, 2, 3]),
    causalAlignment: 'bottom-right',
  });
}

/** Keys and values `[B,H,P+L,D]` of an Attention whose past and present are one tensor `[2,B,H,P,D]`. */
function packedState(node: NodeProto, prelude: Prelude, packed: string, heads: number): string[] {
  refuse(intsAttribute(node, 'qkv_hidden_sizes') !== undefined, 'past or present with widths of their own');
  const past = node.input[4];
  const split = prelude.splitHeads('packed.heads', packed, 3 * heads);
  const bounds = [1, 2, 3].map((part) => prelude.ints(`packed.${part}`, [part * heads])) as [string, string, string];
  const states = ['k', 'v'].map((label, i) => {
    const part = prelude.slice(`${label}.packed`, split, bounds[i] as string, bounds[i + 1] as string, 2);
    const now = prelude.swapHeads(`${label}.swapped`, part);
    if (!given(past)) return now;
    const [from, to] = [i, i + 1].map((at) => prelude.ints(`${label}.past.${at}`, [at])) as [string, string];
    const before = prelude.firstAxis(
      'Squeeze',
      `${label}.past`,
      prelude.slice(`${label}.past.part`, past, from, to, 0),
    );
    return prelude.add('Concat', `${label}.state`, [before, now], { attributes: { axis: 2 } });
  });
  const present = node.output[1];
  if (given(present)) {
    const wide = states.map((state, i) => prelude.firstAxis('Unsqueeze', `present.${i}`, state));
    prelude.add('Concat', 'present', wide, { attributes: { axis: 0 }, output: present });
  }
  return states;
}

/** Inputs and attributes of GroupQueryAttention that change the result in ways kernels do not have. */
function refuseGroupQuery(node: NodeProto): void {
  const [positionIds, attentionBias, sink, keyScale, valueScale] = node.input.slice(9);
  refuse(given(positionIds), 'position_ids inside the node');
  refuse(given(attentionBias), 'an attention bias on a grouped causal attention');
  refuse(given(sink) || (intAttribute(node, 'smooth_softmax') ?? 0) > 0, 'a smooth softmax or sink');
  refuse(given(keyScale) || given(valueScale), 'a quantized cache');
  refuse(given(node.output[3]), 'scores that are an output');
}

function groupQueryAttention(index: GraphIndex, node: NodeProto): AttentionSite {
  const [query, key, value, pastKey, pastValue, lengths, , cos, sin] = node.input as [string, ...string[]];
  const [, presentKey, presentValue] = node.output;
  const heads = intAttribute(node, 'num_heads') ?? 0;
  const kvHeads = intAttribute(node, 'kv_num_heads') ?? 0;
  const windowLength = intAttribute(node, 'local_window_size') ?? -1;
  refuseGroupQuery(node);
  const keys = sizesOf(index, lengths);
  refuse(keys === undefined, 'no sequence lengths');
  requireOnlyOutput(index, presentKey);
  requireOnlyOutput(index, presentValue);
  const prelude = new Prelude(node, index);
  let split: [q: string, k: string, v: string];
  if (given(key) && given(value)) {
    split = [
      prelude.splitHeads('q.heads', query, heads),
      prelude.splitHeads('k.heads', key, kvHeads),
      prelude.splitHeads('v.heads', value, kvHeads),
    ];
  } else {
    const packed = prelude.splitHeads('packed.heads', query, heads + 2 * kvHeads);
    const [zero, one, two, three] = [0, heads, heads + kvHeads, heads + 2 * kvHeads].map((at, i) =>
      prelude.ints(`packed.${i}`, [at]),
    ) as [string, string, string, string];
    split = [
      prelude.slice('q.packed', packed, zero, one, 2),
      prelude.slice('k.packed', packed, one, two, 2),
      prelude.slice('v.packed', packed, two, three, 2),
    ];
  }
  let [q, k, v] = split.map((name, i) => prelude.swapHeads(`${'qkv'[i]}.swapped`, name)) as [string, string, string];
  if ((intAttribute(node, 'do_rotary') ?? 0) !== 0) {
    refuse(!given(cos) || !given(sin), 'a rotary embedding without its tables');
    const half = index.constants.get(cos as string)?.dims[1];
    refuse(half === undefined, 'rotary tables that are no constants');
    // The first new token stands behind the keys that were there: lengths + 1 - L.
    const length = prelude.add('Gather', 'rotary.length', [
      prelude.add('Shape', 'rotary.shape', [query]),
      prelude.ints('rotary.axis', [1]),
    ]);
    const keys = prelude.add('Cast', 'rotary.keys', [lengths as string], { attributes: { to: INT64 } });
    const flat = prelude.add('Reshape', 'rotary.flat', [keys, prelude.ints('rotary.minus', [-1])]);
    const zero = prelude.ints('rotary.zero', [0]);
    const one = prelude.ints('rotary.one', [1]);
    const first = prelude.slice('rotary.first', flat, zero, one, 0);
    const total = prelude.add('Add', 'rotary.total', [first, one]);
    // Negative where the first sequence is padded: then onnxruntime computes the attention, and this must run all the same.
    refuse(index.opset < 12, 'a rotary embedding in an operator set before 12');
    const position = prelude.add('Max', 'rotary.position', [
      prelude.add('Sub', 'rotary.behind', [total, length]),
      zero,
    ]);
    const rotate = (label: string, name: string, count: number) =>
      prelude.add('RotaryEmbedding', label, [name, position, cos as string, sin as string], {
        domain: MICROSOFT,
        attributes: {
          interleaved: intAttribute(node, 'rotary_interleaved') ?? 0,
          num_heads: count,
          rotary_embedding_dim: Number(half) * 2,
        },
      });
    q = rotate('q.rotated', q, heads);
    k = rotate('k.rotated', k, kvHeads);
  }
  k = withPast(prelude, 'k.present', pastKey, k, presentKey);
  v = withPast(prelude, 'v.present', pastValue, v, presentValue);
  return site(index, node, prelude, {
    heads,
    q: permutedOperand(q, [0, 1, 2, 3]),
    k: permutedOperand(k, [0, 1, 2, 3]),
    v: permutedOperand(v, [0, 1, 2, 3]),
    scale: scaleOf(node),
    softcap: floatAttribute(node, 'softcap') ?? 0,
    isCausal: true,
    causalAlignment: 'bottom-right',
    ...(windowLength > 0 ? { windowLength } : {}),
    lastKeys: keys,
  });
}

function onnxAttention(index: GraphIndex, node: NodeProto): AttentionSite {
  const [query, key, value, mask, pastKey, pastValue, nonPadded] = node.input as [string, string, string, ...string[]];
  const [, presentKey, presentValue, scores] = node.output;
  const causal = (intAttribute(node, 'is_causal') ?? 0) !== 0;
  const softcap = floatAttribute(node, 'softcap') ?? 0;
  refuse(given(scores), 'scores that are an output');
  refuse(given(nonPadded), 'lengths of padded caches');
  refuse(softcap !== 0 && (given(mask) || causal), 'a softcap together with a mask');
  requireOnlyOutput(index, presentKey);
  requireOnlyOutput(index, presentValue);
  const heads = intAttribute(node, 'q_num_heads');
  const kvHeads = intAttribute(node, 'kv_num_heads');
  const prelude = new Prelude(node, index);
  const operand = (label: string, name: string, past: string | undefined, present: string | undefined) => {
    const natural = permutedOperand(name, [0, 1, 2, 3]);
    if (!given(past) && !given(present)) {
      return kvHeads === undefined ? natural : anyOperand(hiddenOperand(name, kvHeads), natural);
    }
    const heads4 =
      kvHeads === undefined
        ? name
        : prelude.swapHeads(`${label}.swapped`, prelude.splitHeads(`${label}.heads`, name, kvHeads));
    return permutedOperand(withPast(prelude, `${label}.present`, past, heads4, present), [0, 1, 2, 3]);
  };
  const naturalQuery = permutedOperand(query, [0, 1, 2, 3]);
  return site(index, node, prelude, {
    heads,
    q: heads === undefined ? naturalQuery : anyOperand(hiddenOperand(query, heads), naturalQuery),
    k: operand('k', key, pastKey, presentKey),
    v: operand('v', value, pastValue, presentValue),
    mask: given(mask) ? { value: mask, form: 'full' } : undefined,
    scale: floatAttribute(node, 'scale'),
    softcap,
    isCausal: causal,
    ...(causal ? { causalAlignment: 'bottom-right' as const, alignedPast: pastKey ?? '' } : {}),
    outputLayout: (rank) => (rank === 3 ? 'NHD' : 'HND'),
    outputDims: ([batch, count, length, dim], rank) =>
      rank === 3 ? [batch, length, count * dim] : [batch, count, length, dim],
  });
}

const FORMS: Readonly<Record<string, (index: GraphIndex, node: NodeProto) => AttentionSite>> = {
  'com.microsoft.MultiHeadAttention': multiHeadAttention,
  'com.microsoft.Attention': microsoftAttention,
  'com.microsoft.GroupQueryAttention': groupQueryAttention,
  Attention: onnxAttention,
};

/** Nodes of attention, or of its softmax, that have no equivalent here, and why. */
const LEFT: Readonly<Record<string, string>> = {
  'com.microsoft.BiasSoftmax': 'a softmax with its mask inside the node',
  'com.microsoft.DecoderAttention': 'projections and a cache inside the node',
  'com.microsoft.QLinearSoftmax': 'a quantized softmax',
  'com.microsoft.QOrderedAttention': 'quantized weights inside the node',
  'com.microsoft.QOrderedLongformerAttention': 'global and local attention mixed',
  'com.microsoft.QAttention': 'quantized weights inside the node',
  'com.microsoft.PackedAttention': 'packed batches inside the node',
  'com.microsoft.PackedMultiHeadAttention': 'packed batches inside the node',
  'com.microsoft.DecoderMaskedMultiHeadAttention': 'a key-value buffer shared by past and present',
  'com.microsoft.DecoderMaskedSelfAttention': 'a key-value buffer shared by past and present',
  'com.microsoft.SparseAttention': 'block-sparse attention',
  'com.microsoft.PagedAttention': 'a paged cache',
  'com.microsoft.LongformerAttention': 'global and local attention mixed',
};

/** The attention that a node is; undefined for any other node. */
export function detectFused(index: GraphIndex, node: NodeProto): Detection | undefined {
  const form = formOf(node);
  const heads = intAttribute(node, 'num_heads') ?? intAttribute(node, 'q_num_heads');
  const left = (reason: string): Detection => ({
    left: { name: nameOf(node), form, heads, headDim: undefined, reason },
  });
  const reason = own(LEFT, form);
  if (reason !== undefined) return left(reason);
  const read = own(FORMS, form);
  if (read === undefined) return undefined;
  const attribute = unknownAttribute(node);
  if (attribute !== undefined) return left(`attribute '${attribute}' of ${form}`);
  try {
    return { site: read(index, node) };
  } catch (error) {
    if (error instanceof NotExact) return left(error.message);
    throw error;
  }
}
