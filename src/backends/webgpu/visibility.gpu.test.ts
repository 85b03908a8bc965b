/**
 * Keys that a row cannot see do not affect it, and neither does the size of other keys: on every family, with inputs of
 * random lengths, heads, outlier sizes and kinds of hiding. Errors are judged against float64, and against the errors of
 * the same rows without the keys that they do not see.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { createWebgpuBackendOn } from './backend.ts';
import type { Forced } from './families/choose.ts';
import type { WebgpuBackend } from './index.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();
const SWIFTSHADER = process.env.SAGEATTENTION_SOFTWARE_GPU === 'swiftshader';
/** Every shape compiles its kernels: lavapipe takes five times as long for them as SwiftShader, which has the same shapes. */
const RUNS = process.env.CI === 'true' ? (SWIFTSHADER ? 3 : 2) : 1;

/** What INT8 QK with FP16 PV loses on normal inputs, and a half more. */
const BOUND = 0.02;

const FAMILIES: readonly (Forced & { readonly kernel?: 'qk-int8-pv-int8' })[] = [
  { family: 'base' },
  { family: 'subgroup' },
  { family: SWIFTSHADER ? 'base' : 'subgroup', kernel: 'qk-int8-pv-int8' },
  // lavapipe takes minutes to compile emulated matrices.
  ...(SWIFTSHADER ? [{ emulateMatrices: 'int8', variant: '1s16r16k-qk1-pv1' } as const] : []),
];

interface Case {
  readonly keys: number;
  readonly dim: number;
  readonly kvHeads: number;
  readonly group: number;
  /** The size of the hidden keys, or of one later key. */
  readonly times: number;
  readonly offset: number;
  readonly salt: number;
}

const CASE: fc.Arbitrary<Case> = fc.record({
  keys: fc.integer({ min: 20, max: 150 }),
  dim: fc.constantFrom(40, 64),
  kvHeads: fc.integer({ min: 1, max: 2 }),
  group: fc.integer({ min: 1, max: 2 }),
  times: fc.constantFrom(30, 100, 1000),
  offset: fc.constantFrom(0, 5, 20),
  salt: fc.integer({ min: 0, max: 1000 }),
});

/** Relative L1 over the rows of each head that `seen` names. */
function errorOf(
  output: Tensor,
  exact: Float64Array,
  rows: number,
  dim: number,
  seen: (row: number) => boolean,
): number {
  const actual = toFloat32(output);
  let [error, size] = [0, 0];
  for (let i = 0; i < exact.length; i++) {
    if (!seen(Math.floor(i / dim) % rows)) continue;
    error += Math.abs((actual[i] as number) - (exact[i] as number));
    size += Math.abs(exact[i] as number);
  }
  return error / size;
}

