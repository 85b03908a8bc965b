/** A problem made ready for one device: kernels compiled, arguments marshalled, scratch sized. */

import type { StreamHandle } from '../../attention/options.ts';
import { type AttentionProblem, lseShapeOf, outputShapeOf } from '../../attention/problem.ts';
import { ExecutionError, InvalidArgumentError } from '../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import { elementCount, type Tensor, type TensorView } from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice, Plan, RunContext } from '../backend.ts';
import type { CudaDevice } from './driver/device.ts';
import { CudaGraph } from './driver/graph.ts';
import type { DeviceMemory } from './driver/memory.ts';
import { PreparedLaunches } from './driver/prepared-launches.ts';
import { CudaStream } from './driver/stream.ts';
import type { BufferName, LaunchSequence } from './launches/launch.ts';
import {
  type CudaTensor,
  copyToDevice,
  downloadAsync,
  emptyCudaTensor,
  isCudaTensor,
  uploadAsync,
  validateStorage,
} from './tensor.ts';

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

/** The stream of a run: the caller's, or the device's own. */
export function streamOf(device: CudaDevice, handle: StreamHandle | undefined): CudaStream {
  if (handle === undefined) return device.stream;
  if (handle.device !== device.ordinal) {
    throw new InvalidArgumentError(
      'mixed-locations',
      'options.stream',
      `a stream of device ${device.ordinal}, where the tensors are`,
      `one of device ${handle.device}`,
    );
  }
  const stream = handle instanceof CudaStream ? handle : device.streamFromHandle(handle.handle);
  stream.requireUsable();
  if (!stream.owned && stream.isCapturing) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.stream',
      "a stream that is not being captured (use captureAttention of 'sageattention/cuda' for graphs)",
      'one under capture',
    );
  }
  return stream;
}

/** Sets of addresses that a plan remembers: a program that frees what it allocates gets the same ones again. */
const REMEMBERED_RUNS = 4;
/** Runs over the same addresses before they are captured: making a graph takes as long as dozens of launches. */
const RUNS_BEFORE_CAPTURE = 3;

/** A run by its addresses; once it has come often enough, as a graph. */
interface RememberedRun {
  readonly addresses: readonly bigint[];
  runs: number;
  graph?: CudaGraph;
}

/** Launches bound to one device, with their constants there. Runs any number of times, on any stream. */
export class BoundLaunches {
  readonly device: CudaDevice;
  readonly launches: PreparedLaunches;
  readonly scratchBytes: number;
  readonly #scratch: ReadonlyMap<BufferName, number>;
  readonly #constants: DeviceMemory;
  /** Addresses of the run being enqueued; those of the constants stay. */
  readonly #addresses = new Map<BufferName, bigint>();
  /** Latest runs, the one used longest ago first. */
  readonly #remembered: RememberedRun[] = [];

