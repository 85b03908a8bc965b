/** Ranks in the memory of this process: several on one CPU, to run and to test what is meant for several devices. */
import type { Backend } from '../backends/backend.ts';
import { toFloat32, writeValues } from '../tensor/access.ts';
import type { DType } from '../tensor/dtype.ts';
import { copyOfCpu, elementCount, emptyTensor, type Tensor, type TensorView } from '../tensor/tensor.ts';
import { mergeRow } from './merge.ts';
import type { Parcel, Partial, Place, Sent } from './place.ts';

export class HostPlace implements Place {
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

  merge(parts: readonly Partial[], output: TensorView, lse: TensorView | undefined): void {
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

  bring(sent: Sent<TensorView>): Sent<TensorView> {
    return sent;
  }

  bringParcel(sent: Sent<Parcel>): Sent<Parcel> {
    return sent;
  }

  // All has happened when a call returns, and the garbage collector frees.
  mark(): void {}
  waitFor(): void {}
  free(): void {}
  settle(): void {}
  dispose(): void {}
}
