/** Calls as jobs in memory. */

import { blockShapeOf } from '../../attention/block-choice.ts';
import { attentionOutputs, type OutputName, type OutputSpec, type Outputs } from '../../attention/outputs.ts';
import { type AttentionProblem, type BlockLayout, type MaskLayout, sequencesOf } from '../../attention/problem.ts';
import type { ScaleSearch } from '../../quantization/fp4-blocks.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  NativeFloat16Array,
  type OperandLayout,
  type Tensor,
  type TensorView,
} from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice, KernelDescriptor, SideInputs } from '../backend.ts';
import { outBytes } from '../out.ts';
import type { Stage } from './executor.ts';
import { exactScratch, type Precision, type Simd, type TileGeometry, tileGeometry } from './geometry.ts';
import * as job from './job.ts';
import { ACCURATE_KERNEL, EXACT_KERNEL, exactWayOf, FP4_KERNEL } from './kernel-table.ts';
import {
  type Addresses,
  attendUnits,
  exactUnits,
  type JobSettings,
  jobSettings,
  NO_ADDRESSES,
  prepareUnits,
  recordBytes,
  type SequenceRecord,
  sequenceRecords,
  type UnitRecord,
  writeRecords,
} from './records.ts';
import type { CallParts, Lease, PreparedCall, ReadBytes, Runtime } from './runtime.ts';
import {
  keep,
  type OperandExtent,
  PADDING_BYTES,
  type Staged,
  stageBlocks,
  stageMask,
  stageOperand,
  stageSinks,
} from './staging.ts';

/** What a call computes with. */
export interface Arithmetic extends Pick<KernelChoice, 'smoothK' | 'smoothV' | 'smoothQ' | 'scaleSearch'> {
  readonly precision: Precision;
}

const precisionOf = ({ name }: KernelDescriptor): Precision => {
  if (name === EXACT_KERNEL.name) return 'exact';
  if (name === FP4_KERNEL.name) return 'fp4';
  return name === ACCURATE_KERNEL.name ? 'accurate' : 'integer';
};

export function arithmeticOf({ descriptor, smoothK, smoothV, smoothQ, scaleSearch }: KernelChoice): Arithmetic {
  const precision = precisionOf(descriptor);
  if (precision === 'exact') return { precision, smoothK: false, smoothV: false, smoothQ: false };
  return { precision, smoothK, smoothV, smoothQ, ...(scaleSearch === undefined ? {} : { scaleSearch }) };
}

const PRECISION_FLAGS: Readonly<Record<Precision, number>> = {
  integer: 0,
  accurate: job.FLAG_ACCURATE,
  exact: job.FLAG_ACCURATE | job.FLAG_EXACT,
  fp4: job.FLAG_ACCURATE | job.FLAG_EXACT | job.FLAG_FP4,
};

const SEARCH_FLAGS: Readonly<Record<ScaleSearch, number>> = {
  none: 0,
  'four-over-six': job.FLAG_SEARCH_FOUR_OVER_SIX,
  mse: job.FLAG_SEARCH_MSE,
};

/** Flags of keys and values that are held; see {@link wholeFlagsOf}. */
export const flagsOf = ({ precision, smoothK, smoothV, scaleSearch = 'none' }: Arithmetic): number =>
  (smoothK ? job.FLAG_SMOOTH_K : 0) |
  (smoothV ? job.FLAG_SMOOTH_V : 0) |
  PRECISION_FLAGS[precision] |
  SEARCH_FLAGS[scaleSearch];

/** Flags of a call whose keys are not prepared: with FP4, Q and P are rounded too, as Blackwell's tensor cores need it. */
const wholeFlagsOf = (arithmetic: Arithmetic): number => {
  if (arithmetic.precision !== 'fp4') return flagsOf(arithmetic);
  const { smoothQ } = arithmetic;
  const smoothing = smoothQ === false ? 0 : smoothQ === 'block' ? job.FLAG_SMOOTH_Q : job.FLAG_SMOOTH_Q_SEQUENCE;
  return flagsOf(arithmetic) | job.FLAG_FP4_PRODUCTS | smoothing;
};

