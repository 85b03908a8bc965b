/** Device memory of the fake driver: allocations, pools and copies. Freed memory is poisoned. */
import { type DriverFunctions, STRUCTS } from '../../driver/api.ts';
import type { FakeContexts } from './contexts.ts';
import type { FakeHost } from './host.ts';
import { DeviceFault, type FakeStreams, type Stream } from './streams.ts';

interface Allocation {
  readonly base: bigint;
  readonly bytes: Uint8Array;
  readonly device: number;
  freed: boolean;
  /** Made without a pool: other processes may map it. */
  readonly exportable?: boolean;
  /** Of memory that another process made, as this one maps it. */
  readonly mapped?: boolean;
}

const POISON = 0xff;

type MemoryFunction = Exclude<
  Extract<keyof DriverFunctions, `cuMem${string}` | `cuIpc${string}`>,
  `cuMemHost${string}`
>;

export interface FakeMemoryOptions {
  readonly memoryBytes: number;
  readonly reuse: boolean;
}

export class FakeMemory {
  readonly #options: FakeMemoryOptions;
  readonly #contexts: FakeContexts;
  readonly #host: FakeHost;
  readonly #streams: FakeStreams;
  readonly #pools = new Set<bigint>();
  readonly #allocations: Allocation[] = [];
  #next = 0x7000_0000_0000n;

  constructor(options: FakeMemoryOptions, contexts: FakeContexts, host: FakeHost, streams: FakeStreams) {
    this.#options = options;
    this.#contexts = contexts;
    this.#host = host;
    this.#streams = streams;
  }

  get pools(): number {
    return this.#pools.size;
  }

  /** Live allocations, oldest first. */
  get live(): readonly Uint8Array[] {
    return this.#allocations.filter(({ freed }) => !freed).map(({ bytes }) => bytes);
  }

