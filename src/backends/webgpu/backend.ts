/** The WebGPU backend: a device, opened when first needed and again after a loss, and plans on it. */

import type { BackwardProblem } from '../../attention/backward.ts';
import { type AttentionOptions, optionNamesBut, validateOptions } from '../../attention/options.ts';
import { type AttentionProblem, createProblem } from '../../attention/problem.ts';
import type { SettledSparsity } from '../../attention/sparsity.ts';
import { BackendUnavailableError, InvalidArgumentError, messageOf, takeOptions } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  AttentionInputs,
  Availability,
  Backend,
  BackwardSupport,
  KernelChoice,
  KernelDescriptor,
  KeyValueContext,
  PreparedKeyValue,
} from '../backend.ts';
import { chooseOptions } from '../choice.ts';
import { WebgpuBackwardPlan } from './backward-plan.ts';
import { WebgpuBlockMapPlan } from './block-map-plan.ts';
import { matrixText } from './capabilities.ts';
import { type DeviceOptions, type GpuContext, openDevice } from './device.ts';
import { type Forced, familiesOf } from './families/choose.ts';
import type { Family } from './families/names.ts';
import { KERNELS, MAX_HEAD_DIM, QK_INT8_PV_FP16, QK_INT8_PV_INT8 } from './kernel-table.ts';
import { WebgpuKeyValue } from './key-value.ts';
import { needsTrial, tryShapes } from './matrix-trial.ts';
import { WebgpuPlan } from './plan.ts';
import { copied } from './run.ts';
import { entryFor } from './tuning/record.ts';
import { TUNE, Tuner } from './tuning/tuner.ts';

export interface WebgpuBackendOptions extends DeviceOptions {
  /**
   * Buffers of outputs that were disposed of serve later outputs, up to 8 of them and 256 MiB, which saves the time that a driver takes
   * to allocate and free them: for loops whose commands are all submitted before they dispose. Default: false, `dispose` destroys them.
   */
  readonly reuseOutputs?: boolean;
  /** The kernel family to use. Default: the fastest that the device can run. */
  readonly family?: Family;
  /**
   * Whether families, tiles and kernel are chosen by what was measured on this device. `off` (default): by the tables. `auto`: by the
   * record of this adapter, browser and version; a kind of problem that it lacks is measured once, while nothing else runs here.
   * `now`: the kinds of {@link tune} are measured when the device is opened. Where P and V in integers are faster, calls that leave the
   * kernel and its options to the backend get `qk-int8-pv-int8`.
   */
  readonly tune?: 'auto' | 'off' | 'now';
}

export class WebgpuBackend implements Backend {
  readonly name = 'webgpu' as const;
  readonly kernels: readonly KernelDescriptor[] = KERNELS;
  readonly #options: WebgpuBackendOptions & Forced;
  #context: Promise<GpuContext> | undefined;
  /** The last one that was opened. */
  #ready: GpuContext | undefined;
  readonly #tuner: Tuner;

  constructor(options: WebgpuBackendOptions = {}) {
    this.#options = options;
    const { tune = 'off' } = options;
    if (!TUNE.includes(tune)) {
      throw new InvalidArgumentError('invalid-option', 'options.tune', "'auto', 'off' or 'now'", `'${tune}'`);
    }
    this.#tuner = new Tuner(tune);
  }

