/** Blocks that a backend chooses, against the reference: layouts, dtypes, band, masks, groups, packed sequences, numbers that are none. */
import fc from 'fast-check';
import { bandOf } from '../../src/attention/band.ts';
import { contiguousBlocks } from '../../src/attention/block-choice.ts';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../../src/attention/problem.ts';
import { type SettledSparsity, type Sparsity, settleSparsity } from '../../src/attention/sparsity.ts';
import type { Backend, BlockMapPlan } from '../../src/backends/backend.ts';
import { buildBlockMap } from '../../src/reference/block-map.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import type { DType, MaskDType } from '../../src/tensor/dtype.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';
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
  { windowSize: [10, -1] as const },
);

/** A mask that is drawn. */
interface Hiding {
  /** Keys of a span, for all rows; keys of another document; all but some runs of 16 keys, others for each row. */
  readonly what: 'span' | 'documents' | 'runs';
  readonly perHead: boolean;
  readonly dtype: MaskDType;
  /** What an additive mask has at hidden keys. */
  readonly hidden: number;
}

const arbitraryHiding: fc.Arbitrary<Hiding> = fc.record({
  what: fc.constantFrom('span', 'documents', 'runs'),
  perHead: fc.boolean(),
  dtype: fc.constantFrom<MaskDType>('bool', 'float16', 'bfloat16', 'float32'),
  // Large for float16, and for bfloat16 and float32 what their least number is about.
  hidden: fc.constantFrom(Number.NEGATIVE_INFINITY, -1e4, -65504, -3.3e38),
});

function maskOf(random: Random, { heads: [heads], lengths: [rows, keys] }: Shape, hiding: Hiding): Tensor<MaskDType> {
  const { what, perHead, dtype, hidden } = hiding;
  const count = perHead ? heads : 1;
  const shape = [1, count, what === 'span' ? 1 : rows, keys];
  const spans = Array.from({ length: count }, () => [random.integer(0, keys), random.integer(0, keys)]);
  const values = Float32Array.from({ length: shape.reduce((all, size) => all * size) }, (_, i) => {
    const [key, row] = [i % keys, Math.floor(i / keys) % (shape[2] as number)];
    const head = Math.floor(i / keys / (shape[2] as number));
    const [first = 0, end = 0] = spans[head] ?? [];
    if (what === 'span') return key >= Math.min(first, end) && key <= Math.max(first, end) ? 1 : 0;
    if (what === 'documents') return Math.floor((row * 3) / rows + head) % 3 === Math.floor((key * 3) / keys) ? 1 : 0;
    return ((row * 7919 + (key >> 4) * 104729 + head * 31) >> 3) % 5 === 0 ? 1 : 0;
  });
  if (dtype === 'bool') return tensor(Uint8Array.from(values), shape, { dtype: 'bool' });
  const least = dtype === 'float16' ? Math.max(hidden, hidden === Number.NEGATIVE_INFINITY ? hidden : -65504) : hidden;
  const additive = values.map((seen) => (seen === 1 ? random.uniform(-2, 2) : least));
  return fromFloat32(additive, shape, dtype);
}

/** Throws where a block is computed of which no row sees a key, or where a row that sees keys sees none in what is computed. */
function requireVisible(problem: AttentionProblem, attnMask: Tensor | undefined, map: Tensor<'bool'>): void {
  const { batch, queryHeads, queryLength, keyLength, blocks, mask } = problem;
  const entries = attnMask && toFloat32(attnMask);
  const [, maskHeads = 1, maskRows = 1] = attnMask?.shape ?? [];
  const { lower, upper } = bandOf(problem, problem);
  const [, , nq = 0, nk = 0] = map.shape;
  const { rows, keys } = blocks as NonNullable<typeof blocks>;
  for (let head = 0; head < batch * queryHeads; head++) {
    const seen = new Uint8Array(nq * nk);
    for (let row = 0; row < queryLength; row++) {
      const start = ((head % maskHeads) * maskRows + (row % maskRows)) * keyLength;
      const inBand = Array.from({ length: keyLength }, (_, key) => key).filter(
        (key) => key >= row + lower && key <= row + upper,
      );
      const values = inBand.map((key) => entries?.[start + key] ?? 0);
      const largest = values.filter(Number.isFinite).reduce((x, y) => Math.max(x, y), Number.NEGATIVE_INFINITY);
      const isSeen = (value: number) =>
        mask?.kind === 'boolean' ? value !== 0 : value !== Number.NEGATIVE_INFINITY && !(value < largest - 1000);
      const own = new Set(inBand.filter((_, i) => isSeen(values[i] as number)).map((key) => Math.floor(key / keys)));
      const line = Math.floor(row / rows) * nk;
      for (const block of own) seen[line + block] = 1;
      if (own.size > 0 && ![...own].some((block) => map.data[head * nq * nk + line + block] === 1)) {
        throw new Error(`row ${row} of head ${head} sees keys, and none in the blocks that are computed`);
      }
    }
    const hidden = seen.findIndex((flag, i) => flag === 0 && map.data[head * nq * nk + i] === 1);
    if (hidden >= 0) throw new Error(`block ${hidden} of head ${head} is computed, and no row sees a key of it`);
  }
}

