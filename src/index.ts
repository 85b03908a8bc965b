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
