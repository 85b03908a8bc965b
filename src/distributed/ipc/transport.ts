/**
 * Ranks of one machine, one in each process, that copy from each other's memory through the driver's shared handles (CUDA IPC); several
 * may be on one device. Who sends lays it out in memory that the others map, and tells them when it is there.
 *
 * No stream ever waits for another process: a rank says that something is there only when it is, so that one that ends can leave nothing
 * hanging on a device.
 */
import { ExecutionError, messageOf } from '../../errors.ts';
import { bytesOf, type CudaPlace } from '../cuda-place.ts';
import { Fate } from '../fate.ts';
import { type Connection, type Incoming, type Link, type Outgoing, Post, type Transport } from '../link.ts';
import type { Carried, Mark } from '../place.ts';
import { type Company, meet } from '../rendezvous.ts';
import { Inbox, Outbox } from './windows.ts';

export interface IpcOptions {
  readonly rank: number;
  readonly size: number;
  /** Where rank 0 listens; undefined where there is one rank only. */
  readonly address?: { readonly host: string; readonly port: number };
  /** Milliseconds after which a call in which another rank does not take its part is given up. */
  readonly timeout: number;
}

/** What a rank tells another: what lies in its window for it. */
interface LaidOut {
  /** The window's handle, in base64. */
  readonly window: string;
  readonly pieces: readonly { readonly name: string; readonly at: number; readonly byteLength: number }[];
}

/** Bytes of a window at which what is laid out begins. */
const ALIGNMENT = 256;
/** Milliseconds that a rank that leaves waits for those who may still map its memory. */
const LEAVE_LIMIT = 5000;

class IpcLink implements Link {
  readonly #transport: IpcTransport;
  /** Those who were sent to in the latest exchange. */
  #receivers: readonly number[] = [];

  constructor(transport: IpcTransport) {
    this.#transport = transport;
  }

  async exchange(outgoing: readonly Outgoing[], incoming: readonly Incoming[]): Promise<Mark> {
    const { place } = this.#transport;
    const exchange = this.#transport.nextExchange();
    place.holdCopies(place.mark());
    await this.#untilTaken(exchange - 1);
    await this.#layOut(exchange, outgoing);
    const senders = [...new Set(incoming.map(({ from }) => from))];
    for (const from of senders) {
      const laidOut = await this.#transport.receive<LaidOut>(from, `${exchange} laid out`);
      for (const each of incoming) if (each.from === from) this.#bring(laidOut, each);
    }
    const arrived = place.markCopies();
    if (senders.length > 0) await place.copyStream.completed();
    for (const from of senders) this.#transport.send(from, `${exchange} taken`, true);
    return arrived;
  }

  /** What was sent before may be overwritten by what comes now. */
  async #untilTaken(exchange: number): Promise<void> {
    for (const to of this.#receivers) await this.#transport.receive(to, `${exchange} taken`);
    this.#receivers = [];
  }

  async #layOut(exchange: number, outgoing: readonly Outgoing[]): Promise<void> {
    const { place, outbox } = this.#transport;
    // What goes to several ranks is laid out once.
    const places = new Map<Carried, { readonly at: number; readonly byteLength: number }>();
    let end = 0;
    for (const { value } of outgoing) {
      if (places.has(value)) continue;
      const { byteLength } = bytesOf(value);
      places.set(value, { at: end, byteLength });
      end += Math.ceil(byteLength / ALIGNMENT) * ALIGNMENT;
    }
    const window = outbox.reserve(end);
    for (const [value, { at, byteLength }] of places) {
      copyHere(place, bytesOf(value).pointer, window.pointer + BigInt(at), byteLength);
    }
    if (end > 0) await place.copyStream.completed();
    const handle = Buffer.from(window.handle).toString('base64');
    this.#receivers = [...new Set(outgoing.map(({ to }) => to))];
    for (const to of this.#receivers) {
      const pieces = outgoing
        .filter((each) => each.to === to)
        .map(({ name, value }) => ({ name, ...(places.get(value) as { at: number; byteLength: number }) }));
      this.#transport.send(to, `${exchange} laid out`, { window: handle, pieces } satisfies LaidOut);
    }
  }

  #bring({ window, pieces }: LaidOut, { from, name, into }: Incoming): void {
    const { place, inbox } = this.#transport;
    const target = bytesOf(into);
    const piece = pieces.find((each) => each.name === name);
    if (piece?.byteLength !== target.byteLength) {
      const received = piece === undefined ? 'nothing' : `${piece.byteLength} bytes`;
      throw new ExecutionError(
        'execution-failed',
        `rank ${from} sent ${received} as '${name}', where ${target.byteLength} bytes are received: the ranks make different calls`,
      );
    }
    copyHere(place, inbox.addressOf(window) + BigInt(piece.at), target.pointer, target.byteLength);
  }

  async finish(): Promise<void> {
    await this.#untilTaken(this.#transport.exchanges);
    const { place } = this.#transport;
    place.waitFor(place.markCopies());
  }
}

