import { describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { type Float16ArrayLike, NativeFloat16Array } from '../tensor.ts';
import { bfloat16FromNumber, bfloat16ToNumber, decodeBfloat16, encodeBfloat16 } from './bfloat16.ts';
import { E2M1_VALUES, e2m1FromNumber, e2m1ToNumber, packE2m1, unpackE2m1 } from './float4.ts';
import {
  decodeE4m3,
  decodeE5m2,
  E4M3_MAX,
  E5M2_MAX,
  e4m3FromNumber,
  e4m3ToNumber,
  e5m2FromNumber,
  e5m2ToNumber,
  encodeE4m3,
  encodeE5m2,
} from './float8.ts';
import {
  decodeFloat16,
  encodeFloat16,
  FLOAT16_MAX,
  float16FromNumber,
  float16ToNumber,
  roundToFloat16,
} from './float16.ts';
import { packInt4, unpackInt4 } from './int4.ts';
import { ue8m0FromNumber, ue8m0ToNumber } from './ue8m0.ts';

interface Format {
  readonly name: string;
  readonly codes: number;
  encode(value: number): number;
  decode(code: number): number;
  /**
   * What overflows does: saturate at the largest number, or go to infinity from halfway to the number that would
   * follow.
   */
  readonly saturates: boolean;
  readonly nan: { readonly code: number };
}

const FORMATS: readonly Format[] = [
  {
    name: 'float16',
    codes: 1 << 16,
    encode: float16FromNumber,
    decode: float16ToNumber,
    saturates: false,
    nan: { code: 0x7e00 },
  },
  {
    name: 'bfloat16',
    codes: 1 << 16,
    encode: bfloat16FromNumber,
    decode: bfloat16ToNumber,
    saturates: false,
    nan: { code: 0x7fc0 },
  },
  { name: 'E4M3', codes: 256, encode: e4m3FromNumber, decode: e4m3ToNumber, saturates: true, nan: { code: 0x7f } },
  { name: 'E5M2', codes: 256, encode: e5m2FromNumber, decode: e5m2ToNumber, saturates: true, nan: { code: 0x7f } },
  { name: 'E2M1', codes: 16, encode: e2m1FromNumber, decode: e2m1ToNumber, saturates: true, nan: { code: 7 } },
];

/** Values of all finite codes with sign bit 0, in the order of the codes. */
const magnitudes = ({ codes, decode }: Format) =>
  Array.from({ length: codes / 2 }, (_, code) => decode(code)).filter((value) => Number.isFinite(value));

/** The float64 next to `x` (x > 0), `direction` 1 or -1. */
function neighbour(x: number, direction: 1 | -1): number {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  view.setBigInt64(0, view.getBigInt64(0) + BigInt(direction));
  return view.getFloat64(0);
}

describe.each(FORMATS)('$name', (format) => {
  const { codes, encode, decode, saturates, nan } = format;
  const signBit = codes / 2;
  const values = magnitudes(format);
  const largest = values.at(-1) as number;

  it('encodes every decoded code to itself', () => {
    for (let code = 0; code < codes; code++) {
      const value = decode(code);
      if (Number.isNaN(value)) continue;
      // A format that saturates has no way back to its infinity.
      if (saturates && !Number.isFinite(value)) continue;
      if (encode(value) !== code) expect.fail(`code ${code} decodes to ${value}, which encodes to ${encode(value)}`);
    }
  });

  it('has codes in the order of their values', () => {
    for (let code = 1; code < values.length; code++) {
      if (!((values[code] as number) > (values[code - 1] as number))) expect.fail(`code ${code}`);
    }
  });

  it('rounds to nearest, ties to even, at and around every midpoint', () => {
    for (let code = 0; code + 1 < values.length; code++) {
      const low = values[code] as number;
      const high = values[code + 1] as number;
      const middle = (low + high) / 2;
      const even = code % 2 === 0 ? code : code + 1;
      for (const sign of [1, -1]) {
        const signed = sign < 0 ? signBit : 0;
        if (encode(sign * middle) !== signed + even)
          expect.fail(`${sign * middle} between codes ${code} and ${code + 1}`);
        if (encode(sign * neighbour(middle, -1)) !== signed + code) expect.fail(`just below ${middle}`);
        if (encode(sign * neighbour(middle, 1)) !== signed + code + 1) expect.fail(`just above ${middle}`);
      }
    }
  });

  it('agrees with a search for the nearest value', () => {
    const random = new Random(runSeed());
    for (let i = 0; i < 2000; i++) {
      const value = Math.min(2 ** (random.uniform() * 60 - 40), largest) * (random.uniform() < 0.5 ? -1 : 1);
      const got = Math.abs(decode(encode(value)));
      let low = 0;
      let high = values.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if ((values[middle] as number) <= Math.abs(value)) low = middle;
        else high = middle;
      }
      const best = Math.min(
        Math.abs(Math.abs(value) - (values[low] as number)),
        Math.abs((values[high] as number) - Math.abs(value)),
      );
      expect(Math.abs(Math.abs(value) - got), `${value}, seed ${random.seed}`).toBe(best);
    }
  });

  it('treats overflow, infinity, NaN and signed zero as documented', () => {
    const infinite = saturates ? largest : Number.POSITIVE_INFINITY;
    const last = values.at(-2) as number;
    for (const value of [largest + (largest - last), 1e300, Number.POSITIVE_INFINITY]) {
      expect(decode(encode(value))).toBe(infinite);
      expect(decode(encode(-value))).toBe(-infinite);
    }
    // Just short of halfway to the number that would come next, no overflow yet.
    expect(decode(encode(neighbour(largest + (largest - last) / 2, -1)))).toBe(largest);
    expect(encode(Number.NaN)).toBe(nan.code);
    expect(encode(0)).toBe(0);
    expect(encode(-0)).toBe(signBit);
    expect(Object.is(decode(signBit), -0)).toBe(true);
    // Smaller than half the smallest number.
    expect(encode(5e-324)).toBe(0);
    expect(encode(-1e-310)).toBe(signBit);
  });
});

