/** Keys and values that stay on a device, quantized once and appended to. */
import { NO_LIMIT } from '../../attention/band.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import { type OperandLayout, type Tensor, type TensorView, transpose } from '../../tensor/tensor.ts';
import type {
  AttentionOutputs,
  KernelChoice,
  KeyValueContext,
  PreparedKeyValue,
  RunContext,
  SideInputs,
} from '../backend.ts';
import { copyHeads, copyRows } from './driver/copy.ts';
import type { CudaDevice } from './driver/device.ts';
import type { DeviceMemory } from './driver/memory.ts';
import type { CudaStream } from './driver/stream.ts';
import { SEQUENCE_INTS } from './kernels/parts/sequences.ts';
import type { DeviceFacts, KeyRoom, KeyValuePart } from './launches/context.ts';
import type { KernelLaunch } from './launches/launch.ts';
import type { LaunchPlanner } from './launches/plan.ts';
import { BoundLaunches, packBuffers } from './run/bound-launches.ts';
import {
  type HeldBuffer,
  type Operand,
  planKeyOf,
  requireTensorOn,
  sideOperands,
  streamOf,
  streamOfAppend,
} from './run/operands.ts';
import { Runner } from './run/runner.ts';
import { Uploads } from './run/uploads.ts';
import { type CudaTensor, copyToDevice } from './tensor.ts';

/** Tokens that room is made for at first, and the unit in which it grows. */
const CAPACITY_STEP = 256;
/** Plans for the lengths last attended to. A decoder asks for each length once in each layer, all layers in turn. */
const CACHED_RUNNERS = 4;

/** K or V as they came, `[B,H,capacity,dim]`. */
class GrowingRows {
  readonly #device: CudaDevice;
  readonly #heads: number;
  readonly #rowBytes: number;
  readonly dim: number;
  capacity = 0;
  memory: DeviceMemory | undefined;

  constructor(device: CudaDevice, batchTimesHeads: number, dim: number, elementBytes: number) {
    this.#device = device;
    this.#heads = batchTimesHeads;
    this.dim = dim;
    this.#rowBytes = dim * elementBytes;
  }

  /** Where a head's token lies. */
  #at(memory: DeviceMemory, capacity: number, head: number, token: number): bigint {
    return memory.pointer + BigInt((head * capacity + token) * this.#rowBytes);
  }

