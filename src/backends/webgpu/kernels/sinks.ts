/**
 * Sinks: an extra logit of each head in the sum of its softmax and nowhere else. A row of quantized Q carries its head's
 * sink in the last word of its facts, so that attention kernels need no binding for it; partial results carry it on to
 * the merging kernel, which alone adds it then.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { bitsLoader } from './storage.ts';

/** Parameters of kernels that prepare Q with sinks; element `head * sinkStride + sinkOffset` is a head's. */
export const SINK_PARAMS = ['sinkStride', 'sinkOffset'] as const;

export const sinkParams = (sinks: DType | undefined): readonly string[] => (sinks === undefined ? [] : SINK_PARAMS);

/** Binding 6, and `sink_of(head) -> u32`: the word that rows carry. WGSL knows no infinities: the largest numbers mean them. */
export const sinkReader = (dtype: DType | undefined): string =>
  dtype === undefined
    ? ''
    : `
${bitsLoader('sinks', 'sink_bits_at', 6, dtype)}
fn sink_of(head: u32) -> u32 {
  let bits = sink_bits_at(head * P.sinkStride + P.sinkOffset);
  if ((bits & 0x7f800000u) == 0x7f800000u) { return select(${SINK_WORD.none}, ${SINK_WORD.all}, bits >> 31u == 0u); }
  return bitcast<u32>(clamp(bitcast<f32>(bits), -3.3e38f, 3.3e38f));
}
fn sink_is_nan(head: u32) -> bool {
  return (sink_bits_at(head * P.sinkStride + P.sinkOffset) & 0x7fffffffu) > 0x7f800000u;
}`;

/** The largest float32 numbers: -Infinity and Infinity. */
const SINK_WORD = { none: '0xff7fffffu', all: '0x7f7fffffu' };

/**
 * `join_sink(sink, lse)`: what a row with this natural logsumexp is multiplied by, and the logsumexp with the sink.
 * `joined_lse(sink, sum, lse)`: its bits, where `sum` is 0 for a row that attends to nothing.
 */
export const JOIN_SINK = `
fn join_sink(sink: f32, lse: f32) -> vec2<f32> {
  if (sink < -3.35e38f) { return vec2<f32>(1.0, lse); }
  let above = clamp(sink - lse, -87.0, 87.0);
  return vec2<f32>(1.0 / (1.0 + exp(above)), max(sink, lse) + log(1.0 + exp(-abs(above))));
}
fn joined_lse(sink: f32, sum: f32, lse: f32) -> u32 {
  if (abs(sink) > 3.35e38f) {
    if (sink > 0.0) { return 0x7f800000u; }
    return select(bitcast<u32>(lse), 0xff800000u, sum == 0.0);
  }
  return bitcast<u32>(select(join_sink(sink, lse).y, sink, sum == 0.0));
}`;
