/** Which configuration a problem gets on Hopper, and the variants of it that `bench/cuda/hopper.ts` times against each other. */
import type { HopperConfig, HopperTile } from './config.ts';

/** A tile with what else may be tuned. */
export interface HopperTuning extends HopperTile {
  /** Q is quantized by the attention kernel itself where its layout allows. */
  readonly fuseQuery: boolean;
  /** As many CTAs as fit, each with many items of work; else one CTA an item. */
  readonly persistent: boolean;
  /** Megabytes of K and V whose heads are worked on together, longest tiles first; 0: head after head. */
  readonly groupMegabytes: number;
}

/** Two consumers of 240 registers, QK^T ahead of PV, promotion with every tile. */
const BASE: HopperTuning = {
  consumers: 2,
  stages: 3,
  minBlocks: 1,
  registers: { producer: 24, consumer: 240 },
  schedule: 'ahead',
  pingPong: 'values',
  promotionInterval: 1,
  valueChunk: 256,
  queryScalePerRow: false,
  polynomialShare: 0,
  onesColumn: false,
  rescaleThreshold: 0,
  fuseQuery: true,
  persistent: true,
  groupMegabytes: 16,
};

type Key = Pick<HopperConfig, 'pvFormat' | 'qkRowBytes' | 'paddedValueDim'> & {
  /** Rows of Q of a sequence over one head of K, when they all fit in one consumer. */
  readonly fewRows: boolean;
  /** FP8 sums move to float32 every tile ('fp32+fp32'), or never ('fp32'). */
  readonly promoted: boolean;
};

/** The configuration of a problem. */
export function tuningOf({ pvFormat, qkRowBytes, paddedValueDim, fewRows, promoted }: Key): HopperTuning {
  const promotionInterval = pvFormat === 'e4m3' && promoted ? 1 : 0;
  const wide = paddedValueDim > 128;
  // FP16 holds P up to 2^8 as well as up to 1; E4M3, whose maximum is P's already, has no room.
  const rescaleThreshold = pvFormat === 'f16' ? 8 : 0;
  const base = { ...BASE, promotionInterval, rescaleThreshold };
  if (fewRows) {
    // One consumer; two CTAs on a multiprocessor where their stages fit.
    const rowBytes = qkRowBytes <= 64 ? 64 : Math.ceil(qkRowBytes / 128) * 128;
    const stageBytes = 128 * (rowBytes + paddedValueDim * (pvFormat === 'f16' ? 2 : 1));
    const twice = !wide && stageBytes * 3 + 64 * rowBytes + 1024 <= 115_712;
    return {
      ...base,
      consumers: 1,
      pingPong: 'none',
      persistent: false,
      ...(twice
        ? // 232 registers have no room for a scale of each row.
          { minBlocks: 2, stages: 3, registers: { producer: 24, consumer: 232 } }
        : { stages: stageBytes > 65_536 ? 2 : 3, registers: undefined }),
      ...(wide ? { schedule: 'serial', valueChunk: promotionInterval === 1 ? 128 : 256 } : {}),
    };
  }
  if (wide) {
    return {
      ...base,
      schedule: 'serial',
      pingPong: 'none',
      valueChunk: promotionInterval === 1 ? 128 : 256,
      stages: 2,
    };
  }
  if (pvFormat === 'f16') return { ...base, stages: qkRowBytes > 128 ? 2 : 3 };
  return base;
}

/** What to time on a card, by name; each says what it changes of {@link tuningOf}'s answer for FP8 at D = Dv = 128. */
export const HOPPER_VARIANTS: Readonly<Record<string, Partial<HopperTuning>>> = {
  base: {},
  'no ping-pong': { pingPong: 'none' },
  'turn ends behind scores': { pingPong: 'scores' },
  serial: { schedule: 'serial' },
  'serial, no ping-pong': { schedule: 'serial', pingPong: 'none' },
  'one CTA an item': { persistent: false },
  '2 stages': { stages: 2 },
  '4 stages': { stages: 4 },
  'no promotion': { promotionInterval: 0 },
  'promotion every 2': { promotionInterval: 2 },
  'promotion every 4': { promotionInterval: 4 },
  'ones column': { onesColumn: true },
  'ones, no ping-pong': { onesColumn: true, pingPong: 'none' },
  'ones, exp 12.5% on FMA, no ping-pong': { onesColumn: true, polynomialShare: 0.125, pingPong: 'none' },
  'ones, exp 25% on FMA, no ping-pong': { onesColumn: true, polynomialShare: 0.25, pingPong: 'none' },
  'ones, exp 12.5% on FMA': { onesColumn: true, polynomialShare: 0.125 },
  'ones, exp 25% on FMA': { onesColumn: true, polynomialShare: 0.25 },
  'ones, exp 50% on FMA': { onesColumn: true, polynomialShare: 0.5 },
  '192 x 128, serial, no promotion': {
    consumers: 3,
    registers: { producer: 32, consumer: 160 },
    schedule: 'serial',
    pingPong: 'none',
    promotionInterval: 0,
    stages: 3,
  },
  '192 x 128, serial': {
    consumers: 3,
    registers: { producer: 32, consumer: 160 },
    schedule: 'serial',
    pingPong: 'none',
    stages: 3,
  },
  '192 x 128, serial, chunks of 64': {
    consumers: 3,
    registers: { producer: 32, consumer: 160 },
    schedule: 'serial',
    pingPong: 'none',
    valueChunk: 64,
    stages: 3,
  },
  '192 x 128, serial, chunks of 64, ones, exp 12.5%': {
    consumers: 3,
    registers: { producer: 32, consumer: 160 },
    schedule: 'serial',
    pingPong: 'none',
    valueChunk: 64,
    onesColumn: true,
    polynomialShare: 0.125,
    stages: 3,
  },
  '64 x 128, two CTAs': {
    consumers: 1,
    minBlocks: 2,
    stages: 2,
    registers: { producer: 24, consumer: 232 },
    pingPong: 'none',
  },
  'Q quantized apart': { fuseQuery: false },
  'a scale for each row of Q': { queryScalePerRow: true },
};
