/** One rank of an NCCL communicator, none of whose calls waits for another rank without an end. */
import type { CudaDevice } from '../../backends/cuda/driver/device.ts';
import type { CudaStream } from '../../backends/cuda/driver/stream.ts';
import { ExecutionError } from '../../errors.ts';
import { NCCL_IN_PROGRESS, NCCL_RESULTS, NCCL_SUCCESS, NCCL_UINT8, type NcclApi, nonBlockingConfig } from './api.ts';

/** Polls that yield to the event loop without waiting, before they are a millisecond apart. */
const EAGER_POLLS = 1000;
/** Milliseconds that giving the communicator back may take before it is aborted. */
const FINALIZE_LIMIT = 5000;

const nextPoll = (poll: number) =>
  new Promise<void>((resolve) => (poll < EAGER_POLLS ? setImmediate(resolve) : setTimeout(resolve, 1)));

export interface Transfer {
  readonly way: 'send' | 'receive';
  readonly peer: number;
  readonly pointer: bigint;
  readonly byteLength: number;
}

export interface CommunicatorOptions {
  readonly id: Uint8Array;
  readonly rank: number;
  readonly size: number;
}

export class NcclCommunicator {
  readonly #api: NcclApi;
  readonly #device: CudaDevice;
  readonly #handle = new BigUint64Array(1);
  #failure: unknown;
  #ended = false;

  /** @internal Use {@link open}. */
  constructor(api: NcclApi, device: CudaDevice) {
    this.#api = api;
    this.#device = device;
  }

  /** Begins to connect; {@link settled} says when all ranks have come. */
  open({ id, rank, size }: CommunicatorOptions): void {
    const config = nonBlockingConfig();
    this.#call('ncclCommInitRankConfig', 'connecting the ranks', () =>
      this.#api.ncclCommInitRankConfig(this.#handle, size, id, rank, config),
    );
  }

  #call(name: string, what: string, call: () => number): void {
    const status = this.#device.inContext(call);
    if (status !== NCCL_SUCCESS && status !== NCCL_IN_PROGRESS) throw ncclError(status, name, what);
  }

  /**
   * Resolves when what was begun has been done by the host; what it enqueued may be under way.
   *
   * @throws {ExecutionError} NCCL's error, or what {@link abort} was called with
   */
  async settled(what: string): Promise<void> {
    const status = new Int32Array(1);
    for (let poll = 0; ; poll++) {
      if (this.#failure !== undefined) throw this.#failure;
      if (this.#ended) throw new ExecutionError('disposed', 'this NCCL communicator has been disposed');
      this.#call('ncclCommGetAsyncError', what, () =>
        this.#api.ncclCommGetAsyncError(this.#handle[0] as bigint, status),
      );
      if (status[0] === NCCL_SUCCESS) return;
      if (status[0] !== NCCL_IN_PROGRESS) throw ncclError(status[0] as number, 'ncclCommGetAsyncError', what);
      await nextPoll(poll);
    }
  }

  /** Enqueues sends and receives that happen together. Between two ranks they come in their order. */
  async exchange(transfers: readonly Transfer[], stream: CudaStream): Promise<void> {
    const what = 'exchanging with other ranks';
    if (this.#failure !== undefined) throw this.#failure;
    const api = this.#api;
    const handle = this.#handle[0] as bigint;
    this.#call('ncclGroupStart', what, () => api.ncclGroupStart());
    try {
      for (const { way, peer, pointer, byteLength } of transfers) {
        const name = way === 'send' ? 'ncclSend' : 'ncclRecv';
        this.#call(name, what, () => api[name](pointer, byteLength, NCCL_UINT8, peer, handle, stream.handle));
      }
    } finally {
      this.#call('ncclGroupEnd', what, () => api.ncclGroupEnd());
    }
    await this.settled(what);
  }

  /** Gives up everything at once: kernels that wait for another rank end, and whoever waits here gets the error. */
  abort(failure: unknown): void {
    if (this.#failure !== undefined || this.#ended) return;
    this.#failure = failure;
    this.#release();
  }

  #release(): void {
    this.#ended = true;
    if (this.#handle[0] === 0n) return;
    // A status here would hide the error that is on its way.
    this.#device.inContext(() => this.#api.ncclCommAbort(this.#handle[0] as bigint));
  }

  /** Gives the communicator back when what was enqueued has been done; without that after some seconds. */
  async dispose(): Promise<void> {
    if (this.#ended || this.#failure !== undefined) return;
    const limit = setTimeout(
      () => this.abort(new ExecutionError('disposed', 'the ranks did not end together')),
      FINALIZE_LIMIT,
    );
    try {
      this.#call('ncclCommFinalize', 'ending', () => this.#api.ncclCommFinalize(this.#handle[0] as bigint));
      await this.settled('ending');
      this.#ended = true;
      this.#call('ncclCommDestroy', 'ending', () => this.#api.ncclCommDestroy(this.#handle[0] as bigint));
    } catch (error) {
      this.abort(error);
    } finally {
      clearTimeout(limit);
    }
  }
}

export function ncclError(status: number, call: string, what: string): ExecutionError {
  const name = NCCL_RESULTS[status] ?? `ncclResult ${status}`;
  return new ExecutionError(
    'execution-failed',
    `${what}: ${name} from ${call} (NCCL_DEBUG=WARN in the environment says more)`,
  );
}
