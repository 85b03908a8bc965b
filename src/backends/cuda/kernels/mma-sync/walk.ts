/** The tiles of keys that a CTA takes, one after the other: neighbours, or those of a list. */
import type { Reg } from '../../ptx/types.ts';
import { isCutEntry, loadEntry, tileOfEntry } from '../parts/blocks.ts';
import type { Frame, Work } from './frame.ts';
import type { Parked } from './parked.ts';

/** A tile of keys. */
export interface WalkTile {
  readonly tile: Reg<'s32'>;
  /** Its place among those that are taken: the tile itself where they are neighbours. */
  readonly position: Reg<'s32'>;
}

export class Walk {
  readonly #frame: Frame;
  /** Of the tile at hand. */
  readonly position: Reg<'s32'>;
  /** The list's entry of the tile at hand. */
  readonly #entry: Reg<'u32'> | undefined;

  constructor(frame: Frame, { firstTile, list }: Work) {
    const { b } = frame;
    this.#frame = frame;
    this.position = b.mov(firstTile);
    this.#entry = list === undefined ? undefined : b.constant('u32', 0);
  }

  /** The first tile, which exists. */
  first({ list }: Work): WalkTile {
    const { b } = this.#frame;
    if (list !== undefined && this.#entry !== undefined) loadEntry(b, list, this.position, this.#entry);
    return this.now();
  }

  /** The tile at hand. */
  now(): WalkTile {
    const { position } = this;
    return { tile: this.#entry === undefined ? position : tileOfEntry(this.#frame.b, this.#entry), position };
  }

  /** A part of the tile at hand is hidden; undefined where none ever is. */
  isCut(): Reg<'pred'> | undefined {
    return this.#entry === undefined ? undefined : isCutEntry(this.#frame.b, this.#entry);
  }

  /** The tile after the one at hand, which exists. */
  next(parked: Parked): WalkTile {
    const { b } = this.#frame;
    const position = b.add(this.position, 1);
    const tile = this.#entry === undefined ? position : tileOfEntry(b, loadEntry(b, parked.list(), position));
    return { tile, position };
  }

  advance(parked: Parked): void {
    const { b } = this.#frame;
    b.add(this.position, 1, this.position);
    // Behind the last entry is one more.
    if (this.#entry !== undefined) loadEntry(b, parked.list(), this.position, this.#entry);
  }
}
