/** What a kernel's formats become on a target: containers of codes, padding, sums, groups of scales. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import { InvalidArgumentError } from '../../../errors.ts';
import { V_FP8_MAX } from '../../../quantization/schemes.ts';
import type { KernelChoice } from '../../backend.ts';
import { type CudaKernelDescriptor, descriptorOf, lackedBy } from '../kernel-table.ts';
import type { CodeOrder } from '../kernels/fp4/e2m1.ts';
import type { Fp4TokensConfig } from '../kernels/fp4/tokens.ts';
import type { AttentionConfig } from '../kernels/mma-sync/config.ts';
import { roundUp } from '../kernels/parts/constants.ts';
import { TARGET_FEATURES, type Target } from '../ptx/targets.ts';

/** What a kernel choice means on a target. */
export interface Scheme {
  readonly qkFormat: AttentionConfig['qkFormat'];
  /** Of K and V in FP4: where tensor cores never take them as they are, the one that is unpacked fastest. */
  readonly codeOrder: CodeOrder;
  readonly largest: 127 | 7;
  readonly paddedDim: number;
  readonly qkRowBytes: number;
  readonly queryRowBytes: number;
  /** Q with K in FP4: its codes, what these stand for in FP16, or FP16 of Q itself. */
  readonly queryFormat: Fp4TokensConfig['format'];
  readonly quantizedWeights: boolean;
  readonly pvFormat: AttentionConfig['pvFormat'];
  readonly accumulate: AttentionConfig['accumulate'];
  readonly paddedValueDim: number;
  readonly vMax: number;
  /** P and V share what FP16 sums hold: V takes more of it where its tokens lie far apart. */
  readonly sharesRange: boolean;
  /** V in FP8 has a scale for each tile of keys besides its channel scales, which a sample of its tokens sets. */
  readonly valueTileScales: boolean;
  readonly queryGroups: readonly [tokens: 32 | 128, groups: 1 | 8];
  readonly keyGroups: 1 | 4;
}

const ACCUMULATE = {
  f16: { fp32: 'f32', fp16: 'f16', 'fp16+fp32': 'f16-per-tile' },
  // FP8 tensor cores do not sum in true FP32: where 'fp32' asks for it, tiles are promoted as in 'fp32+fp32'.
  e4m3: { fp32: 'f32-per-tile', 'fp32+fp32': 'f32-per-tile', 'fp32+fp16': 'f16-per-tile' },
} as const;

/** Compute capability (major * 10 + minor) that a target is named after. */
export const capabilityOf = (target: Target) => Number(/\d+/.exec(target)?.[0]);

/**
 * The scheme of a kernel choice; see docs/cuda.md for the kernels and docs/how-it-works.md for the groups.
 *
 * @param cached Q meets keys and values that were quantized before
 * @throws {InvalidArgumentError} when the target lacks what the kernel needs
 */
export function schemeOf(problem: AttentionProblem, choice: KernelChoice, target: Target, cached: boolean): Scheme {
  const features = TARGET_FEATURES[target];
  const { qkQuantGran, pvAccumDtype } = choice;
  const kernel = descriptorOf(choice.descriptor.name);
  const lacked = lackedBy(kernel.name, capabilityOf(target));
  if (lacked !== undefined) {
    throw new InvalidArgumentError(
      'unsupported-option',
      'options.kernel',
      `a kernel that runs on ${target}`,
      `${kernel.name}, which needs ${lacked}`,
    );
  }
  if (kernel.qkFormat === 'as given') return exactScheme(problem);
  if (kernel.qkFormat === 'e2m1') return fp4Scheme(problem, choice, target, cached);
  const wgmma = kernel.family === 'wgmma';
  const fp8 = kernel.pvFormat === 'e4m3';
  const qkFormat = kernel.qkFormat === 's4' && features.int4Mma ? 's4' : 's8';
  const paddedDim = roundUp(problem.headDim, qkFormat === 's4' ? 64 : 32);
  const pvFormat = !fp8 ? 'f16' : features.fp8Mma || wgmma ? 'e4m3' : 'e4m3-as-f16';
  const accumulate =
    pvFormat === 'f16'
      ? ACCUMULATE.f16[pvAccumDtype as keyof typeof ACCUMULATE.f16]
      : pvFormat === 'e4m3'
        ? ACCUMULATE.e4m3[pvAccumDtype as keyof typeof ACCUMULATE.e4m3]
        : // FP16 products are summed in true FP32 at full rate: nothing is gained by less.
          'f32';
  return {
    qkFormat,
    codeOrder: 'nibbles',
    largest: kernel.qkFormat === 's4' ? 7 : 127,
    paddedDim,
    qkRowBytes: qkFormat === 's4' ? paddedDim / 2 : paddedDim,
    queryRowBytes: qkFormat === 's4' ? paddedDim / 2 : paddedDim,
    queryFormat: 'codes',
    quantizedWeights: false,
    pvFormat,
    accumulate,
    paddedValueDim: roundUp(problem.valueDim, fp8 ? 32 : 16),
    vMax: accumulate === 'f16-per-tile' && fp8 ? V_FP8_MAX.fp16Accumulator : V_FP8_MAX.default,
    sharesRange: accumulate === 'f16-per-tile' && pvFormat === 'e4m3',
    valueTileScales: wgmma && fp8,
    queryGroups: qkQuantGran === 'per-block' ? [128, 1] : qkQuantGran === 'per-warp' ? [32, 1] : [32, 8],
    keyGroups: qkQuantGran === 'per-thread' ? 4 : 1,
  };
}

