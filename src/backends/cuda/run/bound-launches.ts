/** Launches bound to the memory of one device: constants there, scratch lent by the stream, repeated runs as graphs. */
import { ExecutionError } from '../../../errors.ts';
import type { CudaDevice } from '../driver/device.ts';
import { CudaGraph } from '../driver/graph.ts';
import type { DeviceMemory } from '../driver/memory.ts';
import { PreparedLaunches } from '../driver/prepared-launches.ts';
import type { ActiveCapture, CapturedRun, CudaStream } from '../driver/stream.ts';
import type { BufferName, LaunchSequence } from '../launches/launch.ts';
import { copyToDevice } from '../tensor.ts';

/** What `cuMemAlloc` promises, and more than any kernel asks for. */
const BUFFER_ALIGNMENT = 256;

/** Places buffers of these sizes one behind another. */
export function packBuffers(sizes: Readonly<Record<BufferName, number>>): {
  readonly offsets: ReadonlyMap<BufferName, number>;
  readonly byteLength: number;
} {
  const offsets = new Map<BufferName, number>();
  let byteLength = 0;
  for (const [name, bytes] of Object.entries(sizes)) {
    offsets.set(name, byteLength);
    byteLength += Math.ceil(bytes / BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT;
  }
  return { offsets, byteLength };
}

/** Sets of addresses that a plan remembers: a program that frees and allocates in a loop gets the same ones again. */
const REMEMBERED_RUNS = 4;
/** Runs over the same addresses before they are captured: making a graph takes as long as dozens of launches. */
const RUNS_BEFORE_CAPTURE = 3;

/** A run by its addresses; once it has come often enough, as a graph. */
interface RememberedRun {
  readonly addresses: readonly bigint[];
  runs: number;
  graph?: CudaGraph;
}

/** Addresses of {@link BoundLaunches.scratchBytes} bytes of any contents, and of {@link BoundLaunches.zeroedBytes} zeros. */
export interface LentMemory {
  readonly scratch: bigint;
  readonly zeros: bigint;
}

/** Launches bound to one device, with their constants there. Runs any number of times, on any stream. */
export class BoundLaunches {
  readonly device: CudaDevice;
  readonly launches: PreparedLaunches;
  readonly scratchBytes: number;
  readonly zeroedBytes: number;
  readonly #scratch: ReadonlyMap<BufferName, number>;
  readonly #zeroed: ReadonlyMap<BufferName, number>;
  readonly #constants: DeviceMemory;
  /** Addresses of the run being enqueued; the constants' addresses stay. */
  readonly #addresses = new Map<BufferName, bigint>();
  /** Latest runs, the one used longest ago first. */
  readonly #remembered: RememberedRun[] = [];

  constructor(device: CudaDevice, sequence: LaunchSequence) {
    this.device = device;
    this.launches = new PreparedLaunches(device, sequence.launches);
    const scratch = packBuffers(sequence.scratch);
    this.#scratch = scratch.offsets;
    this.scratchBytes = scratch.byteLength;
    const zeroed = packBuffers(sequence.zeroed ?? {});
    this.#zeroed = zeroed.offsets;
    this.zeroedBytes = zeroed.byteLength;
    const sizes = Object.entries(sequence.constants).map(([name, bytes]) => [name, bytes.byteLength] as const);
    const constants = packBuffers(Object.fromEntries(sizes));
    this.#constants = device.allocate(constants.byteLength);
    const staging = new Uint8Array(constants.byteLength);
    for (const [name, bytes] of Object.entries(sequence.constants)) {
      const offset = constants.offsets.get(name) as number;
      staging.set(bytes, offset);
      this.#addresses.set(name, this.#constants.pointer + BigInt(offset));
    }
    try {
      copyToDevice(device, this.#constants, staging, device.stream);
      device.stream.hold(staging);
    } catch (error) {
      this.#constants.dispose();
      throw error;
    }
  }

  /**
   * Enqueues the launches.
   *
   * @param operands addresses of the buffers that are neither lent nor constants
   */
  enqueue(
    stream: CudaStream,
    operands: Iterable<readonly [BufferName, bigint]>,
    { scratch, zeros }: LentMemory,
    launched?: () => void,
  ): void {
    const addresses = this.#addresses;
    for (const [name, address] of operands) addresses.set(name, address);
    for (const [name, offset] of this.#scratch) addresses.set(name, scratch + BigInt(offset));
    for (const [name, offset] of this.#zeroed) addresses.set(name, zeros + BigInt(offset));
    this.launches.enqueue(stream, addressIn(addresses), launched);
  }

  /** Makes `stream` wait for the constants' home, and keeps them until its work has ended. */
  useOn(stream: CudaStream): void {
    if (this.#constants.byteLength === 0) return;
    if (stream.capture === undefined) this.#constants.useOn(stream);
    // The plan may end before the graph.
    else stream.capture.retain(this.#constants);
  }

  /**
   * {@link enqueue} with scratch of the stream. A run over the same addresses as earlier ones becomes a graph, which
   * the host launches with one call of the driver.
   *
   * @returns what a capture of the stream keeps of it
   */
  run(stream: CudaStream, operands: readonly (readonly [BufferName, bigint])[]): CapturedRun | undefined {
    this.useOn(stream);
    if (stream.capture !== undefined) return this.#capture(stream, stream.capture, operands);
    this.#withMemory(stream, (lent) => {
      const run = this.#remember(operands, lent);
      if (run.graph === undefined && ++run.runs > RUNS_BEFORE_CAPTURE) {
        run.graph = new CudaGraph(this.device, (capturing) => this.enqueue(capturing, operands, lent));
      }
      if (run.graph === undefined) this.enqueue(stream, operands, lent);
      else run.graph.launch(stream);
    });
    return undefined;
  }

  #capture(
    stream: CudaStream,
    capture: ActiveCapture,
    operands: readonly (readonly [BufferName, bigint])[],
  ): CapturedRun {
    const nodes: bigint[] = [];
    this.#withMemory(capture, (lent) => {
      this.enqueue(stream, operands, lent, () => nodes.push(capture.latestNode));
    });
    const addresses = new Map(this.#addresses);
    const { launches } = this;
    const run: CapturedRun = {
      nodes,
      addresses,
      update: (executable, changed) => launches.update(executable, nodes, addressIn(addresses), changed),
      inputs: [],
    };
    capture.noteRun(run);
    return run;
  }

  #withMemory(lender: Pick<CudaStream, 'withScratch' | 'withZeros'>, use: (lent: LentMemory) => void): void {
    lender.withScratch(this.scratchBytes, (scratch) => {
      lender.withZeros(this.zeroedBytes, (zeros) => use({ scratch, zeros }));
    });
  }

  #remember(operands: readonly (readonly [BufferName, bigint])[], { scratch, zeros }: LentMemory): RememberedRun {
    const remembered = this.#remembered;
    const same = ({ addresses }: RememberedRun) =>
      addresses[0] === scratch &&
      addresses[1] === zeros &&
      operands.every(([, address], i) => addresses[i + 2] === address);
    const at = remembered.map(same).lastIndexOf(true);
    let run = remembered[at];
    if (run !== undefined && at === remembered.length - 1) return run;
    if (run !== undefined) remembered.splice(at, 1);
    run ??= { addresses: [scratch, zeros, ...operands.map(([, address]) => address)], runs: 0 };
    remembered.push(run);
    if (remembered.length > REMEMBERED_RUNS) remembered.shift()?.graph?.dispose();
    return run;
  }

  dispose(): void {
    for (const { graph } of this.#remembered) graph?.dispose();
    this.#remembered.length = 0;
    this.#constants.dispose();
  }
}

const addressIn = (addresses: ReadonlyMap<BufferName, bigint>) => (buffer: BufferName) => {
  const address = addresses.get(buffer);
  if (address === undefined)
    throw new ExecutionError('execution-failed', `a kernel names an unknown buffer '${buffer}'`);
  return address;
};
