/**
 * Attention with subgroup matrices: INT8 QK where the device has such a product, FP16 (or FP32) PV.
 *
 * A workgroup owns `subgroups * rowTiles * M` queries; each subgroup owns whole rows and keeps their output in result
 * matrices. Elements of a matrix cannot be reached, so scores go through workgroup memory, where the lanes of a subgroup
 * (lanes / M of them to a row) scale, mask and exponentiate them, and P comes back as left matrices.
 *
 * A result matrix cannot be scaled by row either. The running maximum therefore stays where it is until a row outgrows it
 * by `2^headroom`; only then are the output matrices stored, rescaled and loaded again. P then reaches 2^headroom, which
 * float16 holds.
 *
 * Result matrices are separate variables: an array of them indexed in a loop is not kept in registers.
 */
import type { MatrixConfig } from '../capabilities.ts';
import { params, rowVectors, SEQUENCE, tables } from './layout.ts';
import type { MatrixMemory, MatrixOperations } from './matrix-operations.ts';
import { valueScale } from './prepare.ts';
import {
  ATTENTION_PARAMS,
  expOf,
  lseStatement,
  recordFloats,
  type ScoreConfig,
  scoreDeclarations,
  scoreStatements,
  storeChannels,
} from './scores.ts';
import { statisticsVectors } from './statistics.ts';
import { EXCLUDED, EXCLUDED_BELOW, range } from './storage.ts';

/** Sizes and strategies of a matrix kernel. */
export interface MatrixShape {
  readonly subgroups: number;
  /** Result tiles of M rows that each subgroup owns. */
  readonly rowTiles: number;
  /** Keys of a tile; divides 64. */
  readonly keys: number;
  /** Copy the tile's K (V) into workgroup memory first; otherwise matrices are loaded from the storage buffer. */
  readonly stageKeys: boolean;
  readonly stageValues: boolean;
  /** Powers of two by which a row may outgrow its maximum before the output is rescaled; 0: always exact maximum. */
  readonly headroom: number;
}

export interface MatrixKernelConfig extends ScoreConfig, MatrixShape {
  readonly operations: MatrixOperations;
  /** Q K^T: components i8 (result i32), or f16 or f32 (result f32). */
  readonly qk: MatrixConfig;
  /** P V: components f16 or f32. Same M as `qk`. */
  readonly pv: MatrixConfig;
  /** Lanes of a subgroup. */
  readonly lanes: number;
  readonly subgroupId: boolean;
}

const bytesOf = (component: string) => (component === 'i8' ? 1 : component === 'f16' ? 2 : 4);

/** Rows in workgroup memory are this many bytes longer than their contents: neighbouring rows then start in other banks. */
const ROW_PADDING = 16;

const stages = (config: Pick<MatrixKernelConfig, 'qk' | 'pv' | 'stageKeys' | 'stageValues'>) => ({
  // Quantized rows are converted on the way where the product takes no INT8, and V where it takes no FP16.
  query: config.qk.componentType !== 'i8',
  keys: config.stageKeys || config.qk.componentType !== 'i8',
  values: config.stageValues || config.pv.componentType !== 'f16',
});

/** Bytes of workgroup memory that the kernel takes. */
export function matrixWorkgroupBytes(
  config: MatrixShape & Pick<MatrixKernelConfig, 'qk' | 'pv'>,
  headDimPadded: number,
  valueDimPadded: number,
): number {
  const { subgroups, rowTiles, keys, qk, pv } = config;
  const rows = subgroups * rowTiles * qk.M;
  const staged = stages(config);
  const row = headDimPadded * bytesOf(qk.componentType) + ROW_PADDING;
  return (
    (staged.query ? rows * row : 0) +
    (staged.keys ? keys * row : 0) +
    (staged.values ? keys * (valueDimPadded * bytesOf(pv.componentType) + ROW_PADDING) : 0) +
    rows * (keys * 4 + ROW_PADDING) +
    rows * (keys * bytesOf(pv.componentType) + ROW_PADDING) +
    subgroups * pv.M * pv.N * bytesOf(pv.resultComponentType) +
    rows * 4 +
    keys * 8 +
    valueDimPadded * 4 +
    64
  );
}