it('has the largest values of the specifications', () => {
  expect([FLOAT16_MAX, E4M3_MAX, E5M2_MAX]).toEqual([float16ToNumber(0x7bff), e4m3ToNumber(0x7e), e5m2ToNumber(0x7b)]);
  expect([FLOAT16_MAX, E4M3_MAX, E5M2_MAX]).toEqual([65504, 448, 57344]);
  expect(E2M1_VALUES.slice(0, 8)).toEqual([0, 0.5, 1, 1.5, 2, 3, 4, 6]);
});

describe('bulk conversion', () => {
  const random = new Random(runSeed());
  const specials = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 0, -0, 65519, 65520, 3.4e38, 1e-45];
  const source = Float32Array.from([...specials, ...random.normals(1000), ...random.normals(1000, 2 ** -16)]);

  it.each([
    ['Float32Array', source],
    ['Float64Array', Float64Array.from(source, (value) => value * (1 + 2 ** -40))],
  ] as const)('rounds a %s as the scalar conversions do', (_, values) => {
    const bits = new Uint16Array(values.length);
    encodeBfloat16(values, bits);
    expect([...bits]).toEqual(Array.from(values, bfloat16FromNumber));
    encodeFloat16(values, bits);
    const decoded = new Float32Array(values.length);
    decodeFloat16(bits, decoded);
    expect([...decoded], `seed ${random.seed}`).toEqual(Array.from(values, roundToFloat16));
    const codes = new Uint8Array(values.length);
    encodeE4m3(values, codes);
    expect([...codes]).toEqual(Array.from(values, e4m3FromNumber));
    decodeE4m3(codes, decoded);
    expect([...decoded]).toEqual(Array.from(codes, e4m3ToNumber));
    encodeE5m2(values, codes);
    expect([...codes]).toEqual(Array.from(values, e5m2FromNumber));
    decodeE5m2(codes, decoded);
    expect([...decoded]).toEqual(Array.from(codes, e5m2ToNumber));
  });

  it('rounds float32 at, below and above every midpoint as the scalar conversions do', () => {
    const encoders = { float16: encodeFloat16, bfloat16: encodeBfloat16, E4M3: encodeE4m3, E5M2: encodeE5m2 } as const;
    for (const format of FORMATS) {
      if (!(format.name in encoders)) continue;
      const values = magnitudes(format);
      const middles = Float32Array.from(values.slice(1), (value, i) => (value + (values[i] as number)) / 2);
      const words = new Uint32Array(middles.buffer);
      const shifted = (by: number) => new Float32Array(Uint32Array.from(words, (word) => word + by).buffer);
      for (const points of [Float32Array.from(values), middles, shifted(1), shifted(-1)]) {
        const signed = Float32Array.from([...points, ...points.map((value) => -value)]);
        const target = format.codes > 256 ? new Uint16Array(signed.length) : new Uint8Array(signed.length);
        encoders[format.name as keyof typeof encoders](signed, target as Uint16Array & Uint8Array);
        const wrong = target.findIndex((code, i) => code !== format.encode(signed[i] as number));
        if (wrong >= 0) expect.fail(`${format.name}: ${signed[wrong]} became ${target[wrong]}`);
      }
    }
  });

  it('decodes all 16-bit codes, strided and with an offset', () => {
    const bits = Uint16Array.from({ length: 1 << 16 }, (_, code) => code);
    const target = new Float32Array((1 << 15) + 1);
    decodeFloat16(bits, target, 1, 2, 1 << 15, 1);
    for (let i = 0; i < 1 << 15; i++) {
      if (!Object.is(target[i + 1], float16ToNumber(2 * i + 1))) expect.fail(`float16 code ${2 * i + 1}`);
    }
    decodeBfloat16(bits, target, 1, 2, 1 << 15, 1);
    for (let i = 0; i < 1 << 15; i++) {
      const expected = bfloat16ToNumber(2 * i + 1);
      if (!Object.is(target[i + 1], expected)) expect.fail(`bfloat16 code ${2 * i + 1}`);
    }
  });

  it.runIf(NativeFloat16Array !== undefined)('agrees with the native Float16Array', () => {
    const native = new (NativeFloat16Array as new (length: number) => Float16ArrayLike)(source.length);
    for (let i = 0; i < source.length; i++) native[i] = source[i] as number;
    expect(Array.from(native)).toEqual(Array.from(source, roundToFloat16));
  });
});

