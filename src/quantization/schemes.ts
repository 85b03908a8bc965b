/**
 * The quantization schemes as data. Every backend and the reference read them from here.
 *
 * Sources: SageAttention (arXiv 2410.02367) for per-block and smooth K, SageAttention2 (arXiv 2411.10958) for
 * per-thread, smooth Q and FP8 V, SageAttention2++ (arXiv 2505.21136) for `vmax`, SageAttention3 (arXiv 2505.11594) for
 * NVFP4.
 */

/** How many tokens share one scale of Q or K; `groups.ts` has the groups. */
export type Granularity = 'per-block' | 'per-warp' | 'per-thread';

/**
 * How P.V is summed. 'fp32+fp32': FP8 tensor-core sums moved to a true FP32 register every tile. 'fp16+fp32': FP16
 * sums moved to FP32 every tile. 'fp32+fp16' is SageAttention2++: FP16 tensor-core sums, FP32 between tiles.
 */
export type PvAccumDtype = 'fp32' | 'fp16' | 'fp16+fp32' | 'fp32+fp32' | 'fp32+fp16';

/** The format in which P and V are multiplied. */
export type PvFormat = 'fp32' | 'fp16' | 'fp8' | 'int8' | 'fp4';

/** The format in which Q and K are multiplied. */
export type QkFormat = 'int8' | 'int4' | 'fp4';

/**
 * What `smoothQ` subtracts from Q: the mean of each block of rows (128 in most kernels), or the mean of the whole
 * sequence.
 */
export type QuerySmoothing = 'block' | 'sequence';

/** Tokens of a tile (block) and of the warps inside it. */
export interface Tiling {
  readonly blockQ: number;
  readonly warpQ: number;
  readonly blockK: number;
  readonly warpK: number;
}

/** The reference implementation's tilings, by kernel family. */
export const TILINGS = {
  portable: { blockQ: 128, warpQ: 128, blockK: 64, warpK: 64 },
  sm80: { blockQ: 128, warpQ: 32, blockK: 64, warpK: 64 },
  sm90: { blockQ: 64, warpQ: 16, blockK: 128, warpK: 128 },
} as const satisfies Record<string, Tiling>;

/** Largest quantized magnitude of an integer format. */
export const INT_MAX = { int8: 127, int4: 7 } as const;

/**
 * `vmax` of FP8 V: E4M3's largest value, and what keeps an FP16 accumulator below its limit (448 * 2.25 * 64 < 65504).
 */
export const V_FP8_MAX = { default: 448, fp16Accumulator: 2.25 } as const;
