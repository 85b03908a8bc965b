/** Families `subgroup` and `base`: tiles for devices without subgroup matrices. */
import type { KernelName } from '../../../attention/kernels.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { Capabilities } from '../capabilities.ts';
import { MAX_HEAD_DIM, type ValueFormat, valueFormatOf } from '../kernel-table.ts';
import { type TileShape, tiledAttentionKernel, tiledWorkgroupBytes } from '../kernels/attention-tiled.ts';
import { valueSlices } from '../kernels/layout.ts';
import { type KernelFamily, unsupportedAccumulation, type VariantRequest } from './family.ts';

export interface TiledVariant extends TileShape {
  readonly name: string;
}

const tiledVariant = (
  rows: number,
  keys: number,
  rowThreads: number,
  colThreads: number,
  options: 's' | 'sq' | '' = '',
): TiledVariant => ({
  name: `${rows}x${keys}${colThreads < 8 ? 'n' : ''}${options}`,
  rows,
  keys,
  rowThreads,
  colThreads,
  sharedKeyValue: options !== '',
  storedQuery: options === 'sq',
});

/**
 * Tiles of families `subgroup` and `base`, best first: the first that fits the device and the head dims is taken. Small
 * tiles serve devices with the core limit of 16 KiB workgroup memory, wide heads, and short queries. Names: rows x
 * keys, fewer than 8 threads to a row (n), K and V in the same memory (s), Q in storage (q: for D or Dv above 256 only). The first
 * entries are ordered by speed on an H200 (bench/webgpu).
 */
export const TILED_VARIANTS: readonly TiledVariant[] = [
  tiledVariant(64, 16, 32, 4),
  tiledVariant(64, 32, 16, 8),
  tiledVariant(64, 32, 16, 8, 's'),
  tiledVariant(32, 32, 16, 8),
  tiledVariant(32, 32, 16, 8, 's'),
  tiledVariant(32, 32, 16, 8, 'sq'),
  tiledVariant(32, 16, 16, 4),
  tiledVariant(32, 16, 16, 4, 's'),
  tiledVariant(16, 16, 16, 4),
  tiledVariant(16, 16, 16, 4, 's'),
  tiledVariant(16, 16, 16, 4, 'sq'),
];

/**
 * Those whose V is in INT8, best first: on an H200, 16 heads of 8192 tokens, family `subgroup`, D 128: 63.6, 59.1, 60.1, 55.9, 38.3
 * TFLOP/s; D 64: 55.5, 54.6, 53.9, 54.7, 34.6. K and V share no memory: V takes half of what float16 does.
 */
const INTEGER_VARIANTS = ['64x32', '64x16n', '32x32', '32x16n', '16x16n'];

const SOFTWARE_VARIANT = '16x16n';

/** A thread's output registers (float32) above which a tile is not used: more would spill. */
const OUTPUT_REGISTERS = 80;

type TileRequest = Pick<VariantRequest, 'headDimPadded' | 'valueDimPadded' | 'queryLength'>;

/** The tiles that fit a device and what V is multiplied in, in the table's order, and the same with the best for a problem first. */
function fittingTiles(
  capabilities: Capabilities,
  family: 'subgroup' | 'base',
  { headDimPadded, valueDimPadded, queryLength }: TileRequest,
  format: ValueFormat,
) {
  const ownValues = valueDimPadded / valueSlices(valueDimPadded);
  const isWide = Math.max(headDimPadded, valueDimPadded) > MAX_HEAD_DIM;
  const fits = (variant: TiledVariant) =>
    (isWide || !variant.storedQuery) &&
    tiledWorkgroupBytes(variant, headDimPadded, valueDimPadded, format) <= capabilities.workgroupBytes &&
    variant.rowThreads * variant.colThreads <= capabilities.workgroupThreads &&
    (family === 'base' || variant.colThreads <= capabilities.subgroupSize[0]) &&
    ownValues % (4 * variant.colThreads) === 0;
  const affordable = (variant: TiledVariant) =>
    ((variant.rows / variant.rowThreads) * ownValues) / variant.colThreads <= OUTPUT_REGISTERS;
  const all =
    format === 'int8'
      ? INTEGER_VARIANTS.flatMap((name) => TILED_VARIANTS.filter((variant) => variant.name === name))
      : TILED_VARIANTS;
  const candidates = all.filter(fits);
  const best = candidates.filter(affordable);
  const ordered = best.length > 0 ? best : candidates;
  const short = ordered.filter(({ rows }) => rows <= Math.max(16, queryLength));
  // Software drivers gain nothing from large tiles and compile them slowly.
  const simplest = candidates.filter(({ name }) => capabilities.isSoftware && name === SOFTWARE_VARIANT);
  return { candidates, offered: [...simplest, ...(short.length > 0 ? short : ordered.slice(-1))] };
}

