/**
 * What the conformance suite runs on the CUDA backend: every kernel with every setting of its options that changes its
 * code.
 */
import type { AttentionOptions } from '../../src/attention/options.ts';
import { lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { VALUE_LIMIT } from '../../src/backends/cuda/kernels/fp4/value.ts';
import { type PvAccumDtype, TILINGS, V_FP8_MAX } from '../../src/quantization/schemes.ts';
import {
  FP4_PV_FP4_ALGORITHM,
  FP4_PV_FP8_ALGORITHM,
  PORTABLE_ALGORITHM,
  type QuantizedAlgorithm,
} from '../../src/reference/quantized.ts';
import { FLOAT16_MAX } from '../../src/tensor/formats/float16.ts';
import { FP4_RELATIVE_L1 } from '../conformance/fp4-target.ts';
import type { Target } from '../conformance/suite.ts';

export const SM80: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, tiling: TILINGS.sm80, granularity: 'per-thread' };

/** FP8 PV with sums of at least FP32's precision between tiles. */
const fp8 = (pvAccumDtype: PvAccumDtype): QuantizedAlgorithm => ({
  ...SM80,
  pvFormat: 'fp8',
  pvAccumDtype,
  vMax: pvAccumDtype === 'fp32+fp16' ? V_FP8_MAX.fp16Accumulator : V_FP8_MAX.default,
});

/**
 * Relative L1 on ordinary inputs. The official kernels reach 0.0129 with FP16 PV and 0.038 with FP8 PV on long
 * sequences; short ones average less and lose up to twice that (`npx tsx test/cuda/emulated-accuracy.ts` prints what
 * the algorithms lose). Nothing but P is rounded in the exact kernel: by up to 2^-9 in BF16, which averages less.
 */
const BOUNDS = { exact: 0.004, fp16: 0.025, fp8: 0.06, int4: 0.25, fp4: FP4_RELATIVE_L1 } as const;

/** E4M3 holds no tokens of a tile of V that are a millionth of others (docs/how-it-works.md); nor does FP4. */
const FP8_EXCEPTIONS: NonNullable<Target['exceptions']> = ['cache of tiny values'];

/** FP4 gives 16 tokens of V one scale, and a row one scale for 16 weights: a large value coarsens its neighbours (docs/cuda.md). */
const FP4_EXCEPTIONS: NonNullable<Target['exceptions']> = [
  'cache of tiny values',
  'later tokens',
  'documents',
  'heads of a group',
];

const EXCEPTIONS: Readonly<Partial<Record<QuantizedAlgorithm['pvFormat'], Target['exceptions']>>> = {
  fp8: FP8_EXCEPTIONS,
  fp4: FP4_EXCEPTIONS,
};

function target(
  kernel: Target['kernel'],
  options: AttentionOptions,
  algorithm: QuantizedAlgorithm,
  bound: keyof typeof BOUNDS,
  largestV: number,
): Target {
  const settings = Object.entries(options).map(([name, value]) => (value === true ? name : value));
  return {
    name: [kernel, ...settings].join(' '),
    backend: 'cuda',
    kernel,
    options,
    relativeL1: BOUNDS[bound],
    algorithm: {
      ...algorithm,
      granularity: options.qkQuantGran ?? algorithm.granularity,
      pvAccumDtype: options.pvAccumDtype ?? algorithm.pvAccumDtype,
      smoothV: options.smoothV ?? false,
      smoothQ: options.smoothQ ?? algorithm.smoothQ,
      fp4: { ...algorithm.fp4, scaleSearch: options.scaleSearch ?? algorithm.fp4.scaleSearch },
    },
    largestV,
    exceptions: EXCEPTIONS[algorithm.pvFormat] ?? [],
  };
}

/** Up to this |V| sums over the suite's lengths (1000 keys) stay below FP16's largest number. */
const FP16_SUMS = 60;
/** V less its mean may reach twice |V|. */
const FP16_SMOOTHED = FLOAT16_MAX / 2;

