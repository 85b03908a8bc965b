/**
 * The part of the CUDA driver API that this backend calls, as data: `koffi` binds the table, the fake driver of the
 * tests implements the same functions, and a test compares the table with `cuda.h`.
 */

import type { BoundLibrary, Functions, FunctionTable } from './bind.ts';

/**
 * Every function with its exported symbol (the version suffix is part of the ABI) and its parameters. All return
 * CUresult. `optional`: absent from older drivers, and not needed for attention itself.
 */
export const DRIVER_FUNCTIONS = {
  cuInit: { symbol: 'cuInit', parameters: ['u32'] },
  cuDriverGetVersion: { symbol: 'cuDriverGetVersion', parameters: ['memory'] },
  cuGetErrorName: { symbol: 'cuGetErrorName', parameters: ['s32', 'memory'] },
  cuGetErrorString: { symbol: 'cuGetErrorString', parameters: ['s32', 'memory'] },

  cuDeviceGetCount: { symbol: 'cuDeviceGetCount', parameters: ['memory'] },
  cuDeviceGet: { symbol: 'cuDeviceGet', parameters: ['memory', 's32'] },
  cuDeviceGetName: { symbol: 'cuDeviceGetName', parameters: ['memory', 's32', 's32'] },
  cuDeviceGetAttribute: { symbol: 'cuDeviceGetAttribute', parameters: ['memory', 's32', 's32'] },
  cuDeviceCanAccessPeer: { symbol: 'cuDeviceCanAccessPeer', parameters: ['memory', 's32', 's32'] },
  cuDeviceTotalMem: { symbol: 'cuDeviceTotalMem_v2', parameters: ['memory', 's32'] },

  cuDevicePrimaryCtxRetain: { symbol: 'cuDevicePrimaryCtxRetain', parameters: ['memory', 's32'] },
  cuDevicePrimaryCtxRelease: { symbol: 'cuDevicePrimaryCtxRelease_v2', parameters: ['s32'] },
  cuCtxPushCurrent: { symbol: 'cuCtxPushCurrent_v2', parameters: ['u64'] },
  cuCtxPopCurrent: { symbol: 'cuCtxPopCurrent_v2', parameters: ['memory'] },
  cuCtxEnablePeerAccess: { symbol: 'cuCtxEnablePeerAccess', parameters: ['u64', 'u32'] },
  cuCtxGetCurrent: { symbol: 'cuCtxGetCurrent', parameters: ['memory'] },

  cuStreamCreate: { symbol: 'cuStreamCreate', parameters: ['memory', 'u32'] },
  cuStreamDestroy: { symbol: 'cuStreamDestroy_v2', parameters: ['u64'] },
  cuStreamSynchronize: { symbol: 'cuStreamSynchronize', parameters: ['u64'] },
  cuStreamWaitEvent: { symbol: 'cuStreamWaitEvent', parameters: ['u64', 'u64', 'u32'] },
  cuStreamIsCapturing: { symbol: 'cuStreamIsCapturing', parameters: ['u64', 'memory'] },
  cuStreamBeginCapture: { symbol: 'cuStreamBeginCapture_v2', parameters: ['u64', 'u32'] },
  cuStreamGetCaptureInfo: {
    symbol: 'cuStreamGetCaptureInfo_v3',
    parameters: ['u64', 'memory', 'memory', 'memory', 'memory', 'memory', 'memory'],
    optional: true,
  },
  cuStreamEndCapture: { symbol: 'cuStreamEndCapture', parameters: ['u64', 'memory'] },

  cuEventCreate: { symbol: 'cuEventCreate', parameters: ['memory', 'u32'] },
  cuEventDestroy: { symbol: 'cuEventDestroy_v2', parameters: ['u64'] },
  cuEventRecord: { symbol: 'cuEventRecord', parameters: ['u64', 'u64'] },
  cuEventQuery: { symbol: 'cuEventQuery', parameters: ['u64'] },
  cuEventSynchronize: { symbol: 'cuEventSynchronize', parameters: ['u64'] },
  cuEventElapsedTime: { symbol: 'cuEventElapsedTime', parameters: ['memory', 'u64', 'u64'] },

  cuMemGetInfo: { symbol: 'cuMemGetInfo_v2', parameters: ['memory', 'memory'] },
  cuMemAlloc: { symbol: 'cuMemAlloc_v2', parameters: ['memory', 'u64'] },
  cuMemFree: { symbol: 'cuMemFree_v2', parameters: ['u64'] },
  cuMemPoolCreate: { symbol: 'cuMemPoolCreate', parameters: ['memory', 'memory'], optional: true },
  cuMemPoolDestroy: { symbol: 'cuMemPoolDestroy', parameters: ['u64'], optional: true },
  cuMemPoolSetAttribute: { symbol: 'cuMemPoolSetAttribute', parameters: ['u64', 's32', 'memory'], optional: true },
  cuMemPoolSetAccess: { symbol: 'cuMemPoolSetAccess', parameters: ['u64', 'memory', 'u64'], optional: true },
  cuMemPoolTrimTo: { symbol: 'cuMemPoolTrimTo', parameters: ['u64', 'u64'], optional: true },
  cuMemAllocFromPoolAsync: {
    symbol: 'cuMemAllocFromPoolAsync',
    parameters: ['memory', 'u64', 'u64', 'u64'],
    optional: true,
  },
  cuMemFreeAsync: { symbol: 'cuMemFreeAsync', parameters: ['u64', 'u64'], optional: true },
  cuIpcGetMemHandle: { symbol: 'cuIpcGetMemHandle', parameters: ['memory', 'u64'], optional: true },
  cuIpcOpenMemHandle: { symbol: 'cuIpcOpenMemHandle_v2', parameters: ['memory', 'bytes64', 'u32'], optional: true },
  cuIpcCloseMemHandle: { symbol: 'cuIpcCloseMemHandle', parameters: ['u64'], optional: true },
  cuMemHostRegister: { symbol: 'cuMemHostRegister_v2', parameters: ['memory', 'u64', 'u32'] },
  cuMemHostUnregister: { symbol: 'cuMemHostUnregister', parameters: ['memory'] },
  cuMemcpyHtoDAsync: { symbol: 'cuMemcpyHtoDAsync_v2', parameters: ['u64', 'memory', 'u64', 'u64'] },
  cuMemcpyDtoHAsync: { symbol: 'cuMemcpyDtoHAsync_v2', parameters: ['memory', 'u64', 'u64', 'u64'] },
  cuMemcpyDtoDAsync: { symbol: 'cuMemcpyDtoDAsync_v2', parameters: ['u64', 'u64', 'u64', 'u64'] },
  cuMemcpyPeerAsync: { symbol: 'cuMemcpyPeerAsync', parameters: ['u64', 'u64', 'u64', 'u64', 'u64', 'u64'] },
  cuMemcpy2DAsync: { symbol: 'cuMemcpy2DAsync_v2', parameters: ['memory', 'u64'] },
  cuMemsetD8Async: { symbol: 'cuMemsetD8Async', parameters: ['u64', 'u8', 'u64', 'u64'] },

  cuModuleLoadDataEx: { symbol: 'cuModuleLoadDataEx', parameters: ['memory', 'memory', 'u32', 'memory', 'memory'] },
  cuLinkCreate: { symbol: 'cuLinkCreate_v2', parameters: ['u32', 'memory', 'memory', 'memory'], optional: true },
  cuLinkAddData: {
    symbol: 'cuLinkAddData_v2',
    parameters: ['u64', 's32', 'memory', 'u64', 'memory', 'u32', 'memory', 'memory'],
    optional: true,
  },
  cuLinkComplete: { symbol: 'cuLinkComplete', parameters: ['u64', 'memory', 'memory'], optional: true },
  cuLinkDestroy: { symbol: 'cuLinkDestroy', parameters: ['u64'], optional: true },
  cuModuleUnload: { symbol: 'cuModuleUnload', parameters: ['u64'] },
  cuModuleGetFunction: { symbol: 'cuModuleGetFunction', parameters: ['memory', 'u64', 'memory'] },
  cuFuncGetAttribute: { symbol: 'cuFuncGetAttribute', parameters: ['memory', 's32', 'u64'] },
  cuFuncSetAttribute: { symbol: 'cuFuncSetAttribute', parameters: ['u64', 's32', 's32'] },

  cuLaunchKernel: {
    symbol: 'cuLaunchKernel',
    parameters: ['u64', 'u32', 'u32', 'u32', 'u32', 'u32', 'u32', 'u32', 'u64', 'memory', 'memory'],
  },
  cuLaunchKernelEx: { symbol: 'cuLaunchKernelEx', parameters: ['memory', 'u64', 'memory', 'memory'], optional: true },
  cuTensorMapEncodeTiled: {
    symbol: 'cuTensorMapEncodeTiled',
    parameters: ['memory', 's32', 'u32', 'u64', 'memory', 'memory', 'memory', 'memory', 's32', 's32', 's32', 's32'],
    optional: true,
  },

  cuGraphInstantiate: { symbol: 'cuGraphInstantiateWithFlags', parameters: ['memory', 'u64', 'u64'] },
  cuGraphLaunch: { symbol: 'cuGraphLaunch', parameters: ['u64', 'u64'] },
  cuGraphExecKernelNodeSetParams: {
    symbol: 'cuGraphExecKernelNodeSetParams_v2',
    parameters: ['u64', 'u64', 'memory'],
    optional: true,
  },
  cuGraphExecDestroy: { symbol: 'cuGraphExecDestroy', parameters: ['u64'] },
  cuGraphDestroy: { symbol: 'cuGraphDestroy', parameters: ['u64'] },
} as const satisfies FunctionTable;

