/** V in FP16, which keeps its layout: rows of tokens, as K's. */
import { offset } from '../../parts/addresses.ts';
import { nextPowerOfTwo } from '../../parts/constants.ts';
import { at } from '../../parts/lists.ts';
import { centered } from './channels.ts';
import { KEY_VALUE_TILE } from './config.ts';
import { isFaulty } from './faults.ts';
import type { ValueOrder } from './records.ts';
import type { Tile } from './tile.ts';

export function orderAsItLies(tile: Tile): ValueOrder {
  const { b, config, thread, threads, pointer, firstRow, keyLayout, isSeen } = tile;
  const { paddedValueDim } = config;
  const ofRow = Math.max(nextPowerOfTwo(paddedValueDim / 8), threads / KEY_VALUE_TILE);
  const atOnce = threads / ofRow;
  const firstOfThread = b.shr(thread, Math.log2(ofRow));
  const channel = b.shl(b.and(thread, ofRow - 1), 3);
  const tokens = Array.from({ length: KEY_VALUE_TILE / atOnce }, (_, i) => b.add(firstOfThread, i * atOnce));
  const store: ValueOrder['store'] = ({ packed, mean }, faults) => {
    b.section('convert and store V');
    const rowBytes = paddedValueDim * 2;
    const destination = b.add(
      offset(b, b.loadPointer(pointer.value), b.add(firstRow, firstOfThread), rowBytes),
      b.as(b.mulWide(channel, 2), 'global'),
    );
    const inRow = b.setp('lt', channel, paddedValueDim);
    packed.forEach((eight, i) => {
      const floats = centered(tile, eight, mean);
      const pairs = [0, 2, 4, 6].map((c) => b.as(b.cvtPack('f16x2', at(floats, c), at(floats, c + 1)), 'b32'));
      const clear = () => {
        for (const pair of pairs) b.set(pair, 0);
      };
      if (config.smoothV) {
        // 0 less the mean may be beyond FP16's range.
        b.when(isFaulty(tile, faults, keyLayout.passes + i), clear);
        if (isSeen !== undefined) b.when(b.notPred(isSeen(at(tokens, i))), clear);
      }
      b.when(inRow, () => b.stVector(pairs, destination, i * atOnce * rowBytes));
    });
    b.barSync();
  };
  return { channels: { channel, span: ofRow * 8 }, tokens, store };
}
