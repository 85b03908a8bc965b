/**
 * The share of the scores that `smoothQ` takes away: `smScale * log2(e) * mean(Q block) . (K - mean K)` for each block of Q and
 * each key, `[head, block, key]` float32, in full precision from the caller's K. One CTA takes 64 keys of one query head and
 * all blocks of Q.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence, type SequenceRegisters } from '../parts/sequences.ts';
import { type HiddenKeys, isVisible, visibleBitsAt } from './visible-keys.ts';

export interface MeanScoresConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly headDim: number;
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
  readonly keyMean: boolean;
  /** Keys that a mask hides from every row get the shares of a key of zeros. */
  readonly hiddenKeys: HiddenKeys;
}

export const MEAN_SCORES_POINTERS = [
  'sequences',
  'input',
  'keyMean',
  'queryMean',
  'meanScores',
  'visibleKeys',
] as const;
export const MEAN_SCORES_INTEGERS = [
  'queryHeads',
  'headsPerKeyHead',
  'keyTiles',
  'paddedQueries',
  'meanScoreKeys',
  'paddedKeys',
] as const;
export const MEAN_SCORES_THREADS = 256;
const KEYS = 64;
/** Blocks of Q that a thread works on at once, and the CTA. */
const BLOCKS_EACH = 4;
const BLOCKS_AT_ONCE = BLOCKS_EACH * (MEAN_SCORES_THREADS / KEYS);

/** What the CTA works on. */
interface Frame {
  readonly b: KernelBuilder;
  readonly config: MeanScoresConfig;
  readonly pointer: Record<(typeof MEAN_SCORES_POINTERS)[number], Parameter<'u64'>>;
  readonly integer: Record<(typeof MEAN_SCORES_INTEGERS)[number], Parameter<'u32'>>;
  readonly stride: Record<'batchStride' | 'headStride' | 'tokenStride', Parameter<'u64'>>;
  readonly scoreScale: Parameter<'f32'>;
  readonly shared: Reg<'shared'>;
  readonly keys: SharedTile;
  readonly means: SharedTile;
  readonly thread: Reg<'u32'>;
  readonly queryHeads: Reg<'u32'>;
  readonly headsPerKeyHead: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly table: SequenceRegisters;
  readonly firstKey: Reg<'u32'>;
}

const threadsPerRow = (paddedDim: number) => nextPowerOfTwo(paddedDim / 8);
/** Bytes of a key in shared memory: four floats more than a row keep neighbouring keys off each other's banks. */
const rowBytesOf = (paddedDim: number) => threadsPerRow(paddedDim) * 32 + 16;

export function meanScores(config: MeanScoresConfig): Kernel {
  const frame = makeFrame(config);
  loadKeys(frame);
  multiply(frame);
  return frame.b.build();
}

function makeFrame(config: MeanScoresConfig): Frame {
  const { target, paddedDim } = config;
  const b = new KernelBuilder({ name: 'meanScores', target, threads: MEAN_SCORES_THREADS });
  const pointer = pointers(b, MEAN_SCORES_POINTERS);
  const integer = integers(b, MEAN_SCORES_INTEGERS);
  const stride = pointers(b, ['batchStride', 'headStride', 'tokenStride']);
  const scoreScale = b.parameter('scoreScale', 'f32');
  const keys = b.shared('keys', KEYS, rowMajor(rowBytesOf(paddedDim)));
  const means = b.shared('means', BLOCKS_AT_ONCE, rowMajor(paddedDim * 4));
  const shared = b.sharedAddress();

  b.section('which keys');
  const thread = b.special('%tid.x');
  const queryHeads = b.loadParameter(integer.queryHeads);
  const [tile, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.keyTiles));
  const [head, sequence] = divide(b, headAndSequence, queryHeads);
  const headsPerKeyHead = b.loadParameter(integer.headsPerKeyHead);
  const keyHead = b.div(head, headsPerKeyHead);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const firstKey = b.mul(tile, KEYS);
  b.when(b.setp('ge', firstKey, table.keyLength), () => b.exit());
  b.when(b.setp('eq', table.queryLength, 0), () => b.exit());
  const parameters = { pointer, integer, stride, scoreScale };
  const place = { queryHeads, headsPerKeyHead, head, keyHead, sequence, table, firstKey };
  return { b, config, ...parameters, shared, keys, means, thread, ...place };
}

