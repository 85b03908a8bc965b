/** A rank on a GPU; several ranks may share one. */
import type { AttentionProblem } from '../attention/problem.ts';
import type { KernelChoice } from '../backends/backend.ts';
import type { CudaBackend } from '../backends/cuda/backend.ts';
import { copyHeads, copyPeer, type Heads } from '../backends/cuda/driver/copy.ts';
import type { CudaDevice } from '../backends/cuda/driver/device.ts';
import type { CudaStream } from '../backends/cuda/driver/stream.ts';
import { type FixedKeyValue, SharedRoom } from '../backends/cuda/fixed-key-value.ts';
import type { MergedPart, SummedPart } from '../backends/cuda/merge.ts';
import { type CudaTensor, downloadAsync, emptyCudaTensor, isCudaTensor, startUpload } from '../backends/cuda/tensor.ts';
import { BYTES_PER_ELEMENT, type DType } from '../tensor/dtype.ts';
import { byteLengthOf, type Tensor, type TensorView } from '../tensor/tensor.ts';
import type { Carried, KeyValueSlot, Mark, Merge, Partial, ReachingPlace } from './place.ts';

export class CudaKeyValueSlot implements KeyValueSlot {
  readonly held: FixedKeyValue;

  constructor(held: FixedKeyValue) {
    this.held = held;
  }

  open(): void {
    this.held.open();
  }

  async fill(k: TensorView, v: TensorView): Promise<void> {
    this.held.fill(k as CudaTensor, v as CudaTensor);
  }

  attend(...given: Parameters<KeyValueSlot['attend']>): ReturnType<KeyValueSlot['attend']> {
    return this.held.attend(...given);
  }

  // The next call quantizes into the same memory.
  release(): void {}

  dispose(): void {
    this.held.dispose();
  }
}

/** Where the bytes of what travels lie: a slot's memory, or a contiguous tensor. */
export function bytesOf(carried: Carried): { readonly pointer: bigint; readonly byteLength: number } {
  if (carried instanceof CudaKeyValueSlot)
    return { pointer: carried.held.open().pointer, byteLength: carried.held.byteLength };
  const view = carried as CudaTensor;
  const pointer = view.memory.pointer + BigInt(view.offset * BYTES_PER_ELEMENT[view.dtype]);
  return { pointer, byteLength: byteLengthOf(view) };
}

export class CudaPlace implements ReachingPlace {
  readonly backend: CudaBackend;
  readonly device: CudaDevice;
  /** Copies from other ranks run beside the kernels. */
  #copies: CudaStream | undefined;
  /** Events of the marks of a call, which the next call uses again. */
  readonly #events: bigint[] = [];
  #marks = 0;
  readonly #rooms = new Map<number, SharedRoom>();

  constructor(backend: CudaBackend, device: CudaDevice) {
    this.backend = backend;
    this.device = device;
  }

  /** The stream of what goes to and comes from other ranks. */
  get copyStream(): CudaStream {
    this.#copies ??= this.device.createStream();
    return this.#copies;
  }

  holds(view: TensorView): boolean {
    return isCudaTensor(view) && view.memory.device === this.device;
  }

  empty(shape: readonly number[], dtype: DType): TensorView {
    return emptyCudaTensor(this.device, shape, dtype);
  }

  upload(view: TensorView): TensorView {
    return startUpload(view as Tensor, this.device, this.device.stream);
  }

  download(view: TensorView): Promise<TensorView> {
    return downloadAsync(view as CudaTensor);
  }

  copy(from: TensorView, to: TensorView): void {
    const { device } = this;
    device.inContext(() => copyTensor(device, from as CudaTensor, to as CudaTensor, device.stream));
  }

  keyValue(problem: AttentionProblem, kernel: KernelChoice, room: number): KeyValueSlot {
    const shared = this.#rooms.get(room) ?? new SharedRoom(this.device);
    this.#rooms.set(room, shared);
    return new CudaKeyValueSlot(this.backend.fixedKeyValue(this.device, problem, kernel, shared));
  }

  merge(): Merge {
    const merge = this.backend.partsMerge(this.device);
    const partOf = ({ queries, output, lse }: Partial): MergedPart => ({
      start: queries.start,
      output: output as CudaTensor,
      lse: lse as CudaTensor,
    });
    return {
      run: (parts, output, lse) => merge.run(parts.map(partOf), output as CudaTensor, lse as CudaTensor | undefined),
      dispose: () => merge.dispose(),
    };
  }

  sum(parts: readonly { readonly start: number; readonly values: TensorView }[], output: TensorView): void {
    this.backend.sum(this.device, parts as readonly SummedPart[], output as CudaTensor);
  }

  #mark(stream: CudaStream): bigint {
    const event = this.#events[this.#marks] ?? this.device.eventPool.take();
    this.#events[this.#marks++] = event;
    this.device.call('cuEventRecord', 'marking what a rank has enqueued', event, stream.handle);
    return event;
  }

  #hold(stream: CudaStream, mark: Mark): void {
    this.device.call('cuStreamWaitEvent', 'waiting for another rank', stream.handle, mark as bigint, 0);
  }

  mark(): Mark {
    return this.#mark(this.device.stream);
  }

  waitFor(mark: Mark): void {
    this.#hold(this.device.stream, mark);
  }

  holdCopies(mark: Mark): void {
    this.#hold(this.copyStream, mark);
  }

  markCopies(): Mark {
    return this.#mark(this.copyStream);
  }

  bring(value: Carried, from: ReachingPlace, into: Carried): void {
    const [source, target] = [bytesOf(value), bytesOf(into)];
    const { device } = from as CudaPlace;
    copyPeer(
      { device, pointer: source.pointer },
      { device: this.device, pointer: target.pointer },
      target.byteLength,
      this.copyStream,
    );
  }

  free(view: TensorView): void {
    if (isCudaTensor(view)) view.dispose();
  }

  settle(others: readonly ReachingPlace[]): void {
    for (const other of others as readonly CudaPlace[]) {
      if (other.#copies !== undefined) this.device.stream.waitFor(other.#copies);
    }
  }

  endCall(): void {
    this.#marks = 0;
  }

  dispose(): void {
    for (const room of this.#rooms.values()) room.dispose();
    this.#rooms.clear();
    for (const event of this.#events.splice(0)) this.device.eventPool.giveBack(event);
    this.#copies?.dispose();
    this.#copies = undefined;
  }
}

/** Enqueues a copy between `[B,H,L,D]` views of one shape whose channels are neighbours. */
function copyTensor(device: CudaDevice, from: CudaTensor, to: CudaTensor, stream: CudaStream): void {
  const bytes = BYTES_PER_ELEMENT[from.dtype];
  const [batch, heads, tokens, dim] = from.shape as [number, number, number, number];
  for (const { memory } of [from, to]) memory.useOn(stream);
  const [source, target] = [from, to].map(({ memory, offset, strides }) => {
    const [batchPitch, headPitch, tokenPitch] = strides.map((stride) => stride * bytes) as [number, number, number];
    return { pointer: memory.pointer + BigInt(offset * bytes), batchPitch, headPitch, tokenPitch };
  }) as [Heads, Heads];
  copyHeads(device, source, target, [batch, heads, tokens], dim * bytes, stream);
}
