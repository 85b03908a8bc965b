/**
 * Quantization to FP4 (SageAttention3, arXiv 2505.11594), in the layout of `fp4.ts`. Every key, every row of Q and every
 * group of 16 keys' values has a power of two of its own around the scales of its blocks, so that appended tokens change
 * nothing that is stored; in what a sequence's power of two would leave to E4M3's subnormals, that is more accurate.
 *
 * What is not finite is stored as 0 and its token flagged, as in `prepare.ts`.
 */
import type { ScaleSearch } from '../../../quantization/fp4-blocks.ts';
import { INT_MAX, type QuerySmoothing } from '../../../quantization/schemes.ts';
import { ALIKE, fp4KeyWords, fp4Quantizer, fp4QueryVectors, fp4ValueWords, KEY_FACTS, VALUE_BLOCK } from './fp4.ts';
import { FLAG_NONFINITE_K, FLAG_NONFINITE_V, FLAG_UNSMOOTHED, OWN_TILE, params, SEQUENCE, tables } from './layout.ts';
import {
  KEY_BLOCK,
  largestOf16,
  loadMean,
  MAX4,
  PREPARE_KEY_VALUE_PARAMS,
  PREPARE_QUERY_PARAMS,
  type PrepareConfig,
  type PrepareQueryConfig,
  QUERY_BLOCK,
  rowMaximum,
  THREADS,
  valueMean,
  WORST_SMOOTHING,
} from './prepare.ts';
import { sinkParams, sinkReader } from './sinks.ts';
import { MEAN_FACTOR, statisticsVectors } from './statistics.ts';
import { decoder, INTEGERS_OF, NONFINITE, operandLoader, range } from './storage.ts';

export interface PrepareFp4KeyValueConfig extends PrepareConfig {
  readonly scaleSearch: ScaleSearch;
  readonly smoothV: boolean;
  /** Blocks of V: keys of a channel, as tensor cores need them, or channels of a key, which can be appended singly. */
  readonly valueBlocks: 'keys' | 'channels';
}

/** Channels past D are 0 in `x` and in the mean, so smoothing leaves them 0. */
const subtract = (mean: string, first: string) =>
  range(4)
    .map((i) => `x[${i}] -= ${mean}[${first} / 4u + ${i}u];`)
    .join(' ');

/** A word of four scales' codes, those of blocks `4 * word` to `4 * word + 3` of a row of `blocks`, out of floats in workgroup memory. */
const scaleWord = (array: string, row: string, word: string, blocks: number) =>
  `${range(4)
    .map(
      (i) =>
        `(select(0u, u32(${array}[${row} * ${blocks}u + min(4u * ${word} + ${i}u, ${blocks - 1}u)]), 4u * ${word} + ${i}u < ${blocks}u) << ${8 * i}u)`,
    )
    .join(' | ')}`;

/** Sizes of the values: `row_outer`, the scale of a group or of a key, and bit by bit whether its blocks run along the channels. */
function valueSizes({ valueDim, valueDimPadded, smoothV, valueBlocks }: PrepareFp4KeyValueConfig): string {
  const chunks = valueDimPadded / 16;
  return `
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    nonfinite = 0u;
    var x = load_v(vSource + row * P.vTokenStride + channel, min(16u, max(${valueDim}u, channel) - channel));
    if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_V}u); }
    ${smoothV ? subtract('value_means', 'channel') : ''}
    largest_partial[item] = ${largestOf16};
  }
  workgroupBarrier();
  if (lid < count) {${rowMaximum('largest', chunks)}
    row_max[lid] = largest;
  }
  workgroupBarrier();
  if (lid < count) {
    let own = row_max[lid];
    ${
      valueBlocks === 'channels'
        ? 'fine[lid] = 1u; row_outer[lid] = outer_scale(own);'
        : `// Zeros are exact at any scale.
    let group_first = lid / ${VALUE_BLOCK}u * ${VALUE_BLOCK}u;
    var least = 0.0;
    var most = 0.0;
    for (var row = group_first; row < min(count, group_first + ${VALUE_BLOCK}u); row++) {
      let size = row_max[row];
      most = max(most, size);
      if (size > 0.0) { least = select(min(least, size), size, least == 0.0); }
    }
    let differ = most > least * ${ALIKE}.0;
    fine[lid] = u32(differ);
    row_outer[lid] = outer_scale(select(most, own, differ));`
    }
  }
  workgroupBarrier();`;
}

