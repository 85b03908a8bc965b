/** What a rewritten topology runs: attention as one operator, and shapes of scores that are never made. */
import { type GraphNode, registerOp } from '@tensorflow/tfjs-converter';
import * as tf from '@tensorflow/tfjs-core';
import type { KernelName } from '../../attention/kernels.ts';
import { MAX_HEAD_DIM } from '../../attention/problem.ts';
import { sageattn } from './attention.ts';
import type { StepKind } from './match.ts';

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
  readonly operand: tf.Tensor | undefined;
}

/** `softmax(steps(q k)) v` as the graph spells it. */
interface Call {
  readonly q: tf.Tensor;
  readonly k: tf.Tensor;
  readonly transposeKeys: boolean;
  readonly steps: readonly Step[];
}

function callOf({ attrs }: GraphNode, q: tf.Tensor, k: tf.Tensor, operands: readonly tf.Tensor[]): Call {
  const { transposeKeys, steps } = attrs as unknown as { transposeKeys: boolean; steps: string };
  const rest = [...operands];
  const kinds = (steps === '' ? [] : steps.split(',')) as StepKind[];
  return {
    q,
    k,
    transposeKeys,
    steps: kinds.map((kind) => ({ kind, operand: kind === 'softmax' ? undefined : rest.shift() })),
  };
}

const ARITHMETIC = { mul: tf.mul, div: tf.div, add: tf.add };

const sameShape = (a: readonly number[], b: readonly number[]) => tf.util.arraysEqual([...a], [...b]);
const batchOf = (shape: readonly number[]) => shape.slice(0, -2);
const broadcast = (a: readonly number[], b: readonly number[]) =>
  tf.broadcast_util.assertAndGetBroadcastShape([...a], [...b]);

/** Shapes of the scores: those of the product, then after each step. */
function shapesOf({ q, k, transposeKeys, steps }: Call): number[][] {
  const keys = k.shape.at(transposeKeys ? -1 : -2) as number;
  let shape = [...broadcast(batchOf(q.shape), batchOf(k.shape)), q.shape.at(-2) as number, keys];
  const after = ({ kind, operand }: Step): number[] => {
    if (operand === undefined) return shape;
    if (kind !== 'reshape') return broadcast(shape, operand.shape);
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
  return tf.tensor1d(shapesOf(callOf(node, q, k, operands)).at(-1) as number[], 'int32');
}

async function attend(node: GraphNode): Promise<tf.Tensor> {
  const { kernel } = node.attrs as unknown as { kernel: KernelName | 'auto' };
  const [q, k, v, ...operands] = node.inputs as [tf.Tensor, tf.Tensor, tf.Tensor, ...tf.Tensor[]];
  const call = callOf(node, q, k, operands);
  const shapes = shapesOf(call);
  const kernelOperands = tf.tidy(() => operandsOf(call, v, shapes));
  if (kernelOperands === undefined) return tf.tidy(() => attendStepByStep(call, v));
  const [q4, k4, v4, attnMask] = kernelOperands;
  const pending = sageattn(q4, k4, v4, { kernel, smScale: 1, ...(attnMask === undefined ? {} : { attnMask }) });
  tf.dispose(kernelOperands);
  const output = await pending;
  const reshaped = tf.reshape(output, [...(shapes.at(-1) as number[]).slice(0, -1), v.shape.at(-1) as number]);
  output.dispose();
  return reshaped;
}

/** Just what the replaced nodes did. */
function attendStepByStep({ q, k, transposeKeys, steps }: Call, v: tf.Tensor): tf.Tensor {
  const apply = (scores: tf.Tensor, { kind, operand }: Step): tf.Tensor => {
    if (operand === undefined) return tf.softmax(scores);
    if (kind === 'reshape') return tf.reshape(scores, [...operand.dataSync()]);
    return ARITHMETIC[kind as keyof typeof ARITHMETIC](scores, operand);
  };
  return tf.matMul(steps.reduce(apply, tf.matMul(q, k, false, !transposeKeys)), v);
}

type KernelOperands = [q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, attnMask?: tf.Tensor];

/**
 * q with the factors in it, k, v and the sum of the masks as `[B,H,L,D]` and `[B,H,Lq,Lk]`; undefined where this run
 * computes something else than attention.
 */
function operandsOf(call: Call, v: tf.Tensor, shapes: readonly (readonly number[])[]): KernelOperands | undefined {
  const { q, k, transposeKeys } = call;
  const product = batchOf(shapes[0] as readonly number[]);
  const weights = batchOf(shapes.at(-1) as readonly number[]);
  if (q.size * k.size * v.size === 0 || [q, k, v].some(({ dtype }) => dtype !== 'float32')) return undefined;
  if (Math.max(q.shape.at(-1) as number, v.shape.at(-1) as number) > MAX_HEAD_DIM) return undefined;
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
  const keys = to4(k, product);
  const operands: KernelOperands = [
    to4(scaled, product),
    transposeKeys ? tf.transpose(keys, [0, 1, 3, 2]) : keys,
    to4(v, weights),
  ];
  if (mask !== undefined) operands.push(mask.sum);
  return operands;
}

interface Mask {
  /** `[B,H,Lq,Lk]`, any of them 1. */
  readonly sum: tf.Tensor;
  /** B and H where the mask depends on them. */
  readonly batch: readonly [number, number] | undefined;
}

/** The factors into q and the masks into one; undefined where the steps are not those of attention. */
function foldSteps(
  { q, steps }: Call,
  shapes: readonly (readonly number[])[],
): { readonly scaled: tf.Tensor; readonly mask: Mask | undefined } | undefined {
  const product = shapes[0] as readonly number[];
  const [queries, keys] = product.slice(-2) as [number, number];
  const hasAllScores = (shape: readonly number[]) => sameShape(shape.slice(-2), [queries, keys]);
  if (!hasAllScores(shapes.at(-1) as readonly number[])) return undefined;
  let scaled = q;
  let mask: Mask | undefined;
  for (const [i, { kind, operand }] of steps.entries()) {
    const shape = shapes[i] as readonly number[];
    // Rows may be reshaped among themselves as long as each is whole where softmax takes it.
    if (kind === 'softmax' && shape.at(-1) !== keys) return undefined;
    if (operand === undefined || kind === 'reshape' || kind === 'softmax') continue;
    if (operand.dtype !== 'float32' || !sameShape(shape, shapes[i + 1] as readonly number[])) return undefined;
    if (kind === 'add') {
      mask = hasAllScores(shape) ? addMasks(mask, maskOf(operand, batchOf(shape))) : undefined;
      if (mask === undefined) return undefined;
    } else {
      const isNumber = operand.size === 1;
      // A factor of a query is one of q; that of a key is not, and behind a reshape it would have to be taken apart.
      if (!isNumber && (operand.shape.at(-1) !== 1 || !sameShape(shape, product))) return undefined;
      scaled = ARITHMETIC[kind](scaled, isNumber ? tf.reshape(operand, []) : operand);
    }
  }
  return { scaled, mask };
}

/** Any number of dimensions before the last two as the two that kernels know: `[L,D]`, `[B,L,D]` and `[B,H,L,D]` alike. */
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
