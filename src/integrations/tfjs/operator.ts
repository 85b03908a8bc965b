/** What a rewritten topology runs: attention as one operator, and shapes of scores that are never made. */
import { type GraphNode, registerOp } from '@tensorflow/tfjs-converter';
import * as tf from '@tensorflow/tfjs-core';
import type { KernelName } from '../../attention/kernels.ts';
import { MAX_BACKWARD_HEAD_DIM } from '../../backends/wasm/kernel-table.ts';
import { inverse, type Order, permutationOf } from '../onnxruntime/detect/order.ts';
import { sageattn } from './attention.ts';
import { operandsOfStep, type StepKind } from './match.ts';

/** Name of the operator that stands for attention in a rewritten topology. */
export const OPERATOR = 'SageAttention';
/** Name of the operator that gives the shape of its scores. */
export const SHAPE_OPERATOR = 'SageAttentionShape';

export function registerOperators(): void {
  registerOp(OPERATOR, attend);
  registerOp(SHAPE_OPERATOR, shapeOfScores);
}

interface Step {
  readonly kind: StepKind;
  readonly operands: readonly tf.Tensor[];
}

/** `softmax(steps(q k^T)) v`, with q `[.., L, D]` and k `[.., S, D]`. */
interface Call {
  readonly q: tf.Tensor;
  readonly k: tf.Tensor;
  readonly steps: readonly Step[];
}

/** In the order in which a topology names them. */
function ordersOf({ attrs }: GraphNode): readonly [q: Order, k: Order, v: Order, output: Order] {
  const { orders } = attrs as unknown as { orders: string };
  return orders
    .split(',')
    .map(
      (order): Order => (order === 'natural' || order === 'swapped' ? order : order.split('.').map(Number)),
    ) as never;
}

/** The tensor itself, or a new one with its axes in an order. */
const arranged = (value: tf.Tensor, order: Order): tf.Tensor =>
  order === 'natural' ? value : tf.transpose(value, [...(permutationOf(order, value.rank) ?? [])]);

/** Makes tensors: to be called in a `tidy`. */
function callOf(node: GraphNode, q: tf.Tensor, k: tf.Tensor, operands: readonly tf.Tensor[]): Call {
  const { steps } = node.attrs as unknown as { steps: string };
  const [ofQ, ofK] = ordersOf(node);
  const rest = [...operands];
  const kinds = (steps === '' ? [] : steps.split(',')) as StepKind[];
  return {
    q: arranged(q, ofQ),
    k: arranged(k, ofK),
    steps: kinds.map((kind) => ({ kind, operands: rest.splice(0, operandsOfStep(kind)) })),
  };
}

const ARITHMETIC = { mul: tf.mul, div: tf.div, add: tf.add, sub: tf.sub };

const sameShape = (a: readonly number[], b: readonly number[]) => tf.util.arraysEqual([...a], [...b]);
const batchOf = (shape: readonly number[]) => shape.slice(0, -2);
const broadcast = (a: readonly number[], b: readonly number[]) =>
  tf.broadcast_util.assertAndGetBroadcastShape([...a], [...b]);

/** Shapes of the scores: first as the product gives them, then after each step. */
function shapesOf({ q, k, steps }: Call): number[][] {
  let shape = [...broadcast(batchOf(q.shape), batchOf(k.shape)), q.shape.at(-2) as number, k.shape.at(-2) as number];
  const after = ({ kind, operands }: Step): number[] => {
    const [operand] = operands;
    if (operand === undefined || kind.startsWith('softmax')) return shape;
    if (kind !== 'reshape') return operands.reduce((before, { shape: beside }) => broadcast(before, beside), shape);
    return tf.util.inferFromImplicitShape([...operand.dataSync()], tf.util.sizeFromShape(shape));
  };
  const shapes = [shape];
  for (const step of steps) {
    shape = after(step);
    shapes.push(shape);
  }
  return shapes;
}

function shapeOfScores(node: GraphNode): tf.Tensor {
  const [q, k, ...operands] = node.inputs as [tf.Tensor, tf.Tensor, ...tf.Tensor[]];
  return tf.tidy(() => tf.tensor1d(shapesOf(callOf(node, q, k, operands)).at(-1) as number[], 'int32'));
}

