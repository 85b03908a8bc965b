/** A WebGPU device with what belongs to it: capabilities, compiled pipelines, and what went wrong. */
import { BackendUnavailableError, ExecutionError, messageOf } from '../../errors.ts';
import { importOptional, loadFailure, REINSTALL } from '../../optional-package.ts';
import {
  type Capabilities,
  capabilitiesOf,
  type MatrixConfig,
  matrixConfigsOf,
  WANTED_FEATURES,
  WANTED_LIMITS,
} from './capabilities.ts';
import { matrixProducts } from './families/matrix.ts';
import { probeMatrixDialect } from './families/matrix-dialect.ts';
import { OutputPool, ScratchPool } from './scratch.ts';
import type { TunedEntry } from './tuning/record.ts';

export interface DeviceOptions {
  /** A device of the caller's, shared with other code; it is never destroyed here. */
  readonly device?: GPUDevice;
  /** An adapter to open the device from. Default: the high-performance adapter. */
  readonly adapter?: GPUAdapter;
  /** The `GPU` object that the device came from. Default: `navigator.gpu`, in Node the one of the package `webgpu`. */
  readonly gpu?: GPU;
  /** Flags for Dawn where Node's `webgpu` package is used. Default {@link DAWN_FLAGS}. */
  readonly dawnFlags?: readonly string[];
  /** Treats the device as one with less: for tests of what such a device would get. */
  readonly capabilities?: Partial<Capabilities>;
}

/**
 * Subgroup matrices are behind the first of these toggles in Dawn; without it the family `matrix` is not offered in
 * Node. The second one gives float16 on NVIDIA's Vulkan driver, without which there is neither `shader-f16` nor a
 * float16 matrix.
 */
export const DAWN_FLAGS: readonly string[] = ['enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia'];

const INSTALL = "In Node install the package 'webgpu' (npm install webgpu); in a browser enable WebGPU";

interface DawnModule {
  create(flags: readonly string[]): GPU;
}

let dawn: Promise<DawnModule> | undefined;

async function loadDawn(): Promise<DawnModule> {
  dawn ??= importOptional('webgpu') as Promise<DawnModule>;
  try {
    return await dawn;
  } catch (cause) {
    dawn = undefined;
    const failure = loadFailure('webgpu', cause);
    throw failure === undefined
      ? new BackendUnavailableError('webgpu', "the package 'webgpu' is not installed", INSTALL, cause)
      : new BackendUnavailableError('webgpu', failure, REINSTALL, cause);
  }
}

/** A Dawn instance must outlive its adapters and devices; one is kept for each set of flags. */
const instances = new Map<string, GPU>();

/** `navigator.gpu`, or Dawn in Node. */
export async function findGpu(flags: readonly string[] = DAWN_FLAGS): Promise<GPU> {
  const browser = (globalThis as { navigator?: { gpu?: GPU } }).navigator?.gpu;
  if (browser !== undefined) return browser;
  if ((globalThis as { process?: { versions?: { node?: string } } }).process?.versions?.node === undefined) {
    throw new BackendUnavailableError('webgpu', 'this environment has no navigator.gpu', INSTALL);
  }
  const key = flags.join(' ');
  let gpu = instances.get(key);
  if (gpu === undefined) {
    gpu = (await loadDawn()).create(flags);
    instances.set(key, gpu);
  }
  return gpu;
}

/** Opens a device with every wanted feature and limit that the adapter has, or adopts the caller's. */
export async function openDevice(options: DeviceOptions): Promise<GpuContext> {
  if (options.device !== undefined) {
    const gpu = options.gpu ?? (globalThis as { navigator?: { gpu?: GPU } }).navigator?.gpu;
    const info = (options.device as { adapterInfo?: GPUAdapterInfo }).adapterInfo ?? options.adapter?.info;
    const found = capabilitiesOf(options.device, info, gpu?.wgslLanguageFeatures);
    const unlisted = found.matrixFeature !== undefined && found.matrixConfigs.length === 0;
    const capabilities = unlisted
      ? { ...found, matrixConfigs: await listedByAdapter(options.adapter, gpu, info) }
      : found;
    return new GpuContext(options.device, await settled(options.device, capabilities, options), false);
  }
  const gpu = options.gpu ?? (await findGpu(options.dawnFlags));
  const adapter = options.adapter ?? (await gpu.requestAdapter({ powerPreference: 'high-performance' }));
  if (adapter === null) {
    throw new BackendUnavailableError(
      'webgpu',
      'no GPU adapter was found',
      'Install a GPU driver (on Linux a Vulkan driver and libvulkan1) or use another backend',
    );
  }
  const requiredFeatures = WANTED_FEATURES.filter((feature) =>
    adapter.features.has(feature as GPUFeatureName),
  ) as GPUFeatureName[];
  const requiredLimits = Object.fromEntries(WANTED_LIMITS.map((limit) => [limit, adapter.limits[limit]]));
  try {
    const device = await adapter.requestDevice({ label: 'sageattention', requiredFeatures, requiredLimits });
    const capabilities = capabilitiesOf(device, adapter.info, gpu.wgslLanguageFeatures);
    return new GpuContext(device, await settled(device, capabilities, options), true);
  } catch (cause) {
    throw new BackendUnavailableError('webgpu', `the adapter gave no device: ${messageOf(cause)}`, INSTALL, cause);
  }
}

