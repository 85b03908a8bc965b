/** Turns at the tensor cores: while one consumer's products run, the next one's softmax does. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';

/** Consumers take turns at issuing products: the one whose turn it is waits at its own barrier. The first needs none. */
export class Turns {
  readonly #b: KernelBuilder;
  readonly #barriers: { readonly own: Reg<'u32'>; readonly next: Reg<'u32'> } | undefined;

  /** @param consumers how many take turns; undefined: none wait */
  constructor(b: KernelBuilder, group: Reg<'u32'>, consumers: number | undefined) {
    this.#b = b;
    if (consumers === undefined) return;
    const own = b.add(group, 1);
    const last = () => b.setp('eq', own, consumers);
    this.#barriers = { own, next: b.selp(1, b.add(own, 1), last()) };
    b.if(last(), () => b.namedBarrier('bar.arrive', b.constant('u32', 1), 256));
  }

  take(): void {
    if (this.#barriers !== undefined) this.#b.namedBarrier('bar.sync', this.#barriers.own, 256);
  }

  /** After as many turns of each: the first one's next turn, which the last gave, is taken, so that another part of the kernel may begin anew. */
  end(): void {
    if (this.#barriers === undefined) return;
    const { own } = this.#barriers;
    this.#b.if(this.#b.setp('eq', own, 1), () => this.take());
  }

  give(): void {
    if (this.#barriers !== undefined) this.#b.namedBarrier('bar.arrive', this.#barriers.next, 256);
  }
}
