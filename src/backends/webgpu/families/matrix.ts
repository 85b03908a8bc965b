/** Family `matrix`: subgroup matrices, the device's own or emulated ones. */
import { UnsupportedOptionError } from '../../../errors.ts';
import { type Capabilities, MATRIX_FEATURES, type MatrixConfig, matrixText } from '../capabilities.ts';
import { MAX_HEAD_DIM } from '../kernel-table.ts';
import { matrixAttentionKernel } from '../kernels/attention-matrix.ts';
import { padDim, VALUE_GROUP } from '../kernels/layout.ts';
import { emulatedMatrices, type MatrixOperations, nativeMatrices } from '../kernels/matrix-operations.ts';
import { fitsUnits, type MatrixProducts, matrixTiling } from '../kernels/matrix-tiling.ts';
import {
  type AttentionVariant,
  type HeadDims,
  type KernelFamily,
  unsupportedAccumulation,
  type VariantRequest,
} from './family.ts';
import { MATRIX_SHAPES, MATRIX_VARIANTS, type MatrixVariant, shapeKey } from './matrix-shapes.ts';

/** The products that emulation stands for: what an H200 lists (`int8`), or Apple's GPUs (`float32`). */
export type Emulation = 'int8' | 'float32';

const EMULATED_LANES = 32;
const EMULATED_PRODUCTS: Readonly<Record<Emulation, readonly MatrixConfig[]>> = {
  int8: [
    { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 16, K: 32 },
    { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 16, K: 16 },
    { componentType: 'f16', resultComponentType: 'f16', M: 16, N: 16, K: 16 },
  ],
  float32: [{ componentType: 'f32', resultComponentType: 'f32', M: 8, N: 8, K: 8 }],
};

/** How good a component is for Q K^T: INT8 as it is, or converted to a type whose sums are exact to 2^24. */
const QK_PREFERENCE = ['i8->i32', 'f16->f32', 'f32->f32'];
const PV_PREFERENCE = { f32: ['f16->f32', 'f32->f32'], f16: ['f16->f16'] } as const;

/** Result type of P V. */
export type Accumulation = 'f32' | 'f16';

/** The products to use: both with the same M, and dims that divide the padded head dims (32) and the key tile. */
export function matrixProducts(configs: readonly MatrixConfig[], accumulate: Accumulation): MatrixProducts | undefined {
  const ranked = (preference: readonly string[]) =>
    preference.flatMap((types) =>
      configs
        .filter((config) => `${config.componentType}->${config.resultComponentType}` === types && fitsUnits(config))
        .sort((a, b) => b.M * b.N * b.K - a.M * a.N * a.K),
    );
  for (const qk of ranked(QK_PREFERENCE)) {
    const pv = ranked(PV_PREFERENCE[accumulate]).find(({ M, K }) => M === qk.M && VALUE_GROUP % K === 0);
    if (pv !== undefined) return { qk, pv };
  }
  return undefined;
}

/** What a device offers the matrix kernel, or why it does not. */
export function matrixSupport(capabilities: Capabilities, emulate: Emulation | undefined) {
  const configs = emulate !== undefined ? EMULATED_PRODUCTS[emulate] : capabilities.matrixConfigs;
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
  const native = emulate === undefined && Object.values(products).some(({ componentType }) => componentType === 'f16');
  if (native && !capabilities.shaderF16) return { reason: "no feature 'shader-f16'" };
  return { lanes, configs };
}

/** How matrices are written on a device. */
export const operationsOf = (
  capabilities: Capabilities,
  lanes: number,
  emulate: Emulation | undefined,
): MatrixOperations => {
  const extension = MATRIX_FEATURES.find(([feature]) => capabilities.matrixFeature === feature)?.[1] ?? '';
  return emulate !== undefined ? emulatedMatrices(lanes) : nativeMatrices(extension, capabilities.matrixDialect);
};

