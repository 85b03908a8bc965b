/** Names of kernels, as `options.kernel` takes them. Each has a function of the same name in camelCase. */
export const KERNEL_NAMES = [
  'qk-int8-pv-fp16',
  'qk-int8-pv-int8',
  'qk-int8-pv-fp16-cuda',
  'qk-int8-pv-fp8-cuda',
  'qk-int8-pv-fp8-cuda-sm90',
  'qk-int8-pv-fp16-cuda-sm90',
  'qk-int4-pv-fp8-cuda',
  'qk-fp4-pv-fp4',
  'qk-fp4-pv-fp4-cuda',
  'qk-fp4-pv-fp8-cuda',
  'exact',
] as const;

export type KernelName = (typeof KERNEL_NAMES)[number];
