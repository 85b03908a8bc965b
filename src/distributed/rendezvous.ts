/**
 * How the processes of a group find each other, and how all learn that one has failed: each keeps a connection to rank 0, which the
 * system closes with the process.
 */
import type { Server, Socket } from 'node:net';
import { ExecutionError, messageOf } from '../errors.ts';

export interface Meeting {
  readonly rank: number;
  readonly size: number;
  /** What all ranks must be alike in. */
  readonly kind: string;
  /** The device, where each rank must have one of its own. */
  readonly device?: string;
  /** Where rank 0 listens. */
  readonly host: string;
  readonly port: number;
  /** Milliseconds until all must have come. */
  readonly timeout: number;
}

/** What ranks tell each other. */
type Message =
  | { readonly kind: 'hello'; readonly rank: number; readonly size: number; readonly of: string; readonly on?: string }
  | { readonly kind: 'all here'; readonly shared: string }
  | { readonly kind: 'failed'; readonly text: string }
  | Posted
  | { readonly kind: 'bye' };

/** What one rank tells another; rank 0 passes on what is not for it. */
interface Posted {
  readonly kind: 'posted';
  readonly from: number;
  readonly to: number;
  readonly name: string;
  /** Anything that JSON holds. */
  readonly value: unknown;
}

/** Milliseconds between attempts to reach rank 0. */
const RETRY = 50;
/** Milliseconds of silence after which the system asks whether the other machine still runs. */
const KEEP_ALIVE = 5000;
/** Longest message; more is not from one of us. */
const LONGEST_MESSAGE = 2 ** 16;

const net = () => process.getBuiltinModule('node:net');
const failure = (text: string) => new ExecutionError('execution-failed', text);

/** A connection on which lines of JSON go both ways. */
class Channel {
  readonly #socket: Socket;
  #text = '';

