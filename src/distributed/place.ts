/** Where a rank's tensors are and who works on them: memory of this process, or a GPU. */
import type { Backend, PreparedKeyValue } from '../backends/backend.ts';
import type { DType } from '../tensor/dtype.ts';
import type { TensorView } from '../tensor/tensor.ts';
import type { Span } from './shards.ts';

/** Quantized keys and values of one span of tokens and some heads: what travels instead of 16-bit K and V. */
export interface Parcel {
  readonly prepared: PreparedKeyValue;
  /** Shape and dtype of what was quantized, `[B,Hkv,L,D]` and `[B,Hkv,L,Dv]`. */
  readonly k: TensorView;
  readonly v: TensorView;
}

/** A part of the rows' output over a part of the keys, normalized by its own sum. */
export interface Partial {
  readonly queries: Span;
  /** `[B,H,rows,Dv]` */
  readonly output: TensorView;
  /** `[B,H,rows]` float32, natural logarithm */
  readonly lse: TensorView;
}

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
   * Joins partial outputs: row i of the output is the mean of its parts with weights `exp(lse - logsumexp of all)`, 0 where no part
   * has anything to attend to. Rows of no part are 0, their LSE -Infinity.
   */
  merge(parts: readonly Partial[], output: TensorView, lse: TensorView | undefined): void;
  /** What was enqueued here so far. */
  mark(): unknown;
  /** What is enqueued here from now on comes after it. */
  waitFor(ready: unknown): void;
  /** A tensor of another place, here: itself where memory is shared. What is enqueued here need not wait for it yet. */
  bring(sent: Sent<TensorView>, from: Place): Sent<TensorView>;
  /** Likewise for quantized keys and values. */
  bringParcel(sent: Sent<Parcel>, from: Place): Sent<Parcel>;
  /** Frees a tensor that was made here; one that was not stays. */
  free(view: TensorView): void;
  /** What is freed here from now on is freed after what the others have brought from here. */
  settle(others: readonly Place[]): void;
  dispose(): void;
}

/** What goes from rank to rank. */
export interface Sent<T> {
  readonly value: T;
  /** When it is there: a mark of the place where it is. */
  readonly ready: unknown;
}
