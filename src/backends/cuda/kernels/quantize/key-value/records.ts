/** What a thread holds of the tile. */
import type { Reg } from '../../../ptx/types.ts';

/** The eight channels of a thread, from `channel` on, of the `span` that the threads cover together. */
export interface Channels {
  readonly channel: Reg<'u32'>;
  readonly span: number;
}

/** Bits of a thread's eights of K and then of V that hold something that is not finite. */
export type Faults = Reg<'b32'>;

/** Eight channels of every so many rows of K. */
export interface Keys {
  readonly row: Reg<'u32'>;
  readonly column: Reg<'u32'>;
  readonly channels: Channels;
  readonly packed: readonly Reg<'b32'>[][];
  /** Bits of this thread's largest magnitude in each pass, 0 where the row counts in no scale; filled by `findKeyMaxima`. */
  readonly magnitudes: Reg<'u32'>[];
  /** The row of each pass in the tile, computed anew. */
  readonly tokens: () => Reg<'u32'>[];
}

/** How V's elements are dealt out to the threads, and how they are stored. */
export interface ValueOrder {
  readonly channels: Channels;
  /** Tokens of a thread, counted from the tile's first. */
  readonly tokens: readonly Reg<'u32'>[];
  /** Has a barrier: what the CTA wrote into shared memory before is seen behind it. */
  readonly store: (values: Values, faults: Faults) => void;
}

/** V as it was loaded: eight channels of each of a thread's tokens. */
export interface LoadedValues extends ValueOrder {
  readonly packed: readonly Reg<'b32'>[][];
}

export interface Values extends LoadedValues {
  readonly mean: readonly Reg<'f32'>[] | undefined;
  /** Reciprocals of the channels' scales; undefined in FP16. */
  readonly toCodes: readonly Reg<'f32'>[] | undefined;
  /** Joins the warp's largest code, which its `first` lane writes into shared memory; in FP16 there is none. */
  readonly shareMaximum: (first: Reg<'pred'>) => void;
}
