/** Which gradient kernels a device and a problem get: with subgroup matrices, or tiles in float32. */
import type { BackwardPrecision } from '../../../attention/backward.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { Capabilities } from '../capabilities.ts';
import {
  type GradientConfig,
  type GradientTile,
  gradientKernel,
  gradientWorkgroupBytes,
} from '../kernels/backward/gradients.ts';
import type { GradientDims } from '../kernels/backward/layout.ts';
import { type MatrixGradientShape, matrixGradientTiling } from '../kernels/backward/matrix-gradient-tiling.ts';
import { matrixGradientKernel } from '../kernels/backward/matrix-gradients.ts';
import type { Forced } from './choose.ts';
import { matrixProducts, matrixSupport, operationsOf } from './matrix.ts';

export interface GradientVariant extends GradientTile {
  readonly name: string;
}

const variant = (own: number, passing: number, ownThreads: number, passingThreads: number): GradientVariant => ({
  name: `${own}x${passing}/${ownThreads}x${passingThreads}`,
  own,
  passing,
  ownThreads,
  passingThreads,
});

/**
 * Best first: the more a workgroup owns, the less often the other side is read. The last fits every device with the core limit of
 * 16 KiB. On an H200 the first is the fastest at D 64 and 128 and at 1024 and 4096 tokens (bench/webgpu/backward.ts).
 */
export const GRADIENT_VARIANTS: readonly GradientVariant[] = [
  variant(32, 32, 8, 8),
  variant(32, 32, 16, 8),
  variant(16, 32, 16, 8),
  variant(16, 16, 16, 4),
];

/**
 * The same with products in INT8, whose sums of a tile are short-lived. On an H200, D 64, 16 heads of 4096 tokens, the first takes 4.79 ms for
 * dQ and 6.30 for dK and dV, the second 6.78 and 8.19 (in float32 6.75 and 7.35); at 1024 tokens 0.44 and 0.60, 0.43 and 0.55.
 * D 128, 4096 tokens: 10.9 and 17.0, 13.3 and 17.7 (in float32 17.5 and 14.0).
 */
export const INT8_GRADIENT_VARIANTS: readonly GradientVariant[] = [variant(64, 32, 8, 8), ...GRADIENT_VARIANTS];

export interface MatrixGradientVariant extends MatrixGradientShape {
  /** Subgroups, own and passing tokens, groups of scores and of sums, use of memory. */
  readonly name: string;
}

const shape = (
  subgroups: number,
  own: number,
  passing: number,
  scoreGroups: number,
  sumGroups: number,
  memory: MatrixGradientShape['memory'],
): MatrixGradientVariant => ({
  name: `${subgroups}s${own}o${passing}p-s${scoreGroups}-g${sumGroups}-${memory}`,
  ...{ subgroups, own, passing, scoreGroups, sumGroups, memory },
});

/**
 * Shapes of the gradient kernels with matrices, best first; the last are for devices with little workgroup memory. On an H200, 16 heads of
 * 4096 tokens, milliseconds for dQ and for dK and dV (bench/webgpu/gradients.ts): D 128 (the first does not fit into 48 KiB with own
 * keys) 1.89 and 2.46 for the second, 1.98 and 2.71, 2.78 and 3.59, 2.79 and 4.03, 4.65 and 7.77; D 64 1.50 and 1.88, 1.64 and 2.03, 1.64
 * and 2.13, 1.38 and 2.79, 1.69 and 2.12, 2.14 and 2.47. At 1024 tokens the order of D 128 is the same.
 */
export const MATRIX_GRADIENT_VARIANTS: readonly MatrixGradientVariant[] = [
  shape(8, 128, 16, 8, 4, 'plain'),
  shape(8, 128, 16, 8, 4, 'place'),
  shape(8, 64, 32, 4, 2, 'place'),
  shape(4, 64, 16, 4, 2, 'plain'),
  shape(2, 32, 16, 2, 1, 'plain'),
  shape(1, 16, 16, 1, 1, 'place'),
];

