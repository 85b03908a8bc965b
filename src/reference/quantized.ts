/**
 * The quantized algorithm step by step in plain TypeScript: SageAttention (arXiv 2410.02367), SageAttention2
 * (arXiv 2411.10958), SageAttention2++ (arXiv 2505.21136) and SageAttention3 (arXiv 2505.11594).
 * What a backend's kernel computes is described by a {@link QuantizedAlgorithm}; this file computes the same without
 * any of its speed.
 */
import {
  type AttentionProblem,
  lseShapeOf,
  outputLayoutOf,
  outputShapeOf,
  type Sequence,
  sequencesOf,
} from '../attention/problem.ts';
import { type Fp4Rules, quantizeFp4InPlace } from '../quantization/fp4-blocks.ts';
import { keyGrouping, queryGrouping } from '../quantization/groups.ts';
import { CUDA_ROUNDING, type IntegerRounding, quantizeIntegers } from '../quantization/integers.ts';
import { largestMagnitude, outerScale } from '../quantization/outer-scale.ts';
import {
  type Granularity,
  INT_MAX,
  type PvAccumDtype,
  type PvFormat,
  type QkFormat,
  type QuerySmoothing,
  TILINGS,
  type Tiling,
  V_FP8_MAX,
} from '../quantization/schemes.ts';
import { blockMeans, channelMean, subtractBlockMeans, subtractMean } from '../quantization/smoothing.ts';
import { P_TWO_LEVEL_MAX, quantizeProbabilities } from '../quantization/two-level.ts';
import { permutedPosition, quantizeValueFp8 } from '../quantization/value-fp8.ts';
import type { DType } from '../tensor/dtype.ts';
import { roundToBfloat16 } from '../tensor/formats/bfloat16.ts';
import { E4M3_MAX, e4m3ToNumber, roundToE4m3 } from '../tensor/formats/float8.ts';
import { roundToFloat16 } from '../tensor/formats/float16.ts';
import { elementCount } from '../tensor/tensor.ts';
import { accumulateTile, accumulationOf } from './accumulators.ts';
import { addSink, capped, type ReferenceInputs, type ReferenceOutputs, readOperands, sinkValues } from './exact.ts';
import { biasReader, rowClasses } from './visibility.ts';

/** What decides the numbers of FP4. */
export interface Fp4Algorithm extends Fp4Rules {
  /** A power of two around each operand of each head (of Q: of each block of rows), see `outerScale`. */
  readonly outerScale: boolean;
  /** What P's elements are divided by before they are coded: their block's scale as rounded, or as it was before. */
  readonly divisorOfP: 'rounded' | 'exact';
  /** What the output is divided by: the sum of P as multiplied with V, or of P before it was rounded. */
  readonly rowSum: 'quantized' | 'exact';
}

/** FP4 of this package. */
export const FP4_ALGORITHM: Fp4Algorithm = {
  format: 'nvfp4',
  scaleSearch: 'mse',
  outerScale: true,
  divisorOfP: 'rounded',
  rowSum: 'quantized',
};

/**
 * FP4 as the official SageAttention3 kernel computes it, with its faults in masking and in the order of tiles repaired.
 */
export const OFFICIAL_FP4_ALGORITHM: Fp4Algorithm = {
  format: 'nvfp4',
  scaleSearch: 'none',
  zeroScales: true,
  outerScale: false,
  divisorOfP: 'exact',
  rowSum: 'exact',
};

