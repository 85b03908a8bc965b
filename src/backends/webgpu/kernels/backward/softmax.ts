/**
 * Softmax of rows whose logsumexp does not give their weights: it is NaN, or too far from 0 to be accurate. They are few, so a
 * workgroup looks at the rows of a block one after the other, and walks over the keys of those that are marked.
 *
 * What made a row NaN is found on the way: a value leaves the row's weights as they are, anything else does not.
 */
import { dotInt8 } from '../attention-tiled.ts';
import {
  CODE_ROW_PARAMS,
  FLAG_NONFINITE_K,
  FLAG_NONFINITE_V,
  FLAG_UNSMOOTHED,
  MASK_PARAMS,
  OWN_TILE,
  params,
  rowVectors,
  SEQUENCE,
  tables,
} from '../layout.ts';
import { expOf, type ScoreMeaning, SOFTCAP, scoreStatements } from '../scores.ts';
import { EXCLUDED, EXCLUDED_BELOW, maskLoader } from '../storage.ts';
import { type GradientDims, gradientRow, ROW_FLAGS } from './layout.ts';

export interface SoftmaxAgainConfig extends ScoreMeaning, GradientDims {
  readonly packedDot: boolean;
}

export const SOFTMAX_AGAIN_PARAMS = [
  'tileStart',
  'headStart',
  'groupSize',
  'sequencesAt',
  'tilesAt',
  ...CODE_ROW_PARAMS,
  'gradientRowBase',
  ...MASK_PARAMS,
  'softcap',
  'inverseQuarterSoftcap',
] as const;

const THREADS = 64;

export function softmaxAgainKernel(config: SoftmaxAgainConfig): string {
  const { headDimPadded, mask, softcap, packedDot } = config;
  const vectors = rowVectors(headDimPadded);
  const { facts, vectors: gradientVectors } = gradientRow(config);
  const names = { constant: 'constant', mask: 'mask_row', poison: 'poison' };
  const { softcap: capping, mask: masking } = scoreStatements(config, 'f', names, 'key');
  return `
${packedDot ? 'requires packed_4x8_integer_dot_product;' : ''}
${params(0, SOFTMAX_AGAIN_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> key_rows: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> gradient_rows: array<vec4<u32>>;
${mask === undefined ? '' : maskLoader(5, mask)}
${softcap ? SOFTCAP : ''}
${dotInt8(packedDot)}
var<workgroup> maxima: array<f32, ${THREADS}>;
var<workgroup> sums: array<f32, ${THREADS}>;
var<workgroup> found: atomic<u32>;
var<workgroup> marked: atomic<u32>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let row_at = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
  let keys_at = head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);
  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  // Of most blocks no row is marked.
  if (lid < count) {
    let own = gradient_rows[(row_at + lid) * ${gradientVectors}u + ${facts}u - P.gradientRowBase].w;
    if ((own & ${ROW_FLAGS.again}u) != 0u) { atomicStore(&marked, 1u); }
  }
  if (workgroupUniformLoad(&marked) == 0u) { return; }
  for (var row = 0u; row < count; row++) {
    let at = (row_at + row) * ${gradientVectors}u + ${facts}u - P.gradientRowBase;
    let again = (gradient_rows[at].w & ${ROW_FLAGS.again}u) != 0u;
    var m = ${EXCLUDED};
    var l = 0.0;
    var poison = 0u;
    if (again) {
      let query_at = (row_at + row) * ${vectors}u - P.queryRowBase;
      let query = query_rows[query_at + ${vectors - 1}u];
      let scale = bitcast<f32>(query.x);
      let constant = bitcast<f32>(query.z);
      ${mask === undefined ? '' : `let mask_row = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + (first + row) * P.maskQueryStride;`}
      let low = max(0, i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(first + row));
      let high = min(length - 1, i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(first + row));
      for (var key = low + i32(lid); key <= high; key += ${THREADS}) {
        let key_at = (keys_at + u32(key)) * ${vectors}u - P.keyRowBase;
        var s = 0;
        for (var w = 0u; w < ${vectors - 1}u; w++) {
          let a = query_rows[query_at + w];
          let b = key_rows[key_at + w];
          s += dot_int8(a.x, b.x) + dot_int8(a.y, b.y) + dot_int8(a.z, b.z) + dot_int8(a.w, b.w);
        }
        let facts_k = key_rows[key_at + ${vectors - 1}u];
        var f = f32(s) * (scale * bitcast<f32>(facts_k.x)) - select(0.0, constant, (facts_k.y & ${FLAG_UNSMOOTHED}u) != 0u);
        ${capping}
        ${masking}
        if (f > ${EXCLUDED_BELOW}) {
          let updated = max(m, f);
          l = select(l * ${expOf(config, 'm - updated')}, 0.0, l == 0.0) + ${expOf(config, 'f - updated')};
          m = updated;
          if ((facts_k.y & ${FLAG_NONFINITE_K}u) != 0u || query.y != 0u) { poison |= ${ROW_FLAGS.weights}u; }
          if ((facts_k.y & ${FLAG_NONFINITE_V}u) != 0u) { poison |= ${ROW_FLAGS.scores}u; }
        }
      }
    }
    maxima[lid] = m;
    sums[lid] = l;
    if (poison != 0u) { atomicOr(&found, poison); }
    workgroupBarrier();
    if (lid == 0u) {
      if (again) {
        var largest = ${EXCLUDED};
        for (var i = 0u; i < ${THREADS}u; i++) { largest = max(largest, maxima[i]); }
        var sum = 0.0;
        for (var i = 0u; i < ${THREADS}u; i++) {
          if (sums[i] > 0.0) { sum += sums[i] * ${expOf(config, 'maxima[i] - largest')}; }
        }
        let own = gradient_rows[at];
        let flags = (own.w & ${ROW_FLAGS.channels | ROW_FLAGS.scores}u) | atomicLoad(&found);
        let sees = sum > 0.0;
        gradient_rows[at] = vec4<u32>(
          bitcast<u32>(select(0.0, largest, sees)), bitcast<u32>(select(0.0, 1.0 / max(sum, 1.0e-37f), sees)), own.z,
          select(0u, flags, sees));
      }
      atomicStore(&found, 0u);
    }
    workgroupBarrier();
  }
}`;
}