/**
 * A thread's sums (vectors of four floats) above which a tile is not used. With 32, as the first tile has for K and V at D = 128, it is 1.2
 * times as fast there as with 16 of the second tile (H200, 36.3 against 43.4 ms); twice as many were not tried.
 */
const SUMS = 32;

const SOFTWARE_VARIANT = GRADIENT_VARIANTS.at(-1) as GradientVariant;

export type GradientOwner = 'query' | 'key';

/** What the chosen kernels are asked for. */
export type GradientRequest = Omit<GradientConfig, keyof GradientTile | 'owner' | 'packedDot' | 'half' | 'codes'>;

/** The gradient kernel of one side. */
export interface GradientKernel {
  readonly name: string;
  readonly own: number;
  /** Of a tile. */
  readonly passingThreads?: number;
  source(config: GradientRequest): string;
}

/** The gradient kernels of a problem. */
export interface GradientKernels {
  /** Rows are in float16. */
  readonly half: boolean;
  /** The operands of dV, dQ and dK's products are in INT8. */
  readonly codes: boolean;
  readonly query: GradientKernel;
  readonly key: GradientKernel;
  /** The tile of the mask's gradient. */
  readonly mask: GradientVariant;
}

const unknownVariant = (names: readonly string[], forced: string) =>
  new UnsupportedOptionError(
    'qk-int8-pv-fp16',
    'options.gradientVariant',
    `one of ${names.map((name) => `'${name}'`).join(', ')}`,
    `'${forced}'`,
  );

/** @throws {UnsupportedOptionError} a forced tile that does not fit */
export function chooseGradientTile(
  { isSoftware, workgroupBytes, workgroupThreads }: Capabilities,
  owner: GradientOwner,
  { headDimPadded, valueDimPadded, codes }: GradientDims,
  { gradientVariant: forced }: Forced = {},
): GradientVariant {
  const variants = codes ? INT8_GRADIENT_VARIANTS : GRADIENT_VARIANTS;
  const runs = (tile: GradientVariant) =>
    gradientWorkgroupBytes(owner, tile, codes) <= workgroupBytes &&
    tile.ownThreads * tile.passingThreads <= workgroupThreads;
  if (forced !== undefined) {
    const candidates = variants.filter(runs);
    const tile = candidates.find(({ name }) => name === forced);
    if (tile !== undefined) return tile;
    throw unknownVariant(
      candidates.map(({ name }) => name),
      forced,
    );
  }
  // Software drivers gain nothing from large tiles and compile them slowly.
  if (isSoftware) return SOFTWARE_VARIANT;
  const channels = owner === 'query' ? headDimPadded : headDimPadded + valueDimPadded;
  const fits = (tile: GradientVariant) =>
    runs(tile) && ((tile.own / tile.ownThreads) * channels) / 4 / tile.passingThreads <= SUMS;
  return variants.find(fits) ?? SOFTWARE_VARIANT;
}

/** What decides whether a gradient kernel with matrices comes out right on a device. */
const gradientShapeKey = (
  owner: GradientOwner,
  name: string,
  { headDimPadded, valueDimPadded }: GradientDims,
): string => `gradients of own ${owner} ${name} D ${headDimPadded}/${valueDimPadded}`;

/** Shapes that are offered, of those that fit: a device on which none of them is right takes tiles. */
const OFFERED = 4;

/** Of few channels, own queries are the fastest in small workgroups (1.38 ms, above). */
function variantsFor(owner: GradientOwner, { headDimPadded, valueDimPadded }: GradientDims) {
  const few = owner === 'query' && Math.max(headDimPadded, valueDimPadded) <= 64;
  const small = MATRIX_GRADIENT_VARIANTS.filter(({ subgroups }) => few && subgroups === 4);
  return [...new Set([...small, ...MATRIX_GRADIENT_VARIANTS])];
}

