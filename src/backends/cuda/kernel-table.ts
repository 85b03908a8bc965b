/** The kernels of this backend, what each honours, and which one a device gets. */
import type { KernelName } from '../../attention/kernels.ts';
import { SCALE_SEARCHES } from '../../quantization/fp4-blocks.ts';
import type { BackwardSupport, KernelDescriptor } from '../backend.ts';
import type { Target } from './ptx/targets.ts';

/** Largest D and Dv of these kernels. */
export const MOST_VALUE_DIM = 256;
const MAX_HEAD_DIM = MOST_VALUE_DIM;
/** Of the one kernel that wide heads take: their V is attended to in parts. */
const WIDE_HEAD_DIM = 512;

/** Compute capability (major * 10 + minor) below which nothing here runs: `mma.m16n8k32` of INT8 and `cp.async` start there. */
export const MINIMUM_COMPUTE_CAPABILITY = 80;

/** Kernels that share an instruction for their products, and with it their launches (`launches/`) and their tiles. */
export type Family = 'mma-sync' | 'wgmma' | 'exact';

/** What the launches of a kernel must know of it, besides what callers may ask of it. */
export interface CudaKernelDescriptor extends KernelDescriptor {
  readonly family: Family;
  /** Codes of Q and K: targets without INT4 tensor cores hold them in INT8. */
  readonly qkFormat: 's8' | 's4' | 'e2m1' | 'as given';
  /** What V is stored as. */
  readonly pvFormat: 'f16' | 'e4m3' | 'e2m1' | 'as given';
  /** Multiplies FP4 on tensor cores that scale its blocks, where there are such. */
  readonly blockScaled?: true;
  /**
   * Compute capabilities (major * 10 + minor) that it runs on: E4M3 conversions start at 8.9, and only 9.0 has wgmma.
   */
  readonly computeCapability: readonly [from: number, below: number];
}

