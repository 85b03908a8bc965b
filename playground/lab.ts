/** What section 2 computes: Q and K of one head, how they quantize, and what that does to scores and output. */

import { Random } from '../src/measure/random.ts';
import { keyGrouping, queryGrouping } from '../src/quantization/groups.ts';
import { quantizeIntegers } from '../src/quantization/integers.ts';
import { type Granularity, INT_MAX, TILINGS, type Tiling, V_FP8_MAX } from '../src/quantization/schemes.ts';
import { blockMeans, channelMean, subtractBlockMeans, subtractMean } from '../src/quantization/smoothing.ts';
import {
  compare,
  exactAttention,
  PORTABLE_ALGORITHM,
  type QuantizedAlgorithm,
  quantizedAttention,
} from '../src/reference/index.ts';
import { quantizedScores } from '../src/reference/quantized.ts';
import { type Tensor, tensor } from '../src/tensor/tensor.ts';

/** Q, K and V of one head, `[length, dim]` each. */
export interface Head {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly length: number;
  readonly dim: number;
}

export type DistributionName = 'channels' | 'few' | 'normal' | 'token';

export interface Distribution {
  readonly name: DistributionName;
  /** Of the offset, in standard deviations of the rest. */
  readonly strength: number;
  readonly length: number;
  readonly dim: number;
  readonly seed: number;
}

/** How much of the offset each element of K has. */
const OFFSETS: Readonly<
  Record<DistributionName, (dim: number, length: number, random: Random) => (token: number, channel: number) => number>
> = {
  normal: () => () => 0,
  channels: (dim, _, random) => {
    const offsets = random.normals(dim);
    return (_token, channel) => offsets[channel] as number;
  },
  few: (dim, _, random) => {
    const chosen = new Map([0, 1, 2].map((i) => [random.integer(0, dim - 1), i === 1 ? -1 : 1]));
    return (_token, channel) => chosen.get(channel) ?? 0;
  },
  token: (dim, length, random) => {
    const outlier = random.integer(0, length - 1);
    const direction = random.normals(dim);
    return (token, channel) => (token === outlier ? (direction[channel] as number) : 0);
  },
};

/** Normal values, K with an offset of the named kind. */
export function drawHead({ name, strength, length, dim, seed }: Distribution): Head {
  const random = new Random(seed);
  const offset = OFFSETS[name](dim, length, random);
  const [q, k, v] = [random.normals(length * dim), random.normals(length * dim), random.normals(length * dim)];
  for (let i = 0; i < k.length; i++) k[i] = (k[i] as number) + strength * offset(Math.floor(i / dim), i % dim);
  return { q, k, v, length, dim };
}

export interface Quantization {
  readonly smoothK: boolean;
  readonly smoothQ: boolean;
  readonly granularity: Granularity;
  readonly bits: 'int8' | 'int4';
}

/** Tiles of the kernels that have the granularity. */
const TILING: Readonly<Record<Granularity, Tiling>> = {
  'per-block': TILINGS.portable,
  'per-warp': TILINGS.sm80,
  'per-thread': TILINGS.sm80,
};

export interface Histogram {
  /** Edges of the bins, one more than there are bins. */
  readonly edges: Float32Array;
  readonly raw: Uint32Array;
  readonly smoothed: Uint32Array;
}

/** The codes that each channel uses: how much of the format is left to tell tokens apart. */
export interface CodeUse {
  /** Codes go from -max to max. */
  readonly max: number;
  /** `[dim]` each. */
  readonly lowest: Int8Array;
  readonly highest: Int8Array;
  /** Different codes in use in the whole head. */
  readonly used: number;
  /** Codes from a channel's lowest to its highest, mean over the channels. */
  readonly meanSpan: number;
}

/** Q or K before and after smoothing: the mean of all tokens is subtracted from K, the mean of each block from Q. */
export interface Operand {
  /** `[length, dim]` each. */
  readonly raw: Float32Array;
  readonly smoothed: Float32Array;
  readonly histogram: Histogram;
  readonly rawCodes: CodeUse;
  readonly smoothedCodes: CodeUse;
}

