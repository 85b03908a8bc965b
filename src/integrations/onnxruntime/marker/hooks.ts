/**
 * Where onnxruntime-web records a dispatch of a marker, our launches are recorded instead, into the same compute pass.
 *
 * onnxruntime-web calls WebGPU through JavaScript objects. Five methods of one `GPUDevice` object, and those of encoders and passes
 * that come from it, get properties of their own that call the originals; no prototype is touched, and passes outside of a run with
 * markers are left as they are.
 */
import { messageOf } from '../../../errors.ts';

export type Entries = readonly GPUBindGroupEntry[];

/** Records what stands in the place of a marker's dispatch, whose bind group has these entries. */
export type Work = (pass: GPUComputePassEncoder, entries: Entries) => void;

export interface SeenDispatch {
  /** WGSL; undefined for a pipeline that is older than the hooks. */
  readonly code: string | undefined;
  readonly entries: Entries;
}

/** A run whose markers are replaced. */
interface Armed {
  /** By the WGSL of the marker. */
  readonly works: ReadonlyMap<string, Work>;
  replaced: number;
  failure: string | undefined;
}

const hooked = new WeakMap<GPUDevice, DeviceHooks>();

/** The last work that waits for its turn. */
let turn: Promise<unknown> = Promise.resolve();

type Method = (...args: never[]) => unknown;

/** Gives one object a method of its own, made of the one that it has. */
function replaceMethod<T extends object, N extends keyof T>(
  target: T,
  name: N,
  replaced: (original: T[N]) => T[N],
): void {
  const original = (target[name] as Method).bind(target) as T[N];
  Object.defineProperty(target, name, { value: replaced(original), configurable: true, writable: true });
}

/** What onnxruntime is given for the layout of a marker's bind groups in a run that replaces it. */
const MARKER_LAYOUT = {} as GPUBindGroupLayout;

/** What it is given for such a bind group: nothing binds it, and making a real one takes a fifth of a marker's time. */
class MarkerGroup {
  readonly entries: Entries;

  constructor(entries: Entries) {
    this.entries = entries;
  }
}

export class DeviceHooks {
  readonly #codes = new WeakMap<GPUShaderModule, string>();
  /** WGSL of each pipeline. */
  readonly #pipelines = new WeakMap<GPUComputePipeline, string>();
  /** Of a watched run, or one whose markers' layouts are not asked for: onnxruntime makes a bind group for each dispatch. */
  readonly #groups = new Map<GPUBindGroup, Entries>();
  /** Markers' bind groups are known by {@link MARKER_LAYOUT}, so that others need not be remembered. */
  #asksForLayouts = false;
  readonly #tags = new Map<string, number>();
  /** WGSL of markers by their equation and type. */
  readonly learned = new Map<string, string>();
  #seen: SeenDispatch[] | undefined;
  #armed: Armed | undefined;

  /** Those of a device, once however many sessions ask. */
  static on(device: GPUDevice): DeviceHooks {
    let hooks = hooked.get(device);
    if (hooks === undefined) {
      hooks = new DeviceHooks(device);
      hooked.set(device, hooks);
    }
    return hooks;
  }

