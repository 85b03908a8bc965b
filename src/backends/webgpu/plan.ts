/** A problem made ready on a device: launches, scratch, bind groups; encoding and running it. */

import { type AttentionProblem, lseShapeOf, outputShapeOf } from '../../attention/problem.ts';
import { ExecutionError, InvalidArgumentError, SageAttentionError } from '../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import {
  contiguousStrides,
  elementCount,
  emptyTensor,
  isContiguous,
  type Tensor,
  type TensorView,
} from '../../tensor/tensor.ts';
import type { AttentionInputs, AttentionOutputs, KernelChoice, Plan, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import {
  type AttentionVariant,
  chooseVariant,
  type Emulation,
  type Family,
  keyValueLayoutOf,
} from './families/choose.ts';
import { rowVectors } from './kernels/layout.ts';
import type { BufferName, Launch } from './launches/launch.ts';
import {
  attentionLaunches,
  createStages,
  type KeyValueShape,
  keySplitsOf,
  keyValueBytes,
  keyValueShapeOf,
  mergeLaunches,
  padDim,
  prepareKeyValueLaunches,
  prepareQueryLaunches,
  recordsBytes,
  type Stages,
  scoreConfigOf,
  scoreScaleOf,
  statisticsLaunches,
} from './launches/stages.ts';
import {
  arrayOf,
  bufferBytes,
  bytesOf,
  emptyGpuTensor,
  GPU_BUFFER_USAGE,
  GPU_MAP_READ,
  type GpuTensor,
  isGpuTensor,
  validateBuffer,
  writeBytes,
} from './tensor.ts';

/** What a plan came to, for `doctor`, benches and tests. */
export interface PlanDetails {
  readonly family: Family;
  readonly variant: string;
  readonly adapter: string;
  /** Dispatches of one run, in order, by name. */
  readonly launches: readonly string[];
  readonly keySplits: number;
  readonly scratchBytes: number;
  /** Wall time that this plan waited for pipelines, milliseconds; 0 when all were cached. */
  readonly compileMilliseconds: number;
}

export interface EncodeOptions {
  /** Timestamps of the compute pass that the plan records. */
  readonly timestampWrites?: GPUComputePassTimestampWrites;
}

/** Options of plans beyond a kernel's own, for tests and tuning. */
export interface PlanOptions {
  readonly family?: Family;
  /** A variant of the family's table by name. Default: the first that fits. */
  readonly variant?: string;
  /**
   * Runs the matrix kernel with its matrix operations replaced by plain WGSL, on any device with subgroups: slow, and for
   * tests of everything else in it. The products are those of an H200 (`int8`) or of Apple's GPUs (`float32`).
   */
  readonly emulateMatrices?: Emulation;
}

type Buffers = Partial<Record<BufferName, GPUBuffer>>;

interface Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly launch: Launch;
  readonly uniformOffset: number;
}

const UNIFORM_SLOT = 256;

/** Bind groups of callers' buffers are kept for this many sets of buffers. */
const BIND_GROUP_SETS = 8;

/** A sequence of dispatches over named buffers, some of them its own. */
export class Program {
  readonly #context: GpuContext;
  readonly #dispatches: readonly Dispatch[];
  readonly #own: Buffers;
  readonly #uniforms: GPUBuffer;
  /** Bind groups by the callers' buffers, most recently used last. */
  readonly #sets: { readonly buffers: Buffers; readonly groups: readonly GPUBindGroup[] }[] = [];

  private constructor(context: GpuContext, dispatches: readonly Dispatch[], own: Buffers, uniforms: GPUBuffer) {
    this.#context = context;
    this.#dispatches = dispatches;
    this.#own = own;
    this.#uniforms = uniforms;
  }

