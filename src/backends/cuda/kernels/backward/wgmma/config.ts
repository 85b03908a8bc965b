/** Configurations of the backward kernels on `wgmma`, and what lies where in shared memory. */
import { type Layout, tma128Swizzle } from '../../../ptx/layouts.ts';
import { tma64Swizzle } from '../../wgmma/config.ts';
import type { GradientConfig } from '../config.ts';

/** Tokens that a consumer warpgroup owns. */
export const GROUP_TOKENS = 64;
/** Channels of a box of BF16: what 128 bytes hold. */
export const BLOCK_CHANNELS = 64;

export interface WgmmaGradientConfig
  extends Pick<GradientConfig, 'gradients' | 'headDim' | 'valueDim' | 'keyScales' | 'banded' | 'gradientType'> {
  /** D: 64 or 128. */
  readonly codeBytes: number;
  readonly streamTokens: 64;
  readonly stages: number;
  /** Warpgroups that own tokens: two of 240 registers a thread, or three of 160. */
  readonly consumers: 2 | 3;
  /** See `gradients.ts`. */
  readonly schedule: 'ahead' | 'scores-ahead';
  /** Own operands that consumers hold in registers: of S, or of S and dP. Others are read from shared memory with each tile. */
  readonly held: 'none' | 'codes' | 'both';
  /**
   * Consumers issue the gradients' products in turns: the next one's turn is when a consumer has issued its own, or when all of them but the
   * last have ended.
   */
  readonly turns: 'none' | 'issued' | 'ended';
  /** A CTA for each multiprocessor, which has one tile after the other: the next one's tokens land while gradients are stored. */
  readonly stays: boolean;
}

/** In the order of the kernel's parameters. The last brings the numbers of rows of Q that pass by. */
export const WGMMA_GRADIENT_MAPS = ['ownCodes', 'ownValues', 'codes', 'values', 'channels', 'rows'] as const;

export interface GradientPlan {
  readonly codesLayout: Layout;
  readonly codesSwizzle: '128B' | '64B';
  /** Boxes of V or dO, and of K or Q. */
  readonly valueBlocks: number;
  readonly channelBlocks: number;
  /** Bytes of a stage's codes. */
  readonly codesBytes: number;
  readonly valuesBytes: number;
  readonly channelsBytes: number;
  readonly rowsBytes: number;
}

export function gradientPlanOf({
  codeBytes,
  headDim,
  valueDim,
  streamTokens,
  gradients,
}: WgmmaGradientConfig): GradientPlan {
  const [valueBlocks, channelBlocks] = [valueDim / BLOCK_CHANNELS, headDim / BLOCK_CHANNELS];
  return {
    codesLayout: codeBytes === 64 ? tma64Swizzle() : tma128Swizzle(),
    codesSwizzle: codeBytes === 64 ? '64B' : '128B',
    valueBlocks,
    channelBlocks,
    codesBytes: streamTokens * codeBytes,
    valuesBytes: streamTokens * valueBlocks * 128,
    channelsBytes: streamTokens * channelBlocks * 128,
    rowsBytes: gradients.includes('query') ? 0 : 3 * streamTokens * 4,
  };
}

/** Whether the kernels on `wgmma` compute these gradients: others run on `mma.sync`. */
export function isWgmmaGradient({
  headDim,
  valueDim,
  mask,
  softcap,
}: Pick<GradientConfig, 'headDim' | 'valueDim' | 'mask' | 'softcap'>): boolean {
  return (headDim === 64 || headDim === 128) && headDim === valueDim && mask === 'none' && !softcap;
}

/** Rows of padding that tiles of 192 queries may add over tiles of 128, at D = 64: they take five sixths of the time. */
const MORE_PADDING = 9 / 8;

/**
 * Tokens up to which CTAs stay at D = 128: they save 1.7% at 4096 and cost 1% at 16,384. Tiles are dealt out beforehand, so that bands and sequences
 * of different lengths would leave some CTAs with more work.
 */
const MOST_STAYING_TOKENS = 4096;

export const wgmmaGradientStays = (work: {
  readonly headDim: number;
  readonly banded: boolean;
  readonly packed: boolean;
  /** Tokens of a sequence, the more of queries and keys. */
  readonly tokens: number;
}): boolean => work.headDim === 128 && !work.banded && !work.packed && work.tokens <= MOST_STAYING_TOKENS;

/** How the work is divided, by head dim and whether queries are owned, of which there are `queries`; the reasons are in docs/hopper-log.md. */
export function wgmmaGradientTile(
  headDim: number,
  ownsQueries: boolean,
  queries: number,
): Pick<WgmmaGradientConfig, 'streamTokens' | 'stages' | 'consumers' | 'schedule' | 'held' | 'turns'> {
  const common = { streamTokens: 64, consumers: 2, turns: 'none' } as const;
  if (headDim === 64) {
    const padded = (rows: number) => Math.ceil(queries / rows) * rows;
    const isWide = ownsQueries && padded(192) <= MORE_PADDING * padded(128);
    if (isWide) return { ...common, consumers: 3, stages: 4, schedule: 'ahead', held: 'codes' };
    return { ...common, stages: 4, schedule: 'ahead', held: 'both' };
  }
  if (ownsQueries) return { ...common, stages: 3, schedule: 'ahead', held: 'both' };
  return { ...common, stages: 3, schedule: 'scores-ahead', held: 'none', turns: 'issued' };
}
