/** Copies of tiles of Q, K and V from global to shared memory. */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { type TileCopy, tileCopy } from '../parts/copies.ts';
import type { Frame } from './frame.ts';

/** Where a head's keys and values are: as the prologue has it, or reloaded. */
export interface KeyPlace {
  readonly keyHead: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  readonly firstKeyTile: Reg<'u32'>;
  /** The thread's number; default `%tid.x`. */
  readonly thread?: Reg<'u32'>;
}

export class TileCopies {
  readonly #frame: Frame;
  readonly query: TileCopy;
  readonly key: TileCopy;
  readonly value: TileCopy;

  constructor(frame: Frame) {
    const { b, config, tiles, threads, valueRowBytes } = frame;
    this.#frame = frame;
    this.query = tileCopy(b, tiles.query, threads, config.qkRowBytes);
    this.key = tileCopy(b, tiles.key, threads, config.qkRowBytes);
    this.value = tileCopy(b, tiles.value, threads, valueRowBytes);
  }

  /** This thread's first chunk of a tile whose rows, tokens, lie one behind the other. */
  #tokensAt(
    base: Reg<'global'>,
    row: Reg<'u32'>,
    copy: TileCopy,
    rowBytes: number,
    thread?: Reg<'u32'>,
  ): Reg<'global'> {
    const { b } = this.#frame;
    const { row: ownRow, column } = copy.place(thread);
    return b.add(offset(b, base, b.add(row, ownRow), rowBytes), b.as(b.mulWide(column, 16), 'global'));
  }

  #rowOfTile({ firstKeyTile }: KeyPlace, tile: Reg<'s32'>): Reg<'u32'> {
    const { b } = this.#frame;
    return b.shl(b.add(firstKeyTile, b.as(tile, 'u32')), 6);
  }

  /** @param row the tile's first in the padded Q */
  copyQuery(row: Reg<'u32'>, shared: Reg<'shared'>): void {
    const { b, config, pointer } = this.#frame;
    const source = this.#tokensAt(b.loadPointer(pointer.query), row, this.query, config.qkRowBytes);
    this.query.emit(source, b.add(shared, this.query.destination), config.qkRowBytes);
  }

  copyKey(place: KeyPlace, tile: Reg<'s32'>, into: Reg<'shared'>): void {
    const { b, config, pointer } = this.#frame;
    const base = b.loadPointer(pointer.key);
    const source = this.#tokensAt(base, this.#rowOfTile(place, tile), this.key, config.qkRowBytes, place.thread);
    this.key.emit(source, into, config.qkRowBytes);
  }

  copyValue(place: KeyPlace, tile: Reg<'s32'>, into: Reg<'shared'>): void {
    const { b, config, pointer, integer, fp8, valueRowBytes } = this.#frame;
    const base = b.loadPointer(pointer.value);
    if (!fp8) {
      const source = this.#tokensAt(base, this.#rowOfTile(place, tile), this.value, valueRowBytes, place.thread);
      this.value.emit(source, into, valueRowBytes);
      return;
    }
    // [head, channel, token]: rows are channels, paddedKeys bytes apart.
    const { row, column } = this.value.place(place.thread);
    const stride = b.loadParameter(integer.paddedKeys);
    const token = b.add(b.add(place.paddedKeyStart, b.as(b.shl(tile, 6), 'u32')), b.shl(column, 4));
    const channel = offset(b, base, b.mad(place.keyHead, config.paddedValueDim, row), stride);
    const source = b.add(channel, b.as(b.cvt('u64', token), 'global'));
    this.value.emit(source, into, b.as(b.mulWide(stride, this.value.rowsAtOnce), 'global'));
  }
}

/** A place in the one of two buffers that a tile goes to: even tiles to the first, odd ones to the second. */
export const staged = ({ b }: Frame, at: Reg<'shared'>, buffer: SharedTile, tile: Reg<'s32'>): Reg<'shared'> =>
  b.as(b.mad(b.as(b.and(tile, 1), 'u32'), buffer.bytes, b.as(at, 'u32')), 'shared');
