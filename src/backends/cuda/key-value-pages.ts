/** Keys and values of many sequences in pages of one pool, as serving engines keep them. */
import type { KernelName } from '../../attention/kernels.ts';
import { type AttentionOptions, validateOptions } from '../../attention/options.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import { type AttentionProblem, createProblem } from '../../attention/problem.ts';
import { DISPOSE } from '../../dispose.ts';
import { ExecutionError, InvalidArgumentError, takeOptions, textOf, UnsupportedOptionError } from '../../errors.ts';
import type { DType } from '../../tensor/dtype.ts';
import { contiguousStrides } from '../../tensor/tensor.ts';
import type { AttentionOutputs, RunContext } from '../backend.ts';
import { chooseOptions, contextOf, RUN_OPTIONS, sideOf } from '../choice.ts';
import type { CudaDevice } from './driver/device.ts';
import { DeviceMemory } from './driver/memory.ts';
import type { CudaStream } from './driver/stream.ts';
import { CUDA_KERNELS, descriptorOf, MOST_VALUE_DIM, targetFor } from './kernel-table.ts';
import { BLOCK_K } from './kernels/mma-sync/config.ts';
import type { LaunchSequence } from './launches/launch.ts';
import { PAGE_PLANNER, type PagePlanner, type PoolFacts } from './launches/pages.ts';
import { BoundLaunches, packBuffers } from './run/bound-launches.ts';
import {
  addressOf,
  type HeldBuffer,
  planKeyOf,
  requireTensorOn,
  sideOperands,
  streamOf,
  streamOfAppend,
} from './run/operands.ts';
import { Runner } from './run/runner.ts';
import { type CudaTensor, copyToDevice } from './tensor.ts';

/** What a pool of pages is made for. */
export interface KeyValuePagesOptions {
  readonly kvHeads: number;
  /** D, up to 256. */
  readonly headDim: number;
  /** Dv; default D. */
  readonly valueDim?: number;
  /** Of q, k and v. */
  readonly dtype: DType;
  /** Pages in the pool. */
  readonly pages: number;
  /** Tokens of a page: a power of two, 64 or more; default 256. */
  readonly pageSize?: number;
  /**
   * `qk-int8-pv-fp16-cuda` (default), `qk-int8-pv-fp16`, `qk-int8-pv-fp8-cuda` (compute capability 8.9 and later, not 9.0; V in E4M3 with a scale for each channel of each 64
   * tokens) or `qk-fp4-pv-fp4`.
   */
  readonly kernel?: KernelName;
  /** Default true. The vector is the mean of K of the first sequence of the first append. */
  readonly smoothK?: boolean;
}

/**
 * Which pages sequences have and how many tokens, int32, on the device (row-major, of the device that the pool is on; see
 * `CudaDevice.memoryFromPointer` for memory of others) or here.
 */
export interface PageTable {
  /** `[B, pagesPerSequence]`: page numbers below the pool's `pages`, in the order of the tokens. Entries behind a sequence's last page are not read. */
  readonly pages: DeviceMemory | Int32Array;
  /** `[B]`: tokens that each sequence holds, of an append those included that it brings; 0 where a place in the batch is not used. */
  readonly lengths: DeviceMemory | Int32Array;
}

const POOL_OPTIONS = ['kvHeads', 'headDim', 'valueDim', 'dtype', 'pages', 'pageSize', 'kernel', 'smoothK'] as const;
/** Options of {@link KeyValuePages.attend}. */
export type PagedAttendOptions = Pick<
  AttentionOptions,
  'isCausal' | 'causalAlignment' | 'windowSize' | 'softcap' | 'smScale' | 'returnLse' | 'sinks' | 'signal' | 'stream'
>;
const ATTEND_OPTIONS = [
  'isCausal',
  'causalAlignment',
  'windowSize',
  'softcap',
  'smScale',
  'returnLse',
  'sinks',
  ...RUN_OPTIONS,
] as const satisfies readonly (keyof PagedAttendOptions)[];

const DEFAULT_PAGE_SIZE = 256;
/** Plans kept for shapes of appends and of attention. */
const KEPT_PLANS = 16;

function requireCount(name: keyof KeyValuePagesOptions, value: unknown, most: number): number {
  if (Number.isInteger(value) && (value as number) > 0 && (value as number) <= most) return value as number;
  throw new InvalidArgumentError('invalid-option', `options.${name}`, `an integer from 1 to ${most}`, textOf(value));
}