  /** Makes room for `tokens`, of which `held` are there. */
  reserve(tokens: number, held: number, stream: CudaStream): void {
    if (tokens <= this.capacity) return;
    const device = this.#device;
    // Doubling: each token is moved once on average.
    const capacity = Math.ceil(Math.max(tokens, 2 * held) / CAPACITY_STEP) * CAPACITY_STEP;
    const grown = device.allocate(this.#heads * capacity * this.#rowBytes, device.stream);
    const old = this.memory;
    try {
      grown.useOn(stream);
      if (old !== undefined) {
        old.useOn(stream);
        const pitch = (rows: number) => rows * this.#rowBytes;
        copyRows(
          device,
          { pointer: old.pointer, pitch: pitch(this.capacity) },
          { pointer: grown.pointer, pitch: pitch(capacity) },
          pitch(held),
          this.#heads,
          stream,
        );
      }
    } catch (error) {
      grown.dispose();
      throw error;
    }
    old?.dispose();
    this.memory = grown;
    this.capacity = capacity;
  }

  /** Copies the tokens of a `[B,H,L,dim]` view behind the first `held`. */
  write(view: CudaTensor, held: number, stream: CudaStream): void {
    const { memory } = this;
    const [batch, heads, tokens] = view.shape as [number, number, number];
    const [batchStride, headStride, tokenStride] = view.strides as [number, number, number];
    if (memory === undefined || tokens === 0) return;
    const elementBytes = BYTES_PER_ELEMENT[view.dtype];
    copyHeads(
      this.#device,
      {
        pointer: view.memory.pointer + BigInt(view.offset * elementBytes),
        batchPitch: batchStride * elementBytes,
        headPitch: headStride * elementBytes,
        tokenPitch: tokenStride * elementBytes,
      },
      {
        pointer: this.#at(memory, this.capacity, 0, held),
        batchPitch: heads * this.capacity * this.#rowBytes,
        headPitch: this.capacity * this.#rowBytes,
        tokenPitch: this.#rowBytes,
      },
      [batch, heads, tokens],
      this.#rowBytes,
      stream,
    );
  }

  /** Sets every byte of `tokens` tokens behind the first `held`. */
  fill(value: number, held: number, tokens: number, stream: CudaStream): void {
    const { memory } = this;
    if (memory === undefined || tokens === 0) return;
    const bytes = tokens * this.#rowBytes;
    for (let head = 0; head < this.#heads; head++) {
      const at = this.#at(memory, this.capacity, head, held);
      this.#device.call('cuMemsetD8Async', `marking ${tokens} tokens`, at, value, bytes, stream.handle);
    }
  }

  layout(heads: number): OperandLayout {
    const headStride = this.capacity * this.dim;
    return { offset: 0, batchStride: heads * headStride, headStride, tokenStride: this.dim };
  }

  dispose(): void {
    this.memory?.dispose();
    this.memory = undefined;
    this.capacity = 0;
  }
}

/** Quantized keys and values, with room for more. */
interface Quantized {
  readonly memory: DeviceMemory;
  readonly buffers: readonly HeldBuffer[];
  /** Tokens that each sequence has room for. */
  readonly capacity: number;
}

/** Tokens whose mean is good enough to stay; with fewer, an append quantizes all anew. */
const SETTLED_MEAN = 512;
/** The buffer that kernels know lengths from: rows of {@link SEQUENCE_INTS}. */
const SEQUENCES = 'sequences';
/** Columns that have a sequence's number of keys: its length, and the end of the keys that any row may see. */
const LENGTH_COLUMNS = [3, 7] as const;

/** A table of sequences on the device, and as it was planned. */
interface SequenceTable {
  readonly memory: DeviceMemory;
  readonly rows: Int32Array;
}

/** Whether a launch reads K or V as they came. */
const readsRaw = ({ arguments: given }: KernelLaunch): boolean =>
  given.some((argument) => {
    const buffer =
      argument.kind === 'pointer' ? argument.buffer : argument.kind === 'tensor-map' ? argument.map.buffer : undefined;
    return buffer === 'k' || buffer === 'v';
  });

/** Keys that are quantized at a time: a multiple of every kernel's tile of keys. */
const TILE = 128;

/**
 * Keys and values of one call, as they came and quantized. An append quantizes the tiles that it touches, with the
 * earlier means: any constant vector serves for smoothing. V in FP8 is quantized anew if its scales are for whole
 * channels, but not if each tile has its own.
 */
export class CudaKeyValue implements PreparedKeyValue {
  readonly #device: CudaDevice;
  readonly #choice: KernelChoice;
  readonly #planner: LaunchPlanner;
  readonly #facts: DeviceFacts;
  /** The first preparation's problem, for everything that does not change with the tokens. */
  readonly #first: AttentionProblem;
  readonly #k: GrowingRows;
  readonly #v: GrowingRows;
  /** A byte for each token, 0: it does not count. Without room as long as all count. */
  readonly #counted: GrowingRows;
  readonly #runners = new Map<string, Runner>();
  /** Tables of sequences that captured calls read, by their problem: the lengths in them are those held. */
  readonly #tables = new Map<string, SequenceTable>();
  #quantized: Quantized | undefined;
  #length = 0;

  constructor(
    device: CudaDevice,
    choice: KernelChoice,
    planner: LaunchPlanner,
    facts: DeviceFacts,
    problem: AttentionProblem,
  ) {
    this.#device = device;
    this.#choice = choice;
    this.#planner = planner;
    this.#facts = facts;
    this.#first = problem;
    const { batch, kvHeads, headDim, valueDim, dtype } = problem;
    this.#k = new GrowingRows(device, batch * kvHeads, headDim, BYTES_PER_ELEMENT[dtype]);
    this.#v = new GrowingRows(device, batch * kvHeads, valueDim, BYTES_PER_ELEMENT[dtype]);
    this.#counted = new GrowingRows(device, batch, 1, BYTES_PER_ELEMENT.bool);
  }

  get length(): number {
    return this.#length;
  }

