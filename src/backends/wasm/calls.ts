/** Calls as jobs in memory. */
import {
  type AttentionProblem,
  lseShapeOf,
  outputShapeOf,
  type Sequence,
  sequencesOf,
} from '../../attention/problem.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  NativeFloat16Array,
  type Tensor,
  type TensorView,
} from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice } from '../backend.ts';
import { type Precision, tileGeometry } from './geometry.ts';
import { FLAG_ACCURATE, FLAG_EXACT, FLAG_SMOOTH_K, FLAG_SMOOTH_V, FLAG_TILE_MEANS } from './job.ts';
import { ACCURATE_KERNEL } from './kernel-table.ts';
import {
  attendUnits,
  jobSettings,
  prepareUnits,
  recordBytes,
  type SequenceRecord,
  sequenceRecords,
  writeRecords,
} from './records.ts';
import type { Lease, PreparedCall, Runtime } from './runtime.ts';
import { PADDING_BYTES, stageMask, stageOperand } from './staging.ts';

/** What a call computes with. */
export interface Arithmetic extends Pick<KernelChoice, 'smoothK' | 'smoothV'> {
  readonly precision: Precision;
}

export const EXACT: Arithmetic = { precision: 'exact', smoothK: false, smoothV: false };

export const arithmeticOf = ({ descriptor, smoothK, smoothV }: KernelChoice): Arithmetic => ({
  precision: descriptor.name === ACCURATE_KERNEL.name ? 'accurate' : 'integer',
  smoothK,
  smoothV,
});

const PRECISION_FLAGS: Readonly<Record<Precision, number>> = {
  integer: 0,
  accurate: FLAG_ACCURATE,
  exact: FLAG_ACCURATE | FLAG_EXACT,
};

export const flagsOf = ({ precision, smoothK, smoothV }: Arithmetic): number =>
  (smoothK ? FLAG_SMOOTH_K : 0) | (smoothV ? FLAG_SMOOTH_V : 0) | PRECISION_FLAGS[precision];

function tensorOf(bytes: Uint8Array<ArrayBuffer>, shape: number[], dtype: DType): Tensor {
  const { buffer } = bytes;
  const data =
    dtype === 'float32'
      ? new Float32Array(buffer)
      : dtype === 'float16' && NativeFloat16Array !== undefined
        ? new NativeFloat16Array(buffer)
        : new Uint16Array(buffer);
  return { location: 'cpu', dtype, data, shape, strides: contiguousStrides(shape), offset: 0 };
}

/** Memory for output and LSE, and how they come back. */
function outputsOf(runtime: Runtime, lease: Lease, problem: AttentionProblem) {
  const shape = outputShapeOf(problem);
  const bytes = elementCount(shape) * BYTES_PER_ELEMENT[problem.dtype];
  const out = lease.allocate(bytes);
  const lseShape = lseShapeOf(problem);
  const lseBytes = elementCount(lseShape) * 4;
  const lse = problem.returnLse ? lease.allocate(lseBytes) : 0;
  const finish = async (): Promise<AttentionOutputs> => {
    const output = tensorOf(await runtime.executor.read(out, bytes), outputShapeOf(problem), problem.dtype);
    if (!problem.returnLse) return { output };
    return { output, lse: tensorOf(await runtime.executor.read(lse, lseBytes), lseShape, 'float32') };
  };
  return { out, lse, finish };
}

/** Tokens of q, or of k and v, that a batch entry has: in varlen all sequences lie in one. */
function extentOf(problem: AttentionProblem, tokens: 'queryLength' | 'keyLength') {
  const { sequences, batch } = problem;
  if (sequences === undefined) return { batch, tokens: problem[tokens] };
  const starts = tokens === 'queryLength' ? sequences.cuSeqlensQ : sequences.cuSeqlensK;
  return { batch: 1, tokens: starts[batch] as number };
}

function placeMask(lease: Lease, problem: AttentionProblem, attnMask: TensorView | undefined) {
  if (problem.mask === undefined || attnMask === undefined) return { address: 0, layout: undefined };
  const { batch, queryHeads, queryLength, keyLength } = problem;
  const { bytes, layout } = stageMask(attnMask, problem.mask, [batch, queryHeads, queryLength, keyLength]);
  return { address: lease.place(bytes, PADDING_BYTES), layout };
}

