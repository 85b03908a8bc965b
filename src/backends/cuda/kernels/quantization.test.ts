/** What the quantization kernels write, against the schemes in plain TypeScript. Kernels run in the simulator. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { createProblem } from '../../../attention/problem.ts';
import { keyGrouping, queryGrouping } from '../../../quantization/groups.ts';
import { quantizeIntegers } from '../../../quantization/integers.ts';
import { type Granularity, INT_MAX, type PvAccumDtype, TILINGS } from '../../../quantization/schemes.ts';
import { channelMean, subtractMean } from '../../../quantization/smoothing.ts';
import { quantizeValueFp8 } from '../../../quantization/value-fp8.ts';
import { toFloat32, writeValues } from '../../../tensor/access.ts';
import type { DType } from '../../../tensor/dtype.ts';
import { e4m3ToNumber } from '../../../tensor/formats/float8.ts';
import { emptyTensor, type Tensor } from '../../../tensor/tensor.ts';
import { descriptorOf } from '../kernel-table.ts';
import type { Target } from '../ptx/targets.ts';
import { simulateAttention } from '../testing/simulator/run.ts';

const LENGTH = 150;
const seed = runSeed();

function operands(dim: number, dtype: DType): { q: Tensor; k: Tensor; v: Tensor } {
  const random = new Random(seed);
  const make = (offset: number) => {
    const target = emptyTensor([1, 1, LENGTH, dim], dtype);
    const values = random.normals(LENGTH * dim);
    for (let i = 0; i < values.length; i++) values[i] = (values[i] as number) + offset * Math.sin(i % dim);
    writeValues(values, target);
    return target;
  };
  return { q: make(0), k: make(4), v: make(1) };
}

interface Setting {
  readonly kernel: Parameters<typeof descriptorOf>[0];
  readonly granularity: Granularity;
  readonly accum: PvAccumDtype;
  readonly target: Target;
  readonly dim: number;
  readonly dtype: DType;
}

function quantized({ kernel, granularity, accum, target, dim, dtype }: Setting, smoothV = false) {
  const inputs = operands(dim, dtype);
  const problem = createProblem(inputs.q, inputs.k, inputs.v, { returnLse: true });
  const descriptor = descriptorOf(kernel);
  const smoothQ = descriptor.smoothQ === 'always';
  const choice = { descriptor, qkQuantGran: granularity, pvAccumDtype: accum, smoothK: true, smoothV, smoothQ };
  return { ...inputs, run: simulateAttention(problem, choice, { target, multiprocessors: 1 }, inputs) };
}

const floats = ({ bytes }: { bytes: Uint8Array }) =>
  new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length >> 2);

/** Codes within one unit (few of them even that), scales within 1e-5: DESIGN's measure of agreement. */
function expectAgreement(codes: ArrayLike<number>, expected: ArrayLike<number>, what: string): void {
  let different = 0;
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs((codes[i] as number) - (expected[i] as number));
    expect(difference, `${what} ${i}`).toBeLessThanOrEqual(1);
    if (difference > 0) different++;
  }
  expect(different / expected.length, `${what}: codes one apart`).toBeLessThan(0.01);
}

function expectScales(scales: Float32Array, expected: Float32Array): void {
  for (let i = 0; i < expected.length; i++) {
    expect(Math.abs((scales[i] as number) - (expected[i] as number)), `scale ${i}`).toBeLessThanOrEqual(
      1e-5 * (expected[i] as number),
    );
  }
}

