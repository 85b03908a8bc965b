/**
 * Warps that look at tiles of the caller's V before they are multiplied, each at its half of the tokens: 0 * NaN is NaN, so a token that is not finite
 * would reach rows that do not see it. It is noted, and made 0; rows that see it get a NaN among their weights instead.
 *
 * Only tiles that not every row sees whole are looked at. Elsewhere all rows see every token, and the product carries
 * its NaN or infinity to them.
 */
import { mbarrierArrive, mbarrierWait } from '../../ptx/mbarrier.ts';
import { fenceProxyAsync } from '../../ptx/tma.ts';
import type { Reg } from '../../ptx/types.ts';
import { carryOfExponents, largerMagnitudes, SIGN_BITS } from '../parts/finite.ts';
import { at } from '../parts/lists.ts';
import type { RingPlace } from '../parts/ring.ts';
import { spreadFaultBytes } from '../parts/scores.ts';
import { type Frame, INSPECTION_BYTES, INSPECTORS, WGMMA_BLOCK_K } from './frame.ts';
import type { Item } from './state.ts';
import { tileAt } from './walk.ts';
import { eachWork, type Work } from './work.ts';

/** Number of the first such warp in its CTA: the one after the producer's. */
const FIRST_WARP = 1;
/** Tokens that a warp looks at. */
const OWN_TOKENS = WGMMA_BLOCK_K / INSPECTORS;

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
  const warp = b.shr(thread, 5);
  const inspects = b.andPred(b.setp('ge', warp, FIRST_WARP), b.setp('lt', warp, FIRST_WARP + INSPECTORS));
  b.if(inspects, () => {
    b.section('inspector');
    const firstToken = b.mul(b.sub(warp, FIRST_WARP), OWN_TOKENS);
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
          if (edge === undefined) inspect(frame, { lane, firstToken }, place);
          else b.if(edge, () => inspect(frame, { lane, firstToken }, place));
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

interface Inspector {
  readonly lane: Reg<'u32'>;
  readonly firstToken: Reg<'u32'>;
}

function inspect(frame: Frame, { lane, firstToken }: Inspector, place: RingPlace): void {
  const { b, config, plan, tiles, bytes, inspection } = frame;
  if (inspection === undefined) return;
  const format = config.pvFormat === 'f16' ? 'f16' : 'bf16';
  const { rowBytes } = plan.valueLayout;
  const stage = stageAt(frame, place, bytes.valueStage, tiles.value.base);
  const record = stageAt(frame, place, INSPECTION_BYTES, inspection.records.base);
  const ownRecord = b.add(record, b.as(firstToken, 'shared'));
  // Behind the tokens' bytes, a word for each warp: whether one of its tokens is not finite.
  const anyAt = b.add(record, b.as(b.shr(firstToken, Math.log2(OWN_TOKENS / 4)), 'shared'));
  const largest = Array.from({ length: 4 }, () => b.constant('b32', 0));
  const rows = b.add(stage, b.as(b.mad(firstToken, rowBytes, b.shl(lane, 4)), 'shared'));
  for (let block = 0; block < plan.valueBlocks; block++) {
    const chunk = b.add(rows, block * plan.valueBlockBytes);
    const count = b.constant('u32', 0);
    b.loop(
      () => b.setp('lt', count, (OWN_TOKENS * rowBytes) / 2048),
      () => {
        const words = [0, 512, 1024, 1536].map((byte) => b.ldVector('b32', 4, chunk, byte));
        for (const four of words) {
          four.forEach((word, i) => {
            largerMagnitudes(b, format, at(largest, i), word, at(largest, i));
          });
        }
        b.add(chunk, 2048, chunk);
        b.add(count, 1, count);
      },
    );
  }
  const carried = (words: readonly Reg<'b32'>[], into: Reg<'b32'>) => {
    for (const word of words) b.or(into, carryOfExponents(b, format, word), into);
  };
  const found = b.constant('b32', 0);
  carried(largest, found);
  const faulty = b.voteAny(b.setp('ne', b.and(found, SIGN_BITS), 0));
  const leader = b.setp('eq', lane, 0);
  b.if(
    faulty,
    () => {
      b.section('which tokens are not finite');
      const token = b.add(firstToken, lane);
      const end = b.add(firstToken, OWN_TOKENS);
      b.loop(
        () => b.setp('lt', token, end),
        () => {
          const row = b.add(stage, b.as(b.mul(token, rowBytes), 'shared'));
          const own = b.constant('b32', 0);
          const eachChunk = (body: (byte: number) => void) => {
            for (let block = 0; block < plan.valueBlocks; block++) {
              for (let byte = 0; byte < rowBytes; byte += 16) body(block * plan.valueBlockBytes + byte);
            }
          };
          eachChunk((byte) => carried(b.ldVector('b32', 4, row, byte), own));
          const bad = b.setp('ne', b.and(own, SIGN_BITS), 0);
          const flag = b.selp<'u32'>(1, b.constant('u32', 0), bad);
          b.stByte(flag, b.add(record, b.as(token, 'shared')));
          b.if(bad, () => {
            const zero = b.constant('b32', 0);
            eachChunk((byte) => b.stVector([zero, zero, zero, zero], row, byte));
          });
          b.add(token, 32, token);
        },
      );
      b.when(leader, () => b.st(b.constant('u32', 1), anyAt, WGMMA_BLOCK_K));
      fenceProxyAsync(b);
    },
    () => {
      // The other warp may have found some: all tokens' bytes must be right.
      const zero = b.constant('b32', 0);
      b.when(b.setp('lt', lane, OWN_TOKENS / 16), () =>
        b.stVector([zero, zero, zero, zero], b.add(ownRecord, b.as(b.shl(lane, 4), 'shared'))),
      );
      b.when(leader, () => b.st(zero, anyAt, WGMMA_BLOCK_K));
    },
  );
  // The lane that says so arrives for all.
  b.warpSync();
}

/** Of a tile that was looked at: makes NaN the scores of keys whose values are not finite, where they are seen. */
export function markFaultyValues({ frame, thread, scores, inspected }: Item): void {
  const { b, values, inspection } = frame;
  if (inspection === undefined || inspected === undefined) return;
  mbarrierWait(b, values.barrierAt(inspected), inspected.parity, inspection.barrier);
  const record = stageAt(frame, inspected, INSPECTION_BYTES, inspection.records.base);
  const [first, second] = b.ldVector('b32', INSPECTORS, record, WGMMA_BLOCK_K) as [Reg<'b32'>, Reg<'b32'>];
  const any = b.setp('ne', b.or(first, second), 0);
  b.if(b.voteAny(any), () => {
    b.section('values that are not finite');
    spreadFaultBytes(b, b.add(record, b.as(thread.t2, 'shared')), scores.each);
  });
}
