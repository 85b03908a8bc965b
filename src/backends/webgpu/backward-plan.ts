/** A backward pass made ready on a device. */
import { type BackwardProblem, gradientOutputs } from '../../attention/backward.ts';
import type { OutputSpec } from '../../attention/outputs.ts';
import { debugPlan } from '../../debug.ts';
import type { OperandLayout } from '../../tensor/tensor.ts';
import type { BackwardInputs, BackwardOutputs, BackwardPlan, KernelChoice, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import type { Forced } from './families/choose.ts';
import { tryGradients } from './gradient-trial.ts';
import { planBackwardLaunches } from './launches/backward.ts';
import { type Built, PlannedProgram } from './planned-program.ts';
import { Program } from './program.ts';
import { rebased } from './run.ts';

/** CPU views are uploaded from their first element on. */
function rebasedBackward(problem: BackwardProblem): BackwardProblem {
  if (problem.attention.location !== 'cpu') return problem;
  const first = (layout: OperandLayout): OperandLayout => ({ ...layout, offset: 0 });
  return {
    ...problem,
    attention: rebased(problem.attention),
    output: first(problem.output),
    dOutput: first(problem.dOutput),
    lseOffset: 0,
  };
}

export class WebgpuBackwardPlan implements BackwardPlan {
  readonly kernel: KernelChoice;
  readonly outputs: readonly OutputSpec[];
  readonly #problem: BackwardProblem;
  readonly #program: PlannedProgram<Built>;

  private constructor(problem: BackwardProblem, kernel: KernelChoice, program: PlannedProgram<Built>) {
    this.#problem = problem;
    this.kernel = kernel;
    this.outputs = gradientOutputs(problem);
    this.#program = program;
  }

  /** @param device gives the backend's present device; a plan of a lost device is built again on the next one */
  static async create(
    problem: BackwardProblem,
    kernel: KernelChoice,
    device: () => Promise<GpuContext>,
    options: Forced,
  ): Promise<WebgpuBackwardPlan> {
    const own = rebasedBackward(problem);
    const program = await PlannedProgram.create(async () => build(await device(), own, kernel, options));
    return new WebgpuBackwardPlan(own, kernel, program);
  }

  /** CPU tensors are read before this returns, unless the plan must first be built for a new device. */
  async run(inputs: BackwardInputs, run: RunContext = {}): Promise<BackwardOutputs> {
    const { q, k, v, attnMask: mask, output, lse, dOutput } = inputs;
    const planned = { location: this.#problem.attention.location, outputs: this.outputs };
    const made = await this.#program.run({ q, k, v, mask, output, lse, dOutput }, planned, run);
    return made as unknown as BackwardOutputs;
  }

  /** Runs under way end first. */
  dispose(): void {
    this.#program.dispose();
  }
}

async function build(
  context: GpuContext,
  problem: BackwardProblem,
  kernel: KernelChoice,
  options: Forced,
): Promise<Built> {
  await tryGradients(context, problem, kernel, options);
  const { launches, sizes, tables, variants } = planBackwardLaunches(context.capabilities, problem, kernel, options);
  const program = await Program.create(context, launches, sizes, tables);
  debugPlan(() => ({
    backend: 'webgpu',
    kernel: kernel.descriptor.name,
    settings: { backwardPrecision: problem.precision, tileOfQueries: variants.query, tileOfKeys: variants.key },
    launches: launches.map(({ label, code, groups }) => ({
      name: label,
      grid: groups,
      language: 'wgsl',
      source: () => code,
    })),
    scratchBytes: Object.values(sizes).reduce((sum, size) => sum + size, 0),
  }));
  return { context, program };
}
