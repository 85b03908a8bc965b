/** Which blocks of scores to compute, by what the means of their rows and keys say (SpargeAttn, arXiv 2502.18137, section 3). */

import type { TensorView } from '../tensor/tensor.ts';
import { bandOf } from './band.ts';
import type { BlockMask } from './options.ts';
import type { AttentionProblem, BlockLayout, Sequence } from './problem.ts';
import type { SettledSparsity } from './sparsity.ts';
import { BLOCK_HIDDEN, BLOCK_NEEDED } from './visible-blocks.ts';

/** How much of a call was computed. */
export interface SparsityFractions {
  /** Blocks computed, of those that hold a key which a row may see by causality, window and mask; 1 where there are none. */
  readonly keptFraction: number;
  /** An estimate of the share of the softmax that was left out, by the means of the blocks, averaged over rows. */
  readonly lostMass: number;
}

/** What of a call was computed. */
export interface SparsityResult<T extends TensorView = TensorView> extends SparsityFractions {
  /** The blocks that were computed, for other calls; its map is bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`. */
  readonly blockMask: BlockMask & { readonly map: T };
}

/** Shape of a problem's map of blocks. */
export function blockShapeOf(
  { batch, queryHeads, queryLength, keyLength }: AttentionProblem,
  { rows, keys }: Pick<BlockLayout, 'rows' | 'keys'>,
): readonly [batch: number, heads: number, rowBlocks: number, keyBlocks: number] {
  return [batch, queryHeads, Math.ceil(queryLength / rows), Math.ceil(keyLength / keys)];
}

/** A problem's map of blocks, contiguous. */
export function contiguousBlocks(
  problem: AttentionProblem,
  { rows, keys }: Pick<BlockLayout, 'rows' | 'keys'>,
): BlockLayout {
  const [, heads, nq, nk] = blockShapeOf(problem, { rows, keys });
  return { rows, keys, offset: 0, strides: [heads * nq * nk, nq * nk, nk, 1] };
}

/** Means of the blocks of one head in one sequence, and how much alike their rows are. */
export interface Pooled {
  /** `[blocks, D]` */
  readonly means: Float32Array;
  /** The mean cosine of all pairs of rows, of K after its mean was taken off; undefined: not asked for. */
  readonly similarities: Float32Array | undefined;
}

/** Sums over blocks of rows, for {@link SparsityResult}. */
export interface SparsityTotals {
  visible: number;
  kept: number;
  rows: number;
  lost: number;
}

export const noTotals = (): SparsityTotals => ({ visible: 0, kept: 0, rows: 0, lost: 0 });

/** What a device tells of a line of the map, in float32: the summands of {@link SparsityTotals}. */
export const BLOCK_LINE = ['visible', 'kept', 'rows', 'lost'] as const satisfies readonly (keyof SparsityTotals)[];

export const fractionsOf = ({ visible, kept, rows, lost }: SparsityTotals): SparsityFractions => ({
  keptFraction: visible === 0 ? 1 : kept / visible,
  lostMass: rows === 0 ? 0 : lost / rows,
});

/** The fractions that lines `[lines, BLOCK_LINE]` come to. */
export function fractionsOfLines(lines: Float32Array): SparsityFractions {
  const totals = noTotals();
  lines.forEach((value, i) => {
    totals[BLOCK_LINE[i % BLOCK_LINE.length] as keyof SparsityTotals] += value;
  });
  return fractionsOf(totals);
}

/** Blocks that `topK` keeps of so many, in float32 as on every device. */
export const countOf = (topK: number, blocks: number): number =>
  Math.max(1, Math.ceil(Math.fround(Math.fround(topK) * blocks)));

/** What the blocks of one head in one sequence are chosen by. */
export interface BlockFacts {
  readonly q: Pooled;
  readonly k: Pooled;
  /** Of a call with a mask: what it leaves of each block, see `visibleBlocksOf`. */
  readonly visible: Uint8Array | undefined;
}

/**
 * Chooses the blocks of one head in one sequence.
 *
 * @param map where the head's lines go, from `at` on, `lineLength` apart; zeros before
 * @param totals is added to
 */
export function chooseBlocks(
  problem: Pick<AttentionProblem, 'headDim' | 'smScale' | 'softcap' | 'band'>,
  sequence: Pick<Sequence, 'queryLength' | 'keyLength'>,
  sparsity: SettledSparsity,
  { q, k, visible }: BlockFacts,
  map: Uint8Array,
  at: number,
  lineLength: number,
  totals: SparsityTotals,
): void {
  const { headDim, smScale } = problem;
  const { queryLength, keyLength } = sequence;
  const { rows, keys, similarity } = sparsity;
  const { lower, upper } = bandOf(problem, sequence);
  const keyBlocks = Math.ceil(keyLength / keys);
  const masses = new Float64Array(keyBlocks);
  const others = new Float64Array(keyBlocks);
  for (let block = 0; block * rows < queryLength; block++) {
    const firstRow = block * rows;
    const lastRow = Math.min(firstRow + rows, queryLength) - 1;
    const firstKey = Math.max(0, firstRow + lower);
    const lastKey = Math.min(keyLength - 1, lastRow + upper);
    totals.rows += lastRow + 1 - firstRow;
    if (firstKey > lastKey) continue;
    const [from, to] = [Math.floor(firstKey / keys), Math.floor(lastKey / keys) + 1];
    const masked = visible?.subarray(block * keyBlocks, (block + 1) * keyBlocks);
    const isHidden = (j: number) => masked?.[j] === BLOCK_HIDDEN;
    let candidates = to - from;
    if (masked !== undefined) for (let j = from; j < to; j++) if (isHidden(j)) candidates--;
    if (candidates === 0) continue;
    scoreBlocks(q.means, k.means, block, from, to, headDim, masses);
    for (let j = from; j < to; j++) {
      masses[j] = (masses[j] as number) * smScale + Math.log(Math.min(keys, keyLength - j * keys));
    }
    const isDoubtful = !((q.similarities?.[block] ?? 1) >= similarity);
    // Blocks from here on hold the last key that a row sees, of each of the rows: where they see different blocks.
    const seesEnd = firstRow + upper >= keyLength;
    const isCut = Math.floor(Math.max(0, lastRow + lower) / keys) > from;
    const edge = seesEnd ? (isCut ? to - 1 : to) : Math.floor(Math.max(0, firstRow + upper) / keys);
    const isForced = (j: number) =>
      isDoubtful ||
      j >= edge ||
      j < sparsity.sinkBlocks ||
      masked?.[j] === BLOCK_NEEDED ||
      !((k.similarities?.[j] ?? 1) >= similarity);
    const line = map.subarray(at + block * lineLength, at + block * lineLength + keyBlocks);
    const kept = chooseLine(line, { from, to, candidates, isHidden, isForced }, sparsity, masses, others);
    totals.visible += candidates;
    totals.kept += kept.count;
    totals.lost += (1 - kept.mass) * (lastRow + 1 - firstRow);
  }
}

