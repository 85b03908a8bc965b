/** Any number of calls, and launches of the caller's own, captured into one CUDA graph. */
import type { StreamHandle } from '../../../attention/options.ts';
import { DISPOSE } from '../../../dispose.ts';
import { ExecutionError, InvalidArgumentError, UnsupportedOptionError } from '../../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import type { CudaDevice } from '../driver/device.ts';
import { CudaGraph, captureWork } from '../driver/graph.ts';
import type { DeviceMemory } from '../driver/memory.ts';
import type { ActiveCapture, CapturedInput, CapturedRun, CudaStream } from '../driver/stream.ts';
import { type CudaTensor, isCudaTensor } from '../tensor.ts';
import { withCapturingStream } from './capturing-stream.ts';
import { addressOf, ordered, requireTensorOn, streamOf } from './operands.ts';

interface Block {
  readonly pointer: bigint;
  readonly byteLength: number;
  free: boolean;
}

/** The capture of a stream: memory and launches that its graph needs. */
class StreamCapture implements ActiveCapture {
  readonly device: CudaDevice;
  readonly stream: CudaStream;
  readonly inputs = new Set<DeviceMemory>();
  readonly runs: CapturedRun[] = [];
  readonly kernels = new Set<string>();
  readonly #blocks: Block[] = [];
  readonly #owned = new Set<DeviceMemory>();
  readonly #retained = new Map<DeviceMemory, () => void>();
  #active = true;
  /** Calls of the capture run in order, and each leaves them as it found them. */
  #zeros = { pointer: 0n, byteLength: 0 };

  constructor(device: CudaDevice, stream: CudaStream) {
    this.device = device;
    this.stream = stream;
  }

  /** The smallest block that earlier calls of the capture have given back, or a new one. What is captured runs in order. */
  allocate(byteLength: number): bigint {
    if (byteLength === 0) return 0n;
    const fitting = this.#blocks.filter((block) => block.free && block.byteLength >= byteLength);
    const smallest = fitting.sort((a, b) => a.byteLength - b.byteLength)[0];
    // A block much larger than what is asked for would be missed by who asks for more.
    if (smallest !== undefined && smallest.byteLength <= 2 * byteLength) {
      smallest.free = false;
      return smallest.pointer;
    }
    const { memoryPool, stream } = this.device;
    const pointer = memoryPool.allocate(byteLength, stream.handle);
    this.#blocks.push({ pointer, byteLength, free: false });
    return pointer;
  }