/** Scales of V's blocks, as floats in `largest_partial`, and its codes. */
function storeValues({ valueDim, valueDimPadded, smoothV }: PrepareFp4KeyValueConfig): string {
  const chunks = valueDimPadded / 16;
  const words = fp4ValueWords(valueDimPadded);
  const codeWords = valueDimPadded / 8;
  const scaleWords = words - codeWords;
  const element = (row: string, channel: string) =>
    `value_at(vSource, ${row}, ${channel})${smoothV ? ` - value_means[(${channel}) / 4u][(${channel}) % 4u]` : ''}`;
  return `
  for (var item = lid; item < ${KEY_BLOCK * chunks}u; item += ${THREADS}u) {
    // Of a group, items are its channels, or the blocks of its keys one after the other.
    let group_first = item / ${valueDimPadded}u * ${VALUE_BLOCK}u;
    let place = item % ${valueDimPadded}u;
    if (group_first >= count) { continue; }
    // Said in full: a compiler may forget to clear what a loop declares.
    var x = array<vec4<f32>, 4>();
    if (fine[group_first] == 0u) {
      let outer = row_outer[group_first];
      for (var i = 0u; i < min(count - group_first, ${VALUE_BLOCK}u); i++) {
        if (place < ${valueDim}u) { x[i / 4u][i % 4u] = (${element('group_first + i', 'place')}) * outer; }
      }
    } else {
      let row = group_first + place / ${chunks}u;
      let channel = place % ${chunks}u * 16u;
      if (row < count) {
        x = load_v(vSource + row * P.vTokenStride + channel, min(16u, max(${valueDim}u, channel) - channel));
        ${smoothV ? subtract('value_means', 'channel') : ''}
        for (var i = 0u; i < 4u; i++) { x[i] *= row_outer[row]; }
      }
    }
    largest_partial[item] = f32(block_scale(x));
  }
  workgroupBarrier();
  for (var item = lid; item < count * ${codeWords}u; item += ${THREADS}u) {
    let row = item / ${codeWords}u;
    let channel = item % ${codeWords}u * 8u;
    let group = row / ${VALUE_BLOCK}u;
    var word = 0u;
    for (var half = 0u; half < 2u; half++) {
      var x = vec4<f32>();
      var scales = vec4<f32>();
      for (var i = 0u; i < 4u; i++) {
        let at = channel + 4u * half + i;
        if (at < ${valueDim}u) { x[i] = (${element('row', 'at')}) * row_outer[row]; }
        let own = (row % ${VALUE_BLOCK}u) * ${chunks}u + at / 16u;
        scales[i] = e4m3_value(u32(largest_partial[group * ${valueDimPadded}u + select(at, own, fine[row] != 0u)]));
      }
      word |= codes_of(x * (1.0 / scales)) << (16u * half);
    }
    values[(row_at + row) * ${words}u + channel / 8u - P.vRowBase] = word;
  }
  for (var item = lid; item < ${KEY_BLOCK * scaleWords}u; item += ${THREADS}u) {
    let row = item / ${scaleWords}u;
    let word = item % ${scaleWords}u;
    let group_first = row / ${VALUE_BLOCK}u * ${VALUE_BLOCK}u;
    if (group_first >= count) { continue; }
    let at = (row_at + row) * ${words}u + ${codeWords}u + word - P.vRowBase;
    if (fine[group_first] == 0u) {
      let quad = (row % ${VALUE_BLOCK}u) * ${scaleWords}u + word;
      if (quad < ${valueDimPadded / 4}u) {
        values[at] = ${scaleWord('largest_partial', `(group_first / ${VALUE_BLOCK}u)`, 'quad', valueDimPadded)};
      }
    } else if (row < count) {
      values[at] = ${scaleWord('largest_partial', 'row', 'word', chunks)};
    }
  }`;
}