  private constructor(device: GPUDevice) {
    replaceMethod(device, 'createShaderModule', (create) => (descriptor) => {
      const module = create(descriptor);
      this.#codes.set(module, descriptor.code);
      return module;
    });
    const noted = (pipeline: GPUComputePipeline, descriptor: GPUComputePipelineDescriptor) => {
      const code = this.#codes.get(descriptor.compute.module);
      if (code === undefined) return pipeline;
      this.#pipelines.set(pipeline, code);
      replaceMethod(pipeline, 'getBindGroupLayout', (get) => (index) => {
        if (index !== 0 || this.#workOf(pipeline) === undefined) return get(index);
        this.#asksForLayouts = true;
        return MARKER_LAYOUT;
      });
      return pipeline;
    };
    replaceMethod(device, 'createComputePipeline', (create) => (descriptor) => noted(create(descriptor), descriptor));
    replaceMethod(
      device,
      'createComputePipelineAsync',
      (create) => async (descriptor) => noted(await create(descriptor), descriptor),
    );
    replaceMethod(device, 'createBindGroup', (create) => (descriptor) => {
      const entries = descriptor.entries as Entries;
      if (descriptor.layout === MARKER_LAYOUT) return new MarkerGroup(entries) as unknown as GPUBindGroup;
      const group = create(descriptor);
      const isAsked = this.#armed !== undefined && !this.#asksForLayouts;
      if (isAsked || this.#seen !== undefined) this.#groups.set(group, entries);
      return group;
    });
    replaceMethod(device, 'createCommandEncoder', (create) => (descriptor) => {
      const encoder = create(descriptor);
      const begin = encoder.beginComputePass;
      encoder.beginComputePass = (passDescriptor) => this.#watch(begin.call(encoder, passDescriptor));
      return encoder;
    });
  }

  /** The number of a kind of markers, the same whenever it is asked for. */
  tagOf(kind: string): number {
    const tag = this.#tags.get(kind) ?? this.#tags.size;
    this.#tags.set(kind, tag);
    return tag;
  }

  /**
   * One after the other: what is replaced belongs to the device. Devices take turns too, since onnxruntime's WebAssembly, of which a program
   * has one, fails in two asynchronous runs at once.
   */
  exclusive<T>(work: () => Promise<T>): Promise<T> {
    const run = turn.then(work);
    turn = run.catch(() => undefined);
    return run;
  }

  /** Runs the work and tells the dispatches that were recorded meanwhile. Inside {@link exclusive}. */
  async watch(work: () => Promise<void>): Promise<readonly SeenDispatch[]> {
    const seen: SeenDispatch[] = [];
    this.#seen = seen;
    try {
      await work();
    } finally {
      this.#seen = undefined;
      this.#groups.clear();
    }
    return seen;
  }

  /** Runs the work with the markers replaced. Inside {@link exclusive}. */
  async replacing<T>(works: ReadonlyMap<string, Work>, work: () => Promise<T>): Promise<T> {
    this.#armed = { works, replaced: 0, failure: undefined };
    try {
      return await work();
    } finally {
      this.#armed = undefined;
      this.#groups.clear();
    }
  }

  /** Markers replaced so far in this run. */
  get replaced(): number {
    return this.#armed?.replaced ?? 0;
  }

  /** Why a marker of this run could not be replaced. */
  get failure(): string | undefined {
    return this.#armed?.failure;
  }

  #watch(pass: GPUComputePassEncoder): GPUComputePassEncoder {
    if (this.#armed === undefined && this.#seen === undefined) return pass;
    const { setPipeline, setBindGroup, dispatchWorkgroups } = pass;
    const original = {
      setPipeline: setPipeline.bind(pass),
      setBindGroup: setBindGroup.bind(pass),
      dispatchWorkgroups: dispatchWorkgroups.bind(pass),
    } as unknown as GPUComputePassEncoder;
    let pipeline: GPUComputePipeline | undefined;
    let work: Work | undefined;
    let group: GPUBindGroup | undefined;
    // A marker's pipeline and bind group are not set: its work sets its own, and what is dispatched next has another pipeline.
    let isGroupSet = true;
    pass.setPipeline = (next) => {
      pipeline = next;
      work = this.#workOf(next);
      if (work === undefined) original.setPipeline(next);
      return undefined;
    };
    pass.setBindGroup = ((...args: Parameters<typeof setBindGroup>) => {
      const [index, next] = args;
      // Offsets come with it; a marker has none.
      if (index !== 0 || args.length > 2) {
        if (index === 0) group = undefined;
        return original.setBindGroup(...args);
      }
      group = next as GPUBindGroup;
      isGroupSet = work === undefined && !(group instanceof MarkerGroup);
      if (isGroupSet) original.setBindGroup(0, group);
      return undefined;
    }) as typeof setBindGroup;
    pass.dispatchWorkgroups = (x, y, z) => {
      if (this.#seen !== undefined && pipeline !== undefined) {
        this.#seen.push({ code: this.#pipelines.get(pipeline), entries: this.#entriesOf(group) });
      }
      if (work === undefined) {
        if (group instanceof MarkerGroup) return this.#fail('the bind group of a marker was used by another dispatch');
        if (!isGroupSet && group !== undefined) original.setBindGroup(0, group);
        isGroupSet = true;
        return original.dispatchWorkgroups(x, y, z);
      }
      this.#replace(original, work, this.#entriesOf(group));
      isGroupSet = false;
      return undefined;
    };
    return pass;
  }

  #workOf(pipeline: GPUComputePipeline): Work | undefined {
    const code = this.#armed && this.#pipelines.get(pipeline);
    return code === undefined ? undefined : this.#armed?.works.get(code);
  }

  #entriesOf(group: GPUBindGroup | undefined): Entries {
    if (group instanceof MarkerGroup) return group.entries;
    return (group && this.#groups.get(group)) ?? [];
  }

  #fail(reason: string): undefined {
    if (this.#armed !== undefined) this.#armed.failure ??= reason;
  }

  /** Throws nothing: the caller is onnxruntime's WebAssembly. */
  #replace(pass: GPUComputePassEncoder, work: Work, entries: Entries): void {
    const armed = this.#armed;
    if (armed === undefined) return;
    armed.replaced++;
    try {
      // Behind a failure the run's results are discarded, and an Einsum over all letters would take hours.
      if (armed.failure === undefined) work(pass, entries);
    } catch (error) {
      armed.failure = messageOf(error);
    }
  }
}
