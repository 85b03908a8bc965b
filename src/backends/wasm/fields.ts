/**
 * The records that kernels read from memory to know their work: 32-bit fields in this order. scripts/build-wasm.ts
 * makes the byte offsets of it that the kernels read by (`generated/fields.ts`); records.ts writes by the same table.
 *
 * A call is one job record, one sequence record for each sequence and one unit record for each piece of work that a
 * thread takes at a time. Offsets and strides into tensors count elements.
 */

/** The job. */
export const JOB_FIELDS = [
  'q',
  'k',
  'v',
  'out',
  /** 0: no LSE is wanted. */
  'lse',
  /** 0: no mask. Of an append to a cache, whose rows are yet to come: bytes that say which of the tokens added count. */
  'mask',
  /** First tile of quantized keys and values. */
  'tiles',
  /** Smoothing vectors, `[sequences, kvHeads, D + DvPadded]` float32: K's mean, then V's. */
  'means',
  /** Values of the last, partly filled tile, `[sequences, kvHeads, BLOCK_K, DvPadded]` float32; 0: not kept. */
  'tail',
  'sequences',
  'units',
  'unitCount',
  /** Next unit to take; threads add to it atomically. */
  'next',
  /** Nonzero: stop. */
  'abort',
  'queryHeads',
  'kvHeads',
  'd',
  'dv',
  /** A `DTYPE_` code. */
  'dtype',
  'qHeadStride',
  'qTokenStride',
  'kHeadStride',
  'kTokenStride',
  'vHeadStride',
  'vTokenStride',
  'outHeadStride',
  'outTokenStride',
  'lseHeadStride',
  'maskHeadStride',
  'maskQueryStride',
  'maskKeyStride',
  /** A `DTYPE_` code. */
  'maskDtype',
  /** Sum of `FLAG_`. */
  'flags',
  /** float32 */
  'smScale',
  /** float32; 0: none. */
  'softcap',
  /**
   * 4-byte steps of a packed row of K: 4 channels each, 2 in a build that keeps operands in 16-bit lanes, 1 of float32.
   */
  'kSteps',
  /** Dv rounded up to a multiple of 8. */
  'dvPadded',
  // Byte offsets inside a tile; the packed keys are at 0.
  'tileKScales',
  'tileKSums',
  'tileV',
  'tileVScales',
  'tileFlags',
  'tileNans',
  'tileBytes',
  'tileVExponents',
  'tileVApart',
  'tileKPlain',
  /**
   * Means of the tile's keys and values, `[D + DvPadded]` float32, D padded too; they count where TILE_SHIFTED is set.
   */
  'tileShift',
  /**
   * Keys of the last, partly filled tile as they came, `[sequences, kvHeads, BLOCK_K, D]` float32, D padded; 0: not
   * kept.
   */
  'keyTail',
  /** One byte for each token of the last, partly filled tile, `[sequences, kvHeads, BLOCK_K]`: whether it counts, see prepare.ts. */
  'tailSeen',
  /** float32 of each query head; 0: none. */
  'sinks',
  /** One byte for each block of scores, nonzero: it is computed; 0: all are. */
  'blockMap',
  /** Rows and keys of a block, multiples of 16. */
  'blockRows',
  'blockKeys',
  'blockHeadStride',
  'blockRowStride',
  'blockKeyStride',
  // A backward pass; 0 in others, as all that follow.
  /** Gradient of the output; `out` and `lse` are what the forward pass gave. */
  'dOut',
  'dOutHeadStride',
  'dOutTokenStride',
  /** Values and keys in float32, see assembly/backward.ts. */
  'gradientTiles',
  /** Sums of dV and dK, float32: for each sequence, query head and chunk of its rows `[tiles * BLOCK_K, DvPadded]`, then D padded. */
  'gradientSums',
  'dQuery',
  'dQueryHeadStride',
  'dQueryTokenStride',
  'dKey',
  'dKeyHeadStride',
  'dKeyTokenStride',
  'dValue',
  'dValueHeadStride',
  'dValueTokenStride',
  /** A `DTYPE_` code, of the three. */
  'gradientDtype',
  /** Gradient of the scores, float32 `[sequences, queryHeads, dMaskRows, dMaskKeys]`; 0: not wanted. */
  'dMask',
  'dMaskRows',
  'dMaskKeys',
] as const;

/** A sequence: its place in operands and tiles, lengths and band. */
export const SEQUENCE_FIELDS = [
  'q',
  'k',
  'v',
  'out',
  'lse',
  'mask',
  'blocks',
  'queryLength',
  'keyLength',
  /** Row i sees keys `i + lower` to `i + upper`, both included. */
  'lower',
  'upper',
  /** Tiles before this sequence's first, and tiles that each of its heads has room for. */
  'firstTile',
  'tiles',
  /** Preparation: tokens already quantized; `SEQUENCE_K` and `SEQUENCE_V` point at the token after them. */
  'start',
  /** Nonzero: keys that no row sees may exist, and stay out of means and scales. */
  'partlySeen',
  /** Nonzero: rows may see different keys, so that none may spoil the precision of another. */
  'rowsDiffer',
  // A backward pass: places in gradients, and how rows are split into units.
  'dOut',
  'dQuery',
  'dKey',
  'dValue',
  /** First float32 of its sums. */
  'firstSum',
  'chunks',
  'chunkRows',
] as const;

/** A head of q and rows of it, or in preparation a head of k and v. */
export const UNIT_FIELDS = ['sequence', 'head', 'row'] as const;
