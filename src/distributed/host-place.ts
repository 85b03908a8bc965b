/** Ranks in the memory of this process: several on one CPU, to run and to test what is meant for several devices. */
import type { AttentionProblem } from '../attention/problem.ts';
import type {
  AttentionOutputs,
  Backend,
  KernelChoice,
  PreparedKeyValue,
  RunContext,
  SideInputs,
} from '../backends/backend.ts';
import { toFloat32, writeValues } from '../tensor/access.ts';
import type { DType } from '../tensor/dtype.ts';
import { copyOfCpu, elementCount, emptyTensor, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { mergeRow } from './merge.ts';
import type { Carried, KeyValueSlot, Merge, Partial, ReachingPlace } from './place.ts';

/** Whoever is sent keys and values has those of the sender, who keeps them until the call has ended. */
class HostKeyValue implements KeyValueSlot {
  readonly #backend: Backend;
  readonly #problem: AttentionProblem;
  readonly #kernel: KernelChoice;
  #prepared: PreparedKeyValue | undefined;
  #isOwn = false;

  constructor(backend: Backend, problem: AttentionProblem, kernel: KernelChoice) {
    this.#backend = backend;
    this.#problem = problem;
    this.#kernel = kernel;
  }

  open(): void {}

  async fill(k: TensorView, v: TensorView, context: RunContext): Promise<void> {
    this.#prepared = await this.#backend.prepareKeyValue(this.#problem, this.#kernel, k, v, context);
    this.#isOwn = true;
  }

  share(other: HostKeyValue): void {
    this.#prepared = other.#prepared;
    this.#isOwn = false;
  }

  attend(q: TensorView, problem: AttentionProblem, side: SideInputs, context: RunContext): Promise<AttentionOutputs> {
    return (this.#prepared as PreparedKeyValue).attend(q, problem, side, context);
  }

  release(): void {
    if (this.#isOwn) this.#prepared?.dispose();
    this.#prepared = undefined;
    this.#isOwn = false;
  }

  dispose(): void {
    this.release();
  }
}

export class HostPlace implements ReachingPlace {
  readonly backend: Backend;

  constructor(backend: Backend) {
    this.backend = backend;
  }

  holds({ location }: TensorView): boolean {
    return location === 'cpu';
  }

  empty(shape: readonly number[], dtype: DType): TensorView {
    return emptyTensor(shape, dtype);
  }

  upload(view: TensorView): TensorView {
    return view;
  }

  async download(view: TensorView): Promise<TensorView> {
    return copyOfCpu(view);
  }

  copy(from: TensorView, to: TensorView): void {
    writeValues(toFloat32(from as Tensor), to as Tensor);
  }

  keyValue(problem: AttentionProblem, kernel: KernelChoice): KeyValueSlot {
    return new HostKeyValue(this.backend, problem, kernel);
  }

  merge(): Merge {
    return { run: mergeOnHost, dispose: () => undefined };
  }

  sum(parts: readonly { readonly start: number; readonly values: TensorView }[], output: TensorView): void {
    const [batch, heads, rows, dim] = output.shape as [number, number, number, number];
    const sums = new Float64Array(elementCount(output.shape));
    for (const { start, values } of parts) {
      const added = toFloat32(values as Tensor);
      const size = (values.shape[2] as number) * dim;
      for (let head = 0; head < batch * heads; head++) {
        const at = (head * rows + start) * dim;
        for (let i = 0; i < size; i++) sums[at + i] = (sums[at + i] as number) + (added[head * size + i] as number);
      }
    }
    writeValues(sums, output as Tensor);
  }

  bring(value: Carried, _from: ReachingPlace, into: Carried): void {
    if (into instanceof HostKeyValue) into.share(value as HostKeyValue);
    else this.copy(value as TensorView, into as TensorView);
  }

  // All has happened when a call returns, and the garbage collector frees.
  mark(): void {}
  waitFor(): void {}
  holdCopies(): void {}
  markCopies(): void {}
  free(): void {}
  settle(): void {}
  endCall(): void {}
  dispose(): void {}
}

function mergeOnHost(parts: readonly Partial[], output: TensorView, lse: TensorView | undefined): void {
  const [batch, heads, rows, dim] = output.shape as [number, number, number, number];
  const values = new Float64Array(elementCount(output.shape));
  const sums = new Float64Array(batch * heads * rows).fill(Number.NEGATIVE_INFINITY);
  for (const part of parts) {
    const [partValues, partLse] = [part.output, part.lse].map((view) => toFloat32(view as Tensor)) as [
      Float32Array,
      Float32Array,
    ];
    const { start, end } = part.queries;
    const partRows = end - start;
    for (let head = 0; head < batch * heads; head++) {
      for (let row = 0; row < partRows; row++) {
        const [to, from] = [head * rows + start + row, head * partRows + row];
        const sum = sums[to] as number;
        sums[to] = mergeRow(values, to * dim, dim, sum, partValues, from * dim, partLse[from] as number);
      }
    }
  }
  writeValues(values, output as Tensor);
  if (lse !== undefined) writeValues(sums, lse as Tensor);
}