/** K and V of up to a block of keys. In a cache a tile may start inside a group of keys: blocks run along channels there. */
export function prepareFp4KeyValueKernel(config: PrepareFp4KeyValueConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDimPadded, smoothK, smoothV, scaleSearch } = config;
  const [chunks, valueChunks] = [headDimPadded / 16, valueDimPadded / 16];
  const words = fp4KeyWords(headDimPadded);
  const codeWords = headDimPadded / 8;
  const scaleWords = words - codeWords - 1;
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  const needsPartials = smoothK || smoothV;
  const loadK = `load_k(kSource + row * P.kTokenStride + channel, min(16u, max(${headDim}u, channel) - channel))`;
  return `
${params(0, PREPARE_KEY_VALUE_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('k', 2, dtype, access)}
${operandLoader('v', 3, dtype, 'scalar')}
${needsPartials ? '@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;' : ''}
@group(0) @binding(5) var<storage, read_write> keys: array<u32>;
@group(0) @binding(6) var<storage, read_write> values: array<u32>;
${smoothK ? `var<workgroup> mean: array<vec4<f32>, ${headDimPadded / 4}>;` : ''}
${smoothV ? `var<workgroup> value_means: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
var<workgroup> largest_partial: array<f32, ${KEY_BLOCK * Math.max(chunks, valueChunks)}>;
${smoothK ? `var<workgroup> plain_partial: array<f32, ${KEY_BLOCK * chunks}>;` : ''}
var<workgroup> row_max: array<f32, ${KEY_BLOCK}>;
var<workgroup> row_outer: array<f32, ${KEY_BLOCK}>;
var<workgroup> fine: array<u32, ${KEY_BLOCK}>;
var<workgroup> flags: array<atomic<u32>, ${KEY_BLOCK}>;
${MAX4}
${needsPartials ? MEAN_FACTOR(statistics) : ''}
${smoothV ? valueMean(statistics) : ''}
${fp4Quantizer(scaleSearch)}
fn value_at(source: u32, row: u32, channel: u32) -> f32 { return element_v(source + row * P.vTokenStride + channel); }

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let kSource = sequence_field(sequence, ${SEQUENCE.kSource}u) - P.kBase + head * P.kHeadStride + first * P.kTokenStride;
  let vSource = sequence_field(sequence, ${SEQUENCE.vSource}u) - P.vBase + head * P.vHeadStride + first * P.vTokenStride;
  let row_at = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + first;
${needsPartials ? `  let record = ((head * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;` : ''}
${smoothK ? loadMean(headDimPadded / 4, statistics) : ''}
${
  smoothV
    ? `  for (var i = lid; i < ${valueDimPadded / 4}u; i += ${THREADS}u) {
    value_means[i] = value_mean(record + ${(headDimPadded + valueDimPadded) / 4}u + i, P.chunks) * mean_factor(record, P.chunks);
  }`
    : ''
}
  workgroupBarrier();
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    nonfinite = 0u;
    var x = ${loadK};
    ${smoothK ? `plain_partial[item] = ${largestOf16}; ${subtract('mean', 'channel')}` : ''}
    largest_partial[item] = ${largestOf16};
    if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_K}u); }
  }
  workgroupBarrier();
  var key_outer = 1.0;
  if (lid < count) {${rowMaximum('largest', chunks)}
    ${
      smoothK
        ? `${rowMaximum('plain', chunks)}
    if (largest > ${WORST_SMOOTHING}.0 * plain) { largest = plain; atomicOr(&flags[lid], ${FLAG_UNSMOOTHED}u); }`
        : ''
    }
    key_outer = outer_scale(largest);
    row_outer[lid] = key_outer;
  }
  workgroupBarrier();
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    var x = ${loadK};
    ${smoothK ? `if ((atomicLoad(&flags[row]) & ${FLAG_UNSMOOTHED}u) == 0u) { ${subtract('mean', 'channel')} }` : ''}
    for (var i = 0u; i < 4u; i++) { x[i] *= row_outer[row]; }
    let scale = block_scale(x);
    largest_partial[item] = f32(scale);
    let inverse = 1.0 / e4m3_value(scale);
    let at = (row_at + row) * ${words}u + channel / 8u - P.kRowBase;
    keys[at] = codes_of(x[0] * inverse) | (codes_of(x[1] * inverse) << 16u);
    keys[at + 1u] = codes_of(x[2] * inverse) | (codes_of(x[3] * inverse) << 16u);
  }
  workgroupBarrier();
  for (var item = lid; item < count * ${scaleWords}u; item += ${THREADS}u) {
    let row = item / ${scaleWords}u;
    let word = item % ${scaleWords}u;
    keys[(row_at + row) * ${words}u + ${codeWords}u + word - P.kRowBase] = ${scaleWord('largest_partial', 'row', 'word', chunks)};
  }
  workgroupBarrier();
