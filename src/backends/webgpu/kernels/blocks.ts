/**
 * Block masks in attention kernels: a tile of keys without a block that is computed is left out, and one of which a part is
 * hidden excludes those scores. All is read from the caller's map, whatever the sizes of its blocks.
 */
import { bitsLoader, EXCLUDED } from './storage.ts';

/** Parameters of kernels with a block mask; strides of the map in its bytes. */
export const BLOCK_PARAMS = [
  'blockRows',
  'blockKeys',
  'mapBatchStride',
  'mapHeadStride',
  'mapRowStride',
  'mapKeyStride',
  'mapOffset',
] as const;

const HAS_COMPUTED = 1;
const HAS_HIDDEN = 2;

/** Binding 9, and `blocks_of(map_at, rows, keys)`: what the blocks of these first and last rows and keys are. */
export const BLOCK_DECLARATIONS = `
${bitsLoader('block_map', 'block_at', 9, 'bool')}
fn blocks_of(map_at: u32, rows: vec2<u32>, keys: vec2<u32>) -> u32 {
  var found = 0u;
  for (var row = rows.x / P.blockRows; row <= rows.y / P.blockRows; row++) {
    for (var key = keys.x / P.blockKeys; key <= keys.y / P.blockKeys; key++) {
      found |= select(${HAS_COMPUTED}u, ${HAS_HIDDEN}u, block_at(map_at + row * P.mapRowStride + key * P.mapKeyStride) == 0u);
    }
  }
  return found;
}`;

/** Before the loop over tiles of keys. */
export const MAP_AT = 'let map_at = sequence * P.mapBatchStride + head * P.mapHeadStride + P.mapOffset;';

/** What the blocks are of a tile of keys that starts at `start`. */
const blocksAt = (start: string, keys: number): string =>
  `blocks_of(map_at, vec2<u32>(first_row, first_row + count - 1u), vec2<u32>(u32(${start}), u32(min(${start} + ${keys}, length)) - 1u))`;

/**
 * `next_tile(map_at, rows, from, end, length)`: where the first tile of keys from `from` on begins of which a block is computed, or `end`
 * where there is none; and what its blocks are, for {@link hasHidden}.
 */
export const nextTile = (keys: number): string => `
fn next_tile(map_at: u32, rows: vec2<u32>, from_key: i32, end_key: i32, length: i32) -> vec2<i32> {
  for (var start = from_key; start < end_key; start += ${keys}) {
    let last = u32(min(start + ${keys}, length)) - 1u;
    let found = blocks_of(map_at, rows, vec2<u32>(u32(start), last));
    if ((found & ${HAS_COMPUTED}u) != 0u) { return vec2<i32>(start, i32(found)); }
  }
  return vec2<i32>(end_key, 0);
}`;

/** A part of a tile of `next_tile` is hidden. */
export const hasHidden = (found: string): string => `(${found} & ${HAS_HIDDEN}) != 0`;

/** At the start of the loop's body: leaves a hidden tile out, and says of others whether they are `cut`. */
export const leaveOutHidden = (keys: number): string => `
    let blocks = ${blocksAt('start', keys)};
    if ((blocks & ${HAS_COMPUTED}u) == 0u) { continue; }
    let cut = (blocks & ${HAS_HIDDEN}u) != 0u;`;

/**
 * {@link leaveOutHidden} where a tile has the rows of all heads of a group: rows are `first_token` to `last_token` of each,
 * and every score is looked up by {@link isHidden}.
 */
export const leaveOutHiddenOfGroup = (keys: number, group: number): string => `
    var blocks = 0u;
    for (var member = 0u; member < ${group}u; member++) {
      blocks |= blocks_of(map_at + member * P.mapHeadStride, vec2<u32>(first_token, last_token), vec2<u32>(u32(start), u32(min(start + ${keys}, length)) - 1u));
    }
    if ((blocks & ${HAS_COMPUTED}u) == 0u) { continue; }`;

/** The block of a key is hidden; `map`: where the map's row of blocks begins. */
export const isHidden = (map: string, key: string): string =>
  `block_at(${map} + u32(${key}) / P.blockKeys * P.mapKeyStride) == 0u`;

/** Excludes a score of a hidden block in a tile that is cut; rows and keys beyond the last may be anything. */
export const excludeHidden = (f: string, row: string, key: string): string =>
  `if (cut && ${isHidden(`map_at + (first_row + ${row}) / P.blockRows * P.mapRowStride`, key)}) { ${f} = ${EXCLUDED}; }`;
