/** A forward and a backward pass of the kernels in the simulator, beside exact gradients. For tests. */
import { createBackwardProblem, type TrainableOptions, trainableProblem } from '../../../attention/backward.ts';
import type { KernelName } from '../../../attention/kernels.ts';
import type { AttentionOptions } from '../../../attention/options.ts';
import { Random } from '../../../measure/random.ts';
import { backwardExact } from '../../../reference/backward.ts';
import { fromFloat32 } from '../../../tensor/access.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { Tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { descriptorOf } from '../kernel-table.ts';
import type { DeviceFacts } from '../launches/context.ts';
import { simulateAttention } from './simulator/run.ts';
import { simulateBackward } from './simulator/run-backward.ts';

export interface Sizes {
  readonly batch?: number;
  readonly heads?: readonly [query: number, key: number];
  readonly lengths: readonly [query: number, key: number];
  readonly dims: readonly [number, number];
  readonly dtype?: DType;
}

export type Options = TrainableOptions & { readonly kernel?: KernelName };

export function choiceOf(name: KernelName): KernelChoice {
  const descriptor = descriptorOf(name);
  const qkQuantGran = descriptor.qkQuantGran[0] ?? 'per-thread';
  return { descriptor, qkQuantGran, pvAccumDtype: 'fp32', smoothK: true, smoothV: false, smoothQ: false };
}

/** A forward pass, and a backward pass of it, in the simulator. */
export function train(
  seed: number,
  sizes: Sizes,
  { kernel = 'qk-int8-pv-fp16-cuda', ...options }: Options,
  facts: DeviceFacts = { target: 'sm_80', multiprocessors: 1 },
  spoil: (operands: Record<'q' | 'k' | 'v' | 'dOutput', Tensor>) => void = () => {},
) {
  const { batch = 1, heads = [1, 1], lengths, dims, dtype = 'float32' } = sizes;
  const random = new Random(seed);
  const { cuSeqlensQ, cuSeqlensK, gradientDtype, ...forward } = options;
  const packed = cuSeqlensQ === undefined || cuSeqlensK === undefined ? undefined : { cuSeqlensQ, cuSeqlensK };
  const make = (count: number, length: number, dim: number) => {
    const shape =
      packed !== undefined
        ? [length, count, dim]
        : forward.tensorLayout === 'NHD'
          ? [batch, length, count, dim]
          : [batch, count, length, dim];
    return fromFloat32(random.normals(shape.reduce((a, b) => a * b)), shape, dtype);
  };
  const operands = {
    q: make(heads[0], lengths[0], dims[0]),
    k: make(heads[1], lengths[1], dims[0]),
    v: make(heads[1], lengths[1], dims[1]),
    dOutput: make(heads[0], lengths[0], dims[1]),
  };
  spoil(operands);
  const { q, k, v, dOutput } = operands;
  const problem = trainableProblem(q, k, v, { packed }, { ...(forward as AttentionOptions), returnLse: true });
  const attnMask = options.attnMask as Tensor | undefined;
  const choice = choiceOf(kernel);
  const { output, lse } = simulateAttention(problem, choice, facts, { q, k, v, attnMask });
  const results = { output, lse: lse as Tensor, dOutput };
  const gradient = gradientDtype === undefined ? {} : { gradientDtype };
  const backward = createBackwardProblem(problem, results, undefined, gradient, 'fp16');
  const got = simulateBackward(backward, choice, facts, { q, k, v, attnMask, ...results });
  const exact = backwardExact(problem, { q, k, v, attnMask, dOutput });
  return { got, exact, problem, operands };
}

/** `|actual - expected| / |expected|` */
export function relativeL2(actual: Float32Array, expected: Float64Array): number {
  let [error, size] = [0, 0];
  expected.forEach((x, i) => {
    error += ((actual[i] as number) - x) ** 2;
    size += x ** 2;
  });
  return Math.sqrt(error / (size === 0 ? 1 : size));
}