export function matrixAttentionKernel(config: MatrixKernelConfig): string {
  const { operations, qk, pv, lanes, subgroupId, subgroups, rowTiles, keys, headroom } = config;
  const { headDimPadded, valueDim, valueDimPadded, keyScale, result, returnLse, scaleValues, mask } = config;
  const M = qk.M;
  const threads = subgroups * lanes;
  const rows = subgroups * rowTiles * M;
  const lanesPerRow = lanes / M;
  const columns = keys / lanesPerRow;
  const staged = stages(config);
  const rowWords = rowVectors(headDimPadded) * 4;
  const usesF16 = pv.componentType === 'f16' || qk.componentType === 'f16' || pv.resultComponentType === 'f16';
  const T = range(rowTiles);
  const S = range(keys / qk.N);
  const O = range(valueDimPadded / pv.N);
  const C = range(columns);
  const log = (n: number) => range(Math.log2(n));

  // Strides in components.
  const padding = (component: string) => ROW_PADDING / bytesOf(component);
  const qkStride = headDimPadded + padding(qk.componentType);
  const scoreStride = keys + padding('i32');
  const probabilityStride = keys + padding(pv.componentType);
  const valueStride = staged.values ? valueDimPadded + padding(pv.componentType) : valueDimPadded;
  const scoreType = qk.resultComponentType;

  const component = (name: string) => name as MatrixMemory['component'];
  const memory = {
    query: { name: staged.query ? 'tile_q' : 'query_rows', component: component(qk.componentType) },
    keys: { name: staged.keys ? 'tile_k' : 'key_rows', component: component(qk.componentType) },
    values: { name: staged.values ? 'tile_v' : 'value_rows', component: component(pv.componentType) },
    scores: { name: 'scores', component: component(scoreType) },
    probabilities: { name: 'probabilities', component: component(pv.componentType) },
    output: { name: 'output_tile', component: component(pv.resultComponentType) },
  } satisfies Record<string, MatrixMemory>;

  const arrayOf = (name: string, type: string, elements: number) =>
    type === 'i8'
      ? `var<workgroup> ${name}: array<i32, ${elements / 4}>;`
      : `var<workgroup> ${name}: array<${type}, ${elements}>;`;

  const tileRow = (rt: number) => `(subgroup * ${rowTiles * M}u + ${rt * M}u)`;
  const row = (rt: number) => `(${tileRow(rt)} + lane_row)`;

  /** Copies quantized rows into workgroup memory, as they are or converted to the product's component. */
  const stageRows = (to: string, from: string, first: string, count: number, base: string) =>
    qk.componentType === 'i8'
      ? `for (var i = t; i < ${count * rowWords}u; i += ${threads}u) { ${to}[i] = ${from}[${first} * ${rowWords}u + i - ${base}]; }`
      : `for (var i = t; i < ${(count * headDimPadded) / 4}u; i += ${threads}u) {
      let r = i / ${headDimPadded / 4}u; let w = i % ${headDimPadded / 4}u;
      let word = ${from}[(${first} + r) * ${rowWords}u + w - ${base}];
      for (var e = 0u; e < 4u; e++) { ${to}[r * ${qkStride}u + 4u * w + e] = ${qk.componentType}(extractBits(word, e * 8u, 8u)); }
    }`;
  // Four values at a time; a matrix is loaded from an array of scalars, so they are written one by one.
  const stageValues = `for (var i = t; i < ${(keys * valueDimPadded) / 4}u; i += ${threads}u) {
      let x = ${pv.componentType === 'f16' ? 'value_rows[AT]' : 'unpack_values(value_rows[AT])'};
      let to = i / ${valueDimPadded / 4}u * ${valueStride}u + i % ${valueDimPadded / 4}u * 4u;
      ${['x', 'y', 'z', 'w'].map((c, e) => `tile_v[to + ${e}u] = ${pv.componentType}(x.${c});`).join(' ')}
    }`.replace('AT', `(kv_row + first) * ${valueDimPadded / 4}u + i - P.valueRowBase`);

  const queryOffset = (rt: number, step: number) =>
    staged.query
      ? `${tileRow(rt)} * ${qkStride}u + ${step * qk.K}u`
      : `(query_row + ${tileRow(rt)}) * ${rowWords * 4}u - P.queryRowBase * 16u + ${step * qk.K}u`;
  const keyOffset = (n: number, step: number) =>
    staged.keys
      ? `${n * qk.N * qkStride + step * qk.K}u`
      : `(kv_row + first + ${n * qk.N}u) * ${rowWords * 4}u - P.keyRowBase * 16u + ${step * qk.K}u`;
  const keyStride = `${qk.componentType === 'i8' ? rowWords * 4 : qkStride}u`;

  const multiplyKeys = range(headDimPadded / qk.K)
    .map((step) => {
      const lefts = T.map((rt) => operations.loadLeft(qk, `q_${rt}`, memory.query, queryOffset(rt, step), keyStride));
      const body = S.map((n) => {
        const [load, right] = operations.loadRight(qk, `k_${n}`, memory.keys, keyOffset(n, step), keyStride, true);
        return `${load} ${T.map((rt) => operations.multiplyAccumulate(qk, lefts[rt]?.[1] ?? right, right, `s_${rt}_${n}`)).join(' ')}`;
      });
      return `{ ${lefts.map(([load]) => load).join(' ')}
      ${body.join('\n      ')} }`;
    })
    .join('\n    ');

  const multiplyValues = range(keys / pv.K)
    .map((step) => {
      const lefts = T.map((rt) =>
        operations.loadLeft(
          pv,
          `p_${rt}`,
          memory.probabilities,
          `${tileRow(rt)} * ${probabilityStride}u + ${step * pv.K}u`,
          `${probabilityStride}u`,
        ),
      );
      const body = O.map((j) => {
        const offset = staged.values
          ? `${step * pv.K * valueStride + j * pv.N}u`
          : `(kv_row + first + ${step * pv.K}u) * ${valueStride}u - P.valueRowBase * 4u + ${j * pv.N}u`;
        const [load, right] = operations.loadRight(pv, `v_${j}`, memory.values, offset, `${valueStride}u`, false);
        return `${load} ${T.map((rt) => operations.multiplyAccumulate(pv, lefts[rt]?.[1] ?? right, right, `o_${rt}_${j}`)).join(' ')}`;
      });
      return `{ ${lefts.map(([load]) => load).join(' ')}
      ${body.join('\n      ')} }`;
    })
    .join('\n    ');

  const softmax = (rt: number) => {
    const score = (c: number) => {
      const f = `f_${c}`;
      const column = `(${c * lanesPerRow}u + lane_column)`;
      const { softcap, mask: masking } = scoreStatements(
        config,
        f,
        { constant: `constant_${rt}`, mask: `mask_${rt}`, poison: `poison_${rt}` },
        `(start + i32(${column}))`,
      );
      const scale = keyScale === 'token' ? `key_scale[${column}]` : 'key_scale[0]';
      return `var ${f} = f32(scores[at + ${column}]) * (scale_${rt} * ${scale}); ${softcap}
      if (edge) { let key = start + i32(${column}); if (key < low_${rt} || key > high_${rt}) { ${f} = ${EXCLUDED}; } }
      ${masking === '' ? '' : `if (${f} > ${EXCLUDED_BELOW}) ${masking.startsWith('{') ? masking : `{ ${masking} }`}`}`;
    };
    return `
    {
      let at = ${row(rt)} * ${scoreStride}u;
      ${C.map(score).join('\n      ')}
      if (flagged) {
        ${C.map((c) => `if (f_${c} > ${EXCLUDED_BELOW}) { poison_${rt} |= key_flags[${c * lanesPerRow}u + lane_column]; }`).join('\n        ')}
      }
      var largest = ${C.slice(1).reduce((acc, c) => `max(${acc}, f_${c})`, 'f_0')};
      ${log(lanesPerRow)
        .map((s) => `largest = max(largest, subgroupShuffleXor(largest, ${1 << s}u));`)
        .join(' ')}
      let held = m_${rt} >= ${EXCLUDED_BELOW};
      let raised = largest >= ${EXCLUDED_BELOW} && (!held || largest > m_${rt} + ${config.softcap || (mask !== undefined && mask !== 'bool') ? (headroom * Math.LN2).toFixed(6) : `${headroom}.0`});
      let updated = select(m_${rt}, largest, raised);
      let alpha = select(select(1.0, ${expOf(config, `m_${rt} - updated`)}, held), 1.0, !raised);
      if (raised && held) { atomicStore(&moved[parity], 1u); }
      if (lane_column == 0u) { row_factor[${row(rt)}] = alpha; }
      m_${rt} = updated;
      l_${rt} *= alpha;
      let to = ${row(rt)} * ${probabilityStride}u;
      ${C.map(
        (c) => `{ let p = select(${expOf(config, `f_${c} - updated`)}, 0.0, f_${c} < ${EXCLUDED_BELOW}); l_${rt} += p;
        probabilities[to + ${c * lanesPerRow}u + lane_column] = ${pv.componentType}(p); }`,
      ).join('\n      ')}
    }`;
  };

  const ownOutput = `subgroup * ${pv.M * pv.N}u`;
  const rescale = T.map((rt) =>
    O.map(
      (j) => `${operations.storeResult(pv, `o_${rt}_${j}`, memory.output, ownOutput, `${pv.N}u`)}
      workgroupBarrier();
      for (var i = lane; i < ${pv.M * pv.N}u; i += ${lanes}u) { output_tile[${ownOutput} + i] *= ${pv.resultComponentType}(row_factor[${tileRow(rt)} + i / ${pv.N}u]); }
      workgroupBarrier();
      ${operations.loadResult(pv, `o_${rt}_${j}`, memory.output, ownOutput, `${pv.N}u`)}
      workgroupBarrier();`,
    ).join('\n      '),
  ).join('\n      ');

  const floats = recordFloats(valueDimPadded);
  const finishRow = (rt: number) => {
    const maximum = config.softcap ? `m_${rt}` : `m_${rt} + constant_${rt}`;
    return `
  if (poison_${rt} != 0u || (l_${rt} > 0.0 && flags_${rt} != 0u)) { l_${rt} = -1.0e30f; }
  ${log(lanesPerRow)
    .map((s) => `l_${rt} += subgroupShuffleXor(l_${rt}, ${1 << s}u);`)
    .join(' ')}
  if (lane_column == 0u) {
    // The sign carries NaN: a sum is positive, and 0 for a row that attends to nothing.
    row_factor[${row(rt)}] = select(select(1.0 / max(l_${rt}, 1.0e-37f), 0.0, l_${rt} == 0.0), -1.0, l_${rt} < 0.0);
    if (${row(rt)} < count) {
      ${result === 'final' && returnLse ? lseStatement(config, `(first_row + ${row(rt)})`, `m_${rt}`, `l_${rt}`, `constant_${rt}`) : ''}
      ${
        result === 'partial'
          ? `let record = ${recordAt(`(first_row + ${row(rt)})`)};
      records[record + ${valueDimPadded}u] = select(${maximum}, ${EXCLUDED}, l_${rt} == 0.0);
      records[record + ${valueDimPadded + 1}u] = l_${rt};`
          : ''
      }
    }
  }`;
  };
  const rowElement = (r: string) =>
    `(sequence_field(sequence, ${SEQUENCE.output}u) + head * P.outputHeadStride + ${r} * P.outputTokenStride)`;
  const recordAt = (r: string) =>
    `(${rowElement(r)} / ${valueDim}u * P.splits + P.splitIndex + group.z) * ${floats}u - P.recordBase`;
  const finish = T.map((rt) =>
    O.map(
      (j) => `
  ${operations.storeResult(pv, `o_${rt}_${j}`, memory.output, ownOutput, `${pv.N}u`)}
  workgroupBarrier();
  for (var i = lane; i < ${(pv.M * pv.N) / 4}u; i += ${lanes}u) {
    let r = ${tileRow(rt)} + i / ${pv.N / 4}u;
    let c = ${j * pv.N}u + i % ${pv.N / 4}u * 4u;
    let factor = row_factor[r];
    let y_at = ${ownOutput} + 4u * i;
    if (r < count) {
      let y = vec4<f32>(f32(output_tile[y_at]), f32(output_tile[y_at + 1u]), f32(output_tile[y_at + 2u]), f32(output_tile[y_at + 3u])) * factor${scaleValues ? ' * value_scales[c / 4u]' : ''};
      ${
        result === 'final'
          ? `let at = ${rowElement('(first_row + r)')} - P.outputBase;
      ${storeChannels(config, 'at', 'c', 'y', 'factor < 0.0')}`
          : `let to = ${recordAt('(first_row + r)')} + c;
      records[to] = y.x; records[to + 1u] = y.y; records[to + 2u] = y.z; records[to + 3u] = y.w;`
      }
    }
  }
  workgroupBarrier();`,
    ).join(''),
  ).join('');

  const main = `
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32, @builtin(subgroup_size) subgroup_lanes: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32${subgroupId ? ', @builtin(subgroup_id) subgroup_index: u32' : ''}) {
  let t = ${subgroupId ? 'subgroup_index * subgroup_lanes + subgroup_lane' : 'lid'};
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  let lane_row = lane / ${lanesPerRow}u;
  let lane_column = lane % ${lanesPerRow}u;
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let first_row = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);
  let query_row = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row;
  let kv_row = head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);

  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(first_row);
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(first_row);
  let begin = i32(P.keyStart + group.z * P.keySpan);
  let key_begin = max(begin, max(0, lower)) / ${keys} * ${keys};
  let key_end = min(min(length, begin + i32(P.keySpan)), upper + i32(count));
  ${staged.query ? stageRows('tile_q', 'query_rows', 'query_row', rows, 'P.queryRowBase * 4u') : ''}
  ${
    scaleValues
      ? `let value_record = ((head / P.groupSize * P.sequences + sequence) * P.chunks) * ${statisticsVectors(headDimPadded, valueDimPadded)}u + ${headDimPadded / 4}u - P.partialBase;
  for (var i = t; i < ${valueDimPadded / 4}u; i += ${threads}u) { value_scales[i] = value_scale(value_record + i, P.chunks, 1); }`
      : ''
  }
${T.map(
  (rt) => `  let facts_${rt} = (query_row + ${row(rt)}) * ${rowWords}u + ${rowWords - 4}u - P.queryRowBase * 4u;
  let scale_${rt} = bitcast<f32>(query_rows[facts_${rt}]); let flags_${rt} = u32(query_rows[facts_${rt} + 1u]); let constant_${rt} = bitcast<f32>(query_rows[facts_${rt} + 2u]);
  var m_${rt} = ${EXCLUDED}; var l_${rt} = 0.0; var poison_${rt} = 0u;
  let low_${rt} = lower + i32(${row(rt)}); let high_${rt} = min(length - 1, upper + i32(${row(rt)}));
  ${mask === undefined ? '' : `let mask_${rt} = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + (first_row + ${row(rt)}) * P.maskQueryStride;`}
  ${O.map((j) => operations.declareResult(pv, `o_${rt}_${j}`)).join(' ')}
  ${S.map((n) => operations.declareResult(qk, `s_${rt}_${n}`)).join(' ')}`,
).join('\n')}

  var parity = 0u;
  for (var start = key_begin; start < key_end; start += ${keys}) {
    let first = u32(start);
    workgroupBarrier();
    ${staged.keys ? stageRows('tile_k', 'key_rows', '(kv_row + first)', keys, 'P.keyRowBase * 4u') : ''}
    ${staged.values ? stageValues : ''}
    if (t < ${keys}u) {
      let at = (kv_row + first + t) * ${rowWords}u + ${rowWords - 4}u - P.keyRowBase * 4u;
      key_scale[t] = bitcast<f32>(key_rows[at]);
      // Rows past the end are whatever scratch holds; no row attends to them.
      let flags = select(0u, u32(key_rows[at + 1u]), start + i32(t) < length);
      key_flags[t] = flags;
      if (flags != 0u) { atomicStore(&poisonous[parity], 1u); }
    }
    if (t == 0u) { atomicStore(&moved[1u - parity], 0u); atomicStore(&poisonous[1u - parity], 0u); }
    workgroupBarrier();
    ${T.map((rt) => S.map((n) => operations.clear(qk, `s_${rt}_${n}`)).join(' ')).join('\n    ')}
    ${multiplyKeys}
    ${T.map((rt) => S.map((n) => operations.storeResult(qk, `s_${rt}_${n}`, memory.scores, `${tileRow(rt)} * ${scoreStride}u + ${n * qk.N}u`, `${scoreStride}u`)).join('\n    ')).join('\n    ')}
    workgroupBarrier();
    let edge = start + ${keys} > length || start < lower + ${rows - 1} || start + ${keys - 1} > upper;
    let flagged = atomicLoad(&poisonous[parity]) != 0u;
    ${T.map(softmax).join('')}
    if (workgroupUniformLoad(&moved[parity]) != 0u) {
      ${rescale}
    }
    ${multiplyValues}
    parity = 1u - parity;
  }
  workgroupBarrier();
${T.map(finishRow).join('')}
  workgroupBarrier();
${finish}
}`;

  return `
enable subgroups;
${operations.enable}
${usesF16 ? 'enable f16;' : ''}
${subgroupId ? 'requires subgroup_id;' : ''}
${operations.enable === '' ? '' : `diagnostic(off, ${operations.enable.includes('chromium') ? 'chromium.' : ''}subgroup_matrix_uniformity);`}
${params(0, ATTENTION_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<i32>;
@group(0) @binding(3) var<storage, read> key_rows: array<i32>;
@group(0) @binding(4) var<storage, read> value_rows: array<${valueRowType(pv.componentType, staged.values)}>;
${pv.componentType === 'f16' ? '' : 'fn unpack_values(w: vec2<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)); }'}
${scoreDeclarations(config)}
${scaleValues ? valueScale(statisticsVectors(headDimPadded, valueDimPadded)) : ''}
${staged.query ? arrayOf('tile_q', qk.componentType, rows * qkStride) : ''}
${staged.keys ? arrayOf('tile_k', qk.componentType, keys * qkStride) : ''}
${staged.values ? arrayOf('tile_v', pv.componentType, keys * valueStride) : ''}
${arrayOf('scores', scoreType, rows * scoreStride)}
${arrayOf('probabilities', pv.componentType, rows * probabilityStride)}
${arrayOf('output_tile', pv.resultComponentType, subgroups * pv.M * pv.N)}
var<workgroup> row_factor: array<f32, ${rows}>;
var<workgroup> key_scale: array<f32, ${keys}>;
var<workgroup> key_flags: array<u32, ${keys}>;
${scaleValues ? `var<workgroup> value_scales: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
var<workgroup> moved: array<atomic<u32>, 2>;
var<workgroup> poisonous: array<atomic<u32>, 2>;
${operations.declarations()}
${main}`;
}

/** How rows of V, FP16 in storage, are bound: as matrices are loaded from them, or four values at a time. */
const valueRowType = (component: string, staged: boolean) =>
  component !== 'f16' ? 'vec2<u32>' : staged ? 'vec4<f16>' : 'f16';
