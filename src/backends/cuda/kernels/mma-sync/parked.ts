/**
 * Registers are scarce in the loop, so values that only the epilogue and rare paths need are kept in shared memory, and
 * reloaded there.
 */
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { at } from '../parts/lists.ts';
import type { TileCopies } from './copies.ts';
import type { Frame, KeyPlace, ThreadPlace, Work } from './frame.ts';

/** Values that are reloaded. */
export interface Reloaded extends Required<KeyPlace> {
  readonly sequence: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  /** Keys. */
  readonly length: Reg<'s32'>;
  readonly lower: Reg<'s32'>;
  readonly upper: Reg<'s32'>;
  /** The tile's first row in the padded Q and in the sequence, and the thread's first in the tile and in the sequence. */
  readonly queryRow: Reg<'u32'>;
  readonly firstRow: Reg<'u32'>;
  readonly threadRow: Reg<'u32'>;
  readonly rowIndex: Reg<'s32'>;
  /** What smoothing K took from the scores of the thread's r-th row, in base 2; NaN for a row that is not finite. */
  readonly rowBias: (r: number) => Reg<'f32'>;
  /** Twice the thread's number among the four that hold a row. */
  readonly t2: Reg<'u32'>;
}

export class Parked {
  readonly #frame: Frame;

  /** Parks what the prologue found; a barrier must follow. */
  constructor(
    frame: Frame,
    { thread, lane }: ThreadPlace,
    work: Work,
    queryRow: Reg<'u32'>,
    copies: TileCopies,
    queryScale: Reg<'f32'>,
  ) {
    this.#frame = frame;
    const { b, own } = frame;
    const { parked, parkedCopies, parkedScales } = frame.tiles;
    const base = own();
    const offsetOfHead = frame.sharesRange ? b.as(loadExponentOffset(frame, work), 's32') : b.constant('s32', 0);
    b.when(b.setp('eq', thread, 0), () => {
      b.stVector([work.sequence, work.head, work.keyHead, work.queryStart], base, parked.base);
      const keyStart = frame.given === undefined ? work.paddedKeyStart : work.keyStart;
      b.stVector([work.queryLength, work.firstRow, queryRow, keyStart], base, parked.base + 16);
      b.stVector([work.lower, work.upper, work.keyLength, work.lastTile], base, parked.base + 32);
      b.stVector([work.wholeFrom, work.wholeUntil, b.constant('s32', 0), offsetOfHead], base, parked.base + 48);
      if (work.list !== undefined) b.st(work.list, base, parked.base + 64);
      if (work.validPages !== undefined) b.st(work.validPages, base, parked.base + 64);
    });
    // Two offsets of 16 bytes each in one word.
    const [key, value] = [copies.key.destination, copies.value.destination];
    const destinations = b.or(b.as(b.shr(key, 4), 'b32'), b.shl(b.as(value, 'b32'), 12));
    b.st(destinations, b.add(base, b.as(b.shl(thread, 2), 'shared')), parkedCopies.base);
    // One for each four threads, which share their rows.
    b.when(b.setp('eq', b.and(lane, 3), 0), () =>
      b.st(queryScale, b.add(base, b.as(thread, 'shared')), parkedScales.base),
    );
  }

  /**
   * The thread's number plus a 0 from memory. ptxas takes what follows from %tid.x for constant, computes it before the
   * loop, and then has no registers to hold it.
   */
  threadNow(): Reg<'u32'> {
    const { b, tiles } = this.#frame;
    return b.add(this.#frame.thread(), b.ld('u32', this.#frame.own(), tiles.parked.base + 56));
  }

  reload(): Reloaded {
    const { b, config, tiles, integer } = this.#frame;
    const base = this.#frame.own(tiles.parked.base);
    const [sequence, head, keyHead, queryStart] = fourOf(b.ldVector('u32', 4, base));
    const [queryLength, firstRow, queryRow, paddedKeyStart] = fourOf(b.ldVector('u32', 4, base, 16));
    const [lower, upper, length] = fourOf(b.ldVector('s32', 4, base, 32));
    const warpRow = b.mul(b.shr(this.threadNow(), 5), config.rowsPerWarp);
    const threadRow = b.add(warpRow, b.shr(b.and(this.threadNow(), 31), 2));
    const rowIndex = b.as(b.add(firstRow, threadRow), 's32');
    const firstKeyTile = b.shr(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), 6);
    const rowBias = this.#rowBias(queryRow, threadRow);
    const t2 = b.shl(b.and(this.threadNow(), 3), 1);
    return {
      ...{ queryRow, firstRow, threadRow, rowIndex, rowBias, t2 },
      ...{ sequence, head, queryStart, queryLength, length, lower, upper },
      ...{ keyHead, paddedKeyStart, firstKeyTile, thread: this.threadNow() },
    };
  }