export interface Picture {
  readonly length: number;
  readonly dim: number;
  /** What the scores were computed with. */
  readonly quantization: Quantization;
  readonly q: Operand;
  readonly k: Operand;
  /** `[length, length]`, scaled, each row's mean taken away: softmax does not see it. */
  readonly exactScores: Float32Array;
  readonly quantizedScores: Float32Array;
  /** sqrt(mean((quantized - exact)^2)). */
  readonly scoreError: number;
}

const BINS = 64;

function histogramOf(raw: Float32Array, smoothed: Float32Array): Histogram {
  let low = Number.POSITIVE_INFINITY;
  let high = Number.NEGATIVE_INFINITY;
  for (const values of [raw, smoothed]) {
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  const width = (high - low) / BINS || 1;
  const bin = (values: Float32Array) => {
    const counts = new Uint32Array(BINS);
    for (const value of values) {
      const i = Math.min(BINS - 1, Math.floor((value - low) / width));
      counts[i] = (counts[i] as number) + 1;
    }
    return counts;
  };
  return {
    edges: Float32Array.from({ length: BINS + 1 }, (_, i) => low + i * width),
    raw: bin(raw),
    smoothed: bin(smoothed),
  };
}

function codeUse(
  x: Float32Array,
  dim: number,
  which: 'q' | 'k',
  { granularity, bits }: Pick<Quantization, 'granularity' | 'bits'>,
): CodeUse {
  const tiling = TILING[granularity];
  const grouping = which === 'q' ? queryGrouping(granularity, tiling) : keyGrouping(granularity, tiling);
  const max = INT_MAX[bits];
  const { values } = quantizeIntegers(x, dim, grouping, max);
  const lowest = new Int8Array(dim).fill(max);
  const highest = new Int8Array(dim).fill(-max);
  values.forEach((code, i) => {
    const channel = i % dim;
    lowest[channel] = Math.min(lowest[channel] as number, code);
    highest[channel] = Math.max(highest[channel] as number, code);
  });
  const meanSpan = lowest.reduce((sum, low, channel) => sum + (highest[channel] as number) - low + 1, 0) / dim;
  return { max, lowest, highest, used: new Set(values).size, meanSpan };
}

/** Codes that a channel of K takes on average, from its lowest to its highest, of those that there are. */
export function codeSpan(
  k: Float32Array,
  dim: number,
  bits: Quantization['bits'],
): { readonly mean: number; readonly codes: number } {
  const { max, meanSpan } = codeUse(k, dim, 'k', { granularity: 'per-block', bits });
  return { mean: meanSpan, codes: 2 * max + 1 };
}

/** Scores of every query and key, `[length, length]`, scaled, row means taken away. */
function centredScores(length: number, smScale: number, score: (row: number, column: number) => number): Float32Array {
  const scores = new Float32Array(length * length);
  for (let row = 0; row < length; row++) {
    let sum = 0;
    for (let column = 0; column < length; column++) {
      const value = smScale * score(row, column);
      scores[row * length + column] = value;
      sum += value;
    }
    const mean = sum / length;
    for (let column = 0; column < length; column++) {
      scores[row * length + column] = (scores[row * length + column] as number) - mean;
    }
  }
  return scores;
}

/** Everything that the section draws but the errors of the output. */
export function picture({ q, k, length, dim }: Head, quantization: Quantization): Picture {
  const { granularity, smoothK, smoothQ, bits } = quantization;
  const tiling = TILING[granularity];
  const smScale = 1 / Math.sqrt(dim);
  const exactScores = centredScores(length, smScale, (row, column) => {
    let sum = 0;
    for (let i = 0; i < dim; i++) sum += (q[row * dim + i] as number) * (k[column * dim + i] as number);
    return sum;
  });
  const products = quantizedScores(q, k, dim, {
    ...PORTABLE_ALGORITHM,
    qkFormat: bits,
    granularity,
    tiling,
    smoothK,
    smoothQ,
  });
  const quantizedCentred = centredScores(length, smScale, (row, column) => products[row * length + column] as number);
  const operand = (which: 'q' | 'k', raw: Float32Array, smoothed: Float32Array): Operand => ({
    raw,
    smoothed,
    histogram: histogramOf(raw, smoothed),
    rawCodes: codeUse(raw, dim, which, quantization),
    smoothedCodes: codeUse(smoothed, dim, which, quantization),
  });
  return {
    length,
    dim,
    quantization,
    q: operand('q', q, subtractBlockMeans(q, dim, tiling.blockQ, blockMeans(q, dim, tiling.blockQ))),
    k: operand('k', k, subtractMean(k, channelMean(k, dim))),
    exactScores,
    quantizedScores: quantizedCentred,
    scoreError: compare(quantizedCentred, exactScores).rmse,
  };
}

/** Steps of smoothing that {@link smoothingSweep} takes, from none to all. */
export const SWEEP_STEPS = 20;

/**
 * Relative L1 error of the output when a part of the mean of K is taken away before K is quantized: nothing of it, a twentieth, and so on.
 * Softmax does not change by any part of it.
 */
export function* smoothingSweep({ q, k, v, length, dim }: Head, bits: Quantization['bits']): Generator<number> {
  const view = (data: Float32Array): Tensor => tensor(data, [1, 1, length, dim]);
  const [tq, tk, tv] = [view(q), view(k), view(v)];
  const exact = exactAttention(tq, tk, tv).output;
  const mean = channelMean(k, dim);
  for (let step = 0; step <= SWEEP_STEPS; step++) {
    const partly = smoothedPartly(k, mean, step / SWEEP_STEPS);
    const { output } = quantizedAttention(tq, view(partly), tv, {
      algorithm: { ...PORTABLE_ALGORITHM, qkFormat: bits, granularity: 'per-block', tiling: TILING['per-block'] },
      smoothK: false,
    });
    yield compare(output, exact).relativeL1;
  }
}

/** K without a part, from 0 to 1, of its mean. */
export const smoothedPartly = (k: Float32Array, mean: ArrayLike<number>, part: number): Float32Array =>
  k.map((value, i) => value - part * (mean[i % mean.length] as number));

interface LabKernel {
  readonly name: string;
  readonly algorithm: Partial<QuantizedAlgorithm>;
  readonly granularities: readonly Granularity[];
}

/** The kernel families, as the reference computes them. */
const LAB_KERNELS: readonly LabKernel[] = [
  {
    name: 'INT8 QK, FP16 PV',
    algorithm: {},
    granularities: ['per-block', 'per-warp', 'per-thread'],
  },
  {
    name: 'INT8 QK, FP8 PV',
    algorithm: { pvFormat: 'fp8', pvAccumDtype: 'fp32+fp16', vMax: V_FP8_MAX.fp16Accumulator },
    granularities: ['per-block', 'per-warp', 'per-thread'],
  },
  {
    name: 'INT4 QK, FP8 PV',
    algorithm: { qkFormat: 'int4', pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32', smoothQ: true },
    granularities: ['per-warp', 'per-thread'],
  },
  {
    name: 'FP4 QK and PV',
    algorithm: { qkFormat: 'fp4', pvFormat: 'fp4', smoothQ: true },
    granularities: ['per-block'],
  },
];

export interface OutputError {
  readonly kernel: string;
  readonly granularity: string;
  readonly smoothK: boolean;
  /** sum|output - exact| / sum|exact|. */
  readonly relativeL1: number;
}

/** Error of the output for each kernel and granularity, with K smoothed and not; one at a time, to be stopped between. */
export function* outputErrors({ q, k, v, length, dim }: Head): Generator<OutputError> {
  const view = (data: Float32Array): Tensor => tensor(data, [1, 1, length, dim]);
  const [tq, tk, tv] = [view(q), view(k), view(v)];
  const exact = exactAttention(tq, tk, tv).output;
  for (const { name, algorithm, granularities } of LAB_KERNELS) {
    for (const granularity of granularities) {
      for (const smoothK of [false, true]) {
        const { output } = quantizedAttention(tq, tk, tv, {
          algorithm: { ...algorithm, granularity, tiling: TILING[granularity] },
          smoothK,
        });
        yield {
          kernel: name,
          granularity: algorithm.qkFormat === 'fp4' ? 'per 16 channels' : granularity,
          smoothK,
          relativeL1: compare(output, exact).relativeL1,
        };
      }
    }
  }
}