${valueSizes(config)}
${storeValues(config)}
  workgroupBarrier();
  if (lid < count) {
    keys[(row_at + lid) * ${words}u + ${words - 1}u - P.kRowBase] =
      (reciprocal_exponent(key_outer) << ${KEY_FACTS.exponent}u) | (atomicLoad(&flags[lid]) << ${KEY_FACTS.flags}u)
      | (reciprocal_exponent(row_outer[lid]) << ${KEY_FACTS.valueExponent}u) | (fine[lid] << ${KEY_FACTS.fineValues}u);
  }
}`;
}

export interface PrepareFp4QueryConfig extends PrepareQueryConfig {
  readonly scaleSearch: ScaleSearch;
  /** What is subtracted from rows, out of buffer `queryMeans`. */
  readonly smoothQ: QuerySmoothing | false;
  /** FP4, or in INT8 with a scale for each 16 channels: over a cache, where only keys and values are FP4. */
  readonly format: 'fp4' | 'int8';
}

export const PREPARE_FP4_QUERY_PARAMS = [...PREPARE_QUERY_PARAMS, 'meanGroups', 'meanBase'] as const;

/** Which mean a tile's rows share: that of its block, or of its sequence. `row`: of the tile within its head. */
export const meanGroup = (smoothQ: QuerySmoothing, row: string): string =>
  smoothQ === 'sequence' ? 'sequence' : `(${row}) / ${QUERY_BLOCK}u`;

export function prepareFp4QueryKernel(config: PrepareFp4QueryConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDimPadded, smoothK, smoothQ, scaleSearch, format, sinks } =
    config;
  const chunks = headDimPadded / 16;
  const words = fp4QueryVectors(headDimPadded) * 4;
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  const load = `load_q(source + row * P.tokenStride + channel, min(16u, max(${headDim}u, channel) - channel))`;
  const quantize =
    format === 'fp4'
      ? `let scale = e4m3_value(block_scale(x));
    let inverse = 1.0 / scale;
    let words = vec4<u32>(${range(4)
      .map((i) => `doubled_of(x[${i}] * inverse)`)
      .join(', ')});`
      : `let largest = largest_of(x);
    let scale = largest * ${2 / INT_MAX.int8}f;
    let inverse = select(0.0, ${INT_MAX.int8}.0 / max(largest, 1.0e-36f), largest > 1.0e-36f);
    let words = vec4<u32>(${range(4)
      .map((i) => `integers_of(x[${i}] * inverse)`)
      .join(', ')});`;
  return `
${params(0, [...PREPARE_FP4_QUERY_PARAMS, ...sinkParams(sinks)])}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('q', 2, dtype, access)}
@group(0) @binding(3) var<storage, read_write> rows: array<u32>;
${smoothK ? '@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;' : ''}
${smoothQ ? '@group(0) @binding(5) var<storage, read> query_means: array<vec4<f32>>;' : ''}
${smoothK ? `var<workgroup> mean: array<vec4<f32>, ${headDimPadded / 4}>;` : ''}
${smoothQ ? `var<workgroup> query_mean: array<vec4<f32>, ${headDimPadded / 4}>;` : ''}
var<workgroup> largest_partial: array<f32, ${QUERY_BLOCK * chunks}>;
var<workgroup> row_outer: array<f32, ${QUERY_BLOCK}>;
var<workgroup> flags: array<atomic<u32>, ${QUERY_BLOCK}>;
${MAX4}
${smoothK ? MEAN_FACTOR(statistics) : ''}
${fp4Quantizer(scaleSearch)}${sinkReader(sinks)}${INTEGERS_OF}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let source = sequence_field(sequence, ${SEQUENCE.qSource}u) - P.base + head * P.headStride + first * P.tokenStride;
  let row_in_head = sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
  let row_at = head * P.queryRowsPerHead + row_in_head;
