/** Modules, launches and tensor maps of the fake driver. */
import { type DriverFunctions, STRUCTS } from '../../driver/api.ts';
import { type FakeContexts, MAX_SHARED } from './contexts.ts';
import type { FakeHost, HostMemory } from './host.ts';
import type { FakeMemory } from './memory.ts';
import { DeviceFault, type FakeStreams } from './streams.ts';

/** A kernel launch as the driver received it. */
export interface FakeLaunch {
  readonly ptx: string;
  readonly entry: string;
  readonly grid: readonly [number, number, number];
  readonly block: readonly [number, number, number];
  readonly cluster: readonly [number, number, number] | undefined;
  readonly sharedBytes: number;
  /** Copies of the parameters, in the sizes that the PTX declares. */
  readonly parameters: readonly Uint8Array[];
  readonly device: number;
  /** Bytes of device memory from an address on, to the end of the allocation; a wild address is a fault. */
  memory(pointer: bigint, bytes: number): Uint8Array;
  /** The description behind a tensor map parameter. */
  tensorMap(parameter: Uint8Array): FakeTensorMap;
}

export interface FakeTensorMap {
  readonly elementType: number;
  readonly pointer: bigint;
  readonly dimensions: readonly bigint[];
  readonly byteStrides: readonly bigint[];
  readonly box: readonly number[];
  readonly elementStrides: readonly number[];
  readonly interleave: number;
  readonly swizzle: number;
}

interface Entry {
  readonly name: string;
  readonly ptx: string;
  readonly parameterBytes: readonly number[];
  sharedLimit: number;
}

/** What machine code begins with: the compute capability that it is for follows, and the PTX that it was made of. */
const MACHINE_CODE = '\x7fELF of sm_';

const DEFAULT_SHARED_LIMIT = 48 * 1024;
const SCALAR_BYTES: Readonly<Record<string, number>> = { 8: 1, 16: 2, 32: 4, 64: 8 };

/** Entries of a PTX module with the sizes of their parameters, read from the text as the driver does. */
function parseEntries(ptx: string): Entry[] {
  return [...ptx.matchAll(/\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?/g)].map(([, name, parameters]) => ({
    name: name as string,
    ptx,
    parameterBytes: (parameters ?? '')
      .split(',')
      .map((text) => text.trim())
      .filter((text) => text !== '')
      .map((text) => {
        const array = text.match(/\.b8\s+\S+\[(\d+)\]/);
        if (array !== null) return Number(array[1]);
        const scalar = text.match(/\.[usbf](8|16|32|64)\b/);
        if (scalar === null) throw new Error(`parameter not understood: ${text}`);
        return SCALAR_BYTES[scalar[1] as string] as number;
      }),
    sharedLimit: DEFAULT_SHARED_LIMIT,
  }));
}

type ModuleFunction =
  | Extract<keyof DriverFunctions, `cuModule${string}`>
  | Extract<keyof DriverFunctions, `cuFunc${string}`>
  | Extract<keyof DriverFunctions, `cuLaunch${string}`>
  | Extract<keyof DriverFunctions, `cuLink${string}`>
  | 'cuTensorMapEncodeTiled';

export class FakeModules {
  /** Kernels that have run, by entry. */
  readonly executed: string[] = [];
  readonly #execute: (launch: FakeLaunch) => void;
  readonly #contexts: FakeContexts;
  readonly #host: FakeHost;
  readonly #streams: FakeStreams;
  readonly #memory: FakeMemory;
  readonly #faults = new Map<string, number>();
  readonly #modules = new Map<bigint, Entry[]>();
  readonly #functions = new Map<bigint, Entry>();
  readonly #tensorMaps: FakeTensorMap[] = [];
  /** Links under way: the PTX that was added, and the machine code, which goes with the link. */
  readonly #links = new Map<bigint, { ptx: string; code?: Uint8Array<ArrayBuffer> }>();

  constructor(
    execute: (launch: FakeLaunch) => void,
    contexts: FakeContexts,
    host: FakeHost,
    streams: FakeStreams,
    memory: FakeMemory,
  ) {
    this.#execute = execute;
    this.#contexts = contexts;
    this.#host = host;
    this.#streams = streams;
    this.#memory = memory;
  }

  /** Modules and links. */
  get live(): number {
    return this.#modules.size + this.#links.size;
  }

  /** The next run of a kernel ends in a fault of the device. */
  faultIn(entry: string, status: number): void {
    this.#faults.set(entry, status);
  }

