/**
 * Quantization of Q and K to INT8 and conversion of V to float16 or INT8, into the rows that the attention kernels read: in one launch for a
 * whole call, of which each workgroup has a tile of Q or one of K and V, and each by itself where K and V are kept for later queries.
 *
 * Every row of Q and every key has a scale of its own, whatever the granularity asked for: a row's facts are read with
 * its values, so that finer scales cost one product a score, and no row loses accuracy to another one that is 1000
 * times as large. For subgroup matrices the keys of a block share one scale where it serves all of them ({@link
 * WIDEST_SPREAD}).
 *
 * Smoothing subtracts K's mean. A key whose values that would make larger (the mean comes from other keys: outliers,
 * another document) is quantized as it is and flagged, and the attention kernels take `q . mean(K)` from its scores.
 *
 * A NaN or an infinity is stored as 0 and its token flagged, so that it takes part in no maximum, mean or product: the
 * attention kernels make a row NaN exactly when it attends to a flagged token.
 *
 * Sources: SageAttention (arXiv 2410.02367) section 4.2 for smoothing K and 4.3 for per-token scales.
 */
import { INT_MAX, TILINGS } from '../../../quantization/schemes.ts';
import type { DType } from '../../../tensor/dtype.ts';
import {
  FLAG_NONFINITE_K,
  FLAG_NONFINITE_V,
  FLAG_OWN_SCALES,
  FLAG_UNSMOOTHED,
  KEY_TILE,
  type KeyValueLayout,
  OWN_TILE,
  params,
  rowVectors,
  SEQUENCE,
  tables,
  VALUE_GROUP,
} from './layout.ts';
import { sinkParams, sinkReader } from './sinks.ts';
import { MEAN_FACTOR, meanOfChunks, overChunks, statisticsVectors } from './statistics.ts';
import { type Access, decoder, NONFINITE, nonfiniteFloat16, operandLoader, range } from './storage.ts';

/** Rows of quantized Q are padded to a block of the portable tiling. */
export const QUERY_BLOCK = TILINGS.portable.blockQ;
/** The same of K; also the most tokens that one workgroup quantizes. */
export const KEY_BLOCK = TILINGS.portable.blockK;

/** Threads of a workgroup. */
export const THREADS = 256;

/** Keys share a scale unless the largest magnitude of one key is this many times smaller than another's. */
const WIDEST_SPREAD = 4;

/** A key is not smoothed where that would make its largest magnitude more than this many times as large. */
export const WORST_SMOOTHING = 2;

export interface PrepareConfig {
  readonly dtype: DType;
  readonly access: Access;
  readonly headDim: number;
  readonly headDimPadded: number;
  readonly valueDim: number;
  readonly valueDimPadded: number;
  /** Subtract K's mean over its sequence before quantizing. */
  readonly smoothK: boolean;
}

/** The query kernel also stores `q . mean(K) * scoreScale` of each row: what smoothing took from its scores. */
export interface PrepareQueryConfig extends PrepareConfig {
  /** Dtype of the sinks; undefined: none. */
  readonly sinks: DType | undefined;
}

export interface PrepareKeyValueConfig extends PrepareConfig {
  /** The keys of a block share a scale where their magnitudes allow it. */
  readonly sharedScale: boolean;
  readonly values: ValueScaling;
  readonly layout: KeyValueLayout;
}

/** How V's channels become float16 or INT8. */
export interface ValueScaling {
  /**
   * INT8 in place of float16: a scale for each key, of channels that were divided by their typical sizes. No key loses accuracy
   * to another, and any size of a channel is right.
   */
  readonly integers: boolean;
  /** V gets a power-of-two scale per channel, so that float32 and bfloat16 values fit float16. */
  readonly scaled: boolean;
  /** Subtract V's mean over its sequence; where scaled only, since differences may be twice as large. */
  readonly smoothed: boolean;
  /** A channel's largest magnitude becomes at most 2 to this: far above 1, so that small values keep their bits. */
  readonly exponent: number;
}

/** Whether V's statistics are needed to read its values. */
export const readsStatistics = ({ scaled, smoothed }: ValueScaling): boolean => scaled || smoothed;

export const PREPARE_QUERY_PARAMS = [
  'tileStart',
  'headStart',
  'groupSize',
  'sequences',
  'chunks',
  'sequencesAt',
  'tilesAt',
  'headStride',
  'tokenStride',
  'base',
  'queryRowsPerHead',
  'rowBase',
  'partialBase',
  'scoreScale',
] as const;

