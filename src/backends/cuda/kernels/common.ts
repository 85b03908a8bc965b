/** What several kernels share: element loads, the table of sequences, and the constants of the INT32-to-float trick. */
import type { DType } from '../../../tensor/dtype.ts';
import type { KernelBuilder } from '../ptx/builder.ts';
import type { Parameter, Reg } from '../ptx/types.ts';

/**
 * 1.5 * 2^23. An integer |n| < 2^22 added to the bits of this float gives the bits of 1.5 * 2^23 + n: scores accumulated on
 * top of it are floats without a conversion.
 */
export const MAGIC = 12582912;
export const MAGIC_BITS = 0x4b400000;

export const LOG2_E = Math.LOG2E;

/** Magnitudes of floats order like the integers of their bits: from here on they are not finite. */
export const INFINITY_BITS = 0x7f800000;
/** From here on they round to infinity in FP16. */
export const BEYOND_FP16_BITS = 0x477ff000;

/** Below this a group of Q or K counts as zeros: 127 / max would not be finite, and no score could tell. */
export const SMALLEST_GROUP_MAXIMUM = 1e-36;

/** Elements of the largest load that an operand's strides and offset allow. */
export type LoadWidth = 1 | 2 | 4 | 8;

/**
 * One row of the table of sequences (constant buffer `sequences`), eight int32: where a sequence lies in the caller's
 * tensors (`queryStart`, `keyStart`: tokens) and in the padded quantized ones (`paddedQueryStart`, `paddedKeyStart`: rows).
 */
export const SEQUENCE_INTS = 8;

export interface SequenceRegisters {
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  readonly paddedQueryStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
}

/** Reads a sequence's row of the table. */
export function loadSequence(b: KernelBuilder, table: Reg<'global'>, sequence: Reg<'u32'>): SequenceRegisters {
  const row = offset(b, table, sequence, SEQUENCE_INTS * 4);
  const [queryStart, queryLength, keyStart, keyLength] = b.ldVector('u32', 4, row, 0, { readOnly: true }) as [
    Reg<'u32'>,
    Reg<'u32'>,
    Reg<'u32'>,
    Reg<'u32'>,
  ];
  const [paddedQueryStart, paddedKeyStart] = b.ldVector('u32', 2, row, 16, { readOnly: true }) as [
    Reg<'u32'>,
    Reg<'u32'>,
  ];
  return { queryStart, queryLength, keyStart, keyLength, paddedQueryStart, paddedKeyStart };
}

/** `base + index * bytes`, in 64 bits. */
export function offset(
  b: KernelBuilder,
  base: Reg<'global'>,
  index: Reg<'u32'>,
  bytes: number | Reg<'u32'>,
): Reg<'global'> {
  return b.add(base, b.as(b.mulWide(index, bytes), 'global'));
}

/** `base + index * stride`, the stride a 64-bit parameter in bytes. */
export function offset64(b: KernelBuilder, base: Reg<'global'>, index: Reg<'u32'>, stride: Reg<'u64'>): Reg<'global'> {
  return b.add(base, b.as(b.mul(b.cvt('u64', index), stride), 'global'));
}

/** Splits a linear index: `index % extent` and `index / extent`. */
export function divide(
  b: KernelBuilder,
  index: Reg<'u32'>,
  extent: Reg<'u32'>,
): [rest: Reg<'u32'>, quotient: Reg<'u32'>] {
  const quotient = b.div(index, extent);
  return [b.sub(index, b.mul(quotient, extent)), quotient];
}

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

/**
 * Loads eight consecutive channels of a token: four pairs of 16-bit floats, or eight f32. {@link unpackEight} makes floats of
 * them, which take twice the registers.
 *
 * @param inside of the load at channel `first` (counted from this thread's first): what is not inside is not read and is 0;
 * undefined where all of it is
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

/** The eight floats of {@link loadEightPacked}'s registers. Those of float32 are the same registers. */
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

/** The low bytes of eight registers, in two. */
export function packBytes(b: KernelBuilder, words: readonly Reg<'b32'>[]): Reg<'b32'>[] {
  return [0, 4].map((first) => {
    const [x, y, z, w] = words.slice(first, first + 4) as [Reg<'b32'>, Reg<'b32'>, Reg<'b32'>, Reg<'b32'>];
    return b.prmt(b.prmt(x, y, 0x0040), b.prmt(z, w, 0x0040), 0x5410);
  });
}

/** Reads eight consecutive floats, 16-byte aligned. */
export function loadEightFloats(b: KernelBuilder, address: Reg<'global'>): Reg<'f32'>[] {
  return [0, 16].flatMap((at) => b.ldVector('f32', 4, address, at, { readOnly: true }));
}

/** `u64` parameters by name, in order: pointers, and strides in bytes. */
export function pointers<const N extends string>(b: KernelBuilder, names: readonly N[]): Record<N, Parameter<'u64'>> {
  return Object.fromEntries(names.map((name) => [name, b.parameter(name, 'u64')])) as Record<N, Parameter<'u64'>>;
}

/** Strides of the caller's K and V, in bytes, for kernels that read both. */
export const KEY_VALUE_STRIDES = ['keyBatch', 'keyHead', 'keyToken', 'valueBatch', 'valueHead', 'valueToken'] as const;

/** `u32` parameters by name, in order. */
export function integers<const N extends string>(b: KernelBuilder, names: readonly N[]): Record<N, Parameter<'u32'>> {
  return Object.fromEntries(names.map((name) => [name, b.parameter(name, 'u32')])) as Record<N, Parameter<'u32'>>;
}

export const nextPowerOfTwo = (n: number) => 2 ** Math.ceil(Math.log2(Math.max(1, n)));
export const roundUp = (n: number, multiple: number) => Math.ceil(n / multiple) * multiple;
