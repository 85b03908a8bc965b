/** Which kernel family and tiles a device and a problem get: tables, and the few rules that read them. */
import { UnsupportedOptionError } from '../../attention/errors.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { KernelChoice } from '../backend.ts';
import type { Capabilities } from './capabilities.ts';
import { type AttentionKernel, padDim } from './stages.ts';
import { type TileShape, tiledAttentionKernel, tiledWorkgroupBytes } from './wgsl/attention-tiled.ts';

export const FAMILIES = ['matrix', 'subgroup', 'base'] as const;

export type Family = (typeof FAMILIES)[number];

export interface TiledVariant extends TileShape {
  readonly name: string;
}

/**
 * Tiles of families `subgroup` and `base`, best first: the first that fits the device and the head dims is taken. Small
 * tiles serve devices with the core limit of 16 KiB workgroup memory, wide heads, and short queries.
 */
export const TILED_VARIANTS: readonly TiledVariant[] = [
  { name: '64x32', rows: 64, keys: 32, rowThreads: 16, colThreads: 8, sharedKeyValue: false },
  { name: '64x32s', rows: 64, keys: 32, rowThreads: 16, colThreads: 8, sharedKeyValue: true },
  { name: '64x16n', rows: 64, keys: 16, rowThreads: 32, colThreads: 4, sharedKeyValue: false },
  { name: '32x32', rows: 32, keys: 32, rowThreads: 16, colThreads: 8, sharedKeyValue: false },
  { name: '32x32s', rows: 32, keys: 32, rowThreads: 16, colThreads: 8, sharedKeyValue: true },
  { name: '32x16n', rows: 32, keys: 16, rowThreads: 16, colThreads: 4, sharedKeyValue: false },
  { name: '32x16ns', rows: 32, keys: 16, rowThreads: 16, colThreads: 4, sharedKeyValue: true },
  { name: '16x16n', rows: 16, keys: 16, rowThreads: 16, colThreads: 4, sharedKeyValue: false },
  { name: '16x16ns', rows: 16, keys: 16, rowThreads: 16, colThreads: 4, sharedKeyValue: true },
];

const SOFTWARE_VARIANT = '16x16n';

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
  _choice: KernelChoice,
  forced: { readonly family?: Family; readonly variant?: string },
): AttentionVariant {
  const family = chooseFamily(capabilities, forced.family);
  const [headDimPadded, valueDimPadded] = [padDim(problem.headDim), padDim(problem.valueDim)];
  if (family === 'matrix')
    throw new UnsupportedOptionError('qk-int8-pv-fp16', 'options.family', "'subgroup' or 'base'", "'matrix'");
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
