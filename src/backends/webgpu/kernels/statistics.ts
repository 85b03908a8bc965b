/**
 * First pass over K and V: partial sums of their channels (for the means that smoothing takes) and, where V gets
 * scales, the largest magnitude of V's channels (for a power of two). Each workgroup reduces one chunk of one sequence
 * and head; the preparing kernels add up the few chunks, always in the same order.
 *
 * Only keys that some row may see count: keys inside the band's interval that the mask does not hide. Any constant
 * vector serves for smoothing, so the means leave out extreme values. V in INT8 has a scale for each key beside those of
 * its channels: any sizes of channels serve, and one key of 1000 times the others' size does not move them.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { params, SEQUENCE, tables } from './layout.ts';
import { type Access, decoder, elementLoader, NONFINITE, range } from './storage.ts';

export interface StatisticsConfig {
  readonly dtype: DType;
  readonly access: Access;
  readonly headDim: number;
  readonly headDimPadded: number;
  readonly valueDim: number;
  readonly valueDimPadded: number;
  readonly keyMean: boolean;
  readonly valueMax: boolean;
  readonly valueMean: boolean;
  /** In place of V's maxima: the size that its channels have in most groups of keys. */
  readonly valueTypical: boolean;
  /** A flag for each key says whether the mask lets any row see it (`visibleKeysKernel`). */
  readonly masked: boolean;
}

export const STATISTICS_PARAMS = [
  'itemStart',
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
  'partialBase',
  'visibleHeadStride',
  'visibleBase',
] as const;

const THREADS = 256;

/** Groups of a chunk's keys, of which those with the most extreme means are left out. */
const LEAST_GROUPS = 8;

/** A channel's size is at least this part of its largest magnitude, so that nothing overflows relative to it. */
const LEAST_TYPICAL = '8.271806e-25f';

/**
 * Vectors of four channels in one chunk's record: K's sums, then V's maxima (or typical sizes), then V's sums, then the share of the
 * sequence's keys that were counted. Sums are divided by the sequence's length.
 */
export const statisticsVectors = (headDimPadded: number, valueDimPadded: number): number =>
  (headDimPadded + 2 * valueDimPadded) / 4 + 1;

/** Loads from storage that are under way together where a loop's bounds are not constants: each takes half a microsecond. */
const AHEAD = 4;
/** The same over the few chunks of a sequence, of which every workgroup reads all. */
const CHUNKS_AHEAD = 8;

/**
 * A loop over `from` to `to`, exclusive, that reads ahead.
 *
 * @param reads by name, the expression of what is read for an index, which is in the range
 * @param use statements with what was read, in the order of the indices
 * @param counts a condition on an index, besides its being in the range
 */
const readAhead = (
  from: string,
  to: string,
  ahead: number,
  reads: Readonly<Record<string, (index: string) => string>>,
  use: string,
  counts?: (index: string) => string,
): string => {
  const items = range(ahead);
  const names = Object.entries(reads);
  const index = (i: number) => `min(at + ${i}u, end - 1u)`;
  return `let end = ${to};
  for (var at = ${from}; at < end; at += ${ahead}u) {
    ${items.map((i) => names.map(([name, read]) => `let ${name}_${i} = ${read(index(i))};`).join(' ')).join('\n    ')}
    ${items
      .map((i) => {
        const seen = counts === undefined ? '' : ` && ${counts(index(i))}`;
        const given = names.map(([name]) => `let ${name} = ${name}_${i};`).join(' ');
        return `if (at + ${i}u < end${seen}) { ${given} ${use} }`;
      })
      .join('\n    ')}
  }`;
};

/** The same over the chunks of a record's fields, which begin at `at`: `use` has the fields' vectors by their names. */
export const overChunks = (
  statistics: number,
  at: Readonly<Record<string, string>>,
  chunks: string,
  use: string,
): string => {
  const reads = Object.entries(at).map(
    ([name, start]) => [name, (chunk: string) => `partials[${start} + ${chunk} * ${statistics}u]`] as const,
  );
  return `{ ${readAhead('0u', chunks, CHUNKS_AHEAD, Object.fromEntries(reads), use)} }`;
};

