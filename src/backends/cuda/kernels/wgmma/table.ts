/**
 * Which configuration a problem gets on Hopper, and the variants of it that `bench/cuda/wgmma-variants.ts` times
 * against each other.
 */
import type { WgmmaConfig, WgmmaTile } from './config.ts';
import { CONSUMER_ROWS } from './frame.ts';

/** A tile with what else may be tuned. */
export interface WgmmaTuning extends WgmmaTile {
  /** Q is quantized by the attention kernel itself where its layout allows. */
  readonly fuseQuery: boolean;
  /** True: as many CTAs as fit on the card, each with many items of work. False: one CTA for each item. */
  readonly persistent: boolean;
  /** Megabytes of K and V whose heads are worked on together, longest tiles first; 0: head after head. */
  readonly groupMegabytes: number;
}

/**
 * Two consumers of 240 registers, QK^T ahead of PV. With promotion, row sums are a column of P V and an eighth of the
 * exponentials runs on the FMA units: 4% faster on an H200 than neither.
 */
const TWO_CONSUMERS: WgmmaTuning = {
  consumers: 2,
  stages: 3,
  minBlocks: 1,
  registers: { producer: 24, consumer: 240 },
  schedule: 'ahead',
  pingPong: true,
  promoted: true,
  valueChunk: 256,
  queryScalePerRow: false,
  polynomialShare: 0.125,
  onesColumn: true,
  rescaleThreshold: 0,
  fuseQuery: true,
  persistent: true,
  groupMegabytes: 16,
};

/**
 * Three consumers hide more of each other's softmax than two that run ahead: 2% faster on an H200. For Dv up to 128 in
 * FP8.
 */
const THREE_CONSUMERS: WgmmaTuning = {
  ...TWO_CONSUMERS,
  consumers: 3,
  registers: { producer: 32, consumer: 160 },
  schedule: 'serial',
  pingPong: false,
  valueChunk: 64,
};
/** Rows of padding that tiles of 192 rows may add over tiles of 128: as much as they gain elsewhere. */
const MORE_PADDING = 1.13;

type Key = Pick<WgmmaConfig, 'pvFormat' | 'qkRowBytes' | 'paddedValueDim'> & {
  /** Rows of Q of a sequence over one head of K. */
  readonly rows: number;
  /** FP8 sums move to float32 every tile ('fp32+fp32'), or never ('fp32'). */
  readonly promoted: boolean;
  /** Scores are more than products: a mask is read, or a cap applied. */
  readonly scoresAreFloat: boolean;
  /** A cap is applied: its series takes registers besides. */
  readonly capped: boolean;
  /** Rows of a block of a block mask; undefined without one. */
  readonly blockRows: number | undefined;
};

/**
 * Whether tiles of 192 rows are worth it. Over blocks of 128 rows each would take part in two, and keep what either keeps: with half of
 * random blocks an H200 was 0.9 times as fast as with all.
 */
function prefersThree(rows: number, blockRows: number | undefined): boolean {
  if (blockRows !== undefined && blockRows % 192 !== 0) return false;
  const padded = (tile: number) => Math.ceil(rows / tile) * tile;
  return padded(192) <= MORE_PADDING * padded(128);
}

