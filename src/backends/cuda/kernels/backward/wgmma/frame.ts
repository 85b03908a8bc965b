/** What every role of a CTA knows: parameters, shared memory, barriers. */
import { KernelBuilder } from '../../../ptx/builder.ts';
import { rowMajor, type SharedTile, tma128Swizzle } from '../../../ptx/layouts.ts';
import { fenceMbarrierInit, mbarrierInit } from '../../../ptx/mbarrier.ts';
import type { Parameter, Reg } from '../../../ptx/types.ts';
import { Ring } from '../../parts/ring.ts';
import { loadVisibleRange } from '../../quantize/visible-keys.ts';
import { uniform } from '../../wgmma/instructions.ts';
import { declareParameters, type Owner, type Work } from '../frame.ts';
import {
  GROUP_TOKENS,
  type GradientPlan,
  gradientPlanOf,
  WGMMA_GRADIENT_MAPS,
  type WgmmaGradientConfig,
} from './config.ts';

export const wgmmaGradientThreads = ({ consumers }: Pick<WgmmaGradientConfig, 'consumers'>) => 128 * (1 + consumers);
/** Registers of a thread by number of consumers: the producer's are theirs to take. */
export const REGISTERS = { 2: { producer: 24, consumer: 240 }, 3: { producer: 32, consumer: 160 } } as const;

export interface WgmmaFrame extends Owner {
  readonly config: WgmmaGradientConfig;
  readonly plan: GradientPlan;
  readonly maps: Readonly<Record<(typeof WGMMA_GRADIENT_MAPS)[number], Parameter<'tensorMap'>>>;
  readonly tiles: Readonly<Record<'ownCodes' | 'ownValues' | 'codes' | 'values' | 'channels' | 'rows', SharedTile>>;
  readonly shared: Reg<'shared'>;
  readonly barriers: Reg<'shared'>;
  readonly ring: Ring;
  /** Offset of the barrier of own tokens. */
  readonly ownFull: number;
  readonly warpgroup: Reg<'u32'>;
}

export function makeWgmmaFrame(config: WgmmaGradientConfig): WgmmaFrame {
  const { stages, streamTokens, gradients } = config;
  const b = new KernelBuilder({ name: 'wgmmaGradients', target: 'sm_90a', threads: wgmmaGradientThreads(config) });
  const parameters = declareParameters(b);
  const maps = Object.fromEntries(WGMMA_GRADIENT_MAPS.map((name) => [name, b.parameter(`${name}Map`, 'tensorMap')]));

  b.section('shared memory');
  const plan = gradientPlanOf(config);
  const { codesLayout, valueBlocks, channelBlocks } = plan;
  const ownTokens = config.consumers * GROUP_TOKENS;
  const blocks = tma128Swizzle();
  const tiles = {
    ownCodes: b.shared('own codes', ownTokens, codesLayout),
    ownValues: b.shared('own V or dO', ownTokens * valueBlocks, blocks),
    codes: b.shared('codes', stages * streamTokens, codesLayout),
    values: b.shared('V or dO', stages * streamTokens * valueBlocks, blocks),
    channels: b.shared('K or Q', stages * streamTokens * channelBlocks, blocks),
    rows: b.shared('rows', stages * 3, { ...rowMajor(streamTokens * 4), alignment: 128 }),
  };
  const barrierTile = b.shared('barriers', 1, rowMajor(8 * (2 * stages + 1) + 8));
  const shared = b.sharedAddress();
  const barriers = b.add(shared, barrierTile.base);
  const ring = new Ring(b, { barriers, stages, full: 0, empty: 8 * stages });
  const ownFull = 16 * stages;
  const thread = b.special('%tid.x');
  const warpgroup = uniform(b, b.shr(thread, 7));
  return {
    ...{ b, config, plan, ownsQueries: gradients.includes('query'), ownTokens, ...parameters },
    ...{ maps: maps as WgmmaFrame['maps'], tiles, shared, barriers, ring, ownFull, warpgroup },
  };
}

export function initBarriers({ b, config, ring, barriers, ownFull }: WgmmaFrame): void {
  b.section('barriers');
  b.if(b.setp('eq', b.special('%tid.x'), 0), () => {
    for (let stage = 0; stage < config.stages; stage++) ring.initFull(stage);
    for (let stage = 0; stage < config.stages; stage++) ring.initEmpty(stage, 4 * config.consumers);
    mbarrierInit(b, barriers, 1, ownFull);
    fenceMbarrierInit(b);
  });
  b.barSync();
}

/**
 * First token of a consumer's own ones: the nearest 64 that there are and, of keys, that any row sees (others are not quantized). Results
 * for the tokens that it replaces are not stored, or are excluded from every row.
 */
export function ownToken(
  frame: WgmmaFrame,
  { sequence, firstOwn, queryLength }: Work,
  group: Reg<'u32'> | number,
): Reg<'u32'> {
  const { b, pointer, ownsQueries } = frame;
  const token =
    typeof group === 'number' ? b.add(firstOwn, group * GROUP_TOKENS) : b.mad(group, GROUP_TOKENS, firstOwn);
  // Rows are padded to 128, which three times 64 may exceed.
  const tileOf = (token: Reg<'u32'>) => b.and(token, 0x100000000 - GROUP_TOKENS);
  if (ownsQueries) return b.min(token, tileOf(b.sub(queryLength, 1)));
  const [from, until] = loadVisibleRange(b, b.loadPointer(pointer.sequences), sequence);
  return b.max(b.min(token, tileOf(b.sub(until, 1))), tileOf(from));
}
