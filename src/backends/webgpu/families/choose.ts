/** Which kernel family and tiles a device and a problem get: tables, and the few rules that read them. */

import type { AttentionProblem } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { KernelChoice } from '../../backend.ts';
import { type Capabilities, MATRIX_FEATURES, type MatrixConfig } from '../capabilities.ts';
import { type MatrixShape, matrixAttentionKernel, matrixWorkgroupBytes } from '../kernels/attention-matrix.ts';
import { type TileShape, tiledAttentionKernel, tiledWorkgroupBytes } from '../kernels/attention-tiled.ts';
import { KEY_TILE, type KeyValueLayout, VALUE_GROUP } from '../kernels/layout.ts';
import { emulatedMatrices, nativeMatrices } from '../kernels/matrix-operations.ts';
import { type AttentionKernel, padDim } from '../launches/stages.ts';

export const FAMILIES = ['matrix', 'subgroup', 'base'] as const;

export type Family = (typeof FAMILIES)[number];

export interface TiledVariant extends TileShape {
  readonly name: string;
}

const tiledVariant = (
  rows: number,
  keys: number,
  rowThreads: number,
  colThreads: number,
  options: 's' | '' = '',
): TiledVariant => ({
  name: `${rows}x${keys}${colThreads < 8 ? 'n' : ''}${options}`,
  rows,
  keys,
  rowThreads,
  colThreads,
  sharedKeyValue: options === 's',
});

/**
 * Tiles of families `subgroup` and `base`, best first: the first that fits the device and the head dims is taken. Small
 * tiles serve devices with the core limit of 16 KiB workgroup memory, wide heads, and short queries. Names: rows x keys,
 * fewer than 8 threads to a row (n), K and V in the same memory (s). The order of the first is that of bench/webgpu/families.ts on an H200.
 */
export const TILED_VARIANTS: readonly TiledVariant[] = [
  tiledVariant(64, 16, 32, 4),
  tiledVariant(64, 32, 16, 8),
  tiledVariant(64, 32, 16, 8, 's'),
  tiledVariant(32, 32, 16, 8),
  tiledVariant(32, 32, 16, 8, 's'),
  tiledVariant(32, 16, 16, 4),
  tiledVariant(32, 16, 16, 4, 's'),
  tiledVariant(16, 16, 16, 4),
  tiledVariant(16, 16, 16, 4, 's'),
];

const SOFTWARE_VARIANT = '16x16n';

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
 * Tiles of family `matrix`, best first; the first that fits is taken. Names: subgroups x row tiles x keys, loads ahead of
 * need (a), exact maximum (e). The order of the first is that of bench/webgpu/families.ts on an H200.
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
  if (configs.length === 0) return { reason: 'no subgroup matrix configurations (in Dawn: toggle allow_unsafe_apis)' };
  if (emulate === undefined && min !== max) return { reason: `subgroups of ${min} to ${max} lanes` };
  const products = matrixProducts(configs, 'f32');
  if (products === undefined) return { reason: 'no pair of listed products that the kernel can use' };
  if (products.pv.componentType === 'f16' && !capabilities.shaderF16) return { reason: "no feature 'shader-f16'" };
  if (lanes % products.qk.M !== 0 || lanes / products.qk.M > Math.max(4, min))
    return { reason: `subgroups of ${lanes} lanes` };
  return { lanes, configs };
}

