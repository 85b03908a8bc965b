/** Tensors of this process as bytes that can be copied to the kernels' memory in one go. */
import type { BlockLayout, MaskLayout, SinksLayout } from '../../attention/problem.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { decodeRun } from '../../tensor/access.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import { extentOf, type OperandLayout, type Tensor, type TensorData, type TensorView } from '../../tensor/tensor.ts';

/** Inputs with copies of the caller's data, for a call that cannot be made ready at once. */
export function ownInputs<Inputs extends object>(inputs: Inputs): Inputs {
  const own = (view: Tensor): Tensor => {
    const { data } = view;
    // What was transferred has nothing to copy, and is refused when it is staged.
    if (data.byteLength === 0) return view;
    const { buffer } = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
    const Data = data.constructor as new (buffer: ArrayBufferLike) => TensorData;
    return { ...view, data: new Data(buffer) };
  };
  const entries = Object.entries(inputs).map(([name, view]) => [name, view === undefined ? view : own(view as Tensor)]);
  return Object.fromEntries(entries);
}

/** Vector loads may reach this much beyond the last element. */
export const PADDING_BYTES = 64;

/** Equally long pieces of a source, in three nested loops: in bytes. */
export interface Runs {
  readonly length: number;
  readonly counts: readonly [number, number, number];
  readonly strides: readonly [number, number, number];
}

export interface Staged<Layout> {
  readonly bytes: Uint8Array;
  /** Which of the bytes count, without gaps between them; default: all. */
  readonly runs?: Runs | undefined;
  /** Layout of the elements that count. */
  readonly layout: Layout;
}

/** Copies runs to where `target` has room for them, from `to` on. */
export function copyRuns(source: Uint8Array, { length, counts, strides }: Runs, target: Uint8Array, to: number): void {
  let at = to;
  for (let i = 0; i < counts[0]; i++) {
    for (let j = 0; j < counts[1]; j++) {
      for (let k = 0; k < counts[2]; k++, at += length) {
        const from = i * strides[0] + j * strides[1] + k * strides[2];
        target.set(source.subarray(from, from + length), at);
      }
    }
  }
}

export const runsBytes = ({ length, counts: [i, j, k] }: Runs): number => i * j * k * length;

/** Runs in memory of their own. */
export function gather(source: Uint8Array, runs: Runs): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(runsBytes(runs));
  copyRuns(source, runs, bytes, 0);
  return bytes;
}

/** How many of each the operand has. */
export interface OperandExtent {
  readonly batch: number;
  readonly heads: number;
  readonly tokens: number;
  readonly dim: number;
}

/**
 * A buffer may have been transferred or made smaller since its tensor was described.
 *
 * @throws {InvalidArgumentError} `buffer-too-small`
 */
function requireBytes(argument: string, data: TensorData, needed: number): void {
  if (data.byteLength >= needed) return;
  const received = data.byteLength === 0 ? 'none: the buffer was transferred or made smaller' : `${data.byteLength}`;
  throw new InvalidArgumentError('buffer-too-small', argument, `data of at least ${needed} bytes`, received);
}

/** The same in memory of its own, for a call that must wait. */
export function keep<Layout>({ bytes, layout, runs }: Staged<Layout>): Staged<Layout> {
  return { bytes: runs === undefined ? bytes.slice() : gather(bytes, runs), layout };
}

/** A span with at most this many times the elements that count is copied whole: one fast copy beats many small ones. */
const LARGEST_SPAN_RATIO = 1.5;

/**
 * The elements of an operand, in the caller's data: all of a span where they lie close together, else runs of it.
 *
 * @throws {InvalidArgumentError} `buffer-too-small`
 */
export function stageOperand(
  argument: string,
  view: TensorView,
  layout: OperandLayout,
  extent: OperandExtent,
): Staged<OperandLayout> {
  const { data, dtype } = view as Tensor;
  const size = BYTES_PER_ELEMENT[dtype];
  const { batch, heads, tokens, dim } = extent;
  const count = batch * heads * tokens * dim;
  if (count === 0) {
    return { bytes: new Uint8Array(0), layout: { offset: 0, batchStride: 0, headStride: 0, tokenStride: 0 } };
  }
  const { offset, batchStride, headStride, tokenStride } = layout;
  const span = (batch - 1) * batchStride + (heads - 1) * headStride + (tokens - 1) * tokenStride + dim;
  requireBytes(argument, data, (offset + span) * size);
  const source = new Uint8Array(data.buffer, data.byteOffset + offset * size, span * size);
  if (span <= count * LARGEST_SPAN_RATIO) {
    return { bytes: source, layout: { offset: 0, batchStride, headStride, tokenStride } };
  }
  // Heads of a token next to each other (NHD) go in one run.
  const runHeads = headStride === dim ? heads : 1;
  const runs: Runs = {
    length: runHeads * dim * size,
    counts: [batch, heads / runHeads, tokens],
    strides: [batchStride * size, headStride * size, tokenStride * size],
  };
  const gathered =
    runHeads === heads ? { headStride: dim, tokenStride: heads * dim } : { headStride: tokens * dim, tokenStride: dim };
  // Packed sequences of different lengths are one batch entry: no stride leads to another.
  return {
    bytes: source,
    runs,
    layout: { offset: 0, batchStride: batch === 1 ? 0 : heads * tokens * dim, ...gathered },
  };
}

/** The mask's elements, from the first that counts to the last: masks are dense or broadcast. */
export function stageMask(
  view: TensorView,
  layout: MaskLayout,
  lengths: readonly [batch: number, heads: number, queries: number, keys: number],
): Staged<MaskLayout> {
  return stageSpan('attnMask', view, layout, lengths, BYTES_PER_ELEMENT[layout.dtype]);
}

/**
 * Likewise the bytes of a map of blocks.
 *
 * @param shape as `blockShapeOf` gives it
 */
export const stageBlocks = (view: TensorView, layout: BlockLayout, shape: readonly number[]): Staged<BlockLayout> =>
  stageSpan('blockMask.map', view, layout, shape, 1);

function stageSpan<L extends { readonly offset: number; readonly strides: readonly number[] }>(
  argument: string,
  view: TensorView,
  layout: L,
  shape: readonly number[],
  size: number,
): Staged<L> {
  const { offset, strides } = layout;
  const end = extentOf({ shape, strides, offset }) * size;
  if (end === 0) return { bytes: new Uint8Array(0), layout };
  const { data } = view as Tensor;
  requireBytes(argument, data, end);
  const bytes = new Uint8Array(data.buffer, data.byteOffset + offset * size, end - offset * size);
  return { bytes, layout: { ...layout, offset: 0 } };
}

/** Sinks in float32, in memory of their own. */
export function stageSinks(view: TensorView, { offset, stride }: SinksLayout, heads: number): Staged<undefined> {
  const source = view as Tensor;
  const elements = extentOf({ shape: [heads], strides: [stride], offset });
  requireBytes('sinks', source.data, elements * BYTES_PER_ELEMENT[view.dtype]);
  const values = new Float32Array(heads);
  decodeRun(source, offset, stride, heads, values, 0);
  return { bytes: new Uint8Array(values.buffer), layout: undefined };
}