/** Where a chunk's share of the sequence's keys is. */
const shareAt = (statistics: number) => `record + ${statistics - 1}u`;
const FACTOR_OF_SHARE = '1.0 / max(share, 1.0e-12f)';

/** K's mean of four channels, in `mean[i]`; `record` begins with K's sums. */
export const meanOfChunks = (statistics: number, chunks: string): string => `
    var sum = vec4<f32>();
    var share = 0.0;
    ${overChunks(statistics, { x: 'record + i', y: shareAt(statistics) }, chunks, 'sum += x; share += y.x;')}
    mean[i] = sum * (${FACTOR_OF_SHARE});`;

/** `mean_factor(record, chunks)`: what the chunks' sums together are multiplied with to be a mean. */
export const MEAN_FACTOR = (statistics: number): string => `
fn mean_factor(record: u32, chunks: u32) -> f32 {
  var share = 0.0;
  ${overChunks(statistics, { x: shareAt(statistics) }, 'chunks', 'share += x.x;')}
  return ${FACTOR_OF_SHARE};
}`;

export function statisticsKernel(config: StatisticsConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDim, valueDimPadded, keyMean, valueMax, valueMean } = config;
  const { valueTypical, masked } = config;
  const vectors = statisticsVectors(headDimPadded, valueDimPadded);
  const lanes = 2 ** Math.ceil(Math.log2(Math.max(headDimPadded, valueDimPadded) / 2));
  const rows = THREADS / lanes;

  // Fewer groups would leave no majority beside one that holds an outlier.
  // Of the widest heads eight would take a little more memory than every device has.
  const segments = Math.max(1, rows === 1 ? LEAST_GROUPS - 1 : LEAST_GROUPS / rows);

  // A lane has two neighbouring channels: one word of a 16-bit type.
  const walk = (operand: 'k' | 'v', from: string, to: string, add: string) => {
    const dim = operand === 'k' ? headDim : valueDim;
    const source = operand === 'k' ? SEQUENCE.kSource : SEQUENCE.vSource;
    return `if (2u * lane < ${dim}u) {
      let base = sequence_field(sequence, ${source}u) - P.${operand}Base + head * P.${operand}HeadStride + lane * 2u;
      let both = 2u * lane + 1u < ${dim}u;
      ${readAhead(
        from,
        to,
        AHEAD,
        { x: (token) => `pair_${operand}(base + (${token}) * P.${operand}TokenStride, both)` },
        add,
        masked ? (token) => `visible[visible_at + ${token}] != 0u` : undefined,
      )}
    }`;
  };
  const paddedOf = (operand: 'k' | 'v') => (operand === 'k' ? headDimPadded : valueDimPadded);
  const largest = (operand: 'k' | 'v', recordAt: number) => `
  {
    var largest = vec2<f32>();
    ${walk(operand, 'own_first', 'own_last', 'largest = max(largest, abs(x));')}
    red[lid] = largest;
    workgroupBarrier();
    for (var step = ${Math.floor(rows / 2)}u; step > 0u; step >>= 1u) {
      if (row < step) { red[lid] = max(red[lid], red[lid + step * ${lanes}u]); }
      workgroupBarrier();
    }
    if (row == 0u && 2u * lane < ${paddedOf(operand)}u) { partials[(record + ${recordAt}u) * 2u + lane] = red[lid]; }
    workgroupBarrier();
  }`;
  const mean = (operand: 'k' | 'v', recordAt: number) => `
  {
    for (var segment = 0u; segment < ${segments}u; segment++) {
      let part_first = min(own_last, own_first + segment * per_segment);
      var sum = vec2<f32>();
      ${walk(operand, 'part_first', 'min(own_last, part_first + per_segment)', 'sum += x * inverse;')}
      red[segment * ${THREADS}u + lid] = sum / max(group_size[row * ${segments}u + segment], 1.0);
    }
    workgroupBarrier();
    if (row == 0u && 2u * lane < ${paddedOf(operand)}u) {
      partials[(record + ${recordAt}u) * 2u + lane] = middle_mean(lane, groups, (groups + 1u) / 4u) * counted;
    }
    workgroupBarrier();
  }`;
  // Where the mean is subtracted, what a channel spans says how large the differences are.
  const size = valueMean
    ? `select(most - least, max(abs(most), abs(least)), most <= least)`
    : 'max(abs(most), abs(least))';
  // Each group's sizes are divided by its total before they are averaged: only how a group's channels compare with each
  // other counts, so that of two keys the one of 1000 times the other's size does not decide alone.
  const typical = (recordAt: number) => `
  {
    for (var segment = 0u; segment < ${segments}u; segment++) {
      let part_first = min(own_last, own_first + segment * per_segment);
      var most = vec2<f32>(-3.0e38f);
      var least = vec2<f32>(3.0e38f);
      ${walk('v', 'part_first', 'min(own_last, part_first + per_segment)', 'most = max(most, x * (0.5 * inverse)); least = min(least, x * (0.5 * inverse));')}
      red[segment * ${THREADS}u + lid] = select(vec2<f32>(), ${size}, most > vec2<f32>(-3.0e38f));
    }
    workgroupBarrier();
    if (lid < ${rows * segments}u) {
      var total = vec2<f32>();
      for (var i = 0u; i < ${valueDimPadded / 2}u; i++) { total += red[lid % ${segments}u * ${THREADS}u + lid / ${segments}u * ${lanes}u + i] * ${1 / valueDimPadded}; }
      group_total[lid] = total.x + total.y;
    }
    workgroupBarrier();
    var least_total = 3.0e38;
    for (var i = 0u; i < ${rows * segments}u; i++) { least_total = min(least_total, select(3.0e38, group_total[i], group_total[i] > 0.0)); }
    if (row == 0u && 2u * lane < ${valueDimPadded}u) {
      var largest = vec2<f32>();
      for (var i = 0u; i < ${rows * segments}u; i++) {
        let at = i % ${segments}u * ${THREADS}u + i / ${segments}u * ${lanes}u + lane;
        largest = max(largest, red[at]);
        red[at] *= select(0.0, least_total / group_total[i], group_total[i] > 0.0);
      }
      let middle = middle_mean(lane, groups, groups / 8u);
      let size = select(max(middle, largest * ${LEAST_TYPICAL}), largest, middle == vec2<f32>());
      partials[(record + ${recordAt}u) * 2u + lane] = size * counted;
    }
    workgroupBarrier();
  }`;

  return `
${params(0, STATISTICS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${keyMean ? pairLoader('k', 2, dtype, access) : ''}
${valueMax || valueMean ? pairLoader('v', 3, dtype, access) : ''}
@group(0) @binding(4) var<storage, read_write> partials: array<vec2<f32>>;
${masked ? '@group(0) @binding(5) var<storage, read> visible: array<u32>;' : ''}
var<workgroup> red: array<vec2<f32>, ${THREADS * segments}>;
var<workgroup> group_size: array<f32, ${rows * segments}>;
${valueTypical ? `var<workgroup> group_total: array<f32, ${rows * segments}>;` : ''}
${middleMean(rows, segments, lanes)}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let item = P.itemStart + group.x;
  let head = P.headStart + group.y;
  let sequence = item / P.chunks;
  let chunk = item % P.chunks;
  let length = sequence_field(sequence, ${SEQUENCE.keyLength}u);
  let visible_from = sequence_field(sequence, ${SEQUENCE.visibleFrom}u);
  let visible_to = sequence_field(sequence, ${SEQUENCE.visibleTo}u);
  let per_chunk = (visible_to - visible_from + P.chunks - 1u) / P.chunks;
  let first = min(visible_to, visible_from + chunk * per_chunk);
  let last = min(visible_to, first + per_chunk);
  ${masked ? `let visible_at = head * P.visibleHeadStride + sequence_field(sequence, ${SEQUENCE.keyRow}u) - P.visibleBase;` : ''}
  // Each term is divided, so that the sum of large values stays finite.
  let inverse = 1.0 / f32(max(length, 1u));
  let lane = lid % ${lanes}u;
  let row = lid / ${lanes}u;
  let record = ((head * P.sequences + sequence) * P.chunks + chunk) * ${vectors}u - P.partialBase;
  // A group of keys: those that follow one another are of one kind.
  let per_row = (last - first + ${rows - 1}u) / ${rows}u;
  let per_segment = (per_row + ${segments - 1}u) / ${segments}u;
  let own_first = min(last, first + row * per_row);
  let own_last = min(last, own_first + per_row);
  if (lane == 0u) {
    for (var segment = 0u; segment < ${segments}u; segment++) {
      let part_first = min(own_last, own_first + segment * per_segment);
      let part_last = min(own_last, part_first + per_segment);
      ${
        masked
          ? `var size = 0.0;
      for (var token = part_first; token < part_last; token++) { size += f32(visible[visible_at + token] != 0u); }`
          : 'let size = f32(part_last - part_first);'
      }
      group_size[row * ${segments}u + segment] = size;
    }
  }
  workgroupBarrier();
  var counted = 0.0;
  var groups = 0u;
  for (var i = 0u; i < ${rows * segments}u; i++) {
    counted += group_size[i];
    groups += u32(group_size[i] > 0.0);
  }
  if (lid == 0u) { partials[(record + ${vectors - 1}u) * 2u] = vec2<f32>(counted * inverse, 0.0); }
${keyMean ? mean('k', 0) : ''}
${valueTypical ? typical(headDimPadded / 4) : valueMax ? largest('v', headDimPadded / 4) : ''}
${valueMean ? mean('v', (headDimPadded + valueDimPadded) / 4) : ''}
}`;
}

