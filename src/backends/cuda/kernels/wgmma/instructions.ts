/** Instructions and short sequences that only the wgmma kernel uses. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import { immediate } from '../../ptx/operands.ts';
import type { Reg } from '../../ptx/types.ts';

/** The value of the warp's first lane, known to be the same in all: what roles and descriptors are computed from. */
export function uniform(b: KernelBuilder, value: Reg<'u32'>): Reg<'u32'> {
  const d = b.reg('u32');
  const bits = (value: number) => immediate(value, 'b32');
  b.emit('shfl.sync.idx.b32', [d], [value, bits(0), bits(31), bits(0xffffffff)]);
  return d;
}

/** Below 2^-14 E4M3 has nothing but 0: its smallest number is 2^-9. */
const LOWEST_EXPONENT = -14;
/** 1.5 * 2^10 + 15: added to x it leaves the integer nearest to x in the low bits, biased as FP16's exponents are. */
const HALF_MAGIC = 1551;
/** Largest relative error 1.7e-3 over [-0.5, 0.5]: E4M3 rounds by up to 6e-2. */
const POLYNOMIAL = [1.0004427, 0.7034355, 0.238422] as const;

const halfConstant = (b: KernelBuilder, bits: number) => b.as(b.constant('b32', bits * 65537), 'f16x2');
const float16Bits = (value: number): number => {
  const exponent = Math.floor(Math.log2(Math.abs(value)));
  const mantissa = Math.round((Math.abs(value) / 2 ** exponent - 1) * 1024);
  return (value < 0 ? 0x8000 : 0) + ((exponent + 15) << 10) + mantissa;
};

/**
 * 2^x of a pair of halves on the FMA units, in E4M3: the integer nearest to x becomes the exponent, a quadratic of the
 * rest the mantissa.
 *
 * @param x below 16; NaN stays NaN
 */
export function exp2Halves(b: KernelBuilder, x: Reg<'f16x2'>): Reg<'e4m3x2'> {
  const constant = (value: number) => halfConstant(b, float16Bits(value));
  const clamped = b.reg('f16x2');
  b.emit('max.NaN.f16x2', [clamped], [x, constant(LOWEST_EXPONENT)]);
  const magic = constant(HALF_MAGIC);
  const biased = b.add(clamped, magic);
  const rest = b.sub(clamped, b.sub(biased, magic));
  const [c0, c1, c2] = POLYNOMIAL.map(constant) as [Reg<'f16x2'>, Reg<'f16x2'>, Reg<'f16x2'>];
  const mantissa = b.fma(b.fma(rest, c2, c1), rest, c0);
  const power = b.shl(b.and(b.as(biased, 'b32'), 0x001f001f), 10);
  const result = b.mul(mantissa, b.as(power, 'f16x2'));
  const packed = b.reg('e4m3x2');
  b.emit('cvt.rn.satfinite.e4m3x2.f16x2', [packed], [result]);
  return packed;
}
