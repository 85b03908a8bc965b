/**
 * UE8M0, the scale format of OCP MX: eight exponent bits, no sign, no mantissa. Code c is 2^(c - 127); 0xff is NaN.
 * Zero cannot be written.
 *
 * The hardware converts by rounding toward zero or toward positive infinity only (`cvt.rz` and `cvt.rp`); rounding to
 * nearest is here for completeness, with a tie (1.5 times a power of two) going to the even code. The sign is ignored.
 * Values above 2^127, infinity included, saturate to 2^127; values below 2^-127 become 2^-127; NaN becomes 0xff.
 */
import { floorToPowerOfTwo } from './rounding.ts';

const NAN_CODE = 0xff;
const MAX_CODE = 0xfe;

export type Ue8m0Rounding = 'up' | 'down' | 'nearest-even';

/**
 * A magnitude to a UE8M0 code.
 *
 * @param rounding default `'up'`: data divided by the scale does not grow beyond what the scale was made for
 */
export function ue8m0FromNumber(value: number, rounding: Ue8m0Rounding = 'up'): number {
  if (Number.isNaN(value)) return NAN_CODE;
  const magnitude = Math.abs(value);
  if (magnitude <= 2 ** -127) return 0;
  if (magnitude >= 2 ** 127) return MAX_CODE;
  const power = floorToPowerOfTwo(magnitude);
  const down = Math.log2(power) + 127;
  const fraction = magnitude / power;
  if (fraction === 1 || rounding === 'down') return down;
  if (rounding === 'up') return down + 1;
  if (fraction === 1.5) return down + (down & 1);
  return fraction > 1.5 ? down + 1 : down;
}

/** UE8M0 code to a number, exactly. */
export function ue8m0ToNumber(code: number): number {
  return code === NAN_CODE ? Number.NaN : 2 ** (code - 127);
}
