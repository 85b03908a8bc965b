/** Result matrices on their way through workgroup memory, where their elements can be reached. */
import type { MatrixConfig } from '../capabilities.ts';
import { type MatrixMemory, type MatrixOperations, unitsOf } from './matrix-operations.ts';
import { range } from './storage.ts';

/** The result matrices of a subgroup: a grid of rows and channels. */
export interface ResultMatrices {
  readonly operations: MatrixOperations;
  readonly product: MatrixConfig;
  readonly lanes: number;
  /** Has room for `atOnce` matrices of each subgroup. */
  readonly memory: MatrixMemory;
  readonly names: readonly (readonly string[])[];
  /** Expressions of the subgroup's first row and first channel. */
  readonly rows: string;
  readonly channels: string;
  readonly atOnce: number;
}

export interface MemoryPass {
  /** A statement for a unit of memory: its `place`, its `row` in the workgroup, its first `channel`. */
  readonly each: string;
  /** The matrices take what the statement leaves. */
  readonly loadAgain: boolean;
}

/** A few matrices of each subgroup at a time. The kernel has `subgroup` and `lane`; in uniform flow. */
export function throughMemory(
  { operations, product, lanes, memory, names, rows, channels, atOnce }: ResultMatrices,
  { each, loadAgain }: MemoryPass,
): string {
  const rowUnits = unitsOf(product.resultComponentType, product.N);
  const tile = product.M * rowUnits;
  const base = `subgroup * ${atOnce * tile}u`;
  const part = (own: readonly string[], rt: number, batch: number) => {
    const first = batch * atOnce;
    const some = own.slice(first, first + atOnce);
    const at = (x: number) => `${base} + ${x * tile}u`;
    return `${some.map((name, x) => operations.storeResult(product, name, memory, at(x), rowUnits)).join(' ')}
      workgroupBarrier();
      for (var i = lane; i < ${some.length * tile}u; i += ${lanes}u) {
        let place = ${base} + i;
        let row = ${rows} + ${rt * product.M}u + i % ${tile}u / ${rowUnits}u;
        let channel = ${channels} + ${first * product.N}u + i / ${tile}u * ${product.N}u + i % ${rowUnits}u * ${product.N / rowUnits}u;
        ${each}
      }
      workgroupBarrier();
      ${loadAgain ? `${some.map((name, x) => operations.loadResult(product, name, memory, at(x), rowUnits)).join(' ')}\n      workgroupBarrier();` : ''}`;
  };
  return names
    .flatMap((own, rt) => range(Math.ceil(own.length / atOnce)).map((batch) => part(own, rt, batch)))
    .join('\n      ');
}
