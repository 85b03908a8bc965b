/** Tile sizes and stages of the attention kernel, as a table: the first row that fits a problem is taken. */
import { TARGET_FEATURES, type Target } from '../../ptx/targets.ts';
import type { AttentionConfig } from './config.ts';

export type TileConfig = Pick<AttentionConfig, 'warps' | 'rowsPerWarp' | 'minBlocksPerMultiprocessor' | 'valueStages'>;

interface TileRule {
  /** Largest padded Dv, and largest bytes of a quantized token. */
  readonly valueDim: number;
  readonly qkRowBytes: number;
  /** Targets to which it applies; default all. */
  readonly targets?: readonly Target[];
  /** It applies to at most so many queries; default any number. */
  readonly queryLength?: number;
  /** It applies only where Q is smoothed. */
  readonly smoothQ?: true;
  readonly tile: TileConfig;
}

/**
 * 32 rows a warp halve the shared-memory reads of K and V per row; 16 where the output would not fit in registers (a thread
 * holds rowsPerWarp * Dv / 32 sums). Two CTAs of four warps share a multiprocessor, so that one's products run under the
 * other's softmax. Where V's second stage would cost a resident CTA, or the register that ptxas then spills on sm_80, V is
 * fetched behind its own tile's QK^T.
 */
const TILE_RULES: readonly TileRule[] = [
  // Decoding: few rows, and many small CTAs, whose copies together keep memory busy.
  ...([4, 2, 1] as const).flatMap((minBlocksPerMultiprocessor) =>
    ([2, 1] as const).map((valueStages) => ({
      valueDim: 256,
      qkRowBytes: 256,
      queryLength: 32,
      tile: { warps: 2, rowsPerWarp: 16, minBlocksPerMultiprocessor, valueStages } as const,
    })),
  ),
  {
    // FP8 unpacked in registers and the means of Q besides do not fit with 32 rows.
    valueDim: 128,
    qkRowBytes: 256,
    targets: ['sm_90a'],
    smoothQ: true,
    tile: { warps: 8, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 2 },
  },
  {
    valueDim: 128,
    qkRowBytes: 128,
    targets: ['sm_86', 'sm_89', 'sm_90a', 'sm_120a'],
    tile: { warps: 4, rowsPerWarp: 32, minBlocksPerMultiprocessor: 2, valueStages: 2 },
  },
  {
    valueDim: 128,
    qkRowBytes: 128,
    tile: { warps: 4, rowsPerWarp: 32, minBlocksPerMultiprocessor: 2, valueStages: 1 },
  },
  {
    valueDim: 128,
    qkRowBytes: 256,
    tile: { warps: 4, rowsPerWarp: 32, minBlocksPerMultiprocessor: 2, valueStages: 2 },
  },
  {
    valueDim: 128,
    qkRowBytes: 256,
    tile: { warps: 4, rowsPerWarp: 32, minBlocksPerMultiprocessor: 1, valueStages: 2 },
  },
  {
    valueDim: 256,
    qkRowBytes: 256,
    tile: { warps: 8, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 2 },
  },
  {
    valueDim: 256,
    qkRowBytes: 256,
    tile: { warps: 8, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 1 },
  },
];

/** Shared bytes of a configuration, as `attention` allocates them. */
export function attentionSharedBytes(tile: TileConfig, qkRowBytes: number, valueTileBytes: number): number {
  const row = qkRowBytes > 128 ? 256 : qkRowBytes > 64 ? 128 : qkRowBytes;
  const parked = 256 + tile.warps * 32 * 5;
  return parked + tile.warps * tile.rowsPerWarp * row + 2 * 64 * row + tile.valueStages * valueTileBytes;
}

/** The first tile configuration that fits the target's shared memory as often as it says. */
export function chooseTile(
  target: Target,
  qkRowBytes: number,
  valueDim: number,
  valueTileBytes: number,
  { queryLength, smoothQ }: { readonly queryLength: number; readonly smoothQ: boolean },
): TileConfig {
  const { sharedBytesPerBlock, sharedBytesPerMultiprocessor } = TARGET_FEATURES[target];
  for (const rule of TILE_RULES) {
    if (valueDim > rule.valueDim || qkRowBytes > rule.qkRowBytes) continue;
    if (rule.targets?.includes(target) === false || (rule.smoothQ === true && !smoothQ)) continue;
    if (rule.queryLength !== undefined && queryLength > rule.queryLength) continue;
    const bytes = attentionSharedBytes(rule.tile, qkRowBytes, valueTileBytes);
    const fits = bytes <= sharedBytesPerBlock;
    const resident = rule.tile.minBlocksPerMultiprocessor * (bytes + 1024) <= sharedBytesPerMultiprocessor;
    if (fits && resident) return rule.tile;
  }
  throw new RangeError(`no tile for ${qkRowBytes} bytes of Q and K and Dv ${valueDim} on ${target}`);
}
