/** Configurations of the `mma.sync` kernel, and what launches must know of it. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { Target } from '../../ptx/targets.ts';
import type { CodeOrder } from '../fp4/e2m1.ts';
import type { LoadWidth } from '../parts/elements.ts';

/** Keys of a tile. */
export const BLOCK_K = 64;

/** What kernels of 16-bit operands must know of the caller's tensors. */
export interface GivenOperands {
  readonly headDim: number;
  /** Elements of the largest load that each tensor's place allows. */
  readonly loadWidths: Readonly<Record<'query' | 'key' | 'value', LoadWidth>>;
}

export interface AttentionConfig {
  readonly target: Target;
  /**
   * `e2m1`: NVFP4 on tensor cores that scale blocks. `e2m1-as-f16`: K unpacked to FP16 on its way to the tensor core,
   * and Q in FP16, in the order of `unpackCodes`.
   */
  readonly qkFormat: 's8' | 's4' | 'e2m1' | 'e2m1-as-f16' | 'f16' | 'bf16';
  /** Of K and V in FP4. */
  readonly codeOrder: CodeOrder;
  /** Bytes of a quantized token of K: D padded to 32 (INT8), or to 64 and halved (INT4, FP4). */
  readonly qkRowBytes: number;
  /** The same for Q, or for FP16. */
  readonly queryRowBytes: number;
  /**
   * `f16`: V in FP16, tokens by channels. `e4m3`: V in FP8, channels by permuted tokens, and P in FP8. `e4m3-as-f16`: V
   * in FP8, converted to FP16 on its way to the tensor core, and P in FP16: where `mma.sync` has no FP8. `e2m1`: V in
   * NVFP4, tiles of channels by tokens, and P too. `e2m1-as-f16`: V in NVFP4, unpacked to FP16.
   */
  readonly pvFormat: 'f16' | 'bf16' | 'e4m3' | 'e4m3-as-f16' | 'e2m1' | 'e2m1-as-f16';
  /** With V in NVFP4: P in NVFP4 too, in two levels, and rows divided by the sum of the rounded P. Else P in FP16. */
  readonly quantizedWeights: boolean;
  /**
   * `f32`: tensor-core sums in FP32 throughout. `f16`: in FP16 throughout. `f32-per-tile` and `f16-per-tile`: sums of one
   * tile, then added to FP32 registers.
   */
  readonly accumulate: 'f32' | 'f16' | 'f32-per-tile' | 'f16-per-tile';
  /** Dv, and Dv padded to a multiple of 16, or of 32 with V in FP8. */
  readonly valueDim: number;
  readonly paddedValueDim: number;
  /** Warps that take different rows of Q and the same keys. */
  readonly warps: number;
  /** Warps that take the same rows of Q and different keys, each with stages of its own; more than 1 only where `warps` is 1. */
  readonly keyWarps: number;
  readonly rowsPerWarp: 16 | 32;
  /**
   * Of a warp's 16 rows only the first eight exist: nothing is computed of the others but products, whose results nobody reads.
   */
  readonly eightRows: boolean;
  readonly minBlocksPerMultiprocessor: number;
  /** 2: V is fetched a tile ahead like K. 1: behind its own tile's QK^T, where shared memory is short. */
  readonly valueStages: 1 | 2;
  /** 2: K is fetched a tile ahead. 1: behind its own QK^T, where shared memory is shorter still. */
  readonly keyStages: 1 | 2;
  /** The caller's Q, up to eight rows, which the kernel quantizes itself; undefined where it is quantized. */
  readonly fusedQuery:
    | { readonly dtype: DType; readonly headDim: number; readonly loadWidth: LoadWidth; readonly keyMean: boolean }
    | undefined;
  /** Of the caller's 16-bit operands; undefined where Q, K and V are quantized. */
  readonly given: GivenOperands | undefined;
  /** Rows of Q that share a set of scales, and how many are in the set: [128, 1], [32, 1] or [32, 8]. */
  readonly queryScales: readonly [rows: number, scales: number];
  /** Scales of a K tile: 1, or 4 when per thread. */
  readonly keyScales: 1 | 4;
  /** The output is rescaled only when a row's maximum has grown by more than this (in powers of two); P then reaches 2^threshold. */
  readonly rescaleThreshold: number;
  /** Causal or windowed: row i sees keys i + lower .. i + upper. */
  readonly banded: boolean;
  /** Rows are heads over one token: all see what row 0 sees. */
  readonly sameBand: boolean;
  readonly mask: 'none' | 'boolean' | DType;
  /** Tiles of keys come from lists; see `parts/blocks.ts`. */
  readonly blocks: boolean;
  readonly softcap: boolean;
  /** Dtype of the sinks. Who joins splits adds them. */
  readonly sinks: 'none' | DType;
  /** Adds the share of Q's block mean to the scores (`smoothQ`), buffer `meanScores`. */
  readonly smoothQ: boolean;
  /** Adds V's channel mean to the output. */
  readonly smoothV: boolean;
  readonly outputType: DType;
  readonly lse: boolean;
  /** Writes partial results of one of several splits of the keys. */
  readonly split: boolean;
  /** With splits: the last CTA of a tile of rows joins them, else `combine.ts`. */
  readonly joins: boolean;
  /** With `joins` and one tile of rows for each head: sequences have as many splits as their lengths ask for (`parts/splits.ts`). */
  readonly splitsByLength?: true;
  /** K and V lie in pages of so many tokens, a power of two from {@link BLOCK_K} up (`parts/pages.ts`). */
  readonly pageTokens?: number;
  /** With `joins`: see `parts/join.ts`. */
  readonly alignedFours: boolean;
}

