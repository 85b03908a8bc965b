/** What the scores of an attention in single operators look like when the graph runs, and whether they are scores throughout. */
import type { ScoresShape } from '../detect/site.ts';
import { type Numbers, readSizes, sameSizes, targetShape } from '../detect/views.ts';

export interface ScoresDims {
  /** Where the mask is applied. */
  readonly masked: readonly number[];
  /** Axes at every stage, at least. */
  readonly rank: number;
}

/**
 * Follows the dimensions of the scores from the product of q and k on, or says why they cannot be followed: where a Reshape
 * mixes rows or keys, or an operand makes the scores larger, a row of the Softmax is not the scores of one query.
 */
export function readScores(
  { reshapes, operands, softmaxAt, softmaxRank, maskAt }: ScoresShape,
  product: readonly number[],
  numbers: Numbers,
): ScoresDims | { readonly reason: string } {
  const stages = [product];
  const row = product.slice(-2);
  for (const sizes of reshapes) {
    const dims = targetShape(readSizes(sizes, numbers), stages.at(-1) as readonly number[]);
    if (dims === undefined || count(dims) !== count(product)) {
      return { reason: `scores [${product}] in another shape: [${dims}]` };
    }
    stages.push(dims);
  }
  // In between, rows and keys may be split up: what lies behind each other stays behind each other.
  const split = [softmaxAt, maskAt]
    .map((at) => stages[at] as readonly number[])
    .find((dims) => !sameSizes(dims.slice(-2), row));
  if (split !== undefined) return { reason: `scores [${product}] in another shape: [${split}]` };
  const last = stages.at(-1) as readonly number[];
  if (!sameSizes(last, product)) return { reason: `scores [${product}] in another shape: [${last}]` };
  for (const operand of operands) {
    const stage = stages[operand.at] as readonly number[];
    const read = readSizes(operand.dims, numbers);
    const dims = operand.ofRows === true ? targetShape(read, stage.slice(0, -1)) : read;
    const isWhole = operand.ofRows !== true || (dims?.at(-1) === 1 && count(dims) === count(stage.slice(0, -1)));
    if (dims === undefined || !isWhole || !fitsInto(dims, stage)) {
      return { reason: `a factor or fill value [${dims}] beside scores [${product}]` };
    }
  }
  const rank = (stages[softmaxAt] as readonly number[]).length;
  if (softmaxRank !== undefined && rank !== softmaxRank) {
    return { reason: `softmax over axis ${softmaxRank - 1} of scores of rank ${rank}` };
  }
  return { masked: stages[maskAt] as readonly number[], rank: Math.min(...stages.map((dims) => dims.length)) };
}

const count = (dims: readonly number[]) => dims.reduce((product, size) => product * size, 1);

/** True where broadcasting leaves `target` as it is. */
function fitsInto(dims: readonly number[], target: readonly number[]): boolean {
  const offset = target.length - dims.length;
  return offset >= 0 && dims.every((size, axis) => size === 1 || size === target[axis + offset]);
}
