import { DISPOSE } from '../../../dispose.ts';
import { ExecutionError } from '../../../errors.ts';
import { CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CUDA_SUCCESS } from './api.ts';
import type { CudaDevice } from './device.ts';
import type { CudaStream } from './stream.ts';

function beginCapture(device: CudaDevice, stream: CudaStream, mode: number): void {
  device.call('cuStreamBeginCapture', 'capturing a graph', stream.handle, mode);
}

function endCapture(device: CudaDevice, stream: CudaStream): bigint {
  const graph = new BigUint64Array(1);
  device.call('cuStreamEndCapture', 'capturing a graph', stream.handle, graph);
  return graph[0] as bigint;
}

/** A stream that is being captured can be used for nothing else, so the capture ends after an error too. */
function abandonCapture(device: CudaDevice, stream: CudaStream): void {
  const graph = new BigUint64Array(1);
  device.release(() => {
    // The capture may have ended already, or be invalid: a status here would hide the error that is on its way.
    const status = device.inContext(() => device.api.cuStreamEndCapture(stream.handle, graph));
    if (status === CUDA_SUCCESS && graph[0] !== 0n) {
      device.call('cuGraphDestroy', 'destroying a graph', graph[0] as bigint);
    }
  });
}

/** What was captured: a `CUgraph`, and the names of its kernels for the error of a fault. */
export interface CapturedWork {
  readonly graph: bigint;
  readonly kernels: readonly string[];
}

function captureNow(device: CudaDevice, enqueue: (stream: CudaStream) => void): CapturedWork {
  using stream = device.createStream();
  // The caller's other threads may go on using the driver meanwhile.
  beginCapture(device, stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
  try {
    enqueue(stream);
    return { graph: endCapture(device, stream), kernels: stream.pendingKernels };
  } catch (error) {
    abandonCapture(device, stream);
    throw error;
  }
}

/**
 * @internal Captures what is enqueued on a stream until `enqueue` resolves to the kernels' names. Other work of the program goes on
 *     meanwhile, on other streams.
 */
export async function captureWork(
  device: CudaDevice,
  stream: CudaStream,
  enqueue: () => Promise<readonly string[]>,
): Promise<CapturedWork> {
  // Kernels are compiled and memory is allocated meanwhile, which no other mode lets this thread do.
  beginCapture(device, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
  try {
    const kernels = await enqueue();
    return { graph: endCapture(device, stream), kernels };
  } catch (error) {
    abandonCapture(device, stream);
    throw error;
  }
}

/** Work captured once and replayed with one call of the driver. */
export class CudaGraph {
  readonly #device: CudaDevice;
  readonly #executable: bigint;
  /** What was instantiated. Its nodes name those of the executable, for the driver only as long as it lives. */
  readonly #template: bigint;
  readonly #kernels: readonly string[];
  #disposed = false;

  /**
   * Captures what `enqueue` enqueues on the stream that it is given. Nothing runs. It may neither allocate memory nor
   * synchronize, and every address that it uses must stay valid while the graph is replayed.
   */
  constructor(device: CudaDevice, enqueue: ((stream: CudaStream) => void) | CapturedWork) {
    this.#device = device;
    const { graph, kernels } = typeof enqueue === 'function' ? captureNow(device, enqueue) : enqueue;
    this.#kernels = kernels;
    this.#template = graph;
    try {
      this.#executable = device.create('cuGraphInstantiate', 'instantiating a graph', graph, 0);
    } catch (error) {
      this.#destroyTemplate();
      throw error;
    }
  }

  #destroyTemplate(): void {
    const device = this.#device;
    device.release(() => device.call('cuGraphDestroy', 'destroying a graph', this.#template));
  }

  /** @internal The driver's `CUgraphExec`. */
  get executable(): bigint {
    if (this.#disposed) throw new ExecutionError('disposed', 'this CUDA graph has been disposed');
    return this.#executable;
  }

  /** Enqueues a replay. */
  launch(stream: CudaStream = this.#device.stream): void {
    const { executable } = this;
    stream.requireUsable();
    this.#device.call('cuGraphLaunch', 'launching a graph', executable, stream.handle);
    for (const kernel of this.#kernels) stream.noteLaunch(kernel);
  }

  /** Replays under way end first. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#device.release(() => this.#device.call('cuGraphExecDestroy', 'destroying a graph', this.#executable));
    this.#destroyTemplate();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}