export type DriverFunctionName = keyof typeof DRIVER_FUNCTIONS;

/** The functions themselves, under the names of `cuda.h`; each returns its CUresult. */
export type DriverFunctions = Functions<typeof DRIVER_FUNCTIONS>;

/** A loaded driver. */
export type CudaApi = BoundLibrary<typeof DRIVER_FUNCTIONS>;

/** Values of `cuda.h` that this backend uses, by their names there. */
export const CUDA_SUCCESS = 0;
export const CUDA_ERROR_OUT_OF_MEMORY = 2;
export const CUDA_ERROR_NOT_READY = 600;
export const CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704;

export const CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
export const CU_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33;
export const CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID = 34;
export const CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID = 50;
export const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
export const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
export const CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
export const CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115;

export const CU_STREAM_NON_BLOCKING = 1;
export const CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1;
export const CU_STREAM_CAPTURE_MODE_RELAXED = 2;
export const CU_STREAM_CAPTURE_STATUS_NONE = 0;
export const CU_EVENT_DISABLE_TIMING = 2;

export const CU_MEM_ALLOCATION_TYPE_PINNED = 1;
export const CU_MEM_LOCATION_TYPE_DEVICE = 1;
export const CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3;
export const CU_MEMORYTYPE_DEVICE = 2;
export const CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4;
export const CU_MEMHOSTREGISTER_PORTABLE = 1;
export const CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1;
export const CU_IPC_HANDLE_SIZE = 64;

