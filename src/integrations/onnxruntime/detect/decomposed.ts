/**
 * Attention written as MatMul, scale, mask, Softmax, MatMul, in the spelling of any exporter. Matching starts at a Softmax
 * and follows the values up to q, k and the mask and down to v and the output. Every step is an identity that holds for all
 * inputs; what is not provable stays outside (its value becomes an operand) or makes the whole match fail.
 */

import { canonicalDomain, node as makeNode, type NodeProto } from '../model/codec.ts';
import { constantScalar, uniformOf } from '../model/constants.ts';
import { floatAttribute, type GraphIndex, intAttribute, intsAttribute, isOp, stringAttribute } from '../model/graph.ts';
import { kindOf } from '../model/types.ts';
import { graphFunction } from '../model/walk.ts';
import { type Repeat, repeatedHeads } from './repeats.ts';
import {
  type AttentionSite,
  type Detection,
  naturalOperand,
  type Operand,
  permutedOperand,
  type RuntimeScale,
  type ScoresShape,
} from './site.ts';
import { type Sizes, sizesOf, sourceOf } from './views.ts';

/** A score at or below this, beside any unmasked score, has a probability of 0 in every float type. */
const MASKED_SCORE = -1e4;
/** The same where a factor follows that is known only when the graph runs: arithmetic on sizes of tensors. */
const MASKED_BEFORE_FACTOR = -1e30;

const FORM = 'MatMul-Softmax-MatMul';

/** Names for values that a rewrite adds; made from what they are computed from, so that layers share them. */
export const added = (what: string, ...of: readonly string[]): string => `sageattention/${what}/${of.join('+')}`;

class NotExact extends Error {}

type Axes = readonly [batch: number, heads: number, length: number, dim: number];

interface Product {
  readonly node: NodeProto;
  readonly left: string;
  readonly right: string;
  /** Axes of each operand in `[B,H,row,column]` terms; undefined: natural MatMul axes of any rank. */
  readonly leftAxes: Axes | undefined;
  readonly rightAxes: Axes | undefined;
  readonly outAxes: Axes | undefined;
  readonly alpha: number;
  /** The right operand is `[.., column, contraction]` instead of MatMul's `[.., contraction, column]`. */
  readonly rightTransposed: boolean;
}

/**
 * Reads MatMul, FusedMatMul and two-operand Einsum as batched products. Of an Einsum, `left` names the operand that comes
 * first in the product; by default the one that does not have the output's last axis.
 */
function asProduct(node: NodeProto | undefined, leftValue?: string): Product | undefined {
  if (node === undefined) return undefined;
  const [left, right] = node.input as [string, string];
  const plain = { node, left, right, leftAxes: undefined, rightAxes: undefined, outAxes: undefined };
  if (isOp(node, 'MatMul')) return { ...plain, alpha: 1, rightTransposed: false };
  if (isOp(node, 'FusedMatMul', 'com.microsoft')) {
    const unusual = ['transA', 'transBatchA', 'transBatchB'].some((name) => (intAttribute(node, name) ?? 0) !== 0);
    if (unusual) return undefined;
    const rightTransposed = (intAttribute(node, 'transB') ?? 0) !== 0;
    return { ...plain, alpha: floatAttribute(node, 'alpha') ?? 1, rightTransposed };
  }
  return isOp(node, 'Einsum') ? einsumProduct(node, leftValue) : undefined;
}