/** Everything that decides a quantized kernel's numbers. */
export interface QuantizedAlgorithm {
  readonly qkFormat: QkFormat;
  /** Groups of Q and K; without meaning for `fp4`, whose groups are 16 channels. */
  readonly granularity: Granularity;
  /** Also the tiles of the running softmax: `blockK` keys at a time. */
  readonly tiling: Tiling;
  readonly rounding: IntegerRounding;
  readonly smoothK: boolean;
  /** `true` is 'block': {@link Tiling.blockQ} rows. */
  readonly smoothQ: boolean | QuerySmoothing;
  readonly smoothV: boolean;
  /** What FP4 formats do; without meaning for others. */
  readonly fp4: Fp4Algorithm;
  /** Format that K's mean is rounded to before it is subtracted. */
  readonly keyMeanDtype: DType;
  /** Format that `K - mean` is rounded to before it is quantized. */
  readonly smoothedKeyDtype: DType;
  readonly pvFormat: PvFormat;
  readonly pvAccumDtype: PvAccumDtype;
  /** Largest quantized magnitude of V in FP8. */
  readonly vMax: number;
  /**
   * What the row maximum of P becomes in FP8; the official kernels add 8.807 to the exponent where log2(448) is 8.8074.
   */
  readonly pFp8Max: number;
  /**
   * Mantissa bits of the FP32 accumulator of FP8 instructions: 13 for sm_89's `mma` and sm_90's `wgmma`, 23 where it is
   * a true FP32 (sm_120, and `mma` on sm_90, which does not run on the FP8 unit there).
   */
  readonly fp8AccumulatorBits: number;
}

/** INT8 per block with FP16 PV in FP32: the portable kernel. Others say where they differ. */
export const PORTABLE_ALGORITHM: QuantizedAlgorithm = {
  qkFormat: 'int8',
  granularity: 'per-block',
  tiling: TILINGS.portable,
  rounding: CUDA_ROUNDING,
  smoothK: true,
  smoothQ: false,
  smoothV: false,
  fp4: FP4_ALGORITHM,
  keyMeanDtype: 'float32',
  smoothedKeyDtype: 'float32',
  pvFormat: 'fp16',
  pvAccumDtype: 'fp32',
  vMax: V_FP8_MAX.default,
  pFp8Max: E4M3_MAX,
  fp8AccumulatorBits: 13,
};

/** SageAttention3 with FP4 QK and PV: what `qk-fp4-pv-fp4` and `qk-fp4-pv-fp4-cuda` compute. */
export const FP4_PV_FP4_ALGORITHM: QuantizedAlgorithm = {
  ...PORTABLE_ALGORITHM,
  qkFormat: 'fp4',
  pvFormat: 'fp4',
  smoothQ: 'block',
};

/** FP4 QK with FP8 PV: what `qk-fp4-pv-fp8-cuda` computes. sm_120 sums FP8 products in true FP32. */
export const FP4_PV_FP8_ALGORITHM: QuantizedAlgorithm = {
  ...FP4_PV_FP4_ALGORITHM,
  pvFormat: 'fp8',
  pvAccumDtype: 'fp32+fp32',
  fp8AccumulatorBits: 23,
};

const ROUND: Readonly<Record<DType, (value: number) => number>> = {
  float32: Math.fround,
  float16: roundToFloat16,
  bfloat16: roundToBfloat16,
};

/**
 * What the row maximum of P, exp2(s - m) = 1, is scaled to. A further integer format
 * (7 bits, or two digits) would be one more case here, in {@link roundP} and in {@link quantizeValue}.
 */
function pMaxOf({ pvFormat, pFp8Max }: QuantizedAlgorithm): number {
  if (pvFormat === 'fp8') return pFp8Max;
  if (pvFormat === 'fp4') return P_TWO_LEVEL_MAX;
  return pvFormat === 'int8' ? INT_MAX.int8 : 1;
}

/**
 * Rounds one tile's P in place to its format; returns its contribution to the sum that divides the output. `exact` is
 * the sum before rounding.
 */