function requirePageSize(pageSize: unknown): number {
  const exponent = Math.log2(pageSize as number);
  if (Number.isInteger(exponent) && exponent >= Math.log2(BLOCK_K) && exponent < 30) return pageSize as number;
  const expected = `a power of two, ${BLOCK_K} or more`;
  throw new InvalidArgumentError('invalid-option', 'options.pageSize', expected, textOf(pageSize));
}

/**
 * A pool of pages on a device, empty.
 *
 * @param planner default: the kernels of this package
 * @throws {InvalidArgumentError | UnsupportedOptionError | CudaError} `out-of-memory`: the pool does not fit
 * @see PagedAttention, arXiv 2309.06180
 */
export function createKeyValuePages(
  device: CudaDevice,
  options: KeyValuePagesOptions,
  planner: PagePlanner = PAGE_PLANNER,
): KeyValuePages {
  if (typeof device?.allocate !== 'function') {
    throw new InvalidArgumentError('invalid-option', 'device', 'a CudaDevice', textOf(device));
  }
  const given = takeOptions(options, POOL_OPTIONS);
  const name = given.kernel ?? 'qk-int8-pv-fp16-cuda';
  const descriptor = CUDA_KERNELS.find((kernel) => kernel.name === name);
  // What smooths Q reads all of K as it came.
  const isHeldByTile = descriptor?.qkFormat === 's8' || (descriptor?.pvFormat === 'e2m1' && !descriptor.blockScaled);
  const target = targetFor(device.computeCapability);
  if (descriptor?.family !== 'mma-sync' || !isHeldByTile || target === undefined) {
    const expected =
      "no keys in pages; 'qk-int8-pv-fp16-cuda', 'qk-int8-pv-fp16', 'qk-int8-pv-fp8-cuda' and 'qk-fp4-pv-fp4' do";
    throw new UnsupportedOptionError(String(name), 'options.kernel', expected, `'${String(name)}'`);
  }
  const kvHeads = requireCount('kvHeads', given.kvHeads, 2 ** 16);
  const headDim = requireCount('headDim', given.headDim, MOST_VALUE_DIM);
  const valueDim = requireCount('valueDim', given.valueDim ?? headDim, MOST_VALUE_DIM);
  const pageTokens = requirePageSize(given.pageSize ?? DEFAULT_PAGE_SIZE);
  const poolPages = requireCount('pages', given.pages, 2 ** 30);
  const held = { device, kvHeads, headDim, valueDim, dtype: given.dtype };
  const problem = problemOf(held, 0, 0);
  const { smoothK } = given;
  const chosen = descriptorOf(name);
  const choice = chooseOptions(chosen, problem, {
    ...(smoothK === undefined ? {} : { smoothK }),
    // FP16 sums leave V few codes; scales of its own take a tile's sums to FP32 anyway.
    ...(chosen.pvFormat === 'e4m3' ? { pvAccumDtype: 'fp32+fp32' as const } : {}),
  });
  const facts = { target, multiprocessors: device.multiprocessors };
  const pages = { pageTokens, poolPages, pagesPerSequence: 1 };
  return new KeyValuePages(held, { choice, device: facts, pages }, planner);
}

/** An output and its logsumexp, as `sageattn` gives them. */
export type PagedResult = Required<AttentionOutputs<CudaTensor>>;

/** What all sequences of a pool have in common. */
interface Held {
  readonly device: CudaDevice;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly dtype: DType;
}

/** A problem of one row for each sequence, which says no more of Q than that. */
function problemOf({ device, kvHeads, headDim, valueDim, dtype }: Held, batch: number, keys: number) {
  const spec = (tokens: number, dim: number) => {
    const shape = [batch, kvHeads, tokens, dim];
    const strides = contiguousStrides(shape);
    return { location: 'cuda', device: device.ordinal, dtype, shape, strides, offset: 0 } as const;
  };
  return createProblem(spec(1, headDim), spec(keys, headDim), spec(keys, valueDim), {});
}

/** Keys and values of many sequences in pages; see {@link createKeyValuePages}. */
export class KeyValuePages {
  /** Tokens of a page. */
  readonly pageSize: number;
  /** Pages that tables may name: numbers below this. */
  readonly pages: number;
  /** Of the pool in device memory. */
  readonly byteLength: number;
  readonly #held: Held;
  readonly #facts: PoolFacts;
  readonly #planner: PagePlanner;
  readonly #memory: DeviceMemory;
  readonly #buffers: readonly HeldBuffer[];
  readonly #appends = new Map<string, BoundLaunches>();
  readonly #runners = new Map<string, Runner>();
  #hasMean: boolean;