  constructor(device: CudaDevice, sequence: LaunchSequence) {
    this.device = device;
    this.launches = new PreparedLaunches(device, sequence.launches);
    const scratch = packBuffers(sequence.scratch);
    this.#scratch = scratch.offsets;
    this.scratchBytes = scratch.byteLength;
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
   * @param operands addresses of the buffers that are neither scratch nor constants
   * @param scratch address of {@link scratchBytes} bytes
   */
  enqueue(stream: CudaStream, operands: Iterable<readonly [BufferName, bigint]>, scratch: bigint): void {
    const addresses = this.#addresses;
    for (const [name, address] of operands) addresses.set(name, address);
    for (const [name, offset] of this.#scratch) addresses.set(name, scratch + BigInt(offset));
    this.launches.enqueue(stream, addressIn(addresses));
  }

  /** Makes `stream` wait for the constants' home, and keeps them until its work has ended. */
  useOn(stream: CudaStream): void {
    if (this.#constants.byteLength > 0) this.#constants.useOn(stream);
  }

  /**
   * {@link enqueue} with scratch of the stream. A run over the same addresses as earlier ones becomes a graph, which the host
   * launches with one call of the driver.
   */
  run(stream: CudaStream, operands: readonly (readonly [BufferName, bigint])[]): void {
    this.useOn(stream);
    stream.withScratch(this.scratchBytes, (scratch) => {
      const run = this.#remember(operands, scratch);
      if (run.graph === undefined && ++run.runs > RUNS_BEFORE_CAPTURE) {
        run.graph = new CudaGraph(this.device, (capturing) => this.enqueue(capturing, operands, scratch));
      }
      if (run.graph === undefined) this.enqueue(stream, operands, scratch);
      else run.graph.launch(stream);
    });
  }

  #remember(operands: readonly (readonly [BufferName, bigint])[], scratch: bigint): RememberedRun {
    const remembered = this.#remembered;
    const same = ({ addresses }: RememberedRun) =>
      addresses[0] === scratch && operands.every(([, address], i) => addresses[i + 1] === address);
    const at = remembered.map(same).lastIndexOf(true);
    let run = remembered[at];
    if (run !== undefined && at === remembered.length - 1) return run;
    if (run !== undefined) remembered.splice(at, 1);
    run ??= { addresses: [scratch, ...operands.map(([, address]) => address)], runs: 0 };
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

/**
 * Address of element 0 as the kernels count: they add the offset of the problem, and the tensor of this run may lie at
 * another one (an upload leaves out what lies before the view).
 */
export const addressOf = (tensor: CudaTensor, plannedOffset: number): bigint =>
  tensor.memory.pointer + BigInt((tensor.offset - plannedOffset) * BYTES_PER_ELEMENT[tensor.dtype]);

/** Checks that a tensor lies on the device that was planned for, in memory that holds it. */
export function requireTensorOn(device: CudaDevice, argument: string, view: TensorView): CudaTensor {
  if (isCudaTensor(view) && view.memory.device !== device && view.device === device.ordinal) {
    throw new ExecutionError('disposed', `${argument} was lost when ${device} was disposed`);
  }
  if (!isCudaTensor(view) || view.memory.device !== device) {
    const where = isCudaTensor(view) ? `${view.memory.device}` : `location '${view.location}'`;
    throw new InvalidArgumentError('mixed-locations', argument, `a CudaTensor of ${device}`, where);
  }
  validateStorage(argument, view);
  return view;
}

/**
 * Runs `work` on a stream between what its operands wait for and what waits for them. On a caller's own stream the outputs
 * belong to the device's stream, which waits: the caller may destroy his.
 *
 * @param work makes its outputs on the stream `home`
 */
export function ordered<T>(
  stream: CudaStream,
  device: CudaDevice,
  tensors: readonly CudaTensor[],
  work: (home: CudaStream) => T,
): T {
  for (const { memory } of tensors) memory.useOn(stream);
  if (stream.owned) return work(stream);
  const home = device.stream;
  stream.waitFor(home);
  const result = work(home);
  stream.mark();
  home.waitFor(stream);
  return result;
}

/** An input of a run. */
export interface Operand {
  readonly buffer: BufferName;
  /** In the caller's spelling. */
  readonly argument: string;
  readonly view: TensorView;
  /** Offset that the launches were planned with. */
  readonly offset: number;
}

/** Memory of the library's own that a run reads besides its inputs. */
export interface HeldBuffer {
  readonly buffer: BufferName;
  readonly memory: DeviceMemory;
  readonly byteOffset: number;
}

/** The inputs of a call as operands. */
export function operandsOf(problem: AttentionProblem, { q, k, v, attnMask }: AttentionInputs): Operand[] {
  const operands: Operand[] = [
    { buffer: 'q', argument: 'q', view: q, offset: problem.q.offset },
    { buffer: 'k', argument: 'k', view: k, offset: problem.k.offset },
    { buffer: 'v', argument: 'v', view: v, offset: problem.v.offset },
  ];
  return attnMask === undefined ? operands : [...operands, maskOperand(problem, attnMask)];
}

export const maskOperand = (problem: AttentionProblem, view: TensorView): Operand => ({
  buffer: 'mask',
  argument: 'options.attnMask',
  view,
  offset: problem.mask?.offset ?? 0,
});

/** Attention captured into a CUDA graph: one call of the driver replays quantization and attention. */
export class CapturedAttention implements AttentionOutputs<CudaTensor> {
  /** Written by each replay. */
  readonly output: CudaTensor;
  declare readonly lse?: CudaTensor;
  readonly #graph: CudaGraph;
  readonly #inputs: readonly CudaTensor[];
  readonly #scratch: DeviceMemory;
  readonly #bound: BoundLaunches;

  /** @internal */
  constructor(
    bound: BoundLaunches,
    outputs: AttentionOutputs<CudaTensor>,
    inputs: readonly CudaTensor[],
    operands: readonly (readonly [BufferName, bigint])[],
  ) {
    const { device } = bound;
    this.output = outputs.output;
    if (outputs.lse !== undefined) this.lse = outputs.lse;
    this.#inputs = inputs;
    this.#bound = bound;
    this.#scratch = device.allocate(bound.scratchBytes);
    try {
      this.#graph = new CudaGraph(device, (stream) => bound.enqueue(stream, operands, this.#scratch.pointer));
    } catch (error) {
      this.#scratch.dispose();
      throw error;
    }
  }

  /** Enqueues a replay over what the input tensors hold by then. They must not have been disposed. */
  launch(options: { readonly stream?: StreamHandle } = {}): void {
    const { device } = this.#bound;
    const stream = streamOf(device, options.stream);
    const outputs = this.lse === undefined ? [this.output] : [this.output, this.lse];
    this.#bound.useOn(stream);
    this.#scratch.useOn(stream);
    ordered(stream, device, [...this.#inputs, ...outputs], () => this.#graph.launch(stream));
    // Outputs and scratch belong to the device's stream: what reads them there comes after the replay.
    if (stream !== device.stream) device.stream.waitFor(stream);
  }

  /** Frees graph, scratch and outputs. */
  dispose(): void {
    this.#graph.dispose();
    this.#scratch.dispose();
    this.output.memory.dispose();
    this.lse?.memory.dispose();
    this.#bound.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** Launches of one problem with outputs of their own: what plans and prepared keys have in common. */
export class AttentionRunner {
  readonly device: CudaDevice;
  readonly #problem: AttentionProblem;
  /** Undefined for a problem without output elements. */
  readonly #bound: BoundLaunches | undefined;
  readonly #outputShape: readonly number[];
  readonly #lseShape: readonly number[];

  /** @param plan makes the launches; not asked when there is nothing to compute */
  constructor(device: CudaDevice, problem: AttentionProblem, plan: () => LaunchSequence) {
    this.device = device;
    this.#problem = problem;
    this.#outputShape = outputShapeOf(problem);
    this.#lseShape = lseShapeOf(problem);
    this.#bound = elementCount(this.#outputShape) === 0 ? undefined : new BoundLaunches(device, plan());
  }

  /** Registers and local memory of each kernel, in order of launch. */
  get kernels(): PreparedLaunches['kernels'] {
    return this.#bound?.launches.kernels ?? [];
  }

  #createOutputs(home: CudaStream): AttentionOutputs<CudaTensor> {
    const { device } = this;
    const output = emptyCudaTensor(device, this.#outputShape, this.#problem.dtype, { stream: home });
    if (!this.#problem.returnLse) return { output };
    try {
      return { output, lse: emptyCudaTensor(device, this.#lseShape, 'float32', { stream: home }) };
    } catch (error) {
      output.memory.dispose();
      throw error;
    }
  }

  /** Checks the operands, and gives them as CUDA tensors. */
  #tensors(operands: readonly Operand[]): CudaTensor[] {
    return operands.map(({ argument, view }) => requireTensorOn(this.device, argument, view));
  }

  #addresses(
    operands: readonly Operand[],
    tensors: readonly CudaTensor[],
    held: readonly HeldBuffer[],
    { output, lse }: AttentionOutputs<CudaTensor>,
  ): (readonly [BufferName, bigint])[] {
    const addresses: (readonly [BufferName, bigint])[] = operands.map(({ buffer, offset }, i) => [
      buffer,
      addressOf(tensors[i] as CudaTensor, offset),
    ]);
    for (const { buffer, memory, byteOffset } of held) addresses.push([buffer, memory.pointer + BigInt(byteOffset)]);
    addresses.push(['output', output.memory.pointer]);
    if (lse !== undefined) addresses.push(['lse', lse.memory.pointer]);
    return addresses;
  }

  /**
   * Enqueues one run over CUDA tensors and returns at once; the outputs are ready in the stream's order.
   *
   * @throws {CudaError} a call of the driver failed; nothing was produced
   */
  enqueue(
    operands: readonly Operand[],
    handle: StreamHandle | undefined,
    held: readonly HeldBuffer[] = [],
  ): AttentionOutputs<CudaTensor> {
    const { device } = this;
    const stream = streamOf(device, handle);
    const tensors = this.#tensors(operands);
    const work = (home: CudaStream) => {
      const outputs = this.#createOutputs(home);
      if (!stream.owned) stream.waitFor(home);
      try {
        this.#bound?.run(stream, this.#addresses(operands, tensors, held, outputs));
      } catch (error) {
        disposeOutputs(outputs);
        throw error;
      }
      return outputs;
    };
    // The context is made current once for all calls of the driver.
    return device.inContext(() => {
      for (const { memory } of held) memory.useOn(stream);
      return ordered(stream, device, tensors, work);
    });
  }

  /** One run over tensors wherever they are; CPU tensors are uploaded, and the outputs read back. */
  async run(
    operands: readonly Operand[],
    { signal, stream: handle }: RunContext,
    held: readonly HeldBuffer[] = [],
  ): Promise<AttentionOutputs> {
    signal?.throwIfAborted();
    if (this.#problem.location !== 'cpu') return this.enqueue(operands, handle, held);
    const { device } = this;
    const stream = streamOf(device, handle);
    // Uploads belong to a stream that outlives them.
    const home = stream.owned ? stream : device.stream;
    const sent = new Map<TensorView, { readonly tensor: CudaTensor; readonly done: Promise<unknown> }>();
    let outputs: AttentionOutputs<CudaTensor> | undefined;
    try {
      const there = operands.map((operand) => {
        // One array of keys and values, as in self-attention over shared storage, travels once.
        const upload = sent.get(operand.view) ?? uploadAsync(operand.view as Tensor, device, { stream: home });
        sent.set(operand.view, upload);
        return { ...operand, view: upload.tensor };
      });
      outputs = this.enqueue(there, handle, held);
      // The caller's arrays are read until the uploads have ended.
      await Promise.all([...sent.values()].map(({ done }) => done));
      const output = await downloadAsync(outputs.output, { stream: home });
      const lse = outputs.lse === undefined ? undefined : await downloadAsync(outputs.lse, { stream: home });
      signal?.throwIfAborted();
      return lse === undefined ? { output } : { output, lse };
    } finally {
      await Promise.allSettled([...sent.values()].map(({ done }) => done));
      for (const { tensor } of sent.values()) tensor.memory.dispose();
      if (outputs !== undefined) disposeOutputs(outputs);
    }
  }

  /** Captures one run over these tensors. The graph has scratch and outputs of its own, and takes the launches over. */
  capture(operands: readonly Operand[]): CapturedAttention {
    const tensors = this.#tensors(operands);
    const outputs = this.#createOutputs(this.device.stream);
    try {
      const bound = this.#bound ?? new BoundLaunches(this.device, { scratch: {}, constants: {}, launches: [] });
      return new CapturedAttention(bound, outputs, tensors, this.#addresses(operands, tensors, [], outputs));
    } catch (error) {
      disposeOutputs(outputs);
      throw error;
    }
  }

  dispose(): void {
    this.#bound?.dispose();
  }
}

function disposeOutputs({ output, lse }: AttentionOutputs<CudaTensor>): void {
  output.memory.dispose();
  lse?.memory.dispose();
}

export class CudaPlan implements Plan {
  readonly kernel: KernelChoice;
  readonly #problem: AttentionProblem;
  readonly #runner: AttentionRunner;
  readonly #device: CudaDevice;
  #disposed = false;

  constructor(device: CudaDevice, problem: AttentionProblem, kernel: KernelChoice, plan: () => LaunchSequence) {
    this.#device = device;
    this.kernel = kernel;
    this.#problem = problem;
    this.#runner = new AttentionRunner(device, problem, plan);
  }

  get ended(): boolean {
    return this.#disposed || this.#device.disposed;
  }

  /** Registers and local memory of each kernel, in order of launch. */
  get kernels(): PreparedLaunches['kernels'] {
    return this.#runner.kernels;
  }

  #requireUsable(): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this CUDA plan has been disposed');
  }

  /**
   * Enqueues one run over CUDA tensors and returns at once; the outputs are ready in the stream's order.
   *
   * @throws {CudaError} a call of the driver failed; nothing was produced
   */
  enqueue(inputs: AttentionInputs, stream?: StreamHandle): AttentionOutputs<CudaTensor> {
    this.#requireUsable();
    return this.#runner.enqueue(operandsOf(this.#problem, inputs), stream);
  }

  async run(inputs: AttentionInputs, context: RunContext): Promise<AttentionOutputs> {
    this.#requireUsable();
    return this.#runner.run(operandsOf(this.#problem, inputs), context);
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#runner.dispose();
  }
}
