/** Elements of the caller's tensors: loads of every dtype and alignment, and what registers make of them. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';

/** Elements of the largest load that an operand's strides and offset allow. */
export type LoadWidth = 1 | 2 | 4 | 8;

export const BYTES: Readonly<Record<DType, number>> = { float16: 2, bfloat16: 2, float32: 4 };

/** The two 16-bit floats of a register, as f32. */
export function unpackPair(
  b: KernelBuilder,
  dtype: 'float16' | 'bfloat16',
  pair: Reg<'b32'>,
): [Reg<'f32'>, Reg<'f32'>] {
  if (dtype === 'bfloat16') return [b.as(b.shl(pair, 16), 'f32'), b.as(b.and(pair, 0xffff0000), 'f32')];
  const [low, high] = b.unpack(pair, 'f16');
  return [b.cvt('f32', low), b.cvt('f32', high)];
}

/** One element as f32; 0 where it is not inside, and not read. */
export function loadElement(
  b: KernelBuilder,
  dtype: DType,
  address: Reg<'global'>,
  byteOffset: number,
  inside: Reg<'pred'>,
): Reg<'f32'> {
  const value = b.constant('f32', 0);
  if (dtype === 'float32') b.when(inside, () => b.ld('f32', address, byteOffset, { into: value }));
  else {
    const bits = b.reg('b16');
    b.set(bits, 0);
    b.when(inside, () => b.ld('b16', address, byteOffset, { into: bits }));
    b.mov(dtype === 'float16' ? b.cvt('f32', b.as(bits, 'f16')) : b.as(b.shl(b.cvt('u32', bits), 16), 'f32'), value);
  }
  return value;
}

/**
 * Loads eight consecutive channels of a token: four pairs of 16-bit floats, or eight f32. {@link unpackEight} makes
 * floats of them, which take twice the registers.
 *
 * @param inside whether the load at channel `first` (counted from this thread's first) is inside; elements outside are
 *     not read and are 0; undefined where all are inside
 */
export function loadEightPacked(
  b: KernelBuilder,
  dtype: DType,
  width: LoadWidth,
  address: Reg<'global'>,
  inside: (first: number) => Reg<'pred'> | undefined,
): Reg<'b32'>[] {
  const words: Reg<'b32'>[] = [];
  const bytes = BYTES[dtype];
  const step = Math.min(width, 16 / bytes);
  const halves: Reg<'b16'>[] = [];
  for (let first = 0; first < 8; first += step) {
    const guard = inside(first);
    const load = (registers: readonly Reg[], body: () => void) => {
      if (guard === undefined) return body();
      for (const register of registers) b.set(register as Reg<'b32'>, 0);
      b.when(guard, body);
    };
    if (bytes * step === 2) {
      const loaded = b.reg('b16');
      load([loaded], () => b.ld('b16', address, first * bytes, { readOnly: true, into: loaded }));
      halves.push(loaded);
      continue;
    }
    const loaded = b.regs('b32', (bytes * step) / 4);
    load(loaded, () => {
      const [only] = loaded as [Reg<'b32'>];
      if (loaded.length === 1) b.ld('b32', address, first * bytes, { readOnly: true, into: only });
      else b.ldVector('b32', loaded.length as 2 | 4, address, first * bytes, { readOnly: true, into: loaded });
    });
    words.push(...loaded);
  }
  for (let i = 0; i < halves.length; i += 2) words.push(b.pack('b32', halves[i] as Reg, halves[i + 1] as Reg));
  return words;
}

/** The eight floats of {@link loadEightPacked}'s registers. Float32 needs no conversion: the registers are the same. */
export function unpackEight(b: KernelBuilder, dtype: DType, words: readonly Reg<'b32'>[]): Reg<'f32'>[] {
  if (dtype === 'float32') return words.map((word) => b.as(word, 'f32'));
  return words.flatMap((word) => unpackPair(b, dtype, word));
}

/**
 * Loads eight consecutive channels of a token as f32.
 *
 * @param channel first channel of this thread
 * @param dim channels of the operand, a multiple of `width`; those at and beyond it read as 0
 * @param rowInside false: everything reads as 0
 */
export function loadEight(
  b: KernelBuilder,
  dtype: DType,
  width: LoadWidth,
  address: Reg<'global'>,
  channel: Reg<'u32'>,
  dim: number,
  rowInside: Reg<'pred'>,
): Reg<'f32'>[] {
  const inside = (first: number) => b.andPred(rowInside, b.setp('lt', b.add(channel, first), dim));
  return unpackEight(b, dtype, loadEightPacked(b, dtype, width, address, inside));
}

/** The low bytes of four registers for each, the first lowest. */
export function packBytes(b: KernelBuilder, words: readonly Reg<'b32'>[]): Reg<'b32'>[] {
  return Array.from({ length: words.length / 4 }, (_, i) => {
    const [x, y, z, w] = words.slice(4 * i, 4 * i + 4) as [Reg<'b32'>, Reg<'b32'>, Reg<'b32'>, Reg<'b32'>];
    return b.prmt(b.prmt(x, y, 0x0040), b.prmt(z, w, 0x0040), 0x5410);
  });
}

/** Reads eight consecutive floats, 16-byte aligned. */
export function loadEightFloats(b: KernelBuilder, address: Reg<'global'>): Reg<'f32'>[] {
  return [0, 16].flatMap((at) => b.ldVector('f32', 4, address, at, { readOnly: true }));
}
