/**
 * What a mask leaves of the blocks of scores: one CTA takes a block of rows. `visibleBlocksOf` of src/attention/visible-blocks.ts says
 * the same in TypeScript.
 *
 * Each warp takes rows of its own, and leaves a byte for each of their blocks: 1 where the row sees a key of it, 2 at the last of these.
 * Then each thread takes blocks of its own, and counts the rows that see them.
 */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { bandParameters } from '../parts/band.ts';
import { loadSequence } from '../parts/sequences.ts';
import { sumsOfWarp } from '../parts/warp.ts';
import { HIDDEN_BELOW, LOWEST_ENTRY, loadEntry, MASK_STRIDES, type MaskConfig } from '../quantize/visible-keys.ts';

export interface VisibleBlocksConfig extends MaskConfig {
  readonly banded: boolean;
}

/** `seen`: a byte for each row and block of keys, lines of blocks after one another. */
export const VISIBLE_BLOCKS_POINTERS = ['sequences', 'mask', 'seen', 'visibleBlocks'] as const;
/** `maskHeads`: heads that the mask has of its own. */
export const VISIBLE_BLOCKS_INTEGERS = ['maskHeads', 'rowBlocks', 'keyBlocks', 'blockRows', 'blockKeys'] as const;

const WARPS = 16;
export const VISIBLE_BLOCKS_THREADS = WARPS * 32;
/** Entries, or blocks, that a lane has under way at once. */
const AT_ONCE = 4;

