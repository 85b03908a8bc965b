/** Gradients of attention: exactly, in float64, and as quantized kernels compute them, step by step. */

import { type BackwardPrecision, type GradientShape, gradientShapesOf } from '../attention/backward.ts';
import { type AttentionProblem, type Sequence, sequencesOf } from '../attention/problem.ts';
import { INT_MAX } from '../quantization/schemes.ts';
import { toFloat32 } from '../tensor/access.ts';
import { roundToBfloat16 } from '../tensor/formats/bfloat16.ts';
import { E4M3_MAX, roundToE4m3 } from '../tensor/formats/float8.ts';
import { roundToFloat16 } from '../tensor/formats/float16.ts';
import { floorToPowerOfTwo } from '../tensor/formats/rounding.ts';
import { elementCount, type Tensor } from '../tensor/tensor.ts';
import { capped, dot, type ReferenceInputs, readOperands } from './exact.ts';
import {
  meanScoreOf,
  type PreparedKey,
  type PreparedQuery,
  prepareKey,
  prepareQuery,
  type QuantizedAlgorithm,
  tileScores,
} from './quantized.ts';
import { type BiasReader, biasReader, rowClasses } from './visibility.ts';

/** Gradients in float64, contiguous, in the layouts that `gradientShapesOf` gives. */
export interface ReferenceGradients {
  readonly dq: Float64Array;
  readonly dk: Float64Array;
  readonly dv: Float64Array;
  /** `[B,Hq,Lq,Lk]` (lengths the longest of a packed call), not summed over what a mask broadcasts; where asked for. */
  readonly dMask?: Float64Array;
}

/** Where everything of one query head of one sequence begins; elements of contiguous `[B,H,L,D]`. */
interface Head {
  readonly sequence: Sequence;
  readonly head: number;
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly dOutput: number;
}

interface Operands {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  /** `[B,Hq,Lq,Dv]`, varlen `[1,Hq,totalQ,Dv]` */
  readonly dOutput: Float32Array;
  readonly queryTokens: number;
  readonly keyTokens: number;
}

/** Something of the output's shape, in the order of the other operands. */
function outputToFloat32(problem: AttentionProblem, x: Tensor): Float32Array {
  const [first, second, third, fourth] = x.strides as [number, number, number, number];
  const [n0, n1, n2, n3] = x.shape as [number, number, number, number];
  if (problem.sequences !== undefined) return toFloat32({ ...x, shape: [n1, n0, n2], strides: [second, first, third] });
  if (problem.tensorLayout === 'HND') return toFloat32(x);
  return toFloat32({ ...x, shape: [n0, n2, n1, n3], strides: [first, third, second, fourth] });
}

/** Calls `visit` with every query head of every sequence. */
function forEachHead(problem: AttentionProblem, { queryTokens, keyTokens }: Operands, visit: (head: Head) => void) {
  const { queryHeads, kvHeads, headDim, valueDim, sequences } = problem;
  for (const sequence of sequencesOf(problem)) {
    const batch = sequences === undefined ? sequence.index : 0;
    for (let head = 0; head < queryHeads; head++) {
      const kvHead = Math.floor((head * kvHeads) / queryHeads);
      const query = (batch * queryHeads + head) * queryTokens + sequence.queryStart;
      const key = (batch * kvHeads + kvHead) * keyTokens + sequence.keyStart;
      visit({ sequence, head, q: query * headDim, k: key * headDim, v: key * valueDim, dOutput: query * valueDim });
    }
  }
}

/** Gradients in the order of the operands, to the call's layout. */
function placed(gradient: Float64Array, { shape, layout }: GradientShape, problem: AttentionProblem, heads: number) {
  const dim = shape.at(-1) as number;
  const batches = problem.sequences === undefined ? problem.batch : 1;
  const tokens = gradient.length / Math.max(1, batches * heads * dim);
  const target = new Float64Array(elementCount(shape));
  for (let batch = 0; batch < batches; batch++) {
    for (let head = 0; head < heads; head++) {
      for (let token = 0; token < tokens; token++) {
        const from = ((batch * heads + head) * tokens + token) * dim;
        const to = batch * layout.batchStride + head * layout.headStride + token * layout.tokenStride;
        target.set(gradient.subarray(from, from + dim), to);
      }
    }
  }
  return target;
}

