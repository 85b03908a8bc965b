/** Memory by which ranks of other processes get what one sends: the sender lays it out there, and the receivers map it. */
import type { CudaDevice } from '../../backends/cuda/driver/device.ts';
import { ExportedMemory, ImportedMemory } from '../../backends/cuda/driver/shared-memory.ts';

const LEAST_WINDOW = 2 ** 20;

/** What a rank lays out for others. */
export class Outbox {
  readonly #device: CudaDevice;
  /** The last one is in use. Others may still map the ones before: they are freed with it, and together are no larger. */
  readonly #windows: ExportedMemory[];

  constructor(device: CudaDevice) {
    this.#device = device;
    this.#windows = [new ExportedMemory(device, LEAST_WINDOW)];
  }

  /** The present window. */
  get window(): ExportedMemory {
    return this.#windows.at(-1) as ExportedMemory;
  }

  /** A window of at least so many bytes. What was laid out before is lost. */
  reserve(byteLength: number): ExportedMemory {
    const { window } = this;
    if (window.byteLength >= byteLength) return window;
    this.#windows.push(new ExportedMemory(this.#device, Math.max(byteLength, 2 * window.byteLength)));
    return this.window;
  }

  /** Nobody maps it any more. */
  dispose(): void {
    for (const window of this.#windows.splice(0)) window.dispose();
  }
}

/** What others laid out. */
export class Inbox {
  readonly #device: CudaDevice;
  readonly #open = new Map<string, ImportedMemory>();

  constructor(device: CudaDevice) {
    this.#device = device;
  }

  /** Where a window lies for this process. */
  addressOf(handle: string): bigint {
    let memory = this.#open.get(handle);
    if (memory === undefined) {
      memory = new ImportedMemory(this.#device, Buffer.from(handle, 'base64'));
      this.#open.set(handle, memory);
    }
    return memory.pointer;
  }

  dispose(): void {
    for (const memory of this.#open.values()) memory.dispose();
    this.#open.clear();
  }
}
