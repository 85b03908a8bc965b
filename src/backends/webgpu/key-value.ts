/** K and V quantized once and kept on the GPU: attended to many times, appended to in place. */

import type { AttentionProblem } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type { AttentionOutputs, KernelChoice, PreparedKeyValue, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import { type Forced, keyValueLayoutOf } from './families/choose.ts';
import { padDim, rowVectors } from './kernels/layout.ts';
import { KEY_BLOCK } from './kernels/prepare.ts';
import { roundUp } from './kernels/storage.ts';
import { attentionParts } from './launches/attention.ts';
import { keyValueBytes, keyValueShapeOf, prepareKeyValueLaunches, statisticsLaunches } from './launches/quantize.ts';
import { createStages, type KeyValueShape } from './launches/stages.ts';
import { checkSizes, Program } from './program.ts';
import { rebased, runProgram, uploaded } from './run.ts';
import { GPU_BUFFER_USAGE, isGpuTensor, validateBuffer } from './tensor.ts';

interface Store {
  readonly keys: GPUBuffer;
  readonly values: GPUBuffer;
  readonly partials: GPUBuffer;
}

/** Programs for recent shapes of queries are kept: a decoder asks for the same ones again and again. */
const PROGRAMS = 4;

export class WebgpuKeyValue implements PreparedKeyValue {
  readonly #context: GpuContext;
  readonly #kernel: KernelChoice;
  readonly #options: Forced;
  /** Rows of each sequence that there is room for. */
  #capacity = 0;
  #length = 0;
  #shape: KeyValueShape;
  #store: Store | undefined;
  readonly #programs = new Map<string, Program>();
  #disposed = false;

  private constructor(context: GpuContext, kernel: KernelChoice, options: Forced, shape: KeyValueShape) {
    this.#context = context;
    this.#kernel = kernel;
    this.#options = options;
    this.#shape = shape;
  }

  static async create(
    problem: AttentionProblem,
    kernel: KernelChoice,
    device: () => Promise<GpuContext>,
    options: Forced,
    k: TensorView,
    v: TensorView,
    run: RunContext,
  ): Promise<WebgpuKeyValue> {
    const context = await device();
    const layout = keyValueLayoutOf(context.capabilities, problem, options);
    const shape = keyValueShapeOf(problem, kernel, context.capabilities, layout);
    const prepared = new WebgpuKeyValue(context, kernel, options, shape);
    await prepared.append(k, v, problem, run);
    return prepared;
  }

  get length(): number {
    return this.#length;
  }

  async append(k: TensorView, v: TensorView, problem: AttentionProblem, run: RunContext): Promise<void> {
    this.#check(run);
    const added = problem.keyLength;
    const first = this.#length;
    const length = first + added;
    const capabilities = this.#context.capabilities;
    // Statistics are those of the first tokens; later ones keep the same mean and scales.
    const fresh = first === 0;
    if (fresh) {
      this.#release();
      this.#shape = keyValueShapeOf(problem, this.#kernel, capabilities, this.#shape.layout);
    }
    await this.#reserve(length, problem);
    if (added === 0) return;
    const whole: AttentionProblem = { ...rebased(problem), keyLength: length };
    const stages = createStages(whole, capabilities, this.#shape, first);
    const launches = [...(fresh ? statisticsLaunches(stages) : []), ...prepareKeyValueLaunches(stages, first)];
    const program = await Program.create(this.#context, launches, {}, stages.tables.bytes);
    for (const [name, view] of [
      ['k', k],
      ['v', v],
    ] as const) {
      if (isGpuTensor(view)) validateBuffer(name, view);
    }
    const temporary: GPUBuffer[] = [];
    try {
      const { device } = this.#context;
      const [, outcome] = this.#context.checked(() => {
        const encoder = device.createCommandEncoder({ label: 'sageattention append' });
        program.encode(encoder, {
          k: uploaded(device, k, temporary),
          v: uploaded(device, v, temporary),
          ...(this.#store as Store),
        });
        device.queue.submit([encoder.finish()]);
      });
      const failure = await outcome;
      if (failure !== undefined) throw failure;
      this.#length = length;
    } finally {
      for (const buffer of temporary) buffer.destroy();
      program.dispose();
    }
  }

  async attend(
    q: TensorView,
    problem: AttentionProblem,
    attnMask: TensorView | undefined,
    run: RunContext,
  ): Promise<AttentionOutputs> {
    this.#check(run);
    const own = rebased(problem);
    const key = JSON.stringify(own);
    let program = this.#programs.get(key);
    if (program === undefined) {
      const stages = createStages(own, this.#context.capabilities, this.#shape);
      // Tokens appended to a block have their own scales, so a tile has no single one.
      const parts = attentionParts(stages, this.#kernel, this.#options, 'token');
      checkSizes(this.#context, parts.sizes);
      program = await Program.create(this.#context, parts.launches, parts.sizes, stages.tables.bytes);
      this.#programs.set(key, program);
      const [oldest] = this.#programs.keys();
      if (this.#programs.size > PROGRAMS && oldest !== undefined) {
        this.#programs.get(oldest)?.dispose();
        this.#programs.delete(oldest);
      }
    }
    return runProgram(this.#context, program, own, { q, mask: attnMask }, run, this.#store as Store);
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#release();
  }

  #release(): void {
    this.#clearPrograms();
    for (const buffer of Object.values(this.#store ?? {})) buffer.destroy();
    this.#store = undefined;
    this.#capacity = 0;
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

  /** Room for `length` tokens of each sequence: doubled when outgrown, and what is held is copied. */
  async #reserve(length: number, problem: AttentionProblem): Promise<void> {
    if (this.#store !== undefined && length <= this.#capacity) return;
    const capacity = roundUp(Math.max(length, this.#store === undefined ? length : this.#capacity * 2, 1), KEY_BLOCK);
    const { batch } = problem;
    const next: KeyValueShape = {
      ...this.#shape,
      rowsPerHead: capacity * batch,
      keyRows: Array.from({ length: batch }, (_, i) => i * capacity),
    };
    const sizes = keyValueBytes(next);
    checkSizes(this.#context, sizes);
    const { device } = this.#context;
    const previous = this.#store;
    const [store, outcome] = this.#context.checked(() => {
      const buffer = (name: string, size: number) =>
        device.createBuffer({
          label: `sageattention cache ${name}`,
          size,
          usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_SRC | GPU_BUFFER_USAGE.COPY_DST,
        });
      const made: Store = {
        keys: buffer('keys', sizes.keys),
        values: buffer('values', sizes.values),
        partials: previous?.partials ?? buffer('partials', sizes.partials),
      };
      if (previous !== undefined && this.#length > 0) {
        const encoder = device.createCommandEncoder();
        for (const [name, rowBytes] of [
          ['keys', rowVectors(padDim(next.headDim)) * 16],
          ['values', padDim(next.valueDim) * 2],
        ] as const) {
          for (let run = 0; run < next.kvHeads * batch; run++) {
            const bytes = roundUp(this.#length, KEY_BLOCK) * rowBytes;
            encoder.copyBufferToBuffer(
              previous[name],
              run * this.#capacity * rowBytes,
              made[name],
              run * capacity * rowBytes,
              bytes,
            );
          }
        }
        device.queue.submit([encoder.finish()]);
      }
      return made;
    });
    const failure = await outcome;
    if (failure !== undefined) throw failure;
    previous?.keys.destroy();
    previous?.values.destroy();
    this.#clearPrograms();
    this.#store = store;
    this.#capacity = capacity;
    this.#shape = next;
  }
}
