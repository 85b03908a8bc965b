/** Outputs over parts of the keys, in the memory of one device, become one. */
import type { DType } from '../../tensor/dtype.ts';
import type { CudaDevice } from './driver/device.ts';
import { targetFor } from './kernel-table.ts';
import { MERGE_PARTS, mergePart } from './kernels/merge.ts';
import type { planMerge } from './launches/merge.ts';
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
 * Enqueues the merge on the device's stream: rows of no part, or whose parts saw nothing, are 0 with LSE -Infinity.
 *
 * @param output `[B,H,rows,Dv]`, the last dimension contiguous
 * @param lse `[B,H,rows,1]` float32 contiguous
 */
export function mergeParts(
  device: CudaDevice,
  plan: typeof planMerge,
  parts: readonly MergedPart[],
  output: CudaTensor,
  lse: CudaTensor | undefined,
): void {
  if (parts.length > MERGE_PARTS) {
    // The first ones become one part of all rows.
    const [first, rest] = [parts.slice(0, MERGE_PARTS), parts.slice(MERGE_PARTS)];
    const joined = emptyCudaTensor(device, output.shape, output.dtype);
    const joinedLse = emptyCudaTensor(device, output.shape.slice(0, 3), 'float32');
    try {
      mergeParts(device, plan, first, joined, joinedLse);
      mergeParts(device, plan, [{ start: 0, output: joined, lse: joinedLse }, ...rest], output, lse);
    } finally {
      joined.dispose();
      joinedLse.dispose();
    }
    return;
  }
  const [batch, heads, rows, valueDim] = output.shape as [number, number, number, number];
  const [batchStride, headStride, rowStride] = output.strides as [number, number, number];
  const sequence = plan(
    {
      batch,
      heads,
      rows,
      valueDim,
      dtype: output.dtype as DType,
      strides: [batchStride, headStride, rowStride],
      parts: parts.map((part) => ({ start: part.start, rows: part.output.shape[2] as number })),
      returnLse: lse !== undefined,
    },
    targetFor(device.computeCapability) as Target,
  );
  if (sequence.launches.length === 0) return;
  const bound = new BoundLaunches(device, sequence);
  try {
    const { stream } = device;
    for (const { memory } of parts.flatMap((part) => [part.output, part.lse])) memory.useOn(stream);
    bound.run(stream, [
      ['output', addressOf(output, 0)],
      ...(lse === undefined ? [] : [['lse', addressOf(lse, 0)] as const]),
      ...parts.flatMap((part, i) => {
        const names = mergePart(i);
        return [[names.output, addressOf(part.output, 0)] as const, [names.lse, addressOf(part.lse, 0)] as const];
      }),
    ]);
  } finally {
    bound.dispose();
  }
}
