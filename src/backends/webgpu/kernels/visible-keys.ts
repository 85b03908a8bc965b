/**
 * Which keys a mask lets any row see, so that K's mean and V's scales are taken over those keys only. A boolean mask
 * hides a key where it is false. An additive one hides it at -Infinity and far below the largest entry of the row:
 * -1e4, -65504 and -FLT_MAX are all in use for "not this one".
 */
import type { MaskDType } from '../../../tensor/dtype.ts';
import { MASK_PARAMS, params, SEQUENCE, tables } from './layout.ts';
import { maskLoader } from './storage.ts';

/** Keys of a workgroup of {@link visibleKeysKernel}, and rows of one of {@link maskMaximaKernel}. */
export const VISIBLE_KEYS = 64;
export const MAXIMA_ROWS = 16;

/** An entry this far below the largest of its row hides its key: its probability is 0 in every format. */
export const HIDDEN_BELOW = '1000.0';

const THREADS = 256;

export const MASK_MAXIMA_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  ...MASK_PARAMS,
  'rowsPerHead',
  'maximaBase',
] as const;

export const VISIBLE_KEYS_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'groupSize',
  'memberStart',
  'memberEnd',
  'rowStart',
  'rowEnd',
  'joined',
  ...MASK_PARAMS,
  'rowsPerHead',
  'maximaBase',
  'keyRowsPerHead',
  'visibleBase',
] as const;

/** Whether each row is looked at within its band only: where a mask's rows differ, or its maxima do. */
export interface VisibleKeysConfig {
  readonly mask: MaskDType;
  readonly banded: boolean;
}

/** The largest finite entry of each row of an additive mask, among the keys of the row's band. */
export function maskMaximaKernel({ mask, banded }: VisibleKeysConfig): string {
  const lanes = THREADS / MAXIMA_ROWS;
  return `
${params(0, MASK_MAXIMA_PARAMS)}
${tables(1)}
${maskLoader(5, mask)}
@group(0) @binding(6) var<storage, read_write> maxima: array<f32>;
var<workgroup> red: array<f32, ${THREADS}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let row = tile_field(tile, 1u) + lid / ${lanes}u;
  let inside = lid / ${lanes}u < tile_field(tile, 2u);
  let length = sequence_field(sequence, ${SEQUENCE.keyLength}u);
  let at = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + row * P.maskQueryStride;
  let low = ${banded ? `max(0, i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(row))` : '0'};
  let high = ${banded ? `min(i32(length), i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(row) + 1)` : 'i32(length)'};
  var largest = -3.4028234e38f;
  if (inside && low < high) {
    for (var key = u32(low) + lid % ${lanes}u; key < u32(high); key += ${lanes}u) {
      let bits = mask_at(at + key * P.maskKeyStride);
      if ((bits & 0x7f800000u) != 0x7f800000u) { largest = max(largest, bitcast<f32>(bits)); }
    }
  }
  red[lid] = largest;
  workgroupBarrier();
  for (var step = ${lanes / 2}u; step > 0u; step >>= 1u) {
    if (lid % ${lanes}u < step) { red[lid] = max(red[lid], red[lid + step]); }
    workgroupBarrier();
  }
  if (inside && lid % ${lanes}u == 0u) {
    maxima[head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + row - P.maximaBase] = red[lid];
  }
}`;
}

/**
 * A flag for each key: whether some row of some query head of its group may see it. A launch looks at some of the
 * group's heads and rows, and joins what earlier launches found.
 */
export function visibleKeysKernel({ mask, banded }: VisibleKeysConfig): string {
  const outside = `i32(key) < i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(row) || i32(key) > i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(row)`;
  const sees =
    mask === 'bool'
      ? 'found = bits != 0u;'
      : `if ((bits & 0x7f800000u) == 0x7f800000u) { found = bits != 0xff800000u; }
        else {
          let largest = maxima[head * P.rowsPerHead + query_row + row - P.maximaBase];
          found = bitcast<f32>(bits) >= largest - ${HIDDEN_BELOW};
        }`;
  return `
${params(0, VISIBLE_KEYS_PARAMS)}
${tables(1)}
${mask === 'bool' ? '' : '@group(0) @binding(4) var<storage, read> maxima: array<f32>;'}
${maskLoader(5, mask)}
@group(0) @binding(6) var<storage, read_write> visible: array<u32>;
var<workgroup> seen: array<atomic<u32>, ${VISIBLE_KEYS}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let tile = P.tileStart + group.x;
  let key_head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let local = lid % ${VISIBLE_KEYS}u;
  let key = tile_field(tile, 1u) + local;
  let inside = local < tile_field(tile, 2u);
  let query_row = sequence_field(sequence, ${SEQUENCE.queryRow}u);
  let rows = min(P.rowEnd, sequence_field(sequence, ${SEQUENCE.queryLength}u));
  if (inside) {
    var found = false;
    for (var member = P.memberStart; member < P.memberEnd && !found; member++) {
      let head = key_head * P.groupSize + member;
      let at = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + key * P.maskKeyStride;
      for (var row = P.rowStart + lid / ${VISIBLE_KEYS}u; row < rows && !found; row += ${THREADS / VISIBLE_KEYS}u) {
        ${banded ? `if (${outside}) { continue; }` : ''}
        let bits = mask_at(at + row * P.maskQueryStride);
        ${sees}
      }
    }
    if (found) { atomicOr(&seen[local], 1u); }
  }
  workgroupBarrier();
  if (inside && lid < ${VISIBLE_KEYS}u) {
    let to = key_head * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + key - P.visibleBase;
    var flag = atomicLoad(&seen[local]);
    if (P.joined != 0u) { flag |= visible[to]; }
    visible[to] = flag;
  }
}`;
}
