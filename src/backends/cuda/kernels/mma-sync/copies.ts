/** Copies of tiles of Q, K and V from global to shared memory. */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { type TileCopy, tileCopy } from '../parts/copies.ts';
import { blockQueries } from './config.ts';
import type { Frame, KeyPlace } from './frame.ts';
import { copyGivenKeys } from './given.ts';

export class TileCopies {
  readonly #frame: Frame;
  readonly query: TileCopy;
  readonly key: TileCopy;
  readonly value: TileCopy;

  constructor(frame: Frame) {
    const { b, config, tiles, threads, valueRowBytes } = frame;
    this.#frame = frame;
    this.query = tileCopy(b, tiles.query, threads * config.keyWarps, config.queryRowBytes);
    this.key = tileCopy(b, tiles.key, threads, config.qkRowBytes, frame.thread);
    this.value = tileCopy(b, tiles.value, threads, valueRowBytes, frame.thread);
  }

  /** Copies the scales of a tile, which lie one behind the other; nothing where there are none. */
  #copyScales(
    tile: SharedTile | undefined,
    scales: Parameter<'u64'> | undefined,
    index: Reg<'u32'>,
    into: Reg<'shared'>,
    thread: Reg<'u32'>,
  ): void {
    if (tile === undefined || scales === undefined) return;
    const { b, threads } = this.#frame;
    const within = b.shl(thread, 4);
    const source = b.add(offset(b, b.loadPointer(scales), index, tile.bytes), b.as(b.cvt('u64', within), 'global'));
    const destination = b.add(into, b.as(within, 'shared'));
    const step = threads * 16;
    for (let first = 0; first < tile.bytes; first += step) {
      const copy = () => b.cpAsync16(destination, source, tile.base + first, first);
      if (tile.bytes - first >= step) copy();
      else b.when(b.setp('lt', within, tile.bytes - first), copy);
    }
  }

  /** The start of shared memory, moved to the buffer of a tile's scales. */
  #scaleStage(scales: SharedTile | undefined, position: Reg<'s32'>): Reg<'shared'> {
    const start = this.#frame.own();
    return scales === undefined ? start : staged(this.#frame, start, scales, position);
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
    const source = this.#tokensAt(b.loadPointer(pointer.query), row, this.query, config.queryRowBytes);
    this.query.emit(source, b.add(shared, this.query.destination), config.queryRowBytes);
    const { fp4, tiles } = this.#frame;
    if (tiles.queryScales === undefined) return;
    // Scales lie in blocks of Q's quantizer, and this tile may be a part of such a block.
    this.#copyQueryScales(row, tiles.queryScales, fp4?.queryBlockScale);
  }

  /** Words of `blockQueries` rows from `row` on for each 64 channels, out of blocks of 128 rows. */
  #copyQueryScales(row: Reg<'u32'>, tile: SharedTile, scales: Parameter<'u64'> | undefined): void {
    if (scales === undefined) return;
    const { b, config, threads } = this.#frame;
    const rows = blockQueries(config);
    const steps = tile.bytes / 4 / rows;
    const block = offset(b, b.loadPointer(scales), b.shr(row, 7), steps * 128 * 4);
    const base = offset(b, block, b.and(row, 127), 4);
    const within = b.shl(b.special('%tid.x'), 4);
    const destination = b.add(b.sharedAddress(), b.as(within, 'shared'));
    const source = b.add(base, b.as(b.cvt('u64', within), 'global'));
    for (let step = 0; step < steps; step++) {
      for (let first = 0; first < rows * 4; first += threads * 16) {
        b.when(b.setp('lt', within, rows * 4 - first), () =>
          b.cpAsync16(destination, source, tile.base + step * rows * 4 + first, step * 128 * 4 + first),
        );
      }
    }
  }

  /**
   * @param tile where it lies, `WalkTile.place`
   * @param position the tile's place among those that are taken, which says what buffer its scales go to
   */
  copyKey(place: KeyPlace, tile: Reg<'s32'>, position: Reg<'s32'>, into: Reg<'shared'>): void {
    const { b, config, pointer, fp4, tiles } = this.#frame;
    if (this.#frame.given !== undefined) {
      copyGivenKeys(this.#frame, 'key', place, tile, position);
      return;
    }
    if (tiles.keyScales !== undefined) {
      const index = b.add(place.firstKeyTile, b.as(tile, 'u32'));
      const into = this.#scaleStage(tiles.keyScales, position);
      this.#copyScales(tiles.keyScales, fp4?.keyBlockScale, index, into, place.thread ?? this.#frame.thread());
    }
    const base = b.loadPointer(pointer.key);
    const source = this.#tokensAt(base, this.#rowOfTile(place, tile), this.key, config.qkRowBytes, place.thread);
    this.key.emit(source, into, config.qkRowBytes);
  }

  /** @param position as for {@link copyKey} */
  copyValue(place: KeyPlace, tile: Reg<'s32'>, position: Reg<'s32'>, into: Reg<'shared'>): void {
    const { b, config, pointer, integer, fp8, fp4, fp4Values, tiles, valueRowBytes } = this.#frame;
    if (this.#frame.given !== undefined) {
      copyGivenKeys(this.#frame, 'value', place, tile, position);
      return;
    }
    const base = b.loadPointer(pointer.value);
    if (tiles.valueScales !== undefined) {
      const index = b.add(place.firstKeyTile, b.as(tile, 'u32'));
      const scales = config.valueStages === 1 ? this.#frame.own() : this.#scaleStage(tiles.valueScales, position);
      const from = fp4Values ? fp4?.valueBlockScale : pointer.valueScale;
      this.#copyScales(tiles.valueScales, from, index, scales, place.thread ?? this.#frame.thread());
      if (fp4Values) {
        // Rows are channels of one tile of keys.
        const first = b.mul(index, config.paddedValueDim);
        this.value.emit(this.#tokensAt(base, first, this.value, valueRowBytes, place.thread), into, valueRowBytes);
        return;
      }
    }
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

/** A place in the one of two buffers, if there are two, that a tile goes to: at even positions to the first, at odd ones to the second. */
export function staged(
  { b, config, tiles }: Frame,
  at: Reg<'shared'>,
  buffer: SharedTile,
  position: Reg<'s32'>,
): Reg<'shared'> {
  const stages = buffer === tiles.key ? config.keyStages : buffer === tiles.value ? config.valueStages : 2;
  if (stages === 1) return at;
  return b.as(b.mad(b.as(b.and(position, 1), 'u32'), buffer.bytes, b.as(at, 'u32')), 'shared');
}
