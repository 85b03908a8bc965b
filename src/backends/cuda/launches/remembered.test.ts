import { expect, it } from 'vitest';
import { createProblem } from '../../../attention/problem.ts';
import { tensor } from '../../../tensor/tensor.ts';
import { chooseOptions } from '../../choice.ts';
import { descriptorOf } from '../kernel-table.ts';
import { planBackward } from './backward.ts';
import { planBlockMap } from './block-map.ts';
import { planMerge, planSum } from './merge.ts';
import { planAttend, planKeyValue, planLaunches } from './plan.ts';
import { remembered } from './remembered.ts';

const q = tensor(new Float32Array(2 * 40 * 32), [1, 2, 40, 32]);
const facts = { target: 'sm_80', multiprocessors: 108 } as const;

it('gives the same plan for equal problems and another for any difference', () => {
  let made = 0;
  const planner = remembered({
    planLaunches,
    planKeyValue,
    planBackward,
    planBlockMap,
    planMerge,
    planSum,
    planAttend: (...given) => {
      made++;
      return planAttend(...given);
    },
  });
  const choice = chooseOptions(descriptorOf('qk-int8-pv-fp16-cuda'), { headDim: 32, valueDim: 32 }, {});
  const plan = (options: object, room = 256) =>
    planner.planAttend(createProblem(q, q, q, options), choice, facts, { room: { capacity: room } });
  const first = plan({});
  expect(plan({})).toBe(first);
  expect(made).toBe(1);
  const others = [plan({ isCausal: true }), plan({ softcap: 3 }), plan({ smScale: 0.5 }), plan({}, 512)];
  expect(new Set([first, ...others]).size).toBe(5);
  expect(made).toBe(5);
  // What is kept is bounded: the first is made anew.
  for (let i = 0; i < 200; i++) plan({ smScale: 1 / (i + 3) });
  expect(plan({})).not.toBe(first);
});
