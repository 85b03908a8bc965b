/**
 * Calls that do not fit into the memory at once: heads of k and v do not need each other, so that some of them at a time give the
 * same.
 */
import { blockShapeOf } from '../../attention/block-choice.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import { type AttentionProblem, sequencesOf } from '../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  extentOf as storageOf,
  type Tensor,
  type TensorData,
} from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, RunContext } from '../backend.ts';
import { outBytes } from '../out.ts';
import { type Arithmetic, extentOf, WholeCalls } from './calls.ts';
import { type Simd, tileGeometry } from './geometry.ts';
import type { MemoryPool } from './memory.ts';
import { tilesOf } from './records.ts';
import type { Runtime } from './runtime.ts';
import { ownInputs } from './staging.ts';

/** Of the memory that is free: the rest is for records, scratch and what rounding and gaps take. */
const USABLE = 0.9;

/** About how many bytes a call takes of the kernels' memory. */
function bytesOf(problem: AttentionProblem, arithmetic: Arithmetic, simd: Simd): number {
  const { queryHeads, kvHeads, headDim, valueDim, dtype, mask, blocks, batch, queryLength, keyLength } = problem;
  const queries = extentOf(problem, 'queryLength');
  const keys = extentOf(problem, 'keyLength');
  const elements =
    queries.batch * queries.tokens * queryHeads * (headDim + valueDim) +
    keys.batch * keys.tokens * kvHeads * (headDim + valueDim);
  const geometry = tileGeometry(headDim, valueDim, simd, arithmetic);
  const tiles = sequencesOf(problem).reduce((sum, sequence) => sum + tilesOf(sequence.keyLength), 0);
  const lengths = [batch, queryHeads, queryLength, keyLength];
  const span = (shape: readonly number[], strides: readonly number[]) => storageOf({ shape, strides, offset: 0 });
  return (
    elements * BYTES_PER_ELEMENT[dtype] +
    tiles * kvHeads * geometry.bytes +
    (mask === undefined ? 0 : span(lengths, mask.strides) * BYTES_PER_ELEMENT[mask.dtype]) +
    (blocks === undefined ? 0 : span(blockShapeOf(problem, blocks), blocks.strides))
  );
}

/** The same problem for some of the heads of k and v. */
function ofHeads(problem: AttentionProblem, first: number, end: number): AttentionProblem {
  const { q, k, v, mask, sinks, blocks } = problem;
  const group = problem.queryHeads / problem.kvHeads;
  return {
    ...problem,
    queryHeads: (end - first) * group,
    kvHeads: end - first,
    q: { ...q, offset: q.offset + first * group * q.headStride },
    k: { ...k, offset: k.offset + first * k.headStride },
    v: { ...v, offset: v.offset + first * v.headStride },
    mask: mask && { ...mask, offset: mask.offset + first * group * mask.strides[1] },
    sinks: sinks && { ...sinks, offset: sinks.offset + first * group * sinks.stride },
    blocks: blocks && { ...blocks, offset: blocks.offset + first * group * blocks.strides[1] },
  };
}

/** Which part of a problem's heads fit into the memory. */
export class HeadsAtOnce {
  readonly #problem: AttentionProblem;
  readonly #arithmetic: Arithmetic;
  readonly #simd: Simd;
  /** Bytes that all heads take, which every call asks for. */
  readonly #all: number;

  constructor(problem: AttentionProblem, arithmetic: Arithmetic, simd: Simd) {
    this.#problem = problem;
    this.#arithmetic = arithmetic;
    this.#simd = simd;
    this.#all = bytesOf(problem, arithmetic, simd);
  }

  /**
   * Heads of k and v that fit at a time: all of them if they do, or if not even one does and the call is to say so.
   *
   * @param memory as it is now: caches stay in it
   */
  in(memory: MemoryPool): number {
    const free = (memory.limitBytes - memory.usedBytes) * USABLE;
    const { kvHeads } = this.#problem;
    if (this.#all <= free) return kvHeads;
    for (let parts = 2; parts <= kvHeads; parts++) {
      const heads = Math.ceil(kvHeads / parts);
      if (bytesOf(ofHeads(this.#problem, 0, heads), this.#arithmetic, this.#simd) <= free) return heads;
    }
    return kvHeads;
  }
}

/** Copies a part's heads to their places: `outer` runs of both, of `run` and `whole` elements. */
function place(part: Tensor, target: Uint8Array, outer: number, whole: number, at: number): void {
  const size = BYTES_PER_ELEMENT[part.dtype];
  const { data } = part;
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const run = bytes.length / outer;
  for (let i = 0; i < outer; i++) target.set(bytes.subarray(i * run, (i + 1) * run), (i * whole + at) * size);
}

/** A tensor without content, whose data is of the kind that parts have. */
function emptyLike(part: Tensor, shape: readonly number[]): Tensor {
  const Data = part.data.constructor as new (length: number) => TensorData;
  const data = new Data(elementCount(shape));
  return { location: 'cpu', dtype: part.dtype, data, shape, strides: contiguousStrides(shape), offset: 0 };
}

/** Runs a call in parts of so many heads, one after another. Inputs are read or copied before this returns. */
export async function runByHeads(
  runtime: Runtime,
  problem: AttentionProblem,
  arithmetic: Arithmetic,
  inputs: AttentionInputs,
  { signal, out }: RunContext,
  heads: number,
): Promise<AttentionOutputs> {
  const own = ownInputs(inputs);
  const { batch, queryHeads, queryLength, valueDim, kvHeads, sequences, tensorLayout } = problem;
  const group = queryHeads / kvHeads;
  const rows = extentOf(problem, 'queryLength');
  const headsOutside = tensorLayout === 'HND' && sequences === undefined;
  // Elements of a head in a run, and runs: heads lie together for each batch entry, or for each token.
  const ofOutput = headsOutside ? queryLength * valueDim : valueDim;
  const outputRuns = headsOutside ? batch : rows.batch * rows.tokens;
  const ofLse = sequences === undefined ? queryLength : rows.tokens;
  const [outputSpec, lseSpec] = attentionOutputs(problem);
  let output = out;
  let lse: Tensor | undefined;
  for (let first = 0; first < kvHeads; first += heads) {
    const end = Math.min(kvHeads, first + heads);
    const calls = new WholeCalls(ofHeads(problem, first, end), arithmetic, runtime.simd);
    const part = await runtime.run(signal === undefined ? {} : { signal }, calls.parts(runtime, own));
    const partOutput = part.output as Tensor;
    output ??= emptyLike(partOutput, outputSpec?.shape ?? []);
    place(partOutput, outBytes(output), outputRuns, queryHeads * ofOutput, first * group * ofOutput);
    if (lseSpec === undefined || part.lse === undefined) continue;
    const partLse = part.lse as Tensor;
    lse ??= emptyLike(partLse, lseSpec.shape);
    place(partLse, outBytes(lse), rows.batch, queryHeads * ofLse, first * group * ofLse);
  }
  return { output: output as Tensor, ...(lse === undefined ? {} : { lse: lse as Tensor<'float32'> }) };
}
