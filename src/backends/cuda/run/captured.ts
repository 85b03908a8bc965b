import type { StreamHandle } from '../../../attention/options.ts';
import { DISPOSE } from '../../../dispose.ts';
import type { AttentionOutputs } from '../../backend.ts';
import { CudaGraph } from '../driver/graph.ts';
import type { DeviceMemory } from '../driver/memory.ts';
import type { CudaTensor } from '../tensor.ts';
import type { BoundLaunches } from './bound-launches.ts';
import { attentionOutputs, disposeOutputs, type Operand, ordered, streamOf } from './operands.ts';
import type { Runner } from './runner.ts';

/** Attention captured into a CUDA graph: one call of the driver replays quantization and attention. */
export class CapturedAttention implements AttentionOutputs<CudaTensor> {
  /** Written by each replay. */
  readonly output: CudaTensor;
  declare readonly lse?: CudaTensor;
  readonly #graph: CudaGraph;
  readonly #inputs: readonly CudaTensor[];
  readonly #scratch: DeviceMemory;
  readonly #bound: BoundLaunches;

  /** @internal Takes the launches of `runner` over: they are disposed with the graph. */
  constructor(runner: Runner, operands: readonly Operand[]) {
    const { bound, inputs, outputs: made, addresses } = runner.prepareCapture(operands);
    const { device } = bound;
    const outputs = attentionOutputs(made);
    this.output = outputs.output;
    if (outputs.lse !== undefined) this.lse = outputs.lse;
    this.#inputs = inputs;
    this.#bound = bound;
    let scratch: DeviceMemory | undefined;
    try {
      const memory = device.allocate(bound.scratchBytes);
      scratch = memory;
      this.#scratch = memory;
      this.#graph = new CudaGraph(device, (stream) => bound.enqueue(stream, addresses, memory.pointer));
    } catch (error) {
      scratch?.dispose();
      disposeOutputs(made);
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

  [DISPOSE](): void {
    this.dispose();
  }
}
