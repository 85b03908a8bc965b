/** Host memory as the fake driver sees it: addresses of buffers, page locks, texts. */
import type { DriverFunctions } from '../../driver/api.ts';
import type { ParameterTypes } from '../../driver/bind.ts';

export type HostMemory = ParameterTypes['memory'];

/** Names of the statuses that the fake returns, as the driver gives them. */
const STATUS_NAMES: Readonly<Record<number, readonly [name: string, text: string]>> = {
  0: ['CUDA_SUCCESS', 'no error'],
  1: ['CUDA_ERROR_INVALID_VALUE', 'invalid argument'],
  2: ['CUDA_ERROR_OUT_OF_MEMORY', 'out of memory'],
  100: ['CUDA_ERROR_NO_DEVICE', 'no CUDA-capable device is detected'],
  101: ['CUDA_ERROR_INVALID_DEVICE', 'invalid device ordinal'],
  201: ['CUDA_ERROR_INVALID_CONTEXT', 'invalid device context'],
  209: ['CUDA_ERROR_NO_BINARY_FOR_GPU', 'no kernel image is available for execution on the device'],
  218: ['CUDA_ERROR_INVALID_PTX', 'a PTX JIT compilation failed'],
  400: ['CUDA_ERROR_INVALID_HANDLE', 'invalid resource handle'],
  500: ['CUDA_ERROR_NOT_FOUND', 'named symbol not found'],
  600: ['CUDA_ERROR_NOT_READY', 'device not ready'],
  700: ['CUDA_ERROR_ILLEGAL_ADDRESS', 'an illegal memory access was encountered'],
  712: ['CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED', 'part or all of the requested memory range is already mapped'],
  713: ['CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED', 'pointer does not correspond to a registered memory region'],
  719: ['CUDA_ERROR_LAUNCH_FAILED', 'unspecified launch failure'],
  900: ['CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED', 'operation not permitted when stream is capturing'],
  901: ['CUDA_ERROR_STREAM_CAPTURE_INVALIDATED', 'operation failed due to a previous error during capture'],
};

export class FakeHost {
  readonly #addresses = new WeakMap<ArrayBufferLike, bigint>();
  readonly #buffers: { readonly base: bigint; readonly buffer: ArrayBufferLike }[] = [];
  readonly #registered: { readonly start: bigint; readonly bytes: bigint }[] = [];
  readonly #texts = new Map<bigint, string>();
  #next = 0x5000_0000_0008n;

  get registrations(): number {
    return this.#registered.length;
  }

  addressOf(buffer: ArrayBufferLike): bigint {
    let base = this.#addresses.get(buffer);
    if (base === undefined) {
      base = this.#next;
      this.#next += BigInt(buffer.byteLength) + 4096n;
      // Addresses end in 8, as malloc's may: nothing may count on more.
      this.#next += (8n - (this.#next % 16n) + 16n) % 16n;
      this.#addresses.set(buffer, base);
      this.#buffers.push({ base, buffer });
    }
    return base;
  }

  textAt(address: bigint): string {
    return this.#texts.get(address) ?? '';
  }

  /** Host memory behind a `memory` parameter. */
  bytes(memory: HostMemory, bytes: number): Uint8Array {
    if (memory === null) throw new Error('the driver would read address 0');
    if (typeof memory !== 'bigint') {
      if (memory.byteLength < bytes) throw new Error(`the driver would go ${bytes - memory.byteLength} bytes too far`);
      return new Uint8Array(memory.buffer, memory.byteOffset, bytes);
    }
    const found = this.#buffers.find(
      ({ base, buffer }) => memory >= base && memory + BigInt(bytes) <= base + BigInt(buffer.byteLength),
    );
    if (found === undefined) throw new Error(`the driver would touch unknown host memory at ${memory}`);
    return new Uint8Array(found.buffer, Number(memory - found.base), bytes);
  }

  view(memory: HostMemory, bytes: number): DataView {
    const { buffer, byteOffset } = this.bytes(memory, bytes);
    return new DataView(buffer, byteOffset, bytes);
  }

  write64(memory: HostMemory, value: bigint): void {
    this.view(memory, 8).setBigUint64(0, value, true);
  }

  write32(memory: HostMemory, value: number): void {
    this.view(memory, 4).setInt32(0, value, true);
  }

  #start(memory: HostMemory): bigint {
    if (memory === null) return 0n;
    return typeof memory === 'bigint' ? memory : this.addressOf(memory.buffer) + BigInt(memory.byteOffset);
  }

  isRegistered(memory: HostMemory, bytes: number): boolean {
    const start = this.#start(memory);
    return this.#registered.some((range) => start >= range.start && start + BigInt(bytes) <= range.start + range.bytes);
  }

  #describe(status: number, index: 0 | 1, out: HostMemory): number {
    const known = STATUS_NAMES[status];
    if (known === undefined) return 1;
    const address = 0x9000_0000n + BigInt(status * 2 + index);
    this.#texts.set(address, known[index]);
    this.write64(out, address);
    return 0;
  }

  /** Functions that need no context. */
  readonly statusFunctions: Pick<DriverFunctions, 'cuGetErrorName' | 'cuGetErrorString'> = {
    cuGetErrorName: (status, text) => this.#describe(status, 0, text),
    cuGetErrorString: (status, text) => this.#describe(status, 1, text),
  };

  readonly functions: Pick<DriverFunctions, 'cuMemHostRegister' | 'cuMemHostUnregister'> = {
    cuMemHostRegister: (memory, bytes) => {
      const start = this.#start(memory);
      const end = start + BigInt(bytes);
      this.bytes(start, Number(bytes));
      const firstPage = start / 4096n;
      const lastPage = (end - 1n) / 4096n;
      const overlaps = this.#registered.some(
        (range) => firstPage <= (range.start + range.bytes - 1n) / 4096n && lastPage >= range.start / 4096n,
      );
      if (overlaps) return 712;
      this.#registered.push({ start, bytes: BigInt(bytes) });
      return 0;
    },
    cuMemHostUnregister: (memory) => {
      const index = this.#registered.findIndex(({ start }) => start === memory);
      if (index < 0) return 713;
      this.#registered.splice(index, 1);
      return 0;
    },
  };
}