export function chooseMatrixVariant(
  capabilities: Capabilities,
  headDimPadded: number,
  valueDimPadded: number,
  accumulate: Accumulation,
  forced: string | undefined,
  emulate: Emulation | undefined,
): AttentionVariant {
  const support = matrixSupport(capabilities, emulate);
  if (support.reason !== undefined) {
    throw new UnsupportedOptionError(
      'qk-int8-pv-fp16',
      'options.family',
      "'subgroup' or 'base' on this device",
      `'matrix': ${support.reason}`,
    );
  }
  const { lanes, configs } = support;
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

/** A thread's output registers (float32) above which a tile is not used: more would spill. */
const OUTPUT_REGISTERS = 80;

/** The families that a device can run, best first, and why the others are not among them. */
export function familiesOf(capabilities: Capabilities): { readonly offered: Family[]; readonly missing: string[] } {
  const offered: Family[] = ['base'];
  const missing: string[] = [];
  const [smallest] = capabilities.subgroupSize;
  if (capabilities.subgroups && capabilities.packedDot && smallest >= 4) offered.unshift('subgroup');
  else {
    missing.push(
      `subgroup: ${capabilities.subgroups ? (capabilities.packedDot ? 'subgroups smaller than 4' : 'no dot4I8Packed') : "no feature 'subgroups'"}`,
    );
  }
  const { reason } = matrixSupport(capabilities, undefined);
  if (reason === undefined) offered.unshift('matrix');
  else missing.unshift(`matrix: ${reason}`);
  return { offered, missing };
}

export function chooseFamily(capabilities: Capabilities, forced: Family | undefined): Family {
  const { offered, missing } = familiesOf(capabilities);
  if (forced !== undefined && !offered.includes(forced)) {
    const reason = missing.find((text) => text.startsWith(forced)) ?? forced;
    throw new UnsupportedOptionError(
      'qk-int8-pv-fp16',
      'options.family',
      `'${offered.join("' or '")}' on this device`,
      reason,
    );
  }
  return forced ?? (offered[0] as Family);
}

/** How the kernels of the family that a problem gets on a device read K and V. */
export const keyValueLayoutOf = (capabilities: Capabilities, dims: HeadDims, forced: Forced): KeyValueLayout =>
  familyOf(capabilities, dims, forced) === 'matrix' ? 'tiles' : 'rows';

type HeadDims = Pick<AttentionProblem, 'headDim' | 'valueDim'>;

/** Above it an H200 computed wrong outputs with its own matrices, where emulated ones are right; why is not known. */
const MATRIX_HEAD_DIM = 128;

/** @throws {UnsupportedOptionError} a forced family that the device or its matrices cannot run */
function familyOf(
  capabilities: Capabilities,
  { headDim, valueDim }: HeadDims,
  { family, emulateMatrices }: Forced,
): Family {
  if (emulateMatrices !== undefined) return 'matrix';
  const best = chooseFamily(capabilities, family);
  if (best !== 'matrix' || Math.max(headDim, valueDim) <= MATRIX_HEAD_DIM) return best;
  if (family === undefined) return chooseFamily({ ...capabilities, matrixConfigs: [] }, undefined);
  throw new UnsupportedOptionError(
    'qk-int8-pv-fp16',
    'options.family',
    `'subgroup' or 'base' for head dims above ${MATRIX_HEAD_DIM}`,
    `'matrix' for D ${headDim}, Dv ${valueDim}`,
  );
}

/** What tests and tuning settle beforehand. */
interface Forced {
  readonly family?: Family;
  readonly variant?: string;
  readonly emulateMatrices?: Emulation;
}

/**
 * @param queryLength the longest query
 * @param forced a variant's name, for tests and tuning
 */
export function chooseTiles(
  capabilities: Capabilities,
  family: 'subgroup' | 'base',
  headDimPadded: number,
  valueDimPadded: number,
  queryLength: number,
  forced: string | undefined,
): TiledVariant {
  const fits = (variant: TiledVariant) =>
    tiledWorkgroupBytes(variant, headDimPadded, valueDimPadded) <= capabilities.workgroupBytes &&
    variant.rowThreads * variant.colThreads <= capabilities.workgroupThreads &&
    (family === 'base' || variant.colThreads <= capabilities.subgroupSize[0]) &&
    valueDimPadded % (4 * variant.colThreads) === 0;
  const affordable = (variant: TiledVariant) =>
    ((variant.rows / variant.rowThreads) * valueDimPadded) / variant.colThreads <= OUTPUT_REGISTERS;
  const candidates = TILED_VARIANTS.filter(fits);
  if (forced !== undefined) {
    const variant = candidates.find(({ name }) => name === forced);
    if (variant === undefined) {
      throw new UnsupportedOptionError(
        'qk-int8-pv-fp16',
        'options.variant',
        `one of ${candidates.map(({ name }) => `'${name}'`).join(', ')} for this device and these head dims`,
        `'${forced}'`,
      );
    }
    return variant;
  }
  const best = candidates.filter(affordable);
  const ordered = best.length > 0 ? best : candidates;
  const short = ordered.filter(({ rows }) => rows <= Math.max(16, queryLength));
  // Software drivers gain nothing from large tiles and compile them slowly.
  const simplest = candidates.find(({ name }) => name === SOFTWARE_VARIANT);
  const chosen = (capabilities.isSoftware ? simplest : undefined) ?? short[0] ?? ordered.at(-1);
  if (chosen === undefined) {
    throw new UnsupportedOptionError(
      'qk-int8-pv-fp16',
      'device',
      `at least ${tiledWorkgroupBytes(TILED_VARIANTS.at(-1) as TiledVariant, headDimPadded, valueDimPadded)} bytes of workgroup memory`,
      `${capabilities.workgroupBytes} bytes`,
    );
  }
  return chosen;
}

const unsupportedAccumulation = (received: string) =>
  new UnsupportedOptionError(
    'qk-int8-pv-fp16',
    'options.pvAccumDtype',
    "'fp32', or family 'matrix'",
    `'fp16' on ${received}`,
  );

/** A family's kernel with its tiles settled. */
export interface AttentionVariant {
  readonly family: Family;
  readonly name: string;
  readonly kernel: AttentionKernel;
}

/**
 * The attention kernel for a problem on a device.
 *
 * @throws {UnsupportedOptionError} a forced family or variant that the device cannot run
 */
export function chooseVariant(
  capabilities: Capabilities,
  problem: AttentionProblem,
  choice: KernelChoice,
  forced: Forced,
): AttentionVariant {
  const emulate = forced.emulateMatrices;
  const family = familyOf(capabilities, problem, forced);
  const [headDimPadded, valueDimPadded] = [padDim(problem.headDim), padDim(problem.valueDim)];
  const accumulate = choice.pvAccumDtype === 'fp16' ? 'f16' : 'f32';
  if (family === 'matrix')
    return chooseMatrixVariant(capabilities, headDimPadded, valueDimPadded, accumulate, forced.variant, emulate);
  if (accumulate === 'f16') throw unsupportedAccumulation(`family '${family}'`);
  const tiles = chooseTiles(capabilities, family, headDimPadded, valueDimPadded, problem.queryLength, forced.variant);
  return {
    family,
    name: tiles.name,
    kernel: {
      label: `attention ${family} ${tiles.name}`,
      rows: tiles.rows,
      source: (config) =>
        tiledAttentionKernel({
          ...config,
          ...tiles,
          family,
          packedDot: capabilities.packedDot,
          subgroupId: capabilities.subgroupId,
        }),
    },
  };
}
