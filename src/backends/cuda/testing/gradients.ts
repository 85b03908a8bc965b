/** A forward and a backward pass of the kernels in the simulator, beside exact gradients. For tests. */
import { createBackwardProblem, type TrainableOptions, trainableProblem } from '../../../attention/backward.ts';
import type { KernelName } from '../../../attention/kernels.ts';
import type { AttentionOptions } from '../../../attention/options.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import { Random } from '../../../measure/random.ts';
import { backwardExact } from '../../../reference/backward.ts';
import { fromFloat32 } from '../../../tensor/access.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { Tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { descriptorOf } from '../kernel-table.ts';
import { type GradientTuning, planBackward } from '../launches/backward.ts';
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

/** Operands of a case, normal numbers. */
export function operandsOf(seed: number, sizes: Sizes, { cuSeqlensQ, tensorLayout }: Options) {
  const { batch = 1, heads = [1, 1], lengths, dims, dtype = 'float32' } = sizes;
  const random = new Random(seed);
  const shapeOf = (count: number, length: number, dim: number) => {
    if (cuSeqlensQ !== undefined) return [length, count, dim];
    return tensorLayout === 'NHD' ? [batch, length, count, dim] : [batch, count, length, dim];
  };
  const make = (count: number, length: number, dim: number): Tensor => {
    const shape = shapeOf(count, length, dim);
    return fromFloat32(random.normals(shape.reduce((a, b) => a * b)), shape, dtype);
  };
  return {
    q: make(heads[0], lengths[0], dims[0]),
    k: make(heads[1], lengths[1], dims[0]),
    v: make(heads[1], lengths[1], dims[1]),
    dOutput: make(heads[0], lengths[0], dims[1]),
  };
}

/** The forward problem of a case. */
export function forwardProblem({ q, k, v }: Record<'q' | 'k' | 'v', Tensor>, options: Options): AttentionProblem {
  const { cuSeqlensQ, cuSeqlensK, gradientDtype: _, backwardPrecision: __, kernel: ___, ...forward } = options;
  const packed = cuSeqlensQ === undefined || cuSeqlensK === undefined ? undefined : { cuSeqlensQ, cuSeqlensK };
  return trainableProblem(q, k, v, { packed }, { ...(forward as AttentionOptions), returnLse: true });
}

/** A forward pass, and a backward pass of it, in the simulator. */
export function train(
  seed: number,
  sizes: Sizes,
  options: Options,
  facts: DeviceFacts = { target: 'sm_80', multiprocessors: 1 },
  spoil: (operands: Record<'q' | 'k' | 'v' | 'dOutput', Tensor>) => void = () => {},
  tuning: GradientTuning = {},
) {
  const { kernel = 'qk-int8-pv-fp16-cuda', gradientDtype, backwardPrecision } = options;
  const operands = operandsOf(seed, sizes, options);
  spoil(operands);
  const { q, k, v, dOutput } = operands;
  const problem = forwardProblem(operands, options);
  const attnMask = options.attnMask as Tensor | undefined;
  const choice = choiceOf(kernel);
  const { output, lse } = simulateAttention(problem, choice, facts, { q, k, v, attnMask });
  const results = { output, lse: lse as Tensor, dOutput };
  const gradient = { ...(gradientDtype && { gradientDtype }), ...(backwardPrecision && { backwardPrecision }) };
  const backward = createBackwardProblem(problem, results, undefined, gradient, 'fp16');
  const plan = planBackward(backward, choice, facts, tuning);
  const got = simulateBackward(backward, choice, facts, { q, k, v, attnMask, ...results }, plan);
  const exact = backwardExact(problem, { q, k, v, attnMask, dOutput });
  return { got, exact };
}

export interface GradientCase {
  readonly name: string;
  readonly sizes: Sizes;
  readonly options: Options;
}

