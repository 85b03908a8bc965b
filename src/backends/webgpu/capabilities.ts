/** What a device can do, as data: what the selection tables and the kernels' configurations are chosen from. */

import type { TunedEntry } from './tuning/record.ts';

/** One subgroup matrix product: left is M x K, right K x N. */
export interface MatrixConfig {
  readonly componentType: string;
  readonly resultComponentType: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/**
 * What implementations of the extension differ in. `majorness`: whether a load's majorness is a template parameter or
 * an argument. `unit`: whether offsets and strides count the array's elements, which are 16 bytes here, or the matrix's
 * components.
 */
export interface MatrixDialect {
  readonly majorness: 'template' | 'argument';
  readonly unit: 'elements' | 'components';
}

export interface Capabilities {
  /** `vendor architecture device description` of the adapter, as far as it tells. */
  readonly adapter: string;
  /** A software driver: correct, not fast. */
  readonly isSoftware: boolean;
  readonly shaderF16: boolean;
  readonly subgroups: boolean;
  /** Smallest and largest subgroup; 0 when unknown. */
  readonly subgroupSize: readonly [min: number, max: number];
  /** Subgroup matrix products that shaders may use; empty without the feature. */
  readonly matrixConfigs: readonly MatrixConfig[];
  /**
   * Products that are listed, but do not come out right in a trial on the device: they are left out of `matrixConfigs`.
   */
  readonly wrongMatrices?: readonly MatrixConfig[];
  /** Shapes of the matrix kernel, as `shapeKey` names them, that were wrong in a trial: they are not used. */
  readonly wrongShapes?: readonly string[];
  /** The name under which the device has them. */
  readonly matrixFeature: string | undefined;
  /** How its WGSL writes them; what was found by probing, or the newest. */
  readonly matrixDialect: MatrixDialect;
  /** What was measured on the device: preferred to the tables. */
  readonly tuning?: readonly TunedEntry[];
  readonly packedDot: boolean;
  readonly subgroupId: boolean;
  readonly timestamps: boolean;
  readonly workgroupBytes: number;
  readonly workgroupThreads: number;
  readonly storageBuffers: number;
  /** Largest storage binding, bytes. */
  readonly bindingBytes: number;
  readonly bufferBytes: number;
  /** Alignment of storage binding offsets, bytes. */
  readonly bindingAlignment: number;
  readonly dispatch: number;
}

/** The names under which the subgroup matrix feature goes, newest first, with the WGSL extension of each. */
export const MATRIX_FEATURES = [
  ['subgroup-matrix', 'subgroup_matrix'],
  ['chromium-experimental-subgroup-matrix', 'chromium_experimental_subgroup_matrix'],
] as const;

/** Features that make the backend faster; requested where the adapter has them. */
export const WANTED_FEATURES = [
  'shader-f16',
  'subgroups',
  'timestamp-query',
  ...MATRIX_FEATURES.map(([feature]) => feature),
] as const;

/** Limits of which the adapter's whole amount is requested. */
export const WANTED_LIMITS = [
  'maxStorageBufferBindingSize',
  'maxBufferSize',
  'maxComputeWorkgroupStorageSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxStorageBuffersPerShaderStage',
] as const;

interface AdapterInfo extends GPUAdapterInfo {
  readonly subgroupMatrixConfigs?: Iterable<MatrixConfig>;
}

const SOFTWARE = /swiftshader|llvmpipe|lavapipe|basic render|software|cpu/i;

/** @param info of the adapter or, where it has one, of the device */
export function capabilitiesOf(
  device: Pick<GPUDevice, 'features' | 'limits'>,
  info: GPUAdapterInfo | undefined,
  language: ReadonlySet<string> | undefined,
): Capabilities {
  const { features, limits } = device;
  const has = (feature: string) => features.has(feature as GPUFeatureName);
  const adapter = [info?.vendor, info?.architecture, info?.device, info?.description].filter(Boolean).join(' ');
  const matrixFeature = MATRIX_FEATURES.map(([feature]) => feature).find(has);
  return {
    adapter: adapter === '' ? 'unnamed adapter' : adapter,
    isSoftware: SOFTWARE.test(adapter) || info?.isFallbackAdapter === true,
    shaderF16: has('shader-f16'),
    subgroups: has('subgroups'),
    subgroupSize: [info?.subgroupMinSize ?? 0, info?.subgroupMaxSize ?? 0],
    matrixConfigs: matrixFeature === undefined ? [] : matrixConfigsOf(info),
    matrixFeature,
    matrixDialect: { majorness: 'template', unit: 'elements' },
    packedDot: language?.has('packed_4x8_integer_dot_product') ?? false,
    subgroupId: language?.has('subgroup_id') ?? false,
    timestamps: has('timestamp-query'),
    workgroupBytes: limits.maxComputeWorkgroupStorageSize,
    workgroupThreads: Math.min(limits.maxComputeInvocationsPerWorkgroup, limits.maxComputeWorkgroupSizeX),
    storageBuffers: limits.maxStorageBuffersPerShaderStage,
    bindingBytes: limits.maxStorageBufferBindingSize,
    bufferBytes: limits.maxBufferSize,
    bindingAlignment: limits.minStorageBufferOffsetAlignment,
    dispatch: limits.maxComputeWorkgroupsPerDimension,
  };
}

/** A product in a few characters. */
export const matrixText = ({ componentType, resultComponentType, M, N, K }: MatrixConfig): string =>
  `${componentType}->${resultComponentType} ${M}x${N}x${K}`;

/** The subgroup matrix products that an adapter lists. */
export const matrixConfigsOf = (info: GPUAdapterInfo | undefined): readonly MatrixConfig[] =>
  Array.from(
    (info as AdapterInfo | undefined)?.subgroupMatrixConfigs ?? [],
    ({ componentType, resultComponentType, M, N, K }) => ({ componentType, resultComponentType, M, N, K }),
  );