function roundP(p: Float32Array, tokens: number, exact: number, { pvFormat, fp4 }: QuantizedAlgorithm): number {
  switch (pvFormat) {
    case 'fp32':
      break;
    case 'fp16':
      for (let i = 0; i < tokens; i++) p[i] = roundToFloat16(p[i] as number);
      break;
    case 'fp8':
      for (let i = 0; i < tokens; i++) p[i] = roundToE4m3(p[i] as number);
      break;
    case 'int8':
      for (let i = 0; i < tokens; i++) p[i] = Math.round(p[i] as number);
      break;
    case 'fp4': {
      const sum = quantizeProbabilities(p, tokens, fp4, fp4.divisorOfP);
      return fp4.rowSum === 'quantized' ? sum : exact;
    }
  }
  return exact;
}

/** Q or K of one head and sequence, quantized: `value * scales[indexOf(token)]`. */
export interface ScoreOperand {
  readonly values: Int8Array | Float32Array;
  readonly scales: Float32Array;
  indexOf(token: number): number;
  /** 0 for tokens with an element that is not finite: their scores are NaN. */
  readonly finite: Uint8Array;
}

/** @param tokens tokens that share an outer scale */
function quantizeTokensFp4(
  x: Float32Array,
  dim: number,
  tokens: number,
  fp4: Fp4Algorithm,
  counted?: Uint8Array,
): Omit<ScoreOperand, 'finite'> {
  const length = x.length / dim;
  const values = x.slice();
  const scales = new Float32Array(Math.ceil(length / tokens)).fill(1);
  for (let first = 0; first < length; first += tokens) {
    const end = Math.min(first + tokens, length);
    const outer = fp4.outerScale ? outerScale(largestMagnitude(x, dim, counted, first, end)) : 1;
    scales[first / tokens] = 1 / outer;
    for (let i = first * dim; i < end * dim; i++) values[i] = (values[i] as number) * outer;
    for (let token = first; token < end; token++) quantizeFp4InPlace(values, token * dim, 1, dim, fp4);
  }
  return { values, scales, indexOf: (token) => Math.floor(token / tokens) };
}

function quantizeScoreOperand(
  x: Float32Array,
  dim: number,
  which: 'q' | 'k',
  algorithm: QuantizedAlgorithm,
  counted?: Uint8Array,
): ScoreOperand {
  const { qkFormat, granularity, tiling, rounding } = algorithm;
  const length = x.length / dim;
  const finite = new Uint8Array(length).fill(1);
  for (let i = 0; i < x.length; i++) if (!Number.isFinite(x[i])) finite[Math.floor(i / dim)] = 0;
  if (qkFormat === 'fp4') {
    const tokens = which === 'q' ? tiling.blockQ : Math.max(1, length);
    return { ...quantizeTokensFp4(x, dim, tokens, algorithm.fp4, counted), finite };
  }
  const grouping = which === 'q' ? queryGrouping(granularity, tiling) : keyGrouping(granularity, tiling);
  const { values, scales } = quantizeIntegers(x, dim, grouping, INT_MAX[qkFormat], rounding, counted);
  return { values, scales, indexOf: grouping.indexOf, finite };
}

/**
 * V of one head and sequence as multiplied, `[length, dim]`, and what turns a sum of it back: `sum * scales + mean`.
 */
interface ValueOperand {
  readonly values: Float32Array;
  readonly scales: Float32Array | undefined;
  readonly mean: Float32Array | undefined;
}

/** Quantizes in place; returns the scale of each channel. */
function quantizeValueInt8(smoothed: Float32Array, dim: number, counted?: Uint8Array): Float32Array {
  const scales = new Float32Array(dim);
  for (let i = 0; i < smoothed.length; i++) {
    if (counted?.[Math.floor(i / dim)] === 0) continue;
    const magnitude = Math.abs(smoothed[i] as number) / INT_MAX.int8;
    if (magnitude > (scales[i % dim] as number) && Number.isFinite(magnitude)) scales[i % dim] = magnitude;
  }
  for (let i = 0; i < smoothed.length; i++) {
    const value = smoothed[i] as number;
    const scale = scales[i % dim] as number;
    if (!Number.isFinite(value)) smoothed[i] = Number.NaN;
    else smoothed[i] = scale === 0 ? 0 : Math.max(-127, Math.min(127, Math.round(value / scale)));
  }
  return scales;
}

