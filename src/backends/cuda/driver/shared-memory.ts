/**
 * Device memory that processes of one machine share: one makes it, others map it by a handle of 64 bytes. The driver shares whole
 * allocations of `cuMemAlloc`, and none of a pool.
 */
import { BackendUnavailableError } from '../../../errors.ts';
import { CU_IPC_HANDLE_SIZE, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS } from './api.ts';
import type { DeviceContext } from './context.ts';

/** @throws {BackendUnavailableError} a driver without it */
function requireSharing({ api }: DeviceContext): void {
  if (api.has('cuIpcGetMemHandle') && api.has('cuIpcOpenMemHandle')) return;
  throw new BackendUnavailableError(
    'cuda',
    'this driver shares no memory between processes',
    "createDeviceGroup with transport 'nccl', or with devices in one process",
  );
}

/** Memory of this process that others may map. */
export class ExportedMemory {
  readonly pointer: bigint;
  readonly byteLength: number;
  /** Other processes open this. */
  readonly handle: Uint8Array<ArrayBuffer>;
  readonly #device: DeviceContext;
  #disposed = false;

  constructor(device: DeviceContext, byteLength: number) {
    requireSharing(device);
    this.#device = device;
    this.byteLength = byteLength;
    this.handle = new Uint8Array(CU_IPC_HANDLE_SIZE);
    this.pointer = device.create('cuMemAlloc', `allocating ${byteLength} bytes to share on ${device}`, byteLength);
    try {
      device.call('cuIpcGetMemHandle', `sharing memory of ${device} with other processes`, this.handle, this.pointer);
    } catch (error) {
      device.release(() => device.call('cuMemFree', 'freeing shared memory', this.pointer));
      throw error;
    }
  }

  /** Frees it, after all work of the device. Nobody may still have it open. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#device.release(() => this.#device.call('cuMemFree', 'freeing shared memory', this.pointer));
  }
}

/** Memory of another process, mapped into this one. */
export class ImportedMemory {
  readonly pointer: bigint;
  readonly #device: DeviceContext;
  #disposed = false;

  /** @param device which is to reach it; it may lie on another that this one has access to */
  constructor(device: DeviceContext, handle: Uint8Array) {
    requireSharing(device);
    this.#device = device;
    const what = `mapping memory of another process on ${device}`;
    this.pointer = device.create('cuIpcOpenMemHandle', what, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    const device = this.#device;
    device.release(() => device.call('cuIpcCloseMemHandle', 'closing memory of another process', this.pointer));
  }
}
