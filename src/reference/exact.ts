/** Exact attention in float64: the oracle that every kernel is compared with. */
import { type AttentionProblem, lseShapeOf, outputLayoutOf, outputShapeOf, sequencesOf } from '../attention/problem.ts';
import { decodeRun, operandToFloat32 } from '../tensor/access.ts';
import { elementCount, type Tensor } from '../tensor/tensor.ts';
import { biasReader } from './visibility.ts';

/** Operands in the memory of this process, as the problem describes them. */
export interface ReferenceInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly attnMask?: Tensor | undefined;
  readonly sinks?: Tensor | undefined;
  readonly blockMap?: Tensor | undefined;
}

/** Results in float64, contiguous, in the layouts that `outputShapeOf` and `lseShapeOf` give. */
export interface ReferenceOutputs {
  /** `[B,Hq,Lq,Dv]` or `[B,Lq,Hq,Dv]`; varlen `[totalQ,Hq,Dv]`. */
  readonly output: Float64Array;
  /** Natural logarithm; `[B,Hq,Lq]`, varlen `[Hq,totalQ]`. Always computed, asked for or not. */
  readonly lse: Float64Array;
}

/**
 * The three operands as contiguous `[B,H,L,D]` float32; in varlen B is 1 and L the packed length that cuSeqlens cover.
 */
export function readOperands(
  problem: AttentionProblem,
  inputs: ReferenceInputs,
): { q: Float32Array; k: Float32Array; v: Float32Array; queryTokens: number; keyTokens: number } {
  const { sequences, queryHeads, kvHeads, headDim, valueDim } = problem;
  const batch = sequences === undefined ? problem.batch : 1;
  const queryTokens = sequences?.cuSeqlensQ.at(-1) ?? problem.queryLength;
  const keyTokens = sequences?.cuSeqlensK.at(-1) ?? problem.keyLength;
  return {
    q: operandToFloat32(inputs.q, problem.q, { batch, heads: queryHeads, length: queryTokens, dim: headDim }),
    k: operandToFloat32(inputs.k, problem.k, { batch, heads: kvHeads, length: keyTokens, dim: headDim }),
    v: operandToFloat32(inputs.v, problem.v, { batch, heads: kvHeads, length: keyTokens, dim: valueDim }),
    queryTokens,
    keyTokens,
  };
}

/** The sink of each query head: -Infinity, which adds nothing, where there is none. */
export function sinkValues({ queryHeads, sinks: layout }: AttentionProblem, sinks: Tensor | undefined): Float32Array {
  const values = new Float32Array(queryHeads).fill(Number.NEGATIVE_INFINITY);
  if (layout !== undefined && sinks !== undefined) {
    decodeRun(sinks, layout.offset, layout.stride, queryHeads, values, 0);
  }
  return values;
}

/**
 * Adds a sink to the sum of a row's softmax, in place: what attends to it is lost to the output.
 *
 * @param lse of the row without it
 * @returns the logsumexp with it
 */
export function addSink(output: Float64Array, lse: number, sink: number): number {
  if (sink === Number.NEGATIVE_INFINITY) return lse;
  const largest = Math.max(lse, sink);
  if (!Number.isFinite(largest)) {
    output.fill(Number.isNaN(largest) ? Number.NaN : 0);
    return largest;
  }
  const total = largest + Math.log(Math.exp(lse - largest) + Math.exp(sink - largest));
  const share = Math.exp(lse - total);
  // A row that saw nothing has zeros already.
  for (let d = 0; d < output.length; d++) output[d] = (output[d] as number) * share;
  return total;
}

/**
 * `softcap * tanh(score / softcap)` by relative error, for every softcap above 0: a large one leaves the score as it
 * is.
 */
export function capped(score: number, softcap: number): number {
  const ratio = score / softcap;
  // The next term of the series is below float64's rounding; a ratio that is no normal number is not needed then.
  return Math.abs(ratio) < 1e-4 ? score * (1 - ratio ** 2 / 3) : softcap * Math.tanh(ratio);
}

