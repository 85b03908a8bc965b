import { DISPOSE } from '../../../dispose.ts';
import { ExecutionError } from '../../../errors.ts';
import { CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CUDA_SUCCESS } from './api.ts';
import type { CudaDevice } from './device.ts';
import type { CudaStream } from './stream.ts';

/** Work captured once and replayed with one call of the driver. */
export class CudaGraph {
  readonly #device: CudaDevice;
  readonly #executable: bigint;
  readonly #kernels: readonly string[];
  #disposed = false;

  /**
   * Captures what `enqueue` enqueues on the stream that it is given. Nothing runs. It may neither allocate memory nor
   * synchronize, and every address that it uses must stay valid while the graph is replayed.
   */
  constructor(device: CudaDevice, enqueue: (stream: CudaStream) => void) {
    this.#device = device;
    using stream = device.createStream();
    device.call(
      'cuStreamBeginCapture',
      'capturing a graph',
      stream.handle,
      // The caller's other threads may go on using the driver meanwhile.
      CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    );
    let graph: bigint;
    try {
      enqueue(stream);
      graph = this.#endCapture(stream);
    } catch (error) {
      this.#abandonCapture(stream);
      throw error;
    }
    this.#kernels = stream.pendingKernels;
    try {
      this.#executable = device.create('cuGraphInstantiate', 'instantiating a graph', graph, 0);
    } finally {
      device.call('cuGraphDestroy', 'destroying a graph', graph);
    }
  }

  /** A stream that is being captured can be used for nothing else, so the capture ends after an error too. */
  #abandonCapture(stream: CudaStream): void {
    const device = this.#device;
    const graph = new BigUint64Array(1);
    device.release(() => {
      // The capture may have ended already, or be invalid: a status here would hide the error that is on its way.
      const status = device.inContext(() => device.api.cuStreamEndCapture(stream.handle, graph));
      if (status === CUDA_SUCCESS && graph[0] !== 0n) {
        device.call('cuGraphDestroy', 'destroying a graph', graph[0] as bigint);
      }
    });
  }

  #endCapture(stream: CudaStream): bigint {
    const graph = new BigUint64Array(1);
    this.#device.call('cuStreamEndCapture', 'capturing a graph', stream.handle, graph);
    return graph[0] as bigint;
  }

  /** Enqueues a replay. */
  launch(stream: CudaStream = this.#device.stream): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this CUDA graph has been disposed');
    stream.requireUsable();
    this.#device.call('cuGraphLaunch', 'launching a graph', this.#executable, stream.handle);
    for (const kernel of this.#kernels) stream.noteLaunch(kernel);
  }

  /** Replays under way end first. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#device.release(() => this.#device.call('cuGraphExecDestroy', 'destroying a graph', this.#executable));
  }

  [DISPOSE](): void {
    this.dispose();
  }
}
