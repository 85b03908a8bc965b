/** Blocks that a backend chooses, against the reference: layouts, dtypes, band, groups, packed sequences, numbers that are none. */
import fc from 'fast-check';
import { contiguousBlocks } from '../../src/attention/block-choice.ts';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../../src/attention/problem.ts';
import { type SettledSparsity, type Sparsity, settleSparsity } from '../../src/attention/sparsity.ts';
import type { Backend } from '../../src/backends/backend.ts';
import { buildBlockMap } from '../../src/reference/block-map.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import type { Tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../support/random.ts';
import { place } from '../support/tensors.ts';

export interface Shape {
  readonly heads: readonly [query: number, key: number];
  readonly lengths: readonly [query: number, key: number];
  readonly dim: number;
  readonly dtype: DType;
  readonly layout: 'HND' | 'NHD';
}

/** Rows of a block are alike, blocks are not: their scores lie far apart. */
export function inBlocks(random: Random, [heads, tokens]: readonly [number, number], shape: Shape): Tensor {
  const { dim, layout, dtype } = shape;
  const centres = random.normals(Math.ceil(tokens / 16) * dim, 2);
  const values = Float32Array.from({ length: heads * tokens * dim }, (_, i) => {
    const token = layout === 'HND' ? Math.floor(i / dim) % tokens : Math.floor(i / dim / heads);
    return (centres[Math.floor(token / 16) * dim + (i % dim)] as number) + random.uniform(-1, 1);
  });
  return place(values, layout === 'HND' ? [1, heads, tokens, dim] : [1, tokens, heads, dim], dtype);
}

const arbitraryShape: fc.Arbitrary<Shape> = fc.record({
  heads: fc.constantFrom([1, 1] as const, [4, 2] as const),
  lengths: fc.tuple(fc.integer({ min: 1, max: 90 }), fc.integer({ min: 0, max: 700 })),
  dim: fc.constantFrom(8, 24, 40, 64, 136),
  dtype: fc.constantFrom('float32' as const, 'float16' as const, 'bfloat16' as const),
  layout: fc.constantFrom('HND' as const, 'NHD' as const),
});
const size = fc.constantFrom(16, 32, 48);
const sizes = { rows: size, keys: fc.constantFrom(16, 48), sinkBlocks: fc.integer({ min: 0, max: 2 }) };
const share = fc.constantFrom(0, 0.1, 0.4, 0.7, 1);
const arbitrarySparsity: fc.Arbitrary<Sparsity> = fc.oneof(
  fc.record({ ...sizes, topK: share }),
  fc.record({ ...sizes, topP: fc.constantFrom(0, 0.3, 0.6, 0.9) }),
  fc.record({ ...sizes, threshold: fc.constantFrom(0.1, 0.5, 0.8), mass: fc.constantFrom(0.5, 0.9) }),
);
const arbitraryBand = fc.constantFrom(
  {},
  { isCausal: true },
  { isCausal: true, causalAlignment: 'bottom-right' as const },
  { windowSize: [40, 20] as const },
);

/** Compares one choice; blocks of about the weight at which keeping ends may change places, in one line of twenty. */
async function check(
  backend: Backend,
  plain: AttentionProblem,
  sparsity: SettledSparsity,
  inputs: { readonly q: Tensor; readonly k: Tensor },
): Promise<void> {
  const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
  const plan = await backend.planBlockMap?.(problem, sparsity);
  if (plan === undefined) throw new Error(`backend '${backend.name}' chooses no blocks`);
  const { map, fractions } = await plan.run(inputs, {});
  const expected = buildBlockMap(problem, sparsity, inputs);
  const { keptFraction, lostMass } = await fractions();
  plan.dispose();
  const { shape, data } = expected.map;
  if (`${map.shape}` !== `${shape}` || map.dtype !== 'bool') throw new Error(`a map ${map.dtype} [${map.shape}]`);
  const others = data.filter((flag, i) => flag !== (map as Tensor<'bool'>).data[i]).length;
  const lines = (shape[0] as number) * (shape[1] as number) * (shape[2] as number);
  const apart = [keptFraction - expected.keptFraction, lostMass - expected.lostMass].map(Math.abs);
  if (others > 2 * Math.floor(lines / 20) || apart.some((difference) => difference > 0.01)) {
    throw new Error(`${others} of ${data.length} blocks in ${lines} lines; fractions ${apart} apart`);
  }
}

/** @param runs random problems */
export const blockMapChecks = (backend: () => Promise<Backend>, seed: number, runs: number) => [
  {
    name: 'are those of the reference',
    run: () =>
      fc.assert(
        fc.asyncProperty(
          arbitraryShape,
          arbitrarySparsity,
          arbitraryBand,
          fc.integer(),
          async (shape, asked, band, of) => {
            const random = new Random(of);
            const q = inBlocks(random, [shape.heads[0], shape.lengths[0]], shape);
            const k = inBlocks(random, [shape.heads[1], shape.lengths[1]], shape);
            const problem = createProblem(q, k, k, { ...band, tensorLayout: shape.layout });
            await check(await backend(), problem, settleSparsity(asked), { q, k });
          },
        ),
        { seed: seed | 0, numRuns: runs },
      ),
  },
  {
    name: 'of packed sequences, one of them empty',
    async run() {
      const random = new Random(seed);
      const [starts, startsK] = [
        [0, 40, 40, 131],
        [0, 70, 75, 220],
      ];
      const packed = (tokens: number, heads: number) =>
        place(random.normals(tokens * heads * 24, 2), [tokens, heads, 24], 'bfloat16');
      const [q, k] = [packed(131, 4), packed(220, 2)];
      const sparsity = settleSparsity({ threshold: 0.1, mass: 0.6, rows: 32, keys: 16 });
      const options = { isCausal: true, causalAlignment: 'bottom-right' } as const;
      await check(await backend(), createVarlenProblem(q, k, k, starts, startsK, options), sparsity, { q, k });
    },
  },
  {
    name: 'of rows and keys that are not numbers are all computed',
    async run() {
      const random = new Random(seed);
      const shape = { heads: [1, 1], lengths: [48, 96], dim: 16, dtype: 'float32', layout: 'HND' } as const;
      const [q, k] = [inBlocks(random, [1, 48], shape), inBlocks(random, [1, 96], shape)];
      (q.data as Float32Array).fill(Number.NaN, 16 * 16, 16 * 17);
      (k.data as Float32Array).fill(Number.POSITIVE_INFINITY, 0, 16);
      const asked = [{ topK: 0.2 }, { topP: 0.5 }, { threshold: 0.2, mass: 0.5 }][random.integer(0, 2)] as Sparsity;
      const sparsity = settleSparsity({ ...asked, rows: 16, keys: 16 });
      await check(await backend(), createProblem(q, k, k, {}), sparsity, { q, k });
    },
  },
];
