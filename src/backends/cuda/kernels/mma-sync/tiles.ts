/** Tile sizes and stages of the attention kernel, as a table: the first row that fits a problem is taken. */
import { TARGET_FEATURES, type Target } from '../../ptx/targets.ts';
import { roundUp } from '../parts/constants.ts';
import type { AttentionConfig } from './config.ts';

export type TileConfig = Pick<
  AttentionConfig,
  'warps' | 'rowsPerWarp' | 'minBlocksPerMultiprocessor' | 'valueStages'
> & {
  /** Default 2. */
  readonly keyStages?: AttentionConfig['keyStages'];
  /** Default 1. */
  readonly keyWarps?: number;
};

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
  /** It applies only where FP4 is unpacked to FP16. */
  readonly unpacksFp4?: true;
  /** It applies only where V is FP4 too. */
  readonly fp4Values?: true;
  /** It applies to 16-bit operands, and others do not. */
  readonly exact?: true;
  readonly tile: TileConfig;
}

/**
 * 32 rows a warp halve the shared-memory reads of K and V per row; 16 where the output would not fit in registers (a
 * thread holds rowsPerWarp * Dv / 32 sums). Two CTAs of four warps share a multiprocessor, so that one's products run
 * under the other's softmax. Where V's second stage would cost a resident CTA, or the register that ptxas then spills
 * on sm_80, V is fetched behind its own tile's QK^T.
 */
const TILE_RULES: readonly TileRule[] = [
  // 16-bit operands: K and V take twice the shared memory. With 32 rows a warp's sums and scores fit up to Dv = 64.
  {
    valueDim: 64,
    qkRowBytes: 128,
    exact: true,
    tile: { warps: 4, rowsPerWarp: 32, minBlocksPerMultiprocessor: 2, valueStages: 2 },
  },
  ...([2, 1] as const).map((minBlocksPerMultiprocessor) => ({
    valueDim: 128,
    qkRowBytes: 256,
    exact: true as const,
    tile: { warps: 4, rowsPerWarp: 16, minBlocksPerMultiprocessor, valueStages: 2 } as const,
  })),
  ...(
    [
      { valueStages: 2, keyStages: 2 },
      { valueStages: 1, keyStages: 2 },
      { valueStages: 1, keyStages: 1 },
    ] as const
  ).map((stages) => ({
    valueDim: 256,
    qkRowBytes: 512,
    exact: true as const,
    tile: { warps: 4, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, ...stages } as const,
  })),
  // Decoding: the rows fit into one warp, so that warps take different keys, each with stages of its own. One CTA on a
  // multiprocessor: half as many parts to join as of two, which took an H200 three of 45 us more over 65,536 keys.
  {
    // FP4, which is bound by unpacking: 31.9 us with one stage of each, 33.3 with two.
    valueDim: 128,
    qkRowBytes: 128,
    queryLength: 16,
    fp4Values: true,
    tile: { warps: 1, keyWarps: 12, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, keyStages: 1, valueStages: 1 },
  },
  // Two warps for each scheduler before two stages for each warp: INT8 and FP8 44.7 us for 46.5, and 9.1 for 9.9 over 8192 keys; INT8
  // and FP16 as before, and 31.4 for 32.4 over 32,768. Twelve warps of one stage were slower than eight.
  ...(
    [
      [12, 2, 2],
      [8, 2, 2],
      [8, 2, 1],
      [8, 1, 1],
      [6, 2, 2],
      [4, 2, 2],
      [3, 2, 2],
      [2, 2, 2],
    ] as const
  ).map(([keyWarps, keyStages, valueStages]) => ({
    valueDim: 128,
    qkRowBytes: 128,
    queryLength: 16,
    tile: { warps: 1, keyWarps, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, keyStages, valueStages } as const,
  })),
  // A few more rows, or wider ones: many small CTAs, whose copies together keep memory busy.
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
    // Nor does FP4.
    valueDim: 128,
    qkRowBytes: 256,
    unpacksFp4: true,
    tile: { warps: 8, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 2 },
  },
  {
    valueDim: 128,
    qkRowBytes: 128,
    targets: ['sm_86', 'sm_89', 'sm_90a', 'sm_120a', 'sm_120f'],
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
  // Head dims to 512, whose values are taken 256 channels at a time.
  ...([2, 1] as const).map((keyStages) => ({
    valueDim: 256,
    qkRowBytes: 512,
    tile: { warps: 4, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 1, keyStages } as const,
  })),
  {
    // FP4 at D = Dv = 256, where a block has 99 KiB.
    valueDim: 256,
    qkRowBytes: 256,
    tile: { warps: 4, rowsPerWarp: 16, minBlocksPerMultiprocessor: 1, valueStages: 1 },
  },
];

