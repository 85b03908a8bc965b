/**
 * How a workgroup of the matrix kernel divides its work, and how that lies in workgroup memory.
 *
 * A workgroup owns `rows` queries and takes `keys` keys a step. Scores pass through workgroup memory between the two
 * products, so the products need not be divided alike: Q K^T in groups of rows and of keys, P V in groups of rows and
 * of channels. In between, the softmax gives each subgroup whole rows, and each row to one or several lanes.
 */
import type { MatrixConfig } from '../capabilities.ts';
import { KEY_TILE } from './layout.ts';
import { componentBytes, UNIT_BYTES, unitsOf } from './matrix-operations.ts';

/** Sizes and strategies of a matrix kernel. */
export interface MatrixShape {
  readonly subgroups: number;
  /** Queries of a workgroup. */
  readonly rows: number;
  /** Keys of a step: 16 or 32. */
  readonly keys: number;
  /** Q K^T: groups of rows; the subgroups of a group divide the step's keys. */
  readonly qkGroups: number;
  /** P V: groups of rows; the subgroups of a group divide the channels. */
  readonly pvGroups: number;
  /** Q K^T of the next step comes before P V of this one. */
  readonly keysFirst: boolean;
  /** Powers of two by which a row may outgrow its maximum before the output is rescaled; 0: always exact maximum. */
  readonly headroom: number;
}

/** The products of a kernel. */
export interface MatrixProducts {
  /** Q K^T: components i8 (result i32), or f16 or f32 (result f32). */
  readonly qk: MatrixConfig;
  /** P V: components f16 or f32. Same M as `qk`. */
  readonly pv: MatrixConfig;
}

/**
 * Units between rows of scores, and of P, beyond their contents: neighbouring rows then start in other banks. With the
 * score rows' two, lanes of every second four rows read their two units in the other order ({@link
 * MatrixTiling.swapped}), so that neither the stores of matrices nor these reads meet in a bank.
 */
const SCORE_PADDING = 2;
const PROBABILITY_PADDING = 1;

/** Scores of a lane are read and written eight at a time: two units. */
export const SCORES_AT_ONCE = 8;

export interface MatrixTiling {
  readonly threads: number;
  /** Subgroups that divide the keys of a group of rows, and the channels. */
  readonly keyGroups: number;
  readonly channelGroups: number;
  /** Tiles of a subgroup: Q K^T in rows and keys, and its steps over channels; P V in rows and channels. */
  readonly queryTiles: number;
  readonly keyTiles: number;
  readonly keySteps: number;
  readonly outputRowTiles: number;
  readonly outputTiles: number;
  /** Rows of a subgroup in the softmax; side by side in its lanes; lanes of a row; rows that a lane has in turn. */
  readonly rowsEach: number;
  readonly rowsAtOnce: number;
  readonly lanesPerRow: number;
  readonly rowsInTurn: number;
  /** Pairs of units that a lane has of a row. */
  readonly pairs: number;
  readonly scoreStride: number;
  readonly probabilityStride: number;
  readonly swapped: boolean;
  /** Units of one product of Q's steps, a key's 32 channels, and a channel's 16 keys. */
  readonly queryUnits: number;
  readonly keyUnits: number;
  readonly valueUnits: number;
  /** Units of the arrays. */
  readonly scores: number;
  readonly probabilities: number;
  readonly keyStage: number;
  readonly valueStage: number;
  /** Output tiles of a subgroup that fit into the scores' memory at once. */
  readonly outputTilesAtOnce: number;
  /** Bytes of workgroup memory. */
  readonly bytes: number;
}

/** @returns undefined where the products' sizes do not divide the shape's */
export function matrixTiling(
  shape: MatrixShape,
  { qk, pv }: MatrixProducts,
  lanes: number,
  headDimPadded: number,
  valueDimPadded: number,
): MatrixTiling | undefined {
  const { subgroups, rows, keys, qkGroups, pvGroups } = shape;
  const rowsEach = rows / subgroups;
  const rowsAtOnce = Math.min(lanes, rowsEach);
  const lanesPerRow = lanes / rowsAtOnce;
  const scoreStride = keys / 4 + SCORE_PADDING;
  const probabilityStride = unitsOf(pv.componentType, keys) + PROBABILITY_PADDING;
  const queryUnits = unitsOf(qk.componentType, qk.K);
  const keyUnits = unitsOf(qk.componentType, 32);
  const valueUnits = unitsOf(pv.componentType, 16);
  const scores = rows * scoreStride;
  const probabilities = rows * probabilityStride;
  const keyStage = (keys * headDimPadded * keyUnits) / 32;
  const valueStage = (keys * valueDimPadded * valueUnits) / 16;
  const keyGroups = subgroups / qkGroups;
  const channelGroups = subgroups / pvGroups;
  const outputTiles = valueDimPadded / pv.N / channelGroups;
  const outputTileUnits = unitsOf(pv.resultComponentType, pv.M * pv.N);
  const tiling: MatrixTiling = {
    threads: subgroups * lanes,
    keyGroups,
    channelGroups,
    queryTiles: rows / qkGroups / qk.M,
    keyTiles: keys / keyGroups / qk.N,
    keySteps: headDimPadded / qk.K,
    outputRowTiles: rows / pvGroups / pv.M,
    outputTiles,
    rowsEach,
    rowsAtOnce,
    lanesPerRow,
    rowsInTurn: rowsEach / rowsAtOnce,
    pairs: keys / SCORES_AT_ONCE / lanesPerRow,
    scoreStride,
    probabilityStride,
    swapped: scoreStride % 4 === 2,
    queryUnits,
    keyUnits,
    valueUnits,
    scores,
    probabilities,
    keyStage,
    valueStage,
    outputTilesAtOnce: Math.min(outputTiles, Math.floor(scores / (subgroups * outputTileUnits))),
    bytes: UNIT_BYTES * (scores + probabilities + keyStage + valueStage) + 4 * rows + 16,
  };
  const whole = Object.values(tiling).every((value) => typeof value === 'boolean' || Number.isInteger(value));
  const usable =
    KEY_TILE % keys === 0 && keys % pv.K === 0 && tiling.outputTilesAtOnce > 0 && queryUnits <= scoreStride;
  return whole && usable ? tiling : undefined;
}

/** Whether a product's matrices begin at whole units, and its sizes divide those of the layout. */
export function fitsUnits({ componentType, resultComponentType, K, N }: MatrixConfig): boolean {
  return (
    32 % K === 0 &&
    32 % N === 0 &&
    (K * componentBytes(componentType)) % UNIT_BYTES === 0 &&
    (N * componentBytes(resultComponentType)) % UNIT_BYTES === 0
  );
}
