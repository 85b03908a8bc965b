/** A sequence of dispatches on a device: pipelines, the buffers of its own, bind groups. */
import { ExecutionError, SageAttentionError } from '../../errors.ts';
import type { GpuContext } from './device.ts';
import type { BufferName, Launch } from './launches/launch.ts';
import { GPU_BUFFER_USAGE } from './tensor.ts';

export interface EncodeOptions {
  /** Timestamps of the compute pass that the plan records. */
  readonly timestampWrites?: GPUComputePassTimestampWrites;
}

export type Buffers = Partial<Record<BufferName, GPUBuffer>>;

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