/** K less its mean into shared memory. */
function loadKeys(frame: Frame): void {
  const { b, config, pointer, stride, shared, keys, thread, table, firstKey } = frame;
  const { dtype, headDim, paddedDim, loadWidth } = config;
  const perRow = threadsPerRow(paddedDim);
  const rowBytes = rowBytesOf(paddedDim);
  b.section('K - mean(K) into shared memory');
  const row = b.shr(thread, Math.log2(perRow));
  const rowsAtOnce = MEAN_SCORES_THREADS / perRow;
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  const keysLeft = b.sub(table.keyLength, firstKey);
  const tokenStride = b.loadParameter(stride.tokenStride);
  let source = offset64(b, b.loadPointer(pointer.input), frame.sequence, b.loadParameter(stride.batchStride));
  source = offset64(b, source, frame.keyHead, b.loadParameter(stride.headStride));
  source = offset64(b, source, b.add(b.add(table.keyStart, firstKey), row), tokenStride);
  source = offset(b, source, channel, BYTES[dtype]);
  const mean = meanOfKeys(frame, channel);
  const destination = b.add(b.add(shared, keys.base), b.as(b.mad(row, rowBytes, b.shl(channel, 2)), 'shared'));
  const bits = config.hiddenKeys === 'none' ? undefined : visibleBits(frame, config.hiddenKeys);
  const step = b.as(b.mul(tokenStride, rowsAtOnce), 'global');
  for (let first = 0; first < KEYS; first += rowsAtOnce) {
    const inBlock = b.setp('lt', b.add(row, first), KEYS);
    const inside = b.setp('lt', b.add(row, first), keysLeft);
    if (bits !== undefined) {
      const word = b.selp(bits[1], bits[0], b.setp('ge', b.add(row, first), 32));
      b.andPred(inside, isVisible(b, word, b.add(row, first)), inside);
    }
    const values = loadEight(b, dtype, loadWidth, source, channel, headDim, inside);
    const centered = values.map((value, i) => b.sub(value, at(mean, i)));
    b.when(inBlock, () => {
      b.stVector(centered.slice(0, 4), destination, first * rowBytes);
      b.stVector(centered.slice(4), destination, first * rowBytes + 16);
    });
    if (first + rowsAtOnce < KEYS) source = b.add(source, step);
  }
}

/** Means of a thread's eight channels of K; zeros without smoothing, and beyond the row. */
function meanOfKeys(frame: Frame, channel: Reg<'u32'>): Reg<'f32'>[] {
  const { b, config, pointer, queryHeads, headsPerKeyHead, sequence, keyHead } = frame;
  const { paddedDim } = config;
  const mean = Array.from({ length: 8 }, () => b.constant('f32', 0));
  if (!config.keyMean) return mean;
  const keyHeads = b.div(queryHeads, headsPerKeyHead);
  const means = b.loadPointer(pointer.keyMean);
  const from = offset(b, means, b.mad(b.mad(sequence, keyHeads, keyHead), paddedDim, channel), 4);
  b.if(b.setp('lt', channel, paddedDim), () => {
    loadEightFloats(b, from).forEach((value, i) => {
      b.mov(value, mean[i]);
    });
  });
  return mean;
}

function visibleBits(frame: Frame, hidden: HiddenKeys): [Reg<'b32'>, Reg<'b32'>] {
  const { b, pointer, integer, table, firstKey, keyHead } = frame;
  const first = b.add(table.paddedKeyStart, firstKey);
  const base = b.loadPointer(pointer.visibleKeys);
  const from = visibleBitsAt(b, base, hidden, keyHead, b.loadParameter(integer.paddedKeys), first);
  return b.ldVector('b32', 2, from, 0, { readOnly: true }) as [Reg<'b32'>, Reg<'b32'>];
}

