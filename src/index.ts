/**
 * Quantized attention for TypeScript: SageAttention on WebAssembly, WebGPU and CUDA.
 *
 * @packageDocumentation
 */
import { kernelFunction } from './attention/sageattn.ts';

export {
  BackendUnavailableError,
  type ErrorCode,
  type ErrorDetails,
  ExecutionError,
  InvalidArgumentError,
  MissingPackageError,
  SageAttentionError,
  UnsupportedOptionError,
} from './attention/errors.ts';
export { KERNEL_NAMES, type KernelName } from './attention/kernels.ts';
export {
  type AttendOptions,
  KeyValueCache,
  type KeyValueOptions,
  prepareKeyValue,
} from './attention/key-value-cache.ts';
export type { AttentionOptions, CausalAlignment, TensorLayout } from './attention/options.ts';
export {
  Attention,
  type AttentionResult,
  createAttention,
  type KernelFunction,
  sageattn,
  sageattnVarlen,
  type TensorSpec,
  type VarlenOptions,
} from './attention/sageattn.ts';
export type {
  AttentionInputs,
  AttentionOutputs,
  Availability,
  Backend,
  BackendName,
  KernelChoice,
  KernelDescriptor,
} from './backends/backend.ts';
export { disposeBackends, getBackend, listBackends, setBackend } from './backends/registry.ts';
export type { Granularity, PvAccumDtype } from './quantization/schemes.ts';
export type { DType, MaskDType } from './tensor/dtype.ts';
export {
  emptyTensor,
  type Float16ArrayLike,
  slice,
  type Tensor,
  type TensorData,
  type TensorLocation,
  type TensorOptions,
  type TensorView,
  tensor,
  transpose,
} from './tensor/tensor.ts';

/** INT8 QK per block, FP16 PV (float32 on WASM): the portable kernel. SageAttention, arXiv 2410.02367, Algorithm 1. */
export const sageattnQkInt8PvFp16 = kernelFunction('qk-int8-pv-fp16');
/** INT8 QK and integer PV: the fastest on WASM. */
export const sageattnQkInt8PvInt8 = kernelFunction('qk-int8-pv-int8');
/** INT8 QK, FP16 PV with three accumulators; CUDA, sm_80 and later. SageAttention2, arXiv 2411.10958. */
export const sageattnQkInt8PvFp16Cuda = kernelFunction('qk-int8-pv-fp16-cuda');
/** INT8 QK, FP16 PV on Hopper's `wgmma`. */
export const sageattnQkInt8PvFp16CudaSm90 = kernelFunction('qk-int8-pv-fp16-cuda-sm90');
/** INT8 QK, FP8 PV; CUDA, sm_89 and later. SageAttention2, arXiv 2411.10958; accumulator 'fp32+fp16': 2++, arXiv 2505.21136. */
export const sageattnQkInt8PvFp8Cuda = kernelFunction('qk-int8-pv-fp8-cuda');
/** INT8 QK, FP8 PV on Hopper's `wgmma`. SageAttention2, arXiv 2411.10958. */
export const sageattnQkInt8PvFp8CudaSm90 = kernelFunction('qk-int8-pv-fp8-cuda-sm90');
/** INT4 QK with Q and K smoothed, FP8 PV; CUDA, sm_89 and later. SageAttention2, arXiv 2411.10958, section 3. */
export const sageattnQkInt4PvFp8Cuda = kernelFunction('qk-int4-pv-fp8-cuda');
