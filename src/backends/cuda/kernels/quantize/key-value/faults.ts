/** Elements that are not finite: found by each thread in its eights, reported by token. */
import type { Reg } from '../../../ptx/types.ts';
import { INFINITY_BITS } from '../../parts/constants.ts';
import type { Faults, Keys, Values } from './records.ts';
import { sharedAt, type Tile } from './tile.ts';

/** Takes a magnitude that is not finite (or not below `from`) out of a maximum, and sets its bit. */
export function leaveOutFaults(
  { b }: Tile,
  faults: Faults,
  largest: Reg<'u32'>,
  bit: number,
  from: number = INFINITY_BITS,
): void {
  b.when(b.setp('ge', largest, from), () => {
    b.set(largest, 0);
    b.or(faults, 2 ** bit, faults);
  });
}

export function isFaulty({ b }: Tile, faults: Faults, bit: number): Reg<'pred'> {
  return b.setp('ne', b.and(faults, 2 ** bit), 0);
}

/**
 * Writes to shared memory which of the tile's tokens each warp found not to be finite, a bit for each; the V that the
 * thread holds for them becomes 0.
 */
export function reportFaults(tile: Tile, faults: Faults, keys: Keys, values: Values): void {
  const { b, shared, warp, lane, lastSeen, faultWords, keyLayout } = tile;
  const first = b.setp('eq', lane, 0);
  values.shareMaximum(first);
  b.section('faults');
  const tokenBits = Array.from({ length: 4 }, () => b.constant('b32', 0));
  b.if(b.voteAny(b.setp('ne', faults, 0)), () => {
    [...keys.tokens(), ...values.tokens].forEach((token, i) => {
      const found = isFaulty(tile, faults, i);
      const real = b.andPred(found, b.setp('le', token, lastSeen));
      tokenBits.forEach((bits, word) => {
        // Shifts by 32 and more give 0, those by less than 0 too.
        const bit = b.shl(b.constant('b32', 1), b.sub(token, 32 * word));
        b.when(real, () => b.or(bits, bit, bits));
      });
      const ofValue = values.packed[i - keyLayout.passes];
      if (ofValue === undefined) return;
      b.when(found, () => {
        for (const register of ofValue) b.set(register, 0);
      });
    });
    for (const bits of tokenBits) {
      for (let mask = 1; mask < 32; mask *= 2) b.or(bits, b.shflBfly(bits, mask), bits);
    }
  });
  b.when(first, () => b.stVector(tokenBits, sharedAt(tile, shared, warp, 4), faultWords.base));
}
