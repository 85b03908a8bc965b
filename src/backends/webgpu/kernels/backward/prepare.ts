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

/** Magnitudes of the rows of a block, of two operands, `largest[row]` and `largest[GRADIENT_BLOCK + row]`, and the powers of two that rows are divided by. */
export const POWERS = `
var<workgroup> largest: array<atomic<u32>, ${2 * GRADIENT_BLOCK}>;
fn note_largest(at: u32, m: vec4<f32>) {
  atomicMax(&largest[at], bitcast<u32>(max(max(m.x, m.y), max(m.z, m.w))));
}
/** The exponent's field of the power of two that a row is divided by. */
fn power_field(at: u32) -> u32 { return clamp(atomicLoad(&largest[at]) >> 23u, 2u, 254u) - 1u; }
fn power(at: u32) -> f32 { return bitcast<f32>(power_field(at) << 23u); }
fn over_power(at: u32) -> f32 { return bitcast<f32>((254u - power_field(at)) << 23u); }`;

const MAGNITUDES = `${POWERS}
fn note_magnitude(at: u32, x: array<vec4<f32>, 4>) {
  note_largest(at, max(max(abs(x[0]), abs(x[1])), max(abs(x[2]), abs(x[3]))));
}
fn halves(x: vec4<f32>, y: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(x.xy), pack2x16float(x.zw), pack2x16float(y.xy), pack2x16float(y.zw));
}`;

/** A loop over 16 channels of each row at a time. */
const eachItem = (
  chunks: number,
  body: string,
) => `for (var item = lid; item < ${GRADIENT_BLOCK * chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let channel = item % ${chunks}u * 16u;
    ${body}
  }`;

/** Writes 16 channels `x` of a row in float16. */
const storeHalves = (buffer: string, at: string, magnitude: string) => `{ let over = over_power(${magnitude});
      ${range(2)
        .map((i) => `${buffer}[${at} + ${i}u] = halves(x[${2 * i}] * over, x[${2 * i + 1}] * over);`)
        .join(' ')} }`;