/** Compares one choice; blocks of about the weight at which keeping ends may change places, in one line of twenty. */
async function check(
  backend: Backend,
  plain: AttentionProblem,
  sparsity: SettledSparsity,
  inputs: { readonly q: Tensor; readonly k: Tensor; readonly attnMask?: Tensor },
): Promise<void> {
  const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
  const plan = await backend.planBlockMap?.(problem, sparsity);
  if (plan === undefined) throw new Error(`backend '${backend.name}' chooses no blocks`);
  const { map, fractions } = await plan.run(inputs, {});
  const expected = buildBlockMap(problem, sparsity, inputs);
  const { keptFraction, lostMass } = await fractions();
  plan.dispose();
  const { shape, data } = expected.map;
  if (problem.sequences === undefined) requireVisible(problem, inputs.attnMask, map as Tensor<'bool'>);
  if (`${map.shape}` !== `${shape}` || map.dtype !== 'bool') throw new Error(`a map ${map.dtype} [${map.shape}]`);
  const others = data.filter((flag, i) => flag !== (map as Tensor<'bool'>).data[i]).length;
  const lines = (shape[0] as number) * (shape[1] as number) * (shape[2] as number);
  const apart = [keptFraction - expected.keptFraction, lostMass - expected.lostMass].map(Math.abs);
  if (others > 2 * Math.floor(lines / 20) || apart.some((difference) => difference > 0.01)) {
    throw new Error(`${others} of ${data.length} blocks in ${lines} lines; fractions ${apart} apart`);
  }
}

/** The last rows see nothing of the first block, and most of the last: threads take other blocks than for the rows before. */
const BEHIND_THE_FIRST: [Shape, Sparsity, { readonly windowSize: readonly [10, -1] }, number] = [
  { heads: [1, 1], lengths: [33, 65], dim: 40, dtype: 'float32', layout: 'HND' },
  { rows: 16, keys: 16, sinkBlocks: 0, topP: 0 },
  { windowSize: [10, -1] },
  0,
];

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
        { seed: seed | 0, numRuns: runs + 1, examples: [BEHIND_THE_FIRST] },
      ),
  },
  {
    name: 'are among those that a mask leaves, and leave each row something',
    run: () =>
      fc.assert(
        fc.asyncProperty(
          ...([arbitraryShape, arbitraryHiding, arbitrarySparsity, arbitraryBand, fc.integer()] as const),
          async (drawn, hiding, asked, band, of) => {
            const random = new Random(of);
            const shape = { ...drawn, lengths: [drawn.lengths[0], drawn.lengths[1] % 300] as const };
            const q = inBlocks(random, [shape.heads[0], shape.lengths[0]], shape);
            const k = inBlocks(random, [shape.heads[1], shape.lengths[1]], shape);
            const attnMask = maskOf(random, shape, hiding);
            const problem = createProblem(q, k, k, { ...band, attnMask, tensorLayout: shape.layout });
            await check(await backend(), problem, settleSparsity(asked), { q, k, attnMask });
          },
        ),
        { seed: seed | 0, numRuns: runs },
      ),
  },
  {
    name: 'of a mask that hides nothing are those without one',
    async run() {
      const random = new Random(seed);
      const shape = { heads: [2, 1], lengths: [70, 200], dim: 24, dtype: 'float32', layout: 'HND' } as const;
      const [q, k] = [inBlocks(random, [2, 70], shape), inBlocks(random, [1, 200], shape)];
      const sparsity = settleSparsity({ topK: 0.4, rows: 32, keys: 16 });
      const choose = async (attnMask?: Tensor) => {
        const plain = createProblem(q, k, k, { isCausal: true, ...(attnMask && { attnMask }) });
        const problem = { ...plain, blocks: contiguousBlocks(plain, sparsity) };
        const plan = (await (await backend()).planBlockMap?.(problem, sparsity)) as BlockMapPlan;
        const { map, fractions } = await plan.run({ q, k, ...(attnMask && { attnMask }) }, {});
        return { flags: `${(map as Tensor).data}`, ...(await fractions()) };
      };
      const [plain, masked] = [await choose(), await choose(tensor(new Float32Array(70 * 200).fill(-5e4), [70, 200]))];
      if (JSON.stringify(plain) !== JSON.stringify(masked)) {
        throw new Error(`${JSON.stringify(masked)}, without a mask ${JSON.stringify(plain)}`);
      }
    },
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
