/** Backward passes as jobs in memory. */
import { type BackwardProblem, gradientOutputs, gradientShapesOf } from '../../attention/backward.ts';
import { type AttentionProblem, sequencesOf } from '../../attention/problem.ts';
import { contiguousStrides, type OperandLayout, type Tensor } from '../../tensor/tensor.ts';
import type { BackwardInputs, BackwardOutputs } from '../backend.ts';
import {
  type Arithmetic,
  allocateMade,
  extentOf,
  flagsOf,
  kept,
  layoutsOf,
  placed,
  type StagedInputs,
  stageInputs,
  workOf,
} from './calls.ts';
import { tileGeometry } from './geometry.ts';
import { BLOCK_K, BLOCK_Q, FLAG_GRADIENTS, FLAG_INTEGER_GRADIENTS, FLAG_PART_OF_KEYS } from './job.ts';
import {
  type JobGradients,
  jobSettings,
  NO_ADDRESSES,
  prepareUnits,
  recordBytes,
  type SequenceGradients,
  type SequenceRecord,
  sequenceRecords,
  startOf,
  type UnitRecord,
  writeRecords,
} from './records.ts';
import type { CallParts, Lease, Runtime } from './runtime.ts';
import { keep, type Staged, stageOperand } from './staging.ts';

/** Five products to the forward pass's two. */
const BACKWARD_PRODUCTS = 2.5;

/**
 * Units that a call is split into where heads alone are fewer. More threads than that find no work; each unit has sums of dK and
 * dV of its own. It must not depend on the number of threads, or the result would.
 */
const LEAST_UNITS = 16;

/** Rows of each unit of a sequence: all of a head's, or part of them where there are few heads. */
function chunkRowsOf(problem: AttentionProblem, queryLength: number): number {
  const heads = Math.max(1, problem.batch * problem.queryHeads);
  const wanted = Math.ceil(LEAST_UNITS / heads);
  const blocks = Math.ceil(queryLength / BLOCK_Q);
  return Math.max(1, Math.ceil(blocks / wanted)) * BLOCK_Q;
}

/** Inputs as bytes, see StagedInputs; lse without gaps. */
interface StagedBackward {
  readonly inputs: StagedInputs & { readonly k: Staged<OperandLayout>; readonly v: Staged<OperandLayout> };
  readonly output: Staged<OperandLayout>;
  readonly dOutput: Staged<OperandLayout>;
  readonly lse: Staged<undefined>;
}

function stage(problem: BackwardProblem, inputs: BackwardInputs): StagedBackward {
  const { attention } = problem;
  const extent = { ...extentOf(attention, 'queryLength'), heads: attention.queryHeads, dim: attention.valueDim };
  const lse = (inputs.lse as Tensor<'float32'>).data;
  const rows = extent.batch * extent.heads * extent.tokens;
  return {
    inputs: stageInputs(attention, inputs) as StagedBackward['inputs'],
    output: stageOperand('output', inputs.output, problem.output, extent),
    dOutput: stageOperand('dOutput', inputs.dOutput, problem.dOutput, extent),
    lse: {
      bytes: new Uint8Array(lse.buffer, lse.byteOffset + problem.lseOffset * 4, rows * 4),
      layout: undefined,
    },
  };
}

/** A sequence's places in the gradients, its chunks and the sums of its units. */
function placesOf(
  problem: AttentionProblem,
  records: readonly SequenceRecord[],
  layouts: Pick<JobGradients, 'dOut' | 'dQuery' | 'dKey' | 'dValue'>,
  sumFloats: number,
): { places: SequenceGradients[]; sums: number } {
  let firstSum = 0;
  const places = sequencesOf(problem).map(({ index, queryStart, queryLength, keyStart }, i) => {
    const chunkRows = chunkRowsOf(problem, queryLength);
    const chunks = Math.ceil(queryLength / chunkRows);
    const place = {
      dOut: startOf(layouts.dOut, index, queryStart),
      dQuery: startOf(layouts.dQuery, index, queryStart),
      dKey: startOf(layouts.dKey, index, keyStart),
      dValue: startOf(layouts.dValue, index, keyStart),
      firstSum,
      chunks,
      chunkRows,
    };
    firstSum += problem.queryHeads * chunks * (records[i] as SequenceRecord).tiles * BLOCK_K * sumFloats;
    return place;
  });
  return { places, sums: firstSum };
}

