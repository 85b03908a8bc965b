/** Packed sequences of different lengths, each of which one rank holds as a whole: nothing is sent. */

import { withCachedPlan } from '../api/plan-cache.ts';
import { type AttentionOptions, validateOptions } from '../attention/options.ts';
import { createVarlenProblem } from '../attention/problem.ts';
import { contextOf, takeTensor } from '../backends/choice.ts';
import { DISPOSE } from '../dispose.ts';
import { takeOptions } from '../errors.ts';
import { toFloat32, writeValues } from '../tensor/access.ts';
import type { DType } from '../tensor/dtype.ts';
import { emptyTensor, slice, type Tensor, type TensorView } from '../tensor/tensor.ts';
import type { DeviceGroup } from './group.ts';
import { DIVIDED_OPTIONS } from './options.ts';

/** Options of {@link sageattnVarlenSharded}. */
export type SequencesOptions = Pick<AttentionOptions, (typeof DIVIDED_OPTIONS)[number]>;

/** As `sageattnVarlen` takes them, in this process's memory. */
export interface PackedSequences {
  /** `[totalQ,Hq,D]` */
  readonly q: Tensor;
  /** `[totalK,Hkv,D]` */
  readonly k: Tensor;
  /** `[totalK,Hkv,Dv]` */
  readonly v: Tensor;
  /** B + 1 integers that start at 0 and never fall. */
  readonly cuSeqlensQ: ArrayLike<number>;
  readonly cuSeqlensK: ArrayLike<number>;
}

/** What a rank of this process holds: its sequences packed end to end. */
interface HeldSequences {
  readonly q: TensorView;
  readonly k: TensorView;
  readonly v: TensorView;
  readonly cuSeqlensQ: readonly number[];
  readonly cuSeqlensK: readonly number[];
}

/** Sequences that are dealt out to the ranks of a group. */
export interface ShardedSequences {
  readonly group: DeviceGroup;
  /** The sequences of each rank of the group, by their numbers. */
  readonly assignment: readonly (readonly number[])[];
  /** Starts of all sequences, those of other ranks too. */
  readonly cuSeqlensQ: readonly number[];
  readonly cuSeqlensK: readonly number[];
  /** Of each rank of this process. */
  readonly held: readonly HeldSequences[];
  dispose(): void;
  [Symbol.dispose](): void;
}

/** Outputs of the sequences, where they were computed. */
export interface SequencesOutput {
  readonly sequences: ShardedSequences;
  /** Of each rank of this process: `[its tokens,Hq,Dv]`. */
  readonly parts: readonly TensorView[];
  dispose(): void;
  [Symbol.dispose](): void;
}

const lengthsOf = (starts: readonly number[]) => starts.slice(1).map((end, i) => end - (starts[i] as number));
const startsOf = (lengths: readonly number[]) => {
  const starts = [0];
  for (const length of lengths) starts.push((starts.at(-1) as number) + length);
  return starts;
};

/**
 * Deals sequences out, the longest first, each to the rank that has least so far: no rank has more than 4/3 of the least possible
 * work (Graham 1969).
 *
 * @param work of each sequence
 * @returns the sequences of each rank, in their order
 */
export function assignSequences(work: readonly number[], ranks: number): number[][] {
  const loads = Array.from({ length: ranks }, () => 0);
  const assignment: number[][] = loads.map(() => []);
  const order = work.map((_, i) => i).sort((a, b) => (work[b] as number) - (work[a] as number) || a - b);
  for (const sequence of order) {
    const rank = loads.indexOf(Math.min(...loads));
    loads[rank] = (loads[rank] as number) + (work[sequence] as number);
    (assignment[rank] as number[]).push(sequence);
  }
  return assignment.map((sequences) => sequences.sort((a, b) => a - b));
}

function copyRows(from: Tensor, to: Tensor): void {
  writeValues(toFloat32(from), to);
}

/** Some sequences of a packed tensor, packed. */
function pick(view: Tensor, starts: readonly number[], sequences: readonly number[]): Tensor {
  const lengths = lengthsOf(starts);
  const packed = startsOf(sequences.map((sequence) => lengths[sequence] as number));
  const picked = emptyTensor([packed.at(-1) as number, ...view.shape.slice(1)], view.dtype as DType);
  for (const [i, sequence] of sequences.entries()) {
    const from = starts[sequence] as number;
    const [at, end] = [packed[i] as number, packed[i + 1] as number];
    copyRows(slice(view, 0, from, from + end - at), slice(picked, 0, at, end));
  }
  return picked;
}

/**
 * Deals packed sequences out to the ranks of a group so that their work is as even as whole sequences allow.
 *
 * @throws {InvalidArgumentError} as `sageattnVarlen`
 */
