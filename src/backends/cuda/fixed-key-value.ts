/** Quantized keys and values of a fixed number of tokens, in memory that is filled again and again. */
import { attentionOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import type { OperandLayout, TensorView } from '../../tensor/tensor.ts';
import type { AttentionOutputs, KernelChoice, RunContext, SideInputs } from '../backend.ts';
import { copyHeads } from './driver/copy.ts';
import type { CudaDevice } from './driver/device.ts';
import type { DeviceMemory } from './driver/memory.ts';
import type { DeviceFacts } from './launches/context.ts';
import type { BufferName, LaunchSequence } from './launches/launch.ts';
import type { LaunchPlanner } from './launches/plan.ts';
import { BoundLaunches, packBuffers } from './run/bound-launches.ts';
import { addressOf, type HeldBuffer, type Operand, sideOperands } from './run/operands.ts';
import { Runner } from './run/runner.ts';
import type { CudaTensor } from './tensor.ts';

/** Tokens that each head has room for are a multiple of this, which every kernel's tile of keys divides. */
const CAPACITY_STEP = 256;

/** Device memory that several users have in turn, as large as the largest of them asks. */
export class SharedRoom {
  readonly #device: CudaDevice;
  #memory: DeviceMemory | undefined;
  #user: unknown;

  constructor(device: CudaDevice) {
    this.#device = device;
  }

  /** @param begin runs where someone else had the room, or it is new */
  use(user: unknown, byteLength: number, begin: (memory: DeviceMemory) => void): DeviceMemory {
    if (this.#memory === undefined || this.#memory.byteLength < byteLength) {
      this.dispose();
      this.#memory = this.#device.allocate(byteLength, this.#device.stream);
    }
    if (this.#user !== user) begin(this.#memory);
    this.#user = user;
    return this.#memory;
  }

  dispose(): void {
    this.#memory?.dispose();
    this.#memory = undefined;
    this.#user = undefined;
  }
}

/** Which of K and V as they came an attention reads besides what is quantized. */
function rawOperands({ launches }: LaunchSequence): ('k' | 'v')[] {
  const read = new Set(
    launches.flatMap(({ arguments: taken }) =>
      taken.flatMap((argument) =>
        argument.kind === 'pointer' ? [argument.buffer] : argument.kind === 'tensor-map' ? [argument.map.buffer] : [],
      ),
    ),
  );
  return (['k', 'v'] as const).filter((name) => read.has(name));
}

/**
 * Keys and values of one shape, quantized in one piece of memory, so that a copy of its bytes is a copy of them. Plans, launches and
 * memory stay from one filling to the next. Everything is enqueued on the device's own stream.
 */
export class FixedKeyValue {
  readonly #device: CudaDevice;
  readonly #choice: KernelChoice;
  readonly #planner: LaunchPlanner;
  readonly #facts: DeviceFacts;
  readonly #problem: AttentionProblem;
  readonly #room: SharedRoom;
  readonly #capacity: number;
  readonly #offsets: ReadonlyMap<BufferName, number>;
  readonly #raw: readonly ('k' | 'v')[];
  /** Of the memory that holds everything: it depends on shape, dtype and kernel alone. */
  readonly byteLength: number;
  #quantizing: BoundLaunches | undefined;
  readonly #runners = new Map<AttentionProblem, Runner>();

  /** @param problem of which K and V are quantized; its Q does not matter */
  constructor(
    device: CudaDevice,
    choice: KernelChoice,
    planner: LaunchPlanner,
    facts: DeviceFacts,
    problem: AttentionProblem,
    room: SharedRoom,
  ) {
    this.#device = device;
    this.#choice = choice;
    this.#planner = planner;
    this.#facts = facts;
    this.#problem = problem;
    this.#room = room;
    const { batch, kvHeads, headDim, valueDim, keyLength, dtype } = problem;
    this.#capacity = Math.ceil(keyLength / CAPACITY_STEP) * CAPACITY_STEP;
    const { kept } = planner.planKeyValue(problem, choice, facts, this.#planOptions);
    this.#raw = rawOperands(
      planner.planAttend(this.#held({ ...problem, queryLength: 1 }), choice, facts, this.#planOptions),
    );
    const rowBytes = { k: headDim * BYTES_PER_ELEMENT[dtype], v: valueDim * BYTES_PER_ELEMENT[dtype] };
    const raw = this.#raw.map((name) => [name, batch * kvHeads * this.#capacity * rowBytes[name]] as const);
    const { offsets, byteLength } = packBuffers({ ...kept, ...Object.fromEntries(raw) });
    this.#offsets = offsets;
    this.byteLength = byteLength;
  }

  get #planOptions() {
    return { room: { capacity: this.#capacity } };
  }

  /** A problem about the keys held, wherever they were when it was made. */
  #held(problem: AttentionProblem): AttentionProblem {
    const { kvHeads, keyLength, headDim, valueDim } = this.#problem;
    const layout = (dim: number): OperandLayout => {
      const headStride = this.#capacity * dim;
      return { offset: 0, batchStride: kvHeads * headStride, headStride, tokenStride: dim };
    };
    return { ...problem, keyLength, k: layout(headDim), v: layout(valueDim) };
  }

  /** The memory, which holds nothing of use before it is filled or written to. */
  open(): DeviceMemory {
    return this.#room.use(this, this.byteLength, () => undefined);
  }

  /**
   * Quantizes keys and values.
   *
   * @param k `[B,Hkv,L,D]` of the problem's strides
   * @param v `[B,Hkv,L,Dv]`
   */
  fill(k: CudaTensor, v: CudaTensor): void {
    const device = this.#device;
    const { stream } = device;
    const problem = this.#problem;
    device.inContext(() => {
      const memory = this.#room.use(this, this.byteLength, ({ pointer }) => {
        // Kernels may load whole tiles: what lies beyond the tokens held must be numbers, for 0 * NaN is not 0.
        if (this.byteLength === 0) return;
        device.call('cuMemsetD8Async', 'clearing quantized keys', pointer, 0, this.byteLength, stream.handle);
      });
      this.#quantizing ??= new BoundLaunches(
        device,
        this.#planner.planKeyValue(problem, this.#choice, this.#facts, this.#planOptions),
      );
      for (const each of [k, v]) each.memory.useOn(stream);
      this.#quantizing.run(stream, [
        ['k', addressOf(k, problem.k.offset)],
        ['v', addressOf(v, problem.v.offset)],
        ...[...this.#offsets]
          .filter(([name]) => name !== 'k' && name !== 'v')
          .map(([name, offset]) => [name, memory.pointer + BigInt(offset)] as const),
      ]);
      for (const name of this.#raw)
        this.#keepRaw(name === 'k' ? k : v, memory.pointer + BigInt(this.#offsets.get(name) as number));
    });
  }

  #keepRaw(view: CudaTensor, pointer: bigint): void {
    const bytes = BYTES_PER_ELEMENT[view.dtype];
    const [batch, heads, tokens, dim] = view.shape as [number, number, number, number];
    const [batchPitch, headPitch, tokenPitch] = view.strides.map((stride) => stride * bytes) as [
      number,
      number,
      number,
    ];
    const rowBytes = dim * bytes;
    const kept = this.#capacity * rowBytes;
    copyHeads(
      this.#device,
      { pointer: addressOf(view, 0), batchPitch, headPitch, tokenPitch },
      { pointer, batchPitch: heads * kept, headPitch: kept, tokenPitch: rowBytes },
      [batch, heads, tokens],
      rowBytes,
      this.#device.stream,
    );
  }

  /** @param problem the same object each time, which the plan for it is kept by */
  attend(q: TensorView, problem: AttentionProblem, side: SideInputs, context: RunContext): Promise<AttentionOutputs> {
    const operands: Operand[] = [
      { buffer: 'q', argument: 'q', view: q, offset: problem.q.offset },
      ...sideOperands(problem, side),
    ];
    const memory = this.open();
    const buffers = [...this.#offsets].map(([buffer, byteOffset]): HeldBuffer => ({ buffer, memory, byteOffset }));
    return this.#runnerOf(problem).run(operands, context, buffers) as Promise<AttentionOutputs>;
  }

  #runnerOf(problem: AttentionProblem): Runner {
    let runner = this.#runners.get(problem);
    if (runner === undefined) {
      const plan = () => this.#planner.planAttend(this.#held(problem), this.#choice, this.#facts, this.#planOptions);
      runner = new Runner(this.#device, { location: problem.location, outputs: attentionOutputs(problem) }, plan);
      this.#runners.set(problem, runner);
    }
    return runner;
  }

  /** Gives up plans and launches; the room is its owner's. */
  dispose(): void {
    for (const runner of this.#runners.values()) runner.dispose();
    this.#runners.clear();
    this.#quantizing?.dispose();
    this.#quantizing = undefined;
  }
}