${
  smoothK
    ? `  let record = ((head / P.groupSize * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;
${loadMean(headDimPadded / 4, statistics)}`
    : ''
}
${
  smoothQ
    ? `  for (var i = lid; i < ${headDimPadded / 4}u; i += ${THREADS}u) {
    query_mean[i] = query_means[(head * P.meanGroups + ${meanGroup(smoothQ, 'row_in_head')}) * ${headDimPadded / 4}u + i - P.meanBase];
  }`
    : ''
}
  workgroupBarrier();
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    nonfinite = 0u;
    var x = ${load};
    ${smoothQ ? subtract('query_mean', 'channel') : ''}
    largest_partial[item] = ${largestOf16};
    if (nonfinite != 0u) { atomicOr(&flags[row], 1u); }
  }
  workgroupBarrier();
  var scale = 1.0;
  if (lid < count) {${rowMaximum('largest', chunks)}
    row_outer[lid] = outer_scale(largest);
    scale = bitcast<f32>(reciprocal_exponent(row_outer[lid]) << 23u);
  }
  workgroupBarrier();
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    var x = ${load};
    ${
      smoothK
        ? `let m = channel / 4u;
    largest_partial[item] = ${range(4)
      .map((i) => `dot(x[${i}], mean[m + ${i}u])`)
      .join(' + ')};`
        : ''
    }
    ${smoothQ ? subtract('query_mean', 'channel') : ''}
    for (var i = 0u; i < 4u; i++) { x[i] *= row_outer[row]; }
    ${quantize}
    let at = (row_at + row) * ${words}u - P.rowBase * 4u;
    for (var i = 0u; i < 4u; i++) { rows[at + channel / 4u + i] = words[i]; }
    rows[at + ${(chunks + 1) * 4}u + channel / 16u] = bitcast<u32>(scale);
  }
  workgroupBarrier();
  if (lid < count) {
    var constant = 0.0;
    ${smoothK ? `for (var i = 0u; i < ${chunks}u; i++) { constant += largest_partial[lid * ${chunks}u + i]; }` : ''}
    let at = (row_at + lid) * ${words}u + ${chunks * 4}u - P.rowBase * 4u;
    // A unit of the integers is half of E2M1's.
    let largest = min(1.0e14f * max(1.0, abs(P.scoreScale)), 3.4e38f);
    rows[at] = bitcast<u32>(clamp(0.5 * scale * P.scoreScale, -largest, largest));
    rows[at + 1u] = atomicLoad(&flags[lid])${sinks === undefined ? '' : ' | u32(sink_is_nan(head))'};
    rows[at + 2u] = bitcast<u32>(constant * P.scoreScale);
    rows[at + 3u] = ${sinks === undefined ? '0u' : 'sink_of(head)'};
  }
}`;
}

export interface QueryMeansConfig extends Pick<PrepareConfig, 'dtype' | 'access' | 'headDim' | 'headDimPadded'> {
  readonly smoothQ: QuerySmoothing;
}

export const QUERY_MEANS_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'headStride',
  'tokenStride',
  'base',
  'meanGroups',
  'meanBase',
] as const;

const MEAN_THREADS = 64;

/** Keys of a workgroup of {@link meanScoresKernel}. */
export const MEAN_SCORE_KEYS = THREADS;

/** The mean of the rows of a tile: of a block, or of a sequence. */
export function queryMeansKernel({ dtype, access, headDim, headDimPadded, smoothQ }: QueryMeansConfig): string {
  const chunks = headDimPadded / 16;
  const lanes = Math.floor(MEAN_THREADS / chunks);
  return `