  #rowBias(queryRow: Reg<'u32'>, threadRow: Reg<'u32'>): (r: number) => Reg<'f32'> {
    const { b, fused, given, pointer } = this.#frame;
    if (given !== undefined) return () => b.constant('f32', 0);
    if (fused !== undefined) {
      const own = b.add(b.sharedAddress(fused.rows.base), b.as(b.shl(threadRow, 3), 'shared'));
      return (r) => b.ld('f32', own, r * 64 + 4);
    }
    const own = offset(b, b.loadPointer(pointer.rowBias), b.add(queryRow, threadRow), 4);
    return (r) => b.ld('f32', own, r * 32, { readOnly: true });
  }

  /** Where the tiles of keys are listed. */
  list(): Reg<'global'> {
    const { b, tiles } = this.#frame;
    return b.ld('global', this.#frame.own(tiles.parked.base), 64);
  }

  /** Of K and V in pages: how many of the pool's count for the sequence. */
  validPages(): Reg<'u32'> {
    const { b, tiles } = this.#frame;
    return b.ld('u32', this.#frame.own(tiles.parked.base), 64);
  }

  lastTile(): Reg<'s32'> {
    const { b, tiles } = this.#frame;
    return b.ld('s32', this.#frame.own(tiles.parked.base), 44);
  }

  /** Keys between which no tile needs its scores masked. */
  wholeKeys(): { readonly from: Reg<'s32'>; readonly until: Reg<'s32'> } {
    const { b, tiles } = this.#frame;
    const bounds = b.ldVector('s32', 2, this.#frame.own(tiles.parked.base), 48);
    return { from: at(bounds, 0), until: at(bounds, 1) };
  }

  /** The scale of the thread's rows of Q, times {@link Frame.scoreScale}. */
  queryScale(): Reg<'f32'> {
    const { b, tiles } = this.#frame;
    const quad = b.and(this.threadNow(), -4);
    return b.ld('f32', b.add(this.#frame.own(), b.as(quad, 'shared')), tiles.parkedScales.base);
  }

  #destinations(): Reg<'b32'> {
    const { b, tiles } = this.#frame;
    const own = b.add(this.#frame.own(), b.as(b.shl(this.threadNow(), 2), 'shared'));
    return b.ld('b32', own, tiles.parkedCopies.base);
  }

  /** Where the thread's copies of K go. */
  keyDestination(): Reg<'shared'> {
    const { b } = this.#frame;
    return b.add(this.#frame.own(), b.as(b.shl(b.and(this.#destinations(), 0xffff), 4), 'shared'));
  }

  /** Where the thread's copies of V go. */
  valueDestination(): Reg<'shared'> {
    const { b } = this.#frame;
    return b.add(this.#frame.own(), b.as(b.shl(b.shr(this.#destinations(), 16), 4), 'shared'));
  }
}

function loadExponentOffset({ b, integer, pointer, exponentOffset }: Frame, { sequence, keyHead }: Work): Reg<'f32'> {
  const keyHeads = b.div(b.loadParameter(integer.queryHeads), b.loadParameter(integer.headsPerKeyHead));
  const shift = offset(b, b.loadPointer(pointer.rangeShift), b.mad(sequence, keyHeads, keyHead), 4);
  return b.sub(b.constant('f32', exponentOffset), b.ld('f32', shift, 0, { readOnly: true }));
}

/** Added to exponents so that P fills its part of its format. */
export function exponentOffsetOf({ b, tiles, own, exponentOffset, sharesRange }: Frame): number | Reg<'f32'> {
  return sharesRange ? b.ld('f32', own(tiles.parked.base), 60) : exponentOffset;
}

const fourOf = <T>(values: readonly T[]) => [at(values, 0), at(values, 1), at(values, 2), at(values, 3)] as const;
