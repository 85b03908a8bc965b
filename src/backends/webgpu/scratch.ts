/**
 * The scratch memory of a device: one buffer of each name for all plans. A run writes its scratch before it reads it,
 * in one submission, and submissions of a queue take effect in turn, so that plans of any number of shapes need the
 * memory of one.
 */
import type { BufferName } from './launches/launch.ts';
import { GPU_BUFFER_USAGE } from './tensor.ts';

export type Buffers = Partial<Record<BufferName, GPUBuffer>>;

export type BufferSizes = Partial<Record<BufferName, number>>;

/** Allocates storage buffers; sizes in bytes. Errors go to the device's error scopes. */
export function allocate(device: GPUDevice, sizes: BufferSizes): Buffers {
  return Object.fromEntries(
    Object.entries(sizes).map(([name, size]) => [
      name,
      device.createBuffer({
        label: `sageattention ${name}`,
        size: Math.max(16, Math.ceil(size / 16) * 16),
        usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST | GPU_BUFFER_USAGE.COPY_SRC,
      }),
    ]),
  );
}

/** Sizes are rounded up by at most a quarter, so that a sequence that grows does not allocate at each step. */
const grown = (size: number, most: number): number => {
  const step = 2 ** Math.max(8, Math.floor(Math.log2(Math.max(1, size))) - 2);
  return Math.max(size, Math.min(most, Math.ceil(size / step) * step));
};

export class ScratchPool {
  readonly #device: GPUDevice;
  readonly #mostBytes: number;
  #buffers: Buffers = {};

  /** @param mostBytes the device's largest buffer */
  constructor(device: GPUDevice, mostBytes: number) {
    this.#device = device;
    this.#mostBytes = mostBytes;
  }

  /**
   * Buffers of at least these sizes, for commands that are submitted before the next call: a buffer that is outgrown is
   * destroyed, which what was submitted survives.
   */
  reserve(sizes: BufferSizes): Buffers {
    const buffers: Buffers = {};
    for (const [name, size] of Object.entries(sizes) as [BufferName, number][]) {
      let buffer = this.#buffers[name];
      if (buffer === undefined || buffer.size < size) {
        buffer?.destroy();
        buffer = allocate(this.#device, { [name]: grown(size, this.#mostBytes) })[name] as GPUBuffer;
        this.#buffers[name] = buffer;
      }
      buffers[name] = buffer;
    }
    return buffers;
  }

  /** Gives the memory back; the next run allocates what it needs. */
  clear(): void {
    for (const buffer of Object.values(this.#buffers)) buffer.destroy();
    this.#buffers = {};
  }
}

/** Buffers of outputs that are kept, and how much memory they may hold. */
const KEPT_OUTPUTS = 8;
const KEPT_OUTPUT_BYTES = 2 ** 28;

/**
 * Buffers of outputs that were disposed of, where that is wanted (`reuseOutputs`): later outputs of the same size get them, since a driver takes as long to allocate and free one
 * of tens of megabytes as its kernels take to fill it.
 */
export class OutputPool {
  readonly #device: GPUDevice;
  #kept: GPUBuffer[] = [];
  #keeps = false;

  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** A buffer of zeros; one that was in use is cleared by `encoder`. {@link give} puts it back, once. */
  take(size: number, encoder: GPUCommandEncoder): GPUBuffer {
    const at = this.#kept.findIndex((buffer) => buffer.size === size);
    const [kept] = at < 0 ? [] : this.#kept.splice(at, 1);
    if (kept === undefined) {
      return this.#device.createBuffer({
        label: 'sageattention output',
        size,
        usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_SRC | GPU_BUFFER_USAGE.COPY_DST,
      });
    }
    encoder.clearBuffer(kept);
    return kept;
  }

  give(buffer: GPUBuffer): void {
    if (!this.#keeps) {
      buffer.destroy();
      return;
    }
    this.#kept.push(buffer);
    const bytes = () => this.#kept.reduce((sum, { size }) => sum + size, 0);
    while (this.#kept.length > KEPT_OUTPUTS || bytes() > KEPT_OUTPUT_BYTES) this.#kept.shift()?.destroy();
  }

  /** Gives the memory back. */
  clear(): void {
    for (const buffer of this.#kept) buffer.destroy();
    this.#kept = [];
  }

  /** What is given from now on is kept. */
  open(): void {
    this.#keeps = true;
  }

  /** What is given from now on is destroyed, as at first. */
  close(): void {
    this.clear();
    this.#keeps = false;
  }
}
