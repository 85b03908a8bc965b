/** Which keys a row may see, what the mask adds to their scores, and which of them count in means and scales. */
import { bandOf } from '../attention/band.ts';
import { type AttentionProblem, MASK_HIDES_BELOW, type Sequence } from '../attention/problem.ts';
import { decodeRun } from '../tensor/access.ts';
import type { Tensor } from '../tensor/tensor.ts';

/** Excludes keys of blocks that the map lacks. */
function hideAbsentBlocks(
  { blocks }: AttentionProblem,
  blockMap: Tensor,
  { index, keyLength }: Sequence,
  head: number,
  row: number,
  bias: Float32Array,
): void {
  if (blocks === undefined) return;
  const { rows, keys, offset, strides } = blocks;
  const start = offset + index * strides[0] + head * strides[1] + Math.floor(row / rows) * strides[2];
  for (let first = 0, block = 0; first < keyLength; first += keys, block++) {
    if (blockMap.data[start + block * strides[3]] !== 0) continue;
    bias.fill(Number.NEGATIVE_INFINITY, first, Math.min(first + keys, keyLength));
  }
}

/**
 * Fills `bias[0..keyLength)` for row `row` of query head `head`: -Infinity for keys that band or mask exclude, the
 * additive mask's value or 0 for the others. Returns the bias below which a key counts as hidden ({@link
 * MASK_HIDES_BELOW}).
 */
export type BiasReader = (sequence: Sequence, head: number, row: number, bias: Float32Array) => number;

/**
 * @param attnMask the mask tensor that `problem.mask` describes
 * @param blockMap the map that `problem.blocks` describes; without it, what counts in means and scales
 */
export function biasReader(
  problem: AttentionProblem,
  attnMask: Tensor | undefined,
  blockMap?: Tensor | undefined,
): BiasReader {
  const { mask } = problem;
  return (sequence, head, row, bias) => {
    const { keyLength, index } = sequence;
    let largest = Number.NEGATIVE_INFINITY;
    if (mask === undefined || attnMask === undefined) {
      bias.fill(0, 0, keyLength);
    } else {
      const [batchStride, headStride, queryStride, keyStride] = mask.strides;
      const start = mask.offset + index * batchStride + head * headStride + row * queryStride;
      decodeRun(attnMask, start, keyStride, keyLength, bias, 0);
      for (let key = 0; key < keyLength; key++) {
        if (mask.kind === 'boolean') bias[key] = bias[key] === 0 ? Number.NEGATIVE_INFINITY : 0;
        else if ((bias[key] as number) > largest) largest = bias[key] as number;
      }
    }
    const { lower, upper } = bandOf(problem, sequence);
    const first = Math.min(Math.max(row + lower, 0), keyLength);
    const end = Math.min(Math.max(row + upper + 1, first), keyLength);
    bias.fill(Number.NEGATIVE_INFINITY, 0, first);
    bias.fill(Number.NEGATIVE_INFINITY, end, keyLength);
    if (blockMap !== undefined) hideAbsentBlocks(problem, blockMap, sequence, head, row, bias);
    return largest - MASK_HIDES_BELOW;
  };
}

export interface ClassRow {
  readonly head: number;
  readonly row: number;
  /** Keys that count for it: none where all that it sees are hidden as far as means and scales are concerned. */
  readonly keys: number;
}

/** Rows of the heads over one head of K that see keys and values of about the same size. */
export interface RowClass {
  /** Equal for classes of like rows of other inputs of the same kind. */
  readonly name: string;
  /** Per key of the sequence, 1: one of the rows sees it, so that it counts in means and scales. */
  readonly counted: Uint8Array;
  readonly rows: readonly ClassRow[];
  /** Largest magnitude of a value that the rows see. */
  readonly largestValue: number;
  /** The largest magnitude of a key that one of its rows sees. */
  readonly largestKey: number;
}

/** Sizes within this factor, a power of two, of the largest make one class. */
const CLASS_BITS = 5;

/** Largest finite magnitude of each token of `[length, dim]`. */
function magnitudesOf(x: Float32Array, dim: number): Float64Array {
  const magnitudes = new Float64Array(x.length / dim);
  for (let i = 0; i < x.length; i++) {
    const magnitude = Math.abs(x[i] as number);
    const token = Math.floor(i / dim);
    if (Number.isFinite(magnitude) && magnitude > (magnitudes[token] as number)) magnitudes[token] = magnitude;
  }
  return magnitudes;
}

/**
 * The rows over one head of K, in classes by the largest key and value that each sees. Keys that a row may not see must not
 * coarsen its quantization, so statistics are taken per class. If all tokens are of about one size there is one class.
 *
 * @param k `[Lk,D]` of this sequence and head
 * @param v `[Lk,Dv]`
 */
export function rowClasses(
  { headDim, valueDim }: Pick<AttentionProblem, 'headDim' | 'valueDim'>,
  sequence: Sequence,
  heads: readonly number[],
  readBias: BiasReader,
  k: Float32Array,
  v: Float32Array,
): RowClass[] {
  const { keyLength, queryLength } = sequence;
  const magnitudes = [magnitudesOf(k, headDim), magnitudesOf(v, valueDim)] as const;
  const bias = new Float32Array(keyLength);
  /** Calls `see` with each key that counts for a row. */
  const seenBy = (head: number, row: number, see: (key: number) => void) => {
    const hidden = readBias(sequence, head, row, bias);
    for (let key = 0; key < keyLength; key++) {
      const value = bias[key] as number;
      // A NaN is seen.
      if (value !== Number.NEGATIVE_INFINITY && !(value < hidden)) see(key);
    }
  };
  const seen = heads.flatMap((head) =>
    Array.from({ length: queryLength }, (_, row) => {
      let [key, value, keys] = [0, 0, 0];
      seenBy(head, row, (token) => {
        keys++;
        key = Math.max(key, magnitudes[0][token] as number);
        value = Math.max(value, magnitudes[1][token] as number);
      });
      return { head, row, keys, key, value };
    }),
  );
  const largest = seen.reduce(
    (most, { key, value }) => ({ key: Math.max(most.key, key), value: Math.max(most.value, value) }),
    { key: 0, value: 0 },
  );
  // A row that sees zeros, or nothing, asks for nothing.
  const level = (own: number, most: number) => (own === 0 ? 0 : Math.floor(Math.log2(most / own) / CLASS_BITS));
  const classes = new Map<string, RowClass & { rows: ClassRow[]; largestValue: number; largestKey: number }>();
  for (const { head, row, keys, key, value } of seen) {
    const name = `${level(key, largest.key)},${level(value, largest.value)}`;
    let found = classes.get(name);
    if (found === undefined) {
      found = { name, counted: new Uint8Array(keyLength), rows: [], largestValue: 0, largestKey: 0 };
      classes.set(name, found);
    }
    const { counted } = found;
    seenBy(head, row, (token) => {
      counted[token] = 1;
    });
    found.rows.push({ head, row, keys });
    found.largestValue = Math.max(found.largestValue, value);
    found.largestKey = Math.max(found.largestKey, key);
  }
  return [...classes.values()];
}
