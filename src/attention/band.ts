/** Causality and window as one thing: the band of keys around the diagonal that a row may see. */

import type { AttentionOptions } from './options.ts';

/**
 * A band at least this far from the diagonal is no limit: sequences are shorter. It fits in 32 bits, also when a length
 * is added.
 */
export const NO_LIMIT = 2 ** 30;

/**
 * Row i of a sequence may see key j if `lower <= j - i - align * (Lk - Lq) <= upper`. Whole numbers from -{@link
 * NO_LIMIT}, which stands for no limit to the left, to {@link NO_LIMIT}, which stands for none to the right.
 *
 * Where the diagonal lies elsewhere (a block of a ring, a chunk of a prefill) both limits have its offset added.
 */
export interface Band {
  readonly lower: number;
  readonly upper: number;
  /** 0: row 0's diagonal is key 0 (`top-left`). 1: the last row's diagonal is the last key (`bottom-right`). */
  readonly align: 0 | 1;
}

interface Lengths {
  readonly queryLength: number;
  readonly keyLength: number;
}

const clip = (limit: number) => Math.max(-NO_LIMIT, Math.min(NO_LIMIT, limit));

/** The band that a call's options mean. Options must have passed `validateOptions`. */
export function createBand({ isCausal, causalAlignment, windowSize }: AttentionOptions): Band {
  const [left, right] = windowSize ?? [-1, -1];
  const far = right === -1 ? NO_LIMIT : right;
  return {
    // Never -0, which is not the same plan as 0.
    lower: left === -1 ? -NO_LIMIT : clip(0 - left),
    upper: clip(isCausal === true ? Math.min(far, 0) : far),
    align: causalAlignment === 'bottom-right' ? 1 : 0,
  };
}

/** Whether the band hides any key from any row, for lengths that are not known. */
export const isBanded = ({ lower, upper }: Band) => lower > -NO_LIMIT || upper < NO_LIMIT;

/** The band of one sequence: its row i may see keys `i + lower` to `i + upper`, both included. */
export function bandOf(
  { band }: { readonly band: Band },
  { queryLength, keyLength }: Lengths,
): Pick<Band, 'lower' | 'upper'> {
  const shift = band.align * (keyLength - queryLength);
  return { lower: clip(band.lower + shift), upper: clip(band.upper + shift) };
}

/** Keys of one sequence that at least one of its rows may see by the band; the mask comes on top. */
export function visibleKeys(
  problem: { readonly band: Band },
  sequence: Lengths,
): readonly [first: number, end: number] {
  const { lower, upper } = bandOf(problem, sequence);
  const { queryLength, keyLength } = sequence;
  const first = Math.min(Math.max(lower, 0), keyLength);
  const end = Math.min(Math.max(queryLength + upper, first), keyLength);
  // Neighbouring rows' intervals overlap or touch, so their union has no gap; all are empty if one is.
  return lower > upper ? [first, first] : [first, end];
}