/** The configuration of a problem. */
export function tuningOf({
  pvFormat,
  qkRowBytes,
  paddedValueDim,
  rows,
  promoted,
  scoresAreFloat,
  capped,
  blockRows,
}: Key): WgmmaTuning {
  const wide = paddedValueDim > 128;
  const fp8 = pvFormat === 'e4m3';
  const plainSums = { onesColumn: false, polynomialShare: 0 as const };
  // Masked kernels have no registers left for these.
  const sums = {
    ...(fp8 && promoted && !scoresAreFloat ? {} : plainSums),
    // Without promotion all columns are summed where they stay.
    ...(fp8 && promoted ? {} : { promoted: false, valueChunk: 256 }),
  };
  // FP16 holds P up to 2^8 as well as up to 1; E4M3, whose maximum is P's already, has no room.
  const two: WgmmaTuning = { ...TWO_CONSUMERS, ...sums, rescaleThreshold: fp8 ? 0 : 8 };
  const narrowChunk = two.promoted ? 128 : 256;
  if (rows <= 64) {
    // One consumer; two CTAs on a multiprocessor where their stages fit.
    const rowBytes = qkRowBytes <= 64 ? 64 : Math.ceil(qkRowBytes / 128) * 128;
    const stageBytes = 128 * (rowBytes + paddedValueDim * (fp8 ? 1 : 2));
    const twice = !wide && stageBytes * 2 + 64 * rowBytes + 1024 <= 115_712;
    return {
      ...two,
      // Memory bounds it: what counts is that two CTAs fit. A third stage took an H200 two of 46 us more over 65,536 keys.
      ...plainSums,
      consumers: 1,
      schedule: 'serial',
      pingPong: false,
      persistent: false,
      ...(twice
        ? { minBlocks: 2, stages: 2, registers: { producer: 24, consumer: 232 } }
        : { stages: stageBytes > 65_536 ? 2 : 3, registers: undefined }),
      ...(wide ? { valueChunk: narrowChunk } : {}),
    };
  }
  if (wide) {
    return {
      ...two,
      ...plainSums,
      schedule: 'serial',
      pingPong: false,
      valueChunk: narrowChunk,
      stages: 2,
    };
  }
  // FP16 is for accuracy, which a scale for each row of Q gives; FP8's own rounding hides it.
  if (!fp8) {
    // Two tiles at once and a cap are 8 bytes more than the registers hold.
    const schedule = capped ? 'serial' : two.schedule;
    return { ...two, queryScalePerRow: true, stages: qkRowBytes > 128 ? 2 : 3, schedule };
  }
  // Serial schedule: the sums of PV reuse the registers of the scores.
  if (scoresAreFloat) return { ...two, schedule: 'serial' };
  if (!prefersThree(rows, blockRows)) return two;
  return { ...THREE_CONSUMERS, ...sums, stages: qkRowBytes > 128 ? 2 : 3 };
}

/**
 * Rows of padding that tiles of 192 rows may add over tiles of 128, at D = 64 on an H200: at 16,384 tokens they take 4.32
 * ms for 4.89; at 512 and 1024, an eighth more rows, 1% more.
 */
const EXACT_MORE_PADDING = 1.125;
/** From here on two stages are 1% (1024 tokens) to 2% (16,384) faster than three at D = 128, and below 2% slower (512). */
const LONG_ROWS = 1024;

/**
 * With a band, at D = 128: from here on a CTA for each item took an H200 0.997 ms for 1.037 (4096 tokens, causal). At 2048 it took between
 * 0.577 and 0.665 where CTAs with many items took 0.616, and at 1024 0.379 for 0.341. Of a single tile of rows two stages took 0.135 for 0.138.
 */
const LONG_BANDED_ROWS = 4096;

/** Shared memory of a multiprocessor's CTA, less what is not stages and Q. */
const STAGE_ROOM = 232_448 - 2048;

/**
 * The configuration of 16-bit operands. Nothing is quantized and nothing promoted; the more stages, the more heads of
 * short sequences are on their way at once.
 */
