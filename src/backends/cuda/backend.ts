import { type BackwardProblem, gradientOutputs } from '../../attention/backward.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { SettledSparsity } from '../../attention/sparsity.ts';
import { debugPlan } from '../../debug.ts';
import { BackendUnavailableError, MissingPackageError, takeOptions, UnsupportedOptionError } from '../../errors.ts';
import { copyOfCpu, type TensorView } from '../../tensor/tensor.ts';
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
import { type Cuda, type CudaDevice, openCuda } from './driver/device.ts';
import { fastestKernel, quantizingKernel } from './fastest.ts';
import { FixedKeyValue, type SharedRoom } from './fixed-key-value.ts';
import {
  backwardSupportOf,
  CUDA_KERNELS,
  defaultKernelFor,
  lackedBy,
  MINIMUM_COMPUTE_CAPABILITY,
  MOST_VALUE_DIM,
  targetFor,
} from './kernel-table.ts';
import { CudaKeyValue } from './key-value.ts';
import { planBackward } from './launches/backward.ts';
import { planBlockMap } from './launches/block-map.ts';
import type { DeviceFacts } from './launches/context.ts';
import { debugPlanOf } from './launches/debug.ts';
import type { LaunchSequence } from './launches/launch.ts';
import { planMerge, planSum } from './launches/merge.ts';
import { type LaunchPlanner, planAttend, planKeyValue, planLaunches } from './launches/plan.ts';
import { remembered } from './launches/remembered.ts';
import { PartsMerge, type SummedPart, sumParts } from './merge.ts';
import { type CudaBackwardPlan, CudaPlan } from './plan.ts';
import { CudaBlockMapPlan } from './run/block-map.ts';
import { CapturedAttention } from './run/captured.ts';
import { backwardOperandsOf, operandsOf } from './run/operands.ts';
import { Runner } from './run/runner.ts';
import type { CudaTensor } from './tensor.ts';

export interface CudaBackendOptions {
  /** Default: the driver of this machine, see `openCuda`. */
  readonly open?: () => Promise<Cuda>;
  /** Ordinal of the device that CPU tensors are sent to; default 0. CUDA tensors are worked on where they are. */
  readonly device?: number;
  /** Default: the kernels of this package. */
  readonly planner?: LaunchPlanner;
}

const gigabytes = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const versionText = (version: number) => `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}`;

function describe(cuda: Cuda): Record<string, string> {
  const details: Record<string, string> = {
    library: cuda.api.library,
    'driver supports': `CUDA ${versionText(cuda.driverVersion)}`,
  };
  for (let i = 0; i < cuda.deviceCount; i++) {
    const { name, computeCapability, multiprocessors, totalMemory } = cuda.device(i);
    details[`device ${i}`] =
      `${name}, sm_${computeCapability}, ${multiprocessors} multiprocessors, ${gigabytes(totalMemory)}`;
  }
  return details;
}

const deviceOf = (
  cuda: Cuda,
  { location, device }: Pick<AttentionProblem, 'location' | 'device'>,
  defaultDevice: number,
): CudaDevice => cuda.device(location === 'cuda' ? device : defaultDevice);

/** A CUDA backend of chosen options, for `setBackend`. */
export const createCudaBackend = (options: CudaBackendOptions = {}): CudaBackend =>
  new CudaBackend(takeOptions(options, ['open', 'device', 'planner']));

/** Attention on NVIDIA GPUs, through nothing but the driver. */
export class CudaBackend implements Backend {
  readonly name = 'cuda';
  readonly kernels = CUDA_KERNELS;
  readonly #open: () => Promise<Cuda>;
  readonly #defaultDevice: number;
  readonly #planner: LaunchPlanner;
  #cuda: Promise<Cuda> | undefined;
  /** The driver, once it is open. */
  #opened: Cuda | undefined;
  /** What {@link availability} says of a driver; it is asked in every call, and only a lost device changes it. */
  readonly #described = new WeakMap<Cuda, Record<string, string>>();