function addScaled(target: Float64Array, at: number, x: ArrayLike<number>, from: number, dim: number, weight: number) {
  for (let d = 0; d < dim; d++) target[at + d] = (target[at + d] as number) + weight * (x[from + d] as number);
}

/** Gradients of one query head are added to these; heads that share keys and values add to the same dK and dV. */
interface Sums {
  readonly dq: Float64Array;
  readonly dk: Float64Array;
  readonly dv: Float64Array;
  readonly dMask: Float64Array | undefined;
}

function gradientsOf(
  problem: AttentionProblem,
  inputs: ReferenceInputs & { readonly dOutput: Tensor },
  maskGradient: boolean,
  addHead: (head: Head, operands: Operands, sums: Sums, readBias: BiasReader) => void,
): ReferenceGradients {
  const { batch, queryHeads, kvHeads, queryLength, keyLength } = problem;
  const operands = { ...readOperands(problem, inputs), dOutput: outputToFloat32(problem, inputs.dOutput) };
  const sums = {
    dq: new Float64Array(operands.q.length),
    dk: new Float64Array(operands.k.length),
    dv: new Float64Array(operands.v.length),
    dMask: maskGradient ? new Float64Array(batch * queryHeads * queryLength * keyLength) : undefined,
  };
  const readBias = biasReader(problem, inputs.attnMask);
  forEachHead(problem, operands, (head) => addHead(head, operands, sums, readBias));
  const shapes = gradientShapesOf(problem);
  return {
    dq: placed(sums.dq, shapes.dq, problem, queryHeads),
    dk: placed(sums.dk, shapes.dk, problem, kvHeads),
    dv: placed(sums.dv, shapes.dv, problem, kvHeads),
    ...(sums.dMask === undefined ? {} : { dMask: sums.dMask }),
  };
}

/** First element of a row of dMask. */
const maskRow = ({ queryHeads, queryLength, keyLength }: AttentionProblem, { sequence, head }: Head, row: number) =>
  ((sequence.index * queryHeads + head) * queryLength + row) * keyLength;

/**
 * Gradients of `sum(dOutput o attention)` by q, k, v and an additive mask, in float64, for every semantics of
 * `attentionExact`. Positions that a row does not see are not read and get nothing; a row that sees no key gives nothing.
 *
 * With `P = softmax(S)`, `dP = dO V^T`: `dV = P^T dO`, `dS = P o (dP - rowsum(P o dP))`, `dQ = dS K smScale` and
 * `dK = dS^T Q smScale`; softcap multiplies dS by its derivative `1 - tanh^2`.
 *
 * @param inputs `dOutput` has the output's shape
 */