describe('packing', () => {
  it('keeps INT4 pairs, low nibble first, and saturates', () => {
    const values = Int8Array.from([-8, -7, -1, 0, 1, 7, 5]);
    const bytes = new Uint8Array(4);
    packInt4(values, bytes);
    expect([...bytes]).toEqual([0x98, 0x0f, 0x71, 0x05]);
    const back = new Int8Array(7);
    unpackInt4(bytes, back);
    expect([...back]).toEqual([...values]);
    packInt4(Int8Array.from([127, -128]), bytes);
    expect(bytes[0]).toBe(0x87);
    for (let byte = 0; byte < 256; byte++) {
      const pair = new Int8Array(2);
      unpackInt4(Uint8Array.of(byte), pair);
      packInt4(pair, bytes);
      expect(bytes[0]).toBe(byte);
    }
  });

  it('keeps E2M1 pairs, low nibble first', () => {
    const bytes = new Uint8Array(2);
    packE2m1(Float32Array.of(0.5, -6, 100), bytes);
    expect([...bytes]).toEqual([0xf1, 0x07]);
    for (let byte = 0; byte < 256; byte++) {
      const pair = new Float32Array(2);
      unpackE2m1(Uint8Array.of(byte), pair);
      packE2m1(pair, bytes);
      expect(bytes[0]).toBe(byte);
    }
  });
});

describe('UE8M0', () => {
  it('holds every power of two from 2^-127 to 2^127', () => {
    for (let code = 0; code < 255; code++) {
      const value = ue8m0ToNumber(code);
      expect(value).toBe(2 ** (code - 127));
      for (const rounding of ['up', 'down', 'nearest-even'] as const)
        expect(ue8m0FromNumber(value, rounding)).toBe(code);
      if (code === 254) continue;
      const between = value * 1.25;
      expect(ue8m0FromNumber(between, 'up')).toBe(code + 1);
      expect(ue8m0FromNumber(between, 'down')).toBe(code);
      expect(ue8m0FromNumber(between, 'nearest-even')).toBe(code);
      expect(ue8m0FromNumber(value * 1.5, 'nearest-even')).toBe(code + (code % 2));
      expect(ue8m0FromNumber(value * 1.75, 'nearest-even')).toBe(code + 1);
    }
  });

  it('saturates, and keeps NaN', () => {
    expect(ue8m0FromNumber(0)).toBe(0);
    expect(ue8m0FromNumber(1e-300)).toBe(0);
    expect(ue8m0FromNumber(Number.POSITIVE_INFINITY)).toBe(254);
    expect(ue8m0FromNumber(-4)).toBe(129);
    expect(ue8m0FromNumber(Number.NaN)).toBe(255);
    expect(ue8m0ToNumber(255)).toBeNaN();
  });
});
