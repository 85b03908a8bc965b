/**
 * Mean of each channel of K (or V) over a sequence, `[sequence, head, paddedDim]` float32, for smoothing.
 *
 * Softmax does not change when any constant vector is subtracted from all keys, nor the output when a constant is subtracted
 * from V and added back: the mean need not be exact. At most `MEAN_TOKENS` evenly spaced tokens are averaged, so the cost is
 * bounded; the mean of n tokens deviates from that of all by sigma / sqrt(n), far below what quantization resolves.
 * Elements that are not finite are left out.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { KernelBuilder } from '../ptx/builder.ts';
import { rowMajor } from '../ptx/layouts.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel } from '../ptx/types.ts';
import {
  BYTES,
  divide,
  integers,
  type LoadWidth,
  loadEight,
  loadSequence,
  nextPowerOfTwo,
  offset,
  offset64,
  pointers,
} from './common.ts';

/** Tokens that are averaged at most. */
export const MEAN_TOKENS = 2048;

export interface ChannelMeanConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly dim: number;
  readonly paddedDim: number;
  readonly loadWidth: LoadWidth;
}

export const CHANNEL_MEAN_POINTERS = ['sequences', 'input', 'mean'] as const;
export const CHANNEL_MEAN_INTEGERS = ['heads'] as const;
export const CHANNEL_MEAN_THREADS = 512;

export function channelMean({ target, dtype, dim, paddedDim, loadWidth }: ChannelMeanConfig): Kernel {
  const threads = CHANNEL_MEAN_THREADS;
  const perRow = nextPowerOfTwo(paddedDim / 8);
  const rowsAtOnce = threads / perRow;
  const b = new KernelBuilder({ name: 'channelMean', target, threads });
  const pointer = pointers(b, CHANNEL_MEAN_POINTERS);
  const integer = integers(b, CHANNEL_MEAN_INTEGERS);
  const batchStride = b.parameter('batchStride', 'u64');
  const headStride = b.parameter('headStride', 'u64');
  const tokenStride = b.parameter('tokenStride', 'u64');
  // Halved until one row is left: sums in the first plane, counts in the second.
  const plane = b.shared('sums', rowsAtOnce, rowMajor(perRow * 32));
  const counts = b.shared('counts', rowsAtOnce, rowMajor(perRow * 32));

  b.section('which sequence and head');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const index = b.special('%ctaid.x');
  const [head, sequence] = divide(b, index, heads);
  const { keyStart, keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const spacing = b.div(b.add(keyLength, MEAN_TOKENS - 1), MEAN_TOKENS);
  b.max(spacing, 1, spacing);

  b.section('sum every spacing-th token');
  const row = b.shr(thread, Math.log2(perRow));
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(batchStride));
  source = offset64(b, source, head, b.loadParameter(headStride));
  const stride = b.loadParameter(tokenStride);
  const token = b.mul(row, spacing);
  source = offset64(b, source, b.add(keyStart, token), stride);
  source = offset(b, source, channel, BYTES[dtype]);
  const step = b.mul(spacing, rowsAtOnce);
  const stepBytes = b.as(b.mul(b.cvt('u64', step), stride), 'global');
  const sums = Array.from({ length: 8 }, () => b.constant('f32', 0));
  const finite = Array.from({ length: 8 }, () => b.constant('f32', 0));
  b.loop(
    () => b.setp('lt', token, keyLength),
    () => {
      // Four rows under way at once hide the latency of memory.
      for (let unrolled = 0; unrolled < 4; unrolled++) {
        const inside = b.setp('lt', token, keyLength);
        const values = loadEight(b, dtype, loadWidth, source, channel, dim, inside);
        values.forEach((value, i) => {
          const counted = b.setp('lt', b.and(b.as(value, 'u32'), 0x7fffffff), 0x7f800000);
          const kept = b.andPred(counted, inside);
          b.when(kept, () => {
            b.add(sums[i] as (typeof sums)[number], value, sums[i]);
            b.add(finite[i] as (typeof sums)[number], 1, finite[i]);
          });
        });
        b.add(token, step, token);
        b.add(source, stepBytes, source);
      }
    },
  );

  b.section('add the rows');
  const shared = b.sharedAddress();
  const at = b.add(shared, b.as(b.mad(row, perRow * 32, b.shl(channel, 2)), 'shared'));
  for (const [tile, registers] of [
    [plane, sums],
    [counts, finite],
  ] as const) {
    b.stVector(registers.slice(0, 4), at, tile.base);
    b.stVector(registers.slice(4), at, tile.base + 16);
  }
  b.barSync();
  b.if(b.setp('lt', thread, paddedDim), () => {
    const column = b.add(shared, b.as(b.shl(thread, 2), 'shared'));
    const total = b.constant('f32', 0);
    const count = b.constant('f32', 0);
    const r = b.constant('u32', 0);
    b.loop(
      () => b.setp('lt', r, rowsAtOnce),
      () => {
        b.add(total, b.ld('f32', column, plane.base), total);
        b.add(count, b.ld('f32', column, counts.base), count);
        b.add(column, perRow * 32, column);
        b.add(r, 1, r);
      },
    );
    const mean = b.divF32(total, b.max(count, 1));
    b.st(mean, offset(b, b.loadPointer(pointer.mean), b.mad(index, paddedDim, thread), 4));
  });
  return b.build();
}