export function backwardExact(
  problem: AttentionProblem,
  inputs: ReferenceInputs & { readonly dOutput: Tensor },
  maskGradient = false,
): ReferenceGradients {
  const { headDim, valueDim, softcap, smScale } = problem;
  const bias = new Float32Array(problem.keyLength);
  const weights = new Float64Array(problem.keyLength);
  const slopes = new Float64Array(problem.keyLength);
  const dP = new Float64Array(problem.keyLength);

  /** Fills `weights` with a row of P and `slopes` with the softcap's derivative. */
  const weigh = (keys: readonly number[], { q, k }: Operands, queryAt: number, keyAt: number): void => {
    let maximum = Number.NEGATIVE_INFINITY;
    for (const key of keys) {
      const raw = dot(q, queryAt, k, keyAt + key * headDim, headDim) * smScale;
      slopes[key] = softcap > 0 ? 1 - Math.tanh(raw / softcap) ** 2 : 1;
      const score = (softcap > 0 ? capped(raw, softcap) : raw) + (bias[key] as number);
      weights[key] = score;
      if (score > maximum || Number.isNaN(score)) maximum = score;
    }
    let sum = 0;
    for (const key of keys) {
      weights[key] = Math.exp((weights[key] as number) - maximum);
      sum += weights[key] as number;
    }
    for (const key of keys) weights[key] = (weights[key] as number) / sum;
  };

  return gradientsOf(problem, inputs, maskGradient, (place, operands, sums, readBias) => {
    const { sequence, head } = place;
    const { q, k, v, dOutput } = operands;
    for (let row = 0; row < sequence.queryLength; row++) {
      readBias(sequence, head, row, bias);
      const keys: number[] = [];
      for (let key = 0; key < sequence.keyLength; key++) if (bias[key] !== Number.NEGATIVE_INFINITY) keys.push(key);
      const queryAt = place.q + row * headDim;
      const outAt = place.dOutput + row * valueDim;
      weigh(keys, operands, queryAt, place.k);
      let delta = 0;
      for (const key of keys) {
        dP[key] = dot(dOutput, outAt, v, place.v + key * valueDim, valueDim);
        delta += (weights[key] as number) * (dP[key] as number);
      }
      for (const key of keys) {
        const dS = (weights[key] as number) * ((dP[key] as number) - delta);
        const dRaw = dS * (slopes[key] as number) * smScale;
        addScaled(sums.dv, place.v + key * valueDim, dOutput, outAt, valueDim, weights[key] as number);
        addScaled(sums.dq, queryAt, k, place.k + key * headDim, headDim, dRaw);
        addScaled(sums.dk, place.k + key * headDim, q, queryAt, headDim, dRaw);
        if (sums.dMask !== undefined) sums.dMask[maskRow(problem, place, row) + key] = dS;
      }
    }
  });
}

/** How the gradients' products are quantized. */
export interface BackwardAlgorithm {
  readonly precision: BackwardPrecision;
  /** Rows and keys that share a scale of P, dO and dS where precision is `int8`. */
  readonly blockQ: number;
  readonly blockK: number;
  /**
   * Format of dO and V in dP = dO V^T; float16 after multiplication by a power of two. In a row whose weight is nearly all on one key,
   * dP - D cancels, and what is left of dS is this rounding.
   */
  readonly valueFormat: 'float16' | 'bfloat16';
}

/** Tiles of 64 x 64, as SageBwd's. */
export const BACKWARD_ALGORITHM: BackwardAlgorithm = {
  precision: 'fp8',
  blockQ: 64,
  blockK: 64,
  valueFormat: 'float16',
};

/** What a backward pass reads besides q, k and v: what the forward pass gave, in float64 or rounded, and dOutput. */
export interface QuantizedBackwardInputs extends ReferenceInputs {
  readonly output: Tensor;
  readonly lse: Tensor;
  readonly dOutput: Tensor;
}

/** x rounded with a scale of each column of `[rows, dim]` that takes its largest magnitude to `most`. */
function roundColumns(x: Float64Array, dim: number, most: number, round: (value: number) => number): Float64Array {
  const scales = new Float64Array(dim);
  for (let i = 0; i < x.length; i++) {
    const magnitude = Math.abs(x[i] as number) / most;
    if (Number.isFinite(magnitude) && magnitude > (scales[i % dim] as number)) scales[i % dim] = magnitude;
  }
  return x.map((value, i) => {
    const scale = scales[i % dim] as number;
    return scale === 0 ? value : round(value / scale) * scale;
  });
}

