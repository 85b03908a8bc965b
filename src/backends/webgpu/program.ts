/** A sequence of dispatches on a device: pipelines, tables and parameters, bind groups. */
import { ExecutionError, SageAttentionError } from '../../errors.ts';
import type { GpuContext } from './device.ts';
import type { BufferName, Launch } from './launches/launch.ts';
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

/** Bind groups of callers' buffers are kept for this many sets of buffers. */
const BIND_GROUP_SETS = 8;

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
  /** Bind groups by the buffers that they bind, most recently used last. */
  readonly #sets: { readonly buffers: Buffers; readonly groups: readonly GPUBindGroup[] }[] = [];

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
    const set = found ?? { buffers: { ...buffers }, groups: this.#bind({ ...buffers, tables: this.#tables }) };
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
    this.#context.disowns(this);
    for (const buffer of Object.values(this.#ownScratch ?? {})) buffer.destroy();
    this.#ownScratch = undefined;
    this.#tables.destroy();
    this.#uniforms.destroy();
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
