/** A backward pass made ready for one device. */
import { type BackwardProblem, gradientOutputs } from '../../attention/backward.ts';
import type { StreamHandle } from '../../attention/options.ts';
import type { OutputSpec } from '../../attention/outputs.ts';
import { ExecutionError } from '../../errors.ts';
import type { BackwardInputs, BackwardOutputs, BackwardPlan, KernelChoice, RunContext } from '../backend.ts';
import type { CudaDevice } from './driver/device.ts';
import type { PreparedLaunches } from './driver/prepared-launches.ts';
import type { LaunchSequence } from './launches/launch.ts';
import { backwardOperandsOf } from './run/operands.ts';
import { Runner } from './run/runner.ts';
import type { CudaTensor } from './tensor.ts';

export class CudaBackwardPlan implements BackwardPlan {
  readonly kernel: KernelChoice;
  readonly outputs: readonly OutputSpec[];
  readonly #problem: BackwardProblem;
  readonly #runner: Runner;
  readonly #device: CudaDevice;
  #disposed = false;

  constructor(device: CudaDevice, problem: BackwardProblem, kernel: KernelChoice, plan: () => LaunchSequence) {
    this.#device = device;
    this.kernel = kernel;
    this.#problem = problem;
    this.outputs = gradientOutputs(problem);
    const { location } = problem.attention;
    this.#runner = new Runner(device, { location, outputs: this.outputs }, plan);
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
   * Enqueues one run over CUDA tensors and returns at once; the gradients are ready in the stream's order.
   *
   * @throws {CudaError} a call of the driver failed; nothing was produced
   */
  enqueue(inputs: BackwardInputs, stream?: StreamHandle): BackwardOutputs<CudaTensor> {
    this.#requireUsable();
    return this.#runner.enqueue(backwardOperandsOf(this.#problem, inputs), stream) as BackwardOutputs<CudaTensor>;
  }

  /** CPU inputs have been read when this returns its promise. */
  async run(inputs: BackwardInputs, context: RunContext): Promise<BackwardOutputs> {
    this.#requireUsable();
    return (await this.#runner.run(backwardOperandsOf(this.#problem, inputs), context)) as BackwardOutputs;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#runner.dispose();
  }
}