  /**
   * Compiles the launches' kernels and allocates buffers of the given sizes.
   *
   * @param tables contents of the buffer `tables`
   * @throws {ExecutionError} `out-of-memory`, `device-lost`, or `execution-failed` with the compiler's message
   */
  static async create(
    context: GpuContext,
    launches: readonly Launch[],
    sizes: Partial<Record<BufferName, number>>,
    tables: Uint32Array<ArrayBuffer>,
  ): Promise<Program> {
    const { device } = context;
    const pipelines = await Promise.all(launches.map(({ label, code }) => context.pipeline(label, code)));
    const created: GPUBuffer[] = [];
    const [program, outcome] = context.checked(() => {
      const buffer = (name: string, size: number, usage: number) => {
        const made = device.createBuffer({ label: `sageattention ${name}`, size, usage });
        created.push(made);
        return made;
      };
      const storage = GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST | GPU_BUFFER_USAGE.COPY_SRC;
      const own: Buffers = Object.fromEntries(
        Object.entries(sizes).map(([name, size]) => [
          name,
          buffer(name, Math.max(16, Math.ceil(size / 16) * 16), storage),
        ]),
      );
      own.tables = buffer('tables', Math.max(16, tables.byteLength), storage);
      device.queue.writeBuffer(own.tables, 0, tables);
      const uniforms = buffer(
        'parameters',
        Math.max(1, launches.length) * UNIFORM_SLOT,
        GPU_BUFFER_USAGE.UNIFORM | GPU_BUFFER_USAGE.COPY_DST,
      );
      const dispatches = launches.map((launch, i) => {
        device.queue.writeBuffer(uniforms, i * UNIFORM_SLOT, launch.params);
        return { pipeline: pipelines[i] as GPUComputePipeline, launch, uniformOffset: i * UNIFORM_SLOT };
      });
      return new Program(context, dispatches, own, uniforms);
    });
    const failure = await outcome;
    if (failure !== undefined) {
      for (const buffer of created) buffer.destroy();
      throw failure;
    }
    return program;
  }

