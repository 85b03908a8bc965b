/** The producer: one thread that sends Q, K and V to shared memory. */
import { mbarrierArriveExpectTx, mbarrierWait } from '../../ptx/mbarrier.ts';
import { prefetchTensorMap, tensorLoad } from '../../ptx/tma.ts';
import type { Reg } from '../../ptx/types.ts';
import { setMaxNReg } from '../../ptx/wgmma.ts';
import { loadEntry, tileOfEntry } from '../parts/blocks.ts';
import type { RingPlace } from '../parts/ring.ts';
import type { Frame } from './frame.ts';
import { eachWork, tokenOf, type Work } from './work.ts';

export function producer(frame: Frame): void {
  const { b, config, fused, barriers, keys, queryEmpty } = frame;
  if (config.registers !== undefined) setMaxNReg(b, 'dec', config.registers.producer);
  b.if(b.setp('eq', frame.thread, 0), () => {
    const [queryMap, keyMap, valueMap] = frame.maps.map((map) => b.tensorMapAddress(map)) as [
      Reg<'global'>,
      Reg<'global'>,
      Reg<'global'>,
    ];
    for (const map of fused ? [keyMap, valueMap] : [queryMap, keyMap, valueMap]) prefetchTensorMap(b, map);
    // K and V go from stage to stage together.
    const place = keys.place();
    const queryParity = b.constant('u32', 1);
    eachWork(frame, (work) => {
      if (!fused) {
        b.section('producer: Q');
        // Also for an item without tiles: consumers count on it.
        mbarrierWait(b, barriers, queryParity, queryEmpty);
        b.xor(queryParity, 1, queryParity);
        sendQuery(frame, work, queryMap);
      }
      sendTiles(frame, work, place, keyMap, valueMap);
    });
  });
}

function sendQuery(frame: Frame, { head, firstRow, paddedQueryStart }: Work, queryMap: Reg<'global'>): void {
  const { b, config, plan, integer, tiles, bytes, shared, barriers, queryFull } = frame;
  mbarrierArriveExpectTx(b, barriers, tiles.query.bytes, queryFull);
  const into = b.add(shared, tiles.query.base);
  const token = b.add(paddedQueryStart, tokenOf(frame, firstRow));
  const coordinates =
    config.packedHeads === 1
      ? [b.as(b.mad(head, b.loadParameter(integer.paddedQueries), token), 's32')]
      : [b.as(head, 's32'), b.as(token, 's32')];
  for (let block = 0; block < plan.rowBlocks; block++) {
    const column = b.constant('s32', block * plan.rowLayout.rowBytes);
    tensorLoad(b, into, queryMap, [column, ...coordinates], barriers, {
      intoOffset: block * bytes.queryBlock,
      barrierOffset: queryFull,
    });
  }
}

/** Sends an item's tiles of K and V, each as its stage becomes free. */
function sendTiles(
  { b, config, plan, integer, fp8, tiles, bytes, shared, keys, values }: Frame,
  { list, firstTile, lastTile, keyHead, paddedKeyStart }: Work,
  place: RingPlace,
  keyMap: Reg<'global'>,
  valueMap: Reg<'global'>,
): void {
  const paddedKeys = b.loadParameter(integer.paddedKeys);
  const keyRow = b.as(b.mad(keyHead, paddedKeys, paddedKeyStart), 's32');
  const token = b.as(paddedKeyStart, 's32');
  const valueRow = b.as(fp8 ? b.mul(keyHead, config.paddedValueDim) : b.as(keyRow, 'u32'), 's32');
  const position = b.mov(firstTile);
  b.loop(
    () => b.setp('lt', position, lastTile),
    () => {
      const tile = list === undefined ? position : tileOfEntry(b, loadEntry(b, list, position));
      const emptyParity = b.xor(place.parity, 1);
      const firstKey = b.shl(tile, 7);
      b.section('producer: K');
      const barrier = keys.barrierAt(place);
      mbarrierWait(b, barrier, emptyParity, keys.empty);
      mbarrierArriveExpectTx(b, barrier, bytes.keyStage, keys.full);
      const keyAt = b.add(shared, b.as(b.mad(place.stage, bytes.keyStage, tiles.key.base), 'shared'));
      for (let block = 0; block < plan.rowBlocks; block++) {
        const column = b.constant('s32', block * plan.rowLayout.rowBytes);
        tensorLoad(b, keyAt, keyMap, [column, b.add(keyRow, firstKey)], barrier, {
          intoOffset: block * bytes.keyBlock,
          barrierOffset: keys.full,
        });
      }
      b.section('producer: V');
      mbarrierWait(b, barrier, emptyParity, values.empty);
      mbarrierArriveExpectTx(b, barrier, plan.valueCopyBytes, values.full);
      const valueAt = b.add(shared, b.as(b.mad(place.stage, bytes.valueStage, tiles.value.base), 'shared'));
      for (let block = 0; block < plan.valueBlocks; block++) {
        const coordinates = fp8
          ? [b.add(token, firstKey), valueRow]
          : [b.constant('s32', block * plan.valueBlockChannels), b.add(valueRow, firstKey)];
        tensorLoad(b, valueAt, valueMap, coordinates, barrier, {
          intoOffset: block * plan.valueBlockBytes,
          barrierOffset: values.full,
        });
      }
      keys.advance(place);
      b.add(position, 1, position);
    },
  );
}