/** Rows of Q and dO, `rowsum(dO o O)`, and how weights come from the logsumexp. */
export function gradientRowsKernel(config: GradientRowsConfig): string {
  const { dtype, queryAccess, outputAccess, headDim, headDimPadded, valueDim, valueDimPadded, softcap, natural } =
    config;
  const half = config.half === true;
  const { dOutput, ready, facts, scales, channels, channelWords, vectors } = gradientRow(config);
  const [queryChunks, chunks] = [headDimPadded / 16, valueDimPadded / 16];
  const codes = rowVectors(headDimPadded);
  const source = (field: number, name: string, at = `place_of(sequence, ${field}u)`) =>
    `let ${name}_source = ${at} - P.${name}Base + head * P.${name}HeadStride + first * P.${name}TokenStride;`;
  return `
${params(0, GRADIENT_ROWS_PARAMS)}
${tables(1)}
${PLACES}
${NONFINITE}
${decoder(dtype)}${half ? MAGNITUDES : ''}
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
    ${
      half
        ? 'note_magnitude(row, x);'
        : `let at = (row_at + row) * ${vectors}u + channel / 4u - P.gradientRowBase;
    for (var i = 0u; i < 4u; i++) { gradient_rows[at + i] = bitcast<vec4<u32>>(x[i]); }`
    }
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
    ${
      half
        ? `note_magnitude(${GRADIENT_BLOCK}u + row, x);`
        : `let at = (row_at + row) * ${vectors}u + ${dOutput}u + channel / 4u - P.gradientRowBase;
    for (var i = 0u; i < 4u; i++) { gradient_rows[at + i] = bitcast<vec4<u32>>(x[i]); }`
    }
    delta_partial[item] = ${range(4)
      .map((i) => `dot(x[${i}], y[${i}])`)
      .join(' + ')};
  }
  workgroupBarrier();
  ${
    half
      ? [
          eachItem(
            queryChunks,
            `${loadRow('q', 'x', 'q_source', 'P.qTokenStride', headDim)}
    ${storeHalves('gradient_rows', `(row_at + row) * ${vectors}u + channel / 8u - P.gradientRowBase`, 'row')}`,
          ),
          eachItem(
            chunks,
            `${loadRow('dOutput', 'x', 'dOutput_source', 'P.dOutputTokenStride', valueDim)}
    ${storeHalves('gradient_rows', `(row_at + row) * ${vectors}u + ${dOutput}u + channel / 8u - P.gradientRowBase`, `${GRADIENT_BLOCK}u + row`)}`,
          ),
        ].join('\n  ')
      : ''
  }
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
  ${half ? `var needed = vec4<f32>(0.0, 1.0e30, 1.0, 0.0);` : ''}
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
      ${
        half
          ? `let q_power = power(lid);
      needed = vec4<f32>(
        bitcast<f32>(query_rows[(row_at + lid) * ${codes}u + ${codes - 1}u - P.queryRowBase].x),
        whole${softcap ? '' : ' - constant'} - (f32(power_field(${GRADIENT_BLOCK}u + lid)) - 127.0), select(q_power, -q_power, own.w != 0u), delta * over_power(${GRADIENT_BLOCK}u + lid));`
          : ''
      }
    }
  }
  ${
    half
      ? `gradient_rows[at + ${ready}u] = bitcast<vec4<u32>>(needed);
  gradient_rows[at + ${scales}u] = bitcast<vec4<u32>>(vec4<f32>(power(lid), power(${GRADIENT_BLOCK}u + lid), 0.0, 0.0));`
      : ''
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
  'keyRowBase',
  'gradientKeyBase',
] as const;

/** Rows of K and V. */
export function gradientKeysKernel(config: GradientKeysConfig): string {
  const { dtype, access, headDim, headDimPadded, valueDim, valueDimPadded, smoothed } = config;
  const half = config.half === true;
  const { value, ready, vectors } = gradientKey(config);
  const [keyChunks, valueChunks] = [headDimPadded / 16, valueDimPadded / 16];
  const chunks = keyChunks + valueChunks;
  const codes = rowVectors(headDimPadded);
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  // A key that no row sees may be so large that the difference overflows, and infinity times a weight of 0 is NaN.
  const less = (i: number) =>
    `x[${i}] = clamp(x[${i}] - mean[channel / 4u + ${i}u], vec4<f32>(-3.4e38f), vec4<f32>(3.4e38f));`;
  const loadKey = `${loadRow('k', 'x', 'k_source', 'P.kTokenStride', headDim)}
      ${smoothed ? `if (row < count) { ${range(4).map(less).join(' ')} }` : ''}`;
  const loadValue = loadRow('v', 'x', 'v_source', 'P.vTokenStride', valueDim);
  const whole = `  for (var item = lid; item < ${GRADIENT_BLOCK * chunks}u; item += ${THREADS}u) {
    let row = item / ${chunks}u;
    let vector = item % ${chunks}u * 4u;
    let at = (row_at + row) * ${vectors}u + vector - P.gradientKeyBase;
    if (vector < ${value}u) {
      let channel = vector * 4u;
      ${loadKey}
      for (var i = 0u; i < 4u; i++) { gradient_keys[at + i] = x[i]; }
    } else {
      let channel = (vector - ${value}u) * 4u;
      ${loadValue}
      for (var i = 0u; i < 4u; i++) { gradient_keys[at + i] = x[i]; }
    }
  }`;
  const at = (offset: number) => `(row_at + row) * ${vectors}u + ${offset}u + channel / 8u - P.gradientKeyBase`;
  const valueMagnitude = `${GRADIENT_BLOCK}u + row`;
  const inHalf = `  ${eachItem(keyChunks, `${loadKey}\n    note_magnitude(row, x);`)}
  ${eachItem(valueChunks, `${loadValue}\n    note_magnitude(${valueMagnitude}, x);`)}
  workgroupBarrier();
  ${eachItem(keyChunks, `${loadKey}\n    ${storeHalves('gradient_keys', at(0), 'row')}`)}
  ${eachItem(valueChunks, `${loadValue}\n    ${storeHalves('gradient_keys', at(value), valueMagnitude)}`)}
  if (lid < ${GRADIENT_BLOCK}u) {
    let facts = key_rows[(row_at + lid) * ${codes}u + ${codes - 1}u - P.keyRowBase];
    gradient_keys[(row_at + lid) * ${vectors}u + ${ready}u - P.gradientKeyBase] = vec4<u32>(
      facts.x, bitcast<u32>(power(${GRADIENT_BLOCK}u + lid)), bitcast<u32>(power(lid)), facts.y);
  }`;
  return `
${params(0, GRADIENT_KEYS_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader('k', 2, dtype, access)}
${operandLoader('v', 3, dtype, access)}
${smoothed ? '@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;' : ''}
@group(0) @binding(5) var<storage, read_write> gradient_keys: array<vec4<${half ? 'u32' : 'f32'}>>;${half ? `\n@group(0) @binding(6) var<storage, read> key_rows: array<vec4<u32>>;${MAGNITUDES}` : ''}
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
${half ? inHalf : whole}
}`;
}
