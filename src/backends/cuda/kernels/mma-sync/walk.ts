/** The tiles of keys that a CTA takes, one after the other: neighbours, or those of a list; and where they lie. */
import type { Reg } from '../../ptx/types.ts';
import { isCutEntry, loadEntry, tileOfEntry } from '../parts/blocks.ts';
import { loadPage } from '../parts/pages.ts';
import { BLOCK_K } from './config.ts';
import type { Frame, Work } from './frame.ts';
import type { Parked } from './parked.ts';

/** A tile of keys. */
export interface WalkTile {
  readonly tile: Reg<'s32'>;
  /** Its place among those that are taken: the tile itself where they are neighbours. */
  readonly position: Reg<'s32'>;
  /** Where it lies among the tiles of its head in memory, from the sequence's first on: the tile itself but in pages. */
  readonly place: Reg<'s32'>;
}

/** Whose pages are looked up, and how many of the pool count. */
type Held = Pick<Work, 'sequence'> & { readonly validPages: Reg<'u32'> };

export class Walk {
  readonly #frame: Frame;
  /** Of the tile at hand. */
  readonly position: Reg<'s32'>;
  /** The list's entry of the tile at hand. */
  readonly #entry: Reg<'u32'> | undefined;
  /** With pages: the places of the tile at hand and of the one after it, which is known before it is sent for. */
  readonly #places: { readonly now: Reg<'s32'>; readonly next: Reg<'s32'> } | undefined;

  constructor(frame: Frame, { firstTile, list }: Work) {
    const { b, pages } = frame;
    this.#places = pages === undefined ? undefined : { now: b.constant('s32', 0), next: b.constant('s32', 0) };
    this.#frame = frame;
    this.position = b.mov(firstTile);
    this.#entry = list === undefined ? undefined : b.constant('u32', 0);
  }

  /** The first tile, which exists. */
  first({ list, sequence, validPages, lastTile }: Work): WalkTile {
    const { b } = this.#frame;
    const places = this.#places;
    if (places !== undefined && validPages !== undefined) {
      const held = { sequence, validPages };
      b.mov(this.#placeInPages(this.position, held), places.now);
      b.mov(places.now, places.next);
      this.#follow(b.add(this.position, 1), lastTile, places.next, () => held);
    }
    if (list !== undefined && this.#entry !== undefined) loadEntry(b, list, this.position, this.#entry);
    return this.now();
  }

  /** The tile at hand. */
  now(): WalkTile {
    const { position } = this;
    const tile = this.#entry === undefined ? position : tileOfEntry(this.#frame.b, this.#entry);
    return { tile, position, place: this.#places?.now ?? tile };
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
    return { tile, position, place: this.#places?.next ?? tile };
  }

  advance(parked: Parked): void {
    const { b } = this.#frame;
    b.add(this.position, 1, this.position);
    // Behind the last entry is one more.
    if (this.#entry !== undefined) loadEntry(b, parked.list(), this.position, this.#entry);
    const places = this.#places;
    if (places === undefined) return;
    b.mov(places.next, places.now);
    this.#follow(b.add(this.position, 1), parked.lastTile(), places.next, () => ({
      sequence: parked.reload().sequence,
      validPages: parked.validPages(),
    }));
  }

  /** Moves the place of the tile before `tile` on to `tile`'s, if there is such a tile: the neighbour, or the first of another page. */
  #follow(tile: Reg<'s32'>, lastTile: Reg<'s32'>, place: Reg<'s32'>, held: () => Held): void {
    const { b } = this.#frame;
    b.add(place, 1, place);
    const begins = b.andPred(b.setp('eq', b.and(tile, this.#tilesOfPage - 1), 0), b.setp('lt', tile, lastTile));
    b.if(begins, () => b.mov(this.#placeInPages(tile, held()), place));
  }

  get #tilesOfPage(): number {
    return (this.#frame.config.pageTokens ?? BLOCK_K) / BLOCK_K;
  }

  /** Where the table of pages says that a tile lies. */
  #placeInPages(tile: Reg<'s32'>, { sequence, validPages }: Held): Reg<'s32'> {
    const { b, pages } = this.#frame;
    if (pages === undefined) throw new Error('K and V have no pages');
    const tiles = this.#tilesOfPage;
    const page = loadPage(b, pages, sequence, b.as(b.shr(tile, Math.log2(tiles)), 'u32'), validPages);
    return b.as(b.mad(page, tiles, b.as(b.and(tile, tiles - 1), 'u32')), 's32');
  }
}
