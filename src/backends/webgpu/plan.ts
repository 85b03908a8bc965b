/** A problem made ready on a device: kernels chosen, launches bound; encoding and running it. */

import { attentionOutputs, type OutputName, type OutputSpec, type Outputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { debugPlan } from '../../debug.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { isContiguous } from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice, Plan, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import type { Forced } from './families/choose.ts';
import type { Family } from './families/names.ts';
import { planLaunches } from './launches/plan.ts';
import { tryShapes } from './matrix-trial.ts';
import { type Built, PlannedProgram } from './planned-program.ts';
import { type EncodeOptions, Program, type RecordedBuffers } from './program.ts';
import { rebased } from './run.ts';
import type { Buffers } from './scratch.ts';
import { emptyGpuTensor, type GpuTensor, isGpuTensor, validateBuffer } from './tensor.ts';

/** What was chosen and built for a plan; shown by `doctor`, benches and tests. */
export interface PlanDetails {
  readonly family: Family;
  readonly variant: string;
  readonly adapter: string;
  /** Dispatches of one run, in order, by name. */
  readonly launches: readonly string[];
  readonly keySplits: number;
  /** Scratch of a run, out of memory that all plans of a device share. */
  readonly scratchBytes: number;
  /** Wall time that this plan waited for pipelines, milliseconds; 0 when all were cached. */
  readonly compileMilliseconds: number;
}

interface BuiltPlan extends Built {
  readonly details: PlanDetails;
}

/** A plan of this backend: `Plan` with recording into the caller's encoder. */
export class WebgpuPlan implements Plan {
  readonly kernel: KernelChoice;
  readonly outputs: readonly OutputSpec[];
  readonly #problem: AttentionProblem;
  readonly #program: PlannedProgram<BuiltPlan>;

  private constructor(problem: AttentionProblem, kernel: KernelChoice, program: PlannedProgram<BuiltPlan>) {
    this.#problem = problem;
    this.outputs = attentionOutputs(problem);
    this.kernel = kernel;
    this.#program = program;
  }

  /** @param device gives the backend's present device; a plan of a lost device is built again on the next one */
  static async create(
    problem: AttentionProblem,
    kernel: KernelChoice,
    device: () => Promise<GpuContext>,
    options: Forced,
  ): Promise<WebgpuPlan> {
    const own = rebased(problem);
    const program = await PlannedProgram.create(async () => build(await device(), own, kernel, options));
    return new WebgpuPlan(own, kernel, program);
  }

  /** Family, tiles, launches and compile time of this plan. */
  get details(): PlanDetails {
    return this.#program.built.details;
  }

  /** CPU tensors are read before this returns, unless the plan must first be built for a new device. */
  async run({ q, k, v, attnMask, sinks, blockMap }: AttentionInputs, run: RunContext = {}): Promise<AttentionOutputs> {
    const planned = { location: this.#problem.location, outputs: this.outputs };
    const made = await this.#program.run({ q, k, v, mask: attnMask, sinks, blockMap }, planned, run);
    return made as unknown as AttentionOutputs;
  }

  /**
   * Records the run into the caller's command encoder; nothing is submitted, read back or waited for. With `outputs`
   * and buffers used lately, nothing is allocated but, the first time, scratch of the plan's own.
   *
   * That scratch is written: commands of one plan must be submitted in the order in which they shall take effect.
   *
   * @param inputs GPU tensors with the layout that was planned for
   * @param outputs contiguous tensors with offsets that are multiples of the device's binding alignment (256 bytes);
   *   default: new buffers, which the caller destroys
   * @throws {InvalidArgumentError} tensors unlike the planned ones
   * @throws {ExecutionError} `device-lost`; `disposed`
   */
  encode(
    encoder: GPUCommandEncoder,
    inputs: AttentionInputs<GpuTensor>,
    outputs?: AttentionOutputs<GpuTensor>,
    options: EncodeOptions = {},
  ): AttentionOutputs<GpuTensor> {
    this.#program.requireUse();
    const { context, program } = this.#program.built;
    if (context.lost !== undefined) throw context.lost;
    const problem = this.#problem;
    if (problem.location !== 'webgpu') {
      throw new InvalidArgumentError(
        'mixed-locations',
        'inputs',
        'a plan for GPU tensors',
        `a plan for ${problem.location} tensors`,
      );
    }
    const { q, k, v, attnMask, sinks, blockMap } = inputs;
    const buffers: Buffers = {};
    for (const [name, view, planned] of [
      ['q', q, problem.q],
      ['k', k, problem.k],
      ['v', v, problem.v],
      ['mask', attnMask, problem.mask],
      ['sinks', sinks, problem.sinks],
      ['blockMap', blockMap, problem.blocks],
    ] as const) {
      if (view === undefined) continue;
      if (!isGpuTensor(view)) throw new InvalidArgumentError('mixed-locations', name, 'a GPU tensor', view.location);
      validateBuffer(name, view);
      if (planned?.offset !== view.offset) {
        throw new InvalidArgumentError(
          'invalid-strides',
          `${name}.offset`,
          `${planned?.offset}, as planned`,
          `${view.offset}`,
        );
      }
      buffers[name] = view.buffer;
    }
    const given: Outputs<GpuTensor> = outputs ?? {};
    const made: Partial<Record<OutputName, GpuTensor>> = {};
    for (const { name, shape, dtype } of this.outputs) {
      const tensor = given[name] ?? emptyGpuTensor(context.device, dtype, shape);
      validateOutput(`outputs.${name}`, tensor, dtype, shape);
      made[name] = tensor;
      buffers[name] = tensor.buffer;
    }
    program.encode(encoder, { ...program.ownScratch, ...buffers }, options);
    return made as AttentionOutputs<GpuTensor>;
  }

  /**
   * Records the run into a compute pass of the caller's, over whole buffers that lie as the planned tensors do. Nothing is checked but
   * that a buffer is there: `encode` is for those who have tensors. The pass keeps the last dispatch's pipeline and bind group.
   *
   * @internal
   * @throws {ExecutionError} `device-lost`; `disposed`; a buffer that is missing
   */
  record(pass: GPUComputePassEncoder, buffers: RecordedBuffers): void {
    this.#program.requireUse();
    const { context, program } = this.#program.built;
    if (context.lost !== undefined) throw context.lost;
    program.record(pass, buffers);
  }

  /**
   * Allocates the scratch that {@link record} needs.
   *
   * @internal
   * @throws {ExecutionError} `out-of-memory`, `device-lost`
   */
  async reserve(): Promise<void> {
    const { context, program } = this.#program.built;
    const [, outcome] = context.checked(() => program.ownScratch);
    const failure = await outcome;
    if (failure !== undefined) throw failure;
  }

  /** Runs under way end first. */
  dispose(): void {
    this.#program.dispose();
  }
}

function validateOutput(argument: string, tensor: GpuTensor, dtype: string, shape: readonly number[]): void {
  const alike =
    tensor.dtype === dtype && tensor.shape.length === shape.length && tensor.shape.every((n, i) => n === shape[i]);
  if (!alike || !isContiguous(tensor) || tensor.offset !== 0) {
    throw new InvalidArgumentError(
      'invalid-shape',
      argument,
      `a contiguous ${dtype} tensor [${shape}] at offset 0`,
      `${tensor.dtype} [${tensor.shape}] strides [${tensor.strides}] offset ${tensor.offset}`,
    );
  }
  validateBuffer(argument, tensor);
}

async function build(
  context: GpuContext,
  problem: AttentionProblem,
  kernel: KernelChoice,
  options: Forced,
): Promise<BuiltPlan> {
  await tryShapes(context, problem, kernel, options);
  const { capabilities } = context;
  const { launches, variant, keySplits, sizes, tables } = planLaunches(capabilities, problem, kernel, options);
  const started = performance.now();
  const program = await Program.create(context, launches, sizes, tables);
  const details: PlanDetails = {
    family: variant.family,
    variant: variant.name,
    adapter: capabilities.adapter,
    launches: launches.map(({ label }) => label),
    keySplits,
    scratchBytes: Object.values(sizes).reduce((sum, size) => sum + size, 0),
    compileMilliseconds: performance.now() - started,
  };
  debugPlan(() => ({
    backend: 'webgpu',
    kernel: kernel.descriptor.name,
    settings: { pvAccumDtype: kernel.pvAccumDtype, family: variant.family, tile: variant.name, keySplits },
    launches: launches.map(({ label, code, groups }) => ({
      name: label,
      grid: groups,
      language: 'wgsl',
      source: () => code,
    })),
    scratchBytes: details.scratchBytes,
  }));
  return { context, program, details };
}
