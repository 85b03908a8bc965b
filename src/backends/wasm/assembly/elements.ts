/** Rows of tensors in any dtype, from and to float32. */
import {
  DTYPE_BFLOAT16,
  DTYPE_BOOL,
  DTYPE_FLOAT16,
  DTYPE_FLOAT32,
} from '../job.ts';

/** log2 of an element's bytes. */
// @ts-ignore: decorator
@inline
export function elementShift(dtype: i32): i32 {
  return dtype == DTYPE_FLOAT32 ? 2 : dtype == DTYPE_BOOL ? 0 : 1;
}

// @ts-ignore: decorator
@inline
function fromFloat16(bits: v128): v128 {
  // The exponent is moved by a multiplication with 2^112, which also normalizes subnormals.
  const magnitude = f32x4.mul(
    i32x4.shl(v128.and(bits, i32x4.splat(0x7fff)), 13),
    f32x4.splat(5.192296858534828e33),
  );
  const special = v128.and(f32x4.ge(magnitude, f32x4.splat(65536)), i32x4.splat(0x7f800000));
  const sign = i32x4.shl(v128.and(bits, i32x4.splat(0x8000)), 16);
  return v128.or(v128.or(magnitude, special), sign);
}

// @ts-ignore: decorator
@inline
function toFloat16(x: v128): v128 {
  const sign = v128.and(i32x4.shr_u(x, 16), i32x4.splat(0x8000));
  const magnitude = v128.and(x, i32x4.splat(0x7fffffff));
  // Round to nearest even at bit 13, then move the exponent.
  const odd = v128.and(i32x4.shr_u(magnitude, 13), i32x4.splat(1));
  let normal = i32x4.add(i32x4.add(magnitude, i32x4.splat(0xfff - (112 << 23))), odd);
  normal = i32x4.min_s(i32x4.shr_s(normal, 13), i32x4.splat(0x7c00));
  // Below 2^-14 the sum with 0.5 rounds to float16's subnormal step, 2^-24.
  const subnormal = i32x4.sub(f32x4.add(magnitude, f32x4.splat(0.5)), i32x4.splat(0x3f000000));
  let h = v128.bitselect(subnormal, normal, f32x4.lt(magnitude, f32x4.splat(0.00006103515625)));
  h = v128.bitselect(i32x4.splat(0x7e00), h, f32x4.ne(x, x));
  return v128.or(h, sign);
}

// @ts-ignore: decorator
@inline
function toBfloat16(x: v128): v128 {
  const odd = v128.and(i32x4.shr_u(x, 16), i32x4.splat(1));
  const rounded = i32x4.shr_u(i32x4.add(i32x4.add(x, i32x4.splat(0x7fff)), odd), 16);
  return v128.bitselect(i32x4.splat(0x7fc0), rounded, f32x4.ne(x, x));
}

/** Four elements as float32; a bool is its byte. Reads to the end of the four also where fewer count. */
// @ts-ignore: decorator
@inline
export function load4(address: usize, dtype: i32): v128 {
  if (dtype == DTYPE_FLOAT32) return v128.load(address);
  if (dtype == DTYPE_FLOAT16) return fromFloat16(v128.load16x4_u(address));
  if (dtype == DTYPE_BFLOAT16) return i32x4.shl(v128.load16x4_u(address), 16);
  return f32x4.convert_i32x4_u(i32x4.extend_low_i16x8_u(i16x8.extend_low_i8x16_u(v128.load32_zero(address))));
}

/** Bytes of a cache line. */
const LINE: usize = 64;

/**
 * Brings rows into the cache, many lines at a time: tokens of one head lie further apart than a processor looks ahead, and what measures or
 * packs a row is too long for it to reach the next one.
 *
 * @param sink 4 bytes for a sum, without which nothing would be read
 */
export function touchRows(address: usize, stride: usize, rows: i32, bytes: usize, sink: usize): void {
  if (stride <= bytes) return;
  let sum = 0;
  for (let row = 0; row < rows; row++, address += stride) {
    for (let at: usize = 0; at < bytes; at += LINE) sum += load<u8>(address + at);
  }
  store<i32>(sink, sum);
}

/** `count` elements to float32 at `target`, then zeros up to `padded`, a multiple of 4. May read 3 elements more. */
export function loadRow(address: usize, dtype: i32, count: i32, target: usize, padded: i32): void {
  if (dtype == DTYPE_FLOAT32) {
    for (let i = 0; i < count; i += 4) v128.store(target + (<usize>i << 2), v128.load(address + (<usize>i << 2)));
  } else if (dtype == DTYPE_FLOAT16) {
    for (let i = 0; i < count; i += 4) {
      v128.store(target + (<usize>i << 2), fromFloat16(v128.load16x4_u(address + (<usize>i << 1))));
    }
  } else {
    for (let i = 0; i < count; i += 4) {
      v128.store(target + (<usize>i << 2), i32x4.shl(v128.load16x4_u(address + (<usize>i << 1)), 16));
    }
  }
  for (let i = count; i < padded; i++) store<f32>(target + (<usize>i << 2), 0);
}

/** `count` float32 values at `source`, stored in a dtype. Writes no byte more: other threads own the neighbours. */
export function storeRow(source: usize, count: i32, address: usize, dtype: i32): void {
  if (dtype == DTYPE_FLOAT32) {
    // A row is short: what the engine calls for a copy of memory takes as long as all of it.
    const bytes = <usize>count << 2;
    let c: usize = 0;
    for (; c + 16 <= bytes; c += 16) v128.store(address + c, v128.load(source + c));
    for (; c < bytes; c += 4) store<f32>(address + c, load<f32>(source + c));
    return;
  }
  // Converted in place, four at a time: the results lie before the elements still to be read.
  for (let i = 0; i < count; i += 4) {
    const x = v128.load(source + (<usize>i << 2));
    const bits = dtype == DTYPE_FLOAT16 ? toFloat16(x) : toBfloat16(x);
    v128.store64_lane(source + (<usize>i << 1), i16x8.narrow_i32x4_u(bits, bits), 0);
  }
  memory.copy(address, source, <usize>count << 1);
}

/** One element; a bool is its byte. */
export function loadElement(address: usize, dtype: i32): f32 {
  if (dtype == DTYPE_FLOAT32) return load<f32>(address);
  if (dtype == DTYPE_BOOL) return <f32>load<u8>(address);
  const bits = i32x4.splat(<i32>load<u16>(address));
  return f32x4.extract_lane(dtype == DTYPE_FLOAT16 ? fromFloat16(bits) : i32x4.shl(bits, 16), 0);
}
