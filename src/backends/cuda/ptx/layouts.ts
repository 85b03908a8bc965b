/**
 * Where the elements of a shared-memory tile lie. A layout is a function from (row, byte in the row) to a byte offset
 * in the tile; kernels use it with constants while they are being emitted, and {@link swizzle} with registers at run
 * time.
 *
 * Shared memory has 32 banks of 4 bytes. `ldmatrix` reads eight rows of 16 bytes at a time: free of conflicts when the
 * eight chunks fall on eight different 16-byte columns of the 128 bytes that the banks span.
 */

export const CHUNK_BYTES = 16;

export interface Layout {
  readonly name: string;
  readonly rowBytes: number;
  /** The base of a tile must be a multiple of this. */
  readonly alignment: number;
  /** `row * rowBytes + byte` before swizzling is XORed with `((row >> rowShift) & rowMask) * 16`. */
  readonly rowShift: number;
  readonly rowMask: number;
  /** Byte offset in the tile. */
  at(row: number, byte: number): number;
}

function layout(
  name: string,
  rowBytes: number,
  rowShift: number,
  rowMask: number,
  alignment = rowMask === 0 ? CHUNK_BYTES : 128,
): Layout {
  return {
    name,
    rowBytes,
    alignment,
    rowShift,
    rowMask,
    at: (row, byte) => (row * rowBytes + byte) ^ (((row >> rowShift) & rowMask) * CHUNK_BYTES),
  };
}

/** Rows one after the other. `ldmatrix` on rows of a multiple of 128 bytes meets eight-fold bank conflicts. */
export function rowMajor(rowBytes: number): Layout {
  return layout('row-major', rowBytes, 0, 0);
}

/**
 * Rows one after the other, with the 16-byte chunks of a row permuted by XOR with its row number, so that the same
 * chunk of any eight consecutive rows falls on eight different bank groups.
 *
 * @param rowBytes a power of two >= 16, or a multiple of 128
 */
export function xorSwizzle(rowBytes: number): Layout {
  const isPowerOfTwo = (rowBytes & (rowBytes - 1)) === 0;
  if (rowBytes % CHUNK_BYTES !== 0 || !(isPowerOfTwo || rowBytes % 128 === 0)) {
    throw new RangeError(
      `xorSwizzle: rows of ${rowBytes} bytes are neither a power of two >= 16 nor a multiple of 128`,
    );
  }
  // A row shorter than 128 bytes shares the banks with its neighbours: 128 / rowBytes rows fill them once.
  const chunks = Math.min(8, rowBytes / CHUNK_BYTES);
  const rowsPerSpan = Math.max(1, 128 / rowBytes);
  return layout('xor-swizzle', rowBytes, Math.log2(rowsPerSpan), chunks - 1);
}

/**
 * CU_TENSOR_MAP_SWIZZLE_128B: within 1024-byte atoms of eight 128-byte rows, chunk c of row r lies at chunk c ^ r.
 * What TMA writes and `wgmma` descriptors read. Rows are exactly 128 bytes.
 */
export function tma128Swizzle(): Layout {
  return layout('tma-128B', 128, 0, 7, 1024);
}

/** A tile of shared memory with its place in the CTA's allocation. */
export interface SharedTile {
  readonly name: string;
  readonly layout: Layout;
  readonly rows: number;
  /** Byte offset in the CTA's dynamic shared memory. */
  readonly base: number;
  readonly bytes: number;
}
