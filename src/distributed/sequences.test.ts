import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { exactBackend } from '../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { createVarlenProblem } from '../attention/problem.ts';
import { createSimulatedBackend } from '../backends/cuda/testing/simulator/backend.ts';
import { attentionExact } from '../reference/exact.ts';
import { compare } from '../reference/metrics.ts';
import { toFloat32 } from '../tensor/access.ts';
import { tensor } from '../tensor/tensor.ts';
import { createDeviceGroup } from './group.ts';
import { assignSequences, gatherSequences, sageattnVarlenSharded, shardSequences } from './sequences.ts';

const seed = runSeed();

function packed(random: Random, lengths: readonly (readonly [number, number])[], dim: number) {
  const starts = (side: 0 | 1) => {
    const all = [0];
    for (const length of lengths) all.push((all.at(-1) as number) + length[side]);
    return all;
  };
  const [cuSeqlensQ, cuSeqlensK] = [starts(0), starts(1)];
  const make = (total: number, heads: number) => tensor(random.normals(total * heads * dim), [total, heads, dim]);
  const [totalQ, totalK] = [cuSeqlensQ.at(-1) as number, cuSeqlensK.at(-1) as number];
  return { q: make(totalQ, 4), k: make(totalK, 2), v: make(totalK, 2), cuSeqlensQ, cuSeqlensK };
}

describe(`sequences that are dealt out (SAGEATTENTION_SEED=${seed})`, () => {
  it('give what they give together, for any lengths and ranks', async () => {
    const backend = exactBackend();
    const length = fc.integer({ min: 0, max: 9 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(length, length), { minLength: 1, maxLength: 7 }),
        fc.integer({ min: 1, max: 5 }),
        fc.boolean(),
        async (lengths, ranks, isCausal) => {
          const all = packed(new Random(seed), lengths, 8);
          const group = await createDeviceGroup({ ranks, backend });
          const sequences = shardSequences(group, all);
          const output = await gatherSequences(await sageattnVarlenSharded(sequences, { isCausal }));
          const { q, k, v, cuSeqlensQ, cuSeqlensK } = all;
          const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, { isCausal });
          const expected = attentionExact(problem, { q, k, v }).output;
          expect(output.shape).toEqual(q.shape);
          toFloat32(output).forEach((value, i) => {
            expect(Math.abs(value - (expected[i] as number))).toBeLessThan(1e-5);
          });
        },
      ),
      { seed: seed | 0, numRuns: 30 },
    );
  });

  it('run on devices', async () => {
    const backend = createSimulatedBackend(80, 2);
    const group = await createDeviceGroup({ devices: [0, 1], backend });
    const all = packed(
      new Random(seed),
      [
        [5, 9],
        [20, 20],
        [3, 3],
      ],
      16,
    );
    const sequences = shardSequences(group, all);
    expect(sequences.assignment).toEqual([[1], [0, 2]]);
    const output = await sageattnVarlenSharded(sequences, { isCausal: true });
    const { q, k, v, cuSeqlensQ, cuSeqlensK } = all;
    const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, { isCausal: true });
    const expected = attentionExact(problem, { q, k, v }).output;
    expect(compare(toFloat32(await gatherSequences(output)), expected).relativeL1).toBeLessThan(0.03);
    for (const each of [sequences, output]) each.dispose();
    group.dispose();
    await backend.dispose();
  });

  it('are as even as the longest first makes them', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(100), { maxLength: 40 }), fc.integer({ min: 1, max: 8 }), (work, ranks) => {
        const assignment = assignSequences(work, ranks);
        expect(assignment.flat().sort((a, b) => a - b)).toEqual(work.map((_, i) => i));
        const loads = assignment.map((own) => own.reduce((sum, i) => sum + (work[i] as number), 0));
        const total = work.reduce((sum, each) => sum + each, 0);
        const least = Math.max(total / ranks, ...work, 0);
        // The least possible is at least this; the order of the longest first stays within 4/3 of it and one sequence.
        expect(Math.max(...loads)).toBeLessThanOrEqual(total / ranks + Math.max(0, ...work) * (1 - 1 / ranks) + 1e-9);
        expect(Math.max(...loads)).toBeGreaterThanOrEqual(least === 0 ? 0 : total / ranks - 1e-9);
      }),
    );
  });

  it('name the argument that is wrong', async () => {
    const group = await createDeviceGroup({ ranks: 2, backend: exactBackend() });
    const all = packed(new Random(seed), [[2, 2]], 8);
    expect(() => shardSequences(group, { ...all, cuSeqlensK: [0, 9] })).toThrow(
      expect.objectContaining({ argument: 'cuSeqlensK' }),
    );
    const sequences = shardSequences(group, all);
    await expect(sageattnVarlenSharded(sequences, { attnMask: 1 } as never)).rejects.toMatchObject({
      code: 'unknown-option',
    });
    group.dispose();
    await expect(sageattnVarlenSharded(sequences)).rejects.toMatchObject({ code: 'disposed' });
  });
});
