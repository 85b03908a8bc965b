/**
 * How many CTAs share the keys of each sequence where sequences are of unequal lengths: each gets as many as its length asks for, so that the
 * longest does not keep the card waiting. A head has so many slots for CTAs, whoever they work for; every CTA counts out of the lengths,
 * alike, whose part it takes.
 */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { sumsOfWarp } from './warp.ts';

export interface SplitsByLength {
  /** Tiles of keys of a sequence, for the lane that asks; not asked where `inside` is false. */
  readonly tilesOf: (sequence: Reg<'u32'>, inside: Reg<'pred'>) => Reg<'u32'>;
  readonly sequences: Reg<'u32'>;
  /** Of a head: more than there are sequences. */
  readonly slots: Reg<'u32'>;
  readonly mostSplits: Reg<'u32'>;
  /** A part of fewer is not worth its prologue. */
  readonly leastTiles: number;
  readonly slot: Reg<'u32'>;
  readonly lane: Reg<'u32'>;
}

/** Steps from the least tiles of a part to those that fit for certain. */
const TRIALS = 4;

/** A CTA's part of a sequence's keys. */
export interface LengthSplit {
  readonly sequence: Reg<'u32'>;
  /** The sequence's first slot, and how many it has: this CTA's part is `slot - first`. */
  readonly first: Reg<'u32'>;
  readonly splits: Reg<'u32'>;
}

/**
 * Ends the CTA where its slot is nobody's. By whole warps, each for itself.
 *
 * With t tiles of all sequences together, S slots and B sequences, parts have at least ceil(t / S) tiles, and with ceil(t / (S - B)) they
 * fit, for sequences have at most t / that + B <= S of them. The first of five lengths between that fits is taken: the first at all where
 * sequences are of one length.
 */
export function splitByLength(b: KernelBuilder, asked: SplitsByLength): LengthSplit {
  const { tilesOf, sequences, slots, mostSplits, leastTiles, slot, lane } = asked;
  const overWarp = (value: Reg<'u32'>, join: (a: Reg<'u32'>, c: Reg<'u32'>) => void) => {
    for (let lanes = 1; lanes < 32; lanes *= 2) join(value, b.shflBfly(value, lanes));
  };
  const roundedUp = (count: Reg<'u32'>, parts: Reg<'u32'>) => b.div(b.sub(b.add(count, parts), 1), parts);
  const eachSequence = (use: (sequence: Reg<'u32'>, inside: Reg<'pred'>, tiles: Reg<'u32'>) => void) => {
    const first = b.constant('u32', 0);
    b.loop(
      () => b.setp('lt', first, sequences),
      () => {
        const sequence = b.add(first, lane);
        const inside = b.setp('lt', sequence, sequences);
        use(sequence, inside, tilesOf(sequence, inside));
        b.add(first, 32, first);
      },
    );
  };

  b.section('tiles of all sequences');
  const [total, most] = [b.constant('u32', 0), b.constant('u32', 0)];
  eachSequence((_, __, tiles) => {
    b.add(total, tiles, total);
    b.max(most, tiles, most);
  });
  overWarp(total, (a, c) => b.add(a, c, a));
  overWarp(most, (a, c) => b.max(a, c, a));
  const least = b.max(b.max(roundedUp(total, slots), roundedUp(most, mostSplits)), leastTiles);
  const enough = b.max(roundedUp(total, b.sub(slots, sequences)), least);
  const step = b.max(b.shr(b.add(b.sub(enough, least), TRIALS - 1), Math.log2(TRIALS)), 1);
  const perPart = b.sub(least, step);
  const splitsOf = (inside: Reg<'pred'>, tiles: Reg<'u32'>) => {
    const splits = b.max(roundedUp(tiles, perPart), 1);
    b.when(inside, () => b.set(splits, 0), true);
    return splits;
  };
  const needed = b.add(slots, 1);
  b.loop(
    () => b.setp('gt', needed, slots),
    () => {
      b.add(perPart, step, perPart);
      b.set(needed, 0);
      eachSequence((_, inside, tiles) => b.add(needed, splitsOf(inside, tiles), needed));
      overWarp(needed, (a, c) => b.add(a, c, a));
    },
  );

  b.section('whose part this is');
  const taken = b.constant('u32', 0);
  // The lane of the sequence has these, all others zeros.
  const own = { next: b.constant('u32', 0), first: b.constant('u32', 0), splits: b.constant('u32', 0) };
  eachSequence((sequence, inside, tiles) => {
    const splits = splitsOf(inside, tiles);
    const { before, total } = sumsOfWarp(b, lane, splits);
    const first = b.add(taken, before);
    b.when(b.setp('lt', b.sub(slot, first), splits), () => {
      b.add(sequence, 1, own.next);
      b.mov(first, own.first);
      b.mov(splits, own.splits);
    });
    b.add(taken, total, taken);
  });
  for (const value of [own.next, own.first, own.splits]) overWarp(value, (a, c) => b.max(a, c, a));
  b.when(b.setp('eq', own.next, 0), () => b.exit());
  return { sequence: b.sub(own.next, 1), first: own.first, splits: own.splits };
}