/** INT8 with a scale for each block of `rows x columns` of `[length, width]`; psi of SageBwd. */
function roundBlocks(x: Float64Array, width: number, rows: number, columns: number): Float64Array {
  const result = x.slice();
  const length = width === 0 ? 0 : x.length / width;
  for (let top = 0; top < length; top += rows) {
    for (let left = 0; left < width; left += columns) {
      const cells: number[] = [];
      for (let r = top; r < Math.min(length, top + rows); r++) {
        for (let c = left; c < Math.min(width, left + columns); c++) cells.push(r * width + c);
      }
      const most = cells.reduce((sofar, i) => {
        const magnitude = Math.abs(x[i] as number);
        return Number.isFinite(magnitude) ? Math.max(sofar, magnitude) : sofar;
      }, 0);
      const scale = most / INT_MAX.int8;
      if (scale > 0) for (const i of cells) result[i] = Math.round((x[i] as number) / scale) * scale;
    }
  }
  return result;
}

/** One head's intermediate matrices. */
interface Matrices {
  /** `[Lq,Lk]`: exp(S - m), m the row's largest; 0 where the row does not see the key. */
  readonly p: Float64Array;
  /** `[Lq,Lk]`: P o (dP - D) with the same P, times the softcap's slope. */
  readonly dS: Float64Array;
  /** `[Lq,Lk]`: what of dS belongs to the mask: without the slope. Only where its gradient is wanted. */
  readonly dMask: Float64Array | undefined;
  /** `[Lq]`: exp(m - lse): what a row's P must be multiplied by. 0: it sees nothing. */
  readonly weights: Float64Array;
  /** `[Lq,Lk]`, 1: the row sees the key. */
  readonly visible: Uint8Array;
}

interface HeadOperands {
  /** `[Lq,D]`, `[Lk,D]` less the mean that smoothing takes where softcap allows it, `[Lk,Dv]`, `[Lq,Dv]`. */
  readonly q: Float64Array;
  readonly k: Float64Array;
  readonly v: Float64Array;
  readonly dOutput: Float64Array;
}

/** Rounds a head's operands of dV, dQ and dK's products. The row weights go into P and dS, or are folded into the others. */
function roundedOperands(
  matrices: Matrices,
  operands: HeadOperands,
  dims: readonly [number, number],
  by: BackwardAlgorithm,
) {
  const [headDim, valueDim] = dims;
  const { weights } = matrices;
  const keys = weights.length === 0 ? 0 : matrices.p.length / weights.length;
  const weighted = (x: Float64Array, width: number) =>
    x.map((value, i) => value * (weights[Math.floor(i / width)] as number));
  if (by.precision === 'int8') {
    return {
      p: roundBlocks(weighted(matrices.p, keys), keys, by.blockQ, by.blockK),
      dS: roundBlocks(weighted(matrices.dS, keys), keys, by.blockQ, by.blockK),
      dOutput: roundBlocks(operands.dOutput, valueDim, by.blockQ, valueDim),
      q: roundBlocks(operands.q, headDim, by.blockQ, headDim),
      k: roundBlocks(operands.k, headDim, by.blockK, headDim),
      folded: false,
    };
  }
  const isFp8 = by.precision === 'fp8';
  const round = isFp8 ? roundToE4m3 : roundToFloat16;
  const most = isFp8 ? E4M3_MAX : 2 ** 14;
  // |dP - D| <= 2 max|dO_i| max|V_j|, so that nothing is cut off; a power of two, once a head.
  const longest = (x: Float64Array, dim: number) => {
    let largest = 0;
    for (let at = 0; at < x.length; at += dim) {
      const length = Math.hypot(...x.subarray(at, at + dim));
      if (Number.isFinite(length) && length > largest) largest = length;
    }
    return largest;
  };
  const bound = 2 * longest(operands.dOutput, valueDim) * longest(operands.v, valueDim);
  const scale = bound > 0 ? floorToPowerOfTwo(most / bound) : 1;
  const pScale = isFp8 ? 2 ** 8 : 1;
  return {
    p: matrices.p.map((value) => round(value * pScale) / pScale),
    dS: matrices.dS.map((value) => round(value * scale) / scale),
    dOutput: roundColumns(weighted(operands.dOutput, valueDim), valueDim, most, round),
    q: roundColumns(weighted(operands.q, headDim), headDim, most, round),
    k: roundColumns(operands.k, headDim, most, round),
    folded: true,
  };
}