export const PREPARE_KEY_VALUE_PARAMS = [
  'tileStart',
  'headStart',
  'sequences',
  'chunks',
  'sequencesAt',
  'tilesAt',
  'kHeadStride',
  'kTokenStride',
  'kBase',
  'vHeadStride',
  'vTokenStride',
  'vBase',
  'rowsPerHead',
  'kRowBase',
  'vRowBase',
  'partialBase',
] as const;

/** Of both in one launch, whose first tiles are those of K and V. */
export const PREPARE_PARAMS = [
  ...new Set([...PREPARE_KEY_VALUE_PARAMS, ...PREPARE_QUERY_PARAMS, 'keyTiles', 'keyHeads']),
] as const;

/** Below this a group counts as all zero: 127 / maximum would not be finite. */
const TINY = '1.0e-36f';

/** Magnitudes of scales of Q and K are kept below this, so that products of two scales and a dot product stay finite. */
const LARGEST_SCALE = '1.0e15f';

/** Adding this rounds to the nearest integer, which is then in the low bits of the sum's. */
const ROUNDING = '12582912.0';

/** What is quantized is at most `127 / inverse`, so that nothing has to be clipped. */
const QUANTIZE = `
fn quantize(x: vec4<f32>, inverse: f32) -> u32 {
  let q = bitcast<vec4<u32>>(x * inverse + vec4<f32>(${ROUNDING})) & vec4<u32>(0xffu);
  return q.x | (q.y << 8u) | (q.z << 16u) | (q.w << 24u);
}`;

/** K's mean, from the chunks' partial ones into workgroup memory. */
export const loadMean = (vectors: number, statistics: number) => `
  for (var i = lid; i < ${vectors}u; i += ${THREADS}u) {${meanOfChunks(statistics, 'P.chunks')}
  }`;

/** The largest of a row's partial maxima. */
export const rowMaximum = (name: string, parts: number) => `
    var ${name} = 0.0;
    for (var i = 0u; i < ${parts}u; i++) { ${name} = max(${name}, ${name}_partial[lid * ${parts}u + i]); }`;

/** Parts of a row whose sums or maxima lie in workgroup memory; of wide rows two chunks share one. */
const partsOf = (headDimPadded: number): number => headDimPadded / (headDimPadded > 256 ? 32 : 16);

/**
 * A loop over the chunks of 16 channels of a tile's rows, with `row`, `channel` and `item`, the chunk's part of a row. A thread has
 * all chunks of a part, one after the other.
 *
 * @param body statements; `first`: the chunk is the first of its part
 */
function eachChunk(headDimPadded: number, body: (isFirst: string | undefined) => string): string {
  const parts = partsOf(headDimPadded);
  const passes = headDimPadded / 16 / parts;
  const loop = (
    offset: string,
    isFirst: string | undefined,
  ) => `for (var item = lid; item < count * ${parts}u; item += ${THREADS}u) {
    let row = item / ${parts}u;
    let channel = ${offset === '' ? '' : '('}item % ${parts}u${offset} * 16u;${body(isFirst)}
  }`;
  if (passes === 1) return loop('', undefined);
  return `for (var turn = 0u; turn < ${passes}u; turn++) { ${loop(` + turn * ${parts}u)`, 'turn == 0u')} }`;
}

/** Assigns to a part, or joins with what its earlier chunks left. */
const joinPart = (isFirst: string | undefined, name: string, value: string, join: (a: string, b: string) => string) =>
  isFirst === undefined
    ? `${name}[item] = ${value};`
    : `{ let value = ${value}; ${name}[item] = select(${join(`${name}[item]`, 'value')}, value, ${isFirst}); }`;
const larger = (a: string, b: string) => `max(${a}, ${b})`;
const sum = (a: string, b: string) => `${a} + ${b}`;

export const largestOf16 = 'max(max(max4(x[0]), max4(x[1])), max(max4(x[2]), max4(x[3])))';
export const MAX4 = `fn max4(v: vec4<f32>) -> f32 { let a = abs(v); return max(max(a.x, a.y), max(a.z, a.w)); }`;

/** What a workgroup does with a tile after {@link readMean}, and what stands before it. */
interface Part {
  readonly declarations: string;
  readonly statements: string;
}

