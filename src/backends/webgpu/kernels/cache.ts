/**
 * What appending to quantized keys and values takes besides quantizing: copies of the first rows, and wider scales of
 * V.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { type KeyValueLayout, OWN_TILE, params, SEQUENCE, tables, VALUE_GROUP } from './layout.ts';
import { KEY_BLOCK, type ValueScaling, valueScale } from './prepare.ts';
import { statisticsVectors } from './statistics.ts';
import { maskLoader } from './storage.ts';

const THREADS = 256;

export const COPY_ROWS_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'headStride',
  'tokenStride',
  'base',
  'rowsPerHead',
  'rowBase',
] as const;

/** 32-bit words of a copied row: whole vectors of 16 bytes. */
export const copiedRowWords = (dtype: DType, dim: number): number =>
  Math.ceil((dim * (dtype === 'float32' ? 1 : 0.5)) / 4) * 4;

/** Copies rows of K or V, bit for bit, each to the start of a row of whole vectors. */
export function copyRowsKernel(dtype: DType, operand: 'k' | 'v', dim: number): string {
  const words = copiedRowWords(dtype, dim);
  const source = operand === 'k' ? SEQUENCE.kSource : SEQUENCE.vSource;
  const load =
    dtype === 'float32'
      ? `if (word < ${dim}u) { bits = src[at + word]; }`
      : `for (var half = 0u; half < 2u; half++) {
      let i = at + 2u * word + half;
      if (2u * word + half < ${dim}u) { bits |= ((src[i >> 1u] >> ((i & 1u) * 16u)) & 0xffffu) << (16u * half); }
    }`;
  return `
${params(0, COPY_ROWS_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> src: array<u32>;
@group(0) @binding(3) var<storage, read_write> rows: array<u32>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let row_at = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + first;
  for (var item = lid; item < count * ${words}u; item += ${THREADS}u) {
    let row = item / ${words}u;
    let word = item % ${words}u;
    let at = sequence_field(sequence, ${source}u) - P.base + head * P.headStride + (first + row) * P.tokenStride;
    var bits = 0u;
    ${load}
    rows[(row_at + row) * ${words}u + word - P.rowBase] = bits;
  }
}`;
}

export const FLAG_KEYS_PARAMS = [
  'tileStart',
  'sequencesAt',
  'tilesAt',
  'firstAdded',
  'maskKeyStride',
  'maskBase',
  'visibleBase',
] as const;

/**
 * Flags of a cache's keys, as the statistics read them: 1 for those that count. Keys before `firstAdded` do, and where there is
 * no mask of those added, these do too.
 */
export function flagKeysKernel(masked: boolean): string {
  return `
${params(0, FLAG_KEYS_PARAMS)}
${tables(1)}
${masked ? maskLoader(2, 'bool') : ''}
@group(0) @binding(3) var<storage, read_write> visible: array<u32>;

@compute @workgroup_size(${KEY_BLOCK})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let tile = P.tileStart + group.x;
  let sequence = tile_field(tile, 0u);
  let token = tile_field(tile, 1u) + lid;
  if (lid >= tile_field(tile, 2u)) { return; }
  var flag = 1u;
  ${
    masked
      ? `if (token >= P.firstAdded) {
    flag = u32(mask_at(sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + (token - P.firstAdded) * P.maskKeyStride) != 0u);
  }`
      : ''
  }
  visible[sequence_field(sequence, ${SEQUENCE.keyRow}u) + token - P.visibleBase] = flag;
}`;
}

export const WIDEN_VALUES_PARAMS = [
  'tileStart',
  'headStart',
  'sequences',
  'chunks',
  'newChunks',
  'sequencesAt',
  'tilesAt',
  'rowsPerHead',
  'rowBase',
  'partialBase',
  'newPartialBase',
] as const;

interface WidenConfig {
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
  readonly values: ValueScaling;
  readonly layout: KeyValueLayout;
}

const newLargest = (statistics: number): string => `
fn new_largest(record: u32, chunks: u32) -> vec4<f32> {
  var largest = vec4<f32>();
  for (var chunk = 0u; chunk < chunks; chunk++) { largest = max(largest, new_partials[record + chunk * ${statistics}u]); }
  return largest;
}`;

/**
 * Multiplies a block of stored values with what their channels' scales become once new tokens count; mostly nothing to
 * do.
 */
export function widenValuesKernel({ headDimPadded, valueDimPadded, values, layout }: WidenConfig): string {
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  // A word holds two channels of a key (rows), or two keys of a channel (tiles).
  const [low, high] =
    layout === 'rows'
      ? [`word % ${valueDimPadded / 2}u * 2u`, `word % ${valueDimPadded / 2}u * 2u + 1u`]
      : [`word / ${VALUE_GROUP / 2}u % ${valueDimPadded}u`, `word / ${VALUE_GROUP / 2}u % ${valueDimPadded}u`];
  return `
${params(0, WIDEN_VALUES_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> new_partials: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;
var<workgroup> factors: array<f32, ${valueDimPadded}>;
var<workgroup> changed: atomic<u32>;
${valueScale(statistics, values)}
${newLargest(statistics)}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let place = head * P.sequences + sequence;
  for (var i = lid; i < ${valueDimPadded / 4}u; i += ${THREADS}u) {
    let held = largest_values(place * P.chunks * ${statistics}u + ${headDimPadded / 4}u + i - P.partialBase, P.chunks);
    let added = new_largest(place * P.newChunks * ${statistics}u + ${headDimPadded / 4}u + i - P.newPartialBase, P.newChunks);
    let factor = scale_of(held, 1) * scale_of(max(held, added), -1);
    for (var e = 0u; e < 4u; e++) { factors[4u * i + e] = factor[e]; }
    if (any(factor != vec4<f32>(1.0))) { atomicStore(&changed, 1u); }
  }
  workgroupBarrier();
  if (atomicLoad(&changed) == 0u) { return; }
  let block = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + tile_field(tile, 1u);
  for (var word = lid; word < ${(KEY_BLOCK * valueDimPadded) / 2}u; word += ${THREADS}u) {
    let at = block * ${valueDimPadded / 2}u + word - P.rowBase;
    values[at] = pack2x16float(unpack2x16float(values[at]) * vec2<f32>(factors[${low}], factors[${high}]));
  }
}`;
}

/** Merges the maxima of V over the new tokens into the maxima over the tokens held. */
export function joinMaximaKernel({ headDimPadded, valueDimPadded }: WidenConfig): string {
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  return `
${params(0, WIDEN_VALUES_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read_write> partials: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> new_partials: array<vec4<f32>>;
${newLargest(statistics)}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let place = (P.headStart + group.y) * P.sequences + tile_field(P.tileStart + group.x, 0u);
  for (var i = lid; i < ${valueDimPadded / 4}u; i += ${THREADS}u) {
    let at = place * P.chunks * ${statistics}u + ${headDimPadded / 4}u + i - P.partialBase;
    let added = new_largest(place * P.newChunks * ${statistics}u + ${headDimPadded / 4}u + i - P.newPartialBase, P.newChunks);
    partials[at] = max(partials[at], added);
  }
}`;
}