/** Products of the mean of a block of rows with those of blocks of keys, four at a time: each sum waits for itself. */
function scoreBlocks(
  rows: Float32Array,
  keys: Float32Array,
  block: number,
  from: number,
  to: number,
  dim: number,
  scores: Float64Array,
): void {
  const row = block * dim;
  for (let j = from; j < to; j += 4) {
    // Beyond the last it is computed once more.
    const [k0, k1, k2, k3] = [j, Math.min(j + 1, to - 1), Math.min(j + 2, to - 1), Math.min(j + 3, to - 1)];
    const [at0, at1, at2, at3] = [k0 * dim, k1 * dim, k2 * dim, k3 * dim];
    let [sum0, sum1, sum2, sum3] = [0, 0, 0, 0];
    for (let d = 0; d < dim; d++) {
      const x = rows[row + d] as number;
      sum0 += x * (keys[at0 + d] as number);
      sum1 += x * (keys[at1 + d] as number);
      sum2 += x * (keys[at2 + d] as number);
      sum3 += x * (keys[at3 + d] as number);
    }
    scores[k0] = sum0;
    scores[k1] = sum1;
    scores[k2] = sum2;
    scores[k3] = sum3;
  }
}

/** Blocks of keys among which a block of rows chooses: those from `from` to `to` that are not hidden, `candidates` of them. */
interface Choice {
  readonly from: number;
  readonly to: number;
  readonly candidates: number;
  readonly isHidden: (block: number) => boolean;
  /** It is computed in any case. */
  readonly isForced: (block: number) => boolean;
}

/** Scores to weights, in place; returns their sum. Blocks whose score is not a number are kept. */
function weighBlocks(line: Uint8Array, { from, to, isHidden }: Choice, masses: Float64Array): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (let j = from; j < to; j++) {
    if ((masses[j] as number) > largest && !isHidden(j)) largest = masses[j] as number;
  }
  let sum = 0;
  for (let j = from; j < to; j++) {
    if (isHidden(j)) continue;
    // A score that is not a number says nothing: it weighs nothing here, and its block is computed.
    if (!Number.isFinite(masses[j] as number)) line[j] = 1;
    const mass = Math.exp((masses[j] as number) - largest);
    masses[j] = Number.isFinite(mass) ? mass : 0;
    sum += masses[j] as number;
  }
  return sum;
}

/**
 * Chooses among the blocks of a line.
 *
 * @param masses the score of each block, which becomes its weight
 * @param others room for the weights of those that are not forced
 * @returns how many it keeps, and their share of the softmax
 */
function chooseLine(
  line: Uint8Array,
  choice: Choice,
  { topK, mass: wanted }: SettledSparsity,
  masses: Float64Array,
  others: Float64Array,
): { readonly count: number; readonly mass: number } {
  const { from, to, candidates, isHidden, isForced } = choice;
  const sum = weighBlocks(line, choice, masses);
  let [count, mass] = [0, 0];
  for (let j = from; j < to; j++) {
    if (isHidden(j) || (line[j] === 0 && !isForced(j))) continue;
    line[j] = 1;
    count++;
    mass += sum === 0 ? 0 : (masses[j] as number) / sum;
  }
  // Sorted as numbers: an order of indices takes a call for each comparison, which took most of the time of choosing.
  let length = 0;
  for (let j = from; j < to; j++) if (line[j] === 0 && !isHidden(j)) others[length++] = masses[j] as number;
  const sorted = others.subarray(0, length).sort();
  const most = countOf(topK ?? 1, candidates);
  const isEnough = () => count > 0 && (topK === undefined ? mass >= wanted : count >= most);
  let least = Number.POSITIVE_INFINITY;
  // Of blocks that weigh as much as the least that is kept, the first ones are.
  let equal = 0;
  for (let i = length - 1; i >= 0 && !isEnough(); i--) {
    const next = sorted[i] as number;
    equal = next === least ? equal + 1 : 1;
    least = next;
    count++;
    mass += sum === 0 ? 0 : next / sum;
  }
  for (let j = from; j < to; j++) {
    if (line[j] === 1 || isHidden(j)) continue;
    const own = masses[j] as number;
    if (own > least || (own === least && equal-- > 0)) line[j] = 1;
  }
  return { count, mass: sum === 0 ? 1 : Math.min(1, mass) };
}
