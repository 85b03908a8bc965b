/** A sequence of dispatches on a device: pipelines, tables and parameters, bind groups. */
import { ExecutionError, SageAttentionError } from '../../errors.ts';
import type { GpuContext } from './device.ts';
import type { Launch } from './launches/launch.ts';
import { allocate, type BufferSizes, type Buffers } from './scratch.ts';
import { GPU_BUFFER_USAGE } from './tensor.ts';

export interface EncodeOptions {
  /** Timestamps of the compute pass that the plan records. */
  readonly timestampWrites?: GPUComputePassTimestampWrites;
}

interface Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly launch: Launch;
  readonly uniformOffset: number;
}

const UNIFORM_SLOT = 256;

/** Bind groups that are kept of each dispatch: callers whose buffers take turns bind a few dozen sets. */
const KEPT_GROUPS = 32;

interface KeptGroup {
  /** What the dispatch binds, in the order of its bindings. */
  readonly buffers: readonly (GPUBuffer | undefined)[];
  readonly group: GPUBindGroup;
}

/** What {@link Program.record} binds of the caller's. */
export interface RecordedBuffers {
  readonly q: GPUBuffer;
  readonly k: GPUBuffer;
  readonly v: GPUBuffer;
  readonly mask?: GPUBuffer;
  readonly sinks?: GPUBuffer;
  readonly blockMap?: GPUBuffer;
  readonly output: GPUBuffer;
}

/** Sets of buffers of `record` whose bind groups are kept together: the layers of a model, which run in turn. */
const KEPT_SETS = 64;

interface KeptSet {
  readonly buffers: RecordedBuffers;
  readonly groups: readonly GPUBindGroup[];
}

const isSameSet = (a: RecordedBuffers, b: RecordedBuffers) =>
  a.output === b.output &&
  a.q === b.q &&
  a.k === b.k &&
  a.v === b.v &&
  a.mask === b.mask &&
  a.sinks === b.sinks &&
  a.blockMap === b.blockMap;

/** A sequence of dispatches over named buffers: the caller's, and scratch. */
export class Program {
  /** Bytes of scratch that a run takes. */
  readonly scratch: BufferSizes;
  readonly #context: GpuContext;
  readonly #dispatches: readonly Dispatch[];
  readonly #tables: GPUBuffer;
  readonly #uniforms: GPUBuffer;
  /** Scratch for callers' encoders, which are submitted nobody knows when. */
  #ownScratch: Buffers | undefined;
  /** Bind groups of each dispatch by the one or two callers' buffers that it binds, most recently used last. */
  readonly #kept: KeptGroup[][];
  readonly #sets: KeptSet[] = [];
  /** Place of the set that was recorded last. */
  #lastSet = -1;

  private constructor(
    context: GpuContext,
    dispatches: readonly Dispatch[],
    scratch: BufferSizes,
    tables: GPUBuffer,
    uniforms: GPUBuffer,
  ) {
    this.#context = context;
    this.#dispatches = dispatches;
    this.scratch = scratch;
    this.#tables = tables;
    this.#uniforms = uniforms;
    this.#kept = dispatches.map(() => []);
    context.owns(this);
  }

  /**
   * Compiles the launches' kernels.
   *
   * @param scratch bytes of scratch that the launches bind
   * @param tables contents of the buffer `tables`
   * @throws {ExecutionError} `out-of-memory`, `device-lost`, or `execution-failed` with the compiler's message
   */
  static async create(
    context: GpuContext,
    launches: readonly Launch[],
    scratch: BufferSizes,
    tables: Uint32Array<ArrayBuffer>,
  ): Promise<Program> {
    checkSizes(context, scratch);
    const { device } = context;
    const pipelines = await Promise.all(launches.map(({ label, code }) => context.pipeline(label, code)));
    const [program, outcome] = context.checked(() => {
      const tablesBuffer = allocate(device, { tables: tables.byteLength }).tables as GPUBuffer;
      device.queue.writeBuffer(tablesBuffer, 0, tables);
      const uniforms = device.createBuffer({
        label: 'sageattention parameters',
        size: Math.max(1, launches.length) * UNIFORM_SLOT,
        usage: GPU_BUFFER_USAGE.UNIFORM | GPU_BUFFER_USAGE.COPY_DST,
      });
      const dispatches = launches.map((launch, i) => {
        device.queue.writeBuffer(uniforms, i * UNIFORM_SLOT, launch.params);
        return { pipeline: pipelines[i] as GPUComputePipeline, launch, uniformOffset: i * UNIFORM_SLOT };
      });
      return new Program(context, dispatches, scratch, tablesBuffer, uniforms);
    });
    const failure = await outcome;
    if (failure !== undefined) {
      program.dispose();
      throw failure;
    }
    return program;
  }

