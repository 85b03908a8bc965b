/**
 * FP4 in blocks of 16 (NVFP4 of SageAttention3, arXiv 2505.11594) in WGSL: the arithmetic of `quantization/fp4-blocks.ts`,
 * and how quantized keys and values lie in memory.
 *
 * A key's row is its codes (eight a word, the lowest channel in the lowest bits), the E4M3 scales of its blocks (four a
 * word), and a word of facts. A value's row is its codes and a share of its group's scales: sixteen keys are a group.
 * Blocks of values run along the keys of a group, one scale a channel, four neighbouring channels a word; or, where the
 * keys of a group differ much in size and in a cache, along the channels of a key, whose scales are then in its own row.
 */
import { NVFP4_BLOCK, nvfp4Candidates, type ScaleSearch } from '../../../quantization/fp4-blocks.ts';
import { NVFP4_MAX, OUTER_MAX } from '../../../quantization/outer-scale.ts';
import { E2M1_MAX } from '../../../tensor/formats/float4.ts';
import { E4M3_MAX } from '../../../tensor/formats/float8.ts';

/** Keys whose values of a channel may share a scale. */
export const VALUE_BLOCK = NVFP4_BLOCK;

const codeWords = (dim: number) => dim / 8;
const scaleWords = (dim: number) => Math.ceil(dim / NVFP4_BLOCK / 4);

/** Words of a key's row; the last one holds its facts. */
export const fp4KeyWords = (headDimPadded: number): number => codeWords(headDimPadded) + scaleWords(headDimPadded) + 1;

/** Words of a value's row. */
export const fp4ValueWords = (valueDimPadded: number): number => codeWords(valueDimPadded) + scaleWords(valueDimPadded);

/** Vectors of a row of Q: 16 doubled codes or integers each, then facts, then float32 scales, four a vector. */
export const fp4QueryVectors = (headDimPadded: number): number =>
  headDimPadded / NVFP4_BLOCK + 1 + Math.ceil(headDimPadded / NVFP4_BLOCK / 4);

/**
 * Bits of a key's facts: the exponent field of what its codes and scales are multiplied with, flags, the same field of its values,
 * and whether its values' blocks run along the channels.
 */
export const KEY_FACTS = { exponent: 0, flags: 8, valueExponent: 16, fineValues: 24 } as const;

/** Values whose sizes differ more do not share blocks: a row that sees only the small ones would lose them. */
export const ALIKE = 8;

/** What a weight of 1 becomes: {@link NVFP4_MAX} of these, so that sums of the largest values stay in float32. */
export const WEIGHT_UNIT = 2 ** -12;

const float = (x: number) => `bitcast<f32>(0x${new Uint32Array(Float32Array.of(x).buffer)[0]?.toString(16)}u)`;

/** `e4m3(x)`, x >= 0, at most 448, to nearest even; `e4m3_value(code)`. */
const E4M3 = `
fn e4m3(x: f32) -> u32 {
  if (x >= ${E4M3_MAX}.0) { return 126u; }
  if (x < 0.015625) { return u32(round(x * 512.0)); }
  let bits = bitcast<u32>(x);
  return ((bits + 0x7ffffu + ((bits >> 20u) & 1u)) >> 20u) - 960u;
}
fn e4m3_value(code: u32) -> f32 {
  return select(bitcast<f32>((code + 960u) << 20u), f32(code) * 0.001953125, code < 8u);
}`;

/** `e2m1(x)`: magnitudes rounded to E2M1, to nearest even, at most 6. The step is half the power of two below x, at least 0.5. */
const E2M1 = `
fn e2m1(x: vec4<f32>) -> vec4<f32> {
  let y = min(abs(x), vec4<f32>(${E2M1_MAX}.0));
  let power = bitcast<vec4<i32>>(y) & vec4<i32>(0x7f800000);
  let step = max(power - vec4<i32>(0x00800000), vec4<i32>(0x3f000000));
  return round(y * bitcast<vec4<f32>>(vec4<i32>(0x7f000000) - step)) * bitcast<vec4<f32>>(step);
}`;

