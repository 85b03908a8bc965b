/// <reference lib="esnext.disposable" preserve="true" />
/**
 * Quantized attention for TypeScript: SageAttention on WebAssembly, WebGPU and CUDA.
 *
 * @module sageattention
 */
import { firstKernelFunction, kernelFunction } from './api/sageattn.ts';

export {
  type AppendOptions,
  type AttendOptions,
  KeyValueCache,
  type KeyValueFormat,
  type KeyValueOptions,
  prepareKeyValue,
  type TokenOptions,
} from './api/key-value-cache.ts';
export { Attention, createAttention, type PlannedOptions, type TensorSpec } from './api/planned.ts';
export {
  type AttentionResult,
  type KernelFunction,
  type SparseAttentionResult,
  type SparseOptions,
  sageattn,
  sageattnSparse,
  sageattnVarlen,
  type VarlenOptions,
} from './api/sageattn.ts';
export {
  type AttentionBackwardInputs,
  attentionBackward,
  type Gradients,
  sageattnTrainable,
  TrainableAttention,
} from './api/trainable.ts';
export {
  BACKWARD_PRECISIONS,
  type BackwardPrecision,
  type ForwardResults,
  type GradientOptions,
  type TrainableOptions,
} from './attention/backward.ts';
export type { SparsityResult } from './attention/block-choice.ts';
export { KERNEL_NAMES, type KernelName } from './attention/kernels.ts';
export type { AttentionOptions, BackendName, BlockMask, CausalAlignment, TensorLayout } from './attention/options.ts';
export type { Sparsity } from './attention/sparsity.ts';
export type {
  AttentionInputs,
  AttentionOutputs,
  Availability,
  Backend,
  BlockMap,
  KernelChoice,
  KernelDescriptor,
  SideInputs,
} from './backends/backend.ts';
export { disposeBackends, getBackend, listBackends, setBackend } from './backends/registry.ts';
export {
  BackendUnavailableError,
  type ErrorCode,
  type ErrorDetails,
  ExecutionError,
  InvalidArgumentError,
  MissingPackageError,
  SageAttentionError,
  UnsupportedOptionError,
} from './errors.ts';
export type { ScaleSearch } from './quantization/fp4-blocks.ts';
export type { Granularity, PvAccumDtype, QuerySmoothing } from './quantization/schemes.ts';
export { fromFloat32, toFloat32 } from './tensor/access.ts';
export type { DType, MaskDType } from './tensor/dtype.ts';
export {
  emptyTensor,
  type Float16ArrayLike,
  type LseOf,
  slice,
  type Tensor,
  type TensorData,
  type TensorDataOf,
  type TensorLocation,
  type TensorOptions,
  type TensorView,
  tensor,
  transpose,
} from './tensor/tensor.ts';

/**
 * INT8 QK per block, FP16 PV (float32 on WASM): the portable kernel, on every backend.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention, arXiv 2410.02367, Algorithm 1
 */
export const sageattnQkInt8PvFp16 = kernelFunction('qk-int8-pv-fp16');
/**
 * INT8 QK and PV in integers: the fastest on WASM.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention, arXiv 2410.02367, Algorithm 1, for QK; that P and V are integers too is this project's
 */
export const sageattnQkInt8PvInt8 = kernelFunction('qk-int8-pv-int8');
/**
 * Float32 and nothing quantized: WASM's choice for few keys, and the ground that the others stand beside.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see FlashAttention-2, arXiv 2307.08691, Algorithm 1
 */
export const sageattnExact = kernelFunction('exact');
/**
 * INT8 QK, FP16 PV with three kinds of accumulator; CUDA, sm_80 and later.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention2, arXiv 2411.10958, Algorithm 1
 */
export const sageattnQkInt8PvFp16Cuda = kernelFunction('qk-int8-pv-fp16-cuda');
/**
 * INT8 QK, FP16 PV on Hopper's `wgmma`.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention2, arXiv 2411.10958, Algorithm 1
 */
export const sageattnQkInt8PvFp16CudaSm90 = kernelFunction('qk-int8-pv-fp16-cuda-sm90');
/**
 * INT8 QK, FP8 PV; CUDA, sm_89 and later. `pvAccumDtype: 'fp32+fp16'` is SageAttention2++.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention2, arXiv 2411.10958, Algorithm 1; SageAttention2++, arXiv 2505.21136
 */
export const sageattnQkInt8PvFp8Cuda = kernelFunction('qk-int8-pv-fp8-cuda');
/**
 * INT8 QK, FP8 PV on Hopper's `wgmma`.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention2, arXiv 2411.10958, Algorithm 1
 */
export const sageattnQkInt8PvFp8CudaSm90 = kernelFunction('qk-int8-pv-fp8-cuda-sm90');
/**
 * INT4 QK with Q and K smoothed, FP8 PV; CUDA, sm_89 and later.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention2, arXiv 2411.10958, Algorithm 1
 */
export const sageattnQkInt4PvFp8Cuda = kernelFunction('qk-int4-pv-fp8-cuda');
/**
 * FP4 QK and PV (NVFP4, SageAttention3) on devices without FP4 tensor cores: the same real numbers, multiplied in FP16
 * on GPUs and in float32 on WASM. Four to five times less accurate than INT8 with FP8; for finding out what FP4 does to
 * a model.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention3, arXiv 2505.11594, Algorithm 1
 */
export const sageattnQkFp4PvFp4 = kernelFunction('qk-fp4-pv-fp4');
/**
 * FP4 QK and PV (NVFP4) on the FP4 tensor cores of Blackwell: RTX 50, RTX PRO and DGX Spark (compute capability 12).
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention3, arXiv 2505.11594, Algorithm 1
 */
export const sageattnQkFp4PvFp4Cuda = kernelFunction('qk-fp4-pv-fp4-cuda');
/**
 * FP4 QK with FP8 PV; CUDA, sm_89 and later: about 0.7 of the error of FP4 in both products.
 *
 * Takes the arguments of {@link sageattn} except `kernel`, gives the same results and throws the same errors.
 *
 * @see SageAttention3, arXiv 2505.11594, Algorithm 1, for QK; SageAttention2, arXiv 2411.10958, for PV
 */
export const sageattnQkFp4PvFp8Cuda = kernelFunction('qk-fp4-pv-fp8-cuda');
/**
 * SageAttention3: `qk-fp4-pv-fp4-cuda` where the device has FP4 tensor cores, elsewhere the same numbers by
 * `qk-fp4-pv-fp4`.
 *
 * Takes what Python's `sageattn3_blackwell` takes, `perBlockMean` too, and every option of {@link sageattn} but
 * `kernel`. Keys are not written. Shapes, results and errors are as in {@link sageattn}.
 *
 * @see SageAttention3, arXiv 2505.11594, Algorithm 1
 */
export const sageattn3Blackwell = firstKernelFunction('qk-fp4-pv-fp4-cuda', 'qk-fp4-pv-fp4');