/** Q, K and V as they are, in 16 bits. */
function exactScheme({ dtype, headDim, valueDim }: AttentionProblem): Scheme {
  const format = dtype === 'float16' ? 'f16' : 'bf16';
  const paddedDim = roundUp(headDim, 16);
  return {
    qkFormat: format,
    codeOrder: 'nibbles',
    largest: 127,
    paddedDim,
    qkRowBytes: paddedDim * 2,
    queryRowBytes: paddedDim * 2,
    queryFormat: 'codes',
    quantizedWeights: false,
    pvFormat: format,
    accumulate: 'f32',
    paddedValueDim: roundUp(valueDim, 16),
    vMax: V_FP8_MAX.default,
    sharesRange: false,
    valueTileScales: false,
    queryGroups: [128, 1],
    keyGroups: 1,
  };
}

/** What a kernel is compiled for: products of FP4 need the family's target, and a newer driver than others. */
export const targetOfKernel = ({ descriptor }: KernelChoice, target: Target): Target =>
  target === 'sm_120a' && descriptorOf(descriptor.name).blockScaled === true ? 'sm_120f' : target;

/** Up to so many rows a query of a cache is worth no FP4 products: memory is what bounds them. */
const DECODING_ROWS = 32;

/**
 * Whether Q, and P beside V in FP4, stay in FP16: over a cache, on cards without FP4 products and for a few rows. Only the
 * cache gains by FP4 there; and smoothing, which would read all of K once more, serves only to quantize Q.
 */
export function keepsQuery({ queryLength }: AttentionProblem, choice: KernelChoice, target: Target): boolean {
  const kernel = descriptorOf(choice.descriptor.name);
  return kernel.qkFormat === 'e2m1' && (!multipliesBlocks(kernel, target) || queryLength <= DECODING_ROWS);
}

const multipliesBlocks = ({ blockScaled }: CudaKernelDescriptor, target: Target) =>
  blockScaled === true && TARGET_FEATURES[target].blockScaledMma;

/** FP4 QK; V in FP4 too, or in FP8 as elsewhere. */
function fp4Scheme(problem: AttentionProblem, choice: KernelChoice, target: Target, cached: boolean): Scheme {
  const kernel = descriptorOf(choice.descriptor.name);
  const features = TARGET_FEATURES[target];
  const keeps = cached && keepsQuery(problem, choice, target);
  const native = multipliesBlocks(kernel, target) && !keeps;
  const paddedDim = roundUp(problem.headDim, 64);
  const fp4Values = kernel.pvFormat === 'e2m1';
  const pvFormat = fp4Values ? (native ? 'e2m1' : 'e2m1-as-f16') : features.fp8Mma ? 'e4m3' : 'e4m3-as-f16';
  const accumulate = pvFormat === 'e4m3' ? ACCUMULATE.e4m3[choice.pvAccumDtype as keyof typeof ACCUMULATE.e4m3] : 'f32';
  return {
    qkFormat: native ? 'e2m1' : 'e2m1-as-f16',
    codeOrder: multipliesBlocks(kernel, target) ? 'nibbles' : 'pairs',
    largest: 127,
    paddedDim,
    qkRowBytes: paddedDim / 2,
    queryRowBytes: native ? paddedDim / 2 : paddedDim * 2,
    queryFormat: native ? 'codes' : keeps ? 'exact-halves' : 'halves',
    quantizedWeights: fp4Values && !keeps,
    pvFormat,
    accumulate,
    paddedValueDim: roundUp(problem.valueDim, 32),
    vMax: accumulate === 'f16-per-tile' ? V_FP8_MAX.fp16Accumulator : V_FP8_MAX.default,
    sharesRange: accumulate === 'f16-per-tile',
    valueTileScales: false,
    queryGroups: [128, 1],
    keyGroups: 1,
  };
}