export function shardSequences(group: DeviceGroup, packed: PackedSequences): ShardedSequences {
  group.requireUsable();
  const { q, k, v, cuSeqlensQ, cuSeqlensK } = packed;
  const [ownQ, ownK, ownV] = [takeTensor('q', q), takeTensor('k', k), takeTensor('v', v)] as [Tensor, Tensor, Tensor];
  const { sequences } = createVarlenProblem(ownQ, ownK, ownV, cuSeqlensQ, cuSeqlensK, {});
  const [startsQ, startsK] = [sequences?.cuSeqlensQ, sequences?.cuSeqlensK].map((starts) =>
    Array.from(starts as ArrayLike<number>),
  ) as [number[], number[]];
  const [lengthsQ, lengthsK] = [lengthsOf(startsQ), lengthsOf(startsK)];
  // Scores, and the tokens that are read and written.
  const work = lengthsQ.map((length, i) => length * (lengthsK[i] as number) + length + (lengthsK[i] as number));
  const assignment = assignSequences(work, group.size);
  const held = group.members.map(({ place, rank }): HeldSequences => {
    const own = assignment[rank] as readonly number[];
    return {
      q: place.upload(pick(ownQ, startsQ, own)),
      k: place.upload(pick(ownK, startsK, own)),
      v: place.upload(pick(ownV, startsK, own)),
      cuSeqlensQ: startsOf(own.map((sequence) => lengthsQ[sequence] as number)),
      cuSeqlensK: startsOf(own.map((sequence) => lengthsK[sequence] as number)),
    };
  });
  const dispose = () => {
    for (const [i, { q: heldQ, k: heldK, v: heldV }] of held.entries()) {
      for (const view of [heldQ, heldK, heldV]) group.members[i]?.place.free(view);
    }
  };
  return { group, assignment, cuSeqlensQ: startsQ, cuSeqlensK: startsK, held, dispose, [DISPOSE]: dispose };
}

/**
 * `sageattnVarlen` over sequences that are dealt out among ranks: each attends to its own, and nothing is sent.
 *
 * @throws {SageAttentionError} as `sageattnVarlen`
 */
export async function sageattnVarlenSharded(
  sequences: ShardedSequences,
  options: SequencesOptions = {},
): Promise<SequencesOutput> {
  const { group, held } = sequences;
  group.requireUsable();
  const own: AttentionOptions = validateOptions(takeOptions(options, [...DIVIDED_OPTIONS]), DIVIDED_OPTIONS);
  const attend = async ({ q, k, v, cuSeqlensQ, cuSeqlensK }: HeldSequences, i: number): Promise<TensorView> => {
    const { place } = group.members[i] as DeviceGroup['members'][number];
    const shape = [q.shape[0] as number, q.shape[1] as number, v.shape[2] as number];
    if (cuSeqlensQ.length === 1) return place.empty(shape, q.dtype as DType);
    const problem = createVarlenProblem(q, k, v, cuSeqlensQ, cuSeqlensK, own);
    const context = contextOf(own, place.backend.name);
    const { output } = await withCachedPlan(place.backend, problem, own, (plan) => plan.run({ q, k, v }, context));
    return output;
  };
  // All of a rank are enqueued before the next rank's; on the CPU they take turns.
  const settled = await Promise.allSettled(held.map(attend));
  const parts = settled.flatMap((each, i) => (each.status === 'fulfilled' ? [{ i, view: each.value }] : []));
  const dispose = () => {
    for (const { i, view } of parts) group.members[i]?.place.free(view);
  };
  const failed = settled.find((each) => each.status === 'rejected');
  if (failed !== undefined) {
    dispose();
    throw failed.reason;
  }
  return { sequences, parts: parts.map(({ view }) => view), dispose, [DISPOSE]: dispose };
}

/** The packed output of all sequences, `[totalQ,Hq,Dv]`, in this process's memory. All processes of the group ask for it. */
export async function gatherSequences({ sequences, parts }: SequencesOutput): Promise<Tensor> {
  const { group, assignment, cuSeqlensQ } = sequences;
  const [first] = parts as readonly [TensorView];
  const [, heads, dim] = first.shape as [number, number, number];
  const dtype = first.dtype as DType;
  const lengths = lengthsOf(cuSeqlensQ);
  const startsOfRank = (rank: number) =>
    startsOf((assignment[rank] as readonly number[]).map((sequence) => lengths[sequence] as number));
  const whole = emptyTensor([cuSeqlensQ.at(-1) as number, heads, dim], dtype);
  await group.forEachPart(
    parts,
    (rank) => [startsOfRank(rank).at(-1) as number, heads, dim],
    (rank, part) => {
      const packed = startsOfRank(rank);
      for (const [i, sequence] of (assignment[rank] as readonly number[]).entries()) {
        const to = cuSeqlensQ[sequence] as number;
        const [at, end] = [packed[i] as number, packed[i + 1] as number];
        copyRows(slice(part, 0, at, end), slice(whole, 0, to, to + end - at));
      }
    },
  );
  return whole;
}