function quantizeValue(
  v: Float32Array,
  dim: number,
  { pvFormat, smoothV, vMax, fp4 }: QuantizedAlgorithm,
  counted?: Uint8Array,
): ValueOperand {
  const length = v.length / dim;
  const mean = smoothV ? channelMean(v, dim, 0, length, counted) : undefined;
  const smoothed = mean === undefined ? v.slice() : subtractMean(v, mean);
  switch (pvFormat) {
    case 'fp32':
      return { values: smoothed, scales: undefined, mean };
    case 'fp16':
      return { values: smoothed.map(roundToFloat16), scales: undefined, mean };
    case 'fp8': {
      const { codes, paddedLength, scales } = quantizeValueFp8(v, dim, {
        vMax,
        ...(mean === undefined ? {} : { mean }),
        ...(counted === undefined ? {} : { counted }),
      });
      for (let i = 0; i < smoothed.length; i++) {
        smoothed[i] = e4m3ToNumber(codes[(i % dim) * paddedLength + permutedPosition(Math.floor(i / dim))] as number);
      }
      return { values: smoothed, scales, mean };
    }
    case 'int8':
      return { values: smoothed, scales: quantizeValueInt8(smoothed, dim, counted), mean };
    case 'fp4': {
      const outer = fp4.outerScale ? outerScale(largestMagnitude(smoothed, dim, counted)) : 1;
      for (let i = 0; i < smoothed.length; i++) {
        smoothed[i] = counted?.[Math.floor(i / dim)] === 0 ? 0 : (smoothed[i] as number) * outer;
      }
      // Blocks run along the tokens, the dimension that P.V sums over.
      for (let channel = 0; channel < dim; channel++) quantizeFp4InPlace(smoothed, channel, dim, length, fp4);
      return { values: smoothed, scales: new Float32Array(dim).fill(1 / outer), mean };
    }
  }
}

/** K of one head and sequence. */
export interface PreparedKey {
  readonly key: ScoreOperand;
  /** K - mean, before quantization: the second factor of smoothQ's term. */
  readonly smoothedKey: Float32Array;
  /** K's mean; undefined without smoothing. */
  readonly keyMean: Float32Array | undefined;
}

/** @param counted per token, 0: no row sees it, and it counts in no mean and no scale; default all count */
export function prepareKey(
  k: Float32Array,
  dim: number,
  algorithm: QuantizedAlgorithm,
  counted?: Uint8Array,
): PreparedKey {
  const keyMean = algorithm.smoothK
    ? channelMean(k, dim, 0, k.length / dim, counted).map(ROUND[algorithm.keyMeanDtype])
    : undefined;
  const smoothedKey = keyMean === undefined ? k : subtractMean(k, keyMean).map(ROUND[algorithm.smoothedKeyDtype]);
  return { key: quantizeScoreOperand(smoothedKey, dim, 'k', algorithm, counted), smoothedKey, keyMean };
}

/** One head's keys and values of one sequence, ready to be attended to. */
interface PreparedHead extends PreparedKey {
  readonly value: ValueOperand;
}

function dot(
  a: Int8Array | Float32Array,
  aStart: number,
  b: Int8Array | Float32Array,
  bStart: number,
  length: number,
): number {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += (a[aStart + i] as number) * (b[bStart + i] as number);
  return sum;
}

/** Q of one head and sequence. */
export interface PreparedQuery {
  readonly operand: ScoreOperand;
  /** Before smoothing and quantization. */
  readonly original: Float32Array;
  /** `[blocks, dim]`; undefined without smoothing. */
  readonly means: Float32Array | undefined;
  /** Rows that share a mean. */
  readonly meanRows: number;
}

