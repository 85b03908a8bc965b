/** The gradient kernels on wgmma against exact gradients in float64. Kernels run in the simulator. */
import { describe, expect, test } from 'vitest';
import { runSeed } from '../../../../../../test/support/random.ts';
import { sampled } from '../../../../../../test/support/sample.ts';
import { toFloat32 } from '../../../../../tensor/access.ts';
import type { GradientTuning } from '../../../launches/backward.ts';
import { type Options, relativeL2, type Sizes, train } from '../../../testing/gradients.ts';

const seed = runSeed();
const BOUND = 0.05;

describe(`gradients on wgmma (SAGEATTENTION_SEED=${seed})`, () => {
  const CASES: readonly (readonly [name: string, sizes: Sizes, options: Options])[] = [
    ['odd lengths, grouped heads', { batch: 2, heads: [2, 1], lengths: [70, 150], dims: [64, 64] }, {}],
    ['several stages', { lengths: [130, 400], dims: [64, 64] }, {}],
    ['causal', { lengths: [200, 200], dims: [64, 64] }, { isCausal: true }],
    [
      'causal, more queries',
      { lengths: [200, 70], dims: [64, 64] },
      { isCausal: true, causalAlignment: 'bottom-right' },
    ],
    ['window, D = 128', { lengths: [150, 150], dims: [128, 128], dtype: 'bfloat16' }, { windowSize: [20, 7] }],
    [
      'packed',
      { heads: [2, 1], lengths: [190, 110], dims: [64, 64] },
      { cuSeqlensQ: [0, 20, 20, 190], cuSeqlensK: [0, 70, 80, 110], isCausal: true },
    ],
    ['several tiles, D = 128', { batch: 2, lengths: [150, 130], dims: [128, 128] }, {}],
    ['scales per block', { lengths: [70, 100], dims: [64, 64] }, { kernel: 'qk-int8-pv-fp16' }],
    ['one query', { heads: [4, 1], lengths: [1, 70], dims: [64, 64] }, {}],
    ['no keys', { lengths: [5, 0], dims: [64, 64] }, {}],
  ];
  test.each(
    sampled(
      CASES.map(([name, sizes, options]) => ({ name, sizes, options })),
      seed,
      { byHand: 0.3 },
    ),
  )('$name', ({ sizes, options }) => {
    const { got, exact } = train(seed, sizes, options, { target: 'sm_90a', multiprocessors: 3 });
    for (const name of ['dq', 'dk', 'dv'] as const) {
      expect(relativeL2(toFloat32(got[name]), exact[name]), name).toBeLessThan(BOUND);
    }
  });

  // Every way to divide the work gives what the table's does.
  const TUNINGS: readonly { readonly name: string; readonly tuning: GradientTuning }[] = [
    {
      name: 'three consumers',
      tuning: { queries: { consumers: 3, held: 'codes' }, keys: { consumers: 3, turns: 'none' } },
    },
    ...(['scores-ahead', 'ahead'] as const).flatMap((schedule) =>
      (['issued', 'ended'] as const).map((turns) => {
        const tile = { schedule, turns, held: turns === 'ended' ? 'codes' : 'both' } as const;
        const queries = turns === 'ended' ? tile : ({ ...tile, consumers: 3 } as const);
        return { name: `${schedule}, in turns when ${turns}`, tuning: { queries, keys: tile } };
      }),
    ),
    {
      name: 'CTAs that stay',
      tuning: { queries: { consumers: 2, stays: true }, keys: { stays: true } },
    },
    {
      name: 'CTAs that stay, in turns, nothing in registers',
      tuning: {
        queries: { consumers: 2, stays: true, turns: 'issued', held: 'none', schedule: 'scores-ahead' },
        keys: { stays: true, turns: 'issued', held: 'none', schedule: 'scores-ahead' },
      },
    },
    {
      name: 'from shared memory, without turns',
      tuning: { queries: { held: 'none', turns: 'none' }, keys: { held: 'none', turns: 'none' }, apart: true },
    },
  ];
  test.each(sampled(TUNINGS, seed, { byHand: 0.5 }))('$name', ({ tuning }) => {
    // So few that a CTA which stays has several tiles.
    const facts = { target: 'sm_90a', multiprocessors: 3 } as const;
    const sizes: Sizes = { batch: 2, lengths: [130, 150], dims: [64, 64] };
    const { got, exact } = train(seed, sizes, { isCausal: true }, facts, undefined, tuning);
    for (const name of ['dq', 'dk', 'dv'] as const) {
      expect(relativeL2(toFloat32(got[name]), exact[name]), name).toBeLessThan(BOUND);
    }
  });
});