export const CU_JIT_INFO_LOG_BUFFER = 3;
export const CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES = 4;
export const CU_JIT_ERROR_LOG_BUFFER = 5;
export const CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6;
export const CU_JIT_LOG_VERBOSE = 12;
export const CU_JIT_INPUT_PTX = 1;

export const CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3;
export const CU_FUNC_ATTRIBUTE_NUM_REGS = 4;
export const CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
export const CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14;

export const CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4;

/** Byte layouts of the structs that are filled by hand (64-bit platforms). */
export const STRUCTS = {
  CUlaunchConfig: {
    size: 56,
    gridDimX: 0,
    gridDimY: 4,
    gridDimZ: 8,
    blockDimX: 12,
    blockDimY: 16,
    blockDimZ: 20,
    sharedMemBytes: 24,
    hStream: 32,
    attrs: 40,
    numAttrs: 48,
  },
  /** `value` holds the cluster's x, y and z as `unsigned int`. */
  CUlaunchAttribute: { size: 72, id: 0, value: 8 },
  CUmemPoolProps: { size: 88, allocType: 0, handleTypes: 4, 'location.type': 8, 'location.id': 12 },
  CUmemAccessDesc: { size: 12, 'location.type': 0, 'location.id': 4, flags: 8 },
  CUDA_MEMCPY2D: {
    size: 128,
    srcMemoryType: 16,
    srcDevice: 32,
    srcPitch: 48,
    dstMemoryType: 72,
    dstDevice: 88,
    dstPitch: 104,
    WidthInBytes: 112,
    Height: 120,
  },
  CUDA_KERNEL_NODE_PARAMS: {
    size: 72,
    func: 0,
    gridDimX: 8,
    gridDimY: 12,
    gridDimZ: 16,
    blockDimX: 20,
    blockDimY: 24,
    blockDimZ: 28,
    sharedMemBytes: 32,
    kernelParams: 40,
  },
  CUtensorMap: { size: 128 },
} as const;
