/**
 * A warp that looks at tiles of the caller's V before they are multiplied: 0 * NaN is NaN, so a token that is not finite
 * would reach rows that do not see it. It is noted, and made 0; rows that see it get a NaN among their weights instead.
 *
 * Only tiles that not every row sees whole are looked at. Elsewhere all rows see every token, and the product carries
 * its NaN or infinity to them.
 */
import { mbarrierArrive, mbarrierWait } from '../../ptx/mbarrier.ts';
import { fenceProxyAsync } from '../../ptx/tma.ts';
import type { Reg } from '../../ptx/types.ts';
import { carryOfExponents, SIGN_BITS } from '../parts/finite.ts';
import type { RingPlace } from '../parts/ring.ts';
import { spreadFaultBytes } from '../parts/scores.ts';
import { type Frame, INSPECTION_BYTES, WGMMA_BLOCK_K } from './frame.ts';
import type { Item } from './state.ts';
import { tileAt } from './walk.ts';
import { eachWork, type Work } from './work.ts';

/** Number of the warp in its CTA: the one after the producer's. */
const WARP = 1;
/** A named barrier that no other warps use. */
const BARRIER = 15;

/** The tile has keys beyond the last, or out of a row's band. */
export function reachesOut({ b }: Frame, work: Work, tileStart: Reg<'s32'>): Reg<'pred'> {
  const beyond = b.setp('gt', b.add(tileStart, WGMMA_BLOCK_K), work.wholeUntil);
  return work.wholeFrom === undefined ? beyond : b.orPred(beyond, b.setp('lt', tileStart, work.wholeFrom));
}

/** Some row may not see some key of the tile. Undefined: that is possible of every tile. */
export const isEdge = (frame: Frame, work: Work, tileStart: Reg<'s32'>): Reg<'pred'> | undefined =>
  frame.config.mask === 'none' && frame.blocks === undefined ? reachesOut(frame, work, tileStart) : undefined;

export function inspector(frame: Frame): void {
  const { b, thread, values, inspection } = frame;
  if (inspection === undefined) return;
  b.if(b.setp('eq', b.shr(thread, 5), WARP), () => {
    b.section('inspector');
    const lane = b.and(thread, 31);
    const leader = b.setp('eq', lane, 0);
    const place = values.place();
    eachWork(frame, (work) => {
      const { firstTile, lastTile } = work;
      const position = b.mov(firstTile);
      b.loop(
        () => b.setp('lt', position, lastTile),
        () => {
          const tile = tileAt(frame, work, position);
          values.awaitFull(place);
          const edge = isEdge(frame, work, b.shl(tile, 7));
          if (edge === undefined) inspect(frame, lane, place);
          else b.if(edge, () => inspect(frame, lane, place));
          b.when(leader, () => mbarrierArrive(b, values.barrierAt(place), inspection.barrier));
          values.release(place, leader);
          b.add(position, 1, position);
        },
      );
    });
  });
}

const stageAt = ({ b, shared }: Frame, { stage }: RingPlace, bytes: number, base: number): Reg<'shared'> =>
  b.add(shared, b.as(b.mad(stage, bytes, base), 'shared'));

function inspect(frame: Frame, lane: Reg<'u32'>, place: RingPlace): void {
  const { b, config, plan, tiles, bytes, inspection } = frame;
  if (inspection === undefined) return;
  const format = config.pvFormat === 'f16' ? 'f16' : 'bf16';
  const stage = stageAt(frame, place, bytes.valueStage, tiles.value.base);
  const record = stageAt(frame, place, INSPECTION_BYTES, inspection.records.base);
  const carried = (words: readonly Reg<'b32'>[], into: Reg<'b32'>) => {
    for (const word of words) b.or(into, carryOfExponents(b, format, word), into);
  };
  const found = b.constant('b32', 0);
  const chunk = b.add(stage, b.as(b.shl(lane, 4), 'shared'));
  const count = b.constant('u32', 0);
  /** Of 2 KiB, which divide every stage. */
  b.loop(
    () => b.setp('lt', count, bytes.valueStage / 2048),
    () => {
      for (let at = 0; at < 2048; at += 512) carried(b.ldVector('b32', 4, chunk, at), found);
      b.add(chunk, 2048, chunk);
      b.add(count, 1, count);
    },
  );
  const faulty = b.voteAny(b.setp('ne', b.and(found, SIGN_BITS), 0));
  b.if(
    faulty,
    () => {
      b.section('which tokens are not finite');
      const { rowBytes } = plan.valueLayout;
      const token = b.mov(lane);
      b.loop(
        () => b.setp('lt', token, WGMMA_BLOCK_K),
        () => {
          const row = b.add(stage, b.as(b.mul(token, rowBytes), 'shared'));
          const own = b.constant('b32', 0);
          const eachChunk = (body: (at: number) => void) => {
            for (let block = 0; block < plan.valueBlocks; block++) {
              for (let byte = 0; byte < rowBytes; byte += 16) body(block * plan.valueBlockBytes + byte);
            }
          };
          eachChunk((at) => carried(b.ldVector('b32', 4, row, at), own));
          const bad = b.setp('ne', b.and(own, SIGN_BITS), 0);
          const flag = b.selp<'u32'>(1, b.constant('u32', 0), bad);
          b.stByte(flag, b.add(record, b.as(token, 'shared')));
          b.if(bad, () => {
            const zero = b.constant('b32', 0);
            eachChunk((at) => b.stVector([zero, zero, zero, zero], row, at));
          });
          b.add(token, 32, token);
        },
      );
      b.st(b.constant('u32', 1), record, WGMMA_BLOCK_K);
      fenceProxyAsync(b);
      b.namedBarrier('bar.sync', BARRIER, 32);
    },
    () => b.when(b.setp('eq', lane, 0), () => b.st(b.constant('u32', 0), record, WGMMA_BLOCK_K)),
  );
}

/** Of a tile that was looked at: makes NaN the scores of keys whose values are not finite, where they are seen. */
export function markFaultyValues({ frame, thread, scores, inspected }: Item): void {
  const { b, values, inspection } = frame;
  if (inspection === undefined || inspected === undefined) return;
  mbarrierWait(b, values.barrierAt(inspected), inspected.parity, inspection.barrier);
  const record = stageAt(frame, inspected, INSPECTION_BYTES, inspection.records.base);
  const any = b.setp('ne', b.ld('u32', record, WGMMA_BLOCK_K), 0);
  b.if(b.voteAny(any), () => {
    b.section('values that are not finite');
    spreadFaultBytes(b, b.add(record, b.as(thread.t2, 'shared')), scores.each);
  });
}
