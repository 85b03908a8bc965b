/** What the quantization kernels write, against the schemes in plain TypeScript. Kernels run in the simulator. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { createProblem } from '../../../../attention/problem.ts';
import { type Grouping, keyGrouping, queryGrouping } from '../../../../quantization/groups.ts';
import { quantizeIntegers } from '../../../../quantization/integers.ts';
import { type Granularity, INT_MAX, type PvAccumDtype, TILINGS } from '../../../../quantization/schemes.ts';
import { smoothingMean, subtractMean } from '../../../../quantization/smoothing.ts';
import { permutedPosition, quantizeValueFp8 } from '../../../../quantization/value-fp8.ts';
import { toFloat32, writeValues } from '../../../../tensor/access.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { e4m3FromNumber, e4m3ToNumber } from '../../../../tensor/formats/float8.ts';
import { float16ToNumber } from '../../../../tensor/formats/float16.ts';
import { emptyTensor, type Tensor } from '../../../../tensor/tensor.ts';
import type { KernelChoice } from '../../../backend.ts';
import { descriptorOf } from '../../kernel-table.ts';
import type { KeyRoom, KeyValuePart } from '../../launches/context.ts';
import { planKeyValue } from '../../launches/plan.ts';
import type { Target } from '../../ptx/targets.ts';
import { GlobalMemory } from '../../testing/simulator/memory.ts';
import { simulateAttention } from '../../testing/simulator/run.ts';
import { simulateLaunches } from '../../testing/simulator/simulator.ts';
import { KEY_EXPONENT_BIAS } from '../parts/constants.ts';
import { SAMPLED_TOKENS, sampledScales, sampledTokens, WHOLE_BELOW } from './channel-statistics.ts';

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
  const smoothQ = descriptor.smoothQ[0];
  const choice = { descriptor, qkQuantGran: granularity, pvAccumDtype: accum, smoothK: true, smoothV, smoothQ };
  return { ...inputs, run: simulateAttention(problem, choice, { target, multiprocessors: 1 }, inputs) };
}

const floats = ({ bytes }: { bytes: Uint8Array }) =>
  new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length >> 2);

/** Codes within one unit (few of them even that), scales within 1e-5: what counts as agreement with the official kernels. */
/** For each element of many: an `expect` takes 20 microseconds, also where it holds. */
function hold(holds: boolean, where: string, ...values: readonly number[]): void {
  if (!holds) expect.fail(`${where}: ${values.join(', ')}`);
}

function expectAgreement(codes: ArrayLike<number>, expected: ArrayLike<number>, what: string): void {
  let different = 0;
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs((codes[i] as number) - (expected[i] as number));
    if (!(difference <= 1)) expect.fail(`${what} ${i}: codes ${difference} apart`);
    if (difference > 0) different++;
  }
  expect(different / expected.length, `${what}: codes one apart`).toBeLessThan(0.01);
}

function expectScales(scales: Float32Array, expected: Float32Array): void {
  for (let i = 0; i < expected.length; i++) {
    // The sign says that keys have exponents.
    expect(Math.abs(Math.abs(scales[i] as number) - (expected[i] as number)), `scale ${i}`).toBeLessThanOrEqual(
      1e-5 * (expected[i] as number),
    );
  }
}

/** The mean that a kernel found, without padding. */
function expectMean(found: Float32Array, rows: Float32Array, dim: number): Float32Array {
  smoothingMean(rows, dim).forEach((mean, c) => {
    expect(found[c], `mean of channel ${c}`).toBeCloseTo(mean, 3);
  });
  return found.slice(0, dim);
}

/**
 * Rows of K as they are quantized: a row that is far smaller than its group's largest is multiplied by a power of two first, and then keeps
 * its bits.
 *
 * @param exponents a byte for each row
 */