for (const { kernel = 'qk-int8-pv-fp16', ...forced } of FAMILIES) {
  const name = `${forced.family ?? 'matrix, emulated'}, ${kernel}`;
  describe(`what rows of family ${name} see (SAGEATTENTION_SEED=${seed})`, () => {
    let backend: WebgpuBackend;
    beforeAll(() => {
      backend = createWebgpuBackendOn(forced);
    });
    afterAll(() => backend.dispose());

    const holds = (property: (made: Case, random: Random) => Promise<void>) =>
      fc.assert(
        fc.asyncProperty(CASE, (made) => property(made, new Random(seed + made.salt))),
        { seed, numRuns: RUNS, endOnFailure: true },
      );

    async function errorWith(
      inputs: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
      options: AttentionOptions,
      seen: (row: number) => boolean = () => true,
    ): Promise<number> {
      const { attnMask } = options;
      const all = attnMask === undefined ? inputs : { ...inputs, attnMask: attnMask as Tensor };
      const plan = await backend.createPlan(all, { ...options, kernel });
      const { output } = await plan.run(all);
      plan.dispose();
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), all);
      const [, , rows, dim] = output.shape as [number, number, number, number];
      return errorOf(output as Tensor, exact.output, rows, dim, seen);
    }

    function inputsOf({ keys, dim, kvHeads, group, offset }: Case, random: Random, rows: number) {
      const offsets = random.normals(dim).map((x) => x * offset);
      const k = random.normals(kvHeads * keys * dim).map((x, i) => x + (offsets[i % dim] as number));
      return {
        q: tensor(random.normals(kvHeads * group * rows * dim), [1, kvHeads * group, rows, dim]),
        k: tensor(k, [1, kvHeads, keys, dim]),
        v: tensor(random.normals(kvHeads * keys * dim), [1, kvHeads, keys, dim]),
      };
    }

    /** Applies `f` to the elements of the keys that are named. */
    const changed = (x: Tensor, f: (value: number) => number, of: (key: number) => boolean): Tensor => {
      const [, , keys, dim] = x.shape as [number, number, number, number];
      const data = toFloat32(x).map((value, i) => (of(Math.floor(i / dim) % keys) ? f(value) : value));
      return tensor(data, x.shape);
    };

    it('keys behind a mask count in nothing, whatever is written there and however they are hidden', () =>
      holds(async (made, random) => {
        const { keys, times } = made;
        const rows = 9;
        const seen = Math.ceil(keys / 3);
        const inputs = inputsOf(made, random, rows);
        const garbage = random.uniform() < 0.5 ? 0 : times;
        const fill = (x: Tensor) =>
          changed(
            x,
            () => garbage * (random.uniform() - 0.5) * 3,
            (key) => key >= seen,
          );
        const { q, k, v } = inputs;
        const filled = { q, k: fill(k), v: fill(v) };
        const hidden = [false, Number.NEGATIVE_INFINITY, -1e4, -3.4028234e38][Math.floor(random.uniform() * 4)];
        const rowed = random.uniform() < 0.5;
        const length = rowed ? rows * keys : keys;
        const attnMask =
          hidden === false
            ? tensor(
                Uint8Array.from({ length }, (_, i) => Number(i % keys < seen)),
                rowed ? [rows, keys] : [keys],
              )
            : tensor(
                Float32Array.from({ length }, (_, i) => (i % keys < seen ? 0 : (hidden as number))),
                rowed ? [rows, keys] : [keys],
              );
        expect(await errorWith(filled, { attnMask })).toBeLessThan(BOUND);
      }));

    it('keys outside of the band count in nothing', () =>
      holds(async (made, random) => {
        const rows = Math.ceil(made.keys / 4);
        const { q, k, v } = inputsOf(made, random, rows);
        const fill = (x: Tensor) =>
          changed(
            x,
            (value) => value * made.times,
            (key) => key >= rows,
          );
        expect(await errorWith({ q, k: fill(k), v: fill(v) }, { isCausal: true })).toBeLessThan(BOUND);
      }));

    it('a later key of any size leaves earlier rows as right as they are without it', () =>
      holds(async (made, random) => {
        const { keys, times } = made;
        const inputs = inputsOf({ ...made, offset: Math.min(made.offset, 5) }, random, keys);
        const at = Math.floor(keys * (0.3 + 0.6 * random.uniform()));
        const before = (row: number) => row < at;
        const alone = await errorWith(inputs, { isCausal: true }, before);
        for (const operand of ['k', 'v'] as const) {
          const large = changed(
            inputs[operand],
            (value) => value * times,
            (key) => key === at,
          );
          const error = await errorWith({ ...inputs, [operand]: large }, { isCausal: true }, before);
          expect(error, `${operand}, ${alone} alone`).toBeLessThan(Math.max(BOUND, 2 * alone));
        }
      }));

    it('documents packed under a mask do not know of each other', () =>
      holds(async (made, random) => {
        const { keys, times } = made;
        const { q, k, v } = inputsOf({ ...made, offset: 0 }, random, keys);
        const first = Math.floor(keys / 2);
        const own = (key: number) => key < first;
        const attnMask = tensor(
          Uint8Array.from({ length: keys * keys }, (_, i) => Number(own(Math.floor(i / keys)) === own(i % keys))),
          [keys, keys],
        );
        const large = (x: Tensor, factor: number) =>
          changed(
            x,
            (value) => value * factor,
            (key) => !own(key),
          );
        // The other document's queries are large too: their rows are judged by nobody else's.
        const packed = { q: large(q, 1 / times), k: large(k, times), v: large(v, times) };
        expect(await errorWith(packed, { attnMask }, own)).toBeLessThan(BOUND);
        expect(await errorWith(packed, { attnMask }, (row) => !own(row))).toBeLessThan(BOUND);
        expect(await errorWith({ ...packed, q: large(q, times) }, { attnMask }, own)).toBeLessThan(BOUND);
      }));

    it('softcap of any size, and no softcap where it is larger than every score', () =>
      fc.assert(
        fc.asyncProperty(CASE, fc.double({ min: -4, max: 38.5, noNaN: true }), async (made, exponent) => {
          const inputs = inputsOf({ ...made, offset: 0 }, new Random(seed + made.salt), 7);
          const softcap = Math.min(10 ** exponent, 3.4028234e38);
          expect(await errorWith(inputs, { softcap })).toBeLessThan(BOUND);
        }),
        {
          seed,
          // The example is the first of them.
          numRuns: SWIFTSHADER ? 6 : 2,
          examples: [
            [{ ...({} as Case), keys: 40, dim: 32, kvHeads: 1, group: 1, times: 1, offset: 0, salt: 0 }, 38.5],
          ],
        },
      ));

    it('NaN in an additive mask makes its row NaN, and no other', async () => {
      const random = new Random(seed);
      const made = { keys: 70, dim: 32, kvHeads: 1, group: 1, times: 1, offset: 0, salt: 0 };
      const inputs = inputsOf(made, random, 5);
      const bias = new Float32Array(5 * 70);
      bias[2 * 70 + 66] = Number.NaN;
      const attnMask = tensor(bias, [5, 70]);
      const plan = await backend.createPlan({ ...inputs, attnMask }, { returnLse: true, kernel });
      const { output, lse } = await plan.run({ ...inputs, attnMask });
      plan.dispose();
      expect(Array.from(toFloat32(output as Tensor), Number.isNaN)).toEqual(
        Array.from({ length: 5 * 32 }, (_, i) => Math.floor(i / 32) === 2),
      );
      expect(Array.from(toFloat32(lse as Tensor), Number.isNaN)).toEqual([false, false, true, false, false]);
    });
  });
}