  async append(k: TensorView, v: TensorView, problem: AttentionProblem, context: KeyValueContext): Promise<void> {
    context.signal?.throwIfAborted();
    const device = this.#device;
    const given = streamOfAppend(device, context.stream);
    // The kept buffers live on the device's own stream; a caller's stream may be destroyed before them.
    const stream = device.stream;
    if (!given.owned) given.mark();
    stream.waitFor(given);
    // The last tile is rewritten where it lies: calls on other streams may still attend to it.
    for (const { memory } of this.#rawBuffers()) memory.awaitUsers();
    this.#quantized?.memory.awaitUsers();
    const { keyLength, tensorLayout } = problem;
    const total = this.#length + keyLength;
    const uploads = new Uploads(device, stream);
    const onDevice = (argument: string, view: TensorView): CudaTensor =>
      view.location === 'cpu' ? uploads.add(argument, view as Tensor) : requireTensorOn(device, argument, view);
    try {
      for (const [rows, argument, view] of [
        [this.#k, 'k', k],
        [this.#v, 'v', v],
      ] as const) {
        const source = onDevice(argument, view);
        source.memory.useOn(stream);
        rows.reserve(total, this.#length, stream);
        rows.write(tensorLayout === 'HND' ? source : transpose(source, [0, 2, 1, 3]), this.#length, stream);
      }
      const { keyMask } = context;
      this.#mark(keyMask && onDevice('options.keyMask', keyMask), keyLength, stream);
      this.#quantize(total, stream);
      uploads.finishReading();
      this.#length = total;
      for (const table of this.#tables.values()) this.#writeTable(table, stream);
      // Plans of other lengths will not be asked for again.
      for (const runner of this.#runners.values()) runner.dispose();
      this.#runners.clear();
      given.waitFor(stream);
      // A fault is reported here, and copies of the caller's tensors are let go.
      if (!uploads.isEmpty) await stream.completed();
    } finally {
      uploads.dispose();
    }
  }

  /**
   * Notes which of the tokens behind those held count.
   *
   * @param keyMask bool `[B,L]`; undefined: all
   */
  #mark(keyMask: CudaTensor | undefined, tokens: number, stream: CudaStream): void {
    const counted = this.#counted;
    const isFirst = counted.memory === undefined;
    if (keyMask === undefined && isFirst) return;
    counted.reserve(this.#length + tokens, this.#length, stream);
    if (isFirst) counted.fill(1, 0, this.#length, stream);
    if (keyMask === undefined) counted.fill(1, this.#length, tokens, stream);
    else {
      keyMask.memory.useOn(stream);
      const { shape, strides } = keyMask;
      const [[batch, length], [batchStride, stride]] = [shape, strides] as [[number, number], [number, number]];
      counted.write(
        { ...keyMask, shape: [batch, 1, length, 1], strides: [batchStride, 0, stride, 1] },
        this.#length,
        stream,
      );
    }
  }

  /** A problem about the tokens held, wherever they were when it was made. */
  #overHeld(problem: AttentionProblem, length: number): AttentionProblem {
    const { kvHeads } = this.#first;
    return { ...problem, keyLength: length, k: this.#k.layout(kvHeads), v: this.#v.layout(kvHeads) };
  }

  #rawBuffers(): HeldBuffer[] {
    const raw: HeldBuffer[] = [];
    if (this.#k.memory !== undefined) raw.push({ buffer: 'k', memory: this.#k.memory, byteOffset: 0 });
    if (this.#v.memory !== undefined) raw.push({ buffer: 'v', memory: this.#v.memory, byteOffset: 0 });
    return raw;
  }

  /** Quantizes what `length` tokens need beyond those that are quantized already. */
  #quantize(length: number, stream: CudaStream): void {
    const problem = this.#overHeld(this.#first, length);
    const { capacity } = this.#k;
    const kept = this.#quantized;
    if (kept !== undefined && kept.capacity === capacity && this.#length >= SETTLED_MEAN) {
      const from = Math.floor(this.#length / TILE) * TILE;
      const holds = (name: string) => kept.buffers.some(({ buffer }) => buffer === name);
      const valueFrom = holds('valueScale') && !holds('valueTileScale') ? 0 : from;
      if (valueFrom === from) this.#run(problem, kept, stream, { capacity, from }, ['key', 'value']);
      else {
        this.#run(problem, kept, stream, { capacity, from }, ['key']);
        // After K, whose tiles also say which values are not finite.
        this.#run(problem, kept, stream, { capacity, from: valueFrom }, ['value']);
      }
      return;
    }
    const device = this.#device;
    const { offsets, byteLength } = packBuffers(
      this.#planner.planKeyValue(problem, this.#choice, this.#facts, { room: { capacity } }).kept,
    );
    const memory = device.allocate(byteLength, device.stream);
    const buffers = [...offsets].map(([buffer, byteOffset]) => ({ buffer, memory, byteOffset }));
    const quantized = { memory, buffers, capacity };
    try {
      // Kernels may load whole tiles: what lies beyond the tokens held must be numbers, for 0 * NaN is not 0.
      if (byteLength > 0) {
        device.call('cuMemsetD8Async', 'clearing quantized keys', memory.pointer, 0, byteLength, stream.handle);
      }
      this.#run(problem, quantized, stream, { capacity });
    } catch (error) {
      memory.dispose();
      throw error;
    }
    kept?.memory.dispose();
    this.#disposeTables();
    this.#quantized = quantized;
  }

  #run(
    problem: AttentionProblem,
    { buffers }: Quantized,
    stream: CudaStream,
    room: KeyRoom,
    parts?: readonly KeyValuePart[],
  ): void {
    const { memory, capacity } = this.#counted;
    const sequence = this.#planner.planKeyValue(problem, this.#choice, this.#facts, {
      room,
      ...(parts && { parts }),
      ...(memory && {
        tokenMask: { kind: 'boolean', dtype: 'bool', offset: room.from ?? 0, strides: [capacity, 0, 0, 1] } as const,
      }),
    });
    if (sequence.launches.length === 0) return;
    const bound = new BoundLaunches(this.#device, sequence);
    const mask = memory === undefined ? [] : [{ buffer: 'mask', memory, byteOffset: 0 }];
    try {
      bound.run(
        stream,
        [...this.#rawBuffers(), ...mask, ...buffers].map(
          ({ buffer, memory, byteOffset }) => [buffer, memory.pointer + BigInt(byteOffset)] as const,
        ),
      );
    } finally {
      bound.dispose();
    }
  }

  async attend(
    q: TensorView,
    problem: AttentionProblem,
    side: SideInputs,
    context: RunContext,
  ): Promise<AttentionOutputs> {
    const isCaptured = streamOf(this.#device, context.stream).capture !== undefined;
    const table = isCaptured ? this.#tableOf(problem) : undefined;
    const held = this.#overHeld(problem, table === undefined ? this.#length : this.#k.capacity);
    const operands: Operand[] = [
      { buffer: 'q', argument: 'q', view: q, offset: problem.q.offset },
      ...sideOperands(problem, side),
    ];
    const buffers: HeldBuffer[] = [...this.#rawBuffers(), ...(this.#quantized?.buffers ?? [])];
    if (table !== undefined) buffers.push({ buffer: SEQUENCES, memory: table.memory, byteOffset: 0 });
    return (await this.#runnerOf(held).run(operands, context, buffers)) as AttentionOutputs;
  }

  /**
   * The table of sequences that a captured call reads, so that each launch attends to the keys held by then; undefined where its kernels
   * know the number of keys from elsewhere.
   */
  #tableOf(problem: AttentionProblem): SequenceTable | undefined {
    const { queryLength, band, mask, blocks } = problem;
    if (this.#length === 0 || mask !== undefined || blocks !== undefined) return undefined;
    // Heads as rows of one token have the band of that token, which is settled with the plan.
    if (queryLength === 1 && band.align === 1 && (band.lower > -NO_LIMIT || band.upper < 0)) return undefined;
    const { capacity } = this.#k;
    const asked = this.#overHeld(problem, capacity);
    const key = planKeyOf(asked);
    const known = this.#tables.get(key);
    if (known !== undefined) return known;
    const { constants, launches } = this.#planner.planAttend(asked, this.#choice, this.#facts, { room: { capacity } });
    const planned = constants[SEQUENCES];
    if (planned === undefined || launches.some(readsRaw)) return undefined;
    const device = this.#device;
    const memory = device.allocate(planned.byteLength, device.stream);
    const table = { memory, rows: new Int32Array(planned.slice().buffer) };
    try {
      this.#writeTable(table, device.stream);
    } catch (error) {
      memory.dispose();
      throw error;
    }
    this.#tables.set(key, table);
    return table;
  }

  #writeTable({ memory, rows }: SequenceTable, stream: CudaStream): void {
    const { capacity } = this.#k;
    const written = rows.slice();
    for (let sequence = 0; sequence < rows.length; sequence += SEQUENCE_INTS) {
      for (const column of LENGTH_COLUMNS) {
        if (rows[sequence + column] === capacity) written[sequence + column] = this.#length;
      }
    }
    copyToDevice(this.#device, memory, new Uint8Array(written.buffer), stream);
    stream.hold(written);
  }

  #disposeTables(): void {
    for (const { memory } of this.#tables.values()) memory.dispose();
    this.#tables.clear();
  }

  #runnerOf(problem: AttentionProblem): Runner {
    const key = planKeyOf(problem);
    let runner = this.#runners.get(key);
    if (runner === undefined) {
      const { capacity } = this.#k;
      const plan = () => this.#planner.planAttend(problem, this.#choice, this.#facts, { room: { capacity } });
      runner = new Runner(this.#device, { location: problem.location, outputs: attentionOutputs(problem) }, plan);
      this.#runners.set(key, runner);
      if (this.#runners.size > CACHED_RUNNERS) {
        const [oldest, old] = this.#runners.entries().next().value as [string, Runner];
        this.#runners.delete(oldest);
        old.dispose();
      }
    }
    return runner;
  }

  dispose(): void {
    for (const runner of this.#runners.values()) runner.dispose();
    this.#runners.clear();
    this.#disposeTables();
    this.#quantized?.memory.dispose();
    this.#quantized = undefined;
    this.#k.dispose();
    this.#v.dispose();
    this.#counted.dispose();
  }
}
