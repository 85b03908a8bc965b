/** A rank on a GPU; several ranks may share one. */
import type { CudaBackend } from '../backends/cuda/backend.ts';
import { copyHeads, copyPeer, type Heads } from '../backends/cuda/driver/copy.ts';
import type { CudaDevice } from '../backends/cuda/driver/device.ts';
import type { CudaEvent, CudaStream } from '../backends/cuda/driver/stream.ts';
import type { CudaKeyValue } from '../backends/cuda/key-value.ts';
import { type CudaTensor, downloadAsync, emptyCudaTensor, isCudaTensor, startUpload } from '../backends/cuda/tensor.ts';
import { BYTES_PER_ELEMENT, type DType } from '../tensor/dtype.ts';
import { isContiguous, type Tensor, type TensorView } from '../tensor/tensor.ts';
import type { Parcel, Partial, Place, Sent } from './place.ts';

export class CudaPlace implements Place {
  readonly backend: CudaBackend;
  readonly device: CudaDevice;
  /** Copies from other devices run beside the kernels. */
  #copies: CudaStream | undefined;
  readonly #events: CudaEvent[] = [];

  constructor(backend: CudaBackend, device: CudaDevice) {
    this.backend = backend;
    this.device = device;
  }

  get #copyStream(): CudaStream {
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
    copyTensor(this.device, from as CudaTensor, to as CudaTensor, this.device.stream);
  }

  merge(parts: readonly Partial[], output: TensorView, lse: TensorView | undefined): void {
    const merged = parts.map((part) => ({
      start: part.queries.start,
      output: part.output as CudaTensor,
      lse: part.lse as CudaTensor,
    }));
    this.backend.merge(this.device, merged, output as CudaTensor, lse as CudaTensor | undefined);
  }

  mark(): CudaEvent {
    return this.#event(this.device.stream);
  }

  #event(stream: CudaStream): CudaEvent {
    const event = this.device.createEvent();
    this.#events.push(event);
    return event.record(stream);
  }

  waitFor(ready: unknown): void {
    (ready as CudaEvent).holdBack(this.device.stream);
  }

  bring(sent: Sent<TensorView>, from: Place): Sent<TensorView> {
    const source = sent.value as CudaTensor;
    const { device } = from as CudaPlace;
    if (device === this.device) return sent;
    const stream = this.#copyStream;
    const target = emptyCudaTensor(this.device, source.shape, source.dtype);
    target.memory.useOn(stream);
    (sent.ready as CudaEvent).holdBack(stream);
    const bytes = BYTES_PER_ELEMENT[source.dtype];
    const [batch, heads, tokens, dim] = source.shape as [number, number, number, number];
    if (isContiguous(source)) {
      const pointer = source.memory.pointer + BigInt(source.offset * bytes);
      copyPeer({ device, pointer }, target.memory, batch * heads * tokens * dim * bytes, stream);
    } else {
      const packed = emptyCudaTensor(device, source.shape, source.dtype);
      copyTensor(device, source, packed, device.stream);
      (from as CudaPlace).mark().holdBack(stream);
      copyPeer(packed.memory, target.memory, packed.memory.byteLength, stream);
      // Freed in the order of its own stream, behind this copy.
      device.stream.waitFor(stream);
      packed.dispose();
    }
    return { value: target, ready: this.#event(stream) };
  }

  bringParcel(sent: Sent<Parcel>, from: Place): Sent<Parcel> {
    const { prepared, k, v } = sent.value;
    if ((from as CudaPlace).device === this.device) return sent;
    const stream = this.#copyStream;
    (sent.ready as CudaEvent).holdBack(stream);
    const here = (prepared as CudaKeyValue).copyTo(this.device, stream);
    const device = this.device.ordinal;
    return {
      value: { prepared: here, k: { ...k, device }, v: { ...v, device } },
      ready: this.#event(stream),
    };
  }

  free(view: TensorView): void {
    if (isCudaTensor(view)) view.dispose();
  }

  settle(others: readonly Place[]): void {
    for (const other of others as readonly CudaPlace[]) {
      if (other.#copies !== undefined) this.device.stream.waitFor(other.#copies);
    }
    for (const event of this.#events.splice(0)) event.dispose();
  }

  dispose(): void {
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