describe(`INT8 Q and K (SAGEATTENTION_SEED=${seed})`, () => {
  const settings: Setting[] = [
    { granularity: 'per-block', dim: 64, dtype: 'bfloat16' },
    { granularity: 'per-warp', dim: 40, dtype: 'float16' },
    { granularity: 'per-thread', dim: 128, dtype: 'float32' },
    { granularity: 'per-thread', dim: 33, dtype: 'bfloat16' },
  ].map((setting) => ({ ...setting, kernel: 'qk-int8-pv-fp16-cuda', accum: 'fp32', target: 'sm_80' }) as Setting);

  test.each(settings)('$granularity, D $dim, $dtype', (setting) => {
    const { q, k, run } = quantized(setting);
    const { granularity, dim } = setting;
    const padded = Math.ceil(dim / 32) * 32;
    const compare = (name: 'query' | 'key', values: Float32Array) => {
      const grouping = (name === 'query' ? queryGrouping : keyGrouping)(granularity, TILINGS.sm80);
      const expected = quantizeIntegers(values, dim, grouping, INT_MAX.int8);
      const codes = new Int8Array(run.buffer(name).bytes.buffer);
      const rows = Int8Array.from(
        { length: LENGTH * dim },
        (_, i) => codes[Math.floor(i / dim) * padded + (i % dim)] ?? 0,
      );
      expectAgreement(rows, expected.values, name);
      expectScales(floats(run.buffer(name === 'query' ? 'queryScale' : 'keyScale')), expected.scales);
      // Padding is zeros: channels beyond D, tokens beyond the length.
      for (let i = 0; i < codes.length; i++) {
        if (i % padded >= dim || i >= LENGTH * padded) expect(codes[i], `padding ${i}`).toBe(0);
      }
    };
    compare('query', toFloat32(q));
    const keys = toFloat32(k);
    compare('key', subtractMean(keys, channelMean(keys, dim)));
  });
});

test('INT4 is packed two to a byte, low nibble first', () => {
  const setting = {
    kernel: 'qk-int4-pv-fp8-cuda',
    granularity: 'per-thread',
    accum: 'fp32+fp16',
    dim: 64,
    dtype: 'bfloat16',
  } as const;
  const packed = quantized({ ...setting, target: 'sm_89' });
  const unpacked = quantized({ ...setting, target: 'sm_90a' });
  const nibbles = packed.run.buffer('key').bytes;
  const bytes = new Int8Array(unpacked.run.buffer('key').bytes.buffer);
  expect(nibbles.length * 2).toBe(bytes.length);
  for (let i = 0; i < bytes.length; i++) {
    const nibble = ((nibbles[i >> 1] as number) << (i % 2 === 0 ? 28 : 24)) >> 28;
    expect(nibble).toBe(bytes[i]);
  }
  const keys = toFloat32(packed.k);
  const grouping = keyGrouping('per-thread', TILINGS.sm80);
  const expected = quantizeIntegers(subtractMean(keys, channelMean(keys, 64)), 64, grouping, INT_MAX.int4);
  expectAgreement(bytes, expected.values, 'key');
});

describe('FP8 V', () => {
  test.each([
    { accum: 'fp32+fp16', vMax: 2.25, smoothV: false, dim: 64 },
    { accum: 'fp32+fp32', vMax: 448, smoothV: true, dim: 72 },
  ] as const)('vmax $vMax, smoothV $smoothV, Dv $dim', ({ accum, vMax, smoothV, dim }) => {
    const setting = {
      kernel: 'qk-int8-pv-fp8-cuda',
      granularity: 'per-thread',
      accum,
      target: 'sm_89',
      dim,
      dtype: 'float16',
    } as const;
    const { v, run } = quantized(setting, smoothV);
    const values = toFloat32(v);
    const mean = smoothV ? { mean: channelMean(values, dim) } : {};
    const expected = quantizeValueFp8(values, dim, { vMax, ...mean });
    expectScales(floats(run.buffer('valueScale')), expected.scales);
    const codes = run.buffer('value').bytes;
    let different = 0;
    expected.codes.forEach((code, i) => {
      // Neighbouring codes of one sign are neighbouring numbers; a mean summed in another order may move a value across.
      const [a, e] = [codes[i] as number, code];
      if (a !== e) different++;
      expect(
        Math.abs((a & 127) - (e & 127)),
        `code ${i}: ${e4m3ToNumber(a)} for ${e4m3ToNumber(e)}`,
      ).toBeLessThanOrEqual(1);
    });
    expect(different / expected.codes.length).toBeLessThan(0.01);
  });
});