/** To FP16 after multiplication by a power of two that takes the largest to 2^14: gradients may be as small as they like. */
function roundToHalf(x: Float32Array): Float32Array {
  const largest = x.reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 0);
  const scale = largest > 0 ? floorToPowerOfTwo(2 ** 14 / largest) : 1;
  return x.map((value) => roundToFloat16(value * scale) / scale);
}

/** S, P, dP and dS of one head, as a kernel with FP16 dP and FP32 sums gets them. */
function headMatrices(
  problem: AttentionProblem,
  place: Head,
  inputs: { readonly operands: Operands; readonly output: Float32Array; readonly lse: Float64Array },
  classes: readonly { readonly key: PreparedKey; readonly rows: readonly number[] }[],
  query: PreparedQuery,
  readBias: BiasReader,
  { maskGradient, valueFormat }: { readonly maskGradient: boolean } & Pick<BackwardAlgorithm, 'valueFormat'>,
): Matrices {
  const { valueDim, softcap } = problem;
  const { sequence, head } = place;
  const { queryLength, keyLength } = sequence;
  const { v, dOutput } = inputs.operands;
  const size = queryLength * keyLength;
  const [p, dS, visible] = [new Float64Array(size), new Float64Array(size), new Uint8Array(size)];
  const dMask = maskGradient ? new Float64Array(size) : undefined;
  const weights = new Float64Array(queryLength);
  const bias = new Float32Array(problem.keyLength);
  const scores = new Float32Array(keyLength);
  const scoreRow = tileScores(problem);
  const unmasked = new Float32Array(keyLength);
  const noBias = new Float32Array(problem.keyLength);
  const round = valueFormat === 'float16' ? roundToHalf : (x: Float32Array) => x.map(roundToBfloat16);
  const values = round(v.slice(place.v, place.v + keyLength * valueDim));
  const incoming = round(dOutput.slice(place.dOutput, place.dOutput + queryLength * valueDim));
  for (const { key, rows } of classes) {
    for (const row of rows) {
      readBias(sequence, head, row, bias);
      const seen = visible.subarray(row * keyLength, (row + 1) * keyLength);
      const maximum = scoreRow(row, 0, keyLength, bias, query, key, scores, seen);
      if (maximum === Number.NEGATIVE_INFINITY) continue;
      const lse = ((inputs.lse[row] as number) - meanScoreOf(problem, row, query, key)) * Math.LOG2E;
      weights[row] = Math.fround(2 ** (maximum - lse));
      const outAt = place.dOutput + row * valueDim;
      if (softcap > 0) scoreRow(row, 0, keyLength, noBias, query, key, unmasked, new Uint8Array(keyLength));
      const delta = Math.fround(dot(dOutput, outAt, inputs.output, outAt, valueDim));
      for (let token = 0; token < keyLength; token++) {
        if (seen[token] === 0) continue;
        const at = row * keyLength + token;
        const dP = Math.fround(dot(incoming, row * valueDim, values, token * valueDim, valueDim));
        p[at] = Math.fround(2 ** ((scores[token] as number) - maximum));
        const gradient = (p[at] as number) * (dP - delta);
        if (dMask !== undefined) dMask[at] = gradient * (weights[row] as number);
        const ratio = softcap > 0 ? ((unmasked[token] as number) * Math.LN2) / softcap : 0;
        dS[at] = gradient * (1 - ratio ** 2);
      }
    }
  }
  return { p, dS, dMask, weights, visible };
}

