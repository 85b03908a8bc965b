/** CPU tensors on their way to a device. */
import { type Tensor, type TensorView, validateData } from '../../../tensor/tensor.ts';
import type { CudaDevice } from '../driver/device.ts';
import type { CudaStream } from '../driver/stream.ts';
import { type CudaTensor, startUpload } from '../tensor.ts';

/**
 * Tensors up to this size are copied before they are sent, so that the caller waits for nothing that the stream holds.
 * The copy of a larger one would take as long as sending it.
 */
const COPIED_BYTES = 2 ** 22;

/** Uploads of one call, whose inputs the caller may overwrite or give away once the call has returned its promise. */
export class Uploads {
  readonly #device: CudaDevice;
  readonly #stream: CudaStream;
  readonly #sent = new Map<TensorView, CudaTensor>();
  /** Each waits until a large tensor has been read. */
  readonly #reads: (() => void)[] = [];

  constructor(device: CudaDevice, stream: CudaStream) {
    this.#device = device;
    this.#stream = stream;
  }

  /**
   * Enqueues an upload. One array of keys and values, as in self-attention over shared storage, is sent once.
   *
   * @throws {InvalidArgumentError} when the array no longer holds the view, as after it was transferred to a worker
   */
  add(argument: string, source: Tensor): CudaTensor {
    const before = this.#sent.get(source);
    if (before !== undefined) return before;
    validateData(argument, source);
    const copied = source.data.byteLength <= COPIED_BYTES;
    const tensor = startUpload(source, this.#device, this.#stream, copied);
    this.#sent.set(source, tensor);
    if (!copied) this.#reads.push(this.#stream.checkpoint());
    return tensor;
  }

  get isEmpty(): boolean {
    return this.#sent.size === 0;
  }

  /** Returns once every source has been read. */
  finishReading(): void {
    for (const wait of this.#reads.splice(0)) wait();
  }

  /** Frees the uploaded tensors, in the stream's order. */
  dispose(): void {
    // After a failed call copies may still be under way, and their sources are about to be the caller's again.
    this.#device.release(() => this.finishReading());
    for (const { memory } of this.#sent.values()) memory.dispose();
    this.#sent.clear();
  }
}