  /** Records all dispatches as one compute pass. Allocates nothing for sets of buffers that it has seen lately. */
  encode(encoder: GPUCommandEncoder, buffers: Buffers, options: EncodeOptions = {}): void {
    const groups = this.#groups(buffers);
    const { timestampWrites } = options;
    const pass = encoder.beginComputePass(timestampWrites === undefined ? {} : { timestampWrites });
    this.#dispatches.forEach(({ pipeline, launch }, i) => {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, groups[i] as GPUBindGroup);
      pass.dispatchWorkgroups(...launch.groups);
    });
    pass.end();
  }

  #groups(buffers: Buffers): readonly GPUBindGroup[] {
    const names = Object.keys(buffers) as BufferName[];
    const at = this.#sets.findIndex((set) => names.every((name) => set.buffers[name] === buffers[name]));
    const found = at < 0 ? undefined : this.#sets.splice(at, 1)[0];
    const set = found ?? { buffers: { ...buffers }, groups: this.#bind({ ...this.#own, ...buffers }) };
    this.#sets.push(set);
    if (this.#sets.length > BIND_GROUP_SETS) this.#sets.shift();
    return set.groups;
  }

  #bind(buffers: Buffers): GPUBindGroup[] {
    return this.#dispatches.map(({ pipeline, launch, uniformOffset }) =>
      this.#context.device.createBindGroup({
        layout: pipeline.getBindGroupLayout(0),
        entries: [
          { binding: 0, resource: { buffer: this.#uniforms, offset: uniformOffset, size: launch.params.byteLength } },
          ...launch.bindings.map(({ slot, buffer: name, start, end }) => {
            const buffer = buffers[name];
            if (buffer === undefined) throw new ExecutionError('execution-failed', `no buffer '${name}' for this run`);
            // Spans of empty or tiny tensors reach past a buffer's end; the binding then ends with the buffer.
            return {
              binding: slot,
              resource: { buffer, offset: start, size: Math.min(end, Math.floor(buffer.size / 4) * 4) - start },
            };
          }),
        ],
      }),
    );
  }

  dispose(): void {
    for (const buffer of Object.values(this.#own)) buffer.destroy();
    this.#uniforms.destroy();
    this.#sets.length = 0;
  }
}

/** The stages of attention over keys that are in scratch or in a cache. */
export interface AttentionParts {
  readonly launches: readonly Launch[];
  readonly sizes: Partial<Record<BufferName, number>>;
  readonly variant: AttentionVariant;
  readonly keySplits: number;
}

/** Launches for Q, attention and merging, and the scratch that they take. */
export function attentionParts(
  stages: Stages,
  choice: KernelChoice,
  options: PlanOptions,
  keyScale: 'token' | 'tile',
): AttentionParts {
  const { problem, capabilities } = stages;
  const variant = chooseVariant(capabilities, problem, choice, options);
  const splits = keySplitsOf(stages, variant.kernel.rows);
  const config = scoreConfigOf(stages, splits, keyScale);
  const rowConstant = config.returnLse || config.softcap;
  const empty = elementCount(outputShapeOf(problem)) === 0;
  const launches = empty
    ? []
    : [
        ...prepareQueryLaunches(stages, choice.qkQuantGran, scoreScaleOf(problem, config), rowConstant),
        ...attentionLaunches(stages, config, variant.kernel, splits),
        ...(config.result === 'partial' ? mergeLaunches(stages, config, splits) : []),
      ];
  const sizes: Partial<Record<BufferName, number>> = {
    queryRows: problem.queryHeads * stages.rowsPerQueryHead * rowVectors(padDim(problem.headDim)) * 16,
    ...(config.result === 'partial' ? { records: recordsBytes(problem, splits) } : {}),
  };
  return { launches, sizes, variant, keySplits: splits.count };
}

/** A plan may not need a buffer larger than the device has. */
export function checkSizes(context: GpuContext, sizes: Partial<Record<BufferName, number>>): void {
  for (const [name, size] of Object.entries(sizes)) {
    if (size > context.capabilities.bufferBytes) {
      throw new SageAttentionError(
        'unsupported-size',
        `scratch '${name}' needs ${size} bytes, more than this device's maxBufferSize of ${context.capabilities.bufferBytes}; split the call by batch or heads`,
        { expected: `at most ${context.capabilities.bufferBytes} bytes`, received: `${size} bytes` },
      );
    }
  }
}

/** CPU views are uploaded from their first element on. */
export function rebased(problem: AttentionProblem): AttentionProblem {
  if (problem.location !== 'cpu') return problem;
  const { q, k, v, mask } = problem;
  const first = <T extends { readonly offset: number }>(layout: T): T => ({ ...layout, offset: 0 });
  return { ...problem, q: first(q), k: first(k), v: first(v), mask: mask === undefined ? undefined : first(mask) };
}

/**
 * What `run` shares between plans and caches: moving CPU tensors, outputs, errors.
 *
 * @param held buffers that are neither inputs nor the program's own: a cache's
 */
export async function runProgram(
  context: GpuContext,
  program: Program,
  problem: AttentionProblem,
  inputs: Readonly<Record<string, TensorView | undefined>>,
  run: RunContext,
  held: Buffers = {},
): Promise<AttentionOutputs> {
  run.signal?.throwIfAborted();
  const { device } = context;
  const temporary: GPUBuffer[] = [];
  const onCpu = problem.location === 'cpu';
  const shape = outputShapeOf(problem);
  const lseShape = lseShapeOf(problem);
  for (const [name, view] of Object.entries(inputs)) if (view !== undefined) validateInput(name, view);
  try {
    const [work, outcome] = context.checked(() => {
      const buffers: Buffers = { ...held };
      for (const [name, view] of Object.entries(inputs)) {
        if (view !== undefined) buffers[name as BufferName] = uploaded(device, view, temporary);
      }
      const output = emptyGpuTensor(device, problem.dtype, shape);
      const lse = problem.returnLse ? emptyGpuTensor(device, 'float32', lseShape) : undefined;
      buffers.output = output.buffer;
      if (lse !== undefined) buffers.lse = lse.buffer;
      const encoder = device.createCommandEncoder({ label: 'sageattention' });
      program.encode(encoder, buffers);
      const downloads = onCpu
        ? [output, ...(lse === undefined ? [] : [lse])].map((tensor) => staged(device, encoder, tensor))
        : [];
      if (onCpu) temporary.push(output.buffer, ...(lse === undefined ? [] : [lse.buffer]), ...downloads);
      device.queue.submit([encoder.finish()]);
      return { output, lse, downloads };
    });
    const { output, lse, downloads } = work;
    const failure = await outcome;
    if (failure !== undefined) {
      if (!onCpu) for (const tensor of [output, lse]) tensor?.buffer.destroy();
      throw failure;
    }
    if (!onCpu) return lse === undefined ? { output } : { output, lse };
    const [outputBytes, lseBytes] = await Promise.all(downloads.map((buffer) => read(context, buffer)));
    run.signal?.throwIfAborted();
    return {
      output: cpuTensor(problem.dtype, shape, outputBytes as ArrayBuffer),
      ...(lseBytes === undefined ? {} : { lse: cpuTensor('float32', lseShape, lseBytes) }),
    };
  } finally {
    for (const buffer of temporary) buffer.destroy();
  }
}

function validateInput(name: string, view: TensorView): void {
  if (isGpuTensor(view)) validateBuffer(name, view);
}

/** The buffer of a GPU tensor, or a new one with a CPU tensor's elements from its first on. */
export function uploaded(device: GPUDevice, view: TensorView, temporary: GPUBuffer[]): GPUBuffer {
  if (isGpuTensor(view)) return view.buffer;
  const { data, offset, dtype } = view as Tensor;
  const size = Math.max(0, Math.min(data.length, extent(view)) - offset);
  const buffer = device.createBuffer({
    label: 'sageattention input',
    size: Math.ceil(bufferBytes(dtype, size) / 16) * 16,
    usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST,
  });
  temporary.push(buffer);
  if (size > 0) writeBytes(device, buffer, bytesOf(data, offset, offset + size));
  return buffer;
}

const extent = (view: TensorView) =>
  elementCount(view.shape) === 0
    ? 0
    : view.shape.reduce((end, size, i) => end + (size - 1) * (view.strides[i] as number), view.offset) + 1;

/** A mappable copy of a tensor, recorded. */
function staged(device: GPUDevice, encoder: GPUCommandEncoder, tensor: GpuTensor): GPUBuffer {
  const { size } = tensor.buffer;
  const staging = device.createBuffer({
    label: 'sageattention download',
    size,
    usage: GPU_BUFFER_USAGE.MAP_READ | GPU_BUFFER_USAGE.COPY_DST,
  });
  encoder.copyBufferToBuffer(tensor.buffer, 0, staging, 0, size);
  return staging;
}

async function read(context: GpuContext, staging: GPUBuffer): Promise<ArrayBuffer> {
  await context.unlessLost(staging.mapAsync(GPU_MAP_READ));
  return staging.getMappedRange().slice(0);
}

function cpuTensor(dtype: Tensor['dtype'], shape: readonly number[], bytes: ArrayBuffer): Tensor {
  const length = elementCount(shape) * BYTES_PER_ELEMENT[dtype];
  if (length === 0) return emptyTensor(shape, dtype === 'bool' ? 'float32' : dtype);
  const data = arrayOf(dtype, bytes.byteLength === length ? bytes : bytes.slice(0, length));
  return { location: 'cpu', dtype, shape, strides: contiguousStrides(shape), offset: 0, data };
}

interface Built {
  readonly context: GpuContext;
  readonly program: Program;
  readonly details: PlanDetails;
}

/** A plan of this backend: `Plan` with recording into the caller's encoder. */
export class WebgpuPlan implements Plan {
  readonly kernel: KernelChoice;
  readonly #problem: AttentionProblem;
  readonly #device: () => Promise<GpuContext>;
  readonly #options: PlanOptions;
  #built: Built;
  #rebuilding: Promise<Built> | undefined;
  #disposed = false;

  private constructor(
    problem: AttentionProblem,
    kernel: KernelChoice,
    device: () => Promise<GpuContext>,
    options: PlanOptions,
    built: Built,
  ) {
    this.#problem = problem;
    this.kernel = kernel;
    this.#device = device;
    this.#options = options;
    this.#built = built;
  }

  /** @param device gives the backend's present device; a plan of a lost device is built again on the next one */
  static async create(
    problem: AttentionProblem,
    kernel: KernelChoice,
    device: () => Promise<GpuContext>,
    options: PlanOptions,
  ): Promise<WebgpuPlan> {
    const own = rebased(problem);
    return new WebgpuPlan(own, kernel, device, options, await build(await device(), own, kernel, options));
  }

  /** Family, tiles, launches and compile time of this plan. */
  get details(): PlanDetails {
    return this.#built.details;
  }

  async run(inputs: AttentionInputs, run: RunContext = {}): Promise<AttentionOutputs> {
    if (this.#disposed) throw new ExecutionError('disposed', 'this plan has been disposed');
    const { context, program } = await this.#current();
    const { q, k, v, attnMask } = inputs;
    return runProgram(context, program, this.#problem, { q, k, v, mask: attnMask }, run);
  }

  /**
   * Records the run into the caller's command encoder; nothing is submitted, read back or waited for. With `outputs`
   * and buffers used lately, nothing is allocated.
   *
   * The plan's scratch is written: commands of one plan must be submitted in the order in which they shall take effect.
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
    if (this.#disposed) throw new ExecutionError('disposed', 'this plan has been disposed');
    const { context, program } = this.#built;
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
    const { q, k, v, attnMask } = inputs;
    const buffers: Buffers = {};
    for (const [name, view] of [
      ['q', q],
      ['k', k],
      ['v', v],
      ['mask', attnMask],
    ] as const) {
      if (view === undefined) continue;
      if (!isGpuTensor(view)) throw new InvalidArgumentError('mixed-locations', name, 'a GPU tensor', view.location);
      validateBuffer(name, view);
      if (problem[name]?.offset !== view.offset) {
        throw new InvalidArgumentError(
          'invalid-strides',
          `${name}.offset`,
          `${problem[name]?.offset}, as planned`,
          `${view.offset}`,
        );
      }
      buffers[name] = view.buffer;
    }
    const output = outputs?.output ?? emptyGpuTensor(context.device, problem.dtype, outputShapeOf(problem));
    const lse = problem.returnLse
      ? (outputs?.lse ?? emptyGpuTensor(context.device, 'float32', lseShapeOf(problem)))
      : undefined;
    validateOutput('outputs.output', output, problem.dtype, outputShapeOf(problem));
    if (lse !== undefined) validateOutput('outputs.lse', lse, 'float32', lseShapeOf(problem));
    buffers.output = output.buffer;
    if (lse !== undefined) buffers.lse = lse.buffer;
    program.encode(encoder, buffers, options);
    return lse === undefined ? { output } : { output, lse };
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#built.program.dispose();
  }

  /** What was built for the present device: built again when the device was lost since. */
  async #current(): Promise<Built> {
    const { context } = this.#built;
    if (context.lost === undefined) return this.#built;
    this.#rebuilding ??= this.#device()
      .then((next) => build(next, this.#problem, this.kernel, this.#options))
      .finally(() => {
        this.#rebuilding = undefined;
      });
    this.#built = await this.#rebuilding;
    return this.#built;
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
  options: PlanOptions,
): Promise<Built> {
  const { capabilities } = context;
  const keyValue: KeyValueShape = keyValueShapeOf(
    problem,
    kernel,
    capabilities,
    keyValueLayoutOf(capabilities, problem, options),
  );
  const stages = createStages(problem, capabilities, keyValue);
  const empty = elementCount(outputShapeOf(problem)) === 0;
  const prepare = empty ? [] : [...statisticsLaunches(stages), ...prepareKeyValueLaunches(stages)];
  const parts = attentionParts(stages, kernel, options, kernel.qkQuantGran === 'per-thread' ? 'token' : 'tile');
  const launches = [...prepare, ...parts.launches];
  const sizes = { ...keyValueBytes(keyValue), ...parts.sizes };
  checkSizes(context, sizes);
  const started = performance.now();
  const program = await Program.create(context, launches, sizes, stages.tables.bytes);
  const details: PlanDetails = {
    family: parts.variant.family,
    variant: parts.variant.name,
    adapter: capabilities.adapter,
    launches: launches.map(({ label }) => label),
    keySplits: parts.keySplits,
    scratchBytes: Object.values(sizes).reduce((sum, size) => sum + size, 0),
    compileMilliseconds: performance.now() - started,
  };
  return { context, program, details };
}
