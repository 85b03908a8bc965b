/**
 * What a kernel reads from memory to know its work: byte offsets of 32-bit fields. Compiled into both sides, the
 * AssemblyScript kernels and the TypeScript that fills these records in.
 *
 * A call is one job record, one sequence record for each sequence and one unit record for each piece of work that a
 * thread takes at a time. Offsets and strides into tensors count elements.
 */

// Tiling.

/** Keys of a tile: one scale of P per row, one scale of V per channel. */
export const BLOCK_K = 128;
/** Query rows of a unit. */
export const BLOCK_Q = 32;

// Job record.

export const JOB_Q = 0;
export const JOB_K = 4;
export const JOB_V = 8;
export const JOB_OUT = 12;
/** 0: no LSE is wanted. */
export const JOB_LSE = 16;
/** 0: no mask. */
export const JOB_MASK = 20;
/** First tile of quantized keys and values. */
export const JOB_TILES = 24;
/** Smoothing vectors, `[sequences, kvHeads, D + DvPadded]` float32: K's mean, then V's. */
export const JOB_MEANS = 28;
/** Values of the last, partly filled tile, `[sequences, kvHeads, BLOCK_K, DvPadded]` float32; 0: not kept. */
export const JOB_TAIL = 32;
export const JOB_SEQUENCES = 36;
export const JOB_UNITS = 40;
export const JOB_UNIT_COUNT = 44;
/** Next unit to take; threads add to it atomically. */
export const JOB_NEXT = 48;
/** Nonzero: stop. */
export const JOB_ABORT = 52;
export const JOB_QUERY_HEADS = 56;
export const JOB_KV_HEADS = 60;
export const JOB_D = 64;
export const JOB_DV = 68;
/** A `DTYPE_` code. */
export const JOB_DTYPE = 72;
export const JOB_Q_HEAD_STRIDE = 76;
export const JOB_Q_TOKEN_STRIDE = 80;
export const JOB_K_HEAD_STRIDE = 84;
export const JOB_K_TOKEN_STRIDE = 88;
export const JOB_V_HEAD_STRIDE = 92;
export const JOB_V_TOKEN_STRIDE = 96;
export const JOB_OUT_HEAD_STRIDE = 100;
export const JOB_OUT_TOKEN_STRIDE = 104;
export const JOB_LSE_HEAD_STRIDE = 108;
export const JOB_MASK_HEAD_STRIDE = 112;
export const JOB_MASK_QUERY_STRIDE = 116;
export const JOB_MASK_KEY_STRIDE = 120;
/** A `DTYPE_` code. */
export const JOB_MASK_DTYPE = 124;
/** Sum of `FLAG_`. */
export const JOB_FLAGS = 128;
/** float32 */
export const JOB_SM_SCALE = 132;
/** float32; 0: none. */
export const JOB_SOFTCAP = 136;
/** 4-byte steps of a packed row of K: 4 channels each, 2 in a build that keeps operands in 16-bit lanes, 1 of float32. */
export const JOB_K_STEPS = 140;
/** Dv rounded up to a multiple of 8. */
export const JOB_DV_PADDED = 144;
// Byte offsets inside a tile; the packed keys are at 0.
export const JOB_TILE_K_SCALES = 148;
export const JOB_TILE_K_SUMS = 152;
export const JOB_TILE_V = 156;
export const JOB_TILE_V_SCALES = 160;
export const JOB_TILE_FLAGS = 164;
export const JOB_TILE_NANS = 168;
export const JOB_TILE_BYTES = 172;
export const JOB_TILE_V_EXPONENTS = 176;
export const JOB_TILE_V_APART = 180;
export const JOB_TILE_K_PLAIN = 184;
/** Means of the tile's keys and values, `[D + DvPadded]` float32, D padded too; they count where TILE_SHIFTED is set. */
export const JOB_TILE_SHIFT = 188;
/** Keys of the last, partly filled tile as they came, `[sequences, kvHeads, BLOCK_K, D]` float32, D padded; 0: not kept. */
export const JOB_KEY_TAIL = 192;
export const JOB_BYTES = 196;

export const FLAG_SMOOTH_K = 1;
export const FLAG_SMOOTH_V = 2;
/** Q in two digits of 7 bits, P and V in float32. */
export const FLAG_ACCURATE = 4;
/** Q and K in float32 too, with FLAG_ACCURATE: nothing is quantized. */
export const FLAG_EXACT = 16;
/** Each tile has means of its own, as tokens may still come; those of the sequence are not computed. */
export const FLAG_TILE_MEANS = 8;

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

// Sequence record.

export const SEQUENCE_Q = 0;
export const SEQUENCE_K = 4;
export const SEQUENCE_V = 8;
export const SEQUENCE_OUT = 12;
export const SEQUENCE_LSE = 16;
export const SEQUENCE_MASK = 20;
export const SEQUENCE_QUERY_LENGTH = 24;
export const SEQUENCE_KEY_LENGTH = 28;
/** Row i sees keys `i + lower` to `i + upper`, both included. */
export const SEQUENCE_LOWER = 32;
export const SEQUENCE_UPPER = 36;
/** Tiles before this sequence's first, and tiles that each of its heads has room for. */
export const SEQUENCE_FIRST_TILE = 40;
export const SEQUENCE_TILES = 44;
/** Preparation: tokens already quantized; `SEQUENCE_K` and `SEQUENCE_V` point at the token after them. */
export const SEQUENCE_START = 48;
/** Nonzero: keys that no row sees may exist, and stay out of means and scales. */
export const SEQUENCE_PARTLY_SEEN = 52;
/** Nonzero: rows may see different keys, so that none may spoil the precision of another. */
export const SEQUENCE_ROWS_DIFFER = 56;
export const SEQUENCE_BYTES = 60;

// Unit record: a head of q and rows of it, or in preparation a head of k and v.

export const UNIT_SEQUENCE = 0;
export const UNIT_HEAD = 4;
export const UNIT_ROW = 8;
export const UNIT_BYTES = 12;

// A thread's own scratch.

/** Bytes of scratch a thread needs besides one byte for each key of the longest sequence. */
export const SCRATCH_BYTES = 196608;
