/** One element of the caller's mask, for every attention kernel. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { LOG2_E } from './constants.ts';

/** Base 2: the lowest that a finite mask adds. A row of such values is not an empty one. */
const LOWEST_FINITE = -3e38;

/**
 * Excludes a score (boolean, 0: excluded) or adds to it (float, in base e; -Infinity: excluded) what the mask has at `address`.
 *
 * @param score in base 2
 * @param inside whether there is such an element; outside a boolean mask excludes and a float one adds 0
 */
export function applyMask(
  b: KernelBuilder,
  kind: 'boolean' | DType,
  score: Reg<'f32'>,
  address: Reg<'global'>,
  inside: Reg<'pred'>,
): void {
  if (kind === 'boolean') {
    const attend = b.constant('u32', 0);
    b.when(inside, () => b.ldByte(address, 0, attend));
    b.when(b.setp('eq', attend, 0), () => b.set(score, Number.NEGATIVE_INFINITY));
    return;
  }
  const added = b.constant('f32', 0);
  if (kind === 'float32') b.when(inside, () => b.ld('f32', address, 0, { into: added }));
  else {
    const bits = b.reg('b16');
    b.set(bits, 0);
    b.when(inside, () => b.ld('b16', address, 0, { into: bits }));
    b.mov(kind === 'float16' ? b.cvt('f32', b.as(bits, 'f16')) : b.as(b.shl(b.cvt('u32', bits), 16), 'f32'), added);
  }
  const excluded = b.setp('eq', added, Number.NEGATIVE_INFINITY);
  b.add(score, b.max(b.mul(added, LOG2_E), LOWEST_FINITE), score);
  b.when(excluded, () => b.set(score, Number.NEGATIVE_INFINITY));
}