export function dot(a: Float32Array, aStart: number, b: Float32Array, bStart: number, length: number): number {
  // Four sums instead of one: additions of float64 would otherwise wait for each other.
  let sum0 = 0;
  let sum1 = 0;
  let sum2 = 0;
  let sum3 = 0;
  let i = 0;
  for (; i + 3 < length; i += 4) {
    sum0 += (a[aStart + i] as number) * (b[bStart + i] as number);
    sum1 += (a[aStart + i + 1] as number) * (b[bStart + i + 1] as number);
    sum2 += (a[aStart + i + 2] as number) * (b[bStart + i + 2] as number);
    sum3 += (a[aStart + i + 3] as number) * (b[bStart + i + 3] as number);
  }
  for (; i < length; i++) sum0 += (a[aStart + i] as number) * (b[bStart + i] as number);
  return sum0 + sum1 + (sum2 + sum3);
}

/**
 * softmax(softcap(Q K^T smScale) + bias) V in float64, for every semantics of an {@link AttentionProblem}: bands,
 * boolean and additive masks, maps of blocks, sinks, grouped heads, varlen, any strides, lengths of 0. Excluded positions are not read, so
 * that a NaN there does not reach the output. A row that sees no key gives 0 and an LSE of -Infinity.
 *
 * Time is O(Hq Lq Lk D); memory beyond the operands is O(Lk).
 */
export function attentionExact(problem: AttentionProblem, inputs: ReferenceInputs): ReferenceOutputs {
  const { queryHeads, kvHeads, headDim, valueDim, softcap, smScale, sequences } = problem;
  const { q, k, v, queryTokens, keyTokens } = readOperands(problem, inputs);
  const output = new Float64Array(elementCount(outputShapeOf(problem)));
  const lse = new Float64Array(elementCount(lseShapeOf(problem)));
  const layout = outputLayoutOf(problem);
  const readBias = biasReader(problem, inputs.attnMask, inputs.blockMap);
  const sinks = sinkValues(problem, inputs.sinks);
  const bias = new Float32Array(problem.keyLength);
  const scores = new Float64Array(problem.keyLength);
  const accumulator = new Float64Array(valueDim);

  const attendRow = (queryAt: number, keyAt: number, valueAt: number, keyLength: number): number => {
    let maximum = Number.NEGATIVE_INFINITY;
    for (let key = 0; key < keyLength; key++) {
      if (bias[key] === Number.NEGATIVE_INFINITY) continue;
      const raw = dot(q, queryAt, k, keyAt + key * headDim, headDim) * smScale;
      const score = (softcap > 0 ? capped(raw, softcap) : raw) + (bias[key] as number);
      scores[key] = score;
      // A NaN among visible scores must not be lost by the comparison.
      if (score > maximum || Number.isNaN(score)) maximum = score;
    }
    accumulator.fill(0);
    if (maximum === Number.NEGATIVE_INFINITY) return maximum;
    let sum = 0;
    for (let key = 0; key < keyLength; key++) {
      if (bias[key] === Number.NEGATIVE_INFINITY) continue;
      const weight = Math.exp((scores[key] as number) - maximum);
      sum += weight;
      const row = valueAt + key * valueDim;
      for (let d = 0; d < valueDim; d++) {
        accumulator[d] = (accumulator[d] as number) + weight * (v[row + d] as number);
      }
    }
    for (let d = 0; d < valueDim; d++) accumulator[d] = (accumulator[d] as number) / sum;
    return maximum + Math.log(sum);
  };

  for (const sequence of sequencesOf(problem)) {
    const batch = sequences === undefined ? sequence.index : 0;
    for (let head = 0; head < queryHeads; head++) {
      const kvHead = Math.floor((head * kvHeads) / queryHeads);
      const keyToken = (batch * kvHeads + kvHead) * keyTokens + sequence.keyStart;
      for (let row = 0; row < sequence.queryLength; row++) {
        const token = sequence.queryStart + row;
        const queryToken = (batch * queryHeads + head) * queryTokens + token;
        readBias(sequence, head, row, bias);
        const own = attendRow(queryToken * headDim, keyToken * headDim, keyToken * valueDim, sequence.keyLength);
        lse[queryToken] = addSink(accumulator, own, sinks[head] as number);
        output.set(
          accumulator,
          sequence.index * layout.batchStride + head * layout.headStride + token * layout.tokenStride,
        );
      }
    }
  }
  return { output, lse };
}
