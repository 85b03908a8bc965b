/** Where a thread's scratch holds what; byte offsets. */

/** One row of float32, padded to 512 and the 3 elements that loads may reach beyond. */
export const SCRATCH_ROW: usize = 0;
/**
 * Quantized rows of Q; a row takes the most that any takes, so that addresses of rows are constants apart, and a cache line more:
 * rows a power of two apart would share few sets of the cache.
 */
export const SCRATCH_Q: usize = 4096;
export const Q_ROW_BYTES: usize = 1088;
/** Per row: what turns an integer score of a key with scale 1 into one in base 2. */
export const SCRATCH_ROW_SCALES: usize = 38912;
/** Per row: share of the smoothing vector in the score, natural units. */
export const SCRATCH_ROW_BIASES: usize = 39040;
/** Per row: running maximum, base 2, and sum of weights. */
export const SCRATCH_MAXIMA: usize = 39168;
export const SCRATCH_SUMS: usize = 39296;
/** For each of the four rows in work, the tile's weight. */
export const SCRATCH_TILE_WEIGHTS: usize = 39456;
/** For each of the four rows in work, the value of a unit of P's second digits; 0 for rows that have none. */
export const SCRATCH_SECOND_WEIGHTS: usize = 39472;
/** How far the row in work reaches below and above 0, and its product with the means. */
export const SCRATCH_RANGE: usize = 39424;
/** Constants of the inner loops, see arithmetic.ts. */
export const SCRATCH_CONSTANTS: usize = 39488;
/** Per row: the integer that stands for 0, as a float32. */
export const SCRATCH_ROW_ZEROS: usize = 39744;
/** For the four rows in work, scores of a tile, float32, and weights in the format of the product with V. */
export const SCRATCH_SCORES: usize = 39936;
export const SCRATCH_P: usize = 41984;
export const P_ROW_BYTES: usize = 512;
/** Output of the unit's rows before division by the sum, float32. */
export const SCRATCH_OUT: usize = 44032;
/** Preparation: the largest value of each key of a tile, float32; counts of exponents, then one byte for each key. */
export const SCRATCH_VALUE_SIZES: usize = 109568;
export const SCRATCH_HISTOGRAM: usize = 110080;
/**
 * For the four rows in work, weights of the keys whose values stand apart, P_ROW_BYTES for each row, and the value of
 * a unit of them.
 */
export const SCRATCH_APART: usize = 110592;
export const SCRATCH_APART_WEIGHTS: usize = 112640;
/** For each of the four rows in work, the tile's sum of weights, and the largest score. */
export const SCRATCH_TILE_SUMS: usize = 112656;
export const SCRATCH_TILE_MAXIMA: usize = 112672;
/** For each of the four rows in work, the factor that turns its scores to base 2. */
export const SCRATCH_TILE_SCALES: usize = 112688;
/** Per row: sum of weights before they were rounded, for the LSE. */
export const SCRATCH_EXACT_SUMS: usize = 112704;
/** For the unit, Q's mean, float32, padded to 512; its product with each key of a tile; and BLOCK_K times 1. */
export const SCRATCH_QUERY_MEAN: usize = 112896;
export const SCRATCH_MEAN_SCORES: usize = 115008;
export const SCRATCH_KEY_ONES: usize = 115520;
/** A block or a row that becomes FP4. */
export const SCRATCH_BLOCK: usize = 116032;
/** A tile's keys and values in float32, where it is FP4. */
export const SCRATCH_DECODED_KEYS: usize = 385024;
export const SCRATCH_DECODED_VALUES: usize = 647168;
/** Rows of Q in float32, where they are not quantized or tiles have means: attending, which comes after preparation. */
export const SCRATCH_FLOAT_Q: usize = 122880;
export const FLOAT_Q_ROW_BYTES: usize = 2112;
/** Preparation: a tile of V in float32, where the caller keeps none. */
export const SCRATCH_VALUES: usize = 122880;
/** Backward: rows of dO in float32, FLOAT_Q_ROW_BYTES apart; weights and gradients of scores, P_ROW_BYTES apart. */
export const SCRATCH_D_OUT: usize = 190464;
export const SCRATCH_GRADIENT_P: usize = 258048;
export const SCRATCH_D_S: usize = 274432;
/** For the four rows in work, dO . V, `[4, BLOCK_K]`. */
export const SCRATCH_D_P: usize = 290816;
/** Per row: `rowsum(dO o O)`, LSE in base 2, and a byte: dO holds NaN or infinity. */
export const SCRATCH_DELTAS: usize = 292864;
export const SCRATCH_LSES: usize = 292992;
export const SCRATCH_INVALID_ROWS: usize = 293120;
/** Per row: what weights relative to SCRATCH_LSES are multiplied by. */
export const SCRATCH_FACTORS: usize = 293248;
/** Four float32 of 1. */
export const SCRATCH_ONES: usize = 293184;
/** A row as SCRATCH_ROW, or a tile's keys of one. */
export const SCRATCH_GRADIENT_ROW: usize = 293440;
/** Gradients in integers, see gradient-codes.ts: constants; reciprocals of the sizes of up to 128 rows. */
export const SCRATCH_GRADIENT_CONSTANTS: usize = 295552;
export const SCRATCH_INVERSES: usize = 295616;
/** P or dS, the left operand: integers; a scale for each row of the result, and sums of the integers that have it. */
export const SCRATCH_LEFT: usize = 296128;
export const SCRATCH_LEFT_UNITS: usize = 304320;
export const SCRATCH_LEFT_SUMS: usize = 304832;
/** The unit's rows of dO and of Q: integers, scales of up to 256 channels and as many zeros, sizes of rows. */
export const SCRATCH_D_OUT_CODES: usize = 305344;
export const SCRATCH_D_OUT_SCALES: usize = 321728;
export const SCRATCH_D_OUT_SIZES: usize = 323776;
export const SCRATCH_Q_CODES: usize = 323904;
export const SCRATCH_Q_SCALES: usize = 340288;
export const SCRATCH_Q_SIZES: usize = 342336;
/** Preparation: one byte for each key, see markSeen. */
export const SCRATCH_SEEN: usize = 385024;
