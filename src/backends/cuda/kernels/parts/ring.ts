/**
 * A ring of stages in shared memory between a producer, whose bulk copies fill them, and consumers. `full` barriers
 * count a stage's bytes in, `empty` barriers the warps that are done with it.
 */
import type { KernelBuilder } from '../../ptx/builder.ts';
import { mbarrierArrive, mbarrierInit, mbarrierTest, mbarrierWait } from '../../ptx/mbarrier.ts';
import type { Reg } from '../../ptx/types.ts';

/** A place in a ring: which stage, and the parity of the phase in which it is filled. */
export interface RingPlace {
  readonly stage: Reg<'u32'>;
  readonly parity: Reg<'u32'>;
}

export interface RingBarriers {
  /** Where the barriers of this and of other rings lie. */
  readonly barriers: Reg<'shared'>;
  readonly stages: number;
  /** Bytes from `barriers` to the barriers of stage 0; the next stages' follow, 8 bytes each. */
  readonly full: number;
  readonly empty: number;
}

export class Ring {
  readonly #b: KernelBuilder;
  readonly #barriers: Reg<'shared'>;
  readonly stages: number;
  readonly full: number;
  readonly empty: number;

  constructor(b: KernelBuilder, { barriers, stages, full, empty }: RingBarriers) {
    this.#b = b;
    this.#barriers = barriers;
    this.stages = stages;
    this.full = full;
    this.empty = empty;
  }

  initFull(stage: number): void {
    mbarrierInit(this.#b, this.#barriers, 1, this.full + 8 * stage);
  }

  /** @param consumers warps that hand a stage back */
  initEmpty(stage: number, consumers: number): void {
    mbarrierInit(this.#b, this.#barriers, consumers, this.empty + 8 * stage);
  }

  /** Places start at stage 0, and their barriers at the phase of parity 0. */
  place(): RingPlace {
    return { stage: this.#b.constant('u32', 0), parity: this.#b.constant('u32', 0) };
  }

  advance({ stage, parity }: RingPlace): void {
    const b = this.#b;
    b.add(stage, 1, stage);
    b.when(b.setp('eq', stage, this.stages), () => {
      b.set(stage, 0);
      b.xor(parity, 1, parity);
    });
  }

  /** What {@link full} and {@link empty} are offsets from, for a place's stage. */
  barrierAt({ stage }: RingPlace): Reg<'shared'> {
    return this.#b.add(this.#barriers, this.#b.as(this.#b.shl(stage, 3), 'shared'));
  }

  /** @param ready whether the stage is known to be full */
  awaitFull(place: RingPlace, ready?: Reg<'pred'>): void {
    const barrier = this.barrierAt(place);
    const wait = () => mbarrierWait(this.#b, barrier, place.parity, this.full);
    if (ready === undefined) wait();
    else this.#b.if(this.#b.notPred(ready), wait);
  }

  /** Whether the stage is full. */
  testFull(place: RingPlace, into: Reg<'pred'>): void {
    mbarrierTest(this.#b, this.barrierAt(place), place.parity, this.full, into);
  }

  /** Hands a stage back, a warp's `leader` for all its lanes, and goes on to the next. */
  release(place: RingPlace, leader: Reg<'pred'>): void {
    const barrier = this.barrierAt(place);
    this.#b.when(leader, () => mbarrierArrive(this.#b, barrier, this.empty));
    this.advance(place);
  }
}