export function prepareQuery(q: Float32Array, dim: number, algorithm: QuantizedAlgorithm): PreparedQuery {
  if (!algorithm.smoothQ)
    return { operand: quantizeScoreOperand(q, dim, 'q', algorithm), original: q, means: undefined, meanRows: 1 };
  const meanRows = algorithm.smoothQ === 'sequence' ? Math.max(1, q.length / dim) : algorithm.tiling.blockQ;
  const means = blockMeans(q, dim, meanRows);
  const smoothed = subtractBlockMeans(q, dim, meanRows, means);
  return { operand: quantizeScoreOperand(smoothed, dim, 'q', algorithm), original: q, means, meanRows };
}

/** `q . (k - mean)` as kernels get it: the product of the codes times both scales, and the rank-1 term of smoothQ. */
function productOf(
  row: number,
  token: number,
  { operand, means, meanRows }: PreparedQuery,
  { key, smoothedKey }: PreparedKey,
  dim: number,
): number {
  const product = dot(operand.values, row * dim, key.values, token * dim, dim);
  const queryScale = operand.scales[operand.indexOf(row)] as number;
  const scale = Math.fround(queryScale * (key.scales[key.indexOf(token)] as number));
  const rank1 = means === undefined ? 0 : dot(means, Math.floor(row / meanRows) * dim, smoothedKey, token * dim, dim);
  return product * scale + rank1;
}

/**
 * The scores of one head that a kernel computes from codes and scales, `[Lq,Lk]`, before `smScale`. With `smoothK` each
 * row lacks `q . mean(K)`, which softmax does not see.
 *
 * @param q `[Lq,D]`
 * @param k `[Lk,D]`
 */
export function quantizedScores(
  q: Float32Array,
  k: Float32Array,
  dim: number,
  algorithm: QuantizedAlgorithm,
): Float32Array {
  const query = prepareQuery(q, dim, algorithm);
  const key = prepareKey(k, dim, algorithm);
  const keys = k.length / dim;
  return Float32Array.from({ length: (q.length / dim) * keys }, (_, i) =>
    productOf(Math.floor(i / keys), i % keys, query, key, dim),
  );
}

/** Sums of P.V to the output, in place: divided by the sum of P, scaled, V's mean added back. */
function normalizeRow(output: Float64Array, sum: number, { scales, mean }: ValueOperand): void {
  for (let d = 0; d < output.length; d++) {
    const normalized = Math.fround((output[d] as number) / sum) * (scales === undefined ? 1 : (scales[d] as number));
    output[d] = Math.fround(Math.fround(normalized) + (mean === undefined ? 0 : (mean[d] as number)));
  }
}

/**
 * A finite bias counts as no less: in base 2 it is finite in float32 then. Masks of float32's least number exclude a
 * key only where there are others.
 */
const LEAST_BIAS = -2e38;

/** Scores in base 2 of one row and `tokens` keys, and which of them the row sees. Returns the largest; NaN if one is NaN. */
export type TileScores = (
  row: number,
  firstKey: number,
  tokens: number,
  bias: Float32Array,
  query: PreparedQuery,
  key: PreparedKey,
  scores: Float32Array,
  visible: Uint8Array,
) => number;

/** Scores as a kernel gets them from codes and scales. With `smoothK` and no softcap they lack {@link meanScoreOf}. */
export function tileScores({
  headDim,
  smScale,
  softcap,
}: Pick<AttentionProblem, 'headDim' | 'smScale' | 'softcap'>): TileScores {
  const toBase2 = Math.fround(smScale * Math.LOG2E);
  return (row, firstKey, tokens, bias, query, prepared, scores, visible) => {
    const { operand, original } = query;
    const { key, keyMean } = prepared;
    // softcap is no constant shift: there, what smoothing took from K must be back before it.
    const meanTerm = softcap > 0 && keyMean !== undefined ? dot(original, row * headDim, keyMean, 0, headDim) : 0;
    let maximum = Number.NEGATIVE_INFINITY;
    for (let i = 0; i < tokens; i++) {
      const token = firstKey + i;
      visible[i] = bias[token] === Number.NEGATIVE_INFINITY ? 0 : 1;
      scores[i] = 0;
      if (visible[i] === 0) continue;
      const raw = productOf(row, token, query, prepared, headDim) + meanTerm;
      const scaled = softcap > 0 ? capped(raw * smScale, softcap) * Math.LOG2E : raw * toBase2;
      const finite = operand.finite[row] === 1 && key.finite[token] === 1;
      const shift = Math.max(bias[token] as number, LEAST_BIAS) * Math.LOG2E;
      const score = finite ? Math.fround(scaled + shift) : Number.NaN;
      scores[i] = score;
      if (score > maximum || Number.isNaN(score)) maximum = score;
    }
    return maximum;
  };
}

