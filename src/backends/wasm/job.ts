/**
 * What both sides of a call agree on, compiled into the AssemblyScript kernels and the TypeScript around them; see
 * fields.ts too.
 */

// Tiling.

/** Keys of a tile: one scale of P per row, one scale of V per channel. */
export const BLOCK_K = 128;
/** Query rows that share a mean where Q is smoothed by blocks. */
export const SMOOTHED_ROWS = 128;
/** Query rows of a unit. */
export const BLOCK_Q = 32;

export const FLAG_SMOOTH_K = 1;
export const FLAG_SMOOTH_V = 2;
/** Q in two digits of 7 bits, P and V in float32. */
export const FLAG_ACCURATE = 4;
/** Q and K in float32 too, with FLAG_ACCURATE: nothing is quantized. */
export const FLAG_EXACT = 16;
/** Tiles hold FP4, with FLAG_ACCURATE and FLAG_EXACT: they are decoded to float32. */
export const FLAG_FP4 = 32;
/** Q and P are rounded to FP4 too, as the whole algorithm has it; not over caches. */
export const FLAG_FP4_PRODUCTS = 2048;
/** Subtract Q's mean over SMOOTHED_ROWS rows, or over the sequence, before it is rounded to FP4. */
export const FLAG_SMOOTH_Q = 128;
export const FLAG_SMOOTH_Q_SEQUENCE = 256;
/** How FP4's scales are searched for; neither: not at all. */
export const FLAG_SEARCH_FOUR_OVER_SIX = 512;
export const FLAG_SEARCH_MSE = 1024;
/** Keys and values are float32 and are used where they lie, for few rows a head. */
export const FLAG_IN_PLACE = 4096;
/** Each tile has its own means, since more tokens may be appended; means of the whole sequence are not computed. */
export const FLAG_TILE_MEANS = 8;

/** A backward pass: rows of Q are kept in float32 besides their integers. */
export const FLAG_GRADIENTS = 64;

/** Pooling: also how much alike the rows of each block are; FLAG_SMOOTH_K: after their mean was taken off. */
export const FLAG_SIMILARITIES = 8192;
/** With FLAG_GRADIENTS: other keys that the rows saw are elsewhere, so that rows of dS do not add up to 0. */
export const FLAG_PART_OF_KEYS = 16384;
/** With FLAG_GRADIENTS: the products of the gradients in integers, see assembly/gradient-codes.ts. */
export const FLAG_INTEGER_GRADIENTS = 32768;

/** Pooling: float32 after the mean of each block; the first is how much alike its rows are. */
export const POOLED_EXTRA = 4;

export const DTYPE_FLOAT32 = 0;
export const DTYPE_FLOAT16 = 1;
export const DTYPE_BFLOAT16 = 2;
export const DTYPE_BOOL = 3;

/** Tile flags: a key that holds a NaN or infinity; a value that does. */
export const TILE_NAN_KEY = 1;
export const TILE_NAN_VALUE = 2;
/** Values have a scale for each key and 8 channels, since rows see some of the keys and sizes differ much. */
export const TILE_FINE_VALUES = 4;
/** The same for up to MOST_APART keys, which the other values' scales leave out. */
export const TILE_VALUES_APART = 8;
/** Keys that smoothing would have enlarged are quantized without it. */
export const TILE_PLAIN_KEYS = 16;
/** The tile has means of its own. */
export const TILE_SHIFTED = 32;

/** Keys of a tile whose values stand apart. */
export const MOST_APART = 8;
/** After the tile's flags: how many keys stand apart, then one byte for each: which. */
export const TILE_APART_COUNT = 4;
export const TILE_APART_KEYS = 8;

/** Query rows of a unit of the kernel that quantizes nothing: K and V are laid out anew for each unit. */
export const EXACT_ROWS = 256;

// A thread's own scratch.

/** Bytes of scratch a thread needs besides one byte for each key of the longest sequence. */
export const SCRATCH_BYTES = 385024;
/** And besides it where tiles are FP4: one of them, decoded. */
export const DECODED_TILE_BYTES = 524288;
/** Where the kernel that quantizes nothing keeps keys, values and scores. */
export const EXACT_DATA = 91904;
