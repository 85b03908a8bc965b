/**
 * Which keys any row may see: only those count in means, scales and groups. Causality, window and length leave one interval of
 * a sequence's keys, which the table of sequences has. A mask is reduced to a bit for each key of each head of K (or one bit
 * for all heads, if they share the mask), over all rows and heads that read the key.
 *
 * A boolean mask hides where it is false, an additive one where it is -Infinity or more than {@link HIDDEN_BELOW} below the
 * largest entry of its row.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { FLOAT32_MAX } from '../parts/constants.ts';
import { loadSequence, SEQUENCE_INTS } from '../parts/sequences.ts';

/** An additive entry this far below the largest of its row hides its key: no score makes up for it. */
export const HIDDEN_BELOW = 1000;
/** Below every finite entry; -Infinity hides whatever the rest of its row is. */
export const LOWEST_ENTRY = -FLOAT32_MAX;
/** Rows that a warp has under way at once. */
const ROWS_AT_ONCE = 8;

/** Whether quantizers read bits of a mask, and whether each head of K has its own. */
export type HiddenKeys = 'none' | 'of all heads' | 'of each head';

/** The interval of a sequence's keys, in its own tokens, outside of which no row sees any. */
export function loadVisibleRange(
  b: KernelBuilder,
  table: Reg<'global'>,
  sequence: Reg<'u32'>,
): readonly [from: Reg<'u32'>, until: Reg<'u32'>] {
  const row = offset(b, table, sequence, SEQUENCE_INTS * 4);
  return b.ldVector('u32', 2, row, 24, { readOnly: true }) as [Reg<'u32'>, Reg<'u32'>];
}

/** Where the bits of a head's keys begin that stand in padded row `paddedKey`, a multiple of 64: two words for each 64. */
export function visibleBitsAt(
  b: KernelBuilder,
  base: Reg<'global'>,
  hidden: HiddenKeys,
  head: Reg<'u32'>,
  paddedTokens: Reg<'u32'>,
  paddedKey: Reg<'u32'>,
): Reg<'global'> {
  const row = hidden === 'of each head' ? b.mad(head, paddedTokens, paddedKey) : paddedKey;
  return offset(b, base, b.shr(row, 5), 4);
}

/** Whether the bit of `token` is set in the word that holds it. */
export function isVisible(b: KernelBuilder, word: Reg<'b32'>, token: Reg<'u32'>): Reg<'pred'> {
  return b.setp('ne', b.and(b.shr(word, b.and(token, 31)), 1), 0);
}

/** Ends the CTA of a block in which no row sees a key. */
export function endWithoutKeys(
  b: KernelBuilder,
  [from, until]: readonly [from: Reg<'u32'>, until: Reg<'u32'>],
  firstToken: Reg<'u32'>,
  blockTokens: number,
): void {
  b.when(b.setp('ge', firstToken, until), () => b.exit());
  b.when(b.setp('le', b.add(firstToken, blockTokens), from), () => b.exit());
}

/** A block of at most 64 tokens, whose first stands in a padded row that is a multiple of 64. */
export interface KeyBlock {
  readonly hiddenKeys: HiddenKeys;
  /** Bits of the keys, read where a mask hides some. */
  readonly visibleKeys: Parameter<'u64'>;
  readonly head: Reg<'u32'>;
  readonly paddedTokens: () => Reg<'u32'>;
  readonly paddedStart: Reg<'u32'>;
  readonly firstToken: Reg<'u32'>;
}

/** Whether any row may see a key of the block, counted from its first. */
export function seenInBlock(
  b: KernelBuilder,
  [from, until]: readonly [from: Reg<'u32'>, until: Reg<'u32'>],
  { hiddenKeys, visibleKeys, head, paddedTokens, paddedStart, firstToken }: KeyBlock,
): (inBlock: Reg<'u32'>) => Reg<'pred'> {
  if (hiddenKeys === 'none') {
    return (inBlock) => {
      const token = b.add(firstToken, inBlock);
      return b.andPred(b.setp('ge', token, from), b.setp('lt', token, until));
    };
  }
  const first = b.add(paddedStart, firstToken);
  const bits = visibleBitsAt(b, b.loadPointer(visibleKeys), hiddenKeys, head, paddedTokens(), first);
  const [low, high] = b.ldVector('b32', 2, bits, 0, { readOnly: true }) as [Reg<'b32'>, Reg<'b32'>];
  // Bits are set in the interval only.
  return (inBlock) => isVisible(b, b.selp(high, low, b.setp('ge', inBlock, 32)), inBlock);
}

export interface MaskConfig {
  readonly target: Target;
  readonly mask: 'boolean' | DType;
}

export const ROW_LIMITS_POINTERS = ['sequences', 'mask', 'rowLimits'] as const;
/** `maskHeads`, `maskRows`: of the mask, 1 where it broadcasts. */
export const ROW_LIMITS_INTEGERS = ['maskHeads', 'maskRows'] as const;
export const MASK_STRIDES = ['maskBatch', 'maskHead', 'maskQuery', 'maskKey'] as const;
export const ROW_LIMITS_THREADS = 128;

