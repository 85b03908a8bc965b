/** Products of E2M1 with a scale for each block: fragments, selectors and conversions, and what ptxas takes. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Random } from '../../../../../test/support/random.ts';
import { E2M1_VALUES, e2m1FromNumber } from '../../../../tensor/formats/float4.ts';
import { e4m3ToNumber } from '../../../../tensor/formats/float8.ts';
import { float16ToNumber } from '../../../../tensor/formats/float16.ts';
import { ue8m0ToNumber } from '../../../../tensor/formats/ue8m0.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { type BlockScaledShape, MXFP4_MMA, NVFP4_MMA } from '../../ptx/mma.ts';
import { printKernel } from '../../ptx/printer.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { assemble, ptxasVersion } from '../ptxas.ts';
import { GlobalMemory } from './memory.ts';
import { simulateKernel } from './simulator.ts';

const K = 64;
/** NaN in UE4M3 and in UE8M0. */
const POISON = { [NVFP4_MMA]: 0x7f, [MXFP4_MMA]: 0xff } as const;

interface Selectors {
  readonly a: number;
  readonly b: number;
  readonly byteA?: number;
  readonly byteB?: number;
}

/** Loads every register of a lane from `in`, 12 words a lane (A, B, scales), multiplies, stores four sums. */
function product(shape: BlockScaledShape, { a, b: threadB, byteA = 0, byteB = 0 }: Selectors): Kernel {
  const b = new KernelBuilder({ name: 'product', target: 'sm_120f', threads: 32 });
  const [out, input] = [b.parameter('out', 'u64'), b.parameter('in', 'u64')];
  const lane = b.special('%tid.x');
  const own = b.add(b.loadPointer(input), b.as(b.mulWide(lane, 32), 'global'));
  const words = [0, 16].flatMap((at) => b.ldVector('b32', 4, own, at));
  const codes = words.map((word) => b.as(word, 'e2m1x8'));
  const d = Array.from({ length: 4 }, () => b.constant('f32', 0));
  const [aScale, bScale] = words.slice(6) as [Reg<'b32'>, Reg<'b32'>];
  b.mmaBlockScaled(
    shape,
    d,
    codes.slice(0, 4),
    codes.slice(4, 6),
    { register: aScale, thread: a, byte: byteA },
    { register: bScale, thread: threadB, byte: byteB },
  );
  b.stVector(d, b.add(b.loadPointer(out), b.as(b.mulWide(lane, 16), 'global')));
  return b.build();
}

interface Matrices {
  /** Codes of A, 16 x 64, and of B, 8 x 64 by columns. */
  readonly a: Uint8Array;
  readonly b: Uint8Array;
  /** Codes of scales, four (two) to a row of A or column of B. */
  readonly aScales: Uint8Array;
  readonly bScales: Uint8Array;
}

/** Registers of all lanes, as the ISA lays fragments out; scales of lanes that the selectors do not name are NaN. */
function fragments(
  shape: BlockScaledShape,
  { a, b, aScales, bScales }: Matrices,
  { a: threadA, b: threadB, byteA = 0, byteB = 0 }: Selectors,
) {
  const perRow = shape === NVFP4_MMA ? 4 : 2;
  const registers = new Uint32Array(32 * 8);
  const bytes = new Uint8Array(registers.buffer);
  for (let lane = 0; lane < 32; lane++) {
    const [g, t] = [lane >> 2, lane & 3];
    for (let e = 0; e < 8; e++) {
      for (let i = 0; i < 6; i++) {
        const [row, half] = i < 4 ? [g + 8 * (i & 1), i >> 1] : [g, i - 4];
        const code = (i < 4 ? a : b)[row * K + 32 * half + 8 * t + e] as number;
        registers[lane * 8 + i] = ((registers[lane * 8 + i] as number) | (code << (4 * e))) >>> 0;
      }
    }
    bytes.fill(POISON[shape], lane * 32 + 24, lane * 32 + 32);
    for (let i = 0; i < perRow; i++) {
      if (t >> 1 === threadA) bytes[lane * 32 + 24 + byteA + i] = aScales[(g + 8 * (t & 1)) * perRow + i] as number;
      if (t === threadB) bytes[lane * 32 + 28 + byteB + i] = bScales[g * perRow + i] as number;
    }
  }
  return bytes;
}

