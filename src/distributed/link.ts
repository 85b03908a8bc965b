/** How a rank sends to the others and receives from them. */
import { ExecutionError, messageOf } from '../errors.ts';
import type { Carried, Mark, Place, ReachingPlace } from './place.ts';

export interface Outgoing {
  readonly to: number;
  readonly name: string;
  readonly value: Carried;
}

export interface Incoming {
  readonly from: number;
  readonly name: string;
  /** Of the shape of what comes; it is written to after all that is enqueued at the place when the exchange begins. */
  readonly into: Carried;
}

/** One rank's side of a call. All ranks exchange equally often; what one sends in an exchange the other receives in the same one. */
export interface Link {
  /**
   * Enqueues sends and receives. Between two ranks things come in the order in which they are sent.
   *
   * @returns when what was received is there; the place has not waited for it
   */
  exchange(outgoing: readonly Outgoing[], incoming: readonly Incoming[]): Promise<Mark>;
  /** What is enqueued at the place from now on comes after all that was sent and received: all of it may be written to. */
  finish(): Promise<void>;
}

/** The links of one call. */
export interface Connection {
  /** One for each rank of this process. */
  readonly links: readonly Link[];
  /** A rank of this process failed: no other waits for it any longer. */
  abort(rank: number, cause: unknown): void;
  /** All ranks of this process have ended; calls after the first do nothing. After a failure nothing that was enqueued for it reaches memory any more. */
  close(): Promise<void>;
}

/** What connects the ranks of a group. */
export interface Transport {
  /** Ranks of the group, those of other processes too. */
  readonly size: number;
  /** Ranks of this process. */
  readonly members: readonly { readonly rank: number; readonly place: Place }[];
  /** @throws {ExecutionError} no call can succeed any more */
  requireUsable(): void;
  connect(): Connection;
  dispose(): void;
}

interface Waiting<T> {
  readonly resolve: (value: T) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * Hands things from rank to rank of one process: what is sent under a name by one rank is received once by another, whichever comes
 * first. Where one rank fails, whatever others wait for or will wait for fails too: none hangs.
 */
export class Post {
  readonly #sent = new Map<string, unknown>();
  readonly #waiting = new Map<string, Waiting<never>>();
  #failure: ExecutionError | undefined;

  send(from: number, to: number, name: string, value: unknown): void {
    const address = `${from} ${to} ${name}`;
    const waiting = this.#waiting.get(address);
    if (waiting === undefined) this.#sent.set(address, value);
    else {
      this.#waiting.delete(address);
      waiting.resolve(value as never);
    }
  }

  /** @throws {ExecutionError} another rank failed; its error is the cause */
  async receive<T>(from: number, to: number, name: string): Promise<T> {
    const address = `${from} ${to} ${name}`;
    if (this.#sent.has(address)) {
      const value = this.#sent.get(address) as T;
      this.#sent.delete(address);
      return value;
    }
    if (this.#failure !== undefined) throw this.#failure;
    return new Promise<T>((resolve, reject) => {
      this.#waiting.set(address, { resolve, reject } as Waiting<never>);
    });
  }

  /** A rank failed: the others get no more from it. */
  abort(rank: number, cause: unknown): void {
    this.fail(new ExecutionError('execution-failed', `rank ${rank} failed: ${messageOf(cause)}`, cause));
  }

  /** Nothing more comes. */
  fail(error: ExecutionError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    for (const { reject } of this.#waiting.values()) reject(this.#failure);
    this.#waiting.clear();
  }
}

/** What a rank tells another: where something lies and when it is there. */
interface Sent {
  readonly value: Carried;
  readonly ready: Mark;
}

/** A rank whose peers are in this process: it copies what they send from where it lies. */
class LocalLink implements Link {
  readonly #post: Post;
  readonly #rank: number;
  readonly #places: readonly ReachingPlace[];
  #exchanges = 0;
  /** Those who were sent to in the latest exchange. */
  #receivers: readonly number[] = [];

  constructor(post: Post, rank: number, places: readonly ReachingPlace[]) {
    this.#post = post;
    this.#rank = rank;
    this.#places = places;
  }

  get #place(): ReachingPlace {
    return this.#places[this.#rank] as ReachingPlace;
  }

  async exchange(outgoing: readonly Outgoing[], incoming: readonly Incoming[]): Promise<Mark> {
    const [post, rank, place] = [this.#post, this.#rank, this.#place];
    const before = this.#receivers;
    const exchange = ++this.#exchanges;
    const ready = place.mark();
    for (const { to, name, value } of outgoing) post.send(rank, to, `${exchange} ${name}`, { value, ready });
    this.#receivers = [...new Set(outgoing.map(({ to }) => to))];
    place.holdCopies(ready);
    // What was sent before may be overwritten by what comes now.
    for (const to of before) place.holdCopies(await post.receive(to, rank, `${exchange - 1} taken`));
    const held = new Set<Mark>();
    for (const { from, name, into } of incoming) {
      const sent = await post.receive<Sent>(from, rank, `${exchange} ${name}`);
      if (!held.has(sent.ready)) place.holdCopies(sent.ready);
      held.add(sent.ready);
      place.bring(sent.value, this.#places[from] as ReachingPlace, into);
    }
    const arrived = place.markCopies();
    for (const from of new Set(incoming.map((each) => each.from))) post.send(rank, from, `${exchange} taken`, arrived);
    return arrived;
  }

  async finish(): Promise<void> {
    for (const to of this.#receivers) {
      this.#place.waitFor(await this.#post.receive(to, this.#rank, `${this.#exchanges} taken`));
    }
    this.#receivers = [];
  }
}

/** Ranks of one process, which copy from each other's memory. */
export class LocalTransport implements Transport {
  readonly #places: readonly ReachingPlace[];
  readonly members: readonly { readonly rank: number; readonly place: ReachingPlace }[];

  constructor(places: readonly ReachingPlace[]) {
    this.#places = places;
    this.members = places.map((place, rank) => ({ rank, place }));
  }

  get size(): number {
    return this.#places.length;
  }

  requireUsable(): void {}

  connect(): Connection {
    const post = new Post();
    const places = this.#places;
    let failed = false;
    let closed = false;
    return {
      links: places.map((_, rank) => new LocalLink(post, rank, places)),
      abort: (rank, cause) => {
        failed = true;
        post.abort(rank, cause);
      },
      close: async () => {
        if (closed) return;
        closed = true;
        if (failed) for (const place of places) place.settle(places);
        for (const place of places) place.endCall();
      },
    };
  }

  dispose(): void {
    for (const place of this.#places) place.dispose();
  }
}
