/** The mean of a sequence's tokens from the means of its blocks, of each head: one CTA a head. */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel } from '../../ptx/types.ts';
import { divide, integers, offset, pointers } from '../parts/addresses.ts';
import { loadSequence } from '../parts/sequences.ts';
import { meanFloats } from './pool.ts';

export interface MeanConfig {
  readonly target: Target;
  readonly dim: number;
}

export const MEAN_POINTERS = ['sequences', 'means', 'mean'] as const;
/** Heads, blocks of the longest sequence of keys, keys of a block. */
export const MEAN_INTEGERS = ['heads', 'blocks', 'blockKeys'] as const;
export const MEAN_THREADS = 512;
/** Loads that a thread has under way at once. */
const AT_ONCE = 4;

export function meanOfBlocks({ target, dim }: MeanConfig): Kernel {
  const b = new KernelBuilder({ name: 'meanOfBlocks', target, threads: MEAN_THREADS });
  const pointer = pointers(b, MEAN_POINTERS);
  const integer = integers(b, MEAN_INTEGERS);
  const line = meanFloats(dim);
  const slices = MEAN_THREADS / line;
  const sums = b.shared('sums', slices, rowMajor(line * 4));
  const thread = b.special('%tid.x');
  const index = b.special('%ctaid.x');
  const [, sequence] = divide(b, index, b.loadParameter(integer.heads));
  const { keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  b.when(b.setp('eq', keyLength, 0), () => b.exit());
  const blockKeys = b.loadParameter(integer.blockKeys);
  const channel = b.and(thread, line - 1);
  const lines = b.mul(index, b.loadParameter(integer.blocks));

  b.section('sums of tokens');
  const total = b.constant('f32', 0);
  const block = b.shr(thread, Math.log2(line));
  const first = b.mul(block, blockKeys);
  const step = b.mul(blockKeys, slices);
  b.loop(
    () => b.setp('lt', first, keyLength),
    () => {
      for (let i = 0; i < AT_ONCE; i++) {
        const mean = b.constant('f32', 0);
        const address = offset(b, offset(b, b.loadPointer(pointer.means), b.add(lines, block), line * 4), channel, 4);
        b.when(b.setp('lt', first, keyLength), () => b.ld('f32', address, 0, { into: mean }));
        // Of a block that is not there this wraps round, and is times 0.
        b.fma(mean, b.cvt('f32', b.min(blockKeys, b.sub(keyLength, first))), total, total);
        b.add(block, slices, block);
        b.add(first, step, first);
      }
    },
  );

  b.section('join');
  const shared = b.sharedAddress();
  b.st(total, b.add(shared, b.as(b.shl(thread, 2), 'shared')), sums.base);
  b.barSync();
  b.if(b.setp('lt', thread, line), () => {
    const all = b.constant('f32', 0);
    const column = b.add(shared, b.as(b.shl(thread, 2), 'shared'));
    for (let i = 0; i < slices; i++) b.add(all, b.ld('f32', column, sums.base + i * line * 4), all);
    const address = offset(b, offset(b, b.loadPointer(pointer.mean), index, line * 4), thread, 4);
    b.st(b.divF32(all, b.cvt('f32', keyLength)), address);
  });
  return b.build();
}