/** Products of the keys with the means of all blocks of Q. */
function multiply(frame: Frame): void {
  const { b, config, integer, thread, head, table } = frame;
  b.section('products with the means, sixteen blocks of Q at once');
  const scale = b.loadParameter(frame.scoreScale);
  const key = b.and(thread, KEYS - 1);
  const slot = b.mul(b.shr(thread, 6), BLOCKS_EACH);
  const blocks = b.shr(b.add(table.queryLength, 127), 7);
  const firstBlock = b.shr(b.mad(head, b.loadParameter(integer.paddedQueries), table.paddedQueryStart), 7);
  const block = b.constant('u32', 0);
  const vectors = config.paddedDim / 4;
  b.loop(
    () => b.setp('lt', block, blocks),
    () => {
      b.barSync();
      const queryMean = offset(
        b,
        b.loadPointer(frame.pointer.queryMean),
        b.add(firstBlock, block),
        config.paddedDim * 4,
      );
      const present = { vector: b.mov(thread), end: b.mul(b.min(b.sub(blocks, block), BLOCKS_AT_ONCE), vectors) };
      loadMeans(frame, queryMean, present);
      b.barSync();
      const sums = dotProducts(frame, key, slot);
      const rowBytes = () => b.mulWide(b.loadParameter(integer.meanScoreKeys), 4);
      const output = offset(
        b,
        b.add(
          b.loadPointer(frame.pointer.meanScores),
          b.as(b.mul(b.cvt('u64', b.add(b.add(firstBlock, block), slot)), rowBytes()), 'global'),
        ),
        b.add(frame.firstKey, key),
        4,
      );
      const rowStep = b.as(rowBytes(), 'global');
      sums.forEach((sum, j) => {
        const share = b.mul(sum, scale);
        b.when(b.setp('lt', b.add(b.add(block, slot), j), blocks), () => b.st(share, output));
        b.add(output, rowStep, output);
      });
      b.add(block, BLOCKS_AT_ONCE, block);
    },
  );
}

/** Means of the blocks at hand into shared memory, from this thread's `vector` on; those beyond the last are zeros, and not stored. */
function loadMeans(
  { b, config, shared, means }: Frame,
  queryMean: Reg<'global'>,
  { vector, end }: { readonly vector: Reg<'u32'>; readonly end: Reg<'u32'> },
): void {
  const place = () => b.add(b.add(shared, means.base), b.as(b.shl(vector, 4), 'shared'));
  b.loop(
    () => b.setp('lt', vector, end),
    () => {
      const loaded = b.ldVector('f32', 4, offset(b, queryMean, vector, 16), 0);
      b.stVector(loaded, place());
      b.add(vector, MEAN_SCORES_THREADS, vector);
    },
  );
  const zeros = Array.from({ length: 4 }, () => b.constant('f32', 0));
  b.loop(
    () => b.setp('lt', vector, BLOCKS_AT_ONCE * (config.paddedDim / 4)),
    () => {
      b.stVector(zeros, place());
      b.add(vector, MEAN_SCORES_THREADS, vector);
    },
  );
}

/** Dot products of one key with the means of {@link BLOCKS_EACH} blocks from `slot` on. */
function dotProducts(
  { b, config, shared, keys, means }: Frame,
  key: Reg<'u32'>,
  slot: Reg<'u32'>,
): readonly Reg<'f32'>[] {
  const { paddedDim } = config;
  const sums = Array.from({ length: BLOCKS_EACH }, () => b.constant('f32', 0));
  const keyAt = b.add(b.add(shared, keys.base), b.as(b.mul(key, rowBytesOf(paddedDim)), 'shared'));
  const meanAt = b.add(b.add(shared, means.base), b.as(b.mul(slot, paddedDim * 4), 'shared'));
  const i = b.constant('u32', 0);
  b.loop(
    () => b.setp('lt', i, paddedDim / 4),
    () => {
      const k = b.ldVector('f32', 4, keyAt);
      sums.forEach((sum, j) => {
        b.ldVector('f32', 4, meanAt, j * paddedDim * 4).forEach((q, c) => {
          b.fma(q, at(k, c), sum, sum);
        });
      });
      b.add(keyAt, 16, keyAt);
      b.add(meanAt, 16, meanAt);
      b.add(i, 1, i);
    },
  );
  return sums;
}