function simulated(shape: BlockScaledShape, matrices: Matrices, packed: Selectors, asked = packed): Float32Array {
  const memory = new GlobalMemory();
  const out = memory.allocate('out', 32 * 16);
  const input = memory.allocate('in', 32 * 32, fragments(shape, matrices, packed));
  simulateKernel(product(shape, asked), 1, { out, in: input }, memory);
  const { bytes } = memory.read('out');
  const sums = new Float32Array(bytes.buffer, bytes.byteOffset, 128);
  const result = new Float32Array(128);
  for (let lane = 0; lane < 32; lane++) {
    for (let i = 0; i < 4; i++) {
      result[((lane >> 2) + 8 * (i >> 1)) * 8 + 2 * (lane & 3) + (i & 1)] = sums[lane * 4 + i] as number;
    }
  }
  return result;
}

function expected(shape: BlockScaledShape, { a, b, aScales, bScales }: Matrices): Float32Array {
  const perRow = shape === NVFP4_MMA ? 4 : 2;
  const scaleOf = shape === NVFP4_MMA ? e4m3ToNumber : ue8m0ToNumber;
  const element = (codes: Uint8Array, scales: Uint8Array, row: number, k: number) =>
    (E2M1_VALUES[codes[row * K + k] as number] as number) *
    scaleOf(scales[row * perRow + Math.floor((k * perRow) / K)] as number);
  return Float32Array.from({ length: 128 }, (_, at) => {
    let sum = 0;
    for (let k = 0; k < K; k++) sum += element(a, aScales, at >> 3, k) * element(b, bScales, at & 7, k);
    return sum;
  });
}

function randomMatrices(shape: BlockScaledShape, seed: number): Matrices {
  const random = new Random(seed);
  const codes = (count: number, from: number, below: number) =>
    Uint8Array.from({ length: count }, () => from + Math.floor(random.uniform() * (below - from)));
  const perRow = shape === NVFP4_MMA ? 4 : 2;
  const scales = (rows: number) =>
    shape === NVFP4_MMA ? codes(rows * perRow, 1, 0x7f) : codes(rows * perRow, 117, 137);
  return { a: codes(16 * K, 0, 16), b: codes(8 * K, 0, 16), aScales: scales(16), bScales: scales(8) };
}

const selectors = fc.record({ a: fc.constantFrom(0, 1), b: fc.constantFrom(0, 1, 2, 3) });

describe('block-scaled products of E2M1', () => {
  test('NVFP4: rows and columns have the scales of the lanes that are named, and of no other', () => {
    fc.assert(
      fc.property(fc.nat(), selectors, selectors, (seed, packed, asked) => {
        const matrices = randomMatrices(NVFP4_MMA, seed);
        const result = simulated(NVFP4_MMA, matrices, packed, asked);
        if (packed.a === asked.a && packed.b === asked.b) expect(result).toEqual(expected(NVFP4_MMA, matrices));
        else expect(result.every(Number.isNaN)).toBe(true);
      }),
      { numRuns: 40 },
    );
  });

  test('MXFP4: the selected bytes count', () => {
    const bytes = fc.record({ byteA: fc.constantFrom(0, 2), byteB: fc.constantFrom(0, 2) });
    fc.assert(
      fc.property(fc.nat(), selectors, bytes, bytes, (seed, lanes, packed, asked) => {
        const matrices = randomMatrices(MXFP4_MMA, seed);
        const result = simulated(MXFP4_MMA, matrices, { ...lanes, ...packed }, { ...lanes, ...asked });
        if (packed.byteA === asked.byteA && packed.byteB === asked.byteB)
          expect(result).toEqual(expected(MXFP4_MMA, matrices));
        else expect(result.every(Number.isNaN)).toBe(true);
      }),
      { numRuns: 20 },
    );
  });

  test('a scale of another row, column or block, and a code at another place, change the product', () => {
    const matrices = randomMatrices(NVFP4_MMA, 7);
    const selected = { a: 0, b: 2 };
    const right = simulated(NVFP4_MMA, matrices, selected);
    const swapped = (codes: Uint8Array, i: number, j: number) => {
      const copy = codes.slice();
      [copy[i], copy[j]] = [copy[j] as number, copy[i] as number];
      return copy;
    };
    const { a, b, aScales, bScales } = matrices;
    const differing = (codes: Uint8Array, step: number) => codes.findIndex((code, i) => code !== codes[i + step]);
    for (const wrong of [
      { ...matrices, aScales: swapped(aScales, differing(aScales, 4), differing(aScales, 4) + 4) },
      { ...matrices, aScales: swapped(aScales, differing(aScales, 1), differing(aScales, 1) + 1) },
      { ...matrices, bScales: swapped(bScales, differing(bScales, 4), differing(bScales, 4) + 4) },
      { ...matrices, a: swapped(a, differing(a, 1), differing(a, 1) + 1) },
      { ...matrices, b: swapped(b, differing(b, 8), differing(b, 8) + 8) },
    ]) {
      expect(simulated(NVFP4_MMA, wrong, selected)).not.toEqual(right);
    }
  });

  test('selectors that the instruction does not have are refused', () => {
    expect(() => product(NVFP4_MMA, { a: 2, b: 0 })).toThrow(RangeError);
    expect(() => product(NVFP4_MMA, { a: 0, b: 4 })).toThrow(RangeError);
    expect(() => product(NVFP4_MMA, { a: 0, b: 0, byteA: 2 })).toThrow(RangeError);
    expect(() => product(MXFP4_MMA, { a: 0, b: 0, byteB: 1 })).toThrow(RangeError);
  });
});