/** Bytes of what a CTA holds: rows of Q and K and the scales of each, a tile of V with its scales. */
export interface TileBytes {
  readonly queryRow: number;
  readonly keyRow: number;
  readonly queryScales: number;
  readonly keyScales: number;
  readonly valueTile: number;
  /** A row of a warp's results, which lie in the place of K and V while warps with keys of their own join theirs. */
  readonly resultRow: number;
}

/** A row of so many bytes as the swizzle wants it. */
export const paddedRow = (bytes: number) => (bytes > 128 ? roundUp(bytes, 128) : bytes > 64 ? 128 : bytes);

/** Shared bytes of a configuration, as `attention` allocates them. */
export function attentionSharedBytes(tile: TileConfig, bytes: TileBytes): number {
  const { keyWarps = 1 } = tile;
  const rows = tile.warps * tile.rowsPerWarp;
  const parked = (keyWarps === 1 ? 256 : 96) + tile.warps * 32 * 5;
  // Who quantizes Q has a scale and a bias for each row.
  const query = rows * (paddedRow(bytes.queryRow) + bytes.queryScales + (keyWarps === 1 ? 0 : 8));
  // The scales of K always have two stages.
  const keys = 64 * ((tile.keyStages ?? 2) * paddedRow(bytes.keyRow) + 2 * bytes.keyScales);
  const results = keyWarps === 1 ? 0 : roundUp(rows * bytes.resultRow, 16);
  const own = parked + Math.max(keys + tile.valueStages * bytes.valueTile, results);
  return query + (keyWarps === 1 ? own : keyWarps * roundUp(own, 128));
}

interface TileConditions {
  readonly queryLength: number;
  readonly smoothQ: boolean;
  readonly unpacksFp4?: boolean;
  readonly fp4Values?: boolean;
  readonly exact?: boolean;
}

/** The first tile configuration that fits the target's shared memory as often as it says. */
export function chooseTile(
  target: Target,
  bytes: TileBytes,
  valueDim: number,
  { queryLength, smoothQ, unpacksFp4 = false, fp4Values = false, exact = false }: TileConditions,
): TileConfig {
  const { sharedBytesPerBlock, sharedBytesPerMultiprocessor } = TARGET_FEATURES[target];
  for (const rule of TILE_RULES) {
    if (valueDim > rule.valueDim || bytes.keyRow > rule.qkRowBytes) continue;
    if (rule.targets?.includes(target) === false || (rule.smoothQ === true && !smoothQ)) continue;
    if ((rule.unpacksFp4 === true && !unpacksFp4) || (rule.exact ?? false) !== exact) continue;
    if (rule.fp4Values === true && !fp4Values) continue;
    if (rule.queryLength !== undefined && queryLength > rule.queryLength) continue;
    // Scales of Q lie with a warp's own tiles of keys.
    if ((rule.tile.keyWarps ?? 1) > 1 && bytes.queryScales > 0) continue;
    const shared = attentionSharedBytes(rule.tile, bytes);
    const fits = shared <= sharedBytesPerBlock;
    const resident = rule.tile.minBlocksPerMultiprocessor * (shared + 1024) <= sharedBytesPerMultiprocessor;
    if (fits && resident) return rule.tile;
  }
  throw new RangeError(`no tile for ${bytes.keyRow} bytes of Q and K and Dv ${valueDim} on ${target}`);
}