/** Reads an entry as f32 (of a boolean mask 0 or 1); `otherwise` where it is not `inside`. */
export function loadEntry(
  b: KernelBuilder,
  mask: 'boolean' | DType,
  address: Reg<'global'>,
  inside: Reg<'pred'>,
  otherwise: number,
): Reg<'f32'> {
  const entry = b.constant('f32', otherwise);
  if (mask === 'boolean') {
    const byte = b.as(entry, 'u32');
    b.set(byte, 0);
    b.when(inside, () => b.ldByte(address, 0, byte));
    return entry;
  }
  if (mask === 'float32') {
    b.when(inside, () => b.ld('f32', address, 0, { into: entry }));
    return entry;
  }
  const bits = b.reg('b16');
  b.set(bits, 0);
  b.when(inside, () => b.ld('b16', address, 0, { into: bits }));
  const value = mask === 'float16' ? b.cvt('f32', b.as(bits, 'f16')) : b.as(b.shl(b.cvt('u32', bits), 16), 'f32');
  b.when(inside, () => b.mov(value, entry));
  return entry;
}

/** The entry below which an additive mask hides, for each of its rows: `[sequence, head, row]`. */
export function maskRowLimits({ target, mask }: MaskConfig): Kernel {
  const threads = ROW_LIMITS_THREADS;
  const b = new KernelBuilder({ name: 'maskRowLimits', target, threads });
  const pointer = pointers(b, ROW_LIMITS_POINTERS);
  const integer = integers(b, ROW_LIMITS_INTEGERS);
  const stride = pointers(b, MASK_STRIDES);
  const warpMaxima = b.shared('largest of each warp', 1, rowMajor((threads / 32) * 4));
  b.section('which row');
  const thread = b.special('%tid.x');
  const index = b.special('%ctaid.x');
  const [row, headAndSequence] = divide(b, index, b.loadParameter(integer.maskRows));
  const [head, sequence] = divide(b, headAndSequence, b.loadParameter(integer.maskHeads));
  const { keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  let address = offset64(b, b.loadPointer(pointer.mask), sequence, b.loadParameter(stride.maskBatch));
  address = offset64(b, address, head, b.loadParameter(stride.maskHead));
  address = offset64(b, address, row, b.loadParameter(stride.maskQuery));
  const keyStride = b.loadParameter(stride.maskKey);
  address = offset64(b, address, thread, keyStride);
  const step = b.as(b.mul(keyStride, threads), 'global');

  b.section('largest entry');
  const largest = b.constant('f32', Number.NEGATIVE_INFINITY);
  const key = b.mov(thread);
  b.loop(
    () => b.setp('lt', key, keyLength),
    () => {
      const entries = Array.from({ length: ROWS_AT_ONCE }, () => {
        const entry = loadEntry(b, mask, address, b.setp('lt', key, keyLength), Number.NEGATIVE_INFINITY);
        b.add(key, threads, key);
        b.add(address, step, address);
        return entry;
      });
      for (const entry of entries) b.max(largest, entry, largest);
    },
  );
  for (let lanes = 1; lanes < 32; lanes *= 2) b.max(largest, b.shflBfly(largest, lanes), largest);
  const shared = b.sharedAddress(warpMaxima.base);
  b.when(b.setp('eq', b.and(thread, 31), 0), () => b.st(largest, b.add(shared, b.as(b.shr(thread, 3), 'shared'))));
  b.barSync();
  const ofWarps = b.ldVector('f32', 4, shared).reduce((x, y) => b.max(x, y));
  const limit = b.max(b.add(ofWarps, -HIDDEN_BELOW), LOWEST_ENTRY);
  b.when(b.setp('eq', thread, 0), () => b.st(limit, offset(b, b.loadPointer(pointer.rowLimits), index, 4)));
  return b.build();
}

export interface VisibleKeysConfig extends MaskConfig {
  readonly hidden: 'of all heads' | 'of each head';
  /** Warps that share the rows of 32 keys; 1 where the mask has one row. */
  readonly warps: 1 | 16;
}

export const VISIBLE_KEYS_POINTERS = ['sequences', 'mask', 'rowLimits', 'visibleKeys'] as const;
/**
 * `heads`: heads of the grid, K's or 1. `groupHeads`: heads of the mask that read one head's keys. `words`: words of 32 keys
 * in the longest sequence, even.
 */
export const VISIBLE_KEYS_INTEGERS = ['heads', 'words', 'groupHeads', 'maskHeads', 'maskRows', 'paddedTokens'] as const;

/** Bits of the keys that the mask hides from no row of a sequence: one CTA takes 32 keys. */
export function maskVisibleKeys({ target, mask, hidden, warps }: VisibleKeysConfig): Kernel {
  const b = new KernelBuilder({ name: 'maskVisibleKeys', target, threads: 32 * warps });
  const pointer = pointers(b, VISIBLE_KEYS_POINTERS);
  const integer = integers(b, VISIBLE_KEYS_INTEGERS);
  const stride = pointers(b, MASK_STRIDES);
  const wordTile = b.shared('word of each warp', 1, rowMajor(warps * 4));
  b.section('which keys');
  const thread = b.special('%tid.x');
  const [lane, warp] = [b.and(thread, 31), b.shr(thread, 5)];
  const [word, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.words));
  const [head, sequence] = divide(b, headAndSequence, b.loadParameter(integer.heads));
  const table = b.loadPointer(pointer.sequences);
  const { queryLength, keyLength, paddedKeyStart } = loadSequence(b, table, sequence);
  // Words come in pairs: the second of the last pair may be beyond the length.
  const firstOfPair = b.shl(b.shr(word, 1), 6);
  b.when(b.setp('ge', firstOfPair, keyLength), () => b.exit());
  const [from, until] = loadVisibleRange(b, table, sequence);
  const key = b.add(b.shl(word, 5), lane);
  const inRange = b.andPred(b.setp('ge', key, from), b.setp('lt', key, until));

  b.section('rows that see them');
  const maskRows = b.loadParameter(integer.maskRows);
  const rows = b.min(maskRows, queryLength);
  const groupHeads = b.loadParameter(integer.groupHeads);
  const [queryStride, headStride] = [b.loadParameter(stride.maskQuery), b.loadParameter(stride.maskHead)];
  const maskHead = b.mul(head, groupHeads);
  let headAt = offset64(b, b.loadPointer(pointer.mask), sequence, b.loadParameter(stride.maskBatch));
  headAt = offset64(b, headAt, maskHead, headStride);
  headAt = offset64(b, headAt, key, b.loadParameter(stride.maskKey));
  headAt = b.mov(offset64(b, headAt, warp, queryStride));
  const step = b.as(b.mul(queryStride, warps), 'global');
  const additive = mask !== 'boolean';
  const limitRow = b.mad(sequence, b.loadParameter(integer.maskHeads), maskHead);
  const seen = b.constant('u32', 0);
  const ofGroup = b.constant('u32', 0);
  b.loop(
    () => b.setp('lt', ofGroup, groupHeads),
    () => {
      const row = b.mov(warp);
      const address = b.mov(headAt);
      const limitAt = additive
        ? b.mov(offset(b, b.loadPointer(pointer.rowLimits), b.mad(b.add(limitRow, ofGroup), maskRows, warp), 4))
        : undefined;
      b.loop(
        () => b.setp('lt', row, rows),
        () => {
          const entries = Array.from({ length: ROWS_AT_ONCE }, () => {
            const inside = b.andPred(inRange, b.setp('lt', row, rows));
            const entry = loadEntry(b, mask, address, inside, Number.NEGATIVE_INFINITY);
            const limit = b.constant('f32', LOWEST_ENTRY);
            if (limitAt !== undefined) {
              b.when(inside, () => b.ld('f32', limitAt, 0, { into: limit }));
              b.add(limitAt, 4 * warps, limitAt);
            }
            b.add(row, warps, row);
            b.add(address, step, address);
            return { entry, limit };
          });
          for (const { entry, limit } of entries) {
            if (!additive) b.or(seen, b.as(entry, 'u32'), seen);
            // Not "at least the limit": an entry that is not a number makes its row one, and hides nothing.
            else b.when(b.setp('lt', entry, limit), () => b.set(seen, 1), true);
          }
          // Where all keys are seen, nothing is left to find.
          const unseen = b.voteAny(b.andPred(inRange, b.setp('eq', seen, 0)));
          b.when(unseen, () => b.set(row, 0x7fffffff), true);
          b.when(unseen, () => b.mov(groupHeads, ofGroup), true);
        },
      );
      b.add(headAt, b.as(headStride, 'global'), headAt);
      b.add(ofGroup, 1, ofGroup);
    },
  );

  b.section('one word');
  const bit = b.selp<'u32'>(1, b.constant('u32', 0), b.andPred(inRange, b.setp('ne', seen, 0)));
  const bits = b.as(b.shl(bit, lane), 'b32');
  for (let lanes = 1; lanes < 32; lanes *= 2) b.or(bits, b.shflBfly(bits, lanes), bits);
  if (warps > 1) {
    const shared = b.sharedAddress(wordTile.base);
    b.when(b.setp('eq', lane, 0), () => b.st(bits, b.add(shared, b.as(b.shl(warp, 2), 'shared'))));
    b.barSync();
    const all = Array.from({ length: warps / 4 }, (_, i) => b.ldVector('b32', 4, shared, 16 * i)).flat();
    b.mov(
      all.reduce((x, y) => b.or(x, y)),
      bits,
    );
  }
  const at = visibleBitsAt(
    b,
    b.loadPointer(pointer.visibleKeys),
    hidden,
    head,
    b.loadParameter(integer.paddedTokens),
    b.add(paddedKeyStart, b.shl(word, 5)),
  );
  b.when(b.setp('eq', thread, 0), () => b.st(bits, at));
  return b.build();
}
