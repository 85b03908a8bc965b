/**
 * Tiles in shared memory under cp.async and ldmatrix: where their chunks lie, and copies that all threads make
 * together.
 */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Layout, SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';

/** Offset of (row, chunk) in a tile for a thread whose row and chunk are registers. */
export function laneOffset(b: KernelBuilder, layout: Layout, row: Reg<'u32'>, chunk: Reg<'u32'>): Reg<'shared'> {
  const permuted = b.xor(b.and(b.shr(row, layout.rowShift), layout.rowMask), chunk);
  return b.as(b.mad(row, layout.rowBytes, b.shl(permuted, 4)), 'shared');
}

/**
 * Moves a swizzled address by a constant number of chunks: an XOR within the permuted chunks, and an offset beyond them.
 */
export function chunkAddresses(b: KernelBuilder, layout: Layout, base: Reg<'shared'>) {
  const moved = new Map<number, Reg<'shared'>>([[0, base]]);
  return (chunk: number): [address: Reg<'shared'>, offset: number] => {
    const within = chunk & layout.rowMask;
    let address = moved.get(within);
    if (address === undefined) {
      address = b.xor(base, within * 16);
      moved.set(within, address);
    }
    return [address, (chunk - within) * 16];
  };
}

/**
 * Copies a tile from global to shared memory, all threads together. Returns the copy as a function of the thread's
 * source and destination, to be emitted once per tile.
 */
export function tileCopy(
  b: KernelBuilder,
  tile: SharedTile,
  threads: number,
  rowBytes: number,
  ownThread: () => Reg<'u32'> = () => b.special('%tid.x'),
) {
  const { layout, rows } = tile;
  const columns = Math.min(8, layout.rowBytes / 16);
  // Computed anew where it is needed: registers held through the loop cost more.
  const place = (thread = ownThread()) => {
    return { row: b.shr(thread, Math.log2(columns)), column: b.and(thread, columns - 1) };
  };
  const { row, column } = place();
  const rowsAtOnce = threads / columns;
  const destination = b.add(laneOffset(b, layout, row, column), tile.base);
  const inside = new Map<number, Reg<'pred'>>();
  // Rows beyond the tile and chunks beyond the row are left out.
  const guarded = (firstRow: number, firstColumn: number, body: () => void) => {
    const lastPartial = rowBytes / 16 - firstColumn < columns;
    const rowsPartial = rows - firstRow < rowsAtOnce;
    if (!lastPartial && !rowsPartial) return body();
    const key = (lastPartial ? 1 : 0) + (rowsPartial ? 2 : 0);
    let predicate = inside.get(key);
    if (predicate === undefined) {
      const inRow = b.setp('lt', column, lastPartial ? rowBytes / 16 - firstColumn : columns);
      predicate = rowsPartial ? b.andPred(inRow, b.setp('lt', row, rows - firstRow)) : inRow;
      inside.set(key, predicate);
    }
    b.when(predicate, body);
  };
  return {
    place,
    rowsAtOnce,
    /** Where this thread's first chunk goes, from the start of shared memory. */
    destination,
    /** @param rowStride bytes between rows in global memory; a register when it is only known at run time */
    emit(source: Reg<'global'>, into: Reg<'shared'>, rowStride: number | Reg<'global'>) {
      let from = source;
      for (let firstRow = 0; firstRow < rows; firstRow += rowsAtOnce) {
        if (firstRow > 0 && typeof rowStride !== 'number') from = b.add(from, rowStride);
        // Few threads copy fewer rows at once than the swizzle's period: in later passes rows lie at other chunks.
        const moved = ((firstRow >> layout.rowShift) & layout.rowMask) * 16;
        const own = moved === 0 ? into : b.xor(into, moved);
        for (let firstColumn = 0; firstColumn * 16 < rowBytes; firstColumn += columns) {
          const sourceOffset = firstColumn * 16 + (typeof rowStride === 'number' ? firstRow * rowStride : 0);
          guarded(firstRow, firstColumn, () =>
            b.cpAsync16(own, from, firstRow * layout.rowBytes + firstColumn * 16, sourceOffset),
          );
        }
      }
    },
  };
}

export type TileCopy = ReturnType<typeof tileCopy>;
