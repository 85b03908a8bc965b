/** A call made ready for one device: kernels compiled, arguments marshalled, scratch sized. */
import type { StreamHandle } from '../../attention/options.ts';
import type { OutputSpec, Outputs, PlannedOutputs } from '../../attention/outputs.ts';
import { ExecutionError } from '../../errors.ts';
import type { DType } from '../../tensor/dtype.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  BackwardInputs,
  BackwardOutputs,
  KernelChoice,
  Plan,
  RunContext,
} from '../backend.ts';
import type { CudaDevice } from './driver/device.ts';
import type { PreparedLaunches } from './driver/prepared-launches.ts';
import type { LaunchSequence } from './launches/launch.ts';
import type { Operand } from './run/operands.ts';
import { Runner } from './run/runner.ts';
import type { CudaTensor } from './tensor.ts';

export class CudaPlan<
  Inputs = AttentionInputs,
  Made extends Outputs = AttentionOutputs,
  OnDevice extends Outputs<CudaTensor> = AttentionOutputs<CudaTensor>,
> implements Plan<Inputs, Made>
{
  readonly kernel: KernelChoice;
  readonly outputs: readonly OutputSpec[];
  readonly #operandsOf: (inputs: Inputs) => readonly Operand[];
  readonly #runner: Runner;
  readonly #device: CudaDevice;
  #disposed = false;

  /**
   * @param operandsOf the inputs of a call as operands
   * @param plan makes the launches; not called when there is nothing to compute
   */
  constructor(
    device: CudaDevice,
    kernel: KernelChoice,
    planned: PlannedOutputs<DType>,
    operandsOf: (inputs: Inputs) => readonly Operand[],
    plan: () => LaunchSequence,
  ) {
    this.#device = device;
    this.kernel = kernel;
    this.outputs = planned.outputs;
    this.#operandsOf = operandsOf;
    this.#runner = new Runner(device, planned, plan);
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
  enqueue(inputs: Inputs, stream?: StreamHandle): OnDevice {
    this.#requireUsable();
    return this.#runner.enqueue(this.#operandsOf(inputs), stream) as OnDevice;
  }

  /** CPU inputs have been read when this returns its promise. */
  async run(inputs: Inputs, context: RunContext): Promise<Made> {
    this.#requireUsable();
    return (await this.#runner.run(this.#operandsOf(inputs), context)) as Made;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#runner.dispose();
  }
}

/** A backward pass made ready for one device. */
export type CudaBackwardPlan = CudaPlan<BackwardInputs, BackwardOutputs, BackwardOutputs<CudaTensor>>;
