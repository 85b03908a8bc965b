import { expect, test } from 'vitest';
import { createProblem } from '../../../../attention/problem.ts';
import { emptyTensor } from '../../../../tensor/tensor.ts';
import { chooseOptions } from '../../../choice.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { planLaunches } from '../../launches/plan.ts';

test('consumers that would wait for registers that their CTA has not are refused', () => {
  const operand = emptyTensor([1, 1, 256, 128], 'bfloat16');
  const problem = createProblem(operand, operand, operand, {});
  const plan = (producer: number, consumer: number) =>
    planLaunches(
      problem,
      chooseOptions(descriptorOf('exact'), problem, {}),
      { target: 'sm_90a', multiprocessors: 132 },
      { overrides: { registers: { producer, consumer } } },
    );
  expect(() => plan(32, 240)).toThrow('512 registers for 3 warpgroups that have 168 each');
  expect(plan(24, 240).launches).toHaveLength(1);
});