/** Two floats of a lane to E2M1 and back to FP16, and the byte beside three others in a word. */
function conversions(): Kernel {
  const b = new KernelBuilder({ name: 'conversions', target: 'sm_120f', threads: 32 });
  const [out, input] = [b.parameter('out', 'u64'), b.parameter('in', 'u64')];
  const offset = b.as(b.mulWide(b.special('%tid.x'), 8), 'global');
  const [low, high] = b.ldVector('f32', 2, b.add(b.loadPointer(input), offset)) as [Reg<'f32'>, Reg<'f32'>];
  const [own, other] = [b.cvtPack('e2m1x2', low, high), b.cvtPack('e2m1x2', high, low)];
  const word = b.packBytes('b32', [own, other, own, other]);
  const back = b.cvt('f16x2', b.unpackBytes(word)[2] as Reg<'e2m1x2'>);
  b.stVector([word, b.as(back, 'b32')], b.add(b.loadPointer(out), offset));
  return b.build();
}

describe('E2M1 conversions', () => {
  test('round to nearest even, saturate, and make +6 of NaN', () => {
    const ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, Number.NaN, -0.25, -5, Number.NEGATIVE_INFINITY];
    const random = new Random(3);
    const values = Float32Array.from({ length: 64 }, (_, i) => ties[i] ?? random.normal() * 3);
    const memory = new GlobalMemory();
    const out = memory.allocate('out', 256);
    const input = memory.allocate('in', 256, new Uint8Array(values.buffer));
    simulateKernel(conversions(), 1, { out, in: input }, memory);
    const { bytes } = memory.read('out');
    const words = new Uint32Array(bytes.buffer, bytes.byteOffset, 64);
    for (let lane = 0; lane < 32; lane++) {
      const [low, high] = [0, 1].map((i) => e2m1FromNumber(values[2 * lane + i] as number)) as [number, number];
      const [own, other] = [low | (high << 4), high | (low << 4)];
      expect(words[2 * lane]).toBe((own | (other << 8) | (own << 16) | (other << 24)) >>> 0);
      const halves = words[2 * lane + 1] as number;
      expect(float16ToNumber(halves & 0xffff)).toBe(E2M1_VALUES[low]);
      expect(float16ToNumber(halves >>> 16)).toBe(E2M1_VALUES[high]);
    }
  });
});

describe.skipIf(ptxasVersion() === undefined)('ptxas', () => {
  test.each([
    ['NVFP4', product(NVFP4_MMA, { a: 1, b: 3 })],
    ['MXFP4', product(MXFP4_MMA, { a: 0, b: 2, byteA: 2 })],
    ['conversions', conversions()],
  ] as const)('takes %s for the family of 12.x', (_, kernel) => {
    expect(printKernel(kernel)).toContain('.version 8.8\n.target sm_120f');
    expect(assemble(kernel).spillStoreBytes).toBe(0);
  });
});
