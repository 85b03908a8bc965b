/**
 * What is done about values of the caller's V that are not finite. 0 * NaN is NaN, so in a tile that not every row sees
 * whole, a token that is not finite is noted and made 0; rows that see it get a NaN among their weights instead.
 */
import type { Reg } from '../../ptx/types.ts';
import { carryOfExponents, SIGN_BITS } from '../parts/finite.ts';
import { BLOCK_K } from './config.ts';
import type { Frame } from './frame.ts';
import type { Parked } from './parked.ts';
import { atEdges } from './softmax.ts';

/**
 * Looks at the tile of V in shared memory, which has landed: notes tokens that are not finite, and makes them 0. All
 * threads together; what they wrote is there when this ends.
 *
 * @param base of the tile's buffer
 */
export function inspectValues(frame: Frame, parked: Parked, tile: Reg<'s32'>, base: Reg<'shared'>): void {
  const { b, config, tiles } = frame;
  const { value, faults } = tiles;
  if (faults === undefined) return;
  const { layout } = value;
  b.section('values that are not finite');
  atEdges(frame, parked, tile, () => {
    const token = parked.threadNow();
    b.loop(
      () => b.setp('lt', token, BLOCK_K),
      () => {
        const found = b.constant('b32', 0);
        const row = b.add(base, b.as(b.mul(token, layout.rowBytes), 'shared'));
        // In whatever order the chunks lie. Those behind the padded channels were never written.
        const permutation = b.shl(b.and(b.shr(token, layout.rowShift), layout.rowMask), 4);
        const eachChunk = (body: (at: Reg<'shared'>, byte: number) => void) => {
          for (let chunk = 0; chunk < config.paddedValueDim / 8; chunk++) {
            const within = chunk & layout.rowMask;
            const at = b.add(row, b.as(b.xor(permutation, within * 16), 'shared'));
            body(at, (chunk - within) * 16);
          }
        };
        eachChunk((at, byte) => {
          for (const word of b.ldVector('b32', 4, at, byte)) {
            b.or(found, carryOfExponents(b, config.qkFormat === 'f16' ? 'f16' : 'bf16', word), found);
          }
        });
        const bad = b.setp('ne', b.and(found, SIGN_BITS), 0);
        b.stByte(b.selp<'u32'>(1, b.constant('u32', 0), bad), b.add(frame.own(faults.base), b.as(token, 'shared')));
        b.if(bad, () => {
          const zero = b.constant('b32', 0);
          eachChunk((at, byte) => b.stVector([zero, zero, zero, zero], at, byte));
        });
        b.add(token, frame.threads, token);
      },
    );
    frame.sync();
  });
}
