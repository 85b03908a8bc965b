import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { place, snapshot } from '../../../../test/support/tensors.ts';
import { NO_LIMIT } from '../../../attention/band.ts';
import { createProblem } from '../../../attention/problem.ts';
import { type AttentionOptions, sageattn } from '../../../index.ts';
import { elementCount, type Tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { setBackend } from '../../registry.ts';
import { descriptorOf } from '../kernel-table.ts';
import { createSimulatedBackend } from '../testing/simulator/backend.ts';
import { headsAsRows } from './heads-as-rows.ts';
import { planLaunches } from './plan.ts';

const seed = runSeed();

const choiceOf = (options: Partial<KernelChoice> = {}): KernelChoice => ({
  descriptor: descriptorOf('qk-int8-pv-fp16-cuda'),
  qkQuantGran: 'per-thread',
  pvAccumDtype: 'fp32',
  smoothK: true,
  smoothV: false,
  smoothQ: false,
  ...options,
});

interface Shape {
  readonly heads: number;
  readonly kvHeads: number;
  readonly queries?: number;
  readonly keys?: number;
}

function tensors({ heads, kvHeads, queries = 1, keys = 100 }: Shape) {
  const random = new Random(seed);
  const make = (shape: readonly number[]): Tensor => place(random.normals(elementCount(shape)), shape, 'float16');
  return { q: make([2, heads, queries, 32]), k: make([2, kvHeads, keys, 32]), v: make([2, kvHeads, keys, 32]) };
}

const problemOf = (shape: Shape, options: AttentionOptions = {}) => {
  const { q, k, v } = tensors(shape);
  return createProblem(q, k, v, options);
};

describe('heads as rows', () => {
  test.each([
    [8, 2, 2, 4],
    [7, 1, 1, 7],
    [32, 1, 4, 8],
    [24, 2, 4, 6],
    [11, 1, 11, 1],
    [4, 4, 4, 1],
  ])('%i heads over %i are %i of %i rows', (heads, kvHeads, expectedHeads, rows) => {
    const problem = problemOf({ heads, kvHeads });
    const { queryHeads, queryLength } = headsAsRows(problem, choiceOf()) ?? problem;
    expect([queryHeads, queryLength]).toEqual([expectedHeads, rows]);
    expect(expectedHeads % kvHeads).toBe(0);
  });

  test('not where rows would share scales or have a mean together', () => {
    const shape = { heads: 8, kvHeads: 2 };
    const grouped = (choice: Partial<KernelChoice>, of: Shape = shape) =>
      headsAsRows(problemOf(of), choiceOf(choice)) !== undefined;
    expect(grouped({})).toBe(true);
    expect(grouped({ qkQuantGran: 'per-warp' })).toBe(false);
    expect(grouped({ smoothQ: 'block' })).toBe(false);
    expect(grouped({}, { ...shape, queries: 2 })).toBe(false);
  });

  test('every row has the band of the token', () => {
    const limitsOf = (options: AttentionOptions) => {
      const { lower, upper, align } = headsAsRows(problemOf({ heads: 8, kvHeads: 2 }, options), choiceOf())?.band ?? {};
      expect(align).toBe(0);
      return [lower, upper];
    };
    const bottomRight = { causalAlignment: 'bottom-right' } as const;
    expect(limitsOf({ ...bottomRight, isCausal: true })).toEqual([-NO_LIMIT, NO_LIMIT]);
    expect(limitsOf({ ...bottomRight, windowSize: [99, 0] })).toEqual([-NO_LIMIT, NO_LIMIT]);
    expect(limitsOf({ ...bottomRight, windowSize: [98, 0] })).toEqual([1, NO_LIMIT]);
    expect(limitsOf({ ...bottomRight, windowSize: [10, -1] })).toEqual([89, NO_LIMIT]);
    expect(limitsOf({ windowSize: [5, 7] })).toEqual([-NO_LIMIT, 7]);
    expect(limitsOf({ isCausal: true })).toEqual([-NO_LIMIT, 0]);
  });

  test('attention has one CTA for the heads over a head of K', () => {
    const device = { target: 'sm_80', multiprocessors: 1 } as const;
    const blocks = (shape: Shape) =>
      planLaunches(problemOf(shape), choiceOf(), device).launches.find(({ name }) => name === 'attention')?.grid[0];
    expect(blocks({ heads: 8, kvHeads: 2 })).toBe(2 * 2);
    expect(blocks({ heads: 8, kvHeads: 2, queries: 3 })).toBe(2 * 8);
  });

  test.each([
    [80, {}],
    [80, { windowSize: [37, 0], causalAlignment: 'bottom-right' }],
    [80, { windowSize: [0, 70] }],
    [89, { isCausal: true, causalAlignment: 'bottom-right' }],
  ] as const)(
    `the bits are those of heads by themselves on a simulated device of %i, %o (${seed})`,
    async (capability, band) => {
      const backend = createSimulatedBackend(capability);
      await setBackend(backend);
      const { q, k, v } = tensors({ heads: 12, kvHeads: 1, keys: 150 });
      // One K for each head, all of them the same.
      const alone = (view: Tensor): Tensor => {
        const [batch, , tokens, dim] = view.shape as [number, number, number, number];
        const [batchStride, , tokenStride, channelStride] = view.strides as [number, number, number, number];
        return { ...view, shape: [batch, 12, tokens, dim], strides: [batchStride, 0, tokenStride, channelStride] };
      };
      const options = { backend: 'cuda', returnLse: true, ...band } as const;
      const packed = await sageattn(q, k, v, options);
      const single = await sageattn(q, alone(k), alone(v), options);
      expect(snapshot(packed.output)).toEqual(snapshot(single.output));
      expect(snapshot(packed.lse)).toEqual(snapshot(single.lse));
      await backend.dispose();
    },
  );
});