/** Bytes that a thread needs for a decoded tile. */
const decodedBytes = ({ precision }: Arithmetic): number => (precision === 'fp4' ? job.DECODED_TILE_BYTES : 0);

/** Multiply-adds that laying out or quantizing an element of k or v takes about as long as, and reading one that is quantized. */
const ELEMENT_WORK = 32;
const PREPARED_ELEMENT_WORK = 4;

/** About how many multiply-adds a call takes as long as: both products, and k and v made ready for them, or read. */
export function workOf(problem: AttentionProblem, prepared = false): number {
  const { headDim, valueDim, queryHeads, kvHeads } = problem;
  return sequencesOf(problem).reduce(
    (sum, { queryLength, keyLength }) =>
      sum +
      keyLength *
        (headDim + valueDim) *
        (queryHeads * queryLength + (prepared ? PREPARED_ELEMENT_WORK : ELEMENT_WORK) * kvHeads),
    0,
  );
}

export function tensorOf(bytes: Uint8Array<ArrayBuffer>, shape: readonly number[], dtype: DType): Tensor {
  const { buffer } = bytes;
  const data =
    dtype === 'float32'
      ? new Float32Array(buffer)
      : dtype === 'float16' && NativeFloat16Array !== undefined
        ? new NativeFloat16Array(buffer)
        : new Uint16Array(buffer);
  return { location: 'cpu', dtype, data, shape, strides: contiguousStrides(shape), offset: 0 };
}

/**
 * Memory for what a run makes, and how it comes back.
 *
 * @param out the caller's tensor for the first of them
 */
export function allocateMade<Made extends Outputs>(
  runtime: Runtime,
  lease: Lease,
  specs: readonly OutputSpec[],
  out?: Tensor,
) {
  const outputs = specs.map(({ name, shape, dtype }) => {
    const bytes = elementCount(shape) * BYTES_PER_ELEMENT[dtype];
    return { name, shape, dtype, bytes, address: lease.allocate(bytes) };
  });
  const collect = (read: ReadBytes): Made => {
    const made: Partial<Record<OutputName, Tensor>> = {};
    for (const { name, shape, dtype, bytes, address } of outputs)
      made[name] = tensorOf(read(address, bytes), shape, dtype);
    return made as Outputs as Made;
  };
  const finish = async (): Promise<Made> => {
    const made: Partial<Record<OutputName, Tensor>> = {};
    for (const [i, { name, shape, dtype, bytes, address }] of outputs.entries()) {
      if (i === 0 && out !== undefined) {
        await runtime.executor.readInto(address, outBytes(out));
        made[name] = out;
      } else {
        made[name] = tensorOf(await runtime.executor.read(address, bytes), shape, dtype);
      }
    }
    return made as Outputs as Made;
  };
  /** 0: it is not wanted. */
  const addressOf = (wanted: OutputName) => outputs.find(({ name }) => name === wanted)?.address ?? 0;
  return { addressOf, finish, collect };
}

const allocateOutputs = (runtime: Runtime, lease: Lease, problem: AttentionProblem, out: Tensor | undefined) =>
  allocateMade<AttentionOutputs>(runtime, lease, attentionOutputs(problem), out);

/** Tokens of q, or of k and v, that a batch entry has: in varlen all sequences lie in one. */
export function extentOf(problem: AttentionProblem, tokens: 'queryLength' | 'keyLength') {
  const { sequences, batch } = problem;
  if (sequences === undefined) return { batch, tokens: problem[tokens] };
  const starts = tokens === 'queryLength' ? sequences.cuSeqlensQ : sequences.cuSeqlensK;
  return { batch: 1, tokens: starts[batch] as number };
}

