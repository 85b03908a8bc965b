/** Gradients in float32 to a 16-bit type: where rows have an odd number of channels, two of them share a word. */
import type { DType } from '../../../../tensor/dtype.ts';
import { params } from '../layout.ts';
import { NAN_WORD, outputPacker } from '../storage.ts';

export const NARROW_PARAMS = ['blockStart', 'count', 'fromBase', 'toBase'] as const;

/** Words that a workgroup writes. */
export const NARROW_WORDS = 1024;
const THREADS = 256;

export const narrowKernel = (dtype: DType): string => `
${params(0, NARROW_PARAMS)}
@group(0) @binding(1) var<storage, read> wide: array<u32>;
@group(0) @binding(2) var<storage, read_write> narrow: array<u32>;
${outputPacker(dtype)}
fn is_nan(bits: u32) -> bool { return (bits & 0x7fffffffu) > 0x7f800000u; }

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  for (var i = lid; i < ${NARROW_WORDS}u; i += ${THREADS}u) {
    let word = (P.blockStart + group.x) * ${NARROW_WORDS}u + i;
    if (2u * word >= P.count) { continue; }
    let at = 2u * word - P.fromBase;
    let low = wide[at];
    let high = select(0u, wide[at + 1u], 2u * word + 1u < P.count);
    let nan = select(0u, 0xffffu, is_nan(low)) | select(0u, 0xffff0000u, is_nan(high));
    let x = pack_output(bitcast<f32>(select(low, 0u, is_nan(low))), bitcast<f32>(select(high, 0u, is_nan(high))));
    narrow[word - P.toBase] = (x & ~nan) | (${NAN_WORD[dtype]} & nan);
  }
}`;