/**
 * `middle_mean(lane, groups, cut)`: of the groups' means of two channels, the mean without the `cut` largest and smallest. A
 * few keys of 1000 times the others' size, which earlier rows may not even see, would otherwise move the mean away from
 * all.
 */
const middleMean = (rows: number, segments: number, lanes: number): string => `
fn middle_mean(lane: u32, groups: u32, cut: u32) -> vec2<f32> {
  var sum = vec2<f32>();
  var kept = vec2<f32>();
  for (var i = 0u; i < ${rows * segments}u; i++) {
    if (group_size[i] == 0.0) { continue; }
    let mine = red[i % ${segments}u * ${THREADS}u + i / ${segments}u * ${lanes}u + lane];
    var rank = vec2<u32>();
    for (var j = 0u; j < ${rows * segments}u; j++) {
      if (group_size[j] == 0.0) { continue; }
      let other = red[j % ${segments}u * ${THREADS}u + j / ${segments}u * ${lanes}u + lane];
      rank += vec2<u32>(other < mine) + select(vec2<u32>(), vec2<u32>(other == mine), j < i);
    }
    let keep = vec2<f32>(rank >= vec2<u32>(cut)) * vec2<f32>(rank < vec2<u32>(groups - cut));
    sum += mine * keep;
    kept += keep;
  }
  return sum / max(kept, vec2<f32>(1.0));
}`;

/** A storage binding and `pair_<name>(index, both)`: two elements from `index`, the second 0 unless `both`. */
function pairLoader(name: string, binding: number, dtype: DType, access: Access): string {
  const element = elementLoader(name, binding, dtype);
  const word = `return decode_${dtype}(src_${name}[index >> 1u]);`;
  const two = `let a = element_${name}(index);
  if (!both) { return vec2<f32>(a, 0.0); }
  return vec2<f32>(a, element_${name}(index + 1u));`;
  return `${element}
fn pair_${name}(index: u32, both: bool) -> vec2<f32> {
  ${access === 'vector' && dtype !== 'float32' ? word : two}
}`;
}