  /** @internal */
  constructor(held: Held, facts: PoolFacts, planner: PagePlanner) {
    const { device } = held;
    this.#held = held;
    this.#facts = facts;
    this.#planner = planner;
    this.pageSize = facts.pages.pageTokens;
    this.pages = facts.pages.poolPages;
    this.#hasMean = !facts.choice.smoothK;
    const problem = problemOf(held, 1, 0);
    const { offsets, byteLength } = packBuffers(planner.poolBytes(problem, facts));
    this.byteLength = byteLength;
    this.#memory = device.allocate(byteLength, device.stream);
    this.#buffers = [...offsets].map(([buffer, byteOffset]) => ({ buffer, memory: this.#memory, byteOffset }));
    try {
      device.inContext(() => this.#clear(problem));
    } catch (error) {
      this.#memory.dispose();
      throw error;
    }
  }

  /** Zeros, for kernels load whole tiles and 0 * NaN is not 0; and behind the last page one that is not finite. */
  #clear(problem: AttentionProblem): void {
    const { device } = this.#held;
    const { handle } = device.stream;
    device.call('cuMemsetD8Async', 'clearing pages', this.#memory.pointer, 0, this.byteLength, handle);
    const plan = this.#planner.planLastPage(problem, this.#facts);
    const given = packBuffers(plan.given);
    const memory = device.allocate(given.byteLength, device.stream);
    const bound = new BoundLaunches(device, plan);
    try {
      device.call('cuMemsetD8Async', 'making NaN', memory.pointer, 0xff, given.byteLength, handle);
      const operands = [...given.offsets].map(([buffer, byteOffset]) => ({ buffer, memory, byteOffset }));
      bound.run(device.stream, addressesOf([...this.#buffers, ...operands]));
    } finally {
      bound.dispose();
      memory.dispose();
    }
  }

  /**
   * Writes tokens behind those that each sequence holds, into the pages that the table says. Enqueued when it returns.
   *
   * Nothing is written where a page is not in the pool or a length is more than the table's row has room for: a later {@link attend} by such
   * a table gives NaN. Where a length is less than the tokens given, the first of these are left out: prompts of unequal lengths are padded
   * on the left.
   *
   * @param k `[B,Hkv,L,D]`, a CUDA tensor of the pool's device
   * @param v `[B,Hkv,L,Dv]`
   * @throws {InvalidArgumentError} tensors or a table that do not fit the pool
   */
  append(k: CudaTensor, v: CudaTensor, table: PageTable, options: RunContext = {}): void {
    const { device, kvHeads, headDim, valueDim, dtype } = this.#held;
    const context = contextOf(validateOptions(options, RUN_OPTIONS), 'cuda');
    context.signal?.throwIfAborted();
    for (const [argument, view, dim] of [
      ['k', k, headDim],
      ['v', v, valueDim],
    ] as const) {
      const { dtype: given, shape } = view ?? {};
      if (given !== dtype || shape?.length !== 4 || shape[1] !== kvHeads || shape[3] !== dim) {
        const expected = `${dtype} [B,${kvHeads},L,${dim}]`;
        throw new InvalidArgumentError('invalid-shape', argument, expected, `${textOf(given)} ${textOf(shape)}`);
      }
      requireTensorOn(device, argument, view);
    }
    const problem = this.#problem(k, v);
    const given = streamOfAppend(device, context.stream);
    const { batch, keyLength } = problem;
    const held = this.#table(table, batch);
    if (batch * keyLength * kvHeads === 0) {
      held.dispose();
      return;
    }
    // The pool lives on the device's own stream; a caller's stream may be destroyed before it.
    const { stream } = device;
    try {
      device.inContext(() => {
        if (!given.owned) given.mark();
        stream.waitFor(given);
        // An unfinished tile is rewritten where it lies: calls on other streams may still attend to it.
        this.#memory.awaitUsers();
        for (const { memory } of [this.#buffers[0] as HeldBuffer, ...held.buffers]) memory.useOn(stream);
        for (const { memory } of [k, v]) memory.useOn(stream);
        const operands = [
          ...addressesOf([...this.#buffers, ...held.buffers]),
          ['k', addressOf(k, problem.k.offset)] as const,
          ['v', addressOf(v, problem.v.offset)] as const,
        ];
        if (!this.#hasMean) {
          const mean = new BoundLaunches(device, this.#planner.planPoolMean(problem, this.#facts));
          mean.run(stream, operands);
          mean.dispose();
          this.#hasMean = true;
        }
        this.#boundAppend(problem, held.pagesPerSequence).run(stream, operands);
        given.waitFor(stream);
      });
    } finally {
      held.dispose();
    }
  }

  /** A problem of the tokens of an append. */
  #problem(k: CudaTensor, v: CudaTensor): AttentionProblem {
    // One row for each sequence and head: K's first tokens, of which nothing is read.
    const [batch, heads, , dim] = k.shape as [number, number, number, number];
    const shape = [batch, heads, 1, dim];
    const q = { ...k, shape, strides: contiguousStrides(shape), offset: 0 };
    return createProblem(q, k, v, {});
  }

  /**
   * Attention of `q` over the tokens that each sequence holds. With queries that are the sequences' last tokens pass
   * `causalAlignment: 'bottom-right'`.
   *
   * @param q `[B,Hq,Lq,D]`, a CUDA tensor of the pool's device
   * @returns as `sageattn`; rows of a sequence whose pages or length are out of range are NaN, those of one without tokens 0
   * @throws {InvalidArgumentError} a tensor or a table that does not fit the pool
   */
  attend(
    q: CudaTensor,
    table: PageTable,
    options: PagedAttendOptions & { readonly returnLse: true },
  ): Promise<PagedResult>;
  attend(
    q: CudaTensor,
    table: PageTable,
    options?: PagedAttendOptions & { readonly returnLse?: false },
  ): Promise<CudaTensor>;
  attend(q: CudaTensor, table: PageTable, options?: PagedAttendOptions): Promise<CudaTensor | PagedResult>;
  async attend(q: CudaTensor, table: PageTable, options: PagedAttendOptions = {}): Promise<CudaTensor | PagedResult> {
    const { device, kvHeads, headDim, valueDim } = this.#held;
    const checked: AttentionOptions = validateOptions(options as AttentionOptions, ATTEND_OPTIONS);
    requireTensorOn(device, 'q', q);
    const batch = q.shape[0] ?? 0;
    const held = this.#table(table, batch, streamOf(device, checked.stream));
    try {
      const room = held.pagesPerSequence * this.pageSize;
      const spec = (dim: number) => {
        const shape = [batch, kvHeads, room, dim];
        return { ...q, dtype: this.#held.dtype, shape, strides: contiguousStrides(shape), offset: 0 };
      };
      const problem = createProblem(q, spec(headDim), spec(valueDim), checked);
      const operands = [
        { buffer: 'q', argument: 'q', view: q, offset: problem.q.offset },
        ...sideOperands(problem, sideOf(checked)),
      ];
      const runner = this.#runnerOf(problem, held.pagesPerSequence);
      const { output, lse } = runner.enqueue(operands, checked.stream, [...this.#buffers, ...held.buffers]);
      return lse === undefined ? (output as CudaTensor) : ({ output, lse } as PagedResult);
    } finally {
      held.dispose();
    }
  }

  /** The table on the device. What is here is checked, and sent in the order of the device's own stream. */
  #table(table: PageTable, batch: number, stream: CudaStream = this.#held.device.stream): HeldTable {
    if (this.#memory.disposed) throw new ExecutionError('disposed', 'this KeyValuePages has been disposed');
    const { device } = this.#held;
    const { pages, lengths } = takeOptions(table, ['pages', 'lengths'], 'table');
    const sizeOf = (argument: string, given: unknown): number => {
      if (given instanceof Int32Array) return given.length;
      if (given instanceof DeviceMemory && given.device === device) return given.byteLength / 4;
      throw new InvalidArgumentError(
        'invalid-option',
        argument,
        `an Int32Array or DeviceMemory of ${device}`,
        textOf(given),
      );
    };
    const [entries, sequences] = [sizeOf('table.pages', pages), sizeOf('table.lengths', lengths)];
    if (sequences !== batch) {
      throw new InvalidArgumentError(
        'invalid-shape',
        'table.lengths',
        `${batch} numbers, as the batch`,
        String(sequences),
      );
    }
    const pagesPerSequence = batch === 0 ? 1 : entries / batch;
    if (!Number.isInteger(pagesPerSequence) || pagesPerSequence < 1 || pagesPerSequence * this.pageSize >= 2 ** 30) {
      const expected = `a row for each of ${batch} sequences, of fewer than 2^30 tokens`;
      throw new InvalidArgumentError('invalid-shape', 'table.pages', expected, `${entries} numbers`);
    }
    if (lengths instanceof Int32Array) this.#checkLengths(lengths, pagesPerSequence);
    if (pages instanceof Int32Array) this.#checkPages(pages, lengths, pagesPerSequence);
    const sent: DeviceMemory[] = [];
    const buffers = Object.entries({ pages, lengths }).map(([buffer, given]): HeldBuffer => {
      if (!(given instanceof Int32Array)) return { buffer, memory: given, byteOffset: 0 };
      if (stream.capture !== undefined) {
        throw new InvalidArgumentError(
          'mixed-locations',
          `table.${buffer}`,
          'DeviceMemory under capture',
          'an Int32Array',
        );
      }
      const bytes = new Uint8Array(given.slice().buffer);
      const memory = device.allocate(bytes.byteLength, device.stream);
      sent.push(memory);
      copyToDevice(device, memory, bytes, device.stream);
      device.stream.hold(bytes);
      return { buffer, memory, byteOffset: 0 };
    });
    const dispose = () => {
      for (const memory of sent) memory.dispose();
    };
    return { pagesPerSequence, buffers, dispose };
  }

  #checkLengths(lengths: Int32Array, pagesPerSequence: number): void {
    const room = pagesPerSequence * this.pageSize;
    const bad = lengths.findIndex((length) => length < 0 || length > room);
    if (bad < 0) return;
    const expected = `0 to ${room} tokens, which its pages hold`;
    throw new InvalidArgumentError('invalid-option', `table.lengths[${bad}]`, expected, String(lengths[bad]));
  }

  #checkPages(pages: Int32Array, lengths: DeviceMemory | Int32Array, pagesPerSequence: number): void {
    if (!(lengths instanceof Int32Array)) return;
    for (const [sequence, length] of lengths.entries()) {
      for (let place = 0; place * this.pageSize < length; place++) {
        const at = sequence * pagesPerSequence + place;
        const page = pages[at] as number;
        if (page >= 0 && page < this.pages) continue;
        const expected = `a page of the pool, 0 to ${this.pages - 1}, for tokens of sequence ${sequence}`;
        throw new InvalidArgumentError('invalid-option', `table.pages[${at}]`, expected, String(page));
      }
    }
  }

  #factsOf(pagesPerSequence: number): PoolFacts {
    return { ...this.#facts, pages: { ...this.#facts.pages, pagesPerSequence } };
  }

  #boundAppend(problem: AttentionProblem, pagesPerSequence: number): BoundLaunches {
    const plan = () => this.#planner.planAppendPages(problem, this.#factsOf(pagesPerSequence));
    const make = () => new BoundLaunches(this.#held.device, plan());
    return remembered(this.#appends, problem, pagesPerSequence, make);
  }

  #runnerOf(problem: AttentionProblem, pagesPerSequence: number): Runner {
    const plan = (): LaunchSequence => this.#planner.planAttendPages(problem, this.#factsOf(pagesPerSequence));
    const { location } = problem;
    return remembered(
      this.#runners,
      problem,
      pagesPerSequence,
      () => new Runner(this.#held.device, { location, outputs: attentionOutputs(problem) }, plan),
    );
  }

  /** Frees the pool, in the order of streams. */
  dispose(): void {
    for (const kept of [...this.#appends.values(), ...this.#runners.values()]) kept.dispose();
    this.#appends.clear();
    this.#runners.clear();
    this.#memory.dispose();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

interface HeldTable {
  readonly pagesPerSequence: number;
  readonly buffers: readonly HeldBuffer[];
  readonly dispose: () => void;
}

const addressesOf = (buffers: readonly HeldBuffer[]) =>
  buffers.map(({ buffer, memory, byteOffset }) => [buffer, memory.pointer + BigInt(byteOffset)] as const);

/** One of a few things kept by what they were planned for. */
function remembered<T extends { dispose(): void }>(
  kept: Map<string, T>,
  problem: AttentionProblem,
  pagesPerSequence: number,
  make: () => T,
): T {
  const key = `${pagesPerSequence} ${planKeyOf(problem)}`;
  let found = kept.get(key);
  if (found === undefined) {
    found = make();
    kept.set(key, found);
    if (kept.size > KEPT_PLANS) {
      const [oldest, old] = kept.entries().next().value as [string, T];
      kept.delete(oldest);
      old.dispose();
    }
  }
  return found;
}
