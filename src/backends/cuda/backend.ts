import { BackendUnavailableError, MissingPackageError, UnsupportedOptionError } from '../../attention/errors.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  AttentionInputs,
  Availability,
  Backend,
  KernelChoice,
  KernelDescriptor,
  PreparedKeyValue,
  RunContext,
} from '../backend.ts';
import { type Cuda, type CudaDevice, openCuda } from './driver/device.ts';
import { CUDA_KERNELS, defaultKernelFor, MINIMUM_COMPUTE_CAPABILITY } from './kernel-table.ts';
import type { LaunchSequence } from './launch.ts';
import { type CapturedAttention, CudaPlan } from './plan.ts';

/** What the choice of launches depends on besides the problem. */
export interface GpuTarget {
  /** major * 10 + minor. */
  readonly computeCapability: number;
  readonly multiprocessors: number;
}

/** Makes the launches of a problem, without touching a device. */
export type LaunchPlanner = (problem: AttentionProblem, kernel: KernelChoice, gpu: GpuTarget) => LaunchSequence;

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

/** A CUDA backend of chosen options, for `setBackend`. */
export const createCudaBackend = (options: CudaBackendOptions = {}): CudaBackend => new CudaBackend(options);

/** Attention on NVIDIA GPUs, through nothing but the driver. */
export class CudaBackend implements Backend {
  readonly name = 'cuda';
  readonly kernels = CUDA_KERNELS;
  readonly #open: () => Promise<Cuda>;
  readonly #defaultDevice: number;
  readonly #planner: LaunchPlanner;
  #cuda: Promise<Cuda> | undefined;

  constructor(options: CudaBackendOptions = {}) {
    this.#open = options.open ?? openCuda;
    this.#defaultDevice = options.device ?? 0;
    this.#planner = options.planner ?? noKernels;
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
      // What is missing may be installed later.
      opening.catch(() => {
        if (this.#cuda === opening) this.#cuda = undefined;
      });
    }
    return this.#cuda;
  }

  /** The device of a problem: its tensors', or the default one for CPU tensors. */
  async device(problem: Pick<AttentionProblem, 'location' | 'device'>): Promise<CudaDevice> {
    const cuda = await this.cuda();
    return cuda.device(problem.location === 'cuda' ? problem.device : this.#defaultDevice);
  }

  async availability(): Promise<Availability> {
    const none = { available: false, accelerated: false, details: {} };
    try {
      const cuda = await this.cuda();
      const details = describe(cuda);
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

  async defaultKernel(problem: AttentionProblem): Promise<KernelDescriptor> {
    const device = await this.device(problem);
    const kernel = defaultKernelFor(device.computeCapability);
    if (kernel === undefined) throw tooOld(device);
    return kernel;
  }

  #launches(device: CudaDevice, problem: AttentionProblem, kernel: KernelChoice): () => LaunchSequence {
    if (device.computeCapability < MINIMUM_COMPUTE_CAPABILITY) throw tooOld(device);
    return () => this.#planner(problem, kernel, device);
  }

  async plan(problem: AttentionProblem, kernel: KernelChoice): Promise<CudaPlan> {
    const device = await this.device(problem);
    return new CudaPlan(device, problem, kernel, this.#launches(device, problem, kernel));
  }

  /** Captures one run over CUDA tensors into a graph. */
  async capture(problem: AttentionProblem, kernel: KernelChoice, inputs: AttentionInputs): Promise<CapturedAttention> {
    const device = await this.device(problem);
    return CudaPlan.capture(device, problem, kernel, this.#launches(device, problem, kernel), inputs);
  }

  async prepareKeyValue(
    _problem: AttentionProblem,
    kernel: KernelChoice,
    _k: TensorView,
    _v: TensorView,
    _context: RunContext,
  ): Promise<PreparedKeyValue> {
    throw new UnsupportedOptionError(kernel.descriptor.name, 'prepareKeyValue', 'whole calls', 'prepared keys');
  }

  async dispose(): Promise<void> {
    const opening = this.#cuda;
    this.#cuda = undefined;
    const cuda = await opening?.catch(() => undefined);
    cuda?.dispose();
  }
}

const tooOld = (device: CudaDevice) =>
  new BackendUnavailableError(
    'cuda',
    `${device} is of compute capability ${device.computeCapability / 10}`,
    `Use a GPU of compute capability ${MINIMUM_COMPUTE_CAPABILITY / 10} or later (Ampere), or backend 'webgpu'`,
  );

const noKernels: LaunchPlanner = (_problem, kernel) => {
  throw new UnsupportedOptionError(kernel.descriptor.name, 'options.kernel', 'nothing yet', kernel.descriptor.name);
};
