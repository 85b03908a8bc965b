/** Ranks of several processes or machines, one in each, connected by NCCL. */
import { messageOf } from '../../errors.ts';
import { bytesOf, type CudaPlace } from '../cuda-place.ts';
import { Fate } from '../fate.ts';
import type { Connection, Incoming, Link, Outgoing, Transport } from '../link.ts';
import type { Mark } from '../place.ts';
import { type Company, meet } from '../rendezvous.ts';
import { NCCL_ID_BYTES, type NcclApi } from './api.ts';
import { NcclCommunicator, ncclError, type Transfer } from './communicator.ts';

export interface NcclOptions {
  readonly rank: number;
  readonly size: number;
  /** Made by one process with `createNcclId` and given to all; undefined: rank 0 gives it to those who come to `address`. */
  readonly id?: Uint8Array;
  readonly address?: { readonly host: string; readonly port: number };
  /** Milliseconds after which a call in which another rank does not take its part is given up. */
  readonly timeout: number;
}

/** A new id for one communicator. */
export function newNcclId(api: NcclApi): Uint8Array {
  const id = new Uint8Array(NCCL_ID_BYTES);
  const status = api.ncclGetUniqueId(id);
  if (status !== 0) throw ncclError(status, 'ncclGetUniqueId', 'making an id for the ranks');
  return id;
}

class NcclLink implements Link {
  readonly #communicator: NcclCommunicator;
  readonly #place: CudaPlace;

  constructor(communicator: NcclCommunicator, place: CudaPlace) {
    this.#communicator = communicator;
    this.#place = place;
  }

  async exchange(outgoing: readonly Outgoing[], incoming: readonly Incoming[]): Promise<Mark> {
    const place = this.#place;
    const transfers: Transfer[] = [
      ...outgoing.map(({ to, value }) => ({ way: 'send' as const, peer: to, ...bytesOf(value) })),
      ...incoming.map(({ from, into }) => ({ way: 'receive' as const, peer: from, ...bytesOf(into) })),
    ].filter(({ byteLength }) => byteLength > 0);
    place.holdCopies(place.mark());
    if (transfers.length > 0) await this.#communicator.exchange(transfers, place.copyStream);
    return place.markCopies();
  }

  async finish(): Promise<void> {
    this.#place.waitFor(this.#place.markCopies());
  }
}

/** Ranks of different kinds would quantize differently, and NCCL refuses two of one device without naming them. */
const introduce = ({ device }: CudaPlace) => ({
  kind: `sm_${device.computeCapability}`,
  device: `device ${device.pciAddress} of ${process.getBuiltinModule('node:os').hostname()}`,
});

export class NcclTransport implements Transport {
  readonly size: number;
  readonly members: readonly { readonly rank: number; readonly place: CudaPlace }[];
  readonly #communicator: NcclCommunicator;
  readonly #company: Company | undefined;
  readonly #fate: Fate;

  private constructor(
    place: CudaPlace,
    communicator: NcclCommunicator,
    company: Company | undefined,
    options: NcclOptions,
  ) {
    this.size = options.size;
    this.members = [{ rank: options.rank, place }];
    this.#communicator = communicator;
    this.#company = company;
    this.#fate = new Fate(options.rank, options.timeout, (failure, cause) => {
      communicator.abort(failure);
      company?.noteFailure(`rank ${options.rank} failed: ${messageOf(cause)}`);
    });
    company?.onFailure((error) => this.#fate.fail(error));
  }

  /**
   * Connects this process's rank with those of the others, who do the same.
   *
   * @throws {ExecutionError} a rank did not come in time, or failed
   */
  static async connect(api: NcclApi, place: CudaPlace, options: NcclOptions): Promise<NcclTransport> {
    const { rank, size, address, timeout } = options;
    const company =
      address &&
      (await meet({ rank, size, timeout, ...introduce(place), ...address }, () => options.id ?? newNcclId(api)));
    const communicator = new NcclCommunicator(api, place.device);
    const transport = new NcclTransport(place, communicator, company, options);
    return transport.#fate.connected(transport, async () => {
      communicator.open({ id: company?.shared ?? (options.id as Uint8Array), rank, size });
      await communicator.settled('connecting the ranks');
    });
  }

  requireUsable(): void {
    this.#fate.requireUsable();
  }

  connect(): Connection {
    const { place } = this.members[0] as { place: CudaPlace };
    const limit = this.#fate.limit('an exchange with other ranks');
    let closed: Promise<void> | undefined;
    return {
      links: [new NcclLink(this.#communicator, place)],
      abort: (_rank, cause) => this.#fate.fail(cause),
      close: () => {
        closed ??= this.#fate.closeCall(place).finally(() => clearTimeout(limit));
        return closed;
      },
    };
  }

  dispose(): void {
    const { place } = this.members[0] as { place: CudaPlace };
    const ended = this.#communicator.dispose();
    void ended.finally(() => {
      this.#company?.leave();
      place.dispose();
    });
  }
}
