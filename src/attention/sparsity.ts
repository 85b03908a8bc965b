/** What a caller says about which blocks of scores to compute (SpargeAttn, arXiv 2502.18137, section 3). */

interface BlockChoice {
  /** Rows and keys of a block, multiples of 16; default 128 and 64. */
  readonly rows?: number;
  readonly keys?: number;
  /** So many blocks of keys at the start of each sequence are always computed; default 0. */
  readonly sinkBlocks?: number;
}

/**
 * How blocks are chosen: for each block of rows, from the softmax of `mean(q) . mean(k) * smScale` over the blocks of keys that it may
 * see; blocks that a mask hides are not among them. Blocks on the diagonal of a causal mask, or on a window's right edge, are always
 * computed, and of each row that sees a key at least one block with such a key.
 */
export type Sparsity = BlockChoice &
  (
    | {
        /** Fraction of its blocks that a block of rows keeps, from 0 to 1: the largest. */
        readonly topK: number;
      }
    | {
        /** Share of the softmax that the blocks kept add up to, from 0 to 1: the fewest that reach it. */
        readonly topP: number;
      }
    | {
        /**
         * As `topP` of `mass`; and blocks of rows or keys that are less alike than this, from -1 to 1, are computed whole, since their
         * mean says little: the mean cosine of all pairs of their rows. SpargeAttn's default is 0.6.
         */
        readonly threshold: number;
        /** Default 0.98. */
        readonly mass?: number;
      }
  );

/** {@link Sparsity} with every default filled in; `similarity` -1: all blocks are alike enough. */
export interface SettledSparsity {
  readonly rows: number;
  readonly keys: number;
  readonly sinkBlocks: number;
  readonly topK: number | undefined;
  readonly mass: number;
  readonly similarity: number;
}

const DEFAULT_MASS = 0.98;
const NO_THRESHOLD = -1;
const DEFAULT_BLOCK = { rows: 128, keys: 64 } as const;

const isFraction = (value: unknown) => typeof value === 'number' && value >= 0 && value <= 1;

/** Whether a value is a {@link Sparsity}. */
export function isSparsity(value: unknown, isBlockSize: (size: unknown) => boolean): value is Sparsity {
  if (typeof value !== 'object' || value === null) return false;
  const { rows, keys, sinkBlocks, topK, topP, threshold, mass, ...others } = value as Record<string, unknown>;
  if (Object.keys(others).length > 0) return false;
  if ([topK, topP, threshold].filter((way) => way !== undefined).length !== 1) return false;
  if (![rows, keys].every((size) => size === undefined || isBlockSize(size))) return false;
  if (sinkBlocks !== undefined && !(Number.isSafeInteger(sinkBlocks) && (sinkBlocks as number) >= 0)) return false;
  if (mass !== undefined && (threshold === undefined || !isFraction(mass))) return false;
  if (threshold !== undefined) return typeof threshold === 'number' && threshold >= -1 && threshold <= 1;
  return isFraction(topK ?? topP);
}

export const SPARSITY_PHRASE =
  '{ topK }, { topP } of 0 to 1 or { threshold, mass }, with rows and keys (multiples of 16) and sinkBlocks';

export function settleSparsity(sparsity: Sparsity): SettledSparsity {
  const { rows, keys, sinkBlocks } = sparsity;
  return {
    rows: rows ?? DEFAULT_BLOCK.rows,
    keys: keys ?? DEFAULT_BLOCK.keys,
    sinkBlocks: sinkBlocks ?? 0,
    topK: 'topK' in sparsity ? sparsity.topK : undefined,
    mass: 'topP' in sparsity ? sparsity.topP : 'threshold' in sparsity ? (sparsity.mass ?? DEFAULT_MASS) : 1,
    similarity: 'threshold' in sparsity ? sparsity.threshold : NO_THRESHOLD,
  };
}
