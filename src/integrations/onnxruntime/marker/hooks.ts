/**
 * Where onnxruntime-web records a dispatch of a marker, our launches are recorded instead, into the same compute pass.
 *
 * onnxruntime-web calls WebGPU through JavaScript objects. Six methods of one `GPUDevice` object, and those of encoders and passes
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

/** What onnxruntime is given for the bind group of a marker that is replaced: nothing binds it, and making a real one takes a fifth of a marker's time. */
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
  /** Bind groups of markers that a device did make. */
  readonly #groups = new WeakMap<GPUBindGroup, Entries>();
  /** WGSL of the pipeline that a layout of bind groups is made for; undefined for one that several have. */
  readonly #layouts = new WeakMap<GPUBindGroupLayout, string | undefined>();
  readonly #tags = new Map<string, number>();
  /** WGSL of markers by their equation and type. */
  readonly learned = new Map<string, string>();
  #seen: SeenDispatch[] | undefined;
  #armed: Armed | undefined;
  /** The pass that was begun last. */
  #pass: GPUComputePassEncoder | undefined;
  /** Markers whose bind group was asked for and that were not dispatched yet. */
  #awaited = 0;

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
    const groupLayouts = new WeakMap<GPUPipelineLayout, GPUBindGroupLayout>();
    replaceMethod(device, 'createPipelineLayout', (create) => (descriptor) => {
      const layout = create(descriptor);
      const [first] = descriptor.bindGroupLayouts;
      if (first != null) groupLayouts.set(layout, first);
      return layout;
    });
    const noteLayout = (layout: GPUBindGroupLayout, code: string) =>
      this.#layouts.set(layout, this.#layouts.has(layout) && this.#layouts.get(layout) !== code ? undefined : code);
    const noted = (pipeline: GPUComputePipeline, descriptor: GPUComputePipelineDescriptor) => {
      const code = this.#codes.get(descriptor.compute.module);
      if (code === undefined) return pipeline;
      this.#pipelines.set(pipeline, code);
      const given = typeof descriptor.layout === 'object' ? groupLayouts.get(descriptor.layout) : undefined;
      if (given !== undefined) noteLayout(given, code);
      replaceMethod(pipeline, 'getBindGroupLayout', (get) => (index) => {
        const layout = get(index);
        if (index === 0) noteLayout(layout, code);
        return layout;
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
      const code = this.#armed && this.#layouts.get(descriptor.layout);
      if (code === undefined || this.#armed?.works.has(code) !== true) return create(descriptor);
      this.#awaited++;
      const entries = descriptor.entries as Entries;
      if (this.#pass === undefined) {
        // Whether passes come from here is not known yet: somebody may have replaced what makes them.
        const group = create(descriptor);
        this.#groups.set(group, entries);
        return group;
      }
      if (this.#awaited === 1) this.#await(this.#pass);
      return new MarkerGroup(entries) as unknown as GPUBindGroup;
    });
    replaceMethod(device, 'createCommandEncoder', (create) => (descriptor) => {
      const encoder = create(descriptor);
      const begin = encoder.beginComputePass;
      encoder.beginComputePass = (passDescriptor) => {
        const pass = begin.call(encoder, passDescriptor);
        if (this.#seen !== undefined) this.#watch(pass, this.#seen);
        if (this.#armed !== undefined) this.#pass = pass;
        if (this.#awaited > 0) this.#await(pass);
        return pass;
      };
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
      this.#pass = undefined;
      this.#awaited = 0;
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

  /** Notes what is dispatched. */
  #watch(pass: GPUComputePassEncoder, seen: SeenDispatch[]): void {
    let pipeline: GPUComputePipeline | undefined;
    replaceMethod(pass, 'setPipeline', (set) => (next) => {
      pipeline = next;
      return set(next);
    });
    replaceMethod(pass, 'dispatchWorkgroups', (dispatch) => (x, y, z) => {
      if (pipeline !== undefined) seen.push({ code: this.#pipelines.get(pipeline) });
      return dispatch(x, y, z);
    });
  }

  /**
   * Puts the work of a marker in the place of its dispatch, which is the next but for few: onnxruntime makes a bind group for each dispatch, just before it.
   * Of a marker neither pipeline nor bind group is set; behind it onnxruntime sets both anew, as any other pipeline and group are not the marker's. The
   * methods are the pass' own again when no marker is awaited, so that other dispatches cost nothing.
   */
  #await(pass: GPUComputePassEncoder): void {
    const { setPipeline, setBindGroup, dispatchWorkgroups } = pass;
    let work: Work | undefined;
    let entries: Entries | undefined;
    const restore = () => Object.assign(pass, { setPipeline, setBindGroup, dispatchWorkgroups });
    pass.setPipeline = (next) => {
      work = this.#workOf(next);
      return work === undefined ? setPipeline.call(pass, next) : undefined;
    };
    pass.setBindGroup = ((...args: Parameters<typeof setBindGroup>) => {
      if (args[0] !== 0) return setBindGroup.apply(pass, args);
      const group = args[1] as GPUBindGroup | undefined;
      entries = group instanceof MarkerGroup ? group.entries : group && this.#groups.get(group);
      return entries === undefined ? setBindGroup.apply(pass, args) : undefined;
    }) as typeof setBindGroup;
    pass.dispatchWorkgroups = (x, y, z) => {
      if (work === undefined && entries === undefined) return dispatchWorkgroups.call(pass, x, y, z);
      if (work === undefined || entries === undefined)
        return this.#fail('a marker was dispatched with the bind group of another');
      this.#awaited--;
      restore();
      this.#replace(pass, work, entries);
      if (this.#awaited > 0) this.#await(pass);
      return undefined;
    };
  }

  #workOf(pipeline: GPUComputePipeline): Work | undefined {
    const code = this.#armed && this.#pipelines.get(pipeline);
    return code === undefined ? undefined : this.#armed?.works.get(code);
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
