/**
 * What the FP4 quantizers write, against the blocks in plain TypeScript: the same codes and scales. Kernels run in the
 * simulator.
 */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { quantizeFp4Block, type ScaleSearch } from '../../../../quantization/fp4-blocks.ts';
import { OUTER_MAX } from '../../../../quantization/outer-scale.ts';
import { channelMean, subtractMean } from '../../../../quantization/smoothing.ts';
import { toFloat32, writeValues } from '../../../../tensor/access.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { e2m1ToNumber } from '../../../../tensor/formats/float4.ts';
import { e4m3ToNumber } from '../../../../tensor/formats/float8.ts';
import { float16ToNumber } from '../../../../tensor/formats/float16.ts';
import { emptyTensor, type Tensor } from '../../../../tensor/tensor.ts';
import { descriptorOf } from '../../kernel-table.ts';
import type { Target } from '../../ptx/targets.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';
import { FP4_BLOCK } from './e2m1.ts';

const seed = runSeed();
const LENGTH = 90;
const TILE = 64;

function operand(dim: number, dtype: DType, magnitude: number, salt: number): Tensor {
  const random = new Random(seed + salt);
  const target = emptyTensor([1, 1, LENGTH, dim], dtype);
  writeValues(
    random.normals(LENGTH * dim).map((value, i) => (value + Math.sin(i % dim)) * magnitude),
    target,
  );
  return target;
}

interface Setting {
  readonly kernel: 'qk-fp4-pv-fp4' | 'qk-fp4-pv-fp4-cuda';
  readonly target: Target;
  readonly dim: number;
  readonly dtype: DType;
  readonly scaleSearch: ScaleSearch;
  readonly magnitude: number;
}

function quantized({ kernel, target, dim, dtype, scaleSearch, magnitude }: Setting) {
  const [q, k, v] = [0, 1, 2].map((salt) => operand(dim, dtype, magnitude, salt)) as [Tensor, Tensor, Tensor];
  const problem = createProblem(q, k, v, { smScale: 1 / (magnitude * magnitude * Math.sqrt(dim)) });
  const choice = {
    descriptor: descriptorOf(kernel),
    pvAccumDtype: 'fp32',
    smoothK: true,
    smoothV: false,
    smoothQ: false,
    scaleSearch,
  } as const;
  return { q, k, v, run: simulateAttention(problem, choice, { target, multiprocessors: 1 }, { q, k, v }) };
}

const floats = ({ bytes }: { bytes: Uint8Array }) =>
  new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length >> 2);

/** Codes of a block as the scheme has it, with the power of two that brings `of` into range. */
function expectedBlock(values: ArrayLike<number>, unit: number, scaleSearch: ScaleSearch) {
  const block = Float32Array.from(values, (value) => value / unit);
  const codes = new Uint8Array(FP4_BLOCK);
  return { scale: quantizeFp4Block(block, FP4_BLOCK, { format: 'nvfp4', scaleSearch }, codes), codes };
}

/** Codes of a block from a byte on: nibbles for block-scaled products; else two to a byte, of bits 6, 2 to 0 and of bits 7, 5 to 3. */
const codesAt = (bytes: Uint8Array, first: number, kernel: Setting['kernel']) =>
  Array.from({ length: FP4_BLOCK }, (_, i) => {
    if (kernel === 'qk-fp4-pv-fp4-cuda') return ((bytes[first + (i >> 1)] as number) >> (4 * (i & 1))) & 15;
    const place = [1, 0, 1, 0, 3, 2, 3, 2][i & 7] as number;
    const byte = bytes[first + 4 * (i >> 3) + place] as number;
    return (i & 2) === 0 ? ((byte >> 3) & 8) | (byte & 7) : ((byte >> 4) & 8) | ((byte >> 3) & 7);
  });

/** What must be equal, up to the rare tie that another order of a sum decides otherwise. */
class Agreement {
  #blocks = 0;
  #others = 0;

  add(same: boolean): void {
    this.#blocks++;
    if (!same) this.#others++;
  }

  get share(): number {
    return this.#others / this.#blocks;
  }
}

const SETTINGS: readonly Setting[] = [
  { kernel: 'qk-fp4-pv-fp4-cuda', target: 'sm_120a', dim: 72, dtype: 'float16', scaleSearch: 'mse', magnitude: 1 },
  { kernel: 'qk-fp4-pv-fp4', target: 'sm_80', dim: 40, dtype: 'float32', scaleSearch: 'four-over-six', magnitude: 1e4 },
  { kernel: 'qk-fp4-pv-fp4', target: 'sm_90a', dim: 64, dtype: 'float32', scaleSearch: 'none', magnitude: 1e-3 },
];