  /** Scratch of this program alone, for commands that are submitted by others; allocated when first asked for. */
  get ownScratch(): Buffers {
    this.#ownScratch ??= allocate(this.#context.device, this.scratch);
    return this.#ownScratch;
  }

  /** Records all dispatches as one compute pass. Allocates nothing for buffers that it has seen lately. */
  encode(encoder: GPUCommandEncoder, buffers: Buffers, options: EncodeOptions = {}): void {
    const groups = this.#groups(buffers);
    const { timestampWrites } = options;
    const pass = encoder.beginComputePass(timestampWrites === undefined ? {} : { timestampWrites });
    this.#dispatch(pass, groups);
    pass.end();
  }

  /** Records all dispatches into a compute pass that is open; the pass keeps the last one's pipeline and bind group. */
  record(pass: GPUComputePassEncoder, buffers: RecordedBuffers): void {
    this.#dispatch(pass, this.#setOf(buffers).groups);
  }

  /** The set behind the last one is mostly the next: layers run in the same order in each run. */
  #setOf(buffers: RecordedBuffers): KeptSet {
    const sets = this.#sets;
    for (let step = 1; step <= sets.length; step++) {
      const at = (this.#lastSet + step) % sets.length;
      const set = sets[at] as KeptSet;
      if (!isSameSet(set.buffers, buffers)) continue;
      this.#lastSet = at;
      return set;
    }
    const made = { buffers, groups: this.#groups({ ...this.ownScratch, ...buffers }) };
    this.#lastSet = sets.length < KEPT_SETS ? sets.length : (this.#lastSet + 1) % KEPT_SETS;
    sets[this.#lastSet] = made;
    return made;
  }

  #dispatch(pass: GPUComputePassEncoder, groups: readonly GPUBindGroup[]): void {
    this.#dispatches.forEach(({ pipeline, launch }, i) => {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, groups[i] as GPUBindGroup);
      pass.dispatchWorkgroups(...launch.groups);
    });
  }

  #groups(buffers: Buffers): readonly GPUBindGroup[] {
    const all = { ...buffers, tables: this.#tables };
    return this.#dispatches.map((dispatch, i) => {
      const kept = this.#kept[i] as KeptGroup[];
      const own = dispatch.launch.bindings.map(({ buffer }) => all[buffer]);
      const at = kept.findIndex((entry) => entry.buffers.every((buffer, slot) => buffer === own[slot]));
      const found = at < 0 ? undefined : kept.splice(at, 1)[0];
      const entry = found ?? { buffers: own, group: this.#bind(dispatch, all) };
      kept.push(entry);
      if (kept.length > KEPT_GROUPS) kept.shift();
      return entry.group;
    });
  }

  #bind({ pipeline, launch, uniformOffset }: Dispatch, buffers: Buffers): GPUBindGroup {
    return this.#context.device.createBindGroup({
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
    });
  }

  dispose(): void {
    this.#context.disowns(this);
    for (const buffer of Object.values(this.#ownScratch ?? {})) buffer.destroy();
    this.#ownScratch = undefined;
    this.#tables.destroy();
    this.#uniforms.destroy();
    for (const kept of this.#kept) kept.length = 0;
    this.#sets.length = 0;
  }
}

/** A plan may not need a buffer larger than the device has. */
export function checkSizes(context: GpuContext, sizes: BufferSizes): void {
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
