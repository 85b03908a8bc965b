/** The producer: one thread that sends own tokens, then those that pass by, to shared memory. */
import { mbarrierArriveExpectTx, mbarrierWait } from '../../../ptx/mbarrier.ts';
import { prefetchTensorMap, tensorLoad } from '../../../ptx/tma.ts';
import type { Reg } from '../../../ptx/types.ts';
import { setMaxNReg } from '../../../ptx/wgmma.ts';
import type { RingPlace } from '../../parts/ring.ts';
import { advance, type Work } from '../frame.ts';
import { BLOCK_CHANNELS, GROUP_TOKENS, WGMMA_GRADIENT_MAPS } from './config.ts';
import { eachTile, ownToken, REGISTERS, type WgmmaFrame } from './frame.ts';

export function producer(frame: WgmmaFrame): void {
  const { b, config, maps, ownsQueries } = frame;
  setMaxNReg(b, 'dec', REGISTERS[config.consumers].producer);
  b.if(b.setp('eq', b.special('%tid.x'), 0), () => {
    b.section('producer: maps');
    const used = WGMMA_GRADIENT_MAPS.filter((name) => name !== 'rows' || !ownsQueries);
    const map = Object.fromEntries(used.map((name) => [name, b.tensorMapAddress(maps[name])])) as Maps;
    for (const name of used) prefetchTensorMap(b, map[name]);
    const places = { ring: frame.ring.place(), ownParity: b.constant('u32', 0) };
    eachTile(frame, (tile, work) => {
      b.if(b.setp('lt', work.firstTile, work.lastTile), () => send(tile, work, map, places));
    });
  });
}

type Maps = Readonly<Record<(typeof WGMMA_GRADIENT_MAPS)[number], Reg<'global'>>>;

/** Sends one tile of own tokens, and what passes by it. */
function send(
  frame: WgmmaFrame,
  work: Work,
  map: Maps,
  { ring: place, ownParity }: { readonly ring: RingPlace; readonly ownParity: Reg<'u32'> },
): void {
  const { b, config, plan, tiles, shared, barriers, ring, ownFull, ownEmpty, ownsQueries } = frame;
  b.section('producer: own tokens');
  const zero = b.constant('s32', 0);
  const column = (block: number) => (block === 0 ? zero : b.constant('s32', block * BLOCK_CHANNELS));
  if (frame.stays) {
    mbarrierWait(b, barriers, b.xor(ownParity, 1), ownEmpty);
    b.xor(ownParity, 1, ownParity);
  }
  mbarrierArriveExpectTx(b, barriers, tiles.ownCodes.bytes + tiles.ownValues.bytes, ownFull);
  for (let group = 0; group < config.consumers; group++) {
    const ownRow = b.as(rowOf(frame, work, ownsQueries, work.head, ownToken(frame, work, group)), 's32');
    tensorLoad(b, b.add(shared, tiles.ownCodes.base), map.ownCodes, [zero, ownRow], barriers, {
      intoOffset: group * GROUP_TOKENS * config.codeBytes,
      barrierOffset: ownFull,
    });
    for (let block = 0; block < plan.valueBlocks; block++) {
      tensorLoad(b, b.add(shared, tiles.ownValues.base), map.ownValues, [column(block), ownRow], barriers, {
        intoOffset: (block * frame.ownTokens + group * GROUP_TOKENS) * 128,
        barrierOffset: ownFull,
      });
    }
  }

  const now = { head: b.mov(work.head), tile: b.mov(work.firstTile) };
  const { codesBytes, valuesBytes, channelsBytes, rowsBytes } = plan;
  b.loop(
    () => b.setp('lt', now.head, work.headEnd),
    () => {
      b.section('producer: what passes by');
      const barrier = ring.barrierAt(place);
      mbarrierWait(b, barrier, b.xor(place.parity, 1), ring.empty);
      mbarrierArriveExpectTx(b, barrier, codesBytes + valuesBytes + channelsBytes + rowsBytes, ring.full);
      const token = b.as(b.shl(now.tile, Math.log2(config.streamTokens)), 'u32');
      const row = rowOf(frame, work, !ownsQueries, now.head, token);
      const signedRow = b.as(row, 's32');
      const into = (name: 'codes' | 'values' | 'channels' | 'rows', bytes: number) =>
        b.add(shared, b.as(b.mad(place.stage, bytes, tiles[name].base), 'shared'));
      const options = { barrierOffset: ring.full };
      tensorLoad(b, into('codes', codesBytes), map.codes, [zero, signedRow], barrier, options);
      const blocksOf = (name: 'values' | 'channels', bytes: number, blocks: number) => {
        const at = into(name, bytes);
        for (let block = 0; block < blocks; block++) {
          const intoOffset = block * config.streamTokens * 128;
          tensorLoad(b, at, map[name], [column(block), signedRow], barrier, { ...options, intoOffset });
        }
      };
      blocksOf('values', valuesBytes, plan.valueBlocks);
      blocksOf('channels', channelsBytes, plan.channelBlocks);
      if (!ownsQueries) {
        const byte = b.as(b.shl(row, 2), 's32');
        tensorLoad(b, into('rows', rowsBytes), map.rows, [byte, zero], barrier, options);
      }
      ring.advance(place);
      advance(b, work, now);
    },
  );
}

/** Padded row of a token of a head's queries, or of the keys. */
function rowOf({ b, integer }: WgmmaFrame, work: Work, ofQueries: boolean, head: Reg<'u32'>, token: Reg<'u32'>) {
  const { keyHead, paddedQueryStart, paddedKeyStart } = work;
  const start = ofQueries
    ? b.mad(head, b.loadParameter(integer.paddedQueries), paddedQueryStart)
    : b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart);
  return b.add(start, token);
}