/** What the scores of {@link tileScores} lack in a row, in natural units. */
export function meanScoreOf(
  { headDim, smScale, softcap }: Pick<AttentionProblem, 'headDim' | 'smScale' | 'softcap'>,
  row: number,
  query: PreparedQuery,
  { keyMean }: PreparedKey,
): number {
  if (softcap > 0 || keyMean === undefined) return 0;
  return dot(query.original, row * headDim, keyMean, 0, headDim) * smScale;
}

/** Attends one row; writes its output and returns its logsumexp (natural). */
type RowAttention = (
  row: number,
  bias: Float32Array,
  query: PreparedQuery,
  head: PreparedHead,
  output: Float64Array,
) => number;

function rowAttention(problem: AttentionProblem, algorithm: QuantizedAlgorithm): RowAttention {
  const { valueDim } = problem;
  const { tiling, pvFormat, pvAccumDtype, fp8AccumulatorBits } = algorithm;
  const scoreTile = tileScores(problem);
  const accumulation = accumulationOf(pvFormat, pvAccumDtype);
  const { promotedEveryTile, register } = accumulation;
  const roundRegister = !promotedEveryTile && register === 'fp16' ? roundToFloat16 : Math.fround;
  const pMax = pMaxOf(algorithm);
  const tileP = new Float32Array(tiling.blockK);
  const visible = new Uint8Array(tiling.blockK);
  const tileSum = new Float64Array(valueDim);

  /** Scores in tileP to P; returns the sum of the P not yet rounded. */
  const exponentiateTile = (tokens: number, maximum: number): number => {
    let total = 0;
    for (let i = 0; i < tokens; i++) {
      if (visible[i] === 0) continue;
      tileP[i] = 2 ** ((tileP[i] as number) - maximum) * pMax;
      total += tileP[i] as number;
    }
    return total;
  };

  return (row, bias, query, head, output) => {
    const keyLength = head.key.finite.length;
    let maximum = Number.NEGATIVE_INFINITY;
    let sum = 0;
    let exactSum = 0;
    output.fill(0);
    for (let firstKey = 0; firstKey < keyLength; firstKey += tiling.blockK) {
      const tokens = Math.min(tiling.blockK, keyLength - firstKey);
      const tileMaximum = scoreTile(row, firstKey, tokens, bias, query, head, tileP, visible);
      if (tileMaximum === Number.NEGATIVE_INFINITY) continue;
      // Math.max gives NaN for either NaN.
      const newMaximum = Math.max(maximum, tileMaximum);
      const rescale = roundRegister(2 ** (maximum - newMaximum));
      maximum = newMaximum;
      const exact = exponentiateTile(tokens, maximum);
      exactSum = Math.fround(exactSum * rescale + exact);
      sum = Math.fround(sum * rescale + roundP(tileP, tokens, exact, algorithm));
      const target = promotedEveryTile ? tileSum.fill(0) : output;
      for (let d = 0; d < valueDim; d++) output[d] = roundRegister((output[d] as number) * rescale);
      const tile = { p: tileP, visible, v: head.value.values, dim: valueDim, firstToken: firstKey, tokens };
      accumulateTile(target, tile, accumulation, fp8AccumulatorBits);
      if (promotedEveryTile) {
        for (let d = 0; d < valueDim; d++) {
          output[d] = Math.fround((output[d] as number) + Math.fround(tileSum[d] as number));
        }
      }
    }
    if (maximum === Number.NEGATIVE_INFINITY) return maximum;
    normalizeRow(output, sum, head.value);
    const meanScore = meanScoreOf(problem, row, query, head);
    return (maximum + Math.log2(exactSum / pMax)) * Math.LN2 + meanScore;
  };
}