/**
 * `outer_scale(largest)`: the power of two that puts a magnitude into (672, 1344], 1 for 0; `reciprocal_exponent(scale)`: the
 * exponent field of its reciprocal.
 */
const OUTER_SCALE = `
fn outer_scale(largest: f32) -> f32 {
  if (largest == 0.0) { return 1.0; }
  if (largest < 1.6e-35) { return 8.507059173023462e37f; }
  return bitcast<f32>(bitcast<u32>(${OUTER_MAX}.0 / largest) & 0x7f800000u);
}
fn reciprocal_exponent(scale: f32) -> u32 { return 254u - (bitcast<u32>(scale) >> 23u); }`;

/** `block_scale(x)`: the code of the scale that errs least of those tried, for 16 elements that an outer scale was applied to. */
const blockScale = (search: ScaleSearch): string => {
  const factors = [...nvfp4Candidates(search)];
  return `
const FACTORS = array<f32, ${factors.length}>(${factors.map(float).join(', ')});
fn largest_of(x: array<vec4<f32>, 4>) -> f32 {
  let y = max(max(abs(x[0]), abs(x[1])), max(abs(x[2]), abs(x[3])));
  return max(max(y.x, y.y), max(y.z, y.w));
}
fn block_scale(x: array<vec4<f32>, 4>) -> u32 {
  let largest = largest_of(x);
  var best = max(1u, e4m3(largest * FACTORS[0]));
  ${
    factors.length === 1
      ? ''
      : `var least = 3.4e38f;
  var last = 0u;
  for (var i = 0u; i < ${factors.length}u; i++) {
    var factors = FACTORS;
    let code = max(1u, e4m3(largest * factors[i]));
    if (code == last) { continue; }
    last = code;
    let scale = e4m3_value(code);
    let inverse = 1.0 / scale;
    var sums = vec4<f32>();
    for (var j = 0u; j < 4u; j++) {
      let error = abs(x[j]) - scale * e2m1(x[j] * inverse);
      sums += error * error;
    }
    let sum = (sums.x + sums.y) + (sums.z + sums.w);
    if (sum < least) { least = sum; best = code; }
  }`
  }
  return best;
}
// Codes of four elements, in the lowest 16 bits.
fn codes_of(x: vec4<f32>) -> u32 {
  let y = e2m1(x);
  let magnitude = max((bitcast<vec4<i32>>(y) >> vec4<u32>(22u)) - vec4<i32>(252), vec4<i32>(y >= vec4<f32>(0.5)));
  let code = vec4<u32>(magnitude) | (vec4<u32>((x < vec4<f32>()) & (y > vec4<f32>())) << vec4<u32>(3u));
  return code.x | (code.y << 4u) | (code.z << 8u) | (code.w << 12u);
}
// Twice E2M1 as four bytes.
fn doubled_of(x: vec4<f32>) -> u32 {
  let y = vec4<i32>(2.0 * e2m1(x));
  let q = vec4<u32>(select(y, -y, x < vec4<f32>())) & vec4<u32>(0xffu);
  return q.x | (q.y << 8u) | (q.z << 16u) | (q.w << 24u);
}`;
};

/** Functions that quantize. */
export const fp4Quantizer = (search: ScaleSearch): string => `${E4M3}${E2M1}${OUTER_SCALE}${blockScale(search)}`;

/**
 * Functions that read a tile's keys and values. `key_codes(row, block)`: 16 doubled codes as bytes; `key_scale(row, block)`;
 * `key_facts(row)`: scale, flags, and what weights of its values are multiplied with; `value_quad(row, quad)`: four values as
 * float16, exactly.
 *
 * What lies behind the last key may be anything, but not turn a weight of 0 into NaN: no byte here reads as an infinity.
 */
