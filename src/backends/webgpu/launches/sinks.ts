/** Sinks on their way into the rows of quantized Q. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import type { Binding, BufferName, Unit } from './launch.ts';

/** The binding of the sinks of a unit's heads; none without sinks. */
export function sinkSpans({ sinks }: AttentionProblem, { heads: [first, end] }: Unit): Binding[] {
  if (sinks === undefined) return [];
  const at = [first, end - 1].map((head) => sinks.offset + head * sinks.stride) as [number, number];
  const bytes = BYTES_PER_ELEMENT[sinks.dtype];
  return [{ slot: 6, buffer: 'sinks', start: Math.min(...at) * bytes, end: (Math.max(...at) + 1) * bytes }];
}

/** Values of `SINK_PARAMS`; none without sinks. */
export const sinkValues = (
  { sinks }: AttentionProblem,
  base: (buffer: BufferName) => number,
): Readonly<Record<string, number>> =>
  sinks === undefined
    ? {}
    : { sinkStride: sinks.stride, sinkOffset: sinks.offset - base('sinks') / BYTES_PER_ELEMENT[sinks.dtype] };
