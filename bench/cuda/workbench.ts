/** One problem's launches on a device, to be run and timed whole or in part, and what a copy takes there. */
import { spawnSync } from 'node:child_process';
import { PreparedLaunches } from '../../src/backends/cuda/driver/prepared-launches.ts';
import type { CudaDevice, CudaTensor } from '../../src/backends/cuda/index.ts';
import { targetFor } from '../../src/backends/cuda/kernel-table.ts';
import type { BufferName, LaunchSequence } from '../../src/backends/cuda/launches/launch.ts';
import { packBuffers } from '../../src/backends/cuda/run/bound-launches.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { type AttentionSize, attentionOperations } from '../../src/measure/operations.ts';

/** Rate of a problem that takes so long, as every table here counts it. */
export const tflops = (shape: AttentionSize, milliseconds: number) => attentionOperations(shape) / milliseconds / 1e9;

/** Launches that are not quantization. */
export const isAttention = (name: string) => name === 'attention' || name.startsWith('combine');

export const factsOf = (device: CudaDevice) => {
  const target = targetFor(device.computeCapability);
  if (target === undefined) throw new Error(`${device} is too old`);
  return { target, multiprocessors: device.multiprocessors };
};

/** Card, driver, clocks, power and temperature as they are now; a line of comma-separated values with its heading. */
export const nvidiaSmi = (): string =>
  spawnSync(
    'nvidia-smi',
    ['--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu', '--format=csv'],
    { encoding: 'utf8' },
  ).stdout;

export interface KernelTime {
  readonly name: string;
  readonly milliseconds: number;
  readonly registers: number;
  readonly localBytes: number;
}

/** Bytes a second that a copy on the device reads and writes together. */
export function copyBandwidth(device: CudaDevice): number {
  const bytes = 2 ** 30;
  using from = device.allocate(bytes);
  using to = device.allocate(bytes);
  const milliseconds = timeOnDevice(device, () =>
    device.call('cuMemcpyDtoDAsync', 'copying', to.pointer, from.pointer, bytes, device.stream.handle),
  );
  return (2 * bytes) / (milliseconds / 1000);
}

/** Addresses of an attention's tensors, and of what a cache keeps in one piece of memory. */
export function cacheAddresses(
  tensors: Readonly<Record<'q' | 'k' | 'v' | 'output', CudaTensor>>,
  offsets: ReadonlyMap<BufferName, number>,
  kept: bigint,
): Record<BufferName, bigint> {
  return Object.fromEntries([
    ...Object.entries(tensors).map(([name, { memory }]) => [name, memory.pointer]),
    ...[...offsets].map(([name, offset]) => [name, kept + BigInt(offset)]),
  ]);
}

/** Launches of one problem with all their buffers, to be run whole or in part. */
export class Workbench {
  readonly #device: CudaDevice;
  readonly #addresses = new Map<BufferName, bigint>();
  readonly #memory: { dispose(): void }[] = [];
  readonly #prepared: readonly PreparedLaunches[];
  readonly sequence: LaunchSequence;

  constructor(device: CudaDevice, sequence: LaunchSequence, operands: Readonly<Record<BufferName, bigint>>) {
    this.#device = device;
    this.sequence = sequence;
    for (const [name, address] of Object.entries(operands)) this.#addresses.set(name, address);
    const { offsets, byteLength } = packBuffers(sequence.scratch);
    const scratch = device.allocate(byteLength);
    this.#memory.push(scratch);
    for (const [name, offset] of offsets) this.#addresses.set(name, scratch.pointer + BigInt(offset));
    const zeros = Object.entries(sequence.zeroed ?? {}).map(([name, bytes]) => [name, new Uint8Array(bytes)] as const);
    for (const [name, bytes] of [...zeros, ...Object.entries(sequence.constants)]) {
      const memory = device.allocate(bytes.byteLength);
      this.#memory.push(memory);
      device.call('cuMemcpyHtoDAsync', 'copying', memory.pointer, bytes, bytes.byteLength, device.stream.handle);
      this.#addresses.set(name, memory.pointer);
    }
    device.stream.synchronize();
    this.#prepared = sequence.launches.map((launch) => new PreparedLaunches(device, [launch]));
  }

  /** Bytes of the quantized operands. */
  bytesOf(names: readonly BufferName[]): number {
    return names.reduce((sum, name) => sum + (this.sequence.scratch[name] ?? 0), 0);
  }

  /** Enqueues the launches whose names `which` takes. */
  run(which: (name: string) => boolean = () => true): void {
    this.sequence.launches.forEach(({ name }, i) => {
      if (!which(name)) return;
      this.#prepared[i]?.enqueue(this.#device.stream, (buffer) => this.#addresses.get(buffer) as bigint);
    });
  }

  /** Registers and local memory of a launch. */
  resourcesOf(name: string): { readonly registers: number; readonly localBytes: number } {
    const at = this.sequence.launches.findIndex((launch) => launch.name === name);
    const { registers = 0, localBytes = 0 } = this.#prepared[at]?.kernels[0] ?? {};
    return { registers, localBytes };
  }

  get kernels(): readonly KernelTime[] {
    return this.timesOf(() => true);
  }

  /** Times of the launches whose names `which` takes. */
  timesOf(which: (name: string) => boolean): KernelTime[] {
    const names = this.sequence.launches.map(({ name }) => name).filter(which);
    return names.map((name) => {
      const milliseconds = timeOnDevice(this.#device, () => this.run((n) => n === name));
      return { name, ...this.resourcesOf(name), milliseconds };
    });
  }

  dispose(): void {
    for (const memory of this.#memory) memory.dispose();
  }
}
