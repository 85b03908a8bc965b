/** What the gradient kernels share about memory: rows of queries and of keys in float32, and what is known of a row. */

/** Tokens whose rows are made together; every tile of a gradient kernel lies in one such block, and rows behind the last token are 0. */
export const GRADIENT_BLOCK = 32;

export interface GradientDims {
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
  /**
   * Rows are in float16, each operand's divided by a power of two of its own, so that its largest element lies between 2 and 4. Default:
   * in float32.
   */
  readonly half?: boolean;
  /** Q, dO and K are also in codes, see {@link CODE_ROWS}. Default: not. Not with `half`. */
  readonly codes?: boolean;
}

/**
 * Where the codes of a block's tokens are, once `codes.ts` has made them: in the place of Q, or of K, in so many rows of the block from an
 * operand's first on. A vector of a row is of four channels. In each of the first 8 rows of an operand a word has the codes of one
 * channel for four tokens, in the next row are the scales of the channels, and in the last the sizes of the block's tokens, four to a vector.
 */
export const CODE_ROWS = {
  q: 0,
  dOutput: 10,
  k: 0,
  scales: GRADIENT_BLOCK / 4,
  sizes: GRADIENT_BLOCK / 4 + 1,
} as const;

/**
 * A query's row in vectors of four words: Q (with codes, as wide as the wider of Q and dO), dO (a NaN or an infinity as 0), in `half` what the matrix kernel needs of the row, its facts,
 * in `half` the powers of two of Q and dO, and a bit for each channel of dO that is no number.
 *
 * Facts: `top` and `factor`, for `P = factor * exp(S - top)`, a factor of 0 where the row sees nothing; `rowsum(dO o O)`; flags.
 * What the matrix kernel needs: the scale of its codes; what to take from its scores so that `exp2` gives P times dO's power of two; Q's
 * power of two, negative where a row has flags; `rowsum(dO o O)` over dO's power of two.
 */
export const gradientRow = ({ headDimPadded, valueDimPadded, half = false, codes = false }: GradientDims) => {
  const perVector = half ? 8 : 4;
  const dOutput = (codes ? Math.max(headDimPadded, valueDimPadded) : headDimPadded) / perVector;
  const ready = dOutput + valueDimPadded / perVector;
  const facts = half ? ready + 1 : ready;
  const channels = half ? facts + 2 : facts + 1;
  const channelWords = valueDimPadded / 32;
  return {
    dOutput,
    ready,
    facts,
    scales: facts + 1,
    channels,
    channelWords,
    vectors: channels + Math.ceil(channelWords / 4),
  };
};

/**
 * A key's row in vectors of four words: K, less its mean where that was taken for the scores too; V; in `half` the scale of its codes, the
 * powers of two of V and of K, and the flags of its codes.
 */
export const gradientKey = ({ headDimPadded, valueDimPadded, half = false }: GradientDims) => {
  const perVector = half ? 8 : 4;
  const ready = (headDimPadded + valueDimPadded) / perVector;
  return { value: headDimPadded / perVector, ready, vectors: half ? ready + 1 : ready };
};

/** Flags of a query's row. */
export const ROW_FLAGS = {
  /** Its weights are NaN: by Q, by a key that it sees, or by the mask. */
  weights: 1,
  /** The gradients of its scores are NaN, and its weights are not: by a value that it sees, or by dO. */
  scores: 2,
  /** Some channels of its dO are no numbers. */
  channels: 4,
  /** Its logsumexp does not give its weights accurately; cleared once its softmax has been made anew. */
  again: 8,
} as const;

/** Flags that make the gradient of the row's query, and of keys that it sees, NaN. */
export const BAD_SCORES = ROW_FLAGS.weights | ROW_FLAGS.scores;

/** Words of a sequence's record: first elements of its part of each tensor, modulo 2^32. */
export const PLACE = { output: 0, dOutput: 1, lse: 2, dq: 3, dk: 4, dv: 5 } as const;
export const PLACE_WORDS = 6;

/** `place_of(sequence, field)`; expects `P.placesAt` and the tables. */
export const PLACES = `
fn place_of(sequence: u32, field: u32) -> u32 { return tables[P.placesAt + sequence * ${PLACE_WORDS}u + field]; }`;