/**
 * Subgroup matrices of the adapter that a device came from: Dawn's Node binding lists them in an adapter's information,
 * but not in its devices'. An adapter that is not the caller's is believed if it has the device's name.
 */
async function listedByAdapter(
  given: GPUAdapter | undefined,
  gpu: GPU | undefined,
  info: GPUAdapterInfo | undefined,
): Promise<readonly MatrixConfig[]> {
  if (given !== undefined) return matrixConfigsOf(given.info);
  for (const powerPreference of ['high-performance', 'low-power'] as const) {
    const adapter = await gpu?.requestAdapter({ powerPreference });
    const names = ['vendor', 'architecture', 'device', 'description'] as const;
    if (adapter && info !== undefined && names.every((name) => adapter.info[name] === info[name])) {
      return matrixConfigsOf(adapter.info);
    }
  }
  return [];
}

const settled = async (device: GPUDevice, found: Capabilities, options: DeviceOptions): Promise<Capabilities> => ({
  ...(await withDialect(device, found)),
  ...options.capabilities,
});

/** Probes how subgroup matrices are written here; products that come out wrong in every way are not used. */
async function withDialect(device: GPUDevice, capabilities: Capabilities): Promise<Capabilities> {
  const { matrixFeature, subgroupSize } = capabilities;
  let { matrixConfigs } = capabilities;
  const wrongMatrices: MatrixConfig[] = [];
  while (matrixFeature !== undefined && matrixConfigs.length > 0) {
    const used = (['f32', 'f16'] as const).flatMap((accumulate) =>
      Object.values(matrixProducts(matrixConfigs, accumulate) ?? {}),
    );
    if (used.length === 0) break;
    const products = [...new Set<MatrixConfig>(used)];
    const { dialect, wrong } = await probeMatrixDialect(device, matrixFeature, products, subgroupSize[1]);
    if (dialect !== undefined) return { ...capabilities, matrixConfigs, wrongMatrices, matrixDialect: dialect };
    if (wrong !== undefined) wrongMatrices.push(wrong);
    matrixConfigs = matrixConfigs.filter((config) => config !== wrong);
  }
  return { ...capabilities, matrixConfigs, wrongMatrices };
}

/** The compiler's first errors, each with its place and the line. Not every engine says them elsewhere. */
async function compilerErrors(module: GPUShaderModule, code: string): Promise<string[]> {
  const { messages } = await module.getCompilationInfo();
  const lines = code.split('\n');
  return messages
    .filter(({ type }) => type === 'error')
    .slice(0, 3)
    .map(
      ({ lineNum, linePos, message }) =>
        `${lineNum}:${linePos}: ${message} in '${(lines[lineNum - 1] ?? '').trim().slice(0, 120)}'`,
    );
}

/** Work that failed may have failed because the device went: how long to wait for word of it. */
const LOSS_IS_TOLD_MS = 100;

/** What holds memory of a device. */
interface Resource {
  dispose(): void;
}

export class GpuContext {
  readonly device: GPUDevice;
  /** Shapes of the matrix kernel that came out right in a trial. */
  readonly rightShapes = new Set<string>();
  #capabilities: Capabilities;
  /** True when the device was opened here and is destroyed here. */
  readonly owned: boolean;
  /** Wall time spent compiling pipelines so far, milliseconds (concurrent compilations overlap and add up). */
  compileMilliseconds = 0;
  #lost: ExecutionError | undefined;
  readonly #loss: Promise<never>;
  readonly #pipelines = new Map<string, Promise<GPUComputePipeline>>();
  readonly scratch: ScratchPool;
  readonly outputs: OutputPool;
  readonly #resources = new Set<Resource>();
  readonly #runs = new Set<Promise<unknown>>();
  #runCount = 0;
  #disposed = false;

