/** Choosing the blocks of calls of one shape, made ready on a device. */
import { fractionsOfLines } from '../../attention/block-choice.ts';
import { blockMapOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { SettledSparsity } from '../../attention/sparsity.ts';
import type { Tensor, TensorView } from '../../tensor/tensor.ts';
import type { BlockMap, BlockMapInputs, BlockMapPlan, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import { planBlockMapLaunches } from './launches/block-map.ts';
import { type Built, PlannedProgram } from './planned-program.ts';
import { Program } from './program.ts';
import { rebased } from './run.ts';
import { downloadTensor, isGpuTensor } from './tensor.ts';

export class WebgpuBlockMapPlan implements BlockMapPlan {
  readonly #problem: AttentionProblem;
  readonly #program: PlannedProgram<Built>;

  private constructor(problem: AttentionProblem, program: PlannedProgram<Built>) {
    this.#problem = problem;
    this.#program = program;
  }

  /** @param device gives the backend's present device; a plan of a lost device is built again on the next one */
  static async create(
    problem: AttentionProblem,
    sparsity: SettledSparsity,
    device: () => Promise<GpuContext>,
  ): Promise<WebgpuBlockMapPlan> {
    const own = rebased(problem);
    const program = await PlannedProgram.create(async () => {
      const context = await device();
      const { launches, sizes, tables } = planBlockMapLaunches(context.capabilities, own, sparsity);
      return { context, program: await Program.create(context, launches, sizes, tables) };
    });
    return new WebgpuBlockMapPlan(own, program);
  }

  /** CPU tensors are read before this returns, unless the plan must first be built for a new device. */
  async run({ q, k, attnMask }: BlockMapInputs, run: RunContext): Promise<BlockMap> {
    const planned = { location: this.#problem.location, outputs: blockMapOutputs(this.#problem) };
    const made = await this.#program.run({ q, k, mask: attnMask }, planned, run);
    const { device } = this.#program.built.context;
    const [map, lines] = [made.map as TensorView, made.lines as TensorView];
    const free = (...tensors: readonly TensorView[]) => {
      for (const tensor of tensors) if (isGpuTensor(tensor)) tensor.dispose();
    };
    return {
      map,
      fractions: async () => {
        const read = isGpuTensor(lines) ? await downloadTensor(device, lines) : (lines as Tensor);
        free(lines);
        return fractionsOfLines(read.data as Float32Array);
      },
      dispose: () => free(map, lines),
    };
  }

  /** Runs under way end first. */
  dispose(): void {
    this.#program.dispose();
  }
}
