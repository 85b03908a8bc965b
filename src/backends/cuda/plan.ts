/** A problem made ready for one device: kernels compiled, arguments marshalled, scratch sized. */
import type { StreamHandle } from '../../attention/options.ts';
import { attentionOutputs, type OutputSpec } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice, Plan, RunContext } from '../backend.ts';
import type { CudaDevice } from './driver/device.ts';
import type { PreparedLaunches } from './driver/prepared-launches.ts';
import type { LaunchSequence } from './launches/launch.ts';
import { operandsOf } from './run/operands.ts';
import { Runner } from './run/runner.ts';
import type { CudaTensor } from './tensor.ts';

export class CudaPlan implements Plan {
  readonly kernel: KernelChoice;
  readonly outputs: readonly OutputSpec[];
  readonly #problem: AttentionProblem;
  readonly #runner: Runner;
  readonly #device: CudaDevice;
  #disposed = false;

  constructor(device: CudaDevice, problem: AttentionProblem, kernel: KernelChoice, plan: () => LaunchSequence) {
    this.#device = device;
    this.kernel = kernel;
    this.#problem = problem;
    this.outputs = attentionOutputs(problem);
    this.#runner = new Runner(device, { location: problem.location, outputs: this.outputs }, plan);
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
    return this.#runner.enqueue(operandsOf(this.#problem, inputs), stream) as AttentionOutputs<CudaTensor>;
  }

  /** CPU inputs have been read when this returns its promise. */
  async run(inputs: AttentionInputs, context: RunContext): Promise<AttentionOutputs> {
    this.#requireUsable();
    return (await this.#runner.run(operandsOf(this.#problem, inputs), context)) as AttentionOutputs;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#runner.dispose();
  }
}
