/** Configurations of the backward kernels on `mma.sync`, and their parameters by name. */
import type { BackwardPrecision } from '../../../../attention/backward.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { TARGET_FEATURES, type Target } from '../../ptx/targets.ts';
import { OPERAND_STRIDES } from '../parts/addresses.ts';
import { nextPowerOfTwo, roundUp } from '../parts/constants.ts';

/** Tokens that a CTA owns: 16 for each of four warps. */
export const OWN_TOKENS = 64;

/** Bytes of the 16-bit operands of gradient products, which are BF16: gradients have no range that FP16 would hold. */
export const OPERAND_BYTES = 2;

/** Tokens whose codes a row of transposed operands holds: those of one product. */
export const CODE_ROW_TOKENS = 32;

/** A gradient that a kernel computes. Of the mask alone: see `mask.ts`. */
export type Gradient = 'query' | 'key' | 'value' | 'mask';

/** How many tokens pass by at a time, and how they are fetched. */
export interface GradientTile {
  readonly streamTokens: 64 | 32;
  readonly stages: 1 | 2;
  readonly minBlocksPerMultiprocessor: number;
}

export interface GradientConfig extends GradientTile {
  readonly target: Target;
  /** `['query']`, `['mask']` or none (`softmax.ts`): a CTA owns a tile of Q and the keys pass by. Else it owns a tile of keys, and the queries of all its heads pass by. */
  readonly gradients: readonly Gradient[];
  /** Of the products over tokens: BF16 (`fp16`), or codes (`codes.ts`). The scores, and dO V^T in BF16, are the same in each. */
  readonly precision: BackwardPrecision;
  /**
   * P of each row of Q is multiplied by its `rowWeight`: 1, or of a row made anew (`softmax.ts`) the reciprocal of its sum. Otherwise D and
   * the copy of dO have that in them: codes with one scale for such rows and others would keep little of either.
   */
  readonly rowWeights: boolean;
  /** D, and Dv. */
  readonly headDim: number;
  readonly valueDim: number;
  /** Bytes of a quantized token of Q or K. */
  readonly codeBytes: number;
  /** D and Dv padded to 16. */
  readonly paddedDim: number;
  readonly paddedValueDim: number;
  /** Scales of 64 keys: 1, or 4 by (key % 8) / 2. */
  readonly keyScales: 1 | 4;
  readonly banded: boolean;
  readonly mask: 'none' | 'boolean' | DType;
  readonly softcap: boolean;
  readonly gradientType: DType;
}

/**
 * Whether the shift of a row is added behind everything else: a softcap, and what a mask adds, want the scores that the forward pass had.
 * Else it is the summand of the product that scales them, and has what smoothing K took from the row in it.
 */
export const needsTrueScores = ({ softcap, mask }: Pick<GradientConfig, 'softcap' | 'mask'>): boolean =>
  softcap || (mask !== 'none' && mask !== 'boolean');

/** Of the kernel that makes the softmax of some rows anew (`softmax.ts`). */
export const SOFTMAX_AGAIN_TILE: GradientTile = { streamTokens: 64, stages: 1, minBlocksPerMultiprocessor: 1 };

/** Of the kernel that computes the gradient of the mask: `own` rows and as many keys as pass by are a tile of it. */
export const MASK_GRADIENT_TILE: GradientTile = { streamTokens: 32, stages: 1, minBlocksPerMultiprocessor: 2 };

/**
 * Its parameters after those of every gradient kernel: how many sequences and tiles there are, and the sizes of the gradient, 1 where the
 * mask broadcasts.
 */
export const MASK_GRADIENT_INTEGERS = [
  'sequenceCount',
  'rowTiles',
  'keyTiles',
  'maskBatches',
  'maskHeads',
  'maskRows',
  'maskKeys',
] as const;

/** Parameters in order. Pointers that a configuration does not use may be null. */
export const GRADIENT_POINTERS = [
  'sequences',
  'query',
  'rowScale',
  'rowShift',
  'rowDelta',
  'rowBias',
  'rowWeight',
  'key',
  'keyScale',
  'keyExponents',
  'queryOperand',
  'keyOperand',
  'valueOperand',
  'outputGradient',
  'queryTransposed',
  'queryTransposedScale',
  'keyTransposed',
  'keyTransposedScale',
  'outputGradientTransposed',
  'outputGradientTransposedScale',
  'mask',
  'queryGradient',
  'keyGradient',
  'valueGradient',
] as const;
export const GRADIENT_INTEGERS = ['queryHeads', 'headsPerKeyHead', 'tiles', 'paddedQueries', 'paddedKeys'] as const;
/** In bytes. dV's strides are for a tensor like dK's with Dv channels. */
export const GRADIENT_STRIDES = ['maskBatch', 'maskHead', 'maskQuery', 'maskKey', ...OPERAND_STRIDES] as const;

