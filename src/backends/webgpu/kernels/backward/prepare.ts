/**
 * Rows of the gradient kernels in float32: Q and dO with what is known of each row, K and V.
 *
 * A NaN or an infinity is stored as 0. Q's and K's are in the flags of the rows of codes, V's in those of K, and dO's here.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { OWN_TILE, params, rowVectors, SEQUENCE, tables } from '../layout.ts';
import { loadMean, THREADS } from '../prepare.ts';
import { LOG2E } from '../scores.ts';
import { MEAN_FACTOR, statisticsVectors } from '../statistics.ts';
import { type Access, decoder, NONFINITE, operandLoader, range } from '../storage.ts';
import { GRADIENT_BLOCK, type GradientDims, gradientKey, gradientRow, PLACE, PLACES, ROW_FLAGS } from './layout.ts';

export interface GradientRowsConfig extends GradientDims {
  readonly dtype: DType;
  /** Of Q, and of the output. */
  readonly queryAccess: Access;
  readonly outputAccess: Access;
  readonly headDim: number;
  readonly valueDim: number;
  /** Scores include what smoothing took. */
  readonly softcap: boolean;
  /** Scores are in base e, not 2. */
  readonly natural: boolean;
}

export const GRADIENT_ROWS_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'placesAt',
  'qHeadStride',
  'qTokenStride',
  'qBase',
  'outputHeadStride',
  'outputTokenStride',
  'outputBase',
  'dOutputHeadStride',
  'dOutputTokenStride',
  'dOutputBase',
  'lseHeadStride',
  'lseBase',
  'rowsPerHead',
  'queryRowBase',
  'gradientRowBase',
] as const;

/**
 * A logsumexp, or what smoothing took from a row's scores, beyond it has lost too much to rounding: the row's softmax is made anew. To
 * this size a weight is right to 1 part in 8000.
 */
const LARGEST_LSE = '2048.0';

/** Loads 16 channels of a row into `x`; those of rows behind the last are 0. */
const loadRow = (name: string, x: string, source: string, stride: string, dim: number) =>
  `var ${x}: array<vec4<f32>, 4>;
    if (row < count) { ${x} = load_${name}(${source} + row * ${stride} + channel, min(16u, max(${dim}u, channel) - channel)); }`;

/** Rows of Q and dO, `rowsum(dO o O)`, and how weights come from the logsumexp. */
export function gradientRowsKernel(config: GradientRowsConfig): string {
  const { dtype, queryAccess, outputAccess, headDim, headDimPadded, valueDim, valueDimPadded, softcap, natural } =
    config;
  const { dOutput, facts, channels, channelWords, vectors } = gradientRow(config);
  const [queryChunks, chunks] = [headDimPadded / 16, valueDimPadded / 16];
  const codes = rowVectors(headDimPadded);
  const source = (field: number, name: string, at = `place_of(sequence, ${field}u)`) =>
    `let ${name}_source = ${at} - P.${name}Base + head * P.${name}HeadStride + first * P.${name}TokenStride;`;
  return `
${params(0, GRADIENT_ROWS_PARAMS)}
${tables(1)}
${PLACES}
${NONFINITE}
${decoder(dtype)}
${operandLoader('q', 2, dtype, queryAccess)}
${operandLoader('dOutput', 3, dtype, 'scalar')}
${operandLoader('output', 4, dtype, outputAccess)}
@group(0) @binding(5) var<storage, read> lse: array<u32>;
@group(0) @binding(6) var<storage, read> query_rows: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> gradient_rows: array<vec4<u32>>;
var<workgroup> delta_partial: array<f32, ${GRADIENT_BLOCK * chunks}>;
var<workgroup> flags: array<atomic<u32>, ${GRADIENT_BLOCK}>;
var<workgroup> channels: array<atomic<u32>, ${GRADIENT_BLOCK * channelWords}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  ${source(0, 'q', `sequence_field(sequence, ${SEQUENCE.qSource}u)`)}
  ${source(PLACE.dOutput, 'dOutput')}
  ${source(PLACE.output, 'output')}
  let row_at = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
  for (var item = lid; item < ${GRADIENT_BLOCK * queryChunks}u; item += ${THREADS}u) {
    let row = item / ${queryChunks}u;
    let channel = item % ${queryChunks}u * 16u;
    ${loadRow('q', 'x', 'q_source', 'P.qTokenStride', headDim)}
    let at = (row_at + row) * ${vectors}u + channel / 4u - P.gradientRowBase;
    for (var i = 0u; i < 4u; i++) { gradient_rows[at + i] = bitcast<vec4<u32>>(x[i]); }
  }
  for (var item = lid; item < ${GRADIENT_BLOCK * chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    nonfinite = 0u;
    ${loadRow('dOutput', 'x', 'dOutput_source', 'P.dOutputTokenStride', valueDim)}
    if (nonfinite != 0u) {
      atomicOr(&flags[row], ${ROW_FLAGS.channels | ROW_FLAGS.scores}u);
      for (var e = 0u; e < 16u && channel + e < ${valueDim}u; e++) {
        nonfinite = 0u;
        let ignored = element_dOutput(dOutput_source + row * P.dOutputTokenStride + channel + e);
        atomicOr(&channels[row * ${channelWords}u + channel / 32u], nonfinite << (channel % 32u + e));
      }
    }
    nonfinite = 0u;
    ${loadRow('output', 'y', 'output_source', 'P.outputTokenStride', valueDim)}
    if (nonfinite != 0u) { atomicOr(&flags[row], ${ROW_FLAGS.scores}u); }
    let at = (row_at + row) * ${vectors}u + ${dOutput}u + channel / 4u - P.gradientRowBase;
    for (var i = 0u; i < 4u; i++) { gradient_rows[at + i] = bitcast<vec4<u32>>(x[i]); }
    delta_partial[item] = ${range(4)
      .map((i) => `dot(x[${i}], y[${i}])`)
      .join(' + ')};
  }
  workgroupBarrier();
  if (lid >= ${GRADIENT_BLOCK}u) { return; }
  let at = (row_at + lid) * ${vectors}u - P.gradientRowBase;
  ${range(vectors - channels)
    .map((v) => {
      const words = range(4).map((w) =>
        4 * v + w < channelWords ? `atomicLoad(&channels[lid * ${channelWords}u + ${4 * v + w}u])` : '0u',
      );
      return `gradient_rows[at + ${channels + v}u] = vec4<u32>(${words.join(', ')});`;
    })
    .join('\n  ')}
  var own = vec4<u32>();
  if (lid < count) {
    let bits = lse[place_of(sequence, ${PLACE.lse}u) - P.lseBase + head * P.lseHeadStride + first + lid];
    // Minus infinity: the row sees nothing.
    if (bits != 0xff800000u) {
      var delta = 0.0;
      for (var i = 0u; i < ${chunks}u; i++) { delta += delta_partial[lid * ${chunks}u + i]; }
      let constant = bitcast<f32>(query_rows[(row_at + lid) * ${codes}u + ${codes - 1}u - P.queryRowBase].z);
      let bad = (bits & 0x7f800000u) == 0x7f800000u;
      let whole = bitcast<f32>(select(bits, 0u, bad))${natural ? '' : ` * ${LOG2E}`};
      let again = bad || abs(whole) > ${LARGEST_LSE}${softcap ? '' : ` || abs(constant) > ${LARGEST_LSE}`};
      own = vec4<u32>(
        bitcast<u32>(whole${softcap ? '' : ' - constant'}), bitcast<u32>(select(1.0, 0.0, again)), bitcast<u32>(delta),
        atomicLoad(&flags[lid]) | select(0u, ${ROW_FLAGS.again}u, again));
    }
  }
  gradient_rows[at + ${facts}u] = own;
}`;
}

