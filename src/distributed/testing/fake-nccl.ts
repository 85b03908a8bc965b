/**
 * NCCL without a network: ranks of one process over the fake driver. A group of calls is in progress until each of its sends and
 * receives has met the other side's, in the order of the pair; the bytes are then copied in the order of both streams.
 */
import type { CudaApi } from '../../backends/cuda/driver/api.ts';
import { type NCCL_FUNCTIONS, NCCL_IN_PROGRESS, NCCL_SUCCESS, type NcclApi } from '../nccl/api.ts';

type Functions = Pick<NcclApi, keyof typeof NCCL_FUNCTIONS>;

interface Operation {
  readonly communicator: Communicator;
  readonly pointer: bigint;
  readonly bytes: number;
  readonly stream: bigint;
}

interface Communicator {
  readonly world: World;
  readonly rank: number;
  readonly context: bigint;
  /** Operations of the group that has ended and have not met their others. */
  unmatched: number;
  error: number;
}

interface World {
  readonly size: number;
  readonly members: Map<number, Communicator>;
  /** Waiting, by sender and receiver. */
  readonly sends: Map<string, Operation[]>;
  readonly receives: Map<string, Operation[]>;
}

export class FakeNccl {
  readonly #driver: CudaApi;
  readonly #worlds = new Map<string, World>();
  readonly #communicators = new Map<bigint, Communicator>();
  #group: (() => void)[] | undefined;
  #made = 0;
  readonly api: NcclApi;
  /** Communicators that were neither destroyed nor aborted. */
  get live(): number {
    return this.#communicators.size;
  }
  aborted = 0;

  constructor(driver: CudaApi) {
    this.#driver = driver;
    const unused = () => {
      throw new Error('not a part of the fake');
    };
    this.api = {
      ...this.#functions,
      library: 'fake',
      has: () => true,
      addressOf: unused,
      bytesAt: unused,
      textAt: unused,
    };
  }

  /** From now on a rank's calls report this. */
  break(rank: number, status: number): void {
    for (const communicator of this.#communicators.values())
      if (communicator.rank === rank) communicator.error = status;
  }

  #of(handle: bigint | number): Communicator {
    const found = this.#communicators.get(BigInt(handle));
    if (found === undefined) throw new Error('a communicator that is gone');
    return found;
  }

  #queue(way: 'sends' | 'receives', from: number, to: number, operation: Operation): void {
    const { world } = operation.communicator;
    const pair = `${from} ${to}`;
    const listOf = (which: 'sends' | 'receives') => {
      let list = world[which].get(pair);
      if (list === undefined) {
        list = [];
        world[which].set(pair, list);
      }
      return list;
    };
    operation.communicator.unmatched++;
    listOf(way).push(operation);
    const [sends, receives] = [listOf('sends'), listOf('receives')];
    while (sends.length > 0 && receives.length > 0)
      this.#copy(sends.shift() as Operation, receives.shift() as Operation);
  }

  #copy(send: Operation, receive: Operation): void {
    if (send.bytes !== receive.bytes)
      throw new Error(`${send.bytes} bytes were sent where ${receive.bytes} are received`);
    const driver = this.#driver;
    const [sent, received] = [new BigUint64Array(1), new BigUint64Array(1)];
    const within = (communicator: Communicator, ...calls: readonly (() => number)[]) => {
      driver.cuCtxPushCurrent(communicator.context);
      for (const call of calls) if (call() !== 0) throw new Error('the fake driver refused');
      driver.cuCtxPopCurrent(new BigUint64Array(1));
    };
    const event = (made: BigUint64Array) => made[0] as bigint;
    within(
      send.communicator,
      () => driver.cuEventCreate(sent, 2),
      () => driver.cuEventRecord(event(sent), send.stream),
    );
    within(
      receive.communicator,
      () => driver.cuStreamWaitEvent(receive.stream, event(sent), 0),
      () =>
        driver.cuMemcpyPeerAsync(
          receive.pointer,
          receive.communicator.context,
          send.pointer,
          send.communicator.context,
          send.bytes,
          receive.stream,
        ),
      () => driver.cuEventCreate(received, 2),
      () => driver.cuEventRecord(event(received), receive.stream),
    );
    within(
      send.communicator,
      () => driver.cuStreamWaitEvent(send.stream, event(received), 0),
      () => driver.cuEventDestroy(event(sent)),
      () => driver.cuEventDestroy(event(received)),
    );
    send.communicator.unmatched--;
    receive.communicator.unmatched--;
  }

  readonly #transfer =
    (way: 'sends' | 'receives'): Functions['ncclSend'] =>
    (pointer, bytes, type, peer, handle, stream) => {
      const communicator = this.#of(handle);
      if (type !== 1 || this.#group === undefined) return 4;
      const [from, to] = way === 'sends' ? [communicator.rank, peer] : [peer, communicator.rank];
      const operation = { communicator, pointer: BigInt(pointer), bytes: Number(bytes), stream: BigInt(stream) };
      this.#group.push(() => this.#queue(way, from, to, operation));
      return NCCL_SUCCESS;
    };

  readonly #functions: Functions = {
    ncclGetVersion: (version) => {
      (version as Int32Array)[0] = 22800;
      return NCCL_SUCCESS;
    },
    ncclGetUniqueId: (id) => {
      (id as Uint8Array).fill(++this.#made);
      return NCCL_SUCCESS;
    },
    ncclCommInitRankConfig: (handle, size, id, rank, config) => {
      const view = config as DataView;
      if (view.getUint32(8, true) !== 0xcafebeef || view.getInt32(16, true) !== 0) return 4;
      const key = id.join();
      const world = this.#worlds.get(key) ?? { size, members: new Map(), sends: new Map(), receives: new Map() };
      this.#worlds.set(key, world);
      const context = new BigUint64Array(1);
      if (this.#driver.cuCtxGetCurrent(context) !== 0 || context[0] === 0n) return 1;
      if (world.size !== size || world.members.has(rank)) return 5;
      const communicator = { world, rank, context: context[0] as bigint, unmatched: 0, error: 0 };
      world.members.set(rank, communicator);
      const made = BigInt(0x9000 + ++this.#made);
      this.#communicators.set(made, communicator);
      (handle as BigUint64Array)[0] = made;
      return NCCL_IN_PROGRESS;
    },
    ncclCommGetAsyncError: (handle, status) => {
      const { world, unmatched, error } = this.#of(handle);
      const waiting = world.members.size < world.size || unmatched > 0;
      (status as Int32Array)[0] = error !== 0 ? error : waiting ? NCCL_IN_PROGRESS : NCCL_SUCCESS;
      return NCCL_SUCCESS;
    },
    ncclCommFinalize: (handle) => {
      this.#of(handle);
      return NCCL_IN_PROGRESS;
    },
    ncclCommDestroy: (handle) => (this.#communicators.delete(BigInt(handle)) ? NCCL_SUCCESS : 4),
    ncclCommAbort: (handle) => {
      this.aborted++;
      return this.#communicators.delete(BigInt(handle)) ? NCCL_SUCCESS : 4;
    },
    ncclGroupStart: () => {
      if (this.#group !== undefined) return 5;
      this.#group = [];
      return NCCL_SUCCESS;
    },
    ncclGroupEnd: () => {
      const group = this.#group;
      this.#group = undefined;
      for (const run of group ?? []) run();
      return group === undefined ? 5 : NCCL_IN_PROGRESS;
    },
    ncclSend: this.#transfer('sends'),
    ncclRecv: this.#transfer('receives'),
  };
}
