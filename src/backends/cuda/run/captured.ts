import type { StreamHandle } from '../../../attention/options.ts';
import type { Outputs } from '../../../attention/outputs.ts';
import { DISPOSE } from '../../../dispose.ts';
import type { AttentionOutputs } from '../../backend.ts';
import { CudaGraph } from '../driver/graph.ts';
import type { DeviceMemory } from '../driver/memory.ts';
import type { CudaTensor } from '../tensor.ts';
import type { BoundLaunches } from './bound-launches.ts';
import { disposeOutputs, type Operand, ordered, streamOf } from './operands.ts';
import type { Runner } from './runner.ts';

/** Attention captured into a CUDA graph: one call of the driver replays quantization and attention. */
export class CapturedAttention implements AttentionOutputs<CudaTensor> {
  /** Written by each replay. */
  readonly output: CudaTensor;
  declare readonly lse?: CudaTensor;
  readonly #graph: CudaGraph;
  readonly #inputs: readonly CudaTensor[];
  readonly #outputs: Outputs<CudaTensor>;
  readonly #scratch: DeviceMemory;
  readonly #bound: BoundLaunches;

  /** @internal Takes the launches of `runner` over: they are disposed with the graph. */
  constructor(runner: Runner, operands: readonly Operand[]) {
    const { bound, inputs, outputs, addresses } = runner.prepareCapture(operands);
    const { device } = bound;
    const { output, lse } = outputs as AttentionOutputs<CudaTensor>;
    this.output = output;
    if (lse !== undefined) this.lse = lse;
    this.#outputs = outputs;
    this.#inputs = inputs;
    this.#bound = bound;
    let scratch: DeviceMemory | undefined;
    try {
      // Zeros behind scratch: each replay leaves them as it found them.
      const memory = device.allocate(bound.scratchBytes + bound.zeroedBytes);
      scratch = memory;
      this.#scratch = memory;
      const zeros = memory.pointer + BigInt(bound.scratchBytes);
      if (bound.zeroedBytes > 0) {
        const what = 'clearing device memory';
        device.call('cuMemsetD8Async', what, zeros, 0, bound.zeroedBytes, device.stream.handle);
      }
      this.#graph = new CudaGraph(device, (stream) =>
        bound.enqueue(stream, addresses, { scratch: memory.pointer, zeros }),
      );
    } catch (error) {
      scratch?.dispose();
      disposeOutputs(outputs);
      throw error;
    }
  }

  /** Enqueues a replay over what the input tensors hold by then. They must not have been disposed. */
  launch(options: { readonly stream?: StreamHandle } = {}): void {
    const { device } = this.#bound;
    const stream = streamOf(device, options.stream);
    this.#bound.useOn(stream);
    this.#scratch.useOn(stream);
    ordered(stream, device, [...this.#inputs, ...Object.values(this.#outputs)], () => this.#graph.launch(stream));
    // Outputs and scratch belong to the device's stream: what reads them there comes after the replay.
    if (stream !== device.stream) device.stream.waitFor(stream);
  }

  /** Frees graph, scratch and outputs. */
  dispose(): void {
    this.#graph.dispose();
    this.#scratch.dispose();
    disposeOutputs(this.#outputs);
    this.#bound.dispose();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}
