/** Float32 products of whole heads: 2 rows by 16 columns where a multiply-add is one instruction, else 4 by 8. */
import { finiteMaximum, largerMagnitudes, madd } from './arithmetic.ts';

/** Columns that {@link product} takes at a time, and rows. */
export const PRODUCT_WIDTH: i32 = ASC_FEATURE_RELAXED_SIMD ? 16 : 8;
export const PRODUCT_ROWS: i32 = ASC_FEATURE_RELAXED_SIMD ? 2 : 4;

/**
 * `out[r, c] = sum over n of a[r, n] * b[n, c]` for PRODUCT_ROWS rows and PRODUCT_WIDTH columns.
 *
 * @param a rows that lie `aBytes` apart
 * @param b `[n, PRODUCT_WIDTH]`; n is at least 1
 */
export function product(a: usize, aBytes: usize, b: usize, n: i32, out: usize, outBytes: usize): void {
  let c00 = f32x4.splat(0);
  let c01 = c00;
  let c10 = c00;
  let c11 = c00;
  let c20 = c00;
  let c21 = c00;
  let c30 = c00;
  let c31 = c00;
  if (ASC_FEATURE_RELAXED_SIMD) {
    let a1 = a + aBytes;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      const b2 = v128.load(b, 32);
      const b3 = v128.load(b, 48);
      let x = v128.load32_splat(a);
      c00 = madd(b0, x, c00);
      c01 = madd(b1, x, c01);
      c10 = madd(b2, x, c10);
      c11 = madd(b3, x, c11);
      x = v128.load32_splat(a1);
      c20 = madd(b0, x, c20);
      c21 = madd(b1, x, c21);
      c30 = madd(b2, x, c30);
      c31 = madd(b3, x, c31);
      a += 4;
      a1 += 4;
      b += 64;
    } while (--n);
    v128.store(out, c00);
    v128.store(out, c01, 16);
    v128.store(out, c10, 32);
    v128.store(out, c11, 48);
    out += outBytes;
    v128.store(out, c20);
    v128.store(out, c21, 16);
    v128.store(out, c30, 32);
    v128.store(out, c31, 48);
  } else {
    let a1 = a + aBytes;
    let a2 = a1 + aBytes;
    let a3 = a2 + aBytes;
    do {
      const b0 = v128.load(b);
      const b1 = v128.load(b, 16);
      let x = v128.load32_splat(a);
      c00 = madd(b0, x, c00);
      c01 = madd(b1, x, c01);
      x = v128.load32_splat(a1);
      c10 = madd(b0, x, c10);
      c11 = madd(b1, x, c11);
      x = v128.load32_splat(a2);
      c20 = madd(b0, x, c20);
      c21 = madd(b1, x, c21);
      x = v128.load32_splat(a3);
      c30 = madd(b0, x, c30);
      c31 = madd(b1, x, c31);
      a += 4;
      a1 += 4;
      a2 += 4;
      a3 += 4;
      b += 32;
    } while (--n);
    v128.store(out, c00);
    v128.store(out, c01, 16);
    out += outBytes;
    v128.store(out, c10);
    v128.store(out, c11, 16);
    out += outBytes;
    v128.store(out, c20);
    v128.store(out, c21, 16);
    out += outBytes;
    v128.store(out, c30);
    v128.store(out, c31, 16);
  }
}

/**
 * `out = a . b` for whole matrices without gaps.
 *
 * @param rows of `a`, a multiple of PRODUCT_ROWS
 * @param b `[columns / PRODUCT_WIDTH, n, PRODUCT_WIDTH]`
 * @param columns a multiple of PRODUCT_WIDTH
 */
export function multiply(a: usize, rows: i32, b: usize, n: i32, columns: i32, out: usize): void {
  const aBytes = <usize>n << 2;
  const outBytes = <usize>columns << 2;
  for (let column = 0; column < columns; column += PRODUCT_WIDTH) {
    for (let row = 0; row < rows; row += PRODUCT_ROWS) {
      const to = out + <usize>row * outBytes + (<usize>column << 2);
      product(a + <usize>row * aBytes, aBytes, b, n, to, outBytes);
    }
    b += (<usize>n * PRODUCT_WIDTH) << 2;
  }
}

/**
 * Four rows of `bytes` bytes to four columns of a group of PRODUCT_WIDTH, transposed 4 x 4 at a time.
 *
 * @returns whether all is finite
 */
export function packColumns(r0: usize, r1: usize, r2: usize, r3: usize, bytes: usize, target: usize): boolean {
  let most = i32x4.splat(0);
  for (let i: usize = 0; i < bytes; i += 16) {
    const a = v128.load(r0 + i);
    const b = v128.load(r1 + i);
    const c = v128.load(r2 + i);
    const d = v128.load(r3 + i);
    most = largerMagnitudes(largerMagnitudes(largerMagnitudes(largerMagnitudes(most, a), b), c), d);
    const ab = v128.shuffle<f32>(a, b, 0, 4, 1, 5);
    const cd = v128.shuffle<f32>(c, d, 0, 4, 1, 5);
    const ab2 = v128.shuffle<f32>(a, b, 2, 6, 3, 7);
    const cd2 = v128.shuffle<f32>(c, d, 2, 6, 3, 7);
    v128.store(target, v128.shuffle<i64>(ab, cd, 0, 2));
    v128.store(target + PRODUCT_WIDTH * 4, v128.shuffle<i64>(ab, cd, 1, 3));
    v128.store(target + PRODUCT_WIDTH * 8, v128.shuffle<i64>(ab2, cd2, 0, 2));
    v128.store(target + PRODUCT_WIDTH * 12, v128.shuffle<i64>(ab2, cd2, 1, 3));
    target += PRODUCT_WIDTH * 16;
  }
  const largest = finiteMaximum(most);
  return largest == largest;
}