/** The gradient kernels with matrices; undefined where the device, its products or the head dims have none. */
function matrixGradients(
  capabilities: Capabilities,
  dims: GradientDims,
  { gradientVariant: forced, emulateMatrices, family }: Forced,
):
  | (Pick<GradientKernels, 'query' | 'key'> & { readonly trialKeys: Readonly<Record<GradientOwner, string>> })
  | undefined {
  if (family !== undefined && family !== 'matrix') return undefined;
  const { lanes, configs } = matrixSupport(capabilities, emulateMatrices);
  const products = matrixProducts(configs ?? [], 'f32');
  if (lanes === undefined || products === undefined) return undefined;
  const { qk, pv } = products;
  // Codes and rows are staged as they are.
  if (qk.componentType !== 'i8' || pv.componentType !== 'f16') return undefined;
  const operations = () => operationsOf(capabilities, lanes, emulateMatrices);
  const fits = (owner: GradientOwner) => (candidate: MatrixGradientVariant) => {
    const tiling = matrixGradientTiling(candidate, products, lanes, owner, dims);
    return (
      tiling !== undefined &&
      tiling.bytes + operations().workgroupBytes(tiling.threads) <= capabilities.workgroupBytes &&
      tiling.threads <= capabilities.workgroupThreads
    );
  };
  const wrong = (emulateMatrices === undefined && capabilities.wrongShapes) || [];
  const named = forced === undefined ? undefined : forced.split(' ');
  const chosen = (owner: GradientOwner): (GradientKernel & { readonly key: string }) | undefined => {
    const able = variantsFor(owner, dims).filter(fits(owner));
    const name = named?.[owner === 'query' ? 0 : named.length - 1];
    const offered =
      name !== undefined
        ? able.filter((candidate) => candidate.name === name)
        : // Of a software driver: what compiles fastest.
          emulateMatrices === undefined
          ? able.slice(0, OFFERED)
          : able.slice(-1);
    const keyOf = (candidate: MatrixGradientVariant) => gradientShapeKey(owner, candidate.name, dims);
    const best = offered.find((candidate) => !wrong.includes(keyOf(candidate)));
    if (best === undefined) return undefined;
    return {
      name: `${best.name}${emulateMatrices === undefined ? '' : ' emulated'}`,
      own: best.own,
      key: keyOf(best),
      source: (config) =>
        matrixGradientKernel({ ...config, ...best, ...products, owner, lanes, operations: operations() }),
    };
  };
  const [query, key] = [chosen('query'), chosen('key')];
  if (query === undefined || key === undefined) return undefined;
  return { query, key, trialKeys: { query: query.key, key: key.key } };
}

/** Names the gradient kernels with matrices that a problem gets, for {@link Capabilities.wrongShapes}; undefined: it gets none. */
export const matrixGradientKeys = (
  capabilities: Capabilities,
  dims: GradientDims,
  forced: Forced,
): Readonly<Record<GradientOwner, string>> | undefined => matrixGradients(capabilities, dims, forced)?.trialKeys;

/**
 * The gradient kernels for a problem on a device: those with subgroup matrices where there are any, but for gradients in INT8.
 *
 * @param precision `fp16` or `int8`
 * @param maskGradient the gradient of the mask is computed too, which takes rows in float32
 * @throws {UnsupportedOptionError} a forced variant that the device cannot run
 */
export function chooseGradients(
  capabilities: Capabilities,
  { headDimPadded, valueDimPadded }: GradientDims,
  forced: Forced,
  precision: BackwardPrecision,
  maskGradient: boolean,
): GradientKernels {
  const codes = precision === 'int8';
  const dims = { headDimPadded, valueDimPadded, codes };
  const matrices = maskGradient || codes ? undefined : matrixGradients(capabilities, dims, forced);
  const tiles = matrices === undefined ? forced : {};
  const tile = (owner: GradientOwner): GradientKernel & { readonly tile: GradientVariant } => {
    const chosen = chooseGradientTile(capabilities, owner, dims, tiles);
    return {
      tile: chosen,
      name: chosen.name,
      own: chosen.own,
      passingThreads: chosen.passingThreads,
      source: (config) => gradientKernel({ ...config, ...chosen, owner, codes, packedDot: capabilities.packedDot }),
    };
  };
  const query = tile('query');
  if (matrices !== undefined) return { half: true, codes, mask: query.tile, query: matrices.query, key: matrices.key };
  return { half: false, codes, mask: query.tile, query, key: tile('key') };
}