  constructor(socket: Socket, onMessage: (message: Message) => void, onEnd: () => void) {
    this.#socket = socket;
    socket.setKeepAlive(true, KEEP_ALIVE);
    socket.setNoDelay(true);
    socket.setEncoding('utf8');
    socket.on('data', (text: string) => {
      this.#text += text;
      const lines = this.#text.split('\n');
      this.#text = lines.pop() as string;
      if (this.#text.length > LONGEST_MESSAGE) socket.destroy();
      for (const line of lines) {
        try {
          onMessage(JSON.parse(line) as Message);
        } catch {
          socket.destroy();
        }
      }
    });
    // The end that follows says it all.
    socket.on('error', () => undefined);
    socket.on('close', onEnd);
  }

  send(message: Message): void {
    if (!this.#socket.destroyed) this.#socket.write(`${JSON.stringify(message)}\n`);
  }

  end(message: Message): void {
    if (!this.#socket.destroyed) this.#socket.end(`${JSON.stringify(message)}\n`);
  }

  /** A program may end without having said goodbye. */
  unref(): void {
    this.#socket.unref();
  }
}

/** The ranks of a group, who have all come. */
export class Company {
  /** What rank 0 gave to all. */
  readonly shared: Uint8Array;
  readonly #rank: number;
  /** Those that this rank is connected to: rank 0, or all others where it is rank 0. */
  readonly #others: ReadonlyMap<number, Channel>;
  readonly #server: Server | undefined;
  #failure: ExecutionError | undefined;
  readonly #listeners: ((error: ExecutionError) => void)[] = [];
  /** What came before anyone asked for it. */
  readonly #early: Posted[] = [];
  #onPosted: ((from: number, name: string, value: unknown) => void) | undefined;

  /** @internal */
  constructor(rank: number, shared: Uint8Array, others: ReadonlyMap<number, Channel>, server: Server | undefined) {
    this.#rank = rank;
    this.shared = shared;
    this.#others = others;
    this.#server = server;
    for (const other of others.values()) other.unref();
    server?.unref();
  }

  /** Tells another rank something; what one tells another arrives in this order. */
  post(to: number, name: string, value: unknown): void {
    this.#deliver({ kind: 'posted', from: this.#rank, to, name, value });
  }

  /** Calls back with all that other ranks have told this one and will tell it. */
  onPosted(listener: (from: number, name: string, value: unknown) => void): void {
    this.#onPosted = listener;
    for (const { from, name, value } of this.#early.splice(0)) listener(from, name, value);
  }

  /** @internal */
  hear(message: Message): void {
    if (message.kind === 'failed') this.noteFailure(message.text);
    else if (message.kind === 'posted') this.#deliver(message);
  }

  /** Takes what is for this rank, and passes on the rest. */
  #deliver(posted: Posted): void {
    const { from, to, name, value } = posted;
    if (to !== this.#rank) (this.#others.get(to) ?? this.#others.get(0))?.send(posted);
    else if (this.#onPosted === undefined) this.#early.push(posted);
    else this.#onPosted(from, name, value);
  }

  /** Calls back, once, when a rank has failed or ended without a word; at once where it has already. */
  onFailure(listener: (error: ExecutionError) => void): void {
    if (this.#failure === undefined) this.#listeners.push(listener);
    else listener(this.#failure);
  }

  /** @internal A rank has failed: this one, or one that it is connected to. */
  noteFailure(text: string): void {
    if (this.#failure !== undefined) return;
    this.#failure = failure(text);
    for (const other of this.#others.values()) other.send({ kind: 'failed', text });
    for (const listener of this.#listeners.splice(0)) listener(this.#failure);
  }

  /** Leaves, so that the others know that it is no failure. */
  leave(): void {
    this.#listeners.length = 0;
    for (const other of this.#others.values()) other.end({ kind: 'bye' });
    this.#server?.close();
  }
}

/** Whoever is connected to: messages before and after all have come go to different places. */
interface Peer {
  rank: number | undefined;
  left: boolean;
  channel: Channel;
}

/**
 * Brings the processes together.
 *
 * @param share made by rank 0, for all
 * @throws {ExecutionError} not all came in time, or one that did not fit
 */
export function meet(meeting: Meeting, share: () => Uint8Array): Promise<Company> {
  return meeting.rank === 0 ? host(meeting, share) : join(meeting);
}

function host(meeting: Meeting, share: () => Uint8Array): Promise<Company> {
  const { size, kind, host: address, port, timeout } = meeting;
  return new Promise((resolve, reject) => {
    const peers = new Map<number, Peer>();
    const devices = new Map([[meeting.device, 0]]);
    const misfit = (rank: number, of: string, on: string | undefined): string | undefined => {
      if (of !== kind) return `all ranks must be of one kind: rank 0 is ${kind}, rank ${rank} is ${of}`;
      const other = on === undefined ? undefined : devices.get(on);
      devices.set(on, rank);
      return other === undefined
        ? undefined
        : `ranks ${other} and ${rank} are both on ${on}, and this transport takes one rank a device`;
    };
    let company: Company | undefined;
    const refuse = (error: unknown) => {
      clearTimeout(limit);
      const text = messageOf(error);
      for (const { channel } of peers.values()) channel.end({ kind: 'failed', text });
      server.close();
      reject(error);
    };
    const limit = setTimeout(() => {
      const missing = Array.from({ length: size }, (_, rank) => rank).filter((rank) => rank > 0 && !peers.has(rank));
      refuse(failure(`ranks ${missing.join(', ')} of ${size} did not come within ${timeout} ms`));
    }, timeout);
    const complete = () => {
      clearTimeout(limit);
      try {
        const shared = share();
        company = new Company(0, shared, new Map([...peers].map(([rank, { channel }]) => [rank, channel])), server);
        const text = Buffer.from(shared).toString('base64');
        for (const { channel } of peers.values()) channel.send({ kind: 'all here', shared: text });
        resolve(company);
      } catch (error) {
        refuse(error);
      }
    };
    const server = net().createServer((socket) => {
      const peer: Peer = { rank: undefined, left: false, channel: undefined as never };
      peer.channel = new Channel(
        socket,
        (message) => {
          if (message.kind === 'hello') {
            const { rank, size: theirs, of, on } = message;
            if (theirs !== size || !(rank > 0 && rank < size) || peers.has(rank) || company !== undefined) {
              const text = `rank ${rank} of ${theirs} is not one that rank 0 of ${size} waits for`;
              peer.channel.end({ kind: 'failed', text });
              return;
            }
            peer.rank = rank;
            peers.set(rank, peer);
            const unfit = misfit(rank, of, on);
            if (unfit !== undefined) refuse(failure(unfit));
            else if (peers.size === size - 1) complete();
          } else if (message.kind === 'bye') peer.left = true;
          else company?.hear(message);
        },
        () => {
          if (peer.rank === undefined || peer.left) return;
          if (company === undefined) peers.delete(peer.rank);
          else company.noteFailure(`rank ${peer.rank} has ended`);
        },
      );
    });
    server.on('error', (error) =>
      refuse(
        new ExecutionError('execution-failed', `rank 0 cannot listen at ${address}:${port}: ${error.message}`, error),
      ),
    );
    server.listen(port, address, () => {
      if (size === 1) complete();
    });
  });
}

function join({ rank, size, kind, device, host: address, port, timeout }: Meeting): Promise<Company> {
  return new Promise((resolve, reject) => {
    const end = Date.now() + timeout;
    let company: Company | undefined;
    let over = false;
    const refuse = (text: string) => {
      over = true;
      clearTimeout(limit);
      reject(failure(text));
    };
    const limit = setTimeout(() => {
      refuse(`rank ${rank} of ${size} found no complete group at ${address}:${port} within ${timeout} ms`);
      socket.destroy();
    }, timeout);
    let socket: Socket;
    const attempt = () => {
      let left = false;
      let connected = false;
      socket = net().connect(port, address, () => {
        connected = true;
        channel.send({ kind: 'hello', rank, size, of: kind, ...(device !== undefined && { on: device }) });
      });
      const channel = new Channel(
        socket,
        (message) => {
          if (message.kind === 'all here') {
            clearTimeout(limit);
            company = new Company(rank, Buffer.from(message.shared, 'base64'), new Map([[0, channel]]), undefined);
            resolve(company);
          } else if (message.kind === 'failed' && company === undefined) refuse(message.text);
          else if (message.kind === 'bye') left = true;
          else company?.hear(message);
        },
        () => {
          if (over || left) return;
          if (company !== undefined) company.noteFailure('rank 0 has ended');
          else if (connected) refuse('rank 0 has ended');
          else if (Date.now() < end) setTimeout(attempt, RETRY);
        },
      );
    };
    attempt();
  });
}
