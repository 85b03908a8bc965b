/**
 * Few queries over many keys, by the kernel that packs the heads of a group: against float64, for random head counts and
 * dims, kinds of hiding and layouts of K and V, out of calls and out of caches.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { sampled } from '../../../test/support/sample.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import { elementCount, type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWebgpuBackendOn } from './backend.ts';
import type { Forced } from './families/choose.ts';
import type { WebgpuBackend } from './index.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();
/** Every case compiles kernels of its own, which takes a software driver many seconds; the seed differs from run to run. */
const RUNS = 1;
vi.setConfig({ testTimeout: 400_000 });

/** What INT8 QK with FP16 PV loses on normal inputs, and a half more. */
const BOUND = 0.02;

const LAYOUTS: readonly (Forced & { readonly name: string })[] = [
  { name: 'rows', family: 'base' },
  { name: 'tiles', emulateMatrices: 'int8' },
];

const CASE = fc.record({
  kvHeads: fc.integer({ min: 1, max: 2 }),
  group: fc.constantFrom(1, 2, 3, 4),
  queries: fc.constantFrom(1, 1, 2, 3),
  keys: fc.integer({ min: 128, max: 400 }),
  headDim: fc.constantFrom(8, 64, 96, 128, 256),
  valueDim: fc.constantFrom(6, 32, 64, 100, 128, 160, 256),
  dtype: fc.constantFrom('float32', 'float16', 'bfloat16'),
  hiding: fc.constantFrom('nothing', 'causal', 'window', 'bool', 'additive', 'softcap'),
  /** Rows and keys of a block of a mask in which each is there with a chance of a half. */
  blocks: fc.constantFrom(undefined, [16, 16], [32, 64], [16, 112]),
  smoothV: fc.boolean(),
  sinks: fc.boolean(),
  tensorLayout: fc.constantFrom('HND', 'NHD'),
  salt: fc.integer({ min: 0, max: 1e6 }),
} as const);

type Case = typeof CASE extends fc.Arbitrary<infer T> ? T : never;

/** Inputs and options of a case. */
function made({
  kvHeads,
  group,
  queries,
  keys,
  headDim,
  valueDim,
  dtype,
  hiding,
  blocks,
  smoothV,
  sinks,
  tensorLayout,
  salt,
}: Case) {
  const random = new Random(seed + salt);
  const heads = kvHeads * group;
  const shaped = (h: number, tokens: number, dim: number): Tensor => {
    const shape = tensorLayout === 'HND' ? [2, h, tokens, dim] : [2, tokens, h, dim];
    return fromFloat32(random.normals(2 * h * tokens * dim), shape, dtype as 'float32');
  };
  const inputs = {
    q: shaped(heads, queries, headDim),
    k: shaped(kvHeads, keys, headDim),
    v: shaped(kvHeads, keys, valueDim),
  };
  const mask = { bool: 'bool', additive: 'additive' }[hiding as string];
  const cells = queries * keys;
  const attnMask =
    mask === undefined
      ? undefined
      : mask === 'bool'
        ? tensor(
            Uint8Array.from({ length: cells }, () => Number(random.uniform() < 0.7)),
            [1, 1, queries, keys],
          )
        : tensor(
            random.normals(cells).map((x) => (x > 1.5 ? Number.NEGATIVE_INFINITY : x)),
            [1, 1, queries, keys],
          );
  const [rows = 1, columns = 1] = blocks ?? [];
  const mapShape = [2, heads, Math.ceil(queries / rows), Math.ceil(keys / columns)];
  const blockMap =
    blocks &&
    tensor(
      Uint8Array.from({ length: elementCount(mapShape) }, () => Number(random.uniform() < 0.5)),
      mapShape,
    );
  const options: AttentionOptions = {
    tensorLayout: tensorLayout as 'HND',
    smoothV,
    returnLse: true,
    ...(hiding === 'causal' ? { isCausal: true, causalAlignment: 'bottom-right' } : {}),
    ...(hiding === 'window' ? { isCausal: true, causalAlignment: 'bottom-right', windowSize: [200, 0] } : {}),
    ...(hiding === 'softcap' ? { softcap: 5 } : {}),
    ...(attnMask === undefined ? {} : { attnMask }),
    ...(sinks ? { sinks: tensor(random.normals(heads), [heads]) } : {}),
    ...(blockMap === undefined ? {} : { blockMask: { rows, keys: columns, map: blockMap } }),
  };
  const all = {
    ...inputs,
    ...(attnMask === undefined ? {} : { attnMask }),
    ...(sinks ? { sinks: options.sinks as Tensor } : {}),
    ...(blockMap === undefined ? {} : { blockMap }),
  };
  return { all, options };
}

