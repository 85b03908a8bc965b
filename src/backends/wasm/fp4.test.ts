import { afterAll, describe, expect, it } from 'vitest';
import { readGolden } from '../../../test/golden/golden.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { compare, exactAttention, FP4_PV_FP4_ALGORITHM, quantizedAttention } from '../../reference/index.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { slice, type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackend } from './backend.ts';
import { tileGeometry } from './geometry.ts';
import { BLOCK_K } from './job.ts';
import { FP4_KERNEL } from './kernel-table.ts';

const seed = runSeed();
const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;

describe.each(relaxedRuns ? (['simd128', 'relaxed'] as const) : (['simd128'] as const))(
  `FP4 on %s (seed ${seed})`,
  (simd) => {
    const backend = createWasmBackend({ threads: 1, simd });
    afterAll(() => backend.dispose());

    async function attend(q: Tensor, k: Tensor, v: Tensor, options: Parameters<typeof chooseOptions>[2]) {
      const problem = createProblem(q, k, v, options);
      const plan = await backend.plan(problem, chooseOptions(FP4_KERNEL, problem, options));
      const { output, lse } = await plan.run({ q, k, v }, {});
      return { output: toFloat32(output as Tensor), lse: lse && toFloat32(lse as Tensor) };
    }

    // They still differ in the running maximum, of 128 keys here and of 64 there, which moves roundings of P.
    it.each(['mse', 'four-over-six', 'none'] as const)(
      'gives the numbers of the algorithm, search %s',
      async (scaleSearch) => {
        for (const name of ['outlier-d128', 'normal-d64-gqa'] as const) {
          const { q, k, v, isCausal } = readGolden(name);
          for (const smoothQ of ['block', 'sequence', false] as const) {
            const options = { isCausal, smoothQ, scaleSearch };
            const { output } = await attend(q, k, v, options);
            const emulated = quantizedAttention(q, k, v, { ...options, algorithm: FP4_PV_FP4_ALGORITHM }).output;
            expect(compare(output, emulated).relativeL1).toBeLessThan(0.025);
          }
        }
      },
      60_000,
    );

    it('outlier-d128 within 0.105', async () => {
      const { q, k, v, isCausal } = readGolden('outlier-d128');
      const { output } = await attend(q, k, v, { isCausal });
      expect(compare(output, exactAttention(q, k, v, { isCausal }).output).relativeL1).toBeLessThanOrEqual(0.105);
    });

    it('V of any magnitude gives the same relative error', async () => {
      const random = new Random(seed);
      const of = (scale = 1) =>
        tensor(
          random.normals(200 * 64).map((x) => x * scale),
          [1, 1, 200, 64],
        );
      const [q, k] = [of(), of()];
      for (const scale of [1, 0.001, 1e4, 1e-30]) {
        const v = of(scale);
        const { output } = await attend(q, k, v, {});
        expect(compare(output, exactAttention(q, k, v).output).relativeL1).toBeLessThan(0.2);
      }
    });

    it('the output is a convex combination of codes: a constant V comes back', async () => {
      const random = new Random(seed);
      const [q, k] = [0, 1].map(() => tensor(random.normals(130 * 40), [1, 1, 130, 40])) as [Tensor, Tensor];
      const v = tensor(new Float32Array(130 * 24).fill(3), [1, 1, 130, 24]);
      const { output } = await attend(q, k, v, { isCausal: true });
      for (const value of output) expect(value).toBeCloseTo(3, 4);
    });

    it('a cache holds 4.5 bits an element and little more, appended token by token', async () => {
      const random = new Random(seed);
      const of = (length: number) => tensor(random.normals(2 * length * 128), [1, 2, length, 128]);
      const [length, added] = [256, 130];
      const [k, v] = [of(length + added), of(length + added)];
      const part = (x: Tensor, from: number, to: number) => slice(x, 2, from, to);
      const problemOf = (keys: Tensor, values: Tensor) => createProblem(keys, keys, values, {});
      const problem = problemOf(part(k, 0, length), part(v, 0, length));
      const cache = await backend.prepareKeyValue(
        problem,
        chooseOptions(FP4_KERNEL, problem, {}),
        part(k, 0, length),
        part(v, 0, length),
        {},
      );
      const bits = (tileGeometry(128, 128, simd, { precision: 'fp4', smoothV: false }).bytes * 8) / (BLOCK_K * 2 * 128);
      expect(bits).toBeLessThan(4.75);
      for (let token = length; token < length + added; token++) {
        const [ownK, ownV] = [part(k, token, token + 1), part(v, token, token + 1)];
        await cache.append(ownK, ownV, problemOf(ownK, ownV), {});
      }
      const q = of(3);
      const { output } = await cache.attend(q, createProblem(q, k, v, {}), {}, {});
      // K and V alone in FP4: 0.11 was measured, where all of it in FP4 loses 0.165.
      expect(compare(toFloat32(output as Tensor), exactAttention(q, k, v).output).relativeL1).toBeLessThan(0.15);
      cache.dispose();
    });
  },
);