export function fp4Reader(headDimPadded: number, valueDimPadded: number): string {
  const [keyWords, valueWords] = [fp4KeyWords(headDimPadded), fp4ValueWords(valueDimPadded)];
  const exponent = (shift: number) => `bitcast<f32>(min((facts >> ${shift}u) & 0xffu, 254u) << 23u)`;
  return `${E4M3}${E2M1}
fn doubled(nibbles: u32) -> u32 {
  let spread = (nibbles & 0xfu) | ((nibbles & 0xf0u) << 4u) | ((nibbles & 0xf00u) << 8u) | ((nibbles & 0xf000u) << 12u);
  let m = spread & 0x07070707u;
  let one = m & 0x01010101u;
  let two = (m >> 1u) & 0x01010101u;
  let large = (m >> 2u) & 0x01010101u;
  let magnitude = m + ((one + 2u * two + 2u * (one & two)) & (large * 7u));
  // Two's complement byte by byte; no code is that of -0.
  let sign = (spread >> 3u) & 0x01010101u;
  return (magnitude ^ (sign * 255u)) + sign;
}
fn key_codes(row: u32, block: u32) -> vec4<u32> {
  let at = row * ${keyWords}u + 2u * block - P.keyRowBase;
  let low = key_rows[at];
  let high = key_rows[at + 1u];
  return vec4<u32>(doubled(low & 0xffffu), doubled(low >> 16u), doubled(high & 0xffffu), doubled(high >> 16u));
}
fn key_scale(row: u32, block: u32) -> f32 {
  let word = key_rows[row * ${keyWords}u + ${codeWords(headDimPadded)}u + block / 4u - P.keyRowBase];
  return e4m3_value((word >> (8u * (block % 4u))) & 0x7fu);
}
fn key_facts(row: u32) -> vec4<u32> {
  let facts = key_rows[row * ${keyWords}u + ${keyWords - 1}u - P.keyRowBase];
  let scale = min(0.5 * ${exponent(KEY_FACTS.exponent)}, 1.0e14f);
  return vec4<u32>(bitcast<u32>(scale), (facts >> ${KEY_FACTS.flags}u) & 0xffu, bitcast<u32>(${exponent(KEY_FACTS.valueExponent)}), 0u);
}
fn value_quad(row: u32, quad: u32) -> vec2<u32> {
  let at = row * ${valueWords}u - P.valueRowBase;
  let nibbles = value_rows[at + quad / 2u] >> (16u * (quad % 2u));
  let facts = key_rows[row * ${keyWords}u + ${keyWords - 1}u - P.keyRowBase];
  let fine = ((facts >> ${KEY_FACTS.fineValues}u) & 1u) != 0u;
  let first = at - row % ${VALUE_BLOCK}u * ${valueWords}u + ${codeWords(valueDimPadded)}u;
  let shared_at = first + quad / ${scaleWords(valueDimPadded)}u * ${valueWords}u + quad % ${scaleWords(valueDimPadded)}u;
  let own_at = at + ${codeWords(valueDimPadded)}u + quad / 16u;
  let word = value_rows[select(shared_at, own_at, fine)];
  let own = vec4<u32>((word >> (8u * (quad / 4u % 4u))) & 0x7fu);
  let scales = select((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0x7fu), own, fine);
  let bytes = doubled(nibbles);
  let codes = vec4<f32>(vec4<i32>(vec4<u32>(bytes << 24u, bytes << 16u, bytes << 8u, bytes)) >> vec4<u32>(24u));
  let x = codes * 0.5 * vec4<f32>(e4m3_value(scales.x), e4m3_value(scales.y), e4m3_value(scales.z), e4m3_value(scales.w));
  return vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw));
}
// The scale of a block of weights whose largest is p, relative to the row's largest.
fn weight_scale(p: f32) -> f32 { return e4m3_value(max(1u, e4m3(p * ${E4M3_MAX}.0))); }
fn rounded_weights(p: vec4<f32>, scale: vec4<f32>) -> vec4<f32> {
  return e2m1(p * (${NVFP4_MAX}.0 / scale)) * (scale * ${WEIGHT_UNIT});
}`;
}
