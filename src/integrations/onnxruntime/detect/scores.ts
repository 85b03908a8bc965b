/** From the softmax up to the product of q and k: what the graph does to the scores on the way. */

import { constantScalar, uniformOf } from '../model/constants.ts';
import { type GraphIndex, intAttribute } from '../model/graph.ts';
import type { NodeProto } from '../onnx/codec.ts';
import { MAX_STEPS } from './additions.ts';
import { dependsOnShapesOnly, dimsOf } from './known.ts';
import { multipliedMasks } from './multiplied.ts';
import { is } from './operators.ts';
import { isFloatCast } from './probabilities.ts';
import { asProduct, mirrored, type Product } from './product.ts';
import type { SoftmaxForm } from './softmax.ts';
import { type Sizes, sizesOf } from './views.ts';

/** A score at or below this, beside any unmasked score, has a probability of 0 in every float type. */
const MASKED_SCORE = -1e4;
/** The same where a factor follows that is known only when the graph runs: arithmetic on sizes of tensors. */
const MASKED_BEFORE_FACTOR = -1e30;

/** A factor of the scores: of all, known now or when the graph runs, or of each row. */
export interface ScaleStep {
  readonly kind: 'scale';
  readonly opType: 'Mul' | 'Div';
  readonly value: string;
  readonly operand: string;
  readonly of:
    | { readonly kind: 'number'; readonly factor: number; readonly dims: readonly number[] }
    | { readonly kind: 'sizes' }
    | { readonly kind: 'rows' };
}

export type ScoreStep =
  | ScaleStep
  | { readonly kind: 'cast'; readonly to: number }
  | { readonly kind: 'reshape'; readonly sizes: Sizes; readonly shape: string }
  | { readonly kind: 'add'; readonly mask: string; readonly isNegated: boolean }
  /** Scores become `fill` where the condition is true (`hides`) or false. */
  | { readonly kind: 'where'; readonly condition: string; readonly hides: boolean; readonly fill: string }
  /** Scores become `fill`, or its negative, where a number is 0 and stay where it is 1; there `fill` is 0. */
  | { readonly kind: 'multiplied'; readonly mask: string; readonly fill: string; readonly isNegated: boolean }
  /** Lifts -Infinity to a finite floor, which gives a probability of 0 as well. */
  | { readonly kind: 'floor'; readonly floor: string }
  | { readonly kind: 'tanh' };

export interface Scores {
  /** The product with q on its left, and its result in the order of the scores. */
  readonly product: Product;
  /** In the order in which they are computed. */
  readonly steps: readonly ScoreStep[];
  readonly nodes: readonly NodeProto[];
}

/** The way from the softmax to where the walk stands. */
interface Way {
  readonly depth: number;
  /** Factors behind: of what a fill value becomes. */
  readonly factor: number;
  readonly hasUnknownFactor: boolean;
  readonly step: ScoreStep | undefined;
  readonly node: NodeProto | undefined;
  readonly behind: Way | undefined;
}

/** Undefined where the way leads elsewhere. */
export function followScores(index: GraphIndex, softmax: SoftmaxForm): Scores | undefined {
  const start: Way = {
    depth: 0,
    factor: 1,
    hasUnknownFactor: false,
    step: undefined,
    node: undefined,
    behind: undefined,
  };
  const readers = new Set(index.consumers(softmax.input));
  const isReadElsewhere = index.outputs.has(softmax.input) || readers.size !== softmax.readers.length;
  return isReadElsewhere || softmax.readers.some((reader) => !readers.has(reader))
    ? undefined
    : follow(index, softmax.input, start);
}

/** Follows only values that a single node reads, so that no node is visited twice. */
function follow(index: GraphIndex, value: string, way: Way): Scores | undefined {
  const node = index.producer(value);
  if (node === undefined || way.depth > MAX_STEPS) return undefined;
  if (way.depth > 0 && index.soleConsumer(value) === undefined) return undefined;
  const found = asProduct(node);
  if (found !== undefined) {
    const product = found.outOrder === 'natural' ? found : mirrored(found);
    return product.outOrder === 'natural'
      ? collect(product, { ...way, node, behind: way, step: undefined })
      : undefined;
  }
  const through = (input: string, step?: ScoreStep, changes: Partial<Way> = {}): Scores | undefined =>
    follow(index, input, { ...way, ...changes, depth: way.depth + 1, step, node, behind: way });
  const hidden = followMultiplied(index, node, way);
  if (hidden !== undefined) return hidden;
  const [a, b] = node.input as [string, string];
  if (is(node, 'Identity')) return through(a);
  if (isFloatCast(node)) return through(a, { kind: 'cast', to: intAttribute(node, 'to') as number });
  if (is(node, 'Reshape')) {
    const sizes = sizesOf(index, b);
    return sizes === undefined ? undefined : through(a, { kind: 'reshape', sizes, shape: b });
  }
  if (is(node, 'Tanh')) return through(a, { kind: 'tanh' });
  if (is(node, 'Where')) return followWhere(index, node, way, through);
  if (is(node, 'Add') || is(node, 'Sum')) return followSum(index, node, way);
  if (is(node, 'Sub')) return through(a, { kind: 'add', mask: b, isNegated: true });
  if (is(node, 'Max') && node.input.length === 2) {
    const [floor, other] = isMasked(index, b, way) ? [b, a] : [a, b];
    return isMasked(index, floor, way) ? through(other, { kind: 'floor', floor }) : undefined;
  }
  const scale = scaleStep(index, node);
  if (scale === undefined) return undefined;
  const { of } = scale;
  return through(scale.value, scale, {
    factor: of.kind === 'number' ? way.factor * of.factor : way.factor,
    hasUnknownFactor: way.hasUnknownFactor || of.kind !== 'number',
  });
}