/** Last rows first: under a causal mask they take longest. */
function backwardUnits(records: readonly SequenceRecord[], places: readonly SequenceGradients[], queryHeads: number) {
  return records.flatMap((_, sequence): UnitRecord[] => {
    const { chunks, chunkRows } = places[sequence] as SequenceGradients;
    return Array.from({ length: queryHeads * chunks }, (__, i) => ({
      sequence,
      head: i % queryHeads,
      row: (chunks - 1 - Math.floor(i / queryHeads)) * chunkRows,
    }));
  });
}

/** A tile of keys each. */
const storeUnits = (records: readonly SequenceRecord[], kvHeads: number) =>
  records.flatMap(({ tiles }, sequence): UnitRecord[] =>
    Array.from({ length: kvHeads * tiles }, (_, i) => ({
      sequence,
      head: Math.floor(i / tiles),
      row: (i % tiles) * BLOCK_K,
    })),
  );

/** Gradients of scores `[B,Hq,Lq,Lk]` summed over what a mask of this shape broadcasts over. */
function sumToMask(
  dScores: Float32Array,
  { batch, queryHeads, queryLength, keyLength }: AttentionProblem,
  shape: readonly number[],
): Tensor {
  const full = [batch, queryHeads, queryLength, keyLength];
  const strides = contiguousStrides(shape);
  const strideOf = (dimension: number) => {
    const own = dimension - (4 - shape.length);
    return own < 0 || shape[own] === 1 ? 0 : (strides[own] as number);
  };
  const [batchStride, headStride, queryStride, keyStride] = full.map((_, i) => strideOf(i)) as [
    number,
    number,
    number,
    number,
  ];
  const sums = new Float64Array(shape.reduce((product, size) => product * size, 1));
  let from = 0;
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < queryHeads; h++) {
      for (let i = 0; i < queryLength; i++) {
        const row = b * batchStride + h * headStride + i * queryStride;
        for (let j = 0; j < keyLength; j++, from++) {
          const at = row + j * keyStride;
          sums[at] = (sums[at] as number) + (dScores[from] as number);
        }
      }
    }
  }
  const data = Float32Array.from(sums);
  return { location: 'cpu', dtype: 'float32', data, shape: [...shape], strides, offset: 0 } as Tensor;
}

/** Memory for the gradient of the scores, if the mask's is wanted; 0 where no row sees a key. */
function placeScoreGradient(runtime: Runtime, lease: Lease, { attention, maskGradient }: BackwardProblem) {
  if (maskGradient === undefined) return { address: 0, read: async () => ({}) };
  const { batch, queryHeads, queryLength, keyLength } = attention;
  const bytes = batch * queryHeads * queryLength * keyLength * 4;
  const address = lease.place(new Uint8Array(bytes));
  const read = async (): Promise<Pick<BackwardOutputs, 'dMask'>> => {
    const scores = new Float32Array((await runtime.executor.read(address, bytes)).buffer);
    return { dMask: sumToMask(scores, attention, maskGradient) as NonNullable<BackwardOutputs['dMask']> };
  };
  return { address, read };
}

/**
 * A backward pass: quantize keys, compute gradients of rows, add up the gradients of keys and values.
 *
 * @throws {InvalidArgumentError} `buffer-too-small`
 */