export const CUDA_KERNELS: readonly CudaKernelDescriptor[] = [
  {
    name: 'qk-int8-pv-fp16',
    summary: 'INT8 QK per block, FP16 PV: the portable kernel, on mma.sync; sm_80 and later',
    family: 'mma-sync',
    qkFormat: 's8',
    pvFormat: 'f16',
    computeCapability: [MINIMUM_COMPUTE_CAPABILITY, Number.POSITIVE_INFINITY],
    qkQuantGran: ['per-block'],
    pvAccumDtype: ['fp32'],
    smoothV: false,
    smoothQ: [false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-int8-pv-fp16-cuda',
    summary: 'INT8 QK, FP16 PV on mma.sync; sm_80 and later',
    family: 'mma-sync',
    qkFormat: 's8',
    pvFormat: 'f16',
    computeCapability: [MINIMUM_COMPUTE_CAPABILITY, Number.POSITIVE_INFINITY],
    qkQuantGran: ['per-thread', 'per-warp', 'per-block'],
    pvAccumDtype: ['fp32', 'fp16', 'fp16+fp32'],
    smoothV: true,
    smoothQ: [false],
    maxHeadDim: WIDE_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-int8-pv-fp8-cuda',
    summary: 'INT8 QK, FP8 PV on mma.sync (SageAttention2 and 2++); sm_89 and later',
    family: 'mma-sync',
    qkFormat: 's8',
    pvFormat: 'e4m3',
    computeCapability: [89, Number.POSITIVE_INFINITY],
    qkQuantGran: ['per-thread', 'per-warp', 'per-block'],
    pvAccumDtype: ['fp32+fp16', 'fp32+fp32', 'fp32'],
    smoothV: true,
    smoothQ: [false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-int4-pv-fp8-cuda',
    summary: 'INT4 QK with Q and K smoothed, FP8 PV on mma.sync; sm_89 and later',
    family: 'mma-sync',
    qkFormat: 's4',
    pvFormat: 'e4m3',
    computeCapability: [89, Number.POSITIVE_INFINITY],
    qkQuantGran: ['per-thread'],
    pvAccumDtype: ['fp32+fp16', 'fp32+fp32', 'fp32'],
    smoothV: true,
    smoothQ: ['block'],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-fp4-pv-fp4',
    summary: 'NVFP4 QK and PV with Q and K smoothed, multiplied in FP16 on mma.sync; sm_80 and later',
    family: 'mma-sync',
    qkFormat: 'e2m1',
    pvFormat: 'e2m1',
    computeCapability: [MINIMUM_COMPUTE_CAPABILITY, Number.POSITIVE_INFINITY],
    qkQuantGran: [],
    pvAccumDtype: ['fp32'],
    scaleSearch: SCALE_SEARCHES,
    smoothV: true,
    smoothQ: ['block', false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-fp4-pv-fp4-cuda',
    summary: 'NVFP4 QK and PV with Q and K smoothed, on block-scaled mma.sync (SageAttention3); compute capability 12',
    family: 'mma-sync',
    qkFormat: 'e2m1',
    pvFormat: 'e2m1',
    blockScaled: true,
    computeCapability: [120, 130],
    qkQuantGran: [],
    pvAccumDtype: ['fp32'],
    scaleSearch: SCALE_SEARCHES,
    smoothV: true,
    smoothQ: ['block', false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-fp4-pv-fp8-cuda',
    summary: 'NVFP4 QK with Q and K smoothed, FP8 PV; block-scaled on compute capability 12, QK in FP16 from sm_89 on',
    family: 'mma-sync',
    qkFormat: 'e2m1',
    pvFormat: 'e4m3',
    blockScaled: true,
    computeCapability: [89, Number.POSITIVE_INFINITY],
    qkQuantGran: [],
    pvAccumDtype: ['fp32+fp32', 'fp32+fp16', 'fp32'],
    scaleSearch: SCALE_SEARCHES,
    smoothV: true,
    smoothQ: ['block', false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-int8-pv-fp8-cuda-sm90',
    summary: 'INT8 QK, FP8 PV on wgmma (Hopper)',
    family: 'wgmma',
    qkFormat: 's8',
    pvFormat: 'e4m3',
    computeCapability: [90, 91],
    qkQuantGran: ['per-thread', 'per-warp', 'per-block'],
    pvAccumDtype: ['fp32+fp32', 'fp32'],
    smoothV: true,
    smoothQ: [false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'qk-int8-pv-fp16-cuda-sm90',
    summary: 'INT8 QK, FP16 PV on wgmma (Hopper)',
    family: 'wgmma',
    qkFormat: 's8',
    pvFormat: 'f16',
    computeCapability: [90, 91],
    qkQuantGran: ['per-thread', 'per-warp', 'per-block'],
    pvAccumDtype: ['fp32'],
    smoothV: true,
    smoothQ: [false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
  {
    name: 'exact',
    summary: 'float16 or bfloat16 as given, nothing quantized; on wgmma (Hopper) or mma.sync (sm_80 and later)',
    family: 'exact',
    qkFormat: 'as given',
    pvFormat: 'as given',
    computeCapability: [MINIMUM_COMPUTE_CAPABILITY, Number.POSITIVE_INFINITY],
    dtypes: ['float16', 'bfloat16'],
    qkQuantGran: [],
    pvAccumDtype: ['fp32'],
    smoothV: false,
    smoothQ: [false],
    maxHeadDim: MAX_HEAD_DIM,
    sinks: true,
    blockMask: true,
  },
];

const BACKWARD_KERNELS = ['qk-int8-pv-fp16-cuda-sm90', 'qk-int8-pv-fp16-cuda', 'qk-int8-pv-fp16'] as const;

/** The backward pass: on every device, of the kernels that it has whose codes and V it has. */
export const backwardSupportOf = (computeCapability: number): BackwardSupport => ({
  kernels: BACKWARD_KERNELS.filter((kernel) => lackedBy(kernel, computeCapability) === undefined),
  precisions: ['fp16', ...(computeCapability >= 89 ? (['fp8'] as const) : []), 'int8'],
  maskGradient: true,
});

/** What a kernel needs of a device, in words, when a device of this compute capability lacks it. */
export function lackedBy(kernel: KernelName, computeCapability: number): string | undefined {
  const [from, below] = descriptorOf(kernel).computeCapability;
  if (computeCapability >= from && computeCapability < below) return undefined;
  const least = `compute capability ${(from / 10).toFixed(1)}`;
  if (below === Number.POSITIVE_INFINITY) return `${least} or later`;
  return below - from > 1 ? `${least} to below ${(below / 10).toFixed(1)}` : least;
}

/** What a range of devices runs by default: the first row whose compute capability is not above the device's. */
interface Preference {
  readonly from: number;
  readonly kernel: KernelName;
  readonly why: string;
}

/** Newest devices first, as the reference implementation (version 2.2.0) chooses. */
export const DEFAULT_KERNELS: readonly Preference[] = [
  { from: 100, kernel: 'qk-int8-pv-fp8-cuda', why: 'FP8 with FP16 accumulation runs at twice the FP16 rate' },
  { from: 90, kernel: 'qk-int8-pv-fp8-cuda-sm90', why: 'wgmma runs INT8 and FP8 at twice the FP16 rate' },
  { from: 89, kernel: 'qk-int8-pv-fp8-cuda', why: 'FP8 with FP16 accumulation runs at twice the FP16 rate' },
  { from: 80, kernel: 'qk-int8-pv-fp16-cuda', why: 'no FP8 tensor cores' },
];

/** The descriptor of a kernel of this backend. */
export function descriptorOf(name: KernelName): CudaKernelDescriptor {
  const found = CUDA_KERNELS.find((descriptor) => descriptor.name === name);
  if (found === undefined) throw new RangeError(`no CUDA kernel '${name}'`);
  return found;
}

/** The kernel that devices of a compute capability run unless told otherwise; undefined below the minimum. */
export function defaultKernelFor(computeCapability: number): CudaKernelDescriptor | undefined {
  const row = DEFAULT_KERNELS.find(({ from }) => computeCapability >= from);
  return row === undefined ? undefined : descriptorOf(row.kernel);
}

/**
 * PTX targets by compute capability, newest first. PTX of a plain target runs on every later device too, PTX of an `a`
 * target only on that target, so a device without its own `a` target takes the plain one before it.
 */
const TARGETS_FROM: readonly (readonly [from: number, target: Target])[] = [
  [130, 'sm_89'],
  // The family's, which a driver of CUDA 12.9 takes; 12.0 takes it for FP4 only (`targetOfKernel`).
  [121, 'sm_120f'],
  [120, 'sm_120a'],
  [91, 'sm_89'],
  [90, 'sm_90a'],
  [89, 'sm_89'],
  [88, 'sm_86'],
  // Orin has the shared memory of sm_80.
  [87, 'sm_80'],
  [86, 'sm_86'],
  [80, 'sm_80'],
];

/** What kernels are compiled for on a device; undefined below the minimum. */
export function targetFor(computeCapability: number): Target | undefined {
  return TARGETS_FROM.find(([from]) => computeCapability >= from)?.[1];
}