function copyHere({ device, copyStream }: CudaPlace, from: bigint, to: bigint, byteLength: number): void {
  if (byteLength === 0) return;
  const what = `copying ${byteLength} bytes between processes on ${device}`;
  device.call('cuMemcpyDtoDAsync', what, to, from, byteLength, copyStream.handle);
}

export class IpcTransport implements Transport {
  readonly size: number;
  readonly members: readonly { readonly rank: number; readonly place: CudaPlace }[];
  readonly outbox: Outbox;
  readonly inbox: Inbox;
  readonly #rank: number;
  readonly #company: Company | undefined;
  readonly #fate: Fate;
  readonly #post = new Post();
  #exchanges = 0;

  private constructor(place: CudaPlace, company: Company | undefined, { rank, size, timeout }: IpcOptions) {
    this.size = size;
    this.#rank = rank;
    this.members = [{ rank, place }];
    this.#company = company;
    this.#fate = new Fate(rank, timeout, (failure, cause) => {
      this.#post.fail(failure);
      company?.noteFailure(`rank ${rank} failed: ${messageOf(cause)}`);
    });
    this.inbox = new Inbox(place.device);
    this.outbox = new Outbox(place.device);
    company?.onPosted((from, name, value) => this.#post.send(from, rank, name, value));
    company?.onFailure((error) => this.#fate.fail(error));
  }

  /**
   * Connects this process's rank with those of the others, who do the same.
   *
   * @throws {ExecutionError} a rank did not come in time, or failed, or its memory cannot be reached from here
   * @throws {BackendUnavailableError} this driver shares no memory between processes
   */
  static async connect(place: CudaPlace, options: IpcOptions): Promise<IpcTransport> {
    const { rank, size, address, timeout } = options;
    const host = process.getBuiltinModule('node:os').hostname();
    // Ranks of different kinds would quantize differently.
    const kind = `sm_${place.device.computeCapability} on ${host}`;
    const company = address && (await meet({ rank, size, timeout, kind, ...address }, () => new Uint8Array()));
    let transport: IpcTransport;
    try {
      transport = new IpcTransport(place, company, options);
    } catch (error) {
      company?.noteFailure(`rank ${rank} failed: ${messageOf(error)}`);
      company?.leave();
      throw error;
    }
    return transport.#fate.connected(transport, () => transport.#reachAll());
  }

  get place(): CudaPlace {
    return (this.members[0] as { place: CudaPlace }).place;
  }

  /** Exchanges so far, of all calls. */
  get exchanges(): number {
    return this.#exchanges;
  }

  nextExchange(): number {
    return ++this.#exchanges;
  }

  send(to: number, name: string, value: unknown): void {
    this.#company?.post(to, name, value);
  }

  receive<T>(from: number, name: string): Promise<T> {
    return this.#post.receive<T>(from, this.#rank, name);
  }

  get #others(): number[] {
    return Array.from({ length: this.size }, (_, rank) => rank).filter((rank) => rank !== this.#rank);
  }

  /** Maps a window of every other rank: what the driver refuses shows now, and not in a call. */
  async #reachAll(): Promise<void> {
    const handle = Buffer.from(this.outbox.window.handle).toString('base64');
    for (const to of this.#others) this.send(to, 'window', handle);
    for (const from of this.#others) this.inbox.addressOf(await this.receive<string>(from, 'window'));
  }

  requireUsable(): void {
    this.#fate.requireUsable();
  }

  connect(): Connection {
    const limit = this.#fate.limit('an exchange with other ranks');
    let closed: Promise<void> | undefined;
    return {
      links: [new IpcLink(this)],
      abort: (_rank, cause) => this.#fate.fail(cause),
      close: () => {
        closed ??= this.#fate.closeCall(this.place).finally(() => clearTimeout(limit));
        return closed;
      },
    };
  }

  dispose(): void {
    void this.#leave().finally(() => {
      this.outbox.dispose();
      this.#company?.leave();
      this.place.dispose();
    });
  }

  /** Others may map this rank's memory until they have left too; those that failed are not waited for. */
  async #leave(): Promise<void> {
    this.inbox.dispose();
    if (this.#fate.failure !== undefined) return;
    for (const to of this.#others) this.send(to, 'left', true);
    let limit: NodeJS.Timeout | undefined;
    const enough = new Promise<void>((resolve) => {
      limit = setTimeout(resolve, LEAVE_LIMIT);
    });
    const all = Promise.all(this.#others.map((from) => this.receive(from, 'left'))).catch(() => undefined);
    await Promise.race([all, this.#fate.failed, enough]);
    clearTimeout(limit);
  }
}
