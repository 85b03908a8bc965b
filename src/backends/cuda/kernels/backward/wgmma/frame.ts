/** What every role of a CTA knows: parameters, shared memory, barriers. */
import { KernelBuilder } from '../../../ptx/builder.ts';
import { rowMajor, type SharedTile, tma128Swizzle } from '../../../ptx/layouts.ts';
import { fenceMbarrierInit, mbarrierInit } from '../../../ptx/mbarrier.ts';
import type { Parameter, Reg } from '../../../ptx/types.ts';
import { Ring } from '../../parts/ring.ts';
import { loadVisibleRange } from '../../quantize/visible-keys.ts';
import { uniform } from '../../wgmma/instructions.ts';
import { declareParameters, type Owner, type Parameters, type Work, workOf } from '../frame.ts';
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
  /** The part's first tile, and the next one's. */
  readonly firstBlock: Parameter<'u32'>;
  readonly lastBlock: Parameter<'u32'>;
  /** Offsets of the barriers of own tokens: they have landed, and consumers need them no more. */
  readonly ownFull: number;
  readonly ownEmpty: number;
  readonly warpgroup: Reg<'u32'>;
}

/** Parameters of each part, after those of every gradient kernel and before its tensor maps: its tiles in all are `firstBlock` to `lastBlock`. */
export const WGMMA_PART_INTEGERS = ['firstBlock', 'lastBlock', 'tiles'] as const;

/** @param parts of which each CTA does one, or one after the other where CTAs stay; as many consumers in each */
export function makeWgmmaFrames(parts: readonly WgmmaGradientConfig[]): {
  readonly b: KernelBuilder;
  readonly frames: readonly WgmmaFrame[];
} {
  const [first] = parts as readonly [WgmmaGradientConfig];
  if (parts.some(({ consumers, stays }) => consumers !== first.consumers || stays !== first.stays))
    throw new RangeError('as many consumers in each part, and all of them stay or none');
  const b = new KernelBuilder({ name: 'wgmmaGradients', target: 'sm_90a', threads: wgmmaGradientThreads(first) });
  const parameters = declareParameters(b);
  b.section('shared memory');
  const shared = b.sharedAddress();
  return { b, frames: b.alternatives(parts, (config, part) => makeFrame(b, parameters, shared, config, part)) };
}

function makeFrame(
  b: KernelBuilder,
  parameters: Parameters,
  shared: Reg<'shared'>,
  config: WgmmaGradientConfig,
  part: number,
): WgmmaFrame {
  const { stages, streamTokens, gradients } = config;
  const named = <T>(names: readonly string[], make: (name: string) => T) =>
    Object.fromEntries(names.map((name) => [name, make(`${name}${part}`)]));
  const own = named(WGMMA_PART_INTEGERS, (name) => b.parameter(name, 'u32'));
  const {
    firstBlock,
    lastBlock,
    tiles: tileCount,
  } = own as Record<(typeof WGMMA_PART_INTEGERS)[number], Parameter<'u32'>>;
  const maps = named(WGMMA_GRADIENT_MAPS, (name) => b.parameter(`${name}Map`, 'tensorMap'));
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
  const barriers = b.add(shared, barrierTile.base);
  const ring = new Ring(b, { barriers, stages, full: 0, empty: 8 * stages });
  const thread = b.special('%tid.x');
  return {
    ...{ b, config, plan, ownsQueries: gradients.includes('query'), ownTokens },
    ...parameters,
    integer: { ...parameters.integer, tiles: tileCount },
    rank: () => b.sub(b.special('%ctaid.x'), b.loadParameter(firstBlock)),
    stays: config.stays,
    ...{ maps: maps as WgmmaFrame['maps'], tiles, shared, barriers, ring },
    ...{ ownFull: 16 * stages, ownEmpty: 16 * stages + 8 },
    ...{ firstBlock, lastBlock },
    warpgroup: uniform(b, b.shr(thread, 7)),
  };
}

export function initBarriers({ b, config, ring, barriers, ownFull, ownEmpty }: WgmmaFrame): void {
  b.section('barriers');
  b.if(b.setp('eq', b.special('%tid.x'), 0), () => {
    for (let stage = 0; stage < config.stages; stage++) ring.initFull(stage);
    for (let stage = 0; stage < config.stages; stage++) ring.initEmpty(stage, 4 * config.consumers);
    mbarrierInit(b, barriers, 1, ownFull);
    mbarrierInit(b, barriers, 4 * config.consumers, ownEmpty);
    fenceMbarrierInit(b);
  });
  b.barSync();
}

/** Has `compute` done for the CTA's tile; where CTAs stay, for one of each `%nctaid.x` of the part. */
export function eachTile(frame: WgmmaFrame, compute: (tile: WgmmaFrame, work: Work) => void): void {
  const { b, firstBlock, lastBlock } = frame;
  if (!frame.stays) {
    compute(frame, workOf(frame));
    return;
  }
  b.section('first tile of the part');
  const [first, cta, ctas] = [b.loadParameter(firstBlock), b.special('%ctaid.x'), b.special('%nctaid.x')];
  const rounds = b.div(b.sub(b.add(first, b.sub(ctas, 1)), cta), ctas);
  const block = b.mad(rounds, ctas, cta);
  const tile = { ...frame, rank: () => b.sub(block, b.loadParameter(firstBlock)) };
  b.loop(
    () => b.setp('lt', block, b.loadParameter(lastBlock)),
    () => {
      compute(tile, workOf(tile));
      b.add(block, b.special('%nctaid.x'), block);
    },
  );
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