function einsumProduct(node: NodeProto, leftValue: string | undefined): Product | undefined {
  const equation = (stringAttribute(node, 'equation') ?? '').replaceAll(' ', '');
  const match = /^([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)$/.exec(equation);
  if (match === null) return undefined;
  const [, first, second, out] = match as unknown as [string, string, string, string];
  const swap = leftValue === undefined ? first.includes(out.at(-1) as string) : node.input[1] === leftValue;
  const [a, b] = swap ? [second, first] : [first, second];
  const [left, right] = (swap ? [node.input[1], node.input[0]] : node.input) as [string, string];
  const regular = [a, b, out].every((letters) => letters.length === out.length && new Set(letters).size === out.length);
  const only = (letters: string, ...excluded: string[]) =>
    [...letters].filter((letter) => excluded.every((other) => !other.includes(letter)));
  const row = only(a, b);
  const column = only(b, a);
  const contraction = only(a, out);
  const batch = only(out, row.join(''), column.join(''));
  if (!regular || row.length !== 1 || column.length !== 1 || contraction.length !== 1) return undefined;
  if (batch.length === 1) {
    const natural = a === [...batch, ...row, ...contraction].join('') && out === [...batch, ...row, ...column].join('');
    const rightTransposed = b === [...batch, ...column, ...contraction].join('');
    if (!natural || !(rightTransposed || b === [...batch, ...contraction, ...column].join(''))) return undefined;
    const axes = { leftAxes: undefined, rightAxes: undefined, outAxes: undefined };
    return { node, left, right, ...axes, alpha: 1, rightTransposed };
  }
  if (batch.length !== 2) return undefined;
  const axes = (letters: string, ...order: string[]) =>
    order.map((letter) => letters.indexOf(letter)) as unknown as Axes;
  return {
    node,
    left,
    right,
    leftAxes: axes(a, ...batch, ...row, ...contraction),
    rightAxes: axes(b, ...batch, ...column, ...contraction),
    outAxes: axes(out, ...batch, ...row, ...column),
    alpha: 1,
    rightTransposed: true,
  };
}

interface Probabilities {
  /** From the Softmax to the product with v, the product left out. */
  readonly nodes: readonly NodeProto[];
  readonly reshapes: readonly Sizes[];
  readonly product: Product;
}

/** Follows the probabilities down to the product with v. */
function followProbabilities(index: GraphIndex, softmax: NodeProto): Probabilities | undefined {
  const nodes: NodeProto[] = [];
  const reshapes: Sizes[] = [];
  let value = softmax.output[0] as string;
  for (;;) {
    const guarded = nanGuard(index, value);
    const next = guarded?.at(-1) ?? index.soleConsumer(value);
    if (next === undefined) return undefined;
    if (guarded !== undefined) nodes.push(...guarded);
    else if (isFloatCast(next) || isOp(next, 'Identity') || isInferenceDropout(index, next)) nodes.push(next);
    else if (isOp(next, 'Reshape') && next.input[0] === value) {
      const sizes = reshapeSizes(index, next);
      if (sizes === undefined) return undefined;
      nodes.push(next);
      reshapes.push(sizes);
    } else {
      const product = asProduct(next, value);
      return product !== undefined && product.left === value && product.right !== value
        ? { nodes, reshapes, product }
        : undefined;
    }
    value = next.output[0] as string;
  }
}

const isFloatCast = (node: NodeProto): boolean =>
  isOp(node, 'Cast') && kindOf(intAttribute(node, 'to') ?? 0) === 'float';

/** Undefined for a Reshape whose zeros are sizes. */
const reshapeSizes = (index: GraphIndex, node: NodeProto): Sizes | undefined =>
  (intAttribute(node, 'allowzero') ?? 0) === 0 ? sizesOf(index, node.input[1]) : undefined;

/** `Where(IsNaN(p), 0, p)`: PyTorch's way to give rows with nothing to attend to an output of 0, which is ours too. */
function nanGuard(index: GraphIndex, value: string): NodeProto[] | undefined {
  const users = index.consumers(value);
  const test = users.find((user) => isOp(user, 'IsNaN'));
  const where = users.find((user) => isOp(user, 'Where'));
  if (users.length !== 2 || test === undefined || where === undefined || index.outputs.has(value)) return undefined;
  const [condition, yes, no] = where.input;
  const matches = condition === test.output[0] && no === value && yes !== undefined && constantScalar(index, yes) === 0;
  return matches && index.soleConsumer(condition as string) === where ? [test, where] : undefined;
}

function isInferenceDropout(index: GraphIndex, node: NodeProto): boolean {
  const training = node.input[2];
  return isOp(node, 'Dropout') && (training === undefined || training === '' || constantScalar(index, training) === 0);
}

interface FoundMask {
  readonly value: string;
  readonly kind: 'boolean' | 'additive';
  /** What masked scores become; of boolean masks only. */
  readonly fill: string;
  /** Reshapes between the Softmax and the mask. */
  readonly reshapes: number;
  /** Casts between the Softmax and the mask: masks with other ones between them are of other types. */
  readonly casts: number;
}

/** A constant beside the scores. */
interface ScoresOperand {
  readonly dims: Sizes;
  /** Reshapes between the Softmax and it. */
  readonly reshapes: number;
}

interface ScoresState {
  readonly nodes: readonly NodeProto[];
  readonly scale: number;
  readonly runtimeScales: readonly RuntimeScale[];
  readonly softcap: number;
  /** The last applied first. */
  readonly masks: readonly FoundMask[];
  /** From the product to the Softmax. */
  readonly reshapes: readonly Sizes[];
  readonly casts: number;
  readonly operands: readonly ScoresOperand[];
  /** Nodes that compute masks in the form that kernels take. */
  readonly extra: readonly NodeProto[];
}

interface Scores extends ScoresState {
  readonly product: Product;
}

/**
 * Follows the scores up to the product of q and k. Undefined where the way leads elsewhere.
 *
 * @throws {NotExact} at a step that kernels have no equivalent of
 */
function followScores(index: GraphIndex, value: string, state: ScoresState): Scores | undefined {
  const node = index.producer(value);
  if (node === undefined || index.soleConsumer(value) === undefined) return undefined;
  const next: ScoresState = { ...state, nodes: [node, ...state.nodes] };
  const product = asProduct(node);
  if (product !== undefined) return { ...next, product, scale: state.scale * product.alpha };
  const [a, b] = node.input as [string, string];
  if (isFloatCast(node)) return followScores(index, a, { ...next, casts: state.casts + 1 });
  if (isOp(node, 'Identity')) return followScores(index, a, next);
  if (isOp(node, 'Reshape')) {
    const sizes = reshapeSizes(index, node);
    if (sizes === undefined) return undefined;
    return followScores(index, a, { ...next, reshapes: [sizes, ...state.reshapes] });
  }
  if (isOp(node, 'Where')) return followWhere(index, node, next);
  if (isOp(node, 'Add')) {
    return followAdd(index, next, a, b) ?? followAdd(index, next, b, a);
  }
  if (isOp(node, 'Sub')) {
    const negated = added('neg', b);
    const extra = [...state.extra, makeNode('Neg', [b], [negated])];
    return followAdd(index, { ...next, extra }, a, negated);
  }
  if (isOp(node, 'Max') && node.input.length === 2) {
    // Lifts -Infinity to a finite floor, which gives a probability of 0 as well.
    return isMasked(index, b, state) ? followScores(index, a, beside(index, next, b)) : undefined;
  }
  if (isOp(node, 'Tanh')) {
    // A tanh(B x) is softcap A of scores scaled by A B.
    if (state.softcap !== 0 || state.runtimeScales.length > 0 || !(state.scale > 0 && Number.isFinite(state.scale)))
      throw new NotExact('a softcap of another kind');
    return followScores(index, a, { ...next, softcap: state.scale });
  }
  const scaled = scaleStep(index, node);
  return (
    scaled &&
    followScores(index, scaled.value, {
      ...(scaled.factor === undefined ? next : withOperand(next, scaled.factor.dims)),
      scale: state.scale * (scaled.factor?.number ?? 1),
      runtimeScales: [...state.runtimeScales, ...scaled.runtime],
    })
  );
}

const withOperand = (state: ScoresState, dims: Sizes): ScoresState => ({
  ...state,
  operands: [...state.operands, { dims, reshapes: state.reshapes.length }],
});

/** The state with a constant operand in it, whose dimensions are read when the graph runs if need be. */
function beside(index: GraphIndex, state: ScoresState, value: string): ScoresState {
  const dims = uniformOf(index, value)?.dims;
  if (dims !== undefined) return withOperand(state, dims);
  const shape = added('shape', value);
  return withOperand({ ...state, extra: [...state.extra, makeNode('Shape', [value], [shape])] }, shape);
}

/** True for a number that gives a probability of 0 whatever the state's factors make of it. */
function isMasked(index: GraphIndex, value: string, { scale, runtimeScales }: ScoresState): boolean {
  const fill = constantScalar(index, value);
  const bound = runtimeScales.length > 0 ? MASKED_BEFORE_FACTOR : MASKED_SCORE;
  return fill !== undefined && fill <= bound && fill * scale <= bound;
}

/** Of the two sides of an Add, one leads to the product; the other is a mask or bias. */
function followAdd(index: GraphIndex, state: ScoresState, scores: string, mask: string): Scores | undefined {
  if (index.constants.has(scores)) return undefined;
  const place = { reshapes: state.reshapes.length, casts: state.casts };
  const masks: FoundMask[] = [...state.masks, { value: mask, kind: 'additive', fill: '', ...place }];
  const found = followScores(index, scores, { ...state, masks });
  if (found !== undefined && state.softcap !== 0) throw new NotExact('a mask added before the softcap');
  if (found !== undefined && (state.scale !== 1 || state.runtimeScales.length > 0)) {
    throw new NotExact('a mask added before the scale');
  }
  return found;
}

function followWhere(index: GraphIndex, node: NodeProto, state: ScoresState): Scores | undefined {
  const [condition, yes, no] = node.input as [string, string, string];
  const isFill = (value: string) => isMasked(index, value, state);
  const masked = (value: string, fill: string): ScoresState => ({
    ...beside(index, state, fill),
    masks: [...state.masks, { value, kind: 'boolean', fill, reshapes: state.reshapes.length, casts: state.casts }],
  });
  let found: Scores | undefined;
  if (isFill(no)) found = followScores(index, yes, masked(condition, no));
  else if (isFill(yes)) {
    const attended = added('not', condition);
    const state = masked(attended, yes);
    const extra = [...state.extra, makeNode('Not', [condition], [attended])];
    found = followScores(index, no, { ...state, extra });
  }
  if (found !== undefined && state.softcap !== 0) throw new NotExact('a mask applied before the softcap');
  return found;
}

interface ScaleStep {
  readonly value: string;
  /** Undefined where only a run shows it. */
  readonly factor: { readonly number: number; readonly dims: readonly number[] } | undefined;
  readonly runtime: readonly RuntimeScale[];
}

/** Reads Mul and Div by one number, known now or when the graph runs. */
function scaleStep(index: GraphIndex, node: NodeProto): ScaleStep | undefined {
  const inverse = isOp(node, 'Div');
  if (!inverse && !isOp(node, 'Mul')) return undefined;
  const [a, b] = node.input as [string, string];
  const orders = inverse ? [[a, b] as const] : [[a, b] as const, [b, a] as const];
  for (const [value, scale] of orders) {
    const { number, dims } = uniformOf(index, scale) ?? {};
    if (number === undefined || dims === undefined) continue;
    return { value, factor: { number: inverse ? 1 / number : number, dims }, runtime: [] };
  }
  for (const [value, scale] of orders) {
    if (isRuntimeScalar(index, scale)) return { value, factor: undefined, runtime: [{ value: scale, inverse }] };
  }
  return undefined;
}

const SHAPE_ARITHMETIC = new Set(
  'Cast Sqrt Div Mul Add Sub Pow Reciprocal Gather Slice Squeeze Unsqueeze Identity Constant Reshape Concat'.split(' '),
);

const isRuntimeScalar = (index: GraphIndex, value: string): boolean =>
  !index.constants.has(value) && dependsOnShapesOnly(index, value);

/** True for arithmetic on sizes of tensors, such as the `sqrt(Shape(q)[-1])` that PyTorch writes for a dynamic head dim. */
const dependsOnShapesOnly = graphFunction<boolean>({
  cyclic: false,
  dependencies(index, value) {
    const node = index.constants.has(value) ? undefined : index.producer(value);
    return node !== undefined && SHAPE_ARITHMETIC.has(node.opType) ? index.readsOf(node) : [];
  },
  result(index, value, of) {
    if (index.constants.has(value)) return true;
    const node = index.producer(value);
    if (node === undefined || canonicalDomain(node.domain) !== '') return false;
    if (node.opType === 'Shape' || node.opType === 'Size') return true;
    return SHAPE_ARITHMETIC.has(node.opType) && index.readsOf(node).every(of);
  },
});

interface Peeled {
  readonly value: string;
  /** Undefined: natural axes, of rank 3 or 4. */
  readonly axes: Axes | undefined;
  readonly scale: number;
  readonly nodes: readonly NodeProto[];
  /** Of `value`, whose heads the graph repeats. */
  readonly repeat?: { readonly of: Repeat; readonly axes: Axes };
}

const NATURAL: Axes = [0, 1, 2, 3];

/**
 * Goes up from an operand through transposes, constant factors and repeated key heads as long as the channels stay
 * contiguous in what is found. `axes` are those of `[B,H,L,D]` in `value`.
 */
function peel(
  index: GraphIndex,
  start: Peeled,
  options: { readonly scales: boolean; readonly repeats: boolean },
): Peeled {
  let best = start;
  let current = start;
  for (;;) {
    const node = index.producer(current.value);
    if (node === undefined) return best;
    const nodes = [node, ...current.nodes];
    const scaled = options.scales ? scaleStep(index, node) : undefined;
    const repeats = options.repeats && current.repeat === undefined;
    const axes = current.axes ?? NATURAL;
    const repeated = repeats ? repeatedHeads(index, node, axes[1]) : undefined;
    if (isOp(node, 'Identity')) current = { ...current, value: node.input[0] as string, nodes };
    else if (isOp(node, 'Transpose')) {
      const permutation = intsAttribute(node, 'perm');
      if (permutation?.length !== 4) return best;
      const permuted = axes.map((axis) => permutation[axis] as number) as unknown as Axes;
      current = { ...current, value: node.input[0] as string, axes: permuted, nodes };
    } else if (scaled?.factor !== undefined && isOneNumber(scaled.factor.dims)) {
      current = { ...current, value: scaled.value, scale: current.scale * scaled.factor.number, nodes };
    } else if (repeated !== undefined) {
      const { value } = repeated;
      current = {
        ...current,
        value,
        axes,
        nodes: [...repeated.nodes, ...current.nodes],
        repeat: { of: repeated, axes },
      };
    } else return best;
    if (current.axes === undefined || current.axes[3] === 3) best = current;
  }
}

/** A factor that gives no operand, which has three dimensions at least, another shape. */
const isOneNumber = (dims: readonly number[]) => dims.length <= 3 && dims.every((size) => size === 1);

function operandOf({ value, axes, repeat }: Peeled): Operand {
  const operand = axes === undefined ? naturalOperand(value) : permutedOperand(value, axes);
  if (repeat === undefined) return operand;
  return {
    ...operand,
    parameters: repeat.of.parameters,
    view: (tensor, numbers) => {
      const view = operand.view(tensor, numbers);
      // In the order of the axes where heads are repeated.
      const shape = view && [0, 1, 2, 3].map((axis) => view.shape[repeat.axes.indexOf(axis)] as number);
      const repeats = shape && repeat.of.count(shape, numbers);
      return repeats === undefined ? undefined : view && { ...view, repeats };
    },
  };
}

/** k as `[B,H,L,D]`: a MatMul's right operand is `[.., D, L]`, so a transpose must be found or added. */
function keyOperand(index: GraphIndex, product: Product): { peeled: Peeled; operand: Operand; extra: NodeProto[] } {
  const { right, rightAxes, rightTransposed } = product;
  if (rightTransposed) {
    const start: Peeled = { value: right, axes: rightAxes, scale: 1, nodes: [] };
    if (rightAxes !== undefined && rightAxes[3] !== 3) throw new NotExact('keys whose channels are not contiguous');
    const peeled = peel(index, start, { scales: true, repeats: true });
    return { peeled, operand: operandOf(peeled), extra: [] };
  }
  const start: Peeled = { value: right, axes: [0, 1, 3, 2], scale: 1, nodes: [] };
  const peeled = peel(index, start, { scales: true, repeats: true });
  if (peeled.axes?.[3] === 3) return { peeled, operand: operandOf(peeled), extra: [] };
  const transpose = index.producer(right);
  const permutation = isOp(transpose, 'Transpose') ? intsAttribute(transpose, 'perm') : undefined;
  if (transpose !== undefined && permutation?.join() === '0,2,1') {
    const value = transpose.input[0] as string;
    const found: Peeled = { value, axes: undefined, scale: 1, nodes: [transpose] };
    const deeper = peel(index, found, { scales: true, repeats: false });
    const result = deeper.axes === undefined ? deeper : found;
    return { peeled: result, operand: naturalOperand(result.value), extra: [] };
  }
  // A Transpose of all axes of a packed projection, say: the channels are contiguous where it was computed.
  if (sourceOf(index, right, 1, 4) !== undefined) {
    const operand = permutedOperand(right, [0, 1, 3, 2]);
    return { peeled: { value: right, axes: undefined, scale: 1, nodes: [] }, operand, extra: [] };
  }
  if (index.opset < 12) throw new NotExact('keys stored transposed in an operator set without Einsum');
  const value = added('transposed', right);
  return {
    peeled: { value: right, axes: undefined, scale: 1, nodes: [] },
    operand: naturalOperand(value),
    extra: [makeNode('Einsum', [right], [value], { attributes: { equation: '...ij->...ji' } })],
  };
}

/** One mask out of several, in nodes to add to the graph. */
function combineMasks(index: GraphIndex, { masks }: Scores, extra: NodeProto[]): FoundMask | undefined {
  if (new Set(masks.map(({ reshapes }) => reshapes)).size > 1) throw new NotExact('masks of scores of several shapes');
  const compute = (opType: string, inputs: string[]) => {
    const result = added(opType.toLowerCase(), ...inputs);
    extra.push(makeNode(opType, inputs, [result]));
    return result;
  };
  const numbersOf = (mask: FoundMask) => (mask.kind === 'additive' ? mask.value : mask.fill);
  const combine = (outer: FoundMask, mask: FoundMask): Pick<FoundMask, 'kind' | 'value'> => {
    if (outer.kind === 'boolean' && mask.kind === 'boolean') {
      return { kind: 'boolean', value: compute('And', [outer.value, mask.value]) };
    }
    let numbers = numbersOf(mask);
    if (mask.casts !== outer.casts) {
      if (index.opset < 15) throw new NotExact('masks of several types in an operator set without CastLike');
      numbers = compute('CastLike', [numbers, numbersOf(outer)]);
    }
    if (outer.kind === 'boolean') {
      return { kind: 'additive', value: compute('Where', [outer.value, numbers, outer.fill]) };
    }
    const value =
      mask.kind === 'additive'
        ? compute('Add', [outer.value, numbers])
        : compute('Where', [mask.value, outer.value, numbers]);
    return { kind: 'additive', value };
  };
  let combined: FoundMask | undefined;
  for (const mask of masks) {
    combined = combined === undefined ? mask : { ...combined, ...combine(combined, mask) };
  }
  return combined;
}

/** The last axis as Softmax names it: the rank that the scores must then have, undefined for -1, null for another axis. */
function softmaxRank(softmax: NodeProto, opset: number): number | undefined | null {
  const axis = intAttribute(softmax, 'axis') ?? (opset >= 13 ? -1 : 1);
  if (axis === -1) return undefined;
  return axis === 2 || axis === 3 ? axis + 1 : null;
}

interface Output {
  readonly value: string;
  readonly layout: 'HND' | 'NHD';
  readonly nodes: readonly NodeProto[];
}

/** Takes in a transpose of the heads behind the product, so that kernels write what the graph wants. */
function outputOf(index: GraphIndex, product: Product): Output {
  const value = product.node.output[0] as string;
  const order = product.outAxes?.join();
  if ((product.leftAxes ?? NATURAL).join() !== NATURAL.join()) throw new NotExact('probabilities with permuted axes');
  if (order === '0,2,1,3') return { value, layout: 'NHD', nodes: [product.node] };
  if (order !== undefined && order !== '0,1,2,3') throw new NotExact(`an output with axes ordered ${order}`);
  const transpose = index.soleConsumer(value);
  if (isOp(transpose, 'Transpose') && intsAttribute(transpose, 'perm')?.join() === '0,2,1,3') {
    return { value: transpose.output[0] as string, layout: 'NHD', nodes: [product.node, transpose] };
  }
  return { value, layout: 'HND', nodes: [product.node] };
}

function buildSite(index: GraphIndex, softmax: NodeProto, scores: Scores, probabilities: Probabilities): AttentionSite {
  const { product } = scores;
  if ((product.outAxes ?? NATURAL).join() !== NATURAL.join()) throw new NotExact('scores with permuted axes');
  const extra = [...scores.extra];
  const qStart: Peeled = { value: product.left, axes: product.leftAxes, scale: 1, nodes: [] };
  if (product.leftAxes !== undefined && product.leftAxes[3] !== 3)
    throw new NotExact('queries whose channels are not contiguous');
  const q = peel(index, qStart, { scales: true, repeats: false });
  const k = keyOperand(index, product);
  extra.push(...k.extra);
  // An Einsum's right operand is [B,H,column,contraction] in `rightAxes`; for v the contraction is the token.
  const { right, rightAxes, rightTransposed } = probabilities.product;
  if (rightTransposed && rightAxes === undefined) throw new NotExact('values stored transposed');
  const vAxes: Axes | undefined = rightAxes && [rightAxes[0], rightAxes[1], rightAxes[3], rightAxes[2]];
  if (vAxes !== undefined && vAxes[3] !== 3) throw new NotExact('values whose channels are not contiguous');
  const v = peel(index, { value: right, axes: vAxes, scale: 1, nodes: [] }, { scales: false, repeats: true });
  if (probabilities.product.alpha !== 1) throw new NotExact('a factor on the product with the values');
  if ([q, k.peeled, v].some((operand) => index.constants.has(operand.value)))
    throw new NotExact('an operand that is a constant');

  const output = outputOf(index, probabilities.product);
  const mask = combineMasks(index, scores, extra);
  const softmaxAt = scores.reshapes.length;
  const shape: ScoresShape = {
    reshapes: [...scores.reshapes, ...probabilities.reshapes],
    softmaxAt,
    softmaxRank: softmaxRank(softmax, index.opset) ?? undefined,
    maskAt: softmaxAt - (mask?.reshapes ?? 0),
    operands: scores.operands.map(({ dims, reshapes }) => ({ dims, at: softmaxAt - reshapes })),
  };
  return {
    name: softmax.name || (softmax.output[0] as string),
    form: FORM,
    heads: undefined,
    headDim: undefined,
    q: operandOf(q),
    k: k.operand,
    v: operandOf(v),
    mask: mask && { value: mask.value, form: 'scores' },
    scale: scores.scale * q.scale * k.peeled.scale,
    runtimeScales: scores.runtimeScales,
    softcap: scores.softcap,
    isCausal: false,
    causalAlignment: 'top-left',
    windowLength: undefined,
    alignedPast: undefined,
    lastKeys: undefined,
    output: output.value,
    outputLayout: () => output.layout,
    outputDims: ([batch, heads, length, dim], rank) => {
      if (output.layout === 'NHD') return [batch, length, heads, dim];
      return rank === 3 ? [batch * heads, length, dim] : [batch, heads, length, dim];
    },
    scores: shape,
    nodes: inGraphOrder(index, [
      ...q.nodes,
      ...k.peeled.nodes,
      ...v.nodes,
      ...scores.nodes,
      softmax,
      ...probabilities.nodes,
      ...output.nodes,
    ]),
    overrides: [],
    extra,
  };
}

function inGraphOrder(index: GraphIndex, nodes: readonly NodeProto[]): NodeProto[] {
  const wanted = new Set(nodes);
  return index.nodes.filter((node) => wanted.has(node));
}

/** The attention around a Softmax; undefined where the Softmax serves something else. */
export function detectDecomposed(index: GraphIndex, softmax: NodeProto): Detection | undefined {
  if (!isOp(softmax, 'Softmax')) return undefined;
  const probabilities = followProbabilities(index, softmax);
  // A product with a constant is a projection of something that is no attention (routing, pooling).
  if (probabilities === undefined || index.constants.has(probabilities.product.right)) return undefined;
  const left = (reason: string): Detection => ({
    left: {
      name: softmax.name || (softmax.output[0] as string),
      form: FORM,
      heads: undefined,
      headDim: undefined,
      reason,
    },
  });
  if (softmaxRank(softmax, index.opset) === null) return left('softmax over an axis that is not the last');
  try {
    const state: ScoresState = {
      nodes: [],
      scale: 1,
      runtimeScales: [],
      softcap: 0,
      masks: [],
      reshapes: [],
      casts: 0,
      operands: [],
      extra: [],
    };
    const scores = followScores(index, softmax.input[0] as string, state);
    return scores === undefined
      ? left('the scores are not a scaled and masked product of two values')
      : { site: buildSite(index, softmax, scores, probabilities) };
  } catch (error) {
    if (error instanceof NotExact) return left(error.message);
    throw error;
  }
}
