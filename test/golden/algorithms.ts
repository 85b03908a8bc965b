/** What each of the official kernels whose outputs the golden files hold computes, in the reference's terms. */
import { CUDA_ROUNDING, TRITON_BLOCK_ROUNDING, TRITON_THREAD_ROUNDING } from '../../src/quantization/integers.ts';
import { type Granularity, type PvAccumDtype, TILINGS, type Tiling, V_FP8_MAX } from '../../src/quantization/schemes.ts';
import { PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';

/** torch's mean of a bfloat16 K is bfloat16, and so is what torch subtracts; the CUDA kernel subtracts in float32. */
const STYLES = {
  'per-warp': { rounding: CUDA_ROUNDING, smoothedKeyDtype: 'float32' },
  'per-thread': { rounding: TRITON_THREAD_ROUNDING, smoothedKeyDtype: 'bfloat16' },
} as const;

function int8(granularity: 'per-warp' | 'per-thread', tiling: Tiling, pvAccumDtype: PvAccumDtype): QuantizedAlgorithm {
  return { ...PORTABLE_ALGORITHM, ...STYLES[granularity], keyMeanDtype: 'bfloat16', granularity, tiling, pvAccumDtype };
}

/** The kernel of an `out.*` entry for a head dim, without the prefix. */
export function goldenAlgorithm(output: string, headDim: number): QuantizedAlgorithm {
  const [kernel, ...rest] = output.split('.');
  const granularity = (rest.find((part) => part.startsWith('per_'))?.replace('_', '-') ?? 'per-thread') as Granularity;
  const accum = (rest.find((part) => part.startsWith('fp')) ?? 'fp32+fp32') as PvAccumDtype;
  if (granularity === 'per-block') throw new Error(`no official kernel '${output}'`);
  switch (kernel) {
    case 'qk_int8_pv_fp16_triton':
      return {
        ...PORTABLE_ALGORITHM,
        rounding: TRITON_BLOCK_ROUNDING,
        keyMeanDtype: 'bfloat16',
        smoothedKeyDtype: 'bfloat16',
        pvAccumDtype: 'fp16+fp32',
      };
    case 'qk_int8_pv_fp16_cuda': {
      // That kernel has fewer registers for two accumulators, and warps of 16 rows there.
      const warpQ = headDim === 128 && accum === 'fp16+fp32' ? 16 : 32;
      return int8(granularity, { ...TILINGS.sm80, warpQ }, accum);
    }
    case 'qk_int8_pv_fp8_cuda':
    case 'qk_int8_pv_fp8_cuda_sm90':
      return {
        ...int8(granularity, kernel.endsWith('sm90') ? TILINGS.sm90 : TILINGS.sm80, accum),
        pvFormat: 'fp8',
        pFp8Max: 2 ** 8.807,
        // On the H200 that made these files only wgmma runs on the FP8 unit; there 'fp32' and 'fp32+fp32' of mma give
        // the same sums.
        fp8AccumulatorBits: kernel.endsWith('sm90') ? 13 : 23,
        vMax: accum === 'fp32+fp16' ? V_FP8_MAX.fp16Accumulator : V_FP8_MAX.default,
      };
    default:
      throw new Error(`no official kernel '${output}'`);
  }
}
