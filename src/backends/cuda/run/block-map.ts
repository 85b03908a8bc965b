/** Chooses the blocks of calls of one shape on one device. */
import { fractionsOfLines } from '../../../attention/block-choice.ts';
import { blockMapOutputs } from '../../../attention/outputs.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import { ExecutionError } from '../../../errors.ts';
import type { Tensor, TensorView } from '../../../tensor/tensor.ts';
import type { BlockMap, BlockMapInputs, BlockMapPlan, RunContext } from '../../backend.ts';
import type { CudaDevice } from '../driver/device.ts';
import type { LaunchSequence } from '../launches/launch.ts';
import { downloadAsync, isCudaTensor } from '../tensor.ts';
import { sideOperands } from './operands.ts';
import { Runner } from './runner.ts';

export class CudaBlockMapPlan implements BlockMapPlan {
  readonly #problem: AttentionProblem;
  readonly #device: CudaDevice;
  readonly #runner: Runner;
  #disposed = false;

  /** @param plan makes the launches; not called when there is nothing to choose */
  constructor(device: CudaDevice, problem: AttentionProblem, plan: () => LaunchSequence) {
    this.#device = device;
    this.#problem = problem;
    this.#runner = new Runner(device, { location: problem.location, outputs: blockMapOutputs(problem) }, plan);
  }

  get ended(): boolean {
    return this.#disposed || this.#device.disposed;
  }

  async run({ q, k, attnMask }: BlockMapInputs, context: RunContext): Promise<BlockMap> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this plan of blocks has been disposed');
    const operands = [
      { buffer: 'q', argument: 'q', view: q, offset: this.#problem.q.offset },
      { buffer: 'k', argument: 'k', view: k, offset: this.#problem.k.offset },
      ...sideOperands(this.#problem, attnMask === undefined ? {} : { attnMask }),
    ];
    const made = await this.#runner.run(operands, context);
    const [map, lines] = [made.map as TensorView, made.lines as TensorView];
    return {
      map,
      fractions: async () => {
        const read = isCudaTensor(lines) ? await downloadAsync(lines) : (lines as Tensor);
        if (isCudaTensor(lines)) lines.dispose();
        return fractionsOfLines(read.data as Float32Array);
      },
      dispose: () => {
        for (const tensor of [map, lines]) if (isCudaTensor(tensor)) tensor.dispose();
      },
    };
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#runner.dispose();
  }
}
