/**
 * Runs of one problem's launches: outputs made, inputs sent where they are needed, everything in the order of streams.
 */
import type { StreamHandle } from '../../../attention/options.ts';
import type { OutputName, Outputs, PlannedOutputs } from '../../../attention/outputs.ts';
import { InvalidArgumentError } from '../../../errors.ts';
import { elementCount, type Tensor, type TensorLocation, type TensorView } from '../../../tensor/tensor.ts';
import type { RunContext } from '../../backend.ts';
import type { CudaDevice } from '../driver/device.ts';
import type { PreparedLaunches } from '../driver/prepared-launches.ts';
import type { CudaStream } from '../driver/stream.ts';
import type { BufferName, LaunchSequence } from '../launches/launch.ts';
import { type CudaTensor, downloadAsync, emptyCudaTensor } from '../tensor.ts';
import { BoundLaunches } from './bound-launches.ts';
import {
  addressOf,
  disposeOutputs,
  type HeldBuffer,
  type Operand,
  ordered,
  requireTensorOn,
  streamOf,
} from './operands.ts';
import { Uploads } from './uploads.ts';

/** Launches with outputs of their own: what plans, prepared keys and captured graphs have in common. */
export class Runner {
  readonly device: CudaDevice;
  readonly #location: TensorLocation;
  readonly #outputs: PlannedOutputs['outputs'];
  /** Undefined where no output has an element. */
  readonly #bound: BoundLaunches | undefined;

  /** @param plan makes the launches; not called when there is nothing to compute */
  constructor(device: CudaDevice, { location, outputs }: PlannedOutputs, plan: () => LaunchSequence) {
    this.device = device;
    this.#location = location;
    this.#outputs = outputs;
    const empty = outputs.every(({ shape }) => elementCount(shape) === 0);
    this.#bound = empty ? undefined : new BoundLaunches(device, plan());
  }

  /** Registers and local memory of each kernel, in order of launch. */
  get kernels(): PreparedLaunches['kernels'] {
    return this.#bound?.launches.kernels ?? [];
  }

  #createOutputs(home: CudaStream): Outputs<CudaTensor> {
    const made: Partial<Record<OutputName, CudaTensor>> = {};
    try {
      for (const { name, shape, dtype } of this.#outputs) {
        made[name] = emptyCudaTensor(this.device, shape, dtype, { stream: home });
      }
      return made;
    } catch (error) {
      disposeOutputs(made);
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
    outputs: Outputs<CudaTensor>,
  ): (readonly [BufferName, bigint])[] {
    return [
      ...operands.map(({ buffer, offset }, i) => [buffer, addressOf(tensors[i] as CudaTensor, offset)] as const),
      ...held.map(({ buffer, memory, byteOffset }) => [buffer, memory.pointer + BigInt(byteOffset)] as const),
      ...Object.entries(outputs).map(([name, { memory }]) => [name, memory.pointer] as const),
    ];
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
  ): Outputs<CudaTensor> {
    const { device } = this;
    const stream = streamOf(device, handle);
    const tensors = this.#tensors(operands);
    const work = (home: CudaStream) => {
      const outputs = this.#createOutputs(home);
      try {
        if (!stream.owned) stream.waitFor(home);
        const captured = this.#bound?.run(stream, this.#addresses(operands, tensors, held, outputs));
        if (captured !== undefined) {
          captured.inputs = operands.map(({ buffer, offset }, i) => ({
            buffer,
            offset,
            tensor: tensors[i] as CudaTensor,
          }));
        }
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

  /**
   * One run over tensors wherever they are; CPU tensors are uploaded, and the outputs read back. CPU tensors have been
   * read when this returns its promise.
   */
  async run(
    operands: readonly Operand[],
    { signal, stream: handle }: RunContext,
    held: readonly HeldBuffer[] = [],
  ): Promise<Outputs<TensorView>> {
    signal?.throwIfAborted();
    if (this.#location !== 'cpu') return this.enqueue(operands, handle, held);
    const { device } = this;
    const stream = streamOf(device, handle);
    if (stream.capture !== undefined) {
      throw new InvalidArgumentError('mixed-locations', 'q', 'CUDA tensors under capture', 'CPU tensors');
    }
    // Uploads belong to a stream that outlives them.
    const home = stream.owned ? stream : device.stream;
    const uploads = new Uploads(device, home);
    let outputs: Outputs<CudaTensor> = {};
    try {
      const there = operands.map((operand) => ({
        ...operand,
        view: uploads.add(operand.argument, operand.view as Tensor),
      }));
      outputs = this.enqueue(there, handle, held);
      uploads.finishReading();
      const read: Partial<Record<OutputName, Tensor>> = {};
      for (const { name } of this.#outputs) {
        // The stream may be disposed between two waits.
        read[name] = await downloadAsync(outputs[name] as CudaTensor, { stream: home.orSuccessor });
      }
      signal?.throwIfAborted();
      return read;
    } finally {
      uploads.dispose();
      disposeOutputs(outputs);
    }
  }

  /** What one run over these tensors is captured from: launches, outputs and addresses. The caller takes them over. */
  prepareCapture(operands: readonly Operand[]): {
    readonly bound: BoundLaunches;
    readonly inputs: readonly CudaTensor[];
    readonly outputs: Outputs<CudaTensor>;
    readonly addresses: readonly (readonly [BufferName, bigint])[];
  } {
    const inputs = this.#tensors(operands);
    const bound = this.#bound ?? new BoundLaunches(this.device, { scratch: {}, constants: {}, launches: [] });
    const outputs = this.#createOutputs(this.device.stream);
    return { bound, inputs, outputs, addresses: this.#addresses(operands, inputs, [], outputs) };
  }

  dispose(): void {
    this.#bound?.dispose();
  }
}