/** A call over keys and values that are quantized already. */
export function prepareAttend(
  runtime: Runtime,
  lease: Lease,
  problem: AttentionProblem,
  arithmetic: Arithmetic,
  q: TensorView,
  attnMask: TensorView | undefined,
  sequences: readonly Sequence[],
  held: { readonly tiles: number; readonly means: number; readonly tilesPerHead: number },
): PreparedCall<AttentionOutputs> {
  const { headDim, valueDim, queryHeads } = problem;
  const geometry = tileGeometry(headDim, valueDim, runtime.simd, arithmetic.precision);
  const staged = stageOperand(q, problem.q, {
    ...extentOf(problem, 'queryLength'),
    heads: queryHeads,
    dim: headDim,
  });
  const mask = placeMask(lease, problem, attnMask);
  const layouts = { q: staged.layout, k: undefined, v: undefined, mask: mask.layout };
  const records = sequenceRecords(problem, sequences, layouts).map(
    (record, i): SequenceRecord => ({ ...record, firstTile: i * held.tilesPerHead, tiles: held.tilesPerHead }),
  );
  const units = attendUnits(records, queryHeads);
  const { out, lse, finish } = outputsOf(runtime, lease, problem);
  const address = lease.allocate(recordBytes(records.length, units.length));
  const addresses = {
    ...{ out, lse, k: 0, v: 0, tail: 0, keyTail: 0, mask: mask.address, tiles: held.tiles, means: held.means },
    q: lease.place(staged.bytes, PADDING_BYTES),
  };
  const settings = jobSettings(problem, geometry, flagsOf(arithmetic) | FLAG_TILE_MEANS, layouts);
  runtime.executor.write(address, writeRecords(address, settings, addresses, records, units));
  return { stages: [{ entry: 'attend', job: address }], units: units.length, extraScratch: 0, finish };
}

/** A call over q, k and v: quantize, then attend. */
export function prepareCall(
  runtime: Runtime,
  lease: Lease,
  problem: AttentionProblem,
  arithmetic: Arithmetic,
  { q, k, v, attnMask }: AttentionInputs,
): PreparedCall<AttentionOutputs> {
  const { headDim, valueDim, queryHeads, kvHeads } = problem;
  const geometry = tileGeometry(headDim, valueDim, runtime.simd, arithmetic.precision);
  const keys = { ...extentOf(problem, 'keyLength'), heads: kvHeads };
  const stagedQ = stageOperand(q, problem.q, {
    ...extentOf(problem, 'queryLength'),
    heads: queryHeads,
    dim: headDim,
  });
  const stagedK = stageOperand(k, problem.k, { ...keys, dim: headDim });
  const stagedV = stageOperand(v, problem.v, { ...keys, dim: valueDim });
  const mask = placeMask(lease, problem, attnMask);
  const layouts = { q: stagedQ.layout, k: stagedK.layout, v: stagedV.layout, mask: mask.layout };
  const sequences = sequenceRecords(problem, sequencesOf(problem), layouts);
  const tiles = sequences.reduce((sum, sequence) => sum + sequence.tiles, 0) * kvHeads;
  const { out, lse, finish } = outputsOf(runtime, lease, problem);
  const addresses = {
    ...{ out, lse, tail: 0, keyTail: 0, mask: mask.address },
    q: lease.place(stagedQ.bytes, PADDING_BYTES),
    k: lease.place(stagedK.bytes, PADDING_BYTES),
    v: lease.place(stagedV.bytes, PADDING_BYTES),
    tiles: lease.allocate(tiles * geometry.bytes),
    means: lease.allocate(sequences.length * kvHeads * (geometry.headDimPadded + geometry.valueDimPadded) * 4),
  };
  const settings = jobSettings(problem, geometry, flagsOf(arithmetic), layouts);
  const stage = (units: ReturnType<typeof attendUnits>) => {
    const address = lease.allocate(recordBytes(sequences.length, units.length));
    runtime.executor.write(address, writeRecords(address, settings, addresses, sequences, units));
    return address;
  };
  const attending = attendUnits(sequences, queryHeads);
  // Sequences without queries need no keys either.
  const preparing = prepareUnits(
    sequences.map((sequence) => (sequence.queryLength === 0 ? { ...sequence, keyLength: 0 } : sequence)),
    kvHeads,
  );
  return {
    stages: [
      { entry: 'prepare', job: stage(preparing) },
      { entry: 'attend', job: stage(attending) },
    ],
    units: attending.length,
    extraScratch: sequences.reduce((most, { partlySeen, keyLength }) => Math.max(most, partlySeen ? keyLength : 0), 0),
    finish,
  };
}
