/// <reference lib="esnext.disposable" preserve="true" />
/**
 * `sageattention/webgpu`: attention in browsers and, through the package `webgpu`, in Node.
 *
 * @module sageattention/webgpu
 */
export { createWebgpuBackend, WebgpuBackend, type WebgpuBackendOptions } from './backend.ts';
export type { Capabilities, MatrixConfig } from './capabilities.ts';
export { DAWN_FLAGS, type DeviceOptions, findGpu } from './device.ts';
export { FAMILIES, type Family } from './families/names.ts';
export { type PlanDetails, WebgpuPlan } from './plan.ts';
export type { EncodeOptions } from './program.ts';
export {
  downloadTensor,
  emptyGpuTensor,
  type GpuTensor,
  type GpuTensorOptions,
  gpuTensor,
  uploadTensor,
} from './tensor.ts';
export type { TuningShape } from './tuning/measure.ts';
export type { QueryClass, TunedEntry, TunedTime, Tuning } from './tuning/record.ts';
export { tune } from './tuning/tune.ts';