export interface GradientKeysConfig extends GradientDims {
  readonly dtype: DType;
  readonly access: Access;
  readonly headDim: number;
  readonly valueDim: number;
  /** Subtract K's mean. */
  readonly smoothed: boolean;
}

export const GRADIENT_KEYS_PARAMS = [
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
  'partialBase',
  'gradientKeyBase',
] as const;

/** Rows of K and V. */
export function gradientKeysKernel(config: GradientKeysConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDim, valueDimPadded, smoothed } = config;
  const { value, vectors } = gradientKey(config);
  const chunks = vectors / 4;
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  // A key that no row sees may be so large that the difference overflows, and infinity times a weight of 0 is NaN.
  const less = (i: number) =>
    `x[${i}] = clamp(x[${i}] - mean[channel / 4u + ${i}u], vec4<f32>(-3.4e38f), vec4<f32>(3.4e38f));`;
  return `
${params(0, GRADIENT_KEYS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('k', 2, dtype, access)}
${operandLoader('v', 3, dtype, access)}
${smoothed ? '@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;' : ''}
@group(0) @binding(5) var<storage, read_write> gradient_keys: array<vec4<f32>>;
${smoothed ? `var<workgroup> mean: array<vec4<f32>, ${headDimPadded / 4}>;${MEAN_FACTOR(statistics)}` : ''}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let k_source = sequence_field(sequence, ${SEQUENCE.kSource}u) - P.kBase + head * P.kHeadStride + first * P.kTokenStride;
  let v_source = sequence_field(sequence, ${SEQUENCE.vSource}u) - P.vBase + head * P.vHeadStride + first * P.vTokenStride;
  let row_at = head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + first;
${
  smoothed
    ? `  let record = ((head * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;
${loadMean(headDimPadded / 4, statistics)}
  workgroupBarrier();`
    : ''
}
  for (var item = lid; item < ${GRADIENT_BLOCK * chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let vector = item % ${chunks}u * 4u;
    let at = (row_at + row) * ${vectors}u + vector - P.gradientKeyBase;
    if (vector < ${value}u) {
      let channel = vector * 4u;
      ${loadRow('k', 'x', 'k_source', 'P.kTokenStride', headDim)}
      ${smoothed ? `if (row < count) { ${range(4).map(less).join(' ')} }` : ''}
      for (var i = 0u; i < 4u; i++) { gradient_keys[at + i] = x[i]; }
    } else {
      let channel = (vector - ${value}u) * 4u;
      ${loadRow('v', 'x', 'v_source', 'P.vTokenStride', valueDim)}
      for (var i = 0u; i < 4u; i++) { gradient_keys[at + i] = x[i]; }
    }
  }
}`;
}
