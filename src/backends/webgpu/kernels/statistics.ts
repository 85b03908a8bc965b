/**
 * First pass over K and V: partial sums of their channels (for the means that smoothing takes) and, where V gets scales,
 * the largest magnitude of V's channels (for a power of two). Each workgroup reduces one chunk of one sequence
 * and head; the preparing kernels add up the few chunks, always in the same order.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { params, SEQUENCE, tables } from './layout.ts';
import { type Access, decoder, elementLoader, NONFINITE } from './storage.ts';

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
] as const;

const THREADS = 256;

/** Vectors of four channels in one chunk's record: K's sums, then V's maxima, then V's sums. */
export const statisticsVectors = (headDimPadded: number, valueDimPadded: number): number =>
  (headDimPadded + 2 * valueDimPadded) / 4;

export function statisticsKernel(config: StatisticsConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDim, valueDimPadded, keyMean, valueMax, valueMean } = config;
  const vectors = statisticsVectors(headDimPadded, valueDimPadded);
  const lanes = 2 ** Math.ceil(Math.log2(Math.max(headDimPadded, valueDimPadded) / 2));
  const rows = THREADS / lanes;

  // A lane has two neighbouring channels: one word of a 16-bit type.
  const reduce = (operand: 'k' | 'v', of: 'sum' | 'max', recordAt: number) => {
    const [dim, padded] = operand === 'k' ? [headDim, headDimPadded] : [valueDim, valueDimPadded];
    const add = of === 'sum' ? 'sum + x * inverse' : 'max(sum, abs(x))';
    const combine =
      of === 'sum' ? `red[lid] + red[lid + step * ${lanes}u]` : `max(red[lid], red[lid + step * ${lanes}u])`;
    return `
  {
    var sum = vec2<f32>();
    if (2u * lane < ${dim}u) {
      let base = sequence_field(sequence, ${operand === 'k' ? SEQUENCE.kSource : SEQUENCE.vSource}u) - P.${operand}Base + head * P.${operand}HeadStride + lane * 2u;
      let both = 2u * lane + 1u < ${dim}u;
      for (var token = first + row; token < last; token += ${rows}u) {
        let x = pair_${operand}(base + token * P.${operand}TokenStride, both);
        sum = ${add};
      }
    }
    red[lid] = sum;
    workgroupBarrier();
    for (var step = ${Math.floor(rows / 2)}u; step > 0u; step >>= 1u) {
      if (row < step) { red[lid] = ${combine}; }
      workgroupBarrier();
    }
    if (row == 0u && 2u * lane < ${padded}u) { partials[(record + ${recordAt}u) * 2u + lane] = red[lid]; }
    workgroupBarrier();
  }`;
  };

  return `
${params(0, STATISTICS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${keyMean ? pairLoader('k', 2, dtype, access) : ''}
${valueMax || valueMean ? pairLoader('v', 3, dtype, access) : ''}
@group(0) @binding(4) var<storage, read_write> partials: array<vec2<f32>>;
var<workgroup> red: array<vec2<f32>, ${THREADS}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let item = P.itemStart + group.x;
  let head = P.headStart + group.y;
  let sequence = item / P.chunks;
  let chunk = item % P.chunks;
  let length = sequence_field(sequence, ${SEQUENCE.keyLength}u);
  let perChunk = (length + P.chunks - 1u) / P.chunks;
  let first = min(length, chunk * perChunk);
  let last = min(length, first + perChunk);
  // Each term is divided, so that the sum of large values stays finite.
  let inverse = 1.0 / f32(max(length, 1u));
  let lane = lid % ${lanes}u;
  let row = lid / ${lanes}u;
  let record = ((head * P.sequences + sequence) * P.chunks + chunk) * ${vectors}u - P.partialBase;
${keyMean ? reduce('k', 'sum', 0) : ''}
${valueMax ? reduce('v', 'max', headDimPadded / 4) : ''}
${valueMean ? reduce('v', 'sum', (headDimPadded + valueDimPadded) / 4) : ''}
}`;
}

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