async function attend(node: GraphNode): Promise<tf.Tensor> {
  const { kernel } = node.attrs as unknown as { kernel: KernelName | 'auto' };
  const [q, k, v, ...operands] = node.inputs as [tf.Tensor, tf.Tensor, tf.Tensor, ...tf.Tensor[]];
  const [, , ofV, ofOutput] = ordersOf(node);
  let shape: number[] = [];
  const kernelOperands = tf.tidy(() => {
    const call = callOf(node, q, k, operands);
    if (call.steps.some((step, i) => !isSoftmaxOfRows(step, call, i))) return undefined;
    const shapes = shapesOf(call);
    const values = arranged(v, ofV);
    shape = [...(shapes.at(-1) as number[]).slice(0, -1), values.shape.at(-1) as number];
    return operandsOf(call, values, shapes);
  });
  const back = (output: tf.Tensor) => arranged(output, inverse(ofOutput));
  if (kernelOperands === undefined) {
    return tf.tidy(() => back(attendStepByStep(callOf(node, q, k, operands), arranged(v, ofV))));
  }
  const [q4, k4, v4, attnMask] = kernelOperands;
  const pending = sageattn(q4, k4, v4, { kernel, smScale: 1, ...(attnMask === undefined ? {} : { attnMask }) });
  tf.dispose(kernelOperands);
  const output = await pending;
  const result = tf.tidy(() => back(tf.reshape(output, shape)));
  output.dispose();
  return result;
}

/** False for a softmax in steps that is none, or one over another axis than the last: its shape may be another too. */
function isSoftmaxOfRows({ kind, operands }: Step, call: Call, at: number): boolean {
  if (kind === 'softmax' || !kind.startsWith('softmax')) return true;
  if (kind !== 'softmax-kk') return false;
  const rank = shapesOf({ ...call, steps: call.steps.slice(0, at) }).at(-1)?.length as number;
  return operands.every((axes) => axes.size === 1 && [-1, rank - 1].includes(axes.dataSync()[0] as number));
}

/** Just what the replaced nodes did. */
function attendStepByStep({ q, k, steps }: Call, v: tf.Tensor): tf.Tensor {
  const apply = (scores: tf.Tensor, { kind, operands }: Step): tf.Tensor => {
    const [first, second] = operands as [tf.Tensor, tf.Tensor];
    if (kind === 'softmax') return tf.softmax(scores);
    if (kind.startsWith('softmax')) return softmaxInSteps(scores, kind.slice(-2), first, second);
    if (kind === 'select') return tf.where(first, scores, second);
    if (kind === 'selectNot') return tf.where(first, second, scores);
    if (kind === 'reshape') return tf.reshape(scores, [...first.dataSync()]);
    return ARITHMETIC[kind as keyof typeof ARITHMETIC](scores, first);
  };
  return tf.matMul(steps.reduce(apply, tf.matMul(q, k, false, true)), v);
}

function softmaxInSteps(scores: tf.Tensor, kept: string, ofMax: tf.Tensor, ofSum: tf.Tensor): tf.Tensor {
  const max = tf.max(scores, [...ofMax.dataSync()], kept[0] === 'k');
  const exponentials = tf.exp(tf.sub(scores, max));
  return tf.div(exponentials, tf.sum(exponentials, [...ofSum.dataSync()], kept[1] === 'k'));
}

type KernelOperands = [q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, attnMask?: tf.Tensor];

/**
 * q with the factors in it, k, v and the sum of the masks as `[B,H,L,D]` and `[B,H,Lq,Lk]`; undefined where this run
 * computes something else than attention.
 */
function operandsOf(call: Call, v: tf.Tensor, shapes: readonly (readonly number[])[]): KernelOperands | undefined {
  const { q, k } = call;
  const product = batchOf(shapes[0] as readonly number[]);
  const weights = batchOf(shapes.at(-1) as readonly number[]);
  if (q.size * k.size * v.size === 0 || [q, k, v].some(({ dtype }) => dtype !== 'float32')) return undefined;
  if (Math.max(q.shape.at(-1) as number, v.shape.at(-1) as number) > MAX_BACKWARD_HEAD_DIM) return undefined;
  // Values of more batch entries than weights: one attention would have to be taken many times.
  if (!sameShape(broadcast(weights, batchOf(v.shape)), weights)) return undefined;
  const folded = foldSteps(call, shapes);
  if (folded === undefined) return undefined;
  const { scaled, mask } = folded;
  const [batch, heads] = mask?.batch ?? foldBatch(weights);
  const to4 = (value: tf.Tensor, ofBatch: readonly number[]): tf.Tensor => {
    const inner = value.shape.slice(-2);
    const shape = [...ofBatch, ...inner];
    return tf.reshape(sameShape(value.shape, shape) ? value : tf.broadcastTo(value, shape), [batch, heads, ...inner]);
  };
  const operands: KernelOperands = [to4(scaled, product), to4(k, product), to4(v, weights)];
  if (mask !== undefined) operands.push(mask.sum);
  return operands;
}

interface Mask {
  /** `[B,H,Lq,Lk]`, any of them 1. */
  readonly sum: tf.Tensor;
  /** B and H where the mask depends on them. */
  readonly batch: readonly [number, number] | undefined;
}

interface Folded {
  readonly scaled: tf.Tensor;
  readonly mask: Mask | undefined;
  /** A score is hidden by a number that a factor might lift. */
  readonly isHiding: boolean;
}

