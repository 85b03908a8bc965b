/** How the ranks of a row exchange heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509), and back. */
import type { DType } from '../tensor/dtype.ts';
import { isContiguous, slice, type TensorView } from '../tensor/tensor.ts';
import type { Incoming, Outgoing } from './link.ts';
import type { Place } from './place.ts';
import type { RankSchedule } from './schedule.ts';
import { lengthOf, type Span, totalOf } from './shards.ts';

const HEADS = 1;
const TOKENS = 2;

export const headsOf = (view: TensorView, { start, end }: Span) => slice(view, HEADS, start, end);
export const tokensOf = (view: TensorView, start: number, length: number) => slice(view, TOKENS, start, start + length);

/** A rank in a call, and what it has made there. */
export class RowMember {
  readonly place: Place;
  readonly schedule: RankSchedule;
  /** Freed when the call has ended. */
  readonly #made: TensorView[] = [];

  constructor(place: Place, schedule: RankSchedule) {
    this.place = place;
    this.schedule = schedule;
  }

  /** To be freed with the others. */
  keep(...views: readonly TensorView[]): void {
    this.#made.push(...views);
  }

  empty(shape: readonly number[], dtype: DType): TensorView {
    const view = this.place.empty(shape, dtype);
    this.keep(view);
    return view;
  }

  /** What lies in one piece, as what travels must. */
  packed(view: TensorView): TensorView {
    if (isContiguous(view)) return view;
    const packed = this.empty(view.shape, view.dtype as DType);
    this.place.copy(view, packed);
    return packed;
  }

  free(): void {
    for (const view of this.#made.splice(0)) this.place.free(view);
  }

  /**
   * Every rank of the row gets its heads of what has this rank's tokens.
   *
   * @param view `[B,Hq,own tokens,any]`
   * @returns what is exchanged, and what gives, after that, the row's tokens of this rank's heads
   */
  toRow(view: TensorView, name: string): RowTransfer<TensorView> {
    const { rank, row, rowQueries, heads } = this.schedule;
    if (row.length === 1) return { outgoing: [], incoming: [], take: () => view };
    const [batch, , own, dim] = view.shape as [number, number, number, number];
    const [outgoing, incoming]: [Outgoing[], Incoming[]] = [[], []];
    const pieces = row.map((other) => {
      if (other.rank === rank) return headsOf(view, heads.query);
      const tokens = other.moves.reduce((sum, { length }) => sum + length, 0);
      const piece = this.empty([batch, lengthOf(heads.query), tokens, dim], view.dtype as DType);
      if (own > 0) outgoing.push({ to: other.rank, name, value: this.packed(headsOf(view, other.heads)) });
      if (tokens > 0) incoming.push({ from: other.rank, name, into: piece });
      return piece;
    });
    const take = () => {
      const shape = [batch, lengthOf(heads.query), totalOf(rowQueries), dim];
      const gathered = this.empty(shape, view.dtype as DType);
      for (const [i, { moves }] of row.entries()) {
        const piece = pieces[i] as TensorView;
        for (const { from, to, length } of moves) {
          this.place.copy(tokensOf(piece, from, length), tokensOf(gathered, to, length));
        }
      }
      return gathered;
    };
    return { outgoing, incoming, take };
  }

  /**
   * The other way round: every rank of the row gets its tokens of this rank's heads.
   *
   * @param gathered `[B, heads of the column, the row's tokens, any]`
   * @param target `[B,Hq,own tokens,any]`, written by `take`
   */
  fromRow(gathered: TensorView, target: TensorView, name: string): RowTransfer<void> {
    const { rank, row } = this.schedule;
    const [outgoing, incoming]: [Outgoing[], Incoming[]] = [[], []];
    const copies: (() => void)[] = [];
    const own = row.find((other) => other.rank === rank)?.moves ?? [];
    for (const { rank: other, moves, heads } of row) {
      const into = headsOf(target, heads);
      if (other !== rank) {
        for (const [i, { to, length }] of moves.entries()) {
          outgoing.push({ to: other, name: `${name} ${i}`, value: this.packed(tokensOf(gathered, to, length)) });
        }
      }
      for (const [i, { from, to, length }] of own.entries()) {
        let piece = tokensOf(gathered, to, length);
        if (other !== rank) {
          const shape = [target.shape[0] as number, lengthOf(heads), length, target.shape[3] as number];
          piece = this.empty(shape, target.dtype as DType);
          incoming.push({ from: other, name: `${name} ${i}`, into: piece });
        }
        copies.push(() => this.place.copy(piece, tokensOf(into, from, length)));
      }
    }
    const take = () => {
      for (const copy of copies) copy();
    };
    return { outgoing, incoming, take };
  }
}

/** What one exchange is to carry, and what is done when it has. */
export interface RowTransfer<T> {
  readonly outgoing: readonly Outgoing[];
  readonly incoming: readonly Incoming[];
  readonly take: () => T;
}