/**
 * A call's inputs as bytes: views of the caller's data where possible, which hold only while the call is being made.
 */
export interface StagedInputs {
  readonly q: Staged<OperandLayout>;
  readonly k: Staged<OperandLayout> | undefined;
  readonly v: Staged<OperandLayout> | undefined;
  readonly mask: Staged<MaskLayout> | undefined;
  readonly blocks: Staged<BlockLayout> | undefined;
  readonly sinks: Staged<undefined> | undefined;
}

/** Operands of a problem with their extents, which all of its calls share. */
class Operands {
  readonly problem: AttentionProblem;
  readonly #q: OperandExtent;
  readonly #k: OperandExtent;
  readonly #v: OperandExtent;
  readonly #lengths: readonly [batch: number, heads: number, queries: number, keys: number];

  constructor(problem: AttentionProblem) {
    const { queryHeads, kvHeads, headDim, valueDim, batch, queryLength, keyLength } = problem;
    const keys = { ...extentOf(problem, 'keyLength'), heads: kvHeads };
    this.problem = problem;
    this.#q = { ...extentOf(problem, 'queryLength'), heads: queryHeads, dim: headDim };
    this.#k = { ...keys, dim: headDim };
    this.#v = { ...keys, dim: valueDim };
    this.#lengths = [batch, queryHeads, queryLength, keyLength];
  }

