/**
 * INT8 codes of what P and dS are multiplied by, with tokens innermost: of Q and dO, or of K, in place of Q or K in float32
 * ({@link CODE_ROWS}).
 *
 * A row is first divided by its size, a power of two, so that no token is rounded by another that is larger as a whole; then a channel of
 * the block's 32 tokens shares a scale. The size goes into P and dS, which the product sums over.
 */
import { INT_MAX } from '../../../../quantization/schemes.ts';
import { OWN_TILE, params, SEQUENCE, tables } from '../layout.ts';
import { INTEGERS_OF, range } from '../storage.ts';
import { CODE_ROWS, GRADIENT_BLOCK, type GradientDims, gradientKey, gradientRow } from './layout.ts';
import { POWERS } from './prepare.ts';

export interface GradientCodesConfig extends GradientDims {
  readonly operands: 'query' | 'key';
}

export const GRADIENT_CODES_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'rowsPerHead',
  'rowBase',
  // A constant that the compiler is not told, as in gradients.ts.
  'blockTokens',
] as const;

/** A channel whose magnitudes are below it, in rows of size 1, has codes as if this were its largest. */
const SMALLEST_CHANNEL = '7.9e-31f';

/** A workgroup takes a block of tokens, a thread four channels of an operand. */
export function gradientCodesKernel(config: GradientCodesConfig): string {
  const { operands, headDimPadded, valueDimPadded } = config;
  const ofQueries = operands === 'query';
  const { dOutput, vectors } = ofQueries ? gradientRow(config) : { dOutput: 0, ...gradientKey(config) };
  const [first, second] = [headDimPadded / 4, ofQueries ? valueDimPadded / 4 : 0];
  const words = range(GRADIENT_BLOCK / 4);
  const row = (token: string) => `bitcast<vec4<f32>>(rows[source + (${token}) * ${vectors}u])`;
  return `
${params(0, GRADIENT_CODES_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read_write> rows: array<vec4<u32>>;
${POWERS}
${INTEGERS_OF}

@compute @workgroup_size(${first + second})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let block = (head * P.rowsPerHead + sequence_field(sequence, ${ofQueries ? SEQUENCE.queryRow : SEQUENCE.keyRow}u) + first) * ${vectors}u - P.rowBase;
  let is_second = lid >= ${first}u;
  let vector = select(lid, lid - ${first}u, is_second);
  let source = block + vector + select(0u, ${dOutput}u, is_second);
  let into = block + vector + select(0u, ${CODE_ROWS.dOutput * vectors}u, is_second);
  let size_at = select(0u, ${GRADIENT_BLOCK}u, is_second);
  for (var t = 0u; t < P.blockTokens; t++) { note_largest(size_at + t, abs(${row('t')})); }
  workgroupBarrier();
  var most = vec4<f32>(${SMALLEST_CHANNEL});
  for (var t = 0u; t < P.blockTokens; t++) { most = max(most, abs(${row('t')} * over_power(size_at + t))); }
  let over = ${INT_MAX.int8}.0 / most;
  ${words
    .map((w) => {
      const four = range(4).map((e) => `${row(`${4 * w + e}u`)} * over_power(size_at + ${4 * w + e}u) * over`);
      return `var codes_${w}: vec4<u32>;
  { let x = mat4x4<f32>(${four.join(', ')});
    let y = transpose(x); codes_${w} = vec4<u32>(integers_of(y[0]), integers_of(y[1]), integers_of(y[2]), integers_of(y[3])); }`;
    })
    .join('\n  ')}
  // All of Q or K has been read.
  storageBarrier();
  ${words.map((w) => `rows[into + ${w * vectors}u] = codes_${w};`).join(' ')}
  rows[into + ${CODE_ROWS.scales * vectors}u] = bitcast<vec4<u32>>(most / ${INT_MAX.int8}.0);
  if (vector < ${GRADIENT_BLOCK / 4}u) {
    let at = size_at + 4u * vector;
    rows[into + ${CODE_ROWS.sizes * vectors}u] = bitcast<vec4<u32>>(vec4<f32>(power(at), power(at + 1u), power(at + 2u), power(at + 3u)));
  }
}`;
}