for (const { name, ...forced } of sampled(LAYOUTS, seed, { byHand: 0.5 })) {
  describe(`packed heads, K and V in ${name} (SAGEATTENTION_SEED=${seed})`, () => {
    let backend: WebgpuBackend;
    beforeAll(() => {
      backend = createWebgpuBackendOn(forced);
    });
    afterAll(() => backend.dispose());

    it('rows are those of exact attention', () =>
      fc.assert(
        fc.asyncProperty(CASE, async (one) => {
          const { all, options } = made(one);
          const plan = await backend.createPlan(all, options);
          expect(plan.details.variant).toMatch(/^packed/);
          const { output, lse } = await plan.run(all);
          plan.dispose();
          const exact = attentionExact(createProblem(all.q, all.k, all.v, options), all);
          expect(compare(toFloat32(output as Tensor), exact.output).relativeL1).toBeLessThan(BOUND);
          for (const [i, value] of toFloat32(lse as Tensor).entries()) {
            const expected = exact.lse[i] as number;
            if (Number.isFinite(expected)) expect(Math.abs(value - expected)).toBeLessThan(0.07);
            else expect(value).toBe(expected);
          }
        }),
        { seed, numRuns: RUNS, endOnFailure: true },
      ));

    it('a step of decoding over a cache that grew, and a token that is not a number', async () => {
      const random = new Random(seed);
      const [heads, kvHeads, dim] = [8, 2, 64];
      const normals = (h: number, tokens: number) => tensor(random.normals(h * tokens * dim), [1, h, tokens, dim]);
      const [k, v] = [normals(kvHeads, 600), normals(kvHeads, 600)];
      const part = (x: Tensor, from: number, to: number): Tensor => {
        const data = toFloat32(x);
        const rows = [0, 1].flatMap((head) => [...data.subarray((head * 600 + from) * dim, (head * 600 + to) * dim)]);
        return tensor(Float32Array.from(rows), [1, kvHeads, to - from, dim]);
      };
      const q = normals(heads, 1);
      const first = createProblem(q, part(k, 0, 577), part(v, 0, 577), {});
      const choice = chooseOptions(backend.defaultKernel(), first, {});
      const cache = await backend.prepareKeyValue(first, choice, part(k, 0, 577), part(v, 0, 577), {});
      await cache.append(
        part(k, 577, 600),
        part(v, 577, 600),
        createProblem(q, part(k, 577, 600), part(v, 577, 600), {}),
        {},
      );
      const problem = createProblem(q, k, v, {});
      const { output } = await cache.attend(q, problem, {}, {});
      expect(compare(toFloat32(output as Tensor), attentionExact(problem, { q, k, v }).output).relativeL1).toBeLessThan(
        BOUND,
      );
      cache.dispose();

      const wrong = toFloat32(v).slice();
      wrong[dim * 599] = Number.NaN;
      const poisoned = { q, k, v: tensor(wrong, v.shape) };
      const plan = await backend.createPlan(poisoned, {});
      const rows = toFloat32((await plan.run(poisoned)).output as Tensor);
      plan.dispose();
      // The token belongs to the first key head, whose four query heads attend to it.
      expect([...rows.subarray(0, 4 * dim)].every(Number.isNaN)).toBe(true);
      expect([...rows.subarray(4 * dim)].some(Number.isNaN)).toBe(false);
    });
  });
}
