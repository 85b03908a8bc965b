import { InvalidArgumentError } from '../../../errors.ts';
import type { BufferName, KernelArgument, KernelLaunch } from '../launches/launch.ts';
import { CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, STRUCTS } from './api.ts';
import type { CudaDevice } from './device.ts';
import type { CudaFunction } from './module.ts';
import type { CudaStream } from './stream.ts';
import { TensorMapEncoder } from './tensor-map.ts';

/** Bytes and alignment of an argument, as the kernel's parameter has them. */
const ARGUMENT_BYTES: Readonly<Record<KernelArgument['kind'], number>> = {
  pointer: 8,
  null: 8,
  u32: 4,
  s32: 4,
  f32: 4,
  u64: 8,
  s64: 8,
  'tensor-map': STRUCTS.CUtensorMap.size,
};

/** What a tensor map needs. */
const BLOCK_ALIGNMENT = 128;

/** Limits of every device; x goes to 2^31 - 1. */
const MAX_GRID_YZ = 65535;

interface PointerPatch {
  readonly buffer: BufferName;
  readonly byteOffset: bigint;
  /** Index of its 64-bit word. */
  readonly word: number;
}

interface MapPatch {
  readonly buffer: BufferName;
  readonly byteOffset: bigint;
  readonly address: bigint;
  readonly encoder: TensorMapEncoder;
  /** The tensor that the map was last encoded for. */
  tensor: bigint;
}

interface Prepared {
  readonly launch: KernelLaunch;
  readonly function: CudaFunction;
  /** Address of the array of pointers to the arguments. */
  readonly parameters: bigint;
  /** Address and view of CUlaunchConfig, for launches with clusters. */
  readonly config: { readonly address: bigint; readonly streamWord: number } | undefined;
}

const alignUp = (value: number, alignment: number) => Math.ceil(value / alignment) * alignment;

/**
 * Launches with everything marshalled that stays the same from run to run: arguments lie in one block of memory that
 * the driver reads, and a run only writes the addresses of its buffers there.
 */
export class PreparedLaunches {
  readonly #device: CudaDevice;
  /** The block. The driver gets addresses in it, so it is referenced as long as this object lives. */
  readonly #block: DataView;
  /** The same block. */
  readonly #words: BigUint64Array;
  readonly #launches: Prepared[] = [];
  readonly #pointers: PointerPatch[] = [];
  readonly #maps: MapPatch[] = [];

  /** Loads the kernels and lays their arguments out. Launches of an empty grid do nothing and are left out. */
  constructor(device: CudaDevice, launches: readonly KernelLaunch[]) {
    this.#device = device;
    const running = launches.filter(({ grid }) => grid.every((size) => size > 0));
    // Never below a page, so that V8 keeps it outside of its own heap.
    const bytes = alignUp(
      running.reduce((sum, launch) => sum + blockBytes(launch), 4096),
      8,
    );
    const memory = new ArrayBuffer(bytes + BLOCK_ALIGNMENT);
    const address = device.api.addressOf(memory);
    const over = Number(address % BigInt(BLOCK_ALIGNMENT));
    const skip = alignUp(over, BLOCK_ALIGNMENT) - over;
    this.#block = new DataView(memory, skip, bytes);
    this.#words = new BigUint64Array(memory, skip, bytes / 8);
    let next = 0;
    const take = (size: number, alignment: number) => {
      const offset = alignUp(next, alignment);
      next = offset + size;
      return offset;
    };
    const start = address + BigInt(skip);
    for (const launch of running) this.#launches.push(this.#prepare(launch, start, take));
  }

  #prepare(launch: KernelLaunch, start: bigint, take: (bytes: number, alignment: number) => number): Prepared {
    const view = this.#block;
    const { grid, block, cluster, sharedBytes } = launch;
    if (grid[1] > MAX_GRID_YZ || grid[2] > MAX_GRID_YZ || grid[0] >= 2 ** 31) {
      throw new InvalidArgumentError(
        'unsupported-size',
        'q',
        `a grid of at most 2^31-1 x ${MAX_GRID_YZ} x ${MAX_GRID_YZ} blocks for kernel '${launch.name}'`,
        grid.join(' x '),
      );
    }
    const table = take(8 * launch.arguments.length, 8);
    launch.arguments.forEach((argument, i) => {
      const bytes = ARGUMENT_BYTES[argument.kind];
      const offset = take(bytes, bytes);
      view.setBigUint64(table + 8 * i, start + BigInt(offset), true);
      this.#writeArgument(offset, argument, start);
    });

    const module = this.#device.module(launch.module);
    const kernel = module.function(launch.entry);
    const clusterBlocks = cluster === undefined ? 1 : cluster[0] * cluster[1] * cluster[2];
    kernel.allow(sharedBytes, clusterBlocks);

