/** A consumer thread and its two rows of a tile of Q: rows g and g + 8 of its warp's 16. */
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { CONSUMER_ROWS, type Frame } from './frame.ts';
import { tokenOf, type Work } from './work.ts';

/** Rows of a thread. */
export const THREAD_ROWS = 2;

/** Something for each of a thread's rows. */
export const eachRow = <T>(make: (r: number) => T): T[] => Array.from({ length: THREAD_ROWS }, (_, r) => make(r));

export interface ConsumerThread {
  /** True in one lane of each warp. */
  readonly leader: Reg<'pred'>;
  /** lane % 4, and twice that. */
  readonly t: Reg<'u32'>;
  readonly t2: Reg<'u32'>;
  /** Number of the consumer warpgroup. */
  readonly group: Reg<'u32'>;
  /** The thread's first row in the CTA's tile. */
  readonly firstRow: Reg<'u32'>;
  /** The group's rows of Q in shared memory. */
  readonly groupQuery: Reg<'shared'>;
}

export function consumerThread({ b, plan, tiles, shared, thread, warpgroup }: Frame): ConsumerThread {
  const lane = b.and(thread, 31);
  const leader = b.setp('eq', lane, 0);
  const [g, t] = [b.shr(lane, 2), b.and(lane, 3)];
  const t2 = b.shl(t, 1);
  const group = b.sub(warpgroup, 1);
  const warpRow = b.mad(group, CONSUMER_ROWS, b.shl(b.and(b.shr(thread, 5), 3), 4));
  const firstRow = b.add(warpRow, g);
  const groupBytes = CONSUMER_ROWS * plan.rowLayout.rowBytes;
  const groupQuery = b.add(b.add(shared, tiles.query.base), b.as(b.mul(group, groupBytes), 'shared'));
  return { leader, t, t2, group, firstRow, groupQuery };
}

/** Where the rows of a thread are. Computed anew at each call: registers held through the loop cost more. */
export class Rows {
  readonly #frame: Frame;
  readonly #thread: ConsumerThread;
  readonly #work: Work;

  constructor(frame: Frame, thread: ConsumerThread, work: Work) {
    this.#frame = frame;
    this.#thread = thread;
    this.#work = work;
  }

  row(r: number): Reg<'u32'> {
    const { b } = this.#frame;
    return b.add(b.add(this.#work.firstRow, this.#thread.firstRow), 8 * r);
  }

  token(row: Reg<'u32'>): Reg<'u32'> {
    return tokenOf(this.#frame, row);
  }

  head(row: Reg<'u32'>): Reg<'u32'> {
    const { b, config } = this.#frame;
    return config.packedHeads === 1 ? this.#work.head : b.add(this.#work.head, b.and(row, config.packedHeads - 1));
  }

  /** A row's place in the padded, quantized Q; rows beyond the sequence stand in for its last. */
  padded(r: number): Reg<'u32'> {
    const { b, integer } = this.#frame;
    const row = this.row(r);
    const token = b.min(this.token(row), b.sub(this.#work.queryLength, 1));
    const firstOfHead = b.mad(this.head(row), b.loadParameter(integer.paddedQueries), this.#work.paddedQueryStart);
    return b.add(firstOfHead, token);
  }

  /** smScale * log2(e) * q . mean(K) of a row, NaN for a row that is not finite; 0 where nothing is quantized. */
  bias(r: number): Reg<'f32'> {
    const { b, fused, exact, pointer } = this.#frame;
    if (exact) return b.constant('f32', 0);
    if (fused) return b.ld('f32', this.biasAddress(r));
    return b.ld('f32', offset(b, b.loadPointer(pointer.rowBias), this.padded(r), 4), 0, { readOnly: true });
  }

  /** Where a kernel that quantizes Q itself keeps {@link bias}. */
  biasAddress(r: number): Reg<'shared'> {
    const { b, tiles, shared } = this.#frame;
    const row = b.add(this.#thread.firstRow, 8 * r);
    return b.add(b.add(shared, tiles.bias.base), b.as(b.shl(row, 2), 'shared'));
  }
}