  /** Device memory, as a kernel would see it. Work that nobody waited for has not happened yet. */
  at(pointer: bigint, bytes: number): Uint8Array {
    const found = this.#allocations.find(
      ({ base, bytes: { length } }) => pointer >= base && pointer + BigInt(bytes) <= base + BigInt(length),
    );
    if (found === undefined || found.freed) throw new DeviceFault(700);
    return found.bytes.subarray(Number(pointer - found.base));
  }

  #allocate(bytes: number, device: number, exportable = false): bigint | undefined {
    const used = this.#allocations.reduce(
      (sum, a) => sum + (a.freed || a.mapped || a.device !== device ? 0 : a.bytes.length),
      0,
    );
    if (used + bytes > this.#options.memoryBytes) return undefined;
    const again = this.#options.reuse
      ? this.#allocations.find(
          (a) => a.freed && !a.mapped && !exportable && a.device === device && a.bytes.length === bytes,
        )
      : undefined;
    if (again !== undefined) {
      again.freed = false;
      return again.base;
    }
    const base = this.#next;
    // A gap after each allocation: what runs over the end of one finds nothing.
    this.#next += BigInt(Math.ceil(bytes / 256) * 256 + 4096);
    this.#allocations.push({ base, bytes: new Uint8Array(bytes).fill(POISON), device, freed: false, exportable });
    return base;
  }

  #free(pointer: bigint): void {
    const found = this.#allocations.find(({ base }) => base === pointer);
    if (found === undefined || found.freed) throw new DeviceFault(700);
    found.freed = true;
    found.bytes.fill(POISON);
  }

  readonly functions: Pick<DriverFunctions, MemoryFunction> = {
    cuMemGetInfo: (free, total) => {
      this.#host.write64(free, BigInt(this.#options.memoryBytes));
      this.#host.write64(total, BigInt(this.#options.memoryBytes));
      return 0;
    },
    cuMemAlloc: (pointer, bytes) => {
      const made = this.#allocate(Number(bytes), this.#contexts.currentDevice, true);
      if (made === undefined) return 2;
      this.#host.write64(pointer, made);
      return 0;
    },
    cuMemFree: (pointer) => {
      // The driver waits for all work before it frees synchronously.
      this.#streams.drainAll();
      this.#free(BigInt(pointer));
      return 0;
    },
    cuIpcGetMemHandle: (handle, pointer) => {
      const found = this.#allocations.find(({ base, freed }) => base === BigInt(pointer) && !freed);
      if (found?.exportable !== true) return 1;
      this.#host.view(handle, 64).setBigUint64(0, found.base, true);
      return 0;
    },
    cuIpcOpenMemHandle: (pointer, handle, flags) => {
      const base = new DataView(handle.buffer, handle.byteOffset, 64).getBigUint64(0, true);
      const found = this.#allocations.find((each) => each.base === base && !each.freed && each.exportable);
      if (found === undefined || flags !== 1) return 400;
      const mapped = this.#next;
      this.#next += BigInt(Math.ceil(found.bytes.length / 256) * 256 + 4096);
      const device = this.#contexts.currentDevice;
      this.#allocations.push({ base: mapped, bytes: found.bytes, device, freed: false, mapped: true });
      this.#host.write64(pointer, mapped);
      return 0;
    },
    cuIpcCloseMemHandle: (pointer) => {
      this.#streams.drainAll();
      const found = this.#allocations.find(({ base, mapped, freed }) => base === BigInt(pointer) && mapped && !freed);
      if (found === undefined) return 400;
      found.freed = true;
      return 0;
    },
    cuMemPoolCreate: (pool, properties) => {
      const layout = STRUCTS.CUmemPoolProps;
      const view = this.#host.view(properties, layout.size);
      const device = this.#contexts.currentDevice;
      if (view.getInt32(layout.allocType, true) !== 1 || view.getInt32(layout['location.type'], true) !== 1) return 1;
      if (view.getInt32(layout['location.id'], true) !== device) return 1;
      const handle = this.#contexts.newHandle();
      this.#pools.add(handle);
      this.#host.write64(pool, handle);
      return 0;
    },
    cuMemPoolDestroy: (pool) => (this.#pools.delete(BigInt(pool)) ? 0 : 400),
    cuMemPoolSetAttribute: (pool) => (this.#pools.has(BigInt(pool)) ? 0 : 400),
    cuMemPoolSetAccess: (pool, descriptions, count) => {
      const layout = STRUCTS.CUmemAccessDesc;
      const view = this.#host.view(descriptions, layout.size);
      const right = view.getInt32(layout['location.type'], true) === 1 && view.getInt32(layout.flags, true) === 3;
      return right && Number(count) === 1 && this.#pools.has(BigInt(pool)) ? 0 : 1;
    },
    cuMemPoolTrimTo: (pool) => (this.#pools.has(BigInt(pool)) ? 0 : 400),
    cuMemAllocFromPoolAsync: (pointer, bytes, pool, handle) => {
      const stream = this.#streams.find(handle);
      if (!this.#pools.has(BigInt(pool)) || stream === undefined) return 400;
      if (stream.capture !== undefined) {
        stream.captureBroken = true;
        return 900;
      }
      const made = this.#allocate(Number(bytes), stream.device);
      if (made === undefined) return 2;
      this.#host.write64(pointer, made);
      return 0;
    },
    cuMemFreeAsync: (pointer, stream) => this.#streams.enqueue(stream, () => this.#free(BigInt(pointer))),
    cuMemcpyHtoDAsync: (target, source, bytes, stream) => {
      const size = Number(bytes);
      const host = this.#host.bytes(source, size);
      // Read only when the copy runs: a source that changes before is a mistake that shows.
      return this.#streams.enqueue(stream, () => this.at(BigInt(target), size).set(host));
    },
    cuMemcpyDtoHAsync: (target, source, bytes, handle) => {
      const size = Number(bytes);
      const host = this.#host.bytes(target, size);
      const status = this.#streams.enqueue(handle, () => host.set(this.at(BigInt(source), size).subarray(0, size)));
      if (status !== 0 || this.#host.isRegistered(target, size)) return status;
      // Into pageable memory the driver returns only when the bytes are there.
      const stream = this.#streams.find(handle) as Stream;
      if (stream.capture !== undefined) return 900;
      this.#streams.drain(stream);
      return this.#contexts.of(stream.device).fault;
    },
    cuMemcpyDtoDAsync: (target, source, bytes, stream) => {
      const size = Number(bytes);
      return this.#streams.enqueue(stream, () =>
        this.at(BigInt(target), size).set(this.at(BigInt(source), size).subarray(0, size)),
      );
    },
    cuMemcpyPeerAsync: (target, targetContext, source, sourceContext, bytes, stream) => {
      const size = Number(bytes);
      const known = [targetContext, sourceContext].every((handle) => this.#contexts.has(BigInt(handle)));
      if (!known) return 201;
      return this.#streams.enqueue(stream, () =>
        this.at(BigInt(target), size).set(this.at(BigInt(source), size).subarray(0, size)),
      );
    },
    cuMemcpy2DAsync: (parameters, stream) => {
      const layout = STRUCTS.CUDA_MEMCPY2D;
      const view = this.#host.view(parameters, layout.size);
      const at = (offset: number) => view.getBigUint64(offset, true);
      const [source, target] = [at(layout.srcDevice), at(layout.dstDevice)];
      const [sourcePitch, targetPitch] = [at(layout.srcPitch), at(layout.dstPitch)];
      const [width, height] = [Number(at(layout.WidthInBytes)), Number(at(layout.Height))];
      const onDevice = [layout.srcMemoryType, layout.dstMemoryType].every((o) => view.getUint32(o, true) === 2);
      const pitched = height <= 1 || (sourcePitch >= BigInt(width) && targetPitch >= BigInt(width));
      if (!onDevice || !pitched || sourcePitch >= 2n ** 31n || targetPitch >= 2n ** 31n) return 1;
      return this.#streams.enqueue(stream, () => {
        for (let row = 0n; row < BigInt(height); row++) {
          const from = this.at(source + row * sourcePitch, width).subarray(0, width);
          this.at(target + row * targetPitch, width).set(from);
        }
      });
    },
    cuMemsetD8Async: (target, value, bytes, stream) =>
      this.#streams.enqueue(stream, () => {
        this.at(BigInt(target), Number(bytes)).fill(value, 0, Number(bytes));
      }),
  };
}
