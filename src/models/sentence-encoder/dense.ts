/** Dense layers: everything of the model that is not attention. */
import { MatrixProduct, type PackedMatrix } from '../../backends/wasm/matrix-product.ts';

/** `x W + b` for x `[rows,inputs]`, W `[inputs,outputs]`, b `[outputs]`; all row-major float32. */
export interface Dense {
  readonly inputs: number;
  readonly outputs: number;
  apply(x: Float32Array, rows: number): Promise<Float32Array>;
}

/** One memory for all layers, made when the first of them is applied. */
let products: Promise<MatrixProduct> | undefined;

export function createDense(kernel: Float32Array, bias: Float32Array, inputs: number, outputs: number): Dense {
  let packed: PackedMatrix | undefined;

  async function apply(x: Float32Array, rows: number): Promise<Float32Array> {
    products ??= MatrixProduct.create();
    const product = await products;
    packed ??= product.pack(kernel, inputs, outputs);
    return product.multiply(x, rows, packed, bias);
  }

  return { inputs, outputs, apply };
}