  giveBack(pointer: bigint): void {
    const block = this.#blocks.find((one) => one.pointer === pointer);
    if (block !== undefined && this.#active) block.free = true;
  }

  withScratch(byteLength: number, enqueue: (pointer: bigint) => void): void {
    const pointer = this.allocate(byteLength);
    try {
      enqueue(pointer);
    } finally {
      this.giveBack(pointer);
    }
  }

  withZeros(byteLength: number, enqueue: (pointer: bigint) => void): void {
    if (byteLength > this.#zeros.byteLength) {
      const { device } = this;
      const pointer = device.memoryPool.allocate(byteLength, device.stream.handle);
      // Never given back to the capture's other calls, and cleared once: on a stream that is not captured.
      this.#blocks.push({ pointer, byteLength, free: false });
      device.call('cuMemsetD8Async', 'clearing device memory', pointer, 0, byteLength, device.stream.handle);
      this.#zeros = { pointer, byteLength };
    }
    enqueue(byteLength === 0 ? 0n : this.#zeros.pointer);
  }

  use(memory: DeviceMemory): void {
    this.inputs.add(memory);
  }

  own(memory: DeviceMemory): void {
    this.#owned.add(memory);
  }

  retain(memory: DeviceMemory): void {
    if (!this.#retained.has(memory)) this.#retained.set(memory, memory.retain());
  }

  noteLaunch(kernel: string): void {
    this.kernels.add(kernel);
  }

  noteRun(run: CapturedRun): void {
    this.runs.push(run);
  }

  /** 0n where the driver cannot tell: the buffers of such a graph stay as they are. */
  get latestNode(): bigint {
    const { api } = this.device;
    if (!api.has('cuStreamGetCaptureInfo')) return 0n;
    const status = new Int32Array(1);
    const [id, graph, nodes, edges, count] = Array.from({ length: 5 }, () => new BigUint64Array(1)) as [
      BigUint64Array,
      BigUint64Array,
      BigUint64Array,
      BigUint64Array,
      BigUint64Array,
    ];
    const what = 'reading the state of a capture';
    const { handle } = this.stream;
    this.device.call('cuStreamGetCaptureInfo', what, handle, status, id, graph, nodes, edges, count);
    if (count[0] !== 1n) return 0n;
    const bytes = api.bytesAt(nodes[0] as bigint, 8);
    return new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  }

  /** The stream runs again, and outputs may be read. */
  end(): void {
    this.#active = false;
    this.stream.capture = undefined;
    for (const memory of this.#owned) memory.settle();
  }

  /** Gives all memory back, behind what the device's stream holds. */
  dispose(): void {
    for (const memory of this.#owned) memory.dispose();
    for (const release of this.#retained.values()) release();
    this.#retained.clear();
    const { device } = this;
    device.release(() => {
      for (const { pointer } of this.#blocks.splice(0)) device.memoryPool.free(pointer, device.stream.handle);
    });
  }
}

/** Calls captured into a CUDA graph; each launch replays them over what their inputs hold by then. */
export class CapturedCalls<T = void> {
  /** What the captured function resolved to. Tensors of it are written by each launch, and are the graph's. */
  readonly result: T;
  readonly #device: CudaDevice;
  readonly #graph: CudaGraph;
  readonly #capture: StreamCapture;

  /** @internal Use {@link capture}. */
  constructor(graph: CudaGraph, capture: StreamCapture, result: T) {
    this.#device = capture.device;
    this.#graph = graph;
    this.#capture = capture;
    this.result = result;
  }

  /**
   * Enqueues a replay and returns at once.
   *
   * @throws {ExecutionError} `disposed`, when a tensor that the calls read has been disposed, or a cache has grown since
   */
  launch(options: { readonly stream?: StreamHandle } = {}): void {
    const device = this.#device;
    const stream = streamOf(device, options.stream);
    stream.requireRunning();
    const inputs = [...this.#capture.inputs].map((memory) => ({ memory }) as CudaTensor);
    stream.waitFor(device.stream);
    ordered(stream, device, inputs, () => this.#graph.launch(stream));
    // The graph's memory belongs to the device's stream: what reads or frees it there comes after the replay.
    if (stream !== device.stream) device.stream.waitFor(stream);
  }

  /**
   * Lets captured calls read another tensor from the next launch on, without capturing again: calls that were given `tensor`, by the same
   * view. Launches of the caller's own keep their buffers.
   *
   * @param replacement of the same device, dtype, shape, strides and alignment
   * @throws {InvalidArgumentError} when no captured call reads `tensor`, or the replacement is another kind of tensor
   * @throws {UnsupportedOptionError} when the driver is older than CUDA 12.3
   */
  replace(tensor: CudaTensor, replacement: CudaTensor): void {
    const device = this.#device;
    const { executable } = this.#graph;
    if (!isCudaTensor(tensor))
      throw new InvalidArgumentError('mixed-locations', 'tensor', 'a CudaTensor', typeof tensor);
    requireTensorOn(device, 'replacement', replacement);
    requireAlike(tensor, replacement);
    const reads = ({ tensor: read }: CapturedInput) => sameView(read as CudaTensor, tensor);
    const runs = this.#capture.runs.filter(({ inputs }) => inputs.some(reads));
    if (runs.length === 0) {
      throw new InvalidArgumentError('invalid-option', 'tensor', 'an input of a captured call', `[${tensor.shape}]`);
    }
    if (!device.api.has('cuGraphExecKernelNodeSetParams') || runs.some(({ nodes }) => nodes.includes(0n))) {
      throw new UnsupportedOptionError('capture', 'replacement', 'a driver of CUDA 12.3', 'an older one');
    }
    if (replacement.memory.disposed) throw new ExecutionError('disposed', 'replacement has been disposed');
    for (const run of runs) {
      const changed = new Set<string>();
      for (const input of run.inputs.filter(reads)) {
        changed.add(input.buffer);
        run.addresses.set(input.buffer, addressOf(replacement, input.offset));
      }
      run.update(executable, changed);
      run.inputs = run.inputs.map((input) => (reads(input) ? { ...input, tensor: replacement } : input));
    }
    const { inputs } = this.#capture;
    const stillRead = this.#capture.runs.some((run) =>
      run.inputs.some((input) => input.tensor.memory === tensor.memory),
    );
    if (!stillRead) inputs.delete(tensor.memory);
    inputs.add(replacement.memory);
  }

  /** Frees the graph and its memory, behind what has been launched. */
  dispose(): void {
    this.#graph.dispose();
    this.#capture.dispose();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

const startOf = ({ memory, offset, dtype }: CudaTensor) => memory.pointer + BigInt(offset * BYTES_PER_ELEMENT[dtype]);
const layoutOf = ({ dtype, shape, strides }: CudaTensor) => `${dtype} [${shape}] of strides [${strides}]`;

const sameView = (a: CudaTensor, b: CudaTensor) =>
  a.memory === b.memory && a.offset === b.offset && layoutOf(a) === layoutOf(b);

/** What kernels were chosen for must hold of the replacement, too. */
function requireAlike(tensor: CudaTensor, replacement: CudaTensor): void {
  const [expected, received] = [layoutOf(tensor), layoutOf(replacement)];
  if (expected !== received) throw new InvalidArgumentError('invalid-shape', 'replacement', expected, received);
  const [from, to] = [startOf(tensor) % 16n, startOf(replacement) % 16n];
  if (from !== to) {
    throw new InvalidArgumentError('invalid-strides', 'replacement', `an address of 16 n + ${from}`, `16 n + ${to}`);
  }
}

/**
 * Captures into one CUDA graph what `calls` enqueues: calls of this library over CUDA tensors, which take `stream` by themselves, and launches
 * of the caller's own on `stream`. Nothing runs until {@link CapturedCalls.launch}; outputs of the calls are the
 * graph's. CPU tensors, copies from and to the host, appends to a cache and synchronizing are refused.
 *
 * @param stream one of the caller's own: not the device's, which other calls go on using
 * @throws {SageAttentionError} what a call in it throws; nothing is left of the capture then
 */
export async function captureCalls<T>(
  device: CudaDevice,
  stream: CudaStream,
  calls: () => Promise<T>,
): Promise<CapturedCalls<T>> {
  if (stream === device.stream) {
    throw new InvalidArgumentError('invalid-option', 'stream', 'a stream of your own', "the device's own stream");
  }
  stream.requireRunning();
  // What waits for this stream meanwhile waits for the work before the capture.
  stream.mark();
  const capture = new StreamCapture(device, stream);
  let result: { readonly value: T } | undefined;
  try {
    const work = await captureWork(device, stream, async () => {
      stream.capture = capture;
      result = { value: await withCapturingStream(stream, calls) };
      stream.capture = undefined;
      return [...capture.kernels];
    });
    const graph = new CudaGraph(device, work);
    capture.end();
    return new CapturedCalls(graph, capture, (result as unknown as { readonly value: T }).value);
  } catch (error) {
    capture.end();
    capture.dispose();
    throw error;
  }
}
