/** A program that outlives its device: where that was lost, or its backend disposed, it is built again on the next one. */
import type { Outputs, PlannedOutputs } from '../../attention/outputs.ts';
import { ExecutionError } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type { RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import type { Program } from './program.ts';
import { copied, type DeviceInputs, runProgram, takeInputs } from './run.ts';

/** A program on a device. */
export interface Built {
  readonly context: GpuContext;
  readonly program: Program;
}

export class PlannedProgram<B extends Built> {
  readonly #build: () => Promise<B>;
  #built: B;
  #rebuilding: Promise<B> | undefined;
  #disposed = false;
  #runs = 0;

  private constructor(build: () => Promise<B>, built: B) {
    this.#build = build;
    this.#built = built;
  }

  /** @param build the program on the backend's present device */
  static async create<B extends Built>(build: () => Promise<B>): Promise<PlannedProgram<B>> {
    return new PlannedProgram(build, await build());
  }

  get built(): B {
    return this.#built;
  }

  /** @throws {ExecutionError} `disposed` */
  requireUse(): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'this plan has been disposed');
  }

  /** CPU tensors are read before this returns, unless the program must first be built for a new device. */
  async run(
    inputs: Readonly<Record<string, TensorView | undefined>>,
    planned: PlannedOutputs,
    run: RunContext,
  ): Promise<Outputs> {
    this.requireUse();
    run.signal?.throwIfAborted();
    this.#runs++;
    try {
      let { context, program } = this.#built;
      let taken: DeviceInputs;
      if (context.usable) taken = takeInputs(context, inputs);
      else {
        const copies = Object.fromEntries(Object.entries(inputs).map(([name, view]) => [name, view && copied(view)]));
        ({ context, program } = await this.#rebuilt());
        taken = takeInputs(context, copies);
      }
      return await context.during(runProgram(context, program, planned, taken, run));
    } finally {
      this.#runs--;
      this.#release();
    }
  }

  /** Runs under way end first. */
  dispose(): void {
    this.#disposed = true;
    this.#release();
  }

  #release(): void {
    if (this.#disposed && this.#runs === 0) this.#built.program.dispose();
  }

  async #rebuilt(): Promise<B> {
    this.#rebuilding ??= this.#build().finally(() => {
      this.#rebuilding = undefined;
    });
    this.#built = await this.#rebuilding;
    return this.#built;
  }
}