describe.each(SETTINGS)(`$kernel, D $dim, $dtype, $scaleSearch (SAGEATTENTION_SEED=${seed})`, (setting) => {
  const { dim, scaleSearch } = setting;
  const { q, k, v, run } = quantized(setting);
  const padded = Math.ceil(dim / 64) * 64;
  const unitInRange = (unit: number, largest: number) => {
    expect(Math.abs(Math.log2(unit) % 1)).toBe(0);
    expect(largest / unit).toBeLessThanOrEqual(OUTER_MAX);
  };
  const largestOf = (values: Float32Array, first: number, end: number, width: number) =>
    values.subarray(first * width, Math.min(end * width, values.length)).reduce((a, x) => Math.max(a, Math.abs(x)), 0);

  test('K: rows in the order of the accumulators', () => {
    const keys = toFloat32(k);
    const smoothed = subtractMean(keys, channelMean(keys, dim));
    const [codes, scales] = [run.buffer('key').bytes, run.buffer('keyBlockScale').bytes];
    const units = floats(run.buffer('keyScale'));
    const agreement = new Agreement();
    for (let token = 0; token < LENGTH; token++) {
      const tile = Math.floor(token / TILE);
      const unit = units[tile] as number;
      unitInRange(unit, largestOf(smoothed, tile * TILE, (tile + 1) * TILE, dim) * (1 - 1e-6));
      // Row r of 32 holds key 2 (r >> 3) + 8 ((r >> 1) & 3) + (r & 1).
      const row = Array.from({ length: 32 }, (_, r) => r).find(
        (r) => 2 * (r >> 3) + 8 * ((r >> 1) & 3) + (r & 1) === token % 32,
      ) as number;
      const stored = tile * TILE + (token % TILE) - (token % 32) + row;
      for (let first = 0; first < padded; first += FP4_BLOCK) {
        const values = Float32Array.from({ length: FP4_BLOCK }, (_, i) =>
          first + i < dim ? (smoothed[token * dim + first + i] as number) : 0,
        );
        const expected = expectedBlock(values, unit, scaleSearch);
        const step = Math.floor(first / 64);
        const word = (tile * (padded / 64) + step) * TILE + (stored % TILE);
        const scale = scales[word * 4 + ((first % 64) >> 4)];
        const own = codesAt(codes, stored * (padded / 2) + first / 2, setting.kernel);
        const same = (code: number, i: number) =>
          e2m1ToNumber(code) === e2m1ToNumber(expected.codes[i] as number) || code % 8 === 0;
        agreement.add(scale === expected.scale && own.every(same));
      }
    }
    // K's mean is summed in another order, which moves values over the edges of codes now and then.
    expect(agreement.share).toBeLessThan(0.02);
  });

  test('V: transposed tiles', () => {
    const values = toFloat32(v);
    const paddedV = Math.ceil(dim / 32) * 32;
    const [codes, scales] = [run.buffer('value').bytes, run.buffer('valueBlockScale').bytes];
    const units = floats(run.buffer('valueTileScale'));
    const agreement = new Agreement();
    for (let tile = 0; tile * TILE < LENGTH; tile++) {
      const unit = units[tile] as number;
      unitInRange(unit, largestOf(values, tile * TILE, (tile + 1) * TILE, dim));
      expect(Math.log2(unit) % 4).toBeCloseTo(0);
      for (let channel = 0; channel < paddedV; channel++) {
        for (let first = 0; first < TILE; first += FP4_BLOCK) {
          const column = Float32Array.from({ length: FP4_BLOCK }, (_, i) => {
            const token = tile * TILE + first + i;
            return channel < dim && token < LENGTH ? (values[token * dim + channel] as number) : 0;
          });
          const expected = expectedBlock(column, unit, scaleSearch);
          const at = tile * paddedV + channel;
          const own = codesAt(codes, at * 32 + first / 2, setting.kernel);
          const same = (code: number, i: number) => e2m1ToNumber(code) === e2m1ToNumber(expected.codes[i] as number);
          agreement.add(scales[at * 4 + first / FP4_BLOCK] === expected.scale && own.every(same));
        }
      }
    }
    expect(agreement.share).toBeLessThan(0.002);
  });

  test('Q: codes, or in FP16 what they stand for', () => {
    const queries = toFloat32(q);
    const unit = floats(run.buffer('queryScale'))[0] as number;
    unitInRange(unit, largestOf(queries, 0, LENGTH, dim));
    const native = setting.kernel === 'qk-fp4-pv-fp4-cuda';
    const { bytes } = run.buffer('query');
    const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length >> 1);
    const agreement = new Agreement();
    for (let token = 0; token < LENGTH; token++) {
      for (let first = 0; first < padded; first += FP4_BLOCK) {
        const values = Float32Array.from({ length: FP4_BLOCK }, (_, i) =>
          first + i < dim ? (queries[token * dim + first + i] as number) : 0,
        );
        const expected = expectedBlock(values, unit, scaleSearch);
        const own = Array.from({ length: FP4_BLOCK }, (_, i) => {
          const channel = first + i;
          if (native) {
            const byte = bytes[token * (padded / 2) + (channel >> 1)] as number;
            const scale =
              run.buffer('queryBlockScale').bytes[((channel >> 6) * 128 + token) * 4 + ((channel & 63) >> 4)];
            return e2m1ToNumber((byte >> (4 * (channel & 1))) & 15) * e4m3ToNumber(scale as number);
          }
          // Elements i and i + 4 of eight are a pair: pair i of quarter t of 32 channels is word t of 16 bytes i.
          const [t, e] = [(channel >> 3) & 3, channel & 7];
          const word = (channel & ~31) / 2 + (e & 3) * 4 + t;
          return float16ToNumber(halves[token * padded + 2 * word + (e >> 2)] as number);
        });
        const wanted = [...expected.codes].map((code) => e2m1ToNumber(code) * e4m3ToNumber(expected.scale));
        agreement.add(own.every((value, i) => value === wanted[i] || value + (wanted[i] as number) === 0));
      }
    }
    expect(agreement.share).toBeLessThan(0.002);
  });
});
