/** What a mask leaves of the blocks of scores, for the choice among them. */
import { decodeRun } from '../tensor/access.ts';
import type { Tensor } from '../tensor/tensor.ts';
import { bandOf, isBanded } from './band.ts';
import { type AttentionProblem, MASK_HIDES_BELOW, type Sequence } from './problem.ts';

/** No row of the block sees a key of it: it is never chosen. */
export const BLOCK_HIDDEN = 0;
/** Some row sees a key of it. */
export const BLOCK_VISIBLE = 1;
/**
 * It is computed in any case: some row sees its last key in it, and rows of its line see different blocks, so that those of the largest
 * weights may leave a row nothing.
 */
export const BLOCK_NEEDED = 2;

/** Of one head in one sequence, `[ceil(Lq/rows), ceil(Lk/keys)]` of its own lengths: each block is hidden, visible or needed. */
export type VisibleBlocks = (sequence: Sequence, head: number) => Uint8Array;

/**
 * Reads the blocks that band and mask leave. An additive mask hides where it is -Infinity, and where it is more than {@link
 * MASK_HIDES_BELOW} below the largest finite entry that the row sees by the band.
 *
 * @param attnMask the mask tensor that `problem.mask` describes
 */
export function visibleBlocksOf(
  problem: AttentionProblem,
  attnMask: Tensor,
  { rows, keys }: { readonly rows: number; readonly keys: number },
): VisibleBlocks {
  const { mask } = problem;
  if (mask === undefined) throw new RangeError('a problem without a mask');
  const [batchStride, headStride, queryStride, keyStride] = mask.strides;
  const entries = new Float32Array(mask.kind === 'boolean' ? 0 : problem.keyLength);
  const { data } = attnMask;
  /** What heads and sequences share where the mask broadcasts over them. */
  const found = new Map<string, Uint8Array>();

  /** What says whether a row sees a key, of the keys `first` to `end`. */
  const visibilityOf = (start: number, length: number, first: number, end: number): ((key: number) => boolean) => {
    if (mask.kind === 'boolean') return (key) => data[start + key * keyStride] !== 0;
    decodeRun(attnMask, start, keyStride, length, entries, 0);
    const least = leastVisible(entries, first, end);
    // A NaN is seen.
    return (key) => !((entries[key] as number) < least);
  };

  /** Sets the blocks in which the row sees keys; returns the last of them, -1: it sees nothing. */
  const lookAt = (start: number, length: number, first: number, end: number, seen: Uint8Array): number => {
    seen.fill(0);
    if (first >= end) return -1;
    const sees = visibilityOf(start, length, first, end);
    let last = -1;
    for (let block = Math.floor(first / keys); block * keys < end; block++) {
      const blockEnd = Math.min(end, (block + 1) * keys);
      let key = Math.max(first, block * keys);
      while (key < blockEnd && !sees(key)) key++;
      if (key === blockEnd) continue;
      seen[block] = 1;
      last = block;
    }
    return last;
  };

  /** Fills the line of rows `first` to `end`. */
  const lookAtRows = (sequence: Sequence, start: number, first: number, end: number, line: Uint8Array): void => {
    const { keyLength } = sequence;
    const { lower, upper } = bandOf(problem, sequence);
    const seen = new Uint8Array(line.length);
    const counts = new Uint32Array(line.length);
    let seeing = 0;
    for (let row = first; row < end; row++) {
      const endKey = Math.min(keyLength, row + upper + 1);
      const last = lookAt(start + row * queryStride, keyLength, Math.max(0, row + lower), endKey, seen);
      if (last < 0) continue;
      seeing++;
      line[last] = BLOCK_NEEDED;
      for (let j = 0; j <= last; j++) counts[j] = (counts[j] as number) + (seen[j] as number);
    }
    // Where each row sees all of these blocks, any of them leaves it something.
    const areCommon = counts.every((count) => count === 0 || count === seeing);
    for (const [j, count] of counts.entries()) {
      if (count !== 0 && (areCommon || line[j] !== BLOCK_NEEDED)) line[j] = BLOCK_VISIBLE;
    }
  };

  // All rows are alike where the mask repeats one and nothing else tells them apart.
  const areAlike = queryStride === 0 && !isBanded(problem.band);
  return (sequence, head) => {
    const { index, queryLength, keyLength } = sequence;
    const start = mask.offset + index * batchStride + head * headStride;
    const name = `${start},${queryLength},${keyLength}`;
    const known = found.get(name);
    if (known !== undefined) return known;
    const keyBlocks = Math.ceil(keyLength / keys);
    const blocks = new Uint8Array(Math.ceil(queryLength / rows) * keyBlocks);
    for (let first = 0; first < queryLength; first += rows) {
      const at = (first / rows) * keyBlocks;
      if (areAlike && first > 0) blocks.copyWithin(at, 0, keyBlocks);
      else {
        const end = areAlike ? 1 : Math.min(queryLength, first + rows);
        lookAtRows(sequence, start, first, end, blocks.subarray(at, at + keyBlocks));
      }
    }
    found.set(name, blocks);
    return blocks;
  };
}

/** The least entry of a row that hides nothing. */
function leastVisible(entries: Float32Array, first: number, end: number): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (let key = first; key < end; key++) {
    const entry = entries[key] as number;
    if (entry > largest && entry < Number.POSITIVE_INFINITY) largest = entry;
  }
  return Math.max(largest - MASK_HIDES_BELOW, -Number.MAX_VALUE);
}
