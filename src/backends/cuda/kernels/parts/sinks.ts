/** Sinks: an extra logit of each head in the sum of its softmax and nowhere else. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset64, pointers } from './addresses.ts';
import { LOG2_E } from './constants.ts';
import { loadElement } from './elements.ts';

/** Parameters of kernels with sinks: where they lie, and the bytes from one head's to the next. */
export const SINK_PARAMETERS = ['sinks', 'sinkStride'] as const;

export interface Sinks {
  readonly dtype: DType;
  readonly parameters: Readonly<Record<(typeof SINK_PARAMETERS)[number], Parameter<'u64'>>>;
}

/** Declares the parameters; undefined without sinks. */
export const sinkParameters = (b: KernelBuilder, dtype: 'none' | DType): Sinks | undefined =>
  dtype === 'none' ? undefined : { dtype, parameters: pointers(b, SINK_PARAMETERS) };

/** A head's sink in base 2; 0 where `inside` does not hold, and nothing is read. */
export function loadSink(
  b: KernelBuilder,
  { dtype, parameters }: Sinks,
  head: Reg<'u32'>,
  inside: Reg<'pred'>,
): Reg<'f32'> {
  const address = offset64(b, b.loadPointer(parameters.sinks), head, b.loadParameter(parameters.sinkStride));
  return b.mul(loadElement(b, dtype, address, 0, inside), LOG2_E);
}

/**
 * What a sink makes of a row, all in base 2: its output is multiplied by `keep`.
 *
 * @param lse of the row's keys; -Infinity if it saw none
 */
export function joinSink(
  b: KernelBuilder,
  lse: Reg<'f32'>,
  sink: Reg<'f32'>,
): { readonly keep: Reg<'f32'>; readonly lse: Reg<'f32'> } {
  const above = b.sub(sink, lse);
  const keep = b.rcp(b.add(b.ex2(above), 1));
  const joint = b.add(b.max(sink, lse), b.lg2(b.add(b.ex2(b.mul(b.abs(above), -1)), 1)));
  // No sink; the difference of two infinities would be NaN.
  b.when(b.setp('eq', sink, Number.NEGATIVE_INFINITY), () => {
    b.set(keep, 1);
    b.mov(lse, joint);
  });
  return { keep, lse: joint };
}