export function backwardCall(
  runtime: Runtime,
  problem: BackwardProblem,
  arithmetic: Arithmetic,
  inputs: BackwardInputs,
): CallParts<BackwardOutputs> {
  const { attention } = problem;
  const { headDim, valueDim, queryHeads, kvHeads } = attention;
  const geometry = tileGeometry(headDim, valueDim, runtime.simd, arithmetic);
  const { headDimPadded, valueDimPadded } = geometry;
  const shapes = gradientShapesOf(attention);
  let staged = stage(problem, inputs);
  return {
    keepInputs: () => {
      const { q, k, v, mask, blocks, sinks } = staged.inputs;
      staged = {
        inputs: { q: keep(q), k: keep(k), v: keep(v), mask: kept(mask), blocks: kept(blocks), sinks },
        output: keep(staged.output),
        dOutput: keep(staged.dOutput),
        lse: keep(staged.lse),
      };
    },
    prepare: (lease) => {
      const layouts = layoutsOf(staged.inputs);
      const records = sequenceRecords(attention, sequencesOf(attention), layouts).map((record, i) => {
        const { index, queryStart } = sequencesOf(attention)[i] as { index: number; queryStart: number };
        return { ...record, out: startOf(staged.output.layout, index, queryStart) };
      });
      const own = {
        dOut: staged.dOutput.layout,
        dQuery: shapes.dq.layout,
        dKey: shapes.dk.layout,
        dValue: shapes.dv.layout,
      };
      const { places, sums } = placesOf(attention, records, own, headDimPadded + valueDimPadded);
      const tiles = records.reduce((sum, record) => sum + record.tiles, 0) * kvHeads;
      const specs = gradientOutputs(problem).filter(({ name }) => name !== 'dMask');
      const { addressOf, finish, collect } = allocateMade<BackwardOutputs>(runtime, lease, specs);
      const scores = placeScoreGradient(runtime, lease, problem);
      const addresses = {
        ...NO_ADDRESSES,
        q: placed(lease, staged.inputs.q),
        k: placed(lease, staged.inputs.k),
        v: placed(lease, staged.inputs.v),
        mask: placed(lease, staged.inputs.mask),
        out: placed(lease, staged.output),
        lse: placed(lease, staged.lse),
        tiles: lease.allocate(tiles * geometry.bytes),
        means: lease.allocate(records.length * kvHeads * (headDimPadded + valueDimPadded) * 4),
      };
      const gradients: JobGradients = {
        addresses: {
          dOut: placed(lease, staged.dOutput),
          gradientTiles: lease.allocate(tiles * BLOCK_K * 4 * (headDimPadded + valueDimPadded + 1)),
          gradientSums: lease.allocate(sums * 4),
          dQuery: addressOf('dq'),
          dKey: addressOf('dk'),
          dValue: addressOf('dv'),
          dMask: scores.address,
        },
        dtype: problem.gradientDtype,
        ...own,
        dMaskRows: attention.queryLength,
        dMaskKeys: attention.keyLength,
        sequences: places,
      };
      const flags =
        FLAG_GRADIENTS |
        (problem.partOfKeys === true ? FLAG_PART_OF_KEYS : 0) |
        (problem.precision === 'int8' ? FLAG_INTEGER_GRADIENTS : 0);
      const settings = {
        ...jobSettings(attention, geometry, flagsOf(arithmetic) | flags, layouts),
        out: staged.output.layout,
      };
      const stageOf = (entry: 'prepareBackward' | 'backward' | 'storeGradients', units: readonly UnitRecord[]) => {
        const job = lease.allocate(recordBytes(records.length, units.length));
        runtime.executor.write(job, writeRecords(job, settings, addresses, records, units, gradients));
        return { entry, job };
      };
      const rows = backwardUnits(records, places, queryHeads);
      const stores = storeUnits(records, kvHeads);
      return {
        stages: [
          stageOf('prepareBackward', prepareUnits(records, kvHeads)),
          stageOf('backward', rows),
          stageOf('storeGradients', stores),
        ],
        units: Math.max(rows.length, stores.length),
        extraScratch: records.reduce(
          (most, { partlySeen, keyLength }) => Math.max(most, partlySeen ? keyLength : 0),
          0,
        ),
        // The mask's gradient, which is summed here, has no need of it.
        collect,
        work: BACKWARD_PRODUCTS * workOf(attention),
        finish: async () => ({ ...(await finish()), ...(await scores.read()) }),
      };
    },
  };
}
