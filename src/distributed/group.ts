/** A group of ranks in this process and the tensors that are divided among them. */
import type { BackendName } from '../attention/options.ts';
import { checkOption, oneOf } from '../attention/options.ts';
import type { Backend } from '../backends/backend.ts';
import type { CudaBackend } from '../backends/cuda/backend.ts';
import { getBackend } from '../backends/registry.ts';
import { DISPOSE } from '../dispose.ts';
import { ExecutionError, InvalidArgumentError, takeOptions, textOf } from '../errors.ts';
import type { DType } from '../tensor/dtype.ts';
import { emptyTensor, isContiguous, requireView, slice, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { HostPlace } from './host-place.ts';
import { type Connection, type Link, LocalTransport, type Transport } from './link.ts';
import type { ReachingPlace } from './place.ts';
import type { RankPlan } from './rank.ts';
import { spansOf, TOKEN_ORDERS, type TokenOrder, totalOf } from './shards.ts';

/** Most ranks of one process. */
const MAX_RANKS = 1024;
/** Shapes of calls whose plans are kept; they share the memory that quantized keys and values need. */
const KEPT_PLANS = 8;

export interface DeviceGroupOptions {
  /**
   * CUDA devices by ordinal, one a rank, all of one kind; one that is named several times is several ranks. Keys and values are copied
   * from device to device by the driver.
   */
  readonly devices?: readonly number[];
  /** Instead of `devices`: ranks in this process's memory, which take turns on one backend. */
  readonly ranks?: number;
  /** Default `'cuda'` with `devices`, `'wasm'` with `ranks`. A backend of one's own may be given instead of a name. */
  readonly backend?: BackendName | Backend;
}

/** A group of several processes, each of which is one rank on a GPU. */
export interface ProcessGroupOptions {
  /**
   * `'nccl'`: on one machine or several, each on a device of its own. `'ipc'`: on one machine, several on one device too; they copy from
   * memory that the driver lets processes share, and need no NCCL.
   */
  readonly transport: 'nccl' | 'ipc';
  /** Which rank this process is; default what the launcher says: `sageattention launch`, torchrun, MPI or Slurm. */
  readonly rank?: number;
  /** Number of ranks; default what the launcher says. */
  readonly worldSize?: number;
  /**
   * `host:port` at which rank 0 listens: there ranks find each other, and learn at once that one has ended. Default what the launcher
   * says (`MASTER_ADDR` and `MASTER_PORT`).
   */
  readonly address?: string;
  /** For NCCL, instead of an address: 128 bytes of {@link createNcclId}, the same for all. A rank that ends is then only noticed by the timeout. */
  readonly id?: Uint8Array;
  /**
   * Ordinal of this process's CUDA device; default its rank on this machine, or 0 where it sees only one. With `'ipc'` ranks beyond the
   * number of devices begin with the first again.
   */
  readonly device?: number;
  /** Milliseconds after which a call is given up, because a rank does not take its part in it; default 600,000. */
  readonly timeout?: number;
  readonly backend?: 'cuda' | Backend;
}

export interface ShardOptions {
  /** Which dimension counts tokens: `'HND'` (default) the third of `[B,H,L,D]`, `'NHD'` the second of `[B,L,H,D]`. */
  readonly tensorLayout?: 'HND' | 'NHD';
  /** Default `'contiguous'`; with a causal mask `'zigzag'` gives every rank the same work. */
  readonly order?: TokenOrder;
}

/** A tensor of which every rank of a group holds some tokens. */
export interface ShardedTensor {
  readonly group: DeviceGroup;
  /** Of each rank of this process, where it works. */
  readonly parts: readonly TensorView[];
  /** Of the whole. */
  readonly shape: readonly number[];
  readonly dtype: DType;
  /** The dimension of tokens. */
  readonly tokenAxis: number;
  readonly order: TokenOrder;
  dispose(): void;
  [Symbol.dispose](): void;
}

export function shardedTensor(
  group: DeviceGroup,
  parts: readonly TensorView[],
  whole: Pick<ShardedTensor, 'shape' | 'dtype' | 'tokenAxis' | 'order'>,
): ShardedTensor {
  let disposed = false;
  const dispose = () => {
    if (disposed) return;
    disposed = true;
    for (const [i, part] of parts.entries()) (group.members[i] as Member).place.free(part);
  };
  const { shape, dtype, tokenAxis, order } = whole;
  return { group, parts, shape, dtype, tokenAxis, order, dispose, [DISPOSE]: dispose };
}

function takeShardOptions(options: ShardOptions): { readonly tokenAxis: 1 | 2; readonly order: TokenOrder } {
  const { tensorLayout = 'HND', order = 'contiguous' } = takeOptions(options, ['tensorLayout', 'order']);
  checkOption('tensorLayout', tensorLayout, oneOf('HND', 'NHD'));
  checkOption('order', order, oneOf(...TOKEN_ORDERS));
  return { tokenAxis: tensorLayout === 'HND' ? 2 : 1, order };
}

type Member = Transport['members'][number];

/** Ranks that attend together; see {@link createDeviceGroup}. */
export class DeviceGroup {
  readonly #transport: Transport;
  readonly #plans = new Map<string, Promise<readonly RankPlan[]>>();
  /** Ends when the last call has. */
  #turn: Promise<unknown> = Promise.resolve();
  #disposed = false;

  /** @internal */
  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Number of ranks. */
  get size(): number {
    return this.#transport.size;
  }

  /** Ranks of this process. */
  get ranks(): readonly number[] {
    return this.members.map(({ rank }) => rank);
  }

  /** @internal */
  get members(): readonly Member[] {
    return this.#transport.members;
  }

  /** @internal */
  requireUsable(): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this DeviceGroup has been disposed');
    this.#transport.requireUsable();
  }

  /** @internal Runs `use` when the calls before it have ended: all ranks do everything in the same order. */
  inTurn<T>(use: (connection: Connection) => Promise<T>): Promise<T> {
    const turn = this.#turn.then(async () => {
      this.requireUsable();
      const connection = this.#transport.connect();
      try {
        return await use(connection);
      } catch (error) {
        // Whatever failed before the ranks began: others must not wait for this one.
        connection.abort(this.ranks[0] as number, error);
        throw error;
      } finally {
        await connection.close().catch(() => undefined);
      }
    });
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  /** @internal The plans of the ranks of this process for calls of one kind. */
  async plansOf(key: string, make: () => Promise<readonly RankPlan[]>): Promise<readonly RankPlan[]> {
    const known = this.#plans.get(key);
    const plans = known ?? make();
    // The one used longest ago comes first.
    this.#plans.delete(key);
    this.#plans.set(key, plans);
    try {
      return await plans;
    } catch (error) {
      this.#plans.delete(key);
      throw error;
    } finally {
      if (this.#plans.size > KEPT_PLANS) await this.forgetPlans(this.#plans.keys().next().value as string);
    }
  }

  /** @internal */
  async forgetPlans(key: string): Promise<void> {
    const plans = this.#plans.get(key);
    this.#plans.delete(key);
    for (const plan of (await plans?.catch(() => [])) ?? []) plan.dispose();
  }

  /**
   * Divides a tensor's tokens among the ranks. The caller's tensor may be written to once the promise has resolved.
   *
   * @param view `[B,H,L,D]` or `[B,L,H,D]` in this process's memory
   * @throws {InvalidArgumentError} no such tensor
   */
  async shard(view: Tensor, options: ShardOptions = {}): Promise<ShardedTensor> {
    this.requireUsable();
    const { tokenAxis, order } = takeShardOptions(options);
    requireView('tensor', view);
    if (view.location !== 'cpu' || view.shape.length !== 4 || view.dtype === 'bool') {
      const received = `${textOf(view.location)} ${textOf(view.dtype)} ${textOf(view.shape)}`;
      throw new InvalidArgumentError('invalid-shape', 'tensor', 'a CPU tensor of 4 dimensions', received);
    }
    const length = view.shape[tokenAxis] as number;
    const parts = this.members.map(({ place, rank }) => {
      const spans = spansOf(length, this.size, rank, order);
      const shape = view.shape.map((size, i) => (i === tokenAxis ? totalOf(spans) : size));
      const host = emptyTensor(shape, view.dtype as DType);
      copySpans(new HostPlace(place.backend), view, host, tokenAxis, spans);
      return place.upload(host);
    });
    return shardedTensor(this, parts, { shape: [...view.shape], dtype: view.dtype as DType, tokenAxis, order });
  }

  /**
   * Tensors that already lie where the ranks work, as one sharded tensor; disposing it disposes them.
   *
   * @param parts of every rank of this process, with the tokens that `order` gives it
   * @param length tokens of the whole
   * @throws {InvalidArgumentError} parts of other shapes, or elsewhere
   */
  wrap(parts: readonly TensorView[], length: number, options: ShardOptions = {}): ShardedTensor {
    this.requireUsable();
    const { tokenAxis, order } = takeShardOptions(options);
    const [first] = parts;
    for (const [i, part] of parts.entries()) {
      const argument = `parts[${i}]`;
      requireView(argument, part);
      const member = this.members[i];
      const tokens = member === undefined ? 0 : totalOf(spansOf(length, this.size, member.rank, order));
      const shape = (first as TensorView).shape.map((size, axis) => (axis === tokenAxis ? tokens : size));
      const alike = part.dtype === first?.dtype && part.dtype !== 'bool' && textOf(part.shape) === textOf(shape);
      if (!alike || member === undefined || !member.place.holds(part)) {
        const expected = `${textOf(first?.dtype)} ${textOf(shape)} where rank ${member?.rank ?? '?'} of ${this.size} works`;
        const received = `${textOf(part.dtype)} ${textOf(part.shape)}, ${part.location} ${part.device ?? 0}`;
        throw new InvalidArgumentError('invalid-shape', argument, expected, received);
      }
    }
    const { length: members } = this.members;
    if (first === undefined || parts.length !== members) {
      const expected = `${members} tensors, one for each rank of this process`;
      throw new InvalidArgumentError('invalid-shape', 'parts', expected, `${parts.length}`);
    }
    const shape = first.shape.map((size, i) => (i === tokenAxis ? length : size));
    return shardedTensor(this, parts, { shape, dtype: first.dtype as DType, tokenAxis, order });
  }

  /** The whole of a sharded tensor, in this process's memory, contiguous. All processes of the group ask for it. */
  async gather(sharded: ShardedTensor): Promise<Tensor> {
    const { group, parts, shape, dtype, tokenAxis, order } = sharded;
    if (group !== this)
      throw new InvalidArgumentError('mixed-locations', 'tensor', 'a tensor of this group', 'another');
    const whole = emptyTensor(shape, dtype);
    const spans = (rank: number) => spansOf(shape[tokenAxis] as number, this.size, rank, order);
    const host = new HostPlace((this.members[0] as Member).place.backend);
    await this.forEachPart(
      parts,
      (rank) => shape.map((size, axis) => (axis === tokenAxis ? totalOf(spans(rank)) : size)),
      (rank, part) => copySpans(host, part, whole, tokenAxis, spans(rank), 'gather'),
    );
    return whole;
  }

  /** @internal Hands every rank's part to `keep`, in this process's memory; those of other processes are sent to all. */
  async forEachPart(
    parts: readonly TensorView[],
    shapeOf: (rank: number) => readonly number[],
    keep: (rank: number, part: Tensor) => void,
  ): Promise<void> {
    this.requireUsable();
    for (const [i, { place, rank }] of this.members.entries()) {
      keep(rank, (await place.download(parts[i] as TensorView)) as Tensor);
    }
    if (this.members.length === this.size) return;
    const { place, rank } = this.members[0] as Member;
    const own = parts[0] as TensorView;
    const others = Array.from({ length: this.size }, (_, other) => other).filter((other) => other !== rank);
    await this.inTurn(async (connection) => {
      const made: TensorView[] = [];
      const empty = (shape: readonly number[]) => {
        const view = place.empty(shape, own.dtype as DType);
        made.push(view);
        return view;
      };
      try {
        let packed = own;
        if (!isContiguous(own)) {
          packed = empty(own.shape);
          place.copy(own, packed);
        }
        const incoming = others.map((from) => ({ from, name: 'part', into: empty(shapeOf(from)) }));
        const outgoing = others.map((to) => ({ to, name: 'part', value: packed }));
        const [link] = connection.links as readonly [Link];
        place.waitFor(await link.exchange(outgoing, incoming));
        await link.finish();
        await connection.close();
        for (const { from, into } of incoming) keep(from, (await place.download(into)) as Tensor);
      } finally {
        for (const view of made) place.free(view);
      }
    });
  }

  /** Frees what the group holds; sharded tensors are the caller's to dispose. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    const kept = [...this.#plans.values()];
    this.#plans.clear();
    for (const plans of kept) {
      void plans.then(
        (made) => {
          for (const plan of made) plan.dispose();
        },
        () => undefined,
      );
    }
    this.#transport.dispose();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/** Copies the tokens of `spans` from a whole tensor to a part that holds them one after another, or back. */
function copySpans(
  host: HostPlace,
  from: TensorView,
  to: TensorView,
  axis: number,
  spans: readonly { readonly start: number; readonly end: number }[],
  way: 'shard' | 'gather' = 'shard',
): void {
  let at = 0;
  for (const { start, end } of spans) {
    const packed = [at, at + end - start] as const;
    const [source, target] = way === 'shard' ? ([[start, end], packed] as const) : ([packed, [start, end]] as const);
    host.copy(slice(from, axis, ...source), slice(to, axis, ...target));
    at = packed[1];
  }
}

/**
 * Ranks that attend together: all of them in this process, or one in each of several.
 *
 * @throws {InvalidArgumentError} no number of ranks, no such device, devices that differ
 * @throws {BackendUnavailableError} this build does not contain the backend, or this machine has no driver or no NCCL
 * @throws {ExecutionError} another process did not come in time, or failed
 */
export async function createDeviceGroup(options: DeviceGroupOptions | ProcessGroupOptions): Promise<DeviceGroup> {
  if ('transport' in options) return new DeviceGroup(await processTransport(options));
  const { devices, ranks, backend } = takeOptions(options, ['devices', 'ranks', 'backend']);
  if ((devices === undefined) === (ranks === undefined)) {
    throw new InvalidArgumentError('invalid-option', 'options.ranks', 'either devices or ranks', 'both or neither');
  }
  const places =
    devices === undefined ? await hostPlaces(ranks as number, backend) : await cudaPlaces(devices, backend);
  return new DeviceGroup(new LocalTransport(places));
}

/**
 * An id for the processes of one group that get it in a way of their own; see {@link ProcessGroupOptions.id}.
 *
 * @throws {BackendUnavailableError} this machine has no NCCL
 */
export async function createNcclId(): Promise<Uint8Array> {
  const { loadNccl, newNcclId } = await import('./nccl/index.ts');
  return newNcclId(await loadNccl());
}

const PROCESS_OPTIONS = ['transport', 'rank', 'worldSize', 'address', 'id', 'device', 'timeout', 'backend'] as const;
const DEFAULT_TIMEOUT = 600_000;

async function processTransport(options: ProcessGroupOptions): Promise<Transport> {
  const { transport, backend = 'cuda', ...rest } = takeOptions(options, [...PROCESS_OPTIONS]);
  checkOption('transport', transport, oneOf('nccl', 'ipc'));
  const own = (await backendOf(backend, 'cuda')) as CudaBackend;
  const given = { timeout: DEFAULT_TIMEOUT, ...rest };
  if (transport === 'ipc') return (await import('./ipc/index.ts')).connectSharing(own, given);
  return (await import('./nccl/index.ts')).connectProcess(own, given);
}

const backendOf = async (given: BackendName | Backend, name: BackendName): Promise<Backend> => {
  const backend = typeof given === 'string' ? await getBackend(given) : given;
  if (backend.name === name) return backend;
  throw new InvalidArgumentError('invalid-option', 'options.backend', `'${name}' for these ranks`, `'${backend.name}'`);
};

async function hostPlaces(ranks: number, backend: BackendName | Backend = 'wasm'): Promise<ReachingPlace[]> {
  if (!Number.isInteger(ranks) || ranks < 1 || ranks > MAX_RANKS) {
    const expected = `a whole number from 1 to ${MAX_RANKS}`;
    throw new InvalidArgumentError('invalid-option', 'options.ranks', expected, textOf(ranks));
  }
  const own = await backendOf(backend, 'wasm');
  return Array.from({ length: ranks }, () => new HostPlace(own));
}

async function cudaPlaces(
  devices: readonly number[],
  backend: BackendName | Backend = 'cuda',
): Promise<ReachingPlace[]> {
  if (!Array.isArray(devices) || devices.length < 1 || devices.length > MAX_RANKS) {
    const expected = `1 to ${MAX_RANKS} ordinals of devices`;
    throw new InvalidArgumentError('invalid-option', 'options.devices', expected, textOf(devices));
  }
  const own = (await backendOf(backend, 'cuda')) as CudaBackend;
  const { CudaPlace } = await import('./cuda-place.ts');
  const cuda = await own.cuda();
  const places = devices.map((ordinal) => new CudaPlace(own, cuda.device(ordinal)));
  const kinds = [...new Set(places.map(({ device }) => device.computeCapability))];
  if (kinds.length > 1) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.devices',
      'devices of one compute capability, which quantize alike',
      places.map(({ device }) => `${device} is sm_${device.computeCapability}`).join(', '),
    );
  }
  return places;
}