const FP16 = 'qk-int8-pv-fp16-cuda';
const FP8 = 'qk-int8-pv-fp8-cuda';
const INT4 = 'qk-int4-pv-fp8-cuda';
const FP4 = 'qk-fp4-pv-fp4';
const FP4_BLACKWELL = 'qk-fp4-pv-fp4-cuda';
const FP4_FP8 = 'qk-fp4-pv-fp8-cuda';
const WGMMA_FP8 = 'qk-int8-pv-fp8-cuda-sm90';
const WGMMA_FP16 = 'qk-int8-pv-fp16-cuda-sm90';

/** The first target of each kernel has the kernel's default options. */
export const CUDA_TARGETS: readonly Target[] = [
  target('qk-int8-pv-fp16', {}, PORTABLE_ALGORITHM, 'fp16', FLOAT16_MAX),
  target(FP16, {}, SM80, 'fp16', FLOAT16_MAX),
  target(FP16, { qkQuantGran: 'per-warp', pvAccumDtype: 'fp16+fp32' }, SM80, 'fp16', FP16_SUMS),
  target(FP16, { qkQuantGran: 'per-block', pvAccumDtype: 'fp16' }, SM80, 'fp16', FP16_SUMS),
  target(FP16, { smoothV: true }, SM80, 'fp16', FP16_SMOOTHED),
  target(FP8, {}, fp8('fp32+fp16'), 'fp8', Number.POSITIVE_INFINITY),
  target(
    FP8,
    { qkQuantGran: 'per-warp', pvAccumDtype: 'fp32+fp32' },
    fp8('fp32+fp32'),
    'fp8',
    Number.POSITIVE_INFINITY,
  ),
  target(FP8, { qkQuantGran: 'per-block', pvAccumDtype: 'fp32' }, fp8('fp32'), 'fp8', Number.POSITIVE_INFINITY),
  target(FP8, { smoothV: true }, fp8('fp32+fp16'), 'fp8', Number.POSITIVE_INFINITY),
  target(INT4, {}, { ...fp8('fp32+fp16'), qkFormat: 'int4', smoothQ: true }, 'int4', Number.POSITIVE_INFINITY),
  target(FP4, {}, FP4_PV_FP4_ALGORITHM, 'fp4', VALUE_LIMIT),
  target(FP4, { smoothQ: false, smoothV: true, scaleSearch: 'none' }, FP4_PV_FP4_ALGORITHM, 'fp4', VALUE_LIMIT / 2),
  target(FP4_BLACKWELL, {}, FP4_PV_FP4_ALGORITHM, 'fp4', VALUE_LIMIT),
  target(FP4_BLACKWELL, { smoothQ: false, smoothV: true }, FP4_PV_FP4_ALGORITHM, 'fp4', VALUE_LIMIT / 2),
  target(FP4_FP8, {}, FP4_PV_FP8_ALGORITHM, 'int4', Number.POSITIVE_INFINITY),
  target(WGMMA_FP8, {}, fp8('fp32+fp32'), 'fp8', Number.POSITIVE_INFINITY),
  target(WGMMA_FP8, { qkQuantGran: 'per-warp', pvAccumDtype: 'fp32' }, fp8('fp32'), 'fp8', Number.POSITIVE_INFINITY),
  target(WGMMA_FP8, { qkQuantGran: 'per-block', smoothV: true }, fp8('fp32+fp32'), 'fp8', Number.POSITIVE_INFINITY),
  target(WGMMA_FP16, {}, SM80, 'fp16', FLOAT16_MAX),
  target(WGMMA_FP16, { qkQuantGran: 'per-warp', smoothV: true }, SM80, 'fp16', FP16_SMOOTHED),
  { ...target('exact', {}, PORTABLE_ALGORITHM, 'exact', Number.POSITIVE_INFINITY), dtype: 'bfloat16' },
];

/** Those that a device of a compute capability can run. */
export const targetsFor = (computeCapability: number): Target[] =>
  CUDA_TARGETS.filter(({ kernel }) => lackedBy(kernel, computeCapability) === undefined);