  /**
   * The device in use, opened on first use; after a loss, a new one.
   *
   * @throws {BackendUnavailableError} no device can be had
   * @throws {ExecutionError} `device-lost`: the caller's own device is gone, and only the caller can give another
   */
  async context(): Promise<GpuContext> {
    const context = await this.#opened();
    if (context.lost === undefined) return context;
    if (!context.owned) throw context.lost;
    // Several calls may find the same loss; the first of them opens the next device.
    if ((await this.#context) === context) this.#context = undefined;
    return this.#opened();
  }

  #opened(): Promise<GpuContext> {
    this.#context ??= openDevice(this.#options).then(
      async (context) => {
        if (this.#options.reuseOutputs === true) context.outputs.open();
        await this.#tuner.opened(context);
        this.#ready = context;
        return context;
      },
      (error: unknown) => {
        this.#context = undefined;
        throw error;
      },
    );
    return this.#context;
  }

  async availability(): Promise<Availability> {
    try {
      const context = await this.context();
      const { capabilities } = context;
      const { offered, missing } = familiesOf(capabilities);
      const [min, max] = capabilities.subgroupSize;
      return {
        available: true,
        accelerated: !capabilities.isSoftware,
        details: {
          adapter: capabilities.adapter,
          family: `${this.#options.family ?? offered[0]}`,
          families: [...offered, ...missing.map((text) => `no ${text}`)].join('; '),
          subgroups: capabilities.subgroups ? (min === max ? `${min}` : `${min} to ${max}`) : 'none',
          'subgroup matrices': capabilities.matrixConfigs.map(matrixText).join(', ') || 'none',
          'shader-f16': capabilities.shaderF16 ? 'yes' : 'no',
          dot4I8Packed: capabilities.packedDot ? 'yes' : 'no',
          'workgroup memory': `${capabilities.workgroupBytes / 1024} KiB`,
          tuning: await this.#tuner.text(context),
          'largest binding': `${Math.floor(capabilities.bindingBytes / 2 ** 20)} MiB`,
        },
      };
    } catch (error) {
      if (error instanceof BackendUnavailableError) {
        return {
          available: false,
          accelerated: false,
          reason: error.received ?? error.message,
          remedy: error.expected ?? '',
          details: {},
        };
      }
      const reason = messageOf(error);
      return { available: false, accelerated: false, reason, remedy: 'Give the backend another device', details: {} };
    }
  }

  /** `qk-int8-pv-fp16`, or what was measured to be faster ({@link WebgpuBackendOptions.tune}). */
  defaultKernel(problem?: AttentionProblem, { quantized = false } = {}): KernelDescriptor {
    const entries = this.#ready?.capabilities.tuning ?? [];
    if (problem === undefined || quantized || this.#options.family !== undefined) return QK_INT8_PV_FP16;
    const [best] = entryFor(entries, problem)?.times ?? [];
    return best?.kernel === QK_INT8_PV_INT8.name ? QK_INT8_PV_INT8 : QK_INT8_PV_FP16;
  }

  plan(problem: AttentionProblem, kernel: KernelChoice): Promise<WebgpuPlan> {
    this.#tuner.asked(this.#ready, problem);
    return WebgpuPlan.create(problem, kernel, () => this.context(), this.#options);
  }

  planBlockMap(problem: AttentionProblem, sparsity: SettledSparsity): Promise<WebgpuBlockMapPlan> {
    return WebgpuBlockMapPlan.create(problem, sparsity, () => this.context());
  }

  async backwardSupport({ headDim, valueDim }: AttentionProblem): Promise<BackwardSupport | undefined> {
    if (Math.max(headDim, valueDim) > MAX_HEAD_DIM) return undefined;
    return { kernels: [QK_INT8_PV_FP16.name], precisions: ['fp16', 'int8'], maskGradient: true };
  }

  planBackward(problem: BackwardProblem, kernel: KernelChoice): Promise<WebgpuBackwardPlan> {
    return WebgpuBackwardPlan.create(problem, kernel, () => this.context(), this.#options);
  }

  /**
   * A plan for those who record it into their own command encoder; see {@link WebgpuPlan.encode}.
   *
   * @param specs tensors, or their layouts: q `[B,Hq,Lq,D]`, k `[B,Hkv,Lk,D]`, v `[B,Hkv,Lk,Dv]` (HND)
   * @throws {InvalidArgumentError} and {UnsupportedOptionError} as `sageattn`
   */
  async createPlan(
    specs: AttentionInputs,
    options: Omit<AttentionOptions, 'attnMask' | 'sinks' | 'sparsity' | 'backend' | 'signal' | 'stream'> = {},
  ): Promise<WebgpuPlan> {
    const { q, k, v, attnMask, sinks, blockMap } = specs;
    if (blockMap !== undefined && options.blockMask === undefined) {
      const expected = 'options.blockMask together with specs.blockMap';
      throw new InvalidArgumentError('invalid-option', 'options.blockMask', expected, 'specs.blockMap alone');
    }
    const all: AttentionOptions = { ...options, ...(attnMask && { attnMask }), ...(sinks && { sinks }) };
    validateOptions(all, optionNamesBut('sparsity'));
    const problem = createProblem(q, k, v, all);
    const kernel = this.kernels.find(({ name }) => name === (options.kernel ?? QK_INT8_PV_FP16.name));
    if (kernel === undefined) {
      const expected = this.kernels.map(({ name }) => `'${name}'`).join(' or ');
      throw new InvalidArgumentError('invalid-option', 'options.kernel', expected, `'${options.kernel}'`);
    }
    return this.plan(problem, chooseOptions(kernel, problem, all));
  }

  async prepareKeyValue(
    problem: AttentionProblem,
    kernel: KernelChoice,
    k: TensorView,
    v: TensorView,
    run: KeyValueContext,
  ): Promise<PreparedKeyValue> {
    const ready = this.#ready;
    if (this.#context !== undefined && ready?.usable && !needsTrial(ready, problem, kernel, this.#options)) {
      return WebgpuKeyValue.create(problem, kernel, ready, this.#options, k, v, run);
    }
    const [ownK, ownV, keyMask] = [copied(k), copied(v), run.keyMask && copied(run.keyMask)];
    const own = keyMask === undefined ? run : { ...run, keyMask };
    const context = await this.context();
    await tryShapes(context, problem, kernel, this.#options);
    return WebgpuKeyValue.create(problem, kernel, context, this.#options, ownK, ownV, own);
  }

  /**
   * Runs under way end first. Then all memory on the device is freed, and a device that was opened here is destroyed.
   */
  async dispose(): Promise<void> {
    const context = this.#context;
    this.#context = undefined;
    if (context !== undefined) await (await context.catch(() => undefined))?.dispose();
  }
}

const OPTIONS = [
  'device',
  'adapter',
  'gpu',
  'dawnFlags',
  'capabilities',
  'family',
  'tune',
  'reuseOutputs',
] as const satisfies readonly (keyof WebgpuBackendOptions)[];

/**
 * The backend on the caller's device, or on one that it opens when first used.
 *
 * @example
 * const backend = createWebgpuBackend({ device });
 * await setBackend(backend);
 */
export function createWebgpuBackend(options: WebgpuBackendOptions = {}): WebgpuBackend {
  return new WebgpuBackend(takeOptions(options, OPTIONS));
}

/**
 * @internal For tests and tuning: with a variant of a family's table, or with emulated matrices.
 */
export function createWebgpuBackendOn(options: WebgpuBackendOptions & Forced): WebgpuBackend {
  return new WebgpuBackend(options);
}
