/** Scratch memory that holds NaN: what a call does not write it must not multiply, not even by 0. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import type { CausalAlignment } from '../../../../attention/options.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { attentionExact } from '../../../../reference/exact.ts';
import { compare } from '../../../../reference/metrics.ts';
import { tensor } from '../../../../tensor/tensor.ts';
import { chooseOptions } from '../../../choice.ts';
import { descriptorOf } from '../../kernel-table.ts';
import { planLaunches } from '../../launches/plan.ts';
import { GlobalMemory } from '../../testing/simulator/memory.ts';
import { simulateLaunches } from '../../testing/simulator/simulator.ts';

const seed = runSeed();
const FACTS = { target: 'sm_90a', multiprocessors: 132 } as const;

it.each(['qk-int8-pv-fp16-cuda-sm90', 'qk-int8-pv-fp8-cuda-sm90'] as const)(
  `%s reads no V that the call has not written (SAGEATTENTION_SEED=${seed})`,
  (kernel) => {
    // Most leave out the whole first tile of 128 keys.
    const length = fc.integer({ min: 100, max: 320 });
    const window = fc.tuple(fc.integer({ min: 0, max: 30 }), fc.integer({ min: 0, max: 10 }));
    const alignment = fc.constantFrom<CausalAlignment>('bottom-right', 'bottom-right', 'top-left');
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 2 }),
        fc.integer({ min: 1, max: 2 }),
        fc.integer({ min: 1, max: 3 }),
        length,
        window,
        alignment,
        fc.nat(),
        (batch, heads, rows, keys, windowSize, causalAlignment, dataSeed) => {
          const random = new Random(dataSeed);
          const make = (tokens: number) =>
            tensor(random.normals(batch * heads * tokens * 32), [batch, heads, tokens, 32]);
          const [q, k, v] = [make(rows), make(keys), make(keys)];
          const problem = createProblem(q, k, v, { windowSize, causalAlignment });
          const plan = planLaunches(problem, chooseOptions(descriptorOf(kernel), problem, {}), FACTS);
          const memory = new GlobalMemory();
          const addresses = new Map<string, number>();
          const place = (name: string, bytes: number, contents?: Uint8Array) =>
            addresses.set(name, memory.allocate(name, bytes, contents));
          for (const [name, { data }] of Object.entries({ q, k, v })) {
            place(name, data.byteLength, new Uint8Array(data.buffer));
          }
          place('output', q.data.byteLength);
          for (const [name, bytes] of Object.entries(plan.scratch)) {
            place(name, bytes, new Uint8Array(bytes).fill(0xff));
          }
          for (const [name, bytes] of Object.entries(plan.zeroed ?? {})) place(name, bytes, new Uint8Array(bytes));
          for (const [name, contents] of Object.entries(plan.constants)) place(name, contents.byteLength, contents);
          simulateLaunches(plan.launches, addresses, memory);
          const output = new Float32Array(memory.read('output').bytes.slice().buffer);
          const exact = attentionExact(problem, { q, k, v }).output;
          if (exact.some((value) => value !== 0)) expect(compare(output, exact).relativeL1).toBeLessThan(0.1);
          else expect(output.every((value) => value === 0)).toBe(true);
        },
      ),
      { seed: seed | 0, numRuns: 16 },
    );
  },
);