/**
 * @param queryLength the longest query
 * @param forced a variant's name, for tests and tuning
 * @param kernel what V is multiplied in decides about workgroup memory
 */
export function chooseTiles(
  capabilities: Capabilities,
  family: 'subgroup' | 'base',
  headDimPadded: number,
  valueDimPadded: number,
  queryLength: number,
  forced: string | undefined,
  kernel: KernelName = 'qk-int8-pv-fp16',
): TiledVariant {
  const format = valueFormatOf(kernel);
  const dims = { headDimPadded, valueDimPadded, queryLength };
  const { candidates, offered } = fittingTiles(capabilities, family, dims, format);
  if (forced !== undefined) {
    const variant = candidates.find(({ name }) => name === forced);
    if (variant === undefined) {
      throw new UnsupportedOptionError(
        kernel,
        'options.variant',
        `one of ${candidates.map(({ name }) => `'${name}'`).join(', ')} for this device and these head dims`,
        `'${forced}'`,
      );
    }
    return variant;
  }
  const [chosen] = offered;
  if (chosen === undefined) {
    const smallest = Math.min(
      ...TILED_VARIANTS.map((variant) => tiledWorkgroupBytes(variant, headDimPadded, valueDimPadded, format)),
    );
    throw new UnsupportedOptionError(
      kernel,
      'device',
      `at least ${smallest} bytes of workgroup memory`,
      `${capabilities.workgroupBytes} bytes`,
    );
  }
  return chosen;
}

const tiledFamily = (
  name: 'subgroup' | 'base',
  support: (capabilities: Capabilities) => string | undefined,
): KernelFamily => ({
  name,
  layout: 'rows',
  values: ['fp16', 'int8', 'fp4'],
  variants: TILED_VARIANTS,
  unfit: () => undefined,
  support,
  fitting: (capabilities, request) =>
    fittingTiles(capabilities, name, request, valueFormatOf(request.kernel)).offered.map((tiles) => tiles.name),
  kernel(capabilities, { kernel, headDimPadded, valueDimPadded, queryLength, pvAccumDtype, variant }) {
    if (pvAccumDtype === 'fp16') throw unsupportedAccumulation(`family '${name}'`);
    const tiles = chooseTiles(capabilities, name, headDimPadded, valueDimPadded, queryLength, variant, kernel);
    return {
      family: name,
      name: tiles.name,
      kernel: {
        label: `attention ${name} ${tiles.name}`,
        rows: tiles.rows,
        source: (config) =>
          tiledAttentionKernel({
            ...config,
            ...tiles,
            family: name,
            packedDot: capabilities.packedDot,
            subgroupId: capabilities.subgroupId,
          }),
      },
    };
  },
});

export const SUBGROUP_FAMILY = tiledFamily('subgroup', ({ subgroups, packedDot, subgroupSize: [smallest] }) => {
  if (!subgroups) return "no feature 'subgroups'";
  if (!packedDot) return 'no dot4I8Packed';
  return smallest < 4 ? 'subgroups smaller than 4' : undefined;
});

/** Core WebGPU: every device runs it. */
export const BASE_FAMILY = tiledFamily('base', () => undefined);
