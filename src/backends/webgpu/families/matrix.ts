/** Family `matrix`: subgroup matrices, the device's own or emulated ones. */
import { UnsupportedOptionError } from '../../../errors.ts';
import { type Capabilities, MATRIX_FEATURES, type MatrixConfig, matrixText } from '../capabilities.ts';
import { type MatrixShape, matrixAttentionKernel, matrixWorkgroupBytes } from '../kernels/attention-matrix.ts';
import { KEY_TILE, VALUE_GROUP } from '../kernels/layout.ts';
import { emulatedMatrices, nativeMatrices } from '../kernels/matrix-operations.ts';
import { type AttentionVariant, type KernelFamily, unsupportedAccumulation, type VariantRequest } from './family.ts';

export interface MatrixVariant extends MatrixShape {
  readonly name: string;
}

const matrixVariant = (
  subgroups: number,
  rowTiles: number,
  keys: number,
  { ahead = false, headroom = 8 } = {},
): MatrixVariant => ({
  name: `${subgroups}x${rowTiles}x${keys}${ahead ? 'a' : ''}${headroom === 0 ? 'e' : ''}`,
  subgroups,
  rowTiles,
  keys,
  ahead,
  headroom,
});

/**
 * Tiles of family `matrix`, best first; the first that fits is taken. Names: subgroups x row tiles x keys, loads ahead
 * of need (a), exact maximum (e). The first entries are ordered by speed on an H200 (bench/webgpu).
 */
export const MATRIX_VARIANTS: readonly MatrixVariant[] = [
  matrixVariant(1, 1, 32),
  matrixVariant(1, 1, 32, { ahead: true }),
  matrixVariant(4, 1, 32, { ahead: true }),
  matrixVariant(2, 1, 32, { ahead: true }),
  matrixVariant(1, 1, 64),
  matrixVariant(4, 1, 32),
  matrixVariant(2, 1, 32),
  matrixVariant(2, 1, 64),
  matrixVariant(1, 2, 32),
  matrixVariant(2, 2, 32),
  matrixVariant(8, 1, 32),
  matrixVariant(1, 1, 32, { headroom: 0 }),
];

/** The products that emulation stands for: what an H200 lists (`int8`), or Apple's GPUs (`float32`). */
export type Emulation = 'int8' | 'float32';

const EMULATED_LANES = 32;
const emulatedProducts = (kind: Emulation, f16: boolean): readonly MatrixConfig[] => {
  const type = f16 ? 'f16' : 'f32';
  if (kind === 'float32') return [{ componentType: 'f32', resultComponentType: 'f32', M: 8, N: 8, K: 8 }];
  return [
    { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 16, K: 32 },
    { componentType: type, resultComponentType: 'f32', M: 16, N: 16, K: 16 },
    ...(f16 ? [{ componentType: type, resultComponentType: 'f16', M: 16, N: 16, K: 16 }] : []),
  ];
};

/** How good a component is for Q K^T: INT8 as it is, or converted to a type whose sums are exact to 2^24. */
const QK_PREFERENCE = ['i8->i32', 'f16->f32', 'f32->f32'];
const PV_PREFERENCE = { f32: ['f16->f32', 'f32->f32'], f16: ['f16->f16'] } as const;

/** Result type of P V. */
export type Accumulation = 'f32' | 'f16';

/** The products to use: both with the same M, and dims that divide the padded head dims (32) and the key tile. */
export function matrixProducts(
  configs: readonly MatrixConfig[],
  accumulate: Accumulation,
): { readonly qk: MatrixConfig; readonly pv: MatrixConfig } | undefined {
  const usable = (config: MatrixConfig) => 32 % config.K === 0 && 32 % config.N === 0 && config.N % 4 === 0;
  const ranked = (preference: readonly string[]) =>
    preference.flatMap((types) =>
      configs
        .filter((config) => `${config.componentType}->${config.resultComponentType}` === types && usable(config))
        .sort((a, b) => b.M * b.N * b.K - a.M * a.N * a.K),
    );
  for (const qk of ranked(QK_PREFERENCE)) {
    const pv = ranked(PV_PREFERENCE[accumulate]).find(({ M, K }) => M === qk.M && VALUE_GROUP % K === 0);
    if (pv !== undefined) return { qk, pv };
  }
  return undefined;
}

