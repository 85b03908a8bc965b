/** The kernel that a whole call runs unless told otherwise. */
import { isBanded } from '../../attention/band.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { type CudaKernelDescriptor, defaultKernelFor, descriptorOf } from './kernel-table.ts';
import { takesAsTheyLie } from './launches/wgmma.ts';

/** Up to how many keys 16-bit operands as given are faster than the default kernel with its quantization. */
interface ExactRule {
  /** Compute capabilities (major * 10 + minor). */
  readonly from: number;
  readonly below: number;
  /** Largest D and Dv. */
  readonly headDim: number;
  /** Causal or windowed. */
  readonly banded: boolean;
  readonly keys: number;
  readonly why: string;
}

const HOPPER = { from: 90, below: 91 } as const;

/**
 * First row that fits. Milliseconds of the exact kernel and of FP8 with its quantization on an H200, tokens times batch
 * 16,384, 32 heads (`bench/results/cuda-short-h200.json`, with a band at D = 128 `cuda-short-causal-h200.json`); the next length measured went to FP8.
 */
export const EXACT_RULES: readonly ExactRule[] = [
  {
    ...HOPPER,
    headDim: 64,
    banded: false,
    keys: 1536,
    why: '1024: 0.361 and 0.428; 1500 (8 x 20 heads): 0.246 and 0.249',
  },
  { ...HOPPER, headDim: 64, banded: true, keys: 2048, why: '1024: 0.231 and 0.358; 2048: 0.390 and 0.444' },
  { ...HOPPER, headDim: 128, banded: false, keys: 1024, why: '512: 0.288 and 0.455; 1024: 0.510 and 0.586' },
  {
    ...HOPPER,
    headDim: 128,
    banded: true,
    keys: 2048,
    why: '1024: 0.341 and 0.505; 2048: 0.616 and 0.633; 4096: 0.997 and 0.951',
  },
];

/** Scores are products and no more, and rows are many: what {@link EXACT_RULES} was measured on. */
const isPlain = ({ mask, blocks, softcap }: AttentionProblem) =>
  mask === undefined && blocks === undefined && softcap === 0;

/** The quantizing kernel of a problem; undefined on devices below the minimum. */
export function quantizingKernel(
  { headDim, valueDim }: Pick<AttentionProblem, 'headDim' | 'valueDim'>,
  computeCapability: number,
): CudaKernelDescriptor | undefined {
  const usual = defaultKernelFor(computeCapability);
  const wide = Math.max(headDim, valueDim) > (usual?.maxHeadDim ?? 0);
  return usual === undefined || !wide ? usual : descriptorOf('qk-int8-pv-fp16-cuda');
}

/** Undefined on devices below the minimum. */
export function fastestKernel(problem: AttentionProblem, computeCapability: number): CudaKernelDescriptor | undefined {
  const exact = descriptorOf('exact');
  const { dtype, headDim, valueDim, keyLength, band } = problem;
  const rule = EXACT_RULES.find(
    (row) =>
      computeCapability >= row.from &&
      computeCapability < row.below &&
      Math.max(headDim, valueDim) <= row.headDim &&
      isBanded(band) === row.banded,
  );
  const takes = exact.dtypes?.includes(dtype) === true && isPlain(problem) && takesAsTheyLie({ problem, device: {} });
  return rule !== undefined && takes && keyLength <= rule.keys ? exact : quantizingKernel(problem, computeCapability);
}
