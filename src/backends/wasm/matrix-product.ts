/** Products of float32 matrices by the kernels' own inner loop, for models whose dense layers surround attention. */
import { createMemory } from './executor.ts';
import type { Simd } from './geometry.ts';
import { MemoryPool } from './memory.ts';
import { compileUnshared, instantiate, type KernelExports, loadModule } from './modules.ts';

/** Columns and rows that the inner loop takes at a time, see assembly/exact-products.ts. */
const TILE: Readonly<Record<Simd, { readonly columns: number; readonly rows: number }>> = {
  relaxed: { columns: 16, rows: 2 },
  simd128: { columns: 8, rows: 4 },
};
/** Rows that are multiplied at a time, so that they stay in the second-level cache; a multiple of both tiles' rows. */
const ROW_BLOCK = 64;
const FLOAT_BYTES = 4;

/** A matrix in the kernels' memory. */
export interface PackedMatrix {
  readonly address: number;
  readonly inputs: number;
  readonly outputs: number;
}

export class MatrixProduct {
  readonly #kernels: KernelExports;
  readonly #memory: WebAssembly.Memory;
  readonly #pool: MemoryPool;
  readonly #tile: (typeof TILE)[Simd];

  private constructor(kernels: KernelExports, memory: WebAssembly.Memory, pool: MemoryPool, simd: Simd) {
    this.#kernels = kernels;
    this.#memory = memory;
    this.#pool = pool;
    this.#tile = TILE[simd];
  }

  /** @throws {BackendUnavailableError} the engine runs no WebAssembly with SIMD */
  static async create(): Promise<MatrixProduct> {
    const { simd } = await loadModule('auto');
    const { memory, limit, pages } = createMemory(false);
    const kernels = await instantiate(await compileUnshared(simd), memory);
    const pool = new MemoryPool(pages, limit, (more) => memory.grow(more));
    return new MatrixProduct(kernels, memory, pool, simd);
  }

  /**
   * Keeps a matrix for {@link multiply}.
   *
   * @param matrix `[inputs, outputs]`, row-major
   * @throws {ExecutionError} `out-of-memory`
   */
  pack(matrix: Float32Array, inputs: number, outputs: number): PackedMatrix {
    const { columns } = this.#tile;
    const panels = Math.ceil(outputs / columns);
    const address = this.#pool.allocate(panels * columns * inputs * FLOAT_BYTES);
    const packed = new Float32Array(this.#memory.buffer, address, panels * columns * inputs).fill(0);
    for (let row = 0; row < inputs; row++) {
      for (let column = 0; column < outputs; column++) {
        const panel = Math.floor(column / columns);
        packed[(panel * inputs + row) * columns + (column % columns)] = matrix[row * outputs + column] as number;
      }
    }
    return { address, inputs, outputs };
  }

  /**
   * `x W + bias`, summed in float32.
   *
   * @param x `[rows, inputs]`
   * @returns `[rows, outputs]`
   */
  multiply(
    x: Float32Array,
    rows: number,
    { address, inputs, outputs }: PackedMatrix,
    bias: Float32Array,
  ): Float32Array {
    const width = Math.ceil(outputs / this.#tile.columns) * this.#tile.columns;
    const result = new Float32Array(rows * outputs);
    const inputBytes = ROW_BLOCK * inputs * FLOAT_BYTES;
    const outputBytes = ROW_BLOCK * width * FLOAT_BYTES;
    const from = this.#pool.allocate(inputBytes);
    const to = this.#pool.allocate(outputBytes);
    const block = new Float32Array(this.#memory.buffer, from, ROW_BLOCK * inputs);
    const products = new Float32Array(this.#memory.buffer, to, ROW_BLOCK * width);
    for (let first = 0; first < rows; first += ROW_BLOCK) {
      const count = Math.min(ROW_BLOCK, rows - first);
      block.set(x.subarray(first * inputs, (first + count) * inputs));
      const padded = Math.ceil(count / this.#tile.rows) * this.#tile.rows;
      block.fill(0, count * inputs, padded * inputs);
      this.#kernels.multiply(from, padded, address, inputs, width, to);
      for (let row = 0; row < count; row++) {
        for (let column = 0, at = (first + row) * outputs; column < outputs; column++, at++) {
          result[at] = (products[row * width + column] as number) + (bias[column] as number);
        }
      }
    }
    this.#pool.free(from, inputBytes);
    this.#pool.free(to, outputBytes);
    return result;
  }
}