/** What a device offers the matrix kernel, or why it does not. */
function matrixSupport(capabilities: Capabilities, emulate: Emulation | undefined) {
  const configs =
    emulate !== undefined ? emulatedProducts(emulate, capabilities.shaderF16) : capabilities.matrixConfigs;
  const [min, max] = capabilities.subgroupSize;
  const lanes = emulate !== undefined ? EMULATED_LANES : max;
  if (!capabilities.subgroups) return { reason: "no feature 'subgroups'" };
  const wrong = (emulate === undefined && capabilities.wrongMatrices) || [];
  const tried = wrong.length === 0 ? '' : `; wrong in a trial: ${wrong.map(matrixText).join(', ')}`;
  if (configs.length === 0 && tried !== '') return { reason: `no subgroup matrix product comes out right${tried}` };
  if (configs.length === 0) return { reason: 'no subgroup matrix configurations (in Dawn: toggle allow_unsafe_apis)' };
  if (emulate === undefined && min !== max) return { reason: `subgroups of ${min} to ${max} lanes` };
  const products = matrixProducts(configs, 'f32');
  if (products === undefined) return { reason: `no pair of listed products that the kernel can use${tried}` };
  if (products.pv.componentType === 'f16' && !capabilities.shaderF16) return { reason: "no feature 'shader-f16'" };
  if (lanes % products.qk.M !== 0 || lanes / products.qk.M > Math.max(4, min))
    return { reason: `subgroups of ${lanes} lanes` };
  return { lanes, configs };
}

function chooseMatrixVariant(
  capabilities: Capabilities,
  { headDimPadded, valueDimPadded, pvAccumDtype, variant: forced }: VariantRequest,
  emulate: Emulation | undefined,
): AttentionVariant {
  const { lanes, configs, reason } = matrixSupport(capabilities, emulate);
  if (lanes === undefined) throw new Error(`the family was chosen although it is not supported: ${reason}`);
  const accumulate: Accumulation = pvAccumDtype === 'fp16' ? 'f16' : 'f32';
  const products = matrixProducts(configs, accumulate);
  if (products === undefined) throw unsupportedAccumulation('a device that lists no product with float16 sums');
  const { qk } = products;
  const candidates = MATRIX_VARIANTS.flatMap((table) => {
    // Sums in float16 have no room for P above 1.
    const variant = accumulate === 'f16' ? { ...table, headroom: 0 } : table;
    const rows = variant.subgroups * variant.rowTiles * qk.M;
    const fits =
      matrixWorkgroupBytes({ ...variant, ...products }, headDimPadded, valueDimPadded) <= capabilities.workgroupBytes &&
      variant.subgroups * lanes <= capabilities.workgroupThreads &&
      128 % rows === 0 &&
      variant.keys % KEY_TILE === 0;
    return fits ? [{ variant, rows }] : [];
  });
  const affordable = candidates.filter(({ variant }) => variant.rowTiles * valueDimPadded <= MATRIX_OUTPUT_COLUMNS);
  const found =
    forced === undefined ? (affordable[0] ?? candidates[0]) : candidates.find(({ variant }) => variant.name === forced);
  if (found === undefined) {
    const names = candidates.map(({ variant }) => `'${variant.name}'`).join(', ');
    throw new UnsupportedOptionError('qk-int8-pv-fp16', 'options.variant', `one of ${names || 'none'}`, `'${forced}'`);
  }
  const { variant, rows } = found;
  const extension = MATRIX_FEATURES.find(([feature]) => capabilities.matrixFeature === feature)?.[1] ?? '';
  return {
    family: 'matrix',
    name: variant.name,
    kernel: {
      label: `attention matrix ${variant.name}${emulate === undefined ? '' : ' emulated'}`,
      rows,
      source: (config) =>
        matrixAttentionKernel({
          ...config,
          ...variant,
          ...products,
          lanes,
          subgroupId: capabilities.subgroupId,
          operations:
            emulate !== undefined ? emulatedMatrices(lanes) : nativeMatrices(extension, capabilities.matrixDialect),
        }),
    },
  };
}

/** Output columns of float32 that a subgroup can hold for 16 rows each, in registers. */
const MATRIX_OUTPUT_COLUMNS = 256;

/** Above it an H200 computed wrong outputs with its own matrices, where emulated ones are right; why is not known. */
const MATRIX_HEAD_DIM = 128;

/** @param emulate products to emulate; default: the device's own */
export const matrixFamily = (emulate?: Emulation): KernelFamily => ({
  name: 'matrix',
  layout: 'tiles',
  fp4: false,
  variants: MATRIX_VARIANTS,
  maxHeadDim: emulate === undefined ? MATRIX_HEAD_DIM : Number.POSITIVE_INFINITY,
  support: (capabilities) => matrixSupport(capabilities, emulate).reason,
  kernel: (capabilities, request) => chooseMatrixVariant(capabilities, request, emulate),
});