/** `record`, where the statistics of a head of K and V begin, and K's mean. */
function readMean(
  { headDimPadded, valueDimPadded, smoothK }: PrepareConfig,
  needsStatistics: boolean,
  keyHead: string,
): string {
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  return `${
    needsStatistics
      ? `  let record = ((${keyHead} * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;`
      : ''
  }
${smoothK ? loadMean(headDimPadded / 4, statistics) : ''}`;
}

/** A kernel of one part or of both: what parts share, each part's own, and `main`. */
function kernelOf(
  { dtype, headDimPadded, valueDimPadded, smoothK }: PrepareConfig,
  fields: readonly string[],
  needsPartials: boolean,
  declarations: string,
  statements: string,
): string {
  return `
${params(0, fields)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${needsPartials ? '@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;' : ''}
${smoothK ? `var<workgroup> mean: array<vec4<f32>, ${headDimPadded / 4}>;` : ''}
var<workgroup> largest_partial: array<f32, ${KEY_BLOCK * partsOf(headDimPadded)}>;
var<workgroup> row_max: array<f32, ${KEY_BLOCK}>;
var<workgroup> flags: array<atomic<u32>, ${KEY_BLOCK}>;
${QUANTIZE}
${MAX4}
${needsPartials ? MEAN_FACTOR(statisticsVectors(headDimPadded, valueDimPadded)) : ''}
${declarations}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
${statements}
}`;
}

/** Quantization of Q by itself: over keys that are in a cache, and with sinks, for which both in one would take nine bindings. */
export function prepareQueryKernel(config: PrepareQueryConfig): string {
  const { declarations, statements } = queryPart(config);
  const fields = [...PREPARE_QUERY_PARAMS, ...sinkParams(config.sinks)];
  const mean = readMean(config, config.smoothK, 'head / P.groupSize');
  return kernelOf(config, fields, config.smoothK, declarations, `${mean}\n${statements}`);
}

function queryPart(config: PrepareQueryConfig): Part {
  const { dtype, access, headDim, headDimPadded, smoothK, sinks } = config;
  const parts = partsOf(headDimPadded);
  const vectors = rowVectors(headDimPadded);
  const declarations = `\
${operandLoader('q', 7, dtype, access)}
@group(0) @binding(8) var<storage, read_write> rows: array<vec4<u32>>;
${sinkReader(sinks)}`;
  const statements = `\
  let source = sequence_field(sequence, ${SEQUENCE.qSource}u) - P.base + head * P.headStride + first * P.tokenStride;
  let row_at = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
  ${eachChunk(
    headDimPadded,
    (isFirst) => `
    nonfinite = 0u;
    let x = load_q(source + row * P.tokenStride + channel, min(16u, max(${headDim}u, channel) - channel));
    ${joinPart(isFirst, 'largest_partial', largestOf16, larger)}
    if (nonfinite != 0u) { atomicOr(&flags[row], 1u); }`,
  )}
  workgroupBarrier();
  if (lid < count) {${rowMaximum('largest', parts)}
    row_max[lid] = largest;
  }
  workgroupBarrier();
  ${eachChunk(
    headDimPadded,
    (isFirst) => `
    let x = load_q(source + row * P.tokenStride + channel, min(16u, max(${headDim}u, channel) - channel));
    let inverse = select(0.0, sign(P.scoreScale) * ${INT_MAX.int8}.0 / max(row_max[row], ${TINY}), row_max[row] > ${TINY});
    rows[(row_at + row) * ${vectors}u + channel / 16u - P.rowBase] = vec4<u32>(${range(4)
      .map((i) => `quantize(x[${i}], inverse)`)
      .join(', ')});
    ${
      smoothK
        ? `let m = channel / 4u;
    ${joinPart(
      isFirst,
      'largest_partial',
      range(4)
        .map((i) => `dot(x[${i}], mean[m + ${i}u])`)
        .join(' + '),
      sum,
    )}`
        : ''
    }`,
  )}
  workgroupBarrier();
  if (lid < count) {
    var constant = 0.0;
    ${smoothK ? `for (var i = 0u; i < ${parts}u; i++) { constant += largest_partial[lid * ${parts}u + i]; }` : ''}
    // A large scale of the scores is the caller's: what overflows with it is a score that float32 has no number for.
    let largest = min(${LARGEST_SCALE} * max(1.0, abs(P.scoreScale)), 3.4e38f);
    // The scale is not negative, so that the largest sum is the largest score: Q's values carry its sign.
    let scale = min(row_max[lid] / ${INT_MAX.int8}.0 * abs(P.scoreScale), largest);
    rows[(row_at + lid) * ${vectors}u + ${vectors - 1}u - P.rowBase] =
      vec4<u32>(bitcast<u32>(scale), atomicLoad(&flags[lid])${sinks === undefined ? '' : ' | u32(sink_is_nan(head))'}, bitcast<u32>(constant * P.scoreScale), ${sinks === undefined ? '0u' : 'sink_of(head)'});
  }`;
  return { declarations, statements };
}

/** Loads 16 of V's channels into `x`, scaled. */
function loadValues({ valueDim, values }: PrepareKeyValueConfig): string {
  const load = `var x = load_v(vSource + row * P.vTokenStride + channel, min(16u, max(${valueDim}u, channel) - channel));`;
  if (!values.scaled) return load;
  const scale = (i: number) =>
    `x[${i}] = x[${i}] * inverse_scale[channel / 4u + ${i}u]${values.smoothed ? ` - scaled_mean[channel / 4u + ${i}u]` : ''};`;
  // Values that no row attends to may exceed the scale: they are clipped.
  return `${load}
    ${range(4).map(scale).join(' ')}`;
}

/**
 * Rows from a tile's first to the end of its block. Attention multiplies all rows of a block, those behind the last token with weight 0:
 * they must be numbers, whatever the memory held before.
 */
const BLOCK_ROWS = `(count + (${KEY_BLOCK}u - (row_at + count) % ${KEY_BLOCK}u) % ${KEY_BLOCK}u)`;

/** V in rows, as the tiled kernels read it. */
function storeRows(config: PrepareKeyValueConfig): string {
  const { valueDimPadded } = config;
  const valueChunks = valueDimPadded / 16;
  const convert = (i: number) =>
    `pack2x16float(clamp(x[${i >> 1}].${i % 2 === 0 ? 'xy' : 'zw'}, vec2<f32>(-65504.0), vec2<f32>(65504.0)))`;
  return `for (var item = lid; item < ${BLOCK_ROWS} * ${valueChunks}u; item += ${THREADS}u) {
    let row = item / ${valueChunks}u;
    let channel = item % ${valueChunks}u * 16u;
    let at = (row_at + row) * ${valueDimPadded / 8}u + channel / 8u - P.vRowBase;
    if (row >= count) { values[at] = vec4<u32>(); values[at + 1u] = vec4<u32>(); continue; }
    nonfinite = 0u;
    ${loadValues(config)}
    if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_V}u); }
    values[at] = vec4<u32>(${range(4).map(convert).join(', ')});
    values[at + 1u] = vec4<u32>(${range(4)
      .map((i) => convert(i + 4))
      .join(', ')});
  }`;
}

/** Float16 values of two keys that are both in the range, and finite, need no conversion. */
function storeWholePairs({ dtype, access, valueDim, valueDimPadded, values }: PrepareKeyValueConfig): string {
  if (dtype !== 'float16' || access !== 'vector' || values.scaled) return '';
  const inside = valueDim < valueDimPadded ? ` && channel < ${valueDim}u` : '';
  const words = ['a', 'b'].map((half) => range(2).map((i) => `${half}${i}`));
  const loads = words.flat().map((name, i) => {
    const row = i < 2 ? '' : ' + P.vTokenStride';
    return `let ${name} = src_v[(source_at${row}) / 8u + ${i % 2}u];`;
  });
  const stores = range(16).map((c) => {
    const [a, b] = ['a', 'b'].map((half) => `${half}${c >> 3}.${'xyzw'[(c >> 1) & 3]}`);
    const word = c % 2 === 0 ? `(${a} & 0xffffu) | (${b} << 16u)` : `(${a} >> 16u) | (${b} & 0xffff0000u)`;
    return `values[to + ${c * (VALUE_GROUP / 2)}u] = ${word};`;
  });
  return `    let pair_row = 2u * pair - row_at;
    // Where the first key lies before the tile its row wraps round.
    if (pair_row < count && pair_row + 1u < count${inside}) {
      let source_at = vSource + pair_row * P.vTokenStride + channel;
      ${loads.join(' ')}
      let bad = ${words.flat().map(nonfiniteFloat16).join(' | ')};
      if (all(bad == vec4<u32>())) {
        let to = ${PAIR_AT(valueDimPadded)};
        ${stores.join('\n        ')}
        continue;
      }
    }
`;
}

/** Where a pair's word of `channel` is; those of the next channels lie a group of keys behind one another. */
const PAIR_AT = (valueDimPadded: number): string =>
  `(pair / ${VALUE_GROUP / 2}u * ${valueDimPadded}u + channel) * ${VALUE_GROUP / 2}u + pair % ${VALUE_GROUP / 2}u - P.vRowBase * 4u`;

/** V in tiles. A word holds two keys' values of a channel; of a pair that is cut by the range, the earlier key's stay. */
function storeTiles(config: PrepareKeyValueConfig): string {
  const { valueDimPadded } = config;
  return `let first_pair = row_at / 2u;
  let pairs = (row_at + ${BLOCK_ROWS} - 1u) / 2u - first_pair + 1u;
  for (var item = lid; item < pairs * ${valueDimPadded / 16}u; item += ${THREADS}u) {
    let pair = first_pair + item % pairs;
    let channel = item / pairs * 16u;
${storeWholePairs(config)}    // Said in full: a compiler may forget to clear what a loop declares.
    var words = array<u32, 16>();
    var written = 0u;
    for (var half = 0u; half < 2u; half++) {
      let row = 2u * pair + half - row_at;
      // Wrapped round: a token before this tile's first.
      if (row > 0x7fffffffu) { continue; }
      written |= 0xffffu << (16u * half);
      if (row >= count) { continue; }
      nonfinite = 0u;
      ${loadValues(config)}
      if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_V}u); }
      for (var i = 0u; i < 4u; i++) {
        let y = clamp(x[i], vec4<f32>(-65504.0), vec4<f32>(65504.0));
        let low = pack2x16float(y.xy);
        let high = pack2x16float(y.zw);
        words[4u * i] |= (low & 0xffffu) << (16u * half);
        words[4u * i + 1u] |= (low >> 16u) << (16u * half);
        words[4u * i + 2u] |= (high & 0xffffu) << (16u * half);
        words[4u * i + 3u] |= (high >> 16u) << (16u * half);
      }
    }
    let at = ${PAIR_AT(valueDimPadded)};
    for (var i = 0u; i < 16u; i++) {
      if (written != 0xffffffffu) { words[i] |= values[at + i * ${VALUE_GROUP / 2}u] & ~written; }
      values[at + i * ${VALUE_GROUP / 2}u] = words[i];
    }
  }`;
}

/** Below this a key's values, relative to the sizes of their channels, count as all zero. */
const TINY_VALUES = '1.0e-28f';

const VALUE_MAX = `var<workgroup> value_max: array<atomic<u32>, ${KEY_BLOCK}>;
// What a key's values in INT8 are multiplied with.
fn key_value_scale(row: u32) -> u32 {
  let largest = bitcast<f32>(atomicLoad(&value_max[row]));
  return bitcast<u32>(select(0.0, largest / ${INT_MAX.int8}.0, largest > ${TINY_VALUES}));
}`;

/** The largest magnitude of each key's values, once their channels are of like size. */
const valueMaxima = (config: PrepareKeyValueConfig): string => `
  for (var item = lid; item < count * ${config.valueDimPadded / 16}u; item += ${THREADS}u) {
    let row = item / ${config.valueDimPadded / 16}u;
    let channel = item % ${config.valueDimPadded / 16}u * 16u;
    nonfinite = 0u;
    ${loadValues(config)}
    // Bits of numbers that are not negative are in the order of the numbers.
    atomicMax(&value_max[row], bitcast<u32>(${largestOf16}));
    if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_V}u); }
  }
  workgroupBarrier();`;

/**
 * V in INT8 for the tiled kernels: four keys' values of a channel in a word, 128 added, so that they are not negative. Of four that
 * are cut by the range, the earlier keys' stay.
 */
function storeIntegers(config: PrepareKeyValueConfig): string {
  const quads = config.valueDimPadded / 4;
  return `let first_four = row_at / 4u;
  let fours = (row_at + ${BLOCK_ROWS} - 1u) / 4u - first_four + 1u;
  for (var item = lid; item < fours * ${config.valueDimPadded / 16}u; item += ${THREADS}u) {
    let four = first_four + item % fours;
    let channel = item / fours * 16u;
    var words: array<vec4<u32>, 4>;
    var written = 0u;
    for (var key = 0u; key < 4u; key++) {
      let row = 4u * four + key - row_at;
      // Wrapped round: a token before this tile's first.
      if (row > 0x7fffffffu) { continue; }
      written |= 0xffu << (8u * key);
      if (row >= count) {
        for (var i = 0u; i < 4u; i++) { words[i] |= vec4<u32>(128u << (8u * key)); }
        continue;
      }
      ${loadValues(config)}
      let largest = bitcast<f32>(atomicLoad(&value_max[row]));
      let inverse = select(0.0, ${INT_MAX.int8}.0 / max(largest, ${TINY_VALUES}), largest > ${TINY_VALUES});
      for (var i = 0u; i < 4u; i++) {
        let y = vec4<i32>(clamp(round(x[i] * inverse), vec4<f32>(-${INT_MAX.int8}.0), vec4<f32>(${INT_MAX.int8}.0))) + vec4<i32>(128);
        words[i] |= vec4<u32>(y) << vec4<u32>(8u * key);
      }
    }
    let at = four * ${quads}u + channel / 4u - P.vRowBase;
    for (var i = 0u; i < 4u; i++) {
      if (written != 0xffffffffu) { words[i] |= values[at + i] & vec4<u32>(~written); }
      values[at + i] = words[i];
    }
  }`;
}

/** Decides from each key's maxima, with and without smoothing, how it is quantized: sets `row_max` and its flags. */
function keyMaxima({ smoothK, sharedScale, headDimPadded }: PrepareKeyValueConfig): string {
  const parts = partsOf(headDimPadded);
  const smoothed = smoothK
    ? `${rowMaximum('plain', parts)}
    if (largest > ${WORST_SMOOTHING}.0 * plain) { largest = plain; atomicOr(&flags[lid], ${FLAG_UNSMOOTHED}u); }`
    : '';
  const shared = `
  // Bits of numbers that are not negative are in the order of the numbers; of the least one all bits are turned.
  if (lid < count) {
    let bits = bitcast<u32>(row_max[lid]);
    atomicMax(&most_bits, bits);
    if (bits != 0u) { atomicMax(&least_bits, ~bits); }
  }
  workgroupBarrier();
  let shared_max = bitcast<f32>(atomicLoad(&most_bits));
  let own_scales = u32(shared_max > 0.0 && bitcast<f32>(~atomicLoad(&least_bits)) * ${WIDEST_SPREAD}.0 < shared_max);
  if (lid < count && own_scales == 0u) { row_max[lid] = shared_max; }
  workgroupBarrier();`;
  return `
  workgroupBarrier();
  if (lid < count) {${rowMaximum('largest', parts)}${smoothed}
    row_max[lid] = largest;
  }
  workgroupBarrier();${sharedScale ? shared : ''}`;
}

const needsStatistics = ({ smoothK, values }: PrepareKeyValueConfig): boolean => smoothK || values.scaled;

/** Quantization of K and V by themselves. */
export function prepareKeyValueKernel(config: PrepareKeyValueConfig): string {
  const { declarations, statements } = keyValuePart(config);
  const mean = readMean(config, needsStatistics(config), 'head');
  return kernelOf(config, PREPARE_KEY_VALUE_PARAMS, needsStatistics(config), declarations, `${mean}\n${statements}`);
}

/** Both: a launch less, and its wait. */
export function prepareKernel(query: PrepareQueryConfig, keyValue: PrepareKeyValueConfig): string {
  const [ofQuery, ofKeyValue] = [queryPart(query), keyValuePart(keyValue)];
  const declarations = `${ofKeyValue.declarations}\n${ofQuery.declarations}`;
  // Compilers take long for what reads statistics: it stands there once. Heads of K and V may be fewer than Q's.
  const keyHead = 'select(head / P.groupSize, min(head, P.keyHeads - 1u), tile < P.keyTiles)';
  const statements = `${readMean(keyValue, needsStatistics(keyValue), keyHead)}
  if (tile < P.keyTiles) { if (head < P.keyHeads) {
${ofKeyValue.statements}
  } } else {
${ofQuery.statements}
  }`;
  return kernelOf(keyValue, PREPARE_PARAMS, needsStatistics(keyValue), declarations, statements);
}

function keyValuePart(config: PrepareKeyValueConfig): Part {
  const { dtype, access, headDim, headDimPadded, valueDimPadded, smoothK, sharedScale, values, layout } = config;
  const chunks = headDimPadded / 16;
  const parts = partsOf(headDimPadded);
  const vectors = rowVectors(headDimPadded);
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  const loadK = `load_k(kSource + row * P.kTokenStride + channel, min(16u, max(${headDim}u, channel) - channel))`;
  // Channels past D are 0 in x and in the mean, so smoothing leaves them 0.
  const smooth = range(4)
    .map((i) => `x[${i}] -= mean[channel / 4u + ${i}u];`)
    .join(' ');
  const tiled = layout === 'tiles';
  const declarations = `\
${operandLoader('k', 2, dtype, access)}
${operandLoader('v', 3, dtype, access)}
@group(0) @binding(5) var<storage, read_write> keys: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> values: array<${tiled ? 'u32' : 'vec4<u32>'}>;
${values.scaled ? `var<workgroup> inverse_scale: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
${values.smoothed ? `var<workgroup> scaled_mean: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
${smoothK ? `var<workgroup> plain_partial: array<f32, ${KEY_BLOCK * parts}>;` : ''}
${sharedScale ? 'var<workgroup> most_bits: atomic<u32>;\nvar<workgroup> least_bits: atomic<u32>;' : ''}
${values.scaled ? valueScale(statistics, values) : ''}
${values.smoothed ? valueMean(statistics) : ''}
${values.integers ? VALUE_MAX : ''}${tiled ? `var<workgroup> tile_flags: array<atomic<u32>, ${KEY_BLOCK / KEY_TILE + 1}>;` : ''}
// The vector of a row's 16 channels from 16 * chunk on; of its facts after the last chunk.
fn key_at(row: u32, chunk: u32) -> u32 { return ${
    tiled
      ? `row / ${KEY_TILE}u * ${KEY_TILE * vectors}u + select(chunk / 2u * ${2 * KEY_TILE}u + row % ${KEY_TILE}u * 2u + chunk % 2u, ${KEY_TILE * chunks}u + row % ${KEY_TILE}u, chunk == ${chunks}u)`
      : `row * ${vectors}u + chunk`
  } - P.kRowBase; }`;
  const statements = `\
  let kSource = sequence_field(sequence, ${SEQUENCE.kSource}u) - P.kBase + head * P.kHeadStride + first * P.kTokenStride;
  let vSource = sequence_field(sequence, ${SEQUENCE.vSource}u) - P.vBase + head * P.vHeadStride + first * P.vTokenStride;
  let row_at = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + first;
${
  values.scaled
    ? `  for (var i = lid; i < ${valueDimPadded / 4}u; i += ${THREADS}u) {
    let inverse = value_scale(record + ${headDimPadded / 4}u + i, P.chunks, -1);
    inverse_scale[i] = inverse;
    ${values.smoothed ? `scaled_mean[i] = value_mean(record + ${(headDimPadded + valueDimPadded) / 4}u + i, P.chunks) * mean_factor(record, P.chunks) * inverse;` : ''}
  }`
    : ''
}
  workgroupBarrier();
  ${eachChunk(
    headDimPadded,
    (isFirst) => `
    nonfinite = 0u;
    var x = ${loadK};
    ${smoothK ? `${joinPart(isFirst, 'plain_partial', largestOf16, larger)} ${smooth}` : ''}
    ${joinPart(isFirst, 'largest_partial', largestOf16, larger)}
    if (nonfinite != 0u) { atomicOr(&flags[row], ${FLAG_NONFINITE_K}u); }`,
  )}
${keyMaxima(config)}
  for (var item = lid; item < count * ${chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    var x = ${loadK};
    ${smoothK ? `if ((atomicLoad(&flags[row]) & ${FLAG_UNSMOOTHED}u) == 0u) { ${smooth} }` : ''}
    let inverse = select(0.0, ${INT_MAX.int8}.0 / max(row_max[row], ${TINY}), row_max[row] > ${TINY});
    keys[key_at(row_at + row, channel / 16u)] = vec4<u32>(${range(4)
      .map((i) => `quantize(x[${i}], inverse)`)
      .join(', ')});
  }
  ${
    values.integers
      ? `${valueMaxima(config)}
  ${storeIntegers(config)}`
      : tiled
        ? storeTiles(config)
        : storeRows(config)
  }
  workgroupBarrier();${
    tiled
      ? `
  let own_tile = (row_at + lid) / ${KEY_TILE}u - row_at / ${KEY_TILE}u;
  if (lid < count) { atomicOr(&tile_flags[own_tile], atomicLoad(&flags[lid])); }
  workgroupBarrier();`
      : ''
  }
  if (lid < count) {
    let scale = min(row_max[lid] / ${INT_MAX.int8}.0, ${LARGEST_SCALE});
    var joined = ${sharedScale ? `own_scales * ${FLAG_OWN_SCALES}u` : '0u'};
    ${
      tiled
        ? `let in_tile = (row_at + lid) % ${KEY_TILE}u;
    if (lid == 0u || in_tile == 0u) {
      joined |= atomicLoad(&tile_flags[own_tile]);
      if (in_tile != 0u && joined != 0u) { keys[key_at(row_at - in_tile, ${chunks}u)].z |= joined; }
    }`
        : ''
    }
    keys[key_at(row_at + lid, ${chunks}u)] = vec4<u32>(bitcast<u32>(scale), atomicLoad(&flags[lid]), joined, ${values.integers ? 'key_value_scale(lid)' : '0u'});
  }`;
  return { declarations, statements };
}

/**
 * `value_scale(record, chunks, sign)`: the power of two that brings four channels' largest magnitudes into the upper
 * half of what {@link ValueScaling} allows when divided by it (sign 1), or its inverse (sign -1); 1 for a channel of
 * zeros. Powers of two keep V's bits as they are. Smoothed values may be twice as large.
 */
export const valueScale = (statistics: number, values: ValueScaling): string =>
  values.integers ? typicalScale(statistics) : powerScale(statistics, values);

/** `value_scale(record, chunks, sign)`: four channels' typical sizes, or their inverses; 1 for a channel of zeros. */
const typicalScale = (statistics: number): string => `
fn value_scale(record: u32, chunks: u32, sign: i32) -> vec4<f32> {
  var size = vec4<f32>();
  ${overChunks(statistics, { x: 'record' }, 'chunks', 'size += x;')}
  // The inverse of a larger one would not be a normal number.
  size = select(min(size, vec4<f32>(1.0e37f)), vec4<f32>(1.0), size < vec4<f32>(1.0e-36f));
  return select(size, 1.0 / size, sign < 0);
}`;

const powerScale = (statistics: number, { smoothed, exponent }: ValueScaling): string => `
fn largest_values(record: u32, chunks: u32) -> vec4<f32> {
  var largest = vec4<f32>();
  ${overChunks(statistics, { x: 'record' }, 'chunks', 'largest = max(largest, x);')}
  return largest;
}
fn scale_of(largest: vec4<f32>, sign: i32) -> vec4<f32> {
  let biased = vec4<i32>((bitcast<vec4<u32>>(largest) >> vec4<u32>(23u)) & vec4<u32>(0xffu));
  let exponent = clamp(biased - vec4<i32>(${(smoothed ? 125 : 126) + exponent}), vec4<i32>(-126), vec4<i32>(126));
  let scale = bitcast<vec4<f32>>((vec4<i32>(127) + sign * exponent) << vec4<u32>(23u));
  return select(scale, vec4<f32>(1.0), biased == vec4<i32>(0));
}
fn value_scale(record: u32, chunks: u32, sign: i32) -> vec4<f32> { return scale_of(largest_values(record, chunks), sign); }`;

/** `value_mean(record, chunks)`: of four of V's channels, the sum that `mean_factor` makes a mean. */
export const valueMean = (statistics: number): string => `
fn value_mean(record: u32, chunks: u32) -> vec4<f32> {
  var mean = vec4<f32>();
  ${overChunks(statistics, { x: 'record' }, 'chunks', 'mean += x;')}
  return mean;
}`;

/** What of V's statistics an attention kernel reads. */
export const valueFunctions = (statistics: number, values: ValueScaling): string => `
${values.scaled ? valueScale(statistics, values) : ''}
${values.smoothed ? `${valueMean(statistics)}${MEAN_FACTOR(statistics)}` : ''}`;