/** Rows of a tile in shared memory as the swizzle can permute them. */
export const sharedRowBytes = (bytes: number) => (bytes >= 128 ? roundUp(bytes, 128) : nextPowerOfTwo(bytes));

type Sizes = Pick<
  GradientConfig,
  'gradients' | 'precision' | 'rowWeights' | 'codeBytes' | 'paddedDim' | 'paddedValueDim'
>;

/** What of tokens that pass by is in shared memory besides the codes of the scores. */
export function streamOperands({ gradients, precision }: Pick<GradientConfig, 'gradients' | 'precision'>) {
  const scoreGradients = gradients.some((gradient) => gradient !== 'value');
  const inCodes = precision !== 'fp16';
  return {
    /** dP is computed: for dQ, dK and a mask's gradient. */
    scoreGradients,
    /** V or dO in BF16: for dP, and for dV where that has no codes. */
    values: scoreGradients || !inCodes,
    /** dO in codes, for dV. */
    valueCodes: inCodes && gradients.includes('value'),
    /** K or Q, in BF16 or codes. */
    channels: gradients.includes('query') || gradients.includes('key'),
    inCodes,
  };
}

/** Shared bytes of one token that passes by. */
function streamTokenBytes(sizes: Sizes): number {
  const { codeBytes, paddedDim, paddedValueDim } = sizes;
  const { values, valueCodes, channels, inCodes } = streamOperands(sizes);
  return (
    sharedRowBytes(codeBytes) +
    (values ? sharedRowBytes(paddedValueDim * OPERAND_BYTES) : 0) +
    (valueCodes ? paddedValueDim : 0) +
    (channels ? (inCodes ? paddedDim : sharedRowBytes(paddedDim * OPERAND_BYTES)) : 0)
  );
}

/** Numbers of each row of Q that passes by. */
export const rowNumberCount = ({ rowWeights }: Pick<GradientConfig, 'rowWeights'>): number => (rowWeights ? 5 : 4);

/** Shared bytes of a configuration, less what alignment adds. */
export function gradientSharedBytes(sizes: Sizes, { streamTokens, stages }: GradientTile): number {
  const { codeBytes, paddedValueDim } = sizes;
  const ownValues = streamOperands(sizes).scoreGradients ? sharedRowBytes(paddedValueDim * OPERAND_BYTES) : 0;
  // Scale, shift, D, bias and weight of each row.
  return (
    OWN_TOKENS * (sharedRowBytes(codeBytes) + ownValues) +
    stages * streamTokens * (streamTokenBytes(sizes) + 4 * rowNumberCount(sizes))
  );
}

const TILES: readonly GradientTile[] = [
  { streamTokens: 64, stages: 2, minBlocksPerMultiprocessor: 2 },
  { streamTokens: 64, stages: 1, minBlocksPerMultiprocessor: 2 },
  { streamTokens: 32, stages: 2, minBlocksPerMultiprocessor: 2 },
  { streamTokens: 64, stages: 2, minBlocksPerMultiprocessor: 1 },
  { streamTokens: 64, stages: 1, minBlocksPerMultiprocessor: 1 },
  { streamTokens: 32, stages: 1, minBlocksPerMultiprocessor: 1 },
];

/** The first tile that fits the target's shared memory as often as it says. */
export function chooseGradientTile(target: Target, sizes: Sizes & Pick<GradientConfig, 'softcap'>): GradientTile {
  const { sharedBytesPerBlock, sharedBytesPerMultiprocessor } = TARGET_FEATURES[target];
  for (const tile of TILES) {
    // A softcap keeps one more value of each score.
    if (sizes.softcap && tile.streamTokens === 64) continue;
    const bytes = gradientSharedBytes(sizes, tile) + 1024;
    const resident = tile.minBlocksPerMultiprocessor * (bytes + 1024) <= sharedBytesPerMultiprocessor;
    if (bytes <= sharedBytesPerBlock && resident) return tile;
  }
  throw new RangeError(`no tile for gradients of D ${sizes.paddedDim} and Dv ${sizes.paddedValueDim} on ${target}`);
}

/**
 * Which gradients share a kernel. dK and dV of a token need (D + Dv) / 2 registers of a thread: beyond 128 they are computed
 * apart, each with the scores anew.
 */
export function gradientPasses(paddedDim: number, paddedValueDim: number): readonly (readonly Gradient[])[] {
  return paddedDim + paddedValueDim <= 256 ? [['key', 'value'], ['query']] : [['value'], ['key'], ['query']];
}
