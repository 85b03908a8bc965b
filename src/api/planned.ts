/** Attention planned once and run many times, for callers who hold the plan themselves. */

import {
  type AttentionOptions,
  type BackendName,
  type BlockMask,
  optionNamesBut,
  UNPLANNED_OPTIONS,
  validateOptions,
} from '../attention/options.ts';
import { createProblem } from '../attention/problem.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  KernelChoice,
  Plan,
  RunContext,
  SideInputs,
} from '../backends/backend.ts';
import { ATTENTION_RUN_OPTIONS, chooseKernel, contextOf, mapSide, SIDE_NAMES, takeInputs } from '../backends/choice.ts';
import { outputsInto, takeOut } from '../backends/out.ts';
import { DISPOSE } from '../dispose.ts';
import { ExecutionError, InvalidArgumentError, reading, takeOptions, textOf } from '../errors.ts';
import { requireView, specOf, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { chooseBackend, readyBackend } from './selection.ts';

/** A shape, dtype and layout to plan for; any tensor is one. */
export type TensorSpec = TensorView;

/** Descriptions without data, as they are now: a plan keeps no tensor alive. */
function keepSpecs({ q, k, v, ...side }: AttentionInputs<TensorSpec>): AttentionInputs<TensorSpec> {
  return { q: specOf('q', q), k: specOf('k', k), v: specOf('v', v), ...mapSide(side, specOf) };
}

const sameLayout = (a: TensorView, b: TensorView) =>
  a.location === b.location &&
  (a.device ?? 0) === (b.device ?? 0) &&
  a.dtype === b.dtype &&
  a.offset === b.offset &&
  a.shape.length === b.shape.length &&
  a.shape.every((size, i) => size === b.shape[i]) &&
  a.strides.every((stride, i) => stride === b.strides[i]);

const layoutText = (view: TensorView | undefined) =>
  view === undefined
    ? 'none'
    : `${textOf(view.location)} ${textOf(view.dtype)} ${textOf(view.shape)} strides ${textOf(view.strides)} offset ${view.offset}`;

/** Attention planned for one shape; see {@link createAttention}. */
export class Attention<T extends TensorView = Tensor> {
  /** The kernel and the options that it runs with. */
  readonly kernel: KernelChoice;
  readonly #backend: BackendName;
  readonly #plan: Plan;
  readonly #specs: AttentionInputs<TensorSpec>;
  #disposed = false;

  /** @internal */
  constructor(backend: BackendName, plan: Plan, specs: AttentionInputs<TensorSpec>) {
    this.#backend = backend;
    this.kernel = plan.kernel;
    this.#plan = plan;
    this.#specs = specs;
  }

  /**
   * @param inputs tensors with the location, dtype, shape, strides and offset that were planned for, as they are at the
   *     moment of the call
   * @returns the output and, if planned with `returnLse`, the logsumexp
   * @throws {InvalidArgumentError} a tensor unlike the planned one
   * @throws {ExecutionError} `disposed` after {@link dispose}; a device or worker that failed
   */
  async run(inputs: AttentionInputs<T>, context: RunContext = {}): Promise<AttentionOutputs<T>> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this Attention has been disposed');
    const own = validateOptions(context, ATTENTION_RUN_OPTIONS);
    if (typeof inputs !== 'object' || inputs === null) {
      throw new InvalidArgumentError('invalid-shape', 'inputs', 'an object with q, k and v', textOf(inputs));
    }
    own.signal?.throwIfAborted();
    reading('inputs', () => this.#requirePlanned(inputs));
    const taken = takeInputs(inputs);
    const { location } = taken.q;
    const out = own.out && takeOut(own.out, { location, outputs: this.#plan.outputs });
    const run: RunContext = { ...contextOf(own, this.#backend), ...(out && { out }) };
    return outputsInto((await this.#plan.run(taken, run)) as AttentionOutputs<T>, own.out, run);
  }

  /** @throws {InvalidArgumentError} a tensor unlike the planned one */
  #requirePlanned(inputs: AttentionInputs<T>): void {
    for (const name of ['q', 'k', 'v', ...SIDE_NAMES] as const) {
      const planned = this.#specs[name];
      const given = inputs[name];
      if (given !== undefined) requireView(name, given);
      const fits = planned === undefined || given === undefined ? planned === given : sameLayout(planned, given);
      if (!fits) {
        throw new InvalidArgumentError('invalid-shape', name, `${layoutText(planned)}, as planned`, layoutText(given));
      }
    }
  }

  /** Frees what the plan holds. Runs under way end first. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#plan.dispose();
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/** Options of {@link createAttention}. What is a tensor is among the `specs`. */
export type PlannedOptions = Omit<AttentionOptions, (typeof UNPLANNED_OPTIONS)[number]> & {
  /** Rows and keys of a block of `specs.blockMap`, multiples of 16; see {@link BlockMask}. */
  readonly blocks?: Pick<BlockMask, 'rows' | 'keys'>;
};
const PLANNED_OPTIONS = optionNamesBut(...UNPLANNED_OPTIONS);

/**
 * Plans attention for one shape, for callers who hold the plan themselves: kernel chosen, code compiled, scratch
 * allocated. `specs` are tensors, or shape, strides, offset, dtype and location without data; their shapes are as in
 * {@link sageattn}.
 *
 * @throws {SageAttentionError} as {@link sageattn}
 */
export async function createAttention<T extends TensorView = Tensor>(
  specs: AttentionInputs<TensorSpec>,
  options: PlannedOptions = {},
): Promise<Attention<T>> {
  const { blocks, ...others } = takeOptions(options, [...PLANNED_OPTIONS, 'blocks']);
  const own: AttentionOptions = validateOptions(others, PLANNED_OPTIONS);
  if (typeof specs !== 'object' || specs === null) {
    throw new InvalidArgumentError('invalid-shape', 'specs', 'an object with q, k and v', textOf(specs));
  }
  const kept = reading('specs', () => keepSpecs(specs));
  const { q, k, v, ...side } = kept;
  if ((blocks === undefined) !== (side.blockMap === undefined)) {
    const expected = 'options.blocks together with specs.blockMap';
    throw new InvalidArgumentError('invalid-option', 'options.blocks', expected, 'only one of them');
  }
  const optionsOver = (views: SideInputs): AttentionOptions => {
    const { attnMask, sinks, blockMap: map } = views;
    const given = {
      ...(attnMask && { attnMask }),
      ...(sinks && { sinks }),
      ...(map && { blockMask: { rows: blocks?.rows as number, keys: blocks?.keys as number, map } }),
    };
    return { ...own, ...validateOptions(given, ['attnMask', 'sinks', 'blockMask']) };
  };
  const all = reading('options.blocks', () => optionsOver(side), 'invalid-option');
  // Runs take a CPU tensor's elements from its offset on.
  const taken = (view: TensorSpec): TensorSpec => (view.location === 'cpu' ? { ...view, offset: 0 } : view);
  createProblem(q, k, v, all);
  const problem = createProblem(taken(q), taken(k), taken(v), optionsOver(mapSide(side, (_, view) => taken(view))));
  const backend = readyBackend(problem, all) ?? (await chooseBackend(problem, all));
  const plan = await backend.plan(problem, await chooseKernel(backend, problem, all));
  return new Attention<T>(backend.name, plan, kept);
}
