/// <reference lib="esnext.disposable" preserve="true" />
/** `sageattention/webgpu`: attention in browsers and, through the package `webgpu`, in Node. */
export { createWebgpuBackend, WebgpuBackend, type WebgpuBackendOptions } from './backend.ts';
export type { Capabilities, MatrixConfig } from './capabilities.ts';
export { DAWN_FLAGS, type DeviceOptions, findGpu } from './device.ts';
export { FAMILIES, type Family } from './families/choose.ts';
export { type EncodeOptions, type PlanDetails, type PlanOptions, WebgpuPlan } from './plan.ts';
export {
  downloadTensor,
  emptyGpuTensor,
  type GpuTensor,
  type GpuTensorOptions,
  gpuTensor,
  uploadTensor,
} from './tensor.ts';