type Through = (input: string, step?: ScoreStep) => Scores | undefined;

/** One of the summands leads to the product; the others are masks or biases. */
function followSum(index: GraphIndex, node: NodeProto, way: Way): Scores | undefined {
  for (const [i, input] of node.input.entries()) {
    if (index.constants.has(input)) continue;
    let last: Way = { ...way, depth: way.depth + 1, step: undefined, node, behind: way };
    for (const [other, mask] of node.input.entries()) {
      if (other !== i) last = { ...last, step: { kind: 'add', mask, isNegated: false }, behind: last };
    }
    const found = follow(index, input, last);
    if (found !== undefined) return found;
  }
  return undefined;
}

function followMultiplied(index: GraphIndex, node: NodeProto, way: Way): Scores | undefined {
  for (const { scores, mask, summand, number, product } of multipliedMasks(index, node)) {
    if (!hides(number, way) || index.soleConsumer(product.output[0] as string) === undefined) continue;
    const step = { kind: 'multiplied', mask, fill: summand, isNegated: is(node, 'Sub') } as const;
    const sum: Way = { ...way, step, node, behind: way };
    return follow(index, scores, { ...sum, depth: way.depth + 2, step: undefined, node: product, behind: sum });
  }
  return undefined;
}

function followWhere(index: GraphIndex, node: NodeProto, way: Way, through: Through): Scores | undefined {
  const [condition, yes, no] = node.input as [string, string, string];
  if (isMasked(index, no, way)) return through(yes, { kind: 'where', condition, hides: false, fill: no });
  return isMasked(index, yes, way) ? through(no, { kind: 'where', condition, hides: true, fill: yes }) : undefined;
}

/** True for a number that gives a probability of 0 whatever the factors behind make of it. */
function isMasked(index: GraphIndex, value: string, way: Way): boolean {
  const fill = constantScalar(index, value);
  return fill !== undefined && hides(fill, way);
}

function hides(fill: number, { factor, hasUnknownFactor }: Way): boolean {
  const bound = hasUnknownFactor ? MASKED_BEFORE_FACTOR : MASKED_SCORE;
  return fill <= bound && fill * factor <= bound;
}

function collect(product: Product, last: Way): Scores {
  const steps: ScoreStep[] = [];
  const nodes: NodeProto[] = [];
  for (let way: Way | undefined = last; way !== undefined; way = way.behind) {
    if (way.step !== undefined) steps.push(way.step);
    if (way.node !== undefined) nodes.push(way.node);
  }
  return { product, steps, nodes };
}

/** Reads Mul and Div by one number, known now or when the graph runs, or by one for each row or head. */
export function scaleStep(index: GraphIndex, node: NodeProto): ScaleStep | undefined {
  const isInverse = is(node, 'Div');
  if (!isInverse && !is(node, 'Mul')) return undefined;
  const [a, b] = node.input as [string, string];
  const orders = isInverse ? [[a, b] as const] : [[a, b] as const, [b, a] as const];
  const opType = isInverse ? 'Div' : 'Mul';
  const step = (value: string, operand: string, of: ScaleStep['of']): ScaleStep => ({
    kind: 'scale',
    opType,
    value,
    operand,
    of,
  });
  for (const [value, operand] of orders) {
    const { number, dims } = uniformOf(index, operand) ?? {};
    if (number === undefined || dims === undefined) continue;
    return step(value, operand, { kind: 'number', factor: isInverse ? 1 / number : number, dims });
  }
  for (const [value, operand] of orders) {
    if (!index.constants.has(operand) && dependsOnShapesOnly(index, operand))
      return step(value, operand, { kind: 'sizes' });
  }
  for (const [value, operand] of orders) {
    const dims = dimsOf(index, operand);
    if (dims !== undefined && (dims.at(-1) ?? 1) === 1) return step(value, operand, { kind: 'rows' });
  }
  return undefined;
}
