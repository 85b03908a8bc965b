/**
 * How a workgroup of the gradient kernels with subgroup matrices divides its work, and how that lies in workgroup memory.
 *
 * A workgroup owns `own` tokens, and `passing` tokens of the other side pass by a step. The scores and dP of a step are divided in groups
 * of own tokens and of those that pass by, the sums in groups of own tokens and of channels. In between, each subgroup has whole rows of
 * both, and a lane eight pairs of a row that follow one another.
 */

import { UNIT_BYTES } from '../matrix-operations.ts';
import type { MatrixProducts } from '../matrix-tiling.ts';
import type { GradientDims } from './layout.ts';

/** Sizes and strategies of a gradient kernel with matrices. */
export interface MatrixGradientShape {
  readonly subgroups: number;
  /** Tokens that a workgroup owns. */
  readonly own: number;
  /** Tokens of a step: 16 or 32. */
  readonly passing: number;
  /** Scores and dP: groups of own tokens; the subgroups of a group divide the step's tokens. */
  readonly scoreGroups: number;
  /** Sums: groups of own tokens; the subgroups of a group divide the channels. */
  readonly sumGroups: number;
  /** `place`: weights are written over the scores, for a barrier more. */
  readonly memory: 'plain' | 'place';
}

/** Units between rows of scores beyond their contents: a matrix's stores then meet in no bank. */
const SCORE_PADDING = 2;

export interface MatrixGradientTiling {
  readonly threads: number;
  /** Matrices of a subgroup: scores in rows and columns, and steps over channels of codes and of values. */
  readonly scoreRows: number;
  readonly scoreColumns: number;
  readonly columnGroups: number;
  readonly codeSteps: number;
  readonly valueSteps: number;
  /** Sums in rows, and in channels of each gradient. */
  readonly sumRows: number;
  readonly channelGroups: number;
  readonly headTiles: number;
  readonly valueTiles: number;
  /** Lanes of a row; rows of a subgroup side by side, and in turn. */
  readonly lanesPerRow: number;
  readonly rowsAtOnce: number;
  readonly rowsEach: number;
  readonly rowsInTurn: number;
  /** Units from one row to the next. */
  readonly scoreStride: number;
  readonly weightStride: number;
  readonly codeStride: number;
  readonly rowStride: number;
  /** Units of the arrays. */
  readonly scores: number;
  readonly weights: number;
  readonly codeStage: number;
  readonly rowStage: number;
  readonly factStage: number;
  /** Result matrices of a subgroup that fit into the scores' memory at once. */
  readonly atOnce: number;
  readonly bytes: number;
}

/** @returns undefined where the products' sizes do not divide the shape's */
export function matrixGradientTiling(
  { subgroups, own, passing, scoreGroups, sumGroups, memory }: MatrixGradientShape,
  { qk, pv }: MatrixProducts,
  lanes: number,
  owner: 'query' | 'key',
  { headDimPadded, valueDimPadded }: GradientDims,
): MatrixGradientTiling | undefined {
  const sets = owner === 'key' ? 2 : 1;
  const columnGroups = subgroups / scoreGroups;
  const channelGroups = subgroups / sumGroups;
  const lanesPerRow = passing / 8;
  const rowsAtOnce = lanes / lanesPerRow;
  const rowsEach = own / subgroups;
  const scoreStride = passing / 4 + SCORE_PADDING;
  const weightStride = memory === 'place' ? scoreStride : passing / 8 + 1;
  const codeStride = headDimPadded / 16 + 1;
  const rowStride = (headDimPadded + valueDimPadded) / 8 + 1;
  const scores = 2 * own * scoreStride;
  const weights = memory === 'place' ? 0 : sets * own * weightStride;
  const [codeStage, rowStage] = [passing * codeStride, passing * rowStride];
  const factStage = (passing * 9) / 8;
  const tiling: MatrixGradientTiling = {
    threads: subgroups * lanes,
    scoreRows: own / scoreGroups / qk.M,
    scoreColumns: passing / columnGroups / qk.N,
    columnGroups,
    codeSteps: headDimPadded / qk.K,
    valueSteps: valueDimPadded / pv.K,
    sumRows: own / sumGroups / pv.M,
    channelGroups,
    headTiles: headDimPadded / pv.N / channelGroups,
    valueTiles: owner === 'key' ? valueDimPadded / pv.N / channelGroups : 0,
    lanesPerRow,
    rowsAtOnce,
    rowsEach,
    rowsInTurn: rowsEach / rowsAtOnce,
    scoreStride,
    weightStride,
    codeStride,
    rowStride,
    ...{ scores, weights, codeStage, rowStage, factStage },
    atOnce: Math.floor((scores * 4) / (subgroups * pv.M * pv.N)),
    bytes:
      UNIT_BYTES * (scores + weights + codeStage + rowStage + factStage) +
      4 * sets * own +
      (owner === 'key' ? 4 * own * (1 + valueDimPadded / 32) : 0) +
      16,
  };
  const usable = qk.N === pv.N && qk.M === pv.M && passing % pv.K === 0 && tiling.atOnce > 0;
  return Object.values(tiling).every(Number.isInteger) && usable ? tiling : undefined;
}