  /** @throws {InvalidArgumentError} `buffer-too-small` */
  stage(
    q: TensorView,
    k: TensorView | undefined,
    v: TensorView | undefined,
    { attnMask, sinks, blockMap }: SideInputs,
  ): StagedInputs {
    const { problem } = this;
    const { mask, blocks } = problem;
    return {
      q: stageOperand('q', q, problem.q, this.#q),
      k: k && stageOperand('k', k, problem.k, this.#k),
      v: v && stageOperand('v', v, problem.v, this.#v),
      mask: mask && attnMask && stageMask(attnMask, mask, this.#lengths),
      blocks: blocks && blockMap && stageBlocks(blockMap, blocks, blockShapeOf(problem, blocks)),
      sinks: problem.sinks && sinks && stageSinks(sinks, problem.sinks, problem.queryHeads),
    };
  }
}

export const stageInputs = (problem: AttentionProblem, inputs: AttentionInputs): StagedInputs =>
  new Operands(problem).stage(inputs.q, inputs.k, inputs.v, inputs);

export const kept = <Layout>(staged: Staged<Layout> | undefined) => (staged === undefined ? undefined : keep(staged));

/** A call that reads its inputs now, by `place` or into copies. */
function callOf(
  staged: StagedInputs,
  place: (lease: Lease, staged: StagedInputs) => PreparedCall<AttentionOutputs>,
): CallParts<AttentionOutputs> {
  let inputs = staged;
  return {
    prepare: (lease) => place(lease, inputs),
    keepInputs: () => {
      const { q, k, v, mask, blocks, sinks } = inputs;
      inputs = { q: keep(q), k: kept(k), v: kept(v), mask: kept(mask), blocks: kept(blocks), sinks };
    },
  };
}

export const placed = (lease: Lease, staged: Staged<unknown> | undefined) =>
  staged === undefined ? 0 : lease.place(staged.bytes, PADDING_BYTES, staged.runs);

export const layoutsOf = ({ q, k, v, mask, blocks }: StagedInputs) => ({
  q: q.layout,
  k: k?.layout,
  v: v?.layout,
  mask: mask?.layout,
  blocks: blocks?.layout,
});

/** Where what is beside q, k and v lies. */
const placedSide = (lease: Lease, { mask, blocks, sinks }: StagedInputs) => ({
  mask: placed(lease, mask),
  blockMap: placed(lease, blocks),
  sinks: placed(lease, sinks),
});

/**
 * A call over keys and values that are quantized already.
 *
 * @param held says where they are when the call's turn comes
 * @param out the caller's tensor for the output
 * @throws {InvalidArgumentError} `buffer-too-small`
 */
export function attendCall(
  runtime: Runtime,
  problem: AttentionProblem,
  arithmetic: Arithmetic,
  q: TensorView,
  side: SideInputs,
  held: () => { readonly tiles: number; readonly means: number; readonly tilesPerHead: number },
  out: Tensor | undefined,
): CallParts<AttentionOutputs> {
  return callOf(new Operands(problem).stage(q, undefined, undefined, side), (lease, staged) => {
    const { headDim, valueDim, queryHeads } = problem;
    const { tiles, means, tilesPerHead } = held();
    const geometry = tileGeometry(headDim, valueDim, runtime.simd, arithmetic);
    const layouts = layoutsOf(staged);
    const records = sequenceRecords(problem, sequencesOf(problem), layouts).map(
      (record, i): SequenceRecord => ({ ...record, firstTile: i * tilesPerHead, tiles: tilesPerHead }),
    );
    const units = attendUnits(records, queryHeads);
    const { addressOf, finish } = allocateOutputs(runtime, lease, problem, out);
    const address = lease.allocate(recordBytes(records.length, units.length));
    const addresses = {
      ...NO_ADDRESSES,
      ...{ out: addressOf('output'), lse: addressOf('lse'), tiles, means },
      ...placedSide(lease, staged),
      q: placed(lease, staged.q),
    };
    const settings = jobSettings(problem, geometry, flagsOf(arithmetic) | job.FLAG_TILE_MEANS, layouts);
    runtime.executor.write(address, writeRecords(address, settings, addresses, records, units));
    return {
      stages: [{ entry: 'attend', job: address }],
      units: units.length,
      extraScratch: decodedBytes(arithmetic),
      work: workOf(problem, true),
      finish,
    };
  });
}

/** What of a stage does not depend on where things lie. */
interface PlannedStage {
  readonly entry: Stage['entry'];
  readonly units: readonly UnitRecord[];
}

/** Everything that calls of one plan have in common, once the first has been staged. */
interface PlannedCall {
  readonly geometry: TileGeometry;
  readonly settings: JobSettings;
  readonly sequences: readonly SequenceRecord[];
  readonly stages: readonly PlannedStage[];
  readonly units: number;
  readonly extraScratch: number;
  readonly tileBytes: number;
  readonly meanBytes: number;
}

/**
 * Calls over q, k and v for one problem: in float32 at once where nothing is quantized and keys or rows are few, else make
 * tiles, then attend.
 */
export class WholeCalls {
  readonly #operands: Operands;
  readonly #arithmetic: Arithmetic;
  readonly #simd: Simd;
  readonly #work: number;
  #planned: PlannedCall | undefined;
  /** Records of the last call, for the next one whose data lies in the same places. */
  #records: { readonly places: readonly number[]; readonly bytes: readonly Uint8Array[] } | undefined;

  constructor(problem: AttentionProblem, arithmetic: Arithmetic, simd: Simd) {
    this.#operands = new Operands(problem);
    this.#arithmetic = arithmetic;
    this.#simd = simd;
    this.#work = workOf(problem);
  }

  /**
   * A call that reads its inputs now.
   *
   * @throws {InvalidArgumentError} `buffer-too-small`
   */
  parts(runtime: Runtime, inputs: AttentionInputs, out?: Tensor): CallParts<AttentionOutputs> {
    const staged = this.#operands.stage(inputs.q, inputs.k, inputs.v, inputs);
    return callOf(staged, (lease, kept) => this.#place(runtime, lease, kept, out));
  }

  #place(
    runtime: Runtime,
    lease: Lease,
    staged: StagedInputs,
    out: Tensor | undefined,
  ): PreparedCall<AttentionOutputs> {
    // Staged layouts follow from the problem alone.
    this.#planned ??= this.#plan(staged);
    const { stages, sequences, units, extraScratch, tileBytes, meanBytes } = this.#planned;
    const { addressOf, finish, collect } = allocateOutputs(runtime, lease, this.#operands.problem, out);
    const addresses: Addresses = {
      q: placed(lease, staged.q),
      k: placed(lease, staged.k),
      v: placed(lease, staged.v),
      out: addressOf('output'),
      lse: addressOf('lse'),
      mask: placed(lease, staged.mask),
      blockMap: placed(lease, staged.blocks),
      sinks: placed(lease, staged.sinks),
      tiles: tileBytes === 0 ? 0 : lease.allocate(tileBytes),
      means: meanBytes === 0 ? 0 : lease.allocate(meanBytes),
      tail: 0,
      keyTail: 0,
      tailSeen: 0,
    };
    const jobs = stages.map((stage) => lease.allocate(recordBytes(sequences.length, stage.units.length)));
    const records = this.#write(this.#planned, addresses, jobs);
    for (const [i, bytes] of records.entries()) runtime.executor.write(jobs[i] as number, bytes);
    return {
      stages: stages.map(({ entry }, i) => ({ entry, job: jobs[i] as number })),
      units,
      extraScratch,
      work: this.#work,
      finish,
      collect,
    };
  }

  #write({ settings, sequences, stages }: PlannedCall, addresses: Addresses, jobs: number[]): readonly Uint8Array[] {
    const places = [...jobs];
    for (const name in addresses) places.push(addresses[name as keyof Addresses]);
    const before = this.#records?.places;
    if (this.#records === undefined || places.some((place, i) => place !== before?.[i])) {
      const bytes = stages.map(({ units }, i) =>
        writeRecords(jobs[i] as number, settings, addresses, sequences, units),
      );
      this.#records = { places, bytes };
    }
    return this.#records.bytes;
  }

  #plan(staged: StagedInputs): PlannedCall {
    const { problem } = this.#operands;
    const { headDim, valueDim, queryHeads, kvHeads } = problem;
    const geometry = tileGeometry(headDim, valueDim, this.#simd, this.#arithmetic);
    const layouts = layoutsOf(staged);
    const sequences = sequenceRecords(problem, sequencesOf(problem), layouts);
    const common = { geometry, sequences };
    const flags = wholeFlagsOf(this.#arithmetic);
    const way = this.#arithmetic.precision === 'exact' ? exactWayOf(problem) : 'tiles';
    if (way !== 'tiles') {
      const units = exactUnits(sequences, kvHeads);
      return {
        ...common,
        settings: jobSettings(problem, geometry, way === 'in-place' ? flags | job.FLAG_IN_PLACE : flags, layouts),
        stages: [{ entry: 'exact', units }],
        units: units.length,
        extraScratch: exactScratch(problem, way),
        ...{ tileBytes: 0, meanBytes: 0 },
      };
    }
    const tiles = sequences.reduce((sum, sequence) => sum + sequence.tiles, 0) * kvHeads;
    const attending = attendUnits(sequences, queryHeads);
    // Sequences without queries need no keys either.
    const preparing = prepareUnits(
      sequences.map((sequence) => (sequence.queryLength === 0 ? { ...sequence, keyLength: 0 } : sequence)),
      kvHeads,
    );
    return {
      ...common,
      settings: jobSettings(problem, geometry, flags, layouts),
      stages: [
        { entry: 'prepare', units: preparing },
        { entry: 'attend', units: attending },
      ],
      units: attending.length,
      extraScratch: sequences.reduce(
        (most, { partlySeen, keyLength }) => Math.max(most, partlySeen ? keyLength : 0),
        decodedBytes(this.#arithmetic),
      ),
      tileBytes: tiles * geometry.bytes,
      meanBytes: sequences.length * kvHeads * (geometry.headDimPadded + geometry.valueDimPadded) * 4,
    };
  }
}