/**
 * Quantized attention over any {@link AttentionProblem}: every granularity, format of P and V, accumulator and
 * smoothing that a {@link QuantizedAlgorithm} can name, with the semantics of `attentionExact`. K and V are quantized
 * per sequence; means and scales are taken over the keys that rows may see, and where some rows see far larger ones
 * than others, for each such class of rows by itself (`rowClasses`).
 *
 * Outputs are float32 values (not yet rounded to the problem's dtype); LSE is computed from the true scores: what smoothing
 * subtracted is added back.
 */
export function attentionQuantized(
  problem: AttentionProblem,
  inputs: ReferenceInputs,
  algorithm: QuantizedAlgorithm,
): ReferenceOutputs {
  const { queryHeads, kvHeads, headDim, valueDim, sequences } = problem;
  const { q, k, v, queryTokens, keyTokens } = readOperands(problem, inputs);
  const output = new Float64Array(elementCount(outputShapeOf(problem)));
  const lse = new Float64Array(elementCount(lseShapeOf(problem)));
  const layout = outputLayoutOf(problem);
  const readBias = biasReader(problem, inputs.attnMask, inputs.blockMap);
  const readCounted = biasReader(problem, inputs.attnMask);
  const sinks = sinkValues(problem, inputs.sinks);
  const bias = new Float32Array(problem.keyLength);
  const rowOutput = new Float64Array(valueDim);
  const attend = rowAttention(problem, algorithm);

  const attendHead = (sequence: Sequence, kvHead: number): void => {
    const batch = sequences === undefined ? sequence.index : 0;
    const firstKey = (batch * kvHeads + kvHead) * keyTokens + sequence.keyStart;
    const endKey = firstKey + sequence.keyLength;
    const key = k.slice(firstKey * headDim, endKey * headDim);
    const value = v.slice(firstKey * valueDim, endKey * valueDim);
    const headsPerKv = queryHeads / kvHeads;
    const heads = Array.from({ length: headsPerKv }, (_, i) => kvHead * headsPerKv + i);
    const firstRowOf = (head: number) => (batch * queryHeads + head) * queryTokens + sequence.queryStart;
    const queries = heads.map((head) => {
      const at = firstRowOf(head);
      return prepareQuery(q.slice(at * headDim, (at + sequence.queryLength) * headDim), headDim, algorithm);
    });
    for (const { counted, rows } of rowClasses(problem, sequence, heads, readCounted, key, value)) {
      const prepared = {
        ...prepareKey(key, headDim, algorithm, counted),
        value: quantizeValue(value, valueDim, algorithm, counted),
      };
      for (const { head, row } of rows) {
        readBias(sequence, head, row, bias);
        const query = queries[head - kvHead * headsPerKv] as PreparedQuery;
        const own = attend(row, bias, query, prepared, rowOutput);
        lse[firstRowOf(head) + row] = addSink(rowOutput, own, sinks[head] as number);
        const token = sequence.queryStart + row;
        const at = sequence.index * layout.batchStride + head * layout.headStride + token * layout.tokenStride;
        output.set(rowOutput, at);
      }
    }
  };

  for (const sequence of sequencesOf(problem)) {
    for (let kvHead = 0; kvHead < kvHeads; kvHead++) attendHead(sequence, kvHead);
  }
  return { output, lse };
}