  constructor(device: GPUDevice, capabilities: Capabilities, owned: boolean) {
    this.device = device;
    this.#capabilities = capabilities;
    this.owned = owned;
    this.scratch = new ScratchPool(device, capabilities.bufferBytes);
    this.outputs = new OutputPool(device);
    this.#loss = device.lost.then((info) => {
      this.#lost = new ExecutionError('device-lost', `the GPU device was lost (${info.reason}): ${info.message}`);
      throw this.#lost;
    });
    this.#loss.catch(() => {});
  }

  get capabilities(): Capabilities {
    return this.#capabilities;
  }

  /** A shape of the matrix kernel that came out wrong. */
  excludeShape(key: string): void {
    const { wrongShapes = [] } = this.#capabilities;
    this.#capabilities = { ...this.#capabilities, wrongShapes: [...wrongShapes, key] };
  }

  /** What was measured: plans that are made from now on prefer it. */
  prefer(tuning: readonly TunedEntry[]): void {
    this.#capabilities = { ...this.#capabilities, tuning };
  }

  /** Nothing runs here. */
  get idle(): boolean {
    return this.#runs.size === 0;
  }

  /** Runs so far. */
  get runCount(): number {
    return this.#runCount;
  }

  /** The error of the loss, once the device is lost. */
  get lost(): ExecutionError | undefined {
    return this.#lost;
  }

  /** The pipeline of a kernel, compiled once per device and source. */
  pipeline(label: string, code: string): Promise<GPUComputePipeline> {
    let pipeline = this.#pipelines.get(code);
    if (pipeline === undefined) {
      pipeline = this.unlessLost(this.#compile(label, code));
      this.#pipelines.set(code, pipeline);
      // A failed compilation may be one of memory; the next call tries again.
      pipeline.catch(() => this.#pipelines.delete(code));
    }
    return pipeline;
  }

  async #compile(label: string, code: string): Promise<GPUComputePipeline> {
    const started = performance.now();
    // The scope keeps the module's errors from the device's owner; the pipeline's rejection carries the message.
    this.device.pushErrorScope('validation');
    const module = this.device.createShaderModule({ label, code });
    const compiled = this.device.createComputePipelineAsync({
      label,
      layout: 'auto',
      compute: { module, entryPoint: 'main' },
    });
    const scope = this.device.popErrorScope();
    try {
      return await compiled;
    } catch (cause) {
      const invalid = await scope;
      const messages = await compilerErrors(module, code).catch(() => []);
      const reason = messages.length > 0 ? messages.join('; ') : (invalid?.message ?? messageOf(cause));
      throw new ExecutionError('execution-failed', `kernel '${label}': ${reason}`, cause);
    } finally {
      scope.catch(() => {});
      this.compileMilliseconds += performance.now() - started;
    }
  }

  /**
   * Runs synchronous GPU work inside error scopes. The second result settles when the scopes do, which waits for no
   * GPU work: it is undefined or what went wrong.
   */
  checked<T>(work: () => T): readonly [T, Promise<ExecutionError | undefined>] {
    const { device } = this;
    device.pushErrorScope('internal');
    device.pushErrorScope('validation');
    device.pushErrorScope('out-of-memory');
    const pop = () => Promise.all([device.popErrorScope(), device.popErrorScope(), device.popErrorScope()]);
    let result: T;
    try {
      result = work();
    } catch (error) {
      pop().catch(() => {});
      throw error;
    }
    const outcome = this.unlessLost(pop()).then(
      ([memory, validation, internal]) => {
        if (memory) return new ExecutionError('out-of-memory', `the GPU is out of memory: ${memory.message}`);
        const failure = validation ?? internal;
        return failure ? new ExecutionError('execution-failed', failure.message) : undefined;
      },
      (error: unknown) =>
        error instanceof ExecutionError ? error : new ExecutionError('execution-failed', messageOf(error), error),
    );
    return [result, outcome];
  }

  /** The promise's result, or the loss of the device if that comes first. */
  async unlessLost<T>(promise: Promise<T>): Promise<T> {
    if (this.#lost !== undefined) {
      promise.catch(() => {});
      throw this.#lost;
    }
    try {
      return await Promise.race([promise, this.#loss]);
    } catch (error) {
      // Work fails in its own words when the device goes, in Chromium before the loss is told; what matters is the
      // loss.
      const told = new Promise((resolve) => setTimeout(resolve, LOSS_IS_TOLD_MS));
      await Promise.race([told, this.#loss.catch(() => {})]);
      throw this.#lost ?? error;
    }
  }

  /** Neither lost nor disposed. */
  get usable(): boolean {
    return this.#lost === undefined && !this.#disposed;
  }

  /** Takes note of what holds memory of the device, to free it with the backend. */
  owns(resource: Resource): void {
    this.#resources.add(resource);
  }

  disowns(resource: Resource): void {
    this.#resources.delete(resource);
  }

  /** A run, which disposing waits for. */
  during<T>(run: Promise<T>): Promise<T> {
    this.#runs.add(run);
    this.#runCount++;
    const ended = () => {
      this.#runs.delete(run);
    };
    run.then(ended, ended);
    return run;
  }

  /** Frees all memory on the device once the runs under way have ended; a caller's device lives on. */
  async dispose(): Promise<void> {
    this.#disposed = true;
    while (this.#runs.size > 0) await Promise.allSettled(this.#runs);
    for (const resource of [...this.#resources]) resource.dispose();
    this.scratch.clear();
    this.outputs.close();
    this.#pipelines.clear();
    if (this.owned) this.device.destroy();
  }
}