export function exactTuningOf({
  qkRowBytes,
  paddedValueDim,
  rows,
  scoresAreFloat,
  banded,
}: Pick<Key, 'qkRowBytes' | 'paddedValueDim' | 'rows' | 'scoresAreFloat'> & {
  /** Causal or windowed. */
  readonly banded: boolean;
}): WgmmaTuning {
  const rowBytes = qkRowBytes <= 64 ? 64 : Math.ceil(qkRowBytes / 128) * 128;
  const valueBytes = paddedValueDim <= 32 ? 64 : Math.ceil(paddedValueDim / 64) * 128;
  const stageBytes = 128 * (rowBytes + valueBytes);
  const two: WgmmaTuning = {
    ...TWO_CONSUMERS,
    // The inspector beside the producer takes more than 24.
    registers: { producer: 40, consumer: 232 },
    promoted: false,
    onesColumn: false,
    polynomialShare: 0,
    rescaleThreshold: 8,
    fuseQuery: false,
    // A mask or a cap takes the registers of the scores that would be ahead.
    schedule: scoresAreFloat ? 'serial' : 'ahead',
    stages: Math.min(4, Math.floor((STAGE_ROOM - 128 * rowBytes) / stageBytes)),
  };
  if (rows > CONSUMER_ROWS) {
    // Measured on scores that are products and no more.
    if (scoresAreFloat) return two;
    const wide = qkRowBytes > 128 || paddedValueDim > 64;
    if (banded) {
      if (!wide) return two;
      if (rows >= LONG_BANDED_ROWS) return { ...two, persistent: false };
      return rows <= 2 * CONSUMER_ROWS ? { ...two, stages: 2 } : two;
    }
    if (wide) return rows >= LONG_ROWS ? { ...two, stages: 2 } : two;
    const padded = (tile: number) => Math.ceil(rows / tile) * tile;
    return padded(192) < EXACT_MORE_PADDING * padded(128)
      ? { ...two, consumers: 3, pingPong: false, registers: { producer: 32, consumer: 160 } }
      : { ...two, pingPong: false };
  }
  return { ...two, consumers: 1, pingPong: false, registers: undefined, schedule: 'serial' };
}

/** Head dims up to which the sums of P V and the scores of two consumers fit in registers. */
export const EXACT_HEAD_DIM = 128;

/** Variants to time on a card, by name; each is a change of {@link tuningOf}'s answer for FP8 at D = Dv = 128. */
export const WGMMA_VARIANTS: Readonly<Record<string, Partial<WgmmaTuning>>> = {
  base: {},
  'sums on FMA units': { onesColumn: false, polynomialShare: 0 },
  'exp 25% on FMA': { polynomialShare: 0.25 },
  'one CTA an item': { persistent: false },
  '2 stages': { stages: 2 },
  'no promotion': { promoted: false, onesColumn: false, polynomialShare: 0, valueChunk: 256 },
  '128 x 128': TWO_CONSUMERS,
  '128 x 128, no ping-pong': { ...TWO_CONSUMERS, pingPong: false },
  '128 x 128, exp 25% on FMA': { ...TWO_CONSUMERS, polynomialShare: 0.25 },
  '128 x 128, sums on FMA units': { ...TWO_CONSUMERS, onesColumn: false, polynomialShare: 0 },
  '128 x 128, serial': { ...TWO_CONSUMERS, schedule: 'serial' },
  'Q quantized apart': { fuseQuery: false },
};

/** Likewise of {@link exactTuningOf}'s. */
export const EXACT_VARIANTS: Readonly<Record<string, Partial<WgmmaTuning>>> = {
  serial: { schedule: 'serial' },
  'no ping-pong': { pingPong: false },
  'serial, no ping-pong': { schedule: 'serial', pingPong: false },
  '2 stages': { stages: 2 },
  'one CTA an item': { persistent: false },
  '64 rows': { consumers: 1, pingPong: false, registers: undefined, schedule: 'serial' },
  // For D = 64.
  '192 rows': { consumers: 3, pingPong: false, registers: { producer: 32, consumer: 160 }, schedule: 'serial' },
  '64 rows, two CTAs': {
    ...{ consumers: 1, minBlocks: 2, pingPong: false, registers: { producer: 40, consumer: 216 } },
    ...{ schedule: 'serial', stages: 3 },
  },
  '192 rows, ahead': { consumers: 3, pingPong: false, registers: { producer: 32, consumer: 160 } },
};
