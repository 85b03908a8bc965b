/**
 * The share of the scores that `smoothQ` takes away: `smScale * log2(e) * mean(Q block) . (K - mean K)` for each block of Q and
 * each key, `[head, block, key]` float32, in full precision from the caller's K. One CTA takes 64 keys of one query head and
 * all blocks of Q.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight, loadEightFloats } from '../parts/elements.ts';
import { loadSequence } from '../parts/sequences.ts';
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

export function meanScores(config: MeanScoresConfig): Kernel {
  const { target, dtype, headDim, paddedDim, loadWidth } = config;
  const threads = MEAN_SCORES_THREADS;
  const b = new KernelBuilder({ name: 'meanScores', target, threads });
  const pointer = pointers(b, MEAN_SCORES_POINTERS);
  const integer = integers(b, MEAN_SCORES_INTEGERS);
  const batchStride = b.parameter('batchStride', 'u64');
  const headStride = b.parameter('headStride', 'u64');
  const tokenStride = b.parameter('tokenStride', 'u64');
  const scoreScale = b.parameter('scoreScale', 'f32');
  const perRow = nextPowerOfTwo(paddedDim / 8);
  // Four floats more than a row keep neighbouring keys off each other's banks.
  const rowBytes = perRow * 32 + 16;
  const keys = b.shared('keys', KEYS, rowMajor(rowBytes));
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

  b.section('K - mean(K) into shared memory');
  const row = b.shr(thread, Math.log2(perRow));
  const rowsAtOnce = threads / perRow;
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  const keysLeft = b.sub(table.keyLength, firstKey);
  const stride = b.loadParameter(tokenStride);
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(batchStride));
  source = offset64(b, source, keyHead, b.loadParameter(headStride));
  source = offset64(b, source, b.add(b.add(table.keyStart, firstKey), row), stride);
  source = offset(b, source, channel, BYTES[dtype]);
  const mean = Array.from({ length: 8 }, () => b.constant('f32', 0));
  if (config.keyMean) {
    const keyHeads = b.div(queryHeads, headsPerKeyHead);
    const at = offset(
      b,
      b.loadPointer(pointer.keyMean),
      b.mad(b.mad(sequence, keyHeads, keyHead), paddedDim, channel),
      4,
    );
    b.if(b.setp('lt', channel, paddedDim), () => {
      loadEightFloats(b, at).forEach((value, i) => {
        b.mov(value, mean[i]);
      });
    });
  }
  const destination = b.add(b.add(shared, keys.base), b.as(b.mad(row, rowBytes, b.shl(channel, 2)), 'shared'));
  const bits = config.hiddenKeys === 'none' ? undefined : visibleBits(config.hiddenKeys);
  const step = b.as(b.mul(stride, rowsAtOnce), 'global');
  for (let first = 0; first < KEYS; first += rowsAtOnce) {
    const inBlock = b.setp('lt', b.add(row, first), KEYS);
    const inside = b.setp('lt', b.add(row, first), keysLeft);
    if (bits !== undefined)
      b.andPred(
        inside,
        isVisible(b, b.selp(bits[1], bits[0], b.setp('ge', b.add(row, first), 32)), b.add(row, first)),
        inside,
      );
    const values = loadEight(b, dtype, loadWidth, source, channel, headDim, inside);
    const centered = values.map((value, i) => b.sub(value, mean[i] as Reg<'f32'>));
    b.when(inBlock, () => {
      b.stVector(centered.slice(0, 4), destination, first * rowBytes);
      b.stVector(centered.slice(4), destination, first * rowBytes + 16);
    });
    if (first + rowsAtOnce < KEYS) source = b.add(source, step);
  }

  b.section('products with the means, sixteen blocks of Q at once');
  const scale = b.loadParameter(scoreScale);
  const key = b.and(thread, KEYS - 1);
  const slot = b.mul(b.shr(thread, 6), BLOCKS_EACH);
  const blocks = b.shr(b.add(table.queryLength, 127), 7);
  const firstBlock = b.shr(b.mad(head, b.loadParameter(integer.paddedQueries), table.paddedQueryStart), 7);
  const block = b.constant('u32', 0);
  const vectors = paddedDim / 4;
  b.loop(
    () => b.setp('lt', block, blocks),
    () => {
      b.barSync();
      const queryMean = offset(b, b.loadPointer(pointer.queryMean), b.add(firstBlock, block), paddedDim * 4);
      const vector = b.mov(thread);
      const present = b.mul(b.min(b.sub(blocks, block), BLOCKS_AT_ONCE), vectors);
      b.loop(
        () => b.setp('lt', vector, present),
        () => {
          const loaded = b.ldVector('f32', 4, offset(b, queryMean, vector, 16), 0);
          b.stVector(loaded, b.add(b.add(shared, means.base), b.as(b.shl(vector, 4), 'shared')));
          b.add(vector, threads, vector);
        },
      );
      // Blocks beyond the last read zeros, and are not stored.
      const end = BLOCKS_AT_ONCE * vectors;
      const zeros = Array.from({ length: 4 }, () => b.constant('f32', 0));
      b.loop(
        () => b.setp('lt', vector, end),
        () => {
          b.stVector(zeros, b.add(b.add(shared, means.base), b.as(b.shl(vector, 4), 'shared')));
          b.add(vector, threads, vector);
        },
      );
      b.barSync();
      const sums = Array.from({ length: BLOCKS_EACH }, () => b.constant('f32', 0));
      const keyAt = b.add(b.add(shared, keys.base), b.as(b.mul(key, rowBytes), 'shared'));
      const meanAt = b.add(b.add(shared, means.base), b.as(b.mul(slot, paddedDim * 4), 'shared'));
      const i = b.constant('u32', 0);
      b.loop(
        () => b.setp('lt', i, vectors),
        () => {
          const k = b.ldVector('f32', 4, keyAt);
          sums.forEach((sum, j) => {
            b.ldVector('f32', 4, meanAt, j * paddedDim * 4).forEach((q, c) => {
              b.fma(q, k[c] as Reg<'f32'>, sum, sum);
            });
          });
          b.add(keyAt, 16, keyAt);
          b.add(meanAt, 16, meanAt);
          b.add(i, 1, i);
        },
      );
      const output = offset(
        b,
        b.add(
          b.loadPointer(pointer.meanScores),
          b.as(
            b.mul(
              b.cvt('u64', b.add(b.add(firstBlock, block), slot)),
              b.mulWide(b.loadParameter(integer.meanScoreKeys), 4),
            ),
            'global',
          ),
        ),
        b.add(firstKey, key),
        4,
      );
      const rowStep = b.as(b.mulWide(b.loadParameter(integer.meanScoreKeys), 4), 'global');
      sums.forEach((sum, j) => {
        const share = b.mul(sum, scale);
        b.when(b.setp('lt', b.add(b.add(block, slot), j), blocks), () => b.st(share, output));
        b.add(output, rowStep, output);
      });
      b.add(block, BLOCKS_AT_ONCE, block);
    },
  );
  return b.build();

  function visibleBits(hidden: HiddenKeys): [Reg<'b32'>, Reg<'b32'>] {
    const first = b.add(table.paddedKeyStart, firstKey);
    const base = b.loadPointer(pointer.visibleKeys);
    const at = visibleBitsAt(b, base, hidden, keyHead, b.loadParameter(integer.paddedKeys), first);
    return b.ldVector('b32', 2, at, 0, { readOnly: true }) as [Reg<'b32'>, Reg<'b32'>];
  }
}
