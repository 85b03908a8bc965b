/**
 * Reading and writing the storage formats in WGSL. float16 and bfloat16 are handled as 32-bit words of two elements, so
 * that none of this needs `shader-f16`; NaN and infinities are recognized by their bits, because a WGSL implementation
 * may assume that floating-point values are finite.
 */
import { BYTES_PER_ELEMENT, type DType, type MaskDType } from '../../../tensor/dtype.ts';

/** `vector`: 16-byte loads; everything about the operand is a multiple of 16 bytes. `scalar`: any layout. */
export type Access = 'vector' | 'scalar';

/** Integers 0 to n - 1: the loops that are unrolled into WGSL. */
export const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

export const roundUp = (value: number, multiple: number): number => Math.ceil(value / multiple) * multiple;

/** Lower than any score; marks an excluded one. Real scores stay above {@link EXCLUDED_BELOW}. */
export const EXCLUDED = '-3.4028234e38f';
export const EXCLUDED_BELOW = '-3.401e38f';

/** Set by the decoders when they met a NaN or an infinity, which they replace with 0. */
export const NONFINITE = 'var<private> nonfinite: u32;';

/** `decode_<dtype>(word)`: the elements of a 32-bit word, non-finite ones as 0 (and `nonfinite` set). */
const DECODERS: Record<DType, string> = {
  float32: `
fn decode_float32(word: u32) -> f32 {
  let bad = (word & 0x7f800000u) == 0x7f800000u;
  nonfinite |= u32(bad);
  return bitcast<f32>(select(word, 0u, bad));
}`,
  float16: `
fn decode_float16(word: u32) -> vec2<f32> {
  let low = (word & 0x7c00u) == 0x7c00u;
  let high = (word & 0x7c000000u) == 0x7c000000u;
  nonfinite |= u32(low || high);
  return unpack2x16float((word & select(0xffffu, 0u, low)) | (word & select(0xffff0000u, 0u, high)));
}`,
  bfloat16: `
fn decode_bfloat16(word: u32) -> vec2<f32> {
  let low = (word & 0x7f80u) == 0x7f80u;
  let high = (word & 0x7f800000u) == 0x7f800000u;
  nonfinite |= u32(low || high);
  return vec2<f32>(bitcast<f32>(select(word << 16u, 0u, low)), bitcast<f32>(select(word & 0xffff0000u, 0u, high)));
}`,
};

export const decoder = (dtype: DType): string => DECODERS[dtype];

/** Elements of one 16-byte load. */
const perVector = (dtype: DType) => 16 / BYTES_PER_ELEMENT[dtype];

/** Nonzero in the high bit of each float16 of a vector of words that is a NaN or an infinity: a carry out of its exponent. */
export const nonfiniteFloat16 = (words: string): string =>
  `(((${words} & vec4<u32>(0x7c007c00u)) + vec4<u32>(0x04000400u)) & vec4<u32>(0x80008000u))`;

/** Sixteen float16 at once: words that hold nothing extraordinary are unpacked as they are, which takes a third of the instructions. */
const loadFloat16 = (name: string): string => `
fn load_${name}(index: u32, count: u32) -> array<vec4<f32>, 4> {
  var x: array<vec4<f32>, 4>;
  if (count < 16u) { return x; }
  var a = src_${name}[index / 8u];
  var b = src_${name}[index / 8u + 1u];
  let bad_a = ${nonfiniteFloat16('a')};
  let bad_b = ${nonfiniteFloat16('b')};
  if (any((bad_a | bad_b) != vec4<u32>())) {
    nonfinite = 1u;
    a &= ~((bad_a >> vec4<u32>(15u)) * 0xffffu);
    b &= ~((bad_b >> vec4<u32>(15u)) * 0xffffu);
  }
${['a', 'b']
  .flatMap((w, i) =>
    ['xy', 'zw'].map(
      ([first, second], j) =>
        `  x[${2 * i + j}] = vec4<f32>(unpack2x16float(${w}.${first}), unpack2x16float(${w}.${second}));`,
    ),
  )
  .join('\n')}
  return x;
}`;

/**
 * A storage binding of an operand and `load_<name>(index, count) -> array<vec4<f32>, 4>`: 16 elements from element
 * `index`, of which those from `count` on are 0. With vector access `count` is 16 or nothing is loaded.
 */
