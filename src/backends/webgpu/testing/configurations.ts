/** Every WGSL kernel that the tables can ask for: compiled in tests, and digested by `scripts/kernel-digest.ts`. */
import type { MatrixConfig } from '../capabilities.ts';
import { MATRIX_VARIANTS, matrixProducts } from '../families/matrix.ts';
import { TILED_VARIANTS } from '../families/tiled.ts';
import { matrixAttentionKernel, matrixWorkgroupBytes } from '../kernels/attention-matrix.ts';
import { tiledAttentionKernel } from '../kernels/attention-tiled.ts';
import { nativeMatrices } from '../kernels/matrix-operations.ts';
import { mergeKernel } from '../kernels/merge.ts';
import { prepareKeyValueKernel, prepareQueryKernel } from '../kernels/prepare.ts';
import type { ScoreConfig } from '../kernels/scores.ts';
import { statisticsKernel } from '../kernels/statistics.ts';

export const EXTENSION = 'chromium_experimental_subgroup_matrix';
export const DIALECT = { majorness: 'template', packedUnit: 'words' } as const;

export const H200: readonly MatrixConfig[] = [
  { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 16, K: 32 },
  { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 8, K: 32 },
  { componentType: 'f16', resultComponentType: 'f16', M: 16, N: 16, K: 16 },
  { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 16, K: 16 },
  { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 8, K: 16 },
];
export const APPLE: readonly MatrixConfig[] = [
  { componentType: 'f32', resultComponentType: 'f32', M: 8, N: 8, K: 8 },
  { componentType: 'f16', resultComponentType: 'f16', M: 8, N: 8, K: 8 },
];

/** Score configurations that together use every statement of the kernels. */
const SCORES: readonly ScoreConfig[] = (
  [
    ['float16', 64, 64, undefined, false, false, 'tile', 'final'],
    ['float32', 128, 100, 'bool', true, true, 'token', 'final'],
    ['bfloat16', 256, 254, 'bfloat16', false, true, 'tile', 'final'],
    ['float16', 32, 33, 'float16', true, true, 'token', 'partial'],
    ['bfloat16', 32, 1, 'float32', false, false, 'tile', 'partial'],
  ] as const
).map(([dtype, headDimPadded, valueDim, mask, softcap, returnLse, keyScale, result]) => ({
  dtype,
  headDimPadded,
  valueDim,
  valueDimPadded: Math.ceil(valueDim / 32) * 32,
  mask,
  softcap,
  returnLse,
  scaleValues: dtype !== 'float16',
  smoothV: dtype === 'bfloat16',
  keyScale,
  result,
}));

/** A configuration of a generator. */
export interface WebgpuConfiguration {
  /** Tells the configuration from every other. */
  readonly name: string;
  /** The generator and its tile variant: configurations that are tested together. */
  readonly group: string;
  readonly source: () => string;
}

/** The score configuration's distinguishing fields. */
const scoresName = ({ dtype, headDimPadded, valueDim, mask, result }: ScoreConfig) =>
  `${dtype} D${headDimPadded}/${valueDim} ${mask ?? 'no'} mask, ${result}`;

function tiledKernels(): WebgpuConfiguration[] {
  return TILED_VARIANTS.flatMap((variant) =>
    SCORES.filter(({ valueDimPadded }) => valueDimPadded % (4 * variant.colThreads) === 0).flatMap((scores) =>
      (['base', 'subgroup'] as const).flatMap((family) =>
        [true, false].map((modern) => ({
          name: `${family} ${variant.name} ${scoresName(scores)}${modern ? '' : ', core WGSL'}`,
          group: `tiles ${variant.name} of both families`,
          source: () => tiledAttentionKernel({ ...scores, ...variant, family, packedDot: modern, subgroupId: modern }),
        })),
      ),
    ),
  );
}

/** Bytes of workgroup memory above which no device needs to take a variant. */
const WORKGROUP_BYTES = 48 * 1024;

function matrixKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  for (const [device, configs] of [
    ['an H200', H200],
    ['an Apple GPU', APPLE],
  ] as const) {
    for (const variant of MATRIX_VARIANTS) {
      for (const accumulate of ['f32', 'f16'] as const) {
        const products = matrixProducts(configs, accumulate);
        if (products === undefined) continue;
        for (const scores of SCORES) {
          const operations = nativeMatrices(EXTENSION, DIALECT);
          const config = { ...scores, ...variant, ...products, lanes: 32, subgroupId: true, operations };
          if (matrixWorkgroupBytes(config, scores.headDimPadded, scores.valueDimPadded) > WORKGROUP_BYTES) continue;
          found.push({
            name: `matrix of ${device} ${variant.name} ${accumulate} ${scoresName(scores)}`,
            group: `matrices of ${device}, ${variant.name},`,
            source: () => matrixAttentionKernel(config),
          });
        }
      }
    }
  }
  return found;
}

function preparingKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  const add = (name: string, source: () => string) => found.push({ name, group: 'preparing kernels', source });
  for (const dtype of ['float16', 'bfloat16', 'float32'] as const) {
    for (const access of ['vector', 'scalar'] as const) {
      const sizes = { dtype, access, headDim: 48, headDimPadded: 64, valueDim: 80, valueDimPadded: 96 };
      const valueMax = dtype !== 'float16';
      const of = `${dtype} ${access}`;
      add(`statistics ${of}`, () => statisticsKernel({ ...sizes, keyMean: true, valueMax, valueMean: valueMax }));
      for (const granularity of ['per-block', 'per-warp', 'per-thread'] as const) {
        for (const smoothK of [true, false]) {
          const features = `${of} ${granularity}${smoothK ? ', smooth K' : ''}`;
          add(`prepare Q ${features}`, () => prepareQueryKernel({ ...sizes, granularity, smoothK, rowConstant: true }));
          for (const layout of ['rows', 'tiles'] as const) {
            const smoothV = valueMax && smoothK;
            add(`prepare K and V ${features} ${layout}`, () =>
              prepareKeyValueKernel({ ...sizes, granularity, smoothK, scaleValues: valueMax, smoothV, layout }),
            );
          }
        }
      }
    }
  }
  for (const scores of SCORES) {
    for (const headsInner of [true, false]) {
      add(`merge ${scoresName(scores)}${headsInner ? ', heads inner' : ''}`, () => mergeKernel(scores, headsInner));
    }
  }
  return found;
}

export const webgpuKernels = (): WebgpuConfiguration[] => [
  ...tiledKernels(),
  ...matrixKernels(),
  ...preparingKernels(),
];
