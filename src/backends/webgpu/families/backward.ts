/** Tiles of the gradient kernels. */
import { UnsupportedOptionError } from '../../../errors.ts';
import type { Capabilities } from '../capabilities.ts';
import { type GradientTile, gradientWorkgroupBytes } from '../kernels/backward/gradients.ts';
import type { GradientDims } from '../kernels/backward/layout.ts';
import type { Forced } from './choose.ts';

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
 * A thread's sums (vectors of four floats) above which a tile is not used. With 32, as the first tile has for K and V at D = 128, it is 1.2
 * times as fast there as with 16 of the second tile (H200, 36.3 against 43.4 ms); twice as many were not tried.
 */
const SUMS = 32;

const SOFTWARE_VARIANT = GRADIENT_VARIANTS.at(-1) as GradientVariant;

/** @throws {UnsupportedOptionError} a forced tile that does not fit */
export function chooseGradientTile(
  { isSoftware, workgroupBytes, workgroupThreads }: Capabilities,
  owner: 'query' | 'key',
  { headDimPadded, valueDimPadded }: GradientDims,
  { gradientVariant: forced }: Forced = {},
): GradientVariant {
  const runs = (tile: GradientVariant) =>
    gradientWorkgroupBytes(owner, tile) <= workgroupBytes && tile.ownThreads * tile.passingThreads <= workgroupThreads;
  if (forced !== undefined) {
    const candidates = GRADIENT_VARIANTS.filter(runs);
    const tile = candidates.find(({ name }) => name === forced);
    if (tile !== undefined) return tile;
    throw new UnsupportedOptionError(
      'qk-int8-pv-fp16',
      'options.gradientVariant',
      `one of ${candidates.map(({ name }) => `'${name}'`).join(', ')}`,
      `'${forced}'`,
    );
  }
  // Software drivers gain nothing from large tiles and compile them slowly.
  if (isSoftware) return SOFTWARE_VARIANT;
  const channels = owner === 'query' ? headDimPadded : headDimPadded + valueDimPadded;
  const fits = (tile: GradientVariant) =>
    runs(tile) && ((tile.own / tile.ownThreads) * channels) / 4 / tile.passingThreads <= SUMS;
  return GRADIENT_VARIANTS.find(fits) ?? SOFTWARE_VARIANT;
}