/**
 * Gradients as quantized kernels compute them: scores from the forward pass's codes, `P = exp(S - m)`, dP in 16 bits, and the
 * three other products as `algorithm.precision` says.
 *
 * - `int8`: SageBwd (arXiv 2505.11594, algorithm 3), a scale for each block of P, dS, dO, Q and K, but without its correction of dQ for
 *   the mean of K: rows of dS add up to 0, and where rounding keeps them from it the correction only adds that error, times
 *   the mean.
 * - `fp8`, `fp16`: the rows' weights `w = exp(m - lse)` are folded into dO, Q and dQ, so that P and dS need no maximum:
 *   `dV = P'^T (w o dO)`, `dQ = w o (dS' K)`, `dK = dS'^T (w o Q)`; the other operands have a scale for each channel.
 *
 * @param forward of the kernel that gave `output` and `lse`
 */
export function backwardQuantized(
  problem: AttentionProblem,
  inputs: QuantizedBackwardInputs,
  forward: QuantizedAlgorithm,
  algorithm: BackwardAlgorithm = BACKWARD_ALGORITHM,
  maskGradient = false,
): ReferenceGradients {
  const { headDim, valueDim, queryHeads, kvHeads, softcap, smScale } = problem;
  const output = outputToFloat32(problem, inputs.output);
  const lse = Float64Array.from(toFloat32(inputs.lse));
  return gradientsOf(problem, inputs, maskGradient, (place, operands, sums, readBias) => {
    const { sequence, head } = place;
    const { queryLength, keyLength } = sequence;
    const q = operands.q.slice(place.q, place.q + queryLength * headDim);
    const k = operands.k.slice(place.k, place.k + keyLength * headDim);
    const v = operands.v.slice(place.v, place.v + keyLength * valueDim);
    const query = prepareQuery(q, headDim, forward);
    const group = queryHeads / kvHeads;
    const first = Math.floor(head / group) * group;
    const heads = Array.from({ length: group }, (_, i) => first + i);
    const classes = rowClasses(problem, sequence, heads, readBias, k, v)
      .map(({ counted, rows }) => ({
        key: prepareKey(k, headDim, forward, counted),
        rows: rows.filter((row) => row.head === head).map(({ row }) => row),
      }))
      .filter(({ rows }) => rows.length > 0);
    const firstLse = place.q / headDim;
    const given = { operands, output, lse: lse.subarray(firstLse, firstLse + queryLength) };
    const { valueFormat } = algorithm;
    const options = { maskGradient, valueFormat };
    const matrices = headMatrices(problem, place, given, classes, query, readBias, options);
    // Under a softcap rows of dS do not add up to 0, and the mean matters.
    const keyMean = softcap > 0 ? undefined : classes[0]?.key.keyMean;
    const headOperands: HeadOperands = {
      q: Float64Array.from(q),
      k: Float64Array.from(k, (value, i) => value - (keyMean?.[i % headDim] ?? 0)),
      v: Float64Array.from(v),
      dOutput: Float64Array.from(operands.dOutput.subarray(place.dOutput, place.dOutput + queryLength * valueDim)),
    };
    const rounded = roundedOperands(matrices, headOperands, [headDim, valueDim], algorithm);
    for (let row = 0; row < queryLength; row++) {
      const weight = rounded.folded ? (matrices.weights[row] as number) : 1;
      for (let token = 0; token < keyLength; token++) {
        const at = row * keyLength + token;
        if (matrices.visible[at] === 0) continue;
        const gradient = (rounded.dS[at] as number) * smScale;
        addScaled(
          sums.dv,
          place.v + token * valueDim,
          rounded.dOutput,
          row * valueDim,
          valueDim,
          rounded.p[at] as number,
        );
        addScaled(sums.dq, place.q + row * headDim, rounded.k, token * headDim, headDim, gradient * weight);
        addScaled(sums.dk, place.k + token * headDim, rounded.q, row * headDim, headDim, gradient);
        if (sums.dMask !== undefined) sums.dMask[maskRow(problem, place, row) + token] = matrices.dMask?.[at] as number;
      }
    }
  });
}
