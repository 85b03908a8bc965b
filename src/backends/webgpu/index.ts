/// <reference lib="esnext.disposable" preserve="true" />
/**
 * `sageattention/webgpu`: attention in browsers and, through the package `webgpu`, in Node.
 *
 * @module sageattention/webgpu
 */
export { createWebgpuBackend, WebgpuBackend, type WebgpuBackendOptions } from './backend.ts';
export type { Capabilities, MatrixConfig } from './capabilities.ts';
export { DAWN_FLAGS, type DeviceOptions, findGpu } from './device.ts';
export { FAMILIES, type Family } from './families/family.ts';
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
