/**
 * Configurations of the Hopper kernel: what they mean, the shared memory they take, and the table that a problem
 * chooses from.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { type Layout, tma128Swizzle } from '../../ptx/layouts.ts';

/** How the pipeline runs; the same for every problem of a head dim. */
export interface WgmmaTile {
  /** Warpgroups that compute, 64 rows of Q each. */
  readonly consumers: 1 | 2 | 3;
  /** Stages of K and of V. */
  readonly stages: number;
  /** CTAs that share a multiprocessor. */
  readonly minBlocks: 1 | 2;
  /** Registers of a thread after `setmaxnreg`; undefined leaves them as they are at the start. */
  readonly registers: { readonly producer: number; readonly consumer: number } | undefined;
  /** `ahead`: QK^T of the next tile is issued before PV of this one. `serial`: one after the other. */
  readonly schedule: 'ahead' | 'serial';
  /** Two consumers issue their products in turns, so that one takes exponentials while the other multiplies. */
  readonly pingPong: boolean;
  /**
   * FP8 sums move to float32 registers with every tile ('fp32+fp32'), or never ('fp32'). FP16 products are summed in
   * float32.
   */
  readonly promoted: boolean;
  /**
   * Columns of PV that have registers for sums of their own; fewer than Dv only when serial and promoted every tile.
   */
  readonly valueChunk: number;
  /**
   * A scale for each row of a Q that the kernel quantizes; else rows i and i + 8 of every 16 share one, which saves
   * registers.
   */
  readonly queryScalePerRow: boolean;
  /** Share of the exponentials on the FMA units. Needs `onesColumn`. */
  readonly polynomialShare: 0 | 0.125 | 0.25 | 0.5;
  /**
   * Row sums as one more column of P V, over the same rounded P: 8 more columns. Only with promotion: FP8 sums lose
   * addends that are small beside them.
   */
  readonly onesColumn: boolean;
  /** Powers of two by which a row's maximum may grow before the output is rescaled. */
  readonly rescaleThreshold: number;
}

export interface WgmmaConfig extends WgmmaTile {
  /** Of Q and K. 16-bit floats are the caller's own, as are those of V then, in the same format. */
  readonly qkFormat: 's8' | 'f16' | 'bf16';
  readonly pvFormat: 'e4m3' | 'f16' | 'bf16';
  /** Sequences of the caller's 16-bit operands lie one behind the other, not as entries of a batch. */
  readonly packedSequences: boolean;
  /** With 16-bit operands: scores are multiplied before their maximum is taken, as a scale that is not positive needs. */
  readonly scalesFirst: boolean;
  /** Bytes of a token of Q or K: D padded to 32 in INT8, to 16 in 16 bits. */
  readonly qkRowBytes: number;
  /** Dv, and Dv padded to a multiple of 16, or of 32 with V in FP8. */
  readonly valueDim: number;
  readonly paddedValueDim: number;
  /** Q as the caller gave it, quantized by the kernel itself. */
  readonly fusedQuery: { readonly dtype: DType; readonly headDim: number; readonly keyMean: boolean } | undefined;
  /** Tokens of Q that share a set of scales, and how many are in the set. */
  readonly queryScales: readonly [tokens: number, scales: 1 | 8];
  /** Scales of 64 keys: 1, or 4 when per thread. */
  readonly keyScales: 1 | 4;
  /**
   * Heads of Q over one head of K that lie side by side as rows of a tile: a power of two up to 64. For short queries.
   */
  readonly packedHeads: number;
  /** P = 2^(s - max + this): the row maximum becomes the format's, less what `rescaleThreshold` lets it grow. */
  readonly exponentOffset: number;
  /** Causal or windowed. */
  readonly banded: boolean;
  readonly mask: 'none' | 'boolean' | DType;
  /**
   * Tiles of keys come from lists; see `parts/blocks.ts`. `whole rows`: the rows of each tile lie in one block, and the lists say what
   * of a tile is hidden.
   */
  readonly blocks: 'none' | 'whole rows' | 'any';
  readonly softcap: boolean;
  /** Dtype of the sinks. Who joins splits adds them. */
  readonly sinks: 'none' | DType;
  readonly smoothV: boolean;
  readonly outputType: DType;
  /** Of 16-bit operands: the output's rows begin at multiples of 16 bytes, as its chunks of eight channels do. */
  readonly alignedOutput: boolean;
  readonly lse: boolean;
  readonly split: boolean;
  /** With splits: the last CTA of a tile of rows joins them, else `combine.ts`. */
  readonly joins: boolean;
  /** With `joins`: see `parts/join.ts`. */
  readonly alignedFours: boolean;
}