${params(0, QUERY_MEANS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('q', 2, dtype, access)}
@group(0) @binding(3) var<storage, read_write> query_means: array<vec4<f32>>;
var<workgroup> sums: array<vec4<f32>, ${lanes * chunks * 4}>;

@compute @workgroup_size(${MEAN_THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let source = sequence_field(sequence, ${SEQUENCE.qSource}u) - P.base + head * P.headStride + first * P.tokenStride;
  let channel = lid % ${chunks}u * 16u;
  // Each term is divided, so that the sum of large values stays finite.
  let share = 1.0 / f32(max(count, 1u));
  if (lid < ${lanes * chunks}u) {
    var sum: array<vec4<f32>, 4>;
    for (var row = lid / ${chunks}u; row < count; row += ${lanes}u) {
      let x = load_q(source + row * P.tokenStride + channel, min(16u, max(${headDim}u, channel) - channel));
      for (var i = 0u; i < 4u; i++) { sum[i] += x[i] * share; }
    }
    for (var i = 0u; i < 4u; i++) { sums[lid * 4u + i] = sum[i]; }
  }
  workgroupBarrier();
  let mean_group = ${meanGroup(smoothQ, `sequence_field(sequence, ${SEQUENCE.queryRow}u) + first`)};
  for (var i = lid; i < ${chunks * 4}u; i += ${MEAN_THREADS}u) {
    var sum = vec4<f32>();
    for (var lane = 0u; lane < ${lanes}u; lane++) { sum += sums[lane * ${chunks * 4}u + i]; }
    query_means[(head * P.meanGroups + mean_group) * ${chunks * 4}u + i - P.meanBase] = sum;
  }
}`;
}

export interface MeanScoresConfig extends PrepareConfig {
  readonly smoothQ: QuerySmoothing;
}

export const MEAN_SCORES_PARAMS = [
  'tileStart',
  'headStart',
  'groupStart',
  'groupSize',
  'sequences',
  'chunks',
  'sequencesAt',
  'tilesAt',
  'kHeadStride',
  'kTokenStride',
  'kBase',
  'rowsPerHead',
  'keyRowBase',
  'partialBase',
  'meanGroups',
  'meanBase',
  'scoreStride',
  'scoreBase',
  'scoreScale',
] as const;

/**
 * What smoothing took from the scores of a group of rows and a key: `mean(Q) . (K - mean(K))`, of K as it came, in float32. Of a key
 * that is not smoothed, `mean(Q) . K`.
 */
export function meanScoresKernel(config: MeanScoresConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDimPadded, smoothK, smoothQ } = config;
  const words = fp4KeyWords(headDimPadded);
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  return `
${params(0, MEAN_SCORES_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('k', 2, dtype, access)}
@group(0) @binding(3) var<storage, read> query_means: array<vec4<f32>>;
${
  smoothK
    ? `@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> keys: array<u32>;`
    : ''
}
@group(0) @binding(6) var<storage, read_write> mean_scores: array<f32>;
var<workgroup> query_mean: array<vec4<f32>, ${headDimPadded / 4}>;
${smoothK ? `var<workgroup> mean: array<vec4<f32>, ${headDimPadded / 4}>;\n${MEAN_FACTOR(statistics)}` : ''}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let kv_head = head / P.groupSize;
  let first_row = (P.groupStart + group.z) * ${QUERY_BLOCK}u;
  let mean_group = ${meanGroup(smoothQ, `sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row`)};
  // A shorter sequence has fewer groups.
  let present = first_row < sequence_field(sequence, ${SEQUENCE.queryLength}u);
  if (present) {
    for (var i = lid; i < ${headDimPadded / 4}u; i += ${THREADS}u) {
      query_mean[i] = query_means[(head * P.meanGroups + mean_group) * ${headDimPadded / 4}u + i - P.meanBase];
    }
${
  smoothK
    ? `    let record = ((kv_head * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;${loadMean(headDimPadded / 4, statistics)}`
    : ''
}
  }
  workgroupBarrier();
  if (!present || lid >= count) { return; }
  let key = first + lid;
  let source = sequence_field(sequence, ${SEQUENCE.kSource}u) - P.kBase + kv_head * P.kHeadStride + key * P.kTokenStride;
  ${
    smoothK
      ? `let key_at = kv_head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + key;
  let facts = keys[key_at * ${words}u + ${words - 1}u - P.keyRowBase];
  let smoothed = ((facts >> ${KEY_FACTS.flags}u) & ${FLAG_UNSMOOTHED}u) == 0u;`
      : ''
  }
  var sum = 0.0;
  for (var channel = 0u; channel < ${headDimPadded}u; channel += 16u) {
    var x = load_k(source + channel, min(16u, max(${headDim}u, channel) - channel));
    ${smoothK ? `if (smoothed) { ${subtract('mean', 'channel')} }` : ''}
    ${range(4)
      .map((i) => `sum += dot(x[${i}], query_mean[channel / 4u + ${i}u]);`)
      .join(' ')}
  }
  mean_scores[(head * P.meanGroups + mean_group) * P.scoreStride + key - P.scoreBase] = clamp(sum * P.scoreScale, -1.0e37f, 1.0e37f);
}`;
}