  #launch(
    functionHandle: bigint,
    geometry: Pick<FakeLaunch, 'grid' | 'block' | 'cluster' | 'sharedBytes'>,
    streamHandle: bigint,
    parameterTable: HostMemory,
  ): number {
    const stream = this.#streams.find(streamHandle);
    if (stream === undefined) return 400;
    const run = this.#work(functionHandle, geometry, stream.device, parameterTable);
    if (typeof run === 'number') return run;
    const { size, ...layout } = STRUCTS.CUDA_KERNEL_NODE_PARAMS;
    return this.#streams.enqueue(streamHandle, run, (parameters) => {
      const view = this.#host.view(parameters, size);
      const at = (offset: number) => view.getUint32(offset, true);
      const given = {
        grid: [at(layout.gridDimX), at(layout.gridDimY), at(layout.gridDimZ)],
        block: [at(layout.blockDimX), at(layout.blockDimY), at(layout.blockDimZ)],
        cluster: geometry.cluster,
        sharedBytes: at(layout.sharedMemBytes),
      } as const;
      const table = view.getBigUint64(layout.kernelParams, true);
      return this.#work(view.getBigUint64(layout.func, true), given, stream.device, table);
    });
  }

  /** What a launch does when it runs, or the status that refuses it. Parameters are read now. */
  #work(
    functionHandle: bigint,
    geometry: Pick<FakeLaunch, 'grid' | 'block' | 'cluster' | 'sharedBytes'>,
    device: number,
    parameterTable: HostMemory,
  ): (() => void) | number {
    const kernel = this.#functions.get(functionHandle);
    if (kernel === undefined) return 400;
    const { grid, block, cluster, sharedBytes } = geometry;
    const threads = block[0] * block[1] * block[2];
    const tooLarge = threads > 1024 || grid[1] > 65535 || grid[2] > 65535;
    const divisible = cluster === undefined || grid.every((size, i) => size % (cluster[i] as number) === 0);
    if (threads < 1 || grid.some((size) => size < 1) || tooLarge || !divisible) return 1;
    if (sharedBytes > kernel.sharedLimit) return 1;
    const { parameterBytes, name: entry, ptx } = kernel;
    const table = this.#host.view(parameterTable, 8 * parameterBytes.length);
    const parameters = parameterBytes.map((bytes, i) =>
      this.#host.bytes(table.getBigUint64(8 * i, true), bytes).slice(),
    );
    const launch: FakeLaunch = {
      ...geometry,
      ptx,
      entry,
      parameters,
      device,
      memory: (pointer, bytes) => this.#memory.at(pointer, bytes),
      tensorMap: (parameter) => {
        const index = new DataView(parameter.buffer, parameter.byteOffset).getUint32(0, true);
        const map = this.#tensorMaps[index];
        if (map === undefined) throw new DeviceFault(700);
        return map;
      },
    };
    return () => {
      this.executed.push(entry);
      const fault = this.#faults.get(entry);
      this.#faults.delete(entry);
      if (fault !== undefined) throw new DeviceFault(fault);
      this.#execute(launch);
    };
  }

  readonly functions: Pick<DriverFunctions, ModuleFunction> = {
    cuLinkCreate: (count, options, _values, state) => {
      this.#host.view(options, 4 * count);
      const handle = this.#contexts.newHandle();
      this.#links.set(handle, { ptx: '' });
      this.#host.write64(state, handle);
      return 0;
    },
    cuLinkAddData: (state, kind, data, bytes) => {
      const link = this.#links.get(BigInt(state));
      if (link === undefined) return 400;
      if (kind !== 1) return 1;
      link.ptx = new TextDecoder().decode(this.#host.bytes(data, Number(bytes)).subarray(0, -1));
      return parseEntries(link.ptx).length === 0 ? 218 : 0;
    },
    cuLinkComplete: (state, address, size) => {
      const link = this.#links.get(BigInt(state));
      if (link === undefined) return 400;
      link.code = new TextEncoder().encode(
        `${MACHINE_CODE}${this.#contexts.capability(this.#contexts.currentDevice)}\n${link.ptx}\0`,
      );
      this.#host.write64(address, this.#host.addressOf(link.code.buffer));
      this.#host.write64(size, BigInt(link.code.length));
      return 0;
    },
    cuLinkDestroy: (state) => {
      const link = this.#links.get(BigInt(state));
      link?.code?.fill(0);
      return this.#links.delete(BigInt(state)) ? 0 : 400;
    },
    cuModuleLoadDataEx: (module, image, count, options, values) => {
      const text = new TextDecoder().decode((image as Uint8Array).subarray(0, -1));
      const [, capability, made] = text.match(/^.ELF of sm_(\d+)\n([\s\S]*)$/) ?? [];
      if (made !== undefined && Number(capability) !== this.#contexts.capability(this.#contexts.currentDevice))
        return 209;
      const ptx = made ?? text;
      const codes = this.#host.view(options, 4 * count);
      const logs = this.#host.view(values, 8 * count);
      const log = (option: number, sizeOption: number, text: string) => {
        const index = Array.from({ length: count }, (_, i) => codes.getUint32(4 * i, true));
        const size = Number(logs.getBigUint64(8 * index.indexOf(sizeOption), true));
        const address = logs.getBigUint64(8 * index.indexOf(option), true);
        this.#host.bytes(address, size).set(new TextEncoder().encode(`${text}\0`));
      };
      const target = Number(ptx.match(/\.target\s+sm_(\d+)/)?.[1] ?? Number.NaN);
      const entries = parseEntries(ptx);
      if (Number.isNaN(target) || entries.length === 0) {
        log(5, 6, "ptxas application ptx input, line 1; fatal : Missing .version directive at start of file '(null)'");
        return 218;
      }
      const device = this.#contexts.currentDevice;
      if (target > this.#contexts.capability(device)) {
        log(5, 6, `ptxas fatal : SM version specified by .target is higher than default SM version assumed`);
        return 209;
      }
      log(
        3,
        4,
        `ptxas info : Compiling entry function '${entries[0]?.name}' for 'sm_${this.#contexts.capability(device)}'`,
      );
      const handle = this.#contexts.newHandle();
      this.#modules.set(handle, entries);
      this.#host.write64(module, handle);
      return 0;
    },
    cuModuleUnload: (module) => (this.#modules.delete(BigInt(module)) ? 0 : 400),
    cuModuleGetFunction: (kernel, module, name) => {
      const text = new TextDecoder().decode((name as Uint8Array).subarray(0, -1));
      const entry = this.#modules.get(BigInt(module))?.find((candidate) => candidate.name === text);
      if (entry === undefined) return 500;
      const handle = this.#contexts.newHandle();
      this.#functions.set(handle, entry);
      this.#host.write64(kernel, handle);
      return 0;
    },
    cuFuncGetAttribute: (value, attribute) => {
      this.#host.write32(value, attribute === 4 ? 168 : 0);
      return 0;
    },
    cuFuncSetAttribute: (kernel, attribute, value) => {
      const entry = this.#functions.get(BigInt(kernel));
      if (entry === undefined) return 400;
      if (attribute === 8 && value > MAX_SHARED) return 1;
      if (attribute === 8) entry.sharedLimit = value;
      return 0;
    },
    cuLaunchKernel: (kernel, gx, gy, gz, bx, by, bz, sharedBytes, stream, parameters) =>
      this.#launch(
        BigInt(kernel),
        { grid: [gx, gy, gz], block: [bx, by, bz], cluster: undefined, sharedBytes },
        BigInt(stream),
        parameters,
      ),
    cuLaunchKernelEx: (config, kernel, parameters) => {
      const layout = STRUCTS.CUlaunchConfig;
      const view = this.#host.view(config, layout.size);
      const u32 = (offset: number) => view.getUint32(offset, true);
      let cluster: FakeLaunch['cluster'];
      for (let i = 0; i < u32(layout.numAttrs); i++) {
        const { size, id, value } = STRUCTS.CUlaunchAttribute;
        const attribute = this.#host.view(view.getBigUint64(layout.attrs, true) + BigInt(i * size), size);
        if (attribute.getUint32(id, true) !== 4) return 1;
        cluster = [0, 4, 8].map((offset) => attribute.getUint32(value + offset, true)) as [number, number, number];
      }
      return this.#launch(
        BigInt(kernel),
        {
          grid: [u32(layout.gridDimX), u32(layout.gridDimY), u32(layout.gridDimZ)],
          block: [u32(layout.blockDimX), u32(layout.blockDimY), u32(layout.blockDimZ)],
          cluster,
          sharedBytes: u32(layout.sharedMemBytes),
        },
        view.getBigUint64(layout.hStream, true),
        parameters,
      );
    },
    cuTensorMapEncodeTiled: (map, elementType, rank, pointer, dims, strides, box, elements, interleave, swizzle) => {
      const address = map as bigint;
      const u64s = (memory: HostMemory, count: number) => {
        const view = this.#host.view(memory, 8 * count);
        return Array.from({ length: count }, (_, i) => view.getBigUint64(8 * i, true));
      };
      const u32s = (memory: HostMemory) => {
        const view = this.#host.view(memory, 4 * rank);
        return Array.from({ length: rank }, (_, i) => view.getUint32(4 * i, true));
      };
      const description: FakeTensorMap = {
        elementType,
        pointer: BigInt(pointer),
        dimensions: u64s(dims, rank),
        byteStrides: u64s(strides, rank - 1),
        box: u32s(box),
        elementStrides: u32s(elements),
        interleave,
        swizzle,
      };
      const valid =
        address % 64n === 0n &&
        rank >= 1 &&
        rank <= 5 &&
        description.pointer % 16n === 0n &&
        description.dimensions.every((size) => size > 0n && size <= 2n ** 32n) &&
        description.byteStrides.every((stride) => stride % 16n === 0n && stride < 2n ** 40n) &&
        description.box.every((size) => size > 0 && size <= 256) &&
        description.elementStrides.every((stride) => stride > 0 && stride <= 8);
      if (!valid) return 1;
      this.#host.view(address, STRUCTS.CUtensorMap.size).setUint32(0, this.#tensorMaps.length, true);
      this.#tensorMaps.push(description);
      return 0;
    },
  };
}