/** Bits of a float that scales keep: 21 of the mantissa, so that 1.5 * 2^23 times the scale has no more than 24. */
export const SCALE_BITS = 0xfffffff8;
/**
 * Largest scale (of a product of codes, in powers of two) up to which the zero point, 1.5 * 2^23 times the scale, may
 * be added to a maximum in float32: it then errs by less than 2^-7, where the rounding of the codes themselves is good
 * for more than 2.
 */
export const EXACT_SCALE = 2 ** -6;

/** CU_TENSOR_MAP_SWIZZLE_64B: in 512-byte atoms of eight 64-byte rows, chunk c of row r lies at chunk c ^ (r >> 1). */
export function tma64Swizzle(): Layout {
  const swizzle = (row: number, byte: number) => (row * 64 + byte) ^ (((row >> 1) & 3) * 16);
  return { name: 'tma-64B', rowBytes: 64, alignment: 512, rowShift: 1, rowMask: 3, at: swizzle };
}

export interface SharedPlan {
  /** Rows of Q and K are cut into blocks of this layout's rows. */
  readonly rowLayout: Layout;
  readonly rowBlocks: number;
  readonly valueLayout: Layout;
  readonly valueSwizzle: '128B' | '64B';
  /** Boxes that bring V's tile, their bytes, and with V in FP16 the channels of each. */
  readonly valueBlocks: number;
  readonly valueBlockBytes: number;
  readonly valueBlockChannels: number;
  readonly valueCopyBytes: number;
  readonly valueStageRows: number;
}

/** What lies where in shared memory. */
export function sharedPlanOf({
  pvFormat,
  qkRowBytes,
  paddedValueDim,
  onesColumn,
}: Pick<WgmmaConfig, 'pvFormat' | 'qkRowBytes' | 'paddedValueDim' | 'onesColumn'>): SharedPlan {
  const rowLayout = qkRowBytes <= 64 ? tma64Swizzle() : tma128Swizzle();
  const rowBlocks = Math.ceil(qkRowBytes / rowLayout.rowBytes);
  if (pvFormat === 'e4m3') {
    // Channels are rows of 128 tokens.
    const valueBlockBytes = paddedValueDim * 128;
    return {
      rowLayout,
      rowBlocks,
      valueLayout: tma128Swizzle(),
      valueSwizzle: '128B',
      valueBlocks: 1,
      valueBlockBytes,
      valueBlockChannels: paddedValueDim,
      valueCopyBytes: valueBlockBytes,
      valueStageRows: paddedValueDim + (onesColumn ? 8 : 0),
    };
  }
  const wide = paddedValueDim > 32;
  const valueLayout = wide ? tma128Swizzle() : tma64Swizzle();
  const valueBlockChannels = valueLayout.rowBytes / 2;
  const valueBlocks = Math.ceil(paddedValueDim / valueBlockChannels);
  const valueBlockBytes = 128 * valueLayout.rowBytes;
  return {
    rowLayout,
    rowBlocks,
    valueLayout,
    valueSwizzle: wide ? '128B' : '64B',
    valueBlocks,
    valueBlockBytes,
    valueBlockChannels,
    valueCopyBytes: valueBlocks * valueBlockBytes,
    valueStageRows: valueBlocks * 128,
  };
}