/** The factors into q and the masks into one; undefined if the steps are not attention's. */
function foldSteps({ q, steps }: Call, shapes: readonly (readonly number[])[]): Folded | undefined {
  const product = shapes[0] as readonly number[];
  const hasAllScores = (shape: readonly number[]) => sameShape(shape.slice(-2), product.slice(-2));
  if (!hasAllScores(shapes.at(-1) as readonly number[])) return undefined;
  let folded: Folded | undefined = { scaled: q, mask: undefined, isHiding: false };
  for (const [i, step] of steps.entries()) {
    const shape = shapes[i] as readonly number[];
    const { kind } = step;
    // Rows may be reshaped among themselves as long as each is whole where softmax takes it.
    if (kind.startsWith('softmax') && shape.at(-1) !== product.at(-1)) return undefined;
    if (kind === 'reshape' || kind.startsWith('softmax')) continue;
    if (!sameShape(shape, shapes[i + 1] as readonly number[])) return undefined;
    if (kind === 'mul' || kind === 'div') {
      folded = foldFactor(folded, kind, step.operands[0] as tf.Tensor, sameShape(shape, product));
    } else folded = hasAllScores(shape) ? foldMask(folded, step, batchOf(shape)) : undefined;
    if (folded === undefined) return undefined;
  }
  return folded;
}

function foldFactor(folded: Folded, kind: 'mul' | 'div', operand: tf.Tensor, isOfProduct: boolean): Folded | undefined {
  const { scaled, mask, isHiding } = folded;
  const isNumber = operand.size === 1;
  // A factor per query is a factor of q. A factor per key is not, and after a reshape it would have to be taken apart.
  if (operand.dtype !== 'float32' || (!isNumber && (operand.shape.at(-1) !== 1 || !isOfProduct))) return undefined;
  if (mask !== undefined && (isHiding || !isNumber)) return undefined;
  const apply = ARITHMETIC[kind];
  const factor = isNumber ? tf.reshape(operand, []) : operand;
  return { isHiding, scaled: apply(scaled, factor), mask: mask && { ...mask, sum: apply(mask.sum, factor) } };
}

function foldMask(folded: Folded, { kind, operands }: Step, batch: readonly number[]): Folded | undefined {
  const [operand, fill] = operands as [tf.Tensor, ...tf.Tensor[]];
  const hides = fill !== undefined;
  const summand = hides ? hidden(operand, kind === 'select', fill) : kind === 'sub' ? tf.neg(operand) : operand;
  const mask = summand?.dtype === 'float32' ? addMasks(folded.mask, maskOf(summand, batch)) : undefined;
  return mask && { ...folded, mask, isHiding: folded.isHiding || hides };
}

/** A score at or below this, beside any that is seen, has a probability of 0. */
const HIDDEN = -1e4;

/** `fill` where a condition is false (`keepsTrue`) or true, 0 elsewhere; undefined where that does not hide. */
function hidden(condition: tf.Tensor, keepsTrue: boolean, fill: tf.Tensor): tf.Tensor | undefined {
  if (condition.dtype !== 'bool' || fill.dtype !== 'float32' || fill.size !== 1) return undefined;
  if (!((fill.dataSync()[0] as number) <= HIDDEN)) return undefined;
  const [number, zero] = [tf.reshape(fill, []), tf.scalar(0)];
  return keepsTrue ? tf.where(condition, zero, number) : tf.where(condition, number, zero);
}

/**
 * Any number of dimensions before the last two as the two that kernels know: `[L,D]`, `[B,L,D]` and `[B,H,L,D]` alike.
 */
const foldBatch = (batch: readonly number[]): [number, number] => [
  tf.util.sizeFromShape(batch.slice(0, -1)),
  batch.at(-1) ?? 1,
];

/** A mask of scores with these dimensions before the last two, in four dimensions. */
function maskOf(mask: tf.Tensor, batch: readonly number[]): Mask {
  const shape = [...new Array<number>(Math.max(0, batch.length + 2 - mask.shape.length)).fill(1), ...mask.shape];
  const own = batchOf(shape);
  const inner = shape.slice(-2);
  const isOne = (size: number) => size === 1;
  if (own.every(isOne)) return { sum: tf.reshape(mask, [1, 1, ...inner]), batch: undefined };
  const outer = own.slice(0, -1).every(isOne) ? own.slice(0, -1) : batch.slice(0, -1);
  const spread = [...outer, own.at(-1) as number];
  const sum = tf.reshape(tf.broadcastTo(tf.reshape(mask, shape), [...spread, ...inner]), [
    ...foldBatch(spread),
    ...inner,
  ]);
  return { sum, batch: foldBatch(batch) };
}

/** Undefined where they fold the batch in different ways. */
function addMasks(a: Mask | undefined, b: Mask): Mask | undefined {
  if (a === undefined) return b;
  if (a.batch !== undefined && b.batch !== undefined && !sameShape(a.batch, b.batch)) return undefined;
  return { sum: tf.add(a.sum, b.sum), batch: a.batch ?? b.batch };
}
