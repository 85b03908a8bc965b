/** The producer: one thread that sends Q, K and V to shared memory. */
import { mbarrierArriveExpectTx, mbarrierWait } from '../../ptx/mbarrier.ts';
import { prefetchTensorMap, tensorLoad } from '../../ptx/tma.ts';
import type { Reg } from '../../ptx/types.ts';
import { setMaxNReg } from '../../ptx/wgmma.ts';
import type { RingPlace } from '../parts/ring.ts';
import type { Frame } from './frame.ts';
import { inspector } from './inspector.ts';
import { tileAt } from './walk.ts';
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
  if (frame.exact) inspector(frame);
}

/** The last coordinate of the caller's tensors. */
const batchOf = ({ b, config }: Frame, { sequence }: Work): Reg<'s32'> =>
  config.packedSequences ? b.constant('s32', 0) : b.as(sequence, 's32');

/** Where the rows of a tile of Q start, after the channel. */
function queryCoordinates(frame: Frame, work: Work): Reg<'s32'>[] {
  const { b, config, integer, exact } = frame;
  const { head, firstRow, paddedQueryStart, queryStart } = work;
  const token = b.add(exact ? queryStart : paddedQueryStart, tokenOf(frame, firstRow));
  if (exact) {
    const [t, h] = [b.as(token, 's32'), b.as(head, 's32')];
    return [...(config.packedHeads === 1 ? [t, h] : [h, t]), batchOf(frame, work)];
  }
  return config.packedHeads === 1
    ? [b.as(b.mad(head, b.loadParameter(integer.paddedQueries), token), 's32')]
    : [b.as(head, 's32'), b.as(token, 's32')];
}

function sendQuery(frame: Frame, work: Work, queryMap: Reg<'global'>): void {
  const { b, plan, tiles, bytes, shared, barriers, queryFull } = frame;
  mbarrierArriveExpectTx(b, barriers, tiles.query.bytes, queryFull);
  const into = b.add(shared, tiles.query.base);
  const coordinates = queryCoordinates(frame, work);
  for (let block = 0; block < plan.rowBlocks; block++) {
    const column = b.constant('s32', (block * plan.rowLayout.rowBytes) / elementBytes(frame));
    tensorLoad(b, into, queryMap, [column, ...coordinates], barriers, {
      intoOffset: block * bytes.queryBlock,
      barrierOffset: queryFull,
    });
  }
}

/** Bytes of an element of Q and K. */
const elementBytes = ({ exact }: Frame) => (exact ? 2 : 1);

/** Where the rows of a tile of K or V start, after the channel, from the tile's first key. */
function rowCoordinates(frame: Frame, work: Work): (firstKey: Reg<'s32'>) => Reg<'s32'>[] {
  const { b, integer, exact } = frame;
  const { keyHead, keyStart, paddedKeyStart } = work;
  if (exact) {
    const [start, head, batch] = [b.as(keyStart, 's32'), b.as(keyHead, 's32'), batchOf(frame, work)];
    return (firstKey) => [b.add(start, firstKey), head, batch];
  }
  const row = b.as(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), 's32');
  return (firstKey) => [b.add(row, firstKey)];
}

/** Sends an item's tiles of K and V, each as its stage becomes free. */
function sendTiles(frame: Frame, work: Work, place: RingPlace, keyMap: Reg<'global'>, valueMap: Reg<'global'>): void {
  const { b, config, integer, plan, fp8, tiles, bytes, shared, keys, values } = frame;
  const { firstTile, lastTile, keyHead, paddedKeyStart } = work;
  const rowsAt = rowCoordinates(frame, work);
  const firstRow = fp8 ? b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart) : undefined;
  const position = b.mov(firstTile);
  b.loop(
    () => b.setp('lt', position, lastTile),
    () => {
      const tile = tileAt(frame, work, position);
      const emptyParity = b.xor(place.parity, 1);
      const firstKey = b.shl(tile, 7);
      b.section('producer: K');
      const barrier = keys.barrierAt(place);
      mbarrierWait(b, barrier, emptyParity, keys.empty);
      mbarrierArriveExpectTx(b, barrier, bytes.keyStage, keys.full);
      const keyAt = b.add(shared, b.as(b.mad(place.stage, bytes.keyStage, tiles.key.base), 'shared'));
      for (let block = 0; block < plan.rowBlocks; block++) {
        const column = b.constant('s32', (block * plan.rowLayout.rowBytes) / elementBytes(frame));
        tensorLoad(b, keyAt, keyMap, [column, ...rowsAt(firstKey)], barrier, {
          intoOffset: block * bytes.keyBlock,
          barrierOffset: keys.full,
        });
      }
      b.section('producer: V');
      mbarrierWait(b, barrier, emptyParity, values.empty);
      mbarrierArriveExpectTx(b, barrier, plan.valueCopyBytes, values.full);
      const valueAt = b.add(shared, b.as(b.mad(place.stage, bytes.valueStage, tiles.value.base), 'shared'));
      for (let block = 0; block < plan.valueBlocks; block++) {
        // FP8: tiles of channels, each with its tokens, one behind the other.
        const coordinates =
          firstRow !== undefined
            ? [
                b.constant('s32', 0),
                b.as(b.mul(b.add(b.shr(firstRow, 7), b.as(tile, 'u32')), config.paddedValueDim), 's32'),
              ]
            : [b.constant('s32', block * plan.valueBlockChannels), ...rowsAt(firstKey)];
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