/** Zeros beside ones: some rows see no key, and some keys are seen by no row. */
export function booleanMask(seed: number, shape: readonly [number, number, number, number]): Tensor {
  const [, , rows, keys] = shape;
  const random = new Random(seed + 1);
  const data = Uint8Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => {
    const [row, key] = [Math.floor(i / keys) % rows, i % keys];
    return row === 3 || key === 5 ? 0 : Number(random.uniform() < 0.7);
  });
  return { location: 'cpu', dtype: 'bool', shape, strides: stridesOf(shape), offset: 0, data } as Tensor;
}

export function additiveMask(seed: number, shape: readonly [number, number, number, number]): Tensor {
  const random = new Random(seed + 2);
  const values = random.normals(shape.reduce((a, b) => a * b));
  for (let i = 0; i < values.length; i += 9) values[i] = Number.NEGATIVE_INFINITY;
  return fromFloat32(values, shape, 'float32');
}

const stridesOf = (shape: readonly number[]) => shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));

/** What gradients are tested with, on every kernel. */
export function gradientCases(seed: number): GradientCase[] {
  const cases: readonly (readonly [name: string, sizes: Sizes, options: Options])[] = [
    ['odd lengths, grouped heads', { batch: 2, heads: [4, 2], lengths: [70, 100], dims: [32, 48] }, {}],
    ['head dims that are no multiples', { lengths: [67, 131], dims: [20, 33] }, {}],
    ['causal', { heads: [2, 1], lengths: [100, 100], dims: [32, 32] }, { isCausal: true }],
    ['causal, more keys', { lengths: [40, 150], dims: [32, 32] }, { isCausal: true, causalAlignment: 'bottom-right' }],
    [
      'causal, more queries',
      { lengths: [150, 40], dims: [32, 32] },
      { isCausal: true, causalAlignment: 'bottom-right' },
    ],
    ['window', { lengths: [150, 150], dims: [32, 32] }, { windowSize: [20, 7] }],
    [
      'boolean mask',
      { heads: [2, 1], lengths: [40, 70], dims: [32, 32] },
      { attnMask: booleanMask(seed, [1, 2, 40, 70]) },
    ],
    [
      'additive mask',
      { heads: [2, 1], lengths: [40, 70], dims: [32, 32] },
      { attnMask: additiveMask(seed, [1, 1, 40, 70]) },
    ],
    ['softcap', { lengths: [70, 70], dims: [32, 32] }, { softcap: 3, isCausal: true }],
    [
      'softcap and additive mask',
      { lengths: [40, 70], dims: [32, 32] },
      { softcap: 2, attnMask: additiveMask(seed, [1, 1, 40, 70]) },
    ],
    [
      'negative scale, NHD',
      { heads: [2, 1], lengths: [33, 65], dims: [32, 32] },
      { smScale: -0.3, tensorLayout: 'NHD' },
    ],
    [
      'packed',
      { heads: [2, 1], lengths: [90, 110], dims: [32, 32] },
      { cuSeqlensQ: [0, 20, 20, 90], cuSeqlensK: [0, 70, 80, 110], isCausal: true },
    ],
    ['scales per block', { lengths: [70, 100], dims: [32, 32] }, { kernel: 'qk-int8-pv-fp16' }],
    ['no keys', { lengths: [5, 0], dims: [32, 32] }, {}],
    ['no queries', { lengths: [0, 5], dims: [32, 32] }, {}],
    ['one query', { heads: [4, 1], lengths: [1, 70], dims: [32, 32] }, {}],
    [
      'bfloat16, gradients in float32',
      { lengths: [40, 70], dims: [64, 64], dtype: 'bfloat16' },
      { gradientDtype: 'float32' },
    ],
    ['float16', { lengths: [40, 70], dims: [64, 64], dtype: 'float16' }, {}],
    ['dims beyond what one kernel holds', { lengths: [20, 70], dims: [256, 144] }, { isCausal: true }],
  ];
  return cases.map(([name, sizes, options]) => ({ name, sizes, options }));
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