  constructor(options: CudaBackendOptions = {}) {
    this.#open = options.open ?? openCuda;
    this.#defaultDevice = options.device ?? 0;
    this.#planner = toldOf(
      remembered(
        options.planner ?? { planLaunches, planKeyValue, planAttend, planBackward, planBlockMap, planMerge, planSum },
      ),
    );
  }

  /**
   * The driver that this backend runs on.
   *
   * @throws {BackendUnavailableError | MissingPackageError} which says what is missing
   */
  async cuda(): Promise<Cuda> {
    if (this.#cuda === undefined) {
      const opening = this.#open();
      this.#cuda = opening;
      opening.then(
        (cuda) => {
          if (this.#cuda === opening) this.#opened = cuda;
        },
        // A missing package may be installed later.
        () => {
          if (this.#cuda === opening) this.#cuda = undefined;
        },
      );
    }
    return this.#cuda;
  }

  /** The device of a problem: its tensors', or the default one for CPU tensors. */
  async device(problem: Pick<AttentionProblem, 'location' | 'device'>): Promise<CudaDevice> {
    return deviceOf(await this.cuda(), problem, this.#defaultDevice);
  }

  async availability(): Promise<Availability> {
    const none = { available: false, accelerated: false, details: {} };
    try {
      const cuda = await this.cuda();
      let details = this.#described.get(cuda);
      if (details === undefined) {
        details = describe(cuda);
        this.#described.set(cuda, details);
      }
      const chosen = cuda.device(this.#defaultDevice);
      const kernel = defaultKernelFor(chosen.computeCapability);
      if (kernel === undefined) {
        return {
          ...none,
          reason: `${chosen} is of compute capability ${chosen.computeCapability / 10}`,
          remedy: `Use a GPU of compute capability ${MINIMUM_COMPUTE_CAPABILITY / 10} or later (Ampere), or backend 'webgpu'`,
          details,
        };
      }
      if (chosen.lost !== undefined) {
        return {
          ...none,
          reason: `${chosen} was lost to a fault in this process (${chosen.lost.statusName})`,
          remedy: 'Start the process again',
          details,
        };
      }
      return { available: true, accelerated: true, details: { ...details, 'default kernel': kernel.name } };
    } catch (error) {
      if (error instanceof BackendUnavailableError) {
        return { ...none, reason: error.received ?? error.message, remedy: error.expected ?? '' };
      }
      if (error instanceof MissingPackageError) {
        const { packageName } = error;
        return {
          ...none,
          reason: `the package '${packageName}' is not installed`,
          remedy: `Run: npm install ${packageName}`,
        };
      }
      throw error;
    }
  }

  async defaultKernel(problem: AttentionProblem, { quantized = false } = {}): Promise<KernelDescriptor> {
    const device = await this.device(problem);
    const { computeCapability } = device;
    const kernel = quantized ? quantizingKernel(problem, computeCapability) : fastestKernel(problem, computeCapability);
    if (kernel === undefined) throw tooOld(device);
    return kernel;
  }

  async plan(problem: AttentionProblem, kernel: KernelChoice): Promise<CudaPlan> {
    const device = await this.device(problem);
    const facts = factsOf(device, kernel);
    return new CudaPlan(
      device,
      kernel,
      { location: problem.location, outputs: attentionOutputs(problem) },
      (inputs) => operandsOf(problem, inputs),
      () => this.#planner.planLaunches(problem, kernel, facts),
    );
  }

  async planBlockMap(problem: AttentionProblem, sparsity: SettledSparsity): Promise<CudaBlockMapPlan> {
    const device = await this.device(problem);
    const { multiprocessors, computeCapability } = device;
    const target = targetFor(computeCapability);
    if (target === undefined) throw tooOld(device);
    if (problem.headDim > MOST_VALUE_DIM) {
      const expected = `head dims up to ${MOST_VALUE_DIM} with sparsity`;
      throw new UnsupportedOptionError('block map', 'q', expected, String(problem.headDim));
    }
    return new CudaBlockMapPlan(device, problem, () =>
      this.#planner.planBlockMap(problem, sparsity, { target, multiprocessors }),
    );
  }

  async backwardSupport(problem: AttentionProblem): Promise<BackwardSupport | undefined> {
    const device = await this.device(problem);
    const { headDim, valueDim } = problem;
    if (Math.max(headDim, valueDim) > MOST_VALUE_DIM) return undefined;
    const { computeCapability } = device;
    return defaultKernelFor(computeCapability) === undefined ? undefined : backwardSupportOf(computeCapability);
  }

  async planBackward(problem: BackwardProblem, kernel: KernelChoice): Promise<CudaBackwardPlan> {
    const device = await this.device(problem.attention);
    const facts = factsOf(device, kernel);
    return new CudaPlan(
      device,
      kernel,
      { location: problem.attention.location, outputs: gradientOutputs(problem) },
      (inputs) => backwardOperandsOf(problem, inputs),
      () => this.#planner.planBackward(problem, kernel, facts),
    );
  }

  /** Captures one run over CUDA tensors into a graph. */
  async capture(problem: AttentionProblem, kernel: KernelChoice, inputs: AttentionInputs): Promise<CapturedAttention> {
    const device = await this.device(problem);
    const facts = factsOf(device, kernel);
    const options = { location: problem.location, outputs: attentionOutputs(problem) };
    const runner = new Runner(device, options, () => this.#planner.planLaunches(problem, kernel, facts));
    try {
      return new CapturedAttention(runner, operandsOf(problem, inputs));
    } catch (error) {
      runner.dispose();
      throw error;
    }
  }

  /** What joins outputs over parts of the keys, all on one device, again and again. */
  partsMerge(device: CudaDevice): PartsMerge {
    return new PartsMerge(device, this.#planner.planMerge);
  }

  /** Enqueues the sum of float32 parts on the device's stream; rows of no part are 0. */
  sum(device: CudaDevice, parts: readonly SummedPart[], output: CudaTensor): void {
    sumParts(device, this.#planner.planSum, parts, output);
  }

  /** Keys and values of one shape that are quantized again and again, in memory that others have in turn. */
  fixedKeyValue(device: CudaDevice, problem: AttentionProblem, kernel: KernelChoice, room: SharedRoom): FixedKeyValue {
    return new FixedKeyValue(device, kernel, this.#planner, factsOf(device, kernel), problem, room);
  }

  async prepareKeyValue(
    problem: AttentionProblem,
    kernel: KernelChoice,
    k: TensorView,
    v: TensorView,
    context: KeyValueContext,
  ): Promise<PreparedKeyValue> {
    const open = this.#opened === undefined ? undefined : deviceOf(this.#opened, problem, this.#defaultDevice);
    // Where the driver must be waited for, copies wait.
    const [ownK, ownV] = open === undefined ? [copyOfCpu(k), copyOfCpu(v)] : [k, v];
    const { keyMask } = context;
    const own = keyMask === undefined || open !== undefined ? context : { ...context, keyMask: copyOfCpu(keyMask) };
    const device = open ?? (await this.device(problem));
    const prepared = new CudaKeyValue(device, kernel, this.#planner, factsOf(device, kernel), problem);
    try {
      await prepared.append(ownK, ownV, problem, own);
      return prepared;
    } catch (error) {
      prepared.dispose();
      throw error;
    }
  }

  async dispose(): Promise<void> {
    const opening = this.#cuda;
    this.#cuda = undefined;
    this.#opened = undefined;
    const cuda = await opening?.catch(() => undefined);
    cuda?.dispose();
  }
}

/** A planner whose plans are told of where the environment asks for it. */
function toldOf(planner: LaunchPlanner): LaunchPlanner {
  const tell = <T extends LaunchSequence>(choice: KernelChoice, sequence: T): T => {
    debugPlan(() => debugPlanOf(choice, sequence));
    return sequence;
  };
  return {
    planLaunches: (problem, choice, ...rest) => tell(choice, planner.planLaunches(problem, choice, ...rest)),
    planKeyValue: (problem, choice, ...rest) => tell(choice, planner.planKeyValue(problem, choice, ...rest)),
    planAttend: (problem, choice, ...rest) => tell(choice, planner.planAttend(problem, choice, ...rest)),
    planBackward: (problem, choice, ...rest) => tell(choice, planner.planBackward(problem, choice, ...rest)),
    planBlockMap: planner.planBlockMap,
    planMerge: planner.planMerge,
    planSum: planner.planSum,
  };
}

const tooOld = (device: CudaDevice) =>
  new BackendUnavailableError(
    'cuda',
    `${device} is of compute capability ${device.computeCapability / 10}`,
    `Use a GPU of compute capability ${MINIMUM_COMPUTE_CAPABILITY / 10} or later (Ampere), or backend 'webgpu'`,
  );

/** What planning needs to know of a device, which must be one that the kernel runs on. */
function factsOf(device: CudaDevice, { descriptor: { name } }: KernelChoice): DeviceFacts {
  const target = targetFor(device.computeCapability);
  if (target === undefined) throw tooOld(device);
  const lacked = lackedBy(name, device.computeCapability);
  if (lacked !== undefined) throw new UnsupportedOptionError(name, 'device', lacked, device.toString());
  return { target, multiprocessors: device.multiprocessors };
}