export function operandLoader(name: string, binding: number, dtype: DType, access: Access): string {
  if (access === 'vector') {
    if (dtype === 'float16') {
      return `
@group(0) @binding(${binding}) var<storage, read> src_${name}: array<vec4<u32>>;
${loadFloat16(name)}`;
    }
    const parts = range(4).map((i) => {
      if (dtype === 'float32') {
        const word = `src_${name}[at + ${i}u]`;
        return `  { let w = ${word};
    x[${i}] = vec4<f32>(${['x', 'y', 'z', 'w'].map((c) => `decode_float32(w.${c})`).join(', ')}); }`;
      }
      const [a, b] = i % 2 === 0 ? ['x', 'y'] : ['z', 'w'];
      return `  { let w = src_${name}[at + ${i >> 1}u]; x[${i}] = vec4<f32>(decode_${dtype}(w.${a}), decode_${dtype}(w.${b})); }`;
    });
    return `
@group(0) @binding(${binding}) var<storage, read> src_${name}: array<vec4<u32>>;
fn load_${name}(index: u32, count: u32) -> array<vec4<f32>, 4> {
  var x: array<vec4<f32>, 4>;
  if (count < 16u) { return x; }
  let at = index / ${perVector(dtype)}u;
${parts.join('\n')}
  return x;
}`;
  }
  return `${elementLoader(name, binding, dtype)}
fn load_${name}(index: u32, count: u32) -> array<vec4<f32>, 4> {
  var x: array<vec4<f32>, 4>;
  for (var e = 0u; e < 16u; e++) {
    if (e < count) { x[e >> 2u][e & 3u] = element_${name}(index + e); }
  }
  return x;
}`;
}

/** A storage binding of 32-bit words and `element_<name>(index)`. */
export function elementLoader(name: string, binding: number, dtype: DType): string {
  const element =
    dtype === 'float32'
      ? `return decode_float32(src_${name}[i]);`
      : `let half = (src_${name}[i >> 1u] >> ((i & 1u) * 16u)) & 0xffffu;
  return decode_${dtype}(half).x;`;
  return `
@group(0) @binding(${binding}) var<storage, read> src_${name}: array<u32>;
fn element_${name}(i: u32) -> f32 {
  ${element}
}`;
}

/** `pack_output(a, b) -> u32`: two elements of a 16-bit output as one word, rounded to nearest even, never infinite. */
export function outputPacker(dtype: DType): string {
  if (dtype === 'float16') {
    return `
fn pack_output(a: f32, b: f32) -> u32 {
  return pack2x16float(clamp(vec2<f32>(a, b), vec2<f32>(-65504.0), vec2<f32>(65504.0)));
}`;
  }
  if (dtype === 'bfloat16') {
    return `
fn round_bfloat16(x: f32) -> u32 {
  let bits = bitcast<u32>(clamp(x, -3.3895313e38f, 3.3895313e38f));
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
fn pack_output(a: f32, b: f32) -> u32 {
  return round_bfloat16(a) | (round_bfloat16(b) << 16u);
}`;
  }
  return '';
}

/** Words that hold NaN in every element of the output's type. */
export const NAN_WORD: Record<DType, string> = {
  float32: '0x7fc00000u',
  float16: '0x7e007e00u',
  bfloat16: '0x7fc07fc0u',
};

/**
 * The mask's binding and `mask_at(index) -> u32`: for a boolean mask nonzero = attend; for an additive one the bits of
 * its value as float32.
 */
export const maskLoader = (binding: number, dtype: MaskDType): string => bitsLoader('mask', 'mask_at', binding, dtype);

/** A binding `name`, and `at(index) -> u32`: a bool's byte, or the bits of a float as float32. */
export function bitsLoader(name: string, at: string, binding: number, dtype: MaskDType): string {
  const header = `@group(0) @binding(${binding}) var<storage, read> ${name}: array<u32>;`;
  if (dtype === 'bool') {
    return `
${header}
fn ${at}(i: u32) -> u32 { return (${name}[i >> 2u] >> ((i & 3u) * 8u)) & 0xffu; }`;
  }
  const bits = {
    float32: `${name}[i]`,
    float16: 'bitcast<u32>(unpack2x16float(half).x)',
    bfloat16: 'half << 16u',
  }[dtype];
  const half = dtype === 'float32' ? '' : `let half = (${name}[i >> 1u] >> ((i & 1u) * 16u)) & 0xffffu;`;
  const special =
    dtype === 'float16'
      ? `if ((half & 0x7c00u) == 0x7c00u) { return select(0x7fc00000u, 0xff800000u, half == 0xfc00u); }`
      : '';
  return `
${header}
fn ${at}(i: u32) -> u32 {
  ${half}
  ${special}
  return ${bits};
}`;
}

/** `integers_of(x)`: four numbers up to 127 in magnitude as INT8, the first lowest. */
export const INTEGERS_OF = `
fn integers_of(x: vec4<f32>) -> u32 {
  let q = vec4<u32>(vec4<i32>(round(x))) & vec4<u32>(0xffu);
  return q.x | (q.y << 8u) | (q.z << 16u) | (q.w << 24u);
}`;
