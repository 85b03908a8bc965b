/** Where a rank's tensors are and who works on them: memory of this process, or a GPU. */
import type { AttentionProblem } from '../attention/problem.ts';
import type { AttentionOutputs, Backend, KernelChoice, RunContext, SideInputs } from '../backends/backend.ts';
import type { DType } from '../tensor/dtype.ts';
import type { TensorView } from '../tensor/tensor.ts';
import type { Span } from './shards.ts';

/** Quantized keys and values of one span of tokens and some heads: what travels instead of 16-bit K and V. */
export interface KeyValueSlot {
  /** Makes room for what is going to be received. */
  open(): void;
  /** Quantizes what the slot's problem describes. */
  fill(k: TensorView, v: TensorView, context: RunContext): Promise<void>;
  /** @param problem the same object in every call: what was planned for it is kept */
  attend(q: TensorView, problem: AttentionProblem, side: SideInputs, context: RunContext): Promise<AttentionOutputs>;
  /** The call has ended: what it holds is not needed again. */
  release(): void;
  /** Gives up plans. */
  dispose(): void;
}

/** A part of the rows' output over a part of the keys, normalized by its own sum. */
export interface Partial {
  readonly queries: Span;
  /** `[B,H,rows,Dv]` */
  readonly output: TensorView;
  /** `[B,H,rows]` float32, natural logarithm */
  readonly lse: TensorView;
}

/** Joins partial outputs of one shape. */
export interface Merge {
  /**
   * Row i of the output is the mean of its parts with weights `exp(lse - logsumexp of all)`, 0 where no part has anything to attend
   * to. Rows of no part are 0, their LSE -Infinity.
   */
  run(parts: readonly Partial[], output: TensorView, lse: TensorView | undefined): void;
  dispose(): void;
}

/** A point in what was enqueued at a place. */
export type Mark = unknown;

/** What goes from rank to rank: a contiguous tensor, or quantized keys and values. */
export type Carried = TensorView | KeyValueSlot;

/** All tensors are `[B,H,L,D]` views of any strides. */
export interface Place {
  readonly backend: Backend;
  /** Whether a tensor lies here. */
  holds(view: TensorView): boolean;
  /** A new contiguous tensor. */
  empty(shape: readonly number[], dtype: DType): TensorView;
  /** A tensor of this process's memory, here; nobody writes to it any more. */
  upload(view: TensorView): TensorView;
  /** A copy in this process's memory. */
  download(view: TensorView): Promise<TensorView>;
  /** Copies between views of this place of the same shape. */
  copy(from: TensorView, to: TensorView): void;
  /**
   * A slot for keys and values of one shape.
   *
   * @param room slots of one room share its memory: what one of them holds is lost when another is written to
   */
  keyValue(problem: AttentionProblem, kernel: KernelChoice, room: number): KeyValueSlot;
  merge(): Merge;
  /** Adds contiguous float32 parts, each of some rows; rows of no part are 0. */
  sum(parts: readonly { readonly start: number; readonly values: TensorView }[], output: TensorView): void;
  /** What was enqueued here so far, copies from other ranks left out. */
  mark(): Mark;
  /** What is enqueued here from now on comes after it; copies from other ranks do not. */
  waitFor(mark: Mark): void;
  /** Frees a tensor that was made here; one that was not stays. */
  free(view: TensorView): void;
  /** A call has ended: its marks are not used again. */
  endCall(): void;
  dispose(): void;
}

/** A place to which what lies in other places of this process can be copied, beside what else is enqueued. */
export interface ReachingPlace extends Place {
  /** Copies from now on come after it. */
  holdCopies(mark: Mark): void;
  /** Copies what another place holds into a tensor or slot of this one. */
  bring(value: Carried, from: ReachingPlace, into: Carried): void;
  /** The copies so far. */
  markCopies(): Mark;
  /** After a failure, when copies may be under way: what is freed here from now on is freed after those of the other places. */
  settle(others: readonly ReachingPlace[]): void;
}
