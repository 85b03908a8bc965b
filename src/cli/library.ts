/**
 * All that the commands use of the library, in one place. The bundle of the command line leaves these imports alone, so
 * that it runs the very code that programs import.
 */
export { createProblem } from '../attention/problem.ts';
export { TARGETS } from '../backends/cuda/ptx/targets.ts';
export { FAMILIES } from '../backends/webgpu/families/names.ts';
export { messageOf } from '../errors.ts';
export * from '../index.ts';
export * from '../models/sentence-encoder/index.ts';
export { attentionExact } from '../reference/exact.ts';
export { type Accuracy, compare } from '../reference/metrics.ts';
export { toFloat32, writeValues } from '../tensor/access.ts';
export { parseSafetensors, type SafetensorsEntry } from '../tensor/safetensors.ts';
export { NativeFloat16Array } from '../tensor/tensor.ts';
