/**
 * What the kernels share about memory: the table of sequences and tiles, and the rows of the scratch buffers.
 *
 * A row of quantized Q or K is `D / 16` vectors of 16 INT8 values and one vector of its own facts, so that a kernel
 * gets a token's scale from the same place as its values, whatever the granularity. The facts of a key: its scale, its
 * flags, in tiles the joined flags, and the scale of its V where that is in INT8.
 *
 * K and V are in rows for the tiled kernels, and in tiles for subgroup matrices.
 */

import { roundUp } from './storage.ts';

/** How quantized K and V lie in memory. */
export type KeyValueLayout = 'rows' | 'tiles';

/**
 * Keys of a tile of K and of V, where they are in tiles. K: for each 32 channels, 32 bytes of each key; then the facts
 * of each key, of which the first key's third word joins the flags of all. V: for each {@link VALUE_GROUP} keys, their
 * values of each channel. Both take as much memory as rows do.
 */
export const KEY_TILE = 32;

/** Keys whose values of one channel lie next to each other in a tile of V. */
export const VALUE_GROUP = 16;

/** Words of a sequence's record in the tables. Offsets into tensors count elements and are modulo 2^32. */
export const SEQUENCE = {
  queryLength: 0,
  keyLength: 1,
  queryRow: 2,
  keyRow: 3,
  lower: 4,
  upper: 5,
  output: 6,
  lse: 7,
  mask: 8,
  qSource: 9,
  kSource: 10,
  vSource: 11,
  /** Keys that some row may see by the band: from the first up to, not including, the second. */
  visibleFrom: 12,
  visibleTo: 13,
} as const;

export const SEQUENCE_WORDS = 14;

/** Parameters: where the quantized rows of Q and K are. */
export const CODE_ROW_PARAMS = ['queryRowsPerHead', 'keyRowsPerHead', 'queryRowBase', 'keyRowBase'] as const;

/** Parameters: where the caller's mask is. */
export const MASK_PARAMS = ['maskHeadStride', 'maskQueryStride', 'maskKeyStride', 'maskBase'] as const;

/** A tile's record: sequence, first token, number of tokens. */
export const TILE_WORDS = 3;

/** `sequence_field(sequence, field)`; expects `P.sequencesAt`. */
export function sequenceTable(binding: number): string {
  return `
@group(0) @binding(${binding}) var<storage, read> tables: array<u32>;
fn sequence_field(sequence: u32, field: u32) -> u32 { return tables[P.sequencesAt + sequence * ${SEQUENCE_WORDS}u + field]; }`;
}

/** `sequence_field(sequence, field)` and the tile accessors; expects `P.sequencesAt` and `P.tilesAt`. */
export function tables(binding: number): string {
  return `${sequenceTable(binding)}
fn tile_field(tile: u32, field: u32) -> u32 { return tables[P.tilesAt + tile * ${TILE_WORDS}u + field]; }`;
}

/** The workgroup's tile and head, and where the tile's tokens are; expects `P.tileStart`, `P.headStart` and the {@link tables}. */
export const OWN_TILE = `\
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let first = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);`;

/** Above this, the channels of V are divided among workgroups, whose threads could not hold a row's sums. */
const WHOLE_VALUES = 256;

/** A head dim as the kernels see it: a multiple of 32 channels, and of 64 where they are divided. */
export const padDim = (dim: number): number => roundUp(dim, dim > WHOLE_VALUES ? 64 : 32);

/** Workgroups that divide the channels of V, each over all keys. */
export const valueSlices = (valueDimPadded: number): number => (valueDimPadded > WHOLE_VALUES ? 2 : 1);

/** Vectors of 16 bytes in a row of quantized Q or K. */
export const rowVectors = (headDimPadded: number): number => headDimPadded / 16 + 1;

/** Bits of a K row's flags. */
export const FLAG_NONFINITE_K = 1;
export const FLAG_NONFINITE_V = 2;
/** K's mean was not subtracted from this key: its scores lack no `q . mean(K)`. */
export const FLAG_UNSMOOTHED = 4;
/** Joined flags only: the keys of this tile have scales of their own. */
export const FLAG_OWN_SCALES = 8;

/** Flags that make a row NaN when it attends to their token. */
export const POISON = FLAG_NONFINITE_K | FLAG_NONFINITE_V;

/** A uniform struct `P` of 32-bit fields. */
export function params(binding: number, fields: readonly string[]): string {
  return `struct Params { ${fields.map((field) => `${field}: ${FLOAT_FIELDS.has(field) ? 'f32' : 'u32'}`).join(', ')} }
@group(0) @binding(${binding}) var<uniform> P: Params;`;
}

const FLOAT_FIELDS: ReadonlySet<string> = new Set([
  'scoreScale',
  'smScale',
  'softcap',
  'inverseQuarterSoftcap',
  'wanted',
  'leastSimilarity',
]);

/** The bytes of such a struct; unsigned fields are taken modulo 2^32. */
export function encodeParams(fields: readonly string[], values: Readonly<Record<string, number>>): ArrayBuffer {
  const bytes = new ArrayBuffer(Math.ceil(fields.length / 4) * 16);
  const view = new DataView(bytes);
  fields.forEach((field, i) => {
    const value = values[field];
    if (value === undefined) throw new Error(`parameter '${field}' has no value`);
    if (FLOAT_FIELDS.has(field)) view.setFloat32(i * 4, value, true);
    else view.setUint32(i * 4, wrap32(value), true);
  });
  return bytes;
}

/** An integer modulo 2^32: offsets wrap in WGSL and come out right once they are relative to their binding. */
export function wrap32(value: number): number {
  const rest = value % 2 ** 32;
  return rest < 0 ? rest + 2 ** 32 : rest;
}
