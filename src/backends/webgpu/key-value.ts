/** K and V quantized once and kept on the GPU: attended to many times, appended to in place. */

import { attentionOutputs } from '../../attention/outputs.ts';
import { type AttentionProblem, keyMaskLayout, type MaskLayout } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  AttentionOutputs,
  KernelChoice,
  KeyValueContext,
  PreparedKeyValue,
  RunContext,
  SideInputs,
} from '../backend.ts';
import type { GpuContext } from './device.ts';
import { type Forced, keyValueLayoutOf } from './families/choose.ts';
import { KEY_BLOCK } from './kernels/prepare.ts';
import { roundUp } from './kernels/storage.ts';
import { attentionParts } from './launches/attention.ts';
import { copyLaunches, flagLaunches, rawLayout, rawRowBytes, widenLaunches } from './launches/cache.ts';
import { keyValueBytes, keyValueShapeOf, prepareKeyValueLaunches, statisticsLaunches } from './launches/quantize.ts';
import { createStages, type KeyValueShape, keyValueRowBytes } from './launches/stages.ts';
import { needsVisibleKeys } from './launches/visible-keys.ts';
import { tryShapes } from './matrix-trial.ts';
import { checkSizes, Program } from './program.ts';
import { type DeviceInputs, rebased, runProgram, takeInputs } from './run.ts';
import { allocate, type Buffers } from './scratch.ts';

/** Programs for recent shapes of queries are kept: a decoder asks for the same ones again and again. */
const PROGRAMS = 4;

/**
 * Tokens whose mean is good enough to stay. While there are fewer, they are kept as they came beside their quantized
 * rows, and an append quantizes all anew: a cache may begin with a single token that is unlike all others.
 */
const SETTLED_MEAN = 512;

/** Buffers whose rows grow with the cache. */
const ROWS = ['keys', 'values', 'rawKeys', 'rawValues', 'visible'] as const;

/** Data that is needed only until the mean is settled. */
const UNSETTLED = ['rawKeys', 'rawValues', 'visible'] as const;

/** A mask that hides nothing: where some keys held do not count, and none of those added. */
const NO_MASK: MaskLayout = { kind: 'boolean', dtype: 'bool', offset: 0, strides: [0, 0, 0, 0] };

export class WebgpuKeyValue implements PreparedKeyValue {
  readonly #context: GpuContext;
  readonly #kernel: KernelChoice;
  readonly #options: Forced;
  /** Rows of each sequence that there is room for. */
  #capacity = 0;
  #length = 0;
  #shape: KeyValueShape;
  /**
   * Quantized rows and statistics. While the mean is not settled, rows as they came too, and where some do not count, `visible`:
   * a flag for each key of a sequence.
   */
  #store: Buffers = {};
  readonly #programs = new Map<string, Program>();
  #disposed = false;

  private constructor(context: GpuContext, kernel: KernelChoice, options: Forced, shape: KeyValueShape) {
    this.#context = context;
    this.#kernel = kernel;
    this.#options = options;
    this.#shape = shape;
    context.owns(this);
  }

  /** CPU tensors are read before this returns. */
  static async create(
    problem: AttentionProblem,
    kernel: KernelChoice,
    context: GpuContext,
    options: Forced,
    k: TensorView,
    v: TensorView,
    run: KeyValueContext,
  ): Promise<WebgpuKeyValue> {
    const layout = keyValueLayoutOf(context.capabilities, problem, kernel, options);
    const prepared = new WebgpuKeyValue(context, kernel, options, shapeOf(context, problem, kernel, layout));
    try {
      await prepared.append(k, v, problem, run);
    } catch (error) {
      prepared.dispose();
      throw error;
    }
    return prepared;
  }

  get length(): number {
    return this.#length;
  }

