/** Blocks that the kernels choose, in the simulator, against the reference: layouts, dtypes, band, groups, varlen. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { place } from '../../../test/support/tensors.ts';
import { sageattn, sageattnSparse } from '../../api/sageattn.ts';
import { contiguousBlocks } from '../../attention/block-choice.ts';
import { createProblem, createVarlenProblem } from '../../attention/problem.ts';
import { type Sparsity, settleSparsity } from '../../attention/sparsity.ts';
import { buildBlockMap } from '../../reference/block-map.ts';
import type { DType } from '../../tensor/dtype.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { setBackend } from '../registry.ts';
import { type CudaTensor, downloadAsync, upload } from './tensor.ts';
import { createSimulatedBackend } from './testing/simulator/backend.ts';

const seed = runSeed();
const backend = createSimulatedBackend(80);

interface Shape {
  readonly heads: readonly [query: number, key: number];
  readonly lengths: readonly [query: number, key: number];
  readonly dim: number;
  readonly dtype: DType;
  readonly layout: 'HND' | 'NHD';
}

/** Rows of a block are alike, blocks are not: their scores lie far apart. */
function inBlocks(random: Random, [heads, tokens]: readonly [number, number], shape: Shape): Tensor {
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

/** Blocks of about the weight at which keeping ends may change places; no other. */
function expectAlike(map: Tensor<'bool'>, expected: Tensor<'bool'>, lines: number, what: string): void {
  const others = expected.data.filter((flag, i) => flag !== map.data[i]).length;
  expect(others, what).toBeLessThanOrEqual(Math.floor(lines / 20) * 2);
}

describe(`blocks chosen by simulated kernels (seed ${seed})`, () => {
  it('are those of the reference', async () => {
    await fc.assert(
      fc.asyncProperty(
        arbitraryShape,
        arbitrarySparsity,
        arbitraryBand,
        fc.integer(),
        async (shape, asked, band, of) => {
          const random = new Random(of);
          const q = inBlocks(random, [shape.heads[0], shape.lengths[0]], shape);
          const k = inBlocks(random, [shape.heads[1], shape.lengths[1]], shape);
          const sparsity = settleSparsity(asked);
          const plain = createProblem(q, k, k, { ...band, tensorLayout: shape.layout });
          const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
          const plan = await backend.planBlockMap(problem, sparsity);
          const { map, fractions } = await plan.run({ q, k }, {});
          const expected = buildBlockMap(problem, sparsity, { q, k });
          const lines = expected.map.shape.slice(0, 3).reduce((a, b) => a * b, 1);
          expectAlike(map as Tensor<'bool'>, expected.map, lines, JSON.stringify({ shape, asked, band }));
          const { keptFraction, lostMass } = await fractions();
          expect(keptFraction).toBeCloseTo(expected.keptFraction, 1);
          expect(lostMass).toBeCloseTo(expected.lostMass, 2);
          plan.dispose();
        },
      ),
      { seed: seed | 0, numRuns: 12 },
    );
  });

  it('of packed sequences, one of them empty', async () => {
    const random = new Random(seed);
    const [starts, startsK] = [
      [0, 40, 40, 131],
      [0, 70, 75, 220],
    ];
    const packed = (tokens: number, heads: number) =>
      place(random.normals(tokens * heads * 24, 2), [tokens, heads, 24], 'bfloat16');
    const [q, k] = [packed(131, 4), packed(220, 2)];
    const sparsity = settleSparsity({ threshold: 0.1, mass: 0.6, rows: 32, keys: 16 });
    const plain = createVarlenProblem(q, k, k, starts, startsK, { isCausal: true, causalAlignment: 'bottom-right' });
    const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
    const plan = await backend.planBlockMap(problem, sparsity);
    const { map, fractions } = await plan.run({ q, k }, {});
    const expected = buildBlockMap(problem, sparsity, { q, k });
    expectAlike(map as Tensor<'bool'>, expected.map, 24, 'packed');
    expect((await fractions()).lostMass).toBeCloseTo(expected.lostMass, 2);
  });

  it('of rows that are not numbers are all computed', async () => {
    const random = new Random(seed);
    const shape = { heads: [1, 1], lengths: [48, 96], dim: 16, dtype: 'float32', layout: 'HND' } as const;
    const [q, k] = [inBlocks(random, [1, 48], shape), inBlocks(random, [1, 96], shape)];
    (q.data as Float32Array).fill(Number.NaN, 16 * 16, 16 * 17);
    (k.data as Float32Array).fill(Number.POSITIVE_INFINITY, 0, 16);
    const sparsity = settleSparsity({ topK: 0.2, rows: 16, keys: 16 });
    const plain = createProblem(q, k, k, {});
    const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
    const { map } = await (await backend.planBlockMap(problem, sparsity)).run({ q, k }, {});
    expect([...(map as Tensor<'bool'>).data]).toEqual([...buildBlockMap(problem, sparsity, { q, k }).map.data]);
  });

  it('of tensors on the device stay there, and are freed where nobody is given them', async () => {
    const random = new Random(seed);
    const shape = { heads: [2, 1], lengths: [48, 96], dim: 16, dtype: 'float16', layout: 'HND' } as const;
    const here = [inBlocks(random, [2, 48], shape), inBlocks(random, [1, 96], shape)] as const;
    await setBackend(backend);
    const device = (await backend.cuda()).device();
    const [q, k] = here.map((tensor) => upload(tensor, device)) as [CudaTensor, CudaTensor];
    const options = { backend: 'cuda', sparsity: { topP: 0.6, rows: 16, keys: 16 } } as const;
    const { output, sparsity } = await sageattnSparse(q, k, k, options);
    expect(sparsity.blockMask.map).toMatchObject({ location: 'cuda', dtype: 'bool', shape: [1, 2, 3, 6] });
    const expected = await sageattnSparse(...here, here[1], options);
    expect(await downloadAsync(sparsity.blockMask.map)).toEqual(expected.sparsity.blockMask.map);
    expect(sparsity.keptFraction).toBe(expected.sparsity.keptFraction);
    const plain = await sageattn(q, k, k, options);
    expect(await downloadAsync(plain)).toEqual(await downloadAsync(output));
  });
});
