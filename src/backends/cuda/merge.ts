/** Outputs over parts of the keys, in the memory of one device, become one; gradients are added. */
import type { DType } from '../../tensor/dtype.ts';
import type { CudaDevice } from './driver/device.ts';
import { targetFor } from './kernel-table.ts';
import { MERGE_PARTS, mergePart } from './kernels/merge.ts';
import type { planMerge, planSum } from './launches/merge.ts';
import type { Target } from './ptx/targets.ts';
import { BoundLaunches } from './run/bound-launches.ts';
import { addressOf } from './run/operands.ts';
import { type CudaTensor, emptyCudaTensor } from './tensor.ts';

export interface MergedPart {
  /** First row of the output that the part is of. */
  readonly start: number;
  /** `[B,H,rows,Dv]` contiguous */
  readonly output: CudaTensor;
  /** `[B,H,rows]` float32 contiguous */
  readonly lse: CudaTensor;
}

/**
 * Merges of one shape: the launch is planned by the first and kept for those that follow, which must have the same parts and the same
 * strides.
 */
export class PartsMerge {
  readonly #device: CudaDevice;
  readonly #plan: typeof planMerge;
  #bound: BoundLaunches | undefined;
  /** Of the first parts, and of what they became with the others, where one launch does not take all. */
  #first: PartsMerge | undefined;
  #rest: PartsMerge | undefined;

  constructor(device: CudaDevice, plan: typeof planMerge) {
    this.#device = device;
    this.#plan = plan;
  }

  /**
   * Enqueues the merge on the device's stream: rows of no part, or whose parts saw nothing, are 0 with LSE -Infinity.
   *
   * @param output `[B,H,rows,Dv]`, the last dimension contiguous
   * @param lse `[B,H,rows,1]` float32 contiguous
   */
  run(parts: readonly MergedPart[], output: CudaTensor, lse: CudaTensor | undefined): void {
    const device = this.#device;
    device.inContext(() => {
      if (parts.length <= MERGE_PARTS) this.#launch(parts, output, lse);
      else this.#inTwo(parts, output, lse);
    });
  }

  #inTwo(parts: readonly MergedPart[], output: CudaTensor, lse: CudaTensor | undefined): void {
    // The first ones become one part of all rows.
    const [first, rest] = [parts.slice(0, MERGE_PARTS), parts.slice(MERGE_PARTS)];
    const joined = emptyCudaTensor(this.#device, output.shape, output.dtype);
    const joinedLse = emptyCudaTensor(this.#device, output.shape.slice(0, 3), 'float32');
    try {
      this.#first ??= new PartsMerge(this.#device, this.#plan);
      this.#first.#launch(first, joined, joinedLse);
      this.#rest ??= new PartsMerge(this.#device, this.#plan);
      this.#rest.run([{ start: 0, output: joined, lse: joinedLse }, ...rest], output, lse);
    } finally {
      joined.dispose();
      joinedLse.dispose();
    }
  }

  #launch(parts: readonly MergedPart[], output: CudaTensor, lse: CudaTensor | undefined): void {
    const device = this.#device;
    this.#bound ??= new BoundLaunches(
      device,
      this.#plan(problemOf(parts, output, lse !== undefined), targetOf(device)),
    );
    if (this.#bound.launches.kernels.length === 0) return;
    const { stream } = device;
    for (const { memory } of parts.flatMap((part) => [part.output, part.lse])) memory.useOn(stream);
    this.#bound.run(stream, [
      ['output', addressOf(output, 0)],
      ...(lse === undefined ? [] : [['lse', addressOf(lse, 0)] as const]),
      ...parts.flatMap((part, i) => {
        const names = mergePart(i);
        return [[names.output, addressOf(part.output, 0)] as const, [names.lse, addressOf(part.lse, 0)] as const];
      }),
    ]);
  }

  dispose(): void {
    for (const each of [this.#first, this.#rest, this.#bound]) each?.dispose();
    this.#first = undefined;
    this.#rest = undefined;
    this.#bound = undefined;
  }
}

const targetOf = (device: CudaDevice) => targetFor(device.computeCapability) as Target;

function problemOf(parts: readonly MergedPart[], output: CudaTensor, returnLse: boolean) {
  const [batch, heads, rows, valueDim] = output.shape as [number, number, number, number];
  const [batchStride, headStride, rowStride] = output.strides as [number, number, number];
  return {
    batch,
    heads,
    rows,
    valueDim,
    dtype: output.dtype as DType,
    strides: [batchStride, headStride, rowStride] as const,
    parts: parts.map((part) => ({ start: part.start, rows: part.output.shape[2] as number })),
    returnLse,
  };
}

/** A part of a sum, float32, contiguous. */
export interface SummedPart {
  /** First row of the output that the part is of. */
  readonly start: number;
  /** `[B,H,rows,dim]` */
  readonly values: CudaTensor;
}

/**
 * Enqueues a sum of parts on the device's stream; rows of no part are 0.
 *
 * @param output `[B,H,rows,dim]` of any dtype, the last dimension contiguous
 */
export function sumParts(
  device: CudaDevice,
  plan: typeof planSum,
  parts: readonly SummedPart[],
  output: CudaTensor,
): void {
  if (parts.length > MERGE_PARTS) {
    const joined = emptyCudaTensor(device, output.shape, 'float32');
    try {
      sumParts(device, plan, parts.slice(0, MERGE_PARTS), joined);
      sumParts(device, plan, [{ start: 0, values: joined }, ...parts.slice(MERGE_PARTS)], output);
    } finally {
      joined.dispose();
    }
    return;
  }
  const rowsOf = parts.map(({ start, values }) => ({ start, output: values, lse: values }));
  const { valueDim: dim, returnLse: _, ...shape } = problemOf(rowsOf, output, false);
  device.inContext(() => {
    const sequence = plan({ ...shape, dim }, targetOf(device));
    if (sequence.launches.length === 0) return;
    const bound = new BoundLaunches(device, sequence);
    try {
      const { stream } = device;
      for (const { values } of parts) values.memory.useOn(stream);
      bound.run(stream, [
        ['output', addressOf(output, 0)],
        ...parts.map(({ values }, i) => [mergePart(i).output, addressOf(values, 0)] as const),
      ]);
    } finally {
      bound.dispose();
    }
  });
}