  /** CPU tensors are read before this returns. */
  async append(k: TensorView, v: TensorView, problem: AttentionProblem, run: KeyValueContext): Promise<void> {
    this.#check(run);
    const { keyMask } = run;
    const inputs = takeInputs(this.#context, { k, v, mask: keyMask });
    try {
      await this.#context.during(this.#append(inputs, problem, keyMask));
    } finally {
      inputs.release();
    }
  }

  async #append(inputs: DeviceInputs, problem: AttentionProblem, keyMask: TensorView | undefined): Promise<void> {
    const failure = await inputs.outcome;
    if (failure !== undefined) throw failure;
    const first = this.#length;
    const length = first + problem.keyLength;
    const { layout } = this.#shape;
    // A problem over all tokens, of which `problem` describes those from `first` on.
    const all: AttentionProblem = { ...rebased(problem), keyLength: length };
    const unsettled = first < SETTLED_MEAN && this.#keepsRaw(length);
    const held = this.#store.visible !== undefined;
    const flagged =
      (keyMask !== undefined || held) &&
      needsVisibleKeys({ problem: { ...all, mask: NO_MASK }, keyValue: this.#shape });
    const whole = flagged ? { ...all, mask: maskOf(keyMask) } : all;
    const shape = unsettled || first === 0 ? shapeOf(this.#context, whole, this.#kernel, layout) : this.#shape;
    // The first tokens of a long prompt settle the mean at once: nothing else is kept.
    const raw = unsettled && (first > 0 || length < SETTLED_MEAN);
    await this.#reserve(length, shape, { raw, flagged });
    if (problem.keyLength === 0) return;
    const steps: Step[] = [];
    try {
      if (flagged) steps.push({ program: await this.#flag(whole, held ? first : 0, first, keyMask !== undefined) });
      if (raw) steps.push({ program: await this.#copy(whole, first) });
      if (raw && first > 0) steps.push({ program: await this.#quantizeRaw(whole), readsRaw: true });
      else steps.push({ program: await this.#quantize(whole, first) });
      await this.#submit(steps, inputs);
      this.#length = length;
    } finally {
      for (const { program } of steps) program.dispose();
    }
    if (length >= SETTLED_MEAN || !unsettled) this.#free(UNSETTLED);
  }

  /** Flags keys `from` to the end of each sequence; those added begin with key `first`. */
  #flag(whole: AttentionProblem, from: number, first: number, masked: boolean): Promise<Program> {
    const stages = createStages(whole, this.#context.capabilities, this.#shape, first);
    return Program.create(this.#context, flagLaunches(stages, from, first, masked), {}, stages.tables.bytes);
  }

  /** The rows as they came fit buffers of the device. */
  #keepsRaw(length: number): boolean {
    const { kvHeads, sequences } = this.#shape;
    const rows = kvHeads * sequences * roundUp(length, KEY_BLOCK) * 2;
    return Object.values(rawRowBytes(this.#shape)).every(
      (bytes) => rows * bytes <= this.#context.capabilities.bufferBytes,
    );
  }

  #copy(whole: AttentionProblem, first: number): Promise<Program> {
    const stages = createStages(whole, this.#context.capabilities, this.#shape, first);
    return Program.create(this.#context, copyLaunches(stages, first), {}, stages.tables.bytes);
  }

  /** Quantizes all tokens out of the rows kept. */
  #quantizeRaw(whole: AttentionProblem): Promise<Program> {
    const k = rawLayout(this.#shape, 'rawKeys');
    const v = rawLayout(this.#shape, 'rawValues');
    return this.#quantize({ ...whole, k, v }, 0);
  }

  /**
   * Quantizes tokens from `first` on; those before keep their mean, and their values get wider scales where they need
   * them.
   */
  #quantize(problem: AttentionProblem, first: number): Promise<Program> {
    const { capabilities } = this.#context;
    const stages = createStages(problem, capabilities, this.#shape, first);
    const { values, layout } = this.#shape;
    const launches = [];
    const scratch: { newPartials?: number } = {};
    if (first === 0) launches.push(...statisticsLaunches(stages));
    else if (values.scaled && !values.integers) {
      const added: KeyValueShape = {
        ...this.#shape,
        chunks: shapeOf(this.#context, { ...problem, keyLength: problem.keyLength - first }, this.#kernel, layout)
          .chunks,
        smoothK: false,
        values: { ...values, smoothed: false },
      };
      scratch.newPartials = keyValueBytes(added).partials;
      launches.push(
        ...statisticsLaunches({ ...stages, keyValue: added }, 'newPartials'),
        ...widenLaunches(stages, first, added),
      );
    }
    launches.push(...prepareKeyValueLaunches(stages, first));
    return Program.create(this.#context, launches, scratch, stages.tables.bytes);
  }

  async #submit(steps: readonly Step[], inputs: DeviceInputs): Promise<void> {
    const { device, scratch } = this.#context;
    const [, outcome] = this.#context.checked(() => {
      const encoder = device.createCommandEncoder({ label: 'sageattention append' });
      for (const { program, readsRaw } of steps) {
        const { rawKeys: k, rawValues: v } = this.#store;
        const source = readsRaw && k !== undefined && v !== undefined ? { k, v } : inputs.buffers;
        program.encode(encoder, { ...scratch.reserve(program.scratch), ...this.#store, ...source });
      }
      device.queue.submit([encoder.finish()]);
    });
    const failure = await outcome;
    if (failure !== undefined) throw failure;
  }

  /** CPU tensors are read before this returns. */
  async attend(
    q: TensorView,
    problem: AttentionProblem,
    { attnMask, sinks, blockMap }: SideInputs,
    run: RunContext,
  ): Promise<AttentionOutputs> {
    this.#check(run);
    const inputs = takeInputs(this.#context, { q, mask: attnMask, sinks, blockMap });
    return this.#context.during(this.#attend(inputs, problem, run));
  }

  async #attend(inputs: DeviceInputs, problem: AttentionProblem, run: RunContext): Promise<AttentionOutputs> {
    const own = rebased(problem);
    try {
      const key = JSON.stringify(own);
      let program = this.#programs.get(key);
      if (program === undefined) {
        // The layout is settled: only shapes of the family that the cache was made for.
        await tryShapes(this.#context, own, this.#kernel, this.#options, { layout: this.#shape.layout });
        const stages = createStages(own, this.#context.capabilities, this.#shape);
        const parts = attentionParts(stages, this.#kernel, this.#options);
        program = await Program.create(this.#context, parts.launches, parts.sizes, stages.tables.bytes);
        this.#programs.set(key, program);
        const [oldest] = this.#programs.keys();
        if (this.#programs.size > PROGRAMS && oldest !== undefined) {
          this.#programs.get(oldest)?.dispose();
          this.#programs.delete(oldest);
        }
      }
      const planned = { location: own.location, outputs: attentionOutputs(own) };
      return (await runProgram(this.#context, program, planned, inputs, run, this.#store)) as AttentionOutputs;
    } finally {
      inputs.release();
    }
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#context.disowns(this);
    this.#clearPrograms();
    this.#free(Object.keys(this.#store) as (keyof Buffers)[]);
  }

  #free(names: readonly (keyof Buffers)[]): void {
    for (const name of names) {
      this.#store[name]?.destroy();
      delete this.#store[name];
    }
  }

  #check(run: RunContext): void {
    if (this.#disposed) throw new ExecutionError('disposed', 'these prepared keys and values have been disposed');
    run.signal?.throwIfAborted();
    // What was quantized is gone with the device; only the caller has it.
    if (this.#context.lost !== undefined) throw this.#context.lost;
  }

  #clearPrograms(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }

  /**
   * Room for `length` tokens of each sequence: doubled when outgrown, copying the tokens held.
   *
   * @param shape shape of the new tokens, laid end to end
   * @param kept the tokens as they came and their flags, as far as they are still needed
   */
  async #reserve(length: number, shape: KeyValueShape, kept: { raw: boolean; flagged: boolean }): Promise<void> {
    const held = this.#capacity;
    const capacity =
      length <= held && held > 0 ? held : roundUp(Math.max(length, Math.min(2 * held, 2 * length), 1), KEY_BLOCK);
    const { sequences } = shape;
    const next: KeyValueShape = {
      ...shape,
      rowsPerHead: capacity * sequences,
      keyRows: Array.from({ length: sequences }, (_, i) => i * capacity),
    };
    const { keys, values, partials } = keyValueBytes(next);
    const rowBytes = {
      ...keyValueRowBytes(next),
      ...rawRowBytes(next),
      visible: 4,
    };
    const headsOf = (name: (typeof ROWS)[number]) => (name === 'visible' ? 1 : next.kvHeads);
    const sizes: Partial<Record<keyof Buffers, number>> = {
      ...(capacity === held ? {} : { keys, values }),
      ...(partials > (this.#store.partials?.size ?? 0) ? { partials } : {}),
    };
    for (const name of UNSETTLED) {
      const needed = name === 'visible' ? kept.flagged : kept.raw;
      if (needed && (capacity !== held || this.#store[name] === undefined)) {
        sizes[name] = headsOf(name) * next.rowsPerHead * rowBytes[name];
      }
    }
    if (Object.keys(sizes).length === 0) {
      this.#shape = next;
      return;
    }
    checkSizes(this.#context, sizes);
    const { device } = this.#context;
    const previous = this.#store;
    const [made, outcome] = this.#context.checked(() => {
      const buffers = allocate(device, sizes);
      const encoder = device.createCommandEncoder();
      for (const name of ROWS) {
        const [from, to] = [previous[name], buffers[name]];
        if (from === undefined || to === undefined) continue;
        const bytes = roundUp(this.#length, KEY_BLOCK) * rowBytes[name];
        for (let run = 0; run < headsOf(name) * sequences && bytes > 0; run++) {
          encoder.copyBufferToBuffer(from, run * held * rowBytes[name], to, run * capacity * rowBytes[name], bytes);
        }
      }
      device.queue.submit([encoder.finish()]);
      return buffers;
    });
    const failure = await outcome;
    if (failure !== undefined) {
      for (const buffer of Object.values(made)) buffer.destroy();
      throw failure;
    }
    this.#free(Object.keys(made) as (keyof Buffers)[]);
    Object.assign(this.#store, made);
    this.#clearPrograms();
    this.#capacity = capacity;
    this.#shape = next;
  }
}

/** A program of an append: it reads the tokens added, or all of them as they came. */
interface Step {
  readonly program: Program;
  readonly readsRaw?: boolean;
}

/** The mask of tokens as it lies in its buffer: what was on the CPU from its first element on. */
const maskOf = (keyMask: TensorView | undefined): MaskLayout => {
  if (keyMask === undefined) return NO_MASK;
  const layout = keyMaskLayout(keyMask);
  return keyMask.location === 'cpu' ? { ...layout, offset: 0 } : layout;
};

const shapeOf = (
  context: GpuContext,
  problem: AttentionProblem,
  kernel: KernelChoice,
  layout: KeyValueShape['layout'],
): KeyValueShape => keyValueShapeOf(problem, kernel, context.capabilities, layout, true);