    let config: Prepared['config'];
    if (cluster !== undefined) {
      const attribute = STRUCTS.CUlaunchAttribute;
      const attributeOffset = take(attribute.size, 8);
      view.setUint32(attributeOffset + attribute.id, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, true);
      cluster.forEach((size, i) => {
        view.setUint32(attributeOffset + attribute.value + 4 * i, size, true);
      });
      const layout = STRUCTS.CUlaunchConfig;
      const configOffset = take(layout.size, 8);
      const sizes = [...grid, ...block];
      const fields = ['gridDimX', 'gridDimY', 'gridDimZ', 'blockDimX', 'blockDimY', 'blockDimZ'] as const;
      fields.forEach((field, i) => {
        view.setUint32(configOffset + layout[field], sizes[i] as number, true);
      });
      view.setUint32(configOffset + layout.sharedMemBytes, sharedBytes, true);
      view.setBigUint64(configOffset + layout.attrs, start + BigInt(attributeOffset), true);
      view.setUint32(configOffset + layout.numAttrs, 1, true);
      config = { address: start + BigInt(configOffset), streamWord: (configOffset + layout.hStream) / 8 };
    }
    return { launch, function: kernel, parameters: start + BigInt(table), config };
  }

  #writeArgument(offset: number, argument: KernelArgument, start: bigint): void {
    const view = this.#block;
    switch (argument.kind) {
      case 'pointer':
        this.#pointers.push({
          buffer: argument.buffer,
          byteOffset: BigInt(argument.byteOffset ?? 0),
          word: offset / 8,
        });
        break;
      case 'null':
        view.setBigUint64(offset, 0n, true);
        break;
      case 'u32':
        view.setUint32(offset, argument.value, true);
        break;
      case 's32':
        view.setInt32(offset, argument.value, true);
        break;
      case 'f32':
        view.setFloat32(offset, argument.value, true);
        break;
      case 'u64':
        view.setBigUint64(offset, BigInt(argument.value), true);
        break;
      case 's64':
        view.setBigInt64(offset, BigInt(argument.value), true);
        break;
      case 'tensor-map':
        this.#maps.push({
          buffer: argument.map.buffer,
          byteOffset: BigInt(argument.map.byteOffset ?? 0),
          address: start + BigInt(offset),
          encoder: new TensorMapEncoder(this.#device, argument.map),
          tensor: -1n,
        });
        break;
    }
  }

  /** Registers and local memory of each kernel, for `doctor` and benchmarks. */
  get kernels(): readonly { readonly name: string; readonly registers: number; readonly localBytes: number }[] {
    return this.#launches.map(({ launch, function: { registers, localBytes } }) => ({
      name: launch.name,
      registers,
      localBytes,
    }));
  }

  /**
   * Enqueues all launches, in order. The driver copies the arguments, so the next call may follow at once.
   *
   * @param addressOf the device address of a buffer of this run
   * @param launched is called after each launch
   */
  enqueue(stream: CudaStream, addressOf: (buffer: BufferName) => bigint, launched?: () => void): void {
    stream.requireUsable();
    this.#place(addressOf);
    this.#device.inContext(() => {
      for (const prepared of this.#launches) {
        this.#launch(prepared, stream);
        launched?.();
      }
    });
  }

  /**
   * Gives the launches that a graph has captured other addresses, from its next replay on.
   *
   * @param nodes of the launches, in order
   * @param changed buffers whose addresses are others
   */
  update(
    executable: bigint,
    nodes: readonly bigint[],
    addressOf: (buffer: BufferName) => bigint,
    changed: ReadonlySet<BufferName>,
  ): void {
    this.#place(addressOf);
    const layout = STRUCTS.CUDA_KERNEL_NODE_PARAMS;
    const view = new DataView(new ArrayBuffer(layout.size));
    this.#launches.forEach(({ launch, function: kernel, parameters }, i) => {
      const names = launch.arguments.map((argument) =>
        argument.kind === 'pointer' ? argument.buffer : argument.kind === 'tensor-map' ? argument.map.buffer : '',
      );
      if (!names.some((name) => changed.has(name))) return;
      const { grid, block, sharedBytes, name } = launch;
      view.setBigUint64(layout.func, kernel.handle, true);
      const fields = ['gridDimX', 'gridDimY', 'gridDimZ', 'blockDimX', 'blockDimY', 'blockDimZ'] as const;
      fields.forEach((field, at) => {
        view.setUint32(layout[field], [...grid, ...block][at] as number, true);
      });
      view.setUint32(layout.sharedMemBytes, sharedBytes, true);
      view.setBigUint64(layout.kernelParams, parameters, true);
      const what = `giving kernel '${name}' of a graph other buffers`;
      this.#device.call('cuGraphExecKernelNodeSetParams', what, executable, nodes[i] as bigint, view);
    });
  }

  /** Writes the addresses of a run. */
  #place(addressOf: (buffer: BufferName) => bigint): void {
    const words = this.#words;
    for (const { buffer, byteOffset, word } of this.#pointers) words[word] = addressOf(buffer) + byteOffset;
    for (const map of this.#maps) {
      const tensor = addressOf(map.buffer) + map.byteOffset;
      if (tensor === map.tensor) continue;
      map.encoder.encode(map.address, tensor);
      map.tensor = tensor;
    }
  }

  #launch({ launch, function: kernel, parameters, config }: Prepared, stream: CudaStream): void {
    const { api } = this.#device;
    const { grid, block, sharedBytes, name } = launch;
    let status: number;
    if (config === undefined) {
      status = api.cuLaunchKernel(
        kernel.handle,
        grid[0],
        grid[1],
        grid[2],
        block[0],
        block[1],
        block[2],
        sharedBytes,
        stream.handle,
        parameters,
        null,
      );
    } else {
      this.#words[config.streamWord] = stream.handle;
      status = api.cuLaunchKernelEx(config.address, kernel.handle, parameters, null);
    }
    // Noted before the check: a launch that reports an earlier kernel's fault is itself no suspect, one that runs is.
    if (status === 0) stream.noteLaunch(name);
    else {
      const call = config === undefined ? 'cuLaunchKernel' : 'cuLaunchKernelEx';
      throw this.#device.error(status, call, `launching kernel '${name}' on ${this.#device}`);
    }
  }
}

/** An upper bound of the block that one launch needs. */
function blockBytes(launch: KernelLaunch): number {
  const argumentBytes = launch.arguments.reduce((bytes, { kind }) => bytes + 2 * ARGUMENT_BYTES[kind] + 8, 0);
  return argumentBytes + STRUCTS.CUlaunchConfig.size + STRUCTS.CUlaunchAttribute.size + 64;
}
