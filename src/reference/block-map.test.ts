import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { createProblem } from '../attention/problem.ts';
import { type Sparsity, settleSparsity } from '../attention/sparsity.ts';
import { type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { buildBlockMap } from './block-map.ts';
import { exactAttention } from './index.ts';

const seed = runSeed();
const settings = { seed: seed | 0, numRuns: 40 };

interface Call {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly isCausal: boolean;
}

const build = ({ q, k, isCausal }: Call, sparsity: Sparsity) =>
  buildBlockMap(createProblem(q, k, k, { isCausal }), settleSparsity({ rows: 16, keys: 16, ...sparsity } as Sparsity), {
    q,
    k,
  });

const call = fc
  .record({
    draw: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
    group: fc.integer({ min: 1, max: 2 }),
    lq: fc.integer({ min: 1, max: 90 }),
    lk: fc.integer({ min: 1, max: 120 }),
    isCausal: fc.boolean(),
  })
  .map(({ draw, group, lq, lk, isCausal }) => {
    const random = new Random(draw);
    // Larger than normal: some blocks matter much more than others.
    const of = (heads: number, length: number) =>
      tensor(random.normals(2 * heads * length * 8, 3), [2, heads, length, 8]);
    return { q: of(2 * group, lq), k: of(2, lk), isCausal };
  });

/** Lines of the map, each with the blocks that its rows may see. */
function linesOf({ q, k, isCausal }: Call, map: Tensor<'bool'>) {
  const [batch, heads, nq, nk] = map.shape as [number, number, number, number];
  const [lq, lk] = [q.shape[2] as number, k.shape[2] as number];
  return Array.from({ length: batch * heads * nq }, (_, i) => {
    const block = i % nq;
    const seen = isCausal ? Math.min(lk, Math.min(lq, block * 16 + 16)) : lk;
    const flags = map.data.slice(i * nk, (i + 1) * nk);
    return { block, flags, visible: Math.ceil(seen / 16), edge: isCausal ? block : nk };
  });
}

describe(`blocks that are chosen (seed ${seed})`, () => {
  it('are as many as topK says, none beyond what is visible, and the diagonal is among them', () => {
    fc.assert(
      fc.property(
        call,
        fc.double({ min: 0, max: 1, noNaN: true }),
        fc.integer({ min: 0, max: 2 }),
        (own, topK, sinkBlocks) => {
          const { map, keptFraction } = build(own, { topK, sinkBlocks });
          let [kept, visible] = [0, 0];
          for (const line of linesOf(own, map)) {
            const count = line.flags.reduce((sum, flag) => sum + flag, 0);
            expect(line.flags.slice(line.visible).every((flag) => flag === 0)).toBe(true);
            expect(line.flags.slice(0, Math.min(sinkBlocks, line.visible)).every((flag) => flag === 1)).toBe(true);
            if (line.edge < line.visible) expect(line.flags[line.edge]).toBe(1);
            const wanted = Math.max(1, Math.ceil(topK * line.visible));
            expect(count).toBeGreaterThanOrEqual(wanted);
            expect(count).toBeLessThanOrEqual(Math.min(line.visible, wanted + sinkBlocks + 1));
            kept += count;
            visible += line.visible;
          }
          expect(keptFraction).toBeCloseTo(kept / visible, 12);
        },
      ),
      settings,
    );
  });

  it('hold what topP says, by their own estimate, and with the rest would hold all', () => {
    fc.assert(
      fc.property(call, fc.double({ min: 0, max: 1, noNaN: true }), (own, topP) => {
        const { lostMass } = build(own, { topP });
        expect(lostMass).toBeLessThanOrEqual(1 - topP + 1e-9);
        const whole = build(own, { topP: 1 });
        expect(whole.keptFraction).toBeGreaterThan(1 - 1e-9);
        expect(whole.lostMass).toBeLessThan(1e-9);
      }),
      settings,
    );
  });

  it('lose what is estimated, where the rows of each block are alike', () => {
    const random = new Random(seed);
    const alike = (heads: number, blocks: number) => {
      const rows = Array.from({ length: heads * blocks }, () => random.normals(8, 2));
      return tensor(
        Float32Array.from({ length: heads * blocks * 128 }, (_, i) => rows[i >> 7]?.[i % 8] as number),
        [1, heads, blocks * 16, 8],
      );
    };
    const [q, k] = [alike(2, 3), alike(2, 6)];
    const { map, lostMass, keptFraction } = build({ q, k, isCausal: false }, { topK: 0.5 });
    expect(keptFraction).toBe(0.5);
    const dense = exactAttention(q, k, k, { returnLse: true }).lse as Float64Array;
    const sparse = exactAttention(q, k, k, { returnLse: true, blockMask: { rows: 16, keys: 16, map } })
      .lse as Float64Array;
    const lost = dense.reduce((sum, lse, i) => sum + 1 - Math.exp((sparse[i] as number) - lse), 0) / dense.length;
    expect(lostMass).toBeCloseTo(lost, 6);
  });

  it('leave each row something where a window hides the heaviest block from some', () => {
    // Only the first block of keys is like the rows.
    const q = tensor(new Float32Array(64 * 8).fill(1), [1, 1, 64, 8]);
    const k = tensor(
      Float32Array.from({ length: 96 * 8 }, (_, i) => (i < 16 * 8 ? 1 : -1)),
      [1, 1, 96, 8],
    );
    const problem = createProblem(q, k, k, { windowSize: [20, -1] });
    const { map } = buildBlockMap(problem, settleSparsity({ topK: 0, rows: 64, keys: 16 }), { q, k });
    const blockMask = { rows: 64, keys: 16, map };
    const { lse } = exactAttention(q, k, k, { returnLse: true, windowSize: [20, -1], blockMask });
    expect((lse as Float64Array).every(Number.isFinite)).toBe(true);
    expect([...map.data]).toEqual([0, 0, 0, 0, 0, 1]);
  });

  it('are whole lines and columns where rows are not alike', () => {
    const random = new Random(seed);
    const blocks = (length: number, unlike: number) =>
      tensor(
        Float32Array.from({ length: length * 64 }, (_, i) =>
          Math.floor(i / 64 / 16) === unlike
            ? random.normal()
            : (Math.floor(i / 64 / 16) % 2) * 2 - 1 + random.normal() / 20,
        ),
        [1, 1, length, 64],
      );
    const { map } = build({ q: blocks(64, 1), k: blocks(96, 2), isCausal: false }, { threshold: 0.6, mass: 0 });
    const lines = linesOf({ q: blocks(64, 1), k: blocks(96, 2), isCausal: false }, map);
    for (const { block, flags } of lines) {
      if (block === 1) expect([...flags]).toEqual([1, 1, 1, 1, 1, 1]);
      else {
        expect(flags[2]).toBe(1);
        expect(flags.reduce((sum, flag) => sum + flag, 0)).toBe(1);
      }
    }
  });

  it('do not depend on the layout, and hold what is not a number', () => {
    const random = new Random(seed);
    const [q, k] = [
      tensor(random.normals(4 * 50 * 8), [1, 4, 50, 8]),
      tensor(random.normals(2 * 70 * 8), [1, 2, 70, 8]),
    ];
    const options = settleSparsity({ topK: 0.3, rows: 16, keys: 16 });
    const nhd = (x: Tensor) => transpose(x, [0, 2, 1, 3]);
    const hnd = buildBlockMap(createProblem(q, k, k, {}), options, { q, k });
    const other = buildBlockMap(createProblem(nhd(q), nhd(k), nhd(k), { tensorLayout: 'NHD' }), options, {
      q: nhd(q),
      k: nhd(k),
    });
    expect(other).toEqual(hnd);
    (k.data as Float32Array)[20 * 8] = Number.NaN;
    const { map } = buildBlockMap(createProblem(q, k, k, {}), options, { q, k });
    for (let line = 0; line < 8; line++) expect(map.data[line * 5 + 1]).toBe(1);
  });
});