/** Sums of the lanes of four vectors. */
// @ts-ignore: decorator
@inline
function sums4(a: v128, b: v128, c: v128, d: v128): v128 {
  const ab = f32x4.add(v128.shuffle<f32>(a, b, 0, 4, 1, 5), v128.shuffle<f32>(a, b, 2, 6, 3, 7));
  const cd = f32x4.add(v128.shuffle<f32>(c, d, 0, 4, 1, 5), v128.shuffle<f32>(c, d, 2, 6, 3, 7));
  return f32x4.add(v128.shuffle<i64>(ab, cd, 0, 2), v128.shuffle<i64>(ab, cd, 1, 3));
}

/**
 * Scores of one row against keys in float32 where they lie, four at a time; a score that is not finite becomes NaN.
 *
 * @param dim a multiple of 4
 * @returns whether all are finite
 */
export function scoreInPlace(q: usize, k: usize, stride: usize, keyLength: i32, dim: i32, scores: usize): boolean {
  let invalid = i32x4.splat(0);
  for (let key = 0; key < keyLength; key += 4) {
    const last = keyLength - 1 - key;
    let r0 = k + <usize>key * stride;
    let r1 = r0 + <usize>min(1, last) * stride;
    let r2 = r0 + <usize>min(2, last) * stride;
    let r3 = r0 + <usize>min(3, last) * stride;
    let a = f32x4.splat(0);
    let b = a;
    let c = a;
    let d = a;
    let a1 = a;
    let b1 = a;
    let c1 = a;
    let d1 = a;
    let at = q;
    let i = 0;
    for (; i + 8 <= dim; i += 8) {
      const x = v128.load(at);
      a = madd(v128.load(r0), x, a);
      b = madd(v128.load(r1), x, b);
      c = madd(v128.load(r2), x, c);
      d = madd(v128.load(r3), x, d);
      const y = v128.load(at, 16);
      a1 = madd(v128.load(r0, 16), y, a1);
      b1 = madd(v128.load(r1, 16), y, b1);
      c1 = madd(v128.load(r2, 16), y, c1);
      d1 = madd(v128.load(r3, 16), y, d1);
      at += 32;
      r0 += 32;
      r1 += 32;
      r2 += 32;
      r3 += 32;
    }
    if (i < dim) {
      const x = v128.load(at);
      a = madd(v128.load(r0), x, a);
      b = madd(v128.load(r1), x, b);
      c = madd(v128.load(r2), x, c);
      d = madd(v128.load(r3), x, d);
    }
    const s = sums4(f32x4.add(a, a1), f32x4.add(b, b1), f32x4.add(c, c1), f32x4.add(d, d1));
    const bad = f32x4.ne(f32x4.mul(s, f32x4.splat(0)), f32x4.splat(0));
    invalid = v128.or(invalid, bad);
    v128.store(scores + (<usize>key << 2), v128.bitselect(f32x4.splat(NaN), s, bad));
  }
  return !v128.any_true(invalid);
}

/**
 * `out = sum over j of shares[j] * v[j]`, values in float32 where they lie.
 *
 * @param channels a multiple of 4
 */
export function addRows(shares: usize, v: usize, stride: usize, keyLength: i32, channels: i32, out: usize): void {
  let c = 0;
  for (; c + 32 <= channels; c += 32) {
    let c0 = f32x4.splat(0);
    let c1 = c0;
    let c2 = c0;
    let c3 = c0;
    let c4 = c0;
    let c5 = c0;
    let c6 = c0;
    let c7 = c0;
    let at = v + (<usize>c << 2);
    for (let j = 0; j < keyLength; j++) {
      const x = v128.load32_splat(shares + (<usize>j << 2));
      c0 = madd(v128.load(at), x, c0);
      c1 = madd(v128.load(at, 16), x, c1);
      c2 = madd(v128.load(at, 32), x, c2);
      c3 = madd(v128.load(at, 48), x, c3);
      c4 = madd(v128.load(at, 64), x, c4);
      c5 = madd(v128.load(at, 80), x, c5);
      c6 = madd(v128.load(at, 96), x, c6);
      c7 = madd(v128.load(at, 112), x, c7);
      at += stride;
    }
    const to = out + (<usize>c << 2);
    v128.store(to, c0);
    v128.store(to, c1, 16);
    v128.store(to, c2, 32);
    v128.store(to, c3, 48);
    v128.store(to, c4, 64);
    v128.store(to, c5, 80);
    v128.store(to, c6, 96);
    v128.store(to, c7, 112);
  }
  for (; c < channels; c += 4) {
    let sum = f32x4.splat(0);
    let at = v + (<usize>c << 2);
    for (let j = 0; j < keyLength; j++) {
      sum = madd(v128.load(at), v128.load32_splat(shares + (<usize>j << 2)), sum);
      at += stride;
    }
    v128.store(out + (<usize>c << 2), sum);
  }
}
