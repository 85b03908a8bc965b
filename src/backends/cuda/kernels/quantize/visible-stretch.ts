/** From which key to which any row sees one, and how many: a sample is as dense as they are few. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { at } from '../parts/lists.ts';

/** Keys of a sequence that are looked at: from `first` on, `count` of `length`. */
export interface Stretch {
  readonly first: Reg<'u32'>;
  readonly length: Reg<'u32'>;
  readonly count: Reg<'u32'>;
}

/** All keys of an interval. */
export function wholeStretch(b: KernelBuilder, [from, until]: readonly [Reg<'u32'>, Reg<'u32'>]): Stretch {
  const length = b.sub(until, from);
  return { first: from, length, count: length };
}

/**
 * From the first word of `bits` with a visible key to the last, and how many there are.
 *
 * @param warps of the CTA, all of which take part
 * @param countsAt where each warp leaves its counts: 16 bytes of shared memory a warp
 */
export function visibleStretch(
  b: KernelBuilder,
  bits: Reg<'global'>,
  [from, until]: readonly [Reg<'u32'>, Reg<'u32'>],
  thread: Reg<'u32'>,
  warps: number,
  countsAt: () => Reg<'shared'>,
): Stretch {
  b.section('visible keys');
  const joins = [
    (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.add(x, y, into),
    (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.min(x, y, into),
    (x: Reg<'u32'>, y: Reg<'u32'>, into?: Reg<'u32'>) => b.max(x, y, into),
  ] as const;
  const own = [b.constant('u32', 0), b.constant('u32', 0xffffffff), b.constant('u32', 0)] as const;
  const word = b.mov(thread);
  const end = b.shr(b.add(until, 31), 5);
  b.loop(
    () => b.setp('lt', word, end),
    () => {
      const set = b.as(b.ld('b32', offset(b, bits, word, 4), 0, { readOnly: true }), 'u32');
      const found = [countBits(b, set), b.shl(word, 5), b.shl(b.add(word, 1), 5)] as const;
      const any = b.setp('ne', set, 0);
      joins.forEach((join, i) => {
        b.when(any, () => join(at(own, i), at(found, i), at(own, i)));
      });
      b.add(word, warps * 32, word);
    },
  );
  joins.forEach((join, i) => {
    for (let lanes = 1; lanes < 32; lanes *= 2) join(at(own, i), b.shflBfly(at(own, i), lanes), at(own, i));
  });
  const base = countsAt();
  const [count, least, most] = own;
  b.when(b.setp('eq', b.and(thread, 31), 0), () =>
    b.stVector([count, least, most, most], b.add(base, b.as(b.shl(b.shr(thread, 5), 4), 'shared'))),
  );
  b.barSync();
  const ofWarps = Array.from({ length: warps }, (_, i) => b.ldVector('u32', 4, base, 16 * i));
  const [all, lowest, highest] = joins.map((join, i) =>
    ofWarps.map((values) => at(values, i)).reduce((x, y) => join(x, y)),
  ) as [Reg<'u32'>, Reg<'u32'>, Reg<'u32'>];
  const first = b.min(b.max(lowest, from), until);
  return { first, length: b.sub(b.max(b.min(highest, until), first), first), count: all };
}

/** How many bits of a word are set. */
function countBits(b: KernelBuilder, word: Reg<'u32'>): Reg<'u32'> {
  const inPairs = b.sub(word, b.and(b.shr(word, 1), 0x55555555));
  const inFours = b.add(b.and(inPairs, 0x33333333), b.and(b.shr(inPairs, 2), 0x33333333));
  const inBytes = b.and(b.add(inFours, b.shr(inFours, 4)), 0x0f0f0f0f);
  return b.shr(b.mul(inBytes, 0x01010101), 24);
}
