/**
 * First pass over K and V: partial sums of K's channels (for its mean) and, where V is stored as float32 or bfloat16,
 * the largest magnitude of V's channels (for its power-of-two scale). Each workgroup reduces one chunk of one sequence
 * and head; the preparing kernels add up the few chunks, always in the same order.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { params, SEQUENCE, tables } from './layout.ts';
import { type Access, decoder, NONFINITE, operandLoader, range } from './storage.ts';

export interface StatisticsConfig {
  readonly dtype: DType;
  readonly access: Access;
  readonly headDim: number;
  readonly headDimPadded: number;
  readonly valueDim: number;
  readonly valueDimPadded: number;
  readonly mean: boolean;
  readonly valueMax: boolean;
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

const THREADS = 128;

/** Vectors of four channels in one chunk's record: K's sums, then V's maxima. */
export const statisticsVectors = (headDimPadded: number, valueDimPadded: number): number =>
  (headDimPadded + valueDimPadded) / 4;

export function statisticsKernel(config: StatisticsConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDim, valueDimPadded, mean, valueMax } = config;
  const vectors = statisticsVectors(headDimPadded, valueDimPadded);
  const lanes = 2 ** Math.ceil(Math.log2(Math.max(headDimPadded, valueDimPadded) / 16));
  const rows = THREADS / lanes;

  const reduce = (operand: 'k' | 'v', dim: number, padded: number, recordAt: number) => {
    const accumulate =
      operand === 'k'
        ? range(4).map((i) => `acc[${i}] += x[${i}] * inverse;`)
        : range(4).map((i) => `acc[${i}] = max(acc[${i}], abs(x[${i}]));`);
    const combine = (i: number) => {
      const [a, b] = [`red[lid * 4u + ${i}u]`, `red[(lid + step * ${lanes}u) * 4u + ${i}u]`];
      return operand === 'k' ? `${a} += ${b};` : `${a} = max(${a}, ${b});`;
    };
    return `
  {
    var acc: array<vec4<f32>, 4>;
    if (lane < ${padded / 16}u) {
      let base = sequence_field(sequence, ${operand === 'k' ? SEQUENCE.kSource : SEQUENCE.vSource}u) - P.${operand}Base + head * P.${operand}HeadStride + lane * 16u;
      let count = min(16u, max(${dim}u, lane * 16u) - lane * 16u);
      for (var token = first + row; token < last; token += ${rows}u) {
        let x = load_${operand}(base + token * P.${operand}TokenStride, count);
        ${accumulate.join(' ')}
      }
    }
    ${range(4)
      .map((i) => `red[lid * 4u + ${i}u] = acc[${i}];`)
      .join(' ')}
    workgroupBarrier();
    for (var step = ${rows / 2}u; step > 0u; step >>= 1u) {
      if (row < step) { ${range(4).map(combine).join(' ')} }
      workgroupBarrier();
    }
    if (row == 0u && lane < ${padded / 16}u) {
      for (var i = 0u; i < 4u; i++) { partials[record + ${recordAt}u + lane * 4u + i] = red[lid * 4u + i]; }
    }
    workgroupBarrier();
  }`;
  };

  return `
${params(0, STATISTICS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${mean ? operandLoader('k', 2, dtype, access) : ''}
${valueMax ? operandLoader('v', 3, dtype, access) : ''}
@group(0) @binding(4) var<storage, read_write> partials: array<vec4<f32>>;
var<workgroup> red: array<vec4<f32>, ${THREADS * 4}>;

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
  let inverse = 1.0 / f32(max(length, 1u));
  let lane = lid % ${lanes}u;
  let row = lid / ${lanes}u;
  let record = ((head * P.sequences + sequence) * P.chunks + chunk) * ${vectors}u - P.partialBase;
${mean ? reduce('k', headDim, headDimPadded, 0) : ''}
${valueMax ? reduce('v', valueDim, valueDimPadded, headDimPadded / 4) : ''}
}`;
}
