/**
 * Block masks in attention kernels: a tile of keys without a block that is computed is left out, and one of which a part is
 * hidden excludes those scores. All is read from the caller's map, whatever the sizes of its blocks.
 */
import { bitsLoader, EXCLUDED, range } from './storage.ts';

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

/** Binding 9, the caller's map. */
export const BLOCK_DECLARATIONS = bitsLoader('block_map', 'block_at', 9, 'bool');

/** Before the loop over tiles of keys: where the map of the head begins, and the first and last row of blocks of the workgroup's rows. */
export const MAP_AT = `let map_at = sequence * P.mapBatchStride + head * P.mapHeadStride + P.mapOffset;
  let map_rows = vec2<u32>(first_row, first_row + count - 1u) / P.blockRows;`;

/** Blocks of keys that are looked up together, and tell of all tiles that they hold: a lookup waits as long as a step of attention takes. */
const WINDOW = 32;
/** Lookups that are under way together: the first brings what the others read near, and software drivers compile each for seconds. */
const AHEAD = 4;

/**
 * `next_tile(map_at, map_rows, seen, from, end, length)`: the first tile of keys from `from` on of which a block is computed. It begins at
 * `start`, or at `end` where there is none; a part of it is hidden where `cut` is not 0. Begin with {@link NOTHING_SEEN}.
 */
export function nextTile(keys: number): string {
  if (keys > WINDOW) throw new Error(`a tile of ${keys} keys may have more than ${WINDOW} blocks`);
  const look = range(AHEAD).map((i) => `let b_${i} = block_at(at + min(first + i + ${i}u, last) * P.mapKeyStride);`);
  const join = range(AHEAD).map((i) => `bits |= select(0u, 1u, b_${i} != 0u) << (i + ${i}u);`);
  return `
// Of ${WINDOW} blocks of keys from \`first\` on a bit each: whether some row's is computed, and whether some row's is hidden.
struct Seen { start: i32, cut: u32, first: u32, computed: u32, hidden: u32 }

fn look(map_at: u32, map_rows: vec2<u32>, first: u32, last: u32) -> Seen {
  var computed = 0u;
  var hidden = 0u;
  for (var row = map_rows.x; row <= map_rows.y; row++) {
    let at = map_at + row * P.mapRowStride;
    var bits = 0u;
    for (var i = 0u; i < ${WINDOW}u; i += ${AHEAD}u) {
      ${look.join(' ')}
      ${join.join(' ')}
    }
    computed |= bits;
    hidden |= ~bits;
  }
  return Seen(0, 0u, first, computed, hidden);
}

fn next_tile(map_at: u32, map_rows: vec2<u32>, before: Seen, from_key: i32, end_key: i32, length: i32) -> Seen {
  var seen = before;
  var start = from_key;
  while (start < end_key) {
    let first = u32(start) / P.blockKeys;
    let last = (u32(min(start + ${keys}, length)) - 1u) / P.blockKeys;
    let end = u32(length - 1) / P.blockKeys;
    if (first < seen.first || last - seen.first >= ${WINDOW}u) { seen = look(map_at, map_rows, first, end); }
    let shift = first - seen.first;
    let own = (0xffffffffu >> (31u - (last - first))) << shift;
    if ((seen.computed & own) != 0u) {
      seen.start = start;
      seen.cut = seen.hidden & own;
      return seen;
    }
    let ahead = seen.computed >> shift;
    let next = min(first + select(firstTrailingBit(ahead), ${WINDOW}u - shift, ahead == 0u), end + 1u);
    start = max(start + ${keys}, i32(min(next * P.blockKeys / ${keys}u * ${keys}u, u32(end_key))));
  }
  seen.start = end_key;
  seen.cut = 0u;
  return seen;
}`;
}

/** Before the first call of `next_tile`. */
export const NOTHING_SEEN = 'Seen(0, 0u, 0xffffffffu, 0u, 0u)';

/** The call of `next_tile` behind what `seen` has; expects {@link MAP_AT}. */
export const nextTileFrom = (seen: string, from: string): string =>
  `next_tile(map_at, map_rows, ${seen}, ${from}, key_end, length)`;

/** `has_computed(map_at, rows, keys)`: a block of these first and last rows and keys is computed. */
export const HAS_COMPUTED = `
fn has_computed(map_at: u32, rows: vec2<u32>, keys: vec2<u32>) -> bool {
  for (var row = rows.x / P.blockRows; row <= rows.y / P.blockRows; row++) {
    for (var key = keys.x / P.blockKeys; key <= keys.y / P.blockKeys; key++) {
      if (block_at(map_at + row * P.mapRowStride + key * P.mapKeyStride) != 0u) { return true; }
    }
  }
  return false;
}`;

/**
 * At the start of a loop's body: leaves a hidden tile out, where one has the rows of all heads of a group. Rows are `first_token` to `last_token`
 * of each, and every score is looked up by {@link isHidden}.
 */
export const leaveOutHiddenOfGroup = (keys: number, group: number): string => `
    var computed = false;
    for (var member = 0u; member < ${group}u; member++) {
      computed = computed || has_computed(map_at + member * P.mapHeadStride, vec2<u32>(first_token, last_token), vec2<u32>(u32(start), u32(min(start + ${keys}, length)) - 1u));
    }
    if (!computed) { continue; }`;

/** The block of a key is hidden; `map`: where the map's row of blocks begins. */
export const isHidden = (map: string, key: string): string =>
  `block_at(${map} + u32(${key}) / P.blockKeys * P.mapKeyStride) == 0u`;

/** Excludes a score of a hidden block in a tile that is cut; rows and keys beyond the last may be anything. */
export const excludeHidden = (f: string, row: string, key: string): string =>
  `if (cut && ${isHidden(`map_at + (first_row + ${row}) / P.blockRows * P.mapRowStride`, key)}) { ${f} = ${EXCLUDED}; }`;