function withExponents(rows: Float32Array, dim: number, exponents: Uint8Array, grouping: Grouping): Float32Array {
  const scaled = rows.map((x, i) => x * 2 ** (KEY_EXPONENT_BIAS - (exponents[Math.floor(i / dim)] as number)));
  const maxima: number[] = [];
  const largest = (token: number) =>
    scaled.subarray(token * dim, (token + 1) * dim).reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  for (let token = 0; token * dim < rows.length; token++) {
    const group = grouping.indexOf(token);
    maxima[group] = Math.max(maxima[group] ?? 0, largest(token));
  }
  for (let token = 0; token * dim < rows.length; token++) {
    const ofGroup = maxima[grouping.indexOf(token)] as number;
    expect(4.001 * largest(token), `largest of token ${token}`).toBeGreaterThanOrEqual(ofGroup);
  }
  return scaled;
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
    const smoothed = subtractMean(keys, expectMean(floats(run.buffer('keyMean')), keys, dim));
    const exponents = run.buffer('keyExponents').bytes;
    compare('key', withExponents(smoothed, dim, exponents, keyGrouping(granularity, TILINGS.sm80)));
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
  const mean = expectMean(floats(unpacked.run.buffer('keyMean')), keys, 64);
  const smoothed = withExponents(subtractMean(keys, mean), 64, unpacked.run.buffer('keyExponents').bytes, grouping);
  const expected = quantizeIntegers(smoothed, 64, grouping, INT_MAX.int4);
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
    const mean = smoothV ? { mean: expectMean(floats(run.buffer('valueMean')), values, dim) } : {};
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

describe('sampled tokens', () => {
  test.each([0, 1, 100, 255, 256, 511, 512, 1000, 16384, 100_000, 2 ** 30 - 1])('of %d', (length) => {
    const tokens = sampledTokens(length);
    const stretch = length < WHOLE_BELOW ? 1 : Math.floor(length / SAMPLED_TOKENS);
    expect(tokens.length).toBeLessThan(WHOLE_BELOW);
    expect(tokens.length).toBeGreaterThanOrEqual(Math.min(length, SAMPLED_TOKENS));
    if (length < WHOLE_BELOW) expect(tokens.length).toBe(length);
    // One of each stretch; only of the last, which may be cut short, none.
    tokens.forEach((token, i) => {
      expect(Math.floor(token / stretch)).toBe(i);
      expect(token).toBeLessThan(length);
    });
  });

  test('lie in all columns of an image', () => {
    const columns = new Set(sampledTokens(128 * 64).map((token) => token % 64));
    expect(columns.size).toBe(64);
  });
});

/** K and V of several heads and sequences on a simulated device, quantized as the Hopper kernels take them. */
class QuantizedKeyValue {
  readonly #memory = new GlobalMemory();
  readonly #addresses = new Map<string, number>();

  readonly #k: Tensor;
  readonly #v: Tensor;
  readonly #choice: KernelChoice;
  readonly #capacity: number;

  constructor(k: Tensor, v: Tensor, choice: KernelChoice, capacity: number) {
    this.#k = k;
    this.#v = v;
    this.#choice = choice;
    this.#capacity = capacity;
    for (const [name, { data }] of Object.entries({ k, v })) {
      this.#place(name, data.byteLength, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    }
    const { kept } = this.#plan(k.shape[2] as number, { capacity });
    for (const [name, bytes] of Object.entries(kept)) this.#place(name, bytes);
  }

  #place(name: string, byteLength: number, contents?: Uint8Array): void {
    this.#addresses.set(name, this.#memory.allocate(name, byteLength, contents));
  }

  #plan(length: number, room: KeyRoom, parts?: readonly KeyValuePart[]) {
    const problem = createProblem(this.#k, this.#k, this.#v, {});
    return planKeyValue(
      { ...problem, keyLength: length },
      this.#choice,
      { target: 'sm_90a', multiprocessors: 132 },
      parts === undefined ? { room } : { room, parts },
    );
  }

  /** Quantizes the first `length` tokens, or what of them comes at and after `from`. */
  run(length: number, from = 0): this {
    const parts: KeyValuePart[] | undefined = from === 0 ? undefined : ['key', 'value'];
    const plan = this.#plan(length, { capacity: this.#capacity, from }, parts);
    for (const [name, bytes] of Object.entries(plan.constants)) this.#place(name, bytes.byteLength, bytes);
    expect(Object.keys(plan.scratch)).toEqual([]);
    simulateLaunches(plan.launches, this.#addresses, this.#memory);
    return this;
  }

  bytes(name: string): Uint8Array {
    return this.#memory.read(name).bytes;
  }

  written(name: string): Uint8Array {
    return this.#memory.read(name).written;
  }

  floats(name: string): Float32Array {
    return new Float32Array(this.bytes(name).buffer);
  }
}

/** Where a code of V lies in the tiles of its head. */
const placeOf = (token: number, channel: number, channels: number) =>
  (Math.floor(token / 128) * channels + channel) * 128 + (permutedPosition(token) % 128);

/** Magnitude beyond which E4M3's relative error is 2^-4; below, the absolute one is 2^-10. */
const E4M3_NORMAL = 2 ** -6;

describe(`K and V in one launch (SAGEATTENTION_SEED=${seed})`, () => {
  const descriptor = descriptorOf('qk-int8-pv-fp8-cuda-sm90');
  const plain: KernelChoice = {
    descriptor,
    qkQuantGran: 'per-thread',
    pvAccumDtype: 'fp32+fp32',
    smoothK: true,
    smoothV: false,
    smoothQ: false,
  };
  const settings = [
    { dims: [128, 128], length: 700, dtype: 'bfloat16', choice: {} },
    { dims: [64, 96], length: 190, dtype: 'float16', choice: { smoothV: true } },
    { dims: [33, 40], length: 129, dtype: 'bfloat16', choice: { qkQuantGran: 'per-warp' } },
    { dims: [256, 160], length: 65, dtype: 'float32', choice: { smoothK: false } },
    { dims: [32, 224], length: 64, dtype: 'float32', choice: { smoothV: true } },
    { dims: [192, 128], length: 150, dtype: 'float16', choice: {} },
    { dims: [1, 7], length: 1, dtype: 'bfloat16', choice: { qkQuantGran: 'per-warp' } },
  ] as const;

  function make(heads: number, length: number, dim: number, dtype: DType, random: Random, offset = 0): Tensor {
    const values = random.normals(heads * length * dim);
    // Channels of different magnitude; one in eight is zeros.
    const shaped = values.map((value, i) => ((i % dim) % 8 === 5 ? 0 : (value + offset) * 2 ** ((i % dim) % 5)));
    const target = emptyTensor([1, heads, length, dim], dtype);
    writeValues(shaped, target);
    return target;
  }

  /** Tokens that the sample misses: much larger, much smaller and zeros, each a tile of its own. */
  function plantUnsampledTokens(v: Tensor, length: number, dim: number, random: Random): void {
    const values = toFloat32(v);
    const sampled = new Set(sampledTokens(length));
    const missed = Array.from({ length }, (_, i) => i).filter((i) => !sampled.has(i) && i < 128);
    for (let c = 0; c < dim; c++) {
      values[(missed[7] as number) * dim + c] = 300 * random.normal();
      for (let i = 256; i < 384; i++) values[i * dim + c] = (values[i * dim + c] as number) * 2 ** -20;
      for (let i = 384; i < 512; i++) values[i * dim + c] = 0;
    }
    writeValues(values, v);
  }

  /** The sampled tokens of a head's rows. */
  function sampleOf(rows: Float32Array, dim: number): Float32Array {
    const sampled = sampledTokens(rows.length / dim);
    return Float32Array.from(
      { length: sampled.length * dim },
      (_, i) => rows[(sampled[Math.floor(i / dim)] as number) * dim + (i % dim)] as number,
    );
  }

  /** A head's rows of an operand, and where they lie among what was found. */
  interface HeadRows {
    readonly found: QuantizedKeyValue;
    readonly head: number;
    readonly rows: Float32Array;
    readonly dim: number;
    /** Tokens with padding. */
    readonly padded: number;
  }

  function expectKeys({ found, head, rows, dim, padded }: HeadRows, { smoothK, qkQuantGran }: KernelChoice): void {
    const paddedDim = Math.ceil(dim / 32) * 32;
    const length = rows.length / dim;
    const groups = qkQuantGran === 'per-thread' ? 4 : 1;
    const grouping = keyGrouping(qkQuantGran as Granularity, TILINGS.sm80);
    const ownMean = () => expectMean(found.floats('keyMean').subarray(head * paddedDim), sampleOf(rows, dim), dim);
    const smoothed = smoothK ? subtractMean(rows, ownMean()) : rows;
    const exponents = found.bytes('keyExponents').subarray(head * padded);
    const expected = quantizeIntegers(withExponents(smoothed, dim, exponents, grouping), dim, grouping, 127);
    const codes = new Int8Array(found.bytes('key').buffer).subarray(head * padded * paddedDim);
    const own = Int8Array.from(
      { length: length * dim },
      (_, i) => codes[Math.floor(i / dim) * paddedDim + (i % dim)] as number,
    );
    expectAgreement(own, expected.values, 'key');
    expectScales(
      found.floats('keyScale').subarray((head * padded * groups) / 64),
      expected.scales.subarray(0, Math.ceil(length / 64) * groups),
    );
  }

  /** Codes of one tile of V; returns how many are not the nearest. */
  function expectValueTile(of: HeadRows, scales: Float32Array, first: number): number {
    const { found, head, rows, dim, padded } = of;
    const length = rows.length / dim;
    const end = Math.min(first + 128, length);
    const codes = found.bytes('value').subarray(head * padded * scales.length);
    const tileScale = found.floats('valueTileScale')[(head * padded + first) / 64] as number;
    expect(Number.isInteger(Math.log2(tileScale))).toBe(true);
    let [largest, different] = [0, 0];
    for (let i = first * dim; i < end * dim; i++) {
      const [token, c] = [Math.floor(i / dim), i % dim];
      const scaled = (rows[i] as number) / (scales[c] as number) / tileScale;
      const code = codes[placeOf(token, c, scales.length)] as number;
      largest = Math.max(largest, Math.abs(scaled));
      // Nothing saturates.
      const apart = Math.abs(e4m3ToNumber(code) - scaled);
      hold(
        apart <= Math.max(Math.abs(scaled) * 2 ** -4, E4M3_NORMAL * 2 ** -4) * 1.001,
        'a code of V',
        i,
        code,
        scaled,
      );
      if (code !== e4m3FromNumber(scaled)) different++;
    }
    expect(largest).toBeLessThanOrEqual(448.01);
    if (largest === 0) expect(tileScale).toBe(1);
    else expect(largest).toBeGreaterThanOrEqual(tileScale === 1 ? 3.49 : 223.9);
    // Behind the last token, copies of it.
    for (let i = end * dim; i < (first + 128) * dim; i++) {
      const codeOf = (token: number) => codes[placeOf(token, i % dim, scales.length)];
      hold(codeOf(Math.floor(i / dim)) === codeOf(length - 1), 'padding of V', i);
    }
    return different;
  }

  function expectValues(of: HeadRows, smoothV: boolean): void {
    const { found, head, rows, dim } = of;
    const paddedDim = Math.ceil(dim / 32) * 32;
    const ownMean = () => expectMean(found.floats('valueMean').subarray(head * paddedDim), sampleOf(rows, dim), dim);
    const smoothed = smoothV ? subtractMean(rows, ownMean()) : rows;
    const maxima = new Float32Array(paddedDim);
    sampleOf(smoothed, dim).forEach((value, i) => {
      maxima[i % dim] = Math.max(maxima[i % dim] as number, Math.abs(value));
    });
    const scales = sampledScales(maxima);
    expectScales(found.floats('valueScale').subarray(head * paddedDim), scales);
    let different = 0;
    for (let first = 0; first < rows.length / dim; first += 128) {
      different += expectValueTile({ ...of, rows: smoothed }, scales, first);
    }
    expect(different / rows.length).toBeLessThan(0.01);
  }

  test.each(settings)('$dims, $length keys, $dtype, $choice', ({ dims, length, dtype, choice }) => {
    const random = new Random(seed);
    const heads = 2;
    const [dim, valueDim] = dims;
    const k = make(heads, length, dim, dtype, random, 3);
    const v = make(heads, length, valueDim, dtype, random, 0.5);
    if (length > 600) plantUnsampledTokens(v, length, valueDim, random);
    const padded = Math.ceil(length / 128) * 128;
    const all = { ...plain, ...choice };
    const found = new QuantizedKeyValue(k, v, all, padded).run(length);
    const rowsOf = (x: Tensor, head: number, of: number): HeadRows => {
      const rows = toFloat32(x).slice(head * length * of, (head + 1) * length * of);
      return { found, head, rows, dim: of, padded };
    };
    for (let head = 0; head < heads; head++) {
      expectKeys(rowsOf(k, head, dim), all);
      expectValues(rowsOf(v, head, valueDim), all.smoothV);
    }
    for (const name of ['key', 'value', 'keyScale', 'keyFaults', 'keyExponents']) {
      expect(found.written(name).indexOf(0), `${name}: never written`).toBe(-1);
    }
  });

  test.each([
    { dims: [64, 128], length: 190, dtype: 'bfloat16', smoothV: false },
    { dims: [33, 20], length: 129, dtype: 'float32', smoothV: true },
    { dims: [256, 72], length: 64, dtype: 'float16', smoothV: false },
  ] as const)('V in FP16: $dims, $length keys, $dtype, smoothV $smoothV', ({ dims, length, dtype, smoothV }) => {
    const random = new Random(seed);
    const [dim, valueDim] = dims;
    const k = make(2, length, dim, dtype, random, 3);
    const v = make(2, length, valueDim, dtype, random, 0.5);
    const values = toFloat32(v);
    // One token beyond FP16's range, where the type of the input allows.
    const beyond = dtype === 'float16' ? undefined : { head: 1, token: 3 };
    if (beyond !== undefined) values[(beyond.head * length + beyond.token) * valueDim] = -1e5;
    writeValues(values, v);
    const padded = Math.ceil(length / 128) * 128;
    const choice = {
      ...plain,
      descriptor: descriptorOf('qk-int8-pv-fp16-cuda-sm90'),
      pvAccumDtype: 'fp32',
      smoothV,
    } as const;
    const found = new QuantizedKeyValue(k, v, choice, padded).run(length);
    const width = Math.ceil(valueDim / 16) * 16;
    const halves = new Uint16Array(found.bytes('value').buffer);
    const words = new Uint32Array(found.bytes('keyFaults').buffer);
    const meanOf = (head: number, own: Float32Array): Float32Array => {
      if (!smoothV) return new Float32Array(valueDim);
      const mean = found.floats('valueMean').subarray(head * width);
      // Beside the large token the others are weighed by their sizes, and it does not move the mean away from them.
      const others = own.filter((x) => Math.abs(x) < 1000);
      const typical = others.reduce((sum, x) => sum + Math.abs(x), 0) / others.length;
      const near = head === beyond?.head ? 0.2 * typical : 1e-4;
      smoothingMean(own, valueDim).forEach((expected, c) => {
        expect(Math.abs((mean[c] as number) - expected), `mean of ${c}`).toBeLessThan(near);
      });
      return mean;
    };
    for (let head = 0; head < 2; head++) {
      const own = values.slice(head * length * valueDim, (head + 1) * length * valueDim);
      const mean = meanOf(head, own);
      for (let i = 0; i < padded * width; i++) {
        const [token, c] = [Math.floor(i / width), i % width];
        const faulty = head === beyond?.head && token === beyond.token;
        const word = words[(head * padded + token) >> 5] as number;
        hold(((word >>> (token & 31)) & 1) === (faulty ? 1 : 0), 'fault of a token', head, token);
        const stored = float16ToNumber(halves[head * padded * width + i] as number);
        const from = Math.min(token, length - 1) * valueDim;
        const expected = c < valueDim ? (own[from + c] as number) - (mean[c] as number) : 0;
        if (faulty && c < 8) hold(Object.is(stored, 0), 'a value beyond the range', head, token, c, stored);
        else hold(Math.abs(stored - expected) <= 2 ** -10 * Math.abs(expected) + 1e-4, 'V', i, stored, expected);
      }
    }
    expect(found.written('value').indexOf(0)).toBe(-1);
  });

  test('what is not finite is named, and spoils nothing else', () => {
    const random = new Random(seed);
    const length = 200;
    const [k, v] = [make(2, length, 64, 'float16', random, 1), make(2, length, 64, 'float16', random)];
    const clean = new QuantizedKeyValue(k, v, plain, 256).run(length);
    const [keys, values] = [toFloat32(k), toFloat32(v)];
    const faults = [
      { of: keys, head: 0, token: 5, channel: 63, value: Number.NaN },
      { of: values, head: 0, token: 70, channel: 0, value: Number.POSITIVE_INFINITY },
      { of: values, head: 1, token: 199, channel: 31, value: Number.NaN },
      { of: keys, head: 1, token: 130, channel: 7, value: Number.NEGATIVE_INFINITY },
      { of: values, head: 1, token: 130, channel: 40, value: Number.NaN },
    ];
    for (const { of, head, token, channel, value } of faults) of[(head * length + token) * 64 + channel] = value;
    writeValues(keys, k);
    writeValues(values, v);
    const found = new QuantizedKeyValue(k, v, plain, 256).run(length);
    const words = new Uint32Array(found.bytes('keyFaults').buffer);
    const isFault = (head: number, token: number) => faults.some((f) => f.head === head && f.token === token);
    for (let i = 0; i < 2 * length; i++) {
      const [head, token] = [Math.floor(i / length), i % length];
      const bit = ((words[head * 8 + (token >> 5)] as number) >>> (token & 31)) & 1;
      expect(bit, `head ${head}, token ${token}`).toBe(isFault(head, token) ? 1 : 0);
    }
    const exponents = found.bytes('keyExponents');
    found.floats('keyScale').forEach((scale, i) => {
      const half = exponents.subarray((i >> 2) * 64, ((i >> 2) + 1) * 64);
      const any =
        faults.some((f) => f.head === i >> 4 && f.token >> 6 === ((i >> 2) & 3)) ||
        half.some((exponent) => exponent !== KEY_EXPONENT_BIAS);
      expect(Object.is(Math.sign(scale), any ? -1 : 1)).toBe(true);
      expect(Number.isFinite(scale)).toBe(true);
    });
    const [codes, cleanCodes] = [found.bytes('value'), clean.bytes('value')];
    for (let row = 0; row < 2 * 64; row++) {
      for (let token = 0; token < 256; token++) {
        const at = (row >> 6) * 256 * 64 + placeOf(token, row & 63, 64);
        const value = e4m3ToNumber(codes[at] as number);
        hold(Number.isFinite(value), 'a code of V', row, token);
        // A missing element may move a channel's mean or scale, not the codes by much.
        if (token >= length || isFault(row >> 6, token)) continue;
        const before = e4m3ToNumber(cleanCodes[at] as number);
        hold(Math.abs(value - before) <= 0.3 * Math.max(Math.abs(before), E4M3_NORMAL), 'V', row, token, value, before);
      }
    }
  });

  test('finished tiles stay as they are when more is appended, and room behind the last is left alone', () => {
    const random = new Random(seed);
    const capacity = 384;
    const [k, v] = [make(2, capacity, 64, 'bfloat16', random, 1), make(2, capacity, 32, 'bfloat16', random)];
    const found = new QuantizedKeyValue(k, v, plain, capacity).run(264);
    const before = found.bytes('value').slice();
    const [keysBefore, scalesBefore] = [found.bytes('key').slice(), found.bytes('valueTileScale').slice()];
    const halves = found.written('keyScale').reduce((sum, byte) => sum + byte, 0) / 4 / 4 / 2;
    expect(halves).toBe(2 * Math.ceil(264 / 128));
    found.run(330, 256);
    const whole = new QuantizedKeyValue(k, v, plain, capacity).run(330);
    const at = (head: number, channel: number, token: number) => head * 32 * capacity + placeOf(token, channel, 32);
    for (let head = 0; head < 2; head++) {
      for (let position = 0; position < 256; position++) {
        for (let c = 0; c < 32; c++) {
          const place = at(head, c, position);
          hold(found.bytes('value')[place] === before[place], 'V', head, position, c);
        }
      }
      const rows = [head * capacity * 64, (head * capacity + 256) * 64] as const;
      expect(found.bytes('key').subarray(...rows)).toEqual(keysBefore.subarray(...rows));
      const slots = [(head * capacity * 4) / 64, ((head * capacity + 256) * 4) / 64] as const;
      expect(found.bytes('valueTileScale').subarray(...slots)).toEqual(scalesBefore.subarray(...slots));
      // The appended tokens, with the statistics of before, are as those quantized at once but for those statistics.
      const slot = (head * capacity + 256) / 64;
      const scales = [found, whole].map((of) => of.floats('valueTileScale')[slot] as number) as [number, number];
      for (let token = 256; token < 330; token++) {
        for (let c = 0; c < 32; c++) {
          const [own, other] = [found, whole].map((of, i) => {
            const code = of.bytes('value')[at(head, c, token)] as number;
            return e4m3ToNumber(code) * (of.floats('valueScale')[head * 32 + c] as number) * (scales[i] as number);
          }) as [number, number];
          const truth = toFloat32(v)[(head * capacity + token) * 32 + c] as number;
          const bound = 2 ** -4 * Math.abs(truth) + 0.02;
          hold(Math.abs(own - truth) <= bound && Math.abs(other - truth) <= bound, 'V', token, c, own, other, truth);
        }
      }
    }
  });
});