/** Leaves for each block 0: no row sees it, 1: some row does, 2: it is computed in any case. */
export function visibleBlocks({ target, mask, banded }: VisibleBlocksConfig): Kernel {
  const b = new KernelBuilder({ name: 'visibleBlocks', target, threads: VISIBLE_BLOCKS_THREADS });
  const pointer = pointers(b, VISIBLE_BLOCKS_POINTERS);
  const integer = integers(b, VISIBLE_BLOCKS_INTEGERS);
  const stride = pointers(b, MASK_STRIDES);
  const band = bandParameters(b);
  const warpSums = b.shared('sum of each warp', 2, rowMajor(WARPS * 4));

  b.section('which rows');
  const thread = b.special('%tid.x');
  const [lane, warp] = [b.and(thread, 31), b.shr(thread, 5)];
  const line = b.special('%ctaid.x');
  const [rowBlock, headOfSequence] = divide(b, line, b.loadParameter(integer.rowBlocks));
  const [head, sequence] = divide(b, headOfSequence, b.loadParameter(integer.maskHeads));
  const { queryLength, keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const [blockRows, blockKeys] = [b.loadParameter(integer.blockRows), b.loadParameter(integer.blockKeys)];
  const keyBlocks = b.loadParameter(integer.keyBlocks);
  const firstRow = b.min(b.mul(rowBlock, blockRows), queryLength);
  const endRow = b.min(b.add(firstRow, blockRows), queryLength);
  const length = b.as(keyLength, 's32');
  const [lower, upper] = [b.constant('s32', 0), b.mov(length)];
  if (banded) {
    const align = b.as(b.loadParameter(band.alignBottomRight), 's32');
    const shift = b.mul(b.sub(length, b.as(queryLength, 's32')), align);
    b.sub(shift, b.loadParameter(band.left), lower);
    b.add(b.add(shift, b.loadParameter(band.right)), 1, upper);
  }
  let maskAt = offset64(b, b.loadPointer(pointer.mask), sequence, b.loadParameter(stride.maskBatch));
  maskAt = offset64(b, maskAt, head, b.loadParameter(stride.maskHead));
  const [queryStride, keyStride] = [b.loadParameter(stride.maskQuery), b.loadParameter(stride.maskKey)];
  const seen = offset(b, b.loadPointer(pointer.seen), line, b.mul(blockRows, keyBlocks));

  b.section('what each row sees');
  const row = b.add(firstRow, warp);
  b.loop(
    () => b.setp('lt', row, endRow),
    () => {
      const firstKey = b.constant('u32', 0);
      const endKey = b.mov(keyLength);
      if (banded) {
        b.mov(b.as(b.min(b.max(b.add(b.as(row, 's32'), lower), 0), length), 'u32'), firstKey);
        b.mov(b.as(b.min(b.max(b.add(b.as(row, 's32'), upper), 0), length), 'u32'), endKey);
      }
      const rowAt = offset64(b, maskAt, row, queryStride);
      const entryOf = (key: Reg<'u32'>, inside: Reg<'pred'>) =>
        loadEntry(b, mask, offset64(b, rowAt, key, keyStride), inside, Number.NEGATIVE_INFINITY);
      const limit = mask === 'boolean' ? undefined : leastVisible(b, lane, firstKey, endKey, entryOf);
      const bytes = offset(b, seen, b.sub(row, firstRow), keyBlocks);
      const block = b.constant('u32', 0);
      // One more than the last block that the row sees.
      const last = b.constant('u32', 0);
      b.loop(
        () => b.setp('lt', block, keyBlocks),
        () => {
          const founds = Array.from({ length: AT_ONCE }, () => b.constant('u32', 0));
          const own = b.mov(lane);
          b.loop(
            () => b.setp('lt', own, blockKeys),
            () => {
              for (const [i, found] of founds.entries()) {
                const key = b.mad(b.add(block, i), blockKeys, own);
                const inside = b.andPred(b.setp('ge', key, firstKey), b.setp('lt', key, endKey));
                const entry = entryOf(key, inside);
                if (limit === undefined) b.or(found, b.as(entry, 'u32'), found);
                // Not "at least the limit": an entry that is not a number makes its row one, and hides nothing.
                else b.when(b.setp('lt', entry, limit), () => b.set(found, 1), true);
              }
              b.add(own, 32, own);
            },
          );
          for (const [i, found] of founds.entries()) {
            const isSeen = b.voteAny(b.setp('ne', found, 0));
            const own = b.add(block, i);
            const byte = b.selp<'u32'>(1, b.constant('u32', 0), isSeen);
            const writes = b.andPred(b.setp('eq', lane, 0), b.setp('lt', own, keyBlocks));
            b.when(writes, () => b.stByte(byte, b.add(bytes, b.as(b.cvt('u64', own), 'global'))));
            b.when(isSeen, () => b.add(own, 1, last));
          }
          b.add(block, AT_ONCE, block);
        },
      );
      const two = b.constant('u32', 2);
      const lastAt = b.add(bytes, b.as(b.cvt('u64', b.sub(b.max(last, 1), 1)), 'global'));
      b.when(b.andPred(b.setp('eq', lane, 0), b.setp('ne', last, 0)), () => b.stByte(two, lastAt));
      b.add(row, WARPS, row);
    },
  );
  b.barSync();

  b.section('rows that see a block');
  const results = offset(b, b.loadPointer(pointer.visibleBlocks), line, b.shl(keyBlocks, 2));
  const ofThread = (body: (result: Reg<'global'>, own: Reg<'u32'>) => void) => {
    const own = b.mov(thread);
    b.loop(
      () => b.setp('lt', own, keyBlocks),
      () => {
        body(offset(b, results, own, 4), own);
        b.add(own, VISIBLE_BLOCKS_THREADS, own);
      },
    );
  };
  const shared = b.sharedAddress(warpSums.base);
  const sumOverCta = (own: Reg<'u32'>, slot: number) => {
    const { total } = sumsOfWarp(b, lane, own);
    const at = b.add(shared, b.as(b.shl(warp, 2), 'shared'));
    b.when(b.setp('eq', lane, 0), () => b.st(total, at, slot * WARPS * 4));
    b.barSync();
    const all = Array.from({ length: WARPS / 4 }, (_, i) => b.ldVector('u32', 4, shared, (slot * WARPS + 4 * i) * 4));
    return all.flat().reduce((x, y) => b.add(x, y));
  };
  const lasts = b.constant('u32', 0);
  ofThread((result, own) => {
    const [count, needed] = [b.constant('u32', 0), b.constant('u32', 0)];
    const at = b.mov(b.add(seen, b.as(b.cvt('u64', own), 'global')));
    const step = b.as(b.cvt('u64', keyBlocks), 'global');
    const next = b.mov(firstRow);
    b.loop(
      () => b.setp('lt', next, endRow),
      () => {
        const byte = b.ldByte(at);
        b.when(b.setp('ne', byte, 0), () => b.add(count, 1, count));
        b.add(needed, b.shr(byte, 1), needed);
        b.add(at, step, at);
        b.add(next, 1, next);
      },
    );
    b.add(lasts, needed, lasts);
    b.when(b.setp('ne', needed, 0), () => b.set(needed, 1));
    b.st(b.mad(count, 2, needed), result);
  });
  // Each row that sees a key has one last block.
  const seeing = sumOverCta(lasts, 0);
  const unlike = b.constant('u32', 0);
  ofThread((result) => {
    const count = b.shr(b.ld('u32', result), 1);
    const isUnlike = b.andPred(b.setp('ne', count, 0), b.setp('ne', count, seeing));
    b.when(isUnlike, () => b.set(unlike, 1));
  });
  const areUnlike = b.setp('ne', sumOverCta(unlike, 1), 0);
  ofThread((result) => {
    const found = b.ld('u32', result);
    const fact = b.min(found, 1);
    const isNeeded = b.andPred(areUnlike, b.setp('ne', b.and(found, 1), 0));
    b.when(isNeeded, () => b.set(fact, 2));
    b.st(fact, result);
  });
  return b.build();
}

/** The entry below which an additive mask hides from a row: of the finite entries that it sees by the band the largest counts. */
function leastVisible(
  b: KernelBuilder,
  lane: Reg<'u32'>,
  firstKey: Reg<'u32'>,
  endKey: Reg<'u32'>,
  entryOf: (key: Reg<'u32'>, inside: Reg<'pred'>) => Reg<'f32'>,
): Reg<'f32'> {
  const largest = b.constant('f32', Number.NEGATIVE_INFINITY);
  const key = b.add(firstKey, lane);
  b.loop(
    () => b.setp('lt', key, endKey),
    () => {
      const entries = Array.from({ length: AT_ONCE }, () => {
        const entry = entryOf(key, b.setp('lt', key, endKey));
        b.add(key, 32, key);
        return entry;
      });
      for (const entry of entries) {
        b.when(b.setp('lt', b.abs(entry), Number.POSITIVE_INFINITY), () => b.max(largest, entry, largest));
      }
    },
  );
  for (let lanes = 1; lanes < 32; lanes *= 2) b.max(largest, b.shflBfly(largest, lanes), largest);
  return b.max(b.add(largest, -HIDDEN_BELOW), LOWEST_ENTRY);
}
