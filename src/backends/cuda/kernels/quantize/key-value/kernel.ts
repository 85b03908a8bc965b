/**
 * Quantizes K and V for the Hopper kernels in one launch that reads each once: INT8 rows of K with float32 scales, and V in FP16
 * or FP8. One CTA takes a tile of 128 keys of one head, the attention kernel's own.
 *
 * V in FP16 stays as it lies, `[head, token, channel]`. V in FP8 is transposed within tiles, `[head, tile, channel, token]`, so that
 * attention reads each tile in one piece; tokens are permuted inside every 16, and
 *
 *     v[token, channel] ~ code * valueScale[channel] * valueTileScale[tile]
 *
 * `valueScale` comes from a sample of the tokens (`channelStatistics`), so that no pass over all of V precedes this one;
 * what exceeds it is covered by a scale that the tile chooses for itself. That is a power of two, which costs FP8 no
 * accuracy, is 1 for nearly all tiles, and lets attention move its sums from one tile's scale to the next's without a rounding.
 * A finished tile never changes, whatever is appended.
 *
 * A key far smaller than the largest of its group would lose its bits to that: its codes are taken larger by a power of two, which
 * `keyExponents` has (`KEY_EXPONENT_BIAS`), and the sign bit of the scales of its 64 keys says so.
 *
 * An element that is not finite sets its token's bit in `keyFaults` and that sign bit: attention makes NaN of the rows that see it, and of those only. Of V it becomes 0 with its neighbours, since 0 * NaN would reach
 * the others; it takes no part in a scale. So it is with numbers beyond FP16's range where V is stored in FP16. Before the first
 * key that causality, window and length leave to any row, and behind the last, tiles are filled with copies of it.
 */
import type { Kernel } from '../../../ptx/types.ts';
import type { QuantizeKeyValueConfig } from './config.ts';
import { reportFaults } from './faults.ts';
import { findKeyMaxima, loadKeys, quantizeKeys, writeKeyScales } from './keys.ts';
import { makeTile } from './tile.ts';
import { findValueMaximum, loadValues } from './values.ts';

export function quantizeKeyValue(config: QuantizeKeyValueConfig): Kernel {
  const tile = makeTile(config);
  const { b } = tile;
  const keys = loadKeys(tile);
  b.section('load V');
  // All of K and V is under way at once where it fits in registers, and two CTAs on a multiprocessor: one loads while the other computes.
  const early = config.dtype === 'float32' ? undefined : loadValues(tile);

  const { mean, faults } = findKeyMaxima(tile, keys);
  if (early === undefined) {
    b.barSync();
    quantizeKeys(tile, keys, mean);
  }

  b.section('largest code of V');
  const values = findValueMaximum(tile, early ?? loadValues(tile), faults);
  reportFaults(tile, faults, keys, values);
  b.barSync();

  if (early !== undefined) quantizeKeys(tile, keys, mean);
  values.store(values, faults);
  writeKeyScales(tile);
  return b.build();
}