/** The shapes that fit a device, its products and a problem, best first. */
function fittingVariants(
  capabilities: Capabilities,
  products: MatrixProducts,
  lanes: number,
  request: Pick<VariantRequest, 'headDimPadded' | 'valueDimPadded' | 'queryLength' | 'pvAccumDtype'>,
  emulate: Emulation | undefined,
): { readonly offered: readonly MatrixVariant[]; readonly all: readonly MatrixVariant[] } {
  const { headDimPadded, valueDimPadded, queryLength, pvAccumDtype } = request;
  const wrong = (emulate === undefined && capabilities.wrongShapes) || [];
  const extra = operationsOf(capabilities, lanes, emulate);
  const fits = (variant: MatrixVariant) => {
    const tiling = matrixTiling(variant, products, lanes, headDimPadded, valueDimPadded);
    return (
      tiling !== undefined &&
      tiling.bytes + extra.workgroupBytes(tiling.threads) <= capabilities.workgroupBytes &&
      tiling.threads <= capabilities.workgroupThreads &&
      !wrong.includes(shapeKey(variant.name, headDimPadded, valueDimPadded, pvAccumDtype === 'fp16'))
    );
  };
  const line = MATRIX_SHAPES.find(
    ({ headDim, queries }) => Math.max(headDimPadded, valueDimPadded) <= headDim && queryLength <= queries,
  );
  const all = MATRIX_VARIANTS.filter(fits);
  return { offered: [...(line?.variants ?? []).filter(fits), ...all], all };
}

function chooseMatrixVariant(
  capabilities: Capabilities,
  request: VariantRequest,
  emulate: Emulation | undefined,
): AttentionVariant {
  const { pvAccumDtype, variant: forced } = request;
  const { lanes, configs, reason } = matrixSupport(capabilities, emulate);
  if (lanes === undefined) throw new Error(`the family was chosen although it is not supported: ${reason}`);
  const accumulate: Accumulation = pvAccumDtype === 'fp16' ? 'f16' : 'f32';
  const products = matrixProducts(configs, accumulate);
  if (products === undefined) throw unsupportedAccumulation('a device that lists no product with float16 sums');
  const { offered, all } = fittingVariants(capabilities, products, lanes, request, emulate);
  const found = forced === undefined ? offered[0] : all.find(({ name }) => name === forced);
  if (found === undefined) {
    const names = all.map(({ name }) => `'${name}'`).join(', ');
    throw new UnsupportedOptionError('qk-int8-pv-fp16', 'options.variant', `one of ${names || 'none'}`, `'${forced}'`);
  }
  // Sums in float16 have no room for P above 1.
  const variant = accumulate === 'f16' ? { ...found, headroom: 0 } : found;
  return {
    family: 'matrix',
    name: variant.name,
    kernel: {
      label: `attention matrix ${variant.name}${emulate === undefined ? '' : ' emulated'}`,
      rows: variant.rows,
      source: (config) =>
        matrixAttentionKernel({
          ...config,
          ...variant,
          ...products,
          lanes,
          operations: operationsOf(capabilities, lanes, emulate),
        }),
    },
  };
}

/** Why no shape holds a problem's head dims; undefined where one does. */
function withoutShape(capabilities: Capabilities, { headDim, valueDim }: HeadDims, emulate: Emulation | undefined) {
  // Integer sums of wider heads are not exact in float32 (SUM_ORIGIN), and no shape divides their channels.
  if (Math.max(headDim, valueDim) > MAX_HEAD_DIM) return `D and Dv up to ${MAX_HEAD_DIM} only`;
  const { lanes, configs, reason } = matrixSupport(capabilities, emulate);
  const products = matrixProducts(configs ?? [], 'f32');
  if (lanes === undefined || products === undefined) return reason;
  const dims = { headDimPadded: padDim(headDim), valueDimPadded: padDim(valueDim), pvAccumDtype: undefined };
  const { offered } = fittingVariants(
    capabilities,
    products,
    lanes,
    { ...dims, queryLength: Number.MAX_VALUE },
    emulate,
  );
  return offered.length > 0 ? undefined : `no shape for D ${headDim}, Dv ${valueDim} fits, or comes out right`;
}

/** @param emulate products to emulate; default: the device's own */
export const matrixFamily = (emulate?: Emulation): KernelFamily => ({
  name: 'matrix',
  layout: 'tiles',
  values: ['fp16'],
  variants: MATRIX_VARIANTS,
  support: (capabilities) => matrixSupport(capabilities, emulate).reason,
  unfit: (capabilities, dims) => withoutShape(capabilities, dims, emulate),
  fitting(capabilities, request) {
    const { lanes, configs } = matrixSupport(capabilities, emulate);
    const products = matrixProducts(configs ?? [], request.pvAccumDtype === 'fp16' ? 'f16' : 'f32');
    if (lanes === undefined || products === undefined) return [];
    const { offered } = fittingVariants(capabilities, products, lanes, request, emulate);
    return [...new Set(offered.map(({ name }) => name))];
  },
  kernel: (capabilities, request) => chooseMatrixVariant(capabilities, request, emulate),
});
