/// <reference lib="esnext.disposable" preserve="true" />
/**
 * `sageattention/cuda`: tensors in the memory of NVIDIA GPUs, streams, graphs, and a CUDA backend of chosen options.
 *
 * @module sageattention/cuda
 */
export {
  CudaBackend,
  type CudaBackendOptions,
  createCudaBackend,
} from './backend.ts';
export { type CaptureOptions, capture, captureAttention } from './capture.ts';
export type { CudaApi } from './driver/api.ts';
export { Cuda, CudaDevice, openCuda } from './driver/device.ts';
export { CudaGraph } from './driver/graph.ts';
export { DeviceMemory, PinnedBuffer } from './driver/memory.ts';
export { CudaError } from './driver/status.ts';
export { CudaEvent, CudaStream } from './driver/stream.ts';
export { CUDA_KERNELS, DEFAULT_KERNELS, defaultKernelFor, MINIMUM_COMPUTE_CAPABILITY } from './kernel-table.ts';
export {
  createKeyValuePages,
  KeyValuePages,
  type KeyValuePagesOptions,
  type PagedAttendOptions,
  type PagedResult,
  type PageTable,
} from './key-value-pages.ts';
export type * from './launches/launch.ts';
export type { PagePlanner } from './launches/pages.ts';
export type { LaunchPlanner } from './launches/plan.ts';
export { type CudaBackwardPlan, CudaPlan } from './plan.ts';
export { CapturedAttention } from './run/captured.ts';
export { CapturedCalls } from './run/captured-calls.ts';
export {
  type CudaTensor,
  cudaTensorFromPointer,
  cudaTensorOn,
  download,
  downloadAsync,
  emptyCudaTensor,
  isCudaTensor,
  type StreamOption,
  upload,
  uploadAsync,
} from './tensor.ts';
