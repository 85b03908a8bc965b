/**
 * The magnitude code of a small binary floating-point format, rounded to nearest even straight from float64 (so a
 * float64 is never rounded twice). Codes of such a format, read as integers, are in the order of their values: what
 * rounds up past a power of two carries into the exponent field by itself.
 */

const float64 = new Float64Array(1);
const words = new Uint32Array(float64.buffer);
/** Index of the word with sign and exponent: 1 on little-endian machines. */
const HIGH = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1 ? 1 : 0;
/** Adding and taking away 2^52 rounds a float64 in 0..2^51 to an integer, ties to even. */
const TO_INTEGER = 2 ** 52;

/**
 * Code of `magnitude` without its sign, not yet limited to the format's largest code.
 *
 * @param magnitude finite, >= 0
 * @param mantissaBits stored mantissa bits
 * @param minExponent exponent of the smallest normal number
 */
export function magnitudeCode(magnitude: number, mantissaBits: number, minExponent: number): number {
  float64[0] = magnitude;
  const exponent = Math.max(((words[HIGH] as number) >>> 20) - 1023, minExponent);
  // 2^(mantissaBits - exponent): steps of the format per unit in this binade.
  float64[0] = 0;
  words[HIGH] = (1023 + mantissaBits - exponent) << 20;
  const steps = magnitude * (float64[0] as number) + TO_INTEGER - TO_INTEGER;
  return (exponent - minExponent) * 2 ** mantissaBits + steps;
}

/** 1 for negative values, -0 and NaNs with their sign bit set; else 0. */
export function signBit(value: number): number {
  float64[0] = value;
  return (words[HIGH] as number) >>> 31;
}

/** The largest power of two that is <= `x`. x: normal, finite, > 0. */
export function floorToPowerOfTwo(x: number): number {
  float64[0] = x;
  words[HIGH] = (words[HIGH] as number) & 0x7ff00000;
  words[1 - HIGH] = 0;
  return float64[0] as number;
}

/** A binary floating-point format of at most 16 bits, as bulk encoding needs it. */
export interface SmallFloat {
  readonly mantissaBits: number;
  readonly minExponent: number;
  /** Where codes end: the largest number's where the format saturates, infinity's where it does not. */
  readonly maxCode: number;
  /** Position of the sign bit. */
  readonly signShift: number;
  readonly nanCode: number;
  /** Whether NaNs keep their sign. */
  readonly signedNan: boolean;
}

/**
 * An encoder of float32 arrays: all integer arithmetic, an order of magnitude faster than {@link magnitudeCode} and
 * equal to it. What depends on the exponent alone is in two tables.
 */
export function float32Encoder(
  format: SmallFloat,
): (source: Float32Array, target: Uint8Array | Uint16Array, at: number) => void {
  const { mantissaBits, minExponent, maxCode, signShift, nanCode, signedNan } = format;
  // Of the 24-bit mantissa, how many bits fall away, and what the bits that stay are added to.
  const shifts = new Int32Array(256);
  const bases = new Int32Array(256);
  for (let field = 0; field < 256; field++) {
    const exponent = field - 127;
    const binade = Math.max(exponent, minExponent);
    shifts[field] = Math.min(23 - mantissaBits + binade - exponent, 25);
    bases[field] = (binade - minExponent) * 2 ** mantissaBits;
  }
  return (source, target, at) => {
    const words = new Uint32Array(source.buffer, source.byteOffset, source.length);
    for (let i = 0; i < words.length; i++) {
      const word = words[i] as number;
      const sign = (word >>> 31) << signShift;
      const field = (word >>> 23) & 0xff;
      const fraction = word & 0x7fffff;
      if (field === 0xff && fraction !== 0) {
        target[at + i] = nanCode | (signedNan ? sign : 0);
        continue;
      }
      const mantissa = fraction | 0x800000;
      const shift = shifts[field] as number;
      // Just under half, and one more where the kept part is odd: ties go to even.
      const kept = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >>> shift) & 1)) >>> shift;
      target[at + i] = sign | Math.min((bases[field] as number) + kept, maxCode);
    }
  };
}
