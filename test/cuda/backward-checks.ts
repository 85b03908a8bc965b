/** The backward pass on a GPU: gradients of every option against float64, and the same bits every time. */

import type { TrainableOptions } from '../../src/attention/backward.ts';
import { backwardSupportOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import {
  forwardProblem,
  type GradientCase,
  gradientCases,
  operandsOf,
  relativeL2,
} from '../../src/backends/cuda/testing/gradients.ts';
import { sageattnTrainable } from '../../src/index.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { PORTABLE_ALGORITHM } from '../../src/reference/quantized.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { FLOAT16_MAX } from '../../src/tensor/formats/float16.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';
import { type BackwardTarget, backwardTests } from '../conformance/backward-suite.ts';
import type { Check } from './checks.ts';
import { SM80 } from './targets.ts';

/**
 * Relative L2 of a gradient: INT8 gives each score an error of 0.011 (`LSE_TOLERANCE`), its weight and the difference that
 * dS is made of the same relative to their size, and a gradient of few rows does not average it.
 */
const BOUND = 0.05;

/** The backward pass of each kernel that has one on a device of this compute capability, and of each 8-bit precision. */
export function backwardTargets(computeCapability: number): BackwardTarget[] {
  const common = { backend: 'cuda', precision: 'fp16', relativeL2: BOUND, valueFormat: 'bfloat16' } as const;
  const targets: BackwardTarget[] = [
    { ...common, name: 'wgmma', kernel: 'qk-int8-pv-fp16-cuda-sm90', algorithm: SM80, largestV: FLOAT16_MAX },
    { ...common, name: 'per thread', kernel: 'qk-int8-pv-fp16-cuda', algorithm: SM80, largestV: FLOAT16_MAX },
    { ...common, name: 'per block', kernel: 'qk-int8-pv-fp16', algorithm: PORTABLE_ALGORITHM, largestV: FLOAT16_MAX },
  ];
  const { precisions } = backwardSupportOf(computeCapability);
  const inCodes = precisions
    .filter((precision) => precision !== 'fp16')
    .map((precision): BackwardTarget => {
      const kernel = 'qk-int8-pv-fp16-cuda';
      return { ...common, name: precision, precision, kernel, algorithm: SM80, largestV: FLOAT16_MAX };
    });
  return [...targets, ...inCodes].filter(({ kernel }) => lackedBy(kernel, computeCapability) === undefined);
}

/** Sizes that a simulator has no time for, and every kernel of a GPU. */
const LARGE: readonly GradientCase[] = [64, 128].flatMap((dim) =>
  [false, true].map((isCausal) => ({
    name: `D = ${dim}, grouped heads${isCausal ? ', causal' : ''}`,
    sizes: { heads: [4, 2], lengths: [777, 1333], dims: [dim, dim], dtype: 'bfloat16' } as const,
    options: { isCausal, causalAlignment: 'bottom-right' } as const,
  })),
);

async function gradientsOf(seed: number, { sizes, options }: GradientCase) {
  const { q, k, v, dOutput } = operandsOf(seed, sizes, options);
  const call = { ...options, backend: 'cuda' } as const;
  // What dtype the gradients have does not matter here.
  const attention = await sageattnTrainable(q, k, v, call as TrainableOptions & { readonly gradientDtype?: never });
  const gradients = await attention.backward(dOutput);
  attention.dispose();
  return { gradients, operands: { q, k, v, dOutput } };
}

export function backwardChecks(computeCapability: number, seed: number): Check[] {
  const accuracy = [...gradientCases(seed), ...LARGE].map((of) => ({
    name: of.name,
    async run() {
      const { gradients, operands } = await gradientsOf(seed, of);
      const { q, k, v, dOutput } = operands;
      const attnMask = of.options.attnMask as Tensor | undefined;
      const exact = backwardExact(forwardProblem(operands, of.options), { q, k, v, attnMask, dOutput });
      const errors = (['dq', 'dk', 'dv'] as const).map((name) => relativeL2(toFloat32(gradients[name]), exact[name]));
      const text = errors.map((error) => error.toFixed(4)).join(' / ');
      if (!errors.every((error) => error < BOUND)) throw new Error(`relative L2 of dQ / dK / dV ${text}`);
      return `relative L2 of dQ / dK / dV ${text}`;
    },
  }));
  const sameBits = LARGE.map((of) => ({
    name: `${of.name}: the same bits in five runs`,
    async run() {
      const bitsOf = async () => {
        const { gradients } = await gradientsOf(seed, of);
        return (['dq', 'dk', 'dv'] as const).map((name) => String(gradients[name].data));
      };
      const first = await bitsOf();
      for (let i = 0; i < 4; i++) {
        const again = await bitsOf();
        if (again.some((bits, j) => bits !== first[j])) throw new Error('other bits');
      }
      return undefined;
    },
  }));
  const conformance = backwardTargets(computeCapability).flatMap((target) =>
    backwardTests(target, seed).map(({ name, run }) => ({
      name: `${target.name}: ${name}`,
      async run() {
        await run();
        return undefined;
      },
    })),
  );
  return [...accuracy, ...sameBits, ...conformance];
}
