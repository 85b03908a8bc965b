/** V of the tile, in either format. */
import type { Reg } from '../../../ptx/types.ts';
import { BEYOND_FP16_BITS, INFINITY_BITS } from '../../parts/constants.ts';
import { at } from '../../parts/lists.ts';
import { centered, channelVector, largestOf, loaderOf, scaled } from './channels.ts';
import { leaveOutFaults } from './faults.ts';
import type { Faults, LoadedValues, Values } from './records.ts';
import { leaveOutHidden, sharedAt, type Tile } from './tile.ts';
import { orderAsItLies } from './values-f16.ts';
import { orderTransposed } from './values-fp8.ts';

export function loadValues(tile: Tile): LoadedValues {
  const { config, fp8, pointer, stride } = tile;
  const order = fp8 ? orderTransposed(tile) : orderAsItLies(tile);
  const strides = [stride.valueBatch, stride.valueHead, stride.valueToken] as const;
  const load = loaderOf(tile, pointer.v, strides, order.channels, config.valueDim, config.valueLoadWidth);
  return { ...order, packed: order.tokens.map(load) };
}

/** V's mean and scales, and what of it is not finite. */
export function findValueMaximum(tile: Tile, loaded: LoadedValues, faults: Faults): Values {
  const { b, config, fp8, shared, warp, valueMaxima, keyLayout } = tile;
  const { channels, tokens, packed } = loaded;
  const mean = config.smoothV ? channelVector(tile, 'valueMean', channels, config.paddedValueDim) : undefined;
  const toCodes = fp8
    ? channelVector(tile, 'valueScale', channels, config.paddedValueDim).map((scale) => b.rcpApprox(scale))
    : undefined;
  let largestCode = b.constant('u32', 0);
  packed.forEach((eight, i) => {
    const largest = largestOf(tile, scaled(tile, centered(tile, eight, mean), toCodes));
    leaveOutHidden(tile, largest, at(tokens, i));
    leaveOutFaults(tile, faults, largest, keyLayout.passes + i, fp8 ? INFINITY_BITS : BEYOND_FP16_BITS);
    if (fp8) b.max(largestCode, largest, largestCode);
  });
  const shareMaximum = (first: Reg<'pred'>) => {
    if (!fp8) return;
    for (let mask = 1; mask < 32; mask *= 2) largestCode = b.max(largestCode, b.shflBfly(largestCode, mask));
    b.when(first, () => b.st(largestCode, sharedAt(tile, shared, warp, 2), valueMaxima.base));
  };
  return { ...loaded, mean, toCodes, shareMaximum };
}