/** Parameters in order, as the kernel declares them. Pointers that a configuration does not use may be null. */
export const ATTENTION_POINTERS = [
  'sequences',
  'query',
  'queryScale',
  'rowBias',
  'key',
  'keyScale',
  'keyFaults',
  'keyExponents',
  'value',
  'valueScale',
  'rangeShift',
  'valueMean',
  'meanScores',
  'mask',
  'output',
  'lse',
] as const;
export const ATTENTION_INTEGERS = [
  'queryHeads',
  'headsPerKeyHead',
  'queryTiles',
  'splits',
  'paddedQueries',
  'paddedKeys',
  'meanScoreKeys',
] as const;
/** Strides in bytes: of the mask, the output and (elements of 4 bytes) the LSE. */
export const ATTENTION_STRIDES = [
  'maskBatch',
  'maskHead',
  'maskQuery',
  'maskKey',
  'outputBatch',
  'outputHead',
  'outputToken',
  'lseBatch',
  'lseHead',
] as const;

/** Rows of a Q that the kernel quantizes itself: each has a scale of its own. */
export const FUSED_ROWS = 8;
/** Parameters of kernels that quantize Q: the mean of K, and Q's strides in bytes; `signedScale`, smScale * log2(e), follows. */
export const FUSED_POINTERS = ['keyMean', 'queryBatch', 'queryHead', 'queryToken'] as const;

/** Parameters of kernels with {@link AttentionConfig.splitsByLength}; `splits` are the slots of a head then. */
export const LENGTH_SPLIT_INTEGERS = ['sequenceCount', 'mostSplits'] as const;
/** A part of the keys of fewer tiles is not worth its prologue. */
export const LEAST_TILES = 4;

/** Pointers of NVFP4's scales, which only kernels with such operands take. */
export const FP4_POINTERS = ['queryBlockScale', 'keyBlockScale', 'valueBlockScale', 'valueTileScale'] as const;

/** Q, K and V are the caller's, in 16 bits. */
export const isExact = ({ qkFormat }: Pick<AttentionConfig, 'qkFormat'>) => qkFormat === 'f16' || qkFormat === 'bf16';
/** Q and K are NVFP4. */
export const hasFp4Keys = ({ qkFormat }: Pick<AttentionConfig, 'qkFormat'>) => qkFormat.startsWith('e2m1');
/** V is NVFP4; the rows of K are in an order that makes the accumulators of Q K^T the operand of P V then. */
export const hasFp4Values = ({ pvFormat }: Pick<AttentionConfig, 'pvFormat'>) => pvFormat.startsWith('e2m1');

/** V in FP8 has scales of its own for the channels of each tile of keys: pages may belong to any sequence. */
export const scalesEachTile = ({
  pvFormat,
  pageTokens,
}: Pick<AttentionConfig, 'pvFormat'> & { pageTokens?: number | undefined }) =>
  pvFormat === 'e4m3' && pageTokens !== undefined;

/** Rows of Q of a CTA. */
export const blockQueries = ({ warps, rowsPerWarp }: Pick<AttentionConfig, 'warps' | 'rowsPerWarp'>) =>
  warps * rowsPerWarp;
