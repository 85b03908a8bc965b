/** The tiles of keys that a consumer takes of an item of work: neighbours, or those of a list. */
import type { Reg } from '../../ptx/types.ts';
import { entryAddress, isCutEntry, loadEntry, tileOfEntry } from '../parts/blocks.ts';
import { type Frame, groupBitsOf } from './frame.ts';
import type { Work } from './work.ts';

/** Scales of tiles, which are loaded ahead of need. */
export interface TileScales {
  /**
   * Loads the scales of a tile; each tile's in its turn.
   *
   * @param exists of a tile from a list
   */
  fetch(tile: Reg<'s32'>, exists: Reg<'pred'> | undefined): void;
}

/** A place in a list. */
interface ListPlace {
  /** Where the entry of the tile at hand is, and the entry. */
  readonly at: Reg<'global'>;
  readonly entry: Reg<'u32'>;
  /** Tiles from this one on. */
  readonly left: Reg<'s32'>;
}

/** The tile at a position of an item of work, for a warp that needs nothing else of its list. */
export const tileAt = ({ b, config }: Frame, { list }: Work, position: Reg<'s32'>): Reg<'s32'> =>
  list === undefined ? position : tileOfEntry(b, loadEntry(b, list, position), groupBitsOf(config));

export class Walk {
  readonly #frame: Frame;
  readonly #work: Work;
  /** The tile at hand where tiles are neighbours. */
  readonly #tile: Reg<'s32'>;
  readonly #listed: ListPlace | undefined;

  constructor(frame: Frame, work: Work) {
    const { b } = frame;
    const { list, firstTile, lastTile } = work;
    this.#frame = frame;
    this.#work = work;
    this.#tile = b.mov(firstTile);
    if (list === undefined) return;
    const left = b.sub(lastTile, firstTile);
    this.#listed = { at: entryAddress(b, list, firstTile), entry: b.constant('u32', 0), left };
  }

  /** There is a tile at hand. */
  exists(): Reg<'pred'> {
    const { b } = this.#frame;
    return this.#listed === undefined
      ? b.setp('lt', this.#tile, this.#work.lastTile)
      : b.setp('gt', this.#listed.left, 0);
  }

  /** The tile at hand, which exists, is the last. */
  isLast(): Reg<'pred'> {
    const { b } = this.#frame;
    return this.#listed === undefined
      ? b.setp('ge', b.add(this.#tile, 1), this.#work.lastTile)
      : b.setp('le', this.#listed.left, 1);
  }

  /** The tile at hand. */
  tile(): Reg<'s32'> {
    return this.#listed === undefined ? this.#tile : this.#tileOf(this.#listed.entry);
  }

  #tileOf(entry: Reg<'u32'>): Reg<'s32'> {
    return tileOfEntry(this.#frame.b, entry, groupBitsOf(this.#frame.config));
  }

  /** The list's entry of the tile at hand. */
  entry(): Reg<'u32'> | undefined {
    return this.#listed?.entry;
  }

  /** A part of the tile at hand is hidden; undefined where none ever is. */
  isCut(): Reg<'pred'> | undefined {
    return this.#listed === undefined ? undefined : isCutEntry(this.#frame.b, this.#listed.entry);
  }

  /** Before the first tile, which exists: loads its scales. */
  start(scales: TileScales): void {
    const { b } = this.#frame;
    if (this.#listed === undefined) scales.fetch(this.#tile, undefined);
    else {
      const { at, entry } = this.#listed;
      b.ld('u32', at, 0, { readOnly: true, into: entry });
      scales.fetch(this.tile(), this.exists());
    }
  }

  /** Loads the scales of the next tile, if there is one. Behind a list's last entry is another. */
  fetchNext(scales: TileScales): void {
    const { b } = this.#frame;
    if (this.#listed === undefined) scales.fetch(b.add(this.#tile, 1), undefined);
    else {
      const { at, left } = this.#listed;
      scales.fetch(this.#tileOf(b.ld('u32', at, 4, { readOnly: true })), b.setp('gt', left, 1));
    }
  }

  advance(): void {
    const { b } = this.#frame;
    if (this.#listed === undefined) {
      b.add(this.#tile, 1, this.#tile);
      return;
    }
    const { at, entry, left } = this.#listed;
    b.add(at, 4, at);
    b.ld('u32', at, 0, { readOnly: true, into: entry });
    b.sub(left, 1, left);
  }
}
